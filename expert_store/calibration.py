"""What a model's matrices see of a text, kept for calibrated packing.

`calibrated` runs the model over the text once (`block_forward`) and keeps of dense matrices the second moment
of their inputs, of routed experts the inputs themselves with the router's choices: which of them an expert
saw, and what its down projection saw then, is computed when the expert is packed. What is kept lies in a file
without a name beside the destination: it is gone with the process, and memory holds a layer of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint.partial import write_errors
from common.checkpoint.plan import BitPlan
from common.checkpoint.source import WeightSource
from common.errors import CheckpointError, ConfigError
from common.expert_key import ExpertKey
from common.hlwq.calibrated import Moment
from common.hlwq.planes import RAW_BITS

WINDOW = 1024  # tokens that are read together
MOST_TOKENS, LEAST_TOKENS = 32 * WINDOW, 512
_CHARACTERS_A_TOKEN = 16  # more than any text has, so that of a long one no more is tokenized than is used
# An expert's inputs count as so many more of the layer's average: steadies experts that saw few.
_LAYER_INPUTS = 64


class Text(NamedTuple):
    """Token ids to calibrate on, window by window, and what they are of."""

    windows: list[Tensor]
    name: str

    @property
    def tokens(self) -> int:
        return sum(len(window) for window in self.windows)


def read_text(path: Path, directory: Path) -> Text:
    """A text file in the tokens of the model in `directory`; raises ConfigError or CheckpointError."""
    from transformers import AutoTokenizer

    try:
        text = path.read_text(encoding="utf-8")[: MOST_TOKENS * _CHARACTERS_A_TOKEN]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot calibrate on {path}: {error}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(text, verbose=False)["input_ids"][:MOST_TOKENS]
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(
            f"cannot calibrate on {path}: it has {len(ids)} tokens; give at least {LEAST_TOKENS}, better "
            f"{MOST_TOKENS}"
        )
    return Text(list(torch.tensor(ids).split(WINDOW)), path.name)


@contextmanager
def calibrated(
    source: WeightSource, plan: BitPlan, text: Text, destination: Path, progress: Callable[[int, int], None]
) -> Iterator[TextCalibration]:
    """Run `source` over `text` and yield what packing by `plan` asks for; `progress` gets bytes of weights.

    Raises ConfigError when the plan quantizes nothing, Exhausted when what is kept does not fit on the disk
    of `destination`, and what running the model raises.
    """
    # Imported here: transformers takes seconds, and has things to say that matter to nobody who packs.
    from transformers.utils import logging

    logging.set_verbosity_error()
    from expert_store.block_forward import forward

    dense, layers = _quantized(source, plan)
    if not dense and not layers:
        raise ConfigError("there is nothing to calibrate: the plan quantizes no matrix anew")
    with Scratch(destination) as scratch:
        recorder = _Recorder(scratch, dense, layers)
        forward(source, text.windows, recorder, progress)
        yield TextCalibration(source, text, scratch, recorder.routes)


class TextCalibration:
    """A `Calibration`: what the matrices of a model saw of one text."""

    def __init__(
        self, source: WeightSource, text: Text, scratch: Scratch, routes: dict[int, tuple[Tensor, Tensor]]
    ) -> None:
        ids = torch.cat(text.windows).numpy().tobytes()
        self.identity = hashlib.sha256(ids).hexdigest()[:16]
        self.description = f"{text.tokens} tokens of {text.name}"
        self._tokens = text.tokens
        self._scratch = scratch
        self._routes = routes
        self._layer = lru_cache(maxsize=2)(self._read_layer)  # threads may be at work on two layers

    def dense(self, name: str) -> Moment:
        """The second moment of a dense matrix's inputs."""
        return Moment(self._scratch.get(name), self._tokens)

    def expert(self, key: ExpertKey, up: Tensor) -> tuple[Moment, Moment]:
        """Moments of what an expert's projections saw, each token by its weight in the layer's output.

        Those of the up projection count the layer's average as some inputs more. The down projection of an
        expert that saw nothing has seen nothing.
        """
        inputs, average = self._layer(key.layer)
        choices, weights = self._routes[key.layer]
        tokens, rank = torch.where(choices == key.expert)
        weight = weights[tokens, rank]
        weight /= weight.square().mean().sqrt()
        seen = inputs[tokens].float()
        inner = F.linear(seen, up.float()).relu_().square_()
        moment = Moment.of(seen * weight[:, None]) + average.scaled(_LAYER_INPUTS)
        return moment, Moment.of(inner * weight[:, None])

    def _read_layer(self, layer: int) -> tuple[Tensor, Moment]:
        """What came into a layer, bfloat16 (tokens, hidden), and its moment."""
        return self._scratch.get(f"inputs {layer}"), Moment(
            self._scratch.get(f"moment {layer}"), self._tokens
        )


class _Recorder:
    """The `Observer` that keeps what is wanted, of dense matrices and of layers."""

    def __init__(self, scratch: Scratch, dense: set[str], layers: set[int]) -> None:
        self._scratch, self._dense, self._layers = scratch, dense, layers
        self._sums: dict[str, Tensor] = {}
        self.routes: dict[int, tuple[Tensor, Tensor]] = {}

    def dense(self, name: str, inputs: Tensor) -> None:
        if name in self._dense:
            total = self._sums.setdefault(name, inputs.new_zeros(inputs.shape[1], inputs.shape[1]))
            total.addmm_(inputs.T, inputs)

    def routed(self, layer: int, inputs: Tensor, choices: Tensor, weights: Tensor) -> None:
        if layer in self._layers:
            self.routes[layer] = choices.short(), weights.float()
            self._scratch.put(f"inputs {layer}", inputs.bfloat16())
            self._scratch.put(f"moment {layer}", inputs.T @ inputs)

    def block_done(self) -> None:
        for name, total in self._sums.items():
            self._scratch.put(name, total)
        self._sums.clear()


class Scratch:
    """Tensors by name in one file without a name, in the directory of `destination`."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self._file = TemporaryFile(dir=destination.parent)  # noqa: SIM115
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; raises Exhausted when the disk is full."""
        with write_errors(self._destination):
            self._places[name] = self._file.tell(), tensor.dtype, tensor.shape
            self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            self._file.flush()

    def get(self, name: str) -> Tensor:
        """A tensor that was put, in memory of its own."""
        offset, dtype, shape = self._places[name]
        buffer = bytearray(shape.numel() * dtype.itemsize)
        done = 0
        while done < len(buffer):
            done += os.preadv(self._file.fileno(), [memoryview(buffer)[done:]], offset + done)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _quantized(source: WeightSource, plan: BitPlan) -> tuple[set[str], set[int]]:
    """The dense matrices, and the layers with matrices, that packing by `plan` quantizes."""
    dense = {name for name, bits in plan.dense.items() if source.dense_stored[name].bits != bits}
    layers = {
        layer
        for layer, (wanted, stored) in enumerate(zip(plan.experts, source.expert_bits, strict=True))
        if any(bits not in (RAW_BITS, had) for bits, had in zip(wanted, stored or (None, None), strict=True))
    }
    return dense, layers
