from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.generate.conftest import gap, one, pixels, run
from torch.nn import functional as F

from sumuk.diffusion.grid import make_grid
from sumuk.diffusion.guidance import Row
from sumuk.diffusion.sample import Moved, drive, sample
from sumuk.diffusion.solver import Ask
from sumuk.generate.draw import decode, draw
from sumuk.generate.pixels import soften, to_image, to_pixels
from sumuk.generate.request import make_request
from sumuk.generate.settings import resolve
from sumuk.generate.text import Tower
from sumuk.weights.model import Model


def by_hand(model: Model, prompt: str, negative: str, scale: float, steps: int, seed: int) -> Image.Image:
    """Text to image without engine, guidance coroutine or rows: the formulas, written out."""
    tower = Tower(model.text, model.tokens, model.readings[0])
    contexts = [
        tower.encode(torch.tensor([model.tokens.row(model.tokens.encode(text))])).z
        for text in (prompt, negative)
    ]
    size = model.size // model.latent.stride
    start = torch.randn((1, model.latent.channels, size, size), generator=torch.Generator().manual_seed(seed))
    grid = make_grid("normal", model.schedule, steps)

    def clean(ask: Ask) -> torch.Tensor:
        time = torch.tensor([ask.level.time])
        towards, away = (model.denoiser(ask.x, time, context, None) for context in contexts)
        return model.prediction.clean(ask.x, away + scale * (towards - away), ask.level)

    solver = resolve(make_request(solver="euler"), model).make_solver()
    with torch.inference_mode():
        latent = drive(sample(solver, grid[0].sigma * start, grid, lambda now, then: start), clean)
        return to_image(decode(model, latent))


def test_text_to_image_equals_the_formulas(model: Model):
    drawn = one(
        model, prompt="a fox in the snow", negative="sea", solver="euler", steps=5, seed=3, guidance=4
    )
    assert gap(drawn, by_hand(model, "a fox in the snow", "sea", 4.0, 5, 3)) == 0


def test_the_first_ask_of_image_to_image_is_the_noised_picture(model: Model, photo: Image.Image):
    settings = resolve(make_request(init=photo, strength=0.5, steps=8, seed=1, grid="normal"), model)
    with torch.inference_mode():
        rows = next(draw(model, settings, 0))
        known = model.encode_latent(to_pixels(photo, 64, 64))
    assert isinstance(rows, list) and all(isinstance(row, Row) for row in rows)
    level = make_grid("normal", model.schedule, 8)[4]
    unit = torch.randn(known.shape, generator=torch.Generator().manual_seed(1))
    assert rows[0].level == level
    assert torch.equal(rows[0].x, level.alpha * known + level.sigma * unit)


def test_settings_change_the_picture(model: Model, photo: Image.Image):
    """What is accepted has an effect."""
    plain = {"prompt": "a fox", "steps": 5, "solver": "euler-a"}
    base = one(model, **plain)
    for change in (
        {"prompt": "the sea"}, {"negative": "snow"}, {"seed": 2}, {"steps": 6}, {"solver": "heun"},
        {"grid": "karras"}, {"eta": 0.3}, {"guidance": 3}, {"rescale": 0.9}, {"guidance_start": 0.3},
        {"guidance_end": 0.5}, {"clip_skip": 2}, {"init": photo}, {"variation": 0.3, "variation_seed": 9},
        {"prompt": "a (fox:1.5)"}, {"prompt": "[a:the sea:2] fox"}, {"prompt": "a fox AND snow :0.5"},
    ):  # fmt: skip
        assert gap(one(model, **plain | change), base) > 0, change


def test_strength(model: Model, photo: Image.Image):
    """The less strength, the closer to the picture that it began from."""
    through = to_image(decode(model, model.encode_latent(to_pixels(photo, 64, 64))))
    far = [
        np.abs(pixels(one(model, init=photo, strength=strength, steps=10)) - pixels(through)).mean()
        for strength in (0.1, 0.5, 1.0)
    ]
    assert far[0] < 0.6 * far[1] and far[1] < far[2], far


@pytest.mark.parametrize("solver", ["euler", "euler-a", "dpmpp-2m-sde"])
def test_variation(model: Model, solver: str):
    def varied(amount: float) -> Image.Image:
        return one(model, solver=solver, seed=5, variation_seed=6, variation=amount)

    alone = one(model, solver=solver, seed=5)
    assert gap(varied(0.0), alone) == 0
    near, far = (np.abs(pixels(varied(each)) - pixels(alone)).mean() for each in (0.1, 0.9))
    assert 0 < near < far
    if solver == "euler":  # with no noise on the way, all the way is the other seed
        assert gap(varied(1.0), one(model, solver=solver, seed=6)) == 0


def test_image_i_of_a_batch_has_the_seed_plus_i(model: Model):
    (batch,) = run(model, {"count": 3, "seed": 10, "solver": "euler-a"})
    for image, finished in enumerate(batch):
        assert finished.image == image
        assert gap(finished.picture, one(model, seed=10 + image, solver="euler-a")) == 0
    assert gap(batch[0].picture, batch[1].picture) > 0


def test_the_brownian_path_belongs_to_the_picture(model: Model):
    (batch,) = run(model, {"count": 2, "seed": 10, "solver": "dpmpp-sde"})
    assert gap(batch[1].picture, one(model, seed=11, solver="dpmpp-sde")) == 0


