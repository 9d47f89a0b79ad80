"""FLUX.1 as a value: what was published, which header is whose, names there and back, and a whole walk."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.nets.inventories import KEYS, inventory, shapes_of
from torch import Tensor, nn

from sumuk.base.errors import BadFile
from sumuk.diffusion.grid import GRIDS, make_grid
from sumuk.diffusion.noise import ImageNoise
from sumuk.diffusion.prediction import PREDICTIONS
from sumuk.diffusion.sample import drive, sample
from sumuk.diffusion.schedule import scaled_linear
from sumuk.diffusion.solvers import SOLVERS
from sumuk.families.family import FAMILIES, Facts, Family, Latent
from sumuk.families.flux import (
    BARE,
    BARE_DIFFUSERS,
    CONTROL,
    DEV,
    DIFFUSERS,
    FILL,
    SCHNELL,
    SINGLE,
    flux_rules,
)
from sumuk.families.reading import Encoded, Given, Sizes
from sumuk.files.layout import Layout
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.clip import ClipShape, ClipText
from sumuk.nets.flux import Flux, FluxShape
from sumuk.nets.t5 import T5Encoder, T5Shape
from sumuk.nets.vae import Vae, VaeShape

VARIANTS = (DEV, SCHNELL, FILL, CONTROL)
WHOSE = {
    "flux1_dev": DEV,
    "flux1_dev.diffusers": DEV,
    "flux1_schnell": SCHNELL,
    "flux1_schnell.diffusers": SCHNELL,
    "flux1_fill_dev": FILL,
    "flux1_canny_depth_dev": CONTROL,
}
OTHERS = sorted({path.name.removesuffix(".json") for path in KEYS.glob("*.json")} - set(WHOSE))
TINY = FluxShape(
    in_channels=4, out_channels=4, width=32, head=16, double=2, single=2, context_dim=24, vector_dim=64
)


def never() -> Tensor:
    raise AssertionError("only names and shapes are known")


def headers(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {name: Lazy(shape, "F32", never) for name, shape in shapes.items()}


def owners(tensors: Tensors) -> list[tuple[str, str]]:
    """Every variant and arrangement that calls these tensors its own."""
    found = []
    for arrangement in DEV.arrangements:
        try:
            moved = arrangement.layout(tensors).forward(tensors)
        except BadFile:
            continue  # shapes that these rules cannot cut
        shapes = {name: one.shape for name, one in moved.tensors.items()}
        for family in VARIANTS:
            if family.recognise(shapes) is None:
                assert not moved.unknown and not moved.halves
                found.append((family.variant, arrangement.name))
    return found


def model(shape: FluxShape = TINY, values: bool = False) -> tuple[dict[str, nn.Module], Tensors]:
    """A tiny model's networks and native tensors."""
    with torch.device("cpu" if values else "meta"):
        networks: dict[str, nn.Module] = {
            "denoiser": Flux(shape),
            "vae": Vae(VaeShape(width=32, multiples=(1, 2), blocks=1, latent=4, quantised=None)),
            "text": ClipText(ClipShape(vocabulary=20, length=8, width=64, depth=1, hidden=64)),
            "text_2": T5Encoder(T5Shape(vocabulary=20, width=24, depth=2, heads=2, head=8, hidden=32)),
        }
    tensors = {
        f"{part}.{name}": lazy(torch.randn(value.shape) if values else value)
        for part, network in networks.items()
        for name, value in network.state_dict().items()
    }
    return networks, tensors


def written(shape: FluxShape, arrangement: Any) -> Tensors:
    """A tiny model as such a file has it."""
    native = model(shape)[1]
    return arrangement.layout(native, backward=True).backward(native).tensors


# -- the value -----------------------------------------------------------------------------------------------


def test_flux_is_what_was_published() -> None:
    assert FAMILIES["flux"] is DEV and FAMILIES["flux/schnell"] is SCHNELL
    for family in VARIANTS:
        assert FAMILIES[family.key] is family and family.arrangements is DEV.arrangements
        assert [part.name for part in family.parts] == ["denoiser", "vae", "text", "text_2"]
        assert family.latent == Latent(channels=16, stride=8, scale=0.3611, shift=0.1159)
        assert family.prediction in PREDICTIONS and family.prediction == "flow"
        assert family.defaults.solver in SOLVERS and family.defaults.grid in GRIDS
    asked = {f.variant: (f.defaults.steps, f.defaults.guidance, f.guidance, f.licence) for f in VARIANTS}
    dev = "FLUX.1-dev-Non-Commercial"
    assert asked == {
        "dev": (28, 3.5, "embedded", dev),
        "schnell": (4, 1.0, "none", "Apache-2.0"),
        "fill": (50, 30.0, "embedded", dev),
        "control": (28, 3.5, "embedded", dev),
    }
    assert [reading.length for reading in DEV.readings] == [None, 512]
    assert [reading.length for reading in SCHNELL.readings] == [None, 256]


