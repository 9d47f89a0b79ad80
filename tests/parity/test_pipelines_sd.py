"""Whole pipelines of Stable Diffusion 1, 2 and XL equal diffusers' from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.pipelines import (
    BETAS,
    CASES,
    GUIDED,
    HEIGHT,
    NEGATIVE,
    PROMPT,
    SEED,
    SIZED,
    STEPS,
    TEXT,
    WIDTH,
    Case,
    asked,
    beginning,
    case,
    clip,
    clip_l,
    clip_words,
    ddim,
    difference,
    diffusers,
    drawn,
    half,
    picture,
    randomise,
    saved,
    unet,
    unit,
    vae,
)

import sumuk

BEFORE = len(CASES)
UNSAFE = {
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
}


def sd1(kind: str = "StableDiffusionPipeline", scheduler: Any = None, channels: int = 4, **more: Any) -> Any:
    """Stable Diffusion 1 in small."""
    return getattr(diffusers, kind)(
        vae=vae(),
        text_encoder=clip_l(),
        tokenizer=clip_words(),
        unet=unet((True, False), 8, in_channels=channels),
        scheduler=scheduler or ddim(),
        **(UNSAFE | more),
    )


def from_noise(folder: Path, pipe: Any, **more: Any) -> float:
    """Text to image, by both."""
    saved(pipe, folder)
    theirs = asked(pipe, latents=beginning(pipe.scheduler, unit()), width=WIDTH, height=HEIGHT)
    ours = drawn(sumuk.load(folder), **(GUIDED | SIZED | {"solver": "ddim", "grid": "leading"} | more))
    return difference(ours.latents[-1], theirs)


@case("SD 1 text to image", "StableDiffusionPipeline", "DDIM, leading", 2e-5)
def sd1_ddim(folder: Path) -> float:
    return from_noise(folder, sd1())


@case("SD 1 text to image", "StableDiffusionPipeline", "PNDM, leading", 2e-5)
def sd1_pndm(folder: Path) -> float:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True, **BETAS)
    return from_noise(folder, sd1(scheduler=scheduler), solver="plms")


@case("SD 1 text to image", "StableDiffusionPipeline", "Euler, trailing", 2e-5)
def sd1_euler(folder: Path) -> float:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", **BETAS)
    return from_noise(folder, sd1(scheduler=scheduler), solver="euler", grid="trailing")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


class Mean:
    """The autoencoder's mean where diffusers draws from its Gaussian, as we do not."""

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        gaussian = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
        self._patch.setattr(gaussian, "sample", lambda self, generator=None: self.mode())

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


@case("SD 1 image to image", "StableDiffusionImg2ImgPipeline", "DDIM, strength 0.6", 2e-5)
def sd1_image(folder: Path) -> float:
    pipe = saved(sd1("StableDiffusionImg2ImgPipeline"), folder)
    with Mean():
        theirs = asked(pipe, image=picture(), strength=0.6, generator=seeded())
    ours = drawn(sumuk.load(folder), **GUIDED, solver="ddim", init=picture(), strength=0.6)
    return difference(ours.latents[-1], theirs)


@case("SD 1 inpainting", "StableDiffusionInpaintPipeline", "DDIM, 9 channels, strength 0.8", 2e-5)
def sd1_inpainting(folder: Path) -> float:
    pipe = saved(sd1("StableDiffusionInpaintPipeline", channels=9), folder)
    with Mean():
        theirs = asked(
            pipe,
            image=picture(),
            mask_image=half(),
            strength=0.8,
            generator=seeded(),
            width=WIDTH,
            height=HEIGHT,
        )
    model = sumuk.load(folder)
    assert model.family.key == "sd1/inpainting"
    ours = drawn(model, **GUIDED, solver="ddim", init=picture(), mask=half(), mask_blur=0, strength=0.8)
    return difference(ours.latents[-1], theirs)


@case("SD 1 + ControlNet", "StableDiffusionControlNetPipeline", "DDIM, weight 0.8", 2e-5)
def sd1_control(folder: Path) -> float:
    net = unet((True, False), 8)
    control = randomise(diffusers.ControlNetModel.from_unet(net, load_weights_from_unet=False), 9)
    saved(sd1(), folder / "m")  # as people have it: the model by itself, the control by itself
    control.save_pretrained(folder / "c")
    pipe = saved(sd1("StableDiffusionControlNetPipeline", controlnet=control), folder / "both")
    theirs = asked(
        pipe,
        image=picture(3),
        latents=beginning(pipe.scheduler, unit()),
        controlnet_conditioning_scale=0.8,
        width=WIDTH,
        height=HEIGHT,
    )
    model = sumuk.load(folder / "m", controls={"edges": folder / "c"})
    steer = ({"control": "edges", "hint": picture(3), "weight": 0.8},)
    ours = drawn(model, **GUIDED, **SIZED, solver="ddim", steer=steer)
    plain = drawn(model, **GUIDED, **SIZED, solver="ddim")
    assert difference(plain.latents[-1], theirs) > 0.05
    return difference(ours.latents[-1], theirs)


