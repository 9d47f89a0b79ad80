"""LoRAs and embeddings whose format is right and whose meaning is hostile: numbers 68 and 69 of the list."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tests.hostile import pickle_files
from tests.hostile.case import Case
from tests.hostile.safetensors_cases import raw

WIDTHS = {"C64": 8, "F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Scene(Case):
    """A case that is opened by a reader of its own.

    Attributes:
        reader: a name in ``tests.hostile.worker.READERS``.
    """

    reader: str = "open"


Stored = tuple[str, tuple[int, ...], bytes | None]
"""Type, shape and bytes of a tensor; None: zeros that take no disk."""


def numbers(*values: float, shape: tuple[int, ...] | None = None) -> Stored:
    return "F32", (len(values),) if shape is None else shape, struct.pack(f"<{len(values)}f", *values)


def zeros(*shape: int, dtype: str = "F32") -> Stored:
    return dtype, shape, None


def ones(*shape: int) -> Stored:
    return numbers(*[0.5] * prod(shape), shape=shape)


def write(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file, sparse where nothing is said of its bytes."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, _) in tensors.items():
        size = prod(shape) * WIDTHS[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = raw(json.dumps(table).encode())
    with path.open("wb") as file:
        file.write(head)
        for name, (_, _, data) in tensors.items():
            file.seek(len(head) + table[name]["data_offsets"][0])
            file.write(data or b"")
        file.truncate(len(head) + at)
    return path


# -- 68: LoRAs for the tiny Stable Diffusion 1 of the zoo --------------------------------------------------------------

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
"""A layer whose weight is [32, 64]."""
DOWN, UP, ALPHA = f"{KEY}.lora_down.weight", f"{KEY}.lora_up.weight", f"{KEY}.alpha"
PAIR = {DOWN: ones(2, 64), UP: ones(32, 2)}


def alpha(*values: float, shape: tuple[int, ...] = ()) -> dict[str, Stored]:
    return PAIR | {ALPHA: numbers(*values, shape=shape)}


def of(**factors: Stored) -> dict[str, Stored]:
    """Factors of the layer; ``__`` stands for a dot."""
    return {f"{KEY}.{name.replace('__', '.')}": one for name, one in factors.items()}


def peft(config: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": config if isinstance(config, str) else json.dumps(config)}


def changed(name: str, value: Stored) -> dict[str, Stored]:
    return PAIR | {name: value}


LORAS: tuple[tuple[str, str, dict[str, Stored], dict[str, str] | None], ...] = (
    ("rank 2^20", "lora.rank", {DOWN: zeros(2**20, 64, dtype="F16"), UP: zeros(32, 2**20, dtype="F16")}, None),
    ("rank 0", "lora.", {DOWN: zeros(0, 64), UP: zeros(32, 0)}, None),
    ("up and down of two ranks", "lora.", changed(UP, ones(32, 3)), None),
    ("down for another width", "lora.", changed(DOWN, ones(2, 63)), None),
    ("up of another height", "lora.", changed(UP, ones(31, 2)), None),
    ("a scalar for a factor", "lora.", changed(UP, numbers(1.0, shape=())), None),
    ("down alone", "lora.half", {DOWN: ones(2, 64)}, None),
    ("up alone", "lora.half", {UP: ones(32, 2)}, None),
    ("alpha alone", "lora.", {ALPHA: numbers(1.0)}, None),
    ("alpha NaN", "lora.alpha", alpha(NAN), None),
    ("alpha infinite", "lora.alpha", alpha(INF), None),
    ("alpha 0", "lora.alpha", alpha(0.0), None),
    ("alpha of two numbers", "lora.alpha", alpha(1.0, 2.0, shape=(2,)), None),
    ("alpha of none", "lora.alpha", PAIR | {ALPHA: zeros(0)}, None),
    ("a factor with NaN", "lora.", changed(UP, numbers(*[NAN] * 64, shape=(32, 2))), None),
    ("a factor with infinity", "lora.", changed(DOWN, numbers(INF, *[0.0] * 127, shape=(2, 64))), None),
    ("factors of whole numbers", "lora.type", {DOWN: zeros(2, 64, dtype="I32"), UP: zeros(32, 2, dtype="I32")}, None),
    ("factors of zero", "lora.zero", {DOWN: zeros(2, 64), UP: zeros(32, 2)}, None),
    ("one factor in two spellings", "lora.twice", PAIR | {f"{KEY}.lora_A.weight": ones(2, 64)}, None),
    ("two methods at once", "lora.", PAIR | of(diff=ones(32, 64)), None),
    ("a factor that nobody knows", "lora.", PAIR | of(evil=ones(1)), None),
    ("a Kronecker product of 2^20 rows", "lora.",
     of(lokr_w1=zeros(2**10, 2**4, dtype="F16"), lokr_w2=zeros(2**10, 2**4, dtype="F16")), None),
    ("a core that is too large", "lora.",
     PAIR | of(lora_mid__weight=zeros(2**10, 2**10, 8, 8, dtype="F16")), None),
    ("reshape_weight to 2^24 rows", "lora.",
     {DOWN: ones(1, 64), UP: zeros(2**24, 1, dtype="F16"),
      f"{KEY}.reshape_weight": ("I64", (2,), struct.pack("<2q", 2**24, 64))}, None),
    ("sparse places outside", "lora.",
     PAIR | of(bias_indices=("I64", (2, 1), struct.pack("<2q", 2**40, 0)), bias_values=numbers(1.0),
               bias_size=("I64", (2,), struct.pack("<2q", 32, 64))), None),
    ("sparse places that are NaN", "lora.",
     PAIR | of(bias_indices=numbers(NAN, NAN, shape=(2, 1)), bias_values=ones(1), bias_size=numbers(32, 64)), None),
    ("a shape of NaN", "lora.", PAIR | of(reshape_weight=numbers(NAN, INF)), None),
    ("alpha that is complex", "lora.", PAIR | {ALPHA: ("C64", (), struct.pack("<2f", 1.0, 1.0))}, None),
    ("layers of another model", "lora.family",
     {DOWN.replace("down_blocks_0", "down_blocks_9"): ones(2, 64),
      UP.replace("down_blocks_0", "down_blocks_9"): ones(32, 2)}, None),
    ("no LoRA at all", "lora.none", {"weight": ones(3)}, None),
    ("30,000 layers", "lora.",
     {f"lora_unet_{at}.lora_down.weight": zeros(0, 1) for at in range(30_000)}, None),
    ("configuration that is no JSON", "lora.config", PAIR, peft("{")),
    ("configuration 100,000 deep", "lora.config", PAIR, peft("[" * 100_000)),
    ("configuration that is a list", "lora.config", PAIR, peft([])),
    ("alpha 10^400 in the configuration", "lora.config", PAIR, peft({"lora_alpha": 10**400})),
    ("alpha NaN in the configuration", "lora.config", PAIR, peft('{"lora_alpha": NaN}')),
    ("alpha_pattern that backtracks", "lora.config", PAIR, peft({"alpha_pattern": {"(a+)+$": 1}})),
    ("alpha_pattern that is a text", "lora.config", PAIR, peft({"alpha_pattern": "os.system"})),
)  # fmt: skip
"""Name, code, tensors, metadata."""

# -- 69: embeddings for Stable Diffusion 1 -----------------------------------------------------------------------------


def rows(count: int, width: int = 768) -> dict[str, Stored]:
    return {"emb_params": zeros(count, width, dtype="F16")}


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A picture whose header says so, without pixels."""
    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(bytes(10))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def hidden(document: bytes) -> bytes:
    return png(8, 8, (b"tEXt", b"sd-ti-embedding\0" + base64.b64encode(document)))


