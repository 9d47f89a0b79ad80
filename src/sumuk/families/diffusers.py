"""How the diffusers library names the tensors of U-Net and autoencoder, as rules.

The published U-Net numbers its blocks in one row (``input_blocks.0`` to ``output_blocks.11``), diffusers by
level and kind. Which is which depends on the numbers of levels and blocks, so the rules are made from the
names at hand; both sides tell them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sumuk.files.layout import Rule, alias, linear_to_conv, rename

RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
"""Parts of a U-Net's residual block: diffusers, original."""

ATTENTION = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
OLD_ATTENTION = (("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out"))
"""The autoencoder's attention, today and before diffusers 0.17: diffusers, original."""


@dataclass(frozen=True)
class Grid:
    """What decides the numbering of a U-Net.

    Attributes:
        attends: for each level, whether its blocks have transformers.
        blocks: residual blocks of a level of the encoder.
        middle: whether the middle has a transformer.
    """

    attends: tuple[bool, ...]
    blocks: int
    middle: bool

    @classmethod
    def read(cls, names: Collection[str]) -> Grid:
        """From the names of either side."""
        if any(name.startswith("input_blocks.") for name in names):
            return cls._original(names)
        levels = _count(names, "down_blocks.{}.")
        attends = tuple(_any(names, f"down_blocks.{level}.attentions.0.") for level in range(levels))
        blocks = _count(names, "down_blocks.0.resnets.{}.")
        return cls(attends, blocks, _any(names, "mid_block.attentions.0."))

    @classmethod
    def _original(cls, names: Collection[str]) -> Grid:
        rows = {int(found[1]) for name in names if (found := re.match(r"input_blocks\.([0-9]{1,4})\.", name))}
        halvings = sorted(n for n in rows if f"input_blocks.{n}.0.op.weight" in names)[: MOST - 1]
        blocks = min(halvings[0] - 1 if halvings else max(rows), MOST)
        attends = [_any(names, f"input_blocks.{first + 1}.1.") for first in (0, *halvings)]
        return cls(tuple(attends), blocks, _any(names, "middle_block.2."))


MOST = 16
"""Levels, or blocks of one, that are counted at most: no network has more, and a hostile file might."""


def _count(names: Collection[str], prefix: str) -> int:
    number = 0
    while number < MOST and _any(names, prefix.format(number)):
        number += 1
    return number


def _any(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def unet_rules(names: Collection[str]) -> list[Rule]:
    """Rules of the latent-diffusion U-Net (SD 1, SD 2, SDXL)."""
    grid = Grid.read(names)
    levels, row = len(grid.attends), grid.blocks + 1
    rules = [
        rename("conv_in.*", "input_blocks.0.0.*"),
        rename("time_embedding.linear_1.*", "time_embed.0.*"),
        rename("time_embedding.linear_2.*", "time_embed.2.*"),
        rename("conv_norm_out.*", "out.0.*"),
        rename("conv_out.*", "out.2.*"),
        *_resnet("mid_block.resnets.0", "middle_block.0"),
        *_resnet("mid_block.resnets.1", f"middle_block.{1 + grid.middle}"),
    ]
    if grid.middle:
        rules.append(rename("mid_block.attentions.0.*", "middle_block.1.*"))
    for level, attends in enumerate(grid.attends):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        first_in, first_out = 1 + level * row, (levels - 1 - level) * row
        for i in range(row):
            if i < grid.blocks:
                rules += _resnet(f"{down}.resnets.{i}", f"input_blocks.{first_in + i}.0")
            rules += _resnet(f"{up}.resnets.{i}", f"output_blocks.{first_out + i}.0")
            if attends and i < grid.blocks:
                rules.append(rename(f"{down}.attentions.{i}.*", f"input_blocks.{first_in + i}.1.*"))
            if attends:
                rules.append(rename(f"{up}.attentions.{i}.*", f"output_blocks.{first_out + i}.1.*"))
        last_in, last_out = first_in + grid.blocks, first_out + grid.blocks
        if level < levels - 1:
            rules.append(rename(f"{down}.downsamplers.0.conv.*", f"input_blocks.{last_in}.0.op.*"))
        if level > 0:
            rules.append(
                rename(f"{up}.upsamplers.0.conv.*", f"output_blocks.{last_out}.{1 + attends}.conv.*")
            )
    return rules


def _resnet(foreign: str, native: str) -> list[Rule]:
    return [rename(f"{foreign}.{theirs}.*", f"{native}.{ours}.*") for theirs, ours in RESNET]


def vae_rules(names: Collection[str]) -> list[Rule]:
    """Rules of the KL autoencoder. Its attention is stored as linear layers instead of 1x1 convolutions."""
    levels = _count(names, "encoder.down_blocks.{}.") or _count(names, "encoder.down.{}.")
    rules = [rename("quant_conv.*", "quant_conv.*"), rename("post_quant_conv.*", "post_quant_conv.*")]
    for side in ("encoder", "decoder"):
        middle, theirs = f"{side}.mid", f"{side}.mid_block.attentions.0"
        rules += [
            rename(f"{side}.conv_in.*", f"{side}.conv_in.*"),
            rename(f"{side}.conv_norm_out.*", f"{side}.norm_out.*"),
            rename(f"{side}.conv_out.*", f"{side}.conv_out.*"),
            rename(f"{side}.mid_block.resnets.0.*", f"{middle}.block_1.*"),
            rename(f"{side}.mid_block.resnets.1.*", f"{middle}.block_2.*"),
            rename(f"{theirs}.group_norm.*", f"{middle}.attn_1.norm.*"),
            *(linear_to_conv(f"{theirs}.{a}.*", f"{middle}.attn_1.{b}.*") for a, b in ATTENTION),
            *(alias(linear_to_conv(f"{theirs}.{a}.*", f"{middle}.attn_1.{b}.*")) for a, b in OLD_ATTENTION),
        ]
    rules += _vae_level("encoder.down_blocks.{level}", "encoder.down.{level}")
    rules.append(
        rename("encoder.down_blocks.{level}.downsamplers.0.conv.*", "encoder.down.{level}.downsample.conv.*")
    )
    for level in range(levels):
        up = f"decoder.up_blocks.{levels - 1 - level}"
        rules += _vae_level(up, f"decoder.up.{level}")
        rules.append(rename(f"{up}.upsamplers.0.conv.*", f"decoder.up.{level}.upsample.conv.*"))
    return rules


def _vae_level(foreign: str, native: str) -> Sequence[Rule]:
    return [
        rename(f"{foreign}.resnets.{{block}}.conv_shortcut.*", f"{native}.block.{{block}}.nin_shortcut.*"),
        rename(f"{foreign}.resnets.{{block}}.*", f"{native}.block.{{block}}.*"),
    ]


def clip_rules(names: Collection[str]) -> list[Rule]:
    """CLIP's text tower is named alike; transformers 5 leaves out the leading ``text_model.``."""
    return [rename("text_model.*", "text_model.*"), *(alias(rule) for rule in HEADLESS)]


HEADLESS = tuple(
    rename(name, f"text_model.{name}") for name in ("embeddings.*", "encoder.layers.*", "final_layer_norm.*")
)
"""CLIP's text tower without its ``text_model.``, as some files have it."""
