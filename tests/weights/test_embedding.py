"""Embeddings in files of every kind, A1111's pictures by its own arithmetic, and what must be refused."""

from __future__ import annotations

import base64
import json
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.zoo import KINDS
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import write
from sumuk.weights import embedding_picture
from sumuk.weights.embedding import Embedding, read_embedding, write_embedding

SD1: Any = KINDS["sd1/text-to-image"]
SD2: Any = KINDS["sd2/text-to-image"]
XL: Any = KINDS["sdxl/base"]
REFINER: Any = KINDS["sdxl/refiner"]
SD3: Any = KINDS["sd3/medium"]
FLUX: Any = KINDS["flux/dev"]
W1, W2, WXL = {"text": 768}, {"text": 1024}, {"text": 768, "text_2": 1280}
W3, WFLUX = {"text": 768, "text_2": 1280, "text_3": 4096}, {"text": 768, "text_2": 4096}


def rows(count: int = 2, width: int = 768, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def a1111(vectors: Tensor, **more: Any) -> dict[str, Any]:
    usual = {"string_to_token": {"*": 265}, "name": "inside", "step": 700, "sd_checkpoint_name": "sd-v1-5"}
    return usual | {"string_to_param": {"*": vectors}} | more


def stored(path: Path, content: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    if path.suffix == ".safetensors":
        write(path, content, metadata)
    else:
        torch.save(content, path)
    return path


# -- kinds of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["half", "parameter", "dictionary", "tokens", "legacy"])
def test_files_of_a1111(tmp_path, kind):
    vectors = rows(3).half() if kind == "half" else rows(3)
    content = a1111(torch.nn.Parameter(vectors) if kind == "parameter" else vectors)
    if kind == "dictionary":  # torch 1.11, and the first implementation
        content["string_to_param"] = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    if kind == "tokens":
        content["string_to_token"] = {"*": torch.tensor(265)}
    path = tmp_path / "ink wash.pt"
    torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    found = read_embedding(path, SD1, W1)
    assert torch.equal(found.vectors["text"], vectors.float())
    assert found.vectors["text"].dtype == torch.float32
    assert not found.vectors["text"].requires_grad
    assert (found.name, found.count, found.step, found.model, found.path) == (
        "ink wash",
        3,
        700,
        "sd-v1-5",
        path,
    )
    assert found.metadata["name"] == "inside"
    assert read_embedding(path, SD1, W1, "other").name == "other"


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
@pytest.mark.parametrize(("key", "shape"), [("emb_params", (2, 768)), ("<ink>", (768,)), ("<a.b>", (1, 768))])
def test_one_table_under_any_name(tmp_path, suffix, key, shape):
    vectors = rows()[: shape[0] if len(shape) == 2 else 1].reshape(shape)
    found = read_embedding(stored(tmp_path / f"ink.{suffix}", {key: vectors}), SD1, W1)
    assert torch.equal(found.vectors["text"], vectors.reshape(-1, 768))
    assert found.metadata.get("token") == (None if key == "emb_params" else key)


def test_what_kohya_says(tmp_path):
    said = {"ss_steps": "1500", "ss_sd_model_name": "sd-v1-5.safetensors", "ss_network_module": "x"}
    found = read_embedding(stored(tmp_path / "ink.safetensors", {"emb_params": rows()}, said), SD1, W1)
    assert (found.step, found.model) == (1500, "sd-v1-5.safetensors")
    assert found.metadata == said


def test_a_table_for_each_tower(tmp_path):
    first, second, third = rows(2, 768), rows(2, 1280, 1), rows(2, 4096, 2)
    for suffix in ("safetensors", "pt"):
        path = stored(tmp_path / f"pair.{suffix}", {"clip_g": second, "clip_l": first})
        found = read_embedding(path, XL, WXL)
        assert torch.equal(found.vectors["text"], first)
        assert torch.equal(found.vectors["text_2"], second)
        assert read_embedding(path, REFINER, {"text_2": 1280}).vectors.keys() == {"text_2"}
        assert read_embedding(path, SD3, W3).vectors.keys() == {"text", "text_2"}
    path = stored(tmp_path / "three.safetensors", {"clip_g": second, "clip_l": first, "t5xxl": third})
    assert torch.equal(read_embedding(path, SD3, W3).vectors["text_3"], third)
    without = {part: width for part, width in W3.items() if part != "text_3"}
    assert read_embedding(path, SD3, without).vectors.keys() == {"text", "text_2"}
    path = stored(tmp_path / "flux.safetensors", {"clip_l": first, "t5xxl": third})
    assert torch.equal(read_embedding(path, FLUX, WFLUX).vectors["text_2"], third)
    path = stored(tmp_path / "single.safetensors", {"emb_params": first})
    assert read_embedding(path, FLUX, WFLUX).vectors.keys() == {"text"}
    path = stored(tmp_path / "h.safetensors", {"clip_h": rows(2, 1024)})
    assert read_embedding(path, SD2, W2).vectors.keys() == {"text"}


@pytest.mark.parametrize(
    ("family", "widths", "layout", "names"),
    [
        (SD1, W1, "a1111", {"emb_params"}),
        (SD1, W1, "diffusers", {"<ink>"}),
        (SD2, W2, "a1111", {"emb_params"}),
        (XL, WXL, "a1111", {"clip_l", "clip_g"}),
        (SD3, W3, "a1111", {"clip_l", "clip_g", "t5xxl"}),
        (FLUX, WFLUX, "a1111", {"clip_l", "t5xxl"}),
        (FLUX, {"text": 768}, "a1111", {"emb_params"}),
    ],
)
def test_written_and_read_again(tmp_path, family, widths, layout, names):
    vectors = {part: rows(3, width, width) for part, width in widths.items()}
    made = Embedding("ink", vectors, step=12, model="sd", metadata={"token": "<ink>", "note": "x"})
    write_embedding(made, tmp_path / "ink.safetensors", family, layout)
    header = read_header(tmp_path / "ink.safetensors")
    assert header.tensors.keys() == names
    found = read_embedding(tmp_path / "ink.safetensors", family, widths)
    assert found.vectors.keys() == vectors.keys()
    assert all(torch.equal(found.vectors[part], vectors[part]) for part in vectors)
    assert (found.name, found.step, found.model) == ("ink", 12, "sd")
    assert found.metadata["note"] == "x"
    first = (tmp_path / "ink.safetensors").read_bytes()
    write_embedding(made, tmp_path / "ink.safetensors", family, layout)
    assert (tmp_path / "ink.safetensors").read_bytes() == first


def test_what_cannot_be_written(tmp_path):
    made, pair = (
        Embedding("ink", {"text": rows()}),
        Embedding("ink", {"text": rows(), "text_2": rows(2, 1280)}),
    )
    path = tmp_path / "ink.safetensors"
    with pytest.raises(BadInput, match="unknown layout 'a111' of embeddings; did you mean 'a1111'"):
        write_embedding(made, path, SD1, "a111")
    with pytest.raises(BadInput, match=r"as .safetensors files, not '.*ink.pt'"):
        write_embedding(made, tmp_path / "ink.pt", SD1)
    with pytest.raises(BadInput, match=r"vectors for 'text_2', which Stable Diffusion 1\.x does not have"):
        write_embedding(pair, path, SD1)
    with pytest.raises(BadInput, match="of 2 towers in as many files; write it as 'a1111'"):
        write_embedding(pair, path, XL, "diffusers")
    for name in ("", " ", "a\nb", "x" * 201):
        with pytest.raises(BadInput, match="cannot name an embedding"):
            Embedding(name, {"text": rows()})
    for vectors in (
        {},
        {"text": rows()[0]},
        {"text": rows(129)},
        {"text": rows(0)},
        {"a": rows(2), "b": rows(3)},
    ):
        with pytest.raises(BadInput, match=r"needs tables \[n, width\] of one n, 1 to 128"):
            Embedding("ink", vectors)
    assert not path.exists()


# -- pictures --------------------------------------------------------------------------------------------------------


def as_json(content: dict[str, Any]) -> bytes:
    def tensor(value: Tensor) -> dict[str, Any]:
        return {"TORCHTENSOR": value.detach().numpy().tolist()}

    return json.dumps(content, default=tensor).encode()


def picture() -> Image.Image:
    across = np.linspace(30, 250, 96)
    red, green = np.meshgrid(across, np.linspace(30, 250, 80))
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1).astype(np.uint8))