# -- whose header --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOSE)
def test_each_published_file_is_one_variant(name: str) -> None:
    layout = "bare-diffusers" if name.endswith("diffusers") else "bare"
    assert owners(headers(inventory(name))) == [(WHOSE[name].variant, layout)]


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_published_file_is_a_flux(name: str) -> None:
    prefixed = json.loads((KEYS / f"{name}.json").read_text()).get("prefix_in_file", "")
    for prefix in {"", prefixed}:
        assert owners(headers({prefix + key: size for key, size in inventory(name).items()})) == []


def test_a_whole_model_in_each_arrangement() -> None:
    parts = {
        "model.diffusion_model.": "flux1_dev",
        "vae.": "flux_ae",
        "text_encoders.clip_l.transformer.": "sd3_clip_l.diffusers",  # with the projection that FLUX.1 ignores
        "text_encoders.t5xxl.transformer.": "t5_xxl_encoder",
    }
    single = {prefix + key: size for prefix, name in parts.items() for key, size in inventory(name).items()}
    single["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = (32128, 4096)
    assert owners(headers(single)) == [("dev", "single")]
    folder = {
        prefix + key: size
        for prefix, name in {
            "transformer/": "flux1_schnell.diffusers",
            "vae/": "flux_ae.diffusers",
            "text_encoder/": "clip_l.diffusers",
            "text_encoder_2/": "t5_xxl_encoder",
        }.items()
        for key, size in inventory(name).items()
    }
    assert owners(headers(folder)) == [("schnell", "diffusers")]


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("img_in.weight", (3072, 96), "takes 96 numbers"),
        ("img_in.weight", (3072,), "no 'img_in.weight'"),
        ("final_layer.linear.weight", None, "no 'final_layer.linear.weight'"),
        ("time_in.in_layer.weight", None, "no 'time_in.in_layer.weight'"),
        ("guidance_in.in_layer.weight", None, "takes no guidance scale"),
    ],
)
def test_what_is_none_is_told_why(name: str, size: tuple[int, ...] | None, why: str) -> None:
    shapes = {f"denoiser.{key}": one for key, one in inventory("flux1_dev").items()}
    assert DEV.recognise(shapes) is None
    assert "a guidance scale" in str(SCHNELL.recognise(shapes))
    del shapes[f"denoiser.{name}"]
    if size is not None:
        shapes[f"denoiser.{name}"] = size
    assert why in str(DEV.recognise(shapes))


def test_a_tower_of_another_width_is_noticed() -> None:
    _, tensors = model()
    shapes = {name: one.shape for name, one in tensors.items()}
    assert DEV.recognise(shapes) is None
    assert "T5" in str(DEV.recognise(shapes | {"text_2.shared.weight": (20, 32)}))
    wide = {"text.text_model.embeddings.token_embedding.weight": (20, 128)}
    assert "CLIP of width [64], the tower writes [128]" in str(DEV.recognise(shapes | wide))


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_tiny_variants_are_told_apart(stride: int) -> None:
    def owner(shape: FluxShape) -> list[tuple[str, str]]:
        return owners(written(shape, SINGLE))

    assert owner(TINY) == [("dev", "single")]
    assert owner(replace(TINY, guidance=False)) == [("schnell", "single")]
    assert owner(replace(TINY, in_channels=8)) == [("control", "single")]
    assert owner(replace(TINY, in_channels=8 + stride**2)) == [("fill", "single")]
    assert owner(replace(TINY, in_channels=8, guidance=False)) == []


# -- names there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux1_dev", "flux1_schnell"])
def test_diffusers_names_are_the_published_ones(name: str) -> None:
    ours, theirs = headers(inventory(name)), headers(inventory(f"{name}.diffusers"))
    forward, backward = (
        Layout(*flux_rules(theirs)).forward(theirs),
        Layout(*flux_rules(ours)).backward(ours),
    )
    for moved, wanted in ((forward, ours), (backward, theirs)):
        assert not moved.unknown and not moved.halves and not moved.ignored
        assert {k: one.shape for k, one in moved.tensors.items()} == {
            k: one.shape for k, one in wanted.items()
        }
    known = json.loads(gzip.decompress((KEYS / "maps" / f"{name}__to_diffusers.json.gz").read_bytes()))["map"]
    sources = {key: value if isinstance(value, str) else value[0][0] for key, value in known.items()}
    assert {key: origin[0] for key, origin in backward.origin.items()} == sources


