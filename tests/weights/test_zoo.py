"""A tiny model of every family: both layouts hold the same, say what they are, and draw the same picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import zoo
from PIL import Image

import sumuk
from sumuk.base.errors import BadFile, BadInput
from sumuk.cli.main import main
from sumuk.families.family import Family
from sumuk.families.published import RELEASES
from sumuk.weights.model import Model

DRAWING = sorted(key for key, kind in zoo.KINDS.items() if isinstance(kind, Family))
NOTHING = 2
"""Of 255: what two kernels may make of the same numbers; see ``zoo.apart``."""
MOST = 5_000_000
"""Parameters; the six levels of the LSUN shape are the largest."""


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part, network in model.networks.items()
        for name, value in network.state_dict().items()
    }


def left_away(name: str) -> bool:
    """What folders have no place for: what SD 2 does not read of its tower."""
    return name == "text.text_projection" or ".resblocks.2." in name


def drawn(out: Path, key: str, place: Path) -> Image.Image:
    """As the shell would draw it."""
    target = out / "drawn.png"
    flags = [each for flag, value in zoo.asked(key, out).items() for each in (f"--{flag}", str(value))]
    prompt = "a fox in the snow" if zoo.ZOO[key].says else ""
    with pytest.raises(SystemExit) as ended:
        main(["generate", prompt, "-m", str(place), "--steps", "2", "--seed", "0", "-o", str(target), *flags])
    assert ended.value.code == 0
    return Image.open(target)


@pytest.mark.parametrize("key", DRAWING)
def test_an_animal_of_each_family(key: str, tmp_path: Path) -> None:
    assert key in zoo.ZOO, f"add a tiny model of {key} to examples/zoo.py"
    if key in zoo.COMPLETES:
        return
    model = zoo.tiny(key)
    wanted = weights(model)
    assert sum(each.numel() for each in wanted.values()) < MOST
    pictures = []
    for place in zoo.write(key, tmp_path):
        loaded = sumuk.load(place)
        found, here = loaded.found, weights(loaded)
        assert found is not None and (f"{found.family}/{found.variant}", found.extra) == (key, ())
        lost = wanted.keys() - here.keys()
        assert here.keys() <= wanted.keys() and (not lost or (place.is_dir() and all(map(left_away, lost))))
        for name, value in here.items():
            assert torch.equal(value, wanted[name]) and value.dtype == wanted[name].dtype, name
        assert {part: words.to_json() for part, words in loaded.words.items()} == {
            part: words.to_json() for part, words in model.words.items()
        }
        # The file as the shell would draw with it, the folder as a program would.
        pictures.append(zoo.draw(loaded, key, tmp_path) if place.is_dir() else drawn(tmp_path, key, place))
    assert pictures[0].size == pictures[1].size == (zoo.ZOO[key].size,) * 2
    assert zoo.apart(*pictures) <= NOTHING


@pytest.mark.parametrize("key", [key for key in DRAWING if key not in zoo.COMPLETES])
def test_the_picture_listens(key: str, tmp_path: Path) -> None:
    """To the seed, the prompt, and each thing that the family is given beside them."""
    model = zoo.tiny(key)
    other = zoo.picture(32).rotate(90)
    said: dict[str, Any] = {"seed": 1}
    if zoo.ZOO[key].says:
        said["prompt"] = "the sea"
    said |= {
        name: {"label": 5, "mask": zoo.hole().rotate(90)}.get(
            name, other.resize((8, 8)) if value == "small" else other
        )
        for name, value in zoo.ZOO[key].asks.items()
    }
    usual = zoo.draw(model, key, tmp_path)
    for name, value in said.items():
        assert zoo.apart(usual, zoo.draw(model, key, tmp_path, **{name: value})) > 4, name


def test_cascade_of_two_files(tmp_path: Path) -> None:
    """Stage B by itself draws nothing; beside stage C it is what stage C's file may lack."""
    stage_b, folder = zoo.write("cascade/stage-b", tmp_path)
    for place in (stage_b, folder):
        with pytest.raises(BadFile, match="another model's latents"):
            sumuk.load(place)
    whole = zoo.tiny("cascade/stage-c")
    assert sumuk.open(stage_b).variant == sumuk.open(folder).variant == "stage-b"
    first = {part: each for part, each in whole.networks.items() if part not in ("decoder", "vae")}
    sumuk.save(replace(whole, networks=first), tmp_path / "c.safetensors")
    loaded = sumuk.load(tmp_path / "c.safetensors", parts={"decoder": stage_b, "vae": stage_b})
    picture = zoo.draw(loaded, "cascade/stage-c", tmp_path)
    assert picture.size == (128, 128) and min(high - low for low, high in picture.getextrema()) > 8


