"""Quantised safetensors files: scales and codes folded into the weights that they belong to.

Two ways to store a weight in fewer bits, each with tensors beside it that its numbers cannot be read without::

    8-bit floats (ComfyUI)      W = fp8 * scale                    one scale, or one for each row
    4-bit codes (bitsandbytes)  W[i] = table[code[i]] * absmax[i // block]
      and again, nested         absmax[j] = table2[q[j]] * absmax2[j // block2] + offset

Names, of a layer ``X``: ``X.scale_weight`` (or ``X.weight_scale``), ``X.scale_input`` (``X.input_scale``), the marker
``scaled_fp8``, ``X.comfy_quant`` and the header's ``_quantization_metadata`` (JSON); ``X.weight.absmax``,
``.quant_map``, ``.quant_state.bitsandbytes__nf4`` (JSON), ``.nested_absmax``, ``.nested_quant_map``. 8-bit floats
without any scale are what they are. The 4-bit formats are those of Dettmers et al. 2023, section 3 (QLoRA).

Folding looks at names and reads only the small JSON tensors. Other formats are refused by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from math import isfinite, prod
from typing import TYPE_CHECKING, Any, NoReturn

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.files.safetensors import BITS
from sumuk.files.tensors import Lazy, Packed, Shape, Tensors, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MARKER = "scaled_fp8"
"""Name of the tensor that says of a file, or of what lies below a prefix, that its 8-bit floats have scales."""
METADATA = "_quantization_metadata"
"""Where a header names the layers that are quantised; untrue once the weights were written in another way."""
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""Types of 8-bit floats -> what ComfyUI calls them."""
MOST = 448.0
"""The largest number of ``F8_E4M3``."""
SCHEMES = ("fp8", "fp8-scaled")

_ROLES = {"scale_weight": "scale", "scale_input": "input", "comfy_quant": "format"}
_ROLES |= {"weight_scale": "scale", "input_scale": "input"}
"""Last part of a name beside a layer -> what it is to the layer's weight."""
_CODES = {"absmax": "absmax", "quant_map": "table", "nested_absmax": "absmax2", "nested_quant_map": "table2"}
"""Last part of a name below a weight -> what it is to that weight."""
_STATE = "bitsandbytes__"
_FOREIGN = {
    "weight_scale_2": "NVFP4",
    "weight_scale_inv": "8-bit floats with scales of blocks",
    "pre_quant_scale": "weights scaled at their input",
    "SCB": "LLM.int8",
}
_KNOWN = ("format", "full_precision_matrix_mult")
_ROUNDED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LONGEST = 4096
"""Bytes of JSON in a tensor; the real ones have about 200."""
_MARKERS = 16
_AT_ONCE = 2**20
"""Codes that are expanded at a time, so that what is made on the way takes little memory."""


@dataclass
class _Found:
    """What the names of a file show: weight -> what lies beside it -> its name; markers; 8-bit floats."""

    beside: dict[str, dict[str, str]] = field(default_factory=dict)
    markers: list[str] = field(default_factory=list)
    floats: list[str] = field(default_factory=list)


def fold(tensors: Tensors, metadata: Mapping[str, str]) -> tuple[Tensors, tuple[str, ...]]:
    """Fold what lies beside quantised weights into them.

    Args:
        tensors: of a file, a set of shards or a folder, all of it.
        metadata: the header's texts.

    Returns:
        The weights under the names and shapes that they have unquantised, ``packed`` where they are quantised
        (``load`` gives numbers that networks compute with), without the tensors beside them; and notes for the user.
        A file without any of this is handed back as it came.

    Raises:
        BadFile: a weight without its scale, a scale without its weight, sizes that do not fit, a format that is not
            known; code ``quantised.*``.
    """
    found = _look(tensors)
    formats = _formats(tensors, found, metadata.get(METADATA))
    if not (found.beside or found.markers or found.floats or formats):
        return tensors, ()
    folded: Tensors = {}
    for weight in dict.fromkeys((*found.beside, *formats)):
        names = found.beside.get(weight, {})
        if weight not in tensors:
            said = next(iter(names.values()), METADATA)
            source = next((one.source for one in tensors.values()), "")
            _refuse(source, "orphan", f"{said!r} tells of the weight {weight!r:.200}, which is not there")
        make = _four_bits if names.keys() & {"state", *_CODES.values()} else _scaled
        folded[weight] = make(weight, names, tensors, formats.get(weight, set()))
    _refuse_unscaled(tensors, found, folded)
    for name in found.floats:
        one = tensors[name]
        plain = Packed(one.dtype, _size(one), partial(_numbers, one), _expand_floats)
        folded.setdefault(name, _packed(one, plain, one.shape, "F32"))
    gone = {name for names in found.beside.values() for name in names.values()} | set(found.markers)
    kept = {name: folded.get(name, one) for name, one in tensors.items() if name not in gone}
    return kept, tuple(_notes(found, folded))


