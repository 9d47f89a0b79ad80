"""Stable Diffusion 3 and 3.5: what was published, the layouts, and what the towers' words become."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.nets.inventories import KEYS, inventory
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.diffusion.grid import make_grid
from sumuk.families.detect import Match, Unknown, detect
from sumuk.families.family import FAMILIES, Facts, Family, Latent
from sumuk.families.reading import Encoded, Given, Sizes
from sumuk.families.sd3 import (
    CLIP_G,
    CLIP_L,
    DIFFUSERS,
    LARGE_35,
    MEDIUM,
    MEDIUM_35,
    MMDIT,
    SINGLE,
    T5,
    VAE16,
    mmdit_rules,
)
from sumuk.files.layout import Layout
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.clip import ClipShape, ClipText
from sumuk.nets.mmdit import MMDiT, MMDiTShape
from sumuk.nets.t5 import T5Encoder, T5Shape
from sumuk.nets.vae import Vae, VaeShape

OURS = [MEDIUM, MEDIUM_35, LARGE_35]
FILES = {
    "sd3_medium_mmdit": ("sd3_medium.diffusers", MEDIUM),
    "sd35_medium_mmditx": ("sd35_medium.diffusers", MEDIUM_35),
    "sd35_large_mmdit": ("sd35_large.diffusers", LARGE_35),
}
SHAPE = MMDiTShape(width=128, depth=3, context=256, pooled=192, positions=8, qk_norm=True, dual=2)
LOW = ClipShape(vocabulary=20, length=8, width=64, depth=3, hidden=96, projection=64)
HIGH = replace(LOW, width=128, projection=128)
WORDS = T5Shape(vocabulary=30, width=256, depth=2, heads=2, head=64, hidden=160)


def never() -> Tensor:
    raise AssertionError("only names and shapes are looked at")


def header(name: str, prefix: str = "") -> Tensors:
    return {prefix + key: Lazy(shape, "F16", never) for key, shape in inventory(name).items()}


def shapes_of(tensors: Mapping[str, Lazy]) -> dict[str, tuple[int, ...]]:
    return {name: one.shape for name, one in tensors.items()}


def whole(name: str) -> Tensors:
    """All of a single file."""
    return {
        **header(name, "model.diffusion_model."),
        **header("sd3_vae", "first_stage_model."),
        **header("sd3_text_encoders"),
    }


def folder(name: str) -> Tensors:
    return {
        **header(name, "transformer/"),
        **header("sd3_vae.diffusers", "vae/"),
        **header("sd3_clip_l.diffusers", "text_encoder/"),
        **header("clip_g.diffusers", "text_encoder_2/"),
        **header("t5_xxl_encoder", "text_encoder_3/"),
    }


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random."""
    torch.manual_seed(seed)
    for name, value in module.eval().requires_grad_(False).state_dict().items():
        noise = torch.randn(value.shape)
        value.copy_(1 + 0.2 * noise if "norm" in name or ".ln_" in name else noise * value.shape[-1] ** -0.5)
    return module


def tiny() -> dict[str, nn.Module]:
    vae = VaeShape(width=32, multiples=(1, 2), blocks=1, latent=16, quantised=None)
    networks = {
        "denoiser": MMDiT(SHAPE),
        "vae": Vae(vae),
        "text": ClipText(LOW),
        "text_2": ClipText(HIGH, activation="gelu"),
        "text_3": T5Encoder(WORDS),
    }
    return {name: drawn(network) for name, network in networks.items()}


def native(networks: Mapping[str, nn.Module]) -> Tensors:
    return {
        f"{part}.{name}": lazy(value)
        for part, net in networks.items()
        for name, value in net.state_dict().items()
    }


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


# -- what was published --------------------------------------------------------------------------------------------


def test_what_the_family_says() -> None:
    assert FAMILIES["sd3"] is MEDIUM and FAMILIES["sd3.5-large"] is LARGE_35 and len(OURS) == 3
    for family in OURS:
        assert FAMILIES[family.key] is family
        assert family.latent == Latent(channels=16, stride=8, scale=1.5305, shift=0.0609)
        assert (family.prediction, family.guidance, family.defaults.size) == ("flow", "classifier-free", 1024)
        assert [part.optional for part in family.parts] == [False, False, True, True, True]
    assert [(f.defaults.steps, f.defaults.guidance) for f in OURS] == [(28, 7.0), (40, 4.5), (28, 3.5)]


