"""Stable Cascade's stage A: published names, parity with diffusers, the conventions of pixels."""

from __future__ import annotations

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.paella import ROWS, Paella, PaellaShape, paella_shape

SMALL = PaellaShape(width=24, blocks=3, channels=4, codes=50)
DEEP = PaellaShape(width=32, levels=3, blocks=1, channels=3, codes=20, colours=1)
EVERY = pytest.mark.parametrize("shape", [SMALL, DEEP], ids=["small", "deep"])


def network(shape: PaellaShape, seed: int = 0) -> Paella:
    """A network in which every parameter and statistic matters."""
    torch.manual_seed(seed)
    net = Paella(shape).requires_grad_(False)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif value.ndim == 1:
            value.add_(0.5 * torch.randn_like(value))
    return net


def twin(net: Paella) -> nn.Module:
    """The same weights in diffusers' network."""
    pytest.importorskip("diffusers")
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    shape = net.shape
    theirs = PaellaVQModel(
        in_channels=shape.colours,
        out_channels=shape.colours,
        levels=shape.levels,
        bottleneck_blocks=shape.blocks,
        embed_dim=shape.width,
        latent_channels=shape.channels,
        num_vq_embeddings=shape.codes,
    )
    renamed = {key.replace("codebook", "embedding"): value for key, value in net.state_dict().items()}
    theirs.load_state_dict(renamed, strict=True)
    return theirs.eval().requires_grad_(False)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_names_and_shapes_are_the_published_ones() -> None:
    published = inventory("cascade_stage_a")
    shape = paella_shape(published)
    assert shape == PaellaShape() and shape.stride == 4 and shape.widths == (192, 384)
    with torch.device("meta"):
        net = Paella(shape)
    assert shapes_of(net) == published
    assert sum(value.numel() for value in net.parameters()) == 18_406_894
    renamed = {key.replace("codebook", "embedding"): size for key, size in published.items()}
    assert renamed == inventory("cascade_stage_a.diffusers")


@EVERY
def test_shape_is_read_back_from_any_header(shape: PaellaShape) -> None:
    with torch.device("meta"):
        assert paella_shape(shapes_of(Paella(shape))) == shape


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("up_blocks.0.0.weight", None),
        ("up_blocks.0.0.weight", (24,)),
        ("up_blocks.0.0.weight", (23, 4, 1, 1)),
        ("up_blocks.0.0.weight", (2**40, 4, 1, 1)),
        ("vquantizer.codebook.weight", None),
        ("out_block.0.weight", (13, 12, 1, 1)),
        ("up_blocks.1.gammas", None),
    ],
)
def test_a_senseless_header_is_refused(key: str, size: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        shapes = shapes_of(Paella(SMALL))
    if size is None:
        del shapes[key]
    else:
        shapes[key] = size
    with pytest.raises(BadFile, match="tensor ") as caught:
        paella_shape(shapes)
    assert key in str(caught.value) or key == "up_blocks.1.gammas"  # then there are no blocks


@EVERY
@pytest.mark.parametrize("size", [(4, 4), (3, 5)], ids=["square", "odd"])
@torch.no_grad()
def test_equals_diffusers(shape: PaellaShape, size: tuple[int, int]) -> None:
    net, step = network(shape), shape.stride
    theirs = twin(net)
    unit = torch.rand(2, shape.colours, size[0] * step, size[1] * step)
    latent = net.encode(unit * 2 - 1).mode()
    want = theirs.encode(unit).latents
    assert latent.shape == (2, shape.channels, *size)
    assert relative(latent, want) <= 2e-6
    pixels = net.decode(want)
    assert pixels.shape == unit.shape
    assert relative((pixels + 1) / 2, theirs.decode(want).sample) <= 2e-6
    codes, numbers = net.quantise(want)
    quantised, _, _ = theirs.vquantizer(want)
    assert relative(codes, quantised) <= 1e-6
    assert torch.equal(net.vquantizer.codebook(numbers).permute(0, 3, 1, 2), codes)
    decoded = theirs.decode(want, force_not_quantize=False).sample
    assert relative((net.decode(codes) + 1) / 2, decoded) <= 2e-6


@torch.no_grad()
def test_full_width_equals_diffusers() -> None:
    net = network(PaellaShape(blocks=2, codes=100))
    unit = torch.rand(1, 3, 24, 32)
    latent = twin(net).encode(unit).latents
    assert relative(net.encode(unit * 2 - 1).mean, latent) <= 2e-6
    assert relative((net.decode(latent) + 1) / 2, twin(net).decode(latent).sample) <= 2e-6


@torch.no_grad()
def test_a_latent_is_a_point() -> None:
    net = network(SMALL)
    point = net.encode(torch.rand(1, 3, 8, 12))
    assert torch.equal(point.mode(), point.sample(torch.randn(1, 4, 2, 3)))
    with pytest.raises(BadInput, match=r"\(1, 4, 2, 2\)"):
        point.sample(torch.randn(1, 4, 2, 2))


@torch.no_grad()
def test_many_cells_are_quantised_as_few_are() -> None:
    net = network(SMALL)
    latent = torch.randn(1, 4, 2, ROWS // 2 + 3)
    codes, numbers = net.quantise(latent)
    distance = (latent[0, :, :, :, None] - net.vquantizer.codebook.weight.T[:, None, None]).square().sum(0)
    assert torch.equal(numbers[0], distance.argmin(-1))
    assert torch.equal(net.quantise(codes)[1], numbers)


@torch.no_grad()
def test_stored_statistics_are_used_and_kept_in_training() -> None:
    net = network(SMALL)
    pixels = torch.rand(2, 3, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    calm = net.eval().encode(pixels).mean
    assert torch.equal(net.train().encode(pixels).mean, calm)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@torch.no_grad()
def test_bfloat16_changes_only_the_rounding() -> None:
    net, low = network(SMALL), network(SMALL).bfloat16()
    latent = torch.randn(1, 4, 4, 6)
    pixels = low.decode(latent.bfloat16())
    assert pixels.dtype == torch.bfloat16
    assert relative(pixels.float(), net.decode(latent)) <= 0.05
    assert low.encode(pixels).mean.isfinite().all()
    assert low.quantise(latent.bfloat16())[0].dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    with torch.device("meta"):
        net = Paella(SMALL)
        with pytest.raises(BadInput, match="multiples of 4"):
            net.encode(torch.zeros(1, 3, 8, 10))
        with pytest.raises(BadInput, match=r"\[B, 3, height, width\]"):
            net.encode(torch.zeros(1, 4, 8, 8))
        with pytest.raises(BadInput, match=r"\[B, 4, height, width\]"):
            net.decode(torch.zeros(1, 3, 8, 8))
        with pytest.raises(BadInput, match=r"\[B, 4, height, width\]"):
            net.quantise(torch.zeros(4, 8, 8))
    with pytest.raises(BadInput, match="27 cannot be halved 1"):
        PaellaShape(width=27)
    with pytest.raises(BadInput, match="at least 1"):
        PaellaShape(blocks=0)
