"""Converting files: nothing is lost, nothing is guessed, and what is not whole is not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from examples import zoo
from moments import alike, body_digest, killed, moments, tensors
from tiny import equal, tiny

import sumuk
from sumuk.base.errors import BadFile, BadInput, Cancelled
from sumuk.diffusion.schedule import scaled_linear, zero_terminal_snr
from sumuk.files.hashes import hashes
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import lazy, write
from sumuk.weights.convert import Converted, convert

DIGEST = "modelspec.hash_sha256"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    sumuk.save(tiny(), path, metadata={"modelspec.title": "Tiny", "author": "someone"})
    return path


@pytest.fixture(scope="module")
def folder(single: Path) -> Path:
    convert(single, single.parent / "folder", layout="diffusers")
    return single.parent / "folder"


def with_more(path: Path, target: Path, **more: torch.Tensor) -> Path:
    write(
        target,
        {**{name: lazy(one) for name, one in tensors(path).items()}, **more},
        read_header(path).metadata,
    )
    return target


def test_there_and_back(single: Path, folder: Path, tmp_path: Path) -> None:
    """Every text, word and bit; the digest of the tensors is new."""
    back = convert(folder, tmp_path / "b.safetensors", layout="single")
    assert alike(tensors(back.path), tensors(single))
    texts = read_header(back.path).metadata
    assert texts.pop(DIGEST) == "0x" + body_digest(back.path)
    assert texts == read_header(single).metadata and texts["author"] == "someone"
    assert equal(sumuk.load(folder), tiny()) and equal(sumuk.load(back.path), tiny())


def test_the_folder_is_the_one_that_save_writes(single: Path, folder: Path, tmp_path: Path) -> None:
    sumuk.save(sumuk.load(single), tmp_path / "saved", layout="diffusers")
    saved = {
        str(p.relative_to(tmp_path / "saved")): p for p in (tmp_path / "saved").rglob("*") if p.is_file()
    }
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(saved)
    assert all((folder / name).read_bytes() == place.read_bytes() for name, place in saved.items())


def test_what_is_told(single: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = convert(
        single, tmp_path / "f", layout="diffusers", dtype="bf16", progress=lambda *each: told.append(each)
    )
    assert (done.kind, done.layouts) == ("sd1/text-to-image", ("single", "diffusers"))
    assert done.moved == done.renamed == len(tensors(single)) and done.cast == {"F32 -> BF16": done.moved}
    assert not done.left and not done.zeroed and done.worst is None
    assert [str(file.relative_to(done.path)) for file in done.files] == [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ]
    assert done.source == {str(single): hashes(single)}
    assert done.target == {str(file): hashes(file) for file in done.files}
    assert done.before == single.stat().st_size and done.after == sum(f.stat().st_size for f in done.files)
    assert told == sorted(told) and told[-1][0] == told[-1][1] > done.before


def test_the_same_names_keep_every_bit(single: Path, tmp_path: Path) -> None:
    """Also those of tensors that the family has no use for."""
    more = {"betas": torch.rand(1000), "model_ema.decay": torch.tensor(0.9)}
    source = with_more(single, tmp_path / "a.safetensors", **more)
    done = convert(source, tmp_path / "b.safetensors", metadata={"modelspec.title": "B"})
    assert alike(tensors(done.path), tensors(source)) and done.renamed == 0 and not done.left
    assert read_header(done.path).metadata["modelspec.title"] == "B"


def test_what_a_layout_leaves_away_is_told(single: Path, tmp_path: Path) -> None:
    clip = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    more = {
        "betas": torch.rand(1000),
        "model_ema.decay": torch.tensor(0.9),
        "first_stage_model.loss.logvar": torch.zeros(1),
        clip: torch.arange(16)[None],
    }
    source = with_more(single, tmp_path / "a.safetensors", **more)
    done = convert(source, tmp_path / "b.safetensors", layout="single")
    assert {name: left.size for left in done.left for name in left.names} == {
        "betas": 4000, "model_ema.decay": 4, "first_stage_model.loss.logvar": 4, clip: 128,
    }  # fmt: skip
    assert len({left.reason for left in done.left}) == 4
    assert alike(tensors(done.path), tensors(single))


def test_the_same_bytes_each_time(single: Path, tmp_path: Path) -> None:
    for name in "ab":
        convert(single, tmp_path / f"{name}.safetensors", dtype="float16")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_types(single: Path, tmp_path: Path) -> None:
    source = with_more(
        single, tmp_path / "a.safetensors", betas=torch.rand(1000), tiny=torch.full((3,), 1e-9)
    )
    done = convert(source, tmp_path / "half.safetensors", dtype="fp16")
    was, now = tensors(source), tensors(done.path)
    assert all(torch.equal(now[name], was[name].half()) for name in was if name != "betas")
    assert torch.equal(now["betas"], was["betas"])  # a table of noise stays exact
    lost = sum(int(((one != 0) & (one.abs() < 2.9e-8)).sum()) for name, one in was.items() if name != "tiny")
    assert done.cast == {"F32 -> F16": len(was) - 1} and done.zeroed == 3 + lost
    back = convert(done.path, tmp_path / "wide.safetensors", dtype="float32")
    assert back.zeroed == 0 and all(value.dtype == torch.float32 for value in tensors(back.path).values())


def test_numbers_that_float16_cannot_hold_are_refused_by_name(single: Path, tmp_path: Path) -> None:
    name = "model.diffusion_model.out.0.bias"
    source = with_more(single, tmp_path / "a.safetensors", **{name: torch.full((32,), -70000.0)})
    with pytest.raises(BadFile, match=rf"'{name}' holds 70000, .* 65504; convert to bf16") as caught:
        convert(source, tmp_path / "b.safetensors", dtype="fp16")
    assert caught.value.code == "convert.overflow" and not (tmp_path / "b.safetensors").exists()
    assert tensors(convert(source, tmp_path / "b.safetensors", dtype="bf16").path)[name][0] == -70144
    source = with_more(single, tmp_path / "c.safetensors", **{name: torch.full((32,), 65519.0)})
    assert tensors(convert(source, tmp_path / "d.safetensors", dtype="fp16").path)[name][0] == 65504


def test_shards(single: Path, tmp_path: Path) -> None:
    done = convert(single, tmp_path / "m.safetensors", shard_bytes=1 << 20)
    assert done.path == tmp_path / "m.safetensors.index.json" and len(done.files) == 8
    assert equal(sumuk.load(done.path), tiny())
    whole = convert(done.path, tmp_path / "w.safetensors", layout="single")
    assert alike(tensors(whole.path), tensors(single)) and whole.renamed == 0
    folder = convert(single, tmp_path / "f", layout="diffusers", shard_bytes=1 << 20)
    assert (folder.path / "unet/diffusion_pytorch_model.safetensors.index.json").exists()
    assert (folder.path / "text_encoder/model.safetensors").exists() and equal(
        sumuk.load(folder.path), tiny()
    )
    again = convert(done.path, tmp_path / "m.safetensors", shard_bytes=1 << 21)  # in its own place
    assert equal(sumuk.load(again.path), tiny()) and not any(file.exists() for file in done.files)


def test_a_file_may_be_replaced_by_itself(single: Path, tmp_path: Path) -> None:
    path = shutil.copy(single, tmp_path / "a.safetensors")
    was = hashes(path)
    done = convert(path, path, dtype="bf16")
    assert done.source == {str(path): was} and done.target == {str(path): hashes(path)}
    assert sumuk.load(path).dtype == torch.bfloat16


def test_what_is_read_is_not_written_over(single: Path, folder: Path, tmp_path: Path) -> None:
    files = convert(single, tmp_path / "m.safetensors", shard_bytes=1 << 20).files
    with pytest.raises(BadInput, match="one of the 8 files that are read"):
        convert(tmp_path / "m.safetensors.index.json", files[0], dtype="fp16")
    index = (tmp_path / "m.safetensors.index.json").rename(tmp_path / "other.json")
    with pytest.raises(BadInput, match="which is read; give another name"):
        convert(index, tmp_path / "m.safetensors", dtype="fp16", shard_bytes=1 << 19)
    with pytest.raises(BadInput, match="not an empty folder"):
        convert(folder, folder, dtype="fp16")
    assert equal(sumuk.load(index), tiny()) and equal(sumuk.load(folder), tiny())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "already what is asked for"),
        ({"layout": "single"}, "already what is asked for"),
        ({"dtype": "float32"}, "already what is asked for"),
        ({"shard_bytes": 1 << 30}, "cuts nothing"),
        ({"shard_bytes": 0}, "at least 1"),
        ({"layout": "singel"}, "did you mean 'single'"),
        ({"layout": "diffusers"}, "layout 'diffusers' is a folder"),
        ({"layout": "bare"}, "holds one network, and there are denoiser, vae, text"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "fp8"}, "quantise='fp8'"),
        ({"quantise": "fp7"}, "did you mean 'fp8'"),
        ({"metadata": {"modelspec.architecture": "flux-1-dev"}}, "contradicts"),
    ],
)
def test_settings_that_cannot_be_or_change_nothing(
    settings: dict[str, object], message: str, single: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        convert(single, tmp_path / "x.safetensors", **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_names_of_files_and_folders(single: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not end in"):
        convert(single, tmp_path / "x.ckpt", dtype="fp16")
    with pytest.raises(BadInput, match="give layout='single'"):
        convert(folder, tmp_path / "x.safetensors", dtype="fp16")
    with pytest.raises(BadInput, match="nothing to convert"):
        convert(folder, tmp_path / "f")
    assert not list(tmp_path.iterdir())
    assert sumuk.load(convert(folder, tmp_path / "f", dtype="bf16").path).dtype == torch.bfloat16


def test_unknown_files_keep_their_names(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"x.y": torch.rand(4, 4), "n": torch.arange(3)}, {"who": "me"})
    with pytest.raises(BadFile, match="unknown model"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout="single")
    with pytest.raises(BadInput, match="no matrix of a denoiser"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", quantise="fp8")
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="fp16")
    assert (done.kind, done.moved, done.cast) == (None, 2, {"F32 -> F16": 1})
    header = read_header(done.path)
    assert {name: info.dtype for name, info in header.tensors.items()} == {"n": "I64", "x.y": "F16"}
    assert header.metadata == {"format": "pt", "who": "me", DIGEST: "0x" + body_digest(done.path)}


def test_tensors_that_nobody_knows_are_refused(single: Path, tmp_path: Path) -> None:
    source = with_more(single, tmp_path / "a.safetensors", **{"embedding_manager.x": torch.zeros(2)})
    with pytest.raises(BadFile, match=r"does not know: 'embedding_manager.x'; remove them first"):
        convert(source, tmp_path / "f", layout="diffusers")
    assert not (tmp_path / "f").exists()


def test_what_a_file_does_not_say_is_not_invented(tmp_path: Path) -> None:
    """Stable Diffusion 2 predicts eps or v, and no tensor tells which."""
    sumuk.save(zoo.tiny("sd2/text-to-image"), tmp_path / "a.safetensors")
    texts = {
        k: t for k, t in read_header(tmp_path / "a.safetensors").metadata.items() if k.startswith("sumuk.")
    }
    kept = {name: one for name, one in tensors(tmp_path / "a.safetensors").items() if name != "v_pred"}
    write(tmp_path / "b.safetensors", kept, texts)
    half = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", dtype="fp16", layout="single")
    said = read_header(half.path).metadata
    assert not {"modelspec.prediction_type", "modelspec.architecture", "modelspec.resolution"} & set(said)
    assert "v_pred" not in read_header(half.path).tensors
    folder = convert(tmp_path / "b.safetensors", tmp_path / "d", layout="diffusers")
    assert any("says that it predicts v" in note for note in folder.notes)
    wanted = {"modelspec.prediction_type": "epsilon"}
    told = convert(tmp_path / "b.safetensors", tmp_path / "e", layout="diffusers", metadata=wanted)
    assert not told.notes and sumuk.load(told.path).prediction.name == "eps"
    with pytest.raises(BadInput, match="marker tensor v_pred says v; leave it away"):
        convert(tmp_path / "a.safetensors", tmp_path / "f.safetensors", metadata=wanted)


def test_what_tensors_do_not_say_is_carried(tmp_path: Path) -> None:
    first = tiny(prediction="v", schedule=zero_terminal_snr(scaled_linear()))
    first = replace(first, latent=replace(first.latent, scale=0.7, shift=-0.25))
    sumuk.save(first, tmp_path / "a.safetensors")
    folder = convert(tmp_path / "a.safetensors", tmp_path / "f", layout="diffusers")
    back = convert(folder.path, tmp_path / "b.safetensors", layout="single")
    assert (
        alike(tensors(back.path), tensors(tmp_path / "a.safetensors")) and not folder.left and not back.left
    )
    for place in (folder.path, back.path):
        again = sumuk.load(place)
        assert (again.prediction.name, again.latent, again.size) == ("v", first.latent, 64)
        assert again.schedule.noisiest.is_pure_noise


def test_a_cancelled_conversion_leaves_nothing(single: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total * 0.6:
            raise Cancelled("enough")

    for settings in ({"layout": "diffusers"}, {"dtype": "fp16"}, {"shard_bytes": 1 << 20}):
        out = tmp_path / ("f" if "layout" in settings else "x.safetensors")
        with pytest.raises(Cancelled):
            convert(single, out, progress=stop, **settings)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())


def small(path: Path, value: float) -> Path:
    write(path, {f"a.{i}": torch.full((600,), value) for i in range(4)}, {"format": "pt"})
    return path


@pytest.mark.parametrize("shard_bytes", [None, 5000])
def test_killed_at_any_moment_the_old_or_the_new_is_there(shard_bytes: int | None, tmp_path: Path) -> None:
    source, out = small(tmp_path / "source.safetensors", 2.0), tmp_path / "x" / "m.safetensors"
    new, old = tensors(source), tensors(small(tmp_path / "old.safetensors", 1.0))
    place = out if shard_bytes is None else out.with_name("m.safetensors.index.json")

    def before() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if shard_bytes is None:
            small(out, 1.0)
        else:
            convert(tmp_path / "old.safetensors", out, shard_bytes=2500)

    def work(progress: Callable[[int, int], None]) -> Converted:
        return convert(source, out, metadata={"a": "b"}, shard_bytes=shard_bytes, progress=progress)

    before()
    count, news = moments(work), 0
    assert alike(tensors(place), new)
    for moment in range(0, count, 2 if shard_bytes is None else 4):
        before()
        assert killed(work, moment)
        now = tensors(place)
        assert alike(now, old) or alike(now, new)
        news += alike(now, new)
    assert 0 < news < count


def test_killed_at_any_moment_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    zoo.write("ddpm/pixel", tmp_path)

    def work(progress: Callable[[int, int], None]) -> Converted:
        return convert(
            tmp_path / "ddpm-pixel.safetensors", tmp_path / "f", layout="diffusers", progress=progress
        )

    count = moments(work)
    wanted = {
        str(p.relative_to(tmp_path / "f")): p.read_bytes() for p in (tmp_path / "f").rglob("*") if p.is_file()
    }
    for moment in (count // 3, count - 8, count - 2):
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        assert killed(work, moment)
        place = tmp_path / "f"
        here = {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}
        assert here in ({}, wanted)


def anonymous() -> int:
    """Bytes of memory that no file stands behind, and of the files' pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssFile")))


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    header = {f"blocks.{i}.weight": ("F32", (1024, 2048)) for i in range(16)}  # 8 MiB each, 128 in all
    zoo.write_header(tmp_path / "a.safetensors", header)
    most = before = anonymous()

    def watch(done: int, total: int) -> None:
        nonlocal most
        most = max(most, anonymous())

    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="fp16", progress=watch)
    assert most - before < 40 << 20
