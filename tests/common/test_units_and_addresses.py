"""Sizes and addresses as people type them, and the right to listen on an address."""

import socket
from pathlib import Path

import pytest

from common.addresses import Address, AddressClaim, runtime_directory
from common.errors import ConfigError
from common.units import format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("7.6GB", 7_600_000_000), ("12GiB", 12 << 30), ("512MB", 512_000_000), ("1k", 1000), ("4096", 4096)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "7,6GB", "1PB", "0", "1 GB x", "nan", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


def test_bytes_are_written_with_three_digits() -> None:
    assert [format_bytes(n) for n in (0, 999, 6_504_448, 19_100_000_000)] == [
        "0 B",
        "999 B",
        "6.5 MB",
        "19.1 GB",
    ]


@pytest.mark.parametrize("text", ["store", "localhost", "host:0", "host:99999", ":5000", "host:port"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        Address.parse(text)


def test_a_socket_path_beyond_the_kernels_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="longer"):
        Address.parse("unix:/" + "x" * 120)


def test_an_address_is_claimed_once_and_leaves_nothing(tmp_path: Path) -> None:
    address = Address.parse(f"unix:{tmp_path}/store.sock")
    claim = AddressClaim(address)
    with pytest.raises(ConfigError, match="already listens"):
        AddressClaim(address)
    for path in (tmp_path / "store.sock", claim.data_path):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
    claim.release()
    assert list(tmp_path.iterdir()) == []
    AddressClaim(address).release()


@pytest.mark.parametrize("name", ["poetry", "poetry.data", "poetry.lock"])
def test_a_file_that_is_no_socket_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("kept")
    with pytest.raises(ConfigError, match="is there, and is something else"):
        AddressClaim(Address.parse(f"unix:{tmp_path}/poetry"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("place", [".", "file/socket"])
def test_where_no_socket_can_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot listen on"):
        AddressClaim(Address.parse(f"unix:{tmp_path / place}"))


def test_the_runtime_directory_must_be_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_SERVING_RUNTIME_DIR", str(tmp_path / "run"))
    assert runtime_directory().stat().st_mode & 0o777 == 0o700
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        runtime_directory()
