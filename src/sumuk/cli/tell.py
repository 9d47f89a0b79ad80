"""Verbs that tell: inspect, models, solvers.

What is printed may come from a file: no markup is read in it, and no control character reaches the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sumuk.files.hashes import Hashes

if TYPE_CHECKING:
    from sumuk.families.lineage import Known
    from sumuk.weights.found import Found, Told

console = Console()
LONGEST = 200
"""Characters of a metadata text that are shown."""
WIDTH = 100
"""Columns of a table that goes into a pipe."""
SHOWN = 6
"""Reasons against alternatives that are shown."""

Row = tuple[str, str]


def run_solvers() -> None:
    """Each solver in two lines, then the names of the spacings; the same on a terminal and in a pipe."""
    from sumuk.diffusion.grid import GRIDS  # here, as they bring torch, which to look at a file needs not
    from sumuk.diffusion.solvers import SOLVERS

    typer.echo("solver, step spacing, noise, asks a step; other names; source\n")
    for name in SOLVERS:
        listing = SOLVERS[name]
        typer.echo(f"{name:24} {listing.grid:14} {listing.noise:10} {listing.asks}")
        typer.echo(f"    {', '.join(SOLVERS.aliases(name))}; {listing.reference}")
    typer.echo("\nstep spacings: " + ", ".join(GRIDS))


# -- inspect -------------------------------------------------------------------------------------------------------


def run_inspect(path: Path, as_json: bool, hashed: bool, checked: bool) -> None:
    """What a checkpoint is."""
    from sumuk.weights.inspect import open as look

    found = look(path)
    if checked:
        from sumuk.weights.checking import check

        sound = check(path)
        well = (f"all {sound.tensors} tensors were read and are sound",) if not sound.unsound else ()
        found = replace(found, warnings=(*found.warnings, *sound.warnings), notes=(*found.notes, *well))
    table = found.as_dict(hashed)
    if as_json:
        typer.echo(json.dumps(table, ensure_ascii=False, indent=1))
        return
    _section("what it is", _identity(found))
    _section("parts", _parts(found))
    _section("evidence", _evidence(found, table["hashes"]))
    careful = [("warning", each) for each in found.warnings]
    _section("warnings", [*careful, *(("note", each) for each in found.notes)])


def _identity(found: Found) -> Iterator[Row]:
    yield "file", found.path
    if found.unknown is not None:
        yield "unknown", f"unknown: {found.unknown}"
    else:
        yield "family", f"{found.family}, {found.variant}: {found.title}"
    if found.layout is not None:
        yield "layout", found.layout
    if len(found.models) > 1:
        yield "one of", ", ".join(found.models)
    yield from found.details.items()
    if found.parts:
        yield "parameters", f"{found.parameters:,}"
    if (latent := found.latent) is not None:
        yield (
            "latent",
            (
                f"{latent.channels} channels, {latent.stride:g} pixels a cell, scale {latent.scale:g}, "
                f"shift {latent.shift:g}"
            ),
        )


def _parts(found: Found) -> Iterator[Row]:
    for part in found.parts:
        stored = ", ".join(f"{count} {dtype}" for dtype, count in part.dtypes.items())
        yield (
            part.name,
            f"{part.title}: {part.parameters:,} parameters in {part.tensors:,} tensors ({stored})",
        )
    for lost in found.missing:
        need = "not here, can be done without" if lost.optional else "not here"
        yield lost.name, f"{lost.title}: {need}; supplied by {lost.supplier}"


def _evidence(found: Found, hashed: Mapping[str, Any] | None) -> Iterator[Row]:
    flows = found.prediction is not None and found.prediction.value == "flow"
    for name, told in (
        ("predicts", found.prediction),
        ("zero SNR", None if flows else found.zero_snr),  # a flow ends in pure noise anyway
        ("resolution", found.resolution),
        ("licence", found.licence),
    ):
        if told is not None:
            yield name, _told(told)
    if found.prediction is not None:
        yield (
            "averages",
            f"{found.ema} beside the plain weights" if found.ema else "none beside the plain weights",
        )
    reasons: dict[str, list[str]] = {}
    for near in found.alternatives:
        reasons.setdefault(near.why, []).append(near.family)
    for why, kinds in list(reasons.items())[:SHOWN]:
        yield "considered", f"{', '.join(kinds)}: {why}"
    if len(reasons) > SHOWN:
        yield "", "and more; --json prints them"
    if found.ignored:
        yield "ignored", f"{found.ignored} tensors that are known and of no use"
    for file, one in (hashed or {}).items():
        yield (
            "hashes",
            f"{Path(file).name}: {Hashes(**one).line}",
        )
    for key, text in found.metadata.items():
        yield "metadata", f"{key}: {_short(text)}"


def _told(told: Told) -> str:
    usual = f" (usually {told.usual})" if told.usual else ""
    return f"{told.value}{usual}; {told.evidence}"


def _section(title: str, rows: Iterable[Row]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 0, 0, 2))
    table.add_column(no_wrap=True, style="bold", min_width=12)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(_safe(name), _safe(value))
    if table.row_count:
        console.print(Text(title, style="bold underline"))
        console.print(table)


def _safe(text: str) -> Text:
    return Text("".join(each if each.isprintable() else " " for each in text))


def _short(text: str) -> str:
    """A text of a header; a vocabulary has a hundred thousand characters."""
    more = f" ... ({len(text):,} characters; --json prints them)"
    return text if len(text) <= LONGEST else text[:LONGEST] + more


# -- a folder of them ----------------------------------------------------------------------------------------------


def run_shelf(folder: Path, as_json: bool) -> None:
    """What lies in a folder."""
    from rich.progress import Progress

    from sumuk.weights.shelf import Shelf

    place = Shelf(folder)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("looking", total=None)
        entries = place.entries(lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        tables = [asdict(each) | {"path": str(each.path)} for each in entries]
        typer.echo(json.dumps(tables, ensure_ascii=False, indent=1))
        return
    wide = console if console.is_terminal and console.width > WIDTH else Console(width=WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("name", "what it is", "megabytes", "where"):
        table.add_column(title, overflow="fold", justify="right" if title == "megabytes" else "left")
    for each in entries:
        where = each.path.parent.relative_to(place.root).as_posix()
        size = f"{each.size / 1e6:,.1f}"
        table.add_row(_safe(each.name), _safe(each.title), size, _safe("" if where == "." else where))
    wide.print(table)
    for path, why in place.skipped:
        wide.print(_safe(f"passed over {path.name}: it {why}"))


# -- models --------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("name", "name"), ("year", "year"), ("parameters", "parameters"), ("text", "reads"), ("resolution", "pixels"),
    ("prediction", "predicts"), ("steps", "steps"), ("commercial", "commerce"), ("status", "Sumuk"),
)  # fmt: skip
"""Of the list: a field of the model, and what it is called above its column."""


def run_models(name: str | None, as_json: bool) -> None:
    """The lineage in a table, or one model in full."""
    from sumuk.families.detect import families
    from sumuk.families.lineage import LINEAGE

    families()  # so that it is known which of them are here
    chosen = [LINEAGE[each] for each in ([name] if name is not None else LINEAGE)]
    if as_json:
        tables = [asdict(each) | {"commercial": each.commercial, "status": each.status} for each in chosen]
        typer.echo(json.dumps(tables if name is None else tables[0], ensure_ascii=False, indent=1))
    elif name is None:
        _list(chosen)
    else:
        _section(chosen[0].title, _in_full(chosen[0]))


def _list(chosen: Iterable[Known]) -> None:
    wide = console if console.is_terminal and console.width > WIDTH else Console(width=WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for _, title in COLUMNS:
        table.add_column(title, overflow="fold")
    for known in chosen:
        table.add_row(*(str(getattr(known, field)) for field, _ in COLUMNS))
    wide.print(table)
    wide.print(Text(LEGEND))


LEGEND = """
parameters: of the network that is asked at every step; commerce: whether its licence allows that
Sumuk: draws with it; knows its files, which draw nothing by themselves; or no
'sumuk models NAME' tells all about one"""

STATUS = {
    "draws": "draws with it",
    "files": "knows its files, which draw nothing by themselves",
    "no": "cannot draw with it",
}


def _in_full(known: Known) -> Iterator[Row]:
    yield "name", known.name
    yield "year", f"{known.year}, {known.by}"
    for title, value in (
        ("parameters", known.parameters),
        ("backbone", known.backbone),
        ("reads", known.text),
        ("pixels", known.resolution),
        ("predicts", known.prediction),
        ("steps", known.steps),
        ("licence", known.licence),
        ("good for", known.good),
        ("not for", known.bad),
        ("note", known.note),
        ("family", known.family),
    ):
        if value:
            yield title, value
    yield "Sumuk", STATUS[known.status]
