"""Where T5's words are looked for, in which order, and what is said when they are nowhere. No network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from sumuk.base.errors import BadFile, MissingFile
from sumuk.nets.unigram import SPACE, T5Tokens
from sumuk.weights.t5_vocabulary import find_t5

SPECIAL = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -2.0)]
CLIP = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'


def spiece(size: int) -> bytes:
    """A spiece.model of ``size`` pieces, told apart by that."""
    pieces = b""
    for index in range(size):
        text = SPECIAL[index][0] if index < 4 else f"{SPACE}w{index}"
        name = text.encode()
        kind = bytes([3 << 3, 2 if index == 2 else 3]) if index < 3 else b""
        body = bytes([1 << 3 | 2, len(name)]) + name + kind
        pieces += bytes([1 << 3 | 2, len(body)]) + body
    return pieces


def as_json(size: int) -> str:
    return T5Tokens([*SPECIAL, *((f"w{index}", -1.0) for index in range(size - 4))], length=8).to_json()


def put(folder: Path, data: bytes | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("spiece.model" if isinstance(data, bytes) else "tokenizer.json")
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def pieces(tokens: T5Tokens) -> int:
    return tokens.size - 100 if tokens.size > 100 else tokens.size


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of ours that is empty, and a hub that may not be asked."""
    monkeypatch.setenv("SUMUK_HOME", str(tmp_path / "home"))
    hub(monkeypatch, AssertionError("the hub was asked"))
    return tmp_path / "home" / "t5"


def hub(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[Any]:
    asked: list[Any] = []

    def fail(*what: Any) -> NoReturn:
        asked.append(what)
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    return asked


@pytest.mark.parametrize("name", ["", "tokenizer_2", "tokenizer_3", "tokenizer"])
@pytest.mark.parametrize("data", [spiece(7), as_json(7)])
def test_in_the_model_folder(tmp_path: Path, home: Path, name: str, data: bytes | str) -> None:
    put(tmp_path / "model" / name, data)
    put(home, spiece(9))
    tokens = find_t5(tmp_path / "model", 77)
    assert pieces(tokens) == 7 and tokens.length == 77


def test_sentencepiece_before_json(tmp_path: Path) -> None:
    put(tmp_path, spiece(7))
    put(tmp_path, "damaged, but not looked at")
    assert pieces(find_t5(tmp_path, 8)) == 7


def test_json_of_another_tower_is_passed_by(tmp_path: Path) -> None:
    put(tmp_path / "tokenizer_2", CLIP)
    put(tmp_path / "tokenizer_3", as_json(7))
    assert pieces(find_t5(tmp_path, 8)) == 7
    with pytest.raises(BadFile, match=r"tokenizer_2.*'BPE'"):  # but not where T5's should be
        find_t5(tmp_path / "tokenizer_2", 8)


def test_at_home(tmp_path: Path, home: Path) -> None:
    put(home, spiece(7))
    assert pieces(find_t5(None, 8)) == 7
    put(tmp_path / "model" / "tokenizer", CLIP)
    assert pieces(find_t5(tmp_path / "model", 8)) == 7


def test_home_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUMUK_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / ".cache" / "sumuk" / "t5", spiece(7))
    assert pieces(find_t5(None, 8)) == 7


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    path = put(tmp_path, spiece(7))

    def give(*what: Any) -> str:
        asked.append(what)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", give)
    assert pieces(find_t5(None, 8)) == 7
    assert asked == [("google/t5-v1_1-xxl", "spiece.model")]


@pytest.mark.parametrize(
    "error",
    [
        OfflineModeIsEnabled("offline mode is enabled"),
        LocalEntryNotFoundError("cannot find it in the cache, and\nsome more lines"),
        HfHubHTTPError.__new__(HfHubHTTPError),
        ConnectionError("unreachable"),
        RuntimeError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_nowhere(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    asked = hub(monkeypatch, error)
    with pytest.raises(MissingFile) as caught:
        find_t5(tmp_path / "model", 8)
    said = str(caught.value)
    assert "\n" not in said and len(asked) == 1
    for words in [str(error).split("\n")[0], str(home / "spiece.model"), str(tmp_path / "model")]:
        assert words in said
    assert "https://huggingface.co/google/t5-v1_1-xxl" in said
    with pytest.raises(MissingFile) as caught:
        find_t5(None, 8)
    assert "model'" not in str(caught.value).split("hub")[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (spiece(7)[:-1], "are left"),
        (as_json(7)[:-1], "not JSON"),
        (as_json(7).replace('"byte_fallback":false', '"byte_fallback":true'), "byte_fallback is True"),
    ],
)
def test_damage_is_told_with_its_path_and_not_passed_over(
    tmp_path: Path, home: Path, data: bytes | str, words: str
) -> None:
    put(home, spiece(7))
    path = put(tmp_path / "tokenizer_3", data)
    with pytest.raises(BadFile, match=words) as caught:
        find_t5(tmp_path, 8)
    assert str(caught.value).startswith(f"{path}: ")
    path.unlink()
    assert pieces(find_t5(tmp_path, 8)) == 7


def test_no_text_and_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff{}")
    with pytest.raises(BadFile, match="not UTF-8"):
        find_t5(tmp_path, 8)
    monkeypatch.setattr("sumuk.weights.t5_vocabulary.MOST_BYTES", 2)
    with pytest.raises(BadFile, match="3 bytes are too many"):
        find_t5(tmp_path, 8)
