"""LoRAs at work on a model: live and fused agree, accounts are right, ejecting restores every bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from examples import zoo
from tests.weights.tiny import tiny, weights
from torch import nn

import sumuk
from sumuk.base.errors import BadFile, BadInput
from sumuk.files.tensors import write
from sumuk.generate.wear import Outfit, dressed
from sumuk.weights.checkpoint import load, save
from sumuk.weights.guests import with_guests
from sumuk.weights.live import BlockRates, Worn, fuse, wear
from sumuk.weights.model import Model

TO_K = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
CONV = "input_blocks.1.0.in_layers.2"
NORM = "input_blocks.1.1.norm"
Q_TEXT = "text_model.encoder.layers.1.self_attn.q_proj"


def spelt(layer: str) -> str:
    return ("lora_te_" if layer.startswith("text_model") else "lora_unet_") + layer.replace(".", "_")


def lora_file(path: Path, model: Model, *layers: str, seed: int = 0, scale: float = 2.0) -> Path:
    """A kohya file of rank 2 for some layers; norms get a whole difference, a name with ``!`` a LoHa."""
    torch.manual_seed(seed)
    own = {**dict(model.denoiser.state_dict()), **dict(model.text.state_dict())}
    tensors = {}
    for layer in layers:
        name, loha = layer.rstrip("!"), layer.endswith("!")
        weight = own[f"{name}.weight"]
        if weight.ndim == 1:
            tensors[f"{spelt(name)}.w_norm"] = scale * torch.randn(weight.shape)
            continue
        out, inner = weight.shape[0], weight[0].numel()
        if loha:
            for pair in ("w1", "w2"):
                tensors[f"{spelt(name)}.hada_{pair}_a"] = torch.randn(out, 2)
                tensors[f"{spelt(name)}.hada_{pair}_b"] = scale * torch.randn(2, inner)
        else:
            tensors[f"{spelt(name)}.lora_up.weight"] = torch.randn(out, 2, *([1] * (weight.ndim - 2)))
            tensors[f"{spelt(name)}.lora_down.weight"] = scale * torch.randn(2, *weight.shape[1:])
        tensors[f"{spelt(name)}.alpha"] = torch.tensor(1.0)
    write(path, tensors)
    return path


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


def asked(model: Model, rows: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(rows, 4, 16, 16, generator=generator),
        "t": torch.full((rows,), 500.0),
        "context": torch.randn(rows, 16, 64, generator=generator),
    }


def answer(model: Model, outfits: list[Outfit], rows: int = 1) -> torch.Tensor:
    with torch.inference_mode(), dressed("denoiser", model.denoiser, outfits):
        return model.denoiser(**asked(model, rows))


@pytest.mark.parametrize(
    "layers", [(TO_K,), (CONV,), (TO_K, CONV, NORM), (f"{TO_K}!",), (f"{CONV}!", NORM, TO_K)], ids=str
)
def test_live_and_fused_agree_and_ejecting_restores_every_bit(
    model: Model, tmp_path: Path, layers: tuple[str, ...]
) -> None:
    before, plain = weights(model), answer(model, [Outfit()])
    live = wear(lora_file(tmp_path / "a.safetensors", model, *layers), model)
    assert live.applied.matched == len(layers) and live.applied.change > 0.001
    worn = Worn(live, "a", 0.8)
    drawn = answer(model, [Outfit((worn,))])
    fusion = fuse(model, [worn])
    fused = answer(model, [Outfit()])
    size = fused.abs().max()
    gap, effect = (drawn - fused).abs().max() / size, (fused - plain).abs().max() / size
    assert gap < 5e-6 and effect > 100 * gap, (gap, effect)
    fusion.eject()
    fusion.eject()
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(answer(model, [Outfit()]), plain)


def test_rows_of_a_batch_wear_what_they_wear_alone(model: Model, tmp_path: Path) -> None:
    ink = Worn(wear(lora_file(tmp_path / "ink.safetensors", model, TO_K, seed=1), model), "ink", 1.0)
    wash = Worn(wear(lora_file(tmp_path / "wash.safetensors", model, CONV, seed=2), model), "wash", -0.5)
    outfits = [Outfit(), Outfit((ink,)), Outfit((ink, wash)), Outfit((wash,))]
    together = answer(model, outfits, rows=4)
    for row, outfit in enumerate(outfits):
        with torch.inference_mode(), dressed("denoiser", model.denoiser, [outfit]):
            alone = model.denoiser(**{name: value[row : row + 1] for name, value in asked(model, 4).items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[1], together[0], rtol=1e-3)
    # What needs the weight itself cannot differ between rows of one forward, so it is in the key.
    whole = Worn(wear(lora_file(tmp_path / "whole.safetensors", model, f"{TO_K}!"), model), "whole", 1.0)
    assert Outfit((ink,)).key == Outfit((wash,)).key == Outfit().key
    assert Outfit((whole,)).key not in (Outfit().key, Outfit((Worn(whole.live, "whole", 0.5),)).key)


def test_several_add_up_in_any_order(model: Model, tmp_path: Path) -> None:
    one = Worn(wear(lora_file(tmp_path / "1.safetensors", model, f"{TO_K}!", NORM, seed=1), model), "1", 0.7)
    two = Worn(wear(lora_file(tmp_path / "2.safetensors", model, f"{TO_K}!", CONV, seed=2), model), "2", 1.3)
    forth, back = (answer(model, [Outfit(pair)]) for pair in ((one, two), (two, one)))
    torch.testing.assert_close(forth, back, rtol=1e-4, atol=1e-5)


def test_blocks_have_rates_of_their_own(model: Model, tmp_path: Path) -> None:
    live = wear(lora_file(tmp_path / "a.safetensors", model, TO_K, "middle_block.1.proj_in"), model)
    only = wear(lora_file(tmp_path / "b.safetensors", model, TO_K), model)
    half = Worn(live, "a", 1.0, BlockRates.read("IN01:0.5,M00:0", model))
    torch.testing.assert_close(
        answer(model, [Outfit((half,))]),
        answer(model, [Outfit((Worn(only, "b", 0.5),))]),
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(BadInput, match="IN77"):
        BlockRates.read("IN77:1", model)


def test_towers_are_changed_too(model: Model, tmp_path: Path) -> None:
    live = wear(lora_file(tmp_path / "te.safetensors", model, Q_TEXT), model)
    assert live.parts == ("text",)
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        plain = model.text(ids).last
        with dressed("text", model.text, [Outfit((Worn(live, "te", 1.0),))]):
            worn = model.text(ids).last
        fusion = fuse(model, [Worn(live, "te", 1.0)])
        fused = model.text(ids).last
        fusion.eject()
        assert torch.equal(model.text(ids).last, plain)
    torch.testing.assert_close(worn, fused, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(worn, plain, rtol=1e-3)


def test_half_applied_and_without_effect_are_errors_unless_allowed(model: Model, tmp_path: Path) -> None:
    path = lora_file(tmp_path / "a.safetensors", model, TO_K)
    from sumuk.files.safetensors import read_header
    from sumuk.files.tensors import from_header

    tensors = dict(from_header(read_header(path)))
    odd = "lora_unet_down_blocks_9_attentions_0_proj_in"
    write(
        tmp_path / "odd.safetensors",
        {**tensors, f"{odd}.lora_down.weight": torch.ones(2, 4), f"{odd}.lora_up.weight": torch.ones(4, 2)},
    )
    with pytest.raises(BadFile, match="2 of its tensors do not fit") as caught:
        wear(tmp_path / "odd.safetensors", model)
    assert caught.value.code == "lora.partial"
    live = wear(tmp_path / "odd.safetensors", model, partial=True)
    assert live.applied.matched == 1 and len(live.applied.unmatched) == 2
    zero = {name: torch.zeros(one.shape) if "up" in name else one for name, one in tensors.items()}
    write(tmp_path / "zero.safetensors", zero)
    with pytest.raises(BadFile, match="changes nothing") as caught:
        wear(tmp_path / "zero.safetensors", model)
    assert caught.value.code == "lora.zero"
    with pytest.raises(BadInput, match="nothing to fuse"):
        fuse(model, [Worn(live, "odd", 0.0)])


def test_the_change_is_measured_against_the_weights(model: Model, tmp_path: Path) -> None:
    live = wear(lora_file(tmp_path / "a.safetensors", model, TO_K, CONV), model)
    deltas = sizes = 0.0
    for patch in live.lora.patches:
        weight = dict(model.denoiser.named_parameters())[patch.name].detach()
        deltas += float(patch.change.delta(weight).double().square().sum())
        sizes += float(weight.double().square().sum())
    assert live.applied.change == pytest.approx((deltas / sizes) ** 0.5, rel=1e-5)


def test_models_are_loaded_with_adapters_by_name(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path / "model.safetensors")
    path = lora_file(tmp_path / "a.safetensors", model, TO_K)
    loaded = load(tmp_path / "model.safetensors", loras={"ink": path})
    assert list(loaded.loras) == ["ink"] and loaded.loras["ink"].file.path == path
    with pytest.raises(BadInput, match="has a LoRA 'ink' already"):
        with_guests(loaded, loras={"ink": path})
    with pytest.raises(BadInput, match=r"partial names 'inc'.*'ink'"):
        load(tmp_path / "model.safetensors", loras={"ink": path}, partial=["inc"])


@pytest.mark.parametrize(
    "key", ["sd2/text-to-image", "sdxl/base", "sd3/3.5-medium", "flux/dev", "cascade/stage-c"]
)
def test_every_layer_of_every_family_can_be_worn_live(key: str, tmp_path: Path) -> None:
    """Live is fused on all linear layers and convolutions, also those whose channels do not meet."""
    model = zoo.tiny(key)
    torch.manual_seed(0)
    tensors = {}
    for name, layer in model.denoiser.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            shape = layer.weight.shape
            tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(2, *shape[1:])
            ones = [1] * (len(shape) - 2)
            tensors[f"diffusion_model.{name}.lora_B.weight"] = 0.02 * torch.randn(shape[0], 2, *ones)
    write(tmp_path / "all.safetensors", tensors)
    worn = with_guests(model, loras={"all": tmp_path / "all.safetensors"})
    assert worn.loras["all"].applied.matched == len(tensors) / 2
    size = {"steps": 2, "seed": 1, "width": 128, "height": 128}
    live = np.asarray(sumuk.draw("a fox <lora:all:1>", model=worn, **size), np.int16)
    fusion = fuse(model, [Worn(worn.loras["all"], "all", 1.0)])
    fused = np.asarray(sumuk.draw("a fox ", model=model, **size), np.int16)
    fusion.eject()
    plain = np.asarray(sumuk.draw("a fox ", model=model, **size), np.int16)
    assert np.abs(live - fused).max() <= 1 and np.abs(live - plain).max() > 10
