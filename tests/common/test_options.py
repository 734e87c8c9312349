"""Options by flags, by a file and by default: one declaration, one order, no key that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from common.config_file import load_toml
from common.errors import ConfigError
from common.options import Option, configured_by
from common.process_config import ProcessConfig
from common.units import parse_size
from expert_store.config import StoreConfig
from gpu_worker.config import WorkerConfig


@dataclass(frozen=True)
class Kettle(ProcessConfig):
    model: Annotated[str, Option("What to boil in.", metavar="MODEL", argument=True)]
    size: Annotated[int | None, Option("How much.", metavar="SIZE", parse=parse_size)] = None
    max_cups: Annotated[int, Option("How many.", metavar="N")] = 3
    heat: Annotated[float, Option("How hot.")] = 1.0
    quiet: Annotated[bool, Option("No whistle.")] = False
    leaves: Annotated[list[str] | None, Option("Of what.")] = None
    lid: Annotated[Path | None, Option("Which lid.")] = None
    hidden: int = 7


class Boiled:
    """The last config that the command got, and what reads it again."""

    config: Kettle
    reread: Callable[[], Kettle]


def run(*words: object) -> str:
    """What the command prints; raises what it raises."""
    app = typer.Typer(rich_markup_mode="rich")

    @app.command()
    @configured_by(Kettle)
    def boil(config: Kettle, reread: Callable[[], Kettle]) -> None:
        """Boil."""
        Boiled.config, Boiled.reread = config, reread

    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kettle.toml"
    path.write_text(
        'model = "demo"\nsize = "2GB"\nmax-cups = 5\nquiet = true\nheat = 2\nleaves = ["mint", "tea"]\n'
    )
    return path


def test_defaults_then_the_file_then_flags(file: Path) -> None:
    run("tin")
    assert Boiled.config == Kettle("tin")
    run("--config", file)
    assert Boiled.config == Kettle("demo", 2_000_000_000, 5, 2.0, True, ["mint", "tea"])
    run("tin", "--config", file, "--max-cups", "0", "--size", "7", "--leaves", "nettle", "--no-quiet")
    assert Boiled.config == Kettle("tin", 7, 0, 2.0, False, ["nettle"])


def test_the_file_can_be_read_again_and_flags_still_go_before_it(file: Path) -> None:
    run("--config", file, "--heat", "3.5")
    file.write_text('model = "pot"\nheat = 9.0\nlog-level = "debug"\n')
    again = Boiled.reread()
    assert (again.model, again.heat, again.max_cups, again.log_level) == ("pot", 3.5, 3, "DEBUG")


def test_what_is_printed_is_a_file_that_says_the_same(file: Path, tmp_path: Path) -> None:
    odd = 'a "lid"\\ of\ttin, naïve\x7f'
    printed = run("--config", file, "--lid", odd, "--size", "12GiB", "--print-config")
    (tmp_path / "again.toml").write_text(printed)
    values = load_toml(tmp_path / "again.toml")
    assert (values["lid"], values["size"]) == (odd, 12 << 30)
    assert run("--config", tmp_path / "again.toml", "--print-config") == printed
    assert "# size: not set" in run("demo", "--print-config")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_cups = 3", "no option 'max_cups'; did you mean 'max-cups'"),
        ("qiet = true", "did you mean 'quiet'"),
        ("zzzz = 1", "known are model, size, max-cups"),
        ("hidden = 1", "no option 'hidden'"),
        ("print-config = true", "no option 'print-config'"),
        ("max-cups = '3'", "max-cups must be a whole number, not '3'"),
        ("max-cups = 3.5", "whole number"),
        ("max-cups = true", "whole number"),
        ("quiet = 1", "quiet must be true or false, not 1"),
        ("heat = 'hot'", "heat must be a number"),
        ("model = 3.5", "model must be a text"),
        ("leaves = 'mint'", "leaves must be a list"),
        ("[model]\nx = 1", "model must be a text"),
        ("model = 'x'\nsize = 'lots'", "'lots' is not a size"),
        ("model = 'x'\nlog-level = 'loud'", "DEBUG, INFO, WARNING, ERROR"),
        ("max-cups = ", "is not TOML"),
        ("size = 1", "MODEL is missing"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        run("--config", path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        run("--config", tmp_path / "none.toml")


def test_help_names_each_option_its_default_and_no_hidden_field() -> None:
    shown = run("--help")
    for text in ("How many. [default: 3]", "[MODEL]", "SIZE", "--quiet", "--config", "--print-config"):
        assert text in shown
    assert "hidden" not in shown
    assert "--no-quiet" not in shown


@pytest.mark.parametrize("config_type", [WorkerConfig, StoreConfig])
def test_the_processes_options_are_declared(config_type: type) -> None:
    """One `Option` a field, and a help that does not merely repeat the name."""
    from common.options import settings_of

    for setting in settings_of(config_type):
        assert len(setting.option.help) > 15, setting.key
