"""LyCORIS's methods against LyCORIS itself on the same random factors, and rotations against their definition."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile
from sumuk.weights.changes import Change, make_change

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(36, 24, bias=False),
    "conv1x1": lambda: nn.Conv2d(36, 24, 1, bias=False),
    "conv3x3": lambda: nn.Conv2d(36, 24, 3, bias=False),
}
CLOSE = 1e-6
"""Relative, in float32; 6.8e-7 was measured, of LyCORIS's rotations, 3.7e-7 of the rest."""


def module(algo: str, kind: str, **more: Any) -> Any:
    """A module of LyCORIS with random factors."""
    modules = pytest.importorskip("lycoris.modules")
    kinds = {
        "lora": "LoConModule", "loha": "LohaModule", "lokr": "LokrModule", "glora": "GLoRAModule",
        "ia3": "IA3Module", "oft": "DiagOFTModule", "boft": "ButterflyOFTModule",
    }  # fmt: skip
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    rank = 2 if algo == "lokr" else 4  # its halves are small
    made = getattr(modules, kinds[algo])("layer", layer, 1.0, **{"lora_dim": rank, "alpha": 4, **more})
    with torch.no_grad():
        for name, factor in made.named_parameters():
            if name not in ("org_module", "dora_scale"):
                factor.normal_().mul_(0.5)
            if name in ("rescale", "dora_scale"):
                factor.abs_().add_(0.5)
    return made


def changed(made: Any) -> Change:
    weight = made.org_module[0].weight
    factors = {name: value.detach() for name, value in made.state_dict().items()}
    return make_change(factors, tuple(weight.shape), "layer")


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs.reshape(ours.shape)).norm() / theirs.norm())


def same(made: Any, theirs: Tensor, strength: float = 1.0, close: float = CLOSE) -> None:
    assert apart(changed(made).delta(made.org_module[0].weight.detach(), strength), theirs.detach()) < close


PLAIN = [
    (algo, kind, alpha, more)
    for algo, kind, alpha in product(("lora", "loha", "lokr"), LAYERS, (4, 1.5))
    for more in (
        {},
        *([{"use_tucker": True}] if kind == "conv3x3" else []),
        *(
            [{"factor": 6}, {"full_matrix": True}, {"decompose_both": True, "factor": 6}]
            if algo == "lokr"
            else []
        ),
    )
]


@pytest.mark.parametrize(("algo", "kind", "alpha", "more"), PLAIN)
def test_products_are_those_of_lycoris(algo: str, kind: str, alpha: float, more: dict[str, Any]) -> None:
    made = module(algo, kind, alpha=alpha, **more)
    # What LyCORIS trains with: its get_diff_weight of LoHa and LoKr multiplies by alpha / rank a second time.
    theirs = made.make_weight() * made.scale if algo == "lora" else made.get_weight(made.shape)
    same(made, theirs)
    same(made, -0.7 * theirs, -0.7)
    weight = made.org_module[0].weight.detach().double()
    made = made.double()
    theirs = made.make_weight() * made.scale if algo == "lora" else made.get_weight(made.shape)
    assert apart(changed(made).delta(weight), theirs.detach()) < 1e-14


@pytest.mark.parametrize(("algo", "kind", "alpha", "more"), PLAIN)
@pytest.mark.parametrize("rows", (True, False))
def test_dora_is_that_of_lycoris(
    algo: str, kind: str, alpha: float, more: dict[str, Any], rows: bool
) -> None:
    made = module(algo, kind, alpha=alpha, weight_decompose=True, wd_on_out=rows, **more)
    plain = made.make_weight() * made.scale if algo == "lora" else made.get_weight(made.shape)
    weight = made.org_module[0].weight.detach()
    theirs = made.apply_weight_decompose(weight + plain.reshape(weight.shape)) - weight
    same(made, theirs)
    same(made, 0.4 * theirs, 0.4)
    change = changed(made)
    assert change.method == "DoRA"
    assert change.low_rank() is None
    assert not change.delta(weight, 0.0).any()


@pytest.mark.parametrize(("kind", "alpha"), product(LAYERS, (4, 1.5)))
def test_glora_is_that_of_lycoris(kind: str, alpha: float) -> None:
    made = module("glora", kind, alpha=alpha)
    for strength in (1.0, -0.7):
        same(made, made.get_diff_weight(strength)[0], strength)