def _look(tensors: Tensors) -> _Found:
    found = _Found()
    for name, one in tensors.items():
        head, _, tail = name.rpartition(".")
        if tail in _ROLES:
            weight, role = f"{head}.weight", _ROLES[tail]
        elif tail in _CODES:
            weight, role = head, _CODES[tail]
        elif tail.startswith(_STATE):
            weight, role = head.removesuffix(".quant_state"), "state"
        elif tail in _FOREIGN:
            _refuse(
                one.source, "format", f"{name!r} is of {_FOREIGN[tail]}, which is not read; take fp8 or NF4"
            )
        else:
            if tail.rpartition("/")[2] == MARKER:
                if one.parameters > 2:
                    _refuse(one.source, "marker", f"{name!r} has {one.parameters} elements, not 0 or 2")
                found.markers.append(name)
            elif one.dtype in FP8:
                found.floats.append(name)
            continue
        names = found.beside.setdefault(weight, {})
        if role in names:
            _refuse(one.source, "twice", f"both {names[role]!r} and {name!r} are there for {weight!r}")
        names[role] = name
    return found


def _formats(tensors: Tensors, found: _Found, said: str | None) -> dict[str, set[str]]:
    """Weight -> the formats that the file says it has: by a text beside it, in the header, or both."""
    formats: dict[str, set[str]] = {}
    for weight, names in found.beside.items():
        if "format" in names:
            one = tensors[names["format"]]
            formats[weight] = {_format(names["format"], one.source, _json(one, names["format"]))}
    if said is not None:
        source = next((one.source for one in tensors.values()), "")
        layers = _parse(said, source, METADATA).get("layers")
        if not isinstance(layers, dict):
            _refuse(source, "json", f"{METADATA} has no table of layers")
        prefix = _prefix(tensors, layers)
        for layer, settings in layers.items():
            weight = f"{layer}.weight" if f"{layer}.weight" in tensors else f"{prefix}{layer}.weight"
            formats.setdefault(weight, set()).add(_format(f"{METADATA} of {layer!r:.99}", source, settings))
    return formats


def _prefix(tensors: Tensors, layers: Mapping[str, Any]) -> str:
    """What a header leaves away from the names of its layers, if anything (``model.diffusion_model.``)."""
    lost = next((f"{layer}.weight" for layer in layers if f"{layer}.weight" not in tensors), "")
    ends = [name.removesuffix(lost) for name in tensors if lost and name.endswith(("." + lost, "/" + lost))]
    return ends[0] if len(ends) == 1 else ""


def _format(name: str, source: str, settings: Any) -> str:
    """The format in a layer's settings, if these ask for nothing else."""
    if not isinstance(settings, dict) or not isinstance(settings.get("format"), str):
        _refuse(source, "json", f"{name} names no format: {settings!r:.80}")
    if settings["format"] not in FP8.values():
        known = ", ".join(FP8.values())
        _refuse(source, "format", f"{name} has the format {settings['format']!r:.40}; known: {known}")
    if strange := [key for key, value in settings.items() if key not in _KNOWN and value]:
        _refuse(source, "format", f"{name} asks for {strange[0]!r:.40}, which is not known")
    return str(settings["format"])


