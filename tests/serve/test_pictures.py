"""Pictures that were sent: plain ones come of good ones, and of bad ones a sentence, quickly and in little memory."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from tests.serve.hostile_pictures import HOSTILE, ODD, pattern, png, saved

from sumuk.generate.request import read_image
from sumuk.serve import pictures
from sumuk.serve.picture_header import read_header
from sumuk.serve.pictures import clean
from sumuk.serve.trouble import Refused

MOST = 4096 * 4096


@pytest.fixture(scope="module", autouse=True)
def ready() -> Iterator[None]:
    asyncio.run(pictures.warm())
    yield
    pictures._DARKROOM.close()


def cleaned(data: bytes, most: int = MOST) -> Image.Image:
    out = asyncio.run(clean(data, "init", most))
    image = Image.open(io.BytesIO(out))
    image.load()
    assert image.format == "PNG" and image.mode in ("L", "RGB", "RGBA")
    assert not image.info and not image.getexif()
    return image


def told(data: bytes, most: int = MOST) -> str:
    with pytest.raises(Refused) as error:
        asyncio.run(clean(data, "init_images[0]", most))
    assert error.value.trouble.type == "bad-picture"
    return error.value.trouble.detail


class Peak:
    """The most memory that any process below this one ever had, looked at every millisecond."""

    def __enter__(self) -> Peak:
        self.most, self.going = 0, True
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.going = False
        self.thread.join()

    def _look(self) -> None:
        room = pictures._DARKROOM.process
        assert room is not None
        while self.going:
            for pid in Path(f"/proc/{room.pid}/task/{room.pid}/children").read_text().split():
                try:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    self.most = max(self.most, pages * resource.getpagesize())
                except (OSError, IndexError):
                    pass
            time.sleep(0.001)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str):
    data = HOSTILE[name]()
    seconds: list[float] = []
    soon = 0.5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    for _ in range(5):  # the machine's other work is not the picture's fault
        with Peak() as peak:
            began = time.perf_counter()
            said = told(data)
            seconds.append(time.perf_counter() - began)
        assert peak.most < 128 * 2**20, peak.most
        if seconds[-1] < soon:
            break
    assert said.startswith("init_images[0] ") and "picture of" not in said and said.isprintable()
    assert min(seconds) < soon, seconds


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_plain_afterwards_or_refused(name: str):
    try:
        cleaned(ODD[name]())
    except Refused as error:
        assert error.trouble.type == "bad-picture"


def test_what_is_refused_is_named():
    assert "is a GIF; PNG, JPEG and WebP are taken" in told(HOSTILE["gif"]())
    assert "50000 x 50000 pixels; at most 16,777,216" in told(HOSTILE["png of 50,000 x 50,000"]())
    assert "animated" in told(HOSTILE["apng"]()) and "animated" in told(HOSTILE["animated webp"]())
    assert "beside its pixels" in told(HOSTILE["jpeg with a maker note of 64 MB"]())
    assert "SVG or HTML" in told(HOSTILE["svg with a declaration"]())
    assert "cut short" in told(HOSTILE["png cut in half"]())
    assert "cannot be decoded" in told(HOSTILE["png whose rows end early"]())
    assert "is empty" in told(b"")
    assert "at most 100 are read" in told(png(11, 11), 100)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "I;16"])
def test_every_kind_of_png(mode: str):
    image = pattern(24, 16, 4)
    image = (
        Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 170)
        if mode == "I;16"
        else image.convert(mode)
    )
    data = saved(image, "PNG")
    out, meant = cleaned(data), read_image(data)
    assert out.mode == meant.mode and out.tobytes() == meant.tobytes()
    if mode == "I;16":
        assert out.getpixel((23, 15)) == 253  # 65,110 of 65,535; clipping would make it white


@pytest.mark.parametrize(("format", "modes"), [("JPEG", "RGB L CMYK"), ("WEBP", "RGB RGBA")])
def test_the_other_formats(format: str, modes: str):
    for mode in modes.split():
        data = saved(pattern(24, 16, 4).convert(mode), format)
        out = cleaned(data)
        assert out.size == (24, 16) and out.tobytes() == read_image(data).tobytes()
    progressive = saved(pattern(64, 64), "JPEG", progressive=True)
    assert cleaned(progressive).tobytes() == read_image(progressive).tobytes()


@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_upright(turn: int, format: str):
    exif = Image.Exif()
    exif[0x0112] = turn
    how = {"lossless": True} if format == "WEBP" else {}
    data = saved(pattern(), format, exif=exif, **how)
    out = cleaned(data)
    meant = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert out.size == meant.size == ((24, 16) if turn in (0, 1, 2, 3, 4, 9) else (16, 24))
    assert out.tobytes() == meant.tobytes()


def test_a_transparent_palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    out = cleaned(saved(image, "PNG", transparency=1))
    assert out.mode == "RGBA" and out.getpixel((0, 0)) == (0, 255, 0, 0)


def test_headers_agree_with_the_decoder():
    for format in ("PNG", "JPEG", "WEBP"):
        for size in ((1, 1), (7, 300), (1023, 5)):
            ways: tuple[dict, ...] = ({},)
            if format == "WEBP":
                ways = ({}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"})
            for how in ways:
                found = read_header(saved(pattern(*size), format, **how), "x", MOST)
                assert (found.format, found.width, found.height) == (format, *size)


def test_nothing_is_left_for_the_next_one():
    """Each picture has a process of its own; what one leaves behind, the next does not find."""
    room = pictures._DARKROOM.process
    for _ in range(3):
        cleaned(saved(pattern(), "PNG"))
        told(HOSTILE["png whose rows end early"]())
    assert pictures._DARKROOM.process is room
    time.sleep(0.05)
    assert not Path(f"/proc/{room.pid}/task/{room.pid}/children").read_text()


def test_the_process_is_started_again_when_it_is_gone():
    room = pictures._DARKROOM.process
    room.kill()
    room.wait()
    assert cleaned(saved(pattern(), "PNG")).size == (24, 16)
    assert pictures._DARKROOM.process is not room


def test_a_picture_is_not_blamed_for_the_death_of_the_process():
    """It dies with the picture on its way to it."""
    room = pictures._DARKROOM.process
    room.send_signal(signal.SIGSTOP)

    async def lose() -> bytes:
        going = asyncio.ensure_future(clean(saved(pattern(), "PNG"), "init", MOST))
        await asyncio.sleep(0.1)
        room.kill()
        return await going

    assert asyncio.run(lose()).startswith(b"\x89PNG")
    assert pictures._DARKROOM.process is not room


def test_the_process_does_not_outlive_its_server():
    code = (
        "import asyncio; from sumuk.serve import pictures as p; asyncio.run(p.warm()); "
        "print(p._DARKROOM.process.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        child = Path(f"/proc/{int(server.stdout.readline())}")
        assert child.exists()
        server.kill()
    until = time.monotonic() + 10
    with suppress(OSError):  # it is not there any more
        while (child / "stat").read_text().split()[2] != "Z":
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_process_that_is_stopped_refuses_its_picture(monkeypatch: pytest.MonkeyPatch):
    """As one that ran into a limit of the system's: no answer, or half of one."""
    for half in (b"", b"+" + saved(pattern(), "PNG")[:-3]):
        monkeypatch.setattr(pictures._DARKROOM, "develop", lambda data, pixels, half=half: half)
        assert "more time or memory" in told(saved(pattern(), "PNG"))


