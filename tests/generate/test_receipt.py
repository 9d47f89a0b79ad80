from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.generate.conftest import gap, pixels, refusal, run
from tests.weights.test_live import TO_K, lora_file

from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.files.tensors import lazy, write
from sumuk.generate.engine import Finished
from sumuk.generate.infotext import parse_infotext
from sumuk.generate.receipt import infotext, read_receipt, save_png
from sumuk.generate.request import image_digest
from sumuk.weights.guests import with_guests
from sumuk.weights.model import Model


@pytest.fixture
def drawn(model: Model) -> Finished:
    return run(model, {"prompt": "여우, (3d:1.2)", "negative": "the sea", "solver": "euler-a", "seed": 7})[0][
        0
    ]


def test_it_says_everything(model: Model, model_file: Path, drawn: Finished):
    told = drawn.receipt
    assert told["model"]["files"] == [
        {"name": model_file.name, "sha256": hashlib.sha256(model_file.read_bytes()).hexdigest()}
    ]
    assert told["model"]["family"] == "sd1/text-to-image" and told["model"]["prediction"] == "eps"
    assert told["model"]["licence"] == "CreativeML-OpenRAIL-M"
    assert told["settings"]["prompt"] == "여우, (3d:1.2)" and told["settings"]["negative"] == "the sea"
    assert {key: told["settings"][key] for key in ("seed", "steps", "solver", "grid", "guidance", "eta")} == {
        "seed": 7, "steps": 4, "solver": "euler-ancestral", "grid": "normal", "guidance": 7.5, "eta": 1.0,
    }  # fmt: skip
    machine = told["machine"]
    assert (machine["device"], machine["dtype"], machine["mode"]) == ("cpu", "float32", "exact")
    assert machine["threads"] == 1 and machine["torch"] == torch.__version__
    assert machine["processor"].endswith(torch.backends.cpu.get_cpu_capability())
    assert told["sumuk"] == version("sumuk")
    assert told["picture"] == {"width": 64, "height": 64, "sha256": image_digest(drawn.picture)}
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_the_licence_of_all_files_that_took_part(model: Model, drawn: Finished, tmp_path: Path):
    assert drawn.receipt["licence"] == {
        "name": "CreativeML-OpenRAIL-M",
        "commercial": "yes",
        "because": model.files[0].path.name,
        "stack": [{"file": model.files[0].path.name, "name": "CreativeML-OpenRAIL-M", "said": False}],
    }
    lora = lora_file(tmp_path / "ink.safetensors", model, TO_K)
    write(
        tmp_path / "w.safetensors",
        {"emb_params": lazy(torch.ones(2, 64))},
        {"modelspec.license": "CC-BY-NC-4.0"},
    )
    dressed = with_guests(
        model, loras={"ink": lora, "idle": lora}, embeddings={"wren": tmp_path / "w.safetensors"}
    )

    def told(prompt: str) -> tuple[str, str, str, list[str]]:
        found = run(dressed, {"prompt": prompt, "steps": 1})[0][0].receipt["licence"]
        return found["name"], found["commercial"], found["because"], [each["file"] for each in found["stack"]]

    base = model.files[0].path.name
    assert told("a fox") == ("CreativeML-OpenRAIL-M", "yes", base, [base])
    assert told("a fox <lora:ink:0.5>") == (
        "unknown",
        "unknown",
        "ink.safetensors",
        [base, "ink.safetensors"],
    )
    assert told("a wren <lora:ink:0.5>") == (
        "CC-BY-NC-4.0", "no", "w.safetensors", [base, "ink.safetensors", "w.safetensors"]
    )  # fmt: skip


def test_receipts_from_before_licences_are_read(drawn: Finished, tmp_path: Path):
    path = with_text(tmp_path / "a.png", changed(drawn.receipt, "licence", ...))
    assert "licence" not in read_receipt(path)[1]


def test_pictures_that_it_began_from_are_told_by_digest(model: Model, photo: Image.Image, hole: Image.Image):
    told = run(model, {"init": photo, "mask": hole})[0][0].receipt["settings"]
    assert told["init"] == {"width": 64, "height": 64, "sha256": image_digest(photo)}
    assert told["mask"] == {"width": 64, "height": 64, "sha256": image_digest(hole)}


def test_a_png_carries_both_texts(drawn: Finished, tmp_path: Path):
    path = tmp_path / "a.png"
    save_png(drawn.picture, drawn.receipt, path)
    with Image.open(path) as found:
        assert set(found.text) == {"parameters", "sumuk"}
        assert json.loads(found.text["sumuk"]) == drawn.receipt
        said = parse_infotext(found.text["parameters"])
    assert said.prompt == "여우, (3d:1.2)" and said.negative == "the sea"
    assert said.settings | {"Model hash": "", "Version": ""} == {
        "Steps": "4", "Sampler": "euler-ancestral", "Schedule type": "normal", "CFG scale": "7.5", "Seed": "7",
        "Size": "64x64", "Model hash": "", "Model": "Stable Diffusion 1.x", "Eta": "1", "RNG": "CPU", "Version": "",
    }  # fmt: skip
    assert said.settings["Model hash"] == drawn.receipt["model"]["files"][0]["sha256"][:10]
    picture, receipt = read_receipt(path)
    assert gap(picture, drawn.picture) == 0 and receipt == drawn.receipt


