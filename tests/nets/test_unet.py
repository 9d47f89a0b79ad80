from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.attention import attention_kernel
from sumuk.nets.layers import timestep_embedding
from sumuk.nets.unet import UNet, UNetShape, encoder_shape, unet_shape

KEYS = Path(__file__).parents[2].parent / "shared" / "facts" / "keys"

SD1 = UNetShape(
    model_channels=32,
    channel_mult=(1, 2, 4, 4),
    transformer_depth=(1, 1, 1, 0),
    middle_depth=1,
    context_dim=24,
    heads=8,
)
SD2 = UNetShape(
    model_channels=64,
    channel_mult=(1, 2, 3),
    transformer_depth=(1, 1, 0),
    middle_depth=1,
    context_dim=40,
    head_channels=64,
    linear=True,
)
SDXL = UNetShape(
    model_channels=32,
    channel_mult=(1, 2, 4),
    transformer_depth=(0, 2, 3),
    middle_depth=3,
    context_dim=48,
    head_channels=16,
    linear=True,
    adm_in_channels=20 + 6 * 256,
)
UPSCALER = UNetShape(
    in_channels=7,
    model_channels=32,
    channel_mult=(1, 2, 2, 4),
    transformer_depth=(0, 1, 1, 1),
    middle_depth=1,
    context_dim=128,
    heads=8,
    linear=True,
    cross_only=(False, True, True, False),
    num_classes=50,
)
PLAIN = UNetShape(
    model_channels=32, channel_mult=(1, 2), transformer_depth=(0, 0), middle_depth=0, context_dim=None
)
EVERY = pytest.mark.parametrize(
    "shape", [SD1, SD2, SDXL, UPSCALER, PLAIN], ids=["sd1", "sd2", "sdxl", "x4", "plain"]
)


def trained(shape: UNetShape, seed: int = 0) -> UNet:
    """A network in which every parameter matters, none being zero."""
    with torch.device("meta"):
        net = UNet(shape)
    net.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(
                float("norm" in name or "layers.0.weight" in name or name == "out.0.weight"), 0.1
            )
    return net


