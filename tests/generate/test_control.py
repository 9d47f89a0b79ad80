"""ControlNets and picture adapters at work: loaded from their own files, and nothing lost or left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import zoo
from PIL import Image
from tests.generate.conftest import gap, one, refusal
from torch import nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.families.family import FAMILIES
from sumuk.files.tensors import lazy, write
from sumuk.generate.control import steerings
from sumuk.generate.engine import Engine, Finished
from sumuk.generate.pixels import to_image, to_pixels
from sumuk.generate.replay import replay, request_of
from sumuk.generate.request import make_request
from sumuk.nets.adapters import T2IAdapter, T2IShape
from sumuk.nets.cascade_blocks import ConvBlock
from sumuk.nets.cascade_control import CascadeControl, CascadeControlShape, PlainShape
from sumuk.nets.clip_vision import ClipVision, ClipVisionShape
from sumuk.nets.controlnet import ControlNet, ControlNetShape
from sumuk.nets.ip_adapter import IPAdapter, IPShape
from sumuk.nets.tiny import TinyDecoder, TinyShape
from sumuk.weights.checkpoint import load
from sumuk.weights.model import Control, Model


def fill(network: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return network.eval().requires_grad_(False)


def saved(network: nn.Module, path: Path, prefix: str = "", **more: torch.Tensor) -> Path:
    state = {f"{prefix}{name}": lazy(value) for name, value in fill(network).state_dict().items()}
    write(path, state | {name: lazy(value) for name, value in more.items()}, {})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, model: Model) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("controls")
    ours = model.denoiser.shape
    fields = {name: getattr(ours, name) for name in ours.__dataclass_fields__ if name != "out_channels"}
    control = ControlNetShape(**fields, hint_channels=3, hint_widths=(8, 16, 16))
    attentions = [m for name, m in model.denoiser.named_modules() if name.endswith("attn2")]
    blocks = (*model.denoiser.input_blocks, *model.denoiser.output_blocks, model.denoiser.middle_block)
    widths = tuple(m.to_q.in_features for b in blocks for n, m in b.named_modules() if n.endswith("attn2"))
    assert len(widths) == len(attentions)
    ip = IPShape(kind="image", image_dim=24, context_dim=ours.context_dim, tokens=4, widths=widths)
    see = ClipVisionShape(width=64, depth=2, hidden=64, patch=32, side=7, projection=24, heads=1)
    return {
        "control": saved(ControlNet(control), folder / "control.safetensors", "control_model."),
        "ip": saved(IPAdapter(ip), folder / "ip.safetensors"),
        "image": saved(ClipVision(see), folder / "vision.safetensors"),
    }


@pytest.fixture(scope="module")
def steered(model_file: Path, files: dict[str, Path]) -> Model:
    return load(
        model_file, controls={"edges": files["control"], "face": files["ip"]}, parts={"image": files["image"]}
    )


@pytest.fixture(scope="module")
def edges() -> Image.Image:
    picture = Image.new("RGB", (64, 64))
    picture.paste("white", (16, 16, 40, 48))
    return picture


def steer(control: str, hint: Image.Image, **more: Any) -> dict[str, Any]:
    return {"steer": [{"control": control, "hint": hint, **more}]}


def test_a_control_changes_the_picture_and_follows_its_own(steered: Model, edges: Image.Image):
    plain = one(steered, steps=4)
    drawn = one(steered, steps=4, **steer("edges", edges))
    other = one(steered, steps=4, **steer("edges", edges.rotate(90)))
    assert gap(drawn, plain) > 0 and gap(drawn, other) > 0
    assert gap(drawn, one(steered, steps=4, **steer("edges", edges, weight=0.5))) > 0
    assert gap(drawn, one(steered, steps=4, **steer("edges", edges, guess=True))) > 0


def test_without_steering_the_bits_are_those_of_the_model_alone(steered: Model, model: Model):
    assert gap(one(steered, steps=4), one(model, steps=4)) == 0


def test_what_the_denoiser_is_told(steered: Model, edges: Image.Image):
    """The residuals that reach the U-Net are the ControlNet's own, times the weight, on both sides of guidance."""
    seen: list[Any] = []
    hook = steered.denoiser.register_forward_hook(
        lambda _, inputs, kept, output: seen.append((inputs, kept)), with_kwargs=True
    )
    try:
        one(steered, prompt="a fox", steps=1, **steer("edges", edges, weight=0.5))
    finally:
        hook.remove()
    assert len(seen) == 2
    hint = torch.zeros(1, 3, 64, 64)
    hint[..., 16:48, 16:40] = 1.0
    for (x, t), kept in seen:
        outputs, middle = steered.controls["edges"].network(x, t, hint, kept["context"])
        mine, own = kept["residuals"]
        assert torch.allclose(own, 0.5 * middle) and len(mine) == len(outputs)
        assert all(torch.allclose(a, 0.5 * b) for a, b in zip(mine, outputs, strict=True))


