"""A worker as it is served to others: over TLS, with keys, from a file; and what the pair keeps to itself."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from common.addresses import Address
from common.api_keys import add_key
from common.credentials import Credentials
from common.errors import Exhausted, PermissionDenied, Unauthenticated
from common.grpc_client import wait_until_serving
from gpu_worker.client import WorkerClient
from tests.helpers.certificates import Authority
from tests.system.processes import READY, Pair, Process, eventually, free_port


def test_a_worker_with_tls_and_keys(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, keys = Authority(tmp_path / "ca"), tmp_path / "keys.toml"
    cert, key = authority.issue("127.0.0.1")
    alice = Credentials(authority.file, api_key=add_key(keys, "alice", max_output_tokens=3))
    config = tmp_path / "worker.toml"
    address = Address.parse(f"127.0.0.1:{free_port()}")
    files = {"tls-cert": cert, "tls-key": key, "api-keys": keys}
    lines = [f'listen = "{address}"', *(f'{name} = "{path}"' for name, path in files.items())]
    config.write_text("\n".join(lines) + '\nlog-level = "warning"\n')

    pair.start_store()
    command = ("gpu-worker", "start", "--device", "cpu", "--config", str(config))
    worker = Process(pair.runtime, *command, forked=True)
    pair.processes.append(worker)
    wait_until_serving(address, READY, Credentials(authority.file))  # health wants no key

    command = ("gpu-worker", "generate", "--worker", str(address), "--token-ids", "1,2,3", "--json")
    monkeypatch.setenv("EXPERT_SERVING_TLS_CA", str(authority.file))
    refused = pair.run(*command, check=False)
    assert refused.returncode == 1
    assert "an API key is needed" in refused.stderr
    monkeypatch.setenv("EXPERT_SERVING_API_KEY", str(alice.api_key))
    done = pair.run(*command, "--max-new-tokens", "3", "--ignore-eos")
    assert len(json.loads(done.stdout)["token_ids"]) == 3

    with WorkerClient(address, credentials=alice) as client:
        with pytest.raises(PermissionDenied, match="3 tokens a request, not for 4"):
            next(client.generate([1, 2, 3], max_new_tokens=4))
        with pytest.raises(PermissionDenied, match="no admin's"):
            client.stop()
        # Keys and the level of the log change while it runs.
        bob = add_key(keys, "bob", max_concurrent_requests=1)
        keys.write_text(keys.read_text().replace("max-output-tokens = 3", "max-output-tokens = 4"))
        config.write_text(config.read_text().replace("warning", "info"))
        worker.signal(signal.SIGHUP)
        eventually(lambda: "reloaded" in worker.log.read_text(), READY, "reloading")
        assert sum(1 for _ in client.generate([1, 2, 3], max_new_tokens=4)) > 0
    with WorkerClient(address, credentials=Credentials(authority.file, api_key=bob)) as client:
        events = client.generate([1, 2, 3], max_new_tokens=400, ignore_eos=True)
        next(events)
        with pytest.raises(Exhausted, match="'bob' may have 1 requests at a time"):
            next(client.generate([1, 2, 3], max_new_tokens=1))
        keys.write_text("")
        worker.signal(signal.SIGHUP)
        eventually(lambda: worker.log.read_text().count("reloaded") == 2, READY, "reloading")
        with pytest.raises(Unauthenticated, match="not known here"):
            client.model_info()
        assert sum(1 for _ in events) > 0  # what had begun goes on
    assert worker.stop() == 0


def test_nothing_of_a_pair_is_open_to_others(pair: Pair) -> None:
    """Whatever umask they were started with: sockets, locks and memory are their owner's alone."""
    pair.start_store()
    pair.start_worker()
    pair.generate([1, 2, 3], 2)
    files = pair.leftovers()
    assert len(files) >= 6
    assert [path for path in files if path.lstat().st_mode & 0o077] == []
    assert pair.worker.stop() == 0
    assert pair.store.stop() == 0