def sd2(scheduler: Any) -> Any:
    """Stable Diffusion 2 in small; its tower ends where it is read."""
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(2),
        tokenizer=clip_words(0),
        unet=unet((True, False), (1, 2), use_linear_projection=True),
        scheduler=scheduler,
        **UNSAFE,
    )


@case("SD 2, v-prediction", "StableDiffusionPipeline", "DDIM, leading", 2e-5)
def sd2_v(folder: Path) -> float:
    return from_noise(folder, sd2(ddim(prediction_type="v_prediction")))


@case("SD 2, v-prediction, zero terminal SNR", "StableDiffusionPipeline", "DDIM, trailing", 2e-5)
def sd2_zero(folder: Path) -> float:
    scheduler = ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return from_noise(folder, sd2(scheduler), grid="trailing")


def sdxl_unet(levels: tuple[bool, ...], context: int, numbers: int, **more: Any) -> Any:
    return unet(
        levels,
        tuple(1 if level == 0 else 2 for level in range(len(levels))),
        use_linear_projection=True,
        cross_attention_dim=context,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=TEXT + 256 * numbers,
        **more,
    )


def euler() -> Any:
    """SDXL's own."""
    return diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **BETAS)


def sdxl(scheduler: Any = None) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scale=0.13025),
        text_encoder=clip_l(),
        text_encoder_2=clip(2, projected=True),
        tokenizer=clip_words(),
        tokenizer_2=clip_words(0),
        unet=sdxl_unet((False, True), 2 * TEXT, 6, transformer_layers_per_block=(1, 2)),
        scheduler=scheduler or euler(),
        add_watermarker=False,
    )


def refiner(scheduler: Any = None) -> Any:
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(scale=0.13025),
        text_encoder=None,
        text_encoder_2=clip(2, projected=True),
        tokenizer=None,
        tokenizer_2=clip_words(0),
        unet=sdxl_unet((False, True, False), TEXT, 5),
        scheduler=scheduler or euler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


@case("SDXL", "StableDiffusionXLPipeline", "Euler, leading", 2e-5)
def sdxl_euler(folder: Path) -> float:
    return from_noise(folder, sdxl(), solver="euler")


@case("SDXL, no negative prompt, told sizes", "StableDiffusionXLPipeline", "DDIM, leading", 2e-5)
def sdxl_sizes(folder: Path) -> float:
    pipe = saved(sdxl(ddim()), folder)
    theirs = asked(
        pipe,
        negative_prompt=None,
        latents=beginning(pipe.scheduler, unit()),
        **SIZED,
        original_size=(300, 200),
        crops_coords_top_left=(16, 8),
    )
    wanted = GUIDED | SIZED | {"negative": "", "original": (200, 300), "crop": (8, 16), "solver": "ddim"}
    return difference(drawn(sumuk.load(folder), **wanted).latents[-1], theirs)


@case("SDXL base, refiner from 0.8", "StableDiffusionXLImg2ImgPipeline", "Euler, leading, 10 steps", 2e-5)
def sdxl_refined(folder: Path) -> float:
    base, other = saved(sdxl(), folder / "base"), saved(refiner(), folder / "refiner")
    halfway = asked(
        base,
        latents=beginning(base.scheduler, unit(), 10),
        num_inference_steps=10,
        denoising_end=0.8,
        **SIZED,
    )
    # To a refiner in the middle of a walk diffusers hands latents as they are.
    theirs = asked(
        other,
        image=halfway,
        num_inference_steps=10,
        denoising_start=0.8,
        original_size=(HEIGHT, WIDTH),
        target_size=(HEIGHT, WIDTH),
    )
    model = sumuk.load(folder / "base", refiner=folder / "refiner")
    wanted = GUIDED | SIZED | {"steps": 10, "solver": "euler", "grid": "leading", "refiner_start": 0.8}
    ours = drawn(model, **wanted)
    return difference(ours.latents[-1], theirs)


HERE = CASES[BEFORE:]


@pytest.mark.parametrize("case", HERE, ids=lambda case: f"{case.name}, {case.how}")
def test_equals_diffusers(case: Case, tmp_path: Path) -> None:
    assert case.measure(tmp_path) <= case.limit


def test_pixels_equal_diffusers(tmp_path: Path) -> None:
    """Not only latents: the same picture."""
    pipe = saved(sd1(), tmp_path)
    theirs = asked(pipe, latents=beginning(pipe.scheduler, unit()), **SIZED, output_type="pt")
    ours = drawn(sumuk.load(tmp_path), **GUIDED, **SIZED, solver="ddim")
    assert difference(ours.pixels, theirs) <= 2e-5


def test_words_matter(tmp_path: Path) -> None:
    """The comparison can fail: other words, another picture."""
    pipe = saved(sd1(), tmp_path)
    theirs = asked(pipe, latents=beginning(pipe.scheduler, unit()), **SIZED)
    for change in ({"prompt": NEGATIVE}, {"negative": PROMPT}, {"seed": SEED + 1}, {"steps": STEPS + 1}):
        ours = drawn(sumuk.load(tmp_path), **(GUIDED | SIZED | change), solver="ddim")
        assert difference(ours.latents[-1], theirs) > 0.01, change
