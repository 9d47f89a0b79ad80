"""A1111's ``parameters`` text: as it writes it, as it reads it, there and back, and hostile."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sumuk.base.errors import BadInput
from sumuk.generate.infotext import Infotext, parse_infotext, write_infotext

# what readers search the last line for (the format's documented pattern)
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SETTINGS = {"Steps": 20, "Sampler": "euler", "Seed": 5}


def test_text_as_a1111_writes_it():
    text = write_infotext(
        "a fox,\n(3d style:1.2)",
        "blurry",
        {
            "Version": "sumuk 0.1.0",
            "Hires upscale": 2.0,
            "Clip skip": 2,
            "CFG scale": 7.0,
            "Steps": 20,
            "Sampler": "dpmpp-2m",
            "VAE": None,
            "Size": "512x768",
            "Seed": 2**63,
            "Denoising strength": 0.55,
            "Model": "ink, wash: 2",
            "Lora hashes": "a: 0123, b: 4567",
            "RNG": "CPU",
        },
    )
    assert text == (
        "a fox,\n(3d style:1.2)\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: dpmpp-2m, CFG scale: 7, Seed: 9223372036854775808, Size: 512x768, "
        'Model: "ink, wash: 2", Denoising strength: 0.55, Clip skip: 2, RNG: CPU, Hires upscale: 2, '
        'Lora hashes: "a: 0123, b: 4567", Version: sumuk 0.1.0'
    )


def test_text_that_a1111_wrote_is_read():
    found = parse_infotext(
        "masterpiece, 1girl, <lora:ink:0.8>\r\n\r\nsecond line\r\nNegative prompt: lowres, bad: worse\r\nmore\r\n"
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, "
        'Model hash: 6ce0161689, Model: v1-5, Lora hashes: "ink: 0a1b, wash: 2c3d", TI hashes: "", Version: v1.10.1'
    )
    assert found.prompt == "masterpiece, 1girl, <lora:ink:0.8>\n\nsecond line"
    assert found.negative == "lowres, bad: worse\nmore"
    assert list(found.settings.items()) == [
        ("Steps", "28"),
        ("Sampler", "DPM++ 2M"),
        ("Schedule type", "Karras"),
        ("CFG scale", "7"),
        ("Seed", "1"),
        ("Size", "512x768"),
        ("Model hash", "6ce0161689"),
        ("Model", "v1-5"),
        ("Lora hashes", "ink: 0a1b, wash: 2c3d"),
        ("TI hashes", ""),
        ("Version", "v1.10.1"),
    ]


def test_a_last_line_of_few_settings_is_prompt():
    assert parse_infotext("a fox\nSteps: 20, Seed: 3") == Infotext("a fox\nSteps: 20, Seed: 3", "", {})
    assert parse_infotext("") == Infotext("", "", {})
    assert parse_infotext("Steps: 20, Sampler: x, Seed: 3") == Infotext(
        "", "", {"Steps": "20", "Sampler": "x", "Seed": "3"}
    )
    with pytest.raises(BadInput, match="2 settings read as a part of the prompt"):
        write_infotext("a", "b", {"Steps": 1, "Seed": 2, "VAE": None})


@pytest.mark.parametrize("key", ["a", "Seed:", "a,b", " Steps", "Steps ", "-x", "a\nb", ""])
def test_keys_that_readers_would_not_find_are_refused(key):
    with pytest.raises(BadInput, match=re.escape(f"setting {key!r} cannot be read back")):
        write_infotext("a", "", SETTINGS | {key: 1})


def test_the_words_that_begin_the_negative_prompt_stay_in_the_prompt():
    text = write_infotext("a\n  Negative prompt: b", "Negative prompt: c", SETTINGS)
    assert text.split("\n")[1:3] == ["  \\Negative prompt: b", "Negative prompt: \\Negative prompt: c"]
    found = parse_infotext(text)
    assert (found.prompt, found.negative) == ("a\nNegative prompt: b", "Negative prompt: c")


def settled(text: str) -> str:
    """Lines stripped, which the format does not keep."""
    return "\n".join(line.strip() for line in text.strip().split("\n")).strip()


PROMPTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["Negative prompt:", "\\", "\n", "Steps: 2, Seed: 3, Size: 1x1", "\r\n", '"', " "]),
    ),
    max_size=8,
).map("".join)
KEYS = st.one_of(
    st.sampled_from(["Steps", "Size", "Version", "Hires steps", "VAE/x"]),
    st.from_regex(r"\w[\w \-/]{0,9}\w", fullmatch=True),
)
VALUES = st.one_of(
    st.text(max_size=20), st.integers(), st.sampled_from(['"', '""', "a, b: c", " x", "\\", 'x"', ""])
)


@settings(max_examples=300, deadline=None)
@given(PROMPTS, PROMPTS, st.dictionaries(KEYS, VALUES, max_size=6))
@example("", "", {})
@example("a: 1, b1: 2, c1: 3", "\nx", {"Aa": '"a"', "Bb": "a\\", "Cc": '\\"'})
def test_there_and_back(prompt, negative, values):
    values = {**SETTINGS, **values}
    text = write_infotext(prompt, negative, values)
    assert parse_infotext(text) == Infotext(
        settled(prompt), settled(negative), {key: str(value) for key, value in values.items()}
    )


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(['"', "\\", ":", ",", " ", "-", "/", "ab", "c", "é", "\t", ".", ': "', '",']))
)
def test_settings_are_found_where_the_documented_pattern_finds_them(pieces):
    line = "Steps: 1, Seed: 2, Size: 3, " + "".join(pieces)
    expected = [(key, value) for key, value in PAIR.findall(line.strip())]
    found = parse_infotext(line).settings
    assert list(found) == list(dict(expected))
    for key, value in dict(expected).items():
        assert found[key] == value or value[0] == value[-1] == '"'


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "a ",
        "a: ",
        'ab: "',
        'ab: "\\"',
        "\n",
        " \n",
        "\nNegative prompt:",
        "-",
        "ab:",
        '"',
        "\\",
        "ab: c,",
    ],
)
def test_hostile_text_takes_linear_time(unit):
    text = "Steps: 1, Seed: 2, Size: 3, " + unit * (200_000 // len(unit))
    start = time.thread_time()
    parse_infotext(text)
    write_infotext(text, text, SETTINGS)
    assert time.thread_time() - start < 1.0
    with pytest.raises(BadInput, match="1,000,001 characters; at most 1,000,000"):
        parse_infotext("a" * 1_000_001)
