"""The lineage as data: whole, consistent with the families, and with the published counts."""

from __future__ import annotations

import pytest
from tests.nets.inventories import inventory

from sumuk.families.detect import families
from sumuk.families.family import FAMILIES, Family
from sumuk.families.lineage import EITHER, LIMITS, LINEAGE, Known, alike

COUNTS = {
    "sd-1.5": "sd15_unet", "sd-1.5-inpainting": "sd15_inpaint_unet", "sd-2.1": "sd2_unet",
    "sd-2-inpainting": "sd2_inpaint_unet", "sd-2-depth": "sd2_depth_unet", "sd-x4-upscaler": "sd2_x4_unet",
    "sd-2.1-unclip": "sd21_unclip_h_unet", "sdxl": "sdxl_base_unet", "sdxl-refiner": "sdxl_refiner_unet",
    "sdxl-inpainting": "sdxl_inpaint_unet.diffusers", "dit": "dit_xl_2", "controlnet": "controlnet_sd15",
    "cascade": "cascade_stage_c_3.6b", "sd-3-medium": "sd3_medium_mmdit", "sd-3.5-large": "sd35_large_mmdit",
    "sd-3.5-large-turbo": "sd35_large_mmdit", "sd-3.5-medium": "sd35_medium_mmditx", "flux-dev": "flux1_dev",
    "flux-schnell": "flux1_schnell", "flux-fill": "flux1_fill_dev", "flux-control": "flux1_canny_depth_dev",
    "ddpm": "ddpm_cifar10",
}  # fmt: skip


@pytest.fixture(autouse=True)
def known_families() -> None:
    families()


def all_known() -> list[Known]:
    return [LINEAGE[name] for name in LINEAGE]


def product(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_published_files(name: str) -> None:
    tensors = inventory(COUNTS[name])
    assert sum(map(product, tensors.values())) in LINEAGE[name].counts


def test_rounded_figures_fit_the_counts() -> None:
    units = {"M": 10**6, "B": 10**9}
    for known in all_known():
        figures = [
            float(word[:-1]) * units[word[-1]] for word in known.parameters.split() if word[-1] in units
        ]
        assert bool(figures) == (known.parameters not in ("", "several")), known.name
        for count in known.counts:
            # Tables of positions count as tensors, but not in what is published.
            assert 0.9 * min(figures) <= count <= 1.12 * max(figures), known.name


def test_the_whole_lineage_is_there() -> None:
    wanted = (
        "ddpm", "ddim", "score-sde", "ldm", "sd-1.1", "sd-1.2", "sd-1.3", "sd-1.4", "sd-1.5", "sd-1.5-inpainting",
        "instruct-pix2pix", "sd-2.0", "sd-2.1", "sdxl", "sdxl-refiner", "sdxl-turbo", "sdxl-lightning", "lcm",
        "sd-3-medium", "sd-3.5-medium", "sd-3.5-large", "sd-3.5-large-turbo", "flux-dev", "flux-schnell", "flux-fill",
        "flux-control", "flux-krea", "flux-kontext", "dit", "controlnet", "cascade",
    )  # fmt: skip
    assert set(wanted) <= set(LINEAGE)
    assert LINEAGE["flux"] is LINEAGE["flux-dev"] and LINEAGE["SDXL base"] is LINEAGE["sdxl"]


def test_what_sumuk_does_is_asked_of_the_families() -> None:
    for known in all_known():
        kind = FAMILIES[known.family] if known.family else None
        assert known.status == ("no" if kind is None else "draws" if isinstance(kind, Family) else "files")
        assert not known.family or known.family in FAMILIES, "a family that is not here yet is left out"
    assert {LINEAGE[name].status for name in ("score-sde", "ldm", "lcm")} == {"no"}
    assert LINEAGE["controlnet"].status == "files" and LINEAGE["sd-1.5"].status == "draws"
    drawn = {known.family for known in all_known()}
    silent = {
        kind.key
        for kind in (FAMILIES[name] for name in FAMILIES)
        if isinstance(kind, Family) and kind.key not in drawn
    }
    # Variants of what is told under another: other sizes of DDPM, unCLIP's other tower, Cascade's second stage.
    assert silent == {"ddpm/celeba", "ddpm/lsun", "sd2/unclip-l", "cascade/stage-b"}


def test_predictions_and_licences_agree_with_the_families() -> None:
    for known in all_known():
        kind = FAMILIES[known.family] if known.family else None
        if not isinstance(kind, Family) or known.name == "ddim":
            continue
        if known.prediction != kind.prediction:
            assert kind.name in EITHER, f"{known.name} predicts otherwise than its family"
        alone = [other for other in all_known() if other.family == known.family]
        if len(alone) == 1 and not known.licence.startswith("that of"):
            assert known.licence == kind.licence, known.name
    predicts = {FAMILIES[name].prediction for name in FAMILIES if isinstance(FAMILIES[name], Family)}  # type: ignore[attr-defined]
    assert predicts == {"eps", "v", "flow"}


def test_licences_that_bound_use() -> None:
    bounds = {known.name: known.commercial for known in all_known()}
    assert {bounds[name] for name in ("flux-dev", "flux-krea", "cascade", "dit", "sdxl-turbo")} == {"no"}
    assert {bounds[name] for name in ("sd-3-medium", "sd-3.5-large")} == {"bounded"}
    assert {bounds[name] for name in ("sd-1.5", "sdxl", "flux-schnell", "ddpm")} == {"yes"} and bounds[
        "ddim"
    ] == ""
    for kind in (FAMILIES[name] for name in FAMILIES):
        if kind.licence not in LIMITS:
            assert kind.licence in ("unknown", "MIT", "Apache-2.0") or "OpenRAIL" in kind.licence, kind.key


def test_models_with_the_same_tensors() -> None:
    assert [known.name for known in alike("sdxl/base", 2_567_463_684)] == [
        "sdxl",
        "sdxl-turbo",
        "sdxl-lightning",
    ]
    assert [known.name for known in alike("flux/dev", 11_901_408_320)] == [
        "flux-dev",
        "flux-krea",
        "flux-kontext",
    ]
    assert list(alike("sd1/text-to-image", 16_915_724)) == [], "a miniature is none of the published ones"


def test_every_line_is_told_in_words() -> None:
    for known in all_known():
        for text in (
            known.title,
            known.by,
            known.backbone,
            known.resolution,
            known.steps,
            known.good,
            known.bad,
        ):
            assert text and text == text.strip() and "\n" not in text and not text.endswith(".")
        assert 2020 <= known.year <= 2025 and (not known.note or known.note.endswith("."))
