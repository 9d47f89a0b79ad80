"""Mutated LoRAs and embeddings without end, for the tiny Stable Diffusion 1: only our own errors may come out.

Headers are damaged as those of all safetensors files; besides, factors get the names, shapes and numbers of others.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from tests.hostile.fuzz_safetensors import Fields, described
from tests.hostile.fuzz_safetensors import mutations as damaged

from sumuk.base.errors import BadFile, MissingFile
from sumuk.weights.embedding import read_embedding
from sumuk.weights.lora import read_lora

SECONDS = 2.0
LAYERS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (32, 64),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (32, 32),
    "lora_unet_down_blocks_0_resnets_0_conv1": (32, 32, 3, 3),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (128, 64),
    "unet.mid_block.attentions.0.proj_in": (64, 64, 1, 1),
    "lora_unet_nowhere": (8, 8),
}
"""Layers of the tiny model, and the shapes of their weights."""
METHODS = (
    ("lora_down.weight", "lora_up.weight", "alpha"), ("lora_down.weight", "lora_up.weight", "dora_scale"),
    ("lora_A.weight", "lora_B.weight"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    ("lokr_w1", "lokr_w2"), ("lokr_w1_a", "lokr_w1_b", "lokr_w2"), ("diff", "diff_b"), ("set_weight",),
    ("oft_blocks", "alpha"), ("weight", "on_input"), ("w_norm", "b_norm"),
    ("lora_down.weight", "lora_up.weight", "reshape_weight"),
    ("lora_down.weight", "lora_up.weight", "bias_indices", "bias_values", "bias_size"),
    ("lora_down.weight", "lora_mid.weight", "lora_up.weight"),
)  # fmt: skip
NUMBERS = (0.0, 0.5, -1.0, 3e38, 1e-40, float("nan"), float("inf"))
OTHERS = {"F32": ("I32", "U32"), "F16": ("BF16", "I16", "U16"), "I64": ("F64", "U64", "C64")}
"""Types of the same width."""
TABLES = ("emb_params", "clip_l", "clip_g", "t5xxl", "<word>", "string_to_param.*")


def _shape(rng: random.Random, factor: str, shape: tuple[int, ...]) -> list[int]:
    """That of a factor, mostly right."""
    rows, columns, *kernel = shape
    rank = 2
    known: dict[str, list[int]] = {
        "lora_down.weight": [rank, columns, *kernel], "lora_A.weight": [rank, columns, *kernel],
        "lora_up.weight": [rows, rank, *(1 for _ in kernel)], "lora_B.weight": [rows, rank, *(1 for _ in kernel)],
        "alpha": [], "dora_scale": [rows, 1], "hada_w1_a": [rows, rank], "hada_w2_a": [rows, rank],
        "hada_w1_b": [rank, columns], "hada_w2_b": [rank, columns], "lokr_w1": [4, 4], "lokr_w1_a": [4, rank],
        "lokr_w1_b": [rank, 4], "lokr_w2": [rows // 4, columns // 4, *kernel], "diff": list(shape), "diff_b": [rows],
        "set_weight": list(shape), "oft_blocks": [4, rows // 4, rows // 4], "weight": [columns], "on_input": [1],
        "w_norm": [rows], "b_norm": [rows], "reshape_weight": [len(shape)], "bias_indices": [len(shape), 2],
        "bias_values": [2], "bias_size": [len(shape)], "lora_mid.weight": [rank, rank, *kernel],
    }  # fmt: skip
    if rng.random() < 0.9:
        return known[factor]
    return rng.choice(([], [0], [1], [rows], [columns, rows], [rows, columns], [2, 2, 2], list(shape)))


def _data(rng: random.Random, factor: str, dtype: str, shape: list[int]) -> bytes:
    count = prod(shape)
    if dtype == "I64":
        values = [rng.choice((0, 1, 32, 64, 128, 2**40, -1)) for _ in range(count)]
        return struct.pack(f"<{count}q", *values)
    letter = {"F32": "f", "F16": "e"}[dtype]
    value = rng.choice(NUMBERS) if rng.random() < 0.1 or factor == "alpha" else 0.25
    value = value if letter == "f" or abs(value) < 6e4 else 1.0
    return struct.pack(f"<{letter}", value) * count


def _lora(rng: random.Random) -> tuple[Fields, bytes]:
    entries: Fields = []
    data = b""
    for layer in rng.sample(list(LAYERS), rng.randint(1, 3)):
        for factor in rng.choice(METHODS):
            whole = factor in ("reshape_weight", "bias_indices", "bias_size")
            dtype = (
                "I64" if whole else rng.choice(("F32", "F32", "F16", "I64" if rng.random() < 0.1 else "F32"))
            )
            shape = _shape(rng, factor, LAYERS[layer])
            own = _data(rng, factor, dtype, shape)
            if rng.random() < 0.05:
                dtype = rng.choice(OTHERS[dtype])
            entries.append((f"{layer}.{factor}", described(dtype, shape, len(data), len(own))))
            data += own
    return entries, data


def _embedding(rng: random.Random) -> tuple[Fields, bytes]:
    entries: Fields = []
    data = b""
    for name in rng.sample(TABLES, rng.choice((1, 1, 1, 2))):
        dtype = rng.choice(("F32", "F16"))
        shape = rng.choice(([2, 64], [64], [1, 64], [0, 64], [2, 63], [200, 64], [1, 1, 64]))
        own = _data(rng, name, dtype, shape)
        entries.append((name, described(dtype, shape, len(data), len(own))))
        data += own
    return entries, data


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """So many files, two LoRAs and an embedding by turns."""
    loras, words = damaged(seed, count, _lora), damaged(seed + 1, count, _embedding)
    for at in range(count):
        yield next(words if at % 3 == 2 else loras)


@cache
def _model() -> tuple[Any, dict[str, tuple[int, ...]]]:
    from examples import zoo

    model = zoo.tiny("sd1/text-to-image")
    native = {
        f"{part}.{name}": tuple(value.shape)
        for part, network in model.networks.items()
        for name, value in network.state_dict().items()
    }
    return model.family, native


def check(data: bytes, folder: Path) -> None:
    """One file, as a LoRA with all that it changes and as an embedding; or refused by one of our errors, in time."""
    import torch

    path = folder / "fuzz.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    family, native = _model()
    began = time.perf_counter()
    try:
        if b"lora_" in data[:4000]:
            for patch in read_lora(path, family, native).patches:
                shape = patch.change.shape
                assert tuple(patch.change.delta(torch.ones(shape)).shape) == patch.change.result
        else:
            assert read_embedding(path, family, {"text": 64}).vectors["text"].shape[1] == 64
    except (BadFile, MissingFile) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    assert time.perf_counter() - began < SECONDS
