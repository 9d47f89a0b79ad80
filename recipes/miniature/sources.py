"""The miniature's sources: pinned packages, which objects the Unicode list keeps, their names and their pictures.

An object's key is its codepoints in lower-case hexadecimal, joined by ``-``, without the variation selector fe0f;
the four icon sets and CLDR spell them in four ways, and :func:`codepoints` brings them together.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned npm package and the licence of what is taken from it."""

    name: str
    version: str
    sha256: str
    licence: str
    holder: str

    @property
    def file(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True, kw_only=True)
class Style:
    """Where a style's pictures are."""

    package: Package
    kind: str
    """``webp`` or ``svg``: one file an icon under ``assets``; ``iconify``: all SVG bodies in one JSON."""
    scale: float
    """Brings the style's usual icon to seven eighths of the frame."""
    withheld: frozenset[str] = frozenset()
    """Objects that the package holds but its licence does not cover."""


SETS: Mapping[str, Style] = {
    "3d": Style(
        package=Package(
            name="@lobehub/fluent-emoji-3d",
            version="1.1.0",
            sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            licence="MIT",
            holder="Microsoft (Fluent Emoji), packaged by LobeHub",
        ),
        kind="webp",
        scale=1.0,
        # The makers kept these back from their open release: a game controller, a paper clip with eyes and a
        # laptop with their logo are trademarks. This package carries them all the same; its flat twin does not.
        withheld=frozenset(["1f3ae", "1f4ce", "1f9d1-200d-1f4bb"]),
    ),
    "flat": Style(
        package=Package(
            name="@lobehub/fluent-emoji-flat",
            version="1.1.0",
            sha256="8f9113c027c7c20eced0070354715a4093a459b8bef6332b91d45f38c9bdb147",
            licence="MIT",
            holder="Microsoft (Fluent Emoji), packaged by LobeHub",
        ),
        kind="svg",
        scale=1.0,
    ),
    "noto": Style(
        package=Package(
            name="@iconify-json/noto",
            version="1.2.9",
            sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
            licence="Apache-2.0",
            holder="Google (Noto Emoji), packaged by Iconify",
        ),
        kind="iconify",
        scale=0.93,
    ),
    "twemoji": Style(
        package=Package(
            name="@iconify-json/twemoji",
            version="1.2.5",
            sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
            licence="CC-BY-4.0",
            holder="Twitter and other contributors (Twemoji), packaged by Iconify",
        ),
        kind="iconify",
        scale=0.875,
    ),
}

GROUPS = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
    holder="Miles Johnson",
)
NAMES = Package(
    name="cldr-annotations-full",
    version="48.2.0",
    sha256="28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    licence="Unicode-3.0",
    holder="Unicode, Inc.",
)
DERIVED = Package(
    name="cldr-annotations-derived-full",
    version="48.2.0",
    sha256="4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    licence="Unicode-3.0",
    holder="Unicode, Inc.",
)

# Pictures that are letters or digits and nothing else, outside the subgroups "alphanum" and "keycap".
_TEXT = frozenset(
    [
        "1f3e7",
        "1f519",
        "1f51a",
        "1f51b",
        "1f51c",
        "1f51d",
        "1f51e",
        "1f6be",
        "1f4af",
        "1f4a4",
        "a9",
        "ae",
        "2122",
    ]
)
_CROWDS = frozenset(["1f465", "1f46a", "1f46f", "1f93c"])
_CLOCKS = frozenset(f"{code:x}" for code in range(0x1F550, 0x1F568))


class BuildError(Exception):
    """The data set cannot be built; the message names what is wrong and the remedy."""


@dataclass(frozen=True)
class Entry:
    """One object of the Unicode list."""

    object: str
    emoji: str
    group: str
    subgroup: str


def codepoints(text: str) -> str:
    """``1F43B-200D-2744-FE0F`` -> ``1f43b-200d-2744``: the key that all packages are brought to."""
    parts = [part.lstrip("0") for part in text.lower().split("-")]
    return "-".join(part for part in parts if part != "fe0f")


