"""ControlNets that are stored as changes of a U-Net, made whole with that U-Net's weights.

Two published kinds, both with the original names. A *difference* stores for each copied weight what was added
to it, and the ControlNet's own layers whole::

    W = W_base + D

A *Control-LoRA* (Stability AI 2023) stores that difference as a product of two thin matrices; biases, norms and
the ControlNet's own layers are whole::

    W = W_base + up down          up [out, r], down [r, in * kh * kw]
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sumuk.base.errors import BadFile

LORA_MARK = "lora_controlnet"
"""An empty tensor in every Control-LoRA."""

DIFFERENCE_MARK = "difference"
"""A tensor in every file of differences."""

COPIED = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
"""What a ControlNet copies of its U-Net."""


def control_lora(base: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole ControlNet from a Control-LoRA and the U-Net that it was made for.

    Args:
        base: the U-Net's tensors by native names; its decoder is not looked at.
        file: the Control-LoRA's tensors by their names, with or without :data:`LORA_MARK`.

    Returns:
        What ``ControlNet.load_state_dict`` takes. Sums are made in float32 and have the base's dtype.

    Raises:
        BadFile: an ``up`` without its ``down``, a change of a weight that the base lacks or of another size.
    """
    file = {name: tensor for name, tensor in file.items() if name != LORA_MARK}
    made = {name: tensor for name, tensor in base.items() if name.startswith(COPIED)}
    for name, tensor in file.items():
        module, _, end = name.rpartition(".")
        if end in ("weight", "bias"):
            if name in made and made[name].shape != tensor.shape:
                raise _misfit(name, tensor, made[name])
            made[name] = tensor
        elif end not in ("up", "down"):
            raise BadFile(
                f"tensor {name!r} has no place in a Control-LoRA; remove it", "control_lora.unknown"
            )
        elif f"{module}.{'down' if end == 'up' else 'up'}" not in file:
            raise BadFile(f"tensor {name!r} is there without its other half", "control_lora.half")
    for name, up in file.items():
        module, _, end = name.rpartition(".")
        if end != "up":
            continue
        weight, down = f"{module}.weight", file[f"{module}.down"]
        if weight not in base or not weight.startswith(COPIED):
            raise BadFile(f"tensor {name!r} changes {weight!r}, which this U-Net lacks", "control_lora.base")
        whole = made[weight]
        left, right = up.flatten(1), down.flatten(1)
        if left.shape != (len(whole), len(right)) or right.shape[1] != whole[0].numel():
            raise _misfit(name, up, whole)
        change = left.to(whole.device).float() @ right.to(whole.device).float()
        made[weight] = (whole.float() + change.reshape(whole.shape)).to(whole.dtype)
    return made


def from_difference(base: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole ControlNet from a file of differences and any U-Net of that family.

    Args:
        base: the U-Net's tensors by native names.
        file: the differences by native names, with or without :data:`DIFFERENCE_MARK`.

    Returns:
        What ``ControlNet.load_state_dict`` takes. Sums are made in float32 and have the dtype of ``file``.

    Raises:
        BadFile: a difference that fits no weight of the base.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in file.items():
        if name == DIFFERENCE_MARK:
            continue
        if not name.startswith(COPIED):
            made[name] = tensor
        elif name not in base:
            raise BadFile(
                f"tensor {name!r} is the difference to one that this U-Net lacks", "difference.base"
            )
        elif base[name].shape != tensor.shape:
            raise _misfit(name, tensor, base[name])
        else:
            made[name] = (tensor.float() + base[name].to(tensor.device).float()).to(tensor.dtype)
    return made


def _misfit(name: str, tensor: Tensor, weight: Tensor) -> BadFile:
    return BadFile(
        f"tensor {name!r} of shape {list(tensor.shape)} does not fit the U-Net's weight of shape "
        f"{list(weight.shape)}; it was made for another model",
        "control.misfit",
    )
