"""LoRA files in every spelling for the tiny models of the zoo, and what a model becomes with one, worked out plainly.

The plain way: name the weights as the spelling does, add the products there, and name them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from examples import zoo
from tests.weights.tiny import weights
from torch import Tensor
from torch.nn import functional as F

from sumuk.families.family import Family
from sumuk.files.tensors import Shape, lazy, write
from sumuk.weights.lora import Patch
from sumuk.weights.model import Model

RANK, ALPHA = 2, 3.0
KEYS = ("sd1/text-to-image", "sd2/text-to-image", "sdxl/base", "sd3/medium", "flux/dev", "cascade/stage-c")

TE = {"sd1": "lora_te_", "sd2": "lora_te_", "cascade": "lora_prior_te_"}
KOHYA: Mapping[str, str] = {"unet": "lora_unet_", "transformer": "lora_unet_", "prior": "lora_prior_unet_"}


@cache
def model(key: str) -> Model:
    """The tiny one of the zoo."""
    return zoo.tiny(key)


def natives(key: str) -> dict[str, Tensor]:
    """Weights of the networks that LoRAs change."""
    kept = {name for name in model(key).networks if name == "denoiser" or name.startswith("text")}
    return {name: one for name, one in weights(model(key)).items() if name.partition(".")[0] in kept}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(one.shape) for name, one in tensors.items()}


def _folder(family: Family) -> object:
    return next(each for each in family.arrangements if each.name == "diffusers")


def as_diffusers(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Native weights as a diffusers folder names them: ``unet/down_blocks...``."""
    table = {name: lazy(one) for name, one in tensors.items()}
    layout = _folder(model(key).family).layout(table, backward=True)  # type: ignore[attr-defined]
    return {name: one.load() for name, one in layout.backward(table).tensors.items()}


