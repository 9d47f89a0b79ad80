"""Step spacing: which levels of a schedule a sampler visits, independent of the solver.

A spacing is a function ``(schedule, steps) -> steps levels, noisiest first``; :func:`make_grid` looks it up
by name, ends the walk at the clean picture and checks that the noise falls at every step. Spacings come in
two sorts.

*By rung.* Every schedule is seen as a ladder of trained steps k = 0 .. T-1 (T = 1000 unless a discrete
schedule says otherwise): step k itself of a discrete one, network time from first to last for
:class:`ContinuousVP`, sigma geometric for :class:`VarianceExploding`, ``t = (k + 1) / T`` shifted for
:class:`Flow`. So leading, trailing and the rest serve all four.

*By amount of noise.* The field's sigma: ``sigma / alpha`` (Karras et al. 2022), but t itself in a rectified
flow, where the ratio is infinite at the start and everyone interpolates t. Where the first level is pure
noise (zero terminal SNR) these begin at the noisiest trained level that has a finite ratio, about 2400 for
Stable Diffusion; others put a made-up number there (4096 or 4519), which is as good as pure noise too.

Sources: Lin et al. 2024 table 2 (leading, trailing, linspace); Karras et al. 2022 eq. 5; Lee et al. 2024
(beta); Luo et al. 2023 (LCM); Sauer et al. 2023 (turbo); Song et al. 2021 (uniform); Esser et al. 2024 eq. 23
(flow shift).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from sumuk.base.errors import BadInput, nearest
from sumuk.base.registry import Registry
from sumuk.diffusion.cosine import ContinuousCosine
from sumuk.diffusion.schedule import (
    ContinuousVP,
    Discrete,
    Flow,
    Level,
    Schedule,
    VarianceExploding,
)

Spacing = Callable[..., list[Level]]
"""``(schedule, steps, **settings)`` -> ``steps`` levels, noisiest first, the clean one not among them."""

GRIDS: Registry[Spacing] = Registry("step spacing")


def make_grid(
    name: str, schedule: Schedule, steps: int, *, final_clean: bool = True, **settings: float
) -> list[Level]:
    """The levels of a whole walk: what :func:`sumuk.diffusion.sample.sample` takes.

    Args:
        name: a spacing of :data:`GRIDS`.
        schedule: the process.
        steps: how many moves.
        final_clean: end at the clean picture; otherwise at the least noise that the network was trained on,
            as DDIM with ``set_alpha_to_one=False`` does.
        settings: keyword settings of the spacing, such as ``rho`` of karras.

    Returns:
        ``steps + 1`` levels of strictly falling noise.

    Raises:
        BadInput: a setting is unknown or out of range, or that many steps do not fit.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BadInput(f"steps must be a whole number of at least 1, got {steps!r}")
    spacing = GRIDS[name]
    takes = inspect.signature(spacing).parameters
    known = {key: each for key, each in takes.items() if each.kind is each.KEYWORD_ONLY}
    for key, value in settings.items():
        if key not in known:
            hint = nearest(key, known) if known else "; it takes none"
            raise BadInput(f"spacing {GRIDS.canonical(name)!r} has no setting {key!r}{hint}")
        whole = known[key].annotation == "int"
        if not math.isfinite(value) or (whole and not (value >= 0 and value == int(value))):
            wanted = "a whole number of at least 0" if whole else "a finite number"
            raise BadInput(f"{key} of spacing {GRIDS.canonical(name)!r} must be {wanted}, got {value}")
    grid = [*spacing(schedule, steps, **settings), schedule.clean if final_clean else schedule.least]
    if not final_clean and not _falls(grid[-2], grid[-1]):
        raise BadInput(
            f"spacing {GRIDS.canonical(name)!r} with {steps} steps already ends at the least noise; "
            "let it end clean (final_clean) or use 'leading'"
        )
    if not all(_falls(now, then) for now, then in pairwise(grid)):
        raise BadInput(
            f"spacing {GRIDS.canonical(name)!r} cannot place {steps} different levels here; "
            "take fewer steps or use 'trailing' or 'normal'"
        )
    return grid


def part(grid: Sequence[Level], strength: float) -> list[Level]:
    """The tail of a grid that image-to-image walks: ``int(steps * strength)`` of its steps.

    Args:
        grid: a whole grid, steps + 1 levels.
        strength: how far back into the noise to start, in (0, 1]; 1 walks the whole grid.

    Raises:
        BadInput: strength out of range, or so small that no step would be left.
    """
    if not 0.0 < strength <= 1.0:
        raise BadInput(f"strength must be above 0 and at most 1, got {strength}")
    steps = len(grid) - 1
    left = int(min(steps * strength, steps))
    if left < 1:
        raise BadInput(
            f"strength {strength:g} of {steps} steps leaves no step to take; use at least "
            f"{math.ceil(min(1 / strength, 1e9))} steps or a strength of {1 / max(steps, 1):.3g}"
        )
    return list(grid[steps - left :])


