"""LoRA, DoRA, whole differences and replacements of one tensor: against PEFT, and by their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.weights.changes import LowRank, lora_of, make_change, stacked

LINEAR, ONE, THREE = (24, 36), (24, 36, 1, 1), (24, 36, 3, 3)


def lora(
    shape: tuple[int, ...], rank: int = 4, seed: int = 0, alpha: float | None = None
) -> dict[str, Tensor]:
    """Random factors as kohya's scripts shape them."""
    torch.manual_seed(seed)
    factors = {
        "lora_down.weight": torch.randn(rank, *shape[1:]),
        "lora_up.weight": torch.randn(shape[0], rank, *(1 for _ in shape[2:])),
    }
    return factors if alpha is None else factors | {"alpha": torch.tensor(alpha)}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", ("linear", "conv"))
@pytest.mark.parametrize("dora", (False, True))
def test_it_is_what_peft_adds(kind: str, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = nn.Linear(36, 24) if kind == "linear" else nn.Conv2d(36, 24, 3)
    weight = layer.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=dora, init_lora_weights=False)
    model: Any = peft.get_peft_model(nn.Sequential(layer), config)
    tuned = model.base_model.model[0]
    factors = {
        "lora_down.weight": tuned.lora_A["default"].weight.detach().clone(),
        "lora_up.weight": tuned.lora_B["default"].weight.detach().clone(),
        "alpha": torch.tensor(6.0),
    }
    if dora:  # a convolution's norms are [1, out, 1, 1] there
        norms = tuned.lora_magnitude_vector["default"].weight.detach()
        norms.mul_(torch.rand_like(norms) + 0.5)
        factors["dora_scale"] = norms.clone().reshape(-1, *(1 for _ in weight.shape[1:]))
    ours = make_change(factors, tuple(weight.shape), "layer").delta(weight)
    merged = model.merge_and_unload()[0].weight.detach()
    assert apart(ours, merged - weight) < 1e-7  # 4.3e-8 measured


@given(
    shape=st.sampled_from((LINEAR, ONE, THREE, (6, 5, 3))),
    rank=st.integers(1, 40),
    alpha=st.one_of(st.none(), st.floats(-8, 8).filter(lambda alpha: abs(alpha) > 1e-3)),
    strength=st.floats(-2, 2),
)
@settings(max_examples=60, deadline=None)
def test_a_lora_is_its_definition(
    shape: tuple[int, ...], rank: int, alpha: float | None, strength: float
) -> None:
    factors = lora(shape, rank, alpha=alpha)
    change = make_change(factors, shape, "layer")
    down, up = (factors[name].double().flatten(1) for name in ("lora_down.weight", "lora_up.weight"))
    scale = 1.0 if alpha is None else float(torch.tensor(alpha)) / rank
    expected = strength * scale * (up @ down).reshape(shape)
    size = float(up.norm() * down.norm()) * abs(strength * scale)
    for dtype, bound in ((torch.float32, 5e-7), (torch.bfloat16, 5e-7), (torch.float64, 1e-15)):
        delta = change.delta(torch.zeros(shape, dtype=dtype), strength)
        assert delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float((delta - expected).norm()) <= bound * size + 1e-30
    live = change.low_rank()
    assert live is not None
    assert live[0].shape == (rank, *shape[1:])
    assert live[1].shape == (shape[0], rank)
    product = live[2] * (live[1] @ live[0].flatten(1))
    assert float((product.reshape(shape) * strength - expected).norm()) <= 1e-6 * size + 1e-30
    assert {name: each is factors[name] for name, each in change.tensors().items()} == dict.fromkeys(
        factors, True
    )


def test_linear_and_1x1_factors_fit_each_other_s_weights() -> None:
    flat = make_change(lora(LINEAR), LINEAR, "layer").delta(torch.zeros(LINEAR))
    for factors, shape in ((lora(LINEAR), ONE), (lora(ONE), LINEAR), (lora(ONE), ONE)):
        assert torch.equal(
            make_change(factors, shape, "layer").delta(torch.zeros(shape)).reshape(LINEAR), flat
        )


