"""Every solver by name: ours, and the names by which A1111, ComfyUI and diffusers know it.

To add a solver: its class, and an entry here. The laws in ``tests/laws`` then test it without being told.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sumuk.base.errors import BadInput, nearest
from sumuk.base.registry import Registry
from sumuk.diffusion.ancestral import DDPM, LCM, Ancestral, Churn, DPMppSDE
from sumuk.diffusion.multistep import DEIS, LMS, PLMS, DPMppM, UniPC
from sumuk.diffusion.score import RK45, PredictorCorrector
from sumuk.diffusion.solver import DPM2, DPMpp2S, Euler, Heun, Solver


@dataclass(frozen=True, kw_only=True)
class Listing:
    """An entry: call it to get the solver; settings are the solver's own arguments.

    Attributes:
        build: makes the solver.
        grid: the spacing (:mod:`grid`) that its authors or the common interfaces pair it with.
        noise: the source that it wants, if its settings make it draw any: "steps" (fresh noise at each call)
        or
            "brownian" (one path, whose increments agree however the range is cut, so that more steps refine
            the same image).
        asks: network evaluations in one step, as the table in the documentation puts it.
        reference: paper.
    """

    build: Callable[..., Solver]
    grid: str = "normal"
    noise: Literal["steps", "brownian"] = "steps"
    asks: str = "1"
    reference: str

    @property
    def settings(self) -> tuple[str, ...]:
        """What may be set by keyword."""
        return tuple(inspect.signature(self.build).parameters)

    def __call__(self, **settings: Any) -> Solver:
        """The solver.

        Raises:
            BadInput: a setting that it does not have, or a value that it refuses.
        """
        for name in settings:
            if name not in self.settings:
                hint = nearest(name, self.settings) if self.settings else "; it has none"
                raise BadInput(f"this solver has no setting {name!r}{hint}")
        return self.build(**settings)


def _churning(
    inner: Solver, churn: float = 0.0, above: float = 0.0, below: float = math.inf, s_noise: float = 1.0
) -> Solver:
    return Churn(inner, churn, above, below, s_noise) if churn else inner


def _ancestral(inner: Solver, eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    return Ancestral(inner, eta, s_noise)


def _ddim(eta: float = 0.0) -> Solver:
    return Ancestral(Euler(), eta)


SOLVERS: Registry[Listing] = Registry("solver")


def _list(name: str, build: Callable[..., Solver], *aliases: str, **about: Any) -> None:
    SOLVERS.add(name, Listing(build=build, **about), *aliases)


_KARRAS = "Karras et al. 2022, algorithm 2"
_LU = "Lu et al. 2022b (DPM-Solver++)"
_CROWSON = "K. Crowson, k-diffusion"

_list(
    "euler",
    partial(_churning, Euler()),
    "flow-euler",
    "EulerDiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    reference=_KARRAS,
)
_list("ddim", _ddim, "DDIMScheduler", grid="leading", reference="Song, Meng & Ermon 2021, eq. 12, 16")
_list(
    "euler-ancestral",
    partial(_ancestral, Euler()),
    "Euler a",
    "EulerAncestralDiscreteScheduler",
    reference=_CROWSON,
)
_list("ddpm", DDPM, "DDPMScheduler", grid="leading", reference="Ho et al. 2020, algorithm 2")
_list(
    "heun",
    partial(_churning, Heun()),
    "flow-heun",
    "HeunDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    grid="karras",
    asks="2 (last 1)",
    reference=_KARRAS,
)
_list(
    "dpm2",
    partial(_churning, DPM2()),
    "dpm_2",
    "KDPM2DiscreteScheduler",
    grid="karras",
    asks="2 (last 1)",
    reference="Lu et al. 2022a (DPM-Solver-2), " + _CROWSON,
)
_list(
    "dpm2-ancestral",
    partial(_ancestral, DPM2()),
    "DPM2 a",
    "dpm_2_ancestral",
    "KDPM2AncestralDiscreteScheduler",
    grid="karras",
    asks="2 (last 1)",
    reference=_CROWSON,
)
_list(
    "dpmpp-2s",
    DPMpp2S,
    "DPMSolverSinglestepScheduler",
    grid="karras",
    asks="2 (last 1)",
    reference=_LU + ", algorithm 1",
)
_list(
    "dpmpp-2s-ancestral",
    partial(_ancestral, DPMpp2S()),
    "DPM++ 2S a",
    grid="karras",
    asks="2 (last 1)",
    reference=_CROWSON,
)
_list(
    "dpmpp-sde",
    DPMppSDE,
    "dpmpp_sde_gpu",
    "DPMSolverSDEScheduler",
    grid="karras",
    noise="brownian",
    asks="2 (last 1)",
    reference=_CROWSON,
)
_list("lms", LMS, "LMSDiscreteScheduler", reference=_CROWSON)
_list(
    "plms",
    PLMS,
    "PNDMScheduler",
    grid="leading",
    asks="1 (first 2)",
    reference="Liu et al. 2022 (PNDM), eq. 12",
)
_list(
    "ipndm",
    partial(PLMS, improved_start=False),
    "IPNDMScheduler",
    reference="Zhang & Chen 2023 (DEIS), appendix",
)
_list(
    "dpmpp-2m",
    partial(DPMppM, points=2, eta=0.0),
    "DPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    grid="karras",
    noise="brownian",
    reference=_LU + ", algorithm 2",
)
_list(
    "dpmpp-2m-sde",
    partial(DPMppM, points=2, eta=1.0),
    "dpmpp_2m_sde_gpu",
    grid="karras",
    noise="brownian",
    reference=_LU + ", appendix A",
)
_list(
    "dpmpp-2m-sde-heun",
    partial(DPMppM, points=2, eta=1.0, kind="heun"),
    "dpmpp_2m_sde_heun_gpu",
    grid="karras",
    noise="brownian",
    reference=_CROWSON,
)
_list(
    "dpmpp-3m-sde",
    partial(DPMppM, points=3, eta=1.0, kind="heun"),
    "dpmpp_3m_sde_gpu",
    grid="exponential",
    noise="brownian",
    reference=_CROWSON,
)
_list("unipc", partial(UniPC, points=3, kind="bh1"), "uni_pc", reference="Zhao et al. 2023 (UniPC)")
_list(
    "unipc-bh2",
    partial(UniPC, points=2, kind="bh2"),
    "uni_pc_bh2",
    "UniPCMultistepScheduler",
    reference="Zhao et al. 2023 (UniPC)",
)
_list("deis", DEIS, "DEISMultistepScheduler", reference="Zhang & Chen 2023 (DEIS)")
_list("lcm", LCM, "LCMScheduler", grid="lcm", reference="Luo et al. 2023 (LCM), algorithm 3")
_list(
    "predictor-corrector",
    PredictorCorrector,
    "pc",
    "score-sde",
    "ScoreSdeVeScheduler",
    grid="exponential",
    asks="1 + corrections",
    reference="Song et al. 2021, algorithms 2-5",
)
_list(
    "rk45",
    RK45,
    "probability-flow",
    "dopri5",
    asks="6 a trial, as the error asks",
    reference="Song et al. 2021, section 4.3; Dormand & Prince 1980",
)