def _scaled(weight: str, names: Mapping[str, str], tensors: Tensors, told: set[str]) -> Lazy:
    """A weight of 8-bit floats with its scale."""
    one = tensors[weight]
    if one.dtype not in FP8 or told - {FP8[one.dtype]}:
        wanted = " and ".join(sorted(told)) or " or ".join(FP8.values())
        _refuse(one.source, "format", f"{weight!r} should be of {wanted}, but is stored as {one.dtype}")
    if "scale" not in names:
        said = next(iter(names.values()), METADATA)
        _refuse(one.source, "lost", f"{weight!r} has no scale, which {said!r} calls for")
    scale = tensors[names["scale"]]
    rows = (*one.shape[:1], *[1] * len(one.shape[1:]))
    if scale.dtype not in ("F32", "BF16", "F16") or (scale.parameters != 1 and scale.shape != rows):
        _unfit(scale, names["scale"], weight, f"one float, or {list(rows)} floats")
    stored = partial(_numbers, one, scale, names["scale"])
    packed = Packed(f"{one.dtype} scaled", _size(one) + _size(scale), stored, _expand_floats)
    return _packed(one, packed, one.shape, "F32")


def _refuse_unscaled(tensors: Tensors, found: _Found, folded: Tensors) -> None:
    """Below a marker each matrix has its scale: without it the numbers would be too large by far."""
    if len(found.markers) > _MARKERS:
        first = found.markers[0]
        _refuse(tensors[first].source, "marker", f"has {len(found.markers)} markers such as {first!r}")
    below = tuple(name.removesuffix(MARKER) for name in found.markers)
    for name in found.floats:
        if name.startswith(below) and name not in folded and len(tensors[name].shape) == 2:
            said = next(marker for marker in found.markers if name.startswith(marker.removesuffix(MARKER)))
            _refuse(tensors[name].source, "lost", f"{name!r} has no scale, which {said!r} calls for")


