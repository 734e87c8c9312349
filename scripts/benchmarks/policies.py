"""Which experts a layer's slots hold, by each replacement policy: routings replayed, one token a step.

The demo model's own routing, over library modules of Python, which it knows, and test modules, which it does
not; and two that are drawn, 6 of 128 experts a token: one where only popularity counts, as in synthetic
checkpoints, and one that stays with what it chose before as well. Both change whom they favour half-way.
`optimum` gives up whoever is wanted last, which takes knowing what comes. Not done here: time; what is copied
ahead.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from measure import Figure
from quality import LIBRARY, TESTS, write_texts
from torch import Tensor

from common.checkpoint import HuggingFaceCheckpoint
from expert_store.block_forward import forward
from expert_store.calibration import read_text
from expert_store.config import DEMO
from expert_store.models import locate_model
from gpu_worker.slots.cache import LayerSlots
from gpu_worker.slots.counters import LayerCounters
from gpu_worker.slots.policies import POLICIES
from gpu_worker.slots.waves import waves

Routing = list[list[int]]  # the experts of each token of a layer, in ascending order

_TOKENS = 6000  # of each drawn routing, and most of a text
_WARM = 500  # tokens that are not counted
_DRAWN = {"popularity alone": (1.25, 0.0), "popularity and habit": (1.0, 2.2)}


def benchmark() -> Iterator[Figure]:
    """Hits in percent, the median of layers or of drawings."""
    with TemporaryDirectory() as directory:
        texts = write_texts(Path(sysconfig.get_path("stdlib")), Path(directory))
        for name, kind in (("demo model, library", LIBRARY), ("demo model, tests", TESTS)):
            yield from _hits(name, _of_demo(texts[kind]), 32, (8, 12, 16))
    for name, (skew, habit) in _DRAWN.items():
        yield from _hits(name, [_drawn(skew, habit, seed) for seed in range(3)], 128, (12, 30, 60))


def _hits(name: str, routings: Sequence[Routing], experts: int, slots: tuple[int, ...]) -> Iterator[Figure]:
    for count in slots:
        for policy in POLICIES:
            shares = [_replayed(routing, policy, count, experts) for routing in routings]
            yield Figure.median(f"{name}: {policy}, {count} of {experts} slots", shares, "% hits")
        shares = [_optimum(routing, count) for routing in routings]
        yield Figure.median(f"{name}: optimum, {count} of {experts} slots", shares, "% hits")


def _replayed(routing: Routing, policy: str, count: int, experts: int) -> float:
    slots, counted = LayerSlots(count, experts, POLICIES[policy]), LayerCounters()
    for token, needed in enumerate(routing):
        if token == _WARM:
            counted = LayerCounters()
        for _ in waves(slots, needed, counted, lambda places: None):
            pass
    return 100 * counted.hits / (counted.hits + counted.misses)


def _optimum(routing: Routing, count: int) -> float:
    """L. A. Belady, A study of replacement algorithms for a virtual-storage computer, 1966."""
    uses: dict[int, list[int]] = {}  # tokens to come, the next one last
    for token in range(len(routing) - 1, -1, -1):
        for expert in routing[token]:
            uses.setdefault(expert, [len(routing)]).append(token)
    here: set[int] = set()
    hits = wanted = 0
    for token, needed in enumerate(routing):
        if token >= _WARM:
            hits, wanted = hits + len(here.intersection(needed)), wanted + len(needed)
        for expert in needed:
            uses[expert].pop()
        here.update(needed)
        others = sorted(here.difference(needed), key=lambda expert: uses[expert][-1])
        here = {*needed, *others[: count - len(needed)]}
    return 100 * hits / wanted


class _Choices:
    """An `Observer` that keeps who was chosen."""

    def __init__(self) -> None:
        self.routings: list[Routing] = []

    def dense(self, name: str, inputs: Tensor) -> None: ...

    def block_done(self) -> None: ...

    def routed(self, layer: int, inputs: Tensor, choices: Tensor, weights: Tensor) -> None:
        self.routings.append(choices.sort(1).values[:_TOKENS].tolist())


def _of_demo(text: Path) -> list[Routing]:
    """One of each layer."""
    source, observer = HuggingFaceCheckpoint.open(locate_model(DEMO).directory), _Choices()
    windows, tokens = [], 0
    for window in read_text(text, source.directory).windows:
        if tokens < _TOKENS:
            windows.append(window)
            tokens += len(window)
    with torch.inference_mode():
        forward(source, windows, observer, lambda done, total: None)
    return observer.routings


def _drawn(skew: float, habit: float, seed: int) -> Routing:
    """`skew`: of a power law of popularity; `habit`: how strong an expert's fortune is beside the noise;
    an expert keeps 97 % of it from token to token.
    """
    draw = np.random.default_rng(seed)
    fortune, routing = np.zeros(128), []
    for token in range(_TOKENS):
        if token % (_TOKENS // 2) == 0:
            popularity = -skew * np.log(draw.permutation(128) + 1)
        fortune = 0.97 * fortune + np.sqrt(1 - 0.97**2) * draw.normal(size=128)
        scores = popularity + habit * fortune + draw.gumbel(size=128)
        routing.append(sorted(np.argpartition(scores, -6)[-6:].tolist()))
    return routing
