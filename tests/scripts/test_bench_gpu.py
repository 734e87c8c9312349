"""The GPU's benchmark as far as no GPU is needed: what it takes from counters, which workers it measures, and
that rows are kept at once. The processes that it starts are not started here.
"""

import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import bench_gpu
from gpu_report import Report, Row, Spread
from gpu_requests import Decoded, decoded

from common.rpc import gpu_worker_pb2 as pb

SHORT = pb.Finish(
    usage=pb.Usage(prompt_tokens=128, completion_tokens=1),
    cache=pb.CacheCounters(hits=700, misses=2200, bytes_fetched=14_000, misses_on_cpu=10),
)
LONG = pb.Finish(
    usage=pb.Usage(prompt_tokens=128, completion_tokens=11),
    timings=pb.Timings(decode_ms=50),
    cache=pb.CacheCounters(hits=1700, misses=2580, bytes_fetched=17_000, misses_on_cpu=40),
)


@dataclass(frozen=True)
class Measured(Row):
    rate: Spread

    def cells(self) -> dict[str, str]:
        return {"rate": self.rate.range}


def test_what_decoding_did_is_what_the_longer_request_did_more() -> None:
    before = pb.WorkerStats(hints_sent=100, hints_useful=60)
    after = pb.WorkerStats(hints_sent=130, hints_useful=80)
    expected = Decoded(
        tokens=10, seconds=0.05, hits=1000, misses=380, on_cpu=30, bytes_moved=3000, guesses=30, useful=20
    )
    assert decoded(SHORT, LONG, before, after) == expected


def test_each_worker_is_measured_once_and_comparisons_by_the_first_prompt() -> None:
    args = Namespace(
        groups=["pairs", "prefetch", "policies"], budgets=["auto", "7.6GB", "16GB"], prompts=[128, 4096],
        policy="lfru",
    )  # fmt: skip
    workers = [(w.group, w.budget, w.policy, w.prefetch, w.prompts) for w in bench_gpu.workers(args)]
    assert workers == [
        ("pairs", "auto", "lfru", "auto", (128, 4096)),
        ("pairs", "7.6GB", "lfru", "auto", (128, 4096)),
        ("pairs", "16GB", "lfru", "auto", (128, 4096)),
        ("prefetch", "7.6GB", "lfru", "off", (128,)),
        ("policies", "7.6GB", "lru", "auto", (128,)),
    ]
    args.groups = ["prefetch"]
    assert [w.prefetch for w in bench_gpu.workers(args)] == ["off", "auto"]
    args.groups = ["lane"]
    assert [w.cpu_experts for w in bench_gpu.workers(args)] == ["0", "auto"]


def test_rows_are_kept_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "rows", None, {"machine": "any"})
    report.add(Measured("pairs", Spread.of([3.0, 1.0, 2.0])))
    report.failed("pairs", "5GB", "a long log\n\nerror: too small\n")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert rows[1:] == [
        {"group": "pairs", "rate": [2.0, 1.0, 3.0]},
        {"group": "pairs", "what": "5GB", "not_measured": ["a long log", "error: too small"]},
    ]
    report.close()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"machine": "any", "results": rows[1:]}


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_gpu.main()
