"""A LoRA taken out of two checkpoints: what it adds is what they differ by, and what it lacks is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.weights.lora_files import RANK, applied, distance, model, natives
from tests.weights.lora_made import (
    EVEN,
    KEYS,
    SD1,
    checkpoint,
    deltas,
    error,
    loaded,
    lora,
    read,
)
from tests.weights.tiny import weights
from torch import Tensor

import sumuk
from sumuk.base.errors import BadFile, BadInput
from sumuk.files.hashes import hashes
from sumuk.files.safetensors import read_header
from sumuk.weights.lora_bake import bake_loras
from sumuk.weights.lora_extract import alike, extract_lora
from sumuk.weights.lora_tools import Wanted

ALL = Wanted(rank=10_000)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1.2e-7), ("float16", 3e-4)])
@pytest.mark.parametrize("key", KEYS)
def test_before_and_what_was_extracted_make_after(key: str, dtype: str, most: float, tmp_path: Path) -> None:
    before, after, a = (
        checkpoint(tmp_path / "b.safetensors", key),
        tmp_path / "a.safetensors",
        tmp_path / "l.safetensors",
    )
    bake_loras(before, [(lora(tmp_path / "made.safetensors", key), 1.0, None, None)], after)
    told = extract_lora(before, after, a, ALL, dtype=dtype)
    bake_loras(before, [(a, 1.0, None, None)], tmp_path / "again.safetensors")
    # Measured: at most 6e-8 and 2.0e-4; what is added is up to 1.
    assert distance(loaded(tmp_path / "again.safetensors"), loaded(after)) <= most
    assert told.kept == pytest.approx(1, abs=1e-9) and told.error < 1e-6 and not told.left
    assert told.same == len(weights(model(key))) - len({f"{p.part}.{p.name}" for p in read(a, key).patches})
    assert sum(told.layers.values()) == len(read(a, key).patches)
    assert told.source[str(after)] == hashes(after) and told.target == hashes(a)
    assert json.loads(read_header(a).metadata["sumuk.extracted"])["before"]["sha256"] == hashes(before).sha256


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("key", ["sdxl/base", "flux/dev"])
def test_what_was_baked_comes_out_again(key: str, layout: str, tmp_path: Path) -> None:
    """Across layouts and types of the two checkpoints; each of q, k and v gets its own rank."""
    made = lora(tmp_path / "made.safetensors", key, "PEFT")
    before = checkpoint(tmp_path / "before", key, layout="diffusers")
    after, out = tmp_path / "after.safetensors", tmp_path / "out.safetensors"
    bake_loras(before, [(made, 1.0, None, None)], after, layout="single")
    told = extract_lora(before, after, out, Wanted(rank=RANK), layout=layout, dtype="float32")
    assert told.layout == layout == read(out, key).layout
    if layout == "peft":  # flux's kohya layers are stacks, whose rank is the sum of those in them
        assert (
            set(told.ranks) == {RANK} and error(deltas(out, key), deltas(made, key)) < 1e-6
        )  # measured: 1.6e-7
        assert told.kept > 1 - 1e-12
    found = error(deltas(out, key), deltas(made, key))
    assert found == pytest.approx(told.error, abs=1e-6) and told.kept == pytest.approx(1 - found**2, abs=1e-6)
    assert told.error <= told.worst[1] < 1


def changed(path: Path, change: Callable[[str, Tensor], Tensor], key: str = SD1, **more: Any) -> Path:
    """A checkpoint with other numbers."""
    host = model(key)
    own = {
        part: {n: change(f"{part}.{n}", v) for n, v in net.state_dict().items()}
        for part, net in host.networks.items()
    }
    before = {
        part: {n: v.clone() for n, v in net.state_dict().items()} for part, net in host.networks.items()
    }
    try:
        for part, net in host.networks.items():
            net.load_state_dict(own[part])
        sumuk.save(host, path, **more)
    finally:
        for part, net in host.networks.items():
            net.load_state_dict(before[part])
    return path


ODD = ("denoiser.out.2.bias", "denoiser.input_blocks.1.0.in_layers.0.weight", "vae.decoder.conv_in.weight")


def test_what_has_no_name_or_no_rank_is_told_or_stored_whole(tmp_path: Path) -> None:
    before = checkpoint(tmp_path / "before.safetensors")
    after = changed(tmp_path / "after.safetensors", lambda n, v: v + 0.1 if n in (*ODD, EVEN) else v)
    own = weights(model(SD1))
    sizes = {name: own[name].numel() ** 0.5 for name in (*ODD, EVEN)}
    whole = sum(each**2 for each in sizes.values()) ** 0.5
    out = tmp_path / "out.safetensors"
    told = extract_lora(before, after, out, Wanted(rank=1), dtype="float32")
    assert {each.name: pytest.approx(each.share, rel=1e-4) for each in told.left} == {
        name: sizes[name] / whole for name in ODD
    }
    assert told.left[0].name == ODD[2] and told.layers == {"denoiser": 1}
    assert told.kept == pytest.approx((sizes[EVEN] / whole) ** 2, rel=1e-4) and told.error < 1e-5
    told = extract_lora(before, after, out, Wanted(rank=1), dtype="float32", whole=True)
    assert [each.name for each in told.left] == [ODD[2]] and told.whole == 2
    assert {name.rpartition(".")[2] for name in load_file(out)} >= {"diff_b", "w_norm"}
    expected = {name: one for name, one in loaded(after).items() if name in natives(SD1)}
    assert distance(applied(natives(SD1), read(out).patches), expected) < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_no_difference(dtype: str, tmp_path: Path) -> None:
    """Between types, and where neither holds the other."""
    wide = checkpoint(tmp_path / "wide.safetensors")
    small = checkpoint(tmp_path / "small.safetensors", dtype=dtype)
    other = checkpoint(tmp_path / "other.safetensors", dtype={"float16": "bfloat16"}.get(dtype, "float16"))
    for before, after in ((wide, small), (small, wide), (small, other)):
        with pytest.raises(BadInput, match="hold the same numbers, but for rounding"):
            extract_lora(before, after, tmp_path / "out.safetensors", ALL)
    after = changed(tmp_path / "after.safetensors", lambda n, v: v * 1.1 if n == EVEN else v, dtype=dtype)
    told = extract_lora(wide, after, tmp_path / "out.safetensors", ALL)
    assert told.layers == {"denoiser": 1} and not told.left


def test_roundings_of_one_number_are_alike_and_steps_are_not() -> None:
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -6, 4, 200_000
    )
    for one in (torch.float16, torch.bfloat16, torch.float32):
        for other in (torch.float16, torch.bfloat16, torch.float32):
            assert alike(numbers.to(one), numbers.to(other))
    assert not alike(numbers.half(), (numbers * 1.02).bfloat16()) and not alike(
        numbers, (numbers * 1.001).half()
    )


def test_parts_can_be_chosen(tmp_path: Path) -> None:
    before, after, out = (tmp_path / f"{name}.safetensors" for name in ("before", "after", "out"))
    bake_loras(checkpoint(before), [(lora(tmp_path / "made.safetensors"), 1.0, None, None)], after)
    assert set(extract_lora(before, after, out, Wanted(rank=2), parts=["text"]).layers) == {"text"}
    with pytest.raises(BadInput, match="parts: no 'vae' that a LoRA could change"):
        extract_lora(before, after, out, Wanted(rank=2), parts=["vae"])
    bake_loras(before, [(lora(tmp_path / "u.safetensors", only="lora_unet"), 1.0, None, None)], after)
    with pytest.raises(BadInput, match=r"the text of .* has no difference"):
        extract_lora(before, after, out, Wanted(rank=2), parts=["denoiser", "text"])
    with pytest.raises(BadInput, match="whole would do nothing"):
        extract_lora(before, after, out, Wanted(rank=2), whole=True)
    with pytest.raises(BadInput, match="PEFT's names have no place for whole differences"):
        extract_lora(before, after, out, Wanted(rank=2), whole=True, layout="peft")


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, out = checkpoint(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(BadInput, match="leads from one model to another of its family"):
        extract_lora(base, checkpoint(tmp_path / "xl.safetensors", "sdxl/base"), out, ALL)
    with pytest.raises(BadInput, match=r"differ in shape: 'denoiser\.input_blocks\.0\.0\.weight'"):
        extract_lora(base, checkpoint(tmp_path / "inpaint.safetensors", "sd1/inpainting"), out, ALL)
    with pytest.raises(BadInput, match="where the checkpoint of a model is wanted"):
        extract_lora(lora(tmp_path / "a.safetensors"), base, out, ALL)
    with pytest.raises(BadInput, match="which is read"):
        extract_lora(base, changed(tmp_path / "b.safetensors", lambda _, v: v * 1.5), base, ALL)
    nan = changed(tmp_path / "nan.safetensors", lambda n, v: v / 0 if n == EVEN else v)
    with pytest.raises(BadFile, match="is not finite"):
        extract_lora(base, nan, out, ALL)
    assert not out.exists()
