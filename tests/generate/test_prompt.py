"""The prompt grammar: A1111's documented cases, limits that name the place, linear time on hostile text."""

from __future__ import annotations

import contextlib
import gc
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sumuk.base.errors import BadInput
from sumuk.generate import prompt as grammar
from sumuk.generate.prompt import BREAK, Alternated, Part, Prompt, Scheduled, Segment, Tag, parse

MARKS = [
    "(",
    ")",
    "[",
    "]",
    ":",
    "|",
    "\\",
    "<",
    ">",
    "\n",
    " ",
    ",",
    ".",
    "1",
    "9e999",
    "-0.5",
    ":1.1)",
    ":3]",
]
WORDS = ["AND", "BREAK", " BREAK ", "<lora:", "a", "여우", "[a|", "[b:", "(c:", "\0", "\ud800", "٣", "é"]


def weighted(text: str, step: int = 1, steps: int = 10) -> list[object]:
    """Segments of a prompt without AND as (text, weight), BREAK as the word."""
    (part,) = parse(text).at(step, steps)
    assert part.weight == 1.0
    return [
        "BREAK" if segment is BREAK else (segment.text, pytest.approx(segment.weight, rel=1e-12))
        for segment in part.segments
    ]


def schedule(text: str, steps: int = 10, base: int | None = None) -> list[tuple[int, str]]:
    """(last step, text) of each stretch, the way in which A1111's examples are written; brackets still in."""
    prompt = parse(text)
    starts = prompt.changes(steps, base)
    ends = [start - 1 for start in starts[1:]] + [steps]
    return [(end, prompt._texts(start, steps, base)[0]) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a) b]", [("a) b]", 1.0)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        (r"a\\(b)", [("a\\", 1.0), ("b", 1.1)]),
        (r"lone \x", [("lone x", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a (b:3) c", [("a ", 1.0), ("b", 3.0), (" c", 1.0)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:-.5)", [("a", -0.5)]),
        ("(a:0)", [("a", 0.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("a:1.2) b", [("a:1.2) b", 1.0)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("[[a", [("a", 1 / 1.1 / 1.1)]),
        ("([a]:2)", [("a", 2 / 1.1)]),
        ("(a [b) c] d", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1), (" d", 1.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("", [("", 1.0)]),
        ("()[]((", [("", 1.0)]),
        ("a BREAK b", [("a", 1.0), "BREAK", ("b", 1.0)]),
        ("a,\n BREAK\n\tb BREAKS", [("a,", 1.0), "BREAK", ("b BREAKS", 1.0)]),
        ("BREAK BREAK a BREAK", ["BREAK", "BREAK", ("a", 1.0), "BREAK"]),
        ("(a BREAK b:2)", [("a", 2.0), "BREAK", ("b", 2.0)]),
        ("  a ,  b", [("  a ,  b", 1.0)]),
    ],
)
def test_emphasis(text, expected):
    assert weighted(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a"), (10, "a b")]),
        ("a [b: 3]", [(3, "a"), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("[(ab:1.5):3]", [(3, ""), (10, "(ab:1.5)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[fantasy:cyberpunk:16]", [(10, "fantasy")]),
        ("[a::4] b", [(4, "a b"), (10, " b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-2]", [(10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1e0]", [(1, "a"), (10, "b")]),
        ("[a:b:0.29][c:0.21]", [(2, "a"), (10, "bc")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a (b:3]", [(10, "[a (b:3]")]),
        ("[(a:b:c):3]", [(10, "[(a:b:c):3]")]),
        (r"[a\:b:3]", [(3, ""), (10, r"a\:b")]),
        ("[a|b:3]", [(10, "[a|b:3]")]),
        ("x | y [z:3]", [(3, "x | y "), (10, "x | y z")]),
    ],
)
def test_schedules(text, expected):
    stripped = [(end, each.rstrip()) for end, each in schedule(text)]
    assert stripped == [(end, each.rstrip()) for end, each in expected]


def test_the_space_between_schedules_is_kept():
    assert parse("a [b:3] c").parts == (Part(1.0, ("a ", Scheduled((), ("b",), 3.0, False), " c")),)
    assert parse("x [a|[b:.5]|]").parts[0].tree == (
        "x ",
        Alternated((("a",), (Scheduled((), ("b",), 0.5, True),), ())),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a|(b:1.1)]", ["a", "(b:1.1)", "a", "(b:1.1)", "a", "(b:1.1)"]),
        ("[fe|]male", ["female", "male", "female", "male", "female", "male"]),
        ("[fe|||]male", ["female", "male", "male", "male", "female", "male"]),
        ("[cow|cow|horse]", ["cow", "cow", "horse", "cow", "cow", "horse"]),
        ("[[a|b]:c:3]", ["a", "b", "a", "c", "c", "c"]),
        ("[a|[b|c]]", ["a", "c", "a", "c", "a", "c"]),
    ],
)
def test_alternation(text, expected):
    assert [parse(text)._texts(step, 6, None)[0] for step in range(1, 7)] == expected


def test_alternating_weight_and_break():
    assert weighted("(a:[1.2|1.3])", step=1) == [("a", 1.2)]
    assert weighted("(a:[1.2|1.3])", step=2) == [("a", 1.3)]
    assert weighted("a [BREAK|] b", step=1) == [("a", 1.0), "BREAK", ("b", 1.0)]
    with pytest.raises(BadInput, match=r"character 3 of what step 2 reads.*5000"):
        parse("(a:[1|5000])").at(2, 4)


def test_fractions_round_down_to_whole_steps():
    assert [end for end, _ in schedule("[a:b:0.5]", steps=7)] == [3, 7]
    assert [end for end, _ in schedule("[a:b:.99]", steps=20)] == [19, 20]
    assert schedule("[a:b:0.04]", steps=20) == [(20, "b")]


def test_second_pass_goes_on_where_the_first_ended():
    assert schedule("a [b:.5] c", steps=10, base=10) == [(10, "a b c")]
    assert schedule("a [b:1.5] c", steps=10, base=10) == [(5, "a  c"), (10, "a b c")]
    assert schedule("a [b:1.5] c", steps=10) == [(10, "a  c")]
    assert schedule("[b:14]", steps=10, base=12) == [(2, ""), (10, "b")]


def test_changes_only_where_the_text_does():
    assert parse("a (b:1.2)").changes(30) == [1]
    assert parse("[a:b:4] [c:d:4] [e:f:9]").changes(30) == [1, 5, 10]
    assert parse("[a|a|b]").changes(6) == [1, 3, 4, 6]
    assert parse("[a:a:4]").changes(30) == [1]
    assert parse("[[a|b]:c:3]").changes(1000) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a AND b", [(1.0, "a"), (1.0, " b")]),
        ("a :0.8 AND b:-1.5 AND c", [(0.8, "a"), (-1.5, " b"), (1.0, " c")]),
        ("a: 2. \n", [(2.0, "a")]),
        ("SAND ANDY AND_", [(1.0, "SAND ANDY AND_")]),
        (" AND b", [(1.0, ""), (1.0, " b")]),
        ("a AND b :2 x", [(1.0, "a"), (1.0, " b :2 x")]),
        ("(a AND b)", [(1.0, "a"), (1.0, " b)")]),
    ],
)
def test_and_joins_weighted_sub_prompts(text, expected):
    parts = parse(text).at(1, 10)
    assert [(part.weight, "".join(s.text for s in part.segments)) for part in parts] == expected


def test_negative_prompts_know_no_and():
    (part,) = parse("a AND b :0.8", conjunction=False).at(1, 10)
    assert part.segments == (Segment("a AND b :0.8"),)
    assert part.weight == 1.0


def test_tags_are_taken_out():
    prompt = parse("a <lora:Ink Wash:0.8>fox<hypernet:h:1:unet=-0.5>, b <lora:x>")
    assert prompt.tags == (
        Tag("lora", "Ink Wash", (("", 0.8),)),
        Tag("hypernet", "h", (("", 1.0), ("unet", -0.5))),
        Tag("lora", "x"),
    )
    assert [tag.place for tag in prompt.tags] == [3, 25, 53]
    assert prompt.at(1, 1)[0].segments == (Segment("a fox, b"),)
    for text in ("a < b > c", "1<2:3", "<:x>", "<lora:>"):
        assert parse(text).tags == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * 50_001, "50,001 characters; at most 50,000"),
        ("ab (c:9e999)", "weight at character 6 is 9e999; it must lie within -1000..1000"),
        ("(c:1e1)", "weight at character 3 has an exponent"),
        ("(c:1.2.3)", r"weight at character 3 is no number: '1\.2\.3'"),
        ("(c:1000.5)", "weight at character 3 is 1000.5"),
        ("((c:40):40)", "nested weights exceed 1000 at character 3"),
        ("<lora:a:1>(c:2000)", "weight at character 13 is 2000"),
        ("b AND (c:2000)", "weight at character 9 is 2000"),
        ("[a:(c:2000):3]", "weight at character 6 is 2000"),
        ("x AND b:2024", "weight of the sub-prompt at character 8 is 2024"),
        ("x<lora:a:one>", "weight of the extra network at character 2 is no number: 'one'"),
        ("x<lora:a:inf>", "weight of the extra network at character 2 is inf"),
        ("x<lora:a:nan>", "weight of the extra network at character 2 is no number: 'nan'"),
        ("<lora::1>", "the extra network at character 1 has no name"),
        ("a [b:c:1e999]", "schedule at character 3 changes at '1e999'"),
        ("(" * 65, "nested deeper than 64 at character 65"),
        ("[)" * 65, "nested deeper than 64 at character 129"),
        ("x AND " * 32, "AND joins more than 32 sub-prompts at character 192"),
        ("[a|b]" * 1001, "schedules more than 1000 places"),
        ("<lora:a:1>" * 257, "names more than 256 extra networks"),
    ],
)
def test_refusals_name_the_place(text, message):
    with pytest.raises(BadInput, match=message) as caught:
        parse(text)
    assert len(str(caught.value)) < 200


def test_limits_are_reached_but_not_passed():
    assert parse("(" * 64 + "a:1").at(1, 1)[0].weight == 1.0
    assert weighted("[" * 64 + "a")[0] == ("a", 1.1**-64)
    assert weighted("(a:1000)") == [("a", 1000.0)]
    assert parse("[a|b]" * 1000).changes(3) == [1, 2, 3]
    assert len(parse("x AND " * 31).parts) == 32


def test_steps_outside_the_pass_are_refused():
    for step in (0, 11):
        with pytest.raises(BadInput, match=f"step {step} is outside 1..10"):
            parse("a").at(step, 10)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(MARKS + WORDS), max_size=24).map("".join))
def test_only_bad_input_is_ever_raised(text):
    try:
        prompt = parse(text)
        for step in prompt.changes(5):
            for part in prompt.at(step, 5):
                assert part.segments
                for segment in part.segments:
                    assert segment is BREAK or abs(segment.weight) <= grammar.MOST_WEIGHT
    except BadInput:
        return
    assert isinstance(prompt, Prompt)
    assert hash(prompt) == hash(parse(text))


@given(st.text(st.characters(exclude_characters="()[]:|\\<")))
def test_plain_text_comes_back_as_it_is(text):
    if not any(word in text for word in ("AND", "BREAK")):
        assert parse(text).at(1, 1)[0].segments == (Segment(text.rstrip()),)


HOSTILE = {
    "(": "(",
    "[a|": "[a|",
    "(a:9e999)": "(a:9e999)",
    ":1.1": ":1.1",
    ":1.1)": ":1.1)",
    "(a:1.1)": "(a:1.1)",
    "[a:b:3]": "[a:b:3]",
    "<a:": "<a:",
    "<a": "<a",
    "spaces": " ",
    "backslashes": "\\",
    "colons": ": ",
    "crossed": "](",
    "breaks": "a BREAK ",
    "digits": "1",
    "deep": "(((((((a)b)c)d)e)f)g)",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_megabyte_is_refused_at_once(unit):
    text = unit * (1_000_000 // len(unit) + 1)
    start = time.perf_counter()
    with pytest.raises(BadInput, match="characters; at most"):
        parse(text)
    assert time.perf_counter() - start < 0.05


def seconds(text: str) -> float:
    """Of this thread, to parse; others' work on the machine does not count."""
    gc.disable()
    start = time.thread_time()
    with contextlib.suppress(BadInput):
        parse(text)
    taken = time.thread_time() - start
    gc.enable()
    return taken


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize(("head", "tail"), [("", ""), ("(a", "x)"), ("[a:", "]")])
def test_time_is_linear(unit, head, tail, monkeypatch):
    monkeypatch.setattr(grammar, "MOST_SCHEDULED", 10**9)
    short, long = (head + unit * (size // len(unit)) + tail for size in (6_000, 24_000))
    few, many = 1.0, 1.0
    for _ in range(12):  # the least of some, in turn, so that a busy moment of the machine spoils neither
        # 4 = two doublings of linear time, 16 = of quadratic; below a millisecond a clock tells nothing
        few, many = min(few, seconds(short)), min(many, seconds(long))
        if many / max(few, 1e-3) < 2.5**2:
            break
    else:
        pytest.fail(f"{few:.4f} s become {many:.4f} s when the text is four times as long")
    assert many < 0.25
