"""The command line's table: verb -> function.

Each verb lives in its own module and is imported when it is called, so that ``sumuk --help`` answers at once.
Errors that the caller can mend are one line on standard error and exit code 2; a stop by Ctrl-C is 130.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sumuk.base.errors import SumukError
from sumuk.cli import files, loras, serve

app = typer.Typer(
    name="sumuk",
    help="Runs, inspects and trains models of the Stable Diffusion lineage.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    Path | None, typer.Option("--model", "-m", help="Checkpoint file or folder; the miniature if left out.")
]
UsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""click's base of errors in the arguments, from click or from the copy inside newer versions of typer."""
OutOption = Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")]


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw, in A1111's grammar; none for models without words.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG to write; a free sumuk.png if left out.")
    ] = None,
    model: ModelOption = None,
    negative: Annotated[str | None, typer.Option("--negative", "-n", help="What not to draw.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own size if left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own size if left out.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver; the family's if left out.")] = None,
    solver: Annotated[str | None, typer.Option(help="See 'sumuk solvers'; the family's if left out.")] = None,
    grid: Annotated[
        str | None, typer.Option(help="Step spacing; the solver's usual one if left out.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Fresh noise, for solvers that have it.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    rescale: Annotated[float | None, typer.Option(help="Guidance rescale, 0 (none) to 1.")] = None,
    guidance_start: Annotated[float | None, typer.Option(help="Guide from this share of the steps.")] = None,
    guidance_end: Annotated[float | None, typer.Option(help="Guide up to this share of the steps.")] = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="Layers to leave out and draw away from, like 7,8,9 (SD 3.5 medium).")
    ] = None,
    skip_scale: Annotated[float | None, typer.Option(help="How much; 2.5.")] = None,
    skip_start: Annotated[float | None, typer.Option(help="From this share of the steps; 0.01.")] = None,
    skip_end: Annotated[float | None, typer.Option(help="Up to this share of the steps; 0.2.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture; drawn if left out.")] = None,
    variation_seed: Annotated[int | None, typer.Option(help="Second seed to go towards.")] = None,
    variation: Annotated[float | None, typer.Option(help="How far to go towards it, 0 to 1.")] = None,
    count: Annotated[int | None, typer.Option(help="How many pictures; the seed counts up.")] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="1: last layer of the text tower, 2: the one before it.")
    ] = None,
    label: Annotated[int | None, typer.Option(help="Class number, for models of classes.")] = None,
    original: Annotated[
        tuple[int, int] | None, typer.Option(help="Width and height that SDXL is told; the picture's.")
    ] = None,
    crop: Annotated[
        tuple[int, int] | None, typer.Option(help="Left and top that SDXL is told were cut away; 0 0.")
    ] = None,
    decoder_steps: Annotated[int | None, typer.Option(help="Steps of a second stage (Cascade).")] = None,
    decoder_guidance: Annotated[float | None, typer.Option(help="Guidance of a second stage.")] = None,
    refiner_start: Annotated[
        float | None, typer.Option(help="From which share of the way the refiner draws; 0.8.")
    ] = None,
    hint: Annotated[Path | None, typer.Option(help="Depth map or edges, for models that follow one.")] = None,
    like: Annotated[Path | None, typer.Option(help="Picture to draw like (unCLIP, Cascade).")] = None,
    noise_level: Annotated[
        int | None, typer.Option(help="Noise on what the model is shown (x4 upscaler, unCLIP).")
    ] = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            help="CONTROL=PICTURE[,weight=0.8][,start=0][,end=1][,guess]: what a ControlNet follows."
        ),
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Picture to begin from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of it is drawn anew; 0.75.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White is drawn anew, black is kept.")] = None,
    mask_blur: Annotated[int | None, typer.Option(help="Softness of the mask's edge in pixels; 2.")] = None,
    hires: Annotated[float | None, typer.Option(help="Second pass at this many times the size.")] = None,
    hires_strength: Annotated[
        float | None, typer.Option(help="How much the second pass draws anew; 0.5.")
    ] = None,
    hires_steps: Annotated[
        int | None, typer.Option(help="Steps of the second pass; as the first if left out.")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE that supplies a part: vae, text_2, decoder, ...")
    ] = None,
    refiner: Annotated[Path | None, typer.Option(help="A model that draws the last part (SDXL's).")] = None,
    control: Annotated[list[str] | None, typer.Option(help="NAME=FILE: load a ControlNet.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="[NAME=]FILE[,weight=0.8][,text_weight=..][,blocks=..][,start=0][,end=1]: apply a LoRA."
        ),
    ] = None,
    hypernet: Annotated[
        list[str] | None, typer.Option(help="[NAME=]FILE[,weight=0.8]: apply a hypernetwork.")
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(help="[NAME=]FILE: a textual inversion that the prompt names.")
    ] = None,
    shelf: Annotated[
        Path | None,
        typer.Option(help="Folder to find in what the prompt names: <lora:name:0.8>, embeddings."),
    ] = None,
    partial: Annotated[
        list[str] | None,
        typer.Option(help="NAME of a LoRA that may be applied though only a part of it fits."),
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="FILE of another autoencoder; auto: MODEL.vae.safetensors beside it.")
    ] = None,
    packed: Annotated[
        bool | None,
        typer.Option("--packed", help="Keep quantised weights as stored: less memory, more work."),
    ] = None,
    quick: Annotated[
        bool | None, typer.Option("--quick", help="Decode with --part tiny_decoder=FILE (TAESD).")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; from file and device if left out.")
    ] = None,
    prediction: Annotated[str | None, typer.Option(help="eps, v: if the file does not say.")] = None,
    mode: Annotated[str | None, typer.Option(help="exact: same bits alone and in company; fast.")] = None,
) -> None:
    """Draw pictures from text, from a picture, or inside a mask."""
    from sumuk.cli.draw import named_files, run_generate, steerings
    from sumuk.cli.guests import guests, vae_of

    adapters = {"lora": lora, "hypernet": hypernet, "embedding": embedding}
    invited = guests(adapters, shelf, prompt or "", negative or "", at_home=model is None)
    values = {
        "prompt": prompt,
        "negative": negative,
        "width": width,
        "height": height,
        "steps": steps,
        "solver": solver,
        "grid": grid,
        "eta": eta,
        "guidance": guidance,
        "rescale": rescale,
        "guidance_start": guidance_start,
        "guidance_end": guidance_end,
        "skip_layers": None if skip_layers is None else skip_layers.split(","),
        "skip_scale": skip_scale,
        "skip_start": skip_start,
        "skip_end": skip_end,
        "seed": seed,
        "variation_seed": variation_seed,
        "variation": variation,
        "count": count,
        "clip_skip": clip_skip,
        "label": label,
        "original": original,
        "crop": crop,
        "decoder_steps": decoder_steps,
        "decoder_guidance": decoder_guidance,
        "refiner_start": refiner_start,
        "hint": hint,
        "like": like,
        "noise_level": noise_level,
        "steer": steerings(steer),
        "quick": quick,
        "init": init,
        "strength": strength,
        "mask": mask,
        "mask_blur": mask_blur,
        "loras": invited.loras or None,
        "hypers": invited.hypers or None,
    }
    how = {
        "device": device,
        "dtype": dtype,
        "prediction": prediction,
        "parts": named_files(part),
        "controls": named_files(control),
        "refiner": refiner,
        "vae": vae_of(vae, model),
        "packed": packed,
        **invited.loading(partial),
    }
    second = {"scale": hires, "strength": hires_strength, "steps": hires_steps}
    run_generate(out, model, how, mode, values, second)