def test_the_infotext_says_what_else_was_set(model: Model, photo: Image.Image, hole: Image.Image):
    def said(**values: Any) -> dict[str, str]:
        return parse_infotext(infotext(run(model, values)[0][0].receipt)).settings

    found = said(hires={"scale": 1.5}, clip_skip=2, rescale=0.5, variation=0.25, variation_seed=9)
    assert found["Size"] == "64x64", "of the first pass, as in A1111"
    assert found["Hires upscale"] == "1.5" and found["Hires steps"] == "4"
    assert found["Denoising strength"] == "0.5" and found["Clip skip"] == "2"
    assert found["Variation seed"] == "9" and found["Variation seed strength"] == "0.25"
    assert found["CFG Rescale"] == "0.5"
    found = said(init=photo, mask=hole, mask_blur=3, strength=0.75, guidance_start=0.1, hires={"scale": 1.5})
    assert found["Denoising strength"] == "0.75" and found["Hires strength"] == "0.5"
    assert found["Mask blur"] == "3" and found["Guidance start"] == "0.1" and found["Guidance end"] == "1"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.jpg", "does not end in .png"),
        ("a", "does not end in .png"),
        ("no/a.png", "the folder .*no does not exist; make it first"),
        ("folder.png", "is a folder"),
    ],
)
def test_bad_targets(drawn: Finished, tmp_path: Path, name: str, told: str):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadInput, match=told):
        save_png(drawn.picture, drawn.receipt, tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == ["folder.png"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    drawn: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(image: Image.Image, file: Any, *rest: Any, **more: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert "No space left on device" in refusal(lambda: save_png(drawn.picture, drawn.receipt, path))
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_killed_while_saving(tmp_path: Path):
    """Whatever happens, the name holds the old file or the whole new one."""
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    code = f"""
        import os, signal
        from pathlib import Path
        from PIL import Image
        from sumuk.generate.receipt import save_png
        def killed(image, file, *rest, **more):
            file.write(b"half"); file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        Image.Image.save = killed
        save_png(Image.new("RGB", (8, 8)), None, Path({str(path)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


# Receipts from elsewhere


def with_text(path: Path, text: str | None, key: str = "sumuk", size: tuple[int, int] = (8, 8)) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_itxt(key, text)
    Image.new("RGB", size).save(path, pnginfo=info)
    return path


def changed(receipt: dict[str, Any], place: str, value: Any) -> str:
    """The receipt as text, with another value at a place; ``...`` takes it out."""
    copy = json.loads(json.dumps(receipt))
    *above, last = place.split(".")
    inner = copy
    for each in above:
        inner = inner[int(each)] if isinstance(inner, list) else inner[each]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(copy)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("receipt", 2, "has receipt format 2; this version of Sumuk reads 1"),
        ("receipt", 10**30, "has receipt format 1000000"),
        ("receipt", "1", "damaged: receipt: input should be a valid integer"),
        ("receipt", True, "damaged: receipt"),
        ("receipt", ..., "damaged: receipt: field required"),
        ("numerics", None, "damaged: numerics"),
        ("model", [], "damaged: model"),
        ("model.files", {}, "damaged: model.files: input should be a valid list"),
        ("model.files", [3], "damaged: model.files.0"),
        ("model.files", [{"name": "a"}], "damaged: model.files.0.sha256: field required"),
        ("model.files", [{"name": "a", "sha256": "x" * 64}], "damaged: model.files.0.sha256"),
        ("model.prediction", ..., "damaged: model.prediction"),
        ("settings", "all", "damaged: settings"),
        ("machine", ..., "damaged: machine: field required"),
        ("machine.device", 3, "damaged: machine.device"),
        ("machine.device", "c" * 1001, "damaged: machine.device"),
        ("machine.mode", "quick", "damaged: machine.mode"),
        ("machine.threads", float("nan"), "damaged: NaN is no number"),
        ("picture.sha256", None, "damaged: picture.sha256"),
        ("picture", {"sha256": {}}, "damaged: picture.sha256"),
    ],
)
def test_damaged_receipts(drawn: Finished, tmp_path: Path, place: str, value: Any, told: str):
    path = with_text(tmp_path / "a.png", changed(drawn.receipt, place, value))
    line = refusal(lambda: read_receipt(path))
    assert told in line and str(path) in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "damaged"),
        ("9" * 5000, "damaged"),
        ("[]", "damaged: it is a list"),
        ("null", "damaged: it is a NoneType"),
        ('{"receipt": Infinity}', "damaged: Infinity is no number"),
        ("x" * 1_000_001, "has 1,000,001 characters; at most 1,000,000"),
    ],
    ids=["empty", "half", "deep list", "deep object", "long number", "list", "null", "infinity", "long"],
)
def test_hostile_receipts(tmp_path: Path, text: str, told: str):
    path = with_text(tmp_path / "a.png", text)
    assert told in refusal(lambda: read_receipt(path))


def test_pictures_without_a_receipt(tmp_path: Path):
    with pytest.raises(BadFile, match="carries no Sumuk receipt"):
        read_receipt(with_text(tmp_path / "a.png", None))
    with pytest.raises(BadFile, match="carries no Sumuk receipt"):
        read_receipt(with_text(tmp_path / "b.png", "a fox", key="parameters"))
    with pytest.raises(MissingFile):
        read_receipt(tmp_path / "c.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "d.jpg")
    with pytest.raises(BadFile, match="is no PNG picture"):
        read_receipt(tmp_path / "d.jpg")
    (tmp_path / "e.png").write_bytes(with_text(tmp_path / "f.png", "{}").read_bytes()[:60])
    with pytest.raises(BadFile):
        read_receipt(tmp_path / "e.png")
    with pytest.raises(BadInput, match="pixels"):
        read_receipt(with_text(tmp_path / "g.png", "{}", size=(4097, 4096)))


def test_what_a_later_version_adds_is_passed_over(drawn: Finished, tmp_path: Path):
    path = with_text(tmp_path / "a.png", changed(drawn.receipt, "machine.moon", "full"))
    assert read_receipt(path)[1]["machine"]["moon"] == "full"
    assert pixels(read_receipt(path)[0]).shape == (8, 8, 3)
