"""Pruning: a training checkpoint becomes its weights, and says what it was before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moments import alike, body_digest, killed, moments, tensors
from tiny import equal, tiny

import sumuk
from sumuk.base.errors import BadFile, BadInput, Cancelled
from sumuk.families.sd import SCHEDULE_BUFFERS
from sumuk.files.hashes import hashes
from sumuk.files.safetensors import read_header
from sumuk.files.shards import write_shards
from sumuk.files.tensors import lazy, write
from sumuk.weights import prune as module
from sumuk.weights.prune import Pruned, prune
from sumuk.weights.source import Source, read

HEAD = "model.diffusion_model."


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prune") / "weights.safetensors"
    sumuk.save(tiny(), path, metadata={"author": "someone"})
    return path


@pytest.fixture(scope="module")
def trained(weights: Path) -> Path:
    """As training code leaves it, with averages that are the plain weights and one more."""
    path = weights.parent / "trained.safetensors"
    write(path, tensors(weights) | extras(weights), read_header(weights).metadata | {"sshs_model_hash": "ab"})
    return path


def averages(weights: Path) -> dict[str, torch.Tensor]:
    plain = {name: one for name, one in tensors(weights).items() if name.startswith(HEAD)}
    return {"model_ema." + name[6:].replace(".", ""): one + 1 for name, one in plain.items()}


def extras(weights: Path) -> dict[str, torch.Tensor]:
    return {
        **averages(weights),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        **{name: torch.rand(1000) for name in SCHEDULE_BUFFERS},
        "first_stage_model.loss.logvar": torch.zeros(()),
        "optimizer_states.0.exp_avg": torch.zeros(9),
    }


def without(path: Path, target: Path, *names: str, **more: torch.Tensor) -> Path:
    kept = {name: one for name, one in tensors(path).items() if name not in names}
    write(target, kept | more, read_header(path).metadata)
    return target


def test_plain_weights(weights: Path, trained: Path, tmp_path: Path) -> None:
    done = prune(trained, tmp_path / "a.safetensors", weights="plain")
    assert alike(tensors(done.path), tensors(weights)) and done.weights == "plain"
    assert {left.reason: (len(left.names), left.size) for left in done.left} == {
        module.AVERAGED: (len(averages(weights)) + 2, sum(v.nbytes for v in averages(weights).values()) + 8),
        module.TABLES: (13, 52_000),
        module.LOSS: (1, 4),
        module.OPTIMIZER: (1, 36),
    }
    assert done.before - done.after >= sum(left.size for left in done.left)
    texts = read_header(done.path).metadata
    assert texts.pop("modelspec.hash_sha256") == "0x" + body_digest(done.path)
    assert texts == read_header(weights).metadata  # and no digest of what it was
    assert done.target == hashes(done.path) and done.source == {str(trained): hashes(trained)}
    assert equal(sumuk.load(done.path), tiny())


def test_averaged_weights_take_the_plain_names(weights: Path, trained: Path, tmp_path: Path) -> None:
    done = prune(trained, tmp_path / "a.safetensors", weights="ema")
    was, now = tensors(weights), tensors(done.path)
    assert now.keys() == was.keys() and done.weights == "ema"
    assert all(torch.equal(now[name], one + 1 if name.startswith(HEAD) else one) for name, one in was.items())
    assert module.PLAIN in {left.reason for left in done.left}


def test_which_weights_is_asked(trained: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(BadInput, match="say weights='plain', which other tools keep, or 'ema'"):
        prune(trained, out)
    with pytest.raises(BadInput, match="'averaged' is not one of auto, ema, plain"):
        prune(trained, out, weights="averaged")
    with pytest.raises(BadInput, match="no averaged weights"):
        prune(weights, out, weights="ema")
    only = without(
        trained, tmp_path / "only.safetensors", *(n for n in tensors(trained) if n.startswith("model_ema."))
    )
    assert prune(only, out).weights == "plain"


def test_half_an_average_is_refused_by_name(trained: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "half.safetensors", tmp_path / "out.safetensors"
    without(trained, path, "model_ema.diffusion_modelout0bias")
    with pytest.raises(BadFile, match=rf"1 weights have no average: '{HEAD}out.0.bias'"):
        prune(path, out, weights="ema")
    without(trained, path, f"{HEAD}out.0.bias")
    with pytest.raises(BadFile, match=r"no plain one: 'model_ema.diffusion_modelout0bias'"):
        prune(path, out, weights="ema")
    without(trained, path, **{"model_ema.diffusion_modelout0bias": torch.zeros(3)})
    with pytest.raises(BadFile, match=r"shape \[3\], not \[32\]"):
        prune(path, out, weights="ema")
    without(trained, path, **{f"{HEAD}out0.bias": torch.zeros(32)})
    with pytest.raises(BadFile, match=r"'model_ema.diffusion_modelout0bias' may be"):
        prune(path, out, weights="ema")
    assert not out.exists()


def test_an_autoencoder_trained_by_itself(tmp_path: Path) -> None:
    """Its averages leave out no ``model.``."""
    plain = {f"vae.{n}"[4:]: v for n, v in tiny().vae.state_dict().items()}
    ema = {"model_ema." + name.replace(".", ""): one * 2 for name, one in plain.items()}
    more = {"loss.perceptual.net.weight": torch.ones(5), "model_ema.decay": torch.tensor(0.9)}
    write(tmp_path / "a.safetensors", plain | ema | more)
    done = prune(tmp_path / "a.safetensors", tmp_path / "b.safetensors", weights="ema")
    assert alike(tensors(done.path), {name: one * 2 for name, one in plain.items()})


def test_what_to_keep_and_what_else_to_drop(trained: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    done = prune(
        trained,
        out,
        weights="plain",
        keep=["alphas_cumprod", "model_ema.*"],
        drop=["first_stage_model.encoder.*"],
    )
    names = set(tensors(out))
    assert "alphas_cumprod" in names and "betas" not in names and "model_ema.decay" in names
    assert not any(name.startswith("first_stage_model.encoder.") for name in names)
    asked = next(left for left in done.left if left.reason == module.ASKED)
    assert set(asked.names) == {n for n in tensors(weights) if n.startswith("first_stage_model.encoder.")}
    for settings, message in (
        ({"keep": ["model.*"]}, "keep 'model.*' fits no tensor .* left away"),
        ({"drop": ["betas"]}, "drop 'betas' fits no tensor .* kept"),
        ({"drop": ["*"]}, "nothing would be left"),
    ):
        with pytest.raises(BadInput, match=message.replace("*'", r"\*'")):
            prune(trained, tmp_path / "b.safetensors", weights="plain", **settings)  # type: ignore[arg-type]


def test_nothing_to_prune(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(BadInput, match="nothing to prune in it: it holds weights alone"):
        prune(weights, out)
    with pytest.raises(BadInput, match="all of it is in fp32 already"):
        prune(weights, out, dtype="fp32")
    done = prune(weights, out, dtype="fp16")
    assert done.cast == {"F32 -> F16": done.kept} and not done.left
    with pytest.raises(BadInput, match="does not end in"):
        prune(weights, tmp_path / "a.ckpt", dtype="fp16")


def test_what_pickles_hold_beside(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reader puts beside the weights: it is counted and named."""

    def reads(path: Path) -> Source:
        source = read(path)
        beside = {f"optimizer_states.0.state.{i}.exp_avg": lazy(torch.zeros(10)) for i in range(3)}
        return Source(
            path, source.tensors, {}, source.files, beside=beside, values={"epoch": 3, "global_step": 9}
        )

    monkeypatch.setattr(module, "read", reads)
    done = prune(weights, tmp_path / "a.safetensors")
    assert [(left.reason, len(left.names), left.size) for left in done.left] == [(module.OPTIMIZER, 3, 120)]
    assert "'epoch', 'global_step'" in done.notes[-1]


