"""What merging must obey, whatever the numbers: ends, swaps, equals, order, and the same again from the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from examples import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import sumuk
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import from_header
from sumuk.weights.merge import merge, recipe_of, run, verify
from sumuk.weights.merge_methods import METHODS

TWO = [name for name in METHODS if METHODS[name].roles == ("A", "B")]
RATES = st.floats(0, 1, width=32)
NUMBERS = st.floats(-1e4, 1e4, width=32)


def tensor(seed: int, shape: tuple[int, ...] = (9, 5)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mix(name: str, models: list[torch.Tensor], alpha: float, seed: int = 0, **more: float) -> torch.Tensor:
    method = METHODS[name]
    values = (
        method.check({}, len(models)) | {"seed": seed} | ({"low": 0.2, "high": 0.9} if method.survey else {})
    )
    return method.mix(models, alpha, values | more, "denoiser.x").tensor


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, also where 0 is -0."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("name", TWO)
def test_rate_0_is_the_first_and_rate_1_the_second(name: str) -> None:
    a, b = tensor(1), tensor(2)
    a[0, 0], b[0, 0] = -0.0, 0.0
    if METHODS[name].neutral:
        assert torch.equal(mix(name, [a, b], 0.0), a)
    if name != "weighted-average":  # whose rate leads to the average
        assert torch.equal(mix(name, [a, b], 1.0), b)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].neutral])
def test_rate_0_leaves_the_first(name: str) -> None:
    models = [tensor(i) for i in range(len(METHODS[name].roles))]
    assert torch.equal(mix(name, models, 0.0), models[0])


@pytest.mark.parametrize("name", METHODS)
@given(number=st.lists(NUMBERS, min_size=1, max_size=12), alpha=RATES)
@settings(max_examples=40, deadline=None)
def test_equals_give_the_same(name: str, number: list[float], alpha: float) -> None:
    a = torch.tensor(number)
    assert same(mix(name, [a.clone() for _ in METHODS[name].roles], alpha), a)


@given(a=NUMBERS, b=NUMBERS, alpha=st.integers(0, 64))
@settings(max_examples=200, deadline=None)
def test_a_swap_turns_the_rate_over(a: float, b: float, alpha: int) -> None:
    """Bit for bit for rates whose complement is exact."""
    x, y, t = torch.tensor([a]), torch.tensor([b]), alpha / 64
    assert same(mix("weighted-sum", [x, y], t), mix("weighted-sum", [y, x], 1 - t))
    between = mix("weighted-sum", [x, y], t)
    assert min(a, b) - abs(a - b) * 1e-6 <= float(between) <= max(a, b) + abs(a - b) * 1e-6


@pytest.mark.parametrize("name", ["sigmoid", "inverse-sigmoid", "slerp"])
@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5])
def test_other_swaps(name: str, alpha: float) -> None:
    a, b = tensor(1), tensor(2)
    assert torch.allclose(mix(name, [a, b], alpha), mix(name, [b, a], 1 - alpha), atol=1e-6)


def test_a_sigmoid_undoes_the_other() -> None:
    a, b = tensor(1), tensor(2)
    for alpha in (0.1, 0.3, 0.8):
        smooth = alpha * alpha * (3 - 2 * alpha)
        assert torch.allclose(
            mix("inverse-sigmoid", [a, b], smooth), mix("weighted-sum", [a, b], alpha), atol=1e-6
        )


def test_the_order_of_those_that_are_alike_does_not_matter() -> None:
    base, *others = (tensor(i) for i in range(4))
    for name in ("weighted-average", "ties"):
        first = [] if name == "weighted-average" else [base]
        made = [mix(name, [*first, *order], 1.0) for order in itertools.permutations(others)]
        assert all(torch.allclose(each, made[0], atol=1e-6) for each in made), name


def test_differences_add_up() -> None:
    a, b, c = (tensor(i) for i in range(3))
    there = mix("add-difference", [a, b, c], 0.7)
    assert torch.allclose(mix("add-difference", [there, c, b], 0.7), a, atol=1e-6)
    assert torch.allclose(mix("add-difference", [c, b, c], 1.0), b, atol=1e-6)
    assert torch.allclose(mix("add-difference", [a, b, a], 0.3), mix("weighted-sum", [a, b], 0.3), atol=1e-6)


def test_chance_is_decided_by_seed_and_name() -> None:
    base, other = tensor(0), tensor(1)
    method = METHODS["dare"]
    values = method.check({}, 2)

    def dare(seed: int, name: str) -> torch.Tensor:
        return method.mix([base, other], 1.0, values | {"seed": seed}, name).tensor

    assert same(dare(1, "x"), dare(1, "x"))
    assert not same(dare(1, "x"), dare(2, "x")) and not same(dare(1, "x"), dare(1, "y"))
    assert same(
        mix("ties", [base, other, tensor(2)], 1.0), mix("ties", [base, other, tensor(2)], 1.0, seed=9)
    )


def bits(path: Path) -> dict[str, bytes]:
    return {n: x.load().numpy().tobytes() for n, x in from_header(read_header(path)).items()}


@pytest.mark.parametrize("key", ["sdxl/base", "sd2/text-to-image", "flux/schnell"])
def test_files_of_a_family(key: str, tmp_path: Path) -> None:
    """A model with itself, in its other layout, is itself; rate 1 is the second; threads and runs do not matter."""
    a, folder = zoo.write(key, tmp_path, seed=0)
    sumuk.save(zoo.tiny(key, seed=50), b := tmp_path / "b.safetensors")
    out = tmp_path / "o.safetensors"
    done = merge([a, folder], out, alpha=0.3)
    assert bits(out) == bits(a) and done.mixed > 0
    merge([a, b], out, alpha=1)
    assert bits(out) == bits(b)
    merge([a, b], out, alpha=0.3, dtype="float16")
    before, threads = out.read_bytes(), torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        merge([a, b], out, alpha=0.3, dtype="float16")
    finally:
        torch.set_num_threads(threads)
    assert out.read_bytes() == before
    assert verify(out, [a, b]).whole


def test_parents_of_the_same_bytes_are_one_hash_and_the_header_keeps_its_room(tmp_path: Path) -> None:
    """Hashes are worked out beside the merging; what is shorter in the end leaves blanks behind the header."""
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    sumuk.save(zoo.tiny("sd1/text-to-image"), a)
    b.write_bytes(a.read_bytes())
    merged = merge([a, b], out, alpha=0.5)
    assert len({model.sha256 for model in merged.recipe.models}) == 1
    assert verify(out, [a, b], sample=None).whole and recipe_of(out) == merged.recipe
    again = tmp_path / "again.safetensors"
    run(merged.recipe, again, folder=tmp_path)
    assert again.read_bytes() == out.read_bytes()
