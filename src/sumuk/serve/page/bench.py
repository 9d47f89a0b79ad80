"""Work on files of the shelf: the command line in a process of its own, one at a time; the server stays light."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sumuk.serve.page.words import Words
from sumuk.serve.trouble import refused

LONGEST = 60_000
"""Characters of output that are kept; the last ones."""
GRACE = 5.0
"""Seconds that a process gets to end by itself."""
ENDING = ".safetensors"
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
_NAME = re.compile(r"\w[\w.\-]{0,99}")


@dataclass
class Work:
    """A command at work.

    Attributes:
        owner: who asked for it.
        makes: name of the file that it makes; empty: none.
        said: its output so far.
        code: how it ended; None: it runs, or was cancelled.
        over: whether it has ended.
    """

    owner: str
    makes: str
    said: str = ""
    code: int | None = None
    over: bool = False
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Bench:
    """Where one command at a time works on a shelf.

    Args:
        shelf: the folder.

    Attributes:
        work: what runs, or ran last.
    """

    def __init__(self, shelf: Path) -> None:
        self.shelf = shelf
        self.work: Work | None = None

    def file(self, name: str | None, words: Words) -> Path:
        """Where a file lies.

        Args:
            name: within the shelf.
            words: for what is wrong.

        Raises:
            Refused: there is none of that name.
        """
        if not name:
            raise refused("bad-value", words("choose-file"))
        path = self.shelf / name
        if not path.resolve().is_relative_to(self.shelf.resolve()) or not path.exists():
            raise refused("not-found", words("no-file", name=name[:100]))
        return path

    def new(self, name: str, words: Words) -> Path:
        """Where a new file is to lie.

        Args:
            name: of the file, with or without its ending.
            words: for what is wrong.

        Raises:
            Refused: it is none for a file, or it is taken.
        """
        name = name.strip().removesuffix(ENDING)
        if not _NAME.fullmatch(name) or name.endswith("."):
            raise refused("bad-value", words("bad-name", name=name[:100]))
        path = self.shelf / f"{name}{ENDING}"
        if path.exists():
            raise refused("conflict", words("name-taken", name=path.name))
        return path

    def start(self, owner: str, arguments: list[str | Path], makes: str, words: Words) -> Work:
        """Begin ``sumuk`` with these arguments; it goes on whether anybody looks or not.

        Raises:
            Refused: another command runs.
        """
        if self.work is not None and not self.work.over:
            raise refused("conflict", words("bench-taken"))
        self.work = work = Work(owner, makes)
        work.task = asyncio.ensure_future(self._run(work, arguments))
        return work

    async def _run(self, work: Work, arguments: list[str | Path]) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sumuk", *map(self._told, arguments)),
            cwd=self.shelf,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | PLAIN,
            start_new_session=True,
        )
        ending = asyncio.ensure_future(_ended(process, work))
        try:
            assert process.stdout is not None
            where = str(self.shelf.resolve())  # nobody's business
            while piece := await process.stdout.read(8192):
                work.said = (work.said + piece.decode(errors="replace"))[-LONGEST:].replace(where, ".")
            code = await process.wait()
            work.code = None if work.cancelled.is_set() else code
        finally:
            ending.cancel()
            if process.returncode is None:
                process.kill()
            work.over = True

    def _told(self, argument: str | Path) -> str:
        """An argument as the command reads it: files from within the shelf."""
        return f".{os.sep}{argument.relative_to(self.shelf)}" if isinstance(argument, Path) else argument

    def cancel(self, owner: str) -> None:
        """End what runs, if it is this owner's; what it writes is whole or not there."""
        if self.work is not None and self.work.owner == owner:
            self.work.cancelled.set()


async def _ended(process: asyncio.subprocess.Process, work: Work) -> None:
    """End a process once it is cancelled, politely at first."""
    await work.cancelled.wait()
    for sign in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            process.send_signal(sign)
        await asyncio.sleep(GRACE)
