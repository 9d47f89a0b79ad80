"""Write docs/solvers.md: every solver, its names, its order, and how far it is from the originals.

Run from the root of the repository: ``PYTHONPATH=src python -m benchmarks.solver_table > docs/solvers.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from tests.diffusion.toy import Listed, Mixture, count_asks, start
from tests.laws.test_solver_laws import QUIET, RANGES, SCHEDULES, measured_order, whole
from tests.parity import test_diffusers_schedulers as diffusers
from tests.parity import test_kdiffusion as kdiffusion

from sumuk.diffusion.solvers import SOLVERS

COMPARED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name here: (cases of k-diffusion, rows of diffusers)
    "euler": (("euler", "euler-churn"), ("ddim-0.0", "euler-flow")),
    "ddim": ((), ("ddim-0.0", "ddim-0.5", "ddim-1.0")),
    "euler-ancestral": (("euler-ancestral", "euler-ancestral-half"), ("ddim-1.0",)),
    "ddpm": ((), ("ddpm-small", "ddpm-large")),
    "heun": (("heun", "heun-churn"), ("heun", "heun-flow")),
    "dpm2": (("dpm2", "dpm2-churn"), ()),
    "dpm2-ancestral": (("dpm2-ancestral",), ()),
    "dpmpp-2s": (("dpmpp-2s",), ("dpmpp-2s",)),
    "dpmpp-2s-ancestral": (("dpmpp-2s-ancestral",), ()),
    "dpmpp-sde": (("dpmpp-sde", "dpmpp-sde-third"), ()),
    "lms": (("lms", "lms-3"), ()),
    "plms": ((), ("plms",)),
    "ipndm": ((), ("ipndm",)),
    "dpmpp-2m": (("dpmpp-2m",), ("dpmpp-2m-midpoint", "dpmpp-2m-heun", "dpmpp-3m", "dpmpp-3m-lower-final")),
    "dpmpp-2m-sde": (("dpmpp-2m-sde", "dpmpp-2m-sde-ode"), ("dpmpp-2m-sde-midpoint",)),
    "dpmpp-2m-sde-heun": (("dpmpp-2m-sde-heun",), ("dpmpp-2m-sde-heun",)),
    "dpmpp-3m-sde": (("dpmpp-3m-sde", "dpmpp-3m-sde-half"), ()),
    "unipc": ((), ("unipc-bh1-2", "unipc-bh1-3")),
    "unipc-bh2": ((), ("unipc-bh2-2", "unipc-bh2-3")),
    "deis": ((), ("deis-2", "deis-3")),
    "lcm": ((), ("lcm",)),
    "predictor-corrector": ((), ("predictor-corrector",)),
    "rk45": ((), ()),
}
"""What each listing was held to; a listing that is missing here stops the run."""

HEAD = """# Solvers

A solver blends the network's answers into one clean estimate and moves there in one `transit`
(`src/sumuk/diffusion/solver.py`). Any name of a row finds it; capitals, blanks, `-` and `_` are all one, and
`++` is `pp`. A1111 and ComfyUI names that only differ in spelling (`DPM++ 2M`, `dpmpp_2m`) are not repeated.

This page is written by `PYTHONPATH=src python -m benchmarks.solver_table > docs/solvers.md`.

- **order**: of convergence with no noise drawn, declared and as measured on Gaussian data (VP, VE, flow),
  whose exact path is known. Blank where a solver is nothing without its noise.
- **noise**: the source that it wants, if it draws any; in brackets where its default settings draw none.
- **asks**: network evaluations in 10 steps to the clean picture with the default settings.
- **differences**: the largest relative one at the end of runs of 1, 2, 5 and 20 steps with an exact nonlinear
  denoiser and the same noise, in float64; k-diffusion on two spacings, each as VE and VP. About 1e-7 means
  that the original itself computes in float32 there.

| solver | other names | order | measured | noise | grid | asks | k-diffusion | diffusers | reference |
|---|---|--:|--:|---|---|--:|--:|--:|---|
"""

NOTES = """
## Where the originals differ from themselves, and what is done here

- **2M SDE and 3M SDE in one step.** k-diffusion stops with an unbound variable; here the step goes to the
  clean picture.
- **3M** weighs the second difference by half of what the integral gives, in the paper's code, k-diffusion and
  diffusers alike. It is kept; so three points are of second order, with a smaller error than two.
- **3M SDE in diffusers** (`sde-dpmsolver++`, order 3) has the constant of that term with the opposite sign,
  so its answer does not settle as steps grow; it is not followed.
- **DPM++ SDE** draws twice in a step. With increments of one Brownian path its variance is of second order,
  with fresh noise for each draw of first: the reason for its noise source.
- **UniPC** bh1 to the clean picture is not a number in diffusers (infinity times zero); here the last step is
  of first order, as bh2's is. `unipc` is bh1 with three points, as A1111 and ComfyUI have it; `unipc-bh2` has
  two, as diffusers.
- **DPM2 ancestral** adds no noise in k-diffusion where all of a step's noise is drawn anew (eta above 1);
  here it does.
- **LMS** takes k-diffusion's integrals, which are by quadrature to 1e-4 there, exactly.
- **iPNDM in diffusers** takes the clean picture to be 0 at pure noise; here it is what the network said.
- **Predictor-corrector**: the Langevin step's norms are per image here, a mean over the batch in the
  originals; so an image does not depend on its neighbours.
- **Heun, DPM2, LMS, PLMS** count in sigma / alpha, but in t on a rectified flow, as FlowMatchHeun and ComfyUI
  do.
- From pure noise (alpha = 0) the first step of the methods that count in sigma / alpha is of first order, and
  that answer takes no part in later polynomials.
"""


def row(name: str) -> str:
    listing, solver = SOLVERS[name], SOLVERS[name]()
    ours, theirs = COMPARED[name]
    rows = {each.name: each for each in diffusers.ROWS}
    quiet = QUIET.get(name)
    measured = (
        [measured_order(quiet, SCHEDULES[each], ends) for each, ends in RANGES.items()] if quiet else []
    )
    grid = whole(SCHEDULES["scaled-linear"], 10)
    asks = sum(count_asks(solver, start(grid[0]), grid, Mixture(), Listed())[1])
    noise = listing.noise if solver.stochastic else f"({listing.noise})"
    if not {"eta", "churn"} & set(listing.settings) and not solver.stochastic:
        noise = "none"
    cells = [
        f"`{name}`",
        ", ".join(f"`{alias}`" for alias in spelled(name)),
        str(quiet.order) if quiet else "",
        ", ".join(f"{value:.2f}" for value in measured),
        noise,
        listing.grid,
        str(asks),
        largest(kdiffusion.worst(case) for case in ours),
        largest(diffusers.worst(rows[case]) for case in theirs),
        listing.reference,
    ]
    return "| " + " | ".join(cells) + " |"


def spelled(name: str) -> Iterable[str]:
    return sorted(SOLVERS.aliases(name))


def largest(differences: Iterable[float]) -> str:
    found = list(differences)
    return f"{max(found):.0e}" if found else ""


def main() -> None:
    warnings.simplefilter("ignore")
    print(HEAD + "\n".join(row(name) for name in SOLVERS) + "\n" + NOTES, end="")


if __name__ == "__main__":
    main()
