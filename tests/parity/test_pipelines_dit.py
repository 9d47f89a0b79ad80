"""Whole pipelines of SD3, FLUX.1, DiT and Stable Cascade equal diffusers' from the same noise."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.pipelines import (
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
    difference,
    diffusers,
    drawn,
    picture,
    randomise,
    saved,
    t5,
    t5_words,
    unit,
    vae,
)
from torch import Tensor

import sumuk
from sumuk.diffusion.cosine import ContinuousCosine
from sumuk.families.cascade_parts import STAGE_A_SCALE
from sumuk.weights.model import Model

BEFORE = len(CASES)
SENTENCE, CONTEXT = 2 * TEXT, 2 * TEXT + 32
STEERED = {"control": "edges", "hint": picture(3), "weight": 0.8}

# -- SD3 -------------------------------------------------------------------------------------------------------------


SD3 = {
    "sample_size": 16,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": CONTEXT,
    "caption_projection_dim": 128,
    "pooled_projection_dim": SENTENCE,
    "pos_embed_max_size": 24,
}


def sd3_transformer(**more: Any) -> Any:
    return randomise(diffusers.SD3Transformer2DModel(**SD3, **more), 5)


def sd3(transformer: Any, *, words: bool = True, kind: str = "StableDiffusion3Pipeline", **more: Any) -> Any:
    return getattr(diffusers, kind)(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, 1.5305, 0.0609),
        text_encoder=clip_l(projected=True),
        text_encoder_2=clip(2, projected=True),
        text_encoder_3=t5(CONTEXT) if words else None,
        tokenizer=clip_words(),
        tokenizer_2=clip_words(0),
        tokenizer_3=t5_words(256) if words else None,
        **more,
    )


def by_both(pipe: Any, folder: Path, variant: str) -> float:
    saved(pipe, folder)
    theirs = asked(pipe, latents=unit(16), **SIZED)
    model = sumuk.load(folder)
    assert model.family.key == variant
    return difference(drawn(model, **GUIDED, **SIZED).latents[-1], theirs)


@case("SD 3 medium", "StableDiffusion3Pipeline", "flow Euler, shift 3", 2e-5)
def sd3_medium(folder: Path) -> float:
    return by_both(sd3(sd3_transformer()), folder, "sd3/medium")


@case("SD 3 medium without T5", "StableDiffusion3Pipeline", "flow Euler, shift 3", 2e-5)
def sd3_without_t5(folder: Path) -> float:
    return by_both(sd3(sd3_transformer(), words=False), folder, "sd3/medium")


@case("SD 3.5 large", "StableDiffusion3Pipeline", "flow Euler, shift 3", 2e-5)
def sd35_large(folder: Path) -> float:
    return by_both(sd3(sd3_transformer(qk_norm="rms_norm")), folder, "sd3/3.5-large")


@case("SD 3.5 medium", "StableDiffusion3Pipeline", "flow Euler, shift 3", 2e-5)
def sd35_medium(folder: Path) -> float:
    net = sd3_transformer(qk_norm="rms_norm", dual_attention_layers=(0,))
    return by_both(sd3(net), folder, "sd3/3.5-medium")


@case("SD 3 + ControlNet", "StableDiffusion3ControlNetPipeline", "flow Euler, weight 0.8", 2e-5)
def sd3_control(folder: Path) -> float:
    net = sd3_transformer()
    control = diffusers.SD3ControlNetModel(**SD3)
    randomise(control, 9).save_pretrained(folder / "c")
    saved(sd3(net), folder / "m")
    pipe = sd3(net, kind="StableDiffusion3ControlNetPipeline", controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    return steered(pipe, folder, unit(16))


def steered(pipe: Any, folder: Path, noise: Tensor, finish: Any = None, **more: Any) -> float:
    """With a ControlNet; the autoencoder's mean of the hint on both sides."""
    with pytest.MonkeyPatch.context() as patch:
        gaussian = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
        patch.setattr(gaussian, "sample", lambda self, generator=None: self.mode())
        theirs = asked(
            pipe, control_image=picture(3), controlnet_conditioning_scale=0.8, latents=noise, **SIZED, **more
        )
    theirs = theirs if finish is None else finish(theirs)
    model = sumuk.load(folder / "m", controls={"edges": folder / "c"})
    wanted = GUIDED | SIZED
    wanted |= {"negative": ""} if model.family.guidance != "classifier-free" else {}
    plain, ours = (drawn(model, **wanted, steer=steer).latents[-1] for steer in ((), (STEERED,)))
    assert difference(plain, theirs) > 0.02
    return difference(ours, theirs)


# -- FLUX.1 ----------------------------------------------------------------------------------------------------------


FLUX = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": 32,
    "pooled_projection_dim": TEXT,
}


