"""Bad calls, as bytes for a socket: every kind that the reliability notes of this field list, each with what may come.

``cases(place)`` makes them for a running server; :func:`blow` sends one and says what is wrong with the answer. A bad
call is answered with a problem of 4xx, soon, and never with 5xx; a few are only odd and may be taken.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.serve.hostile_pictures import HOSTILE, ODD, pattern, png, saved
from tests.serve.wire_raw import Said, call, exchange

JOBS, OPENAI, A1111, IMG2IMG = "/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
EDITS = "/v1/images/edits"
SOON = 0.25
"""Seconds in which a bad call is answered."""


@dataclass(frozen=True)
class Place:
    """Where the calls go.

    Attributes:
        url: of the server.
        token: of a key of it; empty: it has none.
        job: id of a job of another key's.
        trap: port of a listener that nobody may be led to.
        body_bytes: the most that the server takes.
    """

    url: str
    token: str = ""
    job: str = "0" * 32
    trap: int = 9
    body_bytes: int = 64 * 2**20

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *heads: tuple[str, str],
        host: str | None = None,
        kind: str | None = "application/json",
    ) -> bytes:
        shown = [("Authorization", f"Bearer {self.token}")] if self.token else []
        return call(method, path, body, [*shown, *heads], host=self.host if host is None else host, kind=kind)

    def post(self, path: str, value: Any, *heads: tuple[str, str]) -> bytes:
        return self.call("POST", path, json.dumps(value).encode(), *heads)


@dataclass(frozen=True)
class Case:
    """One bad call.

    Attributes:
        group: what it is about.
        name: which one.
        make: its bytes.
        odd: it may be taken: 2xx and 3xx are right as well.
        closed: no answer is right as well, since the call is not whole.
        finish: our side is closed after it.
    """

    group: str
    name: str
    make: Callable[[], bytes]
    odd: bool = False
    closed: bool = False
    finish: bool = False

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


def blow(place: Place, case: Case) -> tuple[Said, str]:
    """Send a call; the answer, and what is wrong with it (empty: nothing)."""
    said = exchange(place.url, case.make(), finish=case.finish)
    if said.status == 0:
        return said, "" if case.closed else "no answer"
    if case.odd and 200 <= said.status < 400:
        return said, ""
    if not 400 <= said.status < 500:
        return said, f"status {said.status}: {said.body[:200]!r}"
    if not said.problem or said.json["status"] != said.status or not said.json["detail"].strip():
        return said, f"no problem: {said.heads.get('content-type')} {said.body[:200]!r}"
    if "Traceback" in said.body.decode() or "/site-packages/" in said.body.decode():
        return said, f"it shows the server's insides: {said.body[:300]!r}"
    return said, ""


def cases(place: Place) -> list[Case]:
    """All of them."""
    some = (_bodies, _parameters, _prompts, _paths, _urls, _pictures, _browsers, _headers)
    return [case for make in some for case in make(place)]


def _bodies(place: Place) -> Iterator[Case]:
    long = place.body_bytes + 1
    raw: dict[str, Any] = {
        "empty": b"",
        "spaces": b"  \n ",
        "not JSON": b"{'a': 1}",
        "half": b'{"request": {"prompt": "a',
        "a list": b"[]",
        "null": b"null",
        "no field": b"{}",
        "100,000 deep": b'{"request":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "100,000 deep, open": b'{"a":' * 100_000,
        "a name twice": b'{"request": {"prompt": "a", "prompt": "b"}}',
        "NaN": b'{"request": {"guidance": NaN}}',
        "Infinity": b'{"request": {"guidance": Infinity}}',
        "-Infinity": b'{"request": {"guidance": -Infinity}}',
        "1e400": b'{"request": {"guidance": 1e400}}',
        "10,000 digits": b'{"request": {"seed": ' + b"7" * 10_000 + b"}}",
        "half a character": b'{"request": {"prompt": "\\ud800"}}',
        "half a character in a name": b'{"request": {"\\udc00": 1}}',
        "NUL": b'{"request": {"prompt": "a\\u0000b"}}',
        "NUL as a byte": b'{"request": {"prompt": "a\0b"}}',
        "no UTF-8": b'{"request": {"prompt": "\xff\xfe"}}',
        "UTF-16": '{"request": {}}'.encode("utf-16"),
        "a byte order mark": b'\xef\xbb\xbf{"request": {}}',
        "two documents": b'{"request": {}}{"request": {}}',
        "a million values": b'{"request": [' + b"0," * 10**6 + b"0]}",
    }
    for path in (JOBS, OPENAI, A1111):
        for name, body in raw.items():
            # A1111's own answer to {} is a picture of nothing in particular
            if not (path == A1111 and name == "no field"):
                yield Case(
                    "body", f"{path} {name}", lambda path=path, body=body: place.call("POST", path, body)
                )
        yield Case(
            "body",
            f"{path} too long",
            lambda path=path: place.call("POST", path, b'{"a":"' + b"x" * (long - 8) + b'"}'),
        )
        yield Case(
            "body",
            f"{path} as text",
            lambda path=path: place.call("POST", path, b'{"request":{}}', kind="text/plain"),
        )
        yield Case(
            "body",
            f"{path} a gzip bomb",
            lambda path=path: place.call(
                "POST", path, gzip.compress(bytes(10**7)), ("Content-Encoding", "gzip")
            ),
        )
    good = b'{"request":{}}'
    chunked = ("Transfer-Encoding", "chunked")
    ends = {
        "longer than all": place.call("POST", JOBS, good, ("Content-Length", str(10**15))),
        "two lengths": place.call("POST", JOBS, good, ("Content-Length", "14"), ("Content-Length", "15")),
        "a negative length": place.call("POST", JOBS, good, ("Content-Length", "-1")),
        "a length in words": place.call("POST", JOBS, good, ("Content-Length", "some")),
        "length and chunks": place.call("POST", JOBS, b"0\r\n\r\n", ("Content-Length", "5"), chunked),
        "chunks that are none": place.call("POST", JOBS, b"xyz\r\n", chunked),
        "another transfer coding": place.call("POST", JOBS, good, ("Transfer-Encoding", "gzip")),
        "a length too short": place.call("POST", JOBS, good, ("Content-Length", "5")),
        "a body without a kind": place.call("POST", JOBS, good, kind=None),
        "a GET with a body": place.call("GET", JOBS, good),
    }
    for name, sent in ends.items():
        yield Case("body", name, lambda sent=sent: sent)
    unfinished = {
        "a length too long": place.call("POST", JOBS, good, ("Content-Length", "50")),
        "chunks without end": place.call("POST", JOBS, b"5\r\n{    \r\n" * 50, chunked),
        "headers without end": b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n",
    }
    for name, sent in unfinished.items():
        yield Case("body", name, lambda sent=sent: sent, closed=True, finish=True)


def _parameters(place: Place) -> Iterator[Case]:
    sizes = (0, -8, 7, 2**31, 2**63, 1e308, 512.5, "512", True, [512], {"a": 1})
    wrong: dict[str, tuple[Any, ...]] = {
        "width": sizes,
        "height": sizes,
        "steps": (0, -1, 10**6, 2.5, "20", True),
        "count": (0, -1, 10**6, True),
        "seed": (-1, 2**64, 10**24, 0.5, "7"),
        "guidance": (-1, 1e6, "7", True),
        "solver": ("no such", "", 7, "../x", "\u202eeuler"),
        "grid": ("no such", []),
        "no such field": (1,),
        "__class__": ("x",),
        "init": ("", "====", 7),
        "mask": ("A",),
        "strength": (-0.1, 1.1, "1"),
        "loras": ([{"name": "no such"}], [{"name": "x", "weight": 1e9}], "x", [[]] * 3),
        "steer": ([{"control": "x"}], "x"),
        "hires": ({"scale": 100}, {"scale": 2, "x": 1}, 2),
        "clip_skip": (0, 13),
        "original": ([1], [1, 2, 3], [0, 0]),
    }
    for field, values in wrong.items():
        for value in values:
            body = {"request": {field: value}}
            yield Case("parameter", f"{JOBS} {field}={value!r:.40}", lambda body=body: place.post(JOBS, body))
            if field in ("width", "height", "steps", "seed", "no such field"):
                # -1 is A1111's word for any seed; its sizes are rounded as there
                if (field, value) in (("seed", -1),) or value == 7:
                    continue
                body = {field: value, "steps": 1} | {field: value}
                yield Case(
                    "parameter", f"{A1111} {field}={value!r:.40}", lambda body=body: place.post(A1111, body)
                )
    for null in ("width", "steps", "seed", "solver", "init"):
        body = {"request": {null: None, **({"steps": 1} if null != "steps" else {})}}
        yield Case("parameter", f"{null}=null", lambda body=body: place.post(JOBS, body), odd=True)
    whole = [
        (JOBS, {"request": {"width": 8192, "height": 8192, "steps": 1000, "count": 64}}),
        (JOBS, {"request": {}, "no such field": 1}),
        (JOBS, {"request": {}, "deadline": 0}),
        (JOBS, {"request": {}, "deadline": -1}),
        (JOBS, {"request": {}, "deadline": "soon"}),
        (JOBS, {"request": []}),
        (JOBS, {"request": {"mask": base64.b64encode(png()).decode()}}),
        (A1111, {"width": 8192, "height": 8192, "steps": 1000, "batch_size": 64}),
        (A1111, {"batch_size": 10**6}),
        (A1111, {"n_iter": 10**6}),
        (A1111, {"batch_size": 64, "n_iter": 64}),
        (A1111, {"cfg_scale": 1e300}),
        (A1111, {"sampler_name": "no such"}),
        (A1111, {"seed": -2}),
        (A1111, {"script_name": "../x.py"}),
        (A1111, {"alwayson_scripts": {"no such": {"args": []}}}),
        (A1111, {"alwayson_scripts": {"controlnet": {"args": [[]] * 10_000}}}),
        (A1111, {"override_settings": {"outdir_samples": "/etc"}}),
        (A1111, {"steps": 1, "styles": ["x"]}),
        (IMG2IMG, {"init_images": []}),
        (IMG2IMG, {"init_images": [base64.b64encode(png()).decode()] * 1000}),
        ("/sdapi/v1/options", {"sd_model_checkpoint": "no such"}),
        ("/sdapi/v1/options", {"no such": 1}),
        ("/sdapi/v1/extra-single-image", {"image": "", "upscaling_resize": 1e9}),
        ("/sdapi/v1/png-info", {"image": "<script>"}),
        ("/sdapi/v1/interrogate", {}),
        (OPENAI, {"prompt": "a", "size": "8x8x8"}),
        (OPENAI, {"prompt": "a", "size": "99999x99999"}),
        (OPENAI, {"prompt": "a", "size": "-8x8"}),
        (OPENAI, {"prompt": "a", "size": 512}),
        (OPENAI, {"prompt": "a", "n": 10**6}),
        (OPENAI, {"prompt": "a", "n": 0}),
        (OPENAI, {"prompt": "a", "n": True}),
        (OPENAI, {"prompt": 7}),
        (OPENAI, {"prompt": None}),
        (OPENAI, {"prompt": "a", "quality": "no such"}),
        (OPENAI, {"prompt": "a", "style": "vivid"}),
        (OPENAI, {"prompt": "a", "partial_images": 99, "stream": True}),
        (OPENAI, {"prompt": "a", "sumuk": {"no such": 1}}),
        (OPENAI, {"prompt": "a", "sumuk": {"steps": 10**6}}),
        (OPENAI, {"prompt": "a", "model": "dall-e-3" * 100}),
        ("/api/receipts", {"picture": "<script>"}),
    ]  # fmt: skip
    for path, body in whole:
        name = f"{path} {json.dumps(body):.70}"
        # interrogate answers 501 by right: there is nothing to do it with
        if path != "/sdapi/v1/interrogate":
            yield Case("parameter", name, lambda path=path, body=body: place.post(path, body))
    for query in (
        "limit=0",
        "limit=10000",
        "limit=x",
        "state=no",
        "before=%00",
        "before=" + "a" * 300,
        "limit=1&limit=2",
    ):
        odd = query.startswith("limit=1&")
        yield Case(
            "parameter", f"GET {query:.30}", lambda query=query: place.call("GET", f"{JOBS}?{query}"), odd=odd
        )


def _prompts(place: Place) -> Iterator[Case]:
    refused = {
        "a megabyte": "fox " * 250_000,
        "a megabyte of one word": "a" * 10**6,
        "100,000 (": "(" * 100_000,
        "100,000 [a|": "[a|" * 100_000,
        "100,000 :1.1": ":1.1" * 100_000,
        "100,000 ((...))": "(" * 50_000 + ")" * 50_000,
        "a weight of 9e999": "(a:9e999)",
        "a LoRA from elsewhere": "fox <lora:../../x:1>",
        "a LoRA by a whole path": "<lora:/etc/passwd:1>",
        "a LoRA that is not there": "<lora:no such:1>",
        "10,000 LoRAs": "<lora:x:1>" * 10_000,
    }
    odd = {
        "4,000 (": "(" * 4000,
        "4,000 [a|": "[a|" * 4000,
        "4,000 :1.1": ":1.1" * 4000,
        "4,000 BREAK": "BREAK " * 3000,
        "a wildcard that names itself": "__a__ {a|{a|{a|__a__}}}",
        "other directions of text": "\u202e\u2066fox\u2069\u202c",
        "nothing visible": "\u200b\u200d\ufeff" * 100,
        "marks on marks": "a" + "\u0301" * 5000,
        "a weight that is none": "(a:nan) (a:) (a:1.2.3)",
        "a script": "<script>alert(1)</script>",
        "a template": "{{7*7}} ${7*7} %s %n",
        "emoji": "👩‍👩‍👧‍👦" * 500,
    }
    for name, text in refused.items():
        yield Case(
            "prompt", name, lambda text=text: place.post(JOBS, {"request": {"prompt": text, "steps": 1}})
        )
        body = {"negative_prompt": text, "steps": 1, "cfg_scale": 7}
        yield Case("prompt", f"not {name}", lambda body=body: place.post(A1111, body))
    for name, text in odd.items():
        body = {"request": {"prompt": text, "steps": 1, "guidance": 1.0}}
        yield Case("prompt", name, lambda body=body: place.post(JOBS, body), odd=True)


NAMES = (
    "../", "..", "../../../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2fetc%2fpasswd", "..%5c..%5cx",
    "%252e%252e%252f", "/etc/passwd", "%2fetc%2fpasswd", "C:%5cx", "C:/x", "%5c%5chost%5cx", "//host/x", "%00", "a%00b",
    "CON", "nul.safetensors", "a" * 300, "." * 300, "%ff%fe", "%e2%80%ae", "~", "~root", "$HOME", "x;y", "*",
    "file:%2f%2f%2fetc%2fpasswd", "linked", "linked.safetensors", "%0d%0aX:y", "-rf",
)  # fmt: skip
"""What stands where a name or an id belongs; ``linked`` is a link out of the shelf, if there is one."""


def _paths(place: Place) -> Iterator[Case]:
    for name in NAMES:
        for path in (f"/api/jobs/{name}", f"/api/jobs/{name}/images/0", f"/api/jobs/{name}/events",
                     f"/api/models/{name}", f"/v1/models/{name}", f"/v1/images/files/{name}/0.png"):  # fmt: skip
            # what climbs above the address may well meet another one that is there: a list
            climbs = name.startswith("..") or name.startswith("%2e%2e%2f")
            yield Case("path", f"GET {path:.60}", lambda path=path: place.call("GET", path), odd=climbs)
        yield Case(
            "path", f"cancel {name:.40}", lambda name=name: place.call("POST", f"/api/jobs/{name}/cancel")
        )
        yield Case(
            "path", f"load {name:.40}", lambda name=name: place.call("POST", f"/api/models/{name}/load")
        )
    plain = ["../x", "../../etc/passwd", "/etc/passwd", "..\\x", "C:\\x", "\\\\host\\x", "a\x7fb", "CON", "a" * 300,
             "linked", "", ".", "x/../../y", "file:///etc/passwd", f"http://127.0.0.1:{place.trap}/x"]  # fmt: skip
    for name in plain:
        for field in ("model", "vae", "refiner"):
            body = {"request": {"steps": 1}, field: name}
            yield Case("path", f"{field}={name!r:.40}", lambda body=body: place.post(JOBS, body))
        control = {"request": {"steps": 1, "steer": [{"control": "c", "hint": base64.b64encode(png()).decode()}]},
                   "controls": {"c": name}}  # fmt: skip
        yield Case("path", f"controls={name!r:.40}", lambda body=control: place.post(JOBS, body))
        if name:
            settings = {"steps": 1, "override_settings": {"sd_model_checkpoint": name}}
            yield Case("path", f"checkpoint={name!r:.40}", lambda body=settings: place.post(A1111, body))
    for path in ("", "/events", "/images/0", "/images/0/receipt"):
        yield Case(
            "path",
            f"another's job{path}",
            lambda path=path: place.call("GET", f"/api/jobs/{place.job}{path}"),
        )
    yield Case("path", "cancel another's job", lambda: place.call("POST", f"/api/jobs/{place.job}/cancel"))
    yield Case("path", "delete another's job", lambda: place.call("DELETE", f"/api/jobs/{place.job}"))
    yield Case("path", "another's file", lambda: place.call("GET", f"/v1/images/files/{place.job}/0.png"))
    for path in ("/api/jobs/x/images/-1", "/api/jobs/x/images/1e9", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd",
                 "/static/../../../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/assets/..%2f..%2fx", "/.env",
                 "/.git/config", "/api", "/v1", "/sdapi/v1/no", "/" + "a" * 3000, "/" + "%2f" * 1000,
                 "/docs/../api/jobs/x", f"/gradio_api/proxy=http://127.0.0.1:{place.trap}/",
                 f"/gradio_api/file=http://127.0.0.1:{place.trap}/"):  # fmt: skip
        yield Case("path", f"GET {path:.60}", lambda path=path: place.call("GET", path))
    for method in ("PUT", "PATCH", "TRACE", "PROPFIND", "GARBAGE"):
        yield Case("path", f"{method} {JOBS}", lambda method=method: place.call(method, JOBS))


def _urls(place: Place) -> Iterator[Case]:
    trap = place.trap
    urls = (
        "file:///etc/passwd", "FILE:///etc/passwd", "gopher://127.0.0.1:6379/_x", f"http://127.1:{trap}/",
        f"http://[::ffff:127.0.0.1]:{trap}/", "http://169.254.169.254/latest/meta-data/", f"http://2130706433:{trap}/",
        f"http://0x7f000001:{trap}/", f"http://localhost:{trap}/redirect", f"http://user@127.0.0.1:{trap}/",
        f"http://example.org@127.0.0.1:{trap}/", f"https://127.0.0.1:{trap}/", f"//127.0.0.1:{trap}/x",
        f"  http://127.0.0.1:{trap}/", f"ftp://127.0.0.1:{trap}/", "data:text/html,<script>",
        "data:image/svg+xml;base64,PHN2Zz4=", "data:image/png;base64", "data:;base64,", "javascript:alert(1)", "blob:http://localhost/x",
        "/etc/passwd", "../x.png",
    )  # fmt: skip
    for url in urls:
        yield Case(
            "url", f"init={url:.50}", lambda url=url: place.post(JOBS, {"request": {"init": url, "steps": 1}})
        )
        yield Case(
            "url",
            f"init_images={url:.50}",
            lambda url=url: place.post(IMG2IMG, {"init_images": [url], "steps": 1}),
        )
        body = {"prompt": "a", "image": url}
        yield Case("url", f"image={url:.50}", lambda body=body: place.post(EDITS, body))
        receipt = {"picture": url}
        yield Case("url", f"receipt={url:.50}", lambda body=receipt: place.post("/api/receipts", body))


def _pictures(place: Place) -> Iterator[Case]:
    def job(data: bytes) -> bytes:
        return place.post(JOBS, {"request": {"init": base64.b64encode(data).decode(), "steps": 1}})

    def img2img(data: bytes) -> bytes:
        return place.post(IMG2IMG, {"init_images": [base64.b64encode(data).decode()], "steps": 1})

    def edit(data: bytes) -> bytes:
        parts = [b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n', b"--b\r\n",
                 b'Content-Disposition: form-data; name="image"; filename="../x.png"\r\n',
                 b"Content-Type: image/png\r\n\r\n",
                 data, b"\r\n--b--\r\n"]  # fmt: skip
        return place.call("POST", EDITS, b"".join(parts), kind="multipart/form-data; boundary=b")

    for number, (name, make) in enumerate(HOSTILE.items()):
        way = edit if "64 MB" in name else (job, img2img, edit)[number % 3]  # base64 would be too long
        yield Case("picture", f"{name} ({way.__name__})", lambda way=way, make=make: way(make()))
    sound = pattern(64, 64)
    odd = dict(ODD)
    for mode in ("CMYK", "L"):
        odd[f"jpeg {mode}"] = lambda mode=mode: saved(sound.convert(mode), "JPEG")
    for mode in ("P", "1", "LA", "RGBA", "I;16"):
        odd[f"png {mode}"] = lambda mode=mode: saved(
            sound.convert("L" if mode == "I;16" else mode).convert(mode), "PNG"
        )
    for name, make in odd.items():
        yield Case("picture", name, lambda make=make: job(make()), odd=True)
    small, large = (base64.b64encode(saved(pattern(side, side), "PNG")).decode() for side in (64, 72))
    mask = {"init": small, "mask": large, "steps": 1}
    yield Case("picture", "a mask of another size", lambda: place.post(JOBS, {"request": mask}))
    forms = {
        "a form without an end": b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na',
        "a form of nothing": b"",
        "a form without its boundary": b"hello",
        "1,000 files": b'--b\r\nContent-Disposition: form-data; name="image[]"; filename="x"\r\n\r\nx\r\n'
        * 1000
        + b"--b--\r\n",
        "10,000 fields": b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 10_000
        + b"--b--\r\n",
        "a header of a part without end": b"--b\r\nContent-Disposition: " + b"x" * 100_000,
    }
    for name, body in forms.items():
        kind = "multipart/form-data; boundary=b"
        yield Case("picture", name, lambda body=body, kind=kind: place.call("POST", EDITS, body, kind=kind))
    yield Case(
        "picture",
        "a form that names no boundary",
        lambda: place.call("POST", EDITS, b"x", kind="multipart/form-data"),
    )


def _browsers(place: Place) -> Iterator[Case]:
    good = b'{"request":{"steps":1}}'
    heads: list[tuple[str, str]] = [
        ("Origin", "null"), ("Origin", "https://evil.example"), ("Origin", "http://localhost:1"), ("Origin", "file://"),
        ("Origin", f"http://{place.host}.evil.example"), ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "same-site"),
    ]  # fmt: skip
    for name, value in heads:
        for path in (
            JOBS,
            A1111,
            OPENAI,
            "/api/models/miniature/load",
            "/sdapi/v1/interrupt",
            "/gradio_api/queue/join",
        ):
            yield Case(
                "browser",
                f"{path} {name}: {value}",
                lambda path=path, head=(name, value): place.call("POST", path, good, head),
            )
        yield Case(
            "browser",
            f"DELETE {name}: {value}",
            lambda head=(name, value): place.call("DELETE", "/api/jobs/x", None, head),
        )
    for host in (
        "evil.example",
        "localhost.evil.example:80",
        "169.254.169.254",
        "",
        "localhost@evil.example",
    ):
        yield Case("browser", f"Host: {host}", lambda host=host: place.call("POST", JOBS, good, host=host))
        yield Case("browser", f"GET Host: {host}", lambda host=host: place.call("GET", JOBS, host=host))
    forms = {
        "application/x-www-form-urlencoded": b"request=x",
        "multipart/form-data; boundary=b": b"--b--\r\n",
        "text/plain": good,
        "text/plain;application/json": good,
        "": good,
    }
    for kind, body in forms.items():
        for path in (JOBS, A1111, OPENAI):
            yield Case(
                "browser", f"{path} {kind}", lambda p=path, k=kind, b=body: place.call("POST", p, b, kind=k)
            )
    upgrade = (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13"),
               ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="), ("Origin", "https://evil.example"))  # fmt: skip
    for path in ("/", JOBS, "/gradio_api/queue/join"):
        yield Case("browser", f"websocket {path}", lambda path=path: place.call("GET", path, None, *upgrade))
    fetch = (("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "no-cors"), ("Sec-Fetch-Dest", "image"))
    yield Case(
        "browser",
        "a picture in another page",
        lambda: place.call("GET", f"/api/jobs/{place.job}/images/0", None, *fetch),
    )
    ask = (("Origin", "https://evil.example"), ("Access-Control-Request-Method", "POST"))
    yield Case("browser", "a preflight", lambda: place.call("OPTIONS", JOBS, None, *ask))


def _headers(place: Place) -> Iterator[Case]:
    host = place.host
    raw = {
        "CR in a value": f"GET /api/jobs HTTP/1.1\r\nHost: {host}\r\nX-A: a\rX-B: b\r\n\r\n",
        "LF in a name": f"GET /api/jobs HTTP/1.1\r\nHost: {host}\r\nX\nA: b\r\n\r\n",
        "NUL in a value": f"GET /api/jobs HTTP/1.1\r\nHost: {host}\r\nX-A: \0\r\n\r\n",
        "a name with a space": f"GET /api/jobs HTTP/1.1\r\nHost: {host}\r\nX A: b\r\n\r\n",
        "no name": f"GET /api/jobs HTTP/1.1\r\nHost: {host}\r\n: b\r\n\r\n",
        "no host": "GET /api/jobs HTTP/1.1\r\n\r\n",
        "two hosts": f"GET /api/jobs HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n\r\n",
        "HTTP/9.9": f"GET /api/jobs HTTP/9.9\r\nHost: {host}\r\n\r\n",
        "no HTTP": "hello\r\n\r\n",
        "another line in the address": f"GET /api/jobs\r\nX: y HTTP/1.1\r\nHost: {host}\r\n\r\n",
        "TLS": "\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + "\0" * 40 + "\r\n\r\n",
    }
    for name, text in raw.items():
        yield Case("header", name, lambda text=text: text.encode("latin-1"))
    lists = {
        "a cookie of 64 KB": [("Cookie", "a" * 65536)],
        "a cookie of 60 KB": [("Cookie", "a" * 60_000)],
        "a cookie of 1 MB": [("Cookie", "a" * 10**6)],
        "1,000 headers": [(f"X-{number}", "a") for number in range(1000)],
        "two tokens": [("Authorization", "Bearer x"), ("Authorization", "Bearer y")],
        "a key of 300 characters": [("Idempotency-Key", "k" * 300)],
        "an empty key": [("Idempotency-Key", "")],
    }
    for name, heads in lists.items():
        body = b'{"request":{"steps":1}}'
        yield Case("header", name, lambda heads=heads, body=body: place.call("POST", JOBS, body, *heads))
    if place.token:
        for number in range(3):
            heads = [("Authorization", f"Bearer guess-{number}"), ("X-Forwarded-For", f"10.0.0.{number}")]
            yield Case(
                "header", f"a guess {number}", lambda heads=heads: call("GET", JOBS, None, heads, host=host)
            )
        for path in (
            JOBS,
            "/v1/models",
            "/sdapi/v1/options",
            "/metrics",
            "/docs",
            "/openapi.json",
            "/api/openapi.json",
        ):
            yield Case("header", f"no token {path}", lambda path=path: call("GET", path, host=host))
