"""Memory and messages of another user are refused. That user is a child of root that gave up being root."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from common.arena import ArenaShape, MappedArena, OwnedArena
from common.errors import PermissionDenied
from common.ownership import check_own_endpoint, open_own
from expert_store.miss_loop import MissLoop

NOBODY = 65534
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")


def as_another_user(action: Callable[[], bool]) -> bool:
    """What `action` says in a process of another user."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            status = int(action())
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1), "the child raised"
    return status == 1


@pytest.fixture
def arena() -> Iterator[OwnedArena]:
    arena = OwnedArena(ArenaShape("0" * 32, 1, 1, 1, 4096))
    yield arena
    arena.close()


def test_an_arena_is_its_owners_alone(arena: OwnedArena) -> None:
    assert arena.path.stat().st_mode & 0o777 == 0o600
    MappedArena(arena.path, "0" * 32)


@as_root
def test_another_user_cannot_map_an_arena(arena: OwnedArena) -> None:
    def refused() -> bool:
        try:
            MappedArena(arena.path, "0" * 32)
        except PermissionDenied:
            return True
        return False

    assert as_another_user(refused)


@as_root
def test_an_arena_that_another_user_made_is_refused(arena: OwnedArena) -> None:
    """Whoever hands out paths could otherwise feed a worker experts of theirs."""
    os.chown(arena.path, NOBODY, NOBODY)
    with pytest.raises(PermissionDenied, match="not to be trusted"):
        MappedArena(arena.path, "0" * 32)


def test_only_plain_files_that_others_cannot_write_to_are_opened(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    file.touch(0o644)
    os.close(open_own(file))
    link.symlink_to(file)
    os.mkfifo(pipe, 0o600)
    for path in (link, pipe, tmp_path):
        with pytest.raises(PermissionDenied):
            open_own(path)
    file.chmod(0o660)
    with pytest.raises(PermissionDenied, match="not to be trusted"):
        open_own(file)
    with pytest.raises(FileNotFoundError):
        open_own(tmp_path / "none")


@pytest.fixture
def data_plane() -> Iterator[MissLoop]:
    """A store's data plane whose file keeps nobody out."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data"
        loop = MissLoop(path, None, None, None)  # type: ignore[arg-type] # nothing gets as far as these
        path.parent.chmod(0o777)
        path.chmod(0o777)
        yield loop
        loop._context.destroy(linger=0)


def send(endpoint: str) -> bool:
    """A message of one byte, with time to arrive; True."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(endpoint)
        socket.send(b"x")
        time.sleep(0.3)
    return True


@as_root
def test_the_data_plane_hears_its_own_user_alone(data_plane: MissLoop) -> None:
    assert as_another_user(lambda: send(data_plane.endpoint))
    assert not data_plane._socket.poll(100)
    send(data_plane.endpoint)
    assert data_plane._socket.poll(5000)


@as_root
def test_a_worker_sends_to_its_own_users_store_alone(data_plane: MissLoop, tmp_path: Path) -> None:
    path = Path(data_plane.endpoint.removeprefix("ipc://"))
    path.chmod(0o700)
    check_own_endpoint(data_plane.endpoint)
    link = tmp_path / "link"
    link.symlink_to(path)
    (tmp_path / "file").touch(0o600)
    for endpoint in ("tcp://127.0.0.1:1", "ipc://relative", f"ipc://{link}", f"ipc://{tmp_path}/file"):
        with pytest.raises(PermissionDenied):
            check_own_endpoint(endpoint)
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(PermissionDenied, match="not to be trusted"):
        check_own_endpoint(data_plane.endpoint)
    with pytest.raises(FileNotFoundError):
        check_own_endpoint(f"ipc://{tmp_path}/none")
