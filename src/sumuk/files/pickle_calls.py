"""What the known names of a pickle describe when it calls them: each entry checks its arguments and builds a node.

No name is looked up in Python and nothing from the file is ever called; a call that real files do not make is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from math import prod
from typing import Any

from sumuk.files.pickle_names import DTYPES, STORAGES
from sumuk.files.pickle_nodes import (
    Foreign,
    Name,
    NumberType,
    Parameters,
    Storage,
    Table,
    View,
    refuse,
    shown,
)

MAX_SIZE = 2**62
"""Above every size, stride and offset that is real; sums of a few stay below 2^64 elsewhere."""
MAX_DIMENSIONS = 64

_NUMBERS = {
    "f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I",
    "u8": "Q", "b1": "?",
}  # fmt: skip
"""numpy's names of number types -> those of the module struct."""

_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


def call(name: Name, args: tuple[Any, ...]) -> Any:
    """What a call of this name with these arguments describes.

    Raises:
        Refused: a call that real files do not make; code ``call``.
    """
    if not name.known:
        return Foreign(name.dotted, list(args))
    maker = _MAKERS.get(name.dotted)
    if maker is None:
        refuse("call", f"calls {name.dotted} with {len(args)} arguments; files from torch.save do not")
    try:
        return maker(*args)
    except TypeError:  # of the call itself: too few or too many
        refuse("call", f"calls {name.dotted} with {len(args)} arguments; that is not how torch.save does")


def storage(said: object) -> Storage | Name:
    """A persistent id: ``("storage", type, key, device, elements)``, in old files with a sixth, None."""
    if isinstance(said, tuple) and len(said) == 4 and said[0] == "module" and isinstance(said[1], Name):
        return said[1]  # the class of a pickled network and its source code, which is not read
    if not isinstance(said, tuple) or len(said) not in (5, 6) or said[0] != "storage":
        refuse("storage", f"has a persistent id that is no storage: {shown(said)}")
    kind, key, device, count = said[1:5]
    known = isinstance(kind, Name) and kind.known and kind.dotted.rpartition(".")[2] in STORAGES
    if not known or not isinstance(key, str) or not isinstance(device, str) or not _is_size(count):
        refuse("storage", f"describes the storage {shown(key)} in a way that torch.save does not")
    if len(said) == 6 and said[5] is not None:
        refuse("storage", f"storage {shown(key)} is a view of another, as before PyTorch 0.4; save it again")
    if not key.isascii() or not 0 < len(key) <= 64 or not key.replace("_", "").isalnum():
        refuse("storage", f"storage {shown(key)} has a name that torch.save does not give")
    return Storage(key, STORAGES[kind.dotted.rpartition(".")[2]], count)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_SIZE  # type(), as True is an int as well


