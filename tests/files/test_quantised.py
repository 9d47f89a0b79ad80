"""Quantised files: exact against the arithmetic and against bitsandbytes, read lazily, refused when they do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sumuk.base.errors import BadFile, BadInput
from sumuk.files.quantised import fold, marker, quantise
from sumuk.files.safetensors import read_header
from sumuk.files.tensors import Lazy, Tensors, from_header, lazy, write

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
P = "model.diffusion_model."


def never() -> Tensor:
    raise AssertionError("only names, shapes and small texts are looked at")


def text(table: object) -> Tensor:
    return torch.tensor(
        list((table if isinstance(table, str) else json.dumps(table)).encode()), dtype=torch.uint8
    )


def folded(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Tensors:
    return fold({name: lazy(value, "q.safetensors") for name, value in tensors.items()}, metadata or {})[0]


def fp8(rows: int, columns: int, dtype: torch.dtype = E4, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return (torch.randn(rows, columns) * 100).clamp(-448, 448).to(dtype)


def direct(numbers: Tensor, scale: Tensor) -> Tensor:
    return numbers.double() * scale.double()


# -- 8-bit floats ----------------------------------------------------------------------------------------------------


def test_a_file_without_codes_comes_back_as_it_was():
    tensors = {f"layer.{i}.weight": Lazy((4, 4), "F16", never) for i in range(3)}
    assert fold(tensors, {"format": "pt"})[0] is tensors
    assert fold(tensors, {})[1] == ()
    assert fold({}, {})[0] == {}


@pytest.mark.parametrize("dtype", [E4, E5])
@pytest.mark.parametrize("spelling", ["old", "new", "header", "short header"])
def test_scaled_weights_in_every_spelling(dtype: torch.dtype, spelling: str):
    """One multiplication in float32: at most half a unit in the last place away from float64."""
    w, scale = fp8(6, 8, dtype), torch.tensor(0.0123)
    settings = {"format": {E4: "float8_e4m3fn", E5: "float8_e5m2"}[dtype], "full_precision_matrix_mult": True}
    tensors = {P + "q.weight": w, P + "q.bias": torch.ones(6).half()}
    metadata = {}
    if spelling == "old":
        tensors |= {
            P + "q.scale_weight": scale,
            P + "q.scale_input": torch.ones(()),
            P + "scaled_fp8": w[:0, 0],
        }
    else:
        tensors |= {P + "q.weight_scale": scale.reshape(1), P + "q.input_scale": torch.ones(())}
    if spelling == "new":
        tensors[P + "q.comfy_quant"] = text(settings)
    elif spelling != "old":
        layer = P + "q" if spelling == "header" else "q"
        metadata["_quantization_metadata"] = json.dumps(
            {"format_version": "1.0", "layers": {layer: settings}}
        )
    made, notes = fold({name: lazy(value) for name, value in tensors.items()}, metadata)
    assert list(made) == [P + "q.weight", P + "q.bias"]
    one = made[P + "q.weight"]
    kind = "F8_E4M3" if dtype == E4 else "F8_E5M2"
    assert (one.shape, one.dtype, one.stored) == ((6, 8), "F32", f"{kind} scaled")
    assert one.packed is not None and one.packed.size == 48 + 4
    exact = direct(w, scale)
    assert ((one.load().double() - exact).abs() <= exact.abs() * 2**-24).all()
    assert notes == (
        f"{kind} scaled: 1 weights",
        "scales of the inputs of 1 layers (activation quantisation) are not used",
    )


def test_a_scale_for_each_row():
    w, scale = fp8(6, 8), torch.rand(6, 1)
    one = folded({"q.weight": w, "q.weight_scale": scale})["q.weight"]
    assert torch.equal(one.load(), direct(w, scale).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_code_in_every_type(dtype: torch.dtype, scaled: bool):
    """Small and large ones take different ways, with the same numbers, among them both zeros and NaN."""
    scale = torch.tensor(1 / 3) if scaled else torch.tensor(1.0)
    for kind in (E4, E5):
        codes = torch.arange(256, dtype=torch.uint8)
        for w in (codes[:255], codes.roll(7).repeat(9000)):
            w = w.view(kind)[None]
            tensors = {"q.weight": w} | ({"q.scale_weight": scale} if scaled else {})
            packed = folded(tensors)["q.weight"].packed
            assert packed is not None
            made = packed.expand(packed.stored(), dtype)
            exact = (w.float() * scale).to(dtype)
            assert made.dtype == dtype
            nan = exact.isnan()
            assert torch.equal(made.isnan(), nan)
            assert torch.equal(made[~nan].view(torch.uint8), exact[~nan].view(torch.uint8))


def test_plain_floats_stay_packed_and_a_whole_checkpoint_may_mix(tmp_path: Path):
    w, scale, bias = fp8(6, 8), torch.tensor(0.5), torch.randn(6).to(E4)
    vae, plain = torch.randn(3, 3).half(), torch.randn(2, 2).to(E5)
    path = tmp_path / "whole.safetensors"
    tensors = {P + "q.weight": w, P + "q.scale_weight": scale, P + "q.bias": bias, P + "scaled_fp8": w[:0, 0]}
    write(
        path, {**tensors, "first_stage_model.conv.weight": vae, "cond.fc.weight": plain, "cond.k.weight": vae}
    )
    raw = from_header(read_header(path))
    made, notes = fold(raw, {})
    assert made["first_stage_model.conv.weight"] is raw["first_stage_model.conv.weight"]
    stored = {name: one.stored for name, one in made.items()}
    assert stored[P + "q.bias"] == "F8_E4M3" and stored["cond.fc.weight"] == "F8_E5M2"
    assert torch.equal(made[P + "q.bias"].load(), bias.float()) and made[P + "q.bias"].dtype == "F32"
    assert torch.equal(made["cond.fc.weight"].load(), plain.float())
    assert notes == ("F8_E4M3 scaled: 1 weights",)


def test_headers_are_enough_and_take_no_torch():
    code = (
        "import sys\nfrom sumuk.files.quantised import fold\nfrom sumuk.files.tensors import Lazy\n"
        "n = None\n"
        "t = {'q.weight': Lazy((4, 4), 'F8_E4M3', n), 'q.scale_weight': Lazy((), 'F32', n),\n"
        "     'k.weight': Lazy((9,), 'F8_E5M2', n), 'scaled_fp8': Lazy((0,), 'F8_E4M3', n)}\n"
        "assert {k: v.stored for k, v in fold(t, {})[0].items()} == "
        "{'q.weight': 'F8_E4M3 scaled', 'k.weight': 'F8_E5M2'}\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- 4-bit codes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_read_as_bitsandbytes_does(bnb, kind: str, nested: bool, dtype: torch.dtype):
    """Bit for bit, with whole blocks and without. (An odd number of columns would only run its slow fallback.)"""
    torch.manual_seed(0)
    for shape, block in (
        ((96, 64), 64),
        ((33, 70), 64),
        ((512, 256), 128),
        ((5, 4, 3, 2), 32),
        ((1030, 1024), 64),
    ):
        w = (torch.randn(shape) * 0.05).to(dtype)
        codes, state = bnb.functional.quantize_4bit(
            w, blocksize=block, compress_statistics=nested, quant_type=kind
        )
        beside = {f"x.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        made = folded({"x.weight": codes, **beside})
        assert list(made) == ["x.weight"]
        one = made["x.weight"]
        assert (one.shape, one.stored) == (shape, kind.upper())
        assert one.packed is not None
        assert one.packed.size == codes.nbytes + sum(v.nbytes for k, v in beside.items() if "state" not in k)
        exact = bnb.functional.dequantize_4bit(codes, state)
        assert one.load().dtype == dtype and torch.equal(one.load(), exact)
        for wanted in (
            torch.float32,
            torch.bfloat16,
        ):  # they round to their own type first, then to the input's
            assert torch.equal(one.packed.expand(one.packed.stored(), wanted), exact.to(wanted))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_layer_of_bitsandbytes_as_it_saves_itself(bnb, tmp_path: Path, storage: torch.dtype):
    """The file of a layer, written as transformers and diffusers do; the layer answers as ours would."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4", quant_storage=storage)
    layer = layer.to("cpu")
    path = tmp_path / "bnb.safetensors"
    write(
        path, {f"transformer.{name}": value for name, value in layer.state_dict().items()}, {"format": "pt"}
    )
    made, notes = fold(from_header(read_header(path)), {"format": "pt"})
    assert sorted(made) == ["transformer.bias", "transformer.weight"] and notes == ("NF4: 1 weights",)
    w = made["transformer.weight"].load()
    assert torch.equal(w, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    x = torch.randn(3, 64)
    ours = torch.nn.functional.linear(x, w.float(), made["transformer.bias"].load())
    # measured 2.2e-3: its own product on the CPU is made in bfloat16
    assert (ours - layer(x)).abs().max() < 1e-2 * ours.abs().max()


def test_only_the_small_texts_are_read():
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3072, 3072]}
    tensors = {
        "x.weight": Lazy((3072 * 1536, 1), "U8", never),
        "x.weight.absmax": Lazy((3072 * 48,), "F32", never),
        "x.weight.quant_map": Lazy((16,), "F32", never),
        "x.weight.quant_state.bitsandbytes__nf4": lazy(text(state)),
    }
    one = fold(tensors, {})[0]["x.weight"]
    assert (one.shape, one.dtype, one.stored) == ((3072, 3072), "BF16", "NF4")