@pytest.mark.parametrize("steps", [4, 28])
def test_noise_and_spacing_are_those_of_the_published_scheduler(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    facts = Facts(prediction="flow", zero_snr=False, latent=MEDIUM.latent, size=1024)
    said = MEDIUM.folder(facts)
    assert said["transformer/config.json"] == {"sample_size": 128}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(said["scheduler/scheduler_config.json"])
    scheduler.set_timesteps(steps)
    assert MEDIUM.defaults.grid == "normal" and MEDIUM.defaults.solver == "euler"
    schedule = MEDIUM.schedule()
    grid = make_grid(MEDIUM.defaults.grid, schedule, steps)
    assert [level.sigma for level in grid] == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
    times = [schedule.time(level) for level in grid[:-1]]
    assert times == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_recognised(name: str) -> None:
    theirs, family = FILES[name]
    extras = {"model.model_sampling.sigmas": Lazy((1000,), "F32", never)}
    for tensors, arrangement, ignored in (
        ({**whole(name), **extras}, "single", 4),
        (folder(theirs), "diffusers", 0),
        (header(name, "model.diffusion_model."), "single", 0),
        (header(name), "bare", 0),
        (header(theirs), "bare-diffusers", 0),
    ):
        answer = detect(tensors, among=[*OURS, FAMILIES["sd1"]])
        assert isinstance(answer, Match)
        assert (answer.family, answer.arrangement.name) == (family, arrangement)
        assert not answer.moved.unknown and not answer.moved.halves and len(answer.moved.ignored) == ignored


def test_nothing_else_is_recognised() -> None:
    names = sorted(path.name.removesuffix(".json") for path in KEYS.glob("*.json"))
    known = {*FILES, *(theirs for theirs, _ in FILES.values())}
    for name in set(names) - known:
        for prefix in {"", json.loads((KEYS / f"{name}.json").read_text()).get("prefix_in_file", "")}:
            assert isinstance(detect(header(name, prefix), among=list(OURS)), Unknown), name


def test_towers_that_do_not_fit_are_named() -> None:
    for name, shape, message in (
        ("text_encoders.t5xxl.transformer.shared.weight", (32128, 2048), r"reads .*4096.* writes .*2048"),
        ("text_encoders.clip_l.transformer.text_projection.weight", (512, 768), "2048.*512"),
    ):
        moved = SINGLE.layout(()).forward(whole("sd3_medium_mmdit") | {name: Lazy(shape, "F16", never)})
        reason = MEDIUM.recognise(shapes_of(moved.tensors))
        assert reason is not None and re.search(message, reason)


def test_published_networks_are_built_whole() -> None:
    """Each part's network has exactly the file's names and shapes."""
    moved = SINGLE.layout(()).forward(whole("sd35_medium_mmditx"))
    for part in MEDIUM_35.parts:
        own = {
            name.removeprefix(f"{part.name}."): one.shape
            for name, one in moved.tensors.items()
            if name.startswith(f"{part.name}.")
        }
        with torch.device("meta"):
            net = part.build(own)
        assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == own, part.name


# -- layouts -------------------------------------------------------------------------------------------------------


def published_map(name: str) -> dict[str, Any]:
    """What the published converter does: diffusers' name to the original one, or to [name, first row, end row]."""
    path = KEYS / "maps" / f"{name}__to_diffusers.json.gz"
    return (
        json.loads(gzip.decompress(path.read_bytes()))["map"] if path.exists() else pytest.skip("maps absent")
    )


@pytest.mark.parametrize("name", FILES)
def test_published_names_key_by_key(name: str) -> None:
    ours, theirs = header(name), header(FILES[name][0])
    forward, backward = (
        Layout(*mmdit_rules(theirs)).forward(theirs),
        Layout(*mmdit_rules(ours)).backward(ours),
    )
    for moved, want in ((forward, ours), (backward, theirs)):
        assert not moved.unknown and not moved.halves and not moved.ignored
        assert shapes_of(moved.tensors) == shapes_of(want)
    sources = {
        key: [one] if isinstance(one, str) else [row[0] for row in one]
        for key, one in published_map(name).items()
    }
    assert {key: backward.origin[key] * len(sources[key]) for key in backward.tensors} == sources


def test_rows_are_cut_where_the_published_converter_cuts_them() -> None:
    """Numbers instead of names: every row is its index in the original."""
    published = inventory("sd35_medium_mmditx")
    known = published_map("sd35_medium_mmditx")
    numbered: Tensors = {}
    for key, (rows, *_) in published.items():
        numbered[key] = lazy(torch.arange(rows))
    moved = Layout(*mmdit_rules(numbered)).backward(numbered)
    for key, source in known.items():
        pieces = [[source, 0, len(numbered[source].load())]] if isinstance(source, str) else source
        want = torch.cat([numbered[name].load()[first:end] for name, first, end in pieces])
        assert torch.equal(moved.tensors[key].load(), want), key


@pytest.mark.parametrize("arrangement", [SINGLE, DIFFUSERS], ids=["single", "diffusers"])
def test_there_and_back_is_the_identity(arrangement: Any) -> None:
    before = native(tiny())
    there = arrangement.layout(before, backward=True).backward(before)
    there.refuse_leftovers("there")
    back = arrangement.layout(there.tensors).forward(there.tensors)
    back.refuse_leftovers("back")
    assert back.tensors.keys() == before.keys()
    for name, one in before.items():
        assert torch.equal(back.tensors[name].load(), one.load()), name


def test_missing_and_misspelt_names_are_refused() -> None:
    for lost, found, message in (
        ("transformer_blocks.1.attn.to_k.weight", None, "to_k.weight"),
        ("transformer_blocks.0.ff.net.2.weight", "transformer_blocks.0.ff.net.3.weight", "ff.net.3.weight"),
    ):
        theirs = Layout(*mmdit_rules(ours := native({"": MMDiT(SHAPE)}))).backward(
            {name.removeprefix("."): one for name, one in ours.items()}
        )
        assert not theirs.unknown
        if found is not None:
            theirs.tensors[found] = theirs.tensors[lost]
        del theirs.tensors[lost]
        with pytest.raises(BadFile, match=message):
            Layout(*mmdit_rules(theirs.tensors)).forward(theirs.tensors).refuse_leftovers("file")


def test_t5s_second_table_is_ignored_by_name() -> None:
    twice = {**header("t5_xxl_encoder"), "encoder.embed_tokens.weight": Lazy((32128, 4096), "F16", never)}
    for dialect in ("original", "diffusers"):
        moved = Layout(*T5.rules(dialect, twice)).forward(twice)
        assert moved.ignored == ["encoder.embed_tokens.weight"] and not moved.unknown
    assert not Layout(*T5.rules("diffusers", ())).backward(header("t5_xxl_encoder")).ignored


def test_configurations_make_diffusers_the_same_network() -> None:
    diffusers = pytest.importorskip("diffusers")
    for name, (theirs, _) in FILES.items():
        with torch.device("meta"):
            net = diffusers.SD3Transformer2DModel.from_config(MMDIT.config(inventory(name)))
        assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == inventory(theirs)
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(VAE16.config(inventory("sd3_vae")))
    assert {key: tuple(value.shape) for key, value in vae.state_dict().items()} == inventory(
        "sd3_vae.diffusers"
    )


# -- text ----------------------------------------------------------------------------------------------------------


def transformers_towers() -> dict[str, nn.Module]:
    """Small towers of the transformers library, made from our configurations."""
    transformers = pytest.importorskip("transformers")
    networks = tiny()
    made: dict[str, nn.Module] = {}
    for part in (CLIP_L, CLIP_G, T5):
        said = part.config({name: tuple(v.shape) for name, v in networks[part.name].state_dict().items()})
        configuration = transformers.T5Config if part is T5 else transformers.CLIPTextConfig
        kind = getattr(transformers, said.pop("architectures")[0])
        made[part.name] = drawn(kind(configuration(**said)), seed=len(made) + 1)
    return made


def ours_from(part: Any, theirs: nn.Module) -> nn.Module:
    """A tower of ours, built and filled from theirs through the part's layout."""
    foreign = {name: lazy(value) for name, value in theirs.state_dict().items()}
    moved = Layout(*part.rules("diffusers", foreign)).forward(foreign)
    moved.refuse_leftovers(part.name)
    net = part.build(shapes_of(moved.tensors))
    net.load_state_dict({name: one.load() for name, one in moved.tensors.items()}, strict=True)
    return net.eval().requires_grad_(False)


def read(family: Family, towers: Mapping[str, nn.Module], ids: Mapping[str, Tensor]) -> dict[str, Encoded]:
    """What the family's readings take from towers."""
    said: dict[str, Encoded] = {}
    for reading in family.readings:
        if reading.part not in towers:
            continue
        out = towers[reading.part](ids[reading.part])
        if reading.words == "t5":
            said[reading.part] = Encoded(z=out.last)
        else:
            said[reading.part] = Encoded(
                z=out.skip(reading.layer, reading.norm), pooled=getattr(out, str(reading.pool))
            )
    return said


def given(texts: Mapping[str, Encoded], shape: MMDiTShape = SHAPE) -> Given:
    return Given(shape=shape, sizes=Sizes(original=(64, 64), target=(64, 64)), texts=texts)


@pytest.mark.parametrize("with_t5", [True, False])
@torch.no_grad()
def test_conditions_equal_diffusers(with_t5: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    towers = transformers_towers()
    end = LOW.vocabulary - 1
    clip = torch.tensor([[18, 3, 4, 5, end, end, end, end]])
    ids = {"text": clip, "text_2": clip.clone(), "text_3": torch.tensor([[5, 6, 7, 1, *[0] * 252]])}
    ids["text_2"][:, 5:] = 0
    pipeline = diffusers.StableDiffusion3Pipeline

    class Borrowed:
        """What the pipeline's method for prompts needs."""

        encode_prompt = pipeline.encode_prompt
        _get_clip_prompt_embeds = pipeline._get_clip_prompt_embeds
        _get_t5_prompt_embeds = pipeline._get_t5_prompt_embeds
        text_encoder, text_encoder_2 = towers["text"], towers["text_2"]
        text_encoder_3 = towers["text_3"] if with_t5 else None
        transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=SHAPE.context))
        tokenizer_max_length, _execution_device = 8, "cpu"

    theirs = Borrowed()
    for name, part in (("tokenizer", "text"), ("tokenizer_2", "text_2"), ("tokenizer_3", "text_3")):
        setattr(theirs, name, lambda *_, part=part, **__: SimpleNamespace(input_ids=ids[part]))
    context, _, pooled, _ = theirs.encode_prompt("a", "a", "a", do_classifier_free_guidance=False)

    ours = {part.name: ours_from(part, towers[part.name]) for part in (CLIP_L, CLIP_G, T5)}
    if not with_t5:
        del ours["text_3"]
    got = MEDIUM.condition(given(read(MEDIUM, ours, ids)))
    assert got["context"].shape == (1, 8 + 256, SHAPE.context)
    assert error(got["context"], context) <= 2e-6
    assert error(got["y"], pooled) <= 2e-6


