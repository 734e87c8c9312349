"""What is told of requests in progress and in the queue, continuation by continuation.

Read while the engine's thread goes on: each figure is right, but of a moment of its own. Nothing is changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.jobs import Generation, Job, Scoring

MOST_TOLD = 64


def sequence_messages(jobs: Iterable[Job]) -> list[pb.SequenceInfo]:
    """Of those that have begun, then of those that wait; both in order of arrival."""
    ordered = sorted(jobs, key=lambda job: not job.begun)
    return list(islice((message for job in ordered for message in _messages(job)), MOST_TOLD))


def _messages(job: Job) -> Iterator[pb.SequenceInfo]:
    told: dict[str, Any] = {
        "request_id": ",".join(job.origin.requests),
        "age_seconds": time.monotonic() - job.arrived,
    }
    if isinstance(job, Scoring):
        told |= {"prompt_tokens": len(job.tokens), "prompt_tokens_read": job.scored}
    elif isinstance(job, Generation):
        told |= {"prompt_tokens": len(job.prompt), "prompt_tokens_read": job.prompt_tokens_read}
    samples = list(job.running) if isinstance(job, Generation) else []
    if not samples:
        written = job.completion_tokens if isinstance(job, Generation) else 0
        yield pb.SequenceInfo(state=_state(job), completion_tokens=written, **told)
    for sample in samples:
        yield pb.SequenceInfo(
            state="decode",
            completion_tokens=len(sample.output),
            tokens_per_second=sample.tokens_per_second,
            **told,
        )


def _state(job: Job) -> str:
    """Of one of which nothing decodes."""
    if not job.begun:
        return "waiting"
    if not (isinstance(job, Generation) and job.prompt_read):
        return "prefill"
    return "set aside" if job.aside else "decode"  # between two samples, for less than a step
