"""Verbs that tell: inspect, solvers."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sumuk.diffusion.grid import GRIDS
from sumuk.diffusion.solvers import SOLVERS

console = Console()
LONGEST = 200
"""Characters of a metadata text that are shown."""


def run_solvers() -> None:
    """Each solver in two lines, then the names of the spacings; the same on a terminal and in a pipe."""
    typer.echo("solver, step spacing, noise, asks a step; other names; source\n")
    for name in SOLVERS:
        listing = SOLVERS[name]
        typer.echo(f"{name:24} {listing.grid:14} {listing.noise:10} {listing.asks}")
        typer.echo(f"    {', '.join(SOLVERS.aliases(name))}; {listing.reference}")
    typer.echo("\nstep spacings: " + ", ".join(GRIDS))


def run_inspect(path: Path, as_json: bool) -> None:
    """What a checkpoint is."""
    from sumuk.weights.inspect import open as look

    found = look(path)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False, indent=1))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.as_dict().items():
        if isinstance(value, dict):
            value = {key: _short(each) if isinstance(each, str) else each for key, each in value.items()}
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # It comes from the file: no markup is read in it, and no control character reaches the terminal.
        table.add_row(name, Text("".join(each if each.isprintable() else " " for each in text)))
    console.print(table)


def _short(text: str) -> str:
    """A text of a header; a vocabulary has a hundred thousand characters."""
    more = f" ... ({len(text):,} characters; --json prints them)"
    return text if len(text) <= LONGEST else text[:LONGEST] + more