# -- what does not fit -----------------------------------------------------------------------------------------------

Q = {"q.weight": fp8(4, 8)}
S = {"q.scale_weight": torch.tensor(0.5)}
FINE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [16, 8]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}


def four(state: object = FINE, kind: str = "nf4", drop: str = "", **other: Tensor) -> dict[str, Tensor]:
    """Codes of 16 x 8 numbers, with something odd about them."""
    tensors = {
        "x.weight": torch.zeros(64, 1, dtype=torch.uint8),
        "x.weight.absmax": torch.ones(2),
        "x.weight.quant_map": torch.zeros(16),
        f"x.weight.quant_state.bitsandbytes__{kind}": state if isinstance(state, Tensor) else text(state),
    } | {f"x.weight.{name}": value for name, value in other.items()}
    tensors.pop(f"x.weight.{drop}" if drop else "x.weight" if drop is None else "", None)
    return tensors


def header(layers: object) -> dict[str, str]:
    return {"_quantization_metadata": layers if isinstance(layers, str) else json.dumps({"layers": layers})}


E4M3 = {"format": "float8_e4m3fn"}
DEEP = "[" * 3000
ODD: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "a scale without its weight": (S, {}, "orphan"),
    "codes' scale without codes": ({"x.weight.absmax": torch.ones(2)}, {}, "orphan"),
    "a header's layer that is not there": ({**Q, **S}, header({"k": E4M3}), "orphan"),
    "a matrix below a marker without scale": ({**Q, "scaled_fp8": torch.zeros(0)}, {}, "lost"),
    "the same below a prefix": (
        {P + "q.weight": Q["q.weight"], P + "scaled_fp8": torch.zeros(2)},
        {},
        "lost",
    ),
    "an input's scale alone": ({**Q, "q.scale_input": torch.ones(())}, {}, "lost"),
    "a declared layer without scale": ({**Q, "q.comfy_quant": text(E4M3)}, {}, "lost"),
    "a layer declared in the header": (Q, header({"q": E4M3}), "lost"),
    "two scales": ({**Q, **S, "q.weight_scale": torch.ones(())}, {}, "twice"),
    "a scale of a weight that is no fp8": ({"q.weight": torch.ones(4, 8).half(), **S}, {}, "format"),
    "another fp8 than declared": ({**Q, **S, "q.comfy_quant": text({"format": "float8_e5m2"})}, {}, "format"),
    "two declarations": (
        {**Q, **S, "q.comfy_quant": text(E4M3)},
        header({"q": {"format": "float8_e5m2"}}),
        "format",
    ),
    "an unknown format": ({**Q, **S, "q.comfy_quant": text({"format": "nvfp4"})}, {}, "format"),
    "a rotation": ({**Q, **S, "q.comfy_quant": text({**E4M3, "convrot": True})}, {}, "format"),
    "NVFP4 by its names": ({**Q, "q.weight_scale_2": torch.ones(())}, {}, "format"),
    "LLM.int8 by its names": ({"q.weight": torch.ones(4, 8).char(), "q.SCB": torch.ones(4)}, {}, "format"),
    "scales of other sizes": ({**Q, "q.scale_weight": torch.ones(4)}, {}, "size"),
    "a block scale": ({**Q, "q.weight_scale": torch.ones(4, 2)}, {}, "size"),
    "an integer scale": ({**Q, "q.scale_weight": torch.ones((), dtype=torch.int32)}, {}, "size"),
    "a large marker": ({**Q, **S, "scaled_fp8": torch.zeros(3)}, {}, "marker"),
    "a crowd of markers": ({**Q, **S} | {f"{i}.scaled_fp8": torch.zeros(0) for i in range(17)}, {}, "marker"),
    "no JSON": ({**Q, **S, "q.comfy_quant": text("{")}, {}, "json"),
    "JSON that is no table": ({**Q, **S, "q.comfy_quant": text("[1]")}, {}, "json"),
    "JSON without format": ({**Q, **S, "q.comfy_quant": text({"format": 3})}, {}, "json"),
    "deep JSON": ({**Q, **S, "q.comfy_quant": text(DEEP)}, {}, "json"),
    "bytes that are no text": (
        {**Q, **S, "q.comfy_quant": torch.full((9,), 255, dtype=torch.uint8)},
        {},
        "json",
    ),
    "long JSON": ({**Q, **S, "q.comfy_quant": text(" " * 5000)}, {}, "json"),
    "a float for JSON": ({**Q, **S, "q.comfy_quant": torch.zeros(9)}, {}, "json"),
    "a header that is no JSON": ({**Q, **S}, header("{"), "json"),
    "a deep header": ({**Q, **S}, header(DEEP * 100), "json"),
    "a header without layers": ({**Q, **S}, header("{}"), "json"),
    "a header whose layer is a text": ({**Q, **S}, header({"q": "float8_e4m3fn"}), "json"),
    "fp8 and codes": ({**four(), "x.scale_weight": torch.ones(())}, {}, "twice"),
    "two states": ({**four(), "x.weight.quant_state.bitsandbytes__fp4": text(FINE)}, {}, "twice"),
    "codes without absmax": (four(drop="absmax"), {}, "lost"),
    "codes without state": (four(drop="quant_state.bitsandbytes__nf4"), {}, "lost"),
    "nested without table": (four(nested_absmax=torch.ones(1)), {}, "lost"),
    "nested only in the state": (four({**FINE, **NESTED}), {}, "lost"),
    "another kind than its name says": (four({**FINE, "quant_type": "fp4"}), {}, "format"),
    "an unknown kind": (four({**FINE, "quant_type": "af4"}, "af4"), {}, "format"),
    "an unknown dtype": (four({**FINE, "dtype": "int8"}), {}, "format"),
    "odd blocks": (four({**FINE, "blocksize": 63}), {}, "format"),
    "blocks of true": (four({**FINE, "blocksize": True}), {}, "format"),
    "no state": (four("{}"), {}, "format"),
    "a state that is none": (four("[]"), {}, "json"),
    "sides of 2^31": (four({**FINE, "shape": [2**31, 2**31]}), {}, "shape"),
    "sides that multiply to what fits": (four({**FINE, "shape": [-16, -8]}), {}, "shape"),
    "a side of a thousand digits": (four({**FINE, "shape": [10**1000]}), {}, "shape"),
    "too many sides": (four({**FINE, "shape": [1] * 70 + [128]}), {}, "shape"),
    "a shape that is larger": (four({**FINE, "shape": [16, 9]}), {}, "shape"),
    "a shape that is none": (four({**FINE, "shape": None}), {}, "shape"),
    "too few scales": (four(absmax=torch.ones(1)), {}, "size"),
    "scales in float16": (four(absmax=torch.ones(2).half()), {}, "size"),
    "codes for scales without nesting": (four(absmax=torch.ones(2).byte()), {}, "size"),
    "a short table": (four(quant_map=torch.zeros(15)), {}, "size"),
    "a nested offset of infinity": (
        four(
            json.dumps({**FINE, **NESTED}).replace("0.1", "1e999"),
            absmax=torch.ones(2).byte(),
            nested_absmax=torch.ones(1),
            nested_quant_map=torch.ones(256),
        ),
        {},
        "format",
    ),
    "too many nested scales": (
        four(
            {**FINE, **NESTED},
            absmax=torch.ones(2).byte(),
            nested_absmax=torch.ones(2),
            nested_quant_map=torch.ones(256),
        ),
        {},
        "size",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_does_not_fit_is_refused_in_one_line(case: str):
    tensors, metadata, code = ODD[case]
    with pytest.raises(BadFile) as caught:
        folded(tensors, metadata)
    message = str(caught.value)
    assert caught.value.code == f"quantised.{code}"
    assert message.startswith("q.safetensors: ") and "\n" not in message and len(message) < 400


def test_the_case_without_a_fault_is_read():
    assert folded(four())["x.weight"].load().shape == (16, 8)
    assert (
        folded({**Q, **S, "scaled_fp8": torch.zeros(2)}, header({"q": E4M3}))["q.weight"].stored
        == "F8_E4M3 scaled"
    )


def test_a_scale_that_is_no_number_is_refused_when_it_is_read():
    one = folded({**Q, "q.scale_weight": torch.tensor(float("nan"))})["q.weight"]
    with pytest.raises(BadFile, match=r"q\.scale_weight.*finite"):
        one.load()


# -- writing ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read(tmp_path: Path):
    torch.manual_seed(0)
    w = torch.randn(64, 96) * 0.02
    made = quantise(lazy(w), "fp8-scaled", "q.weight")
    tensors = {"q.weight": made[""], "q.scale_weight": made["scale_weight"], "scaled_fp8": marker()}
    path = tmp_path / "q.safetensors"
    write(path, tensors)
    again = fold(from_header(read_header(path)), {})[0]
    assert list(again) == ["q.weight"]
    scale = w.abs().max() / 448
    assert torch.equal(made["scale_weight"].load(), scale)
    assert torch.equal(again["q.weight"].load(), (w / scale).to(E4).float() * scale)
    # the bytes are those of the first writing, if what was read is written again
    second = quantise(again["q.weight"], "fp8-scaled")
    assert torch.equal(second[""].load().view(torch.uint8), made[""].load().view(torch.uint8))


def test_the_error_of_both_schemes():
    """Rounding to 4 significant bits: 2.6% of normal numbers, and what is small loses more without a scale."""
    torch.manual_seed(0)

    def error(w: Tensor, scheme: str) -> float:
        made = {"scale_weight": lazy(torch.ones(()))} | quantise(lazy(w), scheme)
        read = made[""].load().float() * made["scale_weight"].load()
        return float((read - w).norm() / w.norm())

    normal = torch.randn(512, 512)
    assert error(normal, "fp8-scaled") == pytest.approx(0.0264, abs=3e-4)
    assert error(normal, "fp8") == pytest.approx(0.0264, abs=3e-4)
    assert error(normal * 0.02, "fp8-scaled") == pytest.approx(0.0264, abs=3e-4)
    assert error(normal * 0.02, "fp8") == pytest.approx(0.0346, abs=3e-3)
    assert error(normal * 0.002, "fp8") > 0.2
    assert error(normal * 1000, "fp8-scaled") == pytest.approx(0.0264, abs=3e-4)


@pytest.mark.parametrize("w", [torch.zeros(3, 4), torch.full((3, 4), 1e-44), torch.full((3, 4), 3e38)])
def test_scales_of_extreme_matrices(w: Tensor):
    made = quantise(lazy(w), "fp8-scaled")
    read = made[""].load().float() * made["scale_weight"].load()
    assert torch.isfinite(read).all() and torch.allclose(read, w, rtol=2**-4, atol=1e-37)


def test_what_fp8_cannot_hold_is_refused_by_name():
    big = lazy(torch.full((2, 2), 500.0), "big.safetensors")
    with pytest.raises(
        BadInput, match=r"'q\.weight' of big\.safetensors reaches 500, fp8 only 448; take fp8-scaled"
    ):
        quantise(big, "fp8", "q.weight")[""].load()
    for scheme in ("fp8", "fp8-scaled"):
        with pytest.raises(BadInput, match="not finite"):
            quantise(lazy(torch.tensor([[1.0, float("nan")]])), scheme)[""].load()
    for odd in (torch.ones(3), torch.ones(2, 3, 1, 1), torch.ones(2, 2).int(), torch.ones(0, 2), fp8(2, 2)):
        with pytest.raises(BadInput, match="only matrices"):
            quantise(lazy(odd), "fp8")
    with pytest.raises(BadInput, match="did you mean 'fp8-scaled'"):
        quantise(lazy(torch.ones(2, 2)), "fp8-scale")
