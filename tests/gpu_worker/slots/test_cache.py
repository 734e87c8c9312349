"""One layer's slots keep their conservation law under any order of calls; policies choose what they say."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_worker.slots.cache import LayerSlots
from gpu_worker.slots.policies import FADING, POLICIES, Usage, lfru, lru

EXPERTS = st.integers(0, 7)


class SlotMachine(RuleBasedStateMachine):
    """Calls the slots as waves do; the model is which experts are filling, resident and pinned."""

    @initialize(slots=st.integers(1, 4), policy=st.sampled_from(sorted(POLICIES)))
    def start(self, slots: int, policy: str) -> None:
        self.slots = LayerSlots(slots, 8, POLICIES[policy])
        self.filling: set[int] = set()
        self.resident: set[int] = set()
        self.pinned: set[int] = set()

    @rule(expert=EXPERTS)
    def reserve(self, expert: int) -> None:
        if expert in self.filling | self.resident or len(self.filling | self.pinned) == self.slots.slots:
            return
        self.slots.reserve(expert)
        self.filling.add(expert)
        self.resident = {e for e in self.resident if self.slots.lookup(e) is not None}

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), success=st.booleans())
    def finish(self, data: st.DataObject, success: bool) -> None:
        expert = data.draw(st.sampled_from(sorted(self.filling)))
        self.filling.remove(expert)
        if success:
            self.slots.publish(expert)
            self.resident.add(expert)
        else:
            self.slots.abandon(expert)

    @precondition(lambda self: self.resident - self.pinned)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        expert = data.draw(st.sampled_from(sorted(self.resident - self.pinned)))
        self.slots.pin(expert)
        self.pinned.add(expert)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        expert = data.draw(st.sampled_from(sorted(self.pinned)))
        self.slots.unpin(expert)
        self.pinned.remove(expert)

    @precondition(lambda self: self.resident)
    @rule(data=st.data(), retire=st.booleans())
    def use(self, data: st.DataObject, retire: bool) -> None:
        expert = data.draw(st.sampled_from(sorted(self.resident)))
        self.slots.begin([expert])
        (self.slots.retire if retire else self.slots.touch)(expert)

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "slots"):
            return
        self.slots.check_integrity()
        assert self.slots.pinned == len(self.pinned)
        assert self.pinned <= self.resident, "a pinned expert was evicted"
        places = [self.slots.lookup(expert) for expert in self.resident]
        assert None not in places
        assert len(set(places)) == len(places)


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_lru_gives_up_the_oldest_and_of_equals_the_lower_slot() -> None:
    assert lru(9, [(0, Usage(5, 1)), (1, Usage(3, 9)), (2, Usage(3, 1))]) == 1


def test_lfru_gives_up_the_fewest_uses_for_its_age() -> None:
    # uses / age: 4/10, 1/2, 2/10
    assert lfru(10, [(0, Usage(1, 4)), (1, Usage(9, 1)), (2, Usage(1, 2))]) == 2
    assert lfru(10, [(0, Usage(1, 2)), (2, Usage(1, 2))]) == 0


def use(slots: LayerSlots, expert: int) -> None:
    """A step that wants this one."""
    slots.begin([expert])
    if slots.lookup(expert) is None:
        slots.reserve(expert)
        slots.publish(expert)
    else:
        slots.touch(expert)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_retired_expert_is_the_next_victim(policy: str) -> None:
    """However often it was used."""
    slots = LayerSlots(2, 8, POLICIES[policy])
    for expert in (0, 1, 1, 1):
        use(slots, expert)
    slots.retire(1)
    slots.reserve(2)
    assert slots.lookup(1) is None
    assert slots.lookup(0) is not None


def test_an_expert_keeps_its_uses_while_it_is_away() -> None:
    slots = LayerSlots(2, 8, lfru)
    for expert in (0, 0, 0, 0, 1, 2, 0, 3):
        use(slots, expert)
    # 0 came back with four uses, now five in 2 steps of age: 3 took the slot of 2, with one.
    assert slots.lookup(0) is not None and slots.lookup(2) is None


def test_uses_fade() -> None:
    slots = LayerSlots(1, 8, lfru)
    for _ in range(FADING - 1):
        use(slots, 0)
    assert slots.state().uses[:2] == [FADING - 1, 0]
    use(slots, 1)
    assert slots.state().uses[:3] == [FADING // 2, 1, 0]
    for _ in range(2 * FADING):
        use(slots, 1)
    assert slots.state().uses[0] == FADING // 8


def test_reserving_with_everything_pinned_is_a_broken_invariant() -> None:
    slots = LayerSlots(1, 8, lru)
    slots.reserve(0)
    slots.publish(0)
    slots.pin(0)
    with pytest.raises(AssertionError, match="pinned"):
        slots.reserve(1)
