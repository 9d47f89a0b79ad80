from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.generate.conftest import pixels

from sumuk.generate.pixels import flat, keep_outside, soften, to_image, to_mask, to_pixels
from sumuk.generate.request import make_request


def test_there_and_back_is_the_same_picture():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([every, 255 - every, every.T], axis=-1))
    tensor = to_pixels(picture, 16, 16)
    assert tensor.shape == (1, 3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(pixels(to_image(tensor)), pixels(picture))


def test_width_and_height_are_not_swapped(photo: Image.Image):
    assert to_pixels(photo, 32, 48).shape == (1, 3, 48, 32)
    assert to_image(torch.zeros(1, 3, 48, 32)).size == (32, 48)


def test_values_outside_are_clipped():
    told = to_image(torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1))
    assert told.getpixel((0, 0)) == (0, 128, 255)


def test_transparency_lies_over_white():
    assert flat(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert flat(Image.new("RGBA", (2, 2), (200, 0, 0, 255))).getpixel((0, 0)) == (200, 0, 0)
    half = flat(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0))
    assert half == (127, 127, 127)


def test_a_mask_is_one_where_it_is_white(hole: Image.Image):
    mask = to_mask(hole, 8, 8)
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = 1
    assert torch.equal(mask, expected[None, None])


@pytest.mark.parametrize("blur", [2, 8])
def test_a_blurred_mask_keeps_its_weight(hole: Image.Image, blur: int):
    mask = to_mask(hole, 64, 64, blur)
    assert 0 < mask[0, 0, 32, 15] < 1, "the edge is soft"
    assert float(mask.mean()) == pytest.approx(0.25, abs=0.01)


def test_outside_is_kept_and_inside_is_drawn(photo: Image.Image, hole: Image.Image):
    drawn = Image.new("RGB", (64, 64), "black")
    request = make_request(init=photo, mask=hole, mask_blur=4)
    kept = keep_outside(drawn, request)
    touched = np.asarray(soften(hole, 4)) > 0
    assert np.array_equal(pixels(kept)[~touched], pixels(photo)[~touched])
    assert (pixels(kept)[30:34, 30:34] == 0).all()
    assert keep_outside(drawn, make_request(init=photo)) is drawn


def test_outside_is_kept_at_another_size(photo: Image.Image, hole: Image.Image):
    drawn = Image.new("RGB", (128, 128), "black")
    kept = keep_outside(drawn, make_request(init=photo, mask=hole))
    large = photo.resize((128, 128), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(kept)[:16], pixels(large)[:16])
    assert (pixels(kept)[48:80, 48:80] == 0).all()
