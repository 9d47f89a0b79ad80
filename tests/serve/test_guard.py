"""The closed door by itself, on real sockets: hosts, pages, tokens, bodies, headers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.serve.doorway import PAGE, doorway
from tests.serve.wire_raw import Said, call, exchange

from sumuk.base.errors import BadInput
from sumuk.serve import http11
from sumuk.serve.body import DEEPEST, MOST_VALUES, Bodies, check_json
from sumuk.serve.config import ServeConfig
from sumuk.serve.guard import LARGE
from sumuk.serve.sites import Sites
from sumuk.serve.trouble import Refused

TOKEN, OTHER = "a-token-of-16-or-more", "토큰-토큰-토큰-토큰-토큰-토큰"
COUNTED: Counter[str] = Counter()


@pytest.fixture(scope="module")
def free() -> Iterator[str]:
    """A server without tokens, for this machine."""
    with doorway(
        lambda type: COUNTED.update([type]),
        hosts=("draw.example", "port.example:8443"),
        origins=("https://sso.example", "http://tool.example:3000"),
        body_bytes=100_000,
        body_seconds=0.5,
    ) as url:
        yield url


@pytest.fixture(scope="module")
def closed() -> Iterator[str]:
    """A server with two keys."""
    with doorway(tokens={"ann": TOKEN, "bo": OTHER}, proxies=("127.0.0.1", "10.1.0.0/16")) as url:
        yield url


def ask(url: str, method: str = "GET", path: str = "/api/x", body: bytes | None = None, **heads: str) -> Said:
    """A request with these headers; ``_`` in a name stands for ``-``."""
    host = heads.pop("host", url.removeprefix("http://"))
    kind = heads.pop("kind", "application/json")
    pairs = [(name.replace("_", "-"), value) for name, value in heads.items()]
    return exchange(url, call(method, path, body, pairs, host=host, kind=kind))


def basic(name: str, token: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()


# Hosts.


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:99", "127.0.0.1:1", "127.9.9.9", "[::1]:7860", "[::ffff:127.0.0.1]", "draw.example",
     "draw.example:1234", "draw.example.", "port.example"],
)  # fmt: skip
def test_own_names_pass(free: str, host: str):
    assert ask(free, host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:7860", "", "127.1",
     "2130706433", "[::ffff:169.254.169.254]", "10.0.0.1", "draw.example@evil.example", "draw.example/x",
     "localhost:99999999", "localhost:x", "a b", "0.0.0.0"],
)  # fmt: skip
def test_other_names_do_not(free: str, host: str):
    said = ask(free, host=host)
    assert (said.status, said.problem) == (421, "foreign-host")


def test_a_server_on_all_addresses_is_known_by_the_one_it_was_reached_at():
    sites = Sites(ServeConfig(host="0.0.0.0", tokens={"a": TOKEN}))
    sites.check_host({"host": ["192.168.1.5:7860"]}, "192.168.1.5")
    for host in ("192.168.1.6:7860", "evil.example"):
        with pytest.raises(Refused) as error:
            sites.check_host({"host": [host]}, "192.168.1.5")
        assert error.value.trouble.type == "foreign-host"


@pytest.mark.parametrize(
    "wrong",
    [{"origins": ("*",)}, {"origins": ("sso.example",)}, {"hosts": ("https://x",)}, {"proxies": ("proxy",)}],
)
def test_configurations_that_mean_nothing_are_refused(wrong: dict):
    with pytest.raises(BadInput):
        Sites(ServeConfig(**wrong))


# Pages of other sites.


def test_twelve_ways_of_another_site_change_nothing(free: str):
    """The promise of the reliability notes: origin, host and type, none of which may change state."""
    own = free.removeprefix("http://")
    foreign = [
        {"Origin": "null"},
        {"Origin": "https://evil.example"},
        {"Origin": f"https://{own}.evil.example"},
        {"Origin": "http://localhost:9"},  # another server of this machine
        {"Origin": ""},
        {"Origin": "http://draw.example:81"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
        {"Origin": "null", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "file://"},
        {"Origin": f"http://{own}@evil.example"},
    ]
    for heads in foreign:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            body = None if method == "DELETE" else b"{}"
            said = exchange(free, call(method, "/api/x", body, heads.items(), host=own))
            assert (said.status, said.problem) == (403, "foreign-origin"), (method, heads)
    twice = [("Origin", f"http://{own}"), ("Origin", "https://evil.example")]
    assert exchange(free, call("POST", "/api/x", b"{}", twice, host=own)).status == 403


def test_own_pages_and_programs_pass(free: str):
    own = free.removeprefix("http://")
    for heads in (
        {},
        {"Origin": free},
        {"Origin": free, "Sec-Fetch-Site": "same-origin"},
        {"Origin": f"https://{own}"},  # a proxy ended TLS and kept the host
        {"Origin": "https://draw.example"},  # a proxy named us by another host
        {"Origin": "https://port.example:8443"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin"},
    ):
        said = exchange(free, call("POST", "/api/x", b"{}", heads.items(), host=own))
        assert said.status == 200, heads
        assert "access-control-allow-origin" not in said.heads


def test_an_http_page_is_no_page_of_an_https_server():
    sites = Sites(ServeConfig())
    heads = {"host": ["localhost"], "origin": ["http://localhost"]}
    assert sites.check_origin("POST", "http", heads) is None
    with pytest.raises(Refused):
        sites.check_origin("POST", "https", heads)


def test_a_proxy_that_signs_people_in_works(free: str):
    said = ask(free, "POST", body=b"{}", Origin="https://sso.example", Sec_Fetch_Site="cross-site")
    assert said.status == 200
    assert said.heads["access-control-allow-origin"] == "https://sso.example"
    assert said.heads["vary"] == "Origin"
    assert ask(free, Origin="https://sso.example", Sec_Fetch_Site="cross-site").status == 200
    assert ask(free, "POST", body=b"{}", Origin="https://sso.example:444").status == 403


def test_preflights_are_answered_for_those_that_may(free: str):
    asks = {"Access_Control_Request_Method": "POST", "Sec_Fetch_Mode": "cors"}
    said = ask(free, "OPTIONS", Origin="http://tool.example:3000", **asks)
    assert said.status == 204
    assert said.heads["access-control-allow-origin"] == "http://tool.example:3000"
    assert "authorization" in said.heads["access-control-allow-headers"]
    for heads in ({"Origin": "https://evil.example"}, {"Origin": free}, {}):
        said = ask(free, "OPTIONS", **heads, **asks)
        assert said.status == 403 and "access-control-allow-methods" not in said.heads


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_pages_cannot_embed_or_read(free: str, site: str):
    for mode, dest in (
        ("no-cors", "image"),
        ("cors", "empty"),
        ("navigate", "iframe"),
        ("navigate", "object"),
    ):
        said = ask(free, Sec_Fetch_Site=site, Sec_Fetch_Mode=mode, Sec_Fetch_Dest=dest)
        assert (said.status, said.problem) == (403, "foreign-origin")
    followed = ask(free, Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document")
    assert followed.status == 200  # a link that somebody clicked


def test_websockets_are_refused(free: str):
    heads = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    for path in ("/", "/gradio_api/queue/join"):
        said = exchange(free, call("GET", path, None, heads.items(), host="localhost"))
        assert (said.status, said.problem) == (400, "bad-request")
    assert ask(free, Upgrade="h2c", Connection="Upgrade").status == 200  # what others offer is passed over


# Tokens.


def test_without_a_token_three_doors_are_open(closed: str):
    for path in ("/livez", "/readyz", "/login"):
        assert ask(closed, path=path).status == 200, path
    for path in ("/metrics", "/docs", "/openapi.json", "/", "/api/x", "/v1/models", "/sdapi/v1/options", "/config",
                 "/gradio_api/queue/data", "/logout", "/livez/", "//livez", "/login/x", "/LIVEZ", "/livez%00",
                 "/x/../livez", "/livez;x"):  # fmt: skip
        assert ask(closed, path=path).status in (401, 400), path
    said = ask(closed)
    assert said.problem == "no-token" and "Bearer" in said.heads["www-authenticate"]
    scripted = ask(closed, Sec_Fetch_Mode="cors", Sec_Fetch_Site="same-origin")
    assert "Basic" not in scripted.heads["www-authenticate"]  # or the browser would ask by itself


def test_tokens_name_their_owner(closed: str):
    for heads, owner in (
        ({"Authorization": f"Bearer {TOKEN}"}, "ann"),
        ({"Authorization": f"bearer  {TOKEN} "}, "ann"),
        ({"Authorization": basic("", TOKEN)}, "ann"),
        ({"Authorization": basic("whoever", OTHER)}, "bo"),
        ({"Authorization": "Bearer " + OTHER.encode().decode("latin-1")}, "bo"),
    ):
        said = ask(closed, **heads)
        assert said.json["owner"] == owner, heads


def test_two_tokens_are_one_too_many(closed: str, free: str):
    for url in (closed, free):
        heads = [("Authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")]
        said = exchange(url, call("GET", "/api/x", None, heads))
        assert (said.status, said.problem) == (400, "bad-request")


def test_whoever_guesses_is_stopped_and_cannot_pretend_to_be_many():
    with doorway(tokens={"ann": TOKEN}) as url:  # no proxy is believed here
        for number in range(10):
            said = ask(url, Authorization=f"Bearer wrong-{number}", X_Forwarded_For=f"10.0.0.{number}")
            assert (said.status, said.problem) == (401, "no-token")
            assert ask(url).status == 401  # showing none is no guess
        said = ask(url, Authorization=f"Bearer {TOKEN}", X_Forwarded_For="10.9.9.9")
        assert (said.status, said.problem) == (429, "too-many")
        assert 1 <= int(said.heads["retry-after"]) <= 60
        for wrong in ("Basic !!!", "Digest x", "Bearer"):
            assert ask(url, Authorization=wrong).status == 429


@pytest.mark.parametrize(
    ("peer", "said", "found"),
    [
        ("127.0.0.1", (), "127.0.0.1"),
        ("127.0.0.1", ("203.0.113.5",), "203.0.113.5"),
        ("127.0.0.1", ("1.1.1.1, 203.0.113.5, 10.1.2.3",), "203.0.113.5"),
        ("127.0.0.1", ("1.1.1.1", "203.0.113.5"), "203.0.113.5"),
        ("127.0.0.1", ("10.1.2.3",), "10.1.2.3"),
        ("127.0.0.1", ("203.0.113.5, x",), "127.0.0.1"),
        ("127.0.0.1", ("::ffff:203.0.113.5",), "203.0.113.5"),
        ("192.0.2.1", ("203.0.113.5",), "192.0.2.1"),
        (None, ("203.0.113.5",), "unknown"),
    ],
)
def test_addresses(peer: str | None, said: tuple[str, ...], found: str):
    sites = Sites(ServeConfig(proxies=("127.0.0.1", "10.1.0.0/16")))
    assert sites.address(peer, {"x-forwarded-for": list(said)}) == found


def test_the_caller_has_that_address(closed: str):
    said = ask(closed, Authorization=f"Bearer {TOKEN}", X_Forwarded_For="203.0.113.7")
    assert said.json["address"] == "203.0.113.7"


# The login page.


def enter(url: str, token: str) -> Said:
    return ask(url, "POST", "/login", json.dumps({"token": token}).encode())


def test_login_by_form_and_session(closed: str):
    page = ask(closed, path="/login")
    assert page.heads["content-type"].startswith("text/html") and "http" not in page.body.decode()
    assert "이 서버의 토큰" in page.body.decode() and "Token of this server" in page.body.decode()
    # A browser without a cookie is led there; what a script asks for is answered with a problem.
    led = ask(closed, path="/", Accept="text/html,*/*")
    assert (led.status, led.heads["location"]) == (303, "/login")
    assert ask(closed, path="/api/x", Accept="text/html").status == 401
    form = f"token={TOKEN}".encode()
    said = ask(closed, "POST", "/login", form, kind="application/x-www-form-urlencoded", Origin=closed)
    assert (said.status, said.heads["location"]) == (303, "/")
    cookie = said.heads["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    shown = cookie.partition(";")[0]
    assert ask(closed, Cookie=f"other=1; {shown}").json["owner"] == "ann"
    assert ask(closed, path="/", Cookie=shown, Accept="text/html").status == 200
    assert ask(closed, Cookie=shown + "x").status == 401
    # A token beside it decides.
    assert ask(closed, Cookie=shown, Authorization=basic("", OTHER)).json["owner"] == "bo"
    # Another site's page cannot log anybody in or out.
    for path in ("/login", "/logout"):
        assert ask(closed, "POST", path, b"{}", Cookie=shown, Origin="https://evil.example").status == 403
    out = ask(closed, "POST", "/logout", Cookie=shown)
    assert out.status == 303
    assert ask(closed, Cookie=shown).status == 401


def test_login_by_json_and_its_refusals(closed: str):
    said = enter(closed, OTHER)
    assert said.json == {"owner": "bo"} and "set-cookie" in said.heads
    assert enter(closed, "x").problem == "no-token"
    for body in (b"", b"{}", b'{"token": 7}', b'{"token": null}'):
        assert ask(closed, "POST", "/login", body).problem == "bad-value", body
    assert ask(closed, "POST", "/login", b'{"token":"' + b"x" * 9000 + b'"}').problem == "too-large"
    wrong = ask(closed, "POST", "/login", b"token=x", kind="application/x-www-form-urlencoded")
    assert wrong.status == 401 and 'role="alert"' in wrong.body.decode()


def test_sessions_are_bounded_in_number_and_age(monkeypatch: pytest.MonkeyPatch):
    from sumuk.serve import keys

    ring = keys.Keyring(ServeConfig(tokens={"ann": TOKEN}))
    monkeypatch.setattr(keys, "MOST_SESSIONS", 3)
    numbers = [ring.open("ann") for _ in range(4)]
    heads = [{"cookie": [f"{ring.cookie}={number}"]} for number in numbers]
    with pytest.raises(Refused):
        ring.owner(heads[0], "x")
    assert ring.owner(heads[3], "x") == "ann"
    now = time.monotonic() + keys.SESSION_SECONDS + 1
    monkeypatch.setattr(keys.time, "monotonic", lambda: now)
    with pytest.raises(Refused):
        ring.owner(heads[3], "x")


# Bodies.


def test_json_passes_unchanged(free: str):
    body = ' {"a": [1, 2.5e3, -0.0, true, null], "말": "\\ud83d\\ude00 수묵"} '.encode()
    said = ask(free, "POST", body=body, kind="application/json; charset=UTF-8")
    assert said.json["body"].encode() == body
    chunked = call(
        "POST", "/api/x", b'4\r\n{"a"\r\n3\r\n:1}\r\n0\r\n\r\n', [("Transfer-Encoding", "chunked")]
    )
    assert exchange(free, chunked).json["body"] == '{"a":1}'
    assert ask(free, "POST").json["size"] == 0
    assert ask(free, "POST", body=b"").json["size"] == 0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "no JSON"),
        (b"{}x", "no JSON"),
        (b"[]", "no object"),
        (b'"x"', "no object"),
        (b"\xef\xbb\xbf{}", "no JSON"),
        ("{}".encode("utf-16"), "no UTF-8"),
        (b'{"a":"\xff"}', "no UTF-8"),
        (b'{"a":1,"a":2}', "'a' stands twice"),
        (b'{"b":{"a":1,"a":2}}', "'a' stands twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "-Infinity"),
        (b'{"a":1e999}', "1e999"),
        (b'{"a":' + b"9" * 26 + b"}", "26 digits"),
        (b'{"a":' + b"9" * 10**4 + b"}", "10,000 digits"),
        (b'{"a":0.' + b"9" * 100 + b"}", "102 characters"),
        (b'{"a":"\\ud800"}', "half a character"),
        (b'{"\\udfff":1}', "half a character"),
        (b'{"a":["\\u0000"]}', "NUL"),
        (b'{"a":"\0"}', "no JSON"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "more than 64 deep"),
        (b"[" * 50_000, "more than 64 deep"),
    ],
)
def test_json_that_can_be_understood_in_two_ways_is_refused(free: str, body: bytes, told: str):
    said = ask(free, "POST", body=body)
    assert (said.status, said.problem) == (400, "bad-request")
    assert told in said.json["detail"]


def test_the_bounds_of_json_are_where_they_are_said_to_be():
    check_json(b'{"a":' + b"[" * (DEEPEST - 1) + b"]" * (DEEPEST - 1) + b"}")
    assert len(check_json(b'{"a":[' + b"0," * (MOST_VALUES - 10) + b"0]}")["a"]) == MOST_VALUES - 9
    assert check_json(b'{"a":"' + b"[{," * MOST_VALUES + b'"}')  # signs in a text are no structure
    check_json(b'{"a":' + b"9" * 25 + b"}")
    with pytest.raises(Refused, match="values"):
        check_json(b'{"a":[' + b"{}," * MOST_VALUES + b"0]}")


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":"' + b'\\"' * 2**20,  # a text that never ends
        b'"' * 2**20,
        b"[" * 2**20,
        b'{"a":[' + b'"\\' * 2**20,
        b'{"a":[' + b"0," * 2**20 + b"0]}",
        b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b',"7":0}',
    ],
    ids=["text", "quotes", "brackets", "slashes", "values", "names"],
)
def test_no_json_costs_more_than_its_size(body: bytes):
    began = time.process_time()
    with pytest.raises(Refused):
        check_json(body)
    assert time.process_time() - began < 1.0  # of two megabytes; what is quadratic takes minutes


def test_bodies_have_a_size(free: str):
    most = b'{"a":"' + b"x" * (100_000 - 8) + b'"}'
    assert ask(free, "POST", body=most).json["size"] == 100_000
    said = ask(free, "POST", body=most + b" ")
    assert (said.status, said.problem) == (413, "too-large")
    # Said but not sent: the answer comes at once.
    promised = call("POST", "/api/x", b"", [("Content-Length", str(10**12))])
    assert exchange(free, promised).status == 413
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    endless = exchange(
        free, call("POST", "/api/x", b"", [("Transfer-Encoding", "chunked")]), then=[chunk] * 64
    )
    assert (endless.status, endless.problem) == (413, "too-large")


def test_large_bodies_are_looked_at_too(closed: str):
    heads = {"Authorization": f"Bearer {TOKEN}"}
    large = b'{"a":"' + b"x" * (2 * LARGE) + b'"'
    assert ask(closed, "POST", body=large + b"}", **heads).json["size"] == len(large) + 1
    assert ask(closed, "POST", body=large + b',"a":1}', **heads).problem == "bad-request"


def test_all_bodies_together_have_a_size():
    bodies = Bodies(1000, 1.0)

    async def receive() -> dict:
        return {"type": "http.request", "body": bytes(600), "more_body": False}

    async def fill() -> None:
        for _ in range(13):
            assert len(await bodies.read(receive, None, 1000)) == 600
        with pytest.raises(Refused) as error:
            await bodies.read(receive, None, 1000)
        assert (error.value.trouble.type, bodies.held) == ("too-many", 13 * 600)
        bodies.release(600)
        await bodies.read(receive, None, 1000)

    asyncio.run(fill())


def test_bodies_are_let_go_of(free: str):
    """More calls than there is room for bodies at once, one after another, good and bad."""
    for number in range(24):
        said = ask(free, "POST", body=b'{"a":"' + b"x" * 90_000 + (b'"}' if number % 2 else b""))
        assert said.status == (200 if number % 2 else 400)


def test_whoever_asks_first_is_told_to_go_on(closed: str):
    """``Expect: 100-continue``, as curl says it before large bodies."""
    name, port = closed.removeprefix("http://").split(":")
    expects = ("Expect", "100-continue")
    for token, first in ((TOKEN, b"HTTP/1.1 100 "), ("wrong", b"HTTP/1.1 401 ")):
        shown = ("Authorization", f"Bearer {token}")
        with socket.create_connection((name, int(port)), timeout=5) as line:
            line.sendall(call("POST", "/api/x", b"", [shown, expects, ("Content-Length", "2")]))
            assert line.recv(65536).startswith(first)
            if token == TOKEN:
                line.sendall(b"{}")
                assert b"200 OK" in line.recv(65536)


def test_whoever_still_sends_hears_why_not(closed: str):
    """The connection is not closed in the middle of what is sent, which many clients take for a lost line."""
    name, port = closed.removeprefix("http://").split(":")
    sent = call("POST", "/api/x", bytes(8 * 2**20), host="localhost")
    with socket.create_connection((name, int(port)), timeout=10) as line:
        line.sendall(sent)
        assert line.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_slow_bodies_are_given_up(free: str):
    began = time.monotonic()
    for heads in ([("Transfer-Encoding", "chunked")], [("Content-Length", "50")]):
        said = exchange(free, call("POST", "/api/x", b"3\r\n{ \n\r\n", heads))
        assert (said.status, said.problem) == (408, "slow")
        assert said.heads["connection"] == "close"
    assert time.monotonic() - began < 10


def test_slow_headers_are_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http11, "HEADER_SECONDS", 0.3)
    with doorway() as url:
        for start in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
            said = exchange(url, start, patience=5)
            assert (said.status, said.problem) == (408, "slow"), start
        # One that is working is not one that is slow.
        name, port = url.removeprefix("http://").split(":")
        with socket.create_connection((name, int(port)), timeout=5) as line:
            for _ in range(2):
                line.sendall(call("GET", "/livez"))
                assert b"200 OK" in line.recv(65536)
            time.sleep(0.5)
            line.sendall(call("GET", "/livez"))
            assert b"200 OK" in line.recv(65536)


def test_a_client_that_goes_away_is_no_fault(free: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "sumuk"):
        exchange(free, call("POST", "/api/x", b"{", [("Content-Length", "50")]), patience=0.05)
        time.sleep(0.3)
        assert ask(free).status == 200
    assert "499" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml", "json",
     "application/json; charset=utf-16", "text/json", "application/json-patch+json"],
)  # fmt: skip
def test_only_json_is_taken(free: str, kind: str):
    for path in ("/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/gradio_api/queue/join", "/x"):
        said = ask(free, "POST", path, b"{}", kind=kind)
        assert (said.status, said.problem) == (415, "not-json"), path


def test_forms_where_clients_send_them(free: str):
    body = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n'
    for path in ("/v1/images/edits", "/v1/images/variations"):
        said = ask(free, "POST", path, body, kind="multipart/form-data; boundary=x")
        assert said.json["size"] == len(body), path
    large = ask(free, "POST", "/v1/images/edits", bytes(75_001), kind="multipart/form-data; boundary=x")
    assert large.problem == "too-large"  # base64 in JSON would be
    bare = exchange(free, call("POST", "/api/x", b"{}", kind=None))
    assert (bare.status, bare.problem) == (415, "not-json")


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "identity, gzip"])
def test_nothing_is_unpacked(free: str, coding: str):
    assert ask(free, "POST", body=b"\x1f\x8b", Content_Encoding=coding).problem == "not-json"


def test_what_carries_no_body_carries_none(free: str):
    for method in ("GET", "OPTIONS"):
        assert ask(free, method, body=b"{}").problem == "bad-request"
    assert ask(free, "DELETE").status == 200


# The page's own addresses.


def test_the_page_is_handed_no_addresses_to_fetch(free: str):
    for path in ("http://127.0.0.1/x", "HTTP://x", "ht\ttp://x", " https://x", "file:///etc/passwd"):
        body = json.dumps(
            {"data": [[{"image": {"path": path, "meta": {"_type": "gradio.FileData"}}}]]}
        ).encode()
        said = ask(free, "POST", "/ko/gradio_api/queue/join", body)
        assert (said.status, said.problem) == (400, "bad-value"), path
    good = {
        "data": [
            {"path": "/tmp/gradio/x.png", "url": f"{free}/gradio_api/file=/tmp/gradio/x.png"},
            "http://x",
        ]
    }
    assert ask(free, "POST", "/gradio_api/queue/join", json.dumps(good).encode()).status == 200


# Answers.


def test_answers_of_apis_are_data(free: str):
    for path in ("/api/x", "/gradio_api/file=/tmp/x.html", "/api/nothing"):
        heads = ask(free, path=path).heads
        assert heads["x-content-type-options"] == "nosniff"
        assert heads["content-security-policy"].startswith("default-src 'none'")
        assert "script-src" not in heads["content-security-policy"]
        assert heads["cache-control"] == "no-store"
        assert heads["cross-origin-resource-policy"] == "same-origin"
        assert re.fullmatch("[0-9a-f]{16}", heads["x-request-id"])
    assert ask(free).heads["referrer-policy"] == "no-referrer"
    assert ask(free, X_Request_Id="mine").heads["x-request-id"] != "mine"


def test_the_page_may_run_its_own_scripts_and_no_other(free: str):
    said = ask(free, path="/", Accept="text/html", Accept_Encoding="gzip")
    assert said.body.decode() == PAGE
    digest = base64.b64encode(hashlib.sha256(b"window.one = 1").digest()).decode()
    scripts = re.search("script-src ([^;]*)", said.heads["content-security-policy"])[1]
    assert scripts == f"'self' 'unsafe-eval' 'sha256-{digest}'"
    assert "frame-ancestors 'none'" in said.heads["content-security-policy"]
    assert "access-control-allow-origin" not in said.heads  # Gradio says it of itself
    assert said.heads["referrer-policy"] == "same-origin"  # or the login form would say Origin: null


def test_faults_are_told_without_their_insides(free: str, caplog: pytest.LogCaptureFixture):
    said = ask(free, path="/api/fault")
    assert (said.status, said.problem) == (500, "internal")
    assert b"secret" not in said.body and "secret insides" in caplog.text
    assert said.heads["x-content-type-options"] == "nosniff"
    assert COUNTED["internal"] == 1
    assert ask(free, path="/api/refused").problem == "conflict"  # whoever forgot a handler is helped out


def test_refusals_are_counted(free: str):
    before = COUNTED["foreign-host"]
    ask(free, host="evil.example")
    assert COUNTED["foreign-host"] == before + 1


# What is no HTTP.


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX : a\r\n\r\n",
        call("POST", "/api/x", b"{}", [("Content-Length", "2"), ("Content-Length", "3")]),
        call("POST", "/api/x", b"{}", [("Content-Length", "-1")]),
        call("POST", "/api/x", b"{}", [("Content-Length", "two")]),
        call("POST", "/api/x", b"{}", [("Content-Length", "1e9")]),
        call("POST", "/api/x", b"{}", [("Transfer-Encoding", "gzip, chunked")]),
        call("POST", "/api/x", b"zz\r\n{}\r\n", [("Transfer-Encoding", "chunked")]),
        call("GET", "/" + "a" * 70_000),
        call("GET", "/" + "a" * 5_000),
        call("GET", "/%00"),
        call("GET", "/a%0d%0aSet-Cookie:x"),
        call("GET", "/", None, [("Cookie", "a" * 65536)]),
        call("GET", "/", None, [("Cookie", "a" * 40_000)]),
        call("GET", "/", None, [(f"X-{n}", "a") for n in range(150)]),
        call("GET", "/", None, [("Cookie", "a" * 2_000_000)]),
        call("POST", "/api/x", b"{}", [("Content-Type", "application/json")]),
    ],
)
def test_malformed_requests_get_a_problem(free: str, sent: bytes):
    said = exchange(free, sent)
    assert (said.status, said.problem) == (400, "bad-request")
    assert "set-cookie" not in said.heads
    assert ask(free).status == 200


def test_a_second_request_behind_a_wrong_length_is_no_request(free: str):
    """Two that disagree where a body ends are how requests are smuggled past a proxy."""
    both = [("Content-Length", "4"), ("Transfer-Encoding", "chunked")]
    said = exchange(
        free, call("POST", "/api/x", b"0\r\n\r\nGET /api/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n", both)
    )
    assert said.problem == "bad-request" and b"smuggled" not in said.body
