"""What packing may know of the inputs that matrices see, from whoever ran the model over a text.

Packing asks matrix by matrix; how a model is run, and where what it saw is kept, is not known here.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from common.expert_key import ExpertKey
from common.hlwq.calibrated import Moment


class Calibration(Protocol):
    """The inputs that a model's matrices saw. Asked by several threads at once."""

    @property
    def identity(self) -> str:
        """Changes with the text and with whatever else decides the moments."""

    def dense(self, name: str) -> Moment:
        """Of one dense matrix that the plan packs, by canonical name."""

    def expert(self, key: ExpertKey, up: Tensor) -> tuple[Moment, Moment]:
        """Of the up and down projections of one routed expert, whose plain up projection is given."""