def with_text(path: Path, text: bytes | str, **more: Any) -> Path:
    info = PngInfo()
    info.add_text(embedding_picture.CHUNK, text, **more)
    picture().save(path, pnginfo=info)
    return path


def with_noise(path: Path, document: bytes, **how: Any) -> Path:
    """A1111's way: halves of bytes, repeated to full columns, patterned in the high bits, xored, black columns."""

    def lcg() -> Any:
        state = 0
        while True:
            state = (1664525 * state + 1013904223) % 2**32
            yield state % 255

    image, content = picture(), np.frombuffer(zlib.compress(document, 9), np.uint8)
    height = image.height
    size = len(content) + height - len(content) % height
    size += 3 * height - size % (3 * height)
    blocks = []
    for half, shade in ((content & 15, 200), (content >> 4, 90)):
        block = np.resize(half, size).reshape(height, -1, 3)
        pattern = Image.new("RGB", (block.shape[1], height))
        ImageDraw.Draw(pattern).ellipse((-6, -6, 60, 60), fill=(shade,) * 3)
        block = block ^ (np.asarray(pattern) & 0xF0)
        mask = np.array(list(islice(lcg(), block.size))).astype(np.uint8).reshape(block.shape)
        blocks.append(Image.fromarray(block ^ (mask & 0x0F)))
    low, high = blocks
    whole = Image.new("RGB", (image.width + low.width + high.width + 2, height))
    whole.paste(low, (0, 0))
    whole.paste(image, (low.width + 1, 0))
    whole.paste(high, (low.width + image.width + 2, 0))
    whole.save(path, **how)
    return path