def from_sigmas(schedule: Schedule, sigmas: Sequence[float], *, final_clean: bool = True) -> list[Level]:
    """A whole grid from a list of sigmas, as published for one model ("custom sigmas").

    Args:
        schedule: the process.
        sigmas: falling amounts of noise: ``sigma / alpha``, or t in [0, 1] for a flow. Amounts outside the
            trained range are kept as they are; the network is told its nearest trained time.
        final_clean: append the clean level unless the list ends with 0 already.

    Raises:
        BadInput: fewer than two levels, a value that is not finite or negative, or one that does not fall.
    """
    for sigma in sigmas:
        if not math.isfinite(sigma) or sigma < 0 or (isinstance(schedule, Flow) and sigma > 1):
            allowed = "in [0, 1] for a flow" if isinstance(schedule, Flow) else "finite and at least 0"
            raise BadInput(f"a sigma must be {allowed}, got {sigma}")
    for first, second in pairwise(sigmas):
        if not first > second:
            raise BadInput(f"sigmas must fall, got {first} followed by {second}")
    grid = [_at_amount(schedule, sigma) for sigma in sigmas]
    if final_clean and grid and not grid[-1].is_clean:
        grid.append(schedule.clean)
    if len(grid) < 2:
        raise BadInput(f"a grid needs at least two levels, got sigmas {list(sigmas)}")
    return grid


def _falls(now: Level, then: Level) -> bool:
    # by more than rounding: a step between two spellings of one level is none
    return then.sigma * now.alpha < now.sigma * then.alpha * (1.0 - 1e-9)


# By rung: the schedule as a ladder of trained steps.

_RUNGS = 1000


def _rungs(schedule: Schedule) -> int:
    return len(schedule.alphas_cumprod) if isinstance(schedule, Discrete) else _RUNGS


def _rung(schedule: Schedule, k: float) -> Level:
    """The level of (fractional) trained step ``k``."""
    last = _rungs(schedule) - 1
    least = -1 if isinstance(schedule, Flow) else 0  # a flow's t is continuous down to the picture
    if not least <= k <= last:
        raise BadInput(f"step {k:g} lies beyond the {last + 1} trained ones; take fewer steps or no offset")
    if isinstance(schedule, Flow):
        return schedule.shifted((k + 1) / _RUNGS)
    if isinstance(schedule, VarianceExploding):
        return schedule.level(schedule.last * (schedule.first / schedule.last) ** (1 - k / last))
    if k == last:
        return schedule.noisiest
    return schedule.level(schedule.first + (schedule.last - schedule.first) * k / last)


def _spread(first: float, last: float, count: int) -> list[float]:
    """``count`` numbers from first to last; one alone is the first."""
    stride = (last - first) / (count - 1) if count > 1 else 0.0
    return [first + i * stride for i in range(count - 1)] + [last if count > 1 else first]


def leading(schedule: Schedule, steps: int, *, offset: int = 1, dropped: int = 0) -> list[Level]:
    """Whole strides of ``T // steps`` from the clean end: Stable Diffusion 1's usual spacing.

    Args:
        schedule: the process.
        steps: how many levels.
        offset: added to every step (``steps_offset``).
        dropped: how many further levels at the clean end are counted but not visited; 1 for the DPM++ family
            as diffusers spaces it.
    """
    stride = _rungs(schedule) // (steps + int(dropped))
    if steps + dropped == 1:
        raise BadInput("spacing 'leading' would take its single step at almost no noise; use 'trailing'")
    return [_rung(schedule, i * stride + offset) for i in reversed(range(int(dropped), steps + int(dropped)))]


def trailing(schedule: Schedule, steps: int) -> list[Level]:
    """Strides of ``T / steps`` from the noisy end, rounded: always begins at the noisiest level."""
    rungs = _rungs(schedule)
    return [_rung(schedule, round(rungs - i * (rungs / steps)) - 1) for i in range(steps)]


def linspace(schedule: Schedule, steps: int, *, dropped: int = 0) -> list[Level]:
    """From last to first step, both included, rounded to trained steps; ``dropped`` as in :func:`leading`.

    A single step begins at the noisiest level (numpy's linspace would yield the cleanest).
    """
    last = _rungs(schedule) - 1
    rising = _spread(0.0, float(last), steps + int(dropped)) if steps + dropped > 1 else [float(last)]
    return [_rung(schedule, round(k)) for k in reversed(rising[int(dropped) :])]


