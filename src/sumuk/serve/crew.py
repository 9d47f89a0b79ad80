"""The crew of a server on a Ray cluster: painters and a clerk, hired at the start and dismissed at the end.

Everything here waits for Ray and is called from a thread. Ray is imported late, after its environment is set.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sumuk.serve.config import MIB, ServeConfig
from sumuk.serve.local import slots
from sumuk.serve.trouble import refused

STORE = 512 * MIB
"""Bytes of shared memory for what goes between processes, where the cluster is this machine alone."""
ALWAYS = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a call that comes late joins no other cluster
}
ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # whatever it is called: Ray then listens on the loopback alone
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # painters are no background work
}
"""How Ray is set up where the cluster is this machine alone."""
THREADS_BESIDE_GPU = 4
QUIET = {"log_level": "WARNING", "enable_access_log": False}
ALIKE: dict[str, Any] = {
    "health_check_period_s": 2.0,
    "max_constructor_retry_count": 2,
    "logging_config": QUIET,
}
"""What is said of all of the crew."""


@dataclass(frozen=True)
class Roll:
    """Who is there.

    Attributes:
        painters: that can draw.
        clerk: whether questions are answered.
        broken: why no painter will come; empty: one will.
    """

    painters: int = 0
    clerk: bool = False
    broken: str = ""


@dataclass(frozen=True)
class Crew:
    """Where the crew is found.

    Attributes:
        painters, clerk: applications of Serve; they may be the same.
        most: painters that there may be.
    """

    painters: str
    clerk: str
    most: int

    def handles(self) -> tuple[Any, Any]:
        """By which a painter and the clerk are called."""
        from ray import serve

        return (
            serve.get_deployment_handle("Painter", self.painters),
            serve.get_deployment_handle("Clerk", self.clerk),
        )

    def roll(self) -> Roll:
        """Who is there now."""
        from ray import serve

        found = serve.status().applications
        if self.painters not in found or self.clerk not in found:
            return Roll()
        for name in (self.painters, self.clerk):
            if found[name].status == "DEPLOY_FAILED":
                return Roll(broken=_reason(found[name]))
        return Roll(_running(found[self.painters], "Painter"), bool(_running(found[self.clerk], "Clerk")))

    def dismiss(self) -> None:
        """End it."""
        from ray import serve

        for name in {self.painters, self.clerk}:
            with suppress(TimeoutError):
                serve.delete(name)


def _running(application: Any, name: str) -> int:
    deployment = application.deployments.get(name)
    return 0 if deployment is None else deployment.replica_states.get("RUNNING", 0)


def _reason(application: Any) -> str:
    """Why an application failed: the last words of its trace, or else what Serve says of it."""
    for each in application.deployments.values():
        if each.status == "DEPLOY_FAILED" and each.message:
            return each.message.strip().splitlines()[-1].removeprefix("RuntimeError: ")
    return application.message


def join(config: ServeConfig) -> bool:
    """Become part of a Ray cluster: of ``RAY_ADDRESS``, or of the one that was started on this machine; if there is
    none, one is started here that lasts as long as this process.

    Args:
        config: says what is logged how.

    Returns:
        Whether one was started.

    Raises:
        Refused: there is none at that address.
    """
    address = _address()
    if "ray" not in sys.modules:  # it looks at most of these but once
        for name, value in (ALWAYS if address else {**ALWAYS, **ALONE}).items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    # A log of JSON is not mixed with lines of other processes; those are in Ray's own folder all the same.
    how: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": config.log == "text"}
    if address is None:
        ray.init("local", include_dashboard=False, object_store_memory=STORE, **how)
        return True
    try:
        ray.init(address, **how)
    except Exception as error:
        raise refused(
            "unready",
            f"cannot join the Ray cluster at {address!r} ({error}); RAY_ADDRESS says which, and RAY_ADDRESS=local "
            "starts one on this machine",
        ) from None
    return False


def _address() -> str | None:
    """Of the cluster; None: there is none."""
    said = os.environ.get("RAY_ADDRESS")
    if said and said.startswith("ray://"):
        raise refused(
            "unready",
            f"RAY_ADDRESS {said} is for clients from outside, which cannot be told of single steps; start the server "
            "on a machine of the cluster, with RAY_ADDRESS=auto",
        )
    if said:
        return None if said == "local" else said
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return "auto" if Path(folder, "ray", "ray_current_cluster").exists() else None  # `ray start` writes it


def hire(config: ServeConfig, most: int | None) -> Crew:
    """Have Serve run painters and a clerk, in place of those that an earlier life of this server left.

    Args:
        config: of the server.
        most: painters; None: one for each GPU, or for each machine where none is used.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # importing it has set another
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = most or (_gpus(nodes) if on_gpu(config) else len(nodes))
    crew = Crew(*names(config), count)
    for each in (crew.painters, crew.clerk):
        with suppress(TimeoutError):
            serve.delete(each)
    threads = config.threads or fitting([int(node.get("CPU", 0)) for node in nodes], count)
    if on_gpu(config):
        threads = min(threads, config.threads or THREADS_BESIDE_GPU)
    elif config.memory is None:
        config = config.model_copy(update={"memory": share(nodes, threads)})
    apps = zip((painter(config, count, threads), clerk(config)), (crew.painters, crew.clerk), strict=True)
    targets = [serve.RunTarget(app, name, None) for app, name in apps]
    serve.run_many(targets, wait_for_applications_running=False)
    return crew


