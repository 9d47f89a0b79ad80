"""A folder of model files as a shelf: what lies on it, found by name or by hash, looked at once.

What a file is and its hashes are remembered (:mod:`~sumuk.weights.remembered`).

Nothing outside the folder is ever named: a link that leads out of it is told of and passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sumuk.base.errors import BadInput, MissingFile, SumukError, nearest
from sumuk.files.hashes import Hashes, Progress
from sumuk.weights import inspect
from sumuk.weights.remembered import Index, state, usual_index

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
MOST_FILES = 100_000


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
        self._index = usual_index() if index is None else Index(index)

    def entries(self, progress: Progress | None = None) -> list[Entry]:
        """Everything on the shelf, by name; told of each file by number and count.

        Raises:
            BadInput: more files than any shelf has.
        """
        paths = sorted(self._paths())
        found = []
        for number, path in enumerate(paths, start=1):
            with suppress(FileNotFoundError):  # somebody takes it away at this moment
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
        return self._index.hashes(entry.path, progress)

    def known_sha256(self, entry: Entry) -> str | None:
        """A file's SHA-256 if it was read before; None: not yet, or a folder."""
        known = self._index.hashed(entry.path, state(entry.path))
        return None if known is None else known.sha256

    def _inner(self, entry: Entry) -> str:
        return entry.path.relative_to(self.root).with_name(entry.name).as_posix()

    def look(self, path: Path) -> Entry:
        """One model on the shelf, by its path."""
        file = path / "model_index.json" if path.is_dir() else path
        before = state(file)
        told = self._index.told(file, before)
        if told is None:
            try:
                found = inspect.open(path)
                key = "" if found.family is None else f"{found.family}/{found.variant}"
                told = key, found.title or f"unknown: {found.unknown}"
            except SumukError as error:
                told = "", f"cannot be read: {error}"
            self._index.tell(file, before, *told)
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
