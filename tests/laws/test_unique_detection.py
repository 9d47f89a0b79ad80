"""Every header belongs to one family or to none, and the answer is the right one.

The inventories of published files stand in for the files: names and shapes are all that detection sees.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sumuk.families.detect import Match, Unknown, detect, families
from sumuk.families.family import FAMILIES, Family
from sumuk.files.tensors import Lazy, Tensors

KEYS = Path(__file__).parents[2].parent / "shared" / "facts" / "keys"
NAMES = sorted(path.name.removesuffix(".json") for path in KEYS.glob("*.json"))

EXPECTED = {
    "sd15_unet": "sd1/text-to-image",
    "sd15_inpaint_unet": "sd1/inpainting",
}
"""Inventories that a family must recognise, with or without ``.diffusers``."""

SD1 = {
    "sd15_unet": "model.diffusion_model.",
    "sd15_vae": "first_stage_model.",
    "sd15_clip_l": "cond_stage_model.transformer.",
}
FOLDER = {"sd15_unet.diffusers": "unet/", "sd15_vae.diffusers": "vae/", "clip_l.diffusers": "text_encoder/"}


def never() -> torch.Tensor:
    raise AssertionError("detection loads no tensor")


def inventory(name: str, prefix: str | None = None) -> Tensors:
    path = KEYS / f"{name}.json"
    if not path.exists():
        pytest.skip("the inventories of published files are not here")
    table = json.loads(path.read_text())
    prefix = table.get("prefix_in_file", "") if prefix is None else prefix
    return {prefix + key: Lazy(tuple(shape), "F16", never) for key, shape in table["tensors"].items()}


def together(parts: dict[str, str]) -> Tensors:
    return {key: one for name, prefix in parts.items() for key, one in inventory(name, prefix).items()}


@pytest.mark.parametrize("name", NAMES)
def test_each_published_network_is_its_own_family_or_none(name: str) -> None:
    answer = detect(inventory(name))
    expected = EXPECTED.get(name.removesuffix(".diffusers"))
    sd1 = isinstance(answer, Match) and answer.family.name == "sd1"
    assert sd1 == (expected is not None)
    if expected:
        assert isinstance(answer, Match) and answer.family.key == expected and not answer.moved.unknown
    if isinstance(answer, Unknown):
        assert answer.why and "\n" not in answer.why and "tied" not in answer.why


@pytest.mark.parametrize(("parts", "layout"), [(SD1, "single"), (FOLDER, "diffusers")])
def test_a_whole_sd1(parts: dict[str, str], layout: str) -> None:
    answer = detect(together(parts))
    assert isinstance(answer, Match)
    assert (answer.family.key, answer.arrangement.name) == ("sd1/text-to-image", layout)
    assert not answer.moved.unknown and not answer.moved.halves


def test_extras_of_training_do_not_disturb() -> None:
    tensors = {**together(SD1), **inventory("sd15_ckpt_extras", ""), **inventory("sd15_model_ema")}
    answer = detect(tensors)
    assert isinstance(answer, Match) and answer.family.key == "sd1/text-to-image"
    assert not answer.moved.unknown
    assert len(answer.moved.ignored) == 12 + 1 + 688  # buffers, position_ids, averages


def test_instruct_pix2pix() -> None:
    tensors = together(SD1)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = Lazy((320, 8, 3, 3), "F16", never)
    answer = detect(tensors)
    assert isinstance(answer, Match) and answer.family.key == "sd1/instruct-pix2pix"
    tensors[first] = Lazy((320, 7, 3, 3), "F16", never)
    answer = detect(tensors)
    assert isinstance(answer, Unknown) and "takes 7 channels" in answer.why


def test_a_text_tower_of_another_width_is_noticed() -> None:
    answer = detect(
        {
            **together(SD1),
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": Lazy(
                (49408, 1024), "F16", never
            ),
        }
    )
    assert isinstance(answer, Unknown) and "1024" in answer.why


def test_the_same_twice_ties_and_says_so() -> None:
    sd1 = FAMILIES["sd1"]
    answer = detect(together(SD1), among=[sd1, sd1])
    assert isinstance(answer, Unknown) and "fit alike" in answer.why


def test_parts_alone() -> None:
    for name in ("sd15_vae", "sd15_vae.diffusers", "sdxl_vae", "sd15_clip_l"):
        answer = detect(inventory(name))
        assert isinstance(answer, Unknown) and "only the" in answer.why
        assert [part.name for part in answer.parts] == ["text" if "clip" in name else "vae"]


def test_families_are_named_once() -> None:
    keys = [family.key for family in families()]
    assert len(keys) == len(set(keys))
    for family in families():
        assert FAMILIES[family.key] is family
        if isinstance(family, Family):
            assert {reading.part for reading in family.readings} <= {part.name for part in family.parts}
