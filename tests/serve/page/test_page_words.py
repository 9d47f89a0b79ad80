"""What the page says: whole in both languages, and nothing from outside becomes HTML."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import pytest

import sumuk.serve.page
from sumuk.serve.page import markup
from sumuk.serve.page.words import LANGUAGES, TABLE, Words, preferred
from sumuk.serve.trouble import TITLES, Trouble

SOURCE = Path(sumuk.serve.page.__file__).parent
EVIL = "<script>alert('x')</script>&\"{{value}}${1+1}"


def test_both_languages_say_everything_with_the_same_values():
    for key, texts in TABLE.items():
        assert len(texts) == len(LANGUAGES) and all(map(str.strip, texts)), key
        english, korean = ({name for _, name, _, _ in Formatter().parse(text) if name} for text in texts)
        if not texts[0].startswith("{"):  # JSON in braces is no value to be put in
            assert english == korean, key
        same = texts[0] == texts[1]
        assert not same or not re.search("[가-힣]", texts[1]), key


def test_every_problem_has_its_words():
    assert {f"why:{name}" for name in TITLES} == {key for key in TABLE if key.startswith("why:")}


def test_every_word_is_used_and_every_used_word_is_there():
    source = "\n".join(path.read_text("utf-8") for path in SOURCE.glob("*.py") if path.name != "words.py")
    asked = set(re.findall(r"words\(\s*[\"']([\w:-]+)[\"']", source))
    assert asked <= TABLE.keys()
    built = ("why:", "state:", "paint-", "send-", "work:")
    unused = [key for key in TABLE if not re.search(f"[\"']{key}[\"']", source) and not key.startswith(built)]
    assert unused == []


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("ko", "ko"),
        ("KO-kr", "ko"),
        ("en;q=0.5, ko;q=0.9", "ko"),
        ("de, ko;q=0.1", "ko"),
        ("ko;q=0, en", "en"),
        ("ko;q=x", "en"),
        ("*", "en"),
        ("", "en"),
        (",;,;q=", "en"),
        ("a," * 10_000 + "ko", "en"),
    ],
)
def test_the_language_of_a_header(header, language):
    assert preferred(header) == language


def test_counting():
    assert [Words("en").count(1), Words("en").count(2), Words("ko").count(1)] == [
        "1 picture",
        "2 pictures",
        "그림 1장",
    ]


@pytest.mark.parametrize(
    "made",
    [
        markup.notice(Words("ko"), Trouble("bad-value", EVIL)),
        markup.said(EVIL),
        markup.bullets(EVIL, {EVIL: EVIL}),
        markup.table([(EVIL, EVIL)]),
        markup.act("x", EVIL, job=EVIL),
        markup.as_json(EVIL, {EVIL: EVIL}),
        markup.inspected(
            Words("en"), {"name": EVIL, "title": EVIL, "warnings": [EVIL], "metadata": {EVIL: EVIL}}
        ),
        markup.element("img", alt=EVIL),
    ],
)
def test_nothing_from_outside_becomes_html(made):
    assert "<script" not in made and "alert(&#x27;x&#x27;)" in made.replace("alert('x')", "alert('x')!")


def test_a_problem_leads_in_the_pages_language_and_stays_as_the_server_says_it():
    told = markup.notice(Words("ko"), Trouble("too-many", "the queue is full; try again in 5 s"))
    assert "한꺼번에 너무 많습니다" in told and "the queue is full; try again in 5 s" in told
