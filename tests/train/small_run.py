"""A training run that takes seconds: ten coloured pictures, captions in two languages, the smallest networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from sumuk.train.config import TrainConfig

SIZE = 16
COLOURS = {
    "red": ("빨간색", (220, 30, 40)),
    "green": ("초록색", (30, 160, 60)),
    "blue": ("파란색", (40, 60, 210)),
    "yellow": ("노란색", (240, 210, 30)),
    "purple": ("보라색", (130, 40, 160)),
}
STYLES = {"flat": "플랫", "3d": "3d"}


def write_pictures(root: Path, *, held_out: tuple[str, ...] = (), only: int | None = None) -> Path:
    """A square of each colour in each style (a disc where the style is 3d), with its captions; returns ``root``."""
    (root / "images").mkdir(parents=True)
    lines = []
    for style, stil in STYLES.items():
        for name, (farbe, value) in COLOURS.items():
            image = Image.new("RGB", (SIZE, SIZE), "white")
            pen = ImageDraw.Draw(image)
            box = (1, 5, 10, 12)  # off centre, so that a mirror shows
            if style == "flat":
                pen.rectangle(box, fill=value)
            else:
                pen.ellipse(box, fill=value)
            file = f"images/{name}-{style}.png"
            image.save(root / file)
            captions = {
                "en": [f"a {name} thing, {style} style", f"{name} thing, {style}"],
                "ko": [f"{farbe} 물건, {stil}", f"{farbe} 물건 {stil} 스타일"],
            }
            split = "test" if f"{name}-{style}" in held_out else "train"
            lines.append({"file": file, "object": name, "style": style, "split": split, "captions": captions})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[:only])
    (root / "captions.jsonl").write_text(text, "utf-8")
    return root


def vae_config(root: Path, out: Path, *, recipe: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    return _config(
        root,
        out,
        {
            "kind": "vae",
            "channels": 32,
            "multiples": (1, 2),
            "blocks": 1,
            "latent_channels": 4,
            **(recipe or {}),
        },
        changes,
    )


def text_config(
    root: Path, out: Path, vae: Path, *, recipe: dict[str, Any] | None = None, **changes: Any
) -> TrainConfig:
    return _config(
        root,
        out,
        {
            "kind": "text-to-image",
            "vae": vae,
            "channels": 32,
            "multiples": (1, 2),
            "blocks": 1,
            "text_width": 64,
            "text_layers": 1,
            "text_length": 32,
            "vocabulary": 530,  # 514 of bytes and special tokens, and 16 merges
            "title": "Small",
            "licence": "CC0-1.0",
            "sheet_prompts": ("red thing, flat", "파란색 물건, 3d"),
            **(recipe or {}),
        },
        changes,
    )


def _config(root: Path, out: Path, recipe: dict[str, Any], changes: dict[str, Any]) -> TrainConfig:
    whole = {
        "out": out,
        "seed": 3,
        "images": 28,
        "batch": 4,
        "precision": "fp32",
        "data": {"root": root, "size": SIZE},
        "optim": {"rate": 2e-3, "warmup": 8},
        "ema": {"half_life": 16},
        "every": {"save": 10_000, "sheet": 10_000},
        "recipe": recipe,
    }
    return TrainConfig.model_validate(whole | changes)


def write_vae(root: Path, path: Path) -> Path:
    """An untrained autoencoder, exported as a finished one would be."""
    from sumuk.train.recipes.vae import VaeTraining
    from sumuk.train.run import make_recipe

    recipe = make_recipe(vae_config(root, path.parent))
    assert isinstance(recipe, VaeTraining)
    recipe.export(path)
    return path


def saved(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a save: weights, averages, moments."""
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def unlike(some: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in any bit, or that one side lacks."""
    names = [name for name in some | others if name not in some or name not in others]
    return names + [n for n in some.keys() & others.keys() if not torch.equal(some[n], others[n])]
