"""The server on Ray Serve: several replicas with an engine each, requests routed by their prefixes.

    serve run radix_mlp.integrations.ray_serve:app model_id=Qwen/Qwen3-Embedding-0.6B num_replicas=4

`docs/ray-serve.md` has all arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import ray
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from radix_mlp.errors import InvalidInputError
from radix_mlp.integrations.ray_serve_autoscaling import PendingTokensPolicy
from radix_mlp.integrations.ray_serve_front import Front
from radix_mlp.integrations.ray_serve_replica import EngineDeployment
from radix_mlp.integrations.ray_serve_router import PrefixRequestRouter
from radix_mlp.serve.settings import ServeSettings

__all__ = ["RayServeSettings", "app", "build_app"]

FRONT_REQUESTS = 10_000
"""More than a front ever has: the replicas' own limits count."""
REPORT_SECONDS = 10
"""Replicas tell their numbers so often."""
NOT_HERE = {
    "hostname": "Serve's proxy listens; its options are http_options",
    "port": "Serve's proxy listens; its options are http_options",
    "uds_path": "Serve's proxy listens, and not at a socket in the file system",
    "prometheus_port": "/metrics has the numbers of all replicas",
}
"""Options of `radix-mlp serve` that have no meaning here."""


@dataclass(frozen=True, kw_only=True)
class RayServeSettings:
    """How many replicas there are, and what each takes of the cluster.

    Raises:
        InvalidInputError: a value out of range.

    Example:
        >>> RayServeSettings(num_replicas=2, max_replicas=8).autoscales
        True
    """

    num_replicas: int = 1
    """Engines; the fewest if `max_replicas` is given."""
    max_replicas: int | None = None
    """Add replicas up to this number while there is work for them, and end them again."""
    target_tokens: int | None = None
    """Compact tokens that a replica should have to wait for and run; `max_batch_tokens` unless given."""
    upscale_delay: float = 10.0
    """Seconds for which more replicas must be wanted until they are started."""
    downscale_delay: float = 300.0
    look_back: float = 15.0
    """Seconds over which the number of tokens is averaged."""
    gpus_per_replica: float | None = None
    """1 where the cluster has GPUs, unless given."""
    cpus_per_replica: float = 1.0
    num_fronts: int = 1
    """Processes that read requests and pass them on; one takes some thousand small requests a second."""
    cpus_per_front: float = 0.0
    slack: float = 0.25
    """Of `PrefixRouter`."""
    affinity: float = 4.0
    """Of `PrefixRouter`."""
    max_surge_percent: int = 0
    """In an update, start so many new replicas before old ones end; there must be GPUs for them."""
    health_check_period: float = 5.0

    def __post_init__(self) -> None:
        for name in ("num_replicas", "num_fronts"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} {getattr(self, name)}: must be at least 1.")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise InvalidInputError(
                f"max_replicas {self.max_replicas}: must be at least num_replicas, {self.num_replicas}."
            )
        if self.target_tokens is not None and self.target_tokens < 1:
            raise InvalidInputError(f"target_tokens {self.target_tokens}: must be at least 1.")
        for name, least in (("look_back", REPORT_SECONDS), ("health_check_period", 0)):
            if not getattr(self, name) > least:
                raise InvalidInputError(f"{name} {getattr(self, name)}: must be more than {least} seconds.")
        least_zero = ("upscale_delay", "downscale_delay", "cpus_per_replica", "cpus_per_front", "slack", "affinity")
        for name in (*least_zero, "gpus_per_replica"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InvalidInputError(f"{name} {value}: must be at least 0.")
        if not 0 <= self.max_surge_percent <= 100:
            raise InvalidInputError(f"max_surge_percent {self.max_surge_percent}: must be from 0 to 100.")

    @property
    def autoscales(self) -> bool:
        """Whether the number of replicas follows the work."""
        return self.max_replicas is not None and self.max_replicas > self.num_replicas


def app(args: dict[str, Any]) -> Application:
    """The application from the arguments of `serve run` or of a config file: names of both settings classes.

    Raises:
        InvalidInputError: an argument that there is not, or a wrong value.

    Example:
        >>> app({"model_id": "tiny", "num_replicas": "2"}).__class__.__name__
        'Application'
    """
    given = dict(args)
    for name, advice in NOT_HERE.items():
        if name in given:
            raise InvalidInputError(f"{name} {given[name]}: {advice}.")
    known = {kind: {field.name for field in fields(kind)} for kind in (ServeSettings, RayServeSettings)}
    every = set().union(*known.values()) - set(NOT_HERE)
    for name in given:
        if name not in every:
            near = get_close_matches(name, every, 1)
            raise InvalidInputError(
                f"{name}: there is no such argument." + (f" Is it {near[0]} that you mean?" if near else "")
            )
    if "model_id" not in given:
        raise InvalidInputError("model_id is missing: give a hub id, a folder, or tiny.")
    settings = _parsed(ServeSettings, {name: value for name, value in given.items() if name in known[ServeSettings]})
    scale = _parsed(RayServeSettings, {name: value for name, value in given.items() if name in known[RayServeSettings]})
    return build_app(settings, scale)


def build_app(settings: ServeSettings, scale: RayServeSettings | None = None) -> Application:
    """The server as an application for `serve.run`; run once more under the same name, replicas are updated in turn.

    Args:
        settings: of the server; address and port are Serve's.
        scale: replicas, and what each takes.

    Example:
        >>> from ray import serve
        >>> application = build_app(ServeSettings(model_id="tiny"), RayServeSettings(num_replicas=2))
        >>> serve.run(application, name="tiny")  # doctest: +SKIP
    """
    scale = scale or RayServeSettings()
    # who may ask is checked by the front
    own = replace(settings, api_key=None, cors_allow_origin=())
    engines = serve.deployment(
        name="Engine",
        **_number_of(scale, settings),
        ray_actor_options={"num_cpus": scale.cpus_per_replica, "num_gpus": _gpus(settings, scale)},
        # a request takes a place at least, so the engine's own limit comes first
        max_ongoing_requests=settings.max_concurrent_requests,
        max_queued_requests=settings.max_concurrent_requests,
        request_router_config={
            "request_router_class": PrefixRequestRouter,
            "request_router_kwargs": {"slack": scale.slack, "affinity": scale.affinity},
        },
        health_check_period_s=scale.health_check_period,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.shutdown_timeout + 5,
        max_surge_percent=scale.max_surge_percent,
    )(EngineDeployment)
    front = serve.deployment(
        name="Front",
        num_replicas=scale.num_fronts,
        ray_actor_options={"num_cpus": scale.cpus_per_front},
        max_ongoing_requests=FRONT_REQUESTS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.shutdown_timeout + 10,
        # a front is small, so a new one is there before an old one ends
        max_surge_percent=100,
    )(Front)
    application: Application = front.bind(engines.bind(own), settings)
    return application


def _number_of(scale: RayServeSettings, settings: ServeSettings) -> dict[str, Any]:
    if scale.max_replicas is None or not scale.autoscales:
        return {"num_replicas": scale.num_replicas}
    policy = AutoscalingPolicy(
        policy_function=PendingTokensPolicy,
        policy_kwargs={"target_tokens": scale.target_tokens or settings.max_batch_tokens},
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.num_replicas,
            max_replicas=scale.max_replicas,
            upscale_delay_s=scale.upscale_delay,
            downscale_delay_s=scale.downscale_delay,
            look_back_period_s=scale.look_back,
            policy=policy,
        )
    }


def _gpus(settings: ServeSettings, scale: RayServeSettings) -> float:
    if scale.gpus_per_replica is not None:
        return scale.gpus_per_replica
    if settings.device is not None:
        return float(settings.device.startswith("cuda"))
    if ray.is_initialized():
        return float(ray.cluster_resources().get("GPU", 0) >= 1)
    # Serve's command builds the application before it joins the cluster
    import torch

    return float(torch.cuda.is_available())


def _parsed(kind: type[Any], given: dict[str, Any]) -> Any:
    """A settings object from values as they stand in a file or on a command line."""
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        if isinstance(reason := error.errors()[0].get("ctx", {}).get("error"), InvalidInputError):
            raise reason from None
        first = error.errors()[0]
        raise InvalidInputError(f"{'.'.join(map(str, first['loc'][:1]))} {first['input']!r}: {first['msg']}.") from None