def inputs(shape: UNetShape, batch: int = 2, size: tuple[int, int] = (16, 8)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    given = {"x": torch.randn(batch, shape.in_channels, *size), "t": torch.rand(batch) * 999}
    if shape.context_dim:
        given["context"] = torch.randn(batch, 7, shape.context_dim)
    if shape.adm_in_channels:
        given["y"] = torch.randn(batch, shape.adm_in_channels)
    if shape.num_classes:
        given["y"] = torch.randint(0, shape.num_classes, (batch,))
    return given


def header(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the largest value."""
    return float((got - want).abs().max() / want.abs().max())


# -- names and shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads", "head_channels"),
    [
        ("sd15_unet", 8, None),
        ("sd15_inpaint_unet", 8, None),
        ("sd2_x4_unet", 8, None),
        ("sd2_unet", None, 64),
        ("sd2_depth_unet", None, 64),
        ("sd2_inpaint_unet", None, 64),
        ("sd21_unclip_h_unet", None, 64),
        ("sd21_unclip_l_unet", None, 64),
        ("sdxl_base_unet", None, 64),
        ("sdxl_refiner_unet", None, 64),
    ],
)
def test_published_names_and_shapes(name: str, heads: int | None, head_channels: int | None) -> None:
    path = KEYS / f"{name}.json"
    if not path.exists():
        pytest.skip("the lists of published tensors are not here")
    facts = json.loads(path.read_text())
    published = {key: tuple(size) for key, size in facts["tensors"].items()}
    config = facts["config"]
    shape = unet_shape(published, heads=heads, head_channels=head_channels)
    with torch.device("meta"):
        assert header(UNet(shape)) == published
    assert shape.channel_mult == tuple(config["channel_mult"])
    assert shape.model_channels == config["model_channels"]
    assert (shape.in_channels, shape.out_channels) == (config["in_channels"], config["out_channels"])
    assert shape.adm_in_channels == config.get("adm_in_channels")
    assert shape.linear == config.get("use_linear_in_transformer", False)
    assert (shape.heads, shape.head_channels) == (config.get("num_heads"), config.get("num_head_channels"))
    strides = [2**level if depth else 0 for level, depth in enumerate(shape.transformer_depth)]
    assert sorted(filter(None, strides)) == sorted(config["attention_resolutions"])
    if "disable_self_attentions" in config:
        disabled = [
            flag and depth > 0
            for flag, depth in zip(config["disable_self_attentions"], shape.transformer_depth, strict=True)
        ]
        assert list(shape.cross_only) == disabled


@EVERY
def test_a_miniature_takes_the_same_path(shape: UNetShape) -> None:
    heads = {"heads": shape.heads, "head_channels": shape.head_channels}
    if not shape.attends:
        heads = {"heads": 8}
        shape = replace(shape, heads=8)
    assert unet_shape(header(UNet(shape)), **heads) == shape


def test_every_parameter_lies_in_a_plain_layer() -> None:
    kinds = {type(m) for m in UNet(SDXL).modules() if next(m.parameters(recurse=False), None) is not None}
    assert kinds == {nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm}


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("input_blocks.0.0.weight", None),
        ("input_blocks.0.0.weight", (32,)),
        ("input_blocks.0.0.weight", (33, 4, 3, 3)),
        ("input_blocks.0.0.weight", (2**40, 4, 3, 3)),
        ("input_blocks.4.0.in_layers.2.weight", (65, 32, 3, 3)),
        ("input_blocks.8.1.norm.weight", None),
        ("input_blocks.5.1.transformer_blocks.1.attn1.to_q.weight", (64, 64)),
        ("middle_block.0.in_layers.2.weight", (64, 64, 3, 3)),
        ("output_blocks.7.0.skip_connection.weight", None),
        ("out.2.weight", None),
        ("time_embed.2.bias", (64,)),
        ("lora_up.weight", (4, 4)),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (32, 0)),
        ("input_blocks.1.1.proj_in.weight", None),
    ],
)
def test_a_senseless_header_is_refused_by_the_name_of_the_key(key: str, size: tuple[int, ...] | None) -> None:
    shapes = header(UNet(SD1))
    if size is None:
        del shapes[key]
    else:
        shapes[key] = size
    with pytest.raises(BadFile, match="tensor ") as caught:
        unet_shape(shapes, heads=8)
    assert key in str(caught.value)


def test_headers_of_something_else_are_refused() -> None:
    with pytest.raises(BadFile, match=r"input_blocks\.0\.0\.weight"):
        unet_shape({}, heads=8)
    with pytest.raises(BadFile, match=r"input_blocks\.1\.0"):
        unet_shape({"input_blocks.0.0.weight": (32, 4, 3, 3)}, heads=8)
    with pytest.raises(BadFile, match="heads 7 does not divide 32"):
        unet_shape(header(UNet(SD1)), heads=7)
    with pytest.raises(BadInput, match="exactly one"):
        unet_shape(header(UNet(SD1)))


def test_the_encoder_alone_tells_the_shape() -> None:
    """A ControlNet has these tensors and no decoder."""
    part = {k: v for k, v in header(UNet(SDXL)).items() if not k.startswith("out")}
    assert encoder_shape(part, head_channels=16) == SDXL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_channels": 40}, "40"),
        ({"transformer_depth": (1, 1)}, "one entry per level"),
        ({"context_dim": None}, "context_dim"),
        ({"head_channels": 8}, "exactly one"),
        ({"heads": None}, "exactly one"),
        ({"heads": 24}, "24 does not divide 32"),
        ({"adm_in_channels": 5, "num_classes": 5}, "not both"),
        ({"channel_mult": (), "transformer_depth": ()}, "one entry per level"),
    ],
)
def test_contradictory_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(SD1, **change)


# -- numbers -------------------------------------------------------------------------------------------------


def oracle(net: UNet) -> nn.Module:
    """The same weights in diffusers' network."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    shape = net.shape
    widths = tuple(shape.model_channels * m for m in shape.channel_mult)
    depths = tuple(max(1, d) for d in shape.transformer_depth)
    kinds = ["CrossAttn" if depth else "" for depth in shape.transformer_depth]
    config: dict[str, Any] = {
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "block_out_channels": widths,
        "layers_per_block": shape.num_res_blocks,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "transformer_layers_per_block": depths,
        "cross_attention_dim": shape.context_dim,
        # In these configurations the name is a misnomer: it is the number of heads of each level.
        "attention_head_dim": tuple(shape.heads or width // (shape.head_channels or 1) for width in widths),
        "use_linear_projection": shape.linear,
        "only_cross_attention": shape.cross_only or False,
        "mid_block_only_cross_attention": False,
        "num_class_embeds": shape.num_classes,
    }
    if shape.adm_in_channels:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape.adm_in_channels,
        }
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config)
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in net.state_dict().items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(state, config), strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [SD1, SD2, SDXL, UPSCALER], ids=["sd1", "sd2", "sdxl", "x4"])
@pytest.mark.parametrize("size", [(16, 8), (11, 7)], ids=["even", "odd"])
@torch.no_grad()
def test_equals_diffusers(shape: UNetShape, size: tuple[int, int]) -> None:
    net = trained(shape)
    given = inputs(shape, size=size)
    more: dict[str, Any] = {}
    if shape.adm_in_channels:
        pooled, ids = torch.randn(2, shape.adm_in_channels - 6 * 256), torch.rand(2, 6) * 1024
        features = timestep_embedding(ids.flatten(), 256).reshape(2, -1)
        given["y"] = torch.cat((pooled, features), dim=1)
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    if shape.num_classes:
        more["class_labels"] = given["y"]
    want = oracle(net)(given["x"], given["t"], given["context"], **more).sample
    got = net(**given)
    assert got.shape == (2, shape.out_channels, *size)
    assert error(got, want) <= 1e-5