def test_a_tucker_core_is_folded_into_the_live_factors() -> None:
    factors = lora(ONE) | {"lora_mid.weight": torch.randn(4, 4, 3, 3)}
    change = make_change(factors, THREE, "layer")
    live = change.low_rank()
    assert live is not None
    assert live[0].shape == (4, 36, 3, 3)
    images = torch.randn(1, 36, 8, 8)
    chain = images
    for name in ("lora_down.weight", "lora_mid.weight", "lora_up.weight"):
        chain = nn.functional.conv2d(chain, factors[name])
    whole = nn.functional.conv2d(images, change.delta(torch.zeros(THREE)))
    beside = nn.functional.conv2d(nn.functional.conv2d(images, live[0]), live[1][:, :, None, None])
    assert apart(whole, chain) < 1e-6
    assert apart(beside, chain) < 1e-6


@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("shape", (LINEAR, THREE))
def test_dora_sets_the_norms_of_rows_or_columns(shape: tuple[int, ...], axis: int) -> None:
    sides = [size if side == axis else 1 for side, size in enumerate(shape)]
    norms = torch.rand(sides) + 0.5
    weight = torch.randn(shape)
    weight[0] = 0
    factors = lora(shape, alpha=2.0) | {"dora_scale": norms}
    factors["lora_up.weight"][0] = 0  # a row of zeros, which has no norm to divide by
    change = make_change(factors, shape, "layer")
    changed = weight + change.delta(weight)
    rows = changed.movedim(axis, 0).flatten(1)
    assert changed.isfinite().all()
    assert torch.allclose(rows.norm(dim=1)[1 - axis :], norms.flatten()[1 - axis :], rtol=1e-5)
    plain = make_change(lora(shape, alpha=2.0), shape, "layer").delta(weight) + weight
    plain[0] = 0
    turned = torch.nn.functional.cosine_similarity(rows, plain.movedim(axis, 0).flatten(1))
    assert torch.allclose(turned[1 - axis :], torch.ones(shape[axis] - 1 + axis), atol=1e-5)
    assert torch.allclose(change.delta(weight, 0.5), change.delta(weight) / 2)


def test_what_is_stored_whole() -> None:
    torch.manual_seed(0)
    weight, other = torch.randn(THREE), torch.randn(THREE)
    assert torch.equal(make_change({"diff": other}, THREE, "layer").delta(weight, 0.5), other / 2)
    for name, method in (("diff_b", "full"), ("lora_B.bias", "full"), ("w_norm", "norm"), ("b_norm", "norm")):
        change = make_change({name: other[0, :, 0, 0]}, (36,), "layer")
        assert (change.method, change.shape) == (method, (36,))
        assert torch.equal(change.delta(torch.zeros(36), -1), -other[0, :, 0, 0])
        assert [*change.tensors()] == [name]
    replaced = make_change({"set_weight": other}, THREE, "layer")
    assert apart(weight + replaced.delta(weight), other) < 1e-7
    assert apart(weight + replaced.delta(weight, 0.5), (weight + other) / 2) < 1e-7


def test_a_sparse_rest_is_added_to_the_low_rank() -> None:
    factors = lora(THREE, alpha=2.0) | {
        "bias_indices": torch.tensor([[0, 23], [5, 323]], dtype=torch.int16),
        "bias_values": torch.tensor([1.0, -2.0], dtype=torch.float16),
        "bias_size": torch.tensor([24, 324], dtype=torch.int16),
    }
    change = make_change(factors, THREE, "layer")
    rest = change.delta(torch.zeros(THREE)) - make_change(lora(THREE, alpha=2.0), THREE, "layer").delta(
        torch.zeros(THREE)
    )
    assert torch.allclose(rest.reshape(24, 324)[[0, 23], [5, 323]], torch.tensor([0.5, -1.0]), atol=1e-5)
    assert int((rest.abs() > 1e-5).sum()) == 2
    assert change.low_rank() is None
    factors["bias_indices"] = torch.tensor([[0, -1], [5, 323]])
    with pytest.raises(BadFile, match="outside of bias_size"):
        make_change(factors, THREE, "layer")
    del factors["bias_size"]
    with pytest.raises(BadFile, match="bias_size is not there"):
        make_change(factors, THREE, "layer")


