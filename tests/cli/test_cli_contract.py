"""The flags that scripts rely on, and what the verbs that only tell say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from tests.cli.conftest import Call
from typer.testing import CliRunner

from sumuk.cli.main import app
from sumuk.diffusion.grid import GRIDS
from sumuk.diffusion.solvers import SOLVERS
from sumuk.generate.request import Hires, Request

FLAGS = {
    "generate": [
        "prompt", "--out -o", "--model -m", "--negative -n", "--width", "--height", "--steps", "--solver", "--grid",
        "--eta", "--guidance", "--rescale", "--guidance-start", "--guidance-end", "--skip-layers",
        "--skip-scale", "--skip-start", "--skip-end", "--seed", "--variation-seed",
        "--variation", "--count", "--clip-skip", "--label", "--original", "--crop",
        "--decoder-steps", "--decoder-guidance", "--refiner-start", "--hint", "--like", "--noise-level",
        "--steer", "--init",
        "--strength", "--mask", "--mask-blur", "--hires",
        "--hires-strength", "--hires-steps",
        "--part", "--refiner", "--control", "--lora", "--hypernet", "--embedding", "--shelf", "--partial", "--vae",
        "--packed", "--quick", "--device", "--dtype", "--prediction", "--mode",
    ],
    "replay": [
        "image", "--model -m", "--init", "--mask", "--hint", "--like", "--steer", "--control",
        "--lora", "--hypernet", "--embedding", "--shelf", "--out -o", "--device",
    ],
    "inspect": ["path", "--json", "--hashes", "--check"],
    "shelf": ["folder", "--json"],
    "models": ["name", "--json"],
    "solvers": [],
    "train": ["config", "--images", "--threads"],
    "demo": ["--out -o"],
    "serve": [
        "--model -m", "--shelf", "--host", "--port", "--token", "--allow-host", "--allow-origin", "--proxy", "--state",
        "--page", "--part", "--device", "--dtype", "--mode", "--together", "--threads", "--memory", "--queue",
        "--per-key", "--per-address", "--patience", "--keep-days", "--keep-size", "--drain", "--check-prompts",
        "--check-images", "--sign", "--log", "--cluster", "--replicas",
    ],
    "convert": ["path", "out", "--layout", "--dtype", "--quantise", "--shards", "--variant"],
    "prune": ["path", "out", "--weights", "--dtype", "--drop", "--keep"],
    "extract-vae": ["path", "out", "--dtype"],
    "bake-vae": ["path", "vae", "out"],
    "merge": [
        "models", "--out -o", "--method", "--alpha", "--blocks", "--vae", "--text", "--denoiser", "--setting",
        "--dtype", "--layout", "--seed", "--extra-channels", "--recipe",
    ],
    "verify": ["result", "parents", "--all"],
    "lora extract": [
        "before", "after", "out", "--rank", "--error", "--layout", "--dtype", "--whole", "--part",
    ],
    "lora resize": ["path", "out", "--model -m", "--rank", "--error", "--dtype", "--to-lora"],
    "lora merge": ["paths", "--out -o", "--model -m", "--rank", "--error", "--whole", "--layout", "--dtype"],
    "lora convert": ["path", "out", "--model -m", "--layout", "--dtype"],
    "lora bake": ["model", "out", "--lora", "--dtype", "--layout", "--partial"],
}  # fmt: skip
"""Names are added here with a feature; taking one away breaks what people have written."""


def test_flags_are_frozen():
    commands = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        commands |= (
            {name: command} if inner is None else {f"{name} {verb}": each for verb, each in inner.items()}
        )
    found = {
        name: [" ".join(each.opts) for each in command.params if each.name != "help"]
        for name, command in commands.items()
    }
    assert found == FLAGS


def test_every_field_of_a_request_has_its_flag():
    flags = {flag.split()[0].removeprefix("--").replace("-", "_") for flag in FLAGS["generate"]}
    unlike = {
        "preview",
        "loras",
        "hypers",
    }  # no place to show one; --lora and --hypernet load and wear in one
    assert set(Request.model_fields) - flags == unlike
    assert {f"hires_{name}" for name in Hires.model_fields} - flags == {"hires_scale"}, "which --hires is"


@pytest.mark.parametrize(
    "name", ["README.md", "README.ko.md", "docs/generate.md", "docs/files.md", "docs/train.md"]
)
def test_documents_name_only_flags_that_are_there(name: str):
    text = (Path(__file__).parents[2] / name).read_text("utf-8")
    flags = {part for each in FLAGS.values() for flag in each for part in flag.split()} | {"--help"}
    for line in re.findall(r"sumuk [a-z][a-z-]* .*", text):
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", line.split("#")[0])) <= flags, line


@pytest.mark.parametrize("verb", [(), *((name,) for name in FLAGS)], ids=lambda verb: " ".join(verb))
def test_help(verb: tuple[str, ...]):
    told = CliRunner().invoke(app, [*" ".join(verb).split(), "--help"])
    assert told.exit_code == 0 and "Usage" in told.output


def test_without_a_verb_the_help_is_shown(call: Call):
    said = call()
    assert said.code == 2 and "generate" in said.out and said.err == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("generate",), "Give a prompt"),
        (("draw", "a"), "No such command 'draw'"),
        (("inspect",), "Missing argument 'path'"),
        (("generate", "a", "-o"), "-o"),
        (("inspect", "none.safetensors"), "none.safetensors"),
        (("inspect", "."), "no weights in the folder"),
        (("train", "none.toml"), "none.toml"),
        (("train", "bad.toml"), "bad.toml"),
    ],
)
def test_misuse_is_one_line(call: Call, arguments: tuple[str, ...], told: str):
    Path("bad.toml").write_text("= 3")
    said = call(*arguments)
    assert said.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and told in said.err, said.err


def test_solvers(call: Call):
    said = call("solvers")
    assert said.code == 0
    for name in SOLVERS:
        assert f"\n{name} " in said.out
        assert all(alias in said.out for alias in SOLVERS.aliases(name)), "nothing is cut off in a pipe"
    assert all(name in said.out for name in GRIDS)


def test_inspect(call: Call, model_file: Path):
    said = call("inspect", model_file, "--json")
    found = json.loads(said.out)
    assert said.code == 0 and found["family"] == "sd1" and found["prediction"]["sure"] is True
    said = call("inspect", model_file)
    assert said.code == 0 and "text-to-image" in said.out and "modelspec.architecture" in said.out
    assert len(said.out) < 10_000, "the vocabulary is not poured out"


def test_inspect_passes_no_markup_and_no_control_characters_on(call: Call):
    texts = {"modelspec.title": "[bold]x[/nothing] \x1b[31mred", "more": "[/]"}
    save_file({"a": torch.zeros(1)}, "a.safetensors", texts)
    said = call("inspect", "a.safetensors")
    assert said.code == 0 and "\x1b" not in said.out and "[bold]x[/nothing]" in said.out


def test_an_interrupt_is_130(call: Call, monkeypatch: pytest.MonkeyPatch):
    from sumuk.cli import draw

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(draw, "run_generate", interrupted)
    said = call("generate", "a")
    assert (said.code, said.out, said.err) == (130, "", "sumuk: stopped\n")
