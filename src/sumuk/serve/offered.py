"""What a server offers by name: its usual checkpoint, and everything on its shelf.

Worker side. Orders name things and never say where they lie; a name stands for one file of one sort.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sumuk.base.errors import BadInput, MissingFile, nearest
from sumuk.diffusion.grid import GRIDS
from sumuk.diffusion.solvers import SOLVERS
from sumuk.families.detect import Unknown, families
from sumuk.families.family import Defaults, Family
from sumuk.files.safetensors import stamp
from sumuk.generate.api import MINIATURE
from sumuk.serve.config import ServeConfig
from sumuk.serve.wire import Entry
from sumuk.weights import shelf
from sumuk.weights.inspect import open as look
from sumuk.weights.inspect import recognise
from sumuk.weights.source import read

SORTS = {
    "lora": "lora",
    "textual-inversion": "embedding",
    "hypernetwork": "hypernet",
    "vae": "vae",
    "controlnet": "control",
    "t2i-adapter": "control",
    "ip-adapter": "control",
}
"""First part of a kind on the shelf -> sort of entry; families that draw are models, the rest is ``other``."""
FRESH = 2.0
"""Seconds in which a shelf is not looked through again, unless a name is not known."""


class Offered:
    """The names that orders may use.

    Args:
        config: which checkpoint and which shelf.

    Raises:
        MissingFile: one of them is not there.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.usual = config.usual
        self._usual_path = MINIATURE if config.model is None else config.model
        if not self._usual_path.exists():
            raise MissingFile(f"no model at {self._usual_path}")
        self._shelf = None if config.shelf is None else shelf.Shelf(config.shelf)
        self._home = shelf.Shelf(MINIATURE.parent) if config.model is None else None
        folders = [each.root for each in (self._shelf, self._home) if each is not None]
        folders += [self._usual_path.parent, self._usual_path.resolve().parent]
        self._roots = sorted({*map(str, folders)}, key=len, reverse=True)
        self._draws = {kind.key: kind for kind in families() if isinstance(kind, Family)}
        self.paths: dict[tuple[str, str], Path] = {}
        self._entries: list[Entry] = []
        self._looked = -FRESH
        self._lock = threading.Lock()
        self._licences: dict[tuple[Path, tuple[int, ...]], str] = {}

    def entries(self, fresh: float = FRESH) -> list[Entry]:
        """Everything, models first; a name that several files bear is said with its folder.

        Args:
            fresh: seconds for which what was seen last is still believed; every request asks.
        """
        with self._lock:
            if time.monotonic() - self._looked >= fresh:
                self._entries = self._look()
                self._looked = time.monotonic()
            return self._entries

    def _look(self) -> list[Entry]:
        found: list[tuple[Path, Entry]] = []
        for path, each, home in self._lying():
            with suppress(FileNotFoundError):  # somebody takes it away at this moment
                found.append((path, self._entry(path, each, home)))
        counts = Counter((entry.sort, entry.name) for _, entry in found)
        named: list[Entry] = []
        paths: dict[tuple[str, str], Path] = {}
        for path, entry in found:
            if counts[entry.sort, entry.name] > 1 and path != self._usual_path:
                entry = replace(entry, name=Path(entry.file).with_suffix("").as_posix())
            if (entry.sort, entry.name) not in paths:
                paths[entry.sort, entry.name] = path
                named.append(entry)
        self.paths = paths
        return sorted(named, key=lambda each: (each.sort != "model", each.sort, each.name.lower()))

    def find(self, name: str, sort: str) -> Path:
        """Where a named thing lies.

        Raises:
            MissingFile: there is none of that name and sort; names the nearest.
        """
        if sort == "model" and name == self.usual:
            return self._usual_path
        if (sort, name) not in self.paths or not self.paths[sort, name].exists():
            self.entries(fresh=0.0)
        if (sort, name) not in self.paths:
            some = [each for kind, each in self.paths if kind == sort]
            hint = nearest(name, some) if some else "; this server offers none"
            raise MissingFile(f"no {sort} {name[:100]!r} here{hint}")
        return self.paths[sort, name]

    def named(self, name: str, sort: str) -> str:
        """The name as it is spelt here, whatever the case of its letters."""
        try:
            self.find(name, sort)
            return name
        except MissingFile:
            same = [each for kind, each in self.paths if kind == sort and each.lower() == name.lower()]
            if len(same) != 1:
                raise
            return same[0]

    def usual_settings(self, name: str) -> Defaults:
        """What an offered model draws where an order says nothing, from its header.

        Raises:
            MissingFile: no such model.
            BadInput: it does not draw.
        """
        opened = recognise(read(self.find(name, "model")))
        if isinstance(opened.answer, Unknown) or opened.answer.family.key not in self._draws:
            what = opened.answer.why if isinstance(opened.answer, Unknown) else opened.answer.family.title
            raise BadInput(f"{name!r} does not draw; it is {what}")
        return replace(opened.family.defaults, size=opened.size())

    def describe(self, name: str) -> dict[str, Any]:
        """What ``sumuk inspect`` says of an entry of any sort; its path is only its name within the shelf."""
        for entry in self.entries():
            if entry.name == name:
                table = look(self.paths[entry.sort, entry.name]).as_dict(False)
                return {**self.inside(table), "name": entry.name, "sort": entry.sort}
        raise MissingFile(f"nothing here is named {name[:100]!r}{nearest(name, [n for _, n in self.paths])}")

    def inside(self, said: Any) -> Any:
        """A text, or what holds some, without where on this machine things lie."""
        if isinstance(said, str):
            for root in self._roots:
                said = said.replace(f"{root}{os.sep}", "")
            return said
        if isinstance(said, dict):
            return {key: self.inside(value) for key, value in said.items()}
        return [self.inside(each) for each in said] if isinstance(said, list | tuple) else said

    def _lying(self) -> Iterator[tuple[Path, shelf.Entry, shelf.Shelf]]:
        seen: set[Path] = set()
        if self._home is None:
            beside = shelf.Shelf(self._usual_path.resolve().parent)
            entry = beside.look(self._usual_path.resolve())
            seen.add(entry.path)
            yield self._usual_path, entry, beside
        for each in (self._home, self._shelf):
            for entry in each.entries() if each is not None else ():
                if entry.path not in seen:
                    seen.add(entry.path)
                    yield entry.path, entry, each  # type: ignore[misc]  # it has entries

    def _entry(self, path: Path, entry: shelf.Entry, home: shelf.Shelf) -> Entry:
        prefix = entry.kind.partition("/")[0]
        kind = self._draws.get(entry.kind)
        parts = () if kind is None else [part.name for part in kind.parts]
        sort = "model" if "denoiser" in parts else SORTS.get(prefix, "other")
        return Entry(
            name=self.usual if path == self._usual_path else entry.name,
            sort=sort,
            kind=entry.kind,
            title=entry.title,
            file=os.path.relpath(entry.path, home.root),
            size=entry.size,
            licence=self._licence(path) if sort == "model" else "",
            sha256=home.known_sha256(entry),
        )

    def _licence(self, path: Path) -> str:
        """What the file says, which may differ from its family's; read once for each state of the file."""
        file = path / "model_index.json" if path.is_dir() else path
        now = stamp(file)
        if (path, now) not in self._licences:
            told = look(path).licence
            self._licences[path, now] = "" if told is None else told.value
        return self._licences[path, now]


def choices() -> dict[str, list[dict[str, Any]]]:
    """Solvers and step spacings, with every other name under which each is known."""
    return {
        "solvers": [
            {
                "name": name,
                "aliases": SOLVERS.aliases(name),
                "grid": SOLVERS[name].grid,
                "settings": list(SOLVERS[name].settings),
                "asks": SOLVERS[name].asks,
            }
            for name in SOLVERS
        ],
        "grids": [{"name": name, "aliases": GRIDS.aliases(name)} for name in GRIDS],
    }
