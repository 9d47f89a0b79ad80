"""Blocks by the community's names, and rates for them."""

from __future__ import annotations

from functools import cache

import pytest
from sparse import release

from sumuk.base.errors import BadInput
from sumuk.families.detect import detect
from sumuk.families.published import RELEASES
from sumuk.weights.blocks import BASE, PRESETS, SHORT_PRESETS, Blocks, Rates, block_of

IN = tuple(f"IN{i:02d}" for i in range(12))
OUT = tuple(f"OUT{i:02d}" for i in range(12))
SD = (*IN, "M00", *OUT)
XL = (*IN[:9], "M00", *OUT[:9])


@cache
def native(family: str) -> tuple[str, ...]:
    """A published model's native names."""
    name = next(name for name, each in RELEASES.items() if each.family == family)
    return tuple(detect(release(name)).moved.tensors)


SIZES = {
    "sdxl/base": XL,
    "flux/dev": (*(f"D{i:02d}" for i in range(19)), *(f"S{i:02d}" for i in range(38))),
    "sd3/medium": tuple(f"J{i:02d}" for i in range(24)),
}


@pytest.mark.parametrize("family", ["sdxl/base", "flux/dev", "sd3/medium"])
def test_blocks_of_published_models(family: str) -> None:
    blocks = Blocks.of(native(family))
    assert blocks.names == SIZES[family]
    found = {name: blocks.block(*name.split(".", 1)) for name in native(family)}
    assert set(found.values()) <= {BASE, *blocks.names}
    for name, block in found.items():
        part = name.partition(".")[0]
        assert part == "denoiser" or block == BASE
    if family == "sdxl/base":
        assert found["denoiser.out.2.weight"] == "OUT08" and found["denoiser.label_emb.0.0.weight"] == "IN00"
        assert str(blocks) == "9 + 1 + 9 = 19 blocks (IN00 to OUT08)"


@pytest.mark.parametrize(
    ("part", "name", "block"),
    [
        ("denoiser", "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", "IN04"),
        ("denoiser", "input_blocks.11.0.in_layers.0.weight", "IN11"),
        ("denoiser", "middle_block.1.proj_in", "M00"),
        ("denoiser", "output_blocks.3.1.proj_out", "OUT03"),
        ("denoiser", "time_embed.0.weight", "IN00"),
        ("denoiser", "out.2.weight", "OUT11"),
        ("denoiser", "double_blocks.18.img_attn.qkv", "D18"),
        ("denoiser", "single_blocks.37.linear1", "S37"),
        ("denoiser", "joint_blocks.0.x_block.attn.qkv", "J00"),
        ("denoiser", "final_layer.linear.weight", BASE),
        ("text", "text_model.encoder.layers.3.mlp.fc1.weight", BASE),
        ("vae", "decoder.up.0.block.0.conv1.weight", BASE),
    ],
)
def test_the_block_of_a_tensor(part: str, name: str, block: str) -> None:
    assert block_of(part, name) == block


def test_numbers_one_a_block_and_one_more_for_base() -> None:
    blocks = Blocks(SD)
    numbers = [i / 100 for i in range(26)]
    text = ",".join(map(str, numbers))
    whole = Rates.parse(text, blocks)
    assert [whole.of(name) for name in (BASE, *SD)] == numbers
    rates = Rates.parse(" ".join(map(str, numbers[1:])), blocks, rest=0.9)
    assert [rates.of(name) for name in (BASE, *SD)] == [0.9, *numbers[1:]]
    with pytest.raises(BadInput, match="no rate for the block BASE"):
        Rates.parse(",".join(map(str, numbers[1:])), blocks).of(BASE)
    assert Rates.parse(whole.text, blocks).values == whole.values


def test_short_forms_of_lora_block_weight() -> None:
    """17 for Stable Diffusion 1, 12 and 20 for SDXL, 26 for all blocks."""
    rates = Rates.parse(",".join(map(str, range(17))), Blocks(SD), rest=0.0)
    named = {
        "IN01": 1,
        "IN02": 2,
        "IN04": 3,
        "IN05": 4,
        "IN07": 5,
        "IN08": 6,
        "M00": 7,
        "OUT03": 8,
        "OUT11": 16,
    }
    assert {name: rates.of(name) for name in named} == named
    assert rates.of(BASE) == 0 and all(rates.of(name) == 0 for name in ("IN00", "IN03", "OUT00", "OUT02"))
    rates = Rates.parse(",".join(map(str, range(12))), Blocks(XL), rest=0.0)
    named = {
        BASE: 0,
        "IN04": 1,
        "IN05": 2,
        "IN07": 3,
        "IN08": 4,
        "M00": 5,
        "OUT00": 6,
        "OUT05": 11,
        "OUT06": 0,
    }
    assert {name: rates.of(name) for name in named} == named
    assert Rates.parse(",".join(["1"] * 20), Blocks(XL)).of("OUT08") == 1