def walked(model: Model, **values: object) -> tuple[list[list[Row]], list[Moved]]:
    """What one picture asks and the moves it makes, when a network answers with random numbers."""
    settings = resolve(make_request(seed=1, **values), model)
    asks: list[list[Row]] = []
    moves: list[Moved] = []
    with torch.inference_mode():
        walk = draw(model, settings, 0)
        reply = None
        while True:
            try:
                event = walk.send(reply)
            except StopIteration:
                return asks, moves
            reply = None
            if isinstance(event, Moved):
                moves.append(event)
            else:
                asks.append(event)
                reply = [torch.randn(row.x.shape) for row in event]


def test_the_second_pass_begins_from_the_first_enlarged(model: Model):
    asks, moves = walked(model, steps=6, solver="euler", hires={"scale": 2, "strength": 0.5, "steps": 4})
    assert [move.steps for move in moves] == [6] * 6 + [2] * 2
    larger = F.interpolate(moves[5].x, (32, 32), mode="bicubic", align_corners=False, antialias=True)
    level = make_grid("normal", model.schedule, 4)[2]
    unit = torch.randn(larger.shape, generator=torch.Generator().manual_seed(1))
    assert asks[6][0].level == level
    assert torch.equal(asks[6][0].x, level.alpha * larger + level.sigma * unit)
    assert one(model, steps=2, hires={"scale": 1.5}).size == (96, 96)


def test_the_second_pass_continues_prompt_schedules(model: Model):
    """Half of the whole way is the end of the first pass, as in A1111: 'when' 1.0 never ends in it."""
    plain = {"steps": 4, "hires": {"scale": 1.5, "strength": 1.0}}
    held = one(model, prompt="[a fox:the sea:1.0]", **plain)
    assert gap(held, one(model, prompt="a fox", **plain)) > 0
    assert gap(one(model, prompt="[a fox:the sea:2.0]", **plain), one(model, prompt="a fox", **plain)) == 0


def test_steps_of_a_schedule_count_from_the_walked_steps_of_the_first_pass(model: Model, photo: Image.Image):
    plain = {"steps": 8, "init": photo, "strength": 0.5, "hires": {"scale": 1.5, "strength": 0.5}}
    assert gap(one(model, prompt="[a fox:the sea:4]", **plain), one(model, prompt="a fox", **plain)) > 0
    assert gap(one(model, prompt="[a fox:the sea:8]", **plain), one(model, prompt="a fox", **plain)) == 0


@pytest.mark.parametrize("size", [(64, 72), (72, 64), (40, 88)])
def test_odd_sizes(model: Model, size: tuple[int, int]):
    assert one(model, width=size[0], height=size[1], steps=2).size == size


def test_a_mask_keeps_outside_and_changes_inside(model: Model, photo: Image.Image, hole: Image.Image):
    drawn = one(model, prompt="a fox", init=photo, mask=hole, mask_blur=2, strength=1.0)
    outside = np.asarray(soften(hole, 2)) == 0
    assert outside.sum() > 2000
    assert np.array_equal(pixels(drawn)[outside], pixels(photo)[outside])
    inside = np.abs(pixels(drawn) - pixels(photo))[20:44, 20:44]
    assert inside.mean() > 10


def test_the_mask_holds_while_drawing_too(model: Model, photo: Image.Image, hole: Image.Image):
    """What is drawn knows what is around it: the latent outside the mask ends as the picture's."""
    _, moves = walked(model, init=photo, mask=hole, mask_blur=0, steps=3, guidance=1)
    last = moves[-1].x
    with torch.inference_mode():
        known = model.encode_latent(to_pixels(photo, 64, 64))
    # photo is 64 pixels and the stride 4: cells 4 to 11 lie in the hole
    keep = torch.ones(16, 16, dtype=torch.bool)
    keep[4:12, 4:12] = False
    assert torch.allclose(last[..., keep], known[..., keep], atol=1e-5)
    assert (last - known)[..., ~keep].abs().mean() > 0.1


def test_a_mask_with_a_second_pass(model: Model, photo: Image.Image, hole: Image.Image):
    drawn = one(model, init=photo, mask=hole, hires={"scale": 2})
    large = photo.resize((128, 128), Image.Resampling.LANCZOS)
    assert drawn.size == (128, 128)
    assert np.array_equal(pixels(drawn)[:20], pixels(large)[:20])


def test_nine_channels(inpainting: Model, photo: Image.Image, hole: Image.Image):
    """Inpainting models see the mask and the picture without what is under it."""
    drawn = one(inpainting, init=photo, mask=hole)
    outside = np.asarray(soften(hole, 2)) == 0
    assert np.array_equal(pixels(drawn)[outside], pixels(photo)[outside])
    settings = resolve(make_request(init=photo, mask=hole, seed=1, steps=4), inpainting)
    with torch.inference_mode():
        (row, *_) = next(draw(inpainting, settings, 0))
        beside = row.condition.beside
        masked = to_pixels(photo, 64, 64)
        masked[..., 16:48, 16:48] = 0
        assert torch.equal(beside[:, 1:], inpainting.encode_latent(masked))
    assert beside.shape == (1, 5, 16, 16) and beside[0, 0].sum() == 64 and beside[0, 0, 4:12, 4:12].all()
    assert one(inpainting, init=photo).size == (64, 64), "without a mask everything is drawn"


def test_eight_channels(pix2pix: Model, photo: Image.Image, hole: Image.Image):
    """Editing models see the picture's latent, unscaled."""
    settings = resolve(make_request(init=photo, seed=1, steps=4), pix2pix)
    with torch.inference_mode():
        (row, *_) = next(draw(pix2pix, settings, 0))
        latent = pix2pix.encode_latent(to_pixels(photo, 64, 64)) / pix2pix.latent.scale
    assert torch.equal(row.condition.beside, latent)
    drawn = one(pix2pix, init=photo, mask=hole)
    assert np.array_equal(pixels(drawn)[:8], pixels(photo)[:8])
