"""GGUF files: read as the gguf package reads them, with the names and shapes of those who write them."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.hostile import gguf_cases as make
from tests.nets.inventories import inventory

from sumuk.families.detect import Match, detect
from sumuk.files.gguf import BLOCKS, PLAIN, read_gguf
from sumuk.files.tensors import Lazy, Tensors, dtype_name

T5_MAP = {
    "layer.0.SelfAttention.q": "attn_q", "layer.0.SelfAttention.k": "attn_k", "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o", "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm", "layer.1.DenseReluDense.wi_0": "ffn_gate", "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_1": "ffn_up", "layer.1.DenseReluDense.wo": "ffn_down", "shared": "token_embd",
    "encoder.block": "enc.blk", "encoder.final_layer_norm": "enc.output_norm",
}  # fmt: skip


def write(path: Path, architecture: str = "flux"):
    """The package's writer; ``finish`` it."""
    gguf = pytest.importorskip("gguf")
    return gguf.GGUFWriter(path, architecture)


def finish(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(kind: int, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Random blocks with usual scales: float16 below 1."""
    name, width, size = BLOCKS[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, cols // width, size), dtype=np.uint8)
    if name == "Q8_K":
        raw[..., :4] = np.frombuffer(struct.pack("<f", 0.01), np.uint8)
    scales = {"Q2_K": (81, 83), "Q3_K": (109,), "Q6_K": (209,)}.get(name, (1, 3) if name != "Q8_0" else (1,))
    for at in scales if name != "Q8_K" else ():
        raw[..., at] &= 0x3B if at != 3 or name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 0xFF
    return raw.reshape(rows, -1)


def test_plain_types_are_what_was_written(tmp_path: Path) -> None:
    writer = write(tmp_path / "plain.gguf")
    rng = np.random.default_rng(0)
    arrays = {name: (100 * rng.standard_normal((3, 4, 2))).astype(name) for name in
              ("float32", "float16", "float64", "int8", "int16", "int32", "int64")}  # fmt: skip
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    rounded = torch.randn(5, 6).bfloat16()
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor("bfloat16", rounded.view(torch.uint8).numpy(), raw_dtype=kind)
    finish(writer)
    found = read_gguf(tmp_path / "plain.gguf").tensors
    assert {one.dtype for one in found.values()} == {name for name, *_ in PLAIN.values()}
    for name, values in arrays.items():
        one = found[name]
        assert one.packed is None and one.shape == (3, 4, 2) and one.stored == one.dtype
        tensor = one.load()
        assert dtype_name(tensor.dtype) == one.dtype
        np.testing.assert_array_equal(tensor.numpy(), values)
    assert torch.equal(found["bfloat16"].load(), rounded)


@pytest.mark.parametrize("kind", BLOCKS)
def test_quantised_types_load_as_the_package_dequantises(kind: int, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    name = BLOCKS[kind][0]
    stored = blocks(kind, 6, 512)
    writer = write(tmp_path / "quantised.gguf")
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("w", stored, raw_dtype=gguf.GGMLQuantizationType(kind))
    finish(writer)
    one = read_gguf(tmp_path / "quantised.gguf").tensors["w"]
    assert one.shape == (6, 512) and one.dtype == "F32" and one.stored == name
    assert one.packed is not None and one.packed.scheme == name and one.packed.size == stored.nbytes
    held = one.packed.stored()
    assert list(held) == ["blocks"] and np.array_equal(held["blocks"].numpy(), stored)
    tensor = one.load()
    assert (
        tensor.dtype == torch.float32 and tuple(tensor.shape) == one.shape and bool(tensor.isfinite().all())
    )
    if name != "Q8_K":  # the package has no arithmetic for it
        theirs = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(kind))
        np.testing.assert_array_equal(tensor.numpy(), theirs)
    moved = {"blocks": held["blocks"].clone()}
    assert torch.equal(one.packed.expand(moved, torch.bfloat16), tensor.bfloat16())
    assert torch.equal(moved["blocks"], held["blocks"]), "expand changes what is stored"


def test_what_the_header_says(tmp_path: Path) -> None:
    writer = write(tmp_path / "said.gguf", "sdxl")
    writer.add_name("a fox, 여우")
    writer.add_quantization_version(2)
    writer.add_bool("yes", True)
    writer.add_float32("half", 0.5)
    writer.add_int64("low", -(2**40))
    writer.add_array("sizes", [1, 2, 3])
    writer.add_array("words", ["a", "", "bc"])
    writer.add_array("tokenizer.ggml.tokens", [f"w{i}" for i in range(1001)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 1001)
    writer.add_tensor("w", np.zeros(4, np.float32))
    finish(writer)
    found = read_gguf(tmp_path / "said.gguf")
    assert found.metadata == {"general.architecture": "sdxl", "general.name": "a fox, 여우"}
    assert found.values == {
        "general.quantization_version": 2, "yes": True, "half": 0.5, "low": -(2**40), "sizes": [1, 2, 3],
        "words": ["a", "", "bc"], "tokenizer.ggml.tokens": "1001 elements",
        "tokenizer.ggml.scores": "1001 elements",
    }  # fmt: skip
    assert found.values["yes"] is True and found.path == tmp_path / "said.gguf"


@pytest.mark.parametrize("step", [8, 32, 4096])
@pytest.mark.parametrize("padded", [True, False])
def test_alignment_and_padding_at_the_end(step: int, padded: bool, tmp_path: Path) -> None:
    """The package pads behind the last tensor as well, other writers stop there."""
    writer = write(tmp_path / "aligned.gguf")
    writer.add_custom_alignment(step)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(5, dtype=np.float32))
    finish(writer)
    path = tmp_path / "aligned.gguf"
    whole = path.read_bytes()
    if not padded:
        path.write_bytes(whole[: len(whole) - (-20 % step)])
    found = read_gguf(path)
    assert found.values["general.alignment"] == step
    assert found.tensors["b"].load().tolist() == [0, 1, 2, 3, 4]


def test_version_2_and_tensors_in_another_order(tmp_path: Path) -> None:
    entries = [make.tensor("late", [8], at=32), make.tensor("early", [8])]
    data = np.arange(16, dtype=np.float32).tobytes()
    (tmp_path / "two.gguf").write_bytes(make.gguf([], entries, data, version=2))
    found = read_gguf(tmp_path / "two.gguf")
    assert list(found.tensors) == ["late", "early"] and found.metadata == {}
    assert found.tensors["late"].load().tolist() == list(range(8, 16))


def test_shapes_that_the_rows_do_not_show(tmp_path: Path) -> None:
    """A convolution as ComfyUI-GGUF stores it, in rows of 256; and one key for a tensor that is not there."""
    gguf = pytest.importorskip("gguf")
    stored = blocks(12, 45, 256)
    writer = write(tmp_path / "conv.gguf", "sdxl")
    writer.add_array("comfy.gguf.orig_shape.conv.weight", [320, 4, 3, 3])
    writer.add_array("comfy.gguf.orig_shape.gone", [2, 2])
    writer.add_tensor("conv.weight", stored, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    finish(writer)
    found = read_gguf(tmp_path / "conv.gguf")
    one = found.tensors["conv.weight"]
    assert one.shape == (320, 4, 3, 3) and one.packed is not None
    assert one.packed.stored()["blocks"].shape == (45, 144)
    theirs = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q4_K).reshape(one.shape)
    np.testing.assert_array_equal(one.load().numpy(), theirs)
    assert one.packed.expand(one.packed.stored(), torch.float16).shape == one.shape
    assert found.values == {"comfy.gguf.orig_shape.gone": [2, 2]}


@pytest.mark.parametrize(("name", "sizes", "shape"), [
    ("pos_embed", [4, 9], (1, 9, 4)),
    ("model.diffusion_model.pos_embed", [4, 9], (1, 9, 4)),
    ("pos_embed", [4, 9, 1], (1, 9, 4)),
    ("not_pos_embed", [4, 9], (9, 4)),
])  # fmt: skip
def test_positions_have_their_leading_one(name: str, sizes: list[int], shape: tuple, tmp_path: Path) -> None:
    data = np.arange(36, dtype=np.float32)
    (tmp_path / "sd3.gguf").write_bytes(make.gguf([], [make.tensor(name, sizes)], data.tobytes()))
    one = read_gguf(tmp_path / "sd3.gguf").tensors[name]
    assert one.shape == shape and np.array_equal(one.load().numpy(), data.reshape(shape))


def test_a_look_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(make.GOOD)
    code = (
        "import sys; from sumuk.files.gguf import read_gguf; "
        f"print(read_gguf({str(tmp_path / 'one.gguf')!r}).tensors['w'].shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(8,) False"


def never() -> torch.Tensor:
    raise AssertionError("only names and shapes are looked at")


def header(folder: Path, shapes: dict[str, tuple[int, ...]], prefix: str = "") -> Tensors:
    """The header of a file of these tensors as ggml writes it, outermost sizes of 1 forgotten; the rest a hole."""
    entries, at = [], 0
    for name, shape in shapes.items():
        sizes = list(shape)
        while len(sizes) > 1 and sizes[0] == 1:
            del sizes[0]
        entries.append(make.tensor(prefix + name, sizes[::-1], make.TYPE["F16"], at))
        at += -(-2 * int(np.prod(shape)) // 32) * 32
    path = folder / "header.gguf"
    path.write_bytes(make.gguf([], entries))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + at)
    found = read_gguf(path).tensors
    assert all(one.dtype == "F16" for one in found.values())
    return {name: Lazy(one.shape, one.dtype, never) for name, one in found.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("name", "key"), [
    ("flux1_dev", "flux/dev"), ("flux1_schnell", "flux/schnell"), ("sd15_unet", "sd1/text-to-image"),
    ("sd2_unet", "sd2/text-to-image"), ("sdxl_base_unet", "sdxl/base"), ("sdxl_refiner_unet", "sdxl/refiner"),
    ("sd3_medium_mmdit", "sd3/medium"), ("sd35_large_mmdit", "sd3/3.5-large"),
    ("sd35_medium_mmditx", "sd3/3.5-medium"), ("dit_xl_2", "dit/class-conditional"),
])  # fmt: skip
def test_networks_are_recognised(name: str, key: str, prefix: str, tmp_path: Path) -> None:
    """Bare as ComfyUI-GGUF writes them, with the prefix of whole checkpoints as stable-diffusion.cpp does."""
    shapes = inventory(name)
    answer = detect(header(tmp_path, shapes, prefix))
    assert isinstance(answer, Match), answer.why
    assert answer.family.key == key and answer.arrangement.name == ("single" if prefix else "bare")
    assert not answer.moved.unknown
    own = {n.removeprefix("denoiser."): one.shape for n, one in answer.moved.tensors.items()}
    assert own == shapes


def test_a_whole_checkpoint_of_stable_diffusion_cpp(tmp_path: Path) -> None:
    """It has no architecture key, and leaves out what nobody uses."""
    shapes = {f"model.diffusion_model.{n}": shape for n, shape in inventory("sd15_unet").items()}
    shapes |= {f"first_stage_model.{n}": shape for n, shape in inventory("sd15_vae").items()}
    clip = {n: shape for n, shape in inventory("sd15_clip_l").items() if "position_ids" not in n}
    shapes |= {f"cond_stage_model.transformer.{n}": shape for n, shape in clip.items()}
    answer = detect(header(tmp_path, shapes))
    assert isinstance(answer, Match), answer.why
    assert answer.family.key == "sd1/text-to-image" and answer.arrangement.name == "single"
    assert not answer.moved.unknown and len(answer.moved.tensors) == len(shapes)


def test_t5_under_llama_cpp_s_names(tmp_path: Path) -> None:
    native = inventory("t5_xxl_encoder")
    shapes = {}
    for name, shape in native.items():
        for ours, theirs in T5_MAP.items():
            name = name.replace(ours, theirs)
        shapes[name] = shape
    assert {"enc.blk.23.ffn_gate.weight", "enc.blk.0.attn_rel_b.weight", "token_embd.weight"} <= set(shapes)
    tensors = header(tmp_path, shapes)
    answer = detect(tensors)
    assert isinstance(answer, Match), answer.why
    assert answer.family.key == "text-encoder/t5" and answer.arrangement.name == "gguf"
    (part,) = answer.family.parts
    moved = answer.moved
    assert {n.removeprefix(f"{part.name}."): one.shape for n, one in moved.tensors.items()} == native
    assert not moved.unknown and not moved.ignored
    back = answer.arrangement.layout(moved.tensors, backward=True).backward(moved.tensors)
    assert set(back.tensors) == set(shapes)
    each = {f"enc.blk.{i}.attn_rel_b.weight": Lazy((32, 64), "F16", never) for i in range(24)}
    assert not isinstance(detect({**tensors, **each}), Match), "UMT5"
