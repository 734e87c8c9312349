"""What a frame shows, as text: of a busy worker on a GPU, of an idle one on a CPU, of one that is gone."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from common.rpc import expert_store_pb2 as store_pb
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.top.history import Answer, History
from gpu_worker.top.view import View, duration

MODEL = pb.ModelInfoReply(model="Nemotron-30B", device="cuda:0", dtype="bfloat16", experts_per_layer=128)


def answer(uptime: float, tokens: int, moved: int, hits: int, store: bool = True, **fields: object) -> Answer:
    """Even layers only hit, odd ones hit and miss in equal parts, the last looks nothing up."""
    layers = [pb.LayerCounters(hits=hits, misses=hits * (n % 2)) for n in range(22)] + [pb.LayerCounters()]
    worker = pb.WorkerStats(
        uptime_seconds=uptime,
        completion_tokens=tokens,
        cache=pb.CacheCounters(bytes_fetched=moved),
        layers=layers,
        store="attached" if store else "lost",
        resident_bytes=1_700_000_000,
        **fields,  # type: ignore[arg-type]
    )
    told = store_pb.StoreStats(frames=2944, ready_frames=2000, staged_bytes=moved // 2, arena_bytes=19 << 30)
    return Answer(worker, told if store else None)


def busy() -> History:
    history = History(MODEL)
    sequences = [
        pb.SequenceInfo(request_id="chat", state="decode", completion_tokens=143, tokens_per_second=64.2),
        pb.SequenceInfo(request_id="book", state="prefill", prompt_tokens=9000, prompt_tokens_read=4096),
        pb.SequenceInfo(request_id="many", state="set aside", completion_tokens=20),
        *(pb.SequenceInfo(request_id=f"w{n}", state="waiting", prompt_tokens=5) for n in range(4)),
    ]
    fields = {
        "running": 2, "waiting": 4, "set_aside": 1, "requests": 11, "requests_failed": 1,
        "slots_per_layer": 30, "slot_bytes": 4_480_000_000, "vram_budget": 8_000_000_000,
        "vram_used": 6_000_000_000, "sequences": sequences, "policy": "lru, decided on the device",
    }  # fmt: skip
    for second in range(5):
        history.add(answer(100 + second, 150 * second, 2_000_000_000 * second, 10 * second + 5, **fields))
    return history


def text(view: View, width: int = 80, colour: bool = False) -> str:
    file = io.StringIO()
    system = "truecolor" if colour else None
    Console(file=file, width=width, force_terminal=colour, color_system=system).print(view)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_busy_worker_is_told_in_rates_states_and_rows(width: int) -> None:
    shown = text(View(busy()), width)
    assert all(len(line) <= width for line in shown.splitlines())
    for said in (
        "Nemotron-30B  cuda:0, bfloat16, lru",
        "up 1 min 44 s",
        "150 tok/s",
        "2 GB/s",
        "1 GB/s",
        "2 running, 1 set aside, 4 waiting"[: width - 55],
        "4, 1 of them failed",
        "30 of 128 a layer, 4.48 GB",
        "attached, 2,000 of 2,944 frames",
        "6 GB of 8 GB",
        "worker 1.7 GB",
        "4,096/9,000",
    ):
        assert said in shown, f"{said!r} is not in\n{shown}"
    (chat,) = [line for line in shown.splitlines() if line.startswith("chat")]
    assert chat.split() == ["chat", "decode", "0", "143", "64.2", "0.0", "s"]


def test_what_clients_call_their_requests_is_shown_as_it_is() -> None:
    history = History(MODEL)
    sequences = [pb.SequenceInfo(request_id="[/red][bold]x", state="decode")]
    history.add(answer(1, 0, 0, 1, sequences=sequences))
    assert "[/red][bold]x" in text(View(history))


def test_layers_have_their_rates_in_digits_and_in_shades() -> None:
    shown = text(View(busy()))
    assert "hit rate by layer, last 4 s; together 66.7%" in shown
    cells = dict(re.findall(r"(?<!\d)(\d+) +(\d+█|\d+▒|-)", shown.split("together")[1].split("request")[0]))
    assert len(cells) == 23 and cells["0"] == "100█" and cells["1"] == "50▒" and cells["22"] == "-"


def test_colours_go_from_red_to_green() -> None:
    assert "48;2;60;210;70" in text(View(busy()), colour=True), "100 % is green"
    assert "█ " not in text(View(busy()), colour=True).split("hit rate")[1], "no shades where there is colour"


def test_rows_that_do_not_fit_are_counted() -> None:
    shown = text(View(busy(), height=18)).splitlines()
    assert len(shown) <= 18 and shown[-1].strip() == "and 4 more"
    assert text(View(busy(), height=5)).splitlines()[-1].strip() == "and 7 more"


def test_requests_that_the_worker_does_not_tell_one_by_one_are_counted() -> None:
    history = History(MODEL)
    told = [pb.SequenceInfo(request_id=f"w{n}", state="waiting") for n in range(64)]
    history.add(answer(7, 0, 0, 0, running=2, waiting=98, sequences=told))
    assert text(View(history)).splitlines()[-1].strip() == "and 36 more"


def test_a_worker_on_a_cpu_whose_store_is_gone() -> None:
    history = History(pb.ModelInfoReply(model="demo", device="cpu", dtype="float32"))
    history.add(answer(7, 0, 0, 0, store=False, policy="direct"))
    shown = text(View(history, "nothing answers on unix:/w.sock"))
    assert shown.startswith("! nothing answers on unix:/w.sock")
    assert "none: experts stay in frames" in shown and "lost" in shown and "VRAM" not in shown
    assert "no request is in progress" in shown and "together none" in shown
    assert text(View(None, "nothing answers")).strip() == "! nothing answers"


def test_rates_are_of_the_last_seconds_and_of_all_time_when_nothing_happens() -> None:
    history = History(MODEL)
    history.add(answer(10, 0, 0, 100))
    history.add(answer(60, 10, 0, 100))
    assert history.hit_rates().seconds == 60 and history.hit_rates().all is not None
    history.add(answer(65, 10, 0, 101))
    assert history.hit_rates().seconds == 5
    assert history.rates(lambda told: told.worker.completion_tokens, 1) == [0.0]
    assert history.rates(lambda told: told.worker.completion_tokens, 9) == [0.2, 0.0]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.25, "0.2 s"),
        (9.96, "10.0 s"),
        (42.7, "42 s"),
        (61, "1 min 1 s"),
        (11580, "3 h 13 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations_have_two_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said
