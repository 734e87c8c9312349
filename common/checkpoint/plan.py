"""Which matrix gets how many bits: the plan that packing follows.

A plan comes from `--bits`, `--dense-bits` and a recipe, and from what the source already is: codes keep their
bits unless a user asks for others. Owns the meaning of a recipe; packs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from common.checkpoint.names import expert_names, packable_dense
from common.checkpoint.source import WeightSource
from common.errors import ConfigError
from common.expert_key import ExpertKey
from common.hlwq.planes import RAW_BITS, check_bits
from common.json_input import parse_json
from common.record import ExpertBits

DEFAULT_BITS = 5
_WEIGHT = ".weight"


@dataclass(frozen=True)
class BitPlan:
    """Bits of every layer's experts, and of every dense matrix that is packed, by canonical name."""

    experts: tuple[ExpertBits, ...]
    dense: dict[str, int]

    def describe(self) -> str:
        """In words: "5 bits", "3 and 4 bits, dense 8"."""
        words = f"{_list(bits for pair in self.experts for bits in pair)} bits"
        return f"{words}, dense {_list(self.dense.values())}" if self.dense else words


def make_plan(
    source: WeightSource,
    bits: int | None = None,
    dense_bits: int | None = None,
    recipe: Mapping[str, int] | None = None,
) -> BitPlan:
    """The plan for packing `source`; raises ConfigError for bits or names that cannot be.

    `bits` is for routed experts and `dense_bits` for dense matrices (16: not packed); None keeps what the
    source has, else 5 bits for experts and dense matrices unpacked. A recipe has patterns of names, without
    `.weight`, as keys and bits as values; it comes first, and of its patterns the last that fits counts.
    """
    for value in (bits, dense_bits):
        if value is not None:
            check_bits(value)
    rules = _Rules(recipe or {})
    experts = tuple(
        _layer_bits(source, layer, bits, stored, rules) for layer, stored in enumerate(source.expert_bits)
    )
    dense = {}
    stored_dense = source.dense_stored
    for name in packable_dense(source.config):
        chosen = rules.bits(name) or dense_bits or stored_dense[name].bits or RAW_BITS
        if chosen != RAW_BITS:
            dense[name] = chosen
    rules.check_all_used()
    return BitPlan(experts, dense)


def kept_codes(source: WeightSource, plan: BitPlan) -> set[bool]:
    """For all matrices that are codes by `plan`, whether they keep the codes that `source` has of them."""
    stored = source.dense_stored
    pairs = [(bits, stored[name].bits) for name, bits in plan.dense.items()]
    for layer, bits in enumerate(plan.experts):
        for expert in range(source.config.n_routed_experts):  # some may be codes, and others not
            before = source.expert_stored(ExpertKey(layer, expert))
            pairs += zip(bits, (kept.bits for kept in before), strict=True)
    return {bits == before for bits, before in pairs if bits != RAW_BITS}


def read_recipe(path: Path) -> dict[str, int]:
    """A recipe file: one JSON object, patterns to bits. Raises ConfigError."""
    try:
        recipe = parse_json(path.read_text(), object_pairs_hook=_unique)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a recipe: {error}") from None
    if not isinstance(recipe, dict) or not recipe:
        raise ConfigError(f'{path} is not a recipe: it must be an object like {{"*.up_proj": 3}}')
    for pattern, bits in recipe.items():
        if not isinstance(bits, int) or isinstance(bits, bool):
            raise ConfigError(f"{path}: the bits of {pattern!r} must be a number, not {bits!r}")
        try:
            check_bits(bits)
        except ConfigError as error:
            raise ConfigError(f"{path}: {pattern!r}: {error}") from None
    return recipe


class _Rules:
    """A recipe's patterns, and which of them fitted a name."""

    def __init__(self, recipe: Mapping[str, int]) -> None:
        self._recipe = recipe
        self._unused = set(recipe)

    def bits(self, name: str) -> int | None:
        """What the recipe says of a matrix, by its canonical name."""
        chosen = None
        for pattern, bits in self._recipe.items():
            if fnmatchcase(name.removesuffix(_WEIGHT), pattern):
                self._unused.discard(pattern)
                chosen = bits
        return chosen

    def check_all_used(self) -> None:
        if self._unused:
            named = ", ".join(repr(pattern) for pattern in self._recipe if pattern in self._unused)
            raise ConfigError(
                f"the recipe names no matrix of this model that can be packed: {named} "
                "(names are like backbone.layers.1.mixer.experts.0.up_proj, lm_head; * stands for any text)"
            )


def _layer_bits(
    source: WeightSource, layer: int, bits: int | None, stored: ExpertBits | None, rules: _Rules
) -> ExpertBits:
    default = (bits, bits) if bits is not None else stored or (DEFAULT_BITS, DEFAULT_BITS)
    chosen = []
    names = [
        expert_names(source.config, ExpertKey(layer, expert))
        for expert in range(source.config.n_routed_experts)
    ]
    for matrix, fallback in enumerate(default):
        wanted = {rules.bits(pair[matrix]) for pair in names}
        if len(wanted) > 1:
            raise ConfigError(
                f"the recipe gives the experts of one layer different bits ({names[0][matrix]} and others): "
                "records of a layer have one form"
            )
        chosen.append(wanted.pop() or fallback)
    return ExpertBits(*chosen)


def _list(bits: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(set(bits))))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a pattern is there twice")
    return result
