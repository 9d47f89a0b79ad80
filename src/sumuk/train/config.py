"""A training run as one frozen value, read from a TOML file; unknown settings are refused by name.

Everything is counted in *images seen*, so that schedules survive a change of batch size (Karras et al. 2024).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sumuk.base.errors import BadInput, MissingFile

Share = Annotated[float, Field(ge=0, lt=1)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Frozen):
    """Where the pictures are: a folder with ``captions.jsonl`` (see :mod:`sumuk.train.data`)."""

    root: Path
    size: int = Field(gt=0, multiple_of=8)
    styles: tuple[str, ...] = ()
    """Which styles to take; empty: all."""
    objects: Path | None = None
    """A list file, one object an line, that narrows the set down."""


class OptimConfig(Frozen):
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, then constant or falling by a cosine to zero."""

    rate: float = Field(default=1e-3, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    warmup: int = Field(default=5_000, ge=0)
    """In images."""
    fall: Literal["constant", "cosine", "linear"] = "cosine"


class EmaConfig(Frozen):
    """Exponential moving average of the weights, its half-life in images."""

    half_life: int = Field(default=20_000, gt=0)


class Every(Frozen):
    """How often things happen, in images."""

    save: int = Field(default=20_000, gt=0)
    sheet: int = Field(default=20_000, gt=0)


class VaeRecipe(Frozen):
    """A KL autoencoder from scratch."""

    kind: Literal["vae"]
    channels: int = Field(default=32, multiple_of=32)
    multiples: tuple[int, ...] = (1, 1, 2, 4)
    blocks: int = Field(default=1, gt=0)
    latent_channels: int = Field(default=12, gt=0)
    kl: float = Field(default=1e-5, ge=0)
    edges: float = Field(default=0.5, ge=0)
    """Weight of the multi-scale edge term."""
    crop: int | None = Field(default=None, multiple_of=8)
    """Side of the random crops that the first ``crop_until`` images are cut to: many cheap steps first."""
    crop_until: int = Field(default=0, ge=0)
    decoder_of: Path | None = None
    """An autoencoder whose decoder alone learns on: its latents, and all models on them, stay as they are. Its shape
    is that file's."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise on latents of deviation 1 that such a decoder shall look through."""


class TextToImageRecipe(Frozen):
    """A latent U-Net and its text tower, trained together from scratch, on a finished autoencoder."""

    kind: Literal["text-to-image"]
    vae: Path
    """The autoencoder that a run of :class:`VaeRecipe` exported."""
    start: Path | None = None
    """A checkpoint of the same shape and autoencoder whose U-Net, text tower and vocabulary the run begins with;
    ``vocabulary`` is then that checkpoint's. A run that has a save goes on from the save."""
    channels: int = Field(default=96, multiple_of=32)
    multiples: tuple[int, ...] = (1, 2)
    blocks: int = Field(default=2, gt=0)
    text_width: int = Field(default=192, multiple_of=64)
    text_layers: int = Field(default=4, gt=0)
    text_length: int = Field(default=32, gt=2)
    vocabulary: int = Field(default=3000, ge=514)
    prediction: Literal["eps", "v"] = "v"
    snr_gamma: float | None = Field(default=None, gt=0)
    """Min-SNR weighting (Hang et al. 2023), 5 in the paper; left out: unweighted."""
    time_shift: float = Field(default=1.0, gt=0)
    """Above 1 noisier times are drawn more often, t -> s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23)."""
    drop_text: float = Field(default=0.1, ge=0, lt=1)
    """How often the prompt is replaced by the empty one, for classifier-free guidance."""
    guidance: float | None = Field(default=None, ge=1)
    """The guidance scale that suits the model best; written into its file for those who draw with it."""
    title: str = "untitled"
    licence: str = "unknown"
    sheet_prompts: tuple[str, ...] = ()


class TrainConfig(Frozen):
    """One run."""

    out: Path
    seed: int = Field(default=0, ge=0)
    images: int = Field(gt=0)
    batch: int = Field(gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    every: Every = Every()
    recipe: Annotated[VaeRecipe | TextToImageRecipe, Field(discriminator="kind")]


def read_config(path: Path, **changes: object) -> TrainConfig:
    """Read a run from a TOML file.

    Args:
        path: the file; relative paths inside it are taken from the current folder.
        changes: top-level settings that replace the file's (``images=1000``); None leaves the file's.

    Raises:
        MissingFile, BadInput: no such file; not TOML; a setting that is unknown or out of range, by its name.
    """
    if not path.is_file():
        raise MissingFile(f"no training configuration at {path}")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
        values.update({key: value for key, value in changes.items() if value is not None})
        return TrainConfig.model_validate(values)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        # Where a setting is missing, pydantic's input is the whole table around it.
        got = "" if first["type"] == "missing" else f" (got {first['input']!r:.100})"
        raise BadInput(f"{path}: setting {where!r}: {first['msg']}{got}") from None
