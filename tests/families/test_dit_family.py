"""DiT as a family: recognised in each layout, and its embedders and positions there and back without a loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.nets.inventories import KEYS, inventory, shapes_of

from sumuk.base.errors import BadFile, BadInput
from sumuk.families import dit
from sumuk.families.family import FAMILIES, Arrangement, Facts, Family, Latent
from sumuk.families.reading import Given, Sizes
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.dit import DiT, DiTShape

TINY = DiTShape(width=64, depth=3, heads=1, classes=11, tokens=256)
PATCHY = DiTShape(width=128, depth=1, heads=2, classes=5, tokens=16, patch=8, out_channels=4)
TRANSFORMERS = [
    Arrangement(name=a.name, title="", dialect=a.dialect, parts=a.parts[:1], ignored=a.ignored)
    for a in dit.DIT.arrangements
]


def never() -> torch.Tensor:
    raise AssertionError("only names and shapes are known")


def headers(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> Tensors:
    return {prefix + name: Lazy(shape, "F32", never) for name, shape in shapes.items()}


def native(shape: DiTShape) -> Tensors:
    torch.manual_seed(0)
    state = DiT(shape).state_dict()
    return {
        f"denoiser.{name}": lazy(value if name == "pos_embed" else torch.randn(value.shape))
        for name, value in state.items()
    }


def theirs_of(ours: Tensors) -> Tensors:
    """The same in the diffusers layout, without a folder."""
    moved = dit.BARE_DIFFUSERS.layout(ours, backward=True).backward(ours)
    assert not moved.unknown and not moved.halves
    return moved.tensors


def recognised(tensors: Tensors, arrangement: Arrangement) -> str | None:
    moved = arrangement.layout(tensors).forward(tensors).tensors
    return dit.DIT.recognise({name: one.shape for name, one in moved.items()})


@pytest.mark.parametrize(
    "name", ["dit_s_2", "dit_b_2", "dit_l_2", "dit_xl_2", "dit_xl_2_512", "dit_xl_2.diffusers"]
)
def test_published_files(name: str) -> None:
    tensors = headers(inventory(name))
    expected = "bare-diffusers" if name.endswith(".diffusers") else "bare"
    fits = []
    for arrangement in dit.DIT.arrangements:
        if recognised(tensors, arrangement) is None:
            moved = arrangement.layout(tensors).forward(tensors)
            assert not moved.unknown and not moved.halves and not moved.ignored
            fits.append(arrangement.name)
    assert fits == [expected]


def test_their_names_are_those_of_the_published_folder() -> None:
    ours = headers(inventory("dit_xl_2"), "denoiser.")
    there = theirs_of(ours)
    assert {name: one.shape for name, one in there.items()} == inventory("dit_xl_2.diffusers")
    assert sum(one.parameters for one in there.values()) == 749_826_464
    back = dit.BARE_DIFFUSERS.layout(there).forward(there).tensors
    assert {name: one.shape for name, one in back.items()} == {name: one.shape for name, one in ours.items()}


@pytest.mark.skipif(not KEYS.exists(), reason="inventories absent")
def test_no_other_published_network_is_one() -> None:
    names = sorted(path.name.removesuffix(".json") for path in KEYS.glob("*.json"))
    for name in names:
        tensors, found = headers(inventory(name)), 0
        for arrangement in dit.DIT.arrangements:
            try:
                found += recognised(tensors, arrangement) is None
            except BadFile:
                continue
        assert found == name.startswith("dit_"), name


@pytest.mark.parametrize("arrangement", TRANSFORMERS, ids=lambda a: a.name)
@pytest.mark.parametrize("shape", [TINY, PATCHY], ids=["tiny", "patchy"])
def test_there_and_back_bit_for_bit(arrangement: Arrangement, shape: DiTShape) -> None:
    ours = native(shape)
    there = arrangement.layout(ours, backward=True).backward(ours)
    assert not there.unknown and not there.halves and not there.ignored
    read = {name: lazy(one.load()) for name, one in there.tensors.items()}
    back = arrangement.layout(read).forward(read)
    assert not back.unknown and not back.halves and not back.ignored
    assert back.tensors.keys() == ours.keys()
    for name, one in ours.items():
        assert torch.equal(back.tensors[name].load(), one.load()), name


def test_a_whole_model_in_a_folder_and_in_a_file() -> None:
    parts = {"denoiser.": inventory("dit_xl_2"), "vae.": inventory("sd15_vae")}
    ours = {name: one for prefix, shapes in parts.items() for name, one in headers(shapes, prefix).items()}
    for arrangement in (dit.SINGLE, dit.DIFFUSERS):
        there = arrangement.layout(ours, backward=True).backward(ours)
        back = arrangement.layout(there.tensors).forward(there.tensors)
        assert not there.unknown and not back.unknown and not back.halves
        assert {k: one.shape for k, one in back.tensors.items()} == {k: one.shape for k, one in ours.items()}


def test_copies_that_differ_are_refused_when_they_are_read() -> None:
    theirs = theirs_of(native(TINY))
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    changed = theirs[name].load().clone()
    changed[-1, -1] += 1
    theirs[name] = lazy(changed)
    moved = dit.BARE_DIFFUSERS.layout(theirs).forward(theirs)
    assert not moved.unknown and not moved.halves
    with pytest.raises(BadFile, match=r"transformer_blocks\.2\.norm1\.emb differs") as caught:
        moved.tensors["denoiser.y_embedder.embedding_table.weight"].load()
    assert caught.value.code == "dit.copies"
    moved.tensors["denoiser.t_embedder.mlp.0.weight"].load()


def test_copies_of_another_shape_are_refused_at_once() -> None:
    theirs = theirs_of(native(TINY))
    theirs["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"] = lazy(torch.zeros(65))
    with pytest.raises(BadFile, match="copies of an embedder differ"):
        dit.BARE_DIFFUSERS.layout(theirs).forward(theirs)


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight",
        "transformer_blocks.1.attn1.to_v.weight",
    ],
)
def test_a_lost_part_of_several_is_an_error(name: str) -> None:
    theirs = theirs_of(native(TINY))
    del theirs[name]
    moved = dit.BARE_DIFFUSERS.layout(theirs).forward(theirs)
    with pytest.raises(BadFile) as caught:
        moved.refuse_leftovers("file")
    assert name in str(caught.value)


def test_a_renamed_tensor_is_refused_by_name() -> None:
    tensors = {name.removeprefix("denoiser."): one for name, one in native(TINY).items()}
    tensors["z_embedder.proj.bias"] = tensors.pop("x_embedder.proj.bias")
    with pytest.raises(BadFile, match=r"z_embedder\.proj\.bias"):
        dit.BARE.layout(tensors).forward(tensors).refuse_leftovers("file")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_positions_are_made_anew_and_only_if_they_are_the_constant(dtype: torch.dtype) -> None:
    ours = native(TINY)
    rounded = ours["denoiser.pos_embed"].load().to(dtype)
    theirs = theirs_of(ours | {"denoiser.pos_embed": lazy(rounded)})
    assert "pos_embed" not in theirs and theirs["pos_embed.proj.weight"].load().shape == (64, 4, 2, 2)
    rounded[0, 3, 5] += 0.1
    theirs = theirs_of(ours | {"denoiser.pos_embed": lazy(rounded)})
    with pytest.raises(BadFile, match="pos_embed is not the constant"):
        theirs["pos_embed.proj.weight"].load()


def test_a_hostile_header_of_many_blocks_is_not_followed() -> None:
    names = {f"transformer_blocks.{i}.attn1.to_q.weight" for i in range(5000)}
    assert max(len(rule.foreign) for rule in dit.dit_rules(names)) == dit.MOST


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("y_embedder.embedding_table.weight", None, "y_embedder"),
        ("x_embedder.proj.weight", (64, 16, 2, 2), "takes 16 channels"),
        ("x_embedder.proj.weight", (64, 16), "x_embedder"),
        ("final_layer.linear.weight", (48, 64), "makes 48 numbers of a patch, not 16 or 32"),
        ("blocks.0.attn.qkv.weight", None, "blocks.0.attn.qkv.weight"),
    ],
)
def test_the_reason_names_what_is_amiss(name: str, size: tuple[int, ...] | None, why: str) -> None:
    shapes = {key: one.shape for key, one in native(TINY).items()}
    del shapes[f"denoiser.{name}"]
    if size:
        shapes[f"denoiser.{name}"] = size
    reason = dit.DIT.recognise(shapes)
    assert reason is not None and why in reason and "\n" not in reason


@pytest.mark.parametrize(
    ("label", "negative", "row"),
    [(3, False, 3), (3, True, 10), (None, False, 10), (None, True, 10), (0, False, 0)],
)
def test_the_class_or_none(label: int | None, negative: bool, row: int) -> None:
    given = Given(shape=TINY, sizes=Sizes(original=(8, 8), target=(8, 8)), label=label, negative=negative)
    y = dit.DIT.condition(given)["y"]
    assert y.dtype == torch.long and y.tolist() == [row]


@pytest.mark.parametrize("label", [-1, 10, 1000])
def test_a_class_that_there_is_not_is_refused(label: int) -> None:
    given = Given(shape=TINY, sizes=Sizes(original=(8, 8), target=(8, 8)), label=label)
    with pytest.raises(BadInput, match=rf"class {label} is outside 0\.\.9"):
        dit.DIT.condition(given)


def test_what_it_says_of_itself() -> None:
    family = FAMILIES["dit"]
    assert family is dit.DIT and isinstance(family, Family)
    assert family.latent == Latent(channels=4, stride=8, scale=0.18215)
    assert (family.readings, family.guidance, family.prediction) == ((), "classifier-free", "eps")
    assert family.classes and family.defaults.size == 256 and family.defaults.guidance == 4.0
    assert [part.name for part in family.parts] == ["denoiser", "vae"]
    assert family.schedule().level(0).alpha ** 2 == pytest.approx(1 - 1e-4)


@pytest.mark.parametrize("shape", [TINY, PATCHY, replace(TINY, tokens=64)])
def test_a_folder_is_what_diffusers_opens(shape: DiTShape) -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        shapes = shapes_of(DiT(shape))
        theirs = diffusers.DiTTransformer2DModel.from_config(dit.TRANSFORMER.config(shapes))
    assert theirs.config.sample_size == shape.side * shape.patch
    there = theirs_of(headers(shapes, "denoiser."))
    assert {name: one.shape for name, one in there.items()} == shapes_of(theirs)
    said = dit.DIT.folder(Facts(prediction="eps", zero_snr=False, latent=dit.DIT.latent, size=256))
    scheduler = diffusers.DDIMScheduler.from_config(said["scheduler/scheduler_config.json"])
    level = dit.DIT.schedule().level(500)
    assert float(scheduler.alphas_cumprod[500]) == pytest.approx(level.alpha**2, rel=1e-5)


def test_the_part_builds_what_was_read() -> None:
    with torch.device("meta"):
        shapes = shapes_of(DiT(PATCHY))
        assert shapes_of(dit.TRANSFORMER.build(shapes)) == shapes
