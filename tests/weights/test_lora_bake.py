"""LoRAs baked into checkpoints: what a model wears fused, in every layout, and nothing half or in vain."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from moments import alike, killed, moments, tensors
from tests.weights.lora_files import SPELLINGS, bfl, make, model, natives, save, shapes
from tests.weights.tiny import weights
from torch import Tensor

import sumuk
from sumuk.base.errors import BadFile, BadInput, Cancelled
from sumuk.files.hashes import hashes
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import lazy
from sumuk.weights.changes import lora_of, make_change
from sumuk.weights.convert import convert
from sumuk.weights.live import BlockRates, Worn, fuse, wear
from sumuk.weights.lora import Patch
from sumuk.weights.lora_bake import LoraBaked, bake_loras
from sumuk.weights.lora_sums import Account
from sumuk.weights.lora_work import host
from sumuk.weights.lora_writing import write_lora

SD1 = "sd1/text-to-image"
KEYS = (SD1, "sd2/text-to-image", "sdxl/base", "flux/dev", "sd3/medium", "cascade/stage-c")


@cache
def kohya(key: str, seed: int = 0) -> dict[str, Tensor]:
    return make(key, SPELLINGS["kohya"], seed)[0]


def lora(path: Path, key: str = SD1, seed: int = 0, only: str = "") -> Path:
    """Of every layer, or of those whose names have ``only`` in them."""
    return save(path, {name: one for name, one in kohya(key, seed).items() if only in name})


def checkpoint(path: Path, key: str = SD1, layout: str = "single", **more: Any) -> Path:
    sumuk.save(model(key), path, layout=layout, **more)
    return path


def fused(key: str, *given: tuple[Path, float, float | None, str | None]) -> dict[str, Tensor]:
    """The weights of the loaded model that wears them."""
    host, worn = model(key), []
    for path, strength, text, blocks in given:
        live = wear(path, host)
        rates = None if blocks is None else BlockRates.read(blocks, host)
        for whether, each in ((False, strength), (True, strength if text is None else text)):
            own = {part: some for part, some in live.thin.items() if part.startswith("text") is whether}
            whole = {part: some for part, some in live.whole.items() if part.startswith("text") is whether}
            worn.append(Worn(replace(live, thin=own, whole=whole), path.stem, each, rates))
    fusion = fuse(host, worn)
    try:
        return {name: value.clone() for name, value in weights(host).items()}
    finally:
        fusion.eject()


def loaded(path: Path) -> dict[str, Tensor]:
    return weights(sumuk.load(path))


@pytest.mark.parametrize("key", KEYS)
def test_a_baked_checkpoint_is_the_model_that_wears_it_to_the_bit(key: str, tmp_path: Path) -> None:
    given = (lora(tmp_path / "a.safetensors", key), 0.7, None, None)
    base, out = checkpoint(tmp_path / "base.safetensors", key), tmp_path / "out.safetensors"
    told = bake_loras(base, [given], out)
    assert alike(loaded(out), fused(key, given))
    assert told.kind == key and told.layouts == ("single", "as it was") and not told.left
    (one,) = told.loras
    assert one.applied.matched == len(wear(given[0], model(key)).lora.patches) and not one.applied.unmatched
    assert one.applied.change == pytest.approx(wear(given[0], model(key)).applied.change, rel=1e-5)
    assert read_header(out).tensors.keys() == read_header(base).tensors.keys()
    assert told.source[str(base)] == hashes(base) and told.target[str(out)] == hashes(out)


@pytest.mark.parametrize("key", ["sd2/text-to-image", "flux/dev"])
def test_a_folder_stays_one(key: str, tmp_path: Path) -> None:
    given = (lora(tmp_path / "a.safetensors", key), 0.7, None, None)
    folder = checkpoint(tmp_path / "base", key, layout="diffusers")
    told = bake_loras(folder, [given], tmp_path / "out")
    expected = fused(key, given)
    found = loaded(tmp_path / "out")
    assert found.keys() == loaded(folder).keys()  # sd2's leave away the last block of the tower
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert told.layouts == ("diffusers", "diffusers") and (tmp_path / "out" / "model_index.json").exists()
    bake_loras(folder, [given], tmp_path / "out.safetensors", layout="single")
    single = loaded(tmp_path / "out.safetensors")
    assert all(torch.equal(single[name], found[name]) for name in found)


def test_several_with_strengths_for_text_and_blocks(tmp_path: Path) -> None:
    one, other = lora(tmp_path / "one.safetensors"), lora(tmp_path / "other.safetensors", seed=1)
    given = [(one, 0.7, 0.3, "IN01:0.5,OUT*:0"), (other, -0.4, None, None)]
    base, out = checkpoint(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    told = bake_loras(base, given, out)
    found, expected = loaded(out), fused(SD1, *given)
    # The sum is rounded in another order where a tensor gets both: one unit in the last place.
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) <= 3e-7
    assert [(each.strength, each.text_strength, each.blocks) for each in told.loras] == [g[1:] for g in given]
    said = read_header(out).metadata
    assert [entry["name"] for entry in json.loads(said["sumuk.baked"])] == [
        "one.safetensors",
        "other.safetensors",
    ]
    assert json.loads(said["sumuk.baked"])[0]["sha256"] == hashes(one).sha256
    assert said["modelspec.merged_from"] == "base.safetensors, one.safetensors, other.safetensors"
    again = bake_loras(out, [(lora(tmp_path / "third.safetensors", seed=2), 1.0, None, None)], out)
    assert len(json.loads(read_header(out).metadata["sumuk.baked"])) == 3 and again.changed == told.changed


@pytest.mark.parametrize("layout", ["single", "diffusers"])
def test_a_control_lora_makes_the_plain_model_one_that_follows_a_picture(layout: str, tmp_path: Path) -> None:
    file, expected = bfl(weights(model("flux/dev")), width=128)
    given = save(tmp_path / "canny.safetensors", file)
    base = checkpoint(
        tmp_path / ("base.safetensors" if layout == "single" else "base"), "flux/dev", layout=layout
    )
    out = tmp_path / ("out.safetensors" if layout == "single" else "out")
    told = bake_loras(base, [(given, 1.0, None, None)], out)
    assert told.kind == "flux/control" and any(
        "reads 64 numbers a token, and the result 128" in n for n in told.notes
    )
    made = sumuk.load(out)
    assert made.family.key == "flux/control"
    found = weights(made)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) <= 1e-5
    again = bake_loras(out, [(given, 1.0, None, None)], tmp_path / f"again{out.suffix}")
    assert again.kind == "flux/control" and not any("numbers a token" in note for note in again.notes)


def odd(tmp_path: Path) -> Path:
    """A LoHa, a DoRA, whole differences of a norm and a bias, and a Tucker core."""
    torch.manual_seed(3)
    block = "denoiser.input_blocks.1.1.transformer_blocks.0."
    native = natives(SD1)

    def patch(name: str, **factors: Tensor) -> Patch:
        part, _, own = name.partition(".")
        factors = {key.replace("__", "."): one for key, one in factors.items()}
        return Patch(part, own, None, make_change(factors, tuple(native[name].shape), name), name)

    square, conv = native[f"{block}attn1.to_q.weight"], native["denoiser.input_blocks.1.0.in_layers.2.weight"]
    rows, columns = square.shape
    thin = [torch.randn(rows, 2), torch.randn(2, columns)]
    patches = [
        patch(f"{block}attn1.to_q.weight", hada_w1_a=thin[0], hada_w1_b=thin[1], hada_w2_a=thin[0], hada_w2_b=thin[1]),
        patch(
            f"{block}attn1.to_k.weight",
            lora_up__weight=thin[0], lora_down__weight=thin[1], dora_scale=torch.rand(rows, 1) + 0.5,
        ),
        patch(f"{block}norm1.weight", w_norm=torch.randn(rows)),
        patch("denoiser.out.2.bias", diff_b=torch.randn(4)),
        patch(
            "denoiser.input_blocks.1.0.in_layers.2.weight",
            lora_up__weight=torch.randn(len(conv), 2, 1, 1), lora_mid__weight=torch.randn(2, 2, 3, 3),
            lora_down__weight=torch.randn(2, conv.shape[1], 1, 1),
        ),
    ]  # fmt: skip
    path = tmp_path / "odd.safetensors"
    write_lora(path, patches, "kohya", model(SD1).family, shapes(native))
    return path


def test_every_method_is_what_it_is_worn(tmp_path: Path) -> None:
    given = (odd(tmp_path), 0.6, None, None)
    bake_loras(checkpoint(tmp_path / "base.safetensors"), [given], tmp_path / "out.safetensors")
    assert alike(loaded(tmp_path / "out.safetensors"), fused(SD1, given))


def test_old_spellings_pickles_and_shards_are_read(tmp_path: Path) -> None:
    given = (lora(tmp_path / "a.safetensors"), 0.6, None, None)
    base, out = checkpoint(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    expected = fused(SD1, given)
    old = {
        name.replace("transformer.text_model.", "transformer."): one for name, one in tensors(base).items()
    }
    told = bake_loras(save(tmp_path / "old.safetensors", old, read_header(base).metadata), [given], out)
    assert tensors(out).keys() == old.keys() != tensors(base).keys() and alike(loaded(out), expected)
    assert told.layouts == ("single", "as it was")
    torch.save({"state_dict": tensors(base), "epoch": 3}, tmp_path / "base.ckpt")
    same = tensors(bake_loras(base, [given], tmp_path / "plain.safetensors").path)
    assert bake_loras(tmp_path / "base.ckpt", [given], out).notes and alike(tensors(out), same)
    convert(base, tmp_path / "shards.safetensors", shard_bytes=1 << 20)
    bake_loras(tmp_path / "shards.safetensors.index.json", [given], out)
    assert alike(tensors(out), same)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_stay_and_the_rounding_is_told(dtype: str, tmp_path: Path) -> None:
    given = (lora(tmp_path / "a.safetensors"), 0.01, None, None)
    base, out = checkpoint(tmp_path / "base.safetensors", dtype=dtype), tmp_path / "out.safetensors"
    told = bake_loras(base, [given], out)
    before, after, wide = tensors(base), tensors(out), tmp_path / "wide.safetensors"
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    assert bake_loras(base, [given], wide, dtype="float32").rounding == 0.0
    exact = tensors(wide)
    changed = [name for name in exact if not torch.equal(exact[name], before[name].float())]
    assert len(changed) == told.changed
    lost = sum(float((after[n].double() - exact[n]).square().sum()) for n in changed)
    added = sum(float((before[n].double() - exact[n]).square().sum()) for n in changed)
    assert told.rounding == pytest.approx((lost / added) ** 0.5, rel=1e-3)
    bounds = {"float16": (0.05, 0.12), "bfloat16": (0.4, 0.9)}[dtype]  # measured: 0.077 and 0.60
    assert bounds[0] < told.rounding < bounds[1]
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - set(changed))


def test_a_number_beyond_the_type_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    base = checkpoint(tmp_path / "base.safetensors", dtype="float16")
    with pytest.raises(BadFile, match="goes beyond what F16 holds") as refused:
        bake_loras(base, [(lora(tmp_path / "a.safetensors"), 1e6, None, None)], out)
    assert "\n" not in str(refused.value) and not out.exists()
    assert not list(tmp_path.glob(".*partial"))


def bare(path: Path) -> Path:
    sumuk.save(replace(model(SD1), networks={"denoiser": model(SD1).denoiser}), path, layout="bare")
    return path


def test_what_fits_in_part_only_is_refused_unless_allowed(tmp_path: Path) -> None:
    base, out, a = (
        bare(tmp_path / "unet.safetensors"),
        tmp_path / "out.safetensors",
        lora(tmp_path / "a.safetensors"),
    )
    with pytest.raises(BadFile, match=r"60 of its tensors do not fit .*partial=True"):
        bake_loras(base, [(a, 1.0, None, None)], out)
    told = bake_loras(base, [(a, 1.0, None, None)], out, partial=True)
    assert len(told.loras[0].applied.unmatched) == 60
    expected = {
        name: value
        for name, value in fused(SD1, (a, 1.0, None, None)).items()
        if name.startswith("denoiser.")
    }
    assert alike({f"denoiser.{name}": value for name, value in tensors(out).items()}, expected)


def test_bundled_embeddings_have_no_place(tmp_path: Path) -> None:
    a = save(
        tmp_path / "a.safetensors", kohya(SD1) | {"bundle_emb.ink.string_to_param.*": torch.randn(2, 64)}
    )
    base, out = checkpoint(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(BadFile, match="brings the embeddings 'ink'"):
        bake_loras(base, [(a, 1.0, None, None)], out)
    assert bake_loras(base, [(a, 1.0, None, None)], out, partial=True).changed


REFUSED: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "none": (lambda p: [], "nothing to bake"),
    "zero strength": (lambda p: [(lora(p / "a.safetensors"), 0.0, None, None)], "at strength 0 it changes nothing"),
    "no number": (lambda p: [(lora(p / "a.safetensors"), float("nan"), None, None)], "not a finite number"),
    "no text": (
        lambda p: [(lora(p / "a.safetensors", only="lora_unet_"), 1.0, 0.5, None)], "text_strength would do nothing",
    ),
    "rates of one": (lambda p: [(lora(p / "a.safetensors"), 1.0, None, "IN01:1")], "block rates .* would do nothing"),
    "no such block": (lambda p: [(lora(p / "a.safetensors"), 1.0, None, "IN99:1")], "no block 'IN99'"),
    "twice": (lambda p: [(lora(p / "a.safetensors"), 1.0, None, None)] * 2, "is given twice"),
    "nothing in it": (
        lambda p: [(save(p / "a.safetensors", {n: t if ".lora_up" not in n else 0 * t
                                               for n, t in kohya(SD1).items()}), 1.0, None, None)], "changes nothing",
    ),
    "another family": (lambda p: [(lora(p / "a.safetensors", "flux/dev"), 1.0, None, None)], "do not fit .*Diffusion"),
    "a checkpoint": (lambda p: [(checkpoint(p / "b.safetensors"), 1.0, None, None)], "is no LoRA"),
    "nowhere": (lambda p: [(p / "b.safetensors", 1.0, None, None)], "b.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_do_nothing_or_harm_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    given, match = REFUSED[case]
    base, out = checkpoint(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises((BadInput, BadFile, FileNotFoundError), match=match) as refused:
        bake_loras(base, given(tmp_path), out)
    assert "\n" not in str(refused.value) and not out.exists()


def test_places_that_are_mixed_up_are_refused(tmp_path: Path) -> None:
    base, a = checkpoint(tmp_path / "base.safetensors"), lora(tmp_path / "a.safetensors")
    given = [(a, 1.0, None, None)]
    with pytest.raises(BadInput, match="where the checkpoint of a model is wanted"):
        bake_loras(a, [(base, 1.0, None, None)], tmp_path / "out.safetensors")
    with pytest.raises(BadInput, match="which is read"):
        bake_loras(base, given, a)
    with pytest.raises(BadInput, match=r"does not end in \.safetensors"):
        bake_loras(base, given, tmp_path / "out.ckpt")
    with pytest.raises(BadInput, match="names a file, and the layout 'diffusers' is a folder"):
        bake_loras(base, given, tmp_path / "out.safetensors", layout="diffusers")


def test_a_quantised_checkpoint_needs_a_type_for_the_result(tmp_path: Path) -> None:
    a, small = lora(tmp_path / "a.safetensors"), tmp_path / "small.safetensors"
    convert(checkpoint(tmp_path / "base.safetensors"), small, quantise="fp8-scaled")
    with pytest.raises(BadInput, match=r"are quantised .*dtype='float16'"):
        bake_loras(small, [(a, 1.0, None, None)], tmp_path / "out.safetensors")
    told = bake_loras(small, [(a, 1.0, None, None)], tmp_path / "out.safetensors", dtype="float16")
    kinds = {info.dtype for info in read_header(tmp_path / "out.safetensors").tensors.values()}
    assert kinds == {"F16"} and any("F8" in key for key in told.cast)


def test_cancelled_or_killed_the_old_or_the_new_is_there(tmp_path: Path) -> None:
    base, a = checkpoint(tmp_path / "base.safetensors"), lora(tmp_path / "a.safetensors", only="attn1_to_q")
    out = tmp_path / "out.safetensors"

    def stop(done: int, total: int) -> None:
        if done > 0.5 * total:  # a half is hashed, what follows is written
            raise Cancelled("stopped")

    def before() -> None:
        out.unlink(missing_ok=True)  # what is mapped stays as it is
        out.write_bytes(base.read_bytes())

    before()
    with pytest.raises(Cancelled):
        bake_loras(base, [(a, 1.0, None, None)], out, progress=stop)
    assert out.read_bytes() == base.read_bytes() and not list(tmp_path.glob(".*partial"))

    def work(progress: Callable[[int, int], None]) -> LoraBaked:
        return bake_loras(base, [(a, 1.0, None, None)], out, progress=progress)

    count = moments(work)
    new, old, news = tensors(out), tensors(base), 0
    for moment in (0, count // 3, count // 2, count - 8, count - 3, count - 1):
        before()
        assert killed(work, moment)
        now = tensors(out)
        assert alike(now, old) or alike(now, new)
        news += alike(now, new)
    assert 0 < news < 6


def test_rows_of_a_large_weight_are_added_some_at_a_time(tmp_path: Path) -> None:
    """More numbers than are widened at once, rows that begin within a piece, and two changes of the same rows."""
    home = host(checkpoint(tmp_path / "base.safetensors"))
    weight = torch.randn(3000, 257)
    changes = [(lora_of(torch.randn(3, 257), torch.randn(high - low, 3), (high - low, 257), "x"), low, high)
               for low, high in ((0, 3000), (1019, 2041))]  # fmt: skip
    some = [
        (i, Patch("denoiser", "x", (low, high), change, "x"), 0.5)
        for i, (change, low, high) in enumerate(changes)
    ]
    found = Account(home).baked("denoiser.x", lazy(weight), some, None).load()
    expected = weight.double()
    for change, low, high in changes:
        expected[low:high] += change.delta(torch.zeros(high - low, 257, dtype=torch.float64), 0.5)
    assert float((found - expected).abs().max()) <= 2e-6
