"""The generation service: gRPC calls to jobs, and jobs' messages back to streams.

A call submits one job and streams what it emits; when the client goes away, the job is cancelled and ends
within one step. Translation of fields lives in `protocol`, errors become statuses in `common.grpc_server`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from common.errors import InvalidRequest
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerServicer
from gpu_worker.jobs import Generation, Job, Scoring, check_tokens
from gpu_worker.protocol import cache_message, check_version, parts_message, prompt_tokens, sampling_params

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    from gpu_worker.loading import ServedModel
    from gpu_worker.scheduler import Scheduler
    from gpu_worker.server import Worker


@dataclass
class _End:
    """The last thing in a job's outbox."""

    error: BaseException | None


class _Outbox:
    """What a job says, from the engine's thread to the event loop. Unbounded: a job's output is bounded."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def emit(self, message: Any) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, message)

    def end(self, error: BaseException | None) -> None:
        self.emit(_End(error))

    async def messages(self) -> AsyncIterator[Any]:
        """Messages until the job's end; raises its error."""
        while not isinstance(message := await self._queue.get(), _End):
            yield message
        if message.error is not None:
            raise message.error


class GenerationService(GpuWorkerServicer):
    """Answers for one running worker."""

    def __init__(self, worker: Worker, model: ServedModel, scheduler: Scheduler) -> None:
        self.worker, self.model, self.scheduler = worker, model, scheduler
        self.requests = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateEvent]:
        check_version(request.protocol_version)
        model, outbox = self.model, _Outbox()
        prompt = await asyncio.to_thread(prompt_tokens, request, model.tokenizer)  # a book takes seconds
        check_tokens(prompt, model.config.vocab_size, model.max_context)
        params = sampling_params(request.sampling)
        if params.stop and model.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, which this checkpoint lacks")
        job = Generation(prompt, params, model.eos_token_ids, model.tokenizer, outbox.emit)
        try:
            async for event in self._run(job, outbox):
                yield event
        finally:
            self.prompt_tokens += len(prompt)
            self.completion_tokens += len(job.output)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> AsyncIterator[pb.ScoreEvent]:
        check_version(request.protocol_version)
        model, outbox = self.model, _Outbox()
        tokens = await asyncio.to_thread(prompt_tokens, request, model.tokenizer)
        check_tokens(tokens, model.config.vocab_size, longest=1 << 31)
        window, stride = _window(request, model.max_context)
        async for event in self._run(Scoring(tokens, window, stride, outbox.emit), outbox):
            yield event
        self.prompt_tokens += len(tokens)

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Context) -> pb.ModelInfoReply:
        model, config = self.model, self.model.config
        return pb.ModelInfoReply(
            model=model.name,
            fingerprint=model.fingerprint,
            vocab_size=config.vocab_size,
            max_context=model.max_context,
            has_tokenizer=model.tokenizer is not None,
            has_chat_template=model.tokenizer is not None and model.tokenizer.has_chat_template,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            pattern=config.pattern,
            layers=config.num_layers,
            experts_per_layer=config.n_routed_experts,
            experts_per_token=config.num_experts_per_tok,
        )

    async def Stats(self, request: pb.WorkerStatsRequest, context: Context) -> pb.WorkerStats:
        worker, scheduler = self.worker, self.scheduler
        experts = self.model.engine.experts
        # On a GPU they are the device's, and reading them waits for the step that it is at.
        counters, ahead = await asyncio.to_thread(lambda: (experts.counters.copy(), experts.hints.counters))
        return pb.WorkerStats(
            slots_per_layer=experts.slots,
            slots_pinned=experts.pinned,
            slot_bytes=experts.nbytes,
            policy=experts.describe(),
            prefetch=experts.hints.describe(),
            cache=cache_message(counters),
            hints_sent=ahead.sent,
            hints_useful=ahead.useful,
            requests=self.requests,
            requests_failed=scheduler.failed,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            running=scheduler.running,
            waiting=scheduler.waiting,
            store="attached" if worker.link.attachment else "lost",
            uptime_seconds=time.monotonic() - worker.started,
            parts=parts_message(self.model.engine.model.times, counters),
            **self._vram(),
        )

    def _vram(self) -> dict[str, int]:
        """Fields of WorkerStats; none on a CPU."""
        if self.model.memory is None:
            return {}
        use = self.model.memory.use()
        return {
            "vram_budget": self.model.account.budget or 0,
            "vram_peak": use.peak,
            "vram_used": use.now,
            "vram_tensors_peak": use.tensors,
        }

    async def Stop(self, request: pb.StopWorkerRequest, context: Context) -> pb.StopWorkerReply:
        # After the reply is on its way.
        asyncio.get_running_loop().call_later(0.05, self.worker.stop)
        return pb.StopWorkerReply()

    async def _run(self, job: Job, outbox: _Outbox) -> AsyncIterator[Any]:
        self.requests += 1
        self.scheduler.submit(job, outbox.end)
        try:
            async for message in outbox.messages():
                yield message
        finally:
            job.cancelled = True  # no effect on a job that has ended


def _window(request: pb.ScoreRequest, max_context: int) -> tuple[int, int]:
    window = request.window or max_context
    stride = request.stride or window
    if not 2 <= window <= max_context:
        raise InvalidRequest(f"the window must be between 2 and {max_context} tokens, not {window}")
    if not 1 <= stride <= window:
        raise InvalidRequest(f"the stride must be between 1 and the window of {window} tokens, not {stride}")
    return window, stride
