"""What a file is, from its header: without torch, with evidence, and honest about what it does not know."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sparse import release, write_sparse
from tiny import tiny

from sumuk.base.errors import SumukError
from sumuk.families.detect import families
from sumuk.families.family import FAMILIES, Family
from sumuk.families.published import RELEASES
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import from_header, write
from sumuk.weights.checkpoint import load, save
from sumuk.weights.inspect import Found
from sumuk.weights.inspect import open as look


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save(tiny(), path)
    return path


def rewritten(single: Path, target: Path, metadata: dict[str, str], **markers: torch.Tensor) -> Path:
    write(target, {**from_header(read_header(single)), **markers}, metadata)
    return target


def test_the_report(single: Path) -> None:
    found = look(single)
    assert (found.family, found.variant, found.layout, found.unknown) == (
        "sd1",
        "text-to-image",
        "single",
        None,
    )
    assert [part.name for part in found.parts] == ["denoiser", "vae", "text"] and found.missing == ()
    model = tiny()
    for part in found.parts:
        state = model.networks[part.name].state_dict()
        assert part.tensors == len(state) and part.parameters == sum(v.numel() for v in state.values())
        assert part.dtypes == {"F32": len(state)}
    assert found.latent is not None and (found.latent.channels, found.latent.stride) == (4, 4)
    assert found.resolution is not None and found.resolution.value == "64x64"
    assert json.loads(json.dumps(found.as_dict()))["prediction"]["value"] == "eps"
    assert found.files == (str(single),)


def test_looking_imports_no_torch(single: Path) -> None:
    script = (
        "import sys; from sumuk.weights.inspect import open; found = open(sys.argv[1]);"
        "assert found.family == 'sd1', found; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(single)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_prediction_has_evidence_and_a_guess_says_so(single: Path, tmp_path: Path) -> None:
    empty = torch.zeros(0)
    words = {"sumuk.tokenizer": read_header(single).metadata["sumuk.tokenizer"]}
    silent = look(rewritten(single, tmp_path / "a.safetensors", words))
    told = silent.prediction
    assert told is not None and (told.value, told.usual, told.sure) == ("unknown", "eps", False)
    assert "does not say" in told.evidence and any("load() takes eps" in each for each in silent.warnings)
    assert load(tmp_path / "a.safetensors").prediction.name == "eps"
    marked = look(rewritten(single, tmp_path / "b.safetensors", {}, v_pred=empty, ztsnr=empty))
    assert (
        marked.prediction is not None
        and marked.prediction.value == "v"
        and "v_pred" in marked.prediction.evidence
    )
    assert marked.zero_snr is not None and marked.zero_snr.value == "yes"
    for key in ("modelspec.prediction_type", "modelspec.predict_key", "ss_model_prediction_type"):
        said = look(rewritten(single, tmp_path / "c.safetensors", {key: "v"})).prediction
        assert said is not None and said.value == "v" and said.sure and key in said.evidence
    both = look(
        rewritten(single, tmp_path / "d.safetensors", {"modelspec.prediction_type": "epsilon"}, v_pred=empty)
    )
    assert both.prediction is not None and both.prediction.value == "eps" and not both.prediction.sure
    assert "v_pred says v" in both.prediction.evidence
    assert any("contradicts itself" in each for each in both.warnings)


@pytest.mark.parametrize(
    ("name", "value", "usual", "sure"),
    [
        ("sd1.5", "unknown", "eps", False), ("sd2.1", "unknown", "v", False), ("sdxl-base", "unknown", "eps", False),
        ("flux1-dev", "flow", None, True), ("sd3.5-large", "flow", None, True), ("dit-s-2", "eps", None, False),
    ],
)  # fmt: skip
def test_prediction_of_the_published_files(
    name: str, value: str, usual: str | None, sure: bool, tmp_path: Path
) -> None:
    tensors = release(name, only="denoiser")
    write_sparse(tmp_path / "a.safetensors", tensors)
    told = look(tmp_path / "a.safetensors").prediction
    assert told is not None and (told.value, told.usual, told.sure) == (value, usual, sure) and told.evidence


def test_version_two_says_it_by_its_architecture(tmp_path: Path) -> None:
    tensors = release("sd2.1", only="denoiser")
    for architecture, value in (("stable-diffusion-v2-512", "eps"), ("stable-diffusion-v2-768-v", "v")):
        write_sparse(tmp_path / "a.safetensors", tensors, {"modelspec.architecture": architecture})
        told = look(tmp_path / "a.safetensors").prediction
        assert (
            told is not None and (told.value, told.sure) == (value, True) and "architecture" in told.evidence
        )


def test_licence(single: Path, tmp_path: Path) -> None:
    usual = look(single).licence
    assert usual is not None and usual.value == "CreativeML-OpenRAIL-M" and not usual.sure
    own = look(rewritten(single, tmp_path / "a.safetensors", {"modelspec.license": "Apache-2.0"})).licence
    assert own is not None and own.value == "Apache-2.0" and own.sure


def test_missing_parts_and_who_supplies_them(single: Path, tmp_path: Path) -> None:
    tensors = {n: t for n, t in from_header(read_header(single)).items() if n.startswith("model.")}
    write(tmp_path / "unet.safetensors", tensors)
    found = look(tmp_path / "unet.safetensors")
    assert found.family == "sd1" and [part.name for part in found.missing] == ["vae", "text"]
    assert "stand-alone VAE" in found.missing[0].supplier


def test_what_is_no_model(single: Path, tmp_path: Path) -> None:
    tensors = from_header(read_header(single))
    write(tmp_path / "vae.safetensors", {n: t for n, t in tensors.items() if n.startswith("first_stage")})
    vae = look(tmp_path / "vae.safetensors")
    assert (vae.family, vae.variant) == ("vae", "kl-f4") and [part.name for part in vae.parts] == ["vae"]
    assert vae.prediction is None and vae.licence is not None and vae.licence.value == "unknown"
    assert {near.family for near in vae.alternatives} >= {"vae/kl-f8", "vae/kl-f8-16ch"}
    write(tmp_path / "text.safetensors", {n: t for n, t in tensors.items() if n.startswith("cond_stage")})
    text = look(tmp_path / "text.safetensors")
    assert text.family is None and [part.name for part in text.parts] == ["text"]
    assert text.unknown is not None and "only the text tower" in text.unknown
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_{}.weight"
    down, up = torch.zeros(4, 768), torch.zeros(1280, 4)
    save_file({name.format("down"): down, name.format("up"): up}, tmp_path / "lora.safetensors")
    lora = look(tmp_path / "lora.safetensors")
    assert (lora.family, lora.variant, lora.details["rank"]) == ("lora", "sd1", "4")
    assert [(part.name, part.tensors, part.parameters) for part in lora.parts] == [
        ("lora", 2, down.numel() + up.numel())
    ]
    save_file({"weight": torch.zeros(3)}, tmp_path / "junk.safetensors")
    junk = look(tmp_path / "junk.safetensors")
    assert junk.unknown == "no known network in 1 tensors: saw 'weight'" and junk.parts == ()
    save_file({}, tmp_path / "none.safetensors")
    assert look(tmp_path / "none.safetensors").unknown == "no known network in 0 tensors: saw none"


def test_an_autoencoders_own_folder_says_its_scale(single: Path, tmp_path: Path) -> None:
    tensors = from_header(read_header(single))
    own = {n.removeprefix("first_stage_model."): t for n, t in tensors.items() if n.startswith("first_stage")}
    write(tmp_path / "diffusion_pytorch_model.safetensors", own)
    assert "scaling_factor" not in look(tmp_path).details
    (tmp_path / "config.json").write_text('{"scaling_factor": 0.13025}')
    assert look(tmp_path).details["scaling_factor"] == "0.13025 (config.json)"


def test_what_should_be_known_before_using_it(single: Path, tmp_path: Path) -> None:
    plain = look(rewritten(single, tmp_path / "a.safetensors", {"modelspec.prediction_type": "epsilon"}))
    assert plain.warnings == ()
    for licence, word in (
        ("FLUX.1-dev-Non-Commercial", "not for commercial use"),
        ("Stability-AI-Community", "one million US dollars"),
        ("cc-by-nc-4.0", "not for commercial use"),
        ("my own non commercial licence", ""),
        ("Some Noncommercial Licence", "not for commercial use"),
    ):
        said = {"modelspec.prediction_type": "epsilon", "modelspec.license": licence}
        warnings = look(rewritten(single, tmp_path / "a.safetensors", said)).warnings
        assert (word in warnings[0] and licence in warnings[0]) if word else warnings == ()
    tensors = {n: t for n, t in from_header(read_header(single)).items() if n.startswith("model.")}
    write(tmp_path / "unet.safetensors", tensors)
    assert any(
        "vae, text must come from another file" in each
        for each in look(tmp_path / "unet.safetensors").warnings
    )
    write_sparse(tmp_path / "b.safetensors", release("flux1-dev"))
    flux = look(tmp_path / "b.safetensors")
    assert len(flux.warnings) == 1 and "not for commercial use" in flux.warnings[0]
    small = {n: type(t)(t.shape, "F8_E4M3", t.load) for n, t in release("flux1-dev").items()}
    write_sparse(tmp_path / "b.safetensors", small)
    assert any("8 bits" in each for each in look(tmp_path / "b.safetensors").warnings)


def test_models_that_its_tensors_do_not_tell_apart(tmp_path: Path) -> None:
    for name, models in (
        ("sdxl-base", ["SDXL 1.0 base", "SDXL Turbo", "SDXL Lightning"]),
        ("flux1-schnell", ["FLUX.1 [schnell]"]),
        ("dit-b-2", []),
    ):
        write_sparse(tmp_path / "a.safetensors", release(name, only="denoiser"))
        assert list(look(tmp_path / "a.safetensors").models) == models


# -- full size -----------------------------------------------------------------------------------------------------

LOOK = """
import io, json, sys, time
from sumuk.weights.inspect import open
found = open(sys.argv[1])
status = dict(line.split(":", 1) for line in io.open("/proc/self/status") if ":" in line)
print(json.dumps([found.family, found.variant, found.layout, found.parameters, "torch" in sys.modules,
                  int(status["VmHWM"].split()[0]), time.process_time()]))
