"""Starting: from anywhere, in any order, and interrupted at any moment without a trace."""

import signal
import threading
import time
from pathlib import Path

import pytest

from common.api_keys import add_key
from common.errors import ServingError, Unavailable
from tests.system.processes import READY, Pair, Process, eventually, pair_of_processes


def test_a_relative_model_path_serves_workers_elsewhere(
    tmp_path: Path, packed_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store says where the checkpoint is; a worker in another directory must find it there."""
    monkeypatch.chdir(packed_model.parent)
    with pair_of_processes(tmp_path / "run", packed_model.name) as pair:
        pair.start_store()
        monkeypatch.chdir(tmp_path)
        pair.start_worker()
        assert pair.generate([1, 2, 3], 2).finish is not None


def test_a_worker_waits_for_its_store(pair: Pair) -> None:
    worker = Process(pair.runtime, "gpu-worker", "start", "--device", "cpu")
    pair.processes.append(worker)
    eventually(lambda: "waiting for the store" in worker.log.read_text(), READY, "waiting")
    done = pair.run("gpu-worker", "wait", "--timeout", "0.5", check=False)
    assert done.returncode == 1 and "the worker is starting: it waits for its store" in done.stderr
    pair.start_store()
    worker.wait_ready(pair.worker_address)
    assert pair.generate([1, 2, 3], 2).finish is not None


def test_who_waits_for_a_worker_needs_no_key(pair: Pair, tmp_path: Path) -> None:
    """Only what it is at, is told to those who have one."""
    add_key(tmp_path / "keys.toml", "alice")
    keys = str(tmp_path / "keys.toml")
    worker = Process(pair.runtime, "gpu-worker", "start", "--device", "cpu", "--api-keys", keys)
    pair.processes.append(worker)
    eventually(lambda: "waiting for the store" in worker.log.read_text(), READY, "waiting")
    done = pair.run("gpu-worker", "wait", "--timeout", "0.5", check=False)
    assert done.returncode == 1 and "is there, but not ready" in done.stderr


@pytest.mark.parametrize("program", ["expert-store", "gpu-worker"])
@pytest.mark.parametrize("delay", [0.6, 1.4, 2.2])
def test_a_signal_while_starting_leaves_nothing(
    tmp_path: Path, packed_model: Path, program: str, delay: float
) -> None:
    """At a few moments: option parsing, imports, loading, or ready by then."""
    runtime = tmp_path / "run"
    with pair_of_processes(runtime, packed_model) as pair:
        command = ("start", str(packed_model)) if program == "expert-store" else ("start", "--device", "cpu")
        process = Process(runtime, program, *command)
        pair.processes.append(process)
        time.sleep(delay)
        process.popen.send_signal(signal.SIGTERM)
        process.popen.wait(READY)
        assert pair.leftovers() == []


def test_a_worker_that_waits_for_the_disk_stops_at_once(pair: Pair, record_bytes: int) -> None:
    """Its store stands still in the middle of a fetch: stopping does not wait for the fetch's time limit."""
    pair.start_store("--ram", str(record_bytes))
    pair.start_worker("--slots", "1", "--drain-timeout", "0")
    pair.store.signal(signal.SIGSTOP)
    ended: list[ServingError] = []

    def ask() -> None:
        with pytest.raises(ServingError) as failure:
            pair.generate([1, 2, 3], 5)
        ended.append(failure.value)

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: pair.worker_stats().running == 1, READY, "the request")
    started = time.monotonic()
    pair.worker.stop()
    assert time.monotonic() - started < 10  # a fetch may take 30 s
    thread.join(READY)
    assert isinstance(ended[0], Unavailable)
    assert "stopping" in str(ended[0])
