"""Laws of extracting, resizing, merging and baking: exact where they claim it, within the error that was asked for."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.tensors import Lazy, lazy
from sumuk.weights.changes import Change, LowRank, lora_of, make_change
from sumuk.weights.lora_tools import (
    Extracted,
    Wanted,
    bake,
    extract,
    factored,
    merge,
    relative_change,
    resize,
)

SHAPES = ((24, 36), (36, 24), (24, 36, 1, 1), (24, 5, 3, 3), (7, 40, 3))
SPECTRA = st.floats(0.3, 3)
"""By how much singular values fall, a power."""


def matrix(rows: int, columns: int, fall: float, seed: int = 0) -> Tensor:
    """Random, with singular values 1, 2 ** -fall, 3 ** -fall, ..."""
    random = torch.Generator().manual_seed(seed)
    sides = [torch.randn(side, min(rows, columns), generator=random).double() for side in (rows, columns)]
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return ((left * torch.arange(1, min(rows, columns) + 1).double() ** -fall) @ right.t()).float()


def lora(shape: tuple[int, ...], rank: int = 4, seed: int = 0, alpha: float = 3.0) -> Change:
    random = torch.Generator().manual_seed(seed)
    factors = {
        "lora_down.weight": torch.randn(rank, *shape[1:], generator=random),
        "lora_up.weight": torch.randn(shape[0], rank, generator=random),
        "alpha": torch.tensor(alpha),
    }
    return make_change(factors, shape, f"layer {seed}")


def loha(shape: tuple[int, int]) -> Change:
    names = {
        "hada_w1_a": (shape[0], 2),
        "hada_w1_b": (2, shape[1]),
        "hada_w2_a": (shape[0], 2),
        "hada_w2_b": (2, shape[1]),
    }
    return make_change({name: torch.randn(*each) for name, each in names.items()}, shape, "loha")


def dora(shape: tuple[int, int]) -> Change:
    return make_change({**lora(shape).tensors(), "dora_scale": torch.rand(shape[0], 1) + 0.5}, shape, "dora")


def dense(change: Change, strength: float = 1.0) -> Tensor:
    return change.delta(torch.zeros(change.shape, dtype=torch.float64), strength)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


def one_of(before: Tensor, after: Tensor, wanted: Wanted, **more: Any) -> Extracted:
    (found,) = extract({"layer.weight": lazy(before)}, {"layer.weight": lazy(after)}, wanted, **more)
    return found


# -- extracting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_the_difference_comes_back(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    before, after = torch.randn(shape), torch.randn(shape)
    found = one_of(before, after, Wanted(error=0.0))
    assert isinstance(found.change, LowRank)
    assert found.outcome == "low rank"
    assert found.change.shape == shape
    assert apart(found.change.delta(before), after - before) < 2e-7  # 1.2e-7 measured
    assert found.kept is not None and found.kept.error < 1e-6
    assert found.norm == pytest.approx(float((after - before).norm()), rel=1e-6)
    assert found.weight == pytest.approx(float(before.norm()), rel=1e-6)


@given(
    rows=st.integers(2, 40),
    columns=st.integers(2, 40),
    fall=SPECTRA,
    error=st.floats(1e-4, 0.9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_least_rank_within_the_error_is_found(
    rows: int, columns: int, fall: float, error: float, seed: int
) -> None:
    whole = matrix(rows, columns, fall, seed)
    down, up, kept = factored(whole, Wanted(error=error))
    values = torch.linalg.svdvals(whole.double())
    rests = [float(values[rank:].norm() / values.norm()) for rank in range(1, len(values) + 1)]
    assert apart(up.double() @ down.double(), whole.double()) <= error * (1 + 1e-6) + 1e-6
    assert rests[kept.rank - 1] <= error * (1 + 1e-6) + 1e-9
    assert kept.rank == 1 or rests[kept.rank - 2] >= error * (1 - 1e-6)
    assert kept.error == pytest.approx(rests[kept.rank - 1], abs=1e-6)
    share = factored(whole, Wanted(share=1 - error**2))[2]
    assert abs(share.rank - kept.rank) <= 1  # one rounding of the same bound


def test_a_fixed_rank_is_the_nearest_matrix_of_it() -> None:
    whole = matrix(40, 60, 1.0)
    values = torch.linalg.svdvals(whole.double())
    for rank in (1, 7, 40, 99):
        down, up, kept = factored(whole, Wanted(rank=rank))
        assert down.shape == (min(rank, 40), 60) and up.shape == (40, min(rank, 40))
        best = float(values[rank:].norm() / values.norm())
        assert apart(up.double() @ down.double(), whole.double()) == pytest.approx(best, rel=1e-6, abs=3e-7)
        assert kept.share == pytest.approx(1 - best**2, rel=1e-9)
        assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-5)  # half of a singular value each
    assert factored(whole, Wanted(rank=3, error=1e-3))[2].rank == 3


def test_a_search_in_a_large_matrix_comes_near_the_best() -> None:
    """Much noise is the hard case."""
    torch.manual_seed(1)
    whole = torch.randn(512, 2048) + torch.randn(512, 8) @ torch.randn(8, 2048) / 2
    exact = factored(whole, Wanted(rank=32, error=0.0))[2]
    down, up, kept = factored(whole, Wanted(rank=32))
    assert kept.rank == exact.rank == 32
    assert apart(up.double() @ down.double(), whole.double()) == pytest.approx(kept.error, rel=1e-5)
    assert exact.error <= kept.error * (1 + 1e-6)
    assert kept.error < exact.error * 1.002  # 1.0012 measured; of noise in 1280 x 5120, rank 64, 1.0018
    again = factored(whole, Wanted(rank=32))
    assert torch.equal(down, again[0]) and torch.equal(up, again[1])


def test_every_tensor_is_accounted_for() -> None:
    torch.manual_seed(0)
    before = {
        "a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8), "b.bias": torch.randn(8),
        "norm.weight": torch.randn(8), "ids": torch.arange(8), "places": torch.arange(4),
    }  # fmt: skip
    after = {
        name: value + 1 if name not in ("a.weight", "ids") else value.clone()
        for name, value in before.items()
    }
    sides = [{name: lazy(value) for name, value in side.items()} for side in (before, after)]
    short = {each.name: each.outcome for each in extract(*sides, Wanted(rank=2))}
    assert short == {
        "a.weight": "same", "b.weight": "low rank", "b.bias": "left out", "norm.weight": "left out",
        "ids": "same", "places": "left out",
    }  # fmt: skip
    found = {each.name: each.change for each in extract(*sides, Wanted(rank=2), whole=True)}
    assert [*found] == sorted(before)
    assert found["a.weight"] is found["ids"] is None
    for name, suffix in (("b.bias", "diff_b"), ("norm.weight", "diff")):
        change = found[name]
        assert change is not None
        assert torch.equal(change.tensors()[suffix], after[name] - before[name])


def test_models_that_do_not_belong_together_are_refused() -> None:
    one, other = {"a": lazy(torch.ones(2, 2))}, {"a": lazy(torch.ones(2, 3))}
    with pytest.raises(BadInput, match="1 tensors are not in the model after: 'a'"):
        [*extract(one, {}, Wanted(rank=1))]
    with pytest.raises(BadInput, match="not in the model before: 'b'"):
        [*extract(one, one | {"b": one["a"]}, Wanted(rank=1))]
    with pytest.raises(BadInput, match=r"a: is \[2, 2\] before and \[2, 3\] after"):
        [*extract(one, other, Wanted(rank=1))]
    with pytest.raises(BadFile, match="a minus the same before is not finite") as caught:
        [*extract(one, {"a": lazy(torch.full((2, 2), float("nan")))}, Wanted(rank=1))]
    assert caught.value.code == "lora.values"


@pytest.mark.parametrize(
    "asked",
    (
        {}, {"rank": 0}, {"error": 1.0}, {"error": -0.1}, {"share": 0.0}, {"share": 1.1},
        {"share": 0.9, "error": 0.1}, {"error": float("nan")}, {"share": float("nan")},
    ),
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Wanted(**asked)


# -- resizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_nothing_changes(shape: tuple[int, ...]) -> None:
    change = lora(shape, alpha=-3.0)
    assert resize(change, Wanted(rank=4))[0] is change
    assert resize(change, Wanted(error=0.0))[0] is change
    wide = merge([(change, 0.5), (lora(shape, alpha=-3.0), 0.5)])  # of rank 8, and of 4 in truth
    small, kept = resize(wide, Wanted(error=1e-6))
    assert kept.rank == 4
    assert apart(dense(small), dense(change)) < 1e-7  # 4.6e-8 measured


@given(rank=st.integers(1, 12), fewer=st.integers(1, 12), alpha=st.floats(0.1, 9), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_resizing_is_the_truncated_svd_of_the_product(rank: int, fewer: int, alpha: float, seed: int) -> None:
    change = lora((9, 14), rank, seed, alpha)
    small, kept = resize(change, Wanted(rank=fewer))
    values = torch.linalg.svdvals(dense(change))
    best = float(values[fewer:].norm() / values.norm())
    assert apart(dense(small), dense(change)) == pytest.approx(best, abs=1e-6)
    assert kept.error == pytest.approx(best, abs=1e-6)
    assert kept.norm == pytest.approx(float(values.norm()), rel=1e-5)
    assert isinstance(small, LowRank)
    assert small.rank == kept.rank <= max(fewer, 1)


@pytest.mark.parametrize("error", (0.5, 0.1, 0.01))
def test_a_resized_lora_keeps_within_the_error(error: float) -> None:
    change = lora((40, 50), 30)
    small, kept = resize(change, Wanted(error=error))
    assert apart(dense(small), dense(change)) <= error
    assert kept.error <= error
    by_share, same = resize(change, Wanted(share=1 - error**2))
    assert same.rank == kept.rank
    assert torch.equal(dense(by_share), dense(small))


def test_an_untrained_lora_is_resized_to_nothing() -> None:
    change = lora_of(torch.randn(4, 36), torch.zeros(24, 4), (24, 36), "layer")
    small, kept = resize(change, Wanted(rank=2))
    assert not dense(small).any()
    assert (kept.share, kept.norm) == (1.0, 0.0)


def test_other_methods_become_loras_unless_they_read_the_weight() -> None:
    torch.manual_seed(0)
    change = loha((24, 36))
    small, kept = resize(change, Wanted(rank=4))
    assert isinstance(small, LowRank) and kept.rank == 4
    assert apart(dense(small), dense(change)) < 1e-6  # two of rank 2 multiply to rank 4
    bias = make_change({"diff_b": torch.ones(4)}, (4,), "layer")
    for refused in (dora((24, 36)), bias):
        with pytest.raises(BadInput, match="has no rank"):
            resize(refused, Wanted(rank=2))


# -- merging -------------------------------------------------------------------------------------------------------


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    strengths=st.lists(st.floats(-2, 2).filter(lambda s: abs(s) > 1e-3), min_size=4, max_size=4),
    shape=st.sampled_from(SHAPES),
)
@settings(max_examples=40, deadline=None)
def test_merging_is_the_sum(ranks: list[int], strengths: list[float], shape: tuple[int, ...]) -> None:
    changes = [
        (lora(shape, rank, seed, seed + 1.0), strength)
        for seed, (rank, strength) in enumerate(zip(ranks, strengths, strict=False))
    ]
    both = merge(changes)
    expected = sum(dense(change, strength) for change, strength in changes)
    size = sum(float(dense(change, strength).norm()) for change, strength in changes)
    assert float((dense(both) - expected).norm()) < 3e-7 * size
    assert isinstance(both, LowRank)
    assert both.rank == sum(ranks)


def test_other_methods_are_summed_whole() -> None:
    torch.manual_seed(0)
    one, other = lora((24, 36)), loha((24, 36))
    both = merge([(one, 0.5), (other, -1.0)])
    assert (both.method, [*both.tensors()]) == ("full", ["diff"])
    assert apart(dense(both), dense(one, 0.5) - dense(other)) < 1e-6
    biases = [make_change({"b_norm": torch.full((4,), value)}, (4,), "layer") for value in (1.0, 2.0)]
    total = merge([(biases[0], 1.0), (biases[1], 0.5)])
    assert (total.method, total.tensors()["b_norm"].tolist()) == ("norm", [2.0] * 4)
    assert merge([(one, 1.0)]) is one


def test_what_cannot_be_merged_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(BadInput, match="bake them into the model"):
        merge([(lora((24, 36)), 1.0), (dora((24, 36)), 1.0)])
    with pytest.raises(BadInput, match=r"changes \[36, 24\]"):
        merge([(lora((24, 36)), 1.0), (lora((36, 24)), 1.0)])
    with pytest.raises(BadInput, match="strength 0"):
        merge([(lora((24, 36)), 0.0)])
    with pytest.raises(BadInput, match="nothing to merge"):
        merge([])


# -- baking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_a_baked_weight_less_itself_is_the_sum_of_deltas(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 36).to(dtype)
    changes = [(lora((24, 36), seed=1), 0.7), (dora((24, 36)), 1.0), (loha((24, 36)), -0.3)]
    expected = weight.double() + sum(change.delta(weight.double(), strength) for change, strength in changes)
    result = bake(lazy(weight), changes, name="mid").load()
    assert result.dtype == dtype
    assert apart(result, expected) < torch.finfo(dtype).eps
    turned = bake(lazy(weight), changes[::-1], name="mid").load()
    assert apart(turned, result.double()) < torch.finfo(dtype).eps
    wide = bake(lazy(weight), changes, name="mid", dtype=torch.float32)
    assert wide.dtype == "F32"
    assert apart(wide.load(), expected) < 5e-7


def test_baking_reads_nothing_before_it_is_loaded_and_casts_once() -> None:
    reads: list[int] = []
    weight = torch.randn(24, 36)

    def load() -> Tensor:
        reads.append(1)
        return weight.half()

    made = bake(Lazy((24, 36), "F16", load, "model.safetensors"), [(lora((24, 36)), 1.0)], name="mid")
    assert (reads, made.shape, made.dtype, made.source) == ([], (24, 36), "F16", "model.safetensors")
    assert torch.equal(made.load(), (weight.half().float() + lora((24, 36)).delta(weight)).half())
    assert len(reads) == 1


def test_a_weight_that_grows_is_baked_larger() -> None:
    small, grown = (
        lora((24, 36)),
        {**lora((24, 72), seed=1).tensors(), "reshape_weight": torch.tensor([24, 72])},
    )
    weight = torch.randn(24, 36)
    made = bake(lazy(weight), [(small, 1.0), (make_change(grown, (24, 36), "img_in"), 1.0)], name="img_in")
    assert made.shape == (24, 72) == made.load().shape
    expected = dense(lora((24, 72), seed=1))
    expected[:, :36] += weight + dense(small)
    assert apart(made.load(), expected) < 1e-6


def test_what_cannot_be_baked_is_refused() -> None:
    weight = lazy(torch.full((24, 36), 6e4, dtype=torch.float16), "model.safetensors")
    change = make_change({"diff": torch.full((24, 36), 6e3)}, (24, 36), "style: mid")
    with pytest.raises(
        BadFile, match=r"model.safetensors: mid with style: mid goes beyond what F16 holds; write"
    ) as caught:
        bake(weight, [(change, 1.0)], name="mid").load()
    assert caught.value.code == "lora.values"
    with pytest.raises(BadFile, match="beyond what F8_E4M3 holds"):  # it would end at 448
        bake(weight, [(change, 1.0)], name="mid", dtype=torch.float8_e4m3fn).load()
    with pytest.raises(BadFile, match="beyond what F32 holds"):
        none = make_change({"diff": torch.full((24, 36), float("nan"))}, (24, 36), "style: mid")
        bake(weight, [(none, 1.0)], name="mid", dtype=torch.float32).load()
    wide = bake(weight, [(change, 1.0)], name="mid", dtype=torch.float32)
    assert torch.equal(wide.load(), torch.full((24, 36), 66000.0))
    with pytest.raises(BadInput, match=r"changes \[24, 36\], but mid is \[24, 35\]"):
        bake(lazy(torch.ones(24, 35)), [(change, 1.0)], name="mid")
    with pytest.raises(BadInput, match="mid: is I64"):
        bake(lazy(torch.ones(24, 36, dtype=torch.int64)), [(change, 1.0)], name="mid")
    with pytest.raises(BadInput, match="strength 0"):
        bake(weight, [(change, 0.0)], name="mid")
    with pytest.raises(BadInput, match="no changes"):
        bake(weight, [], name="mid")


def test_how_much_a_change_changes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 36)
    for change in (lora((24, 36)), loha((24, 36)), dora((24, 36))):
        size, whole = relative_change(change, weight, -0.7)
        assert size == pytest.approx(float(change.delta(weight, -0.7).norm()), rel=1e-6)
        assert whole == pytest.approx(float(weight.norm()), rel=1e-6)
    assert relative_change(lora((24, 5, 3, 3)), torch.zeros(24, 5, 3, 3))[0] == pytest.approx(
        float(dense(lora((24, 5, 3, 3))).norm()), rel=1e-6
    )
    one = lora_of(torch.ones(1, 4), torch.ones(9, 1), (9, 4), "layer")
    assert relative_change(one, torch.ones(9, 4), 2.0) == (
        pytest.approx(2 * sqrt(36)),
        pytest.approx(sqrt(36)),
    )