def as_native(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    table = {name: lazy(one) for name, one in tensors.items()}
    layout = _folder(model(key).family).layout(table)  # type: ignore[attr-defined]
    return {name: one.load() for name, one in layout.forward(table).tensors.items()}


@dataclass(frozen=True)
class Spelling:
    """How a file names its tensors.

    Attributes:
        layer: (network's folder, path of the layer) -> the layer's name; None: such files do not have that network.
        down, up, alpha: names of the factors; no alpha: it is the rank.
        layout: what reading calls it.
        original: whether paths are the published ones instead of diffusers'.
    """

    layer: Callable[[str, str, str], str | None]
    down: str
    up: str
    alpha: str
    layout: str
    original: bool = False


def te(family: str, folder: str) -> str:
    if family in TE:
        return TE[family]
    number = 1 if folder == "text_encoder" else int(folder[-1])
    return f"lora_te{3 if family == 'flux' and number == 2 else number}_"


def _kohya(family: str, folder: str, path: str) -> str:
    return KOHYA.get(folder, te(family, folder) if folder not in KOHYA else "") + path.replace(".", "_")


def _only(prefix: str) -> Callable[[str, str, str], str | None]:
    def layer(family: str, folder: str, path: str) -> str | None:
        dots = "." in prefix or not prefix
        return None if folder not in KOHYA else prefix + (path if dots else path.replace(".", "_"))

    return layer


def _dotted(family: str, folder: str, path: str) -> str:
    return f"{folder}.{path}"


DOWN_UP = ("lora_down.weight", "lora_up.weight", "alpha")
SPELLINGS: dict[str, Spelling] = {
    "kohya": Spelling(_kohya, *DOWN_UP, "kohya"),
    "kohya, published paths": Spelling(_only("lora_unet_"), *DOWN_UP, "kohya", original=True),
    "OneTrainer": Spelling(_only("lora_transformer_"), *DOWN_UP, "kohya"),
    "SimpleTuner": Spelling(_only("lycoris_"), *DOWN_UP, "kohya"),
    "ComfyUI": Spelling(_only("diffusion_model."), *DOWN_UP, "dotted", original=True),
    "PEFT": Spelling(_dotted, "lora_A.weight", "lora_B.weight", "", "peft"),
    "PEFT with alpha": Spelling(_dotted, "lora_A.default.weight", "lora_B.default.weight", "alpha", "peft"),
    "PEFT alone": Spelling(_only("base_model.model."), "lora_A.weight", "lora_B.weight", "", "peft"),
    "diffusers": Spelling(_dotted, "lora.down.weight", "lora.up.weight", "", "diffusers"),
}


def layer_path(name: str) -> str:
    return name.removesuffix("weight").removesuffix("bias").rstrip("._")


def random_pair(weight: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """``down`` [r, in, ...] and ``up`` [out, r, ...]; their product is as large as a weight's tenth."""
    ones = tuple(1 for _ in weight.shape[2:])
    down = torch.randn(rank, *weight.shape[1:]) * weight[0].numel() ** -0.5
    return down, torch.randn(len(weight), rank, *ones) * 0.1


def product(down: Tensor, up: Tensor, shape: Iterable[int], scale: float = 1.0) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(tuple(shape)) * scale


def make(key: str, spelling: Spelling, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA of every matrix and convolution that such files may have, and the native weights with it."""
    torch.manual_seed(seed)
    family = model(key).family.name
    own = natives(key)
    spelt = {
        name.replace("denoiser.", "unet/", 1): one
        for name, one in own.items()
        if name.startswith("denoiser.")
    }
    named = spelt if spelling.original else as_diffusers(key, own)
    file: dict[str, Tensor] = {}
    changed = dict(named)
    for name, weight in named.items():
        folder, _, path = name.partition("/")
        layer = spelling.layer(family, folder, layer_path(path))
        if layer is None or weight.ndim not in (2, 4) or path.endswith("bias"):
            continue
        down, up = random_pair(weight)
        file |= {f"{layer}.{spelling.down}": down, f"{layer}.{spelling.up}": up}
        if spelling.alpha:
            file[f"{layer}.{spelling.alpha}"] = torch.tensor(ALPHA)
        changed[name] = weight + product(down, up, weight.shape, ALPHA / RANK if spelling.alpha else 1.0)
    if spelling.original:
        return file, own | {name.replace("unet/", "denoiser.", 1): one for name, one in changed.items()}
    return file, own | as_native(key, changed)


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file."""
    write(path, {name: one.contiguous() for name, one in tensors.items()}, metadata)
    return path


def applied(own: Mapping[str, Tensor], patches: Iterable[Patch], strength: float = 1.0) -> dict[str, Tensor]:
    """Native weights with the changes of a LoRA."""
    made = {name: one.clone() for name, one in own.items()}
    for patch in patches:
        name = f"{patch.part}.{patch.name}"
        rows = slice(None) if patch.rows is None else slice(*patch.rows)
        made[name][rows] += patch.change.delta(own[name][rows], strength)
    return made


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of weights of the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def bfl(own: dict[str, Tensor], width: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Black Forest Labs's control LoRA: biases too, norms whole, and an ``img_in`` of so many inputs."""
    file, expected = {}, dict(own)
    for name, weight in own.items():
        layer = name.removeprefix("denoiser.").removesuffix(".weight")
        if not name.startswith("denoiser."):
            continue
        if name.endswith("_norm.scale"):
            expected[name] = file[layer] = torch.rand_like(weight)
        elif name.endswith(".weight"):
            wide = F.pad(weight, (0, width - weight.shape[1])) if width and layer == "img_in" else weight
            down, up = random_pair(wide)
            file |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            expected[name] = wide + up @ down
            bias = name.replace("weight", "bias")
            file[f"{layer}.lora_B.bias"] = torch.randn(len(weight))
            expected[bias] = own[bias] + file[f"{layer}.lora_B.bias"]
    return file, expected
