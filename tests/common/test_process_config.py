"""Where a process may listen, and with what protection."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from common.addresses import Address
from common.errors import ConfigError
from common.process_config import ServerConfig
from expert_store.config import StoreConfig
from gpu_worker.config import WorkerConfig

CERT, KEY, KEYS = Path("cert.pem"), Path("key.pem"), Path("keys.toml")
TLS = {"tls_cert": CERT, "tls_key": KEY}


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("unix:/run/x.sock", True),
        ("127.0.0.1:50051", True),
        ("127.8.9.10:1", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        ("10.0.0.3:50051", False),
        ("localhost.example.org:50051", False),
        ("127.0.0.1.example.org:50051", False),
    ],
)
def test_which_addresses_are_this_machines_alone(address: str, local: bool) -> None:
    assert Address.parse(address).is_local is local


@pytest.mark.parametrize(
    ("address", "options", "missing"),
    [
        ("10.0.0.3:1", {}, "--tls-cert and --tls-key, and --api-keys"),
        ("0.0.0.0:1", TLS, "give --api-keys"),
        ("0.0.0.0:1", {"api_keys": KEYS}, "give --tls-cert and --tls-key;"),
        ("0.0.0.0:1", {**TLS, "api_keys": KEYS}, ""),
        ("0.0.0.0:1", {**TLS, "tls_client_ca": CERT}, ""),
        ("0.0.0.0:1", {"insecure_listen": True}, ""),
        ("127.0.0.1:1", {}, ""),
        ("unix:/run/x.sock", {"api_keys": KEYS}, ""),
        ("unix:/run/x.sock", TLS, "a unix socket is private"),
        ("127.0.0.1:1", {"tls_cert": CERT}, "go together"),
        ("127.0.0.1:1", {"tls_key": KEY}, "go together"),
        ("127.0.0.1:1", {"tls_client_ca": CERT}, "--tls-client-ca needs --tls-cert"),
    ],
)
def test_beyond_this_machine_tls_and_keys_are_wanted(
    address: str, options: dict[str, Any], missing: str
) -> None:
    if not missing:
        ServerConfig(listen=Address.parse(address), **options)
        return
    with pytest.raises(ConfigError, match=missing):
        ServerConfig(listen=Address.parse(address), **options)


def test_a_store_serves_its_machine_alone() -> None:
    StoreConfig("demo", Address.parse("127.0.0.1:1"))
    with pytest.raises(ConfigError, match="they are all on this one"):
        StoreConfig("demo", Address.parse("0.0.0.0:1"))


@pytest.mark.parametrize(
    ("address", "wrong"),
    [
        ("127.0.0.1:9100", ""),
        ("[::1]:9100", ""),
        ("0.0.0.0:9100", "--metrics 0.0.0.0:9100 can be reached from other machines"),
        ("unix:/run/metrics.sock", "--metrics must be HOST:PORT"),
    ],
)
def test_metrics_are_this_machines_alone(address: str, wrong: str) -> None:
    """Even of a worker that may listen everywhere: the page asks nobody for a key."""
    config = partial(WorkerConfig, insecure_listen=True, metrics=Address.parse(address))
    if not wrong:
        assert str(config().metrics) == address
        return
    with pytest.raises(ConfigError, match=wrong):
        config()


def test_a_log_has_one_of_two_forms() -> None:
    assert StoreConfig("demo", log_format="json").log_format == "json"
    with pytest.raises(ConfigError, match="--log-format must be one of text, json"):
        StoreConfig("demo", log_format="xml")
