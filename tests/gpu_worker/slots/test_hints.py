"""Hints are sent while they can help, and with `auto` only as long as they do."""

from collections.abc import Sequence

from common.expert_key import ExpertKey
from gpu_worker.slots import hints as hints_module
from gpu_worker.slots.hints import Hints


class Store:
    """As much of a fetcher as hints need."""

    def __init__(self, complete: bool = False) -> None:
        self.complete = complete
        self.hinted: list[ExpertKey] = []

    def all_fit(self) -> bool:
        return self.complete

    def hint(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        self.hinted += keys
        return list(keys)


def keys(count: int, layer: int = 0) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in range(count)]


def make(mode: str, complete: bool = False) -> Hints:
    return Hints(mode, Store(complete))  # type: ignore[arg-type]


def test_no_hints_when_told_or_when_every_expert_is_in_ram() -> None:
    assert not make("off").wanted()
    assert not make("on", complete=True).wanted()
    assert not make("auto", complete=True).wanted()
    assert make("on").wanted()
    assert make("auto").wanted()


def test_a_hint_is_useful_when_the_later_miss_finds_it_ready() -> None:
    hints = make("auto")
    hints.send(keys(4))
    hints.note_misses(keys(3), staged={ExpertKey(0, 2)})  # the third still had to be waited for
    hints.note_misses(keys(3), staged=set())  # no hint is open for these any more
    assert (hints.counters.sent, hints.counters.useful) == (4, 2)


def test_auto_pauses_useless_hints_and_tries_again_later() -> None:
    hints = make("auto")
    judged = hints_module._JUDGED_HINTS
    hints.send(keys(judged))
    assert not hints.wanted()
    assert "fewer than" in hints.describe()
    hints.note_misses(keys(hints_module._RETRY_MISSES, layer=1), staged=set())
    assert hints.wanted()


def test_auto_goes_on_with_useful_hints_and_on_never_pauses() -> None:
    for mode, useful in (("auto", True), ("on", False)):
        hints = make(mode)
        for layer in range(8):
            hints.send(keys(hints_module._JUDGED_HINTS // 2, layer))
            if useful:
                hints.note_misses(keys(hints_module._JUDGED_HINTS // 2, layer), staged=set())
            assert hints.wanted()
