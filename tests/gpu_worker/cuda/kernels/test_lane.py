"""Handing experts over to the host: the kernels against their plain twins, and what becomes of an answer."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpu_worker.cuda.kernels import expert_products, slots
from gpu_worker.cuda.kernels.lane import HANDED_OVER, SHARES, Lane
from gpu_worker.cuda.kernels.orders import AHEAD, GIVEN_UP, Orders, chunks_of, no_orders
from gpu_worker.cuda.kernels.slots import ABSENT, Awaited, Directory
from gpu_worker.kernels.expert_lane import Mailbox

LAYERS, EXPERTS, SLOTS, PAIRS, COLUMNS, HIDDEN, STRIDE = 2, 24, 12, 4, 640, 300, 4096 * 5
LAYER, FIRST_FRAME, ALL = 1, EXPERTS, SHARES.value


def lane(device: torch.device, share: int) -> Lane:
    """Its mailbox is where a GPU reaches it."""
    pinned = device.type == "cuda"

    def host(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, 77, dtype=dtype, pin_memory=pinned)

    x, products = host(COLUMNS, dtype=torch.float32), host(PAIRS, HIDDEN, dtype=torch.float32)
    made = Lane.of(Mailbox(host(2 + PAIRS), x, host(1).zero_(), products), LAYERS, share, device)
    made.heard.fill_(4)
    made.posted.fill_(5)
    return made


def tables(resident: list[int], coming: list[int], begun: int, clock: int, device: torch.device) -> list:
    """Slots of LAYER hold `resident` experts; `coming` ones are awaited, the first `begun` of them begun."""
    slot_of, expert_of = torch.full((LAYERS, EXPERTS), ABSENT), torch.full((LAYERS, SLOTS), ABSENT)
    for slot, expert in enumerate(resident):
        slot_of[LAYER, expert], expert_of[LAYER, slot] = slot, expert
    columns = slot_of, expert_of, torch.zeros(LAYERS, SLOTS), torch.zeros(LAYERS, EXPERTS)
    columns = *columns, torch.full((LAYERS,), clock)
    counters = torch.zeros(LAYERS, 2, dtype=torch.int64)
    directory = Directory(*(column.int() for column in columns), counters=counters)
    guesses = torch.full((LAYERS, AHEAD), ABSENT, dtype=torch.int32)
    kept = Awaited(guesses, torch.zeros(LAYERS, 3, dtype=torch.int64))
    orders = no_orders(LAYERS, PAIRS, torch.device("cpu"))
    for order, expert in enumerate(coming):
        guesses[LAYER, order], orders.slot[LAYER, order] = expert, SLOTS - 1 - order
        orders.claimed[LAYER, order] = int(order < begun)
        orders.due[LAYER, order] = chunks_of(STRIDE)
        kept.counters[LAYER, 0] += 1
    on_device = [type(table)(*(t.clone().to(device) for t in table)) for table in (directory, kept, orders)]
    frame_of = torch.arange(LAYERS * EXPERTS, dtype=torch.int32, device=device).view(LAYERS, EXPERTS)
    return [*on_device, frame_of, torch.full((16,), 99, dtype=torch.int32, device=device)]


def resolved(
    twin: Callable[..., None], device: torch.device, share: int, choices: list[int], *state: list[int] | int
) -> tuple[Lane, Directory, Awaited, Orders, torch.Tensor]:
    """What a twin leaves behind."""
    mailbox = lane(device, share)
    directory, awaited, orders, frame_of, slot_ids = tables(*state, device)  # type: ignore[arg-type]
    x = torch.arange(COLUMNS, dtype=torch.float32, device=device).view(1, -1, 128)
    chosen = torch.tensor([choices], device=device)
    twin(
        chosen, LAYER, "lru", directory, awaited, orders, frame_of, slot_ids, STRIDE, mailbox, x
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    return mailbox, directory, awaited, orders, slot_ids


def flat(result: tuple) -> list:
    told, *rest, slot_ids = result
    return [t.tolist() for table in (told.mailbox, told[1:], *rest) for t in table] + [slot_ids.tolist()]


experts = st.integers(0, EXPERTS - 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    choices=st.lists(experts, min_size=PAIRS, max_size=PAIRS, unique=True),
    resident=st.lists(experts, max_size=6, unique=True),
    coming=st.lists(experts, max_size=AHEAD, unique=True),
    begun=st.integers(0, AHEAD),
    clock=st.integers(0, 50),
    share=st.integers(0, ALL),
)
@example(choices=[9, 3, 7, 1], resident=[], coming=[9, 1], begun=1, clock=0, share=ALL)
def test_handing_over(
    device: torch.device,
    choices: list[int],
    resident: list[int],
    coming: list[int],
    begun: int,
    clock: int,
    share: int,
) -> None:
    coming = [expert for expert in coming if expert not in resident]
    state = resident, coming, begun, clock
    found, expected = (
        resolved(twin, device, share, choices, *state) for twin in (slots.resolve, slots.resolve_plain)
    )
    assert flat(found) == flat(expected)


@pytest.mark.parametrize("share", [0, 8, ALL])
def test_whose_turn_it_is(device: torch.device, share: int) -> None:
    """Of two that nobody foresaw, one guess that is being copied and one that is not, and nothing else."""
    choices = [9, 3, 7, 1]
    told, directory, awaited, orders, slot_ids = resolved(
        slots.resolve, device, share, choices, [], [9, 1], 1, 0
    )
    handed = {0: [], 8: [3, 7], ALL: [3, 7, 1]}[share]
    assert [slot == HANDED_OVER.value for slot in slot_ids[:4].tolist()] == [e in handed for e in choices]
    assert int(told.posted) == 5 + bool(handed)
    if handed:
        frames = [FIRST_FRAME + expert if expert in handed else -1 for expert in choices]
        assert told.mailbox.request.tolist() == [6, LAYER, *frames]
        assert told.mailbox.x.tolist() == list(range(COLUMNS))
    else:
        assert told.mailbox.request.tolist() == [77] * (2 + PAIRS)
    assert told.computed.tolist() == [0, len(handed)]
    assert directory.counters[LAYER].tolist() == [2 - (1 in handed), 2 + (1 in handed)]
    assert int(directory.slot_of[LAYER, 9]) == SLOTS - 1, "who has begun goes on"
    assert (int(orders.claimed[LAYER, 1]) == GIVEN_UP.value) == (1 in handed)
    assert awaited.counters[LAYER].tolist()[:2] == [2 - (1 in handed)] * 2


def handed(
    device: torch.device, share: int, choices: list[int], resident: list[int], clock: int
) -> list[int]:
    slot_ids = resolved(slots.resolve, device, share, choices, resident, [], 0, clock)[-1].tolist()
    return [expert for expert, slot in zip(choices, slot_ids, strict=False) if slot == HANDED_OVER.value]


def test_everyone_gets_a_slot_at_times(device: torch.device) -> None:
    """A lone one goes to the CPU, if that is not much slower than the link, but not always; nor do always the
    same of several."""
    for share in (6, ALL):
        alone = [handed(device, share, [9, 3, 7, 1], [3, 7, 1], clock) for clock in range(32)]
        assert [len(experts) for experts in alone].count(0) == 2
    assert all(handed(device, 5, [9, 3, 7, 1], [3, 7, 1], clock) == [] for clock in range(4))
    pairs = [handed(device, 8, [9, 3, 7, 1], [3, 7], clock) for clock in range(EXPERTS)]
    assert {tuple(pair) for pair in pairs} == {(9,), (1,)}


def test_an_answer_is_waited_for_and_taken(device: torch.device) -> None:
    """Pairs that were not handed over come from the device, whatever lies in the mailbox."""
    asked = lane(device, ALL)
    mailbox = asked.mailbox
    slot_ids = torch.tensor([2, HANDED_OVER.value, 0, HANDED_OVER.value], dtype=torch.int32, device=device)
    here, there = torch.randn(2, PAIRS, HIDDEN)
    weights, shared, residual = torch.rand(1, PAIRS), torch.randn(1, HIDDEN), torch.randn(1, HIDDEN)
    handed = slot_ids.cpu() == HANDED_OVER.value
    whole = torch.where(handed[:, None], there, here)
    expected = expert_products.combine_plain(expert_products.Products(whole), weights, shared, residual)
    poisoned = torch.where(handed[:, None], torch.nan, here).to(device)

    def answer() -> None:
        time.sleep(0.2)
        mailbox.products.copy_(torch.where(handed[:, None], there, torch.nan))
        mailbox.answered.copy_(torch.tensor([5]))

    thread = threading.Thread(target=answer)
    thread.start()
    products = expert_products.Products(poisoned, asked, slot_ids)
    arguments = weights.to(device), shared.to(device), residual.to(device)
    plain = expert_products.combine_plain(products, *arguments)
    mailbox.answered.fill_(0)
    again = threading.Thread(target=answer)
    again.start()
    found = expert_products.combine(products, *arguments)
    for each in (thread, again):
        each.join()
    assert torch.equal(plain.cpu(), expected)
    assert torch.allclose(found.cpu(), expected, rtol=1e-6, atol=1e-6)