@torch.no_grad()
def test_control_residuals_equal_diffusers() -> None:
    net, given = trained(SD1), inputs(SD1)
    theirs = oracle(net)
    extra = []
    hooks = [
        block.register_forward_hook(lambda _module, _given, out: extra.append(torch.randn_like(out)))
        for block in [*net.input_blocks, net.middle_block]
    ]
    plain = net(**given)
    for hook in hooks:
        hook.remove()
    residuals = (extra[:-1], extra[-1])
    want = theirs(
        given["x"],
        given["t"],
        given["context"],
        down_block_additional_residuals=tuple(extra[:-1]),
        mid_block_additional_residual=extra[-1],
    ).sample
    got = net(**given, residuals=residuals)
    assert error(got, want) <= 1e-5
    assert error(got, plain) > 0.01
    with pytest.raises(BadInput, match="11 control residuals"):
        net(**given, residuals=(extra[:-2], extra[-1]))


def available_gib() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


@pytest.mark.slow
@torch.no_grad()
def test_full_width_sd15_equals_diffusers() -> None:
    if available_gib() < 12:
        pytest.skip("needs 12 GiB of free memory")
    shape = replace(SD1, model_channels=320, context_dim=768)
    net = trained(shape)
    assert sum(p.numel() for p in net.parameters()) == 859_520_964
    given = inputs(shape, batch=1, size=(32, 32))
    want = oracle(net)(given["x"], given["t"], given["context"]).sample
    got = net(**given)
    assert error(got, want) <= 1e-4


# -- laws ----------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_a_batch_equals_its_members(shape: UNetShape) -> None:
    net, given = trained(shape), inputs(shape, batch=3)
    together = net(**given)
    for i in range(3):
        alone = net(**{name: tensor[i : i + 1] for name, tensor in given.items()})
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@EVERY
@torch.no_grad()
def test_every_input_matters(shape: UNetShape) -> None:
    net, given = trained(shape), inputs(shape)
    before = net(**given)
    for name, tensor in given.items():
        other = (tensor + 1) % shape.num_classes if name == "y" and shape.num_classes else tensor + 0.5
        assert error(net(**given | {name: other}), before) > 1e-4, name


@EVERY
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (13, 6)])
@torch.no_grad()
def test_any_size_runs(shape: UNetShape, size: tuple[int, int]) -> None:
    out = trained(shape)(**inputs(shape, size=size))
    assert out.shape == (2, shape.out_channels, *size)
    assert out.isfinite().all()


@torch.no_grad()
def test_other_formats_change_only_the_rounding() -> None:
    net, given = trained(SD1), inputs(SD1)
    want = net(**given)
    last = net.to(memory_format=torch.channels_last)
    x = given["x"].to(memory_format=torch.channels_last)
    got = last(**given | {"x": x})
    assert error(got, want) <= 1e-5
    assert got.is_contiguous(memory_format=torch.channels_last)
    low = trained(SD1).bfloat16()
    for kernel in ("auto", "sdpa", "matmul"):
        with attention_kernel(kernel):  # type: ignore[arg-type]
            got = low(**given | {"x": given["x"].bfloat16()})
        assert got.dtype == torch.bfloat16
        assert error(got.float(), want) <= 0.05


def test_meta_gives_the_shape_without_the_numbers() -> None:
    with torch.device("meta"):
        net = UNet(SDXL)
    given = {name: tensor.to("meta") for name, tensor in inputs(SDXL).items()}
    assert net(**given).shape == (2, 4, 16, 8)


@EVERY
def test_an_untrained_network_predicts_zero_and_learns(shape: UNetShape) -> None:
    with torch.device("meta"):
        net = UNet(shape)
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(0)
    net.reset_parameters()
    assert all(p.isfinite().all() for p in net.parameters())
    given = inputs(shape)
    assert not UNet(shape)(**given).any()
    assert not net(**given).any()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    target = torch.randn_like(given["x"][:, : shape.out_channels])
    losses = []
    for _ in range(6):
        loss = (net(**given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    stuck = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not stuck


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        (SD1, {"x": torch.zeros(2, 5, 8, 8)}, r"\[B, 4, H, W\]"),
        (SD1, {"context": None}, r"\[B, M, 24\], not None"),
        (SD1, {"context": torch.zeros(2, 7, 25)}, r"\(2, 7, 25\)"),
        (SD1, {"y": torch.zeros(2, 3)}, "takes no vector"),
        (SDXL, {"y": None}, "1556"),
        (SDXL, {"y": torch.zeros(2, 3)}, r"\(2, 3\)"),
        (UPSCALER, {"y": torch.zeros(2)}, "long"),
        (UPSCALER, {"y": None}, "class"),
        (PLAIN, {"context": torch.zeros(2, 7, 24)}, "no attention"),
    ],
)
def test_what_does_not_fit_is_refused(shape: UNetShape, change: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        net = UNet(shape)
    given = {**inputs(shape), **change}
    given = {name: value if value is None else value.to("meta") for name, value in given.items()}
    with pytest.raises(BadInput, match=message):
        net(**given)