def test_a_weight_may_grow_first() -> None:
    """As the input layer of FLUX's control LoRAs, which takes twice as many channels."""
    factors = lora((24, 72)) | {"reshape_weight": torch.tensor([24, 72])}
    change = make_change(factors, LINEAR, "img_in")
    assert (change.shape, change.result) == (LINEAR, (24, 72))
    assert change.low_rank() is None
    plain = make_change(lora((24, 72)), (24, 72), "img_in")
    assert torch.equal(change.delta(torch.ones(LINEAR)), plain.delta(torch.zeros(24, 72)))
    for sizes in ([24, 35], [24, 72, 1]):
        with pytest.raises(BadFile, match="does not enlarge"):
            make_change(factors | {"reshape_weight": torch.tensor(sizes)}, LINEAR, "img_in")


def without(name: str) -> dict[str, Tensor]:
    return {each: factor for each, factor in lora(LINEAR).items() if each != name}


@pytest.mark.parametrize(
    ("factors", "shape", "code", "says"),
    (
        ({}, LINEAR, "unknown", "nothing is no known"),
        ({"alpha": torch.tensor(1.0)}, LINEAR, "unknown", "alpha is no known"),
        ({"lora_magic": torch.ones(1)}, LINEAR, "unknown", "lora_magic"),
        (lora(LINEAR) | {"lora_magic": torch.ones(1)}, LINEAR, "unknown", "lora_magic has no meaning"),
        (lora(LINEAR) | {"diff": torch.ones(LINEAR)}, LINEAR, "method", "more than one method"),
        (without("lora_up.weight"), LINEAR, "half", "lora_up.weight is not there"),
        (without("lora_down.weight"), LINEAR, "half", "lora_down.weight is not there"),
        (without("lora_up.weight") | {"lora_up.weight": torch.ones(24, 5)}, LINEAR, "shape", "[24, 5]"),
        (lora((23, 36)), LINEAR, "shape", "lora_up.weight is [23, 4]"),
        (lora((24, 35)), LINEAR, "shape", "needs 36 columns"),
        (lora(THREE), LINEAR, "shape", "needs 36 columns"),
        (lora((24, 36, 1, 9)), THREE, "shape", "needs a kernel [3, 3]"),
        (lora(LINEAR), (36,), "shape", "it is not a matrix"),
        (lora(LINEAR, rank=0), LINEAR, "shape", "needs a matrix"),
        (lora((2, 2), rank=1 << 20), (2, 2), "rank", "rank 1,048,576 is absurd"),
        (lora(LINEAR, alpha=float("nan")), LINEAR, "alpha", "alpha is nan"),
        (lora(LINEAR, alpha=float("inf")), LINEAR, "alpha", "alpha is inf"),
        (lora(LINEAR, alpha=0.0), LINEAR, "alpha", "alpha is 0"),
        (lora(LINEAR) | {"alpha": torch.ones(2)}, LINEAR, "alpha", "a tensor [2]"),
        ({name: each.to(torch.int8) for name, each in lora(LINEAR).items()}, LINEAR, "type", "torch.int8"),
        (lora(LINEAR) | {"dora_scale": torch.ones(36, 1)}, LINEAR, "shape", "[24, 1, ...] or [1, 36, ...]"),
        (lora(LINEAR) | {"dora_scale": torch.ones(24, 1, dtype=torch.int8)}, LINEAR, "type", "dora_scale"),
        (lora(ONE) | {"lora_mid.weight": torch.ones(4, 4, 1, 3)}, THREE, "shape", "a core [4, 4, 3, 3]"),
        ({"diff": torch.ones(36, 24)}, LINEAR, "shape", "needs the same shape"),
        ({"set_weight": torch.ones(24)}, LINEAR, "shape", "needs the same shape"),
        ({"diff_b": torch.ones(24), "dora_scale": torch.ones(24)}, (24,), "unknown", "dora_scale"),
        ({"diff": torch.ones(LINEAR), "alpha": torch.tensor(1.0)}, LINEAR, "unknown", "alpha"),
    ),
)
def test_factors_that_do_not_fit_are_refused_by_name(
    factors: dict[str, Tensor], shape: tuple[int, ...], code: str, says: str
) -> None:
    with pytest.raises(BadFile) as caught:
        make_change(factors, shape, "style.safetensors: mid")
    assert caught.value.code == f"lora.{code}"
    assert says in str(caught.value)
    assert str(caught.value).startswith("style.safetensors: mid: ")
    assert "\n" not in str(caught.value)


