"""A random Stable Diffusion 1 of a million parameters, for tests of files."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sumuk.diffusion.prediction import PREDICTIONS
from sumuk.families.family import FAMILIES
from sumuk.families.sd import TEXT_TO_IMAGE
from sumuk.nets.clip import ClipShape, ClipText
from sumuk.nets.tokens import ClipTokens
from sumuk.nets.unet import UNet, UNetShape
from sumuk.nets.vae import Vae, VaeShape
from sumuk.weights.model import Model

WORDS = "a fox in the snow, a fox and a fish, the sea and the snow and the fox in the sea"


def tiny(
    variant: str = "text-to-image",
    prediction: str = "eps",
    seed: int = 0,
    openai: bool = False,
    **more: object,
) -> Model:
    """A model with random weights; a vocabulary of its own unless ``openai``."""
    torch.manual_seed(seed)
    family = FAMILIES[f"sd1/{variant}"]
    tokens = ClipTokens.openai(length=16) if openai else ClipTokens.train([WORDS], size=520, length=16)
    unet = UNet(
        UNetShape(
            in_channels={"text-to-image": 4, "inpainting": 9, "instruct-pix2pix": 8}[variant],
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            transformer_depth=(1, 0),
            middle_depth=1,
            context_dim=64,
            heads=8,
        )
    )
    vae = Vae(VaeShape(width=32, multiples=(1, 2, 2), blocks=1))
    text = ClipText(
        ClipShape(vocabulary=tokens.size, length=16, width=64, depth=2, hidden=128), eos=tokens.eos
    )
    for network in (unet, vae, text):
        fill(network)
    model = Model(
        family=family,
        networks={"denoiser": unet, "vae": vae, "text": text},
        words={"text": tokens},
        schedule=TEXT_TO_IMAGE.schedule(),
        prediction=PREDICTIONS[prediction],
        latent=replace(family.latent, stride=4),
        size=64,
    )
    return replace(model, **more)


def fill(network: nn.Module) -> None:
    """Random numbers everywhere, also where an untrained network has zeros."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=0.02, std=0.05)
    network.eval().requires_grad_(False)


def weights(model: Model) -> dict[str, torch.Tensor]:
    """All tensors of a model by native name."""
    return {
        f"{name}.{key}": value
        for name, network in model.networks.items()
        for key, value in network.state_dict().items()
    }


def equal(one: Model, other: Model) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )
