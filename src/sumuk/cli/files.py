"""The part of the command line's table that works on files: verb -> function in :mod:`sumuk.cli.workshop`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DtypeOption = Annotated[
    str | None, typer.Option(help="Type to store: float32, float16, bfloat16; as it is if left out.")
]
Source = Annotated[Path, typer.Argument(help="Checkpoint file or folder.")]
Target = Annotated[Path, typer.Argument(help="The new file; for --layout diffusers a new folder.")]
NewFile = Annotated[Path, typer.Argument(help="The new .safetensors file.")]


def convert(
    path: Source,
    out: Target,
    layout: Annotated[
        str | None, typer.Option(help="single or diffusers; names stay as they are if left out.")
    ] = None,
    dtype: DtypeOption = None,
    quantise: Annotated[
        str | None, typer.Option(help="fp8 or fp8-scaled, for the denoiser's matrices.")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="Most bytes of one file, like 5GB; several then.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Which weights of a folder to read: fp16.")] = None,
) -> None:
    """Write a checkpoint in another layout, type or kind of file."""
    from sumuk.cli.workshop import run_convert

    how = {"layout": layout, "dtype": dtype, "quantise": quantise, "variant": variant}
    run_convert(path, out, how, shards)


def prune(
    path: Source,
    out: NewFile,
    weights: Annotated[
        str, typer.Option(help="plain, ema, or auto: what there is, refused if both are.")
    ] = "auto",
    dtype: DtypeOption = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Further names to leave away, like 'low_scale_model.*'.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Names to keep all the same.")] = None,
) -> None:
    """Write the weights of a training checkpoint, without what training needs."""
    from sumuk.cli.workshop import run_prune

    run_prune(path, out, {"weights": weights, "dtype": dtype, "drop": drop or (), "keep": keep or ()})


def extract_vae(path: Source, out: NewFile, dtype: DtypeOption = None) -> None:
    """Write a checkpoint's autoencoder as a file of its own."""
    from sumuk.cli.workshop import run_extract_vae

    run_extract_vae(path, out, dtype)


def bake_vae(
    path: Source,
    vae: Annotated[Path, typer.Argument(help="An autoencoder, or a checkpoint with one.")],
    out: Target,
) -> None:
    """Write a checkpoint with another autoencoder in the place of its own."""
    from sumuk.cli.workshop import run_bake_vae

    run_bake_vae(path, vae, out)


def merge(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Checkpoints, in the order that the method asks for.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The new file; for diffusers a new folder.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="weighted-sum, add-difference, slerp, ties, ...")
    ] = "weighted-sum",
    alpha: Annotated[float | None, typer.Option(help="How much of the others; the method's usual.")] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Rates by block: 25 numbers, GRAD_V, or IN04:0.3,OUT*:0.5.")
    ] = None,
    vae: Annotated[float | None, typer.Option(help="Rate of the autoencoder; 0: the first model's.")] = None,
    text: Annotated[float | None, typer.Option(help="Rate of the text towers.")] = None,
    denoiser: Annotated[float | None, typer.Option(help="Rate of blocks that --blocks leaves out.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of the method, like density=0.5.")
    ] = None,
    dtype: DtypeOption = None,
    layout: Annotated[str | None, typer.Option(help="single or diffusers; the first model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="For methods that draw random numbers (dare).")] = None,
    extra_channels: Annotated[
        str | None, typer.Option(help="keep: the first takes more input channels (inpainting).")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe (TOML), or a merged file: make it again, or print it.")
    ] = None,
) -> None:
    """Merge checkpoints; the recipe and its parents' hashes are written into the result."""
    from sumuk.cli.workshop import run_merge, settings_of

    how = {
        "method": None if recipe is not None and method == "weighted-sum" else method,
        "alpha": alpha,
        "blocks": blocks,
        "vae": vae,
        "text": text,
        "denoiser": denoiser,
        "dtype": dtype,
        "layout": layout,
        "seed": seed,
        "extra_channels": extra_channels,
        **settings_of(setting),
    }
    run_merge(models or [], out, recipe, how)


def verify(
    result: Annotated[Path, typer.Argument(help="A file that sumuk merge wrote.")],
    parents: Annotated[list[Path], typer.Argument(help="The models it was made of, in their order.")],
    every: Annotated[bool, typer.Option("--all", help="Every tensor, not only a sample.")] = False,
) -> None:
    """Make tensors of a merged file again from its parents, and compare bit for bit."""
    from sumuk.cli.workshop import run_verify

    run_verify(result, parents, every)


def register(app: typer.Typer) -> None:
    """Put these verbs into the table."""
    for verb in (convert, prune, extract_vae, bake_vae, merge, verify):
        app.command(verb.__name__.replace("_", "-"))(verb)
