"""Names, aliases, nearest names, and refusal of what is taken."""

from __future__ import annotations

import pytest

from sumuk.base.errors import BadInput
from sumuk.base.registry import Registry, plain


@pytest.fixture
def solvers() -> Registry[int]:
    registry: Registry[int] = Registry("solver")
    registry.add("euler", 1)
    registry.add("dpmpp-2m", 2, "DPM++ 2M", "2M")
    registry.add("heun", 3, "k_heun")
    return registry


@pytest.mark.parametrize(
    ("typed", "reduced"),
    [
        ("DPM++ 2M", "dpmpp-2m"),
        ("k_heun", "k-heun"),
        ("  Euler   a ", "euler-a"),
        ("a--b__c", "a-b-c"),
        ("", ""),
    ],
)
def test_plain(typed: str, reduced: str):
    assert plain(typed) == reduced
    assert plain(reduced) == reduced


@pytest.mark.parametrize("typed", ["dpmpp-2m", "DPM++ 2M", "dpmpp 2m", "2m", "DPMPP_2M"])
def test_a_name_is_found_as_people_type_it(solvers: Registry[int], typed: str):
    assert solvers[typed] == 2
    assert solvers.canonical(typed) == "dpmpp-2m"
    assert typed in solvers


def test_it_is_a_table_of_canonical_names(solvers: Registry[int]):
    assert list(solvers) == ["euler", "dpmpp-2m", "heun"]
    assert len(solvers) == 3
    assert solvers.aliases("dpmpp-2m") == ["2m"]
    assert solvers.aliases("heun") == ["k-heun"]
    assert solvers.aliases("euler") == []
    assert 7 not in solvers and "nonsense" not in solvers


def test_a_misspelt_name_gets_the_nearest(solvers: Registry[int]):
    with pytest.raises(BadInput, match=r"^unknown solver 'eulr'; did you mean 'euler'\?$"):
        solvers["eulr"]


def test_a_name_like_none_gets_the_list(solvers: Registry[int]):
    with pytest.raises(BadInput, match=r"^unknown solver 'zzz'; known: dpmpp-2m, euler, heun$"):
        solvers["zzz"]


@pytest.mark.parametrize(
    ("name", "aliases"),
    [
        ("euler", ()),  # the very name again
        ("Euler", ()),  # in another spelling
        ("other", ("2m",)),  # an alias that is an alias
        ("other", ("fresh", "HEUN")),  # an alias that is a name
        ("k-heun", ()),  # a name that is an alias
    ],
)
def test_what_is_taken_is_refused_and_nothing_changes(
    solvers: Registry[int], name: str, aliases: tuple[str, ...]
):
    with pytest.raises(KeyError, match="registered twice"):
        solvers.add(name, 9, *aliases)
    assert [solvers[each] for each in solvers] == [1, 2, 3]
    assert "fresh" not in solvers and "other" not in solvers


def test_add_gives_the_value_back(solvers: Registry[int]):
    assert solvers.add("lms", 5) == 5