def test_the_noise_is_a1111s():
    """Its own first numbers (mod 16), and their sum after the first hundred."""
    assert embedding_picture.noise(13).tolist() == [
        each & 15 for each in (253, 242, 127, 44, 157, 27, 239, 133, 38, 79, 167, 4, 177)
    ]
    assert len(embedding_picture.noise(100_100)) == 100_100

    state, slow = 0, []
    for _ in range(5000):
        state = (1664525 * state + 1013904223) % 2**32
        slow.append(state % 255 & 15)
    assert embedding_picture.noise(5000).tolist() == slow


@pytest.mark.parametrize("how", ["text", "compressed text", "pixels", "webp"])
def test_embeddings_in_pictures(tmp_path, how):
    vectors = rows(8)
    document = as_json(a1111(vectors))
    if how in ("text", "compressed text"):
        path = with_text(tmp_path / "ink.png", base64.b64encode(document), zip=how != "text")
    elif how == "pixels":
        path = with_noise(tmp_path / "ink.png", document)
    else:
        path = with_noise(tmp_path / "ink.webp", document, lossless=True, exact=True)
    found = read_embedding(path, SD1, W1)
    assert torch.equal(found.vectors["text"], vectors)
    assert (found.name, found.step, found.model) == ("ink", 700, "sd-v1-5")


def refused(path: Path) -> str:
    with pytest.raises(BadFile) as caught:
        read_embedding(path, SD1, W1)
    line = str(caught.value)
    assert caught.value.code == "embedding.picture", line
    assert line.startswith(str(path)) and "\n" not in line and len(line) < 400
    return line


