"""The generation service: gRPC calls to jobs, and jobs' messages back to streams.

A call submits one job and streams what it emits; when the client goes away or its time is up, the job is
cancelled and ends within one step. Not here: translation of fields (`protocol`), errors made statuses
(`common.grpc_server`), whether calls are accepted at all (`lifecycle`), what clients leave unread (`outbox`).
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client.core import Metric

from common import origin
from common.errors import InvalidRequest
from common.key_usage import check_allowance
from common.metrics import read_on_loop
from common.process import resident_bytes
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerServicer
from gpu_worker.chats import reply_forms
from gpu_worker.jobs import (
    MOST_SCORED,
    Emit,
    Generation,
    Job,
    Scoring,
    check_length,
    check_scored_length,
    check_vocabulary,
)
from gpu_worker.lifecycle import STARTING, Lifecycle
from gpu_worker.metrics import WorkerMetrics, figures_of
from gpu_worker.outbox import Outbox
from gpu_worker.protocol import (
    cache_message,
    check_version,
    layer_messages,
    parts_message,
    prefix_fields,
    prompt_tokens,
    samples_of,
    sampling_params,
)
from gpu_worker.request_watch import RequestWatch
from gpu_worker.sequences import sequence_messages

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    from gpu_worker.loading import ServedModel
    from gpu_worker.scheduler import Scheduler
    from gpu_worker.server import Worker


_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # what is in log lines and headers as it is


class GenerationService(GpuWorkerServicer):
    """Answers for one running worker, from before it has a model."""

    model: ServedModel  # these two from `begin` on
    scheduler: Scheduler

    def __init__(self, worker: Worker, life: Lifecycle) -> None:
        self.worker, self.life = worker, life
        self.requests = 0
        self.cancelled = 0
        self.unread = 0
        self.metrics = WorkerMetrics(read_on_loop(self._figures))

    def begin(self, model: ServedModel, scheduler: Scheduler) -> None:
        """From now on there is something to ask."""
        self.model, self.scheduler = model, scheduler

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateEvent]:
        await _identify(context)
        with RequestWatch(self.metrics, "generate", context.time_remaining()) as watch, self.life.call():
            outbox = Outbox()
            job = await self._generation(request, outbox)
            watch.follow(job)
            in_reasoning = job.tokenizer is not None and job.tokenizer.opens_reasoning(job.prompt)
            async with aclosing(self._run(job, outbox)) as events:
                async for event in events:
                    event.in_reasoning = in_reasoning
                    yield event

    async def Score(self, request: pb.ScoreRequest, context: Context) -> AsyncIterator[pb.ScoreEvent]:
        await _identify(context)
        with RequestWatch(self.metrics, "score", context.time_remaining()) as watch, self.life.call():
            outbox = Outbox()
            # In a thread: a book takes seconds.
            job = await asyncio.to_thread(_scoring, request, self.model, outbox.emit)
            watch.follow(job)
            async with aclosing(self._run(job, outbox)) as events:
                async for event in events:
                    yield event

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Context) -> pb.ModelInfoReply:
        self.life.check_loaded()
        return self._model_info()

    def _model_info(self) -> pb.ModelInfoReply:
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
            max_sequences=model.engine.pools.sequences,
            **reply_forms(model.tokenizer),
        )

    async def Stats(self, request: pb.WorkerStatsRequest, context: Context) -> pb.WorkerStats:
        return await self._stats()

    async def _stats(self) -> pb.WorkerStats:
        self.life.check_loaded()
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
            prompt_tokens=self.metrics.prompt_tokens,
            completion_tokens=self.metrics.completion_tokens,
            running=scheduler.running,
            waiting=scheduler.waiting,
            set_aside=scheduler.set_aside,
            prompt_state_bytes=scheduler.prompt_state_bytes,
            store="attached" if worker.link.attachment else "lost",
            uptime_seconds=time.monotonic() - worker.started,
            parts=parts_message(self.model.engine.model.times, counters),
            state=self.life.state,
            ready=worker.ready,
            requests_cancelled=self.cancelled,
            requests_unread=self.unread,
            layers=layer_messages(counters),
            prefetch_useful_bytes=ahead.useful_bytes,
            prefetch_wasted_bytes=ahead.wasted_bytes,
            sequences=sequence_messages(scheduler.jobs),
            resident_bytes=resident_bytes(),
            store_address=str(worker.config.store),
            **prefix_fields(self.model.engine),
            **self._vram(),
        )

    def _vram(self) -> dict[str, Any]:
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

    async def _figures(self) -> list[Metric]:
        """For the metrics page."""
        if self.life.state == STARTING:
            return []
        return list(figures_of(await self._stats(), self._model_info()))

    async def Stop(self, request: pb.StopWorkerRequest, context: Context) -> pb.StopWorkerReply:
        # After the reply is on its way.
        asyncio.get_running_loop().call_later(0.05, self.worker.stop)
        return pb.StopWorkerReply(calls=self.life.calls, drain_timeout=self.worker.config.drain_timeout)

    async def _generation(self, request: pb.GenerateRequest, outbox: Outbox) -> Generation:
        check_version(request.protocol_version)
        model = self.model
        most, longest = model.max_context, model.config.max_position_embeddings
        check_length(len(request.token_ids.ids), most, longest)  # before anything is done with them
        # In a thread: a book takes seconds.
        prompt = await asyncio.to_thread(prompt_tokens, request, model.tokenizer, most)
        check_length(len(prompt), most, longest)
        check_vocabulary(prompt, model.config.vocab_size)
        samples = samples_of(request)
        params = sampling_params(request.sampling, samples)
        if params.stop and model.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, which this checkpoint lacks; leave them out")
        check_allowance(len(prompt), params.max_new_tokens * samples, request.priority)
        return Generation(
            prompt,
            params,
            model.eos_token_ids,
            model.tokenizer,
            outbox.emit,
            samples,
            request.priority,
        )

    async def _run(self, job: Job, outbox: Outbox) -> AsyncGenerator[Any, None]:
        def give_up() -> None:
            self.unread += 1
            job.cancelled = True

        self.requests += 1
        outbox.on_full = give_up
        self.scheduler.submit(job, outbox.end)
        try:
            async for message in outbox.messages():
                yield message
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            job.cancelled = True  # no effect on one that has ended


async def _identify(context: Context) -> None:
    """From here on this task works for the request's id: the client's, or a new one; the client is told."""
    given = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    name = given.get(origin.REQUEST_ID, "")
    if not _REQUEST_ID.fullmatch(name):
        name = uuid.uuid4().hex
    origin.work_for(origin.Origin((name,), given.get(origin.TRACEPARENT, "")))
    await context.send_initial_metadata(((origin.REQUEST_ID, name),))


def _scoring(request: pb.ScoreRequest, model: ServedModel, emit: Emit) -> Scoring:
    check_version(request.protocol_version)
    window, stride = _window(request, model.max_context)
    check_scored_length(len(request.token_ids.ids))  # before anything is done with them
    tokens = prompt_tokens(request, model.tokenizer, MOST_SCORED)
    check_scored_length(len(tokens))
    check_vocabulary(tokens, model.config.vocab_size)
    check_allowance(_tokens_read(len(tokens), window, stride), priority=None)
    return Scoring(tokens, window, stride, emit)


def _tokens_read(tokens: int, window: int, stride: int) -> int:
    """By a scoring, whose windows overlap by one token at least."""
    windows = 1 + max(0, -(-(tokens - window) // min(stride, window - 1)))
    return min(window, tokens) * windows


def _window(request: pb.ScoreRequest, max_context: int) -> tuple[int, int]:
    window = request.window or max_context
    stride = request.stride or window
    if not 2 <= window <= max_context:
        raise InvalidRequest(f"the window must be between 2 and {max_context} tokens, not {window}")
    if not 1 <= stride <= window:
        raise InvalidRequest(f"the stride must be between 1 and the window of {window} tokens, not {stride}")
    return window, stride