def _sizes(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS or not all(map(_is_size, value)):
        numbers = "negative or huge numbers" if isinstance(value, tuple) else shown(value)
        refuse("tensor", f"a tensor has {numbers} as its {what}")
    return value


def _tensor(source: object, offset: object, size: object, stride: object, kind: str = "") -> View:
    if not isinstance(source, Storage):
        refuse("tensor", f"a tensor lies in {shown(source)}, not in a storage")
    kind = kind or source.kind
    if not kind:
        refuse("tensor", f"a tensor in the untyped storage {shown(source.key)} says no type")
    if not _is_size(offset):
        refuse("tensor", f"a tensor has the offset {shown(offset)}")
    sizes, strides = _sizes(size, "size"), _sizes(stride, "strides")
    if len(sizes) != len(strides):
        refuse("tensor", f"a tensor has {len(sizes)} sizes, but {len(strides)} strides")
    if (elements := prod(sizes)) > source.count:
        many = f"{elements} elements in a storage of {source.count}"
        refuse("tensor", f"a tensor has {many}: it is expanded, save it with .clone()")
    assert isinstance(offset, int)
    return View(source, kind, offset, sizes, strides)


def _plain(grad: object, hooks: object, marks: object = None) -> None:
    """Refuse what would make a tensor other than its numbers say: hooks, a conjugate or negative bit."""
    if not isinstance(grad, bool) or not (hooks is None or (isinstance(hooks, Table) and not hooks.flat)):
        refuse("tensor", "a tensor has hooks, which are code")
    if marks is not None and not (isinstance(marks, Table) and not marks.flat):
        refuse(
            "tensor", "a tensor is marked as conjugate or negative; save it resolved (tensor.resolve_conj())"
        )


def _v2(source: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, marks: Any = None) -> View:
    _plain(grad, hooks, marks)
    return _tensor(source, offset, size, stride)


def _v3(
    source: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, marks: Any = None
) -> View:
    _plain(grad, hooks, marks)
    kind = _dtype(dtype)
    if isinstance(source, Storage) and source.kind:
        refuse("tensor", f"a tensor of {kind} lies in a storage of {source.kind}")
    return _tensor(source, offset, size, stride, kind)


def _dtype(dtype: object) -> str:
    name = dtype.dotted.removeprefix("torch.") if isinstance(dtype, Name) else ""
    if name not in DTYPES:
        refuse("tensor", f"a tensor has the type {shown(dtype)}")
    return DTYPES[name]


def _parameter(data: Any, grad: Any, hooks: Any, state: Any = None) -> View | Foreign:
    _plain(grad, hooks)
    if not isinstance(data, View | Foreign):
        refuse("tensor", f"a parameter holds {shown(data)}, no tensor")
    return data


def _from_cpu(data: Any, dtype: Any, device: Any, grad: Any) -> View:
    if not isinstance(data, View) or _dtype(dtype) != data.kind:
        refuse("tensor", "a tensor of another device is kept in another type")
    return data


def _of_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes, which are left out; one of another class is foreign."""
    if not isinstance(function, Name) or not isinstance(kind, Name) or not isinstance(args, tuple):
        refuse("call", "rebuilds a tensor in a way that torch.save does not")
    if not kind.known:
        return Foreign(kind.dotted, [function, *args, state])
    if not function.dotted.startswith("torch._utils._rebuild_") or kind.dotted not in _TENSOR_CLASSES:
        refuse("call", f"rebuilds a tensor as {kind.dotted} by {function.dotted}")
    return call(function, args)


def _dict(pairs: Any = ()) -> Table:
    """A dict from nothing, another dict, or a list of pairs, as Python 2 wrote ordered ones."""
    if isinstance(pairs, Table):
        return Table(list(pairs.flat))
    table = Table()
    for pair in pairs if isinstance(pairs, list | tuple) else (None,):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            refuse("call", f"makes a dict of {shown(pair)}")
        table.flat += pair
    return table


def _default(factory: Any = None, pairs: Any = ()) -> Table:
    if not (factory is None or isinstance(factory, Name)):
        refuse("call", f"makes a dict with the default {shown(factory)}")
    return _dict(pairs)


def _list(items: Any = ()) -> list[Any]:
    if not isinstance(items, list | tuple):
        refuse("call", f"makes a list or set of {shown(items)}")
    return list(items)


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or len(kind) > 40 or not (index is None or _is_size(index)):
        refuse("call", f"names the device {shown(kind)}")
    return kind if index is None else f"{kind}:{index}"


def _text(text: Any) -> str:
    if not isinstance(text, str):
        refuse("call", f"makes a text of {shown(text)}")
    return text


def _encode(text: Any, codec: Any) -> bytes:
    """Bytes, as protocol 2 writes them; other codecs than this one do more than encode."""
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        refuse("call", f"encodes a text as {shown(codec)}")
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        refuse("call", "encodes a text as latin1 that has other letters")


def _number_type(code: Any, align: Any = False, copy: Any = True) -> NumberType:
    if not isinstance(code, str):
        refuse("call", f"names the numpy type {shown(code)}")
    return NumberType(code)


def _number(kind: Any, data: Any = None) -> Any:
    """A numpy scalar as a Python number; what is no plain number (a text, a date) stays foreign."""
    if not isinstance(kind, NumberType) or not isinstance(data, bytes):
        return Foreign("numpy.generic", [data])
    code = _NUMBERS.get(kind.code)
    if code is None or struct.calcsize(code) != len(data):
        return Foreign("numpy.generic", [])
    return struct.unpack((">" if kind.order == ">" else "<") + code, data)[0]


_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _default,
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.set": _list,
    "builtins.frozenset": _list,
    "builtins.tuple": lambda items=(): tuple(_list(items)),
    "torch.Size": lambda items=(): tuple(_list(items)),
    "torch.device": _device,
    "torch.torch_version.TorchVersion": _text,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _v2,
    "torch._utils._rebuild_tensor_v3": _v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_cpu,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.nn.modules.container.ParameterDict": Parameters,
    "numpy.dtype": _number_type,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "_codecs.encode": _encode,
}
