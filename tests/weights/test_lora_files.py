"""LoRA files made of LoRA files: exact where they claim it, with the errors that they tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.weights.lora_files import ALPHA, RANK, SPELLINGS, applied, distance, natives, save
from tests.weights.lora_made import (
    KEYS,
    SD1,
    checkpoint,
    deltas,
    error,
    loaded,
    loha,
    lora,
    read,
    spelt,
)
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput, Cancelled
from sumuk.files.hashes import hashes
from sumuk.files.safetensors import read_header
from sumuk.weights.lora_bake import bake_loras
from sumuk.weights.lora_files import convert_lora, resize_lora
from sumuk.weights.lora_merge import merge_loras
from sumuk.weights.lora_tools import Wanted

# -- resizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["kohya", "PEFT", "ComfyUI", "diffusers"])
def test_the_error_of_a_smaller_rank_is_what_is_told(spelling: str, tmp_path: Path) -> None:
    base, a, out = (
        checkpoint(tmp_path / "base.safetensors"),
        tmp_path / "a.safetensors",
        tmp_path / "out.safetensors",
    )
    told = resize_lora(lora(a, SD1, spelling), out, Wanted(rank=1), model=base)
    before, after = deltas(a), deltas(out)
    assert told.error == pytest.approx(error(after, before), abs=1e-6) and 0.3 < told.error < 0.8
    worst = max(float((after[n] - before[n]).norm() / before[n].norm()) for n in before)
    assert told.worst[1] == pytest.approx(worst, abs=1e-6)
    assert told.ranks == {1: told.resized} and told.layout == read(out).layout == {"PEFT": "peft"}.get(
        spelling, "kohya"
    )


def test_metadata_and_types_stay_and_ranks_in_them_do_not(tmp_path: Path) -> None:
    base, a, out = (
        checkpoint(tmp_path / "base.safetensors"),
        tmp_path / "a.safetensors",
        tmp_path / "out.safetensors",
    )
    half = {n: one.half() for n, one in spelt(SD1).items()} | {
        "lora_te_text_model_final_layer_norm.w_norm": torch.randn(64)
    }
    save(a, half, {"ss_output_name": "ink", "ss_network_dim": "2", "sshs_model_hash": "0"})
    told = resize_lora(a, out, Wanted(rank=1), model=base)
    header = read_header(out)
    assert header.metadata["ss_output_name"] == "ink" and header.metadata["ss_network_dim"] == "1"
    assert "sshs_model_hash" not in header.metadata
    assert {i.dtype for n, i in header.tensors.items() if not n.endswith("alpha")} == {"F16", "F32"}
    assert torch.equal(
        load_file(out)["lora_te_text_model_final_layer_norm.w_norm"],
        half["lora_te_text_model_final_layer_norm.w_norm"],
    )
    assert told.error == pytest.approx(error(*(_without_norm(deltas(path)) for path in (out, a))), abs=1e-3)
    with pytest.raises(BadInput, match="would change nothing, its largest rank is 1"):
        resize_lora(out, out, Wanted(rank=1), model=base)


def _without_norm(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one for name, one in found.items() if one.ndim > 1}


def test_other_methods_become_products_where_that_is_asked_for(tmp_path: Path) -> None:
    base, out = checkpoint(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    a = loha(tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"LoHa in 2 layers .*to_lora=True"):
        resize_lora(a, out, Wanted(rank=4), model=base)
    told = resize_lora(a, out, Wanted(rank=9), model=base, to_lora=True)
    assert told.resized == 1 and told.ranks == {9: 1} and "add nothing" in told.notes[0]
    assert error(deltas(out), deltas(a)) < 1e-6 and read(out).method == "LoRA"  # a product of ranks 3 has 9
    with pytest.raises(BadInput, match="to_lora would do nothing"):
        resize_lora(out, tmp_path / "no.safetensors", Wanted(rank=4), model=base, to_lora=True)


# -- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_a_sum_baked_is_both_baked(key: str, tmp_path: Path) -> None:
    one, other = (
        lora(tmp_path / "one.safetensors", key),
        lora(tmp_path / "other.safetensors", key, "PEFT", seed=1),
    )
    base, out = checkpoint(tmp_path / "base.safetensors", key), tmp_path / "out.safetensors"
    told = merge_loras([(one, 0.7), (other, -0.4)], out, model=base)
    bake_loras(base, [(out, 1.0, None, None)], tmp_path / "sum.safetensors")
    bake_loras(base, [(one, 0.7, None, None), (other, -0.4, None, None)], tmp_path / "both.safetensors")
    found, expected = loaded(tmp_path / "sum.safetensors"), loaded(tmp_path / "both.safetensors")
    assert distance(found, expected) <= 3e-7  # measured: 1.2e-7
    assert told.shared and not told.error and not told.dense
    parents = json.loads(read_header(out).metadata["sumuk.merged"])
    assert [(p["name"], p["weight"], p["sha256"]) for p in parents] == [
        ("one.safetensors", 0.7, hashes(one).sha256), ("other.safetensors", -0.4, hashes(other).sha256)
    ]  # fmt: skip
    small = merge_loras([(one, 0.7), (other, -0.4)], out, model=base, wanted=Wanted(rank=2), layout="peft")
    assert small.layout == "peft" and small.error > 0.1
    grain = {f"{p.part}.{p.name}" for p in read(out, key).patches}
    assert grain == deltas(out, key).keys()
    sums = {n: 0.7 * v for n, v in deltas(one, key).items()}
    for n, v in deltas(other, key).items():
        sums[n] = sums.get(n, 0) - 0.4 * v
    assert error(deltas(out, key), sums) == pytest.approx(small.error, abs=1e-6)


def test_sums_that_are_no_products_need_a_word(tmp_path: Path) -> None:
    base, out = checkpoint(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    pair = [(loha(tmp_path / "a.safetensors"), 0.5), (lora(tmp_path / "b.safetensors"), 1.0)]
    with pytest.raises(BadInput, match=r"LoHa in 2 layers .*no products: give wanted.* or whole=True"):
        merge_loras(pair, out, model=base)
    told = merge_loras(pair, out, model=base, whole=True)
    expected = {n: v.clone() for n, v in deltas(pair[1][0]).items()}
    for n, v in deltas(pair[0][0]).items():
        expected[n] += 0.5 * v
    assert told.dense == 2 and read(out).method == "LoRA and full"
    assert error(deltas(out), expected) < 1e-6
    told = merge_loras(pair, out, model=base, wanted=Wanted(rank=11))
    assert read(out).method == "LoRA" and error(deltas(out), expected) < 1e-6  # 9 and 2
    with pytest.raises(BadInput, match="whole would do nothing"):
        merge_loras([(pair[1][0], 0.5)], out, model=base, whole=True)
    with pytest.raises(BadInput, match="would do nothing: no sum has a larger rank"):
        merge_loras([(pair[1][0], 0.5)], out, model=base, wanted=Wanted(rank=2))


def test_what_depends_on_the_weight_cannot_be_added(tmp_path: Path) -> None:
    base, out = checkpoint(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    a = lora(tmp_path / "a.safetensors")
    layer = next(name.removesuffix(".alpha") for name in load_file(a) if "attn1_to_q.alpha" in name)
    rows = len(load_file(a)[f"{layer}.lora_up.weight"])
    dora = save(tmp_path / "dora.safetensors", spelt(SD1) | {f"{layer}.dora_scale": torch.ones(rows, 1)})
    with pytest.raises(BadInput, match="DoRA depends on the weight"):
        merge_loras([(a, 1.0), (dora, 1.0)], out, model=base)
    with pytest.raises(BadInput, match=r"DoRA in 1 layers .*no rank to change"):
        resize_lora(dora, out, Wanted(rank=1), model=base)
    convert_lora(dora, out, model=base, layout="peft")
    assert {each.change.method for each in read(out).patches} == {"LoRA", "DoRA"}


def test_embeddings_come_along_and_a_clash_is_refused(tmp_path: Path) -> None:
    base, out = checkpoint(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    places = []
    for i, name in enumerate(("ink", "snow", "ink")):
        file = spelt(SD1, seed=i) | {f"bundle_emb.{name}.string_to_param.*": torch.full((2, 64), float(i))}
        places.append(save(tmp_path / f"{i}.safetensors", file))
    told = merge_loras([(places[0], 1.0), (places[1], 1.0)], out, model=base)
    assert set(told.embeddings) == {"ink", "snow"} == read(out).embeddings.keys()
    for i in (0, 1):
        own = {f"bundle_emb.{i}.string_to_param.*": torch.ones(2, 64)}
        save(tmp_path / f"only-{i}.safetensors", own)
    pair = [(tmp_path / f"only-{i}.safetensors", 1.0) for i in (0, 1)]
    assert merge_loras(pair, out, model=base).embeddings == ("0", "1")
    with pytest.raises(BadInput, match="bring different embeddings of the name 'ink'"):
        merge_loras([(places[0], 1.0), (places[2], 1.0)], out, model=base)


def test_nothing_to_merge_is_refused(tmp_path: Path) -> None:
    base, out, a = (
        checkpoint(tmp_path / "base.safetensors"),
        tmp_path / "out.safetensors",
        lora(tmp_path / "a.safetensors"),
    )
    for pairs, match in (
        ([], "nothing to merge"), ([(a, 1.0)], "nothing to merge"), ([(a, 0.0), (a, 1.0)], "adds nothing"),
        ([(a, 0.5), (a, 0.5)], "is given twice"), ([(base, 0.5)], "is no LoRA"),
    ):  # fmt: skip
        with pytest.raises((BadInput, BadFile), match=match):
            merge_loras(pairs, out, model=base)
    with pytest.raises(BadInput, match="which is read"):
        merge_loras([(a, 0.5)], a, model=base)
    merge_loras([(a, 0.5)], out, model=base)
    assert error(deltas(out), {n: 0.5 * v for n, v in deltas(a).items()}) < 1e-7


# -- converting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_there_and_back_is_the_same_to_the_bit(key: str, tmp_path: Path) -> None:
    base, a = checkpoint(tmp_path / "base", key, layout="diffusers"), tmp_path / "a.safetensors"
    # A power of two that makes nothing smaller, so that no rounding comes with it.
    save(a, {n: torch.tensor(2.0 * RANK) if n.endswith("alpha") else t.half() for n, t in spelt(key).items()})
    told = convert_lora(a, tmp_path / "peft.safetensors", model=base, layout="peft")
    assert told.layouts == ("kohya", "peft") and told.rounded == 0
    convert_lora(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", model=base, layout="kohya")
    one, other, third = (
        applied(natives(key), read(tmp_path / f"{name}.safetensors", key).patches)
        for name in ("a", "peft", "kohya")
    )
    assert distance(one, other) == distance(one, third) == 0


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if not name.startswith("kohya")])
def test_every_layout_becomes_kohyas(spelling: str, tmp_path: Path) -> None:
    key = "sdxl/base"
    base, a, out = (
        checkpoint(tmp_path / "base.safetensors", key),
        tmp_path / "a.safetensors",
        tmp_path / "out.safetensors",
    )
    convert_lora(lora(a, key, spelling), out, model=base, layout="kohya")
    assert error(deltas(out, key), deltas(a, key)) < 1e-7


def test_alpha_that_has_to_be_rounded_is_counted(tmp_path: Path) -> None:
    base, a, out = (
        checkpoint(tmp_path / "base.safetensors"),
        tmp_path / "a.safetensors",
        tmp_path / "out.safetensors",
    )
    assert ALPHA / RANK == 1.5
    save(a, {n: t if n.endswith("alpha") else t.half() for n, t in spelt(SD1).items()})
    told = convert_lora(a, out, model=base, layout="peft")
    assert told.rounded == sum(told.layers.values()) and 0 < error(deltas(out), deltas(a)) < 3e-4
    convert_lora(a, out, model=base, layout="peft", dtype="float32")
    assert error(deltas(out), deltas(a)) < 1e-7


def test_what_changes_nothing_or_has_no_place_is_refused(tmp_path: Path) -> None:
    base, a, out = (
        checkpoint(tmp_path / "base.safetensors"),
        tmp_path / "a.safetensors",
        tmp_path / "out.safetensors",
    )
    lora(a)
    with pytest.raises(BadInput, match="is in the layout 'kohya' already"):
        convert_lora(a, out, model=base, layout="kohya")
    with pytest.raises(BadInput, match="is in the layout 'kohya' and in float32 already"):
        convert_lora(a, out, model=base, layout="kohya", dtype="float32")
    with pytest.raises(BadInput, match=r"cannot be written in the layout 'khoya'.*kohya"):
        convert_lora(a, out, model=base, layout="khoya")
    with pytest.raises(BadInput, match="have no place in PEFT's names"):
        convert_lora(loha(tmp_path / "l.safetensors"), out, model=base, layout="peft")
    with pytest.raises(BadInput, match="where the checkpoint of a model is wanted"):
        convert_lora(base, out, model=a, layout="peft")
    with pytest.raises(BadFile, match="is no LoRA"):
        convert_lora(base, out, model=base, layout="peft")
    with pytest.raises(BadFile, match=r"fit nothing in .*would be lost"):
        save(a, spelt(SD1) | {"lora_unet_nowhere.diff": torch.ones(3)})
        convert_lora(a, out, model=base, layout="peft")
    with pytest.raises(BadFile, match=r"for which torch\.float16 has no numbers"):
        save(a, {n: t * 1e6 for n, t in spelt(SD1).items()})
        convert_lora(a, out, model=base, layout="kohya", dtype="float16")
    assert not out.exists()


def test_progress_ends_at_its_end_and_can_stop_the_work(tmp_path: Path) -> None:
    base, a, out = (
        checkpoint(tmp_path / "base.safetensors"),
        lora(tmp_path / "a.safetensors"),
        tmp_path / "out.safetensors",
    )
    seen: list[tuple[int, int]] = []
    convert_lora(a, out, model=base, layout="peft", progress=lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == 2 * a.stat().st_size
    before = out.read_bytes()

    def stop(done: int, total: int) -> None:
        if done == total:
            raise Cancelled("stopped")

    for work in (
        lambda: convert_lora(a, out, model=base, layout="peft", dtype="bf16", progress=stop),
        lambda: resize_lora(a, out, Wanted(rank=1), model=base, progress=stop),
        lambda: merge_loras([(a, 0.5)], out, model=base, progress=stop),
    ):
        with pytest.raises(Cancelled):
            work()
        assert out.read_bytes() == before
