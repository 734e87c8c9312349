"""A synthetic checkpoint served by real processes: text in, text out, and no figure without its mark."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.synth import make_synthetic
from tests.system.processes import Pair, pair_of_processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model = make_synthetic(tmp_path_factory.mktemp("model") / "random", dense_bits=8).directory
    with pair_of_processes(tmp_path_factory.mktemp("run"), model) as pair:
        pair.start_store()
        pair.start_worker()
        yield pair


def test_text_goes_in_and_comes_out(pair: Pair) -> None:
    for options in ((), ("--chat",)):
        command = ("gpu-worker", "generate", "A model", *options, "--max-new-tokens", "12", "--ignore-eos")
        result = json.loads(pair.run(*command, "--json").stdout)
        assert len(result["token_ids"]) == 12 and len(result["text"]) >= 12


def test_both_processes_say_that_it_is_synthetic(pair: Pair) -> None:
    assert "random (synthetic)" in " ".join(pair.run("expert-store", "stats").stdout.split())
    assert json.loads(pair.run("expert-store", "stats", "--json").stdout)["model"].endswith(" (synthetic)")
    stats = pair.run("gpu-worker", "stats").stdout
    assert "gpu worker: synthetic nemotron-cascade-2-30b-a3b" in " ".join(stats.split())


def test_a_third_of_the_experts_in_ram_and_dense_weights_packed_while_loading(tmp_path: Path) -> None:
    """The way to run a 30B model on a small machine: within its budgets, with the tokens of a large one."""
    model = make_synthetic(tmp_path / "random", dense_bits=8)
    experts = model.config.num_layers * model.config.n_routed_experts
    ram = experts // 3 * model.layout.stride
    results = []
    for name, budget in (("large", ()), ("small", ("--ram", str(ram)))):
        with pair_of_processes(tmp_path / name, model.directory) as pair:
            pair.start_store(*budget)
            pair.start_worker("--dense-bits", "5")
            results.append(pair.generate(range(40), 20))
            stats, store, worker = pair.store_stats(), pair.store.popen.pid, pair.worker.popen.pid
            assert resident(store, "RssAnon") + resident(store, "RssShmem") <= ram + 1e9
            assert resident(worker, "VmRSS") - resident(worker, "RssShmem") <= 2e9
    assert (stats.frames, stats.pinned_frames) == (experts // 3, 0)
    assert stats.evictions > 0 and stats.staging_seconds > stats.preload_seconds > 0
    large, small = results
    assert (small.token_ids, small.logprobs) == (large.token_ids, large.logprobs)
    assert small.finish is not None and small.finish.cache.staged > 0


def resident(pid: int, kind: str) -> int:
    """Bytes, by a line of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))
