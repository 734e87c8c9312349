"""Requests as the protocol wants them, made from Python's own types. Used by both clients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from grpc_health.v1.health_pb2 import HealthCheckRequest

from common import origin
from common.addresses import Address
from common.credentials import Credentials
from common.key_usage import TOGETHER
from common.messages import PROTOCOL_VERSION
from common.rpc import gpu_worker_pb2 as pb

SHORT_CALL = 10.0  # seconds, for calls that only tell something
SERVICE = pb.DESCRIPTOR.services_by_name["GpuWorker"].full_name
HEALTH_CHECK = HealthCheckRequest(service=SERVICE)  # a store, too, is healthy

Metadata = list[tuple[str, str]]
Message = Mapping[str, Any]  # role, content, and whatever else the chat template reads
Prompt = str | Sequence[int] | Sequence[Message] | pb.Chat


def worker_address(address: Address | str | None) -> Address:
    """As given, as the command line takes it, or the default."""
    return address if isinstance(address, Address) else Address.of_option(address, "worker")


def generate_request(
    prompt: Prompt, samples: int, priority: int, sampling: dict[str, Any]
) -> pb.GenerateRequest:
    """`sampling` are the fields of SamplingParams; ValueError for a name or a value that it has not."""
    request = pb.GenerateRequest(
        protocol_version=PROTOCOL_VERSION,
        sampling=pb.SamplingParams(**sampling),
        samples=samples,
        priority=priority,
    )
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, pb.Chat):
        request.chat.CopyFrom(prompt)
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat(cast(Sequence[Message], prompt)))
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=cast(Sequence[int], prompt)))
    return request


def chat(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), /, **template_arguments: Any
) -> pb.Chat:
    """A chat with what its template reads: messages, tools in OpenAI's form, and further variables."""
    return pb.Chat(
        messages=[_chat_message(message) for message in messages],
        tools_json=json.dumps(list(tools)) if tools else "",
        template_arguments_json=json.dumps(template_arguments) if template_arguments else "",
    )


def score_request(text: str | Sequence[int], window: int, stride: int) -> pb.ScoreRequest:
    request = pb.ScoreRequest(protocol_version=PROTOCOL_VERSION, window=window, stride=stride)
    if isinstance(text, str):
        request.text = text
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=text))
    return request


def metadata(credentials: Credentials, request_id: str | None = None, together: int = 1) -> Metadata:
    """What goes with a call: the API key, the id of the request (else of the one that this is done for), the
    trace that it belongs to, and of how many calls it is one."""
    here = origin.current()
    name = request_id or next(iter(here.requests), None)
    return [
        *credentials.metadata,
        *([(origin.REQUEST_ID, name)] if name else []),
        *([(origin.TRACEPARENT, here.traceparent)] if here.traceparent else []),
        *([(TOGETHER, str(together))] if together > 1 else []),
    ]


def _chat_message(message: Message) -> pb.ChatMessage:
    fields = {name: value for name, value in message.items() if name not in ("role", "content")}
    return pb.ChatMessage(
        role=message["role"],
        content=message.get("content") or "",
        fields_json=json.dumps(fields) if fields else "",
    )
