"""The miniature's words, prompts, hold-out and selection: pure functions, no network, no packages."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "miniature"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"miniature_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


c = load("captioning")
sources = load("sources")


def named(code: str, en: str, ko: str, subgroup: str = "animal-mammal"):
    return c.Named(code, subgroup, {"en": en, "ko": ko})


def test_prompts_name_object_and_style_in_the_promised_forms() -> None:
    assert c.prompts(["fox"], "3d", "en") == ["fox, 3d", "a fox, 3d style", "fox 3d", "a 3d picture of a fox"]
    assert c.prompts(["여우"], "3d", "ko") == [
        "여우, 3d", "여우, 3d 스타일", "여우 3d", "3d 여우 그림",
        "여우, 입체", "여우, 입체 스타일", "여우 입체", "입체 여우 그림",
    ]  # fmt: skip
    assert {"사과, 플랫", "사과, 평면", "사과, flat"} <= set(c.prompts(["사과"], "flat", "ko"))
    twice = c.prompts(["fox", "fox"], "flat", "en")
    assert len(twice) == len(set(twice)) == 4


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("fox", "a fox"),
        ("eye", "an eye"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("euro banknote", "a euro banknote"),
        ("grapes", "grapes"),
        ("octopus", "an octopus"),
        ("bus", "a bus"),
        ("rhinoceros", "a rhinoceros"),
        ("honey", "honey"),
        ("honey pot", "a honey pot"),
        ("glass of milk", "a glass of milk"),
        ("money with wings", "money with wings"),
        ("face with tears of joy", "a face with tears of joy"),
    ],
)
def test_articles(word: str, expected: str) -> None:
    assert c.with_article(word) == expected


def test_the_face_takes_the_plain_name_and_the_animal_becomes_whole() -> None:
    table = c.read_words("1f431  cat | = 고양이\n")
    words = c.claim_words([named("1f408", "cat", "고양이"), named("1f431", "cat face", "고양이 얼굴")], table)
    assert words["1f431"] == {"en": ("cat", "cat face"), "ko": ("고양이",)}
    assert words["1f408"] == {"en": ("whole cat",), "ko": ("고양이 전신",)}


def test_without_a_listed_word_the_own_cldr_name_goes_before_a_simplified_one() -> None:
    words = c.claim_words([named("1f431", "cat face", "고양이 얼굴"), named("1f408", "cat", "고양이")], {})
    assert words["1f408"]["en"] == ("cat",)
    assert words["1f431"]["en"] == ("cat face",)
    alone = c.claim_words([named("1f98a", "fox", "여우 얼굴")], {})
    assert alone["1f98a"]["ko"] == ("여우 얼굴", "여우")


def test_a_smiley_keeps_its_face_and_a_taken_name_leaves_nothing() -> None:
    faces = [
        named("1", "hot face", "더운 얼굴", "face-unwell"),
        named("2", "hot face", "더운 얼굴", "face-unwell"),
    ]
    words = c.claim_words(faces, {})
    assert words["1"] == {"en": ("hot face",), "ko": ("더운 얼굴",)}
    assert words["2"] == {"en": (), "ko": ()}


def test_tidy_names() -> None:
    assert c.tidy("woman’s  Hat", "en") == "woman's hat"
    assert c.tidy("person: red hair", "en") == "person with red hair"
    assert c.tidy("사람: 빨간 머리", "ko") == "빨간 머리인 사람"


@pytest.mark.parametrize("text", ["1f98a fox | 여우", "1f98a  fox", "zz  fox | 여우", "1  a | 가\n1  b | 나"])
def test_bad_word_lines_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"words\.txt line"):
        c.read_words(text)


def test_a_word_of_two_objects_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"line 2: 'fox' belongs to 1f98a already"):
        c.read_words("1f98a  fox | 여우\n1f43a  fox | 늑대")


def test_hold_out_is_fixed_a_tenth_of_each_style_and_one_style_an_object() -> None:
    codes = [f"{code:x}" for code in range(0x1F000, 0x1F000 + 4000)]
    held = {style: {code for code in codes if c.held_out(code, style, c.STYLES)} for style in c.STYLES}
    assert all(
        abs(len(some) - 400) < 60 for some in held.values()
    )  # three standard deviations of binomial(4000, .1)
    assert max(Counter(code for some in held.values() for code in some).values()) == 1
    assert held["3d"] == {code for code in codes if c.held_out(code, "3d", ("3d", "flat"))}
    assert not any(c.held_out(code, "3d", ("3d",)) for code in codes)


def test_hold_out_of_known_objects_never_moves() -> None:
    for code in ("1f98a", "1f431", "2764", "1f355"):
        slot = int(hashlib.sha256(code.encode()).hexdigest()[:8], 16) / 2**32 * 10
        expected = c.STYLES[int(slot)] if slot < len(c.STYLES) else None
        assert [s for s in c.STYLES if c.held_out(code, s, c.STYLES)] == ([expected] if expected else [])


def test_select_by_style_group_objects_and_limit() -> None:
    records = [
        {"object": code, "style": style, "group": group}
        for style in ("3d", "flat", "noto")
        for code, group in (("a", "animals"), ("b", "food"), ("c", "animals"))
    ]
    assert len(c.select(records)) == 9
    some = c.select(records, ("3d", "flat"), ("animals",), 1)
    assert [(r["object"], r["style"]) for r in some] == [("a", "3d"), ("a", "flat")]
    assert {r["object"] for r in c.select(records, objects={"b", "c"})} == {"b", "c"}
    with pytest.raises(ValueError, match="no record has style 'oil'; known: 3d, flat, noto"):
        c.select(records, ("oil",))


def test_the_shipped_lists_agree() -> None:
    table = c.read_words((RECIPE / "words.txt").read_text("utf-8"))
    objects = c.read_objects((RECIPE / "objects.txt").read_text("utf-8"))
    assert len(objects) == len(set(objects))
    assert 450 <= len(objects) <= 600
    assert set(objects) <= set(table)
    for code, sides in table.items():
        assert all(re.search("[가-힣]|^dna$", word) for word in sides["ko"].words), code
        assert not any(re.search("[가-힣]", word) for word in sides["en"].words), code
    assert table["1f98a"]["ko"].words[0] == "여우"
    assert table["1f436"]["ko"].words[:2] == ("강아지", "개")
    assert "빨간 하트" in table["2764"]["ko"].words


@pytest.mark.parametrize(
    ("code", "group", "subgroup", "rule"),
    [
        ("1f98a", "animals-nature", "animal-mammal", None),
        ("1f43b-200d-2744", "animals-nature", "animal-mammal", None),
        ("1f468", "people-body", "person", None),
        ("1f1f0-1f1f7", "flags", "country-flag", "flag"),
        ("23-20e3", "symbols", "keycap", "keycap"),
        ("1f170", "symbols", "alphanum", "text only"),
        ("1f4af", "smileys-emotion", "emotion", "text only"),
        ("1f550", "travel-places", "time", "clock face"),
        ("1f3fb", "component", "skin-tone", "component"),
        ("1f46a", "people-body", "person-symbol", "group of people"),
        ("1f9d1-200d-1f9d1-200d-1f9d2", "people-body", "person-symbol", "group of people"),
        ("1f3c3-200d-2640", "people-body", "person-activity", "gender variant"),
        ("1f468-200d-1f373", "people-body", "person-role", "gender variant"),
        ("1f6b6-200d-27a1", "people-body", "person-activity", "facing right"),
    ],
)
def test_exclusion_rules(code: str, group: str, subgroup: str, rule: str | None) -> None:
    known = {"1f3c3", "1f9d1-200d-1f373", code}
    assert sources.exclusion(sources.Entry(code, "", group, subgroup), known) == rule


def test_a_gendered_form_without_a_neutral_one_stays() -> None:
    entry = sources.Entry("1f468-200d-1f373", "", "people-body", "person-role")
    assert sources.exclusion(entry, {entry.object}) is None


def test_codepoints_bring_the_spellings_together() -> None:
    assert sources.codepoints("1F43B-200D-2744-FE0F") == "1f43b-200d-2744"
    assert sources.codepoints("0023-fe0f-20e3") == sources.codepoints("23-20e3") == "23-20e3"


def test_a_tampered_package_is_refused(tmp_path: Path) -> None:
    package = sources.SETS["3d"].package
    (tmp_path / package.file).write_bytes(b"not the archive")
    with pytest.raises(sources.BuildError, match=r"has SHA-256 [0-9a-f]{64}, not c1bb7eee"):
        sources.fetch(package, tmp_path)


def test_trademarks_are_neither_drawn_nor_listed() -> None:
    objects = set(c.read_objects((RECIPE / "objects.txt").read_text("utf-8")))
    assert len(sources.SETS["3d"].withheld) == 3
    assert not objects & sources.SETS["3d"].withheld