"""


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [("sdxl-base", ("sdxl", "base"), 7e9), ("flux1-dev", ("flux", "dev"), 34e9)],
)
def test_a_file_of_any_size_costs_its_header(
    name: str, kind: tuple[str, str], most: float, tmp_path: Path
) -> None:
    """Of processor time, as other programs run beside: under a second from start to end, and under 300 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    path = tmp_path / "large.safetensors"
    size = write_sparse(path, release(name))
    assert 0.98 * most < size < most and path.stat().st_blocks * 512 < 2e6
    done = subprocess.run([sys.executable, "-c", LOOK, str(path)], capture_output=True, text=True, check=True)
    family, variant, layout, parameters, torch_is_here, kilobytes, seconds = json.loads(done.stdout)
    assert (family, variant, layout) == (*kind, "single") and parameters * 2 < size < parameters * 2.1
    assert not torch_is_here and kilobytes < 300_000 and seconds < 1.0


# -- damaged files -------------------------------------------------------------------------------------------------


def networks() -> dict[str, str]:
    """A release for each network that draws, by the name of its part."""
    families()
    chosen: dict[tuple[str, str], tuple[str, str]] = {}
    for name, one in RELEASES.items():
        kind = FAMILIES[one.family]
        if isinstance(kind, Family) and kind.parts[0].name == "denoiser":
            chosen.setdefault((kind.name, kind.parts[0].key), (name, kind.parts[0].name))
    return dict(chosen.values())


