"""Rules: each read forward and backward, each refusal by name."""

from __future__ import annotations

import pytest
import torch

from sumuk.base.errors import BadFile
from sumuk.files.layout import (
    Layout,
    Pattern,
    alias,
    fuse,
    ignore,
    linear_to_conv,
    rename,
    split,
    swap_halves,
    transpose,
)
from sumuk.files.tensors import Tensors, lazy


def table(**shapes: tuple[int, ...]) -> Tensors:
    torch.manual_seed(len(shapes))
    return {name.replace("__", "."): lazy(torch.randn(shape)) for name, shape in shapes.items()}


def values(tensors: Tensors) -> dict[str, torch.Tensor]:
    loaded = {name: one.load() for name, one in tensors.items()}
    assert all(tuple(loaded[name].shape) == one.shape for name, one in tensors.items())
    return loaded


def same(a: Tensors, b: Tensors) -> bool:
    left, right = values(a), values(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_patterns() -> None:
    pattern = Pattern("blocks.{i}.x{j}.*")
    assert pattern.read("blocks.12.x3.proj.weight") == {"i": "12", "j": "3", "rest": "proj.weight"}
    assert pattern.read("blocks.a.x3.weight") is None
    assert pattern.read("blocks.1.x3.") is None
    assert pattern.read("a.blocks.1.x3.w") is None
    assert Pattern("to.{j}.{i}.*").fill({"i": "1", "j": "2", "rest": "w"}) == "to.2.1.w"
    assert Pattern("a.b").read("aXb") is None


def test_every_kind_of_rule_there_and_back() -> None:
    layout = Layout(
        rename("blocks.{i}.out.0.*", "double.{i}.proj.*"),
        fuse(["blocks.{i}.q.*", "blocks.{i}.k.*", "blocks.{i}.v.*"], "double.{i}.qkv.*"),
        fuse(["one.q.*", "one.mlp.*"], "one.linear.*", parts=[1, 3]),
        split("kv.*", ["k.*", "v.*"]),
        swap_halves("norm_out.*", "final.mod.*"),
        transpose("projection", "text.projection"),
        linear_to_conv("mid.to_q.*", "mid.q.*"),
    )
    foreign = table(
        blocks__0__out__0__weight=(4, 4),
        blocks__11__out__0__weight=(4, 4),
        blocks__0__q__weight=(4, 2),
        blocks__0__k__weight=(4, 2),
        blocks__0__v__weight=(4, 2),
        blocks__0__q__bias=(4,),
        blocks__0__k__bias=(4,),
        blocks__0__v__bias=(4,),
        one__q__weight=(2, 3),
        one__mlp__weight=(6, 3),
        kv__weight=(6, 2),
        norm_out__weight=(8, 3),
        projection=(3, 5),
        mid__to_q__weight=(4, 4),
        mid__to_q__bias=(4,),
    )
    moved = layout.forward(foreign)
    assert not moved.unknown and not moved.halves and not moved.ignored
    native, given = values(moved.tensors), values(foreign)
    qkv = [given[f"blocks.0.{x}.weight"] for x in "qkv"]
    assert torch.equal(native["double.0.qkv.weight"], torch.cat(qkv))
    assert torch.equal(native["k.weight"], given["kv.weight"][:3])
    assert torch.equal(native["v.weight"], given["kv.weight"][3:])
    assert torch.equal(native["final.mod.weight"][:4], given["norm_out.weight"][4:])
    assert torch.equal(native["text.projection"], given["projection"].T)
    assert native["mid.q.weight"].shape == (4, 4, 1, 1) and native["mid.q.bias"].shape == (4,)
    assert native["one.linear.weight"].shape == (8, 3)
    back = layout.backward(moved.tensors)
    assert not back.unknown and not back.halves
    assert same(back.tensors, foreign)


def test_ignored_and_unknown_are_reported() -> None:
    layout = Layout(rename("a.*", "b.*"), ignore("position_ids"), ignore("old.*"))
    moved = layout.forward(table(a__x=(1,), position_ids=(1,), old__y=(1,), a_x=(1,)))
    assert sorted(moved.tensors) == ["b.x"]
    assert sorted(moved.ignored) == ["old.y", "position_ids"]
    assert moved.unknown == ["a_x"]
    with pytest.raises(BadFile, match=r"file: 1 unknown tensors: 'a_x'; did you mean 'a.x'") as caught:
        moved.refuse_leftovers("file", ["a.x", "c.y"])
    assert caught.value.code == "layout.unknown"


def test_half_a_fused_set_is_an_error() -> None:
    layout = Layout(fuse(["q.*", "k.*", "v.*"], "qkv.*"))
    moved = layout.forward(table(q__weight=(2, 2), v__weight=(2, 2)))
    assert not moved.tensors
    with pytest.raises(BadFile, match=r"without 'k.weight'") as caught:
        moved.refuse_leftovers("file")
    assert caught.value.code == "layout.half"


def test_parts_that_do_not_fit_are_refused() -> None:
    layout = Layout(fuse(["q.*", "k.*"], "qk.*"))
    for shapes in ({"q__w": (2, 2), "k__w": (2, 3)}, {"q__w": (2, 2), "k__w": (4, 2)}):
        with pytest.raises(BadFile) as caught:
            layout.forward(table(**shapes))
        assert caught.value.code == "layout.shape"
    with pytest.raises(BadFile, match="5 rows"):
        layout.backward(table(qk__w=(5, 2)))


def test_two_names_for_one_place_are_refused() -> None:
    layout = Layout(rename("new.*", "x.*"), alias(rename("old.*", "x.*")))
    assert list(layout.forward(table(old__w=(1,))).tensors) == ["x.w"]
    assert list(layout.backward(table(x__w=(1,))).tensors) == ["new.w"]  # an alias is never written
    with pytest.raises(BadFile, match=r"both 'new.w' and 'old.w'") as caught:
        layout.forward(table(new__w=(1,), old__w=(1,)))
    assert caught.value.code == "layout.twice"


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    from sumuk.files.tensors import Lazy

    def never() -> torch.Tensor:
        raise AssertionError("loaded")

    layout = Layout(fuse(["q.*", "k.*"], "qk.*"), linear_to_conv("p.*", "c.*"))
    names = {"q.w": (2, 2), "k.w": (2, 2), "p.w": (3, 3)}
    moved = layout.forward({name: Lazy(shape, "F16", never) for name, shape in names.items()})
    assert {name: one.shape for name, one in moved.tensors.items()} == {"qk.w": (4, 2), "c.w": (3, 3, 1, 1)}
    assert layout.backward(moved.tensors).tensors["k.w"].shape == (2, 2)
