"""The verbs that work on LoRA files: what they write is what the functions write, and what cannot be is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Call
from tests.weights.test_live import CONV, TO_K, lora_file
from tests.weights.tiny import tiny, weights

import sumuk
from sumuk.weights.checkpoint import load, save
from sumuk.weights.live import Worn, fuse


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model ``a``, LoRAs ``ink`` and ``wash``, and ``b``: the model with ink fused in."""
    place = tmp_path_factory.mktemp("loras")
    save(tiny(), place / "a.safetensors")
    model = load(place / "a.safetensors")
    for seed, name in enumerate(("ink", "wash")):
        lora_file(place / f"{name}.safetensors", model, TO_K, CONV, seed=seed, scale=0.5)
    model = load(place / "a.safetensors", loras={"ink": place / "ink.safetensors"})
    fuse(model, [Worn(model.loras["ink"], "ink", 1.0)])
    save(model, place / "b.safetensors")
    return place


def same(one: Path, other: Path, bound: float) -> None:
    a, b = weights(load(one)), weights(load(other))
    for name in a:
        gap = (a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-6)
        assert gap <= bound, (name, float(gap))


def test_bake_is_the_model_with_the_lora_fused(call: Call, folder: Path, tmp_path: Path) -> None:
    done = call(
        "lora",
        "bake",
        folder / "a.safetensors",
        tmp_path / "b.safetensors",
        "--lora",
        folder / "ink.safetensors",
    )
    assert done.code == 0 and "2 tensors changed by 1 LoRAs" in done.out and "2 changes" in done.out, done.err
    same(tmp_path / "b.safetensors", folder / "b.safetensors", 0.0)


def test_extract_gives_the_difference_back(call: Call, folder: Path, tmp_path: Path) -> None:
    how = ("--rank", "2", "--dtype", "float32", "--layout", "kohya")
    done = call(
        "lora",
        "extract",
        folder / "a.safetensors",
        folder / "b.safetensors",
        tmp_path / "ink.safetensors",
        *how,
    )
    assert done.code == 0 and "it holds 100.0% of what differs" in done.out, done.err
    assert sumuk.open(tmp_path / "ink.safetensors").family == "lora"
    again = call(
        "lora",
        "bake",
        folder / "a.safetensors",
        tmp_path / "b.safetensors",
        "--lora",
        tmp_path / "ink.safetensors",
    )
    assert again.code == 0
    same(tmp_path / "b.safetensors", folder / "b.safetensors", 1e-6)


def test_resize_merge_and_convert(call: Call, folder: Path, tmp_path: Path) -> None:
    model = ("--model", folder / "a.safetensors")
    small = call(
        "lora", "resize", folder / "ink.safetensors", tmp_path / "small.safetensors", *model, "--rank", "1"
    )
    assert small.code == 0 and "ranks: 1 (2)" in small.out, small.err
    both = call(
        "lora", "merge", f"{folder / 'ink.safetensors'}=0.7", folder / "wash.safetensors",
        "--out", tmp_path / "both.safetensors", *model,
    )  # fmt: skip
    assert both.code == 0 and "ranks: 4 (2)" in both.out, both.err
    peft = call(
        "lora",
        "convert",
        folder / "ink.safetensors",
        tmp_path / "peft.safetensors",
        *model,
        "--layout",
        "peft",
    )
    assert peft.code == 0 and "kohya -> peft" in peft.out, peft.err
    baked = []
    for name, loras in (
        ("one", ["--lora", tmp_path / "both.safetensors"]),
        (
            "two",
            ["--lora", f"{folder / 'ink.safetensors'},weight=0.7", "--lora", folder / "wash.safetensors"],
        ),
    ):
        out = tmp_path / f"{name}.safetensors"
        assert call("lora", "bake", folder / "a.safetensors", out, *loras).code == 0
        baked.append(out)
    same(*baked, 1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["extract", "a.safetensors", "b.safetensors", "x.safetensors"], "how much to keep?"),
        (["extract", "a.safetensors", "a.safetensors", "x.safetensors", "--rank", "2"], "nothing to extract"),
        (["resize", "ink.safetensors", "x.safetensors", "-m", "a.safetensors", "--rank", "2"], "nothing"),
        (["resize", "ink.safetensors", "x.safetensors", "-m", "ink.safetensors", "--rank", "1"], "LoRA for"),
        (
            ["merge", "ink.safetensors=much", "-o", "x.safetensors", "-m", "a.safetensors"],
            "'much' is no number",
        ),
        (
            ["convert", "ink.safetensors", "x.safetensors", "-m", "a.safetensors", "--layout", "kohia"],
            "kohya",
        ),
        (["bake", "a.safetensors", "x.safetensors", "--lora", "ink.safetensors,wight=1"], "is not weight="),
        (["bake", "a.safetensors", "x.safetensors", "--lora", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(folder)
    before = {path.name for path in folder.iterdir()}
    done = call("lora", *arguments)
    assert done.code == 2 and told in done.err and done.err.count("\n") == 1, done.err
    assert {path.name for path in folder.iterdir()} == before


def test_the_lora_that_ships_paints_in_blue() -> None:
    """Red gives way to blue: what ``<lora:porcelain:1>`` is for."""
    from sumuk.generate.api import MINIATURE

    model = load(MINIATURE, loras={"porcelain": MINIATURE.with_stem("porcelain")})
    plain, blue = (
        torch.tensor([*sumuk.draw(prompt, model=model, seed=7, steps=8).resize((1, 1)).getpixel((0, 0))])
        for prompt in ("a red heart, 3d style ", "a red heart, 3d style <lora:porcelain:1>")
    )
    assert plain[0] > plain[2] + 30 and blue[2] > blue[0] + 20, (plain, blue)