def test_a_change_is_added_to_its_own_shape_only_and_by_a_number() -> None:
    change = make_change(lora(LINEAR), LINEAR, "layer")
    with pytest.raises(BadInput, match=r"\[24, 36\] cannot be added to \[24, 36, 1, 1\]"):
        change.delta(torch.zeros(ONE))
    with pytest.raises(BadInput, match="strength nan"):
        change.delta(torch.zeros(LINEAR), float("nan"))


def test_loras_of_bands_become_one() -> None:
    parts = [
        (8, make_change(lora((8, 36), 2, 1, 3.0), (8, 36), "k")),
        (0, make_change(lora((8, 36), 4), (8, 36), "q")),
    ]
    change = stacked(parts, LINEAR, "qkv")
    assert isinstance(change, LowRank)
    assert change.rank == 6
    delta = change.delta(torch.zeros(LINEAR), 0.5)
    for begin, part in parts:
        assert apart(delta[begin : begin + 8], part.delta(torch.zeros(8, 36), 0.5)) < 1e-6
    assert not delta[16:].any()
    assert (
        make_change(change.tensors(), LINEAR, "qkv")
        .delta(torch.zeros(LINEAR))
        .equal(change.delta(torch.zeros(LINEAR)))
    )


def test_bands_of_other_methods_keep_them() -> None:
    weight = torch.randn(LINEAR)
    dora = make_change(lora((8, 36)) | {"dora_scale": torch.rand(8, 1)}, (8, 36), "v")
    change = stacked([(0, make_change(lora((8, 36)), (8, 36), "q")), (16, dora)], LINEAR, "qkv")
    assert change.reads_weight
    assert torch.equal(change.delta(weight)[16:], dora.delta(weight[16:]))
    assert not change.delta(weight)[8:16].any()
    with pytest.raises(BadInput, match="DoRA and LoRA of parts of a weight"):
        change.tensors()
    bias = stacked([(8, make_change({"diff_b": torch.ones(8)}, (8,), "k"))], (24,), "qkv")
    assert bias.delta(torch.zeros(24)).tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 8
    assert not bias.reads_weight


@pytest.mark.parametrize("begin", (4, 17))
def test_bands_that_overlap_or_stand_out_are_refused(begin: int) -> None:
    parts = [(at, make_change(lora((8, 36)), (8, 36), "q")) for at in (0, begin)]
    with pytest.raises(BadFile, match=f"from row {begin} on is no band") as caught:
        stacked(parts, LINEAR, "qkv")
    assert caught.value.code == "lora.shape"


def test_a_lora_out_of_two_matrices_has_its_rank_as_alpha() -> None:
    change = lora_of(torch.randn(4, 36 * 9), torch.randn(24, 4), THREE, "layer")
    assert {name: tuple(each.shape) for name, each in change.tensors().items()} == {
        "lora_down.weight": (4, 36, 3, 3),
        "lora_up.weight": (24, 4, 1, 1),
        "alpha": (),
    }
    assert change.scale == 1