def _four_bits(weight: str, names: Mapping[str, str], tensors: Tensors, told: set[str]) -> Lazy:
    """A weight of 4-bit codes."""
    one = tensors[weight]
    if told or names.keys() & set(_ROLES.values()):
        _refuse(one.source, "twice", f"{weight!r} is said to be both 8-bit floats and codes of bitsandbytes")
    again = {"absmax2", "table2"} if names.keys() & {"absmax2", "table2"} else set()
    if lost := {"state", "absmax", "table", *again} - names.keys():
        spelt = {role: tail for tail, role in _CODES.items()} | {"state": f"quant_state.{_STATE}nf4"}
        _refuse(one.source, "lost", f"{weight!r} cannot be read without '{weight}.{spelt[min(lost)]}'")
    where = names["state"]
    code = _code(where, tensors[where], bool(again))
    if (code.count + 1) // 2 != _size(one):
        _refuse(one.source, "shape", f"{where!r}: {_size(one)} bytes of codes do not fill {code.shape!s:.80}")
    blocks = -(-code.count // code.block)
    needed = {"table": ("F32", 16), "absmax": ("U8" if again else "F32", blocks)}
    if again:
        needed |= {"absmax2": ("F32", -(-blocks // code.block2)), "table2": ("F32", 256)}
    parts = {role: tensors[names[role]] for role in needed}
    for role, (dtype, count) in needed.items():
        if parts[role].dtype != dtype or parts[role].parameters != count:
            _unfit(parts[role], names[role], weight, f"{count} of {dtype}")
    size = _size(one) + sum(map(_size, parts.values()))
    packed = Packed(code.kind.upper(), size, partial(_codes, one, parts), partial(_expand_codes, code=code))
    return _packed(one, packed, code.shape, code.rounded)


@dataclass(frozen=True)
class _Code:
    """What the JSON beside 4-bit codes says: their true shape, numbers in a block, the type that these are rounded to.

    Where the scales are codes as well (nested), also how many of them are in a block, and what is added to them.
    """

    kind: str
    shape: Shape
    block: int
    rounded: str
    block2: int = 0
    offset: float = 0.0

    @property
    def count(self) -> int:
        return prod(self.shape)


def _code(name: str, one: Lazy, nested: bool) -> _Code:
    state = _json(one, name)
    kind, shape, block = name.rpartition(_STATE)[2], state.get("shape"), state.get("blocksize")
    rounded = _ROUNDED.get(str(state.get("dtype")))
    block2, offset = state.get("nested_blocksize"), state.get("nested_offset", 0.0)
    odd = ""
    if kind not in ("nf4", "fp4") or state.get("quant_type") != kind:
        odd = f"the kind {state.get('quant_type')!r:.40}; known: nf4, fp4"
    elif rounded is None:
        odd = f"the dtype {state.get('dtype')!r:.40}; known: {', '.join(_ROUNDED)}"
    elif type(block) is not int or block not in _BLOCKS:
        odd = f"blocks of {block!r:.40}; known: {', '.join(map(str, _BLOCKS))}"
    elif not isinstance(shape, list) or not 0 < len(shape) <= 8 or not all(map(_is_side, shape)):
        _refuse(one.source, "shape", f"{name!r} has the shape {shape!r:.80}, which is none")
    elif nested != (block2 is not None):
        _refuse(one.source, "lost", f"{name!r} and the tensors beside it disagree whether scales are nested")
    elif nested and not (_is_side(block2) and isinstance(offset, float) and isfinite(offset)):
        odd = f"nested blocks of {block2!r:.40} with the offset {offset!r:.40}"
    else:
        return _Code(kind, tuple(shape), block, str(rounded), *((block2, offset) if nested else ()))
    _refuse(one.source, "format", f"{name!r} has {odd}")


def _notes(found: _Found, folded: Tensors) -> list[str]:
    counts = Counter(one.stored for name, one in folded.items() if name in found.beside)
    inputs = sum("input" in names for names in found.beside.values())
    notes = [f"{scheme}: {count} weights" for scheme, count in sorted(counts.items())]
    if inputs:
        notes.append(f"scales of the inputs of {inputs} layers (activation quantisation) are not used")
    return notes


def _packed(one: Lazy, packed: Packed, shape: Shape, dtype: str) -> Lazy:
    return Lazy(shape, dtype, partial(_load, packed, dtype), one.source, packed)


def _load(packed: Packed, dtype: str) -> Tensor:
    return packed.expand(packed.stored(), torch_dtype(dtype))


def _size(one: Lazy) -> int:
    return one.parameters * BITS[one.dtype] // 8


def _is_side(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31  # type(), as True is an int as well


def _json(one: Lazy, name: str) -> dict[str, Any]:
    """What is written in a small tensor."""
    if one.dtype != "U8" or len(one.shape) != 1 or not 0 < one.parameters <= _LONGEST:
        kind = f"{one.dtype} {list(one.shape)}"
        _refuse(one.source, "json", f"{name!r} is {kind}, no text of at most {_LONGEST} bytes")
    return _parse(bytes(one.load().tolist()), one.source, repr(name))


def _parse(text: str | bytes, source: str, name: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(source, "json", f"{name} is not JSON: {str(error) or 'nested too deeply':.80}")
    if not isinstance(table, dict):
        _refuse(source, "json", f"{name} holds {type(table).__name__}, not a table")
    return table


def _unfit(one: Lazy, name: str, weight: str, needed: str) -> NoReturn:
    _refuse(one.source, "size", f"{name!r} is {one.dtype} {list(one.shape)}; {weight!r} needs {needed}")


def _refuse(source: str, code: str, message: str) -> NoReturn:
    raise BadFile(f"{source}: {message}", f"quantised.{code}")


# -- the arithmetic --------------------------------------------------------------------------------------------------


def _numbers(one: Lazy, scale: Lazy | None = None, name: str = "") -> dict[str, Tensor]:
    if scale is None:
        return {"numbers": one.load()}
    value = scale.load().float()
    if not bool(value.isfinite().all()):
        _refuse(scale.source, "scale", f"{name!r} is not a finite number")
    return {"numbers": one.load(), "scale": value.reshape(()) if value.numel() == 1 else value}


def _expand_floats(stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """8-bit floats as numbers; with a scale they are multiplied in float32 and rounded once."""
    import torch

    numbers, scale = stored["numbers"], stored.get("scale")
    word, count = {4: torch.int64, 2: torch.int32}.get(dtype.itemsize), numbers.numel()
    per_row = scale is not None and scale.ndim > 0
    if word is None or per_row or numbers.device.type != "cpu" or count % 2 or count < 2**18:
        return numbers.to(dtype) if scale is None else (numbers.float() * scale).to(dtype)
    # CPUs convert them one by one. Looking up two at a time is up to ten times as fast, and gives the same numbers.
    every = torch.arange(256, dtype=torch.uint8).view(numbers.dtype)
    table = every.to(dtype) if scale is None else (every.float() * scale).to(dtype)
    pairs = torch.stack((table.repeat(256), table.repeat_interleave(256)), -1).view(word).flatten()
    at, made = numbers.flatten().view(torch.uint16), torch.empty(count // 2, dtype=word)
    for begin in range(0, count // 2, _AT_ONCE):
        made[begin : begin + _AT_ONCE] = pairs.index_select(0, at[begin : begin + _AT_ONCE].int())
    return made.view(dtype).view(numbers.shape)


def _codes(one: Lazy, parts: Mapping[str, Lazy]) -> dict[str, Tensor]:
    import torch

    # bitsandbytes can lay the bytes of codes into tensors of any type
    codes = one.load().flatten().view(torch.uint8)
    return {"codes": codes, **{role: part.load().flatten() for role, part in parts.items()}}


def _expand_codes(stored: Mapping[str, Tensor], dtype: torch.dtype, *, code: _Code) -> Tensor:
    """4-bit codes as numbers, the upper half of a byte first, rounded to the type that the file says."""
    import torch

    absmax, table = stored["absmax"], stored["table"]
    if code.block2:
        absmax = _times(stored["table2"][absmax.int()], stored["absmax2"], code.block2) + code.offset
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), -1).view(torch.int64).flatten()
    made = torch.empty(code.count, dtype=dtype, device=pairs.device)
    for begin in range(0, code.count, _AT_ONCE):
        end = min(begin + _AT_ONCE, code.count)
        at = stored["codes"][begin // 2 : (end + 1) // 2].int()
        numbers = pairs.index_select(0, at).view(torch.float32)[: end - begin]
        scales = absmax[begin // code.block :]
        made[begin:end] = _times(numbers, scales, code.block).to(torch_dtype(code.rounded))
    return made.view(code.shape)


def _times(numbers: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each block of numbers times its scale, in place; the last block may be shorter."""
    whole, rest = divmod(len(numbers), block)
    numbers[: whole * block].view(whole, block).mul_(scales[:whole, None])
    if rest:
        numbers[whole * block :].mul_(scales[whole])
    return numbers


def quantise(one: Lazy, scheme: str, name: str = "") -> dict[str, Lazy]:
    """A matrix as 8-bit floats (``F8_E4M3``), for writing.

    Args:
        one: the matrix.
        scheme: ``fp8``, or ``fp8-scaled``, which divides by ``scale_weight = max|W| / 448`` so that the largest number
            is the type's largest. The error of normal weights is 2.6% of their size (root mean square).
        name: the matrix's, for messages.

    Returns:
        The tensors by what follows the layer's name: ``""`` for the weight, ``"scale_weight"`` for its scale. A file
        with such scales also has a :func:`marker`.

    Raises:
        BadInput: no matrix, another scheme; or, when it is loaded, numbers that are not finite or, without a scale,
            beyond 448.
    """
    if scheme not in SCHEMES:
        raise BadInput(f"weights cannot be written as {scheme!r}{nearest(scheme, SCHEMES)}")
    if len(one.shape) != 2 or not one.parameters or one.dtype not in ("F64", "F32", "BF16", "F16"):
        raise BadInput(f"only matrices of floats become fp8; {name!r} is {one.dtype} {list(one.shape)}")

    @cache  # the matrix is read once for its scale and once for itself, and kept neither time
    def scale() -> Tensor:
        most = one.load().abs().max().float()
        if not bool(most.isfinite()):
            raise BadInput(f"{name!r} of {one.source} holds numbers that are not finite, which fp8 has not")
        if scheme == "fp8-scaled":
            # what is zero, or smaller than a scale can tell, needs some scale all the same
            return (most / MOST).clamp_min(2.0**-126)
        if most > MOST:
            raise BadInput(f"{name!r} of {one.source} reaches {most:g}, fp8 only {MOST:g}; take fp8-scaled")
        return most.new_ones(())

    def weight() -> Tensor:
        import torch

        return (one.load().float() / scale()).clamp_(-MOST, MOST).to(torch.float8_e4m3fn)

    made = {"": one.become(weight, dtype="F8_E4M3")}
    if scheme == "fp8-scaled":
        made["scale_weight"] = one.become(scale, shape=(), dtype="F32")
    return made


def marker() -> Lazy:
    """The tensor that is written as ``scaled_fp8``; its two elements ask for products in full precision."""

    def load() -> Tensor:
        import torch

        return torch.zeros(2).to(torch.float8_e4m3fn)

    return Lazy((2,), "F8_E4M3", load)
