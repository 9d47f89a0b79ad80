"""The verbs that work on files: what they write loads, what they say is true, what cannot be is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Call
from tests.weights.test_live import TO_K, lora_file
from tests.weights.tiny import equal, tiny

import sumuk
from sumuk.cli.workshop import settings_of, size_of
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import write
from sumuk.weights.checkpoint import load, save
from sumuk.weights.model import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, ``a`` and ``b``."""
    place = tmp_path_factory.mktemp("workshop")
    for seed, name in enumerate("ab"):
        save(tiny(seed=seed), place / f"{name}.safetensors")
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder / "a.safetensors")


def test_convert_there_and_back(call: Call, folder: Path, tmp_path: Path, model: Model) -> None:
    there = call("convert", folder / "a.safetensors", tmp_path / "a", "--layout", "diffusers")
    assert there.code == 0 and "single -> diffusers" in there.out
    back = call("convert", tmp_path / "a", tmp_path / "back.safetensors", "--layout", "single")
    assert back.code == 0 and equal(load(tmp_path / "back.safetensors"), model)
    half = call("convert", folder / "a.safetensors", tmp_path / "half.safetensors", "--dtype", "float16")
    assert half.code == 0 and "F32 -> F16" in half.out
    parts = call("convert", folder / "a.safetensors", tmp_path / "parts.safetensors", "--shards", "2MB")
    assert parts.code == 0 and len(list(tmp_path.glob("parts-0*"))) > 1


def test_prune_says_what_it_drops(call: Call, folder: Path, tmp_path: Path, model: Model) -> None:
    from sumuk.files.tensors import from_header

    tensors = dict(from_header(read_header(folder / "a.safetensors")))
    extra = {"model_ema.decay": torch.tensor(0.99), "alphas_cumprod": torch.ones(1000)}
    for name in list(tensors):
        if name.startswith("model.diffusion_model."):
            extra[
                "model_ema.diffusion_model" + name.removeprefix("model.diffusion_model").replace(".", "")
            ] = tensors[name].load() * 0
    write(tmp_path / "full.safetensors", {**tensors, **extra}, read_header(folder / "a.safetensors").metadata)
    asked = call("prune", tmp_path / "full.safetensors", tmp_path / "p.safetensors")
    assert asked.code == 2 and "plain" in asked.err and "ema" in asked.err
    done = call("prune", tmp_path / "full.safetensors", tmp_path / "p.safetensors", "--weights", "plain")
    assert done.code == 0 and "saved" in done.out and "alphas_cumprod" in done.out
    assert equal(load(tmp_path / "p.safetensors"), model)


