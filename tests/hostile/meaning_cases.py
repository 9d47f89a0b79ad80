"""Folders, places and moments that are hostile: numbers 70 to 72 of the list.

What remains possible, and no reader that maps files can prevent: a file that is cut short *while* its mapped pages are
being read kills the process (SIGBUS), as those pages are gone. What a file system offers against it is that writers
replace files instead of shortening them, as everything here does. Between two tensors it is noticed, and
``sumuk.weights.checking`` and the file workshop read tensors into memory of their own, to which it cannot happen.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.hostile import gguf_cases, pickle_files
from tests.hostile.guest_cases import NAN, PAIR, Scene, write, zeros
from tests.hostile.safetensors_cases import MISSING

from sumuk.files import tensors as weight_files
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import from_header

# -- 70: configurations of a diffusers folder --------------------------------------------------------------------------


@cache
def model_folder() -> Path:
    """The tiny Stable Diffusion 1 of the zoo, as diffusers writes it."""
    from examples import zoo

    place = Path(tempfile.mkdtemp(prefix="hostile-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = zoo.write("sd1/text-to-image", place)[1]
    for path in folder.rglob(
        "*.safetensors"
    ):  # as another program writes it, so that its configurations are asked
        tensors = from_header(read_header(path))
        weight_files.write(path, tensors)
    return folder


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copyfile(source, target)


EVIL = b"import os\nos.system('touch hacked')\nclass Evil: pass\n"
Change = dict[str, Any] | bytes | Callable[[Path], None]
"""Fields that are set, another content, or what is done in the place of the file."""


def _sparse(path: Path) -> None:
    path.write_bytes(b"{")
    os.truncate(path, 2**30)


UNET, VAE, NOISE, TOKENS = (
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)
CONFIGS: tuple[tuple[str, str | None, str, Change], ...] = (
    ("_class_name os.system", None, "model_index.json", {"_class_name": "os.system"}),
    ("a part of module os", None, "model_index.json", {"unet": ["os", "system"]}),
    ("a part that is a path", None, "model_index.json", {"unet": ["../../evil", "Evil"]}),
    ("a list for a class", None, UNET, {"_class_name": ["__import__", "os"]}),
    ("another class", None, UNET, {"_class_name": "builtins.eval"}),
    ("auto_map", None, UNET, {"auto_map": {"AutoModel": "evil.py--Evil"}, "trust_remote_code": True}),
    ("custom_pipeline", None, "model_index.json", {"custom_pipeline": "evil.py", "_class_name": "Evil"}),
    ("2^31 channels", None, UNET, {"in_channels": 2**31, "out_channels": 2**31}),
    ("blocks of 2^31 channels", None, UNET, {"block_out_channels": [2**31] * 4, "layers_per_block": 2**31}),
    ("2^31 heads", "model.config", UNET, {"attention_head_dim": 2**31, "cross_attention_dim": 2**31}),
    ("2^31 words", None, "text_encoder/config.json", {"vocab_size": 2**31, "hidden_size": 2**31}),
    ("an activation os.system", None, "text_encoder/config.json", {"hidden_act": "os.system"}),
    ("a size of 2^31", "meta.", UNET, {"sample_size": 2**31}),
    ("a size of 10^400", "meta.", UNET, {"sample_size": 10**400}),
    ("a negative size", "meta.", UNET, {"sample_size": -64}),
    ("a size of 0", "meta.", UNET, {"sample_size": 0}),
    ("a size that is true", None, UNET, {"sample_size": True}),
    ("a latent scale of NaN", "meta.number", VAE, {"scaling_factor": NAN}),
    ("a latent scale of 10^400", "meta.number", VAE, {"scaling_factor": 10**400}),
    ("a latent scale of 0", "meta.number", VAE, {"scaling_factor": 0}),
    ("a latent scale that is a list", "meta.number", VAE, {"scaling_factor": [1]}),
    ("a latent scale of 1e999 as a text", "meta.number", VAE, {"scaling_factor": "1e999"}),
    ("2^31 steps", "meta.schedule", NOISE, {"num_train_timesteps": 2**31}),
    ("betas that are none", "meta.schedule", NOISE, {"beta_schedule": {"a": 1}}),
    ("a prediction os.system", "meta.prediction", NOISE, {"prediction_type": "os.system"}),
    ("a prediction that is a table", "meta.prediction", NOISE, {"prediction_type": {}}),
    ("noise that ends at 10^400", "meta.schedule", NOISE,
     {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 10**400}),
    ("a padding that is a list", "model.vocabulary", TOKENS, {"pad_token": ["x"]}),
    ("a padding that nobody knows", "model.vocabulary", TOKENS, {"pad_token": "os.system"}),
    ("words with the numbers of others", "tokens.", "tokenizer/vocab.json", b'{"a": -1, "b": 1e9}'),
    ("words that are a list", "", "tokenizer/vocab.json", b"[]"),
    ("words 100,000 deep", "model.vocabulary", "tokenizer/vocab.json", b'{"a":' + b"[" * 100_000),
    ("words of a gigabyte", "json.size", "tokenizer/vocab.json", _sparse),
    ("merges that are none", "model.vocabulary", "tokenizer/merges.txt", b"#version: 0.2\na b c d\n\xff\n"),
    ("100,000 deep", "json.parse", UNET, b'{"a":' + b"[" * 100_000),
    ("no JSON", "json.parse", VAE, b"{'a': 1}"),
    ("not UTF-8", "json.parse", VAE, b'{"a": "\xff"}'),
    ("a list", "json.kind", NOISE, b"[]"),
    ("a number of 5,000 digits", "json.parse", UNET, b'{"sample_size": ' + b"9" * 5000 + b"}"),
    ("a gigabyte", "json.size", UNET, _sparse),
    ("a pipe", "file.kind", UNET, lambda path: os.mkfifo(path)),
    ("a folder", "file.kind", UNET, lambda path: path.mkdir()),
    ("a device", "file.kind", UNET, lambda path: path.symlink_to("/dev/zero")),
)  # fmt: skip
"""Name, code (None: it is read, and nothing of it obeyed), file, and how it is changed."""

TOLD: tuple[tuple[str, str | None, dict[str, str]], ...] = (
    ("a prediction os.system", "meta.prediction", {"modelspec.prediction_type": "os.system"}),
    ("an empty prediction", "meta.prediction", {"modelspec.prediction_type": ""}),
    ("a prediction of 1 MB", "meta.prediction", {"modelspec.prediction_type": "x" * 10**6}),
    ("a resolution of 10^9", "meta.resolution", {"modelspec.resolution": "1000000000x1000000000"}),
    ("a resolution of 0", "meta.resolution", {"modelspec.resolution": "0x0"}),
    ("a resolution in other digits", "meta.resolution", {"modelspec.resolution": "٥١٢x٥١٢"}),
    ("a latent scale of NaN", "meta.number", {"sumuk.latent_scale": "nan"}),
    ("a latent scale of words", "meta.number", {"sumuk.latent_scale": "__import__('os')"}),
    ("an empty noise", "meta.schedule", {"sumuk.schedule": ""}),
    ("noise without ends", "meta.schedule", {"sumuk.schedule": "ve"}),
    ("noise that ends at infinity", "meta.schedule", {"sumuk.schedule": "ve 0.01 1e999"}),
    ("noise turned round", "meta.schedule", {"sumuk.schedule": "vp 20 0.1"}),
    ("words that are no JSON", "tokens.json", {"sumuk.tokenizer": "{"}),
    ("words 50,000 deep", "model.vocabulary", {"sumuk.tokenizer": '{"a":' * 50_000}),
    ("words of nothing", "tokens.json", {"sumuk.tokenizer": "{}"}),
    ("words with a padding of 2^62", "",
     {"sumuk.tokenizer": '{"length":2,"merges":[],"pad":4611686018427387904,"vocabulary":{}}'}),
    ("a vocabulary where OpenAI's is asked", "model.vocabulary", {}),
)  # fmt: skip
"""Name, code, and what the header of a single file says in addition; nothing: not even what it should."""

# -- 71: what is no file -----------------------------------------------------------------------------------------------


def _pipe(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def _link(name: str, target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def _folder(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


def _socket(folder: Path) -> Path:
    inside = os.open(folder, os.O_RDONLY)  # a socket's own path may have 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{inside}/s.safetensors")
    finally:
        os.close(inside)
    return folder / "s.safetensors"


def _beside(folder: Path, what: str) -> Path:
    """A model folder with something outside it, and a link to that inside."""
    (folder / "outside").mkdir()
    write(folder / "outside" / "secret.safetensors", PAIR)
    (folder / "models").mkdir()
    link = folder / "models" / ("secret.safetensors" if what == "file" else "secret")
    link.symlink_to(folder / "outside" / (link.name if what == "file" else ""))
    return folder / "models" / "secret.safetensors"


def _stuck(folder: Path) -> Path:
    (folder / "models").mkdir()
    os.mkfifo(folder / "models" / "stuck.safetensors")
    return folder / "models" / "stuck.safetensors"


def _up(folder: Path) -> Path:
    (folder / "models").mkdir()
    return folder / "models" / "../secret"


PLACES: tuple[tuple[str, str, Callable[[Path], Path], str], ...] = (
    ("a pipe", "file.kind", _pipe("pipe.safetensors"), "open"),
    ("a pipe called ckpt", "file.kind", _pipe("pipe.ckpt"), "open"),
    ("a pipe called GGUF", "file.kind", _pipe("pipe.gguf"), "open"),
    ("a pipe called index", "file.kind", _pipe("model.safetensors.index.json"), "open"),
    ("a device", "file.kind", _link("zero.safetensors", "/dev/zero"), "open"),
    ("a device called ckpt", "file.kind", _link("zero.ckpt", "/dev/zero"), "open"),
    ("a device called GGUF", "file.kind", _link("zero.gguf", "/dev/urandom"), "open"),
    ("a socket", "file.kind", _socket, "open"),
    ("a folder called safetensors", MISSING, _folder("x.safetensors"), "open"),
    ("a folder called ckpt", MISSING, _folder("x.ckpt"), "open"),
    ("an empty folder", MISSING, _folder("empty"), "open"),
    ("a pipe in a folder", "file.kind", lambda folder: _pipe("model.safetensors")(folder).parent, "open"),
    ("a device in a folder", "file.kind",
     lambda folder: _link("pytorch_model.bin", "/dev/zero")(folder).parent, "open"),
    ("a link to itself", MISSING, _link("loop.safetensors", "loop.safetensors"), "open"),
    ("a link to nothing", MISSING, _link("gone.ckpt", "nowhere"), "open"),
    ("a name with NUL", MISSING, lambda folder: folder / "a\0b.safetensors", "open"),
    ("a name of 300 letters", MISSING, lambda folder: folder / ("a" * 300 + ".safetensors"), "open"),
    ("a path of 5,000 folders", MISSING, lambda folder: folder.joinpath(*["a"] * 5000, "x.gguf"), "open"),
    ("a pipe as an embedding", "file.kind", _pipe("pipe.png"), "embedding"),
    ("a device as a LoRA", "file.kind", _link("zero.safetensors", "/dev/zero"), "lora"),
    ("a link out of the folder of models", MISSING, lambda folder: _beside(folder, "file"), "shelf"),
    ("a linked folder out of the folder of models", MISSING, lambda folder: _beside(folder, "folder"), "shelf"),
    ("a pipe in the folder of models", MISSING, _stuck, "shelf"),
    ("a name that leaves the folder of models", MISSING, _up, "shelf"),
)  # fmt: skip
"""Name, code, what makes it, reader."""

# -- 72: files that change ---------------------------------------------------------------------------------------------

PAGES = 2**16
"""Bytes of a tensor: so many that pages of the second one are gone when the file is cut within the first."""


def _pair_of(ending: str) -> Callable[[Path], Path]:
    """A good file of two tensors, ``a`` and ``b``."""

    def make(folder: Path) -> Path:
        path = folder / f"changing.{ending}"
        count = PAGES // 4
        if ending == "safetensors":
            return write(path, {"a": zeros(count), "b": zeros(count)})
        if ending == "ckpt":
            both = {
                name: pickle_files.tensor((count,), source=pickle_files.storage(key, count=count))
                for name, key in (("a", "0"), ("b", "1"))
            }
            path.write_bytes(pickle_files.file(both, {"0": bytes(PAGES), "1": bytes(PAGES)}))
        else:
            entries = [gguf_cases.tensor("a", [count]), gguf_cases.tensor("b", [count], at=PAGES)]
            path.write_bytes(gguf_cases.gguf([], entries, bytes(2 * PAGES)))
        return path

    return make


ATTACKS = ("replaced", "rewritten", "shrunk", "emptied", "grown", "removed")
KEPT = ("replaced", "removed")
"""Done to a file that is open, these leave its reader the whole old one."""


def _races() -> list[Scene]:
    found = []
    for ending in ("safetensors", "ckpt", "gguf"):
        changed = "gguf.changed" if ending == "gguf" else "file.changed"
        for attack in ATTACKS:
            early = f"{ending}.read" if attack == "removed" else changed
            late = "" if attack in KEPT else None
            first, second = (
                f"{ending}: {attack} after its header was read",
                f"{ending}: {attack} between two loads",
            )
            make = _pair_of(ending)
            found.append(Scene(72, first, early, make, reader=f"race {attack} early"))
            found.append(Scene(72, second, changed, make, late, reader=f"race {attack} late"))
        name = f"{ending}: shrunk while it is checked"
        changed = (
            "safetensors.read" if ending == "safetensors" else changed
        )  # there the missing bytes are noticed
        found.append(Scene(72, name, changed, _pair_of(ending), reader="race shrunk check"))
    return found


# -- all of them -------------------------------------------------------------------------------------------------------


def _config(name: str, code: str | None, place: str, change: Change) -> Scene:
    def make(folder: Path) -> Path:
        model = folder / "model"
        shutil.copytree(model_folder(), model, copy_function=_linked)
        (model / "evil.py").write_bytes(EVIL)
        path = model / place
        before = json.loads(path.read_bytes()) if isinstance(change, dict) else {}
        path.unlink()
        if isinstance(change, dict):
            path.write_text(json.dumps(before | change))
        elif isinstance(change, bytes):
            path.write_bytes(change)
        else:
            change(path)
        return model

    warns = "" if code is None else None
    return Scene(70, f"{place}: {name}", code or "", make, warns, reader="load")


def _told(name: str, code: str | None, metadata: dict[str, str]) -> Scene:
    def make(folder: Path) -> Path:
        whole = read_header(model_folder().with_suffix(".safetensors"))
        texts = {**whole.metadata, **metadata} if metadata else {}
        weight_files.write(folder / "hostile.safetensors", from_header(whole), texts)
        return folder / "hostile.safetensors"

    return Scene(70, f"metadata: {name}", code or "", make, "" if code is None else None, reader="load")


CASES: tuple[Scene, ...] = (
    *(_config(*one) for one in CONFIGS),
    *(_told(*one) for one in TOLD),
    *(Scene(71, f"place: {name}", code, make, reader=reader) for name, code, make, reader in PLACES),
    *_races(),
)