def test_diffusers_rows_are_the_published_ones() -> None:
    """Which rows of a fused tensor become which: numbers in, numbers out."""
    path = KEYS / "maps" / "flux1_dev__to_diffusers.json.gz"
    if not path.exists():
        pytest.skip("the maps of published files are not here")
    width = 32
    native = {name.removeprefix("denoiser."): one for name, one in model(values=True)[1].items()}
    native = {name: one for name, one in native.items() if name.split(".")[0] in ROOTS}
    moved = Layout(*flux_rules(native)).backward(native).tensors
    for key, value in json.loads(gzip.decompress(path.read_bytes()))["map"].items():
        if key in moved and not isinstance(value, str):
            pieces = [native[n].load()[a * width // 3072 : b * width // 3072] for n, a, b in value]
            assert torch.equal(moved[key].load(), torch.cat(pieces)), key


ROOTS = {name.split(".")[0] for name in DEV.parts[0].original}


@pytest.mark.parametrize("arrangement", [SINGLE, DIFFUSERS, BARE, BARE_DIFFUSERS], ids=lambda a: a.name)
def test_there_and_back_is_the_identity(arrangement: Any) -> None:
    native = model(values=True)[1]
    there = arrangement.layout(native, backward=True).backward(native)
    back = arrangement.layout(there.tensors).forward(there.tensors)
    for moved in (there, back):
        assert not moved.unknown and not moved.halves and not moved.ignored
    assert set(back.tensors) == set(native)
    for name, one in native.items():
        assert torch.equal(back.tensors[name].load(), one.load()), name


def test_missing_and_renamed_tensors_are_refused_by_name() -> None:
    theirs = written(TINY, DIFFUSERS)
    lost = "transformer/single_transformer_blocks.1.proj_mlp.weight"
    without = {name: one for name, one in theirs.items() if name != lost}
    with pytest.raises(BadFile, match=lost):
        DIFFUSERS.layout(without).forward(without).refuse_leftovers("folder")
    renamed = {name.replace("ff_context.net.2", "ff_context.net.3"): one for name, one in theirs.items()}
    with pytest.raises(BadFile, match=r"ff_context\.net\.3"):
        DIFFUSERS.layout(renamed).forward(renamed).refuse_leftovers("folder")


# -- parts and folder ----------------------------------------------------------------------------------------


def test_parts_build_what_their_tensors_say() -> None:
    networks, _ = model()
    for part in DEV.parts:
        shapes = shapes_of(networks[part.name])
        assert part.key in shapes
        with torch.device("meta"):
            built = part.build(shapes)
        assert type(built) is type(networks[part.name]) and shapes_of(built) == shapes


def test_the_autoencoder_is_the_published_one() -> None:
    published = inventory("flux_ae")
    with torch.device("meta"):
        assert shapes_of(DEV.parts[1].build(published)) == published


@pytest.mark.parametrize("shape", [TINY, replace(TINY, guidance=False), replace(TINY, in_channels=24)])
def test_diffusers_makes_the_same_networks_of_our_configurations(shape: FluxShape) -> None:
    diffusers = pytest.importorskip("diffusers")
    networks, native = model(shape)
    theirs = DIFFUSERS.layout(native, backward=True).backward(native).tensors
    for part, prefix, kind in (
        (DEV.parts[0], "transformer/", diffusers.FluxTransformer2DModel),
        (DEV.parts[1], "vae/", diffusers.AutoencoderKL),
    ):
        with torch.device("meta"):
            made = kind.from_config(part.config(shapes_of(networks[part.name])))
        wanted = {n.removeprefix(prefix): one.shape for n, one in theirs.items() if n.startswith(prefix)}
        assert shapes_of(made) == wanted


def test_the_folder_is_a_pipeline() -> None:
    diffusers = pytest.importorskip("diffusers")
    latent = Latent(channels=16, stride=8, scale=0.5, shift=0.25)
    facts = Facts(prediction="flow", zero_snr=False, latent=latent, size=512)
    for family in VARIANTS:
        said = family.folder(facts)
        index = said["model_index.json"]
        pipeline = getattr(diffusers, index["_class_name"])
        parts = set(pipeline._get_signature_keys(pipeline)[0]) - set(pipeline._optional_components)
        assert set(index) == parts | {"_class_name", "_diffusers_version"}
        config = said["scheduler/scheduler_config.json"]
        assert getattr(diffusers, config["_class_name"]).from_config(config).config.shift == config["shift"]
        assert said["vae/config.json"] == {"sample_size": 512, "scaling_factor": 0.5, "shift_factor": 0.25}


# -- noise and conditions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VARIANTS, ids=lambda f: f.variant)
@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (256, 256), (1360, 768), (512, 2048)])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_levels_are_those_of_the_pipeline(family: Family, width: int, height: int, steps: int) -> None:
    pytest.importorskip("diffusers")
    import numpy
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    facts = Facts(prediction="flow", zero_snr=False, latent=family.latent, size=1024)
    config = family.folder(facts)["scheduler/scheduler_config.json"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    tokens = (width // 16) * (height // 16)
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
    schedule = family.schedule()
    if family.resized is not None:
        schedule = family.resized(schedule, width, height)
    assert family.defaults.grid is not None
    grid = make_grid(family.defaults.grid, schedule, steps)
    assert [level.sigma for level in grid] == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)
    assert [level.time for level in grid[:-1]] == pytest.approx(scheduler.timesteps.tolist(), abs=2e-4)


def test_other_noise_is_left_alone() -> None:
    other = scaled_linear()
    assert DEV.resized is not None and DEV.resized(other, 1024, 1024) is other
    assert SCHNELL.resized is None


def given(shape: FluxShape, guidance: float) -> Given:
    torch.manual_seed(3)
    texts = {
        "text": Encoded(z=torch.randn(1, 8, 64), pooled=torch.randn(1, shape.vector_dim)),
        "text_2": Encoded(z=torch.randn(1, 6, shape.context_dim)),
    }
    return Given(shape=shape, sizes=Sizes(original=(64, 64), target=(64, 64)), texts=texts, guidance=guidance)


def test_conditions() -> None:
    told = given(TINY, 3.5)
    named = DEV.condition(told)
    assert set(named) == {"context", "y", "guidance"}
    assert named["context"] is told.texts["text_2"].z and named["y"] is told.texts["text"].pooled
    assert named["guidance"].dtype == torch.float32 and named["guidance"].tolist() == [3.5]
    assert set(SCHNELL.condition(given(replace(TINY, guidance=False), 1.0))) == {"context", "y"}


@pytest.mark.parametrize("family", [DEV, SCHNELL], ids=lambda f: f.variant)
@torch.no_grad()
def test_a_whole_walk_equals_the_pipeline(family: Family) -> None:
    """From noise to latent: packing, places, times, guidance and steps together, on one small network."""
    diffusers = pytest.importorskip("diffusers")
    shape = replace(TINY, guidance=family.guidance == "embedded")
    native = {name: one for name, one in model(shape, values=True)[1].items() if name.startswith("denoiser.")}
    ours = Flux(shape).eval()
    ours.load_state_dict({name.removeprefix("denoiser."): 0.2 * one.load() for name, one in native.items()})
    state = {name: lazy(value) for name, value in ours.state_dict().items()}
    theirs = diffusers.FluxTransformer2DModel.from_config(family.parts[0].config(shapes_of(ours))).eval()
    moved = Layout(*flux_rules(state)).backward(state).tensors
    theirs.load_state_dict({name: one.load() for name, one in moved.items()})
    facts = Facts(prediction="flow", zero_snr=False, latent=family.latent, size=1024)
    config = family.folder(facts)["scheduler/scheduler_config.json"]
    towers = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(config), transformer=theirs, **towers
    )
    pipeline.set_progress_bar_config(disable=True)
    told = given(shape, 2.5)
    noise = torch.randn(1, 4, 6, 10)
    want = pipeline(
        prompt_embeds=told.texts["text_2"].z,
        pooled_prompt_embeds=told.texts["text"].pooled,
        latents=pipeline._pack_latents(noise, 1, 4, 6, 10),
        height=48,
        width=80,
        num_inference_steps=3,
        guidance_scale=2.5,
        output_type="latent",
    ).images
    want = pipeline._unpack_latents(want, 48, 80, 8)

    named = family.condition(told)
    schedule = family.schedule()
    schedule = schedule if family.resized is None else family.resized(schedule, 80, 48)
    grid = make_grid(family.defaults.grid or "", schedule, 3)
    row = PREDICTIONS[family.prediction]

    def clean(ask: Any) -> Tensor:
        return row.clean(ask.x, ours(ask.x, torch.tensor([ask.level.time]), **named), ask.level)

    got = drive(sample(SOLVERS[family.defaults.solver](), noise, grid, ImageNoise(0, noise.shape[1:])), clean)
    assert float((got - want).abs().max() / want.abs().max()) <= 3e-6
