"""Verbs that work on files: convert, prune, extract-vae, bake-vae, merge, verify.

Each tells what became of everything: what was moved, cast, left away and why, and the hashes of what went in and out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sumuk.base.errors import BadInput, MissingFile
from sumuk.files.hashes import Hashes, Progress

console = Console(stderr=True)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHOWN = 5
"""Names of tensors in a line."""


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A bar over bytes, on a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size_of(text: str | None) -> int | None:
    """``5GB``, ``500 MiB`` or a number of bytes."""
    if text is None:
        return None
    plain = text.upper().replace(" ", "").replace("_", "")
    unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if plain.endswith(unit)), "")
    try:
        return round(float(plain.removesuffix(unit)) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        raise BadInput(f"{text!r} is no size; write bytes, or like 5GB") from None


def run_convert(path: Path, out: Path, how: Mapping[str, Any], shards: str | None) -> None:
    """A checkpoint in another layout, type or kind of file."""
    from sumuk.weights.convert import convert

    with progress("converting") as told:
        done = convert(path, out, shard_bytes=size_of(shards), progress=told, **how)
    before, after = done.layouts
    say(f"{done.path}: {done.title}, {before} -> {after}, {done.moved} tensors, {_bytes(done.after)}")
    if done.renamed:
        say(f"  {done.renamed} under other names, or cut anew")
    _cast(done.cast, done.zeroed)
    if done.worst is not None:
        name, error = done.worst
        say(f"  8 bits cost {name!r} most: a relative error of {error:.2%}")
    _left(done.left)
    say_notes(done.notes)
    say_hashes(done.source, done.target)


def run_prune(path: Path, out: Path, how: Mapping[str, Any]) -> None:
    """The weights of a training checkpoint."""
    from sumuk.weights.prune import prune

    with progress("pruning") as told:
        done = prune(path, out, progress=told, **how)
    saved = done.before - done.after
    say(
        f"{done.path}: {done.weights} weights, {done.kept} tensors, {_bytes(done.after)}, {_bytes(saved)} saved"
    )
    _cast(done.cast, done.zeroed)
    _left(done.left)
    say_notes(done.notes)
    say_hashes(done.source, {str(done.path): done.target})


def run_extract_vae(path: Path, out: Path, dtype: str | None) -> None:
    """A checkpoint's autoencoder by itself."""
    from sumuk.weights.vae import extract_vae

    with progress("extracting") as told:
        done = extract_vae(path, out, dtype, told)
    say(f"{done.path}: the autoencoder of {done.title}, {done.tensors} tensors, {_bytes(done.after)}")
    _cast(done.cast, done.zeroed)
    say_hashes({}, {str(done.path): done.target})


def run_bake_vae(path: Path, vae: Path, out: Path) -> None:
    """Another autoencoder in a checkpoint's place for one."""
    from sumuk.weights.vae import bake_vae

    with progress("baking") as told:
        done = bake_vae(path, vae, out, told)
    old, new = ("/".join(each) for each in done.dtypes)
    replaced = (
        f"in place of its own ({len(done.replaced)} tensors, {old})" if done.replaced else "where it had none"
    )
    say(f"{done.path}: {done.title} with an autoencoder of {done.tensors} tensors ({new}) {replaced}")
    say_notes(done.notes)
    say_hashes(done.source, done.target)


def run_merge(models: list[Path], out: Path | None, recipe: Path | None, how: Mapping[str, Any]) -> None:
    """Several models as one; without a place to write to, the recipe alone."""
    from sumuk.weights.merge import merge, run
    from sumuk.weights.merge_recipe import parse, recipe_of

    said = {key: value for key, value in how.items() if value is not None}
    if recipe is not None:
        if models or said:
            raise BadInput("a recipe says itself what is merged and how; leave models and other options out")
        if not recipe.is_file():
            raise MissingFile(f"no recipe at {recipe}")
        text = recipe.suffix.lower() in (".toml", ".txt")
        known = parse(recipe.read_text("utf-8")) if text else recipe_of(recipe)
        if out is None:
            typer.echo(known.text, nl=False)
            return
        with progress("merging") as told:
            done = run(known, out, folder=recipe.parent, progress=told)
    else:
        if out is None:
            raise BadInput("where to? Give --out FILE")
        with progress("merging") as told:
            done = merge(models, out, progress=told, **said)
    say(
        f"{done.path}: {done.family}, {done.mixed} tensors mixed, {done.kept} of the first model as they were"
    )
    if done.lone:
        say(f"  {done.lone} come from one model, as others lack them")
    say_notes(done.notes)
    say("  its recipe is inside: sumuk merge --recipe prints it, sumuk verify checks it")


def run_verify(result: Path, parents: list[Path], every: bool) -> None:
    """Make a result again and compare; exit code 1 where anything differs."""
    from sumuk.weights.merge import SAMPLE, verify

    with progress("verifying") as told:
        done = verify(result, parents, sample=None if every else SAMPLE, progress=told)
    if done.whole:
        typer.echo(f"{done.checked} of {done.total} tensors were made again, and are the same bit for bit")
        return
    typer.echo(f"{len(done.failed)} of {done.checked} tensors differ: {_names(done.failed)}")
    raise typer.Exit(1)


def settings_of(said: list[str] | None) -> dict[str, Any]:
    """``density=0.5``, several times; numbers, lists of numbers, true and false, else texts."""
    found: dict[str, Any] = {}
    for each in said or ():
        key, equals, text = each.partition("=")
        if not (key and equals and text):
            raise BadInput(f"{each!r} is not NAME=VALUE, like density=0.5")
        if key in found:
            raise BadInput(f"{key} is given twice: {found[key]!r} and {text!r}")
        found[key] = _value(text)
    return found


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        numbers = [float(piece) if "." in piece or "e" in piece else int(piece) for piece in text.split(",")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else numbers


# -- telling ---------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """A line; what comes out of a file cannot steer the terminal."""
    typer.echo("".join(each if each.isprintable() else " " for each in line))


def _bytes(count: int) -> str:
    for unit in ("GB", "MB", "KB"):
        if abs(count) >= UNITS[unit]:
            return f"{count / UNITS[unit]:,.1f} {unit}"
    return f"{count} bytes"


def _cast(cast: Mapping[str, int], zeroed: int) -> None:
    for change, count in cast.items():
        say(f"  {count} tensors {change}")
    if zeroed:
        say(f"  {zeroed:,} numbers were too small for that and are 0 now")


def _left(left: Iterable[Any]) -> None:
    for each in left:
        say(
            f"  left away: {each.reason}: {len(each.names)} tensors, {_bytes(each.size)}: {_names(each.names)}"
        )


def _names(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def say_notes(notes: Iterable[str]) -> None:
    for note in notes:
        say(f"  note: {note}")


def say_hashes(source: Mapping[str, Hashes], target: Mapping[str, Hashes]) -> None:
    for title, files in (("from", source), ("to", target)):
        for file, each in files.items():
            path = Path(file)
            name = path.name if len(files) == 1 else f"{path.parent.name}/{path.name}"
            say(f"  {title} {name}: {each.line}")
