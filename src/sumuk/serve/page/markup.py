"""Pieces of HTML. Whatever comes from outside (prompts, receipts, errors) is escaped here, once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from sumuk.serve.order import Job, Result
from sumuk.serve.page.words import Words
from sumuk.serve.trouble import Trouble

JOBS = "../api/jobs"
"""Where results are shown from, seen from ``/en/`` and ``/ko/``."""


def element(tag: str, inside: str = "", /, **attributes: object) -> str:
    """An element; ``class_`` is ``class``, ``data_x`` is ``data-x``, True stands alone, None and False are left out.

    Args:
        tag: its name.
        inside: HTML.
        attributes: texts, escaped here.
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return f"<{tag}{written}>" if tag in ("img", "link", "input") else f"<{tag}{written}>{inside}</{tag}>"


def text(value: object) -> str:
    """A text from anywhere, as HTML."""
    return escape(str(value))


def act(name: str, label: str, /, **about: object) -> str:
    """A button that tells the page's Python what was pressed (``data-act``), and ``about`` what."""
    data = {f"data_{key}": value for key, value in about.items()}
    return element("button", text(label), type="button", class_="act", data_act=name, **data)


def notice(words: Words, trouble: Trouble) -> str:
    """A problem as one sentence: what sort it is in the page's language, then what the server says of it."""
    lead = words(f"why:{trouble.type}")
    return element("p", f"<b>{text(lead)}:</b> {text(trouble.detail)}", class_="notice trouble", role="alert")


def said(sentence: str, *, trouble: bool = False) -> str:
    """A sentence of the page's own."""
    kind, role = ("notice trouble", "alert") if trouble else ("notice", "status")
    return element("p", text(sentence), class_=kind, role=role)


def bullets(lead: str, lines: Mapping[str, str]) -> str:
    """What is to be told of several things, each with why."""
    inside = "".join(f"<li><b>{text(name)}</b> {text(why)}</li>" for name, why in lines.items())
    return element("div", f"<p>{text(lead)}</p><ul>{inside}</ul>", class_="notice", role="status")


def table(lines: Iterable[tuple[str, object]]) -> str:
    """Names and values; those without a value are left out."""
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>'
        for name, value in lines
        if value not in (None, "", (), [], {})
    )
    return element("table", f"<tbody>{rows}</tbody>", class_="lines")


def source(job: Job, result: Result) -> str:
    """The address of a picture."""
    return f"{JOBS}/{job.id}/images/{result.image}"


def image(words: Words, job: Job, result: Result) -> str:
    """A picture that is finished."""
    prompt = str(job.order.values.get("prompt", "")) or words("no-prompt")
    return element(
        "img",
        src=source(job, result),
        alt=words("picture-of", seed=result.seed, prompt=prompt[:200]),
        width=result.width,
        height=result.height,
        style=f"--natural: {result.width}px",
        loading="lazy",
    )


def sends(words: Words, job: Job, result: Result) -> str:
    """What can be done with a picture."""
    about = {"job": job.id, "image": result.image}
    name = f"sumuk-{result.seed}.png"
    save = element("a", text(words("download")), href=source(job, result), download=name, class_="act")
    buttons = [act(each, words(each), **about) for each in ("send-all", "send-init", "send-mask")]
    return element("div", save + "".join(buttons), class_="acts")


def receipt_lines(words: Words, job: Job, result: Result) -> list[tuple[str, object]]:
    """The receipt, as people read it."""
    receipt = result.receipt
    settings: Mapping[str, Any] = receipt.get("settings") or {}
    model: Mapping[str, Any] = receipt.get("model") or {}
    machine: Mapping[str, Any] = receipt.get("machine") or {}
    hires = settings.get("hires")
    worn = [f"{each.get('kind')} {each.get('name')}" for each in receipt.get("adapters") or ()]
    plain = ("prompt", "negative", "solver", "grid", "steps", "guidance", "seed")
    return [
        *((words(name), settings.get(name)) for name in plain),
        (words("about:size"), f"{result.width} × {result.height}"),
        (words("axis:strength"), settings.get("strength") if settings.get("init") else None),
        (words("part:hires"), f"× {hires.get('scale'):g}" if hires else None),
        (words("model"), model.get("title")),
        (words("about:licence"), _licence(words, receipt, model)),
        (words("about:adapters"), ", ".join(worn)),
        (
            words("about:machine"),
            " · ".join(str(machine[k]) for k in ("device", "dtype", "mode") if k in machine),
        ),
        (words("about:job"), job.id),
    ]


def _licence(words: Words, receipt: Mapping[str, Any], model: Mapping[str, Any]) -> object:
    """The strictest of all files that made a picture, and whether it forbids commercial use."""
    strictest = receipt.get("licence")
    if not isinstance(strictest, Mapping):
        return model.get("licence")
    plain = strictest.get("commercial") != "no"
    return strictest.get("name") if plain else f"{strictest.get('name')} · {words('non-commercial')}"


def as_json(label: str, value: object) -> str:
    """A value as JSON, folded away."""
    written = json.dumps(value, ensure_ascii=False, indent=1, default=str)
    return f"<details><summary>{text(label)}</summary><pre tabindex='0'>{text(written)}</pre></details>"


def inspected(words: Words, found: Mapping[str, Any]) -> str:
    """What ``sumuk inspect`` says of a file, in short; all of it folded away."""

    def told(name: str) -> str | None:
        value = found.get(name)
        if not isinstance(value, Mapping):
            return value
        return f"{value.get('value')}" + ("" if value.get("sure", True) else f" ({words('unsure')})")

    parts = [
        f"{part['title']}: {part['parameters'] / 1e6:,.1f} M, {'/'.join(part['dtypes'])}"
        for part in found.get("parts") or ()
    ]
    missing = [
        each["title"] + (f" ({words('optional')})" if each.get("optional") else "")
        for each in found.get("missing") or ()
    ]
    details = [f"{name}: {value}" for name, value in (found.get("details") or {}).items()]
    lines = [
        (words("about:title"), found.get("title")),
        (words("about:unknown"), found.get("unknown")),
        (words("about:licence"), told("licence")),
        (words("about:prediction"), told("prediction")),
        (words("about:resolution"), told("resolution")),
        (words("about:parts"), "; ".join(parts)),
        (words("about:missing"), ", ".join(missing)),
        (words("about:details"), "; ".join(details)),
        (words("about:warnings"), " ".join(found.get("warnings") or ())),
    ]
    heading = element("p", text(found.get("name", "")), class_="card-name")
    short = {key: value for key, value in found.items() if key not in ("metadata", "files")}
    short["metadata"] = {key: str(value)[:300] for key, value in (found.get("metadata") or {}).items()}
    return element("div", heading + table(lines) + as_json("JSON", short), class_="card")
