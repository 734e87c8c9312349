"""A whole worker in this process: its metrics, its live view, what it tells of requests in progress."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common import metrics
from common.addresses import Address
from common.errors import Unavailable
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.top import polling as polling_module
from gpu_worker.top.command import print_frame
from gpu_worker.top.polling import Polling
from tests.helpers.metrics_pages import Families, lint, of_page, value, values
from tests.helpers.workers import LocalWorker, QuietLink, local_worker
from tests.system.processes import eventually

SOMEWHERE = Address.parse("127.0.0.1:1")  # any free port is taken instead
PROMPT = [1, 2, 3]


@pytest.fixture(autouse=True, scope="module")
def any_free_port() -> Iterator[None]:
    server = metrics._PageServer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_PageServer", lambda host, port, registry: server(host, 0, registry))
        yield


@pytest.fixture(scope="module")
def worker(quiet_link: QuietLink, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWorker]:
    options: dict[str, Any] = {"max_sequences": 2, "metrics": SOMEWHERE}
    with local_worker(quiet_link, tmp_path_factory.mktemp("run"), **options) as worker:
        yield worker


def page(worker: LocalWorker) -> Families:
    assert worker.worker is not None and worker.worker._page is not None
    return of_page(worker.worker._page.port)


def stats(worker: LocalWorker) -> pb.WorkerStats:
    with worker.client() as client:
        return client.stats()


def test_the_page_says_what_the_statistics_say(worker: LocalWorker) -> None:
    before = page(worker)
    with worker.client() as client:
        for count in (5, 3):
            client.answers(PROMPT, max_new_tokens=count, ignore_eos=True)
        list(client.score(PROMPT))
        with pytest.raises(ValueError, match="empty"):
            client.answers([])
    worker.eventually_idle()
    families, told = page(worker), stats(worker)
    assert list(lint(families.values())) == []
    hits, misses = (values(families, f"worker_expert_{what}", "layer") for what in ("hits", "misses"))
    assert len(hits) == len(misses) == 2 and all(hits.values())
    assert (sum(hits.values()), sum(misses.values())) == (told.cache.hits, told.cache.misses)
    assert value(families, "worker_completion_tokens") == told.completion_tokens == 8
    assert value(families, "worker_prompt_tokens") == told.prompt_tokens == 9
    outcomes = {
        (sample.labels["kind"], sample.labels["outcome"]): sample.value
        for sample in families["expert_serving_worker_requests"].samples
    }
    assert outcomes == {("generate", "finished"): 2, ("score", "finished"): 1, ("generate", "invalid"): 1}
    counts = {
        sample.name: sample.value
        for name in ("time_to_first_token", "inter_token_latency", "queue")
        for sample in families[f"expert_serving_worker_{name}_seconds"].samples
        if sample.name.endswith("_count")
    }
    assert list(counts.values()) == [2, 6, 2]
    assert value(families, "worker_ready") == 1 and value(before, "worker_completion_tokens") == 0


def test_requests_are_told_while_they_run_and_while_they_wait(worker: LocalWorker) -> None:
    worker.step_seconds = 0.002
    before = stats(worker).completion_tokens
    with worker.client() as client:
        names = ["first", "second", "third"]
        streams = [client.generate(PROMPT, request_id=n, max_new_tokens=400, ignore_eos=True) for n in names]
        for stream in streams[:2]:
            next(stream)
        pending = iter(streams[2])
        with worker.pause:
            waiting = threading.Thread(target=lambda: next(pending))
            waiting.start()
            eventually(lambda: len(stats(worker).sequences) == 3, 30, "the queue")
            told = stats(worker).sequences
            live = stats(worker).completion_tokens - before
        for stream in streams[:2]:
            stream.close()  # type: ignore[attr-defined]
        waiting.join(30)
        streams[2].close()  # type: ignore[attr-defined]
    worker.step_seconds = 0.0
    worker.eventually_idle()
    assert [sequence.request_id for sequence in told] == names
    assert [sequence.state for sequence in told] == ["decode", "decode", "waiting"]
    assert all(sequence.prompt_tokens == 3 for sequence in told)
    assert live >= told[0].completion_tokens + told[1].completion_tokens - 2 > 0, "counted as they come"
    assert not stats(worker).sequences


def test_one_frame_of_the_live_view(worker: LocalWorker) -> None:
    out = io.StringIO()
    with worker.client() as client:
        print_frame(Polling(client, 1.0), Console(file=out, width=80))
    shown = out.getvalue()
    assert "cpu, float32, direct" in shown and "no request is in progress" in shown
    assert "hit rate by layer" in shown and "0 running, 0 waiting" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_the_live_view_outlives_the_worker_and_finds_its_successor(
    quiet_link: QuietLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling_module, "_SAME_START", 0.05)
    with local_worker(quiet_link, tmp_path) as first:
        client = first.client()
        polling = Polling(client, 1.0)
        polling.ask()
        history, problem = polling.latest()
        assert history is not None and not problem
    polling._poll()
    kept, problem = polling.latest()
    assert kept is history and "nothing answers" in problem
    with pytest.raises(Unavailable):
        polling.ask()
    with local_worker(quiet_link, tmp_path):
        polling._poll()
        history, problem = polling.latest()
        assert history is not None and history is not kept and not problem
    client.close()


def test_a_worker_that_is_starting_has_a_page_of_its_process(quiet_link: QuietLink, tmp_path: Path) -> None:
    quiet_link.may_attach.clear()
    with local_worker(quiet_link, tmp_path, metrics=SOMEWHERE) as starting:
        eventually(lambda: getattr(starting.worker, "_page", None) is not None, 30, "the page")
        families = page(starting)
    assert "process_resident_memory_bytes" in families and "expert_serving_worker_ready" not in families
