"""Files stay small enough to read: when one grows past the bound, a second thing has moved in."""

from __future__ import annotations

from pathlib import Path
from statistics import median

SOURCE = Path(__file__).parents[2] / "src" / "sumuk"
LONGEST = 450
MEDIAN = 250


def sizes() -> dict[str, int]:
    """Path -> lines, the longest first; a package's one-line docstring is no file to read."""
    lines = {
        str(path.relative_to(SOURCE)): len(path.read_text("utf-8").splitlines())
        for path in SOURCE.rglob("*.py")
    }
    return dict(sorted(((f, n) for f, n in lines.items() if n > 10), key=lambda each: -each[1]))


def listing(table: dict[str, int]) -> str:
    return "\n".join(f"{lines:5d}  {file}" for file, lines in table.items())


def test_no_file_is_too_long():
    long = {file: lines for file, lines in sizes().items() if lines > LONGEST}
    assert not long, f"above {LONGEST} lines; what second thing has moved in?\n{listing(long)}"


def test_the_median_file_is_short():
    table = sizes()
    assert len(table) > 40, "the source is not where it was looked for"
    assert median(table.values()) < MEDIAN, f"median {median(table.values())}\n{listing(table)}"
