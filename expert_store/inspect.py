"""What a checkpoint on disk is, in numbers: one dictionary for JSON, one table for people.

Works for every kind of checkpoint that `common.checkpoint` opens. Reads headers only, and codes where nothing
but the largest of them tells how many bits they have.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from common.checkpoint import HuggingFaceCheckpoint, PackedCheckpoint, open_checkpoint
from common.checkpoint.manifest import VERSION
from common.checkpoint.names import dense_shapes, expert_shapes, packable_dense
from common.checkpoint.source import WeightSource
from common.model_config import ATTENTION, MAMBA, MLP, MOE, ModelConfig
from common.units import format_bytes

_BLOCK_WORDS = {"mamba": MAMBA, "moe": MOE, "attention": ATTENTION, "mlp": MLP}


def describe(directory: Path) -> dict[str, Any]:
    """Everything worth knowing about a checkpoint; raises what opening it raises."""
    checkpoint = open_checkpoint(directory)
    storage = _packed(checkpoint) if isinstance(checkpoint, PackedCheckpoint) else _unpacked(checkpoint)
    return {"directory": str(directory), **_architecture(checkpoint.config), **storage}


def as_table(description: dict[str, Any]) -> Table:
    """The description as rows of name and value."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in description.items():
        if name in ("bytes", "record_stride") and value is not None:
            parts = value if isinstance(value, dict) else {"": value}
            text = ", ".join(f"{part} {format_bytes(count)}".strip() for part, count in parts.items())
        elif isinstance(value, dict):
            text = ", ".join(f"{part} {_plain(number)}" for part, number in value.items())
        else:
            text = _plain(value)
        table.add_row(name.replace("_", " "), Text(text))  # paths may hold brackets, which are markup
    return table


def dense_kind(name: str) -> str:
    """What a dense matrix is in its block: in_proj, shared_experts.up_proj, mlp.up_proj; lm_head."""
    _, _, kind = name.removesuffix(".weight").rpartition(".mixer.")
    if kind in ("up_proj", "down_proj"):
        return f"mlp.{kind}"
    return kind


def _architecture(config: ModelConfig) -> dict[str, Any]:
    experts = config.num_layers * config.n_routed_experts
    return {
        "architecture": "NemotronHForCausalLM",
        "blocks": {word: config.pattern.count(letter) for word, letter in _BLOCK_WORDS.items()},
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layers": config.num_layers,
        "experts_per_layer": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "parameters": {
            "routed": experts * sum(map(math.prod, expert_shapes(config))),
            "dense": sum(map(math.prod, dense_shapes(config).values())),
        },
    }


def _packed(checkpoint: PackedCheckpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "kind": "packed",
        "layouts": None,
        "bytes": _bytes(checkpoint),
        "bits": _bits(checkpoint),
        "record_stride": manifest.stride,
        "codebook": manifest.codebook,
        "format_version": VERSION,
        "source": manifest.source["name"],
        "calibration": manifest.source.get("calibration"),
        "fingerprint": checkpoint.fingerprint,
        "synthetic": manifest.synthetic,
    }


def _unpacked(checkpoint: HuggingFaceCheckpoint) -> dict[str, Any]:
    """The same keys, so that readers of the JSON need not ask for the kind first."""
    return {
        "kind": "huggingface",
        "layouts": checkpoint.layouts or None,
        "bytes": _bytes(checkpoint),
        "bits": _bits(checkpoint),
        "record_stride": None,
        "codebook": None,
        "format_version": None,
        "source": None,
        "calibration": None,
        "fingerprint": None,
        "synthetic": checkpoint.synthetic,
    }


def _bytes(source: WeightSource) -> dict[str, int]:
    return {
        "routed": source.routed_bytes,
        "dense": sum(stored.size for stored in source.dense_stored.values()),
    }


def _bits(source: WeightSource) -> dict[str, object] | None:
    """Bits of what is stored as codes, or None; one number where all matrices of a kind agree.

    Dense matrices are one kind as long as they agree, else a kind for each name that they have in a block.
    """
    kinds: dict[str, list[int | None]] = {
        "up_proj": [bits and bits.up for bits in source.expert_bits],
        "down_proj": [bits and bits.down for bits in source.expert_bits],
    }
    dense = {name: source.dense_stored[name].bits for name in packable_dense(source.config)}
    together = len(set(dense.values())) == 1
    for name, bits in dense.items():
        kinds.setdefault("dense" if together else dense_kind(name), []).append(bits)
    if not any(any(bits) for bits in kinds.values()):
        return None
    return {kind: bits[0] if len(set(bits)) == 1 else bits for kind, bits in kinds.items()}


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