def test_pairs_patterns_and_changed_presets() -> None:
    blocks = Blocks(SD)
    rates = Rates.parse("IN04:0.3, OUT*:0.5,OUT07:0.7 m00:1", blocks, rest=0.1)
    assert [rates.of(name) for name in ("IN04", "OUT00", "OUT07", "M00", "IN05", BASE)] == [
        0.3,
        0.5,
        0.7,
        1,
        0.1,
        0.1,
    ]
    assert rates.named == {"IN04", "M00", *OUT}
    changed = Rates.parse("grad_v,BASE:0.4", blocks)
    assert [changed.of(name) for name in (BASE, "IN00", "M00", "OUT11")] == [0.4, 1, 0, 1]
    assert changed.named == {BASE}


# Of supermerger's mbwpresets.txt, without BASE: first, eighth, thirteenth, fourteenth and last number.
KNOWN = {
    "GRAD_V": (1, 0.4166666667, 0, 0.0833333333, 1),
    "GRAD_A": (0, 0.5833333333, 1, 0.9166666667, 0),
    "WRAP14": (1, 0, 0, 0, 1),
    "WRAP16": (1, 1, 0, 0, 1),
    "MID12_50": (0, 0.5, 0.5, 0.5, 0),
    "OUT12_5": (0, 0, 0.5, 1, 1),
    "RING08_SOFT": (0, 1, 0, 0, 0),
    "RING10_3": (0, 1, 0, 0, 0),
    "SMOOTHSTEP": (0, 0.205584490740741, 0.5, 0.562355324074074, 1),
    "SMOOTHSTEP*3": (0, 0.616753472222222, 0.5, 0.312934027777778, 1),
    "SMOOTHSTEP/2": (0, 0.623842592592593, 1, 0.980324074074074, 0),
    "R_SMOOTHSTEP/4": (1, 0.0740740740740742, 1, 0.925925925925926, 1),
    "COSINE": (1, 0.80438071450436, 0.5, 0.434736903889974, 0),
    "TRUE_CUBIC_HERMITE": (0, 0.597360869984568, 0.520833333333333, 0.49438777970679, 1),
    "FAKE_REVERSE_CUBIC_HERMITE": (1, 0.435739776234568, 0.5, 0.523847415123457, 0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_presets_have_their_published_numbers(name: str) -> None:
    base, *numbers = PRESETS[name]
    assert base == 0 and len(numbers) == 25
    assert [numbers[i] for i in (0, 7, 12, 13, 24)] == pytest.approx(KNOWN[name], abs=1e-9)


def test_presets_on_other_models() -> None:
    assert all(len(each) == 26 and all(0 <= x <= 1 for x in each) for each in PRESETS.values())
    assert all(len(each) == 17 for each in SHORT_PRESETS.values())
    rates = Rates.parse("GRAD_V", Blocks(XL))
    assert set(rates.values) == {BASE, *XL} and rates.of("OUT08") == pytest.approx(0.75)
    assert "SDXL" in rates.note
    assert Rates.parse("OUTALL", Blocks(SD), rest=0.0).of("OUT03") == 1
    with pytest.raises(
        BadInput, match="GRAD_V is for Stable Diffusion 1, 2 and XL; this model has 24 blocks"
    ):
        Rates.parse("GRAD_V", Blocks.of(native("sd3/medium")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "block rates are empty"),
        ("GRAD_X", "unknown preset of block rates 'GRAD_X'; did you mean 'GRAD_"),
        (
            "0.1,0.2",
            "2 block rates do not fit this model, which has 9 + 1 + 9 = 19 blocks (IN00 to OUT08): give 19, or 20",
        ),
        (",".join(["1"] * 26), "26 block rates do not fit"),
        ("IN09:1", "no block 'IN09' in this model"),
        ("IN04:much", "block rate 'much' is not a number"),
        ("IN04:nan", "block rate 'nan' is not a number"),
        ("IN04:1,IN04:0", "two rates for the block IN04"),
        ("IN*:1,IN0*:0", "two rates for the block IN00"),
        ("IN04:1,0.5", "block rate '0.5' is no pair"),
        ("0.5,IN04:1", "unknown preset of block rates '0.5'"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        Rates.parse(text, Blocks(XL))
    assert message in str(caught.value)


def test_a_model_without_blocks_takes_one_rate() -> None:
    with pytest.raises(BadInput, match="no blocks, only BASE: give one alpha"):
        Rates.parse("0.1,0.2", Blocks(()))
