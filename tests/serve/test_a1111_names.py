"""A1111's names stand for what is here, and nothing is taken for something else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sumuk.base.errors import BadInput
from sumuk.diffusion.grid import GRIDS
from sumuk.diffusion.solvers import SOLVERS
from sumuk.serve.a1111_names import (
    SAMPLERS,
    SCHEDULERS,
    Walk,
    entry_of,
    label_of,
    scheduler_label,
    title_of,
    usual_model,
    walk_of,
)
from sumuk.serve.config import ServeConfig
from sumuk.serve.offered import choices
from sumuk.serve.wire import Entry

CHOICES = choices()
FOX = Entry(
    name="fox",
    sort="model",
    kind="sd1/text-to-image",
    title="Fox",
    file="sd/fox.safetensors",
    size=1,
    sha256="ab" * 32,
)
CAT = replace(FOX, name="cat", file="cat.safetensors", sha256=None)
VAE = replace(FOX, name="fox", sort="vae", kind="vae/sd", file="vae/fox.safetensors")


def test_every_sampler_and_scheduler_is_one_that_is_here():
    for each in SAMPLERS:
        assert SOLVERS.canonical(each.solver) == each.solver
        assert not each.eta or "eta" in SOLVERS[each.solver].settings, each.label
    for label, grid in SCHEDULERS.values():
        assert grid is None or grid in GRIDS, label


@pytest.mark.parametrize(
    ("sampler", "scheduler", "walk"),
    [
        (None, None, Walk(None, None, False)),
        ("Euler a", "automatic", Walk("euler-ancestral", None, True)),
        ("DPM++ 2M", "Karras", Walk("dpmpp-2m", "karras", False)),
        ("DPM++ 2M Karras", None, Walk("dpmpp-2m", "karras", False)),
        ("DPM++ 2M Karras", "automatic", Walk("dpmpp-2m", "karras", False)),
        ("DPM++ 2M SDE Heun Exponential", None, Walk("dpmpp-2m-sde-heun", "exponential", True)),
        ("k_dpmpp_2s_a", "sgm_uniform", Walk("dpmpp-2s-ancestral", "sgm-uniform", True)),
        ("Heun", "SGMUniform", Walk("heun", "sgm-uniform", False)),
        ("DDIM", "DDIM", Walk("ddim", "ldm-ddim", True)),
        ("Euler", "Uniform", Walk("euler", "normal", False)),
        ("Euler", "Beta", Walk("euler", "beta-sigma", False)),
        ("deis", "trailing", Walk("deis", "trailing", False)),
        ("FlowMatchEulerDiscreteScheduler", "turbo", Walk("euler", "turbo", False)),
    ],
)
def test_names_mean(sampler, scheduler, walk):
    assert walk_of(sampler, scheduler, CHOICES) == walk


@pytest.mark.parametrize(
    ("sampler", "scheduler", "told"),
    [
        ("Eulr", None, "unknown sampler 'Eulr'; did you mean 'euler'"),
        ("Restart", None, "unknown sampler 'Restart'"),
        ("Euler", "Align Your Steps", "unknown scheduler 'Align Your Steps'"),
        ("DPM++ 2M Karras", "Exponential", "contradict"),
        ("", None, "unknown sampler ''"),
        ("Karras", None, "unknown sampler 'Karras'"),
    ],
)
def test_other_names_are_refused(sampler, scheduler, told):
    with pytest.raises(BadInput, match=told):
        walk_of(sampler, scheduler, CHOICES)


def test_names_go_back():
    assert [label_of(each.solver) for each in SAMPLERS] == [each.label for each in SAMPLERS]
    assert label_of("deis") == "deis"
    assert scheduler_label("karras") == "Karras"
    assert scheduler_label("trailing") == "trailing"
    assert scheduler_label(None) == "Automatic"


@pytest.mark.parametrize(
    "said", ["fox", "sd/fox.safetensors", "sd/fox.safetensors [abababab01]", "abababab" + "ab", "ab" * 32]
)
def test_a_checkpoint_has_many_names(said):
    assert entry_of(said, "model", [CAT, VAE, FOX], "sd_model_checkpoint") is FOX
    assert entry_of(title_of(FOX), "model", [CAT, FOX], "sd_model_checkpoint") is FOX


def test_a_checkpoint_that_is_not_here_is_refused():
    with pytest.raises(BadInput, match=r"sd_model_checkpoint: no model 'fux' here; did you mean 'fox'\?"):
        entry_of("fux", "model", [CAT, FOX], "sd_model_checkpoint")
    with pytest.raises(BadInput, match="sd_vae: no vae 'fox' here; this server offers none"):
        entry_of("fox", "vae", [CAT, FOX], "sd_vae")


def test_the_usual_model_is_the_one_that_the_server_was_given(tmp_path):
    assert usual_model([CAT, FOX], ServeConfig(model=tmp_path / "fox.safetensors")) is FOX
    assert usual_model([VAE, CAT, FOX], ServeConfig()) is CAT
    assert usual_model([VAE], ServeConfig()) is None
