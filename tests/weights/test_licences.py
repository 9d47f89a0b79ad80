"""Licences: every spelling is the one that is meant, and over a stack of files the strictest holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.weights.test_live import TO_K, lora_file
from tests.weights.tiny import tiny

from sumuk.families.family import FAMILIES
from sumuk.families.lineage import LIMITS, LINEAGE
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import from_header, lazy, write
from sumuk.weights.checkpoint import load, save
from sumuk.weights.found import Found, Told
from sumuk.weights.guests import with_guests
from sumuk.weights.licences import (
    LICENCES,
    UNKNOWN,
    everything,
    licence_of,
    stack,
    strictest,
    warning,
)
from sumuk.weights.model import Model, WeightFile

SPELT = {
    "CreativeML-OpenRAIL-M": ("creativeml-openrail-m", "CreativeML Open RAIL-M License", "CREATIVEML OPENRAIL-M"),
    "CreativeML-OpenRAIL++-M": ("openrail++", "CreativeML Open RAIL++-M License", "creativeml-openrail++-m"),
    "OpenRAIL": ("openrail", "bigscience-openrail-m"),
    "Stability-AI-Community": (
        "stabilityai-ai-community", "STABILITY AI COMMUNITY LICENSE AGREEMENT", "Stability AI Community License",
    ),
    "Stability-AI-NC-Research": (
        "sai-nc-community", "stabilityai-nc-research-community",
        "Stability AI Non-Commercial Research Community License",
    ),
    "stable-cascade-nc-community": ("Stable Cascade Non-Commercial Community License Agreement",),
    "FLUX.1-dev-Non-Commercial": ("flux-1-dev-non-commercial-license", "FLUX.1 [dev] Non-Commercial License"),
    "Apache-2.0": ("apache-2.0", "Apache License, Version 2.0", "Apache License 2.0", "apache 2"),
    "CC-BY-NC-4.0": ("cc-by-nc-4.0", "CC BY-NC 4.0", "https://creativecommons.org/licenses/by-nc/4.0"),
    "CC0-1.0": ("cc0-1.0", "CC0", "Public Domain"),
    "MIT": ("mit", "The MIT License", "MIT Licence", "ＭＩＴ"),
    "FAIPL-1.0-SD": ("fair-ai-public-license-1.0-sd", "https://freedevproject.org/faipl-1.0-sd/"),
    "unknown": ("", "  ", "unknown", "other", "Unknown license"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, some in SPELT.items() for text in some])
def test_spellings(name: str, text: str) -> None:
    assert licence_of(text).name == name


def test_names_are_found_under_themselves_and_none_is_taken_twice() -> None:
    for each in LICENCES:
        assert all(licence_of(name) is each for name in (each.name, *each.aliases)), each.name
        assert each.means and not each.means.endswith("."), each.name
    assert licence_of(None) is UNKNOWN


@pytest.mark.parametrize(
    ("text", "commercial"),
    [
        ("my own non commercial licence", "no"),
        ("Some Noncommercial Licence", "no"),
        ("not for commercial use", "no"),
        ("No commercial use, please", "no"),
        ("CC-BY-NC-3.0", "no"),
        ("FLUX.1 [dev] Non-Commercial License v1.1.1", "no"),
        ("research only", "no"),
        ("for personal use only", "no"),
        ("CC-BY-3.0", "unknown"),
        ("MIT, but ask me first", "unknown"),
        ("Apache-2.0 WITH something", "unknown"),
        ("free", "unknown"),
        ("nc" * 600, "unknown"),
        ("commercial use allowed", "unknown"),
    ],
)
def test_names_that_are_not_known_are_never_free(text: str, commercial: str) -> None:
    found = licence_of(text)
    assert found.commercial == commercial and found.name == text[:120]
    assert strictest([licence_of("Stability-AI-Community"), found]) is found


def test_a_name_is_one_line_that_can_be_shown() -> None:
    assert licence_of("mine\n\x1b[31m\u202eown\0").name == "mine [31mown"


def test_the_lineage_is_in_the_table() -> None:
    """Whatever families and the list of models call their licence is known here, with the same answer."""
    said = {FAMILIES[name].licence for name in FAMILIES} | {LINEAGE[name].licence for name in LINEAGE}
    unknown = {text for text in said if licence_of(text).commercial == "unknown"}
    assert unknown == {
        "unknown",
        "a method, without weights",
        "that of Stable Diffusion 1.5, from which it was trained",
    }
    for name, (commercial, sentence) in LIMITS.items():
        known = licence_of(name)
        assert (known.name, known.means) == (name, sentence)
        assert known.commercial == {"bounded": "conditions"}.get(commercial, commercial)


def test_strictest() -> None:
    order = ["CC0-1.0", "MIT", "CreativeML-OpenRAIL-M", "Stability-AI-Community", "free", "CC-BY-NC-4.0"]
    known = [licence_of(text) for text in order]
    for place, each in enumerate(known):
        assert strictest(known[: place + 1]) is each and strictest(known[place::-1]) is each
    assert strictest([]) is UNKNOWN
    one, other = licence_of("terms of A"), licence_of("terms of B")
    assert strictest([one, other]) is one, "the first of equals"


def test_warnings() -> None:
    assert warning("Apache-2.0") is None and warning("CreativeML-OpenRAIL-M") is None
    assert warning(UNKNOWN) is None and warning("free") is None
    said = warning(licence_of("flux-1-dev-non-commercial-license"))
    assert said is not None and said.startswith("licence FLUX.1-dev-Non-Commercial: ") and "\n" not in said
    assert "one million US dollars" in (warning("stabilityai-ai-community") or "")
    assert "not for commercial use" in (warning("My NC licence") or "")


# Stacks: base (file, what it says, published models that look alike), further parts, what is worn -> what decides.

RAIL, RAILPP, SAI = "CreativeML-OpenRAIL-M", "CreativeML-OpenRAIL++-M", "Stability-AI-Community"
DEV, SCHNELL, TURBO, CASCADE = "FLUX.1-dev-Non-Commercial", "Apache-2.0", "sai-nc-community", "CC-BY-NC-4.0"
XL = ("SDXL 1.0 base", "SDXL Turbo", "SDXL Lightning")
FLUX = ("FLUX.1 [dev]", "FLUX.1 Krea [dev]", "FLUX.1 Kontext [dev]")
STACKS = [
    # A checkpoint by itself.
    (("sd15", RAIL, ()), [], [], "CreativeML-OpenRAIL-M", "yes", "sd15"),
    (("sdxl", RAILPP, XL), [], [], "CreativeML-OpenRAIL++-M", "yes", "sdxl"),
    (("sd35", SAI, ()), [], [], "Stability-AI-Community", "conditions", "sd35"),
    (("dev", DEV, FLUX), [], [], "FLUX.1-dev-Non-Commercial", "no", "dev"),
    (("schnell", SCHNELL, ("FLUX.1 [schnell]",)), [], [], "Apache-2.0", "yes", "schnell"),
    (("turbo", TURBO, XL), [], [], "Stability-AI-NC-Research", "no", "turbo"),
    (("mine", None, ()), [], [], "unknown", "unknown", "mine"),
    (("mine", "ask me", ()), [], [], "ask me", "unknown", "mine"),
    (("miniature", "Apache-2.0", ()), [], [], "Apache-2.0", "yes", "miniature"),
    # What calls itself freer than what it is.
    (("reupload", "MIT", FLUX), [], [], "FLUX.1-dev-Non-Commercial", "no", "reupload"),
    (("reupload", None, FLUX), [], [], "FLUX.1-dev-Non-Commercial", "no", "reupload"),
    (("reupload", "CC0-1.0", XL), [], [], "CreativeML-OpenRAIL++-M", "yes", "reupload"),
    (("reupload", "apache-2.0", ("DiT XL/2",)), [], [], "CC-BY-NC-4.0", "no", "reupload"),
    (("finetune", "FAIPL-1.0-SD", XL), [], [], "FAIPL-1.0-SD", "conditions", "finetune"),
    # Other parts.
    (("sd15", RAIL, ()), [("vae", "MIT")], [], "CreativeML-OpenRAIL-M", "yes", "sd15"),
    (("sd15", RAIL, ()), [("vae", None)], [], "unknown", "unknown", "vae"),
    (("schnell", SCHNELL, ()), [("clip_l", "MIT"), ("t5", "Apache-2.0")], [], "Apache-2.0", "yes", "schnell"),
    (("schnell", SCHNELL, ()), [("clip_l", "MIT"), ("ae", DEV)], [], "FLUX.1-dev-Non-Commercial", "no", "ae"),
    (("sd35", SAI, ()), [("t5", "Apache-2.0"), ("clip_g", None)], [], "unknown", "unknown", "clip_g"),
    # What is worn.
    (("sd15", RAIL, ()), [], [("lora", "MIT")], "CreativeML-OpenRAIL-M", "yes", "sd15"),
    (("miniature", "Apache-2.0", ()), [], [("lora", RAIL)], "CreativeML-OpenRAIL-M", "yes", "lora"),
    (("sd15", RAIL, ()), [], [("lora", "CC-BY-NC-SA-4.0")], "CC-BY-NC-SA-4.0", "no", "lora"),
    (("sdxl", RAILPP, XL), [], [("lora", None)], "unknown", "unknown", "lora"),
    (("sdxl", RAILPP, XL), [], [("lora", None), ("control-lora", SAI)], "unknown", "unknown", "lora"),
    (("sdxl", RAILPP, XL), [], [("control-lora", SAI)], "Stability-AI-Community", "conditions", "control-lora"),
    (("dev", DEV, FLUX), [], [("lora", None)], "FLUX.1-dev-Non-Commercial", "no", "dev"),
    (("dev", DEV, FLUX), [], [("lora", "CC-BY-NC-4.0")], "FLUX.1-dev-Non-Commercial", "no", "dev"),
    (("schnell", SCHNELL, ()), [], [("lora", DEV)], "FLUX.1-dev-Non-Commercial", "no", "lora"),
    (("sd35", SAI, ()), [], [("a", "MIT"), ("b", "research only"), ("c", None)], "research only", "no", "b"),
    (("sd15", RAIL, ()), [("vae", "MIT")], [("a", "terms A"), ("b", "terms B")], "terms A", "unknown", "a"),
    (("cc0", "CC0-1.0", ()), [], [("a", "MIT"), ("b", "GPL-3.0"), ("c", "CC-BY-4.0")], "GPL-3.0", "yes", "b"),
    (("sd15", RAIL, ()), [("vae", None)], [("a", SAI), ("b", TURBO)], "Stability-AI-NC-Research", "no", "b"),
]  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> Model:
    return tiny()


def file(name: str, said: str | None) -> WeightFile:
    return WeightFile(Path(name), None if said is None else Told(said, "metadata modelspec.license"))


@pytest.mark.parametrize("case", STACKS, ids=range(len(STACKS)))
def test_the_strictest_of_a_stack(plain: Model, case: tuple) -> None:
    (name, said, alike), parts, worn, licence, commercial, because = case
    own = (file(name, said), *(file(*part) for part in parts))
    found = stack(
        replace(plain, files=own, found=Found(path=name, models=alike)), *(file(*one) for one in worn)
    )
    assert found.licence.name == licence
    told = found.as_dict()
    assert (told["name"], told["commercial"], told["because"]) == (licence, commercial, because)
    assert [each["file"] for each in told["stack"]] == [
        name,
        *(part for part, _ in parts),
        *(one for one, _ in worn),
    ]


def test_thirty_stacks() -> None:
    assert len(STACKS) >= 30


def test_a_refiner_counts_and_a_model_of_no_file_has_its_familys(plain: Model) -> None:
    assert stack(plain).as_dict() == {
        "name": "CreativeML-OpenRAIL-M",
        "commercial": "yes",
        "because": "",
        "stack": [{"file": "", "name": "CreativeML-OpenRAIL-M", "said": False}],
    }
    refiner = replace(plain, files=(file("refiner", "CC-BY-NC-4.0"),))
    both = stack(replace(plain, files=(file("base", "MIT"),), refiner=refiner))
    assert both.deciding.file == "refiner" and both.licence.commercial == "no"


# Real files.


def labelled(source: Path, target: Path, licence: str | None, only: str = "") -> Path:
    """A copy with another licence in its header, or with some tensors only."""
    header = read_header(source)
    tensors = {name: each for name, each in from_header(header).items() if name.startswith(only)}
    metadata = {key: value for key, value in header.metadata.items() if key != "modelspec.license"}
    write(target, tensors, metadata | ({"modelspec.license": licence} if licence else {}))
    return target


def test_what_files_say_reaches_the_stack(plain: Model, tmp_path: Path) -> None:
    save(plain, tmp_path / "whole.safetensors")
    whole = labelled(tmp_path / "whole.safetensors", tmp_path / "base.safetensors", "Apache-2.0")
    silent = labelled(whole, tmp_path / "silent.safetensors", None)
    vae = labelled(whole, tmp_path / "vae.safetensors", "CC-BY-NC-4.0", "first_stage_model.")
    bare = tmp_path / "bare.safetensors"
    write(
        bare,
        {
            name.removeprefix("first_stage_model."): each
            for name, each in from_header(read_header(vae)).items()
        },
        {},
    )
    assert [vars(each) for each in stack(load(whole)).records] == [
        {"file": "base.safetensors", "licence": licence_of("Apache-2.0"), "said": True}
    ]
    assert stack(load(silent)).as_dict()["stack"] == [
        {"file": "silent.safetensors", "name": "CreativeML-OpenRAIL-M", "said": False}
    ], "that of its family, and told so"
    assert stack(load(whole, vae=vae)).as_dict()["because"] == "vae.safetensors"
    assert stack(load(whole, vae=bare)).as_dict()["stack"][1] == {
        "file": "bare.safetensors", "name": "unknown", "said": False,
    }, "an autoencoder by itself is not of the model's licence"  # fmt: skip


def test_what_is_worn_says_it_in_its_own_file(plain: Model, tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "plain.safetensors", plain, TO_K)
    said = labelled(lora, tmp_path / "said.safetensors", "research only")
    word = lazy(torch.ones(2, 64))
    write(tmp_path / "word.safetensors", {"emb_params": word}, {"modelspec.license": "MIT"})
    model = with_guests(
        replace(plain, files=(file("base", "MIT"),)),
        loras={"plain": lora, "said": said},
        embeddings={"word": tmp_path / "word.safetensors"},
    )
    assert stack(model).licence.name == "MIT", "what is beside the model and not worn does not bind"
    assert everything(model).as_dict() == {
        "name": "research only",
        "commercial": "no",
        "because": "said.safetensors",
        "stack": [
            {"file": "base", "name": "MIT", "said": True},
            {"file": "plain.safetensors", "name": "unknown", "said": False},
            {"file": "said.safetensors", "name": "research only", "said": True},
            {"file": "word.safetensors", "name": "MIT", "said": True},
        ],
    }


def test_words_inside_a_lora_have_its_licence(plain: Model, tmp_path: Path) -> None:
    header = read_header(lora_file(tmp_path / "plain.safetensors", plain, TO_K))
    rows = {"bundle_emb.wren.string_to_param.*": lazy(torch.ones(2, 64))}
    write(tmp_path / "both.safetensors", from_header(header) | rows, {"modelspec.license": "MIT"})
    model = with_guests(plain, loras={"both": tmp_path / "both.safetensors"})
    assert [each.licence.name for each in everything(model).records[1:]] == ["MIT", "MIT"]
