"""The measurement of the miniature on pictures whose answer is known; no model, no data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.likeness import Gallery, Pair, Seen, blur, features, gradients, interval, shuffled, to_lab
from benchmarks.page import fill
from benchmarks.sheets import wrapped
from PIL import Image, ImageDraw

from sumuk.base.errors import BadInput

COLOURS = {"red": (214, 40, 40), "blue": (40, 70, 200), "green": (30, 150, 60), "ochre": (200, 150, 40)}
SHAPES = ("disc", "box", "bar", "wedge")


def icon(shape: str, colour: str, style: str) -> np.ndarray:
    image = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(image)
    inside, line = COLOURS[colour], (20, 20, 20) if style == "3d" else None
    if shape == "disc":
        pen.ellipse((10, 10, 54, 54), inside, line, 3)
    elif shape == "box":
        pen.rectangle((12, 16, 52, 48), inside, line, 3)
    elif shape == "bar":
        pen.rectangle((26, 6, 38, 58), inside, line, 3)
    else:
        pen.polygon([(32, 8), (56, 54), (8, 54)], inside, line)
    return np.asarray(image)


PAIRS = [
    Pair(f"{colour} {shape}", style) for colour in COLOURS for shape in SHAPES for style in ("3d", "flat")
]
PICTURES = np.stack([icon(*reversed(pair.object.split()), pair.style) for pair in PAIRS])


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery(PICTURES, PAIRS)


def test_lab_of_known_colours():
    known = {  # sRGB -> CIE L*a*b* (D65), published tables, two decimals
        (255, 255, 255): (100.0, 0.0, 0.0),
        (0, 0, 0): (0.0, 0.0, 0.0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
    }
    lab = to_lab(np.array(list(known), np.uint8)[None, None])[0, 0]
    np.testing.assert_allclose(lab, list(known.values()), atol=0.02)


def test_blur_keeps_sums_and_has_its_width():
    point = np.zeros((1, 41, 41, 1), np.float32)
    point[0, 20, 20] = 1
    spread = blur(point, 3.0)[0, :, :, 0]
    place = np.arange(41) - 20
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    assert (spread.sum(0) * place**2).sum() == pytest.approx(9, rel=0.05)


def test_gradients_know_direction_not_sign():
    x = np.zeros((1, 64, 64, 3), np.float32)
    x[:, :, 20:44, 0] = 50  # two upright edges of opposite sign
    votes = gradients(x).reshape(8, 8, 8)
    assert votes[..., 0].sum() > 100 * votes[..., 1:].sum()
    turned = gradients(np.ascontiguousarray(x.transpose(0, 2, 1, 3))).reshape(8, 8, 8)
    np.testing.assert_allclose(turned[..., 4], votes[..., 0].T, atol=1e-4)


def test_features_are_unit_and_blank_paper_is_harmless():
    made = features(PICTURES)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert made.shape == (len(PAIRS), 768 + 512)
    assert np.isfinite(features(np.full((1, 64, 64, 3), 255, np.uint8))).all()


def test_every_picture_finds_itself(gallery: Gallery):
    assert gallery.marks(gallery.look(features(PICTURES)), PAIRS).tolist() == [[1, 1, 1, 1]] * len(PAIRS)
    assert gallery.distance(features(PICTURES), PAIRS) == pytest.approx(0, abs=1e-5)


def test_every_picture_finds_its_object_in_the_other_style(gallery: Gallery):
    seen = gallery.look(gallery.features, lambda row, pair: pair.style != PAIRS[row].style)
    assert all(
        gallery.pairs[near].style != pair.style for near, pair in zip(seen.nearest, PAIRS, strict=True)
    )
    marks = gallery.marks(seen, PAIRS)
    assert marks[:, 0].mean() == 1
    assert marks[:, 2].max() == 0


def test_marks_tell_rank_and_style(gallery: Gallery):
    best = np.linspace(1, 0, len(gallery.objects), dtype=np.float32)[None]
    seen = Seen(best, np.array([PAIRS.index(Pair(gallery.objects[0], "flat"))]))
    for rank, expected in ((0, [1, 1, 1, 1]), (4, [0, 1, 1, 0]), (5, [0, 0, 1, 0])):
        assert gallery.marks(seen, [Pair(gallery.objects[rank], "flat")])[0].tolist() == expected
    assert gallery.marks(seen, [Pair(gallery.objects[0], "3d")])[0].tolist() == [1, 1, 0, 0]


def test_shuffled_prompts_are_at_chance(gallery: Gallery):
    row = shuffled(gallery, gallery.look(gallery.features), PAIRS)
    assert row["object"][0] == 0  # every picture shows its own object, and is never judged by it
    # Of the 15 other objects four are among the five; of the 30 other pictures 15 have the style.
    assert row["five"][0] == pytest.approx(100 * 4 / 15, abs=3)
    assert row["style"][0] == pytest.approx(50, abs=3)


def test_interval_draws_whole_groups():
    marks = np.repeat(np.arange(100) % 2, 4)[:, None].astype(float)
    by_group = interval(marks, [str(i // 4) for i in range(400)])[0]
    alone = interval(marks, [str(i) for i in range(400)])[0]
    assert by_group[0] == alone[0] == 50
    assert by_group[2] - by_group[1] == pytest.approx(2 * 196 * 0.5 / 10, rel=0.12)  # 1.96 sqrt(p q / 100)
    assert alone[2] - alone[1] == pytest.approx(2 * 196 * 0.5 / 20, rel=0.12)


def test_fill_replaces_and_refuses():
    page = "a\n<!-- written: x -->\nold\n<!-- end -->\nb\n<!-- written: y -->\n<!-- end -->\n"
    once = fill(page, {"x": "new", "y": "| t |"})
    assert once == "a\n<!-- written: x -->\nnew\n<!-- end -->\nb\n<!-- written: y -->\n| t |\n<!-- end -->\n"
    assert fill(once, {"x": "new", "y": "| t |"}) == once
    with pytest.raises(BadInput, match="written: z"):
        fill(page, {"z": ""})


def test_the_page_has_all_markers():
    page = Path(__file__).parents[2] / "docs" / "miniature.md"
    names = ("model", "made", "space", "chance", "prompts", "guidance", "solvers", "strange")
    filled = fill(page.read_text("utf-8"), dict.fromkeys(names, "-"))
    assert filled.count("<!-- written: ") == len(names) == filled.count("<!-- end -->")


def test_wrapped_keeps_words():
    assert wrapped("warning sign (3d held out)", 19) == ["warning sign (3d", "held out)"]
    assert wrapped("incomprehensibilities", 5) == ["incomprehensibilities"]
