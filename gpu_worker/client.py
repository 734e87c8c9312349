"""A blocking Python client of a GPU worker: what the command line uses, and anyone may.

    with WorkerClient(Address.default("worker")) as client:
        for piece in client.generate("def fibonacci(", max_new_tokens=64):
            print(piece.text, end="")

Errors come out as `common.errors`; nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import grpc

from common.addresses import Address
from common.grpc_client import OPTIONS, translate
from common.messages import PROTOCOL_VERSION
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerStub

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
_SHORT_CALL = 10.0


@dataclass
class Generated:
    """A whole generation, put together from its events."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: pb.Finish | None = None

    def add(self, event: pb.GenerateEvent) -> None:
        if event.HasField("finish"):
            self.finish = event.finish
        self.text += event.delta.text
        self.token_ids += [token.id for token in event.delta.tokens]
        self.logprobs += [token.logprob for token in event.delta.tokens]


class WorkerClient:
    """One channel to one worker. Not for use after `close`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(str(address), options=OPTIONS)
        self._stub = GpuWorkerStub(self._channel)

    def generate(self, prompt: Prompt, **sampling: Any) -> Iterator[pb.GenerateEvent]:
        """Stream a continuation. `prompt` is text, token ids, or chat messages (role, content).

        `sampling` are the fields of `SamplingParams` in proto/gpu_worker.proto. Closing the iterator cancels.
        """
        request = pb.GenerateRequest(
            protocol_version=PROTOCOL_VERSION, sampling=pb.SamplingParams(**sampling), **_prompt_field(prompt)
        )
        return self._stream(self._stub.Generate(request))

    def score(self, text: str | Sequence[int], window: int = 0, stride: int = 0) -> Iterator[pb.ScoreEvent]:
        """Stream the log-probabilities of a text or of token ids; 0 means the worker's default."""
        given: dict[str, Any] = (
            {"text": text} if isinstance(text, str) else {"token_ids": pb.TokenIds(ids=text)}
        )
        request = pb.ScoreRequest(
            protocol_version=PROTOCOL_VERSION,
            window=window,
            stride=stride,
            **given,
        )
        return self._stream(self._stub.Score(request))

    def model_info(self) -> pb.ModelInfoReply:
        return self._call(self._stub.ModelInfo, pb.ModelInfoRequest())

    def stats(self) -> pb.WorkerStats:
        return self._call(self._stub.Stats, pb.WorkerStatsRequest())

    def stop(self) -> None:
        """Ask the worker to end in good order."""
        self._call(self._stub.Stop, pb.StopWorkerRequest())

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=_SHORT_CALL)
        except grpc.RpcError as error:
            raise translate(error, self.address) from None

    def _stream(self, call: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from call
        except grpc.RpcError as error:
            raise translate(error, self.address) from None
        finally:
            call.cancel()  # type: ignore[attr-defined]


def _prompt_field(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    if prompt and isinstance(prompt[0], dict):
        messages = cast(Sequence[dict[str, str]], prompt)
        return {"chat": pb.Chat(messages=[pb.ChatMessage(**message) for message in messages])}
    return {"token_ids": pb.TokenIds(ids=cast(Sequence[int], prompt))}
