"""LoRAs and their like at work on a loaded model: live, for one forward at a time, or fused into its weights.

A file's changes are held beside the model. Those that are products of two thin layers are added to what a layer makes
(:mod:`sumuk.nets.patched`), by another strength for each row of a batch. The others (LoHa, LoKr, DoRA, norms, ...)
change the weight itself, for the length of a forward. Fused, all of them are added to the weights, which are put back
when they shall go. Whichever way, each change is worked out from the model's own weights, and several are added::

    W' = W + sum_i delta_i(W, strength_i)

so their order does not matter, and live and fused mean the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sumuk.base.errors import BadFile, BadInput
from sumuk.nets.packed import shapes, value
from sumuk.nets.patched import Thin, home
from sumuk.nets.t5 import T5Encoder
from sumuk.weights.blocks import Blocks, Rates
from sumuk.weights.building import Place
from sumuk.weights.licences import said_in
from sumuk.weights.lora import Lora, Patch, read_lora
from sumuk.weights.lora_tools import relative_change
from sumuk.weights.model import Model, WeightFile


@dataclass(frozen=True, kw_only=True)
class Applied:
    """The account of one file: what of it reaches the model, and how much that changes.

    Attributes:
        matched: layers that it changes.
        unmatched: its tensors for layers that the model does not have.
        misshapen: its tensors that do not fit the layer they name.
        change: size of what is added at strength 1 against the weights that it is added to (Frobenius norms).
    """

    matched: int
    unmatched: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    change: float

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a picture's receipt."""
        return {
            "matched": self.matched,
            "unmatched": len(self.unmatched),
            "misshapen": len(self.misshapen),
            "change": self.change,
        }


