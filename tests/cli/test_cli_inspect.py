"""``sumuk inspect`` and ``sumuk models``: what is said, to people and to programs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.cli.conftest import Call
from tests.weights.sparse import release, write_sparse

from sumuk.families.detect import families
from sumuk.families.family import FAMILIES
from sumuk.families.lineage import LINEAGE

KEYS = (
    "path", "family", "variant", "title", "layout", "parts", "missing", "details", "models", "prediction", "zero_snr",
    "ema", "latent", "licence", "resolution", "metadata", "ignored", "extra", "incomplete", "alternatives", "warnings",
    "unknown", "notes", "files", "parameters", "hashes",
)  # fmt: skip
"""Of the JSON; programs rely on them."""


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    path = tmp_path / "flux.safetensors"
    write_sparse(path, release("flux1-dev"))
    return path


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    path = tmp_path / "unet.safetensors"
    write_sparse(path, release("sdxl-base", "bare-diffusers", only="denoiser"))
    return path


def flat(text: str) -> str:
    """Without the breaks of lines."""
    return " ".join(text.split())


def test_the_json(call: Call, flux: Path):
    said = call("inspect", flux, "--json")
    found = json.loads(said.out)
    assert said.code == 0 and said.err == "" and tuple(sorted(found)) == tuple(sorted(KEYS))
    assert (found["family"], found["variant"], found["layout"]) == ("flux", "dev", "single")
    assert found["parts"][0] == {
        "name": "denoiser", "title": "transformer", "tensors": 780, "parameters": 11_901_408_320,
        "dtypes": {"BF16": 780},
    }  # fmt: skip
    assert [part["name"] for part in found["parts"]] == ["denoiser", "vae", "text", "text_2"]
    assert (
        found["missing"] == [] and found["unknown"] is None and found["hashes"] is None and found["ema"] == 0
    )
    assert found["prediction"]["value"] == "flow" and found["prediction"]["evidence"]
    assert found["latent"] == {"channels": 16, "stride": 8, "scale": 0.3611, "shift": 0.1159}
    assert (
        found["licence"]["value"] == "FLUX.1-dev-Non-Commercial"
        and "not for commercial" in found["warnings"][0]
    )
    assert {near["family"] for near in found["alternatives"]} == {"flux/schnell", "flux/fill", "flux/control"}
    assert found["models"] == ["FLUX.1 [dev]", "FLUX.1 Krea [dev]", "FLUX.1 Kontext [dev]"]


def test_what_is_not_known_is_unknown(call: Call, unet: Path):
    found = json.loads(call("inspect", unet, "--json").out)
    assert found["prediction"] | {"evidence": ""} == {
        "value": "unknown", "usual": "eps", "sure": False, "evidence": "",
    }  # fmt: skip
    assert [part["name"] for part in found["missing"]] == ["vae", "text", "text_2"]
    assert all(part["supplier"] for part in found["missing"])
    save_file({"weight": torch.zeros(3)}, "junk.safetensors")
    junk = json.loads(call("inspect", "junk.safetensors", "--json").out)
    assert junk["family"] is None and junk["unknown"] and junk["parts"] == [] and junk["prediction"] is None
    said = call("inspect", "junk.safetensors")
    assert said.code == 0 and "unknown: no known network in 1 tensors" in said.out


def test_the_table(call: Call, flux: Path, unet: Path):
    said = flat(call("inspect", flux).out)
    for words in (
        "what it is", "parts", "evidence", "warnings",
        "flux, dev: FLUX.1 [dev]",
        "one of FLUX.1 [dev], FLUX.1 Krea [dev], FLUX.1 Kontext [dev]",
        "parameters 16,870,599,139",
        "latent 16 channels, 8 pixels a cell, scale 0.3611, shift 0.1159",
        "denoiser transformer: 11,901,408,320 parameters in 780 tensors (780 BF16)",
        "predicts flow; FLUX.1 [dev] is a flow",
        "considered flux/schnell: the transformer takes a guidance scale",
        "warning licence FLUX.1-dev-Non-Commercial",
    ):  # fmt: skip
        assert words in said, words
    assert "zero SNR" not in said and "AutoV2" not in said
    said = flat(call("inspect", unet).out)
    for words in (
        "layout bare-diffusers",
        "predicts unknown (usually eps); the file does not say",
        "vae autoencoder: not here; supplied by any SDXL checkpoint",
        "warning it is not whole: vae, text, text_2 must come from another file",
        "averages none beside the plain weights",
    ):
        assert words in said, words


def test_what_is_missing_and_what_is_too_much_is_shown(call: Call, tmp_path: Path):
    tensors = release("flux1-schnell", only="denoiser")
    lost = "model.diffusion_model.double_blocks.5.img_attn.qkv.weight"
    odd = tensors.pop(lost)
    write_sparse(tmp_path / "a.safetensors", {**tensors, "strange.weight": odd})
    found = json.loads(call("inspect", "a.safetensors", "--json").out)
    assert found["incomplete"] == [lost] and found["extra"] == ["strange.weight"]
    said = flat(call("inspect", "a.safetensors").out)
    assert f"it lacks 1 tensors that it should have: '{lost}'; load() refuses it" in said
    assert "1 tensors have no place in it: 'strange.weight'" in said


def test_hashes_are_read_when_asked_for(call: Call, model_file: Path):
    whole = hashlib.sha256(model_file.read_bytes()).hexdigest()
    found = json.loads(call("inspect", model_file, "--json", "--hashes").out)
    told = found["hashes"][str(model_file)]
    assert (told["sha256"], told["autov2"]) == (whole, whole[:10]) and len(told["autov3"]) == 12
    said = flat(call("inspect", model_file, "--hashes").out)
    assert f"AutoV2 {whole[:10]}, AutoV3 {told['autov3']}" in said


def test_an_adapter_tells_its_own(call: Call):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_{}.weight"
    tensors = {name.format("down"): torch.zeros(4, 768), name.format("up"): torch.zeros(1280, 4)}
    save_file(tensors, "lora.safetensors", {"ss_base_model_version": "sd_v1"})
    said = flat(call("inspect", "lora.safetensors").out)
    for words in ("lora, sd1: LoRA for Stable Diffusion 1.x", "layout kohya", "rank 4", "layers 1 of the denoiser",
                  "licence unknown", "ss_base_model_version: sd_v1"):  # fmt: skip
        assert words in said, words
    assert "averages" not in said and "predicts" not in said


def test_looking_costs_little(flux: Path):
    """The command itself, whole: no torch, less than a second of processor time, less than 300 MB."""
    code = (
        "import io, sys, time\n"
        f"sys.argv = ['sumuk', 'inspect', {str(flux)!r}]\n"
        "from sumuk.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "peak = [line for line in io.open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]\n"
        "print('torch' in sys.modules, peak, time.process_time(), file=sys.stderr)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch_is_here, kilobytes, seconds = done.stderr.split()
    assert torch_is_here == "False" and int(kilobytes) < 300_000 and float(seconds) < 1.0
    assert flux.stat().st_size > 24e9


# -- models --------------------------------------------------------------------------------------------------------


def test_the_list_of_models(call: Call):
    said = call("models")
    lines = said.out.splitlines()
    assert said.code == 0 and max(map(len, lines)) <= 100
    rows = {line.split()[0]: line for line in lines if line.strip()}
    for name in LINEAGE:
        known = LINEAGE[name]
        assert str(known.year) in rows[name] and rows[name].rstrip().endswith(known.status), name
    assert "~" not in said.out and "2.57B" in rows["sdxl"] and "CLIP L, bigG" in rows["sdxl"]


def test_one_model_in_full(call: Call):
    said = flat(call("models", "flux-kontext").out)
    for words in ("FLUX.1 Kontext [dev]", "2025, Black Forest Labs", "licence FLUX.1-dev-Non-Commercial", "good for",
                  "not for", "family flux/dev", "Sumuk draws with it"):  # fmt: skip
        assert words in said, words
    assert "cannot draw with it" in flat(call("models", "score-sde").out)
    said = call("models", "flux-dex")
    assert said.code == 2 and "did you mean 'flux-dev'" in said.err


def test_models_as_json(call: Call):
    families()
    every = json.loads(call("models", "--json").out)
    assert [one["name"] for one in every] == list(LINEAGE)
    for one in every:
        assert (one["status"] == "no") == (one["family"] not in FAMILIES)
    one = json.loads(call("models", "SDXL", "--json").out)
    assert one["name"] == "sdxl" and one["counts"] == [2_567_463_684] and one["commercial"] == "yes"
