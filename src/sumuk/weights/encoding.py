"""The numbers of a file in another type, and what that costs: told for each, refused where it would break them.

float16 ends at 65504. A larger number would become infinite and the picture black, so it is refused by name; one below
6e-8 becomes zero, which is counted. The 8-bit floats (E4M3: 4 bits of exponent, 3 of mantissa) are for matrices of the
denoiser alone, those between its first and last layers; what rounding does to the worst of them is told.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.families.sd import SCHEDULE_BUFFERS
from sumuk.files.quantised import FP8, MARKER, SCHEMES, marker, quantise
from sumuk.files.safetensors import read_header
from sumuk.files.streaming import unmapped
from sumuk.files.tensors import Lazy, Tensors, dtype_name, from_header, torch_dtype
from sumuk.weights.source import Source

FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")
ENDS = (
    "time_embed.", "label_emb.", "input_blocks.0.0.", "out.",  # U-Nets
    "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.",  # FLUX.1
    "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.",  # SD3, DiT
    "embedding.", "clf.", "clip_", "effnet_mapper.", "pixels_mapper.",  # Cascade
    "temb.", "conv_in.", "conv_out.",  # DDPM
)  # fmt: skip
"""First and last layers of the denoisers, by native names: few numbers, on which all others depend."""


@dataclass(kw_only=True)
class Encoding:
    """What becomes of the numbers, and, once they are written, what became of them.

    Attributes:
        dtype: type of the floating-point numbers; None: each as it is.
        quantise: one of :data:`SCHEMES` for the denoiser's matrices, None for none.
        part: which network is the denoiser.
        cast: how many tensors went from one type to another, ``{"F32 -> F16": 686}``.
        zeroed: numbers that were none and have become zero.
        worst: of 8-bit tensors, the name and the relative error (root mean square) of the one that lost most.
    """

    dtype: torch.dtype | None = None
    quantise: str | None = None
    part: str = "denoiser"
    cast: Counter[str] = field(default_factory=Counter)
    zeroed: int = 0
    worst: tuple[str, float] | None = None

    def encode(self, tensors: Mapping[str, Lazy], native: Callable[[str], str] | None = None) -> Tensors:
        """The tensors as they are to be written; loading one measures what it lost.

        Args:
            tensors: by the names that they get in the file.
            native: a name in the file to the native one, part in front; None where nobody knows.
        """
        chosen: set[str] = set()
        if self.quantise is not None and native is not None:
            chosen = {name for name, one in tensors.items() if _fits(native(name), self.part, one)}
        if self.quantise is not None and not chosen:
            raise BadInput(
                f"quantise {self.quantise!r} finds no matrix of a denoiser that it could make smaller"
            )
        made: Tensors = {}
        for name, one in tensors.items():
            made |= self._quantised(name, one) if name in chosen else {name: self._cast(name, one)}
        for name, one in tensors.items():
            if one.stored != (after := made[name].dtype):
                self.cast[f"{one.stored} -> {after}"] += 1
        if self.quantise == "fp8-scaled":
            assert native is not None
            prefix = _prefix(first := min(chosen), native(first))
            made[prefix + MARKER] = marker()
        return made

    def _cast(self, name: str, one: Lazy) -> Lazy:
        """A tensor in the wanted type; tables of noise stay as exact as they are."""
        if self.dtype is None or one.dtype not in FLOATS or one.dtype == dtype_name(self.dtype):
            return one
        if name in SCHEDULE_BUFFERS:
            return one
        dtype = self.dtype

        def load() -> Tensor:
            before = one.load()
            after = before.to(dtype)
            if dtype == torch.float16:
                self._check(name, one, before, after)
            return after

        return one.become(load, dtype=dtype_name(dtype))

    def _check(self, name: str, one: Lazy, before: Tensor, after: Tensor) -> None:
        if not before.numel():
            return
        # The quick look at the ends settles it for all but tensors that hold infinity or none at all.
        if not all(map(math.isfinite, (float(end) for end in after.aminmax()))):
            beyond = before[after.isinf() & ~before.isinf()]
            if beyond.numel():
                most = float(beyond.to(torch.float64).abs().max())
                raise BadFile(
                    f"{one.source}: tensor {name!r} holds {most:g}, and float16 ends at 65504; convert to bf16",
                    "convert.overflow",
                )
        self.zeroed += _zeros(after) - _zeros(before)

    def _quantised(self, name: str, one: Lazy) -> Tensors:
        assert self.quantise is not None
        stem = name.removesuffix("weight")
        parts = {
            (stem + key) if key else name: part for key, part in quantise(one, self.quantise, name).items()
        }
        weight, scale = parts[name], parts.get(stem + "scale_weight")

        def load() -> Tensor:
            made = weight.load()
            exact = one.load().to(torch.float32)
            back = made.to(torch.float32) * (1.0 if scale is None else scale.load().to(torch.float32))
            self.zeroed += _zeros(back) - _zeros(exact)
            error = float((back - exact).norm() / exact.norm()) if bool(exact.any()) else 0.0
            if self.worst is None or error > self.worst[1]:
                self.worst = (name, error)
            return made

        parts[name] = weight.become(load)
        return parts


def _zeros(value: Tensor) -> int:
    return value.numel() - int(torch.count_nonzero(value))


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A type that files are written in.

    Raises:
        BadInput: none of those.
    """
    if isinstance(dtype, str) and dtype in SCHEMES:
        raise BadInput(f"dtype {dtype!r} is not for all tensors: give it as quantise={dtype!r}")
    return None if dtype is None else torch_dtype(dtype)


def read_quantise(scheme: str | None) -> str | None:
    """A scheme of 8 bits.

    Raises:
        BadInput: none of those.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise BadInput(f"quantise {scheme!r} is not known here{nearest(scheme, SCHEMES)}")
    return scheme


def plain_floats(tensors: Mapping[str, Lazy]) -> Tensors:
    """8-bit floats without scales as they are stored, where reading would have made wider ones of them."""
    return {name: _as_stored(one) for name, one in unmapped(tensors).items()}


def as_stored(source: Source) -> Tensors:
    """A source's tensors as they lie in its files, scales and codes beside their weights.

    Of files that are no safetensors: as they were read.
    """
    if any(file.suffix != ".safetensors" for file in source.files):
        return source.tensors
    return unmapped(
        {name: one for file in source.files for name, one in from_header(read_header(file)).items()}
    )


def _as_stored(one: Lazy) -> Lazy:
    packed = one.packed
    if packed is None or packed.scheme not in FP8:
        return one
    return one.become(lambda: packed.stored()["numbers"], dtype=packed.scheme)


def _fits(native: str, part: str, one: Lazy) -> bool:
    """Whether a tensor is a matrix within a denoiser, of numbers that are not 8 bits yet."""
    own, _, name = native.partition(".")
    if own != part or len(one.shape) != 2 or not name.endswith(".weight") or name.startswith(ENDS):
        return False
    return one.dtype in FLOATS and not one.dtype.startswith("F8")


def _prefix(name: str, native: str) -> str:
    return name.removesuffix(native.partition(".")[2])
