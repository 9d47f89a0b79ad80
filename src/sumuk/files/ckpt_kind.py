"""What a file is that was given as a PyTorch file and is none, told by its first bytes or the names in its archive."""

from __future__ import annotations

from collections.abc import Iterable

_FIRST: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GGUF", "a GGUF file; give it the ending .gguf"),
    (0, b"\x89PNG", "a PNG image; if it carries an embedding, give it the ending .png"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"RIFF", "a WebP image or other RIFF file"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the weights; run: git lfs pull"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes; it holds no PyTorch weights"),
    (0, b"MZ", "a Windows program"),
    (0, b"\x7fELF", "a program"),
    (0, b"%PDF", "a PDF document"),
    (257, b"ustar", "a tar archive, as PyTorch wrote before 0.2; save it again with a newer PyTorch"),
)
LOOK = 512
"""Bytes from the beginning that tell."""


def kind_of(first: bytes, size: int) -> str:
    """A few words on a file that is neither ZIP nor pickle; ``first`` are its first :data:`LOOK` bytes."""
    if not size:
        return "an empty file; fetch it again"
    for at, magic, words in _FIRST:
        if first[at : at + len(magic)] == magic:
            return words
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= size - 8:
        return "a safetensors file; give it the ending .safetensors"
    text = first.lstrip()[:1]
    if text == b"<":
        return "a web page, perhaps an error message that was saved in place of the weights; fetch it again"
    if text in (b"{", b"["):
        return "a JSON file"
    if not any(first):
        return "nothing but zeros at its beginning; fetch it again"
    return f"no file of PyTorch; it begins with {first[:8]!r}"


def archive_of(names: Iterable[str]) -> str:
    """A few words on a ZIP archive that is no file of torch.save; "" if its names do not tell."""
    names = list(names)
    below = [name.partition("/")[2] for name in names]
    if "constants.pkl" in below or any(name.startswith("code/") for name in below):
        return "a TorchScript program, which is code; save the state_dict() of the model instead"
    if "archive_format" in below or any(
        name.endswith(".pt2") or name.startswith("models/") for name in below
    ):
        return "a program from torch.export (.pt2), which is code; save the state_dict() of the model instead"
    if ".data/extern_modules" in below or ".data/python_version" in below:
        return "a torch.package archive, which is code; save the state_dict() of the model instead"
    if "[Content_Types].xml" in names or "META-INF/MANIFEST.MF" in names:
        return "a document or a Java archive"
    if any(name.endswith(".npy") for name in names):
        return "a numpy archive (.npz)"
    pickles = [name for name in below if name == "data.pkl"]
    inner = [name for name in names if name.endswith((".ckpt", ".pt", ".pth", ".bin", ".safetensors"))]
    if not pickles and inner:
        return f"a ZIP archive around {inner[0]!r:.80}; unpack it first"
    return "" if pickles else "a ZIP archive without data.pkl, so none of torch.save"
