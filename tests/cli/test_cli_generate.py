from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.cli.conftest import Call

from sumuk.files.safetensors import read_header
from sumuk.files.tensors import from_header, write
from sumuk.generate.api import MINIATURE
from sumuk.generate.receipt import read_receipt

needs_miniature = pytest.mark.skipif(not MINIATURE.is_file(), reason="the miniature is not built yet")
FEW = ("--steps", 3, "--seed", 7)


def settings(path: str | Path) -> dict:
    return read_receipt(Path(path))[1]["settings"]


def test_text_to_image(call: Call, model_file: Path):
    said = call("generate", "a red heart, flat style", "-m", model_file, *FEW, "-o", "a.png")
    assert (said.code, said.out) == (0, "a.png  seed 7\n")
    assert settings("a.png")["prompt"] == "a red heart, flat style"
    assert said.err == "", "bars are for terminals"


def test_image_to_image_and_mask_and_replay(call: Call, model_file: Path, photo: Path, mask: Path):
    on = ("-m", model_file)
    assert (
        call("generate", "a fox", *on, "--steps", 5, "--init", photo, "--strength", 0.6, "-o", "b.png").code
        == 0
    )
    assert settings("b.png")["strength"] == 0.6
    said = call(
        "generate", "a fox", *on, *FEW, "--init", photo, "--mask", mask, "--mask-blur", 1, "-o", "c.png"
    )
    assert said.code == 0
    drawn, kept = (np.asarray(Image.open(each)) for each in ("c.png", photo))
    assert np.array_equal(drawn[:12], kept[:12]) and not np.array_equal(drawn[24:40], kept[24:40])
    assert call("replay", "c.png", *on, "--init", photo, "--mask", mask).out == "identical\n"
    said = call("replay", "c.png", *on)
    assert said.code == 2 and "give it with --init" in said.err


def test_every_flag_reaches_the_request(call: Call, model_file: Path, photo: Path):
    said = call(
        "generate", "a fox", "-m", model_file, "-o", "a.png", "-n", "the sea", "--width", 72, "--height", 64,
        "--steps", 4, "--solver", "euler a", "--grid", "karras", "--eta", 0.5, "--guidance", 3, "--rescale", 0.25,
        "--guidance-start", 0.1, "--guidance-end", 0.9, "--seed", 5, "--variation-seed", 6, "--variation", 0.5,
        "--clip-skip", 2, "--init", photo, "--strength", 0.5, "--hires", 1.5, "--hires-strength", 0.25,
        "--hires-steps", 8, "--mode", "fast", "--device", "cpu", "--dtype", "float32", "--prediction", "v",
    )  # fmt: skip
    assert said.code == 0, said.err
    _, receipt = read_receipt(Path("a.png"))
    init = receipt["settings"].pop("init")
    assert init["width"] == 64
    assert receipt["settings"] == {
        "prompt": "a fox", "negative": "the sea", "width": 72, "height": 64, "steps": 4,
        "solver": "euler-ancestral", "grid": "karras", "eta": 0.5, "guidance": 3.0, "rescale": 0.25,
        "guidance_start": 0.1, "guidance_end": 0.9, "seed": 5, "variation_seed": 6, "variation": 0.5, "count": 1,
        "clip_skip": 2, "strength": 0.5, "mask": None, "mask_blur": 2, "preview": 0,
        "label": None, "original": None, "crop": None, "hint": None, "steer": [], "loras": [], "hypers": [],
        "like": None, "noise_level": None, "quick": False,
        "skip_layers": [], "skip_scale": 2.5, "skip_start": 0.01, "skip_end": 0.2,
        "decoder_steps": None, "decoder_guidance": None, "refiner_start": None,
        "hires": {"scale": 1.5, "strength": 0.25, "steps": 8},
    }  # fmt: skip
    assert receipt["machine"]["mode"] == "fast" and receipt["model"]["prediction"] == "v"
    said = call("replay", "a.png", "-m", model_file, "--init", photo)
    assert (said.code, said.out) == (0, "identical\n"), "also with the prediction that was asked for"


def test_several_pictures_get_numbers(call: Call, model_file: Path):
    said = call("generate", "a fox", "-m", model_file, *FEW, "--count", 3, "-o", "a.png")
    assert said.out.split("\n")[:3] == ["a-1.png  seed 7", "a-2.png  seed 8", "a-3.png  seed 9"]
    assert [settings(f"a-{i}.png")["seed"] for i in (1, 2, 3)] == [7, 8, 9]
    assert call("replay", "a-3.png", "-m", model_file).out == "identical\n"


def test_without_a_seed_one_is_drawn_and_told(call: Call, model_file: Path):
    said = call("generate", "a fox", "-m", model_file, "--steps", 1, "-o", "a.png")
    assert said.out == f"a.png  seed {settings('a.png')['seed']}\n"


