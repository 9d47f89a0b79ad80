"""The autoencoder's recipe: batches, the loss, learning, and the affine map that is folded in on export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.train.small_run import SIZE, vae_config, write_pictures

from sumuk.base.errors import BadInput
from sumuk.nets.vae import Vae, vae_shape
from sumuk.train.data import seeded, to_signed
from sumuk.train.loop import Diverged, begin, train
from sumuk.train.recipes.vae import VaeTraining, edge_distance, standardise
from sumuk.train.run import make_recipe, run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "set", held_out=("red-3d", "blue-flat"))


def training(pictures: Path, **recipe: object) -> VaeTraining:
    made = make_recipe(vae_config(pictures, pictures / "out", recipe=recipe))
    assert isinstance(made, VaeTraining)
    return made


def test_batches_are_the_pictures_or_their_mirrors(pictures: Path):
    recipe = training(pictures)
    assert len(recipe.pixels) == 8, "held-out pictures are not seen"
    mirrored = 0
    for images in range(0, 48, 4):
        batch = recipe.batch(images, 4, seeded(0, images)).pixels
        plain = to_signed(recipe.pixels[recipe.order.batch(images, 4)])
        for each, source in zip(batch, plain, strict=True):
            assert torch.equal(each, source) or torch.equal(each, source.flip(-1))
            mirrored += torch.equal(each, source.flip(-1)) and not torch.equal(each, source)
    # The discs and squares are off centre to the left, so a mirror shows.
    assert 12 < mirrored < 36


def test_crops_come_first(pictures: Path):
    recipe = training(pictures, crop=8, crop_until=20)
    assert recipe.batch(16, 4, seeded(0, 16)).pixels.shape == (4, 3, 8, 8)
    assert recipe.batch(20, 4, seeded(0, 20)).pixels.shape == (4, 3, SIZE, SIZE)
    source = to_signed(recipe.pixels[recipe.order.batch(0, 1)])[0]
    (crop,) = recipe.batch(0, 1, seeded(0, 0)).pixels
    places = [(y, x) for y in range(9) for x in range(9)]
    cut = [source[:, y : y + 8, x : x + 8] for y, x in places]
    assert any(torch.equal(crop, each) or torch.equal(crop, each.flip(-1)) for each in cut)


@pytest.mark.parametrize("crop", [0, 24])
def test_an_impossible_crop_is_refused(pictures: Path, crop: int):
    with pytest.raises(BadInput, match=f"crop {crop} is outside 1 to 16"):
        training(pictures, crop=crop, crop_until=100)


def test_edge_distance():
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    assert float(edge_distance(a, a)) == 0.0
    assert float(edge_distance(a, a + 0.25)) < 1e-6, "a change of brightness has no edges"
    assert float(edge_distance(a, b)) == float(edge_distance(b, a)) > 0.1
    # A ramp of 1 a pixel differs from black by 1 across, 0 down; halving the size makes it 2, then 4.
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    assert float(edge_distance(ramp, torch.zeros_like(ramp), scales=1)) == pytest.approx(1)
    assert float(edge_distance(ramp, torch.zeros_like(ramp))) == pytest.approx((1 + 2 + 4) / 3)
    assert float(edge_distance(ramp.mT, ramp, scales=1)) == pytest.approx(2)


def test_the_loss_is_the_sum_that_is_written(pictures: Path):
    recipe = training(pictures, kl=0.25, edges=2.0)
    recipe.vae.requires_grad_(False)
    given = recipe.batch(0, 4, seeded(0, 0))
    loss, figures = recipe.loss(given, seeded(0, 1))
    batch = given.pixels
    moments = recipe.vae.encode(batch)
    noise = torch.randn(moments.mean.shape, generator=seeded(0, 1))
    drawn = recipe.vae.decode(moments.mean + (0.5 * moments.log_variance).exp() * noise)
    # KL(q || N(0, 1)), Kingma & Welling 2014, appendix B; torch's own formula as the reference.
    spread = torch.distributions.Normal(moments.mean, (0.5 * moments.log_variance).exp())
    divergence = torch.distributions.kl_divergence(spread, torch.distributions.Normal(0.0, 1.0))
    kl = figures["kl"]
    assert kl == pytest.approx(float(divergence.sum(dim=(1, 2, 3)).mean()), rel=1e-4)
    expected = (batch - drawn).abs().mean() + 2.0 * edge_distance(batch, drawn) + 0.25 * kl
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    psnr = 20 * torch.log10(2 / (batch - drawn).square().mean().sqrt())
    assert figures["psnr"] == pytest.approx(float(psnr), rel=1e-4)


def test_standardise_moves_latents_and_no_pixel(pictures: Path):
    recipe = training(pictures)
    vae, pixels = recipe.vae, to_signed(recipe.pixels)
    with torch.no_grad():
        vae.quant_conv.bias[:4] += torch.tensor([3.0, -2.0, 0.5, 0.0])  # far from standard before
        before, noise = vae.encode(pixels), torch.randn(8, 4, 8, 8, generator=seeded(0, 0))
        plain, sampled = vae.decode(before.mode()), vae.decode(before.sample(noise))
        assert float(before.mode().mean(dim=(0, 2, 3)).abs().max()) > 1
        standardise(vae, pixels)
        after = vae.encode(pixels)
        assert torch.allclose(vae.decode(after.mode()), plain, atol=1e-4)
        assert torch.allclose(vae.decode(after.sample(noise)), sampled, atol=1e-4)
    mean, deviation = after.mode().mean(dim=(0, 2, 3)), after.mode().std(dim=(0, 2, 3))
    assert torch.allclose(mean, torch.zeros(4), atol=1e-3)
    assert torch.allclose(deviation, torch.full((4,), 1 / 0.18215), rtol=1e-4)
    assert not torch.allclose(before.mode(), after.mode(), atol=0.1)


def test_two_pictures_are_learnt(tmp_path: Path):
    """Ninety steps on two pictures: the loss falls below three tenths."""
    root = write_pictures(tmp_path / "two", only=2)
    config = vae_config(
        root,
        tmp_path,
        images=180,
        batch=2,
        recipe={"kl": 1e-6},
        optim={"rate": 4e-3, "warmup": 8, "fall": "linear"},
    )
    recipe = make_recipe(config)
    assert isinstance(recipe, VaeTraining)
    ticks = list(train(config, recipe, begin(config, recipe)))
    first, last = ticks[0].loss, sum(each.loss for each in ticks[-5:]) / 5
    assert last < 0.3 * first


def test_a_run_exports_what_it_averaged(pictures: Path, tmp_path: Path):
    config = vae_config(pictures, tmp_path, images=8)
    told: list[str] = []
    target = run(config, tell=told.append)
    assert target == tmp_path / "model.safetensors"
    weights = load_file(target)
    vae = Vae(vae_shape({name: tuple(t.shape) for name, t in weights.items()}))
    vae.load_state_dict(weights)
    pixels = to_signed(training(pictures).pixels)
    with torch.no_grad():
        latent = vae.encode(pixels).mode()
    assert torch.allclose(latent.std(dim=(0, 2, 3)), torch.full((4,), 1 / 0.18215), rtol=1e-3)
    averages = load_file(tmp_path / "state-0000000008" / "ema.safetensors")
    assert torch.equal(weights["decoder.conv_in.weight"], averages["vae.decoder.conv_in.weight"])
    assert (tmp_path / "sheet-0000000008.png").is_file()
    assert told[-1].startswith(f"wrote {target}")
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".building")]


def test_the_seed_decides_the_first_weights(pictures: Path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = training(pictures).vae.state_dict()
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers go on undisturbed"
    other = training(pictures).vae.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    config = vae_config(pictures, pictures / "out", seed=9)
    third = make_recipe(config).modules["vae"].state_dict()
    assert not torch.equal(one["encoder.conv_in.weight"], third["encoder.conv_in.weight"])


def test_a_loss_that_is_not_finite_stops_the_run(pictures: Path, tmp_path: Path):
    config = vae_config(pictures, tmp_path)
    recipe = make_recipe(config)
    state = begin(config, recipe)
    ticks = train(config, recipe, state)
    next(ticks)
    kept = copy.deepcopy(recipe.modules["vae"].state_dict())
    recipe.pixels = recipe.pixels.float() * torch.nan  # type: ignore[attr-defined]
    with pytest.raises(Diverged, match="loss nan and gradient norm nan after 4 images"):
        next(ticks)
    assert all(torch.equal(value, kept[name]) for name, value in recipe.modules["vae"].state_dict().items())


def test_a_decoder_alone_leaves_the_latents_as_they_are(pictures: Path, tmp_path: Path):
    """What other models were trained on is the encoder's; it must not move by a bit, on export either."""
    first = training(pictures)
    first.export(tmp_path / "first.safetensors")
    recipe = training(pictures, decoder_of=str(tmp_path / "first.safetensors"), latent_noise=0.1)
    before = {name: value.clone() for name, value in recipe.vae.state_dict().items()}
    config = vae_config(
        pictures, tmp_path / "out", images=32, recipe={"decoder_of": str(tmp_path / "first.safetensors")}
    )
    state = begin(config, recipe)
    assert len(list(train(config, recipe, state))) == 8
    recipe.export(tmp_path / "second.safetensors")
    after = load_file(tmp_path / "second.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(name.startswith("decoder.") for name in moved)


def test_a_decoder_looks_through_noise_at_the_encoders_latents(pictures: Path, tmp_path: Path):
    training(pictures).export(tmp_path / "first.safetensors")
    start = str(tmp_path / "first.safetensors")
    clean = training(pictures, decoder_of=start, crop=None)
    batch = clean.batch(0, 4, seeded(0, 0))
    assert batch.latents is not None
    with torch.no_grad():
        seen = clean.vae.encode(batch.pixels).mode()
        assert torch.allclose(batch.latents, seen, atol=1e-5), "mirrored pictures have their own latents"
        drawn = clean.vae.decode(batch.latents)
        plain = (batch.pixels - drawn).abs().mean() + 0.5 * edge_distance(batch.pixels, drawn)
        assert float(clean.loss(batch, seeded(0, 1))[0]) == pytest.approx(float(plain), rel=1e-4)
        noisy = training(pictures, decoder_of=start, latent_noise=0.5)
        unit = torch.randn(seen.shape, generator=seeded(0, 1))
        drawn = noisy.vae.decode(batch.latents + 0.5 / 0.18215 * unit)
        plain = (batch.pixels - drawn).abs().mean() + 0.5 * edge_distance(batch.pixels, drawn)
        assert float(noisy.loss(batch, seeded(0, 1))[0]) == pytest.approx(float(plain), rel=1e-4)
