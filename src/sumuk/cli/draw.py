"""Verbs that draw: generate, replay, demo. They print what the engine tells and write what it made."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sumuk.base.errors import BadInput, MissingFile, SumukError
from sumuk.cli.guests import guests_of
from sumuk.generate import engine
from sumuk.generate.api import MINIATURE, miniature
from sumuk.generate.receipt import check_target, read_receipt, save_png
from sumuk.generate.replay import replay, request_of
from sumuk.generate.request import make_request, read_image
from sumuk.weights.checkpoint import load
from sumuk.weights.licences import everything, warning
from sumuk.weights.model import Model, WeightFile

console = Console(stderr=True)

DEMO = (
    ("a fox, 3d style", 7),
    ("여우, 플랫", 7),
    ("a red heart, flat style", 7),
    ("빨간색 하트, 3d", 7),
    ("a cat, 3d style", 3),
    ("고양이, 플랫", 3),
    ("pizza, 3d", 1),
    ("피자, 플랫", 1),
)


def run_generate(
    out: Path | None,
    model: Path | None,
    how: dict[str, Any],
    mode: str | None,
    values: dict[str, Any],
    second: dict[str, Any],
) -> None:
    """Draw and write; several pictures get numbered names.

    Args:
        out: where to; None takes ``sumuk.png``, numbered so that no picture from before is overwritten.
        model: the checkpoint; the miniature if None.
        how: what :func:`sumuk.load` is told; None where nothing was said, here and below.
        mode: of the engine.
        values: fields of the request.
        second: fields of its second pass.
    """
    if mode not in (None, "exact", "fast"):
        raise BadInput(f"mode {mode!r} is neither 'exact' nor 'fast'")
    chosen, second = _said(values), _said(second)
    if "scale" in second:
        chosen["hires"] = second
    elif second:
        raise BadInput(f"--hires-{next(iter(second))} does nothing without --hires, how many times larger")
    request = make_request(**chosen)
    targets = _targets(out, request.count)
    loaded = _load(model, how)
    if loaded.readings and "prompt" not in chosen:
        raise BadInput('what shall be drawn? Give a prompt; "" for none')
    if careful := warning(everything(loaded).licence):
        typer.secho(f"sumuk: {careful}", err=True, fg="yellow")
    machine = engine.Engine(loaded, mode=mode)  # type: ignore[arg-type]
    machine.submit(request)
    for image, drawn, receipt in _show(machine.events()):
        save_png(drawn, receipt, targets[image])
        typer.echo(f"{targets[image]}  seed {receipt['settings']['seed']}")


def named_files(said: list[str] | None) -> dict[str, str] | None:
    """``NAME=FILE`` as people type it, several times."""
    found: dict[str, str] = {}
    for each in said or ():
        name, equals, file = each.partition("=")
        if not (name and equals and file):
            raise BadInput(f"{each!r} is not NAME=FILE, like text_2=clip_g.safetensors")
        if name in found:
            raise BadInput(f"the part {name!r} is given twice: {found[name]!r} and {file!r}")
        found[name] = file
    return found or None


def steerings(said: list[str] | None) -> list[dict[str, Any]] | None:
    """``CONTROL=PICTURE,weight=0.8,guess`` as people type it, to what a request takes."""
    found = []
    for each in said or ():
        (name, picture), *settings = (part.partition("=")[::2] for part in each.split(","))
        if not (name and picture):
            raise BadInput(f"{each!r} is not CONTROL=PICTURE, like canny=edges.png,weight=0.8")
        values: dict[str, Any] = {key: value or True for key, value in settings}
        found.append({"control": name, "hint": Path(picture), **values})
    return found or None


def _targets(out: Path | None, count: int) -> list[Path]:
    """Where each picture goes, checked before anything is computed."""
    if out is None:
        names = itertools.chain(["sumuk"], (f"sumuk-{number}" for number in itertools.count(2)))
        every = (_numbered(Path(f"{name}.png"), count) for name in names)
        targets = next(each for each in every if not any(path.exists() for path in each))
    else:
        targets = _numbered(out, count)
    for target in targets:
        check_target(target)
    return targets


def _numbered(out: Path, count: int) -> list[Path]:
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{image + 1}") for image in range(count)]


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _load(path: Path | None, how: dict[str, Any]) -> Model:
    chosen = _said(how)
    return load(MINIATURE if path is None else path, **chosen)


def _show(events: Iterator[engine.Event]) -> Iterator[tuple[int, Image.Image, dict[str, Any]]]:
    """A progress bar for each picture; finished ones are handed on, a failure is raised."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[int, Any] = {}
        for event in events:
            if isinstance(event, engine.Progress):
                task = tasks.get(event.image)
                if task is None:
                    task = tasks[event.image] = bar.add_task(f"picture {event.image + 1}", total=event.steps)
                bar.update(task, completed=event.step, total=event.steps)
            elif isinstance(event, engine.Failed):
                raise event.error
            elif isinstance(event, engine.Finished):
                yield event.image, event.picture, event.receipt


