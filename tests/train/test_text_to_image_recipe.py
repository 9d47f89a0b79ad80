"""The text-to-image recipe: batches, min-SNR weights, learning, and an export that the rest of Sumuk opens."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.train.small_run import SIZE, text_config, write_pictures, write_vae

import sumuk
from sumuk.base.errors import BadFile, BadInput, MissingFile
from sumuk.nets.vae import Vae
from sumuk.train.config import TrainConfig
from sumuk.train.data import read_pixels, seeded, to_signed
from sumuk.train.loop import begin, train
from sumuk.train.recipes.text_to_image import TextToImageTraining
from sumuk.train.run import make_recipe, run
from sumuk.weights.checkpoint import load

FACTOR = 0.18215


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Path:
    return write_pictures(folder / "set", held_out=("red-3d",))


@pytest.fixture(scope="module")
def vae(folder: Path, pictures: Path) -> Path:
    return write_vae(pictures, folder / "vae.safetensors")


def training(config: TrainConfig) -> TextToImageTraining:
    made = make_recipe(config)
    assert isinstance(made, TextToImageTraining)
    return made


@pytest.fixture(scope="module")
def recipe(folder: Path, pictures: Path, vae: Path) -> TextToImageTraining:
    """Untrained; tests leave it as it is."""
    return training(text_config(pictures, folder / "out", vae, recipe={"snr_gamma": 5.0}))


@pytest.fixture(scope="module")
def learnt(folder: Path, vae: Path) -> tuple[TextToImageTraining, list[float]]:
    """Trained on two pictures for 120 steps, and its mean square error at each."""
    root = write_pictures(folder / "two", only=2)
    config = text_config(
        root,
        folder / "two-out",
        vae,
        images=960,
        batch=8,
        optim={"rate": 2e-3, "warmup": 16, "fall": "constant"},
        recipe={"drop_text": 0.0, "vocabulary": 518, "guidance": 3.5},
    )
    made = training(config)
    return made, [tick.figures["mse"] for tick in train(config, made, begin(config, made))]


def snr() -> np.ndarray:
    """alpha^2 / sigma^2 of each step of Stable Diffusion's schedule, from its betas."""
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return kept / (1 - kept)


@pytest.mark.parametrize(
    ("prediction", "gamma", "expected"),
    [
        ("eps", 5.0, lambda r: np.minimum(r, 5) / r),
        ("v", 5.0, lambda r: np.minimum(r, 5) / (r + 1)),
        ("v", 2.5, lambda r: np.minimum(r, 2.5) / (r + 1)),
        ("v", None, np.ones_like),
    ],
)
def test_min_snr_weights(
    recipe: TextToImageTraining, monkeypatch: pytest.MonkeyPatch, prediction: str, gamma: float, expected
):
    """Hang et al. 2023, section 3.4: one weight on the error of the clean picture, whatever is predicted."""
    changed = recipe.recipe.model_copy(update={"prediction": prediction, "snr_gamma": gamma})
    monkeypatch.setattr(recipe, "recipe", changed)
    weights = recipe._weights(torch.arange(1000)).double().numpy()
    assert np.allclose(weights, expected(snr()), rtol=1e-3)


