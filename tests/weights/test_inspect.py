"""What a file is, from its header: without torch, with evidence, and honest about what it does not know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny

from sumuk.files.safetensors import read_header
from sumuk.files.tensors import from_header, write
from sumuk.weights.checkpoint import save
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
    silent = look(rewritten(single, tmp_path / "a.safetensors", {})).prediction
    assert (
        silent is not None and silent.value == "eps" and not silent.sure and "does not say" in silent.evidence
    )
    marked = look(rewritten(single, tmp_path / "b.safetensors", {}, v_pred=empty, ztsnr=empty))
    assert (
        marked.prediction is not None
        and marked.prediction.value == "v"
        and "v_pred" in marked.prediction.evidence
    )
    assert marked.zero_snr is not None and marked.zero_snr.value == "yes"
    said = look(rewritten(single, tmp_path / "c.safetensors", {"modelspec.prediction_type": "v"})).prediction
    assert said is not None and said.value == "v" and said.sure
    both = look(
        rewritten(single, tmp_path / "d.safetensors", {"modelspec.prediction_type": "epsilon"}, v_pred=empty)
    )
    assert both.prediction is not None and both.prediction.value == "eps" and not both.prediction.sure
    assert "v_pred says v" in both.prediction.evidence


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
    assert vae.family is None and [part.name for part in vae.parts] == ["vae"]
    assert vae.unknown is not None and "only the autoencoder" in vae.unknown
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    lora = look(tmp_path / "lora.safetensors")
    assert lora.family is None and lora.unknown is not None and "LoRA" in lora.unknown
    save_file({"weight": torch.zeros(3)}, tmp_path / "junk.safetensors")
    junk = look(tmp_path / "junk.safetensors")
    assert junk.unknown == "no known network in 1 tensors: saw 'weight'" and junk.parts == ()
    save_file({}, tmp_path / "none.safetensors")
    assert look(tmp_path / "none.safetensors").unknown == "no known network in 0 tensors: saw none"
