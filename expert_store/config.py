"""The store's configuration, frozen once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from common.addresses import Address
from common.errors import ConfigError
from common.options import Option
from common.process_config import MetricsConfig, address_option
from common.units import parse_size

DEMO = "demo"  # the model that comes with the package
LEASE_TTL = 3.0  # seconds; a killed worker's pins are free after this


@dataclass(frozen=True)
class StoreConfig(MetricsConfig):
    """`model` as the user named it; `ram` in bytes, None to choose."""

    model: Annotated[
        str,
        Option(
            "A packed directory, a Hugging Face directory (packed on first start), a Hugging Face id, "
            "or 'demo'.",
            metavar="MODEL",
            argument=True,
        ),
    ]
    listen: Annotated[Address, address_option()] = field(default_factory=partial(Address.default, "store"))
    bits: Annotated[
        int | None,
        Option(
            "Bits per weight when MODEL must be packed first: 2, 3, 4, 5, 6, 8 or 16; default: what it "
            "has if it is quantized, else 5."
        ),
    ] = None
    ram: Annotated[
        int | None,
        Option(
            "Memory for experts, like 8GB; default: all of them if they fit.",
            metavar="SIZE",
            parse=parse_size,
        ),
    ] = None
    lease_ttl: float = LEASE_TTL

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.listen.is_local:
            raise ConfigError(
                f"--listen {self.listen} can be reached from other machines, but workers map the store's "
                "memory, so they are all on this one: give unix:PATH, or 127.0.0.1:PORT"
            )