def test_the_child_can_do_nothing_else():
    """Its limits, asked of itself in a fork of this process."""
    from sumuk.serve import picture_child

    come, go = os.pipe()
    if not os.fork():
        said = []
        try:
            picture_child.limit(1000, 1000)
            for act in (
                lambda: open("/etc/passwd"),  # noqa: PTH123, SIM115  # no file can be opened
                os.pipe,
                lambda: bytearray(2**30),
            ):
                try:
                    act()
                    said.append("done")
                except (OSError, MemoryError) as error:
                    said.append(type(error).__name__)
        finally:
            os.write(go, " ".join(said).encode())
            os._exit(0)
    os.close(go)
    with os.fdopen(come, "rb") as answer:
        assert answer.read() == b"OSError OSError MemoryError"
    os.wait()


def test_many_at_once():
    """Two at a time; the others wait, and the event loop goes on."""
    data = saved(pattern(256, 256), "PNG")

    async def all_of_them() -> list[bytes]:
        return await asyncio.gather(*(clean(data, f"init {n}", MOST) for n in range(20)))

    assert len(set(asyncio.run(all_of_them()))) == 1


def test_the_child_knows_no_secret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SUMUK_TOKENS", "ann=secret-secret-secret")
    assert b"secret" not in str(pictures._environment()).encode()
    room = pictures._DARKROOM.process
    assert b"TOKEN" not in Path(f"/proc/{room.pid}/environ").read_bytes()
