"""What a client shows a server over TCP, and what it asks of it: certificates and an API key.

Commands take them from the environment, since what is typed can be read by every user of the machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from common.errors import ConfigError
from common.tls import check_authorities, check_pair

SYSTEM = "system"
_LONGEST_KEY = 1024  # ours have 46


@dataclass(frozen=True)
class Credentials:
    """`tls_ca`: certificates to trust, SYSTEM for the system's, or None for no TLS; the others are ours."""

    tls_ca: Path | str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raises ConfigError naming what is missing or wrong; the files are not looked at."""
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("the API key has characters that no key has")  # nor any field of HTTP/2
        # Else gRPC would say of the field's size that the server is busy.
        if self.api_key is not None and len(self.api_key) > _LONGEST_KEY:
            raise ConfigError(f"the API key has more than {_LONGEST_KEY} characters")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("a client's certificate and its key go together")
        if self.tls_cert is not None and self.tls_ca is None:
            raise ConfigError(f"a client's certificate needs TLS: name the server's CA, or {SYSTEM!r}")

    @classmethod
    def of_environment(cls) -> Credentials:
        """EXPERT_SERVING_TLS_CA, _TLS_CERT, _TLS_KEY (files) and EXPERT_SERVING_API_KEY."""
        ca, cert, key, api_key = (
            os.environ.get(f"EXPERT_SERVING_{name}") or None
            for name in ("TLS_CA", "TLS_CERT", "TLS_KEY", "API_KEY")
        )
        return cls(ca, Path(cert) if cert else None, Path(key) if key else None, api_key)

    def tls(self) -> grpc.ChannelCredentials | None:
        """For a channel over TCP. Raises ConfigError naming the file that is wrong."""
        if self.tls_ca is None:
            return None
        if self.tls_cert is not None and self.tls_key is not None:
            check_pair(self.tls_cert, self.tls_key)
        if self.tls_ca != SYSTEM:
            check_authorities(Path(self.tls_ca))
        return grpc.ssl_channel_credentials(
            None if self.tls_ca == SYSTEM else Path(self.tls_ca).read_bytes(),
            self.tls_key.read_bytes() if self.tls_key is not None else None,
            self.tls_cert.read_bytes() if self.tls_cert is not None else None,
        )

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """What goes with each call."""
        return [] if self.api_key is None else [("authorization", f"Bearer {self.api_key}")]


NO_CREDENTIALS = Credentials()
