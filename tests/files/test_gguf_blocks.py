"""The arithmetic of the blocks: the gguf package's numbers bit for bit, on random bytes and on quantised weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sumuk.files.gguf import BLOCKS
from sumuk.files.gguf_blocks import AT_ONCE, expand

SCHEMES = {name: (width, size) for name, width, size in BLOCKS.values()}
MEASURED = {  # rms error of quantised normal weights over their rms, by the gguf package's quantisers
    "Q4_0": 0.0865, "Q4_1": 0.0782, "Q5_0": 0.0428, "Q5_1": 0.0381, "Q8_0": 0.00537,
}  # fmt: skip


def random_blocks(scheme: str, count: int, seed: int = 0) -> torch.Tensor:
    """Any bytes at all; scales that are infinite or none among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, SCHEMES[scheme][1]), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "Q8_K"])
def test_any_bytes_give_the_same_bits_as_the_package(scheme: str) -> None:
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(scheme, 3000)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[scheme])
    ours = expand(scheme, blocks)
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy(), theirs)
    finite = np.isfinite(theirs)
    assert finite.mean() > 0.9
    np.testing.assert_array_equal(ours.numpy()[finite].view(np.int32), theirs[finite].view(np.int32))


def test_the_table_of_types_is_the_package_s() -> None:
    gguf = pytest.importorskip("gguf")
    sizes = gguf.constants.GGML_QUANT_SIZES
    for kind, (name, width, size) in BLOCKS.items():
        assert gguf.GGMLQuantizationType[name] == kind
        assert sizes[gguf.GGMLQuantizationType(kind)] == (width, size)


def test_q8_k_by_its_formula() -> None:
    blocks = random_blocks("Q8_K", 50)
    scale = torch.rand(50, 1)
    blocks[:, :4] = scale.view(torch.uint8)
    numbers = blocks[:, 4:260].view(torch.int8).float()
    assert torch.equal(expand("Q8_K", blocks), numbers * scale)


@pytest.mark.parametrize("scheme", MEASURED)
def test_quantised_weights_come_back(scheme: str) -> None:
    gguf = pytest.importorskip("gguf")
    weights = np.random.default_rng(0).normal(0, 0.02, (64, 512)).astype(np.float32)
    stored = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[scheme])
    back = expand(scheme, torch.from_numpy(stored)).reshape(64, 512).numpy()
    error = float(np.sqrt(np.mean((back - weights) ** 2)) / weights.std())
    assert error == pytest.approx(MEASURED[scheme], rel=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_and_places_do_not_matter(scheme: str) -> None:
    """As a large tensor is expanded in chunks; one that lies in the middle of another's memory."""
    width, size = SCHEMES[scheme]
    few = random_blocks(scheme, 7)
    expected = expand(scheme, few)
    many = few.repeat(AT_ONCE // width // 7 + 3, 1)
    torch.testing.assert_close(expand(scheme, many)[-7:], expected, rtol=0, atol=0, equal_nan=True)
    assert len(expand(scheme, many)) == len(many)
    inside = torch.cat((torch.zeros(1, size, dtype=torch.uint8), few))[1:]
    torch.testing.assert_close(expand(scheme, inside), expected, rtol=0, atol=0, equal_nan=True)
    rows = few.reshape(1, 7 * size)
    torch.testing.assert_close(expand(scheme, rows), expected, rtol=0, atol=0, equal_nan=True)
    assert expand(scheme, few[:0]).shape == (0, width)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_gives_the_same_bits(scheme: str) -> None:
    blocks = random_blocks(scheme, 5000)
    here, there = expand(scheme, blocks), expand(scheme, blocks.cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=0, atol=0, equal_nan=True)
