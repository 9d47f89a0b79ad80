"""Merging files: mixed layouts and precisions, what is refused and what is told, recipes that make the same again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import equal, tiny, weights

import sumuk
from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.files.hashes import hashes
from sumuk.files.safetensors import read_header
from sumuk.files.streaming import THREADS, ahead, unmapped, written
from sumuk.files.tensors import from_header, lazy, write
from sumuk.weights.merge import merge, parse, recipe_of, run, verify
from sumuk.weights.model import Model


def near(a: Model) -> Model:
    """A model trained a little from another."""
    dice = torch.Generator().manual_seed(9)
    other = tiny()
    for network, was in zip(other.networks.values(), a.networks.values(), strict=True):
        for p, q in zip(network.parameters(), was.parameters(), strict=True):
            p.data = q.data + 0.001 * torch.randn(q.shape, generator=dice)
    return replace(other, words=a.words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of one shape: a file, a folder, a file in float16; and an inpainting model."""
    folder = tmp_path_factory.mktemp("models")
    a = tiny(seed=0)
    sumuk.save(a, folder / "a.safetensors")
    sumuk.save(near(a), folder / "b", layout="diffusers")
    sumuk.save(tiny(seed=2), folder / "c.safetensors", dtype="float16")
    sumuk.save(tiny("inpainting", seed=3), folder / "inpaint.safetensors")
    return folder


@pytest.fixture
def abc(place: Path) -> list[Path]:
    return [place / "a.safetensors", place / "b", place / "c.safetensors"]


def loaded(path: Path) -> dict[str, torch.Tensor]:
    return weights(sumuk.load(path))


def raw(path: Path) -> dict[str, torch.Tensor]:
    return {name: one.load() for name, one in from_header(read_header(path)).items()}


def test_a_file_and_a_folder(abc: list[Path], tmp_path: Path) -> None:
    done = merge(
        abc[:2], out := tmp_path / "o.safetensors", alpha=0.3, vae=0, blocks="BASE:0.6,M00:1,IN*:0.1"
    )
    a, b, made = (loaded(path) for path in (abc[0], abc[1], out))
    assert made.keys() == a.keys() and done.family == "sd1/text-to-image"
    for name, value in made.items():
        rate = 0.3 if name.startswith("denoiser.output") or name.startswith("denoiser.out.") else None
        rate = 0.1 if name.startswith(("denoiser.input_blocks", "denoiser.time_embed")) else rate
        rate = 1.0 if name.startswith("denoiser.middle") else 0.6 if name.startswith("text.") else rate
        rate = 0.0 if name.startswith("vae.") else rate
        assert rate is not None, name
        assert torch.allclose(value, (1 - rate) * a[name] + rate * b[name], atol=1e-6), name
        if rate in (0, 1):
            assert torch.equal(value, b[name] if rate else a[name]), name
    assert (done.mixed, done.kept, done.lone) == (len(a) - done.kept, sum(n.startswith("vae.") for n in a), 0)


def test_the_result_may_have_any_layout(abc: list[Path], tmp_path: Path) -> None:
    file, folder = tmp_path / "o.safetensors", tmp_path / "o"
    merge([abc[1], abc[0]], file, alpha=0.3, layout="single")
    merge([abc[1], abc[0]], folder, alpha=0.3)
    one, other = sumuk.load(file), sumuk.load(folder)
    assert equal(one, other) and one.tokens.to_json() == other.tokens.to_json()
    assert recipe_of(folder) == replace(recipe_of(file), layout=None)
    assert verify(folder, [abc[1], abc[0]], sample=None).whole


