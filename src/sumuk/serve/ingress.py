"""The whole server on Ray Serve, its HTTP too: ``serve.run(deployment(config))``.

The front is then one replica behind Serve's proxy instead of a process of its own behind its own socket; what that
costs is said in ``docs/cluster.md``.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve

from sumuk.base.errors import BadInput
from sumuk.serve.cluster import Cluster
from sumuk.serve.config import ServeConfig
from sumuk.serve.crew import QUIET, Crew, clerk, painter


def deployment(config: ServeConfig, most: int = 1) -> Any:
    """The server as an application of Serve: one front, a clerk, and painters.

    Args:
        config: of the server. Its state folder lies where the front runs, and has to be there again for the next one.
        most: painters.

    Raises:
        BadInput: no token is set. Who reaches Serve's proxy is not for the server to know.
    """
    if not config.tokens:
        raise BadInput("behind Ray Serve's proxy a token is needed: ServeConfig(tokens={'me': ...})")

    def front() -> FastAPI:
        from sumuk.serve.app import make_app

        application = serve.get_replica_context().app_name
        return make_app(config, Cluster(config, crew=Crew(application, application, most)))

    made = serve.deployment(
        name="Front",
        num_replicas=1,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.drain + 10,
        logging_config=QUIET,
    )
    return made(serve.ingress(front)()).bind(painter(config, most, config.threads or 1), clerk(config))
