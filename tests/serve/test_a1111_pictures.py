"""Shapes, masks, holes and the part around a mask: no pixel that was to be kept changes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sumuk.base.errors import BadInput
from sumuk.serve.a1111_pictures import filled, flat, mask_of, opened, part_around, png_of, scene, shaped

RANDOM = np.random.default_rng(3)
USUAL = {
    "width": 64,
    "height": 64,
    "resize_mode": 0,
    "invert": False,
    "blur": 0,
    "fill": False,
    "only_masked": False,
    "padding": 0,
}


def noise(width: int, height: int, bands: int = 3) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 255, (height, width, bands), dtype=np.uint8))


def white_in(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(
    ("size", "target", "cropped", "drawn_out"),
    [
        ((64, 48), (64, 64), (48, 48), (64, 64)),
        ((48, 64), (64, 64), (48, 48), (64, 64)),
        ((64, 48), (32, 64), (24, 48), (64, 128)),
        ((64, 48), (1024, 768), (64, 48), (64, 48)),
        ((1000, 3), (8, 8192), (1, 3), (1000, 1024000)),
    ],
)
def test_shapes(size, target, cropped, drawn_out):
    image = noise(*size)
    assert shaped(image, *target, 0) is image
    assert shaped(image, *target, 1).size == cropped
    if drawn_out[1] < 10_000:
        assert shaped(image, *target, 2).size == drawn_out


def test_cropping_keeps_the_middle_and_drawing_out_keeps_all():
    image = noise(64, 48)
    crop = np.asarray(shaped(image, 8, 8, 1))
    assert (crop == np.asarray(image)[:, 8:56]).all()
    whole = np.asarray(shaped(image, 8, 8, 2))
    assert (whole[8:56] == np.asarray(image)).all()
    assert (whole[:8] == np.asarray(image)[:1]).all()
    assert (whole[56:] == np.asarray(image)[-1:]).all()


def test_a_mask_is_how_opaque_or_how_light():
    grey = white_in((8, 8), (2, 2, 5, 5))
    assert (np.asarray(mask_of(grey.convert("RGB"), False)) == np.asarray(grey)).all()
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    clear.paste((0, 0, 0, 129), (2, 2, 5, 5))
    assert (np.asarray(mask_of(clear, False)) == np.asarray(grey)).all()
    assert (np.asarray(mask_of(clear, True)) == 255 - np.asarray(grey)).all()


def test_a_hole_takes_the_colours_around_it():
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    image.paste("white", (40, 20, 160, 80))
    made = filled(image, white_in(image.size, (40, 20, 160, 80)))
    assert made.getpixel((10, 50)) == (255, 0, 0) and made.getpixel((190, 50)) == (0, 0, 255)
    left, right = made.getpixel((45, 50)), made.getpixel((155, 50))
    assert left[0] > 200 and left[1] < 30 and right[2] > 200 and right[1] < 30
    assert filled(image, Image.new("L", image.size, 255)).getpixel((5, 5)) == (128, 128, 128)
    assert (np.asarray(filled(image, Image.new("L", image.size))) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("target", "padding", "box"),
    [
        ((64, 64), 0, (5, 6, 20, 21)),
        ((64, 64), 4, (1, 2, 24, 25)),
        ((64, 128), 0, (5, 0, 20, 30)),
        ((64, 64), 100, (0, 0, 64, 64)),
    ],
)
def test_the_part_around_a_mask(target, padding, box):
    assert part_around(white_in((64, 64), (5, 10, 20, 16)), *target, padding) == box


def test_the_part_never_leaves_the_picture():
    for box in ((0, 0, 3, 60), (61, 61, 64, 64), (0, 30, 64, 31), (63, 0, 64, 1)):
        for target in ((8, 8), (8, 512), (512, 8)):
            left, top, right, bottom = part_around(white_in((64, 64), box), *target, 3)
            assert 0 <= left <= box[0] and box[2] <= right <= 64 and left < right
            assert 0 <= top <= box[1] and box[3] <= bottom <= 64 and top < bottom


def test_only_the_masked_part_is_drawn_and_put_back():
    image, mask = noise(96, 64), white_in((96, 64), (30, 20, 50, 36))
    made = scene(png_of(image), png_of(mask), **(USUAL | {"only_masked": True, "padding": 2}))
    part = opened(made.init)
    assert part.size == (24, 24) and opened(made.mask).size == (24, 24)
    text = PngInfo()
    text.add_itxt("parameters", "a fox\nSteps: 2, Sampler: euler, Seed: 1")
    whole = opened(made.back(png_of(Image.new("RGB", (64, 64), "green"), text)))
    inside = np.asarray(mask) == 255
    assert (np.asarray(whole)[~inside] == np.asarray(image)[~inside]).all()
    assert (np.asarray(whole)[inside] == (0, 128, 0)).all()
    assert whole.info["parameters"].endswith("Inpaint area: Only masked, Masked area padding: 2")


def test_a_blurred_edge_has_room():
    image, mask = noise(96, 64), white_in((96, 64), (30, 20, 50, 36))
    made = scene(png_of(image), png_of(mask), **(USUAL | {"only_masked": True, "blur": 4}))
    whole = np.asarray(opened(made.back(png_of(Image.new("RGB", (64, 64), "green")))))
    far = np.asarray(white_in(mask.size, (12, 2, 68, 54))) == 0
    assert (whole[far] == np.asarray(image)[far]).all()
    assert tuple(whole[28, 40]) != tuple(np.asarray(image)[28, 40])


def test_without_a_mask_the_picture_goes_on_as_it_is():
    png = png_of(noise(40, 40, 4))
    assert scene(png, None, **(USUAL | {"only_masked": True, "fill": True})).init is png
    assert opened(scene(png, None, **(USUAL | {"width": 32, "resize_mode": 1})).init).size == (20, 40)


def test_mask_and_picture_come_to_the_same_size():
    made = scene(
        png_of(noise(64, 48, 4)), png_of(white_in((32, 32), (0, 0, 8, 8))), **(USUAL | {"resize_mode": 2})
    )
    assert opened(made.init).size == opened(made.mask).size == (64, 64)
    assert opened(made.init).mode == "RGB" and opened(made.mask).mode == "L"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"width": None, "only_masked": True}, "inpaint_full_res true needs width and height"),
        ({"height": None, "resize_mode": 2}, "resize_mode 2 needs width and height"),
        ({"only_masked": True, "invert": True}, "black everywhere"),
    ],
)
def test_what_has_no_size_or_no_mask_is_refused(more, told):
    with pytest.raises(BadInput, match=told):
        scene(png_of(noise(16, 16)), png_of(Image.new("L", (16, 16), 255)), **(USUAL | more))


def test_transparency_lies_over_white():
    assert flat(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
