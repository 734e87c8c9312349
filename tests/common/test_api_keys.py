"""API keys: what a file may say, whose key is whose, and what a key may use."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from common import key_usage
from common.api_keys import KeyRing, KeyRules, add_key
from common.errors import ConfigError, Exhausted, PermissionDenied, Unauthenticated
from common.key_usage import KeyUsage, allowed_output, check_allowance

HASH = "0" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_a_key_is_found_and_not_kept(path: Path) -> None:
    alice, bob = add_key(path, "alice", max_prompt_tokens=5), add_key(path, "bob", admin=True, max_priority=0)
    text = path.read_text()
    assert alice not in text
    assert hashlib.sha256(alice.encode()).hexdigest() in text
    assert path.stat().st_mode & 0o777 == 0o600
    ring = KeyRing(path)
    assert len(ring) == 2
    assert len(alice) >= 43  # 256 bits
    assert ring.find(f"Bearer {alice}").rules.max_prompt_tokens == 5
    assert ring.find(f"bearer {bob}").name == "bob"
    assert ring.find(f"bearer {bob}").rules.admin
    assert ring.find(f"bearer {bob}").rules.max_priority == 0


@pytest.mark.parametrize(
    ("shown", "says"),
    [
        (None, "is needed"),
        ("", "is needed"),
        ("Bearer", "is needed"),
        ("Basic YTpi", "is needed"),
        ("Bearer es-nobodys", "not known"),
        (f"Bearer {HASH}", "not known"),  # the hash does not open
        ("Bearer \udcff", "not known"),
    ],
)
def test_what_is_no_key(path: Path, shown: str | None, says: str) -> None:
    add_key(path, "alice")
    path.write_text(path.read_text() + f'[keys.zero]\nhash = "{HASH}"\n')
    with pytest.raises(Unauthenticated, match=says):
        KeyRing(path).find(shown)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[key.alice]", "no option 'key'; did you mean 'keys'"),
        ("keys = 3", "must be tables"),
        ("[keys]\nalice = 3", "keys.alice must be a table"),
        ("[keys.alice]", "keys.alice has no hash"),
        ("[keys.alice]\nhash = 'abc'", "keys.alice: hash must be 64 hexadecimal digits"),
        (f"[keys.alice]\nhash = '{HASH}'\nmax-prompt-token = 3", "did you mean 'max-prompt-tokens'"),
        (f"[keys.alice]\nhash = '{HASH}'\nmax-prompt-tokens = '3'", "must be a whole number"),
        (f"[keys.alice]\nhash = '{HASH}'\nmax-prompt-tokens = 0", "max-prompt-tokens must be at least 1"),
        (f"[keys.alice]\nhash = '{HASH}'\nadmin = 1", "admin must be true or false"),
        ("[keys.alice", "is not TOML"),
    ],
)
def test_a_file_that_is_not_right_is_refused(path: Path, text: str, says: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        KeyRing(path)


def test_a_file_that_others_may_write_is_refused(path: Path) -> None:
    add_key(path, "alice")
    path.chmod(0o620)
    with pytest.raises(ConfigError, match="chmod 600"):
        KeyRing(path)


def test_a_file_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(path, "alice")
    owner = os.getuid()
    if owner == 0:  # root's files are anybody's to trust
        os.chown(path, 4711, -1)
    monkeypatch.setattr("os.getuid", lambda: owner + 4712)
    with pytest.raises(ConfigError, match="belongs to another user"):
        KeyRing(path)


def test_names(path: Path) -> None:
    add_key(path, "alice")
    with pytest.raises(ConfigError, match="has a key 'alice' already"):
        add_key(path, "alice")
    for name in ("", "a b", "a]", "ä"):
        with pytest.raises(ConfigError, match="no name for a key"):
            add_key(path, name)
    with pytest.raises(ConfigError, match="at least 1"):
        add_key(path, "bob", requests_per_minute=0)
    assert len(KeyRing(path)) == 1


def test_reloading_takes_up_changes_and_forgets_no_use(path: Path) -> None:
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    ring = KeyRing(path)
    ring.find(f"Bearer {alice}").begin()
    path.write_text(path.read_text().split("\n[keys.bob]")[0] + "max-concurrent-requests = 1\n")
    carol = add_key(path, "carol")
    ring.reload()
    with pytest.raises(Unauthenticated):
        ring.find(f"Bearer {bob}")
    assert ring.find(f"Bearer {carol}").name == "carol"
    with pytest.raises(Exhausted, match="1 requests at a time"):
        ring.find(f"Bearer {alice}").begin()
    path.write_text("[keys.alice")
    with pytest.raises(ConfigError, match="not TOML"):
        ring.reload()
    assert ring.find(f"Bearer {carol}").name == "carol"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(key_usage.time, "monotonic", lambda: now[0])
    return now


def test_a_file_without_keys_lets_nobody_in_and_is_told_of(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.touch(0o600)
    ring = KeyRing(path)
    with pytest.raises(Unauthenticated):
        ring.find("Bearer anything")
    assert f"{path} has no keys: every call is refused" in caplog.text


def test_the_rate_is_that_of_any_minute(clock: list[float]) -> None:
    usage = KeyUsage("alice", KeyRules(hash=HASH, requests_per_minute=2))
    for at in (0, 50):
        clock[0] = 1000.0 + at
        usage.begin()
        usage.end()
    clock[0] = 1059.0
    with pytest.raises(Exhausted, match="begin 2 requests a minute; try again in 1 s"):
        usage.begin()
    clock[0] = 1060.0
    usage.begin()
    with pytest.raises(Exhausted, match="try again in 50 s") as caught:
        usage.begin()
    assert caught.value.retry_after == 50
    usage.rules = KeyRules(hash=HASH, requests_per_minute=1)
    with pytest.raises(Exhausted, match="try again in 60 s"):
        usage.begin()
    assert usage.running == 1  # what was refused does not count


def test_concurrency_ends_with_the_request() -> None:
    usage = KeyUsage("alice", KeyRules(hash=HASH, max_concurrent_requests=2))
    usage.begin()
    usage.begin()
    with pytest.raises(Exhausted, match="2 requests at a time"):
        usage.begin()
    usage.end()
    usage.begin()


def test_several_at_once_are_counted_one_by_one() -> None:
    usage = KeyUsage("alice", KeyRules(hash=HASH, max_concurrent_requests=3, requests_per_minute=4))
    usage.begin()
    with pytest.raises(Exhausted, match="3 requests at a time"):
        usage.begin(3)
    usage.begin(2)
    usage.end(2)
    with pytest.raises(Exhausted, match="4 requests a minute"):
        usage.begin(2)
    usage.begin(1)
    usage.end(2)
    assert usage.running == 0


def test_more_at_once_than_a_key_may_ever_have() -> None:
    """No waiting helps: it was Exhausted once, which is to be tried again."""
    usage = KeyUsage("alice", KeyRules(hash=HASH, max_concurrent_requests=3, requests_per_minute=2))
    usage.check_possible(2)
    with pytest.raises(
        PermissionDenied, match="begin 2 requests a minute, not 3 at once: send fewer prompts"
    ):
        usage.check_possible(3)
    with pytest.raises(
        PermissionDenied, match="have 3 requests at a time, not 4 at once: send fewer prompts"
    ):
        usage.check_possible(4)
    KeyUsage("bob", KeyRules(hash=HASH)).check_possible(1 << 40)


@pytest.mark.parametrize(
    ("wanted", "samples", "allowed"),
    [(10, 2, 10), (11, 2, 10), (256, 1, 20), (256, 7, 2), (5, 21, 1), (0, 1, 0)],
)
def test_what_nobody_asked_for_is_what_the_key_allows(wanted: int, samples: int, allowed: int) -> None:
    usage = KeyUsage("alice", KeyRules(hash=HASH, max_output_tokens=20))
    assert usage.allowed_output(wanted, samples) == allowed
    assert KeyUsage("bob", KeyRules(hash=HASH)).allowed_output(wanted, samples) == wanted
    assert allowed_output(wanted, samples) == wanted  # no key is asked for


def test_the_allowance_of_a_request() -> None:
    rules = KeyRules(hash=HASH, max_prompt_tokens=10, max_output_tokens=20, max_priority=-1)
    usage = KeyUsage("alice", rules)
    usage.check_allowance(10, 20, -1)
    with pytest.raises(PermissionDenied, match="have 10 tokens read, not 11"):
        usage.check_allowance(11, 1, -1)
    with pytest.raises(PermissionDenied, match="20 tokens a request, not for 21: lower max_new_tokens"):
        usage.check_allowance(1, 21, -1)
    with pytest.raises(PermissionDenied, match="priority of -1, not of 0"):
        usage.check_allowance(1, 1, 0)
    check_allowance(1 << 40, 1 << 40, 1 << 30)  # without keys there are no limits
