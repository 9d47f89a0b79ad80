"""Detection itself, on small made-up kinds: keys, prefixes, dialects, ties, what is left over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sumuk.families.detect import SHARE, Match, Unknown, candidates, detect, moved
from sumuk.families.family import FAMILIES, Arrangement, Kind, Part, Shapes
from sumuk.files.layout import Layout, Rule, alias, fuse, ignore, rename
from sumuk.files.tensors import Lazy, Tensors


def never() -> torch.Tensor:
    raise AssertionError("detection loads no tensor")


def header(*names: str, shape: tuple[int, ...] = (4, 4)) -> Tensors:
    return {name: Lazy(shape, "F32", never) for name in names}


def nothing(shapes: Shapes) -> torch.nn.Module:
    raise AssertionError("detection builds no network")


COUNTED = []


def rules(names: object) -> list[Rule]:
    COUNTED.append(names)
    return [fuse([f"layer.{{i}}.{part}" for part in "qkv"], "row.{i}.qkv"), rename("end.*", "out.*")]


NET = Part(
    name="net",
    title="net",
    key="row.0.qkv",
    original=("row.*", "out.*"),
    aliases=(rename("old.{i}.qkv", "row.{i}.qkv"),),
    diffusers=rules,
    supplier="nobody",
    build=nothing,
    config=lambda shapes: {},
)
HAT = replace(NET, name="hat", title="hat", key="brim", original=("brim", "out.*"), aliases=())


def arrangement(
    name: str, dialect: str, *parts: tuple[Part, str], ignored: tuple[Rule, ...] = ()
) -> Arrangement:
    return Arrangement(name=name, title=name, dialect=dialect, parts=parts, ignored=ignored)


SINGLE = arrangement("single", "original", (NET, "net."), (HAT, "hat."), ignored=(ignore("net.out.spare"),))
BARE = arrangement("bare", "original", (NET, ""), (HAT, ""))
FOLDER = arrangement("diffusers", "diffusers", (NET, "net/"), (HAT, "hat/"))


def says(reason: str | None) -> Kind:
    return Kind(
        name="kind",
        variant=reason or "it",
        title="a kind",
        architecture="kind",
        arrangements=(SINGLE, BARE, FOLDER),
        recognise=lambda shapes: reason,
        licence="MIT",
    )


def shapes(one: object) -> dict[str, tuple[int, ...]]:
    assert isinstance(one, Match | Unknown)
    return {name: tensor.shape for name, tensor in one.moved.tensors.items()}


def test_each_arrangement_is_found_by_its_key() -> None:
    for tensors, layout in (
        (header("net.row.0.qkv", "net.out.x", "net.out.spare"), "single"),
        (header("row.0.qkv", "out.x"), "bare"),
        (header("old.0.qkv", "out.x"), "bare"),
        (header("net/layer.0.q", "net/layer.0.k", "net/layer.0.v", "net/end.x"), "diffusers"),
    ):
        answer = detect(tensors, among=[says(None)])
        assert isinstance(answer, Match) and answer.arrangement.name == layout
        height = 12 if layout == "diffusers" else 4
        assert shapes(answer) == {"net.row.0.qkv": (height, 4), "net.out.x": (4, 4)}
        assert answer.moved.unknown == []
        assert answer.moved.ignored == (["net.out.spare"] if layout == "single" else [])


def test_names_are_moved_once_for_all_that_name_them_alike() -> None:
    COUNTED.clear()
    tensors = header("net/layer.0.q", "net/layer.0.k", "net/layer.0.v")
    tried = candidates(tensors, among=[says("no") for _ in range(9)])
    assert len(tried) == 9 and len(COUNTED) == 1


def test_an_arrangement_without_any_key_is_passed_over() -> None:
    COUNTED.clear()
    assert candidates(header("row.1.qkv", "out.x"), among=[says(None)]) == []
    assert candidates({}, among=[says(None)]) == []
    assert not COUNTED, "no rules are made for a folder that is not there"


def test_what_one_part_takes_is_not_for_the_next() -> None:
    """Both have ``out.*``: as in the layout's own order, the first rule that fits counts."""
    tensors = header("row.0.qkv", "out.x", "brim")
    here, whole = moved(BARE, tensors), BARE.layout(tensors).forward(tensors)
    assert set(here.tensors) == set(whole.tensors) == {"net.row.0.qkv", "net.out.x", "hat.brim"}
    assert here.origin == whole.origin and here.unknown == whole.unknown == []


def test_names_that_stand_for_one_place_do_not_fit_at_all() -> None:
    tensors = header("row.0.qkv", "old.0.qkv")
    assert moved(BARE, tensors).unknown == list(tensors)
    twice = arrangement("twice", "original", (replace(NET, aliases=(alias(rename("out", "out.x")),)), ""))
    assert moved(twice, header("row.0.qkv", "out", "out.x")).unknown == ["row.0.qkv", "out", "out.x"]


