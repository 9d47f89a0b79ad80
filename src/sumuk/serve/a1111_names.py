"""The names that A1111 knows things by, and what they are called here: samplers, schedulers, models, upscalers.

Source: AUTOMATIC1111 stable-diffusion-webui 1.10, ``sd_samplers_*``, ``sd_schedulers``, ``shared_items``. There a
sampler and its scheduler are two names since 1.9; the older joint names (``DPM++ 2M Karras``) are read too. A scheduler
of that program is a step spacing here, under another name where the same name means another spacing: its ``Uniform``
and ``Normal`` are both our ``normal``, its ``DDIM`` our ``ldm-ddim``, its ``Beta`` our ``beta-sigma``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sumuk.base.errors import BadInput, nearest
from sumuk.base.registry import plain
from sumuk.serve.config import ServeConfig
from sumuk.serve.wire import Entry

Choices = Mapping[str, Sequence[Mapping[str, Any]]]
"""``solvers`` and ``grids``, as the desk tells them."""


@dataclass(frozen=True)
class Sampler:
    """One of A1111's samplers that is here too.

    Attributes:
        label: its name there.
        solver: its name here.
        alias: an older spelling.
        eta: whether A1111 hands the field ``eta`` on to it.
    """

    label: str
    solver: str
    alias: str
    eta: bool = False


SAMPLERS = (
    Sampler("DPM++ 2M", "dpmpp-2m", "k_dpmpp_2m"),
    Sampler("DPM++ SDE", "dpmpp-sde", "k_dpmpp_sde", eta=True),
    Sampler("DPM++ 2M SDE", "dpmpp-2m-sde", "k_dpmpp_2m_sde", eta=True),
    Sampler("DPM++ 2M SDE Heun", "dpmpp-2m-sde-heun", "k_dpmpp_2m_sde_heun", eta=True),
    Sampler("DPM++ 2S a", "dpmpp-2s-ancestral", "k_dpmpp_2s_a", eta=True),
    Sampler("DPM++ 3M SDE", "dpmpp-3m-sde", "k_dpmpp_3m_sde", eta=True),
    Sampler("Euler a", "euler-ancestral", "k_euler_a", eta=True),
    Sampler("Euler", "euler", "k_euler"),
    Sampler("LMS", "lms", "k_lms"),
    Sampler("Heun", "heun", "k_heun"),
    Sampler("DPM2", "dpm2", "k_dpm_2"),
    Sampler("DPM2 a", "dpm2-ancestral", "k_dpm_2_a", eta=True),
    Sampler("DDIM", "ddim", "ddim", eta=True),
    Sampler("PLMS", "plms", "plms"),
    Sampler("UniPC", "unipc", "unipc"),
    Sampler("LCM", "lcm", "k_lcm"),
)
AUTOMATIC = "automatic"
SCHEDULERS: dict[str, tuple[str, str | None]] = {
    AUTOMATIC: ("Automatic", None),
    "uniform": ("Uniform", "normal"),
    "karras": ("Karras", "karras"),
    "exponential": ("Exponential", "exponential"),
    "polyexponential": ("Polyexponential", "polyexponential"),
    "sgm_uniform": ("SGM Uniform", "sgm-uniform"),
    "simple": ("Simple", "simple"),
    "normal": ("Normal", "normal"),
    "ddim": ("DDIM", "ldm-ddim"),
    "beta": ("Beta", "beta-sigma"),
}
"""Name -> label, and the spacing here; None: the one that the model or the solver usually goes with."""
LATENT_UPSCALERS = (
    "Latent",
    "Latent (antialiased)",
    "Latent (bicubic)",
    "Latent (bicubic antialiased)",
    "Latent (nearest)",
    "Latent (nearest-exact)",
)
"""All are followed by the one enlargement of latents that is here, bicubic and antialiased."""
UPSCALERS = ("None", "Lanczos", "Nearest")
"""Of pictures. "None" leaves them as they are."""
USUAL_VAES = ("Automatic", "None")
"""Both: the checkpoint's own."""


@dataclass(frozen=True)
class Walk:
    """How a picture is to be sampled.

    Attributes:
        solver, grid: names here; None: the model's usual.
        eta: whether the solver is told the field ``eta``.
    """

    solver: str | None
    grid: str | None
    eta: bool