def ldm_ddim(schedule: Schedule, steps: int) -> list[Level]:
    """latent-diffusion's own DDIM spacing, ``range(0, T, T // steps) + 1``.

    That range has more than ``steps`` entries unless they divide T well enough; then it is refused.
    """
    rungs = _rungs(schedule)
    if steps > rungs or len(range(0, rungs, rungs // steps)) != steps or steps in (1, rungs):
        fits = [n for n in range(2, rungs) if len(range(0, rungs, rungs // n)) == n]
        near = min(fits, key=lambda n: abs(n - steps))
        raise BadInput(f"spacing 'ldm-ddim' cannot take exactly {steps} steps; use {near} or 'leading'")
    return [_rung(schedule, k + 1) for k in reversed(range(0, rungs, rungs // steps))]


def _last_rung(schedule: Schedule) -> float:
    """Where evenly spaced times end: step 0, but in a flow that step's *shifted* t is shifted a second time.

    So the published SD3 sampler has it and everyone after it; with shift 1 there is no difference.
    """
    return _RUNGS * schedule.shifted(1 / _RUNGS).sigma - 1 if isinstance(schedule, Flow) else 0.0


def normal(schedule: Schedule, steps: int) -> list[Level]:
    """Times evenly from last to first, fractional: k-diffusion's ``get_sigmas``, SD3's own spacing."""
    return [_rung(schedule, k) for k in _spread(float(_rungs(schedule) - 1), _last_rung(schedule), steps)]


def sgm_uniform(schedule: Schedule, steps: int) -> list[Level]:
    """``steps + 1`` even times of which the cleanest is left out: the spacing of Stability's SDXL code."""
    times = _spread(float(_rungs(schedule) - 1), _last_rung(schedule), steps + 1)
    return [_rung(schedule, k) for k in times[:-1]]


def simple(schedule: Schedule, steps: int) -> list[Level]:
    """Even strides from the noisy end, rounded down, as ComfyUI's ``simple``."""
    rungs = _rungs(schedule)
    return [_rung(schedule, rungs - 1 - int(i * (rungs / steps))) for i in range(steps)]


def lcm(schedule: Schedule, steps: int, *, original: int = 50) -> list[Level]:
    """A choice among the ``original`` levels that a latent consistency model was distilled on."""
    rungs = _rungs(schedule)
    if not steps <= original <= rungs:
        raise BadInput(
            f"spacing 'lcm' takes from 1 to {original:g} steps (its original, at most {rungs}), got {steps}; "
            "use 'trailing'"
        )
    stride = rungs // int(original)
    taken = [int(original) - math.floor(i * (original / steps)) for i in range(steps)]
    return [_rung(schedule, number * stride - 1) for number in taken]


def turbo(schedule: Schedule, steps: int) -> list[Level]:
    """One to four trailing steps, for which SD-Turbo and SDXL-Turbo were distilled."""
    if steps > 4:
        raise BadInput(f"spacing 'turbo' is for 1 to 4 steps, got {steps}; use 'trailing'")
    return trailing(schedule, steps)


def uniform(schedule: Schedule, steps: int, *, until: float | None = None) -> list[Level]:
    """Even in the process's own t, from its noisiest to ``until``.

    Flow and cosine: ``t = 1 - i / steps``, then shifted (FLUX; SD3 with diffusers' sigmas; Cascade). VE and
    VP: score-SDE's ``linspace(1, until, steps)``, until 1e-5 and 1e-3 unless given.
    """
    if isinstance(schedule, (Flow, ContinuousCosine)):
        end = 1 / steps if until is None else until
        low = 0.0
    elif isinstance(schedule, (VarianceExploding, ContinuousVP)):
        least = 1e-5 if isinstance(schedule, VarianceExploding) else 1e-3
        end, low = least if until is None else until, 1e-5
    else:
        raise BadInput("spacing 'uniform' is for continuous processes; use 'trailing' or 'normal' here")
    if not low <= end <= 1.0 or (end == 0.0 and isinstance(schedule, Flow)):
        raise BadInput(f"until of spacing 'uniform' must lie between {low:g} and 1, got {end}")
    times = _spread(1.0, end, steps)
    if isinstance(schedule, (Flow, ContinuousCosine)):
        return [schedule.shifted(t) for t in times]
    if isinstance(schedule, VarianceExploding):
        return [schedule.level(schedule.first ** (1 - t) * schedule.last**t) for t in times]
    return [schedule.level(t * schedule.last) for t in times]


def beta(schedule: Schedule, steps: int, *, a: float = 0.6, b: float = 0.6) -> list[Level]:
    """Steps at the quantiles of a Beta(a, b) law, dense at both ends (Lee et al. 2024), rounded."""
    last = _rungs(schedule) - 1
    return [_rung(schedule, round(beta_quantile(1 - i / steps, a, b) * last)) for i in range(steps)]


# By amount of noise.


def _amount(level: Level) -> float:
    return level.sigma if isinstance(level.schedule, Flow) else level.ratio


def _at_amount(schedule: Schedule, amount: float) -> Level:
    if isinstance(schedule, Flow):
        t = min(amount, 1.0)  # powers and logarithms may round past pure noise
        return Level(1.0 - t, t, schedule)
    return schedule.at_ratio(amount)


def _range(schedule: Schedule, most: float | None, least: float | None) -> tuple[float, float]:
    """The ends between which amounts are interpolated: the trained range unless given."""
    top = schedule.noisiest
    if top.is_pure_noise and not isinstance(schedule, Flow):
        top = _rung(schedule, _rungs(schedule) - 2)
    high = _amount(top) if most is None else most
    low = _amount(_rung(schedule, 0)) if least is None else least
    if not 0 < low < high or (isinstance(schedule, Flow) and high > 1):
        raise BadInput(f"sigmas must run from a higher to a lower one above 0, got {high:g} to {low:g}")
    return high, low


def _positive(spacing: str, **settings: float) -> None:
    for key, value in settings.items():
        if not value > 0:
            raise BadInput(f"{key} of spacing {spacing!r} must be above 0, got {value}")


def karras(
    schedule: Schedule, steps: int, *, rho: float = 7.0, most: float | None = None, least: float | None = None
) -> list[Level]:
    """Even in ``sigma ** (1 / rho)`` (Karras et al. 2022, eq. 5), between sigmas ``most`` and ``least``."""
    _positive("karras", rho=rho)
    high, low = _range(schedule, most, least)
    roots = _spread(high ** (1 / rho), low ** (1 / rho), steps)
    return [_at_amount(schedule, min(root**rho, high)) for root in roots]


def polyexponential(
    schedule: Schedule, steps: int, *, rho: float = 1.0, most: float | None = None, least: float | None = None
) -> list[Level]:
    """Logarithms of sigma along a power ``rho`` of an even ramp (k-diffusion)."""
    _positive("polyexponential", rho=rho)
    high, low = _range(schedule, most, least)
    return [_at_amount(schedule, low * (high / low) ** ramp**rho) for ramp in _spread(1.0, 0.0, steps)]


def exponential(
    schedule: Schedule, steps: int, *, most: float | None = None, least: float | None = None
) -> list[Level]:
    """Even in the logarithm of sigma, so in half-log-SNR (Lu et al. 2022)."""
    return polyexponential(schedule, steps, most=most, least=least)


def beta_sigma(
    schedule: Schedule,
    steps: int,
    *,
    a: float = 0.6,
    b: float = 0.6,
    most: float | None = None,
    least: float | None = None,
) -> list[Level]:
    """The quantiles of :func:`beta` laid over sigma instead of time: diffusers' ``use_beta_sigmas``."""
    high, low = _range(schedule, most, least)
    return [
        _at_amount(schedule, low + beta_quantile(share, a, b) * (high - low))
        for share in _spread(1.0, 0.0, steps)
    ]


def beta_quantile(share: float, a: float, b: float) -> float:
    """The x in [0, 1] below which a Beta(a, b) variable falls with probability ``share``.

    By bisection of the regularised incomplete beta function; accurate to about 1e-14.
    """
    _positive("beta", a=a, b=b)
    if not 0.0 <= share <= 1.0:
        raise BadInput(f"a probability lies between 0 and 1, got {share}")
    if share in (0.0, 1.0):
        return share
    low, high = 0.0, 1.0
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return middle
        if _beta_below(middle, a, b) < share:
            low = middle
        else:
            high = middle


def _beta_below(x: float, a: float, b: float) -> float:
    """``I_x(a, b)`` by its continued fraction (Abramowitz & Stegun 26.5.8), evaluated as Lentz does."""
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta_below(1.0 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    upper, lower, value = 1.0, 0.0, 1.0
    for m in range(1000):
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        even = (m + 1) * (b - m - 1) * x / ((a + 2 * m + 1) * (a + 2 * m + 2))
        before = value
        for term in (odd, even):
            lower = 1.0 / (1.0 + term * lower)
            upper = 1.0 + term / upper
            value *= upper * lower
        if abs(value - before) <= 1e-16 * abs(value):
            break
    return front / (a * value)


GRIDS.add("leading", leading)
GRIDS.add("trailing", trailing)
GRIDS.add("linspace", linspace)
GRIDS.add("ldm-ddim", ldm_ddim, "ddim-uniform")
GRIDS.add("normal", normal)
GRIDS.add("sgm-uniform", sgm_uniform)
GRIDS.add("simple", simple)
GRIDS.add("uniform", uniform, "flow")
GRIDS.add("karras", karras)
GRIDS.add("exponential", exponential)
GRIDS.add("polyexponential", polyexponential)
GRIDS.add("beta", beta)
GRIDS.add("beta-sigma", beta_sigma)
GRIDS.add("lcm", lcm)
GRIDS.add("turbo", turbo)