def test_the_first_model_gives_the_precision_unless_it_is_asked_for(abc: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    for order, dtype, wanted in (((2, 0), None, "F16"), ((0, 2), None, "F32"), ((0, 2), "bf16", "BF16")):
        merge([abc[i] for i in order], out, dtype=dtype)
        assert {info.dtype for info in read_header(out).tensors.values()} == {wanted}
    a, c = raw(abc[0]), raw(abc[2])
    for name, value in raw(out).items():  # of what is computed in float32, rounded once
        assert torch.equal(value, (a[name] * 0.5 + c[name].float() * 0.5).bfloat16()), name


def test_eight_bits(abc: list[Path], tmp_path: Path) -> None:
    """As an input, and as what the first model is stored in: what is computed is kept in full."""
    a, out = raw(abc[0]), tmp_path / "o.safetensors"
    small = {name: value.to(torch.float8_e4m3fn) for name, value in a.items()}
    write(eight := tmp_path / "eight.safetensors", small, read_header(abc[0]).metadata)
    merge([abc[0], eight], out, alpha=0.25)
    for name, value in raw(out).items():
        assert torch.allclose(value, 0.75 * a[name] + 0.25 * small[name].float(), atol=1e-6), name
    done = merge([eight, abc[0]], out, vae=0)
    for name, value in raw(out).items():
        mean = (small[name].float() + a[name]) * 0.5
        assert torch.equal(value, small[name].float() if name.startswith("first_stage") else mean), name
    assert any("quantised" in note and "F8_E4M3" in note for note in done.notes)
    merge([eight, abc[0]], out, vae=0, dtype="float16")
    assert {info.dtype for info in read_header(out).tensors.values()} == {"F16"}


def test_a_pickle_and_its_averages(abc: list[Path], tmp_path: Path) -> None:
    a, b = raw(abc[0]), tmp_path / "b.ckpt"
    ema = "model_ema.diffusion_modelmiddle_block0in_layers2weight"
    torch.save({"state_dict": {n: x * 2 for n, x in a.items()} | {ema: torch.zeros(2)}, "epoch": 3}, b)
    done = merge([abc[0], b], out := tmp_path / "o.safetensors")
    for name, value in raw(out).items():
        assert torch.allclose(value, 1.5 * a[name], atol=1e-6), name
    assert any("b.ckpt: 1 averaged weights" in note for note in done.notes)
    assert verify(out, [abc[0], b]).whole


def test_three_models(abc: list[Path], tmp_path: Path) -> None:
    merge(abc, out := tmp_path / "o.safetensors", method="add difference", alpha=0.7)
    a, b, c = (loaded(path) for path in abc)
    for name, value in loaded(out).items():
        assert torch.allclose(value, a[name] + 0.7 * (b[name] - c[name].float()), atol=1e-6), name


@pytest.mark.parametrize("method", ["cosine-a", "slerp", "dare"])
def test_every_method_can_be_followed_again(method: str, abc: list[Path], tmp_path: Path) -> None:
    inputs = [abc[0], abc[2]] if method in ("cosine-a", "slerp") else abc
    seed = 7 if method == "dare" else None
    done = merge(inputs, one := tmp_path / "one.safetensors", method=method, seed=seed, alpha=0.4)
    recipe = recipe_of(one)
    assert recipe == done.recipe == parse(recipe.text)
    again = run(recipe, other := tmp_path / "other.safetensors", folder=abc[0].parent)
    assert one.read_bytes() == other.read_bytes() and again.notes == done.notes
    assert verify(one, inputs, sample=None).whole
    if method == "cosine-a":
        a, made = loaded(abc[0]), loaded(one)
        assert all(torch.equal(made[name], a[name]) for name in a if name.startswith("vae."))
    if method == "slerp":
        assert not any("nearly parallel" in note for note in done.notes)
        done = merge(abc[:2], one, method=method, alpha=0.4)  # trained a little from one another
        assert any(f"of {done.mixed} merged tensors are nearly parallel" in note for note in done.notes)


def test_the_result_says_what_it_was_made_of(abc: list[Path], tmp_path: Path) -> None:
    merge(abc[:2], one := tmp_path / "one.safetensors", alpha=0.3)
    merge([one, abc[2]], two := tmp_path / "two.safetensors", dtype="float16")
    texts = read_header(two).metadata
    said, models = json.loads(texts["sd_merge_recipe"]), json.loads(texts["sd_merge_models"])
    sums = {path: hashes(path).sha256 for path in (abc[0], abc[2], one)}
    assert said["primary_model_hash"] == sums[one] and said["secondary_model_hash"] == sums[abc[2]]
    assert models[sums[one]]["name"] == "one.safetensors"
    assert json.loads(json.dumps(models[sums[one]]["sd_merge_recipe"]))["primary_model_hash"] == sums[abc[0]]
    assert {sums[abc[0]], sums[abc[2]], sums[one]} <= models.keys()
    assert texts["modelspec.merged_from"] == "one.safetensors, c.safetensors"
    assert texts["modelspec.title"] == "one + c"


def test_verify_sees_a_flipped_bit_and_another_parent(abc: list[Path], tmp_path: Path) -> None:
    merge(abc[:2], out := tmp_path / "o.safetensors", alpha=0.3)
    header = read_header(out)
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    data = bytearray(out.read_bytes())
    data[header.start + header.tensors[name].begin] ^= 1
    out.write_bytes(data)
    found = verify(out, abc[:2], sample=None)
    assert found.failed == ("denoiser.middle_block.0.in_layers.2.weight",) and found.checked == found.total
    assert verify(out, abc[:2], sample=5).checked == 5
    with pytest.raises(BadFile, match="is not the 'b' of the recipe") as caught:
        verify(out, [abc[0], abc[2]])
    assert caught.value.code == "merge.parent"
    with pytest.raises(BadInput, match="was made of 2 models, not 1"):
        verify(out, abc[:1])
    with pytest.raises(BadFile, match="does not say that it was merged"):
        verify(abc[0], abc[:2])


def test_a_recipe_is_not_followed_with_other_models(abc: list[Path], tmp_path: Path) -> None:
    done = merge(abc[:2], tmp_path / "o.safetensors", alpha=0.3)
    (tmp_path / "a.safetensors").write_bytes(abc[2].read_bytes())
    (tmp_path / "b").symlink_to(abc[1])
    with pytest.raises(BadFile, match=r"is not the 'a\.safetensors' of the recipe"):
        run(done.recipe, tmp_path / "p.safetensors", folder=tmp_path)
    assert not (tmp_path / "p.safetensors").exists()
    with pytest.raises(MissingFile, match=r"no file 'a\.safetensors'"):
        run(done.recipe, tmp_path / "p.safetensors", folder=tmp_path / "b")


def test_a_part_that_only_one_has(abc: list[Path], tmp_path: Path) -> None:
    whole = raw(abc[0])
    bald = tmp_path / "bald.safetensors"
    texts = read_header(abc[0]).metadata
    write(bald, {n: v for n, v in whole.items() if not n.startswith("first_stage")}, texts)
    done = merge([bald, abc[2]], out := tmp_path / "o.safetensors")
    made, c = loaded(out), loaded(abc[2])
    lone = [name for name in made if name.startswith("vae.")]
    assert done.lone == len(lone) and all(torch.equal(made[name], c[name].float()) for name in lone)
    assert any(f"vae: {len(lone)} tensors are those of" in note and "bald" in note for note in done.notes)
    with pytest.raises(BadInput, match="the rate vae= would do nothing"):
        merge([bald, abc[2]], out, vae=0.5)


def test_position_ids_that_became_floats(abc: list[Path], tmp_path: Path) -> None:
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    ids = torch.arange(16).float()[None]
    ids[0, 3] = 2.9
    hurt = tmp_path / "hurt.safetensors"
    write(hurt, raw(abc[0]) | {name: ids}, read_header(abc[0]).metadata)
    done = merge([hurt, abc[2]], out := tmp_path / "o.safetensors")
    assert name not in read_header(out).tensors
    assert any("F32 instead of I64, 1 of them wrong" in note for note in done.notes)


def test_inpainting_and_a_base(abc: list[Path], place: Path, tmp_path: Path) -> None:
    inpaint, out = place / "inpaint.safetensors", tmp_path / "o.safetensors"
    with pytest.raises(BadInput, match=r"1 tensors differ in shape .*extra_channels='keep'"):
        merge([inpaint, abc[1], abc[0]], out, method="add-difference")
    with pytest.raises(BadInput, match="1 tensors differ in shape"):
        merge([abc[0], inpaint], out, extra_channels="keep")
    done = merge([inpaint, abc[1], abc[0]], out, method="add-difference", extra_channels="keep")
    made, was = (
        loaded(out)["denoiser.input_blocks.0.0.weight"],
        loaded(inpaint)["denoiser.input_blocks.0.0.weight"],
    )
    a, b = (loaded(path)["denoiser.input_blocks.0.0.weight"] for path in abc[:2])
    assert torch.allclose(made[:, :4], was[:, :4] + b - a, atol=1e-6) and torch.equal(made[:, 4:], was[:, 4:])
    assert done.family == "sd1/inpainting" and any("9 input channels" in note for note in done.notes)
    assert verify(out, [inpaint, abc[1], abc[0]], sample=None).whole
    with pytest.raises(BadInput, match="would do nothing: the models take the same channels"):
        merge(abc[:2], out, extra_channels="keep")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, "alpha 0 leaves the first model as it is"),
        ({"alpha": 1.5}, "alpha 1.5 is not a number from 0 to 1"),
        ({"alhpa": 0.5}, "weighted-sum has no setting 'alhpa'"),
        ({"blocks": "BASE:0,IN*:0,OUT*:0,M00:0"}, "every rate is 0"),
        ({"blocks": "IN01:0.5"}, "the block rates leave out"),
        ({"blocks": "IN01:7", "alpha": 1}, "the rate of IN01, 7.0 is not a number from 0 to 1"),
        (
            {"blocks": "0.5", "alpha": 1},
            "1 block rates do not fit this model, which has 4 + 1 + 4 = 9 blocks",
        ),
        ({"blocks": "BASE:0.5,*:0.2", "alpha": 0.3}, "the rate alpha would do nothing"),
        ({"blocks": "BASE:0.5,*0*:1", "text": 0, "vae": 0}, "the rate BASE would do nothing"),
        (
            {"parts": {"vea": 0.5}},
            "the rate vea= would do nothing: no merged tensor asks for it; did you mean 'vae'?",
        ),
        ({"seed": 4}, "the seed 4 would do nothing"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"layout": "singel"}, "layout 'singel' is not known"),
        ({"layout": "diffusers"}, "names a file"),
        ({"extra_channels": "drop"}, "extra_channels 'drop' is not 'keep'"),
        ({"method": "weigted"}, "unknown merge method 'weigted'"),
    ],
)
def test_settings_that_are_refused(settings: dict, message: str, abc: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        merge(abc[:2], tmp_path / "o.safetensors", **settings)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit(abc: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    sumuk.save(tiny(prediction="v"), v := tmp_path / "v.safetensors")
    with pytest.raises(BadInput, match=r"predicts v, .*predicts eps; what lies between predicts neither"):
        merge([abc[0], v], out)
    half = raw(abc[0])
    lost = [name for name in half if ".middle_block.0." in name][:2]
    write(few := tmp_path / "few.safetensors", {n: x for n, x in half.items() if n not in lost})
    with pytest.raises(
        BadInput, match=r"few.safetensors lacks 2 tensors that another of the models has: 'denoiser.m"
    ):
        merge([abc[0], few], out)
    write(odd := tmp_path / "odd.safetensors", half | {"surprise": torch.zeros(2)})
    with pytest.raises(BadFile, match="holds 1 tensors that its family does not know: 'surprise'"):
        merge([abc[0], odd], out)
    write(unknown := tmp_path / "unknown.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(BadFile, match="unknown model"):
        merge([abc[0], unknown], out)
    with pytest.raises(BadInput, match="is one of the models to merge"):
        merge(abc[:2], abc[0])
    with pytest.raises(BadInput, match="11 models are more than the 10"):
        merge([abc[0]] * 11, out, method="average")
    assert not out.exists()


def test_numbers_that_a_type_cannot_hold(abc: list[Path], tmp_path: Path) -> None:
    name, out = "model.diffusion_model.middle_block.0.in_layers.2.weight", tmp_path / "o.safetensors"
    large, none = raw(abc[0]), raw(abc[0])
    large[name] = large[name] + 2e5
    none[name] = none[name] * torch.nan
    texts = read_header(abc[0]).metadata
    write(tmp_path / "large.safetensors", large, texts)
    write(tmp_path / "none.safetensors", none, texts)
    for rates in ({}, {"denoiser": 0.0}):  # computed, and only stored
        with pytest.raises(BadInput, match=r"would hold [12]00000, and F16 ends at 65504"):
            merge([tmp_path / "large.safetensors", abc[2]], out, dtype="float16", **rates)
    assert not out.exists()
    done = merge([tmp_path / "none.safetensors", abc[2]], out)
    assert any("1 tensors hold numbers that are none" in note for note in done.notes)


def test_progress_reaches_the_end_and_may_stop_the_work(abc: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    told: list[tuple[int, int]] = []
    merge(abc[:2], out, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] and told == sorted(told) and len({total for _, total in told}) == 1
    before = out.read_bytes()

    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise Enough

    with pytest.raises(Enough):
        merge(abc[:2], out, alpha=0.9, progress=stop)
    assert out.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["o.safetensors"]


KILLED = """
import os, sys
from sumuk.weights.merge import merge
def told(done, total):
    if done > 0.9 * total:
        print("now", flush=True)
        import time; time.sleep(60)
merge(sys.argv[1:3], sys.argv[3], alpha=0.9, progress=told)
"""


def test_killed_in_the_middle_it_leaves_the_old_file(abc: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    merge(abc[:2], out)
    before = out.read_bytes()
    command = [sys.executable, "-c", KILLED, str(abc[0]), str(abc[1]), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": "src"}) as process:
        assert process.stdout is not None and process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert out.read_bytes() == before
    assert sum(path.suffix == ".partial" for path in tmp_path.iterdir()) == 1  # and is no model
    merge(abc[:2], out, alpha=0.9)
    assert out.read_bytes() != before


def test_a_recipe_of_a1111(abc: list[Path], tmp_path: Path) -> None:
    sums = [hashes(path).sha256 for path in (abc[0], abc[2])]
    said = {"type": "webui", "interp_method": "Weighted sum", "multiplier": 0.3, "save_as_half": True}
    said |= {"primary_model_hash": sums[0], "secondary_model_hash": sums[1], "tertiary_model_hash": None}
    models = {sums[0]: {"name": "a.safetensors"}, sums[1]: {"name": "c.safetensors"}}
    texts = {"sd_merge_recipe": json.dumps(said), "sd_merge_models": json.dumps(models)}
    write(old := tmp_path / "old.safetensors", {"x": torch.zeros(1)}, texts)
    recipe = recipe_of(old)
    assert (recipe.method, recipe.alpha, recipe.dtype) == ("weighted-sum", 0.3, "float16")
    assert recipe.models[1].name == "c.safetensors" and recipe.models[1].sha256 == sums[1]
    run(recipe, tmp_path / "o.safetensors", folder=abc[0].parent)
    for change in ({"interp_method": "No interpolation"}, {"bake_in_vae": "x.pt"}, {"primary_model_hash": 3}):
        write(old, {"x": torch.zeros(1)}, texts | {"sd_merge_recipe": json.dumps(said | change)})
        with pytest.raises(BadFile, match="its recipe cannot be followed"):
            recipe_of(old)


@pytest.mark.parametrize(
    "text",
    [
        "method = ",
        "methd = 'slerp'",
        "models = 3",
        "[[models]]\nname = 3",
        "[[models]]\nname = 'a'\nsha256 = 'b'",
        "[[models]]\nname = 'a'\npath = 'b'",
        "alpha = 'much'\n[[models]]\nname = 'a'\n[[models]]\nname = 'b'",
        "seed = true\nmethod = 'dare'\n[[models]]\nname = 'a'\n[[models]]\nname = 'b'",
        "a = " + "[" * 2000,
        "#" * 200_000,
    ],
)
def test_recipes_that_are_none(text: str) -> None:
    with pytest.raises(BadInput):
        parse(text)


def test_reading_without_a_map(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {
        "a": torch.randn(300, 7),
        "b": torch.arange(5),
        "c": torch.empty(0),
        "d": torch.tensor(2.0).half(),
    }
    write(path, values)
    tensors = unmapped(from_header(read_header(path)) | {"e": lazy(torch.ones(2))})
    for name, value in values.items():
        found = tensors[name].load()
        assert torch.equal(found, value) and found.dtype == value.dtype
        assert found.untyped_storage().nbytes() == value.nbytes  # its own, not a file's
    assert torch.equal(tensors["e"].load(), torch.ones(2))
    fresh = unmapped(from_header(read_header(path)))
    time.sleep(0.01)
    write(path, {name: value.clone() for name, value in values.items()})
    with pytest.raises(BadFile, match="was replaced or changed since its header was read"):
        fresh["a"].load()


@pytest.mark.parametrize("held", [0, 64 << 20])
def test_parents_are_hashed_right_on_the_way(
    abc: list[Path], tmp_path: Path, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sumuk.files.direct.HELD", held)
    done = merge([abc[0], abc[2]], out := tmp_path / "o.safetensors", alpha=0.3)
    assert [model.sha256 for model in done.recipe.models] == [hashes(abc[i]).sha256 for i in (0, 2)]
    assert verify(out, [abc[0], abc[2]], sample=None).whole


def test_working_ahead_keeps_to_its_budget() -> None:
    under, most = 0, 0

    def load(i: int) -> torch.Tensor:
        nonlocal under, most
        under += 1
        most = max(most, under)
        time.sleep(0.002)
        return torch.full((4,), i)

    tensors = {f"{i:02d}": replace(lazy(torch.full((4,), i)), load=lambda i=i: load(i)) for i in range(20)}
    for budget, limit in ((1, 2), (3, 4), (100, THREADS + 4)):
        under = most = 0
        with ahead(tensors, written(tensors), lambda _: 1, budget) as ready:
            for i, name in enumerate(written(tensors)):
                assert torch.equal(ready[name].load(), torch.full((4,), i))
                under -= 1
        assert most <= limit
    with ahead(tensors, written(tensors), lambda _: 1) as ready:  # in another order
        assert [int(ready[name].load()[0]) for name in reversed(written(tensors))] == list(range(19, -1, -1))
