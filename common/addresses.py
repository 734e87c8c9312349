"""Where the processes listen: addresses, the private runtime directory, and the right to an address.

An address is `unix:PATH` or `HOST:PORT`. Defaults are sockets in a directory only its owner can enter. gRPC
silently takes a unix socket over from a living server, so whoever listens holds a lock file beside it.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from common.errors import ConfigError

_UNIX_PATH_LIMIT = 100  # sockaddr_un holds 107 bytes; the data plane adds a suffix


def runtime_directory() -> Path:
    """The directory of sockets, made owner-only; $EXPERT_SERVING_RUNTIME_DIR overrides it."""
    path = Path(os.environ.get("EXPERT_SERVING_RUNTIME_DIR") or _user_runtime_directory())
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the runtime directory {path}: {error.strerror}") from None
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"runtime directory {path} must belong to you alone (mode 0700)")
    if path.parent.stat().st_uid not in (0, os.getuid()):  # its owner could swap the directory
        raise ConfigError(f"runtime directory {path} lies in a directory that belongs to another user")
    return path


def _user_runtime_directory() -> Path:
    with warnings.catch_warnings():
        # Without $XDG_RUNTIME_DIR it falls back to a directory in /tmp and warns; that is checked above.
        warnings.simplefilter("ignore")
        return platformdirs.user_runtime_path("expert-serving")


@dataclass(frozen=True)
class Address:
    """A parsed address; `str()` gives back what a user would type."""

    target: str

    @classmethod
    def parse(cls, text: str) -> Address:
        if text.startswith("unix:"):
            path = Path(text.removeprefix("unix:")).absolute()
            if len(os.fsencode(path)) > _UNIX_PATH_LIMIT:
                raise ConfigError(f"socket path is longer than {_UNIX_PATH_LIMIT} bytes: {path}")
            return cls(f"unix:{path}")
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"{text!r} is not an address; write unix:PATH or HOST:PORT")
        return cls(text)

    @classmethod
    def default(cls, name: str) -> Address:
        """`unix:<runtime directory>/<name>.sock`."""
        return cls.parse(f"unix:{runtime_directory() / name}.sock")

    @classmethod
    def of_option(cls, text: str | None, name: str) -> Address:
        """What a command-line option says, or the default for `name`."""
        return cls.parse(text) if text else cls.default(name)

    @property
    def socket_path(self) -> Path | None:
        """The unix socket, if it is one."""
        return Path(self.target.removeprefix("unix:")) if self.target.startswith("unix:") else None

    @property
    def is_local(self) -> bool:
        """Whether nobody outside this machine can reach it."""
        if self.socket_path is not None:
            return True
        host = self.target.rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"  # any other name is what a name server says it is

    def beside(self, suffix: str) -> Path:
        """A path that belongs to this address: beside its socket, or in the runtime directory."""
        path = self.socket_path
        if path is not None:
            return path.with_name(path.name + suffix)
        return runtime_directory() / (self.target.replace(":", "-").replace("/", "-") + suffix)

    def __str__(self) -> str:
        return self.target


class AddressClaim:
    """The exclusive right to listen on an address, for as long as this process lives.

    Claiming removes what a killed predecessor left; releasing removes what this process leaves.
    """

    def __init__(self, address: Address) -> None:
        """Raises ConfigError if a living process holds the address, or other files are where it would be."""
        self.address = address
        self._lock_path = address.beside(".lock")
        self._check_paths()
        while (lock := self._try_lock()) is None:
            pass
        self._lock = lock
        self._remove_sockets()

    @property
    def data_path(self) -> Path:
        """Path of the data plane's ipc socket."""
        return self.address.beside(".data")

    def release(self) -> None:
        """Remove sockets and lock. Unlinked while locked: a successor then locks a file of its own."""
        self._remove_sockets()
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)

    def _try_lock(self) -> int | None:
        """The locked file; None if its owner removed it in between, so that it locks nothing any more."""
        try:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise ConfigError(f"cannot listen on {self.address}: its directory does not exist") from None
        except OSError as error:
            raise ConfigError(f"cannot listen on {self.address}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink:
                return lock
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(
                f"another process already listens on {self.address}; stop it first, or choose --listen"
            ) from None
        os.close(lock)
        return None

    def _check_paths(self) -> None:
        """What is there must be what a predecessor left: sockets, and a lock, which is empty."""
        for path, ours in [
            *((path, stat.S_ISSOCK) for path in self._sockets),
            (self._lock_path, stat.S_ISREG),
        ]:
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ConfigError(f"cannot listen on {self.address}: {error.strerror}") from None
            if not ours(status.st_mode) or (path == self._lock_path and status.st_size):
                raise ConfigError(f"cannot listen on {self.address}: {path} is there, and is something else")

    @property
    def _sockets(self) -> list[Path]:
        return [path for path in (self.address.socket_path, self.data_path) if path is not None]

    def _remove_sockets(self) -> None:
        for path in self._sockets:
            path.unlink(missing_ok=True)