def test_autoencoders_are_taken_out_and_put_in(call: Call, folder: Path, tmp_path: Path) -> None:
    assert call("extract-vae", folder / "b.safetensors", tmp_path / "vae.safetensors").code == 0
    assert sumuk.open(tmp_path / "vae.safetensors").family == "vae"
    done = call(
        "bake-vae", folder / "a.safetensors", tmp_path / "vae.safetensors", tmp_path / "ab.safetensors"
    )
    assert done.code == 0 and "in place of its own" in done.out
    made, other = load(tmp_path / "ab.safetensors"), load(folder / "b.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(made.vae.parameters(), other.vae.parameters(), strict=True))


def test_merge_verify_and_merge_again(call: Call, folder: Path, tmp_path: Path) -> None:
    pair = (folder / "a.safetensors", folder / "b.safetensors")
    done = call("merge", *pair, "--out", tmp_path / "m.safetensors", "--alpha", "0.25", "--vae", "0")
    assert done.code == 0, done.err
    checked = call("verify", tmp_path / "m.safetensors", *pair, "--all")
    assert checked.code == 0 and "same bit for bit" in checked.out
    swapped = call("verify", tmp_path / "m.safetensors", *reversed(pair))
    assert swapped.code == 2 and "sha-256" in swapped.err.lower()
    printed = call("merge", "--recipe", tmp_path / "m.safetensors")
    (folder / "recipe.toml").write_text(printed.out)
    again = call("merge", "--recipe", folder / "recipe.toml", "--out", tmp_path / "again.safetensors")
    assert again.code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["merge", "a.safetensors", "b.safetensors"], "Give --out"),
        (["merge", "a.safetensors", "--recipe", "r.toml"], "leave models and other options out"),
        (["merge", "--recipe", "r.toml"], "no recipe at"),
        (
            ["merge", "a.safetensors", "b.safetensors", "-o", "x.safetensors", "--setting", "density"],
            "NAME=VALUE",
        ),
        (["convert", "a.safetensors", "x.safetensors"], "nothing"),
        (["convert", "a.safetensors", "x.safetensors", "--dtype", "int4"], "int4"),
        (["convert", "a.safetensors", "x.safetensors", "--shards", "much"], "'much' is no size"),
        (["prune", "a.safetensors", "x.safetensors"], "nothing to prune"),
        (["extract-vae", "missing.safetensors", "x.safetensors"], "no file 'missing.safetensors'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(
    call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(folder)
    before = {path.name for path in folder.iterdir()}
    done = call(*arguments)
    assert done.code == 2 and told in done.err and done.err.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == before


def test_a_shelf_is_listed(call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / "loras").mkdir()
    lora_file(folder / "loras" / "ink.safetensors", load(folder / "a.safetensors"), TO_K)
    done = call("shelf", folder)
    assert done.code == 0 and "Stable Diffusion 1.x" in done.out and "loras" in done.out
    told = {each["name"]: each["kind"] for each in json.loads(call("shelf", folder, "--json").out)}
    assert told["a"] == "sd1/text-to-image" and "ink" in told


def test_adapters_on_the_command_line(
    call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = lora_file(tmp_path / "ink.safetensors", load(folder / "a.safetensors"), TO_K)
    base = ("-m", folder / "a.safetensors", "--steps", "2", "--seed", "1")
    first = call("generate", "a fox", *base, "--lora", f"{file},weight=0.5", "-o", tmp_path / "1.png")
    second = call("generate", "a fox<lora:ink:0.5>", *base, "--shelf", tmp_path, "-o", tmp_path / "2.png")
    assert first.code == 0 and second.code == 0, (first.err, second.err)
    same = call("replay", tmp_path / "1.png", "-m", folder / "a.safetensors", "--lora", f"ink={file}")
    assert same.code == 0 and same.out.startswith("identical")
    found = call("replay", tmp_path / "2.png", "-m", folder / "a.safetensors", "--shelf", tmp_path)
    assert found.code == 0 and found.out.startswith("identical")
    for arguments, told in (
        (["--lora", "missing.safetensors"], "no lora at"),
        (["--lora", f"{file},weight=0.5,weight"], "is not like weight=0.8"),
        (["--shelf", tmp_path], "nothing on the shelf"),
        (["--embedding", file], "the prompt does not name it"),
        (["--packed"], "none of its weights are quantised"),
        (["--partial", "ink"], "no LoRA that is loaded"),
    ):
        done = call("generate", "a fox", *base, *arguments, "-o", tmp_path / "3.png")
        assert done.code == 2 and told in done.err, (arguments, done.err)
    lost = call("replay", tmp_path / "1.png", "-m", folder / "a.safetensors")
    assert lost.code == 2 and "give it with --lora ink=FILE" in lost.err


def test_inspect_checks_numbers(call: Call, folder: Path, tmp_path: Path) -> None:
    done = call("inspect", folder / "a.safetensors", "--check")
    assert done.code == 0 and "are sound" in done.out
    write(tmp_path / "nan.safetensors", {"a": torch.tensor([1.0, float("nan"), float("inf")])})
    bad = call("inspect", tmp_path / "nan.safetensors", "--check")
    assert bad.code == 0 and "a: 1 NaN, 1 infinite" in " ".join(bad.out.split())


def test_sizes_and_settings_are_read() -> None:
    assert [size_of(text) for text in ("5GB", "1.5 MiB", "700", None)] == [5 * 10**9, 1572864, 700, None]
    assert settings_of(["density=0.5", "weights=1,2,0.5", "normalise=true", "name=x"]) == {
        "density": 0.5,
        "weights": [1, 2, 0.5],
        "normalise": True,
        "name": "x",
    }