@pytest.mark.parametrize("kind", LAYERS)
def test_old_files_of_glora_have_their_factors_the_other_way_round(kind: str) -> None:
    made = module("glora", kind, alpha=1.5)
    weight = made.org_module[0].weight.detach()
    new = {name: value.detach() for name, value in made.state_dict().items()}
    old = {name: new[name.replace("1", "3").replace("2", "1").replace("3", "2")] for name in new}
    assert old["b2.weight"].shape[0] == 24
    ours = make_change(old, tuple(weight.shape), "layer").delta(weight)
    assert torch.equal(ours, changed(made).delta(weight))


@pytest.mark.parametrize(("kind", "columns"), product(LAYERS, (True, False)))
def test_ia3_is_that_of_lycoris(kind: str, columns: bool) -> None:
    made = module("ia3", kind, train_on_input=columns)
    for strength in (1.0, -0.7):
        same(made, made.get_diff_weight(strength)[0], strength)


@pytest.mark.parametrize(
    ("algo", "kind", "constraint", "rescaled"), product(("oft", "boft"), LAYERS, (0, 0.01), (True, False))
)
def test_rotations_are_those_of_lycoris(algo: str, kind: str, constraint: float, rescaled: bool) -> None:
    made = module(algo, kind, constraint=constraint, rescaled=rescaled, lora_dim=12 if algo == "boft" else 4)
    assert changed(made).method == algo.upper()
    weight = made.org_module[0].weight.detach()
    for strength in (1.0,) if rescaled else (1.0, 0.3):
        ours, theirs = changed(made).delta(weight, strength), made.get_diff_weight(strength)[0].detach()
        assert (
            apart(weight + ours, weight + theirs) < CLOSE
        )  # their small turns are differences of large numbers
        assert apart(ours, changed(made).delta(weight.double(), strength).float()) < 5e-7
    assert not changed(made).delta(weight, 0.0).any()


def rotation(skew: Tensor) -> Tensor:
    unit = torch.eye(len(skew), dtype=skew.dtype)
    return (unit + skew) @ torch.linalg.inv(unit - skew)


def test_oft_is_its_definition_in_float64() -> None:
    torch.manual_seed(0)
    blocks = torch.randn(3, 4, 4, dtype=torch.float64)
    scale = torch.rand(12, 1, dtype=torch.float64) + 0.5
    weight = torch.randn(12, 7, dtype=torch.float64)
    whole = torch.block_diag(*(rotation(block - block.T).T for block in blocks))
    assert torch.allclose(whole @ whole.T, torch.eye(12, dtype=torch.float64))
    change = make_change({"oft_blocks": blocks, "rescale": scale}, (12, 7), "layer")
    assert torch.allclose(change.delta(weight), scale * (whole @ weight) - weight, atol=1e-13)
    half = (1 + 0.5 * (scale - 1)) * ((whole + torch.eye(12)) / 2 @ weight) - weight
    assert torch.allclose(change.delta(weight, 0.5), half, atol=1e-13)


def test_boft_is_its_definition_in_float64() -> None:
    torch.manual_seed(0)
    stages, number, size = 2, 4, 4
    blocks = torch.randn(stages, number, size, size, dtype=torch.float64)
    weight = torch.randn(16, 7, dtype=torch.float64)
    expected = weight.clone()
    for stage in range(stages):
        apart_by = 2**stage * size // 2
        order = [  # rows of a group of two runs, taken one from each in turn
            group + side * apart_by + at
            for group in range(0, 16, 2 * apart_by)
            for at in range(apart_by)
            for side in (0, 1)
        ]
        turn = torch.block_diag(*(rotation(block - block.T) for block in blocks[stage]))
        moved = turn @ expected[order]
        expected = torch.empty_like(moved)
        expected[order] = moved
    ours = make_change({"oft_blocks": blocks}, (16, 7), "layer").delta(weight)
    assert torch.allclose(ours, expected - weight, atol=1e-13)


def hada(**more: Tensor) -> dict[str, Tensor]:
    sides = {"hada_w1_a": (24, 4), "hada_w1_b": (4, 36), "hada_w2_a": (24, 4), "hada_w2_b": (4, 36)}
    return {name: torch.zeros(*shape) for name, shape in sides.items()} | more