def test_a_window_of_steps(steered: Model, edges: Image.Image):
    counts: list[bool] = []
    hook = steered.denoiser.register_forward_hook(
        lambda _, inputs, kept, output: counts.append("residuals" in kept), with_kwargs=True
    )
    try:
        one(steered, steps=4, guidance=1, **steer("edges", edges, start=0.25, end=0.75))
    finally:
        hook.remove()
    assert counts == [False, True, True, False]


def test_guess_mode_leaves_the_other_side_alone(steered: Model, edges: Image.Image):
    counts: list[bool] = []
    hook = steered.denoiser.register_forward_hook(
        lambda _, inputs, kept, output: counts.append("residuals" in kept), with_kwargs=True
    )
    try:
        one(steered, prompt="a fox", steps=1, guidance=4, **steer("edges", edges, guess=True))
    finally:
        hook.remove()
    assert sorted(counts) == [False, True]


def test_two_at_once_are_added(steered: Model, edges: Image.Image):
    twice = one(steered, steps=3, steer=[{"control": "edges", "hint": edges, "weight": 0.5}] * 2)
    assert gap(twice, one(steered, steps=3, **steer("edges", edges))) <= 1


def test_an_image_adapter_attaches_for_the_forward_only(steered: Model, edges: Image.Image):
    before = {name: id(module) for name, module in steered.denoiser.named_modules()}
    plain = one(steered, steps=3)
    drawn = one(steered, steps=3, **steer("face", edges))
    assert gap(drawn, plain) > 0
    assert gap(drawn, one(steered, steps=3, **steer("face", edges.rotate(90)))) > 0
    assert {name: id(module) for name, module in steered.denoiser.named_modules()} == before
    assert gap(one(steered, steps=3), plain) == 0


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_unlike_requests_together_are_as_each_alone(steered: Model, edges: Image.Image, mode: str):
    asked = [
        {"seed": 1},
        {"seed": 2, **steer("edges", edges)},
        {"seed": 3, **steer("edges", edges.rotate(90))},
        {"seed": 4, **steer("face", edges)},
        {"seed": 5, **steer("edges", edges, guess=True, end=0.5)},
    ]
    engine = Engine(steered, mode=mode)  # type: ignore[arg-type]
    jobs = [engine.submit(make_request(steps=4, **values)) for values in asked]
    drawn = {event.job: event.picture for event in engine.events() if isinstance(event, Finished)}
    for job, values in zip(jobs, asked, strict=True):
        assert gap(drawn[job], one(steered, steps=4, **values)) <= (0 if mode == "exact" else 1)


