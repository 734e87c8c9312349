"""The gateway's configuration, frozen once and validated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from common.addresses import Address
from common.errors import ConfigError
from common.options import Option
from common.process_config import ServerConfig, address_option

DEFAULT_LISTEN = "127.0.0.1:8000"


@dataclass(frozen=True)
class GatewayConfig(ServerConfig):
    """See the options."""

    listen: Annotated[
        Address,
        Option("Where HTTP clients find it: HOST:PORT or unix:PATH.", metavar="ADDRESS", parse=Address.parse),
    ] = field(default_factory=partial(Address.parse, DEFAULT_LISTEN))
    worker: Annotated[Address, address_option()] = field(default_factory=partial(Address.default, "worker"))
    model_name: Annotated[
        str | None, Option("What clients call the model; default: as the worker calls it.", metavar="NAME")
    ] = None
    request_timeout: Annotated[
        float, Option("Seconds that a request may take, waiting included.", metavar="SECONDS")
    ] = 600.0
    drain_timeout: Annotated[
        float,
        Option(
            "Seconds that accepted requests may take to finish when the gateway is asked to stop; those that "
            "do not are ended with an error.",
            metavar="SECONDS",
        ),
    ] = 30.0

    def __post_init__(self) -> None:
        """Raises ConfigError naming the option."""
        super().__post_init__()
        if not 0 < self.request_timeout < math.inf:
            raise ConfigError(f"--request-timeout must be above 0 seconds, not {self.request_timeout}")
        if not 0 <= self.drain_timeout < math.inf:
            raise ConfigError(f"--drain-timeout must be at least 0 seconds, not {self.drain_timeout}")