BAD = [
    (("--width", 100), "width: input should be a multiple of 8 (got 100)"),
    (("--solver", "eulr"), "unknown solver 'eulr'; did you mean 'euler'?"),
    (("--grid", "karass"), "did you mean 'karras'?"),
    (("--steps", 0), "steps: input should be greater than or equal to 1 (got 0)"),
    (("--steps", "few"), "'--steps'"),
    (("--guidance", "nan"), "guidance: input should be a finite number (got nan)"),
    (("--guidance", "inf"), "guidance: input should be a finite number (got inf)"),
    (("--seed", -1), "seed: input should be greater than or equal to 0 (got -1)"),
    (("--init", "none.png"), "no image at none.png"),
    (("--init", "photo.png", "--mask", "small.png"), "the mask is 32 x 32 but the init image 64 x 64"),
    (("--init", "photo.png", "--mask", "broken.png"), "mask: broken.png cannot be decoded"),
    (("--mask", "mask.png"), "a mask needs an init image"),
    (("--init", "picture.svg"), "init: picture.svg is no PNG, JPEG or WEBP picture"),
    (("--strength", 0.5), "strength 0.5 does nothing without an init image"),
    (("--hires-strength", 0.5), "--hires-strength does nothing without --hires"),
    (("--hires-steps", 5), "--hires-steps does nothing without --hires"),
    (("--variation-seed", 5), "variation_seed 5 does nothing without variation"),
    (("--guidance", 1, "--negative", "sea"), "a negative prompt does nothing at guidance 1"),
    (("--device", "cuda:77"), "device 'cuda:77' is not here; there is cpu"),
    (("--device", "moon"), "device 'moon' is not here; there is cpu"),
    (("--device", "meta"), "device 'meta' is not here; there is cpu"),
    (("--dtype", "int3"), "dtype 'int3' is not one of float32"),
    (("--prediction", "w"), "unknown prediction 'w'"),
    (("--mode", "quick"), "mode 'quick' is neither 'exact' nor 'fast'"),
    (("--model", "none.safetensors"), "none.safetensors"),
    (("--model", "photo.png"), "photo.png"),
    (("--model", "mask.safetensors"), "mask.safetensors"),
    (("--out", "no/a.png"), "the folder no does not exist; make it first"),
    (("--out", "a.jpg"), "a.jpg does not end in .png"),
    (("--out", "folder.png"), "folder.png is a folder; name a file in it"),
    (("--stepz", 3), "No such option: --stepz"),
    (("another",), "another"),
]


@pytest.mark.parametrize(("bad", "told"), BAD, ids=[" ".join(map(str, bad)) for bad, _ in BAD])
def test_bad_input_is_one_line_on_stderr_and_nothing_is_written(
    call: Call, model_file: Path, photo: Path, mask: Path, bad: tuple, told: str
):
    Image.open(mask).resize((32, 32)).save("small.png")
    Path("broken.png").write_bytes(mask.read_bytes()[:60])
    Path("picture.svg").write_text("<svg/>")
    Path("mask.safetensors").write_bytes(mask.read_bytes())
    Path("folder.png").mkdir()
    before = sorted(Path().rglob("*"))
    model = () if "--model" in bad else ("--model", model_file)
    said = call("generate", "a fox", *model, *bad)
    assert said.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("sumuk: ") and told in said.err, said.err
    assert len(said.err) < 400
    assert sorted(Path().rglob("*")) == before


def test_errors_that_come_while_drawing_are_told_alike(call: Call, model_file: Path):
    said = call("generate", "(a fox:[1.1|2000])", "-m", model_file, "--steps", 3, "-o", "a.png")
    assert said.code == 2 and said.err.strip().count("\n") == 0 and "2000" in said.err
    assert not list(Path().glob("*.png"))


def test_text_that_would_steer_a_terminal_is_not_passed_on(call: Call):
    said = call("generate", "a", "--solver", "\x1b[31m\nred")
    assert said.code == 2 and "\x1b" not in said.err and said.err.count("\n") == 1


def test_an_older_file_stays_when_nothing_comes(call: Call, model_file: Path):
    Path("a.png").write_bytes(b"old")
    call("generate", "(a:[1|2000])", "-m", model_file, "--steps", 3, "-o", "a.png")
    assert Path("a.png").read_bytes() == b"old"


# In processes of their own


def sumuk(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sumuk", *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@needs_miniature
def test_the_miniature_from_a_shell(tmp_path: Path):
    done = sumuk(
        tmp_path, "generate", "a red heart, flat style", "--seed", "7", "--steps", "3", "-o", "a.png"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "a.png  seed 7\n", "")
    done = sumuk(
        tmp_path,
        "generate",
        "초록색 하트",
        "--init",
        "a.png",
        "--strength",
        "0.6",
        "--steps",
        "4",
        "-o",
        "b.png",
    )
    assert done.returncode == 0, done.stderr
    done = sumuk(tmp_path, "replay", "a.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, "identical\n", "")


def test_bad_input_from_a_shell(tmp_path: Path):
    done = sumuk(tmp_path, "generate", "a", "--width", "100")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sumuk: width: input should be a multiple of 8 (got 100)\n"
    assert not list(tmp_path.iterdir())


def test_a_licence_that_binds_is_told_once(call: Call, model_file: Path):
    header = read_header(model_file)
    said = header.metadata | {"modelspec.license": "FLUX.1 [dev] Non-Commercial License"}
    write(Path("nc.safetensors"), from_header(header), said)
    told = call("generate", "a fox", "-m", "nc.safetensors", "--steps", 1, "-o", "a.png")
    assert told.code == 0 and told.err.count("\n") == 1
    assert told.err.startswith(
        "sumuk: licence FLUX.1-dev-Non-Commercial: the weights are not for commercial use"
    )
    assert read_receipt(Path("a.png"))[1]["licence"]["commercial"] == "no"