def names(config: ServeConfig) -> tuple[str, str]:
    """Of the applications of painters and clerk: the same for each life of a server, by the folder of its state."""
    home = f"{socket.gethostname()}:{config.state.resolve()}"
    name = f"sumuk-{hashlib.sha256(home.encode()).hexdigest()[:8]}"
    return f"{name}-painters", f"{name}-clerk"


def on_gpu(config: ServeConfig) -> bool:
    """Whether each painter needs a card."""
    return config.device.startswith("cuda")


def _gpus(nodes: list[dict[str, float]]) -> int:
    found = int(sum(node.get("GPU", 0) for node in nodes))
    if not found:
        raise refused(
            "unready", "no machine of the Ray cluster has a GPU; leave --device cuda out, or add one"
        )
    return found


def fitting(cores: list[int], count: int) -> int:
    """How many threads each of ``count`` painters can have on machines of so many cores; at least one."""
    most = max(cores, default=1)
    return next((n for n in range(most, 1, -1) if sum(each // n for each in cores) >= count), 1)


def share(nodes: list[dict[str, float]], threads: int) -> int:
    """Bytes that the models of a painter may take: of three quarters of a machine, its part by its cores."""
    able = [node for node in nodes if node.get("CPU", 0) >= threads] or nodes
    least = min(node.get("memory", 0) * threads / max(node.get("CPU", 0), threads) for node in able)
    return max(int(least * 3 / 4), 64 * MIB)


def painter(config: ServeConfig, most: int, threads: int) -> Any:
    """Painters as an application of Serve: one, and up to ``most`` where more pictures wait than are drawn."""
    from ray import serve

    from sumuk.serve.replica import Painter

    each = slots(config)
    made = serve.deployment(
        name="Painter",
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": most,
            "target_ongoing_requests": each,
            "look_back_period_s": 15.0,
            "upscale_delay_s": 3.0,
            "downscale_delay_s": 300.0,
        },
        max_ongoing_requests=each,
        ray_actor_options={"num_cpus": threads, "num_gpus": int(on_gpu(config))},
        request_router_config={"max_backoff_s": 0.1},
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.drain,
        **ALIKE,
    )
    return made(Painter).bind(_without_secrets(config), threads)


def clerk(config: ServeConfig) -> Any:
    """The clerk as an application of Serve."""
    from ray import serve

    from sumuk.serve.replica import Clerk

    made = serve.deployment(
        name="Clerk", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, **ALIKE
    )
    return made(Clerk).bind(_without_secrets(config))


def _without_secrets(config: ServeConfig) -> ServeConfig:
    """For what stays in the cluster's memory."""
    return config.model_copy(update={"tokens": {}, "host": "127.0.0.1"})