def some_texts() -> dict[str, Encoded]:
    torch.manual_seed(3)
    return {
        "text": Encoded(z=torch.randn(1, 8, 64), pooled=torch.randn(1, 64)),
        "text_2": Encoded(z=torch.randn(1, 16, 128), pooled=torch.randn(1, 128)),
        "text_3": Encoded(z=torch.randn(1, 9, 256)),
    }


def test_missing_towers_leave_zeros_in_their_places() -> None:
    texts = some_texts()
    low, high, words = (texts[part] for part in ("text", "text_2", "text_3"))
    for lost, rows, t5 in (
        ((), 16, 9),  # the shorter of two CLIP texts is filled up
        (("text",), 16, 9),
        (("text_2",), 8, 9),
        (("text_3",), 16, 256),
        (("text", "text_2"), 77, 9),
        (("text_2", "text_3"), 8, 256),
    ):
        context, y = torch.zeros(1, rows + t5, 256), torch.zeros(1, 192)
        if "text" not in lost:
            context[:, :8, :64], y[:, :64] = low.z, low.pooled
        if "text_2" not in lost:
            context[:, :16, 64:192], y[:, 64:] = high.z, high.pooled
        if "text_3" not in lost:
            context[:, rows:] = words.z
        got = MEDIUM.condition(given({part: said for part, said in texts.items() if part not in lost}))
        assert torch.equal(got["context"], context) and torch.equal(got["y"], y), lost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None, "text_2": None, "text_3": None}, "no text tower"),
        ({"text": Encoded(z=torch.zeros(1, 8, 64))}, "whole sentence"),
        ({"text": Encoded(z=torch.zeros(1, 8, 64), pooled=torch.zeros(1, 60))}, r"192 numbers.*\[60, 128\]"),
        ({"text": Encoded(z=torch.zeros(1, 8, 140), pooled=torch.zeros(1, 64))}, r"256.*\[140, 128, 256\]"),
        ({"text_3": Encoded(z=torch.zeros(1, 9, 200))}, r"256.*\[64, 128, 200\]"),
    ],
)
def test_texts_that_do_not_fit_are_refused(change: dict[str, Encoded | None], message: str) -> None:
    texts = {part: said for part, said in {**some_texts(), **change}.items() if said is not None}
    with pytest.raises(BadInput, match=message):
        MEDIUM.condition(given(texts))


@torch.no_grad()
def test_a_whole_small_model_takes_what_its_family_makes() -> None:
    networks = tiny()
    ids = {"text": torch.tensor([[18, 3, 19]]), "text_2": torch.tensor([[18, 3, 19]])}
    named = MEDIUM_35.condition(given(read(MEDIUM_35, {p: networks[p] for p in ids}, ids)))
    x, t = torch.randn(1, 16, 7, 10), torch.tensor([700.0])
    assert networks["denoiser"](x, t, **named).isfinite().all()
