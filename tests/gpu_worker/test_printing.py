"""What counters and accounts look like, as text."""

from __future__ import annotations

import re
from typing import Any

from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.account import Account, Entry
from gpu_worker.printing import account_table, as_text, finish_table, stats_table

VRAM = {"vram_budget": 7_600_000_000, "vram_peak": 7_410_000_000, "vram_used": 7_100_000_000}


def test_stats_have_the_gpus_memory_beside_its_budget_and_nothing_of_the_kind_on_a_cpu() -> None:
    stats = pb.WorkerStats(**VRAM, vram_tensors_peak=6_200_000_000)
    text = as_text(stats_table(stats, pb.ModelInfoReply()))
    assert "at most 7.41 GB of 7.6 GB (tensors 6.2 GB), now 7.1 GB" in text
    assert "device memory" not in as_text(stats_table(pb.WorkerStats(), pb.ModelInfoReply()))


def test_what_was_fetched_early_is_told_by_its_use() -> None:
    stats = pb.WorkerStats(prefetch_useful_bytes=3_000_000_000, prefetch_wasted_bytes=500_000_000)
    text = as_text(stats_table(stats, pb.ModelInfoReply()))
    assert "3 GB that were needed, 500 MB in vain" in text
    assert "in vain" not in as_text(stats_table(pb.WorkerStats(), pb.ModelInfoReply()))


def test_stats_tell_what_a_worker_is_at() -> None:
    def shown(**stats: Any) -> str:
        return as_text(stats_table(pb.WorkerStats(**stats), pb.ModelInfoReply()))

    assert "serving, but not ready" in shown(state="serving", requests_unread=2)
    assert "2 did not read what came" in shown(state="serving", requests_unread=2)
    ready = shown(state="serving", ready=True)
    assert "serving" in ready and "not ready" not in ready and "slow clients" not in ready
    assert "draining" in shown(state="draining")


def test_what_the_prefix_cache_saved_is_told() -> None:
    stats = pb.WorkerStats(
        prefix_lookups=5, prefix_hits=3, prefix_saved_tokens=1200,
        prefix_snapshots=4, prefix_bytes=200_000_000, prefix_budget=800_000_000,
    )  # fmt: skip
    text = " ".join(as_text(stats_table(stats, pb.ModelInfoReply())).split())
    assert "3 of 5 prompts, 1200 tokens not read again; 4 snapshots, 200 MB of 800 MB" in text
    assert "prefix cache │ off" in as_text(stats_table(pb.WorkerStats(), pb.ModelInfoReply()))
    usage = pb.Usage(prompt_tokens=100, cached_prompt_tokens=64, completion_tokens=7)
    finished = as_text(finish_table(pb.Finish(reason="eos", usage=usage)))
    assert "eos, 7 tokens after 100, 64 of them known" in finished


def test_an_account_is_told_line_by_line_and_aligned() -> None:
    entries = (
        Entry("dense weights", 1_210_000_000, "5 bits"),
        Entry("staging ring", 156_000_000, "24 records"),
    )
    account = Account(7_600_000_000, entries, 30, 200_000_000, 128, 4096, "--vram 7.6 GB less the rest")
    lines = as_text(account_table(account)).splitlines()
    ends = [size.end() for line in lines if (size := re.search(r"[\d.]+ [GM]B", line))]
    assert len(ends) == 5 and len(set(ends)) == 1
    rows = [" ".join(line.split()) for line in lines]
    for row in (
        "dense weights 1.21 GB 5 bits",
        "not used 234 MB",
        "budget 7.6 GB --vram 7.6 GB less the rest",
    ):
        assert row in rows
    assert any("6 GB 30 of 128 a layer, 200 MB for one in each" in row for row in rows)
    assert all(line == line.rstrip() and len(line) <= 110 for line in lines)
