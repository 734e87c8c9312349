"""The store's configuration, frozen once."""

from __future__ import annotations

from dataclasses import dataclass

from common.addresses import Address

LEASE_TTL = 3.0  # seconds; a killed worker's pins are free after this


@dataclass(frozen=True)
class StoreConfig:
    """`model` as the user named it; `ram` in bytes, None to choose."""

    model: str
    listen: Address
    ram: int | None = None
    lease_ttl: float = LEASE_TTL
