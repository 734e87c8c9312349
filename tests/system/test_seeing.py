"""One request seen through both processes: by its id in their logs, as one trace, in the store's metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import origin
from common.origin import Origin
from gpu_worker.client import WorkerClient
from tests.helpers.metrics_pages import lint, of_page, value
from tests.system.processes import Pair, free_port

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SPANS = ("worker generate", "queue", "prefill", "decode", "store stage")


def objects(log: Path) -> Iterator[dict[str, Any]]:
    """All JSON objects of a text: lines of the log, and spans of OpenTelemetry's console exporter."""
    text, decoder, place = log.read_text(), json.JSONDecoder(), 0
    while (place := text.find("{", place)) >= 0:
        found, place = decoder.raw_decode(text, place)
        yield found


def test_a_request_that_waits_for_the_disk_is_seen_in_both_processes(
    pair: Pair, record_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    port = free_port()
    log = ("--log-format", "json", "--log-level", "debug")
    pair.start_store("--ram", str(12 * record_bytes), "--metrics", f"127.0.0.1:{port}", *log)
    pair.start_worker(*log)
    with WorkerClient(pair.worker_address) as client, origin.working_for(Origin(("seen",), CALLER)):
        client.answers([1, 2, 3], max_new_tokens=4, ignore_eos=True)
    families, told = of_page(port), pair.store_stats()
    assert pair.worker.stop() == pair.store.stop() == 0

    assert list(lint(families.values())) == []
    assert value(families, "store_staged_bytes") == told.staged_bytes > 0
    assert value(families, "store_demands") == told.demands > 0 and value(families, "store_leases") == 1
    assert families["process_resident_memory_bytes"].samples[0].value > 1e7
    worker, store = list(objects(pair.worker.log)), list(objects(pair.store.log))
    (line,) = [entry for entry in worker if entry.get("kind") == "generate"]
    assert (line["request_id"], line["outcome"], line["completion_tokens"]) == ("seen", "finished", 4)
    staged = [entry for entry in store if entry.get("logger") == "expert_store.stage_watch"]
    assert staged and {entry["request_id"] for entry in staged} == {"seen"}

    spans = {name: [span for span in worker + store if span.get("name") == name] for name in SPANS}
    assert all(spans.values())
    (request,) = spans["worker generate"]
    assert request["parent_id"] == "0x" + CALLER.split("-")[2]
    parts = [span for name in SPANS[1:] for span in spans[name]]
    assert {span["context"]["trace_id"] for span in parts} == {"0x" + CALLER.split("-")[1]}
    assert {span["parent_id"] for span in parts} == {request["context"]["span_id"]}
    assert len(spans["store stage"]) == told.demands - told.demands_ready