def test_what_a_layout_leaves_away_is_told(tmp_path: Path) -> None:
    model = zoo.tiny("sd2/text-to-image")
    assert sumuk.save(model, tmp_path / "a.safetensors") == ()
    left = sumuk.save(model, tmp_path / "a", layout="diffusers")
    assert left and all(left_away(name) for name in left)
    assert set(weights(model)) - set(weights(sumuk.load(tmp_path / "a"))) == set(left)


def test_a_layout_without_a_place_says_so(tmp_path: Path) -> None:
    """An image tower that was lent for an IP-Adapter is no part of Stable Diffusion 1."""
    model = zoo.tiny("sd1/text-to-image")
    lent = replace(model, networks=model.networks | {"image": zoo.vision(64)})
    for place, layout in ((tmp_path / "a.safetensors", "single"), (tmp_path / "a", "diffusers")):
        with pytest.raises(BadInput, match="no place for the image"):
            sumuk.save(lent, place, layout=layout)
        assert not place.exists()


def test_a_refiner(tmp_path: Path) -> None:
    """Of the base's latents, it draws the last of the way."""
    base, _ = zoo.write("sdxl/base", tmp_path)
    refiner, _ = zoo.write("sdxl/refiner", tmp_path, seed=1)
    plain = zoo.draw(sumuk.load(base), "sdxl/base", tmp_path, steps=4)
    refined = zoo.draw(sumuk.load(base, refiner=refiner), "sdxl/base", tmp_path, steps=4, refiner_start=0.5)
    assert zoo.apart(plain, refined) > 4


@pytest.mark.parametrize("name", zoo.GUESTS)
def test_guests_steer(name: str, tmp_path: Path) -> None:
    key = zoo.GUESTS[name][0]
    file, _ = zoo.write(key, tmp_path)
    model = sumuk.load(file, controls={"edges": zoo.write_guest(name, tmp_path)})
    plain = zoo.draw(model, key, tmp_path)
    one, other = (
        zoo.draw(model, key, tmp_path, steer=[{"control": "edges", "hint": hint}])
        for hint in (zoo.picture(32), zoo.hole())
    )
    assert min(zoo.apart(plain, one), zoo.apart(plain, other), zoo.apart(one, other)) > 4


@pytest.mark.parametrize("name", RELEASES)
def test_headers_are_known(name: str, tmp_path: Path) -> None:
    release, path = RELEASES[name], tmp_path / f"{name}.safetensors"
    header = release.header()
    length = zoo.write_header(path, header)
    assert path.stat().st_size == length and path.stat().st_blocks * 512 < 2_000_000
    found = sumuk.open(path)
    assert f"{found.family}/{found.variant}" == release.family
    assert {part.name for part in found.parts} == set(release.parts)
    assert not found.extra and not found.incomplete and not found.ignored
    assert sum(part.tensors for part in found.parts) == len(header)


def test_every_drawing_family_was_published_or_says_so() -> None:
    unpublished = {"ddpm/pixel"}  # any other shape than the published ones
    assert {release.family for release in RELEASES.values() if release.size} == set(DRAWING) - unpublished
