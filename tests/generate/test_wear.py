"""LoRAs and hypernetworks in requests: tags and fields mean the same, act when they should, and are accounted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.generate.conftest import gap, one, refusal, run
from tests.weights.test_live import TO_K, lora_file

from sumuk.generate.receipt import infotext, read_receipt, save_png
from sumuk.generate.replay import replay, request_of
from sumuk.generate.request import make_request
from sumuk.generate.settings import resolve
from sumuk.generate.wear import acts
from sumuk.nets.hypernet import HypernetShape, Hypernetwork
from sumuk.weights.guests import with_guests
from sumuk.weights.hypernet import Hypernet, write_hypernet
from sumuk.weights.live import Worn, fuse
from sumuk.weights.model import Model

LAYERS = (TO_K, "middle_block.1.transformer_blocks.0.attn2.to_v", "output_blocks.1.0.in_layers.2")
TEXT = "text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def dressed_model(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With LoRAs ``ink`` and ``wash`` of thin pairs, ``loha``, ``words`` for the tower, and a hypernetwork ``h``."""
    folder = tmp_path_factory.mktemp("adapters")
    loras = {
        "ink": lora_file(folder / "ink.safetensors", model, *LAYERS, seed=1, scale=0.5),
        "wash": lora_file(folder / "wash.safetensors", model, *LAYERS, seed=2, scale=0.5),
        "loha": lora_file(folder / "loha.safetensors", model, *(f"{each}!" for each in LAYERS), scale=0.2),
        "words": lora_file(folder / "words.safetensors", model, TEXT, TO_K, seed=3, scale=0.5),
    }
    torch.manual_seed(4)
    network = Hypernetwork(HypernetShape(widths=(64,)))
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.2)
    write_hypernet(Hypernet("h", network), folder / "h.safetensors")
    return with_guests(model, loras=loras, hypernets={"h": folder / "h.safetensors"})


def test_a_tag_is_a_field_and_says_nothing_to_the_text(dressed_model: Model) -> None:
    plain = one(dressed_model, prompt="a fox")
    tagged = one(dressed_model, prompt="a fox<lora:ink:0.7>")
    assert gap(tagged, plain) > 3
    assert gap(tagged, one(dressed_model, prompt="a fox", loras=[{"name": "ink", "weight": 0.7}])) == 0
    assert gap(tagged, one(dressed_model, prompt="<lora:ink:0.7>a fox")) == 0
    assert gap(one(dressed_model, prompt="a fox"), plain) == 0, "nothing stays on the model"


def test_towers_and_denoiser_have_strengths_of_their_own(dressed_model: Model) -> None:
    both = one(dressed_model, prompt="a fox <lora:words:1>")
    unet = one(dressed_model, prompt="a fox <lora:words:0:1>")
    tower = one(dressed_model, prompt="a fox <lora:words:1:0>")
    assert gap(unet, one(dressed_model, prompt="a fox <lora:words:te=0:unet=1>")) == 0
    pictures = [one(dressed_model, prompt="a fox "), both, unet, tower]
    assert all(gap(a, b) > 0 for i, a in enumerate(pictures) for b in pictures[:i])


def test_live_is_fused(dressed_model: Model) -> None:
    for name in ("ink", "loha", "words"):
        live = one(dressed_model, prompt=f"a fox <lora:{name}:0.8>")
        fusion = fuse(dressed_model, [Worn(dressed_model.loras[name], name, 0.8)])
        fused = one(dressed_model, prompt="a fox ")
        fusion.eject()
        assert gap(live, fused) <= 1, name
        assert gap(live, one(dressed_model, prompt="a fox ")) > 3, name


def test_requests_with_unlike_adapters_are_drawn_together_as_alone(dressed_model: Model) -> None:
    prompts = ["a fox", "a fox <lora:ink:1>", "a fox <lora:wash:0.5><lora:ink:-0.5>", "a fox <lora:loha:1>",
               "a fox <hypernet:h:1>", "a fox <lora:ink:1><hypernet:h:0.4>"]  # fmt: skip
    alone = [one(dressed_model, prompt=prompt) for prompt in prompts]
    exact = run(dressed_model, *({"prompt": prompt} for prompt in prompts))
    assert [gap(a, b.picture) for a, (b,) in zip(alone, exact, strict=True)] == [0] * 6
    fast = run(dressed_model, *({"prompt": prompt} for prompt in prompts), mode="fast")
    assert max(gap(a, b.picture) for a, (b,) in zip(alone, fast, strict=True)) <= 1


def test_thin_pairs_share_forwards_and_whole_changes_do_not(dressed_model: Model) -> None:
    told: list[int] = []
    hook = dressed_model.denoiser.register_forward_hook(lambda _, given, out: told.append(len(given[0])))
    prompts = ["a fox", "a fox <lora:ink:1>", "a fox <lora:wash:1>", "a fox <hypernet:h:1>"]
    run(dressed_model, *({"prompt": prompt, "steps": 1} for prompt in prompts), mode="fast")
    assert told == [8], "four pictures, two sides of guidance"
    told.clear()
    run(dressed_model, *({"prompt": p, "steps": 1} for p in ("a fox", "a fox <lora:loha:1>")), mode="fast")
    hook.remove()
    assert sorted(told) == [2, 2]