def test_sets_and_folders(trained: Path, weights: Path, tmp_path: Path) -> None:
    own = {name: lazy(one) for name, one in tensors(trained).items()}
    write_shards(tmp_path / "m.safetensors", own, {}, 2 << 20)
    index = tmp_path / "m.safetensors.index.json"
    done = prune(index, tmp_path / "a.safetensors", weights="plain")
    assert alike(tensors(done.path), tensors(weights))
    first = next(tmp_path.glob("m-00001*"))
    with pytest.raises(BadInput, match="files that are read"):
        prune(index, first, weights="plain")
    sumuk.save(tiny(), tmp_path / "f", layout="diffusers")
    with pytest.raises(BadInput, match="several networks"):
        prune(tmp_path / "f", tmp_path / "b.safetensors")


def test_in_its_own_place_killed_and_cancelled(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    new = {f"w.{i}": torch.full((100,), float(i)) for i in range(3)}
    old = new | {"betas": torch.zeros(1000), "loss.x": torch.zeros(3)}

    def work(progress: Callable[[int, int], None]) -> Pruned:
        return prune(path, path, progress=progress)

    write(path, old)
    count, news = moments(work), 0
    assert alike(tensors(path), new)
    for moment in range(count):
        write(path, old)
        assert killed(work, moment)
        now = tensors(path)
        assert alike(now, old) or alike(now, new)
        news += alike(now, new)
    assert 0 < news < count
    write(path, old)

    def stop(done: int, total: int) -> None:
        if done == total:
            return
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        work(stop)
    assert alike(tensors(path), old)
