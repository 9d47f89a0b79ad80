"""The hostile files of the project's tests, written out: to try another program on them, or to see what Sumuk says.

    python examples/hostile.py --out build/hostile            # a folder for each of them
    python examples/hostile.py --out build/hostile --inspect  # and a table: what each costs, and how it is refused

They are harmless to whoever only lists, reads or copies them. Some are pipes, links to devices, and files of a gigabyte
that take no disk. What tries to run a command tries ``touch hacked``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from tests.hostile.case import Case  # noqa: E402
from tests.hostile.corpus import CASES, reader_of  # noqa: E402
from tests.hostile.driver import Died, Worker, good_files  # noqa: E402
from tests.hostile.worker import LIGHT  # noqa: E402


def place(case: Case, out: Path) -> Path:
    """Where a case lies: ``08-bytearray-3e9``."""
    words = re.sub(r"[^a-z0-9]+", "-", case.name.lower()).strip("-")
    return out / f"{case.number:02}-{words}"[:100]


def write(out: Path) -> list[tuple[Case, Path]]:
    """All of them; returns what to open."""
    shutil.rmtree(out, ignore_errors=True)
    made = []
    for case in CASES:
        folder = place(case, out)
        folder.mkdir(parents=True)
        made.append((case, case.make(folder)))
    return made


def inspect(made: list[tuple[Case, Path]]) -> None:
    """Open each as the tests do, and print what came of it."""
    print(f"{'':2} {'ms':>6} {'KiB':>7}  {'what':60} said")
    with tempfile.TemporaryDirectory() as place:
        good = good_files(Path(place))
        with Worker("light", good) as light, Worker("heavy", good) as heavy:
            for case, path in made:
                reader = reader_of(case)
                try:
                    told = (light if reader.split()[0] in LIGHT else heavy).ask(reader, path)
                    cost = f"{told['cpu'] * 1000:6.0f} {told['kib']:7}"
                    if reader == "open" and not told["error"]:
                        told = heavy.ask("check", path)
                    said = told["code"] or "; ".join(told["said"]) or "read"
                except Died as error:
                    cost, said = f"{'':14}", str(error)
                print(f"{case.number:2} {cost}  {case.name:60.60} {said:.100}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/hostile"), help="folder, emptied first")
    parser.add_argument("--inspect", action="store_true", help="also open each of them")
    given = parser.parse_args()
    made = write(given.out)
    print(f"{len(made)} files in {given.out}")
    if given.inspect:
        inspect(made)


if __name__ == "__main__":
    main()
