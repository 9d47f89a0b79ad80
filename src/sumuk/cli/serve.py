"""The verb that serves: flags and environment to a :class:`sumuk.serve.config.ServeConfig`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from sumuk.base.errors import BadInput, MissingExtra

UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "": 1}
NEEDED = ("fastapi", "uvicorn", "prometheus_client", "limits", "sse_starlette")


def register(app: typer.Typer) -> None:
    """Put the verb into the table."""
    app.command()(serve)


def serve(
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="Checkpoint file or folder; the miniature if left out."),
    ] = None,
    shelf: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints, LoRAs, ... that orders can name.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Where to listen; 127.0.0.1, for this machine alone.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Where to listen; 7860. 0: any free one.")] = None,
    token: Annotated[
        list[str] | None, typer.Option(help="NAME=SECRET of who may call; needed off this machine.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name under which the server is reached.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Another site whose pages may call: https://sso.example.")
    ] = None,
    proxy: Annotated[
        list[str] | None, typer.Option(help="Address of a proxy whose X-Forwarded-For is believed.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Folder for jobs and results.")] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the web page too.")] = True,
    part: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE that supplies a part of --model: vae, tiny_decoder, ..."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="exact: same bits alone and in company; fast: larger batches.")
    ] = None,
    together: Annotated[int | None, typer.Option(help="Pictures drawn at once; 2 exact, 16 fast.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    memory: Annotated[str | None, typer.Option(help="What models may take together: 12GiB.")] = None,
    queue: Annotated[int | None, typer.Option(help="Jobs that may wait; 256.")] = None,
    per_key: Annotated[str | None, typer.Option(help="Orders of one key; 120/minute.")] = None,
    per_address: Annotated[str | None, typer.Option(help="Orders from one address; 240/minute.")] = None,
    patience: Annotated[
        float | None, typer.Option(help="Seconds after which a job is given up; 3600.")
    ] = None,
    keep_days: Annotated[float | None, typer.Option(help="Days that results are kept; 30.")] = None,
    keep_size: Annotated[str | None, typer.Option(help="Size of results that are kept; 20GiB.")] = None,
    drain: Annotated[float | None, typer.Option(help="Seconds for running jobs at the end; 30.")] = None,
    check_prompts: Annotated[
        Path | None, typer.Option(help="File of words, a line each, that prompts may not hold.")
    ] = None,
    check_images: Annotated[
        bool, typer.Option("--check-images", help="Withhold pictures that opennsfw finds indecent.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option(help="Folder with cert.pem and key.pem: sign results (C2PA).")
    ] = None,
    log: Annotated[str | None, typer.Option(help="text or json.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Draw on a Ray cluster.")] = False,
    replicas: Annotated[int | None, typer.Option(help="Replicas on the cluster at most.")] = None,
) -> None:
    """Serve HTTP APIs (OpenAI Images, A1111, jobs) and a web page."""
    from sumuk.cli.draw import named_files

    values = {
        "model": model,
        "parts": named_files(part),
        "shelf": shelf,
        "host": host,
        "port": port,
        "hosts": tuple(allow_host or ()),
        "origins": tuple(allow_origin or ()),
        "proxies": tuple(proxy or ()),
        "state": _folder(state),
        "page": page,
        "device": device,
        "dtype": dtype,
        "mode": mode,
        "together": together,
        "threads": threads,
        "memory": _size(memory),
        "queue_jobs": queue,
        "per_key": per_key,
        "per_address": per_address,
        "patience": patience,
        "keep_days": keep_days,
        "keep_bytes": _size(keep_size),
        "drain": drain,
        "check_prompts": check_prompts is not None,
        "blocked_words": check_prompts,
        "check_images": check_images,
        "sign": sign,
        "log": log,
    }
    _run(values, token or [], cluster, replicas)


def _run(values: Mapping[str, Any], tokens: list[str], cluster: bool, replicas: int | None) -> None:
    """Serve until it is stopped; tokens of ``SUMUK_TOKENS`` (commas between) count as well."""
    if not all(find_spec(package) for package in NEEDED):
        raise MissingExtra("sumuk serve", "serve")
    from sumuk.serve.config import ServeConfig
    from sumuk.serve.logs import set_up
    from sumuk.serve.run import address, listening, serve

    said = {key: value for key, value in values.items() if value not in (None, ())}
    environment = [each for each in os.environ.get("SUMUK_TOKENS", "").split(",") if each]
    config = ServeConfig(**said, tokens=_named([*environment, *tokens]))
    set_up(config)
    backend = None
    if cluster:
        if find_spec("ray") is None:
            raise MissingExtra("sumuk serve --cluster", "cluster")
        from sumuk.serve.cluster import Cluster

        backend = Cluster(config, most=replicas)
    elif replicas is not None:
        raise BadInput(f"--replicas {replicas} does nothing without --cluster; leave it out")
    made = listening(config)
    serve(config, made, backend, lambda: typer.echo(f"sumuk serves at {address(made)}", err=True))


def _named(said: list[str]) -> dict[str, str]:
    """``NAME=SECRET`` as people type it; messages never repeat the secret."""
    found: dict[str, str] = {}
    for each in said:
        name, equals, token = each.partition("=")
        if not (name and equals and token):
            raise BadInput("a token is given as NAME=SECRET, like me=4f0c...; one is not like that")
        if name in found:
            raise BadInput(f"the token {name!r} is given twice")
        found[name] = token
    return found


def _size(said: str | None) -> int | None:
    """Bytes of ``12GiB``, ``800MiB`` or a plain number."""
    if said is None:
        return None
    text = said.strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        return int(float(number) * UNITS[text[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        raise BadInput(f"{said!r} is no size; write it like 12GiB or 800MiB") from None


def _folder(said: Path | None) -> Path | None:
    """A folder, made if it is not there."""
    try:
        if said is not None:
            said.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {said}: {error.strerror or error}") from None
    return said