def walk_of(sampler: str | None, scheduler: str | None, choices: Choices) -> Walk:
    """What a sampler's and a scheduler's name mean here.

    Raises:
        BadInput: one is not known here, or a joint name says another scheduler than the other field.
    """
    grid = None if scheduler is None else _grid(scheduler, choices)
    if sampler is None:
        return Walk(None, grid, False)
    found = _solver(sampler, choices)
    if found is not None:
        return Walk(found[0], grid, found[1])
    for ending, joint in _endings(choices).items():
        if not plain(sampler).endswith(f"-{ending}"):
            continue
        found = _solver(plain(sampler)[: -len(ending) - 1], choices)
        if found is None:
            continue
        if grid not in (None, joint):
            raise BadInput(f"sampler_name {sampler!r} and scheduler {scheduler!r} contradict; leave one out")
        return Walk(found[0], joint, found[1])
    known = [each.label for each in SAMPLERS] + [each["name"] for each in choices["solvers"]]
    raise BadInput(f"sampler_name: unknown sampler {sampler[:60]!r}{nearest(sampler[:60], known)}")


def _solver(name: str, choices: Choices) -> tuple[str, bool] | None:
    """The solver behind A1111's name or one of ours, and whether it is told ``eta``."""
    wanted = plain(name)
    for each in SAMPLERS:
        if wanted in (plain(each.label), plain(each.alias)):
            return each.solver, each.eta
    for entry in choices["solvers"]:
        if wanted in (plain(entry["name"]), *map(plain, entry["aliases"])):
            return entry["name"], "eta" in entry["settings"]
    return None


def _grid(name: str, choices: Choices) -> str | None:
    wanted = plain(name)
    for key, (label, grid) in SCHEDULERS.items():
        if wanted in (plain(key), plain(label), plain(label).replace("-", "")):
            return grid
    for entry in choices["grids"]:
        if wanted in (plain(entry["name"]), *map(plain, entry["aliases"])):
            return entry["name"]
    known = [*(label for label, _ in SCHEDULERS.values()), *(each["name"] for each in choices["grids"])]
    raise BadInput(f"scheduler: unknown scheduler {name[:60]!r}{nearest(name[:60], known)}")


def _endings(choices: Choices) -> dict[str, str | None]:
    """How joint names may end, and the spacing that is meant."""
    own = {plain(each["name"]): each["name"] for each in choices["grids"]}
    return own | {plain(label): grid for label, grid in SCHEDULERS.values()}


def label_of(solver: str) -> str:
    """What A1111 calls a solver; its name here if it knows none such."""
    return next((each.label for each in SAMPLERS if each.solver == solver), solver)


def scheduler_label(grid: str | None) -> str:
    """What A1111 calls a step spacing; its name here if it knows none such."""
    return next((label for label, ours in SCHEDULERS.values() if ours == grid), str(grid))


def title_of(entry: Entry) -> str:
    """A checkpoint as A1111 lists it: the file's name and, where it is known, the head of its hash."""
    return entry.file if entry.sha256 is None else f"{entry.file} [{entry.sha256[:10]}]"


def usual_model(entries: Iterable[Entry], config: ServeConfig) -> Entry | None:
    """The checkpoint that draws where none is named."""
    models = [each for each in entries if each.sort == "model"]
    return next((each for each in models if each.name == config.usual), models[0] if models else None)


def entry_of(said: str, sort: str, entries: Iterable[Entry], what: str) -> Entry:
    """The entry that a client means: by its name, its file's, its title in A1111's list, or its hash.

    Args:
        said: by the client.
        sort: of entry.
        entries: all that there are.
        what: how to call the field.

    Raises:
        BadInput: there is none; names the nearest.
    """
    some = [each for each in entries if each.sort == sort]
    bare = said.rpartition(" [")[0] if said.endswith("]") else said
    for each in some:
        digests = () if each.sha256 is None else (each.sha256, each.sha256[:10])
        if bare in (each.name, each.file) or said in digests:
            return each
    hint = nearest(bare[:60], [each.name for each in some]) if some else "; this server offers none"
    raise BadInput(f"{what}: no {sort} {said[:100]!r} here{hint}")