def test_a_replay_needs_the_same_picture(steered: Model, edges: Image.Image):
    engine = Engine(steered)
    engine.submit(make_request(steps=2, seed=1, **steer("edges", edges)))
    (finished,) = [event for event in engine.events() if isinstance(event, Finished)]
    files = {each["name"] for each in finished.receipt["model"]["files"]}
    assert "control.safetensors" in files and "ip.safetensors" in files
    bound = [each["file"] for each in finished.receipt["licence"]["stack"]]
    own = [each.path.name for each in steered.files]
    assert bound == [*own, "control.safetensors"], "the ControlNet that steered, no other"
    with pytest.raises(BadInput, match="steer-1"):
        request_of(finished.receipt, {})
    request = request_of(finished.receipt, {"steer-1": edges})
    assert replay(finished.picture, finished.receipt, steered, request).kind == "identical"


def test_refusals(steered: Model, model: Model, model_file: Path, files: dict[str, Path], edges: Image.Image):
    assert "did you mean 'edges'" in refusal(lambda: one(steered, **steer("edge", edges)))
    assert "loaded without a control" in refusal(lambda: one(model, **steer("edges", edges)))
    assert "is not before end" in refusal(lambda: make_request(**steer("edges", edges, start=0.5, end=0.5)))
    assert "no step of 2" in refusal(
        lambda: one(steered, steps=2, **steer("edges", edges, start=0.6, end=0.7))
    )
    assert "knows one kind of picture" in refusal(
        lambda: one(steered, steps=1, **steer("edges", edges, mode=1))
    )
    with pytest.raises(BadFile, match="is no ControlNet"):
        load(model_file, controls={"edges": model_file})
    blind = replace(steered, networks={k: v for k, v in steered.networks.items() if k != "image"})
    assert "image tower" in refusal(lambda: one(blind, steps=1, **steer("face", edges)))


def test_windows_are_those_of_the_steps_that_are_walked(steered: Model, edges: Image.Image):
    """Ten steps at strength 0.2 are two, and none of two lies in the second fifth."""
    late = steer("edges", edges, start=0.2, end=0.4)
    one(steered, steps=10, **late)
    told = refusal(lambda: one(steered, steps=10, init=edges, strength=0.2, **late))
    assert "no step of 2 lies from start 0.2 to end 0.4" in told


def test_a_hint_is_looked_at_once_for_both_sides(steered: Model, edges: Image.Image):
    request = make_request(**steer("edges", edges))
    towards, away = steerings(steered, request, 64, 64)
    assert towards == away and towards[0] is away[0]
    towards, away = steerings(steered, make_request(**steer("face", edges)), 64, 64)
    assert not torch.equal(towards[0].seen[0], away[0].seen[0]), "an IP-Adapter goes away from nothing seen"


def test_what_cannot_be_guided_or_is_no_guidance_is_refused():
    dit, cascade = zoo.tiny("dit/class-conditional"), zoo.tiny("cascade/stage-c")
    assert "needs a label" in refusal(lambda: one(dit, steps=2))
    one(dit, steps=2, guidance=1)
    assert "decoder_guidance" in refusal(lambda: one(cascade, steps=1, decoder_guidance=0.0))


def test_a_control_of_another_model_is_refused(tmp_path: Path, model_file: Path, model: Model):
    ours = model.denoiser.shape
    fields = {name: getattr(ours, name) for name in ours.__dataclass_fields__ if name != "out_channels"}
    other = ControlNetShape(**fields | {"context_dim": 96}, hint_channels=3, hint_widths=(8, 16, 16))
    path = saved(ControlNet(other), tmp_path / "other.safetensors", "control_model.")
    with pytest.raises(BadFile, match="context_dim 96"):
        load(model_file, controls={"edges": path})


def test_a_t2i_adapter_adds_its_features(model: Model, edges: Image.Image):
    network = fill(T2IAdapter(T2IShape(widths=(32, 64), factor=4)))
    guest = Control(kind=FAMILIES["t2i-adapter"], network=network)
    steered = replace(model, controls={"sketch": guest})
    plain, drawn = one(steered, steps=3), one(steered, steps=3, **steer("sketch", edges))
    assert gap(drawn, plain) > 0 and gap(one(steered, steps=3), plain) == 0


@pytest.fixture(autouse=True)
def _nothing_stays(model: Model) -> Iterator[None]:
    yield
    assert not any(module._forward_hooks for module in model.denoiser.modules())


