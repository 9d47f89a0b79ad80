"""What a run must remember to go on as if it had never stopped, and how it is kept on disk.

A save is a folder ``state-0000120000`` (images seen) with the weights, their average, the optimizer's moments
and a manifest with the SHA-256 of each file, written last. It is built beside its final name, synced, and
renamed, so a save exists whole or not at all. No random state is kept: all randomness follows from (seed,
images seen).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sumuk.base.errors import BadFile
from sumuk.train.ema import Ema

KEPT = 2
"""How many saves stay: the newest, and the one before it in case that one is damaged."""

FILES = ("ema.safetensors", "optimizer.safetensors", "weights.safetensors")


@dataclass
class TrainState:
    """The changing part of a run."""

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    ema: Ema
    images: int = 0
    seconds: float = 0.0

    def save(self, out: Path, fingerprint: str) -> Path:
        """Write a complete save below ``out``; once it stands, older ones than the last two are removed.

        A whole save of this run after as many images is this state already and stays untouched, so that no
        moment passes without one.

        Raises:
            BadFile: it cannot be written (full disk); the saves before it are as they were.
        """
        target = out / _name(self.images)
        if not _stands(target, fingerprint):
            self._replace(target, fingerprint)
        # A later save than this one was damaged and passed over: it counts for nothing here.
        for old in [each for each in saves(out) if each.name <= target.name][:-KEPT]:
            shutil.rmtree(old)
        for abandoned in out.glob(".building-state-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        return target

    def _replace(self, target: Path, fingerprint: str) -> None:
        """Build a save beside ``target`` and give it that name."""
        out = target.parent
        building = out / f".building-{target.name}-{os.getpid()}"
        try:
            self._write(building, fingerprint)
            shutil.rmtree(target, ignore_errors=True)  # only a damaged one can be there
            building.rename(target)
            _sync(out)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(building, ignore_errors=True)
            raise BadFile(f"cannot save the run to {target}: {error}", "train.write") from error

    def _write(self, building: Path, fingerprint: str) -> None:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        weights = {
            f"{part}.{name}": tensor.detach().contiguous()
            for part, module in self.modules.items()
            for name, tensor in module.state_dict().items()
        }
        save_file(weights, building / "weights.safetensors")
        save_file(self.ema.weights, building / "ema.safetensors")
        save_file(self._moments(), building / "optimizer.safetensors")
        files = {path.name: _sha256(path) for path in sorted(building.iterdir())}
        manifest = {
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "config": fingerprint,
            "files": files,
        }
        (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*building.iterdir(), building]:
            _sync(path)

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{index}.{key}": value.detach().contiguous().clone()
            for index, values in self.optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }

    def load(self, folder: Path, fingerprint: str) -> None:
        """Go on from a save.

        Raises:
            BadFile: a file of it is missing or damaged, or it belongs to another configuration.
        """
        manifest = _manifest(folder)
        if manifest["config"] != fingerprint:
            raise BadFile(
                f"{folder} belongs to a run with another configuration; name another 'out' or remove it",
                "train.config",
            )
        weights = load_file(folder / "weights.safetensors")
        for part, module in self.modules.items():
            own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
            module.load_state_dict(own)
        for name, average in load_file(folder / "ema.safetensors").items():
            self.ema.weights[name].copy_(average)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / "optimizer.safetensors").items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.images, self.seconds = manifest["images"], manifest["seconds"]


def saves(out: Path) -> list[Path]:
    """Complete saves below ``out``, oldest first."""
    return sorted(path for path in out.glob("state-*") if (path / "manifest.json").is_file())


def resume(state: TrainState, out: Path, fingerprint: str) -> list[str]:
    """Load the newest save that is whole into ``state``.

    Returns:
        One sentence for each damaged save that was passed over, so that the caller can say so.

    Raises:
        BadFile: the newest whole save belongs to another configuration; or there are saves and none is whole.
    """
    damage: list[BadFile] = []
    for folder in reversed(saves(out)):
        try:
            state.load(folder, fingerprint)
            return [f"{error}; going back to {folder.name}" for error in damage]
        except BadFile as error:
            if error.code != "train.damaged":
                raise
            damage.append(error)
    if damage:
        raise BadFile(
            f"no save below {out} is whole: {damage[0]}; remove its state-* folders to begin anew",
            "train.damaged",
        )
    return []


def _name(images: int) -> str:
    return f"state-{images:010d}"


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a save, after each of its files proved whole; else BadFile ``train.damaged``."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        whole = manifest["images"] == int(folder.name.removeprefix("state-"))
        whole = whole and manifest.keys() >= {"seconds", "config"} and sorted(manifest["files"]) == [*FILES]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise BadFile(f"{path} is missing or damaged", "train.damaged")
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise BadFile(f"{folder / name} is missing or damaged", "train.damaged")
    return manifest


def _stands(folder: Path, fingerprint: str) -> bool:
    """Whether a whole save of this run is there."""
    try:
        return bool(_manifest(folder)["config"] == fingerprint)
    except BadFile:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