def flux_transformer(guided: bool) -> Any:
    return randomise(diffusers.FluxTransformer2DModel(**FLUX, guidance_embeds=guided), 5)


def flux(net: Any, kind: str = "FluxPipeline", **more: Any) -> Any:
    guided = net.config.guidance_embeds
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True} if guided else {"shift": 1.0}
    return getattr(diffusers, kind)(
        transformer=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=vae(16, 0.3611, 0.1159),
        text_encoder=clip_l(),
        text_encoder_2=t5(32),
        tokenizer=clip_words(),
        tokenizer_2=t5_words(512),
        **more,
    )


def packed(noise: Tensor) -> Tensor:
    return diffusers.FluxPipeline._pack_latents(noise, 1, 16, HEIGHT // 8, WIDTH // 8)


def unpacked(latents: Tensor) -> Tensor:
    return diffusers.FluxPipeline._unpack_latents(latents, HEIGHT, WIDTH, 8)


def flux_by_both(guided: bool, folder: Path, rows: int, scale: float) -> float:
    pipe = saved(flux(flux_transformer(guided)), folder)
    given = {"latents": packed(unit(16)), "max_sequence_length": rows, "guidance_scale": scale}
    theirs = unpacked(asked(pipe, negative_prompt=None, **given, **SIZED))
    wanted = GUIDED | SIZED | {"negative": "", "guidance": scale if guided else None}
    return difference(drawn(sumuk.load(folder), **wanted).latents[-1], theirs)


@case("FLUX.1 dev", "FluxPipeline", "flow Euler, shifted by size", 2e-5)
def flux_dev(folder: Path) -> float:
    return flux_by_both(True, folder, 512, 3.5)


@case("FLUX.1 schnell", "FluxPipeline", "flow Euler, no shift", 2e-5)
def flux_schnell(folder: Path) -> float:
    return flux_by_both(False, folder, 256, 0.0)


@case("FLUX.1 dev + ControlNet", "FluxControlNetPipeline", "flow Euler, weight 0.8", 2e-5)
def flux_control(folder: Path) -> float:
    net = flux_transformer(True)
    control = diffusers.FluxControlNetModel(**FLUX, guidance_embeds=True)
    randomise(control, 9).save_pretrained(folder / "c")
    saved(flux(net), folder / "m")
    pipe = flux(net, "FluxControlNetPipeline", controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    return steered(pipe, folder, packed(unit(16)), unpacked, negative_prompt=None)


# -- DiT -------------------------------------------------------------------------------------------------------------


def dit_pipeline() -> Any:
    """With the original's constants: see tests/nets/test_dit.py."""
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_eps=1e-6,
    )
    randomise(net, 5)
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=1)
    return diffusers.DiTPipeline(transformer=net, vae=vae(), scheduler=scheduler)


@torch.inference_mode()
def dit(folder: Path, scale: float) -> float:
    """Their pipeline takes no noise and gives no latents: noise goes in and latents come out at its seams."""
    pipe = saved(dit_pipeline(), folder)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    decoded: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        start = beginning(pipe.scheduler, noise)
        patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: start)
        decode = pipe.vae.decode
        patch.setattr(pipe.vae, "decode", lambda z: decoded.append(z) or decode(z))
        pipe(class_labels=[7], guidance_scale=scale, num_inference_steps=STEPS)
    model = sumuk.load(folder)
    # They guide all four channels; the original, and so we, the first three.
    model = replace(model, family=replace(model.family, guided=None))
    wanted = {"label": 7, "guidance": scale, "steps": STEPS, "seed": SEED, "width": 128, "height": 128}
    return difference(drawn(model, **wanted).latents[-1], decoded[0] * 0.18215)


@case("DiT", "DiTPipeline", "DDIM, guidance 1", 2e-5)
def dit_plain(folder: Path) -> float:
    return dit(folder, 1.0)


@case("DiT, all channels guided", "DiTPipeline", "DDIM, guidance 4", 2e-5)
def dit_guided(folder: Path) -> float:
    return dit(folder, 4.0)


# -- Stable Cascade --------------------------------------------------------------------------------------------------


def cascade_net(**more: Any) -> Any:
    config = {
        "kernel_size": 3,
        "conditioning_dim": 48,
        "clip_text_pooled_in_channels": TEXT,
        "clip_seq": 4,
        "dropout": (0.1, 0.1),
        "self_attn": True,
        "block_out_channels": (64, 128),
        "down_num_layers_per_block": (2, 1),
        "up_num_layers_per_block": (1, 2),
        "down_blocks_repeat_mappers": (1, 1),
        "up_blocks_repeat_mappers": (1, 1),
        "num_attention_heads": (1, 2),
        "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
    }
    return randomise(diffusers.StableCascadeUNet(**(config | more)), 5)


