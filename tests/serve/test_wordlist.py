"""Blocked words: found wherever a prompt can come to read them, and not inside other words."""

from __future__ import annotations

import random
import re
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sumuk.base.errors import BadInput, MissingFile, SumukError
from sumuk.generate.prompt import MOST_CHARACTERS, parse
from sumuk.serve.wordlist import PARTICLES, Wordlist

WORDS = Wordlist(
    ["nude", "blood bath", "칼", "裸体", "café", "ナイフ", "naked person  # a comment", "# nothing", ""]
)


@pytest.mark.parametrize(
    "prompt",
    [
        "nude", "a NUDE, standing", "nude_girl", "nude-art", "1girl,nude", "ｎｕｄｅ", "núde", "n\u0332u\u0332de",
        "𝓃𝓊𝒹𝑒",         "nu\u200bde", "nu\u00adde", "\u202enude", "n\u2060ude", "nu\ufe0fde", "nu\U000e0061de",
        # Syntax within a word, or around it.
        "(nude:1.2)", "nu(de:1.2)", "(nu:1.0)de", "(nu)de", "((n)u)de", "[nu]de", "n\\ude", "nu\\(de", "(nude)ly",
        "[nu|nu]de", "[x|nu]de", "[x:nu:3]de", "[nu:x:0.5]de", "[nu::3]de", "n[u|o]d[e|a]", "[|nude]", "[[nu:x:1]|b]de",
        "n<lora:x:1>ude", "nude AND a fox", "a fox AND nude :0.5", "a fox BREAK nude", "((((nude", "nude]",
        # Phrases.
        "blood bath", "Blood  Bath", "blood, bath", "blood_bath", "(blood:1.2) bath", "blood [bath|x]", "naked person",
        # Korean, with and without particles, composed and not.
        "칼", "칼을 든 여우", "칼로는", "큰 칼들을", "여우,칼", "\u110f\u1161\u11af", "칼\u200b을", "[칼|x]로",
        # Without borders.
        "裸体", "一个裸体女人", "abc裸体", "大きなナイフで", "大きなﾅｲﾌで",
        "CAFÉ", "cafe\u0301", "cafe",
    ],
)  # fmt: skip
def test_found(prompt: str) -> None:
    assert WORDS.find(prompt) is not None


@pytest.mark.parametrize(
    "prompt",
    [
        "", "a fox", "nudes", "denude", "nudely", "nu de", "[nu|de]x", "[a|b]nude", "nu AND de", "nu BREAK de",
        "<lora:nude:1>", "blood", "bath blood", "blood a bath", "bloodbath", "person naked", "칼국수", "올칼", "칼로리",
        "카을", "체인", "裸の体", "ナイ", "(((((", "[a|b|c]", "n u d e",
    ],
)  # fmt: skip
def test_not_found(prompt: str) -> None:
    assert WORDS.find(prompt) is None


def test_the_answer_is_the_lists_own_word() -> None:
    assert WORDS.find("ＮＵＤＥ") == "nude" and WORDS.find("칼로는") == "칼"
    assert WORDS.find("a naked_person") == "naked person"


@pytest.mark.parametrize("particle", PARTICLES)
def test_particles(particle: str) -> None:
    assert Wordlist(["권총"]).find(f"검은 권총{particle} 든 여우") == "권총"


def read_at_every_step(prompt: str, steps: int) -> list[str]:
    return [
        "".join(each.text if hasattr(each, "text") else " " for each in part.segments)
        for step in range(1, steps + 1)
        for part in parse(prompt).at(step, steps)
    ]


FORMS = [
    "{}", "({})", "({}:1.0)", "[{}]", "\\{}", "{}<lora:a:1>", "[{0}|{0}]", "[{}|x]", "[|{}]", "[x:{}:2]", "[{}:x:0.5]",
    "[{}::3]", "[[{}|x]:y:4]", "[x|[y:{}:1]]", "(({}", "{}]",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(FORMS), min_size=4, max_size=4),
    st.sampled_from(["", "a ", "a", "[a |b]"]),
    st.sampled_from(["", ", b", "b", "[ |b]"]),
)
def test_whatever_a_step_reads_is_found(forms: list[str], before: str, after: str) -> None:
    """The walk knows every step, whatever their number."""
    prompt = before + "".join(form.format(letter) for form, letter in zip(forms, "nude", strict=True)) + after
    texts = [text for steps in (1, 2, 3, 6, 12) for text in read_at_every_step(prompt, steps)]
    if any(re.search(r"(?<![a-z])nude(?![a-z])", text) for text in texts):
        event("read")
        assert WORDS.find(prompt) == "nude"


def test_an_escaped_bracket_is_one_for_the_parser_too() -> None:
    with pytest.raises(SumukError, match="no number"):
        WORDS.find("(a:1.2.3)")
    with pytest.raises(SumukError, match="at most"):
        WORDS.find("a" * (MOST_CHARACTERS + 1))


def test_in_a_negative_prompt_and_is_a_word() -> None:
    assert WORDS.find("blood AND bath") is None
    assert Wordlist(["blood and bath"]).find("blood AND bath", conjunction=False) == "blood and bath"


def big(count: int) -> Wordlist:
    source = random.Random(1)
    return Wordlist(
        "".join(source.choices(string.ascii_lowercase, k=source.randint(4, 9))) for _ in range(count)
    )


HOSTILE = {
    "words": "a red fox in the snow, ",
    "letters": "ab",
    "spaces": " ",
    "unseen": "\u200b",
    "weights": "(ab:1.1)",
    "options": "[a|b|c|d|e] ",
    "han": "本",
    "particles": "은는이가",
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_time_is_linear(piece: str) -> None:
    words = big(5000)

    def seconds(characters: int) -> float:
        text = (piece * characters)[:characters].rpartition(" ")[0] or (piece * characters)[:characters]
        best = 9.0
        for _ in range(3):
            began = time.process_time()
            assert words.find(text) is None
            best = min(best, time.process_time() - began)
        return best

    once, twice = seconds(5_000), seconds(10_000)
    assert twice < 3 * once + 0.005 and twice < 0.3


def test_too_many_ways_are_refused_instead_of_walked() -> None:
    every, words = "[" + "|".join(string.ascii_lowercase) + "]", big(10_000)
    began = time.process_time()
    with pytest.raises(BadInput, match="too many ways"):
        words.find((every * 3 + " ") * 120)
    assert time.process_time() - began < 1.0


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    with pytest.raises(MissingFile, match="no list of blocked words at"):
        Wordlist.read(path)
    path.write_bytes("\ufeff# mine\r\nnude\r\n\r\n  칼  # knife\r\nC#\r\n".encode())
    words = Wordlist.read(path)
    assert words.find("a nude") == "nude" and words.find("칼은") == "칼" and words.find("c") == "C#"
    for content, told in (
        (b"", "holds no word"),
        (b"# nothing\n", "holds no word"),
        (b"nude\n***\n", "line 2: '\\*\\*\\*' holds no letter"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=told):
            Wordlist.read(path)


def test_no_torch() -> None:
    code = "import sys, sumuk.serve.wordlist; assert not {'torch', 'numpy'} & set(sys.modules) - {'numpy'}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
