"""The options that processes have in common, and what must hold before a process listens.

A server of the network side (worker, gateway) is reached through a unix socket that is its owner's alone, or
through TCP. Beyond this machine TCP wants TLS and a proof of who calls, an API key or a certificate.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from common import logs
from common.addresses import Address
from common.api_keys import KeyRing
from common.errors import ConfigError
from common.options import Option
from common.tls import ServerTls

ADDRESS_HELP = "unix:PATH or HOST:PORT; default: a socket in your private runtime directory."
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """What every process has; to inherit from. Its fields are given by name."""

    log_level: Annotated[
        str,
        Option(
            "debug, info, warning or error; default: $EXPERT_SERVING_LOG, or info. SIGHUP reads it again.",
            metavar="LEVEL",
            parse=str.upper,
        ),
    ] = field(default_factory=lambda: os.environ.get("EXPERT_SERVING_LOG", "INFO").upper())
    log_format: Annotated[
        str, Option("text, or json: an object a line, with the id of the request that it is about.")
    ] = logs.TEXT

    def __post_init__(self) -> None:
        """Raises ConfigError naming the option."""
        one_of("--log-level (or $EXPERT_SERVING_LOG)", self.log_level, LOG_LEVELS)
        one_of("--log-format", self.log_format, logs.FORMATS)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig(ProcessConfig):
    """What a process has that serves its metrics at an address of their own."""

    metrics: Annotated[
        Address | None,
        Option(
            "Serve Prometheus metrics over HTTP on this address of this machine; default: not at all.",
            metavar="HOST:PORT",
            parse=Address.parse,
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics is None:
            return
        if self.metrics.socket_path is not None:
            raise ConfigError(f"--metrics must be HOST:PORT, not {self.metrics}")
        if not self.metrics.is_local:
            raise ConfigError(
                f"--metrics {self.metrics} can be reached from other machines, and the page asks nobody who "
                "they are: give 127.0.0.1:PORT, and let a proxy with TLS offer it to others"
            )


@dataclass(frozen=True, kw_only=True)
class ServerConfig(ProcessConfig):
    """What a process has that clients reach, also over the network; it adds a default for `listen`."""

    listen: Address
    tls_cert: Annotated[
        Path | None, Option("Serve TCP by TLS: PEM file of the certificate and its chain.", metavar="FILE")
    ] = None
    tls_key: Annotated[
        Path | None, Option("PEM file of the certificate's key, without a password.", metavar="FILE")
    ] = None
    tls_client_ca: Annotated[
        Path | None,
        Option("Take only clients with a certificate signed by one of this PEM file.", metavar="FILE"),
    ] = None
    api_keys: Annotated[
        Path | None,
        Option("Take only clients with a key of this file; see `gpu-worker key add`.", metavar="FILE"),
    ] = None
    insecure_listen: Annotated[
        bool, Option("Listen beyond this machine even without TLS, and without keys or client certificates.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.tls_cert is not None and self.listen.socket_path is not None:
            raise ConfigError("--tls-cert is for TCP; a unix socket is private without it. Leave it out")
        if self.listen.is_local or self.insecure_listen:
            return
        missing = []
        if self.tls_cert is None:
            missing.append("--tls-cert and --tls-key")
        if self.api_keys is None and self.tls_client_ca is None:
            missing.append("--api-keys (or --tls-client-ca)")
        if missing:
            raise ConfigError(
                f"--listen {self.listen} can be reached from other machines: give {', and '.join(missing)}; "
                "or --insecure-listen, if everybody there may use it and read what is sent"
            )

    def tls(self) -> ServerTls | None:
        """Raises ConfigError naming what is wrong with the files."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_cert, self.tls_key, self.tls_client_ca)

    def keys(self) -> KeyRing | None:
        """Raises ConfigError naming what is wrong with the file."""
        return KeyRing(self.api_keys) if self.api_keys is not None else None


def address_option() -> Option:
    return Option(ADDRESS_HELP, metavar="ADDRESS", parse=Address.parse)


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{option} must be one of {', '.join(allowed)}, not {value!r}")