def test_hostile_pictures(tmp_path, monkeypatch):
    path = tmp_path / "ink.png"
    picture().save(path)
    assert "hides no embedding, neither as a text" in refused(path)
    Image.new("RGB", (64, 64)).save(path)
    assert "is black" in refused(path)
    barred = np.asarray(picture()).copy()
    barred[:, 20], barred[:, 70] = 0, 0
    Image.fromarray(barred).save(path)
    assert "no block of noise of one size" in refused(path)
    barred = np.random.default_rng(0).integers(1, 256, (40, 62, 3), np.uint8)
    barred[:, 20], barred[:, 41] = 0, 0
    Image.fromarray(barred).save(path)
    assert "in its pixels, or was saved with loss" in refused(path)
    assert "hides more than 2,500,000 characters" in refused(with_noise(path, b"0" * 30_000_000))
    assert "more than 3,333,333 characters" in refused(with_text(path, "A" * 6_000_000))
    for many in (b'{"a":' * 100_000, b"[" * 100_000):
        assert "hides 100,000 lists or tables, above 1,000" in refused(
            with_text(path, base64.b64encode(many))
        )
    deep = base64.b64encode(b'{"a":' * 1000)
    assert "hides something that is no embedding" in refused(with_text(path, deep))
    for document in (b"[1]", b"7"):
        assert "not the table of an embedding" in refused(with_text(path, base64.b64encode(document)))
    for inner in ("[[1, 2], [3]]", '"x"', "[[[[" * 20 + "]]]]" * 20, '{"a": 1}', "[1e400, null]"):
        document = f'{{"string_to_param": {{"*": {{"TORCHTENSOR": {inner}}}}}}}'.encode()
        with_text(path, base64.b64encode(document))
        with pytest.raises(BadFile, match=r"ink\.png"):
            read_embedding(path, SD1, W1)
    assert "is no base64" in refused(with_text(path, "AAA"))
    large = Image.new("RGB", (3000, 1500), (9, 9, 9))
    large.save(path)
    assert "3000 x 1500 pixels, above 2,500,000" in refused(path)
    path.write_bytes(path.read_bytes()[:200])
    assert "pixels" in refused(path) or "decoded" in refused(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    assert "cannot be decoded" in refused(path)
    monkeypatch.setattr(embedding_picture, "MOST_BYTES", 400)
    assert "has 508 bytes, above 400" in refused(path)


# -- what must be refused --------------------------------------------------------------------------------------------

PAIR = {"clip_l": rows(), "clip_g": rows(2, 1280)}
NAN = torch.full((3, 768), float("nan")).index_fill(0, torch.tensor([0]), 0.0)
WRONG: dict[str, tuple[dict[str, Any], Any, dict[str, int], str, str]] = {
    "width": (
        {"emb_params": rows()}, SD2, W2, "width",
        "is 768 wide, made for Stable Diffusion 1 or .*; the tower of this Stable Diffusion 2.* is 1024 wide",
    ),
    "odd width": ({"emb_params": rows(2, 700)}, SD1, W1, "width", "is 700 wide; the tower"),
    "many": ({"emb_params": torch.zeros(129, 768)}, SD1, W1, "count", "129 vectors, not 1 to 128"),
    "none": ({"emb_params": torch.zeros(0, 768)}, SD1, W1, "count", "0 vectors"),
    "nan": ({"emb_params": NAN}, SD1, W1, "numbers", "vector 2 of 'emb_params' holds NaN"),
    "overflow": (
        {"emb_params": torch.full((1, 768), 1e300, dtype=torch.float64)}, SD1, W1, "numbers", "vector 1 of",
    ),
    "whole numbers": ({"emb_params": torch.zeros(2, 768, dtype=torch.int32)}, SD1, W1, "shape", "is I32"),
    "scalar": ({"emb_params": torch.zeros(())}, SD1, W1, "shape", r"is F32 \[\]"),
    "flat": ({"emb_params": torch.zeros(1, 1, 768)}, SD1, W1, "shape", r"F32 \[1, 1, 768\]"),
    "two tables": ({"a": rows(), "b": rows()}, SD1, W1, "tensors", "holds 2 tables"),
    "two terms": ({"string_to_param.a": rows(), "string_to_param.b": rows()}, SD1, W1, "tensors", "holds 2 tables"),
    "nothing": ({}, SD1, W1, "tensors", "holds no tensor"),
    "pair for one": (
        PAIR, SD1, W1, "towers", "a table 'clip_g', 1280 wide; Stable Diffusion 1.x takes 'clip_l', 768 wide",
    ),
    "one for a pair": (
        {"emb_params": rows()}, XL, WXL, "towers",
        "a table 'emb_params', 768 wide; SDXL takes 'clip_l', 768 wide and 'clip_g', 1280 wide",
    ),
    "half a pair": ({"clip_g": rows(2, 1280)}, XL, WXL, "towers", "has no table 'clip_l'"),
    "swapped": ({"clip_l": rows(2, 1280), "clip_g": rows()}, XL, WXL, "width", "'clip_l' is 1280 wide"),
    "uneven": (
        {"clip_l": rows(2), "clip_g": rows(3, 1280)}, XL, WXL, "count", "has 2 for text, 3 for text_2",
    ),
    "t5 alone": ({"t5xxl": rows(2, 4096)}, FLUX, WFLUX, "towers", "has no table 'clip_l'"),
    "no tower": ({"emb_params": rows()}, KINDS["dit/class-conditional"], {}, "towers", "no text tower that takes"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(tmp_path, what):
    content, family, widths, code, says = WRONG[what]
    path = stored(tmp_path / "ink.safetensors", content)
    with pytest.raises(BadFile, match=says) as caught:
        read_embedding(path, family, widths)
    assert caught.value.code == f"embedding.{code}"
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_hundred_thousand_vectors_are_never_read(tmp_path):
    """A header and a hole of 300 megabytes."""
    path = tmp_path / "ink.safetensors"
    size = 100_000 * 768 * 4
    header = json.dumps({"emb_params": {"dtype": "F32", "shape": [100_000, 768], "data_offsets": [0, size]}})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)
    with pytest.raises(BadFile, match="has 100,000 vectors, not 1 to 128") as caught:
        read_embedding(path, SD1, W1)
    assert caught.value.code == "embedding.count"


def test_other_files(tmp_path):
    with pytest.raises(MissingFile):
        read_embedding(tmp_path / "none.pt", SD1, W1)
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(BadFile, match=r"x\.pt") as caught:
        read_embedding(tmp_path / "x.pt", SD1, W1)
    assert caught.value.code.startswith("ckpt.")
