"""Runs the pickle machine in a process of its own, and takes what it says as a stranger's word.

The process (:mod:`~sumuk.files.pickle_child`) is a bare interpreter without packages, environment or site. It is handed
the open file as its input, so that it reads the very file that was checked, whatever happens to its name meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from threading import Timer
from typing import Any, BinaryIO

from sumuk.files import pickle_child
from sumuk.files.pickle_answer import answer, legacy_answer
from sumuk.files.pickle_nodes import Refused

MAX_ANSWER = 128 * 2**20
SECONDS = 60
"""Wall clock; a busy machine may need many times the 40 ms that reading takes."""


def in_child(file: BinaryIO, kind: str, offset: int, length: int) -> dict[str, Any]:
    """The answer of :mod:`~sumuk.files.pickle_answer` on a pickle in an open file, or ``refused``: code, sentence."""
    program = [sys.executable, "-I", "-S", "-B", str(Path(pickle_child.__file__).resolve())]
    arguments = [kind, str(offset), str(length)]
    try:
        process = subprocess.Popen(
            program + arguments, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        return {"refused": ["limits", f"is not read, as no process can be started to read it in: {error}"]}
    with process:
        assert process.stdout is not None
        timer = Timer(SECONDS, process.kill)
        timer.start()
        try:
            said = b""
            while (piece := process.stdout.read(2**20)) and len(said) < MAX_ANSWER:
                said += piece
            process.kill()  # whoever closed its output, or said too much, has nothing more to say
        finally:
            timer.cancel()
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    return {
        "refused": ["limits", "took more memory or time to read than its size explains, and was given up"]
    }


def in_process(file: BinaryIO, kind: str, offset: int, length: int) -> dict[str, Any]:
    """The same without another process, by the machine's own budgets alone; for tests that read very many files."""
    file.seek(offset)
    data = file.read(length)
    read = legacy_answer if kind == "legacy" else answer
    try:
        return json.loads(json.dumps(read(data, 0, len(data))))
    except Refused as refused:
        return {"refused": [refused.code, refused.what]}
