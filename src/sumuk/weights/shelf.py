"""A folder of model files as a shelf: what lies on it, found by name or by hash, looked at once.

What a file is and its hashes are kept in an index (SQLite, under the user's cache folder) together with the file's
size, inode and time of change; whatever differs from these is looked at anew. The index is a convenience: if it is
damaged or cannot be written, everything works without it, only slower.

Nothing outside the folder is ever named: a link that leads out of it is told of and passed over.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sumuk.base.errors import BadInput, MissingFile, SumukError, nearest
from sumuk.files.hashes import Hashes, Progress, hashes
from sumuk.files.safetensors import stamp
from sumuk.weights import inspect

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
MOST_FILES = 100_000
VERSION = 1
"""Of the index: raised when recognition learns something new, so that files are looked at again."""
TABLE = """
CREATE TABLE IF NOT EXISTS files (path TEXT, kind TEXT, stamp TEXT, said TEXT, PRIMARY KEY (path, kind))
"""


@dataclass(frozen=True)
class Entry:
    """A model on the shelf.

    Attributes:
        name: the file's name without its ending, or the folder's.
        path: where it is.
        kind: ``lora/sdxl``, ``sd1/text-to-image``, ...; empty for what is not recognised.
        title: in words; for what is not recognised or cannot be read, why.
        size: bytes.
    """

    name: str
    path: Path
    kind: str
    title: str
    size: int


class Shelf:
    """A folder of models.

    Args:
        root: the folder.
        index: the file that remembers; the user's own by default.

    Raises:
        MissingFile: no such folder.
    """

    def __init__(self, root: str | os.PathLike[str], index: Path | None = None) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise MissingFile(f"no folder {str(root)!r} to look for models in")
        self.skipped: list[tuple[Path, str]] = []
        self._index = _Index(index or _usual_index())

    def entries(self, progress: Progress | None = None) -> list[Entry]:
        """Everything on the shelf, by name; told of each file by number and count.

        Raises:
            BadInput: more files than any shelf has.
        """
        paths = sorted(self._paths())
        found = []
        for number, path in enumerate(paths, start=1):
            found.append(self.look(path))
            if progress:
                progress(number, len(paths))
        return sorted(found, key=lambda entry: (entry.name.lower(), entry.path))

    def find(self, name: str, kinds: Iterable[str] = ()) -> Entry:
        """The model of that name: as it is written, else whatever the case of its letters.

        Args:
            name: the file's name without its ending; below subfolders also their path, ``people/fox``.
            kinds: beginnings of its kind, ``("lora/",)``; any by default.

        Raises:
            MissingFile: there is none; names the nearest.
            BadInput: there are several.
        """
        starts = tuple(kinds)
        entries = [each for each in self.entries() if not starts or each.kind.startswith(starts)]
        for same in (str.__str__, str.lower):
            fit = [each for each in entries if same(name) in (same(each.name), same(self._inner(each)))]
            if len(fit) > 1:
                where = ", ".join(str(each.path.relative_to(self.root)) for each in fit[:3])
                raise BadInput(
                    f"{name!r} is the name of {len(fit)} files ({where}); say which folder it is in"
                )
            if fit:
                return fit[0]
        hint = nearest(name, [each.name for each in entries]) if entries else ""
        wanted = f"{' or '.join(start.strip('/') for start in starts)} " if starts else ""
        raise MissingFile(f"no {wanted}{name!r} in {str(self.root)!r}{hint}")

    def by_hash(self, digits: str, progress: Progress | None = None) -> Entry:
        """The file whose SHA-256 or AutoV3 begins with these digits, as pictures name their models.

        Raises:
            BadInput: fewer than eight digits, or others than hexadecimal ones.
            MissingFile: there is none.
        """
        wanted = digits.lower().removeprefix("0x")
        if len(wanted) < 8 or set(wanted) - set("0123456789abcdef"):
            raise BadInput(f"{digits!r} is no beginning of a hash: give at least 8 hexadecimal digits")
        for entry in self.entries():
            if entry.path.is_file():
                known = self.hashes(entry, progress)
                if known.sha256.startswith(wanted) or (known.autov3 or "").startswith(wanted):
                    return entry
        raise MissingFile(f"no file in {str(self.root)!r} has a hash that begins with {wanted!r}")

    def hashes(self, entry: Entry, progress: Progress | None = None) -> Hashes:
        """The hashes of a file, read whole once and remembered."""
        before = stamp(entry.path)
        known = self._index.hashes(entry.path, before)
        if known is None:
            known = hashes(entry.path, progress)
            if stamp(entry.path) == before:
                self._index.remember(entry.path, before, hashed=known)
        return known

    def _inner(self, entry: Entry) -> str:
        return entry.path.relative_to(self.root).with_name(entry.name).as_posix()

    def look(self, path: Path) -> Entry:
        """One model on the shelf, by its path."""
        file = path / "model_index.json" if path.is_dir() else path
        before = stamp(file)
        told = self._index.told(file, before)
        if told is None:
            try:
                found = inspect.open(path)
                key = "" if found.family is None else f"{found.family}/{found.variant}"
                told = key, found.title or f"unknown: {found.unknown}"
            except SumukError as error:
                told = "", f"cannot be read: {error}"
            self._index.remember(file, before, told=told)
        size = (
            sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
            if path.is_dir()
            else before[2]
        )
        return Entry(path.stem if path.is_file() else path.name, path, *told, size)

    def _paths(self) -> Iterator[Path]:
        count = 0
        self.skipped = []
        for folder, inner, files in os.walk(self.root, followlinks=False):
            here = Path(folder)
            if "model_index.json" in files and here != self.root:
                inner.clear()
                yield here
                continue
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in files:
                path = here / name
                if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                    continue
                count += 1
                if count > MOST_FILES:
                    raise BadInput(
                        f"{str(self.root)!r} holds more than {MOST_FILES:,} model files; name a folder in it"
                    )
                if self._inside(path):
                    yield path

    def _inside(self, path: Path) -> bool:
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            self.skipped.append((path, f"leads nowhere: {error}"))
            return False
        if not target.is_relative_to(self.root):
            self.skipped.append((path, "is a link that leads out of the folder"))
            return False
        if not target.is_file():
            self.skipped.append((path, "is no regular file"))
            return False
        return True


def _usual_index() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "sumuk" / f"shelf-{VERSION}.sqlite3"


class _Index:
    """What is remembered of files, as long as they stay what they were."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def told(self, path: Path, now: tuple[int, ...]) -> tuple[str, str] | None:
        said = self._read("told", path, now)
        match said:
            case [str(kind), str(title)]:
                return kind, title
        return None

    def hashes(self, path: Path, now: tuple[int, ...]) -> Hashes | None:
        said = self._read("hashed", path, now)
        with suppress(TypeError):
            return Hashes(**said) if isinstance(said, dict) else None
        return None

    def remember(
        self,
        path: Path,
        now: tuple[int, ...],
        *,
        told: tuple[str, str] | None = None,
        hashed: Hashes | None = None,
    ) -> None:
        """Keep what was found; an index that cannot be written is passed over."""
        kind, said = (
            ("told", list(told)) if told is not None else ("hashed", asdict(hashed) if hashed else None)
        )
        with suppress(sqlite3.Error, OSError), closing(self._open()) as base, base:
            base.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
                (str(path), kind, json.dumps(now), json.dumps(said)),
            )

    def _read(self, kind: str, path: Path, now: tuple[int, ...]) -> object:
        if not self.path.is_file():
            return None
        try:
            with closing(self._open()) as base:
                row = base.execute(
                    "SELECT stamp, said FROM files WHERE path = ? AND kind = ?", (str(path), kind)
                ).fetchone()
            return json.loads(row[1]) if row and json.loads(row[0]) == list(now) else None
        except (sqlite3.Error, OSError, ValueError):
            return None

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(self.path, timeout=5)
        try:
            base.execute(TABLE)
        except sqlite3.DatabaseError as error:
            base.close()
            if not isinstance(error, sqlite3.OperationalError):  # damaged, not only busy: begin a new one
                self.path.unlink(missing_ok=True)
            raise
        return base
