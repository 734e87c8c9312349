"""API keys: who may call a server, and how much of it each may use.

The file is TOML, one table a key, made and added to by `gpu-worker key add`:

    [keys.alice]
    hash = "5f0c..."                  # SHA-256 of the key, in hexadecimal
    admin = false                     # may stop the worker, and see its statistics
    max-prompt-tokens = 8192          # of one request, as are output tokens over all its samples
    max-output-tokens = 1024
    max-concurrent-requests = 4
    requests-per-minute = 60
    max-priority = 0

Only hashes are kept. A fast hash is the right one here: keys are 256 random bits that we make, so there is
nothing to guess, and a slow hash would let anybody keep the server busy with wrong keys.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.config_file import as_toml, check_key, checked_value, load_toml
from common.errors import ConfigError, Unauthenticated
from common.key_usage import KeyUsage

log = logging.getLogger(__name__)

_PREFIX = "es-"  # so that scanners for leaked secrets, and people, know one when they see it
_WANTED = "send `authorization: Bearer KEY`; the commands take it from $EXPERT_SERVING_API_KEY"


@dataclass(frozen=True, kw_only=True)
class KeyRules:
    """What a table of the file says; None: no limit."""

    hash: str
    admin: bool = False
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    max_priority: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError naming the key of the table."""
        if not re.fullmatch("[0-9a-f]{64}", self.hash):
            raise ConfigError("hash must be 64 hexadecimal digits, as `gpu-worker key add` writes it")
        for key, value in self.items():
            if type(value) is int and value < 1 and key != "max-priority":
                raise ConfigError(f"{key} must be at least 1, not {value}")

    def items(self) -> Iterator[tuple[str, Any]]:
        """As in the file."""
        for field in fields(self):
            yield field.name.replace("_", "-"), getattr(self, field.name)


class KeyRing:
    """The keys of a file, and what each is using. `reload` takes up a changed file."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError saying what is wrong with the file."""
        self._path = path
        self._usages: dict[str, KeyUsage] = {}
        self.reload()

    def reload(self) -> None:
        """Raises ConfigError, and keeps the keys it has, when the file is not right.

        A request of a key that is no longer there goes on to its end.
        """
        usages = {}
        for name, rules in read_keys(self._path).items():
            usages[name] = self._usages.get(name) or KeyUsage(name, rules)
            usages[name].rules = rules
        self._usages = usages
        if not usages:  # no mistake of who has taken the last one back
            log.warning("%s has no keys: every call is refused", self._path)

    def find(self, authorization: str | None) -> KeyUsage:
        """Whose key an `Authorization` field bears; Unauthenticated if nobody's."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated(f"an API key is needed: {_WANTED}")
        digest = hash_of(key.strip())
        found = None
        for usage in self._usages.values():  # all of them: the time taken tells nothing
            if hmac.compare_digest(digest, usage.rules.hash):
                found = usage
        if found is None:
            raise Unauthenticated(f"this API key is not known here: {_WANTED}")
        return found

    def __len__(self) -> int:
        return len(self._usages)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def read_keys(path: Path) -> dict[str, KeyRules]:
    """The tables of a file by name; raises ConfigError."""
    status = _status(path)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{path} may be written by others than its owner; chmod 600 it")
    if status.st_uid not in (0, os.getuid()):
        raise ConfigError(f"{path} belongs to another user, who could make keys; chown it")
    values = load_toml(path)
    for name in values:
        check_key(name, ["keys"], str(path))
    tables = values.get("keys", {})
    if not isinstance(tables, dict):
        raise ConfigError(f"{path}: keys must be tables, as in [keys.alice]")
    return {name: _rules(f"{path}: keys.{name}", table) for name, table in tables.items()}


def add_key(path: Path, name: str, **rules: Any) -> str:
    """Make a key, append its hash to the file, and return it: it is kept nowhere."""
    if not re.fullmatch("[A-Za-z0-9_-]{1,64}", name):
        raise ConfigError(f"{name!r} is no name for a key; use letters, digits, - and _")
    key = _PREFIX + secrets.token_urlsafe(32)
    table = KeyRules(hash=hash_of(key), **rules).items()
    values = [item for item in table if item[1] is not None and item[1] is not False]
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    with os.fdopen(file, "a+", encoding="utf-8") as keys:
        fcntl.flock(keys, fcntl.LOCK_EX)  # two of these at once must not both find the name free
        if name in read_keys(path):
            raise ConfigError(f"{path} has a key {name!r} already; remove its table first")
        keys.write(f"{chr(10) if keys.tell() else ''}[keys.{name}]\n{as_toml(values)}")
    return key


def _rules(where: str, table: Any) -> KeyRules:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table, with a hash in it")
    kinds = {key: str if key == "hash" else bool if key == "admin" else int for key in _KEYS}
    for key, value in table.items():
        check_key(key, kinds, where)
        checked_value(value, kinds[key], f"{where}: {key}")
    if "hash" not in table:
        raise ConfigError(f"{where} has no hash")
    try:
        return KeyRules(**{key.replace("-", "_"): value for key, value in table.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


_KEYS = [name.replace("_", "-") for name in typing.get_type_hints(KeyRules)]


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
