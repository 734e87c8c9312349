"""What deploy/ offers is what the programs take: options, commands, and units that systemd accepts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from common.config_file import load_toml
from common.options import resolve
from expert_store import cli as store_cli
from expert_store.config import StoreConfig
from gpu_worker import cli as worker_cli
from gpu_worker.config import WorkerConfig
from gpu_worker.gateway.config import GatewayConfig

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
CONFIGS = {"store": StoreConfig, "worker": WorkerConfig, "gateway": GatewayConfig}
BIN = "/opt/expert-serving/bin/"


@pytest.mark.parametrize("name", CONFIGS)
def test_example_configurations(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, and with each line that is commented out put in force."""
    monkeypatch.setenv("EXPERT_SERVING_RUNTIME_DIR", str(tmp_path / "run"))
    text = (DEPLOY / f"{name}.toml").read_text()
    resolve(CONFIGS[name], {}, DEPLOY / f"{name}.toml")
    offered = re.findall(r"^# ([a-z-]+) = ", text, re.MULTILINE)
    assert len(offered) > 4
    whole = tmp_path / "whole.toml"
    whole.write_text(offer_all(text))
    resolve(CONFIGS[name], {}, whole)
    assert set(offered) <= load_toml(whole).keys()


def offer_all(text: str) -> str:
    """Comments that are lines of TOML made such lines; the last line of a key counts."""
    lines = {}
    for line in text.splitlines():
        if match := re.match("(?:# )?([a-z-]+) = ", line):
            lines[match[1]] = line.removeprefix("# ")
    return "\n".join(lines.values())


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    for line in re.findall(r"^ExecStart(?:Post)?=(.*)$", text, re.MULTILINE):
        check_command(line.removeprefix(BIN).split())
        config = re.search(r"--config /etc/expert-serving/(\S+)", line)
        assert config is None or (DEPLOY / config[1]).exists()
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd here to ask")
    (tmp_path / unit.name).write_text(
        text.replace(BIN, f"{Path(sys.executable).parent}/").replace("/bin/kill", sys.executable)
    )
    checked = systemd_analyze("verify", str(tmp_path / unit.name))
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    exposed = systemd_analyze("security", "--offline=true", "--threshold=20", str(tmp_path / unit.name))
    assert exposed.returncode == 0, exposed.stdout  # of 100


def systemd_analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *words], capture_output=True, text=True, timeout=60
    )


def test_containers() -> None:
    """Directories that the image makes, one /dev/shm for the pair, and commands that there are."""
    composed = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    image = (DEPLOY / "Containerfile").read_text()
    services = composed["services"]
    for service in services.values():
        check_command(service["command"])
        if "healthcheck" in service:
            check_command(service["healthcheck"]["test"][1:])
        for volume in service["volumes"]:
            name, path = volume.split(":")
            assert name in composed["volumes"]
            assert re.search(rf"install .*\n.*{path}\b", image)
    assert services["worker"]["ipc"] == "service:store"
    for path in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE):
        assert all((ROOT / part).exists() for part in path.split())


def check_command(words: list[str]) -> None:
    """The command and its options exist, and take so many values."""
    app = {"expert-store": store_cli.app, "gpu-worker": worker_cli.app}[words[0]]
    command = get_command(app)
    context = command.make_context(words[0], words[1:], resilient_parsing=True)
    name, inner, rest = command.resolve_command(context, words[1:])
    inner.make_context(name, rest, parent=context)
