"""Calls that schemathesis makes up from the server's own OpenAPI document, right and wrong ones: never a 5xx.

Every answer has a status, a content type and a body that the document foretells. The calls go to the real server with
the miniature; what is drawn is kept tiny, and half of the pictures and of the jobs that calls name are real ones, so
that they come further than the first check.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.serve.conftest import Running, running


def no_server_error(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: Case
) -> bool | None:
    """No 5xx, but for what A1111 can do and this server says that it cannot: 501, by name."""
    if response.status_code == 501 and response.json()["type"] == "urn:sumuk:not-here":
        return None
    return not_a_server_error(context, response, case)


CHECKS = [
    no_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SMALL = {"steps": 2, "count": 1, "n": 1, "batch_size": 1, "n_iter": 1, "width": 64, "height": 64}
SMALL |= {"decoder_steps": 2, "hr_second_pass_steps": 2, "partial_images": 1}
"""Where a call says a whole number, it says this one: no picture takes longer than a moment."""
DRAWING = {"/api/jobs": "request", "/sdapi/v1/txt2img": "", "/sdapi/v1/img2img": ""}
DRAWING |= {f"/v1/images/{call}": "sumuk" for call in ("generations", "edits", "variations")}
"""Calls that draw -> where they say how many steps."""
PICTURES = {"image", "init", "mask", "hint", "like", "picture", "init_images", "data"}


@dataclass
class Told:
    """What came of the calls."""

    calls: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")

    def __str__(self) -> str:
        return f"{self.calls} calls: {dict(sorted(self.statuses.items()))}; slowest {self.slowest}"


def png() -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PNG = png()


def tamed(value: Any, lucky: bool, name: str = "") -> Any:
    """A body in which numbers are small, and pictures are real ones if ``lucky``."""
    if isinstance(value, dict):
        return {key: tamed(each, lucky, key) for key, each in value.items()}
    if isinstance(value, list):
        return [tamed(each, lucky, name) for each in value]
    if type(value) is int and value >= 1 and name in SMALL:
        return min(value, SMALL[name]) if name not in ("width", "height") or value % 8 else SMALL[name]
    return PNG if lucky and name in PICTURES and isinstance(value, str) else value


def sent(case: Case, job: str, lucky: bool) -> Case:
    """The case as it is sent."""
    if isinstance(case.body, dict | list):
        case.body = tamed(case.body, lucky)
    if isinstance(case.body, dict) and (place := DRAWING.get(case.operation.path)) is not None:
        holder = case.body.setdefault(place, {}) if place else case.body
        if isinstance(holder, dict) and holder.get("steps") is None:
            holder["steps"] = SMALL["steps"]
        if place and case.media_type == "multipart/form-data":
            case.body[place] = json.dumps(holder)
    if lucky and case.path_parameters:
        case.path_parameters |= {
            name: real
            for name, real in (("id", job), ("job", job), ("image", 0))
            if name in case.path_parameters
        }
    return case


def try_all(server: Running, cases: int) -> Told:
    """So many calls or a few more, spread over all addresses, as many wrong as right ones."""
    schema = schemathesis.openapi.from_url(f"{server.url}/api/openapi.json")
    job = server.draw(prompt="x", width=64, height=64)["id"]
    told = Told()
    left = [(each.ok(), mode) for each in schema.get_all_operations() for mode in GenerationMode]
    while told.calls < cases and left:
        count = math.ceil((cases - told.calls) / len(left))
        left = [each for each in left if try_one(server, *each, count, job, told) == count]
    return told


def try_one(server: Running, operation: Any, mode: GenerationMode, count: int, job: str, told: Told) -> int:
    """Some calls of one address; how many there were, since not every address can be called in many ways."""
    before = told.calls

    @seed(before)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(mode), st.booleans())
    def call(case: Case, lucky: bool) -> None:
        case = sent(case, job, lucky)
        began = time.perf_counter()
        response = case.call(base_url=server.url, timeout=60)
        took = time.perf_counter() - began
        told.calls += 1
        told.statuses[str(response.status_code)] += 1
        told.slowest = max(told.slowest, (round(took, 2), f"{operation.method} {operation.path}"))
        case.validate_response(response, checks=CHECKS)

    try:
        call()
    except Unsatisfiable:  # nothing can be wrong in such a call
        assert mode is GenerationMode.NEGATIVE
    return told.calls - before


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of its own: these calls leave things behind."""
    with running(tmp_path_factory.mktemp("schemathesis") / "state") as made:
        yield made


def test_two_hundred_calls(server: Running) -> None:
    told = try_all(server, 200)
    print(told)
    assert told.calls >= 200 and told.statuses["200"] > 20 and told.statuses["400"] > 20, told
    assert server.client.get("/livez").status_code == 200


@pytest.mark.slow
def test_ten_thousand_calls(alone: Running) -> None:
    told = try_all(alone, 10_000)
    print(told)
    assert told.calls >= 10_000 and {each for each in told.statuses if each >= "5"} <= {"501"}, told
