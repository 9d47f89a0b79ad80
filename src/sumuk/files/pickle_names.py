"""Which names a pickle may speak of: few mean something, few are passed over, all others refuse the file.

A name is never imported, so none can do harm here. A file that asks for ``os.system`` is hostile all the same and must
be refused aloud, not read around. Three answers:

known
    has a description in :mod:`~sumuk.files.pickle_calls`: tensors, storages, dtypes, dicts, numbers.
foreign
    looks like a data class of some trainer (``pytorch_lightning.callbacks.ModelCheckpoint``); what it holds is left
    out and its name is told to the user. In the standard library and in torch only listed ones are: everything that
    was ever used as a gadget lives there or is a function, and functions are not foreign.
refused
    the rest.
"""

from __future__ import annotations

import re
import sys

from sumuk.files.pickle_nodes import Name, refuse, shown

STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "",
}  # fmt: skip
"""``torch.X`` -> element type; "" has none of its own."""
DTYPES = {
    "float32": "F32", "float": "F32", "float16": "F16", "half": "F16", "bfloat16": "BF16", "float64": "F64",
    "double": "F64", "int64": "I64", "long": "I64", "int32": "I32", "int": "I32", "int16": "I16", "short": "I16",
    "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "cfloat": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""``torch.x`` -> element type."""

_KNOWN = {
    "collections.OrderedDict", "collections.Counter", "collections.defaultdict",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor", "torch._tensor._rebuild_from_type_v2",
    "torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer",
    "torch.nn.modules.container.ParameterDict", "torch.storage.UntypedStorage", "torch.torch_version.TorchVersion",
    "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "_codecs.encode",
    "builtins.dict", "builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset", "builtins.int",
    "builtins.float", "builtins.bool", "builtins.str",
    *(f"torch.{name}" for name in (*STORAGES, *DTYPES)),
}  # fmt: skip

_FOREIGN = {
    "argparse.Namespace", "types.SimpleNamespace", "collections.deque", "fractions.Fraction", "decimal.Decimal",
    "uuid.UUID", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path", "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "datetime.datetime",
    "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone", "random.Random",
    "builtins.complex", "builtins.slice", "builtins.range", "builtins.bytes", "builtins.object", "builtins.Ellipsis",
    "typing.Any",
    "numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    *(f"numpy.{name}{bits}" for name in ("int", "uint") for bits in (8, 16, 32, 64)),
    "numpy.float16", "numpy.float32", "numpy.float64", "numpy.bool_", "numpy.str_",
    *(f"numpy.random._pickle.__{part}_ctor" for part in ("randomstate", "generator", "bit_generator")),
    "numpy.random._mt19937.MT19937", "numpy.random._pcg64.PCG64",
    "deepspeed.utils.tensor_fragment.fragment_address",
}  # fmt: skip

_TENSORS_REFUSED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch.serialization._get_layout": "a sparse tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without numbers (of the meta device)",
    "torch._utils._rebuild_qtensor": "a quantised tensor of PyTorch",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of another class",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_xla_tensor": "a tensor of another device",
}

_FOREIGN_TORCH = (
    "torch.nn.",
    "torch.optim.",
    "torch.utils.data.",
    "torch.distributed.",
    "torch.cuda.amp.",
    "torch.amp.",
)
"""Packages of torch whose classes trainers and whole pickled networks hold."""
_TOOLS = {
    "torch", "numpy", "scipy", "pandas", "sympy", "numba", "cffi", "pip", "setuptools", "pkg_resources", "wheel",
    "_distutils_hack", "IPython", "ipykernel", "dill", "cloudpickle", "joblib", "pexpect", "paramiko", "fabric",
    "invoke", "psutil", "requests", "tensorflow", "keras", "jax", "test", "distutils",
}  # fmt: skip
"""Packages outside the standard library that lend themselves to running code; only the lists above come from them."""
_OLD = {
    "__builtin__", "__builtins__", "posix", "nt", "os2", "ce", "commands", "popen2", "copy_reg", "cPickle", "StringIO",
    "cStringIO", "urllib2", "httplib", "imp", "asyncore", "asynchat", "smtpd", "pipes", "telnetlib", "nntplib", "cgi",
    "cgitb", "crypt", "spwd", "imghdr", "lib2to3", "binhex", "formatter", "parser", "symbol", "xdrlib", "msilib",
    "ossaudiodev", "sunau", "uu", "mailcap", "chunk", "aifc", "audioop", "sndhdr", "nis", "_bootlocale",
    "dummy_threading", "macpath", "new", "user", "exceptions", "thread", "_winreg", "winreg", "msvcrt",
    "_posixsubprocess", "_winapi",
}  # fmt: skip
"""Modules of other systems' and other years' standard libraries."""

_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "UserDict": "collections",
    "exceptions": "builtins",
}
"""What protocol 2 writes for today's modules."""
_WORDS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_CLASS = re.compile(r"_*[A-Z]\w*(\.[A-Z]\w*)*", re.ASCII)


def judge(module: str, name: str) -> Name:
    """What a name means.

    Raises:
        Refused: it means code, or a kind of tensor that is not read; code ``name``.
    """
    dotted = f"{_RENAMED.get(module, module)}.{name}"
    if dotted in _KNOWN:
        return Name(dotted, True)
    if dotted in _FOREIGN:
        return Name(dotted, False)
    if dotted in _TENSORS_REFUSED:
        refuse(
            "name",
            f"holds {_TENSORS_REFUSED[dotted]} ({dotted}), which is not read; save it as a plain tensor",
        )
    if len(dotted) > 300 or not _WORDS.fullmatch(module) or not _WORDS.fullmatch(name):
        refuse("name", f"names the class {shown(dotted)}, which no Python file can define")
    if module == "torch" and re.fullmatch(r"(\w+Storage|\w*(int|float|bits|complex)\w*)", name):
        refuse("name", f"holds numbers of the type {dotted}, which no safetensors file can hold")
    top = module.partition(".")[0]
    ours = top not in sys.stdlib_module_names and top not in _OLD and top not in _TOOLS
    if _CLASS.fullmatch(name) and (ours or f"{module}.".startswith(_FOREIGN_TORCH)):
        return Name(dotted, False)
    refuse("name", f"asks for {shown(dotted)}, which is no data; opened with torch.load it could run code")
