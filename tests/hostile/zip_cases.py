"""PyTorch files whose archive is hostile or broken, and files that are none: numbers 21 to 30 and 32 of the list."""

from __future__ import annotations

import io
import json
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

from tests.hostile.pickle_files import GOOD, End, Part, archive, change, file, parts, pickle, storage, tensor

USUAL = parts(pickle({"w": tensor()}))
"""data.pkl, byteorder, data/0, version."""


def shared_body() -> bytes:
    """A second name for the bytes of data/0."""
    begins = archive(USUAL).index(b"archive/data/0") - 30
    return archive([*USUAL, Part(b"archive/data/1", USUAL[2].body, header=begins)])


def bomb() -> bytes:
    """A pickle of 300 MB in 300 kB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw = b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
    return archive(change(USUAL, 0, body=raw, method=8, size=300 * 2**20, crc=0))


def zipped(*names: str) -> bytes:
    return archive([Part(name.encode(), b"x") for name in names])


def tarred() -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    return raw.getvalue()


def safetensors() -> bytes:
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(4)


def deflated() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as one:
        for part in USUAL:
            one.writestr(part.name.decode(), part.body)
    return raw.getvalue()


def flipped(at: int) -> bytes:
    """A good file with one bit of an entry's bytes wrong."""
    raw = archive(USUAL)
    place = raw.index(USUAL[at].name) + len(USUAL[at].name)
    return raw[:place] + bytes([raw[place] ^ 64]) + raw[place + 1 :]


def crowd(count: int) -> bytes:
    """So many entries, with the 64-bit end that says so."""
    of = [Part(b"archive/data/%d" % at) for at in range(count)]
    length = sum(46 + len(part.name) for part in of)
    begin = sum(30 + len(part.name) for part in of)
    return archive(of, End(total=0xFFFF, wide=(count, length, begin)))


BUILT: list[tuple[int, str, str, bytes | Callable[[], bytes]]] = [
    (21, "two data.pkl", "zip", archive([*USUAL, USUAL[0]])),
    (21, "data.pkl in two folders", "zip", archive([*USUAL, Part(b"other/data.pkl", USUAL[0].body)])),
    (22, "a flipped bit in a weight", "crc", flipped(2)),
    (22, "a flipped bit in the pickle", "crc", flipped(0)),
    (22, "a wrong CRC", "crc", archive(change(USUAL, 2, crc=1))),
    (23, "a DEFLATE bomb", "zip", bomb),
    (23, "a deflated file, harmless", "zip", deflated),
    (23, "a size that is larger than what is stored", "zip", archive(change(USUAL, 2, size=2**30))),
    (24, "two entries share one body", "zip", shared_body),
    (24, "an entry inside another", "zip", archive(change(USUAL, 2, header=40))),
    (24, "an offset beyond the file", "zip", archive(change(USUAL, 3, header=10**6))),
    (25, "bytes before the archive", "kind", b"#!/bin/sh\n" + GOOD),
    (25, "an archive before the archive", "zip", GOOD + GOOD),
    (25, "bytes behind the archive", "cut", GOOD + b"x"),
    (25, "a comment", "cut", archive(USUAL, End(comment=b"hello"))),
    (25, "a comment that ends like an archive", "zip", archive(USUAL, End(comment=GOOD[-22:]))),
    (25, "bytes before the directory", "zip", archive(USUAL, End(between=b"hidden"))),
    (25, "bytes between two entries", "zip", archive(change(USUAL, 1, descriptor=b"hidden"))),
    (25, "ends of directory that disagree", "zip", archive(USUAL, End(wide=(1, 2, 3)))),
    (26, "flag 0x1, encrypted", "zip", archive(change(USUAL, 0, flags=1))),
    (26, "flag 0x20, patched", "zip", archive(change(USUAL, 0, flags=0x20))),
    (26, "flag 0x40, strongly encrypted", "zip", archive(change(USUAL, 2, flags=0x40))),
    (26, "flag 0x8 without a descriptor", "zip", archive(change(USUAL, 2, flags=8))),
    (27, "two names for one entry", "zip", archive(change(USUAL, 0, local=b"archive/data.pk1"))),
    (28, "an entry ../x", "zip", archive([*USUAL, Part(b"archive/../../x", b"x")])),
    (28, "an absolute entry", "zip", archive([*USUAL, Part(b"/etc/passwd", b"x")])),
    (28, "a Windows path", "zip", archive([*USUAL, Part(b"archive\\x", b"x")])),
    (28, "NUL in the name of an entry", "zip", archive([*USUAL, Part(b"archive/x\0y", b"x")])),
    (28, "a name that is not UTF-8", "zip", archive([*USUAL, Part(b"archive/\xff", b"x")])),
    (28, "an empty name", "zip", archive([*USUAL, Part(b"", b"x")])),
    (28, "a symbolic link", "zip", archive(change(USUAL, 2, mode=stat.S_IFLNK | 0o777))),
    (28, "a folder", "zip", archive([*USUAL, Part(b"archive/data/")])),
    (28, "an entry that torch.save does not know", "zip", archive([*USUAL, Part(b"archive/run.py", b"x")])),
    (28, "65,536 entries", "zip", lambda: crowd(65_536)),
    (28, "2^40 entries that are not there", "zip", archive(USUAL, End(wide=(2**40, 2**50, 0)))),
    (29, "no data.pkl", "kind", archive(USUAL[1:])),
    (29, "data.pkl without a folder", "kind", zipped("data.pkl")),
    (29, "an empty data.pkl", "budget", file(b"")),
    (29, "missing data/0", "storage", file({"w": tensor()}, {})),
    (29, "short data/0", "storage", file({"w": tensor()}, {"0": bytes(15)})),
    (29, "long data/0", "storage", file({"w": tensor()}, {"0": bytes(20)})),
    (29, "a storage key that is a path", "storage", file({"w": tensor(source=storage("../0"))})),
    (29, "big byte order", "byteorder", archive(change(USUAL, 1, body=b"big"))),
    (29, "unknown byte order", "byteorder", archive(change(USUAL, 1, body=b"middle"))),
    (30, "TorchScript", "kind", zipped("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl")),
    (30, "torch.package", "kind", zipped("m/.data/version", "m/.data/extern_modules", "m/model/x.pkl")),
    (30, "torch.export", "kind", zipped("m/archive_format", "m/models/model.json", "m/version")),
    (30, "tar", "kind", tarred),
    (30, "7z", "kind", b"7z\xbc\xaf\x27\x1c" + bytes(100)),
    (30, "gzip", "kind", b"\x1f\x8b\x08" + bytes(100)),
    (30, "a ZIP archive around a checkpoint", "kind", zipped("model/x.ckpt")),
    (32, "a safetensors file", "kind", safetensors),
    (32, "a GGUF file", "kind", b"GGUF" + struct.pack("<IQQ", 3, 0, 0)),
    (32, "a PNG image", "kind", b"\x89PNG\r\n\x1a\n" + bytes(100)),
    (32, "a web page", "kind", b"\n<!DOCTYPE html><html><body>404</body></html>"),
    (32, "a Git LFS pointer", "kind", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
    (32, "JSON", "kind", b'{"weight_map": {}}'),
    (32, "an empty file", "kind", b""),
    (32, "zeros", "kind", bytes(1000)),
]  # fmt: skip
