"""The part of the command line's table that works on LoRA files: ``sumuk lora VERB``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sumuk.base.errors import BadInput
from sumuk.cli.files import DtypeOption, NewFile

app = typer.Typer(help="Work on LoRA files.", no_args_is_help=True)

ModelOption = Annotated[
    Path, typer.Option("--model", "-m", help="A checkpoint that it is for; only its header is read.")
]
RankOption = Annotated[int | None, typer.Option(help="Rank of each layer, at most.")]
ErrorOption = Annotated[
    float | None, typer.Option(help="The least rank with at most this relative error, like 0.1.")
]
LayoutOption = Annotated[str, typer.Option(help="kohya, as most tools write them, or peft.")]
Lora = Annotated[Path, typer.Argument(help="LoRA file.")]


@app.command()
def extract(
    before: Annotated[Path, typer.Argument(help="The checkpoint to which it will be added.")],
    after: Annotated[Path, typer.Argument(help="The same, trained further.")],
    out: NewFile,
    rank: RankOption = None,
    error: ErrorOption = None,
    layout: LayoutOption = "kohya",
    dtype: Annotated[str, typer.Option(help="Type of the factors.")] = "float16",
    whole: Annotated[
        bool, typer.Option("--whole", help="Also differences of biases and norms, as they are.")
    ] = False,
    part: Annotated[
        list[str] | None, typer.Option(help="Networks to look at: denoiser, text, ...; all if left out.")
    ] = None,
) -> None:
    """Write the LoRA that makes the one checkpoint of the other."""
    from sumuk.weights.lora_extract import extract_lora

    how: dict[str, Any] = {"layout": layout, "dtype": dtype, "whole": whole, "parts": part}
    with _progress("extracting") as told:
        done = extract_lora(before, after, out, _wanted(rank, error), progress=told, **how)
    _made(done)
    _say(f"  it holds {done.kept:.1%} of what differs (squared norms); its layers err by {done.error:.1%}")
    _worst(done.worst)
    if done.whole:
        _say(f"  {done.whole} differences of vectors are stored whole")
    if done.left:
        names = ", ".join(each.name for each in done.left[:3])
        more = f" and {len(done.left) - 3} more" if len(done.left) > 3 else ""
        _say(f"  left out: {len(done.left)} tensors that differ and have no place in it: {names}{more}")
    _say(f"  {done.same} tensors are the same in both")


@app.command()
def resize(
    path: Lora,
    out: NewFile,
    model: ModelOption,
    rank: RankOption = None,
    error: ErrorOption = None,
    dtype: DtypeOption = None,
    to_lora: Annotated[
        bool, typer.Option("--to-lora", help="Make products of LoHa, LoKr and whole differences.")
    ] = False,
) -> None:
    """Give a LoRA smaller ranks."""
    from sumuk.weights.lora_files import resize_lora

    how: dict[str, Any] = {"model": model, "dtype": dtype, "to_lora": to_lora}
    with _progress("resizing") as told:
        done = resize_lora(path, out, _wanted(rank, error), progress=told, **how)
    _made(done)
    _say(f"  {done.resized} layers have another rank; together they err by {done.error:.1%}")
    _worst(done.worst)


@app.command()
def merge(
    paths: Annotated[
        list[str], typer.Argument(help="LoRA files, each with its weight: ink.safetensors=0.7.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new .safetensors file.")],
    model: ModelOption,
    rank: RankOption = None,
    error: ErrorOption = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Store sums that are no products as they are.")
    ] = False,
    layout: LayoutOption = "kohya",
    dtype: DtypeOption = None,
) -> None:
    """Add LoRAs up to one."""
    from sumuk.weights.lora_merge import merge_loras

    wanted = None if rank is None and error is None else _wanted(rank, error)
    how: dict[str, Any] = {"model": model, "wanted": wanted, "whole": whole, "layout": layout, "dtype": dtype}
    with _progress("merging") as told:
        done = merge_loras([_weighted(each) for each in paths], out, progress=told, **how)
    _made(done)
    _say(f"  {done.shared} tensors are changed by several of them")
    if done.error:
        _say(f"  together the layers err by {done.error:.1%}")
    _worst(done.worst)


@app.command()
def convert(
    path: Lora, out: NewFile, model: ModelOption, layout: LayoutOption, dtype: DtypeOption = None
) -> None:
    """Write a LoRA in another layout."""
    from sumuk.weights.lora_files import convert_lora

    with _progress("converting") as told:
        done = convert_lora(path, out, model=model, layout=layout, dtype=dtype, progress=told)
    _made(done)
    _say(f"  {done.layouts[0]} -> {done.layouts[1]}")
    if done.rounded:
        _say(f"  {done.rounded} layers were rounded, as this layout has no place for their alpha")


@app.command()
def bake(
    model: Annotated[Path, typer.Argument(help="Checkpoint file or folder.")],
    out: Annotated[Path, typer.Argument(help="The new file, or a new folder for a folder.")],
    lora: Annotated[
        list[str], typer.Option(help="FILE[,weight=0.8][,text_weight=..][,blocks=..], once for each.")
    ],
    dtype: DtypeOption = None,
    layout: Annotated[str | None, typer.Option(help="single or diffusers; as it is if left out.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Also LoRAs of which only a part fits.")] = False,
) -> None:
    """Write a checkpoint with LoRAs in its weights."""
    from sumuk.weights.lora_bake import bake_loras

    how: dict[str, Any] = {"dtype": dtype, "layout": layout, "partial": partial}
    with _progress("baking") as told:
        done = bake_loras(model, [_given(each) for each in lora], out, progress=told, **how)
    _say(f"{done.path}: {done.title}, {done.changed} tensors changed by {len(done.loras)} LoRAs")
    for each in done.loras:
        _say(
            f"  {each.path.name}: {each.applied.matched} changes, {each.applied.change:.2%} of their weights"
        )
        for title, lost in (
            ("no such layer", each.applied.unmatched),
            ("does not fit", each.applied.misshapen),
        ):
            if lost:
                _say(f"    {title}: {len(lost)}, such as {lost[0]}")
    if done.rounding > 0.01:
        _say(f"  rounding to the stored types changed {done.rounding:.1%} of what was added")
    _tail(done.notes, done.source, done.target)


def _wanted(rank: int | None, error: float | None) -> Any:
    from sumuk.weights.lora_tools import Wanted

    if rank is None and error is None:
        raise BadInput("how much to keep? Give --rank 16, or --error 0.1")
    return Wanted(rank=rank, error=error)


def _weighted(said: str) -> tuple[str, float]:
    path, equals, weight = said.rpartition("=")
    if not equals:
        return said, 1.0
    return path, _number(weight, said)


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"{where!r}: {text!r} is no number") from None


def _given(said: str) -> tuple[str, float, float | None, str | None]:
    """``FILE,weight=0.8`` as baking takes it."""
    file, *rest = said.split(",")
    values: dict[str, str] = {}
    for piece in rest:
        key, equals, value = piece.partition("=")
        if not (equals and value) or key not in ("weight", "text_weight", "blocks"):
            raise BadInput(f"{said!r}: {piece!r} is not weight=, text_weight= or blocks=")
        values[key] = value
    text = values.get("text_weight")
    blocks = values.get("blocks")
    return (
        file,
        _number(values.get("weight", "1"), said),
        None if text is None else _number(text, said),
        None if blocks is None else blocks.replace("/", ","),
    )


def _progress(what: str) -> Any:
    from sumuk.cli.workshop import progress

    return progress(what)


def _say(line: str) -> None:
    from sumuk.cli.workshop import say

    say(line)


def _made(done: Any) -> None:
    """What every verb that writes a LoRA tells."""
    layers = ", ".join(f"{count} of the {part}" for part, count in done.layers.items())
    ranks = ", ".join(f"{rank} ({count})" for rank, count in sorted(done.ranks.items())[:6])
    _say(
        f"{done.path}: a LoRA for {done.title}, {done.layout} names, layers: {layers}; ranks: {ranks or 'none'}"
    )
    _tail(done.notes, done.source, {str(done.path): done.target})


def _worst(worst: tuple[str, float] | None) -> None:
    if worst is not None and worst[1]:
        _say(f"  most in {worst[0]}: {worst[1]:.1%}")


def _tail(notes: Any, source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    from sumuk.cli.workshop import say_hashes, say_notes

    say_notes(notes)
    say_hashes(source, target)
