"""The server on Ray Serve: each replica is an engine with the server's own application.

    serve run radix_mlp.integrations.ray_serve:app model_id=Qwen/Qwen3-Embedding-0.6B num_replicas=4

Ray Serve routes, scales, updates and restarts replicas; `docs/ray-serve.md` has examples.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

import ray
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application

from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.http.errors import UnhealthyError
from radix_mlp.serve.http.logs import set_up_logs
from radix_mlp.serve.settings import ServeSettings

__all__ = ["Replica", "app", "build_app"]

logger = logging.getLogger("radix_mlp.serve")

NOT_HERE = {
    "hostname": "Serve's proxy listens; set http_options",
    "port": "Serve's proxy listens; set http_options",
    "uds_path": "Serve's proxy listens, and not at a Unix socket",
    "prometheus_port": "each replica has its metrics at /metrics",
    "replicas": "Serve starts the replicas; set num_replicas",
}
"""Options of `radix-mlp serve` that have no meaning here."""


def app(args: dict[str, Any]) -> Application:
    """The application from the arguments of `serve run` or of a config file.

    Args:
        args: names and values of `ServeSettings`, and `num_replicas`. All other options of a deployment go into the
            config file, under `deployments`.

    Raises:
        InvalidInputError: an unknown argument, or a wrong value.

    Examples:
        >>> app({"model_id": "tiny", "num_replicas": "2"}).__class__.__name__
        'Application'
    """
    given = dict(args)
    options = {}
    if "num_replicas" in given:
        count = given.pop("num_replicas")
        options["num_replicas"] = count if count == "auto" else _parsed(int, count, "num_replicas")
    known = {field.name for field in fields(ServeSettings)} - set(NOT_HERE)
    for name, value in given.items():
        if name in NOT_HERE:
            raise InvalidInputError(f"{name} {value}: {NOT_HERE[name]}.")
        if name not in known:
            near = get_close_matches(name, [*known, "num_replicas"], 1)
            raise InvalidInputError(f"{name}: unknown argument." + (f" Did you mean {near[0]}?" if near else ""))
    if "model_id" not in given:
        raise InvalidInputError("model_id is missing: give a hub id, a folder, or tiny.")
    return build_app(_parsed(ServeSettings, given), **options)


def build_app(settings: ServeSettings, **options: Any) -> Application:
    """The server as an application for `serve.run`.

    Args:
        settings: of the server; the address is Serve's.
        options: of the deployment, as `serve.deployment` takes them: `num_replicas`, `autoscaling_config`,
            `ray_actor_options`, ... A replica takes one GPU where the cluster has GPUs, unless `ray_actor_options` says
            otherwise.

    Raises:
        InvalidInputError: a wrong option.

    Examples:
        >>> from ray import serve
        >>> application = build_app(ServeSettings(model_id="tiny"), num_replicas=2)
        >>> serve.run(application, name="tiny")  # doctest: +SKIP
    """
    defaults: dict[str, Any] = {
        "name": "Server",
        "ray_actor_options": {"num_gpus": _num_gpus(settings)},
        # a request has at least one text, so the server's own limit is reached first
        "max_ongoing_requests": settings.max_concurrent_requests,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": settings.shutdown_timeout + 5,
    }
    try:
        deployment = serve.deployment(**{**defaults, **options})(serve.ingress()(Replica))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"options of the deployment: {error}") from error
    application: Application = deployment.bind(replace(settings, replicas=1))
    return application


class Replica:
    """An engine and the server's application, which Serve calls without another HTTP connection."""

    def __init__(self, settings: ServeSettings) -> None:
        # the process that builds the application needs no torch
        from radix_mlp.serve.app import create_app
        from radix_mlp.serve.load_engine import load_engine

        set_up_logs(settings.log_level, as_json=settings.json_output)
        engine, sha = load_engine(settings)
        self._application = create_app(engine, settings, sha=sha)
        self._supervisor = self._application.state.service.supervisor
        self._supervisor.on_hang(_end_process)

    def __serve_build_asgi_app__(self) -> Any:
        """Serve runs this application, its start and its end included."""
        return self._application

    async def check_health(self) -> None:
        """Serve replaces the replica after three failures; an engine that restarts is healthy again before that.

        Raises:
            UnhealthyError: the engine does not run.
        """
        if not self._supervisor.is_healthy:
            raise UnhealthyError("the engine does not run")


async def _end_process() -> None:
    """Exit; Serve starts another replica. A hanging thread cannot be stopped by itself."""
    logger.error("the engine hangs; ending this replica")
    # lets answers that are being sent arrive
    await asyncio.sleep(1)
    os._exit(1)


def _num_gpus(settings: ServeSettings) -> float:
    if settings.device is not None:
        return float(settings.device.startswith("cuda"))
    if ray.is_initialized():
        return float(ray.cluster_resources().get("GPU", 0) >= 1)
    # Serve's command builds the application before it joins the cluster
    import torch

    return float(torch.cuda.is_available())


def _parsed(kind: type[Any], given: Any, name: str = "") -> Any:
    """A value of a type from what a file or a command line holds."""
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(reason := first.get("ctx", {}).get("error"), InvalidInputError):
            raise reason from None
        what = ".".join(map(str, first["loc"][:1])) or name
        raise InvalidInputError(f"{what} {first['input']!r}: {first['msg']}.") from None
