"""Serve's hook for the way from the front to a replica: by prefix, bounded by the work that waits there."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from radix_mlp.serve.fleet.prefix_routing import PrefixRouter

__all__ = ["PrefixRequestRouter"]


class PrefixRequestRouter(RequestRouter):
    """Routes calls whose first argument is a `Forwarded` with `PrefixRouter`, others to the least loaded replica.

    A replica's load is the bytes of the requests that this router sent there and that are not answered, less what they
    share with those before them. Serve pickles this class by value, so it leans on nothing else in this file.
    """

    def initialize_state(self, **options: Any) -> None:
        """Serve calls this with the deployment's `request_router_kwargs`: those of `PrefixRouter`."""
        self._policy: PrefixRouter[str] = PrefixRouter(**options)
        self._loads: dict[str, int] = {}
        # request -> where it is counted, and as how much
        self._counted: dict[str, tuple[str, int]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica for a request first; the others in case that it is full or gone."""
        # the one with a place; who is full is asked once more, as Serve asks it how full it is
        replicas = {
            replica.replica_id.unique_id: replica
            for replica in self.select_available_replicas(candidate_replicas) or candidate_replicas
        }
        if pending_request is None or not replicas:
            return [list(replicas.values())]
        request = pending_request.args[0] if pending_request.args else None
        name = pending_request.metadata.internal_request_id
        before = self._counted.get(name)
        self._uncount(name)
        choice = self._policy.choose(
            getattr(request, "key", None), {replica: self._loads.get(replica, 0) for replica in replicas}
        )
        work = max(1, len(getattr(request, "body", b"")) - choice.shared)
        if before is not None:
            # asked for anew, it shares its prefix with itself
            work = before[1]
        self._counted[name] = choice.replica, work
        self._loads[choice.replica] = self._loads.get(choice.replica, 0) + work
        # Serve tells of the end of what was sent, and not of what was given up before
        pending_request.future.add_done_callback(lambda future: self._on_decided(future, name))
        chosen = replicas.pop(choice.replica)
        # where nobody has a place, Serve waits a moment before it asks again
        pending_request.routing_context.should_backoff = True
        return [[chosen], list(replicas.values())]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has taken the request: if it is another than the chosen one, count it there."""
        name = pending_request.metadata.internal_request_id
        replica, work = self._counted.get(name, (None, 0))
        if replica is not None and replica != replica_id.unique_id:
            self._uncount(name)
            self._counted[name] = replica_id.unique_id, work
            self._loads[replica_id.unique_id] = self._loads.get(replica_id.unique_id, 0) + work

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request was answered, refused by the replica, or lost with it."""
        self._uncount(internal_request_id)

    def _on_decided(self, future: asyncio.Future[RunningReplica], name: str) -> None:
        if future.cancelled():
            self._uncount(name)

    def _uncount(self, name: str) -> None:
        replica, work = self._counted.pop(name, (None, 0))
        if replica is not None:
            self._loads[replica] -= work
            if not self._loads[replica]:
                del self._loads[replica]
