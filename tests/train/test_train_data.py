"""Captioned pictures: the order is a permutation addressed by count, and bad records are named by line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.train.small_run import COLOURS, SIZE, write_pictures

from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.train.config import DataConfig
from sumuk.train.data import Order, chunks, read_pixels, read_records, seeded, to_signed
from sumuk.train.sheet import tile, to_images

LINE = {"file": "a.png", "object": "a", "style": "flat", "split": "train", "captions": {"en": ["a"]}}


def config(root: Path, **rest: object) -> DataConfig:
    return DataConfig.model_validate({"root": root, "size": SIZE} | rest)


def write(root: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "captions.jsonl").write_text("\n".join(texts), "utf-8")
    return root


@given(count=st.integers(1, 40), seed=st.integers(0, 2**63), epoch=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_each_epoch_is_a_permutation(count: int, seed: int, epoch: int):
    order = Order(count, seed)
    assert sorted(order.batch(epoch * count, count)) == list(range(count))


@given(at=st.integers(0, 500), size=st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_it_resumes_by_count(at: int, size: int):
    """A fresh order asked in the middle says what one that was asked from the start says."""
    long = Order(7, 5)
    assert Order(7, 5).batch(at, size) == [long.at(images) for images in range(at + size)][at:]


def test_epochs_and_seeds_differ():
    order = Order(50, 1)
    epochs = [tuple(order.batch(50 * epoch, 50)) for epoch in range(4)]
    seeds = [tuple(Order(50, seed).batch(0, 50)) for seed in range(4)]
    assert len(set(epochs)) == len(set(seeds)) == 4


def test_seeded_depends_on_both_and_on_nothing_else():
    def draw(seed: int, position: int) -> list[float]:
        return torch.rand(4, generator=seeded(seed, position)).tolist()

    torch.manual_seed(1)
    one = draw(3, 4)
    torch.manual_seed(2)
    torch.rand(7)
    assert draw(3, 4) == one
    # Neither the sum nor the order of the two decides.
    assert len({tuple(draw(*each)) for each in [(3, 4), (4, 3), (3, 5), (2, 5), (7, 0), (0, 7)]}) == 6


def test_neighbouring_positions_are_unlike():
    draws = torch.stack([torch.randn(500, generator=seeded(0, position)) for position in range(20)])
    correlation = torch.corrcoef(draws) - torch.eye(20)
    assert float(correlation.abs().max()) < 5 / 500**0.5


def test_records(tmp_path: Path):
    root = write_pictures(tmp_path / "set", held_out=("red-3d",))
    records = read_records(config(root))
    assert len(records) == 2 * len(COLOURS)
    assert [r.file for r in records if r.split != "train"] == ["images/red-3d.png"]
    first = records[0]
    assert (first.object, first.style) == ("red", "flat")
    assert first.captions["ko"][0] == "빨간색 물건, 플랫" and len(first.captions["en"]) == 2


def test_styles_and_objects_narrow(tmp_path: Path):
    root = write_pictures(tmp_path / "set")
    narrow = tmp_path / "objects.txt"
    narrow.write_text("# two of them\n\nred  the first\nblue\n", "utf-8")
    records = read_records(config(root, styles=("flat",), objects=narrow))
    assert [r.file for r in records] == ["images/red-flat.png", "images/blue-flat.png"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("3", "TypeError"),
        ({k: v for k, v in LINE.items() if k != "style"}, "KeyError.*style"),
        (LINE | {"captions": {}}, "not a table of languages"),
        (LINE | {"captions": ["a"]}, "not a table of languages"),
        (LINE | {"captions": {"en": "a fox"}}, "'en' are 'a fox', not a list of prompts"),
        (LINE | {"captions": {"en": []}}, "not a list of prompts"),
        (LINE | {"captions": {"en": [3]}}, "not a list of prompts"),
    ],
)
def test_a_bad_record_is_named_by_line(tmp_path: Path, line: object, why: str):
    with pytest.raises(BadFile, match=rf"captions\.jsonl line 2: .*{why}") as caught:
        read_records(config(write(tmp_path, LINE, line, LINE)))
    assert caught.value.code == "captions" and "\n" not in str(caught.value)


def test_absent_files_are_named(tmp_path: Path):
    with pytest.raises(MissingFile, match=r"no captions\.jsonl in"):
        read_records(config(tmp_path))
    write(tmp_path, LINE)
    with pytest.raises(MissingFile, match=r"no object list at .*list\.txt"):
        read_records(config(tmp_path, objects=tmp_path / "list.txt"))
    with pytest.raises(MissingFile, match=r"captions\.jsonl names a\.png, which does not exist"):
        read_pixels(tmp_path, read_records(config(tmp_path)), SIZE)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadFile, match=r"a\.png is not a picture"):
        read_pixels(tmp_path, read_records(config(tmp_path)), SIZE)


def test_a_style_that_no_picture_has_is_refused(tmp_path: Path):
    root = write_pictures(tmp_path / "set")
    with pytest.raises(BadInput, match=r"the style 'flatt'; did you mean 'flat'\?"):
        read_records(config(root, styles=("3d", "flatt")))


def test_nothing_to_train_on_is_refused(tmp_path: Path):
    write(tmp_path, LINE | {"split": "test"})
    with pytest.raises(BadInput, match="left to train on: all 1 are held out"):
        read_records(config(tmp_path))
    write(tmp_path, LINE)
    (tmp_path / "none.txt").write_text("other\n")
    with pytest.raises(BadInput, match="left to train on: the object list selects none"):
        read_records(config(tmp_path, objects=tmp_path / "none.txt"))


def test_pixels(tmp_path: Path):
    root = write_pictures(tmp_path / "set")
    records = read_records(config(root))
    pixels = read_pixels(root, records, SIZE)
    assert pixels.shape == (10, 3, SIZE, SIZE) and pixels.dtype == torch.uint8
    assert pixels[0, :, 0, 0].tolist() == [255, 255, 255]
    assert pixels[0, :, 8, 8].tolist() == [220, 30, 40]
    assert read_pixels(root, records[:1], 8).shape == (1, 3, 8, 8)
    signed = to_signed(pixels)
    assert signed.dtype == torch.float32
    assert float(signed.max()) == 1.0 and float(to_signed(torch.zeros(1, dtype=torch.uint8))) == -1.0


def test_sheets_show_what_was_read(tmp_path: Path):
    root = write_pictures(tmp_path / "set")
    records = read_records(config(root))
    signed = to_signed(read_pixels(root, records, SIZE))
    with Image.open(root / records[3].file) as image:
        assert np.array_equal(np.asarray(to_images(signed)[3]), np.asarray(image))
    sheet = tile(signed, columns=4, gap=2)
    assert sheet.size == (4 * (SIZE + 2) - 2, 3 * (SIZE + 2) - 2)
    corner = sheet.crop((SIZE + 2, SIZE + 2, 2 * SIZE + 2, 2 * SIZE + 2))
    assert np.array_equal(np.asarray(corner), np.asarray(to_images(signed)[5]))


def test_chunks():
    assert [list(each) for each in chunks(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert list(chunks([], 3)) == []
