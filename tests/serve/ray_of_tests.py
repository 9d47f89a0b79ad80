"""A Ray cluster for tests, and looking at its processes from outside."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sumuk.serve import crew
from sumuk.serve.config import ServeConfig

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
"""As Linux writes it."""


def the_ray() -> Any:
    """Ray, which looks at its environment when it is imported."""
    os.environ.update(crew.ALWAYS | crew.ALONE)
    return pytest.importorskip("ray")


def painters(state: Path) -> list[int]:
    """The processes of a server's painters."""
    name = crew.names(ServeConfig(state=state))[0]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"ray::ServeReplica:{name}:Painter" in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def below(pid: int) -> set[int]:
    """All processes that a process has started, and those have."""
    found = {
        int(each)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for each in task.read_text().split()
    }
    return found.union(*map(below, found))


def listening(pids: set[int]) -> dict[int, str]:
    """Ports at which processes listen, and the address, as Linux writes it."""
    sockets = set()
    for pid in pids:
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                sockets.add(str(each.readlink()).removeprefix("socket:[").rstrip("]"))
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in map(str.split, Path(table).read_text().splitlines()):
            if row[3] == "0A" and row[9] in sockets:
                address, _, port = row[1].partition(":")
                found[int(port, 16)] = address
    return found


def without_token(port: int) -> str:
    """What a painter's own port of Serve says to a stranger."""
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    stub = serve_pb2_grpc.ASGIServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
    with pytest.raises(grpc.RpcError) as refused:
        stub.HandleRequest(serve_pb2.ASGIRequest(), timeout=10)
    return refused.value.code().name