@app.command()
def replay(
    image: Annotated[Path, typer.Argument(help="A PNG that Sumuk wrote.")],
    model: ModelOption = None,
    init: Annotated[Path | None, typer.Option(help="The picture it began from, if it did.")] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask that was used, if one was.")] = None,
    hint: Annotated[Path | None, typer.Option(help="The picture that it followed, if it did.")] = None,
    like: Annotated[Path | None, typer.Option(help="The picture it was drawn like, if it was.")] = None,
    steer: Annotated[
        list[Path] | None, typer.Option(help="What its controls followed, in order, if it had any.")
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: the ControlNets it was made with.")
    ] = None,
    lora: Annotated[list[str] | None, typer.Option(help="NAME=FILE: the LoRAs it was made with.")] = None,
    hypernet: Annotated[list[str] | None, typer.Option(help="NAME=FILE: its hypernetworks.")] = None,
    embedding: Annotated[list[str] | None, typer.Option(help="NAME=FILE: its embeddings.")] = None,
    shelf: Annotated[Path | None, typer.Option(help="Folder to find all these in, by their hashes.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the picture drawn again.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute; where it was made if left out.")
    ] = None,
) -> None:
    """Draw a picture again from its receipt; say identical, within tolerance, or why not."""
    from sumuk.cli.draw import named_files, run_replay

    pictures = {"init": init, "mask": mask, "hint": hint, "like": like}
    pictures |= {f"steer-{number}": each for number, each in enumerate(steer or (), start=1)}
    adapters = {"lora": lora, "hypernet": hypernet, "embedding": embedding}
    run_replay(image, model, pictures, out, device, named_files(control), adapters, shelf)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint file or folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    hashed: Annotated[bool, typer.Option("--hashes", help="Also hashes; this reads the file whole.")] = False,
    checked: Annotated[
        bool, typer.Option("--check", help="Also read every number: NaN, infinities, checksums.")
    ] = False,
) -> None:
    """Say what a checkpoint is, from its header alone."""
    from sumuk.cli.tell import run_inspect

    run_inspect(path, as_json, hashed, checked)


@app.command()
def shelf(
    folder: Annotated[Path, typer.Argument(help="Folder of model files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models in a folder: what each of them is."""
    from sumuk.cli.tell import run_shelf

    run_shelf(folder, as_json)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One model, told in full; all if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models of the lineage: what they are, and what they are good for."""
    from sumuk.cli.tell import run_models

    run_models(name, as_json)


@app.command()
def solvers() -> None:
    """List solvers and step spacings."""
    from sumuk.cli.tell import run_solvers

    run_solvers()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A recipe's TOML file.")],
    images: Annotated[int | None, typer.Option(help="Images to see, instead of the file's number.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
) -> None:
    """Train by a recipe; goes on where it stopped."""
    from sumuk.cli.learn import run_train

    run_train(config, images, threads)


@app.command()
def demo(
    out: OutOption = Path("sumuk-demo.png"),
) -> None:
    """Draw a sheet of pictures with the miniature."""
    from sumuk.cli.draw import run_demo

    run_demo(out)


files.register(app)
serve.register(app)
app.add_typer(loras.app, name="lora")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``sumuk`` command.

    Args:
        arguments: instead of those of the process.
    """
    try:
        code = app(arguments, standalone_mode=False)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error))
            sys.exit(2)
        _complain(error.format_message())  # type: ignore[attr-defined]
    except SumukError as error:
        _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        typer.secho("sumuk: stopped", err=True)
    sys.exit(code or 0)


def _complain(message: str) -> None:
    """One line, whatever a file's name or text may hold."""
    line = "".join(each if each.isprintable() else " " for each in " ".join(message.split()))
    typer.secho(f"sumuk: {line}", err=True, fg="red")
    sys.exit(2)
