"""DiT (Peebles & Xie 2023): a transformer on the latents of Stable Diffusion's autoencoder, told a class.

S, B, L and XL, with patches of 2, 4 or 8, differ in shape alone; XL/2 was published, for 256 and for 512 pixels, and
each file holds the transformer only. What was published is ancestral sampling in 250 steps; the default is DDIM in 50.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sumuk.base.errors import BadFile, BadInput
from sumuk.diffusion.schedule import linear
from sumuk.families import sd
from sumuk.families.family import FAMILIES, Arrangement, Defaults, Facts, Family, Latent, Part, Shapes
from sumuk.families.reading import Given
from sumuk.files.layout import Cut, Pattern, Rule, fuse, ignore, rename
from sumuk.files.tensors import Lazy

if TYPE_CHECKING:
    from torch import Tensor, nn

SIDE = 32
"""Latent cells a side for which positions are made where a file has none: those of 256 pixels."""

MOST = 128
"""Blocks that are counted at most: no DiT has more, and a hostile file might."""

EMBEDDERS = (
    ("timestep_embedder.linear_1.*", "t_embedder.mlp.0.*"),
    ("timestep_embedder.linear_2.*", "t_embedder.mlp.2.*"),
    ("class_embedder.embedding_table.weight", "y_embedder.embedding_table.weight"),
)
"""What DiT has once and diffusers has in each block: diffusers, original."""


def dit_rules(names: Collection[str]) -> list[Rule]:
    """The diffusers library's names (``DiTTransformer2DModel``), from either side's names.

    It keeps a copy of the embedders in each block, and no positions, as they are a constant.
    """
    here, depth = set(names), 0
    while depth < MOST and here & {
        f"blocks.{depth}.attn.qkv.weight",
        f"transformer_blocks.{depth}.attn1.to_q.weight",
    }:
        depth += 1
    block, ours = "transformer_blocks.{i}", "blocks.{i}"
    rules = [
        Rule(
            (Pattern("pos_embed.proj.weight"),),
            (Pattern("x_embedder.proj.weight"), Pattern("pos_embed")),
            Cut(_without_positions, _with_positions),
            splits=True,
        ),
        rename("pos_embed.proj.bias", "x_embedder.proj.bias"),
        rename(f"{block}.norm1.linear.*", f"{ours}.adaLN_modulation.1.*"),
        fuse([f"{block}.attn1.to_{part}.*" for part in "qkv"], f"{ours}.attn.qkv.*"),
        rename(f"{block}.attn1.to_out.0.*", f"{ours}.attn.proj.*"),
        rename(f"{block}.ff.net.0.proj.*", f"{ours}.mlp.fc1.*"),
        rename(f"{block}.ff.net.2.*", f"{ours}.mlp.fc2.*"),
        rename("proj_out_1.*", "final_layer.adaLN_modulation.1.*"),
        rename("proj_out_2.*", "final_layer.linear.*"),
    ]
    for theirs, one in EMBEDDERS if depth else ():
        copies = tuple(Pattern(f"transformer_blocks.{i}.norm1.emb.{theirs}") for i in range(depth))
        rules.append(Rule(copies, (Pattern(one),), Cut(_one_of_all, lambda tensor, _: tensor)))
    return rules


def _one_of_all(copies: Sequence[Lazy]) -> Lazy:
    """The tensor that all blocks have a copy of; where they differ (trained apart) nothing is chosen."""
    first = copies[0]
    if {(copy.shape, copy.dtype) for copy in copies} != {(first.shape, first.dtype)}:
        raise BadFile(f"{first.source}: the blocks' copies of an embedder differ in shape", "layout.shape")

    def load() -> Tensor:
        import torch

        tensor = first.load()
        for block, copy in enumerate(copies):
            if not torch.equal(copy.load(), tensor):
                raise BadFile(
                    f"{first.source}: the embedder {list(first.shape)} of transformer_blocks.{block}.norm1.emb "
                    "differs from that of block 0, but a DiT has one for all blocks",
                    "dit.copies",
                )
        return tensor

    return first.become(load)


def _with_positions(patches: Lazy, index: int) -> Lazy:
    """The patch embedding (0), or the positions (1) of the published 256 pixels for its width and patch.

    How large the pictures were the tensors do not show. The network computes positions of other sizes by the same
    formula, so that nothing but the usual size is lost.
    """
    if len(patches.shape) != 4 or not 0 < patches.shape[3] <= SIDE:
        raise BadFile(f"{patches.source}: no patch has the shape {list(patches.shape)}", "layout.shape")
    width, side = patches.shape[0], SIDE // patches.shape[3]

    def load() -> Tensor:
        from sumuk.nets.dit import positions

        return positions(side, side, width, "cpu")

    return patches if index == 0 else Lazy((1, side * side, width), "F32", load, patches.source)


def _without_positions(both: Sequence[Lazy]) -> Lazy:
    """The patch embedding, if the positions are those that anyone can compute."""
    patches, stored = both

    def load() -> Tensor:
        import torch

        from sumuk.nets.dit import positions

        found = stored.load()
        side = math.isqrt(found.shape[1])
        known = positions(side, side, found.shape[2], "cpu").to(found.device)
        rounding = max(1e-5, torch.finfo(found.dtype).eps)
        if found.shape != known.shape or not torch.allclose(found.float(), known, rtol=0, atol=rounding):
            raise BadFile(
                f"{stored.source}: pos_embed is not the constant of {side} x {side} tokens, and the diffusers "
                "layout has no place for another; keep the original layout",
                "dit.positions",
            )
        return patches.load()

    return patches.become(load)


def _build(shapes: Shapes) -> nn.Module:
    from sumuk.nets.dit import DiT, dit_shape

    return DiT(dit_shape(shapes))


def _config(shapes: Shapes) -> dict[str, Any]:
    from sumuk.nets.dit import dit_shape

    shape = dit_shape(shapes)
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": shape.width // shape.heads,
        "in_channels": shape.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": shape.heads,
        "num_embeds_ada_norm": shape.null,
        "num_layers": shape.depth,
        "out_channels": shape.out_channels,
        "patch_size": shape.patch,
        "sample_size": shape.side * shape.patch,
    }


TRANSFORMER = Part(
    name="denoiser",
    title="diffusion transformer",
    key="y_embedder.embedding_table.weight",
    original=(
        "pos_embed", "x_embedder.proj.*", "t_embedder.mlp.*", "y_embedder.embedding_table.*", "blocks.*",
        "final_layer.*",
    ),
    diffusers=dit_rules,
    supplier="DiT-XL-2-256x256.pt, another DiT, or transformer/ of a diffusers folder",
    build=_build,
    config=_config,
)  # fmt: skip
VAE = replace(
    sd.VAE,
    supplier="vae/ of a DiT's diffusers folder, a stand-alone VAE (vae-ft-ema), or any SD 1.x checkpoint",
)

SINGLE = Arrangement(
    name="single",
    title="single file, original names",
    dialect="original",
    parts=((TRANSFORMER, "model.diffusion_model."), (VAE, "first_stage_model.")),
)
DIFFUSERS = Arrangement(
    name="diffusers",
    title="diffusers folder",
    dialect="diffusers",
    parts=((TRANSFORMER, "transformer/"), (VAE, "vae/")),
)
BARE = Arrangement(
    name="bare",
    title="single network, original names without prefix",
    dialect="original",
    parts=((TRANSFORMER, ""), (VAE, "")),
    ignored=(ignore("loss.*"), ignore("model_ema.*")),
)
BARE_DIFFUSERS = Arrangement(
    name="bare-diffusers",
    title="single network, diffusers names",
    dialect="diffusers",
    parts=((TRANSFORMER, ""), (VAE, "")),
)


def _recognise(shapes: Shapes) -> str | None:
    """Whether native names and shapes are a DiT on latents of four channels."""
    net = {name.removeprefix("denoiser."): shape for name, shape in shapes.items() if name[:9] == "denoiser."}
    axes = {
        TRANSFORMER.key: 2, "pos_embed": 3, "x_embedder.proj.weight": 4, "t_embedder.mlp.2.weight": 2,
        "blocks.0.attn.qkv.weight": 2, "blocks.0.adaLN_modulation.1.weight": 2, "final_layer.linear.weight": 2,
    }  # fmt: skip
    for name, count in axes.items():
        if len(net.get(name, ())) != count:
            return f"there is no {name!r} of a DiT"
    _, given, _, patch = net["x_embedder.proj.weight"]
    if given != DIT.latent.channels:
        return f"the transformer takes {given} channels, where the latent has {DIT.latent.channels}"
    rows, plain = net["final_layer.linear.weight"][0], given * patch * patch
    if rows not in (plain, 2 * plain):
        return f"the transformer makes {rows} numbers of a patch, not {plain} or {2 * plain}"
    return None


def _condition(given: Given) -> dict[str, Tensor]:
    """The class, or none on the side to go away from and where nobody named one."""
    import torch

    shape, label = given.shape, given.label
    if label is not None and not 0 <= label < shape.null:
        raise BadInput(f"class {label} is outside 0..{shape.null - 1}, the classes of this DiT")
    return {"y": torch.tensor([shape.null if given.negative or label is None else label])}


def _folder(facts: Facts) -> dict[str, dict[str, Any]]:
    return {
        "model_index.json": {
            "_class_name": "DiTPipeline",
            "_diffusers_version": "0.30.0",  # whose layout this is; without a version it cannot be opened
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": {"eps": "epsilon", "v": "v_prediction", "clean": "sample"}[facts.prediction],
            "rescale_betas_zero_snr": facts.zero_snr,
        },
        "vae/config.json": {
            "sample_size": facts.size,
            "scaling_factor": facts.latent.scale,
            "shift_factor": facts.latent.shift or None,
        },
    }


DIT = Family(
    name="dit",
    variant="class-conditional",
    title="DiT",
    architecture="dit",
    arrangements=(SINGLE, DIFFUSERS, BARE, BARE_DIFFUSERS),
    recognise=_recognise,
    latent=Latent(channels=4, stride=8, scale=0.18215),
    # Only the first three channels, as the original sampler does.
    guided=3,
    sides=lambda shapes: math.isqrt(shapes["pos_embed"][1]) * shapes["x_embedder.proj.weight"][2] * 8,
    schedule=linear,
    prediction="eps",
    readings=(),
    condition=_condition,
    guidance="classifier-free",
    classes=True,
    defaults=Defaults(size=256, steps=50, guidance=4.0, solver="ddim"),
    licence="CC-BY-NC-4.0",
    folder=_folder,
)

FAMILIES.add("dit/class-conditional", DIT, "dit")
