"""Adapters beside a model: LoRAs, hypernetworks and embeddings, each under the name by which prompts ask for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from sumuk.base.errors import BadFile, BadInput, nearest
from sumuk.nets.attention import CrossAttention
from sumuk.nets.unet import UNet
from sumuk.weights.building import Place
from sumuk.weights.embedding import Embedding, read_embedding
from sumuk.weights.hypernet import Hypernet, read_hypernet
from sumuk.weights.live import LiveLora, wear
from sumuk.weights.model import Model


def with_guests(
    model: Model,
    *,
    loras: Mapping[str, Place] | None = None,
    hypernets: Mapping[str, Place] | None = None,
    embeddings: Mapping[str, Place] | None = None,
    partial: Collection[str] = (),
) -> Model:
    """The model with further adapters; its networks are shared, and nothing of them is changed.

    Args:
        model: loaded before.
        loras: files by the names that ``<lora:name>`` and ``Request.loras`` use.
        hypernets: files by the names that ``<hypernet:name>`` and ``Request.hypers`` use.
        embeddings: files by the words that stand for them in prompts.
        partial: names of LoRAs that may be applied though only a part of them fits.

    Raises:
        MissingFile: a file is not there.
        BadFile: a file is damaged, something else, or made for another model.
        BadInput: a name that is taken, or one in ``partial`` that no LoRA has.
    """
    loras = loras or {}
    for name in partial:
        if name not in loras:
            raise BadInput(f"partial names {name!r}, which is no LoRA that is loaded{nearest(name, loras)}")
    worn = {name: wear(place, model, partial=name in partial) for name, place in loras.items()}
    words = {name: _embedding(model, place, name) for name, place in (embeddings or {}).items()}
    for name, live in worn.items():
        for word, bundled in _bundled(live).items():
            if word in words or word in model.embeddings:
                raise BadInput(
                    f"the LoRA {name!r} brings an embedding {word!r}, a name that is taken already"
                )
            words[word] = bundled
    networks = {name: _hypernet(model, place, name) for name, place in (hypernets or {}).items()}
    for title, old, new in (
        ("LoRA", model.loras, worn),
        ("hypernetwork", model.hypernets, networks),
        ("embedding", model.embeddings, words),
    ):
        if twice := sorted(set(old) & set(new)):
            raise BadInput(f"the model has a {title} {twice[0]!r} already; give another name")
    words = {**model.embeddings, **words}
    # A refiner reads the same prompt, with the second of the base's towers under the same name.
    refiner = None if model.refiner is None else replace(model.refiner, embeddings=words)
    return replace(
        model,
        loras={**model.loras, **worn},
        hypernets={**model.hypernets, **networks},
        embeddings=words,
        refiner=refiner,
    )


def _embedding(model: Model, place: Place, name: str) -> Embedding:
    widths = {reading.part: model.networks[reading.part].shape.width for reading in model.readings}
    if not widths:
        raise BadInput(f"{model.family.title} reads no text, so that the embedding {name!r} would do nothing")
    return read_embedding(place, model.family, widths, name)


def _bundled(live: LiveLora) -> dict[str, Embedding]:
    """The embeddings inside a LoRA's file."""
    return {
        word: Embedding(word, dict(vectors), path=live.lora.path, metadata=live.lora.metadata)
        for word, vectors in live.lora.embeddings.items()
    }


def _hypernet(model: Model, place: Place, name: str) -> Hypernet:
    if not isinstance(model.denoiser, UNet):
        raise BadInput(f"the hypernetwork {name!r} does nothing for {model.family.title}, which is no U-Net")
    made = read_hypernet(place, name)
    seen = {each.to_k.in_features for each in model.denoiser.modules() if isinstance(each, CrossAttention)}
    if not seen & set(made.network.shape.widths):
        raise BadFile(
            f"{place}: is a hypernetwork for contexts of width {sorted(made.network.shape.widths)}; this model's are "
            f"{sorted(seen)} wide, so that it would do nothing",
            "hypernet.misfit",
        )
    made.network.to(model.device, model.dtype)
    return made