def text_bomb() -> bytes:
    packed = zlib.compress(bytes(200 * 2**20), 9)
    return png(8, 8, (b"zTXt", b"sd-ti-embedding\0\0" + packed))


def embedded(vectors: pickle_files.Ops) -> bytes:
    return pickle_files.file({"string_to_param": {"*": vectors}, "name": "x"})


EMBEDDINGS: tuple[tuple[str, str, str, dict[str, Stored] | bytes | Callable[[], bytes]], ...] = (
    ("a wrong width", "embedding.width", ".safetensors", rows(2, 1024)),
    ("a width of 2^30", "embedding.width", ".safetensors", rows(1, 2**30)),
    ("100,000 vectors", "embedding.count", ".safetensors", rows(100_000)),
    ("129 vectors", "embedding.count", ".safetensors", rows(129)),
    ("no vectors", "embedding.count", ".safetensors", rows(0)),
    ("NaN", "embedding.numbers", ".safetensors", {"emb_params": numbers(*[0.0] * 767, NAN, shape=(1, 768))}),
    ("whole numbers", "embedding.", ".safetensors", {"emb_params": zeros(1, 768, dtype="I64")}),
    ("a scalar", "embedding.", ".safetensors", {"emb_params": numbers(1.0, shape=())}),
    ("three sides", "embedding.", ".safetensors", {"emb_params": zeros(1, 1, 768)}),
    ("two tables", "embedding.", ".safetensors", {"a": zeros(1, 768), "b": zeros(1, 768)}),
    ("10,000 tables", "embedding.", ".safetensors", {str(at): zeros(0, 768) for at in range(10_000)}),
    ("for SDXL", "embedding.", ".safetensors", {"clip_l": zeros(1, 768), "clip_g": zeros(1, 1280)}),
    ("os.system in place of the vectors", "ckpt.name", ".pt",
     embedded(pickle_files.call("os", "system", "touch hacked"))),
    ("a pickle of another width", "embedding.", ".pt", embedded(pickle_files.tensor())),
    ("a picture of 50,000 x 50,000", "embedding.picture", ".png", png(50_000, 50_000)),
    ("a picture without pixels", "embedding.picture", ".png", png(64, 64)),
    ("a picture cut off", "embedding.picture", ".png", png(64, 64)[:40]),
    ("a text that unpacks to 200 MB", "embedding.picture", ".png", text_bomb),
    ("JSON 100,000 deep in a picture", "embedding.picture", ".png", lambda: hidden(b"[" * 100_000)),
    ("a ragged tensor in a picture", "embedding.picture", ".png",
     hidden(b'{"string_to_param":{"*":{"TORCHTENSOR":[[1],[1,2]]}}}')),
    ("a text for a tensor in a picture", "embedding.picture", ".png",
     hidden(b'{"string_to_param":{"*":{"TORCHTENSOR":"os.system"}}}')),
    ("no base64 in a picture", "embedding.picture", ".png",
     png(8, 8, (b"tEXt", b"sd-ti-embedding\0\xff\xfe*"))),
    ("SVG called PNG", "embedding.picture", ".png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
)  # fmt: skip
"""Name, code, ending, and what."""

# -- both --------------------------------------------------------------------------------------------------------------


def _lora(name: str, code: str, tensors: dict[str, Stored], metadata: dict[str, str] | None) -> Scene:
    def make(folder: Path) -> Path:
        return write(folder / "hostile.safetensors", tensors, metadata)

    return Scene(68, f"LoRA: {name}", code, make, reader="lora")


def _embedding(
    name: str, code: str, ending: str, what: dict[str, Stored] | bytes | Callable[[], bytes]
) -> Scene:
    def make(folder: Path) -> Path:
        path = folder / f"hostile{ending}"
        if isinstance(what, dict):
            return write(path, what)
        path.write_bytes(what() if callable(what) else what)
        return path

    return Scene(69, f"embedding: {name}", code, make, reader="embedding")


CASES: tuple[Scene, ...] = (*(_lora(*one) for one in LORAS), *(_embedding(*one) for one in EMBEDDINGS))
