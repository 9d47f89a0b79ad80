"""Towers in files of their own: which they are, in both namings, in every place where they are kept."""

from __future__ import annotations

import pytest
import torch
from tests.nets.inventories import inventory, shapes_of

from sumuk.families.cascade_parts import IMAGE
from sumuk.families.detect import Match, Unknown, detect
from sumuk.families.encoders import BUNDLE, CLIP_G_KIND, CLIP_H_KIND, CLIP_L_KIND, T5_KIND
from sumuk.families.family import FAMILIES, Kind
from sumuk.files.tensors import Lazy, Tensors, lazy
from sumuk.nets.clip_vision import ClipVision, ClipVisionShape


def never() -> torch.Tensor:
    raise AssertionError("only names and shapes are looked at")


def header(name: str, prefix: str = "") -> Tensors:
    return {prefix + key: Lazy(shape, "F16", never) for key, shape in inventory(name).items()}


def matched(tensors: Tensors, kind: Kind, layout: str) -> Match:
    answer = detect(tensors)
    assert isinstance(answer, Match), answer.why
    assert (answer.family, answer.arrangement.name) == (kind, layout)
    assert not answer.moved.unknown and not answer.moved.halves
    return answer


PLACES = [
    ("clip_l.diffusers", CLIP_L_KIND, "bare", ""),
    ("sd15_clip_l", CLIP_L_KIND, "single", "cond_stage_model.transformer."),
    ("sdxl_base_clip_l", CLIP_L_KIND, "single", "conditioner.embedders.0.transformer."),
    ("sd3_clip_l.diffusers", CLIP_L_KIND, "single", "text_encoders.clip_l.transformer."),
    ("sd3_clip_l.diffusers", CLIP_L_KIND, "diffusers", "text_encoder/"),
    ("sd2_openclip_h", CLIP_H_KIND, "bare", ""),
    ("sd2_openclip_h", CLIP_H_KIND, "single", "cond_stage_model.model."),
    ("sd2_clip_h.diffusers", CLIP_H_KIND, "bare-diffusers", ""),
    ("sd2_clip_h.diffusers", CLIP_H_KIND, "diffusers", "text_encoder/"),
    ("sdxl_base_openclip_g", CLIP_G_KIND, "bare", ""),
    ("sdxl_base_openclip_g", CLIP_G_KIND, "single", "conditioner.embedders.1.model."),
    ("sdxl_refiner_openclip_g", CLIP_G_KIND, "single", "conditioner.embedders.0.model."),
    ("clip_g.diffusers", CLIP_G_KIND, "bare-diffusers", ""),
    ("clip_g.diffusers", CLIP_G_KIND, "single", "text_encoders.clip_g.transformer."),
    ("clip_g.diffusers", CLIP_G_KIND, "diffusers", "text_encoder_2/"),
    ("t5_xxl_encoder", T5_KIND, "bare", ""),
    ("t5_xxl_encoder", T5_KIND, "single", "text_encoders.t5xxl.transformer."),
    ("t5_xxl_encoder", T5_KIND, "diffusers", "text_encoder_2/"),
    ("t5_xxl_encoder", T5_KIND, "diffusers", "text_encoder_3/"),
]


@pytest.mark.parametrize(("name", "kind", "layout", "prefix"), PLACES, ids=[f"{p[3]}{p[0]}" for p in PLACES])
def test_towers_in_all_their_places(name: str, kind: Kind, layout: str, prefix: str) -> None:
    answer = matched(header(name, prefix), kind, layout)
    (part,) = kind.parts
    own = {n.removeprefix(f"{part.name}."): one.shape for n, one in answer.moved.tensors.items()}
    with torch.device("meta"):
        assert shapes_of(part.build(own)) == own
    assert kind.tells is not None
    said = kind.tells({n: one.shape for n, one in answer.moved.tensors.items()})
    depth, width = {"clip-l": (12, 768), "openclip-g": (32, 1280), "t5": (24, 4096)}.get(
        kind.variant, (24 if "openclip" in name else 23, 1024)
    )
    assert said["tower"].startswith(f"{depth} blocks, width {width}, ") and said["serves"]