def test_half_a_set_is_a_half() -> None:
    answer = detect(header("net/layer.0.q", "net/layer.0.k", "net/end.x"), among=[says(None)])
    assert isinstance(answer, Unknown) and "net/layer.0.q" in answer.why, "its key is made of all three"
    tensors = header(*(f"net/layer.0.{part}" for part in "qkv"), "net/layer.1.q", "net/end.x")
    answer = detect(tensors, among=[says(None)])
    assert isinstance(answer, Match)
    assert answer.moved.halves == [(["net/layer.1.q"], ["net/layer.1.k", "net/layer.1.v"])]
    theirs = FOLDER.layout(tensors).forward(tensors)
    assert theirs.halves == answer.moved.halves


def test_a_kind_that_draws_nothing_must_explain_most_of_the_file() -> None:
    little = header("row.0.qkv", *(f"out.{i}" for i in range(3)), "strange")
    answer = detect(little, among=[says(None)])
    assert isinstance(answer, Match) and answer.moved.unknown == ["strange"]
    much = header("row.0.qkv", *(f"strange.{i}" for i in range(SHARE)))
    answer = detect(much, among=[says(None)])
    assert isinstance(answer, Unknown) and "4 of 5 tensors unexplained" in answer.why


def test_an_empty_reason_is_not_even_near() -> None:
    answer = detect(header("row.0.qkv"), among=[says("")])
    assert isinstance(answer, Unknown) and answer.near == () and "no known network" in answer.why
    answer = detect(header("row.0.qkv"), among=[says("too square")])
    assert isinstance(answer, Unknown) and answer.why == "not kind: too square"
    assert [(near.family, near.why) for near in answer.near] == [("kind/too square", "too square")]


def test_reasons_are_few_and_in_one_line() -> None:
    answer = detect(header("row.0.qkv"), among=[says(f"reason {i}") for i in range(9)])
    assert isinstance(answer, Unknown) and len(answer.near) == 9
    assert "reason 3" in answer.why and "reason 4" not in answer.why and "5 more" in answer.why


def test_the_same_kind_in_two_arrangements_is_no_tie() -> None:
    kind = replace(says(None), arrangements=(BARE, replace(BARE, name="again")))
    answer = detect(header("row.0.qkv"), among=[kind])
    assert isinstance(answer, Match) and answer.arrangement.name == "bare"
    answer = detect(header("row.0.qkv"), among=[kind, replace(kind, variant="two")])
    assert isinstance(answer, Unknown) and "kind/it" in answer.why and "kind/two" in answer.why


def test_a_missing_key_is_named_as_the_file_would_spell_it() -> None:
    answer = detect(header(*(f"net/end.{i}" for i in range(9)), "net/layer.1.q"), among=[says(None)])
    assert (
        isinstance(answer, Unknown)
        and answer.why == "it has most of the net (kind) but lacks 'net/layer.0.q'"
    )


@pytest.mark.parametrize("ignored", [(), (ignore("a"),), (rename("a", "b.a"),)])
def test_kinds_without_networks_are_asked_of_names(ignored: tuple[Rule, ...]) -> None:
    files = arrangement("own", "original", ignored=ignored)
    seen: list[Shapes] = []
    kind = replace(says(None), arrangements=(files,), recognise=lambda shapes: seen.append(shapes))
    answer = detect(header("a"), among=[kind])
    renames = bool(ignored) and bool(ignored[0].native)
    assert isinstance(answer, Match) == renames
    assert seen == ([{"b.a": (4, 4)}] if renames else [])
    assert kind.parts == ()


def test_rules_of_published_kinds_are_no_longer_run_where_no_key_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure of it: a header of an autoencoder makes few layouts."""
    ran: list[int] = []
    forward = Layout.forward
    monkeypatch.setattr(Layout, "forward", lambda self, tensors: ran.append(1) or forward(self, tensors))
    from sumuk.families.detect import families

    kinds = families()
    levels = (f"encoder.down.{level}.block.0.conv1.weight" for level in range(4))
    ends = (
        "encoder.conv_in.weight",
        "decoder.conv_in.weight",
        "quant_conv.weight",
        "encoder.mid.attn_1.q.weight",
    )
    names = [f"first_stage_model.{name}" for name in (*levels, *ends)]
    answer = detect({name: Lazy((4, 4, 3, 3), "F32", never) for name in names}, kinds)
    assert isinstance(answer, Match) and answer.family is FAMILIES["vae/kl-f8"]
    arrangements = sum(len(kind.arrangements) for kind in kinds)
    assert arrangements > 150 and len(ran) < 60, (arrangements, len(ran))