def run_replay(
    path: Path,
    model: Path | None,
    pictures: dict[str, Path | None],
    out: Path | None,
    device: str | None,
    controls: dict[str, str] | None,
    adapters: dict[str, list[str] | None],
    shelf: Path | None,
) -> None:
    """Draw again and say what came of it; exit code 1 when the picture is another one."""
    if out is not None:
        check_target(out)
    drawn, receipt = read_receipt(path)
    request = request_of(receipt, {name: read_image(each) for name, each in _said(pictures).items()})
    machine = receipt["machine"]
    invited = guests_of(receipt, adapters, shelf)
    how = {
        "device": device or machine["device"],
        "dtype": machine["dtype"],
        "prediction": receipt["model"]["prediction"],
        "ema": receipt["model"]["ema"],
        "controls": controls,
        # What was applied in part then is so again; the receipt says how much did not fit.
        **invited.loading([each["name"] for each in receipt.get("adapters", ()) if _in_part(each)]),
    }
    loaded = _load(model or _find(receipt), how)
    verdict = replay(drawn, receipt, loaded, request)
    if out is not None:
        save_png(verdict.picture, None, out)
    figures = (
        ""
        if verdict.kind == "identical"
        else f" (largest difference {verdict.largest}/255, {verdict.psnr:.1f} dB)"
    )
    typer.echo(f"{verdict.kind}{figures}")
    for reason in verdict.reasons:
        typer.echo(f"  {reason}")
    if verdict.kind == "different":
        if not verdict.reasons:
            typer.echo("  files, settings and versions are the same; the processor may differ")
        raise typer.Exit(1)


def _in_part(adapter: dict[str, Any]) -> bool:
    account = adapter.get("account")
    return isinstance(account, dict) and bool(account.get("unmatched") or account.get("misshapen"))


def _find(receipt: dict[str, Any]) -> Path:
    """The model of a receipt, if it is the miniature that is here."""
    files = receipt["model"]["files"]
    if MINIATURE.is_file() and [each["sha256"] for each in files] == [WeightFile(MINIATURE).sha256]:
        return MINIATURE
    names = ", ".join(each["name"] for each in files) or "a model that came from no file"
    raise MissingFile(
        f"the picture was made with {names}, which is not the miniature here; give it with --model"
    )


def run_demo(out: Path) -> None:
    """A sheet of pictures, all drawn together by one engine."""
    (target,) = _targets(out, 1)
    began = time.perf_counter()
    machine = engine.Engine(miniature())
    jobs = [machine.submit(make_request(prompt=prompt, seed=seed)) for prompt, seed in DEMO]
    finished: dict[int, engine.Finished] = {}
    with console.status("drawing") as status:
        for event in machine.events():
            if isinstance(event, engine.Failed):
                raise event.error
            if isinstance(event, engine.Progress):
                status.update(f"drawing {len(jobs)} pictures, step {event.step} of {event.steps}")
            elif isinstance(event, engine.Finished):
                finished[event.job] = event
    if len(finished) != len(jobs):
        raise SumukError(f"only {len(finished)} of {len(jobs)} pictures came")
    side = finished[jobs[0]].picture.width
    sheet = Image.new("RGB", (4 * side, 2 * side), "white")
    for place, job in enumerate(jobs):
        sheet.paste(finished[job].picture, (place // 2 * side, place % 2 * side))
    sheet = sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.LANCZOS)
    save_png(sheet, None, target)
    for prompt, seed in DEMO:
        typer.echo(f'  "{prompt}", seed {seed}')
    typer.echo(f"{len(jobs)} pictures in {time.perf_counter() - began:.1f} s; look at {target}")
