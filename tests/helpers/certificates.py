"""Certificate authorities and certificates for tests of TLS, made on the spot."""

from __future__ import annotations

from pathlib import Path

import trustme


class Authority:
    """One CA, with the files that servers and clients of its are started with."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._directory, self._ca = directory, trustme.CA()
        self.file = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, name: str) -> tuple[Path, Path]:
        """PEM files of a certificate for a host's name or address, and of its key."""
        issued = self._ca.issue_cert(name)
        cert, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return cert, key
