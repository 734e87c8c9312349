"""MODEL of `expert-store start`: what it may be, and the cache of packed copies."""

import fcntl
import io
import os
import shutil
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console

from common.checkpoint import PackedCheckpoint
from common.checkpoint.manifest import MANIFEST
from common.errors import CheckpointError, ConfigError, NotFound, Unavailable
from expert_store import models
from expert_store.models import cache_directory, resolve_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own."""
    monkeypatch.setenv("EXPERT_SERVING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def resolve(model: str | Path, bits: int | None = None) -> tuple[PackedCheckpoint, str]:
    """The checkpoint, and what was printed on the way."""
    console = Console(file=io.StringIO(), width=200)
    checkpoint = resolve_model(str(model), bits, console)
    assert isinstance(console.file, io.StringIO)
    return checkpoint, console.file.getvalue()


def test_packed_directory_is_used_as_it_is(pristine_packed: Path, cache: Path) -> None:
    checkpoint, output = resolve(pristine_packed)
    assert checkpoint.directory == pristine_packed and output == ""
    assert resolve(pristine_packed, bits=5)[0].fingerprint == checkpoint.fingerprint
    with pytest.raises(ConfigError, match=r"packed already, at 5 bits: .*pack --bits 4"):
        resolve(pristine_packed, bits=4)
    assert not cache.exists()


def test_unpacked_directory_is_packed_once(model: Path, pristine_packed: Path, cache: Path) -> None:
    first, output = resolve(model)
    assert "packing model at 5 bits" in output and "100%" in output
    assert first.directory.parent == cache / "packed" and first.directory.name.startswith("model-")
    assert first.fingerprint == PackedCheckpoint.open(pristine_packed).fingerprint
    written = (first.directory / MANIFEST).stat().st_mtime_ns
    second, output = resolve(model)
    assert second.directory == first.directory and output == ""
    assert (second.directory / MANIFEST).stat().st_mtime_ns == written


def test_other_bits_and_a_changed_source_are_packed_anew(model: Path) -> None:
    first = resolve(model)[0].directory
    assert resolve(model, bits=16)[0].directory != first
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert resolve(model)[0].directory != first


@pytest.mark.parametrize("version", ["expert_store.models.VERSION", "expert_store.models.RECORD_FORMAT"])
def test_a_new_form_of_packed_checkpoints_is_packed_anew(
    model: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Old copies must not be found, since they could only be refused."""
    first = resolve(model)[0].directory
    monkeypatch.setattr(version, 99)
    assert resolve(model)[0].directory != first


def test_two_starts_do_not_both_pack(model: Path) -> None:
    """The second waits for the lock that the first holds while it packs, then finds the result."""
    directory = resolve(model)[0].directory
    hidden = directory.rename(directory.with_name("hidden"))
    results: list[tuple[PackedCheckpoint, str]] = []
    with directory.with_name(directory.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter = threading.Thread(target=lambda: results.append(resolve(model)))
        waiter.start()
        waiter.join(0.5)
        assert waiter.is_alive() and not directory.exists()
        hidden.rename(directory)
    waiter.join()
    checkpoint, output = results[0]
    assert checkpoint.directory == directory
    assert "waiting for another process" in output and "packing model" not in output


def test_waiting_for_the_lock_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = resolve(model)[0].directory
    monkeypatch.setattr(models, "_LOCK_TIMEOUT", 0.2)
    with directory.with_name(directory.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match=r"\.lock for 0 s"):
            resolve(model)


def test_damaged_copy_says_what_to_remove(model: Path) -> None:
    directory = resolve(model)[0].directory
    (directory / "dense.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"dense.safetensors is missing.*remove {directory}"):
        resolve(model)


def test_failed_packing_leaves_no_copy(model: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match="bits 7"):
        resolve(model, bits=7)
    assert not cache.exists()


def test_a_cache_that_cannot_be_made(model: Path, cache: Path) -> None:
    cache.touch()
    with pytest.raises(ConfigError, match=r"packed copies .*: Not a directory; EXPERT_SERVING_CACHE names"):
        resolve(model)


def test_demo(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo is package data; a directory that happens to be called so does not hide it."""
    monkeypatch.setattr(models, "files", lambda package: tmp_path / package)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match="lacks the demo"):
        resolve("demo")
    shutil.copytree(pristine, tmp_path / "expert_store" / "demo")
    assert resolve("demo")[0].directory.name.startswith("demo-")


@pytest.mark.parametrize("model", ["/no/such/directory", "nowhere", "a/b/c", "../a"])
def test_refuses_what_is_nothing_of_all_this(model: str) -> None:
    with pytest.raises(NotFound, match="neither a directory nor"):
        resolve(model)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub without a network, and its cache in a directory of the test's own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hugging_face_id_that_was_downloaded_before(pristine: Path, offline_hub: Path) -> None:
    repository = offline_hub / "models--someone--tiny"
    shutil.copytree(pristine, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert resolve("someone/tiny")[0].directory.name.startswith("someone--tiny-")


def test_hugging_face_id_without_a_network(offline_hub: Path) -> None:
    with pytest.raises(Unavailable, match="cannot download someone/tiny from Hugging Face"):
        resolve("someone/tiny")


def test_hugging_face_id_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(NotFound, match="no such model or wants a login"):
        resolve("someone/tiny")


def test_downloads_weights_and_text_only(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "model-00001-of-00002.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
    ]
    unwanted = [
        "modeling.py",
        "pytorch_model.bin",
        "weights.gguf",
        "README.md",
        "original/a.safetensors",
        "x.pkl",
    ]

    def download(model: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        items = filter_repo_objects(
            wanted + unwanted, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(items) == wanted
        return str(pristine)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("someone/tiny")


def test_cache_directory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == cache
    monkeypatch.delenv("EXPERT_SERVING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/expert-serving")
