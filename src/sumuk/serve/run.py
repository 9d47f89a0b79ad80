"""Running the server: one socket, and an orderly end.

SIGTERM (and the first Ctrl-C) drains: unready at once, it takes no more orders, gives running jobs their time, queues
the rest for the next start, and ends with code 0. A second signal ends it now; nothing that was acknowledged is lost.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from sumuk.base.errors import BadInput
from sumuk.serve.app import make_app
from sumuk.serve.backend import Backend
from sumuk.serve.config import ServeConfig
from sumuk.serve.desk import Desk
from sumuk.serve.http11 import Http11

log = logging.getLogger("sumuk.serve")


class Server(uvicorn.Server):
    """Uvicorn, which drains before it stops."""

    desk: Desk
    told: Callable[[], None]
    _draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """The desk first, so that what is wrong with it is the caller's to see, and not a trace in the log."""
        await self.desk.start()
        await super().startup(sockets)
        if self.started:
            self.told()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends."""
        if self._draining is None and self.started:
            asyncio.get_running_loop().call_soon_threadsafe(self._drain, sig)
        else:
            self.force_exit = self.should_exit = True

    def _drain(self, sig: int) -> None:
        log.info(
            "%s: taking no more orders; %g s for what runs", signal.Signals(sig).name, self.desk.config.drain
        )
        self._draining = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self.desk.stop()
        self.should_exit = True


def listening(config: ServeConfig) -> socket.socket:
    """The socket, bound.

    Raises:
        BadInput: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((config.host, config.port))
        made.listen(1024)
    except OSError as error:
        made.close()
        raise BadInput(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}; give another --port"
        ) from None
    return made


def address(made: socket.socket) -> str:
    """As people type it."""
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    config: ServeConfig,
    made: socket.socket,
    backend: Backend | None = None,
    told: Callable[[], None] = lambda: None,
) -> None:
    """Serve on a bound socket until a signal ends it; ``told`` is called when it answers.

    Raises:
        SumukError: it cannot be set up.
    """
    app = make_app(config, backend)
    server = Server(
        uvicorn.Config(
            app,
            http=Http11,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # the guard believes --proxy addresses only
            server_header=False,
            h11_max_incomplete_event_size=64 * 1024,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
    )
    server.desk, server.told = app.state.desk, told
    server.run(sockets=[made])
    if not server.started:
        raise SystemExit(1)