def test_a_tiny_decoder_for_previews_and_quick_pictures(model_file: Path, model: Model, tmp_path: Path):
    torch.manual_seed(5)
    tiny = TinyDecoder(TinyShape(channels=4, width=8))
    path = tmp_path / "taesd_decoder.safetensors"
    write(path, {name: lazy(value) for name, value in tiny.state_dict().items()}, {})
    quick = load(model_file, parts={"tiny_decoder": path})
    assert "needs a tiny decoder" in refusal(lambda: one(model, steps=2, quick=True))
    # The tiny decoder knows eight pixels a cell, this model's own four.
    assert one(quick, steps=2, quick=True).size == (128, 128) and one(quick, steps=2).size == (64, 64)
    wrong = TinyDecoder(TinyShape(channels=16, width=8))
    write(path, {name: lazy(value) for name, value in wrong.state_dict().items()}, {})
    with pytest.raises(BadFile, match="16 latent channels does not fit"):
        load(model_file, parts={"tiny_decoder": path})


def test_a_strength_of_nothing_shows_what_the_encoder_keeps(model: Model, photo: Image.Image):
    """Encode and decode, no step taken: the same whatever the seed is; a prompt would do nothing, and is refused."""
    drawn = one(model, init=photo, strength=0.0, seed=1)
    with torch.inference_mode():
        kept = model.decode_latent(model.encode_latent(to_pixels(photo, 64, 64)))
    assert gap(drawn, to_image(kept)) == 0
    assert gap(one(model, init=photo, strength=0.0, seed=2), drawn) == 0
    assert "prompt does nothing at strength 0" in refusal(
        lambda: one(model, init=photo, strength=0.0, prompt="a fox")
    )
    again = one(model, init=photo, strength=0.0, prompt="[fox:sea:0.5]", steps=4, hires={"strength": 0.5})
    assert again.size == (128, 128), "a second pass goes on from what was kept"


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_cascades_controls_add_maps_inside_stage_c(channels: int, edges: Image.Image):
    model = zoo.tiny("cascade/stage-c")
    width, backbone = model.denoiser.shape.widths[-1], model.networks["effnet"].shape.backbone
    if channels == 16:
        read: Any = PlainShape(channels=16, hidden=32, width=16, depth=1, features=24)
    else:
        read = replace(backbone, channels=channels)
    blocks = sum(isinstance(module, ConvBlock) for module in model.denoiser.modules())
    network = fill(CascadeControl(CascadeControlShape(backbone=read, width=width, places=(0, blocks - 1))))
    guest = Control(kind=FAMILIES["controlnet/cascade"], network=network)
    steered = replace(model, controls={"follow": guest})
    hint = edges.resize((256, 256)).convert("RGBA")
    hint.putalpha(Image.new("L", (256, 256), 255 if channels != 4 else 0))
    asked = {"prompt": "a fox", "steps": 2, "seed": 1, "width": 256, "height": 256}
    plain, drawn = one(steered, **asked), one(steered, **asked, **steer("follow", hint))
    assert gap(drawn, plain) > 0
    if channels == 4:
        opaque = hint.convert("RGB")
        assert "transparent" in refusal(lambda: one(steered, **asked, **steer("follow", opaque)))


def test_cascade_reconstructs_a_picture_through_its_smallest_latent():
    """1024 pixels are 24 cells of 16 channels; here 256 pixels are 6."""
    model = zoo.tiny("cascade/stage-c")
    photo = zoo.picture(256)
    with torch.inference_mode():
        latent = model.encode_latent(to_pixels(photo, 256, 256))
    assert latent.shape == (1, 16, 6, 6)
    drawn = one(model, init=photo, strength=0.0, seed=1, decoder_steps=2)
    assert drawn.size == (256, 256)
    assert gap(drawn, one(model, init=photo.rotate(90), strength=0.0, seed=1, decoder_steps=2)) > 0