@dataclass(frozen=True, eq=False)
class LiveLora:
    """A LoRA that fits a model and can be worn by requests.

    Attributes:
        lora: what was read.
        file: where it came from.
        applied: its account.
        thin: for each part, what is added to layers' outputs, on the model's device.
        whole: for each part, the changes that need the weight itself.
    """

    lora: Lora
    file: WeightFile
    applied: Applied
    thin: Mapping[str, tuple[tuple[Thin, Patch], ...]]
    whole: Mapping[str, tuple[Patch, ...]]

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that it changes."""
        return tuple(dict.fromkeys((*self.thin, *self.whole)))


@dataclass(frozen=True)
class BlockRates:
    """Rates by block as a request writes them, read for one model."""

    text: str
    blocks: Blocks
    rates: Rates = field(compare=False)

    @classmethod
    def read(cls, text: str, model: Model) -> BlockRates:
        """Blocks that the text does not name have the rate 1.

        Raises:
            BadInput: see :meth:`sumuk.weights.blocks.Rates.parse`.
        """
        blocks = Blocks.of(f"denoiser.{name}" for name in shapes(model.denoiser))
        return cls(text, blocks, Rates.parse(text, blocks, rest=1.0))

    def of(self, part: str, name: str) -> float:
        """The rate of a tensor."""
        return self.rates.of(self.blocks.block(part, name))


@dataclass(frozen=True)
class Worn:
    """A LoRA as one request wears it on one network.

    Attributes:
        live: which.
        strength: factor of its changes.
        rates: further factors, by block; None: 1 everywhere.
    """

    live: LiveLora
    name: str
    strength: float
    rates: BlockRates | None = None

    def rate(self, patch: Patch) -> float:
        """The strength for one change."""
        return self.strength * (1.0 if self.rates is None else self.rates.of(patch.part, patch.name))


def wear(path: Place, model: Model, *, partial: bool = False) -> LiveLora:
    """Read a LoRA for a model.

    Args:
        path: its file.
        model: what it shall change.
        partial: whether a file is welcome of which only a part fits.

    Raises:
        MissingFile, BadFile: no such file; no LoRA; made for another model; it fits in part only; it changes nothing.
    """
    native = {
        f"{part}.{name}": shape
        for part, network in model.networks.items()
        for name, shape in shapes(network).items()
    }
    lora = read_lora(path, model.family, native)
    lost = (*lora.unmatched, *lora.misshapen)
    if lost and not partial:
        raise BadFile(
            f"{path}: {len(lost)} of its tensors do not fit {model.family.title}, such as {lost[0]!r}; to apply "
            "the rest all the same, allow it in part",
            "lora.partial",
        )
    thin: dict[str, list[tuple[Thin, Patch]]] = defaultdict(list)
    whole: dict[str, list[Patch]] = defaultdict(list)
    size = weights = 0.0
    for patch in lora.patches:
        network = model.networks[patch.part]
        factors = patch.change.low_rank()
        layer, _, leaf = patch.name.rpartition(".")
        if factors is not None and leaf == "weight" and _is_layer(network, layer):
            down, up, scale = factors
            made = Thin(layer, down, up, scale, patch.rows).to(model.device, model.dtype)
            thin[patch.part].append((made, patch))
        else:
            whole[patch.part].append(patch)
        one, other = relative_change(patch.change, _rows(value(network, patch.name), patch), 1.0)
        size, weights = size + one**2, weights + other**2
    change = (size / weights) ** 0.5 if weights else 0.0
    if not isfinite(change):
        raise BadFile(f"{path}: holds NaN, or numbers whose product is infinite", "lora.numbers")
    if change == 0.0 and not lora.embeddings:
        raise BadFile(f"{path}: changes nothing: all that it would add is zero", "lora.zero")
    return LiveLora(
        lora=lora,
        file=WeightFile(lora.path, said_in(lora.metadata)),
        applied=Applied(
            matched=len(lora.patches), unmatched=lora.unmatched, misshapen=lora.misshapen, change=change
        ),
        thin={part: tuple(some) for part, some in thin.items()},
        whole={part: tuple(some) for part, some in whole.items()},
    )


def _is_layer(network: nn.Module, name: str) -> bool:
    """Whether a layer is called as one, so that something can be added to what it makes."""
    layer = network.get_submodule(name)
    if isinstance(network, T5Encoder) and name.endswith(".wo") and layer.weight.dtype == torch.float16:
        return False  # there the weight is read, and the product made in float32
    if isinstance(layer, nn.Conv2d):
        # Two thin convolutions in a row are its product only where all channels meet, and the border is zero.
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


_LAST: WeakKeyDictionary[nn.Module, tuple[tuple[Worn, ...], dict[str, tuple[nn.Parameter, Tensor]]]] = (
    WeakKeyDictionary()
)
"""What was last exchanged in each network: the steps of a picture ask for the same again and again."""


def exchanged(network: nn.Module, part: str, worn: Sequence[Worn]) -> dict[str, Tensor]:
    """Parameters with those changes added that cannot be added live, by their names; the last ones are remembered.

    Args: see :func:`added`.
    """
    asked = tuple(worn)
    key, known = _LAST.get(network, ((), {}))
    current = all(_parameter(network, name) is old for name, (old, _) in known.items())
    if key != asked or not current:
        made = added(network, part, asked)
        known = {name: (_parameter(network, name), new) for name, new in made.items()}
        _LAST[network] = (asked, known)
    return {name: new for name, (_, new) in known.items()}


def _parameter(network: nn.Module, name: str) -> nn.Parameter:
    module, leaf = home(network, name)
    found = module._parameters[leaf]
    assert found is not None
    return found


def added(network: nn.Module, part: str, worn: Sequence[Worn], *, thin: bool = False) -> dict[str, Tensor]:
    """Parameters of a network with changes added, by their names; those that nothing changes are not among them.

    Args:
        network: whose parameters; they are not touched.
        part: which of the model's networks it is.
        worn: what is added.
        thin: also what could be added live.

    Raises:
        BadInput: a weight that is kept packed.
    """
    sums: dict[str, Tensor] = {}
    for each in worn:
        some = [patch for _, patch in each.live.thin.get(part, ())] if thin else []
        for patch in (*some, *each.live.whole.get(part, ())):
            strength = each.rate(patch)
            if not strength:
                continue
            weight = _parameter(network, patch.name)
            delta = patch.change.delta(_rows(weight.detach(), patch), strength)
            if patch.name not in sums:
                sums[patch.name] = torch.zeros(weight.shape, dtype=delta.dtype, device=delta.device)
            _rows(sums[patch.name], patch).add_(delta)
    for name, total in sums.items():
        weight = _parameter(network, name)
        sums[name] = (weight.detach().to(total.dtype) + total).to(weight)
    return sums


def _rows(weight: Tensor, patch: Patch) -> Tensor:
    return weight if patch.rows is None else weight[slice(*patch.rows)]


@dataclass
class Fusion:
    """LoRAs added to a model's weights; :meth:`eject` puts the old weights back, the very same tensors."""

    before: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)

    def eject(self) -> None:
        """Undo it. A second time does nothing."""
        while self.before:
            module, leaf, old = self.before.pop()
            module._parameters[leaf] = old


def fuse(model: Model, worn: Sequence[Worn]) -> Fusion:
    """Add LoRAs to a model's weights, for drawing without any cost in each step.

    The model's networks are changed in place until the result is ejected; the old weights are kept meanwhile, which for
    a model that is mapped from its file costs no memory.

    Raises:
        BadInput: nothing to add, or a weight that is kept packed. Nothing was changed then.
    """
    made = {part: added(network, part, worn, thin=True) for part, network in model.networks.items()}
    if not any(made.values()):
        raise BadInput("there is nothing to fuse: no LoRA, or all of strength 0")
    fusion = Fusion()
    for part, values in made.items():
        for name, new in values.items():
            module, leaf = home(model.networks[part], name)
            fusion.before.append((module, leaf, _parameter(model.networks[part], name)))
            module._parameters[leaf] = nn.Parameter(new, requires_grad=False)
    return fusion
