"""The client's side of gRPC: channels, readiness, and statuses turned back into `ServingError`s."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import errors
from common.addresses import Address
from common.grpc_server import MAX_MESSAGE_BYTES

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Peers live on this host: seconds of back-off would only delay recovery. The minimum is something else
    # in spite of its name: how long one attempt may take, which on a busy machine can be a while.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.enable_http_proxy", 0),
]
_BY_STATUS: dict[grpc.StatusCode, type[errors.ServingError]] = {
    kind.status: kind
    for kind in (
        errors.InvalidRequest,
        errors.CheckpointError,
        errors.NotFound,
        errors.Incompatible,
        errors.Unavailable,
        errors.Exhausted,
    )
}


def translate(error: grpc.RpcError, peer: object) -> errors.ServingError:
    """The `ServingError` a status stands for; `peer` is named when nobody answered."""
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
        return errors.Unavailable(f"nothing answers on {peer}; is it running?")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.Unavailable(f"{peer} did not answer in time")
    return _BY_STATUS.get(code, errors.ServingError)(details)


@contextmanager
def channel_to(address: Address) -> Iterator[grpc.Channel]:
    """A blocking channel whose errors come out translated."""
    with grpc.insecure_channel(str(address), options=OPTIONS) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise translate(error, address) from None


def wait_until_serving(address: Address, timeout: float) -> None:
    """Return as soon as the process says SERVING; Unavailable, naming what was awaited, otherwise."""
    deadline = time.monotonic() + timeout
    seen = "nothing answers"
    with grpc.insecure_channel(str(address), options=OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while (left := deadline - time.monotonic()) > 0:
            try:
                status = stub.Check(health_pb2.HealthCheckRequest(), timeout=min(left, 2.0)).status
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                seen = "it is still starting"
            except grpc.RpcError:
                seen = "nothing answers"
            time.sleep(min(0.05, max(left, 0)))
    raise errors.Unavailable(f"{address} was not ready within {timeout:g} s: {seen}")