def test_one_without_its_first_name_and_one_with_positions() -> None:
    headless = {n.removeprefix("text_model."): one for n, one in header("clip_l.diffusers").items()}
    matched(headless, CLIP_L_KIND, "bare")
    positions = {"text_model.embeddings.position_ids": Lazy((1, 77), "I64", never)}
    answer = matched({**header("clip_l.diffusers"), **positions}, CLIP_L_KIND, "bare")
    assert answer.moved.ignored == ["text_model.embeddings.position_ids"]


def vision(width: int, depth: int = 2, prefix: str = "") -> Tensors:
    heads = ClipVisionShape(width=width, depth=depth, hidden=64, projection=32, heads=16)
    with torch.device("meta"):
        state = ClipVision(heads).state_dict()
    return {prefix + name: lazy(value) for name, value in state.items()}


@pytest.mark.parametrize(("variant", "width"), [("clip-l", 1024), ("openclip-h", 1280), ("openclip-g", 1664)])
def test_image_towers(variant: str, width: int) -> None:
    kind = FAMILIES[f"image-encoder/{variant}"]
    for prefix, layout in (("", "bare"), ("clip_l_vision.", "single"), ("image_encoder/", "diffusers")):
        positions = {f"{prefix}vision_model.embeddings.position_ids": Lazy((1, 257), "I64", never)}
        answer = matched({**vision(width, prefix=prefix), **positions}, kind, layout)
        own = {n.removeprefix("image."): one.shape for n, one in answer.moved.tensors.items()}
        with torch.device("meta"):
            assert shapes_of(IMAGE.build(own)) == own


def test_a_whole_clip_is_its_text_tower_with_more() -> None:
    both = {**header("sd3_clip_l.diffusers"), **vision(1024), "logit_scale": Lazy((), "F32", never)}
    answer = matched(both, CLIP_L_KIND, "bare")
    assert len(answer.moved.ignored) == len(vision(1024)) + 1


def test_the_bundle_and_what_is_one_tower_of_it() -> None:
    matched(header("sd3_text_encoders"), BUNDLE, "single")
    without_t5 = {n: one for n, one in header("sd3_text_encoders").items() if "t5xxl" not in n}
    matched(without_t5, BUNDLE, "single")
    flux = {
        **header("clip_l.diffusers", "text_encoders.clip_l.transformer."),
        **header("t5_xxl_encoder", "text_encoders.t5xxl.transformer."),
    }
    matched(flux, BUNDLE, "single")
    matched(header("t5_xxl_encoder", "text_encoders.t5xxl.transformer."), T5_KIND, "single")


def test_other_widths_and_other_t5s_are_no_published_tower() -> None:
    token, head = "text_model.embeddings.token_embedding.weight", header("clip_l.diffusers")
    answer = detect({**head, token: Lazy((49408, 512), "F16", never)})
    assert isinstance(answer, Unknown) and [part.name for part in answer.parts] == ["text"]
    assert {near.why for near in answer.near} >= {"its width is 512, not 768"}
    t5 = header("t5_xxl_encoder")
    row = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    answer = detect({**t5, row: Lazy((32, 64), "F16", never)})
    assert isinstance(answer, Unknown) and any("UMT5" in near.why for near in answer.near)
    old = {n.replace("wi_0", "wi"): one for n, one in t5.items() if "wi_1" not in n}
    answer = detect(old)
    assert isinstance(answer, Unknown) and any("not gated" in near.why for near in answer.near)
    patches = {"vision_model.embeddings.patch_embedding.weight": Lazy((512, 3, 14, 14), "F16", never)}
    assert isinstance(detect(vision(1024) | patches), Unknown)
