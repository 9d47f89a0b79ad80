"""The login page: a browser shows its token once and gets a session's cookie for it.

One small form without scripts, in English and Korean; programs may post JSON instead. The cookie is a random number
that means nothing elsewhere, is not shown to scripts (HttpOnly) and not sent on the way from other sites
(SameSite=Strict).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from sumuk.serve.keys import SESSION_SECONDS, Keyring
from sumuk.serve.trouble import Refused, refused

router = APIRouter(include_in_schema=False)

FORM = "application/x-www-form-urlencoded"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sumuk · 수묵</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ display: grid; min-height: 90vh; place-items: center; }}
form {{ display: grid; gap: .8rem; width: min(22rem, 90vw); }}
h1 {{ font-weight: 500; margin: 0; }}
input, button {{ font: inherit; padding: .6rem; }}
[role=alert] {{ color: light-dark(#a00, #f99); }}
</style></head><body>
<form method="post" action="login">
<h1>Sumuk · <span lang="ko">수묵</span></h1>
<label for="token">Token of this server · <span lang="ko">이 서버의 토큰</span></label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Enter · <span lang="ko">들어가기</span></button>
{told}</form></body></html>
"""
WRONG = """<p role="alert">This is not one of the server's tokens. ·
<span lang="ko">이 서버의 토큰이 아닙니다.</span></p>
"""
WAIT = """<p role="alert">Too many wrong tokens; wait a minute. ·
<span lang="ko">틀린 토큰이 너무 많습니다. 1분 뒤에 다시 하세요.</span></p>
"""


@router.get("/login")
async def form(request: Request) -> Response:
    """The page, or the way past it where no token is needed."""
    if not _keyring(request).needed:
        return RedirectResponse(_home(request), 303)
    return HTMLResponse(PAGE.format(told=""))


@router.post("/login")
async def enter(request: Request) -> Response:
    """Open a session with a token.

    Raises:
        Refused: it is none; a form gets the page again instead.
    """
    keyring = _keyring(request)
    by_form = request.headers.get("content-type", "").partition(";")[0].strip().lower() == FORM
    token = await _sent(request, by_form)
    if not keyring.needed:
        raise refused("not-found", "this server needs no token")
    try:
        owner = keyring.admit(token.encode(), request.scope["sumuk.caller"].address)
    except Refused as error:
        if not by_form:
            raise
        told = WAIT if error.trouble.type == "too-many" else WRONG
        return HTMLResponse(PAGE.format(told=told), error.trouble.status)
    answer: Response = RedirectResponse(_home(request), 303) if by_form else JSONResponse({"owner": owner})
    answer.set_cookie(
        keyring.cookie,
        keyring.open(owner),
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path=_home(request),
    )
    return answer


@router.post("/logout")
async def leave(request: Request) -> Response:
    """End the session."""
    keyring = _keyring(request)
    keyring.close({"cookie": request.headers.getlist("cookie")})
    answer = RedirectResponse(_home(request) + "login", 303)
    answer.delete_cookie(keyring.cookie, path=_home(request))
    return answer


async def _sent(request: Request, by_form: bool) -> str:
    """The token in a form or in JSON."""
    body = await request.body()
    found: Any
    if by_form:
        try:
            found = parse_qs(body.decode(), max_num_fields=8).get("token", [None])[0]
        except ValueError:
            raise refused("bad-request", "the form cannot be read") from None
    else:
        found = (await request.json()).get("token") if body else None
    if not isinstance(found, str):
        raise refused("bad-value", 'no token was sent; send {"token": "..."}')
    return found


def _keyring(request: Request) -> Keyring:
    return request.scope["sumuk.keyring"]


def _home(request: Request) -> str:
    """Where the application is mounted."""
    return request.scope.get("root_path", "") + "/"