def test_latents_have_unit_scale(recipe: TextToImageTraining, pictures: Path):
    assert recipe.means.shape == recipe.deviations.shape == (9, 4, SIZE // 2, SIZE // 2)
    assert torch.allclose(recipe.means.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-3)
    with torch.no_grad():
        pixels = recipe.vae.decode(recipe.means / FACTOR)
        seen = to_signed(read_pixels(pictures, recipe.records, SIZE))
        plain = recipe.vae.decode(recipe.vae.encode(seen).mode())
    assert torch.allclose(pixels, plain, atol=1e-5)


def test_a_batch_pairs_pictures_with_their_words(recipe: TextToImageTraining):
    spread = recipe.deviations.mean()
    for images in range(0, 36, 4):
        batch = recipe.batch(images, 4, seeded(0, images))
        rows = recipe.order.batch(images, 4)
        assert batch.latents.shape == (4, 4, SIZE // 2, SIZE // 2) and batch.ids.shape == (4, 32)
        assert float((batch.latents - recipe.means[rows]).abs().max()) < 8 * float(spread)
        for row, ids in zip(rows, batch.ids.tolist(), strict=True):
            own = [text for texts in recipe.records[row].captions.values() for text in texts]
            assert ids in recipe.ids([*own, ""]).tolist()


def test_languages_are_drawn_alike_and_prompts_dropped_now_and_then(recipe: TextToImageTraining):
    random = seeded(0, 0)
    drawn = [recipe._caption(0, random) for _ in range(4000)]
    captions = recipe.records[0].captions
    share = {tongue: sum(text in texts for text in drawn) / 4000 for tongue, texts in captions.items()}
    # Four standard deviations of a share of 4,000 draws.
    assert abs(drawn.count("") / 4000 - 0.1) < 0.019
    assert abs(share["en"] - 0.45) < 0.032 and abs(share["ko"] - 0.45) < 0.032
    assert set(drawn) == {"", *captions["en"], *captions["ko"]}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noisier_times_are_drawn_as_often_as_asked(
    recipe: TextToImageTraining, monkeypatch: pytest.MonkeyPatch, shift: float
):
    """Quantiles of the times against Esser et al. 2024, eq. 23: t = s u / (1 + (s - 1) u), u uniform."""
    monkeypatch.setattr(recipe, "recipe", recipe.recipe.model_copy(update={"time_shift": shift}))
    times = recipe._times(20_000, seeded(0, 0))
    assert times.dtype == torch.int64 and int(times.min()) >= 0 and int(times.max()) <= 999
    for u in (0.1, 0.25, 0.5, 0.75, 0.9):
        share = float((times < 1000 * shift * u / (1 + (shift - 1) * u)).double().mean())
        assert abs(share - u) < 4 * (u * (1 - u) / 20_000) ** 0.5 + 0.002


def test_the_loss_is_the_weighted_error(recipe: TextToImageTraining):
    """The untrained network says zero, so each row's error is the mean square of its target, alpha e - sigma x."""
    batch = recipe.batch(0, 4, seeded(0, 0))
    loss, figures = recipe.loss(batch, seeded(0, 1))
    random = seeded(0, 1)
    time = (1000 * torch.rand(4, generator=random)).long()
    noise = torch.randn(batch.latents.shape, generator=random).double().numpy()
    ratio = snr()[time.numpy()]
    kept = (ratio / (1 + ratio))[:, None, None, None]
    target = np.sqrt(kept) * noise - np.sqrt(1 - kept) * batch.latents.double().numpy()
    each = (target**2).mean(axis=(1, 2, 3))
    assert figures["mse"] == pytest.approx(each.mean(), rel=1e-4)
    assert float(loss.detach()) == pytest.approx((np.minimum(ratio, 5) / (ratio + 1) * each).mean(), rel=1e-3)


def test_two_pictures_are_learnt(learnt: tuple[TextToImageTraining, list[float]]):
    """Untrained, the error is about 1, the variance of v; to halve it the network must know the pictures."""
    _, errors = learnt
    assert sum(errors[:8]) / 8 == pytest.approx(1, abs=0.1)
    assert sum(errors[-16:]) / 16 < 0.55


def test_words_are_heeded(learnt: tuple[TextToImageTraining, list[float]]):
    """At high noise only the text can tell the two pictures apart: wrong words cost more than right ones."""
    recipe, _ = learnt
    right = recipe.ids([record.captions["en"][0] for record in recipe.records])
    noise = torch.randn((2, *recipe.means.shape[1:]), generator=seeded(0, 0))
    level = recipe.schedule.level(800)
    x = level.alpha * recipe.means + level.sigma * noise
    target = level.alpha * noise - level.sigma * recipe.means

    def error(ids: torch.Tensor) -> float:
        with torch.no_grad():
            output = recipe.unet(x, torch.full((2,), level.time), recipe.text(ids).last)
        return float((output - target).square().mean())

    assert error(right) < 0.5 * error(right.flip(0))


def test_the_export_is_a_checkpoint_like_any_other(
    learnt: tuple[TextToImageTraining, list[float]], tmp_path: Path
):
    recipe, _ = learnt
    path = tmp_path / "model.safetensors"
    recipe.export(path)

    found = sumuk.open(path)
    assert (found.family, found.variant, found.layout) == ("sd1", "text-to-image", "single")
    assert found.missing == () and found.extra == () and found.incomplete == ()
    assert found.prediction is not None and (found.prediction.value, found.prediction.sure) == ("v", True)
    assert found.licence is not None and found.licence.value == "CC0-1.0"
    assert found.metadata["modelspec.title"] == "Small" and found.metadata["sumuk.guidance"] == "3.5"

    model = load(path)
    assert model.prediction.name == "v" and model.size == SIZE
    assert model.tokens.vocabulary == recipe.tokens.vocabulary and model.tokens.length == 32
    assert (model.latent.channels, model.latent.stride, model.latent.scale) == (4, 2, FACTOR)

    prompts = ["red thing, flat", "파란색 물건", ""]
    ids = torch.tensor([model.tokens.row(model.tokens.encode(text)) for text in prompts])
    assert torch.equal(ids, recipe.ids(prompts))
    x, time = torch.randn(3, 4, 8, 8, generator=seeded(0, 0)), torch.tensor([1.0, 500.0, 999.0])
    with torch.no_grad():
        trained = recipe.unet(x, time, recipe.text(ids).last)
        loaded = model.denoiser(x, time, model.text(ids).last)
        rounded = [copy.deepcopy(net).half().float() for net in (recipe.unet, recipe.text)]
        same = rounded[0](x, time, rounded[1](ids).last)
        pixels = model.decode_latent(recipe.means[:1])
        expected = copy.deepcopy(recipe.vae).half().float().decode(recipe.means[:1] / FACTOR)
    assert float(trained.std()) > 0.1, "an output of nothing would prove nothing"
    assert torch.equal(loaded, same), "the same weights in half precision, and nothing else changed"
    # Half precision keeps 11 bits; the error of a few dozen layers stays within a few of its steps.
    assert float((loaded - trained).square().mean().sqrt() / trained.std()) < 4 * 2**-11
    assert torch.allclose(pixels, expected, atol=1e-6)


def test_pictures_are_drawn_during_training(learnt: tuple[TextToImageTraining, list[float]]):
    recipe, _ = learnt
    drawn = recipe.draw(["red thing, flat", "초록색 물건"], seed=1, steps=3)
    assert drawn.shape == (2, 3, SIZE, SIZE) and bool(drawn.isfinite().all())
    assert torch.equal(drawn, recipe.draw(["red thing, flat", "초록색 물건"], seed=1, steps=3))
    assert not torch.equal(drawn, recipe.draw(["red thing, flat", "초록색 물건"], seed=2, steps=3))


def test_the_autoencoder_stays_as_it_is(learnt: tuple[TextToImageTraining, list[float]], vae: Path):
    recipe, _ = learnt
    assert recipe.modules.keys() == {"unet", "text"}
    weights = load_file(vae)
    assert all(torch.equal(value, weights[name]) for name, value in recipe.vae.state_dict().items())


def test_eps_is_told_in_the_export(pictures: Path, vae: Path, tmp_path: Path):
    made = training(text_config(pictures, tmp_path, vae, recipe={"prediction": "eps"}))
    made.export(tmp_path / "eps.safetensors")
    prediction = sumuk.open(tmp_path / "eps.safetensors").prediction
    assert prediction is not None and (prediction.value, prediction.sure) == ("eps", True)


def test_captions_are_checked_before_the_run(pictures: Path, vae: Path, tmp_path: Path):
    with pytest.raises(BadInput, match=r"caption '.+' has \d+ tokens, more than the 6 of text_length 8"):
        training(text_config(pictures, tmp_path, vae, recipe={"text_length": 8}))


def test_an_autoencoder_that_is_absent_or_damaged_is_named(pictures: Path, vae: Path, tmp_path: Path):
    with pytest.raises(MissingFile, match=r"absent\.safetensors"):
        training(text_config(pictures, tmp_path, tmp_path / "absent.safetensors"))
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(vae.read_bytes()[:-9])
    with pytest.raises(BadFile, match=r"torn\.safetensors: is cut off"):
        training(text_config(pictures, tmp_path, torn))


def test_a_run_ends_in_a_checkpoint(pictures: Path, vae: Path, tmp_path: Path):
    told: list[str] = []
    target = run(text_config(pictures, tmp_path / "run", vae, images=8), tell=told.append)
    assert target is not None and load(target).family.name == "sd1"
    assert "0 of 8 images seen" in told[0]


def test_a_run_begins_with_the_weights_of_another(
    learnt: tuple[TextToImageTraining, list[float]], folder: Path, pictures: Path, vae: Path, tmp_path: Path
):
    old, _ = learnt
    old.export(tmp_path / "old.safetensors")
    new = training(text_config(pictures, tmp_path, vae, recipe={"start": tmp_path / "old.safetensors"}))
    assert new.tokens.to_json() == old.tokens.to_json()
    for part, module in old.modules.items():
        for name, value in module.state_dict().items():
            assert torch.equal(new.modules[part].state_dict()[name], value.half().float()), name
    with pytest.raises(BadInput, match=r"text tower of .*old\.safetensors has "):
        training(
            text_config(
                pictures, tmp_path, vae, recipe={"start": tmp_path / "old.safetensors", "text_layers": 2}
            )
        )
    with pytest.raises(BadInput, match=r"old\.safetensors predicts v, the recipe eps"):
        training(
            text_config(
                pictures,
                tmp_path,
                vae,
                recipe={"start": tmp_path / "old.safetensors", "prediction": "eps"},
            )
        )
    other = Vae(old.vae.shape)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="has another autoencoder than"):
        training(
            text_config(
                pictures,
                tmp_path,
                tmp_path / "other.safetensors",
                recipe={"start": tmp_path / "old.safetensors"},
            )
        )