@pytest.mark.parametrize(
    ("factors", "code", "says"),
    (
        (hada(hada_w2_b=torch.zeros(4, 35)), "shape", "hada_w2_b is [4, 35]"),
        (hada(hada_w2_b=torch.zeros(3, 36), hada_w2_a=torch.zeros(24, 3)), "shape", "hada_w2"),
        (hada(hada_t1=torch.zeros(4, 4)), "half", "hada_t2 is not there"),
        (hada(lora_mid=torch.zeros(1)), "unknown", "lora_mid"),
        (hada(alpha=torch.tensor(float("nan"))), "alpha", "alpha is nan"),
        ({"hada_w1_a": torch.zeros(24, 4)}, "half", "hada_w1_b is not there"),
        ({"lokr_w1": torch.zeros(4, 6)}, "half", "lokr_w2 is not there"),
        ({"lokr_w1": torch.zeros(4, 6), "lokr_w2_a": torch.zeros(6, 2)}, "half", "lokr_w2_b is not there"),
        ({"lokr_w1": torch.zeros(4, 6), "lokr_w2": torch.zeros(6, 7)}, "shape", "[4, 6] times [6, 7]"),
        (
            {
                "lokr_w1_a": torch.zeros(4, 2), "lokr_w1_b": torch.zeros(2, 6),
                "lokr_w2_a": torch.zeros(6, 3), "lokr_w2_b": torch.zeros(3, 6),
            },
            "rank", "[2, 3]",
        ),
        ({"lokr_w1": torch.zeros(4, 6), "lokr_w2": torch.zeros(6, 6), "lokr_t2": torch.zeros(2, 2)}, "half", "_a"),
        ({"oft_blocks": torch.zeros(5, 5, 5)}, "shape", "24 rows"),
        ({"oft_blocks": torch.zeros(24)}, "shape", "square blocks"),
        ({"oft_blocks": torch.zeros(5, 6, 4, 4)}, "shape", "strides"),
        ({"oft_blocks": torch.zeros(70, 6, 4, 4)}, "shape", "strides"),
        ({"oft_blocks": torch.zeros(6, 4, 4), "rescale": torch.ones(36, 1)}, "shape", "24 numbers"),
        ({"oft_blocks": torch.zeros(6, 4, 4), "alpha": torch.tensor(-1.0)}, "alpha", "negative"),
        ({"weight": torch.zeros(36), "on_input": torch.tensor(0)}, "shape", "24 numbers"),
        ({"weight": torch.zeros(36)}, "half", "on_input"),
        ({"weight": torch.zeros(36), "on_input": torch.tensor(1), "dora_scale": torch.ones(24, 1)}, "unknown", "IA3"),
        (
            {
                "a1.weight": torch.zeros(36, 4), "a2.weight": torch.zeros(4, 36),
                "b1.weight": torch.zeros(24, 4), "b2.weight": torch.zeros(4, 35),
            },
            "shape", "b2.weight",
        ),
    ),
)  # fmt: skip
def test_factors_that_do_not_fit_are_refused(factors: dict[str, Tensor], code: str, says: str) -> None:
    with pytest.raises(BadFile) as caught:
        make_change(factors, (24, 36), "style.safetensors: mid")
    assert caught.value.code == f"lora.{code}"
    assert says in str(caught.value)
    assert str(caught.value).startswith("style.safetensors: mid: ")
    assert "\n" not in str(caught.value)


def test_alpha_means_nothing_to_lokr_of_two_whole_halves() -> None:
    factors = {
        "lokr_w1": torch.randn(4, 6),
        "lokr_w2": torch.randn(6, 6),
        "alpha": torch.tensor(float("inf")),
    }
    change = make_change(factors, (24, 36), "layer")
    assert torch.equal(change.delta(torch.zeros(24, 36)), torch.kron(factors["lokr_w1"], factors["lokr_w2"]))


def test_a_kernel_of_lokr_must_be_that_of_the_weight() -> None:
    factors = {"lokr_w1": torch.randn(4, 6), "lokr_w2": torch.randn(6, 2, 1, 9)}
    with pytest.raises(BadFile, match=r"needs a kernel \[3, 3\]"):
        make_change(factors, (24, 12, 3, 3), "layer")
