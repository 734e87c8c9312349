"""Messages to both gRPC services: random ones, damaged ones, and bytes that are none.

Messages are sent as bytes, whatever they are. A call may succeed, or end with a status that says what the
caller did wrong or what is used up. A stream is left after a few events, since its length is the caller's
wish.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from common.addresses import Address
from common.grpc_client import open_async_channel
from common.rpc import expert_store_pb2, gpu_worker_pb2
from tests.fuzz.mutate import mutated, number, some_bytes, text
from tests.fuzz.tally import Tally

LIMIT = 60.0  # seconds until a call that has not ended counts as one that hangs
_AT_ONCE = 24
_EVENTS = 2  # of a stream
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined] # missing in its stubs
_LEFT_OUT = ("Stop",)  # does what it says
_Code = grpc.StatusCode
_FINE = (
    _Code.OK, _Code.INVALID_ARGUMENT, _Code.NOT_FOUND, _Code.FAILED_PRECONDITION, _Code.RESOURCE_EXHAUSTED,
)  # fmt: skip
_FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 2.0, 1e-30, 1e30, math.inf, -math.inf, math.nan)


async def run(tally: Tally, numbers: range, worker: Address, store: Address) -> None:
    """Several calls at a time."""
    rest = iter(numbers)
    async with open_async_channel(worker) as to_worker, open_async_channel(store) as to_store:
        doors = [
            *((to_worker, method) for method in _methods(gpu_worker_pb2, "GpuWorker")),
            *((to_store, method) for method in _methods(expert_store_pb2, "ExpertStore")),
        ]
        weights = [5 if method.server_streaming else 1 for _, method in doors]
        await asyncio.gather(*(_caller(tally, rest, doors, weights) for _ in range(_AT_ONCE)))


async def _caller(tally: Tally, rest: Iterator[int], doors: list[Any], weights: list[int]) -> None:
    for case in rest:
        draw = tally.draw(case)
        channel, method = draw.choices(doors, weights)[0]
        data = request_bytes(draw, method)
        try:
            code, details = await asyncio.wait_for(_call(channel, method, data), LIMIT)
        except asyncio.TimeoutError:
            tally.fault(case, f"{method.full_name} has not ended after {LIMIT} s: {data!r}")
            continue
        if code not in _FINE or "Traceback" in details:
            tally.fault(case, f"{method.full_name} ended with {code}, {details}: {data!r}")
        tally.outcome(f"{method.name} {code.name}")


async def _call(channel: Any, method: MethodDescriptor, data: bytes) -> tuple[_Code, str]:
    """How it ended: OK for a stream that was left."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if not method.server_streaming:
            await channel.unary_unary(path)(data)
            return _Code.OK, ""
        call = channel.unary_stream(path)(data)
        for _ in range(_EVENTS):
            if await call.read() is _EOF:
                break
        call.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return _Code.OK, ""


def request_bytes(draw: random.Random, method: MethodDescriptor) -> bytes:
    way = draw.random()
    if way < 0.1:
        return some_bytes(draw)
    message = GetMessageClass(method.input_type)()
    _fill(draw, message, depth=4)
    if method.name in ("Generate", "Score") and draw.random() < 0.5:
        _make_plausible(draw, message)
    data = message.SerializeToString()
    return mutated(draw, data) if way < 0.6 else data


def _make_plausible(draw: random.Random, message: Any) -> None:
    """Near enough to a good request that its other fields are looked at."""
    message.protocol_version = 0
    message.token_ids.ids[:] = [draw.randrange(100) for _ in range(draw.choice((1, 1, 5, 70)))]
    if hasattr(message, "samples") and draw.random() < 0.7:
        message.samples = draw.randrange(3)


def _fill(draw: random.Random, message: Message, depth: int) -> None:
    """Every field with a chance; of a oneof, whichever comes last stays."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() < 0.5:
            continue
        if field.message_type is not None:
            if field.is_repeated:
                for _ in range(draw.randrange(4) if depth else 0):
                    _fill(draw, getattr(message, field.name).add(), depth - 1)
            elif depth:
                getattr(message, field.name).SetInParent()
                _fill(draw, getattr(message, field.name), depth - 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(_value(draw, field) for _ in range(draw.choice((1, 2, 30))))
        else:
            setattr(message, field.name, _value(draw, field))


def _value(draw: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return some_bytes(draw)
        chosen = text(draw) if draw.random() < 0.8 else draw.choice(('{"a": [1]}', "[[[", '[{"type": 1}]'))
        return chosen.replace("\ud800", "?")
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return draw.choice(_FLOATS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return draw.random() < 0.5
    signed = kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    wanted = number(draw) if draw.random() < 0.5 else draw.randrange(130)
    return int(min(max(wanted, least), most)) if math.isfinite(wanted) else most


def _methods(module: Any, service: str) -> list[MethodDescriptor]:
    described = module.DESCRIPTOR.services_by_name[service]
    return [method for method in described.methods if method.name not in _LEFT_OUT]
