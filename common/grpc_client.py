"""The client's side of gRPC: channels, readiness, and statuses turned back into `ServingError`s."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import errors
from common.addresses import Address
from common.credentials import NO_CREDENTIALS, Credentials
from common.grpc_server import MAX_MESSAGE_BYTES
from common.statuses import retry_after

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Peers live on this host: seconds of back-off would only delay recovery. The minimum is something else
    # in spite of its name: how long one attempt may take, which on a busy machine can be a while.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.enable_http_proxy", 0),
    # A server whose machine is gone says nothing more: streams then end within 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # a minute if left alone, whatever the other one says
]
_BY_STATUS: dict[grpc.StatusCode, type[errors.ServingError]] = {
    kind.status: kind
    for kind in (
        errors.InvalidRequest,
        errors.CheckpointError,
        errors.NotFound,
        errors.Incompatible,
        errors.Unavailable,
        errors.Unauthenticated,
        errors.PermissionDenied,
    )
}
# What gRPC says of a dead peer, and of calls that this side has given up.
_BROKEN = ("socket closed", "stream removed", "connection reset", "broken pipe")
_OUR_DOING = ("locally cancelled", "channel closed")


def translate(error: grpc.RpcError, peer: object) -> errors.ServingError:
    """The `ServingError` a status stands for; `peer` is named when nobody answered."""
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE and ("handshake" in details or "SSL" in details):
        return errors.Unavailable(
            f"no TLS connection to {peer}: {details}; check $EXPERT_SERVING_TLS_CA, "
            "and $EXPERT_SERVING_TLS_CERT if it wants one"
        )
    if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details and "Socket closed" in details:
        # What a server that wants TLS does to a client without.
        return errors.Unavailable(
            f"{peer} closes connections at once; if it speaks TLS, set $EXPERT_SERVING_TLS_CA"
        )
    if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
        return errors.Unavailable(f"nothing answers on {peer}; is it running?")
    if code is grpc.StatusCode.UNAVAILABLE and any(words in details.lower() for words in _BROKEN):
        return errors.Unavailable(f"the connection to {peer} broke: the process there has ended ({details})")
    if code is grpc.StatusCode.CANCELLED and not any(words in details.lower() for words in _OUR_DOING):
        return errors.Unavailable(f"{peer} broke the call off; it may be about to end")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(f"{peer} did not answer in full within the time given")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.Incompatible(
            f"{peer} does not know this call: an expert store where a GPU worker is meant, or the other way "
            "round, or one of another version"
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:  # gRPC's own words
        return errors.InvalidRequest(f"a message may have {MAX_MESSAGE_BYTES >> 20} MiB at most: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.Exhausted(details, retry_after(error))
    return _BY_STATUS.get(code, errors.ServingError)(details)


def open_channel(address: Address, credentials: Credentials = NO_CREDENTIALS) -> grpc.Channel:
    """A blocking channel, with TLS if the address is TCP and credentials have it; whoever opens it closes it.

    An API key goes with each call, in `credentials.metadata`.
    """
    tls = credentials.tls() if address.socket_path is None else None
    if tls is None:
        return grpc.insecure_channel(str(address), options=OPTIONS)
    return grpc.secure_channel(str(address), tls, options=OPTIONS)


def open_async_channel(address: Address, credentials: Credentials = NO_CREDENTIALS) -> grpc.aio.Channel:
    """The same for the running event loop."""
    tls = credentials.tls() if address.socket_path is None else None
    if tls is None:
        return grpc.aio.insecure_channel(str(address), options=OPTIONS)
    return grpc.aio.secure_channel(str(address), tls, options=OPTIONS)


@contextmanager
def channel_to(address: Address) -> Iterator[grpc.Channel]:
    """A blocking channel whose errors come out translated."""
    with open_channel(address) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise translate(error, address) from None


def wait_until_serving(
    address: Address, timeout: float, credentials: Credentials = NO_CREDENTIALS, service: str = ""
) -> None:
    """Return as soon as the process says SERVING; Unavailable, naming what was awaited, otherwise.

    service: its full name; Incompatible where a process listens that has another.
    """
    deadline = time.monotonic() + timeout
    seen = f"nothing answers on {address}"
    with open_channel(address, credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while (left := deadline - time.monotonic()) > 0:
            try:
                request = health_pb2.HealthCheckRequest(service=service)
                status = stub.Check(request, timeout=min(left, 2.0)).status
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                seen = f"{address} is there, but not ready"
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise errors.Incompatible(f"what listens on {address} is no {service}") from None
                seen = str(translate(error, address))
            time.sleep(min(0.05, max(left, 0)))
    raise errors.Unavailable(f"not ready within {timeout:g} s: {seen}")
