"""The page as people use it: the server that ``sumuk serve`` is, the miniature, and a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator

import pytest
from PIL import Image, ImageChops, ImageStat
from tests.serve.conftest import Running, running
from tests.serve.page.conftest import Reader, reading
from tests.serve.toy_backend import ToyBackend
from tests.serve.toy_running import toy_running

from sumuk.generate.api import MINIATURE

pytestmark = pytest.mark.slow
PORCELAIN = MINIATURE.with_name("porcelain.safetensors")
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    shelf = folder / "shelf"
    shelf.mkdir()
    for name in ("first", "second"):
        shutil.copy(MINIATURE, shelf / f"{name}.safetensors")
    shutil.copy(PORCELAIN, shelf)
    with running(folder / "state", "--shelf", str(shelf), page=True) as made:
        yield made


@pytest.fixture
def reader(browser, server) -> Iterator[Reader]:
    with reading(browser, server.url) as made:
        yield made
        assert made.foreign() == []


def drawn(page, prompt: str = "a heart, 3d style", **fields: object):
    """Draw with these fields, and wait for the end."""
    page.fill("#prompt textarea", prompt)
    for name, value in {"steps": 4, "seed": 5, **fields}.items():
        page.fill(f"#{name} :is(input, textarea)", str(value))
    page.click("#draw")
    page.wait_for_selector("#cancel:visible")
    page.wait_for_selector("#draw:visible", timeout=60_000)


def tab(page, name: str) -> None:
    page.locator("#tabs > .tab-wrapper [role=tab]", has_text=name).click()
    page.wait_for_timeout(500)


def kept(page) -> dict:
    page.wait_for_timeout(400)
    return json.loads(page.evaluate("localStorage.getItem('sumuk.form')"))


def test_the_first_picture_shows_how_it_comes(reader):
    page = reader.open()
    page.fill("#prompt textarea", "여우, 3d")
    page.fill("#steps input", "40")
    page.press("#prompt textarea", "Control+Enter")
    page.wait_for_selector("#stage img.wet")
    assert re.fullmatch(r"Step \d+ of 40", page.inner_text("#stage .walk span"))
    page.wait_for_selector("#stage figure a img", timeout=60_000)
    assert "1 picture in" in page.inner_text("#stage .walk")
    assert reader.complained == []


def test_shift_enter_is_a_new_line_and_writing_korean_draws_nothing(reader):
    page = reader.open()
    page.click("#prompt textarea")
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.evaluate(
        "document.querySelector('#prompt textarea').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, isComposing: true}))"
    )
    page.wait_for_timeout(500)
    assert page.input_value("#prompt textarea") == "a\n"
    assert page.is_visible("#draw") and page.locator("#stage figure").count() == 0


def test_cancel_stops_it(reader, server):
    page = reader.open()
    page.fill("#prompt textarea", "a fox")
    page.fill("#steps input", "900")
    page.click("#draw")
    page.wait_for_selector("#stage progress")
    page.click("#cancel")
    page.wait_for_selector("#draw:visible")
    assert page.inner_text("#notice") == "Cancelled."
    assert server.client.get("/api/jobs?limit=1").json()["jobs"][0]["state"] == "cancelled"


def test_a_mask_is_painted_and_only_what_is_painted_changes(reader, server):
    page = reader.open()
    drawn(page)
    page.click("#stage [data-act=send-mask]")
    canvas = page.locator("#fold-start canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()

    def at(across: float, down: float) -> tuple[float, float]:
        return box["x"] + across * box["width"], box["y"] + down * box["height"]

    page.locator("#fold-start .size input").fill("30")
    page.mouse.move(*at(0.2, 0.05))
    page.mouse.down()
    page.mouse.move(*at(0.2, 0.95), steps=8)
    page.mouse.up()
    form = kept(page)
    mask = Image.open(io.BytesIO(_bytes(form["start"]["mask"]))).convert("L")
    assert mask.size == (64, 64)
    assert (mask.getpixel((10, 32)), mask.getpixel((50, 32))) == (255, 0)
    # Undo, clear and invert are of the mask too.
    page.click("#fold-start >> text=Undo")
    assert kept(page)["start"]["mask"] is None
    page.click("#fold-start >> text=Invert")
    assert Image.open(io.BytesIO(_bytes(kept(page)["start"]["mask"]))).convert("L").getextrema() == (255, 255)
    page.click("#fold-start >> text=Undo")
    page.mouse.move(*at(0.2, 0.05))
    page.mouse.down()
    page.mouse.move(*at(0.2, 0.95), steps=8)
    page.mouse.up()
    before = _result(server)
    drawn(page, "a fox, 3d style", seed=8, mask_blur=0)
    difference = ImageChops.difference(before, _result(server))
    painted, other = (
        ImageStat.Stat(difference.crop(part)).mean for part in ((0, 0, 16, 64), (44, 0, 64, 64))
    )
    assert sum(painted) > 3 * sum(other), (painted, other)


def _bytes(data: str) -> bytes:
    return base64.b64decode(data.partition(",")[2])


def _result(server: Running) -> Image.Image:
    job = server.client.get("/api/jobs?limit=1&state=done").json()["jobs"][0]
    return Image.open(io.BytesIO(server.client.get(f"/api/jobs/{job['id']}/images/0").content)).convert("RGB")


def test_a_reload_keeps_settings_pictures_and_the_last_result(reader):
    page = reader.open()
    drawn(page, "a star", guidance=3.5, negative="blurry")
    page.click("#stage [data-act=send-init]")
    page.wait_for_selector("#fold-start canvas")
    page.click("#fold-hires .label-wrap")
    page.fill("#hires_scale input", "1.5")
    before = kept(page)
    page.reload()
    page.wait_for_selector("#fold-start canvas")
    page.wait_for_selector("#stage figure a img")
    page.wait_for_load_state("networkidle")
    assert page.input_value("#prompt textarea") == "a star"
    assert page.input_value("#guidance input") == "3.5"
    assert page.input_value("#negative textarea") == "blurry"
    assert page.input_value("#seed textarea, #seed input") == "5"
    page.fill("#steps input", "")
    assert kept(page) == before | {"steps": None}


def test_a_running_job_is_followed_again_after_a_reload(reader):
    page = reader.open()
    page.fill("#prompt textarea", "a fox")
    page.fill("#steps input", "300")
    page.click("#draw")
    page.wait_for_selector("#stage progress")
    page.wait_for_timeout(400)
    page.reload()
    page.wait_for_selector("#stage progress")
    page.click("#cancel")
    page.wait_for_selector("#draw:visible")


def test_korean_first_by_the_browser_then_by_choice(browser, server):
    with reading(browser, server.url, locale="ko-KR") as reader:
        page = reader.open()
        assert page.url.endswith("/ko/") and page.evaluate("document.documentElement.lang") == "ko"
        assert page.inner_text("#draw") == "그리기"
        drawn(page, "여우, 3d")
        assert "그림 1장" in page.inner_text("#stage .walk")
        page.fill("#steps input", "5000")
        page.click("#draw")
        page.wait_for_selector("#notice [role=alert]")
        assert page.inner_text("#notice") == (
            "쓸 수 없는 값이 있습니다: steps: input should be less than or equal to 1000 (got 5000)"
        )
        page.click("#head [data-language=en]")
        page.wait_for_url("**/en/")
        page.wait_for_selector("#stage figure a img")
        assert page.input_value("#prompt textarea") == "여우, 3d", "what was set goes along"
        page.goto(server.url)
        assert page.url.endswith("/en/"), "the choice is remembered"
        assert not reader.foreign() and reader.complained == []


WEIGHTS = [
    # text with the cursor as | or the selection in [ ], times 0.05, and what comes of it
    ("a f|ox, 3d", 1, "a (fox:1.05), 3d"),
    ("a f|ox, 3d", -2, "a (fox:0.9), 3d"),
    ("a (f|ox:1.05), 3d", 1, "a (fox:1.1), 3d"),
    ("a (f|ox:1.05), 3d", -1, "a fox, 3d"),
    ("a (red f|ox:1.3), 3d", 1, "a (red fox:1.35), 3d"),
    ("a [red fox], 3d", 1, "a (red fox:1.05), 3d"),
    ("a ([red fox]:1.2), 3d", -1, "a (red fox:1.15), 3d"),
    ("a [ fox ]!", 1, "a  (fox:1.05) !"),
    ("빨간 여|우, 3d", 1, "빨간 (여우:1.05), 3d"),
    ("a <lora:ink|:0.8> fox", 1, "a <lora:ink:0.85> fox"),
    ("<lora:ink:1|:lbw=MIDD>", -1, "<lora:ink:0.95:lbw=MIDD>"),
    ("(a (b|:1.1):1.2)", 1, "(a (b:1.15):1.2)"),
    (r"\(f|ox\)", 1, r"\((fox:1.05)\)"),
    ("a , | b", 1, None),
    ("|", 1, None),
]


@pytest.mark.parametrize(("text", "times", "after"), WEIGHTS)
def test_keys_weigh_words(reader, text, times, after):
    page = reader.page
    if page.url == "about:blank":
        reader.open()
    marks = [match.start() for match in re.finditer(r"\||(?<!\\)[\[\]]", text)]
    plain = re.sub(r"\||(?<!\\)[\[\]]", "", text)
    start, end = marks[0], marks[-1] - (len(marks) - 1)
    page.fill("#prompt textarea", plain)
    page.evaluate(
        "([a, b]) => document.querySelector('#prompt textarea').setSelectionRange(a, b)", [start, end]
    )
    for _ in range(abs(times)):
        page.press("#prompt textarea", "Control+ArrowUp" if times > 0 else "Control+ArrowDown")
    assert page.input_value("#prompt textarea") == (plain if after is None else after)
    if after is not None:
        for _ in range(abs(times)):
            page.press("#prompt textarea", "Control+z")
        assert page.input_value("#prompt textarea") == plain, "undo takes it back"


def test_the_keyboard_is_enough(reader):
    page = reader.open()
    page.focus("#prompt textarea")
    page.keyboard.type("a fox")
    visited = []
    for _ in range(12):
        page.keyboard.press("Tab")
        visited.append(page.evaluate("document.activeElement.closest('[id]').id || ''"))
    assert [
        each
        for each in visited
        if each in ("negative", "draw", "steps", "guidance", "count", "width", "height", "seed")
    ] == [
        *("negative", "draw", "steps", "guidance", "count", "width", "height", "seed"),
    ]
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('#tabs :is(button, input, textarea, select)')]
        .filter((e) => e.checkVisibility() && !e.closest('[aria-hidden=true]') && e.type !== 'file')
        .filter((e) => !(e.innerText || e.ariaLabel || e.title || e.labels?.length || e.placeholder))
        .map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert unnamed == []


@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_phone_shows_it_without_scrolling_sideways(browser, server, language):
    with reading(browser, server.url, **PHONE) as reader:
        page = reader.open(f"/{language}/")
        drawn(page, "a very " * 30 + "longwordwithoutanyspaceinitthatgoesonandonandonandonandon")
        for fold in ("model", "start", "control", "hires", "replay", "further"):
            page.click(f"#fold-{fold} .label-wrap")
        assert reader.wide() == 0
        tabs = page.locator("#tabs > .tab-wrapper [role=tab]")
        assert tabs.count() == 5
        for place in range(1, 5):
            tabs.nth(place).click()
            page.wait_for_timeout(500)
            assert reader.wide() == 0, place
            if place == 1:
                page.locator("#gallery-wall .wall button").first.click()
                page.wait_for_selector("#gallery-detail .lines")
                assert reader.wide() == 0
        assert (
            min(
                page.evaluate(
                    "[...document.querySelectorAll('#head .switches > *')].map(e => e.offsetHeight)"
                )
            )
            >= 36
        )


def test_light_and_dark(browser, server):
    with reading(browser, server.url, color_scheme="dark") as reader:
        page = reader.open()

        def paper() -> str:
            return page.evaluate("getComputedStyle(document.body).backgroundColor")

        assert paper() == "rgb(23, 22, 20)"
        page.click("#head [data-theme]")
        assert paper() == "rgb(250, 249, 245)"
        page.reload()
        page.wait_for_selector("#prompt textarea")
        assert paper() == "rgb(250, 249, 245)", "the choice is remembered"


def test_a_grid_is_drawn_and_exported(reader):
    page = reader.open()
    page.fill("#prompt textarea", "a fox, 3d style")
    tab(page, "Compare")
    page.fill("#across-values textarea", "2, 3")
    page.fill("#down-values textarea", "1-3:1")
    page.click("#compare-draw")
    page.wait_for_selector("#compare-cancel:visible")
    page.wait_for_selector("#compare-draw:visible", timeout=90_000)
    assert page.locator("#compare-grid td img").count() == 6
    assert page.inner_text("#compare-grid [role=status]") == "6 of 6 drawn"
    files = {}
    for kind in ("png", "csv", "json"):
        with page.expect_download() as download:
            page.click(f"#compare-grid a[download$={kind}]")
        files[kind] = download.value.path().read_bytes()
    sheet = Image.open(io.BytesIO(files["png"]))
    assert sheet.width > 2 * 128 and sheet.height > 3 * 128
    assert files["csv"].decode("utf-8-sig").count("\n") == 7
    assert [each["place"] for each in json.loads(files["json"])["pictures"]][:2] == [
        {"Steps": "Steps 2", "Seed": "Seed 1"},
        {"Steps": "Steps 3", "Seed": "Seed 1"},
    ]
    page.locator("#compare-grid td button").nth(1).click()
    page.wait_for_selector("#draw:visible")
    assert page.input_value("#steps input") == "3", "a picture of the grid is sent to Create"


def test_the_gallery_tells_what_made_a_picture_and_sends_it(reader):
    page = reader.open()
    drawn(page, "a star, 3d style <b>", guidance=2.5)
    page.fill("#prompt textarea", "something else")
    tab(page, "Gallery")
    page.locator("#gallery-wall .wall button").first.click()
    page.wait_for_selector("#gallery-detail .lines")
    lines = page.inner_text("#gallery-detail .lines")
    assert "a star, 3d style <b>" in lines and "Apache-2.0" in lines and "2.5" in lines
    assert json.loads(page.locator("#gallery-detail pre").text_content())["settings"]["guidance"] == 2.5
    with page.expect_download() as download:
        page.click("#gallery-detail a[download]")
    assert "sumuk" in Image.open(download.value.path()).info
    page.click("#gallery-detail [data-act=send-all]")
    page.wait_for_selector("#draw:visible")
    assert page.input_value("#prompt textarea") == "a star, 3d style <b>"
    assert page.input_value("#guidance input") == "2.5"


def test_a_dropped_png_fills_the_fields(reader, server, tmp_path):
    job = server.draw(prompt="a cat", seed=9, guidance=3.0, clip_skip=1, rescale=0.3)
    png = server.client.get(f"/api/jobs/{job['id']}/images/0").content
    (tmp_path / "cat.png").write_bytes(png)
    page = reader.open()
    page.click("#fold-replay .label-wrap")
    page.set_input_files("#fold-replay input[type=file]", tmp_path / "cat.png")
    page.wait_for_selector("#notice .notice")
    assert page.input_value("#prompt textarea") == "a cat"
    assert json.loads(page.input_value("#further textarea"))["rescale"] == 0.3
    assert "Settings taken over: prompt" in page.inner_text("#notice")
    page.click("#draw")
    page.wait_for_selector("#stage figure a img", timeout=60_000)
    page.wait_for_selector("#draw:visible")
    assert page.inner_text("#notice").strip() == ""
    first = Image.open(io.BytesIO(png)).convert("RGB")
    assert ImageChops.difference(first, _result(server)).getbbox() is None, "the same picture"
    # What says nothing of itself is told, and so is what cannot be taken over.
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.set_input_files("#fold-replay input[type=file]", tmp_path / "plain.png")
    page.wait_for_selector("#notice [role=alert]")
    assert "carries neither a Sumuk receipt" in page.inner_text("#notice")
    init = server.client.post(
        "/api/jobs",
        json={
            "request": {"prompt": "a", "steps": 2, "init": base64.b64encode(png).decode(), "strength": 0.5}
        },
    ).json()
    server.ended(init["id"])
    (tmp_path / "init.png").write_bytes(server.client.get(f"/api/jobs/{init['id']}/images/0").content)
    page.set_input_files("#fold-replay input[type=file]", tmp_path / "init.png")
    page.wait_for_selector("#notice li")
    assert page.inner_text("#notice li").startswith("init")


def test_pickers_tell_what_they_offer(reader):
    page = reader.open()
    page.click("#fold-model .label-wrap")
    assert "Stable Diffusion 1.x" in page.inner_text("#card")
    page.click("#loras input")
    page.locator("#loras [role=option]", has_text="porcelain").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('<lora:porcelain:1>')")
    page.wait_for_function("document.querySelector('#card').innerText.includes('porcelain')")
    page.click("#model input")
    page.locator("#model [role=option]", has_text="second").click()
    page.wait_for_function("document.querySelector('#card .card-name').innerText === 'second'")
    drawn(page, "a fox <lora:porcelain:0.5>")
    assert page.locator("#stage figure a img").count() == 1, page.inner_text("#notice")


def test_the_queue_shows_places_and_stops_jobs(reader, server):
    jobs = [
        server.client.post("/api/jobs", json={"request": {"prompt": f"job {n}", "steps": 900}}).json()["id"]
        for n in range(4)
    ]
    page = reader.open()
    tab(page, "Queue")
    page.wait_for_selector("#queue .jobs >> text=job 3")
    page.wait_for_function("document.querySelector('#queue').innerText.includes('before it')")
    for _ in jobs:
        page.locator("#queue [data-act=cancel]").first.click()
        page.wait_for_timeout(300)
    page.wait_for_function(
        "document.querySelector('#queue').innerText.includes('Nothing is running or waiting')"
    )
    assert all(server.client.get(f"/api/jobs/{job}").json()["state"] == "cancelled" for job in jobs)


def test_the_workshop_works_on_the_shelf(reader, server):
    page = reader.open()
    tab(page, "Workshop")

    def pick(place: str, name: str) -> None:
        page.click(f"#{place} input")
        page.locator(f"#{place} [role=option]", has_text=name).first.click()

    pick("inspect-file", "first")
    page.click("#inspect-run")
    page.wait_for_selector("#work-notice >> text=Done.", timeout=60_000)
    assert "Stable Diffusion 1.x" in page.inner_text("#work-output")
    page.get_by_role("tab", name="Merge").click()
    pick("merge-first", "first")
    pick("merge-second", "second")
    page.fill("#merge-name :is(input, textarea)", "../evil")
    page.click("#merge-run")
    page.wait_for_selector("#work-notice [role=alert]")
    assert "no name for a file" in page.inner_text("#work-notice")
    page.fill("#merge-name :is(input, textarea)", "mixed")
    page.click("#merge-run")
    page.wait_for_selector("#work-notice >> text=mixed.safetensors is on the shelf", timeout=120_000)
    assert "mixed" in server.client.get("/api/models").text
    page.click("#merge-run")
    page.wait_for_selector("#work-notice >> text=There is already a mixed.safetensors")


def test_a_page_outlives_its_server(browser, tmp_path):
    with running(tmp_path / "state", page=True) as first:
        port = first.url.rpartition(":")[2]
        with reading(browser, first.url) as reader:
            page = reader.open()
            drawn(page, "a star")
            first.stop()
            page.click("#draw")
            page.wait_for_selector("text=Connection to the server was lost")
            with running(tmp_path / "state", "--port", port, page=True):
                page.wait_for_load_state("networkidle")
                page.wait_for_timeout(5000)  # it may load itself anew
                drawn(page, "a heart")
                assert "1 picture" in page.inner_text("#stage .walk")


def test_behind_a_token_everybody_sees_their_own(browser, tmp_path):
    tokens = {"ann": "a" * 16, "ben": "b" * 16}
    backend = ToyBackend(turn=0.1, steps=4)
    with toy_running(tmp_path / "state", backend, page=True, tokens=tokens) as toy:
        for name, count in (("ann", 1), ("ben", 0)):
            with reading(browser, toy.url) as reader:
                page = reader.page
                page.goto(toy.url)
                page.fill("#token", tokens[name])
                page.keyboard.press("Enter")
                page.wait_for_selector("#prompt textarea")
                page.wait_for_load_state("networkidle")
                if count:
                    drawn(page, "a fox")
                    assert page.locator("#stage figure a img").evaluate(
                        "async (i) => (await i.decode(), i.naturalWidth)"
                    )
                tab(page, "Gallery")
                assert page.locator("#gallery-wall .wall button").count() == count
                assert reader.foreign() == [] and reader.complained == []
