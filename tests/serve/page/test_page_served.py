"""The page over the toy backend: its addresses, what of the framework is shut, a first picture in a real browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.serve.page.conftest import reading
from tests.serve.toy_backend import ToyBackend
from tests.serve.toy_running import Toy, toy_running

pytest.importorskip("gradio", reason="the page is not installed: pip install 'sumuk[ui]'")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Iterator[Toy]:
    backend = ToyBackend(turn=0.15, steps=6)
    with toy_running(tmp_path_factory.mktemp("page") / "state", backend, page=True) as made:
        yield made


@pytest.mark.parametrize(
    ("accepts", "cookie", "language"),
    [
        ("ko-KR,ko;q=0.9,en;q=0.8", "", "ko"),
        ("en-US,en;q=0.9,ko;q=0.8", "", "en"),
        ("fr-FR,fr", "", "en"),
        ("ko", "en", "en"),
        ("en", "ko", "ko"),
        ("ko", "xx", "ko"),
    ],
)
def test_the_door_leads_to_the_readers_language(toy, accepts, cookie, language):
    headers = {"Accept-Language": accepts} | ({"Cookie": f"sumuk-language={cookie}"} if cookie else {})
    answer = toy.client.get("/", headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (307, f"/{language}/")
    html = toy.client.get(f"/{language}/", headers={"Accept": "text/html"})
    assert html.status_code == 200 and f'lang="{language}"' in html.text
    assert "https://" not in html.text.partition("window.gradio_config")[0], "the head names another site"


@pytest.mark.parametrize(
    "path",
    [
        "/en/gradio_api/file=/etc/passwd",
        "/en/gradio_api/file=http://127.0.0.1:1/x",
        "/en/gradio_api/proxy=http://127.0.0.1:1/x",
        "/ko/gradio_api/upload",
        "/en/gradio_api/call/draw",
        "/en/gradio_api/run/draw",
        "/en/gradio_api/queue/join",
        "/en/gradio_api/queue/data?session_hash=x",
        "/en/gradio_api/heartbeat/x",
        "/en/gradio_api/component_server",
        "/en/gradio_api/vibe-edit",
        "/en/gradio_api/info",
        "/en/monitoring",
        "/en/login",
        "/en/../en/gradio_api/upload",
        "/en//gradio_api/upload",
    ],
)
def test_what_the_page_does_not_use_of_the_framework_is_shut(toy, path):
    for method in ("GET", "POST"):
        answer = toy.client.request(method, path, **({"json": {}} if method == "POST" else {}))
        assert answer.status_code in (400, 404), (method, path, answer.status_code)
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"data": []},
        {"data": [], "fn_index": 10_000},
        {"data": [], "fn_index": -1},
        {"data": [None] * 99, "fn_index": 0, "session_hash": "x"},
        {"data": "x" * 1000, "fn_index": 0},
        {"data": [[[]]], "fn_index": {}, "session_hash": []},
        *(
            {
                "data": [{"path": path, "meta": {"_type": "gradio.FileData"}}] * 23,
                "fn_index": n,
                "session_hash": "x",
            }
            for n in range(6)
            for path in ("/etc/passwd", "http://127.0.0.1:1/x", "../../etc/passwd")
        ),
    ],
)
def test_a_call_that_the_page_does_not_make_is_a_mistake_of_the_caller(toy, body):
    answer = toy.client.post("/en/gradio_api/run/predict", json=body)
    assert answer.status_code < 500, answer.text
    assert "root:" not in answer.text
    assert toy.client.get("/en/").status_code == 200


def test_the_apis_come_before_the_page(toy):
    assert toy.client.get("/livez").status_code == 200
    assert toy.client.get("/v1/models").json()["object"] == "list"
    assert toy.client.get("/api/nothing").status_code == 404
    assert not any(
        path.startswith(("/page", "/en", "/ko"))
        for path in toy.client.get("/api/openapi.json").json()["paths"]
    )


def test_the_pages_files_come_from_here(toy):
    for name, kind in (("page.js", "javascript"), ("picture.js", "javascript"), ("look.css", "css")):
        answer = toy.client.get(f"/page/{name}")
        assert answer.status_code == 200 and kind in answer.headers["content-type"]
        assert "http://" not in answer.text.replace("http://www.w3.org", "") and "https://" not in answer.text
    assert toy.client.get("/page/icon.svg").headers["content-type"] == "image/svg+xml"
    assert toy.client.get("/page/words.py").status_code in (400, 404)
    assert toy.client.get("/page/kept/0123456789abcdef0123456789abcdef.png").status_code == 410
    assert toy.client.get("/page/kept/..%2f..%2fjobs.png").status_code in (404, 410)
    assert toy.client.get("/page/sheets/0123.png").status_code == 410


@pytest.mark.slow  # it imports the framework once more
def test_the_front_has_no_torch():
    """The page is built in this process; nothing of it may have brought the networks in."""
    code = "import sys, sumuk.serve.page.layout, sumuk.serve.page.routes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_first_picture_from_a_fresh_start(toy, browser):
    with reading(browser, toy.url) as reader:
        page = reader.open()
        assert page.title() == "수묵 Sumuk"
        page.fill("#prompt textarea", "a <b>fox</b> {{value}} ${1+1}")
        page.press("#prompt textarea", "Enter")
        page.wait_for_selector("#stage progress")
        page.wait_for_selector("#stage figure a img")
        assert (
            page.locator("#stage figure img").get_attribute("alt").endswith("a <b>fox</b> {{value}} ${1+1}")
        )
        natural = page.locator("#stage figure a img").evaluate(
            "async (i) => (await i.decode(), i.naturalWidth)"
        )
        assert natural == 64
        page.wait_for_selector("#draw:visible")
        # What is wrong is a sentence; the page goes on.
        page.fill("#steps input", "4.5")
        page.click("#draw")
        page.wait_for_selector("#notice [role=alert]")
        assert page.inner_text("#notice") == "A value is not allowed: steps '4.5' is no whole number"
        assert not reader.foreign() and not reader.complained