def test_windows_are_shares_of_the_steps(dressed_model: Model) -> None:
    wear = make_request(prompt="x", loras=[{"name": "ink", "start": 0.25, "end": 0.75}]).loras[0]
    assert [acts(wear, step, 4) for step in range(4)] == [False, True, True, False]
    never = one(dressed_model, prompt="a fox ")
    early = one(dressed_model, prompt="a fox <lora:ink:1:end=0.5>")
    late = one(dressed_model, prompt="a fox <lora:ink:1:start=0.5>")
    always = one(dressed_model, prompt="a fox <lora:ink:1>")
    pictures = [never, early, late, always]
    assert all(gap(a, b) > 0 for i, a in enumerate(pictures) for b in pictures[:i])


def test_blocks_have_rates(dressed_model: Model) -> None:
    named = one(dressed_model, prompt="a fox <lora:ink:1:lbw=1,0,1,0,0,0,0,0,0,0>")
    if_written_out = [{"name": "ink", "blocks": "IN*:0,M00:0,OUT*:0,IN01:1"}]
    assert gap(named, one(dressed_model, prompt="a fox ", loras=if_written_out)) == 0
    assert gap(named, one(dressed_model, prompt="a fox ")) > 0
    assert gap(named, one(dressed_model, prompt="a fox <lora:ink:1>")) > 0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompt": "a <lora:inc:1>"}, "the model was loaded without a LoRA 'inc'; did you mean 'ink'?"),
        ({"prompt": "a <hypernet:g:1>"}, "loaded without a hypernetwork 'g'"),
        ({"prompt": "a <lycoris:ink:1>"}, "<lycoris:ink> is no kind of extra network"),
        ({"negative": "<lora:ink:1>"}, "in the negative prompt does nothing"),
        ({"prompt": "a <lora:ink:1><lora:ink:0.5>"}, "the LoRA 'ink' is named 2 times"),
        ({"prompt": "a <lora:ink:1>", "loras": [{"name": "ink"}]}, "the LoRA 'ink' is named 2 times"),
        ({"prompt": "a <lora:ink:0>"}, "the LoRA 'ink' at strength 0 does nothing"),
        ({"prompt": "a <lora:ink:1:1:64>"}, "dyn 64 is not understood"),
        ({"prompt": "a <lora:ink:1:te=2>"}, "says te twice"),
        ({"prompt": "a <lora:ink:11>"}, "weight: input should be less than or equal to 10"),
        ({"prompt": "a <lora:ink:1:start=0.5:end=0.5>"}, "start 0.5 is not before end 0.5"),
        ({"prompt": "a <lora:ink:1:start=0.9>", "steps": 4}, "no step of 4 lies from start 0.9 to end 1 of 'ink'"),
        ({"prompt": "a <lora:ink:1:lbw=NONSENSE>"}, "NONSENSE"),
        ({"prompt": "a <lora:ink:1:lbw=1,1,0,0,0,0,0,0,0,0>"}, "changes nothing with these strengths and blocks"),
        ({"prompt": "a <lora:ink:0.5:1>"}, "te 0.5 of the LoRA 'ink' does nothing, as it changes no text tower"),
        ({"prompt": "a <lora:words:1:0:end=0.5>"}, "start and end of the LoRA 'words' do nothing"),
        ({"prompt": "a <lora:ink:1:lbw=1,0,1>"}, "3 block rates do not fit this model"),
        ({"prompt": "a <hypernet:h:1:2>"}, "takes one number"),
        ({"loras": [{"name": "ink", "wight": 1}]}, "unknown setting"),
    ],
)  # fmt: skip
def test_what_cannot_be_worn_is_refused_before_anything_is_drawn(
    dressed_model: Model, values: dict, told: str
) -> None:
    assert told in refusal(lambda: resolve(make_request(**values), dressed_model))


def test_the_receipt_accounts_for_what_was_worn_and_replays(dressed_model: Model, tmp_path: Path) -> None:
    ((done,),) = run(dressed_model, {"prompt": "a fox <lora:ink:0.8> <hypernet:h:0.5>"})
    adapters = {each["name"]: each for each in done.receipt["adapters"]}
    assert set(adapters) == {"ink", "h"}, "what is loaded and not worn is not told"
    ink = adapters["ink"]
    assert ink["account"]["matched"] == 3 and ink["account"]["unmatched"] == 0
    assert ink["account"]["change"] == pytest.approx(dressed_model.loras["ink"].applied.change)
    assert f'Lora hashes: "ink: {ink["autov3"]}"' in infotext(
        done.receipt
    ) or "Lora hashes: ink: " in infotext(done.receipt)
    save_png(done.picture, done.receipt, tmp_path / "a.png")
    drawn, receipt = read_receipt(tmp_path / "a.png")
    request = request_of(receipt, {})
    assert replay(drawn, receipt, dressed_model, request).kind == "identical"
    other = replace(dressed_model, loras={**dressed_model.loras, "ink": dressed_model.loras["wash"]})
    verdict = replay(drawn, receipt, other, request)
    assert verdict.kind == "different" and any("the lora 'ink' was" in each for each in verdict.reasons)
