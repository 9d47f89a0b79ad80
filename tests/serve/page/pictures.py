"""The pictures of the page in ``docs/images``: ``python -m tests.serve.page.pictures``, then look at them."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from tests.serve.conftest import running
from tests.serve.page.conftest import chromium, reading

HERE = Path(__file__).parents[3] / "docs" / "images"
PHONE = {
    "viewport": {"width": 360, "height": 780},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}
MOST = 195_000
"""Bytes of a picture."""


def draw(page: Any, prompt: str, **fields: object) -> None:
    page.fill("#prompt textarea", prompt)
    for name, value in fields.items():
        page.fill(f"#{name} :is(input, textarea)", str(value))
    page.click("#draw")
    page.wait_for_selector("#cancel:visible")
    page.wait_for_selector("#draw:visible", timeout=120_000)
    page.mouse.move(2, 2)


def english(page: Any) -> None:
    draw(page, "a fox, 3d style", seed=3)


def korean(page: Any) -> None:
    draw(page, "고양이, 3d", seed=5)
    page.click("#stage [data-act=send-mask]")
    canvas = page.locator("#fold-start canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()

    def at(across: float, down: float) -> tuple[float, float]:
        return box["x"] + across * box["width"], box["y"] + down * box["height"]

    for down in (0.45, 0.5, 0.55):
        page.mouse.move(*at(0.3, down))
        page.mouse.down()
        page.mouse.move(*at(0.7, down), steps=6)
        page.mouse.up()
    page.evaluate("window.scrollTo(0, 0)")


def phone(page: Any) -> None:
    draw(page, "빨간색 하트, 3d", seed=7)


def dark(page: Any) -> None:
    page.locator("#tabs > .tab-wrapper [role=tab]").nth(1).click()
    page.locator("#gallery-wall .wall button").nth(2).click()
    page.wait_for_selector("#gallery-detail .lines")
    page.mouse.move(2, 2)


def compare(page: Any) -> None:
    page.fill("#prompt textarea", "a star, 3d style")
    page.fill("#seed :is(input, textarea)", "11")
    page.locator("#tabs > .tab-wrapper [role=tab]").nth(2).click()
    page.click("#down input")
    page.locator("#down [role=option]", has_text="Solver").click()
    page.wait_for_timeout(500)
    page.fill("#down-values textarea", "euler\ndpmpp-2m\nheun")
    page.fill("#across-values textarea", "6, 10, 16, 25")
    page.click("#compare-draw")
    page.wait_for_selector("#compare-cancel:visible")
    page.wait_for_selector("#compare-draw:visible", timeout=180_000)
    page.mouse.move(2, 2)


SCENES: dict[str, tuple[Any, dict[str, Any]]] = {
    "en": (english, {"viewport": {"width": 1280, "height": 940}}),
    "ko": (korean, {"viewport": {"width": 1180, "height": 1580}, "locale": "ko-KR"}),
    "phone": (phone, {**PHONE, "viewport": {"width": 360, "height": 1000}, "locale": "ko-KR"}),
    "compare": (compare, {"viewport": {"width": 1280, "height": 1150}}),
    "dark": (dark, {"viewport": {"width": 1180, "height": 1010}, "color_scheme": "dark"}),
}


def save(shot: bytes, path: Path) -> None:
    """The window's picture, with fewer shades where it would have too many bytes otherwise."""
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    for step in (1, 2, 4, 8):
        shades = [min(255, round(value / step) * step) for value in range(256)]
        image.point(shades * 3).save(path, optimize=True)
        if path.stat().st_size <= MOST:
            break
    print(f"{path.name}: {path.stat().st_size:,} bytes, {image.width} x {image.height}, shades by {step}")


def main(names: list[str]) -> None:
    """Draw the scenes that are named, or all."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "state", page=True) as server,
        chromium() as browser,
    ):
        for name in names or SCENES:
            scene, window = SCENES[name]
            with reading(browser, server.url, **window) as reader:
                page = reader.open()
                scene(page)
                page.wait_for_timeout(800)
                save(page.screenshot(), HERE / f"page-{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