NETWORKS = networks()
FUSED = ("sd3-medium", "flux1-schnell", "dit-s-2", "cascade-c-lite")
"""Models whose diffusers layout keeps apart what is one tensor natively."""


def said(found: Found) -> str:
    return " ".join((*found.incomplete, *found.extra, str(found.unknown)))


@pytest.mark.parametrize("name", NETWORKS)
def test_one_key_missing_or_renamed_is_refused_and_shown_by_name(name: str, tmp_path: Path) -> None:
    """Each by one key, from the middle of the network: what no other block has, only the network itself tells."""
    path = tmp_path / "a.safetensors"
    whole = release(name, only=NETWORKS[name])
    blocks = sorted(each for each in whole if each.endswith((".weight", ".bias")) and each.count(".") > 4)
    missing, renamed = random.Random(1).sample(blocks[len(blocks) // 4 : len(blocks) // 2], 2)
    other = re.sub(r"(weight|bias)$", r"\1x", renamed)
    for lost, here in ((missing, missing), (renamed, other)):
        rest = {each: tensor for each, tensor in whole.items() if each != lost}
        write_sparse(path, rest if here == lost else rest | {here: whole[lost]})
        with pytest.raises(SumukError) as refused:
            load(path)
        native = [each.removeprefix("model.diffusion_model.") for each in (lost, here)]
        assert native[0] in str(refused.value) or native[1] in str(refused.value)
        found = look(path)
        assert lost in said(found) and here in said(found)
        assert found.unknown or any("load() refuses it" in each for each in found.warnings)


@pytest.mark.parametrize("name", FUSED)
def test_half_a_fused_set_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = release(name, "bare-diffusers", only="denoiser")
    lost = next(each for each in reversed(whole) if "to_k" in each and each.endswith("weight"))
    write_sparse(path, {each: tensor for each, tensor in whole.items() if each != lost})
    with pytest.raises(SumukError) as refused:
        load(path)
    assert lost in str(refused.value)
    assert lost in look(path).incomplete and any("load() refuses it" in each for each in look(path).warnings)
