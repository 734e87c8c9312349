"""TLS: checks of PEM files, and a gRPC server's certificates, which are read again when they change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from common.errors import ConfigError

log = logging.getLogger(__name__)


class ServerTls:
    """Certificates are renewed while servers run: each handshake looks whether the files are newer."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """With `client_ca`, clients must show a certificate of its. Raises ConfigError naming the file."""
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._stamps = self._look()
        self._configuration = self._read()

    @property
    def asks_clients(self) -> bool:
        """Whether clients have to show a certificate."""
        return self._client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._renewed,  # type: ignore[arg-type] # its stubs know no None
            require_client_authentication=self.asks_clients,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before a handshake, in a thread of its own; None: as before."""
        try:
            stamps = self._look()
            if stamps == self._stamps:
                return None
            self._stamps = stamps
            self._configuration = self._read()
        except ConfigError as error:
            log.error("the TLS certificate stays as it was: %s", error)
            return None
        log.info("took up the TLS certificate %s", self._cert)
        return self._configuration

    def _look(self) -> list[int]:
        return [_modified(path) for path in self._files()]

    def _files(self) -> list[Path]:
        return [path for path in (self._cert, self._key, self._client_ca) if path is not None]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        check_pair(self._cert, self._key)
        if self._client_ca is not None:
            check_authorities(self._client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(self._key.read_bytes(), self._cert.read_bytes())],
            root_certificates=self._client_ca.read_bytes() if self._client_ca is not None else None,
        )


def check_pair(cert: Path, key: Path) -> None:
    """Raises ConfigError unless the key is that of the certificate. gRPC itself would only fail to listen."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigError(f"cannot use the certificate {cert} with the key {key}: {error}") from None


def check_authorities(path: Path) -> None:
    """Raises ConfigError unless the file has certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use the certificates of {path}: {error}") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted; store it without a password, readable by its owner alone")


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