def cascade() -> tuple[Any, Any]:
    """Both pipelines: from text to stage C's latent, and on to pixels."""
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    prior = cascade_net(
        in_channels=16,
        out_channels=16,
        patch_size=1,
        clip_text_in_channels=TEXT,
        clip_image_in_channels=24,
        switch_level=(False,),
        timestep_conditioning_type=("sca", "crp"),
    )
    decoder = cascade_net(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        timestep_conditioning_type=("sca",),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(2, 2),
    )
    stage_a = randomise(
        PaellaVQModel(bottleneck_blocks=2, embed_dim=24, num_vq_embeddings=32, scale_factor=STAGE_A_SCALE), 6
    )
    shared = {"tokenizer": clip_words(), "text_encoder": clip(2, projected=True)}
    scheduler = diffusers.DDPMWuerstchenScheduler
    return (
        diffusers.StableCascadePriorPipeline(prior=prior, scheduler=scheduler(), **shared),
        diffusers.StableCascadeDecoderPipeline(
            decoder=decoder, vqgan=stage_a, scheduler=scheduler(), **shared
        ),
    )


def loaded_cascade(folder: Path, shift: float) -> Model:
    model = sumuk.load(
        folder / "prior",
        parts={"decoder": folder / "decoder" / "decoder", "vae": folder / "decoder" / "vqgan"},
    )
    return replace(model, schedule=ContinuousCosine(shift))


def like_the_original(pipe: Any, net: Any) -> None:
    """Two things that diffusers does otherwise than the model's authors.

    Its first step tells the network time 1, theirs the time of the noise that is really there. Its last step leaves
    1 % of noise's place in the picture, theirs ends at the clean estimate.
    """
    last, alpha = ContinuousCosine().last, pipe.scheduler._alpha_cumprod
    pipe.scheduler._alpha_cumprod = lambda t, device: torch.where(t == 0, 1.0, alpha(t, device))
    net.register_forward_pre_hook(
        lambda _, args, given: (args, given | {"timestep_ratio": given["timestep_ratio"].clamp(max=last)}),
        with_kwargs=True,
    )


SIDE = 256


@functools.cache
@torch.inference_mode()
def cascade_both() -> tuple[float, float, float]:
    """How far both stages and the picture are from theirs, ours drawn with their scheduler's shift of 1."""
    with tempfile.TemporaryDirectory() as folder:
        return _cascade_both(Path(folder))


def _cascade_both(folder: Path) -> tuple[float, float, float]:
    prior, decoder = cascade()
    saved(prior, folder / "prior"), saved(decoder, folder / "decoder")
    like_the_original(prior, prior.prior), like_the_original(decoder, decoder.decoder)
    given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS}
    start = ContinuousCosine().noisiest.sigma

    def noise(*shape: int, seed: int = SEED) -> dict[str, Any]:
        """Our first noise as latents, and the generator as it is after that."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(1, *shape, generator=generator)
        return {"latents": start * first, "generator": generator}

    coarse = prior(**given, guidance_scale=4.0, width=SIDE, height=SIDE, **noise(16, 6, 6)).image_embeddings
    later = noise(4, SIDE // 4, SIDE // 4, seed=SEED + 2**31)
    both = decoder(**given, image_embeddings=coarse, guidance_scale=2.0, output_type="latent", **later).images
    model = loaded_cascade(folder, 1.0)
    wanted = GUIDED | {"width": SIDE, "height": SIDE, "decoder_steps": STEPS, "decoder_guidance": 2.0}
    ours = drawn(model, **wanted)
    pixels = decoder.vqgan.decode(decoder.vqgan.config.scale_factor * both).sample.clamp(0, 1)
    return (
        difference(ours.latents[0], coarse),
        difference(ours.latents[1], both),
        difference(ours.pixels, pixels),
    )


@case("Stable Cascade, stage C", "StableCascadePriorPipeline", "DDPM, shift 1", 2e-5)
def cascade_prior(folder: Path) -> float:
    return cascade_both()[0]


@case("Stable Cascade, stages C and B", "StableCascadeDecoderPipeline", "DDPM, shift 1", 2e-5)
def cascade_decoder(folder: Path) -> float:
    return cascade_both()[1]


@case("Stable Cascade, stages C, B and A", "StableCascadeDecoderPipeline", "pixels, DDPM, shift 1", 1e-4)
def cascade_pixels(folder: Path) -> float:
    return cascade_both()[2]


HERE = CASES[BEFORE:]


@pytest.mark.parametrize("case", HERE, ids=lambda case: f"{case.name}, {case.how}")
def test_equals_diffusers(case: Case, tmp_path: Path) -> None:
    assert case.measure(tmp_path) <= case.limit