def exclusion(entry: Entry, known: frozenset[str] | set[str]) -> str | None:
    """The rule that keeps an object out of the set, or None.

    Args:
        known: every object of the Unicode list, to see whether a gendered form has a neutral one.
    """
    code = entry.object
    if entry.group == "component":
        return "component"
    if entry.group == "flags":
        return "flag"
    if entry.subgroup == "keycap":
        return "keycap"
    if entry.subgroup == "alphanum" or code in _TEXT:
        return "text only"
    if code in _CLOCKS:
        return "clock face"
    if entry.subgroup == "family" or code in _CROWDS:
        return "group of people"
    parts = code.split("-200d-")
    if len(parts) > 1:
        if {*parts} <= {"1f9d1", "1f9d2"}:  # "family: adult, child", listed among the symbols
            return "group of people"
        if parts[-1] == "27a1":
            return "facing right"
        if parts[-1] in {"2640", "2642"} and "-200d-".join(parts[:-1]) in known:
            return "gender variant"
        if parts[0] in {"1f468", "1f469"} and "-200d-".join(["1f9d1", *parts[1:]]) in known:
            return "gender variant"
    return None


def fetch(package: Package, cache: Path) -> Path:
    """The package's archive, downloaded if the cache lacks it, checked either way."""
    path = cache / package.file
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        try:
            done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=600)
        except FileNotFoundError:
            raise BuildError("npm is not installed; it comes with Node.js") from None
        if done.returncode or not path.is_file():
            raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise BuildError(f"{path} has SHA-256 {found}, not {package.sha256}; delete it and build again")
    return path


def members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted files of an archive, by path below its top folder, in one pass."""
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile() and wanted(name):
                stream = tar.extractfile(member)
                assert stream is not None
                found[name] = stream.read()
    return found


def read_entries(archive: Path) -> tuple[list[Entry], Counter[str]]:
    """The kept objects in Unicode order, and how many each rule left out."""
    files = members(archive, lambda name: name in {"en/data.json", "meta/groups.json"})
    meta = json.loads(files["meta/groups.json"])
    listed, left_out = [], Counter[str]()
    for raw in json.loads(files["en/data.json"]):
        left_out["skin tone variant"] += len(raw.get("skins", ()))
        if "group" not in raw:
            left_out["regional indicator letter"] += 1
            continue
        group, subgroup = meta["groups"][str(raw["group"])], meta["subgroups"][str(raw["subgroup"])]
        listed.append(Entry(codepoints(raw["hexcode"]), raw["emoji"], group, subgroup))
    known = {entry.object for entry in listed}
    kept = []
    for entry in listed:
        rule = exclusion(entry, known)
        if rule is None:
            kept.append(entry)
        else:
            left_out[rule] += 1
    return kept, left_out


def read_names(names: Path, derived: Path, language: str) -> dict[str, str]:
    """CLDR annotations: object -> name."""
    found: dict[str, str] = {}
    for archive, top in ((names, "annotations"), (derived, "annotationsDerived")):
        path = f"{top}/{language}/annotations.json"
        table = json.loads(members(archive, lambda name, path=path: name == path)[path])[top]["annotations"]  # type: ignore[misc]
        for emoji, entry in table.items():
            if "tts" in entry:
                code = codepoints("-".join(f"{ord(letter):x}" for letter in emoji))
                found[code] = entry["tts"][0]
    return found


def read_pictures(style: Style, archive: Path, wanted: set[str]) -> dict[str, bytes]:
    """Object -> its WebP or SVG file, without those that the licence does not cover."""
    wanted = wanted - style.withheld
    if style.kind == "iconify":
        files = members(archive, lambda name: name in {"icons.json", "chars.json"})
        icons, chars = json.loads(files["icons.json"]), json.loads(files["chars.json"])
        pictures = {}
        for code, name in chars.items():
            if codepoints(code) in wanted:
                name = icons.get("aliases", {}).get(name, {}).get("parent", name)
                icon = icons["icons"][name]
                width = icon.get("width", icons.get("width", 16))
                height = icon.get("height", icons.get("height", 16))
                pictures[codepoints(code)] = (
                    f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
                ).encode()
        return pictures
    return {
        codepoints(Path(name).stem): data
        for name, data in members(
            archive, lambda name: name.endswith(f".{style.kind}") and codepoints(Path(name).stem) in wanted
        ).items()
    }
