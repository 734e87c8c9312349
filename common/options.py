"""Options of a process: each is declared once, as an annotated field of the process's config dataclass.

    @dataclass(frozen=True)
    class WorkerConfig(ProcessConfig):
        max_queue: Annotated[int, Option("Requests that may wait.", metavar="N")] = 256

    @app.command()
    @configured_by(WorkerConfig)
    def start(config: WorkerConfig, reread: Callable[[], WorkerConfig]) -> None: ...

From that come the flag `--max-queue`, its help, the key `max-queue` of a TOML file (`common.config_file`) and
what `--print-config` shows. A flag goes before the file, the file before the default. Checks of values and of
what fits together are `__post_init__`'s; a field without an `Option` cannot be set by users.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from common.config_file import as_toml, read_config_file
from common.errors import ConfigError

Config = TypeVar("Config")
_NOT = "no_"
_CONFIG = typer.Option(
    help="TOML file of these options, as in max-queue = 64. Flags go before it; --no-NAME undoes a switch.",
    metavar="FILE",
)
_PRINT_CONFIG = typer.Option(
    "--print-config", help="Print the configuration that flags, file and defaults make, as TOML, and exit."
)


@dataclasses.dataclass(frozen=True)
class Option:
    """What users are told of a field. `parse` makes its value of a text, raising ConfigError."""

    help: str
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    argument: bool = False  # given by its place, not by a flag


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field and its option."""

    name: str
    option: Option
    kind: Any  # of what is typed or written in a file: str, int, float, bool, Path or list[str]
    default: Any  # None where it is chosen later

    @property
    def key(self) -> str:
        """In a file, and after the dashes of the flag."""
        return self.name.replace("_", "-")

    def value(self, given: Any) -> Any:
        return given if self.option.parse is None else self.option.parse(str(given))

    def parameters(self) -> list[inspect.Parameter]:
        """For typer. Every flag is None unless given, so that what was given is known."""
        text, metavar = self.option.help, self.option.metavar
        if self.option.argument:
            return [_parameter(self.name, self.kind, typer.Argument(help=text, metavar=metavar))]
        if self.kind is bool:
            unset = typer.Option(f"--no-{self.key}", hidden=True)
            return [
                _parameter(self.name, bool, typer.Option(f"--{self.key}", help=text)),
                _parameter(_NOT + self.name, bool, unset),
            ]
        if self.default is not None:
            text += rf" [dim]\[default: {self.default}][/dim]"
        return [_parameter(self.name, self.kind, typer.Option(help=text, metavar=metavar))]

    def given(self, flags: dict[str, Any]) -> Any:
        """What flags say of it; None: nothing."""
        if self.kind is bool and flags.get(_NOT + self.name):
            return False
        value = flags.get(self.name)
        return None if value == [] else value


def settings_of(config_type: type[Any]) -> list[Setting]:
    """The fields that users can set: the class's own, then those it inherits."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    own = set(inspect.get_annotations(config_type))
    settings = []
    for field in sorted(dataclasses.fields(config_type), key=lambda field: field.name not in own):
        option = next(
            (x for x in getattr(hints[field.name], "__metadata__", ()) if isinstance(x, Option)), None
        )
        if option is not None:
            kind = str if option.parse else _without_none(typing.get_args(hints[field.name])[0])
            default = None if field.default is dataclasses.MISSING else field.default
            settings.append(Setting(field.name, option, kind, default))
    return settings


def resolve(config_type: type[Config], flags: dict[str, Any], file: Path | None) -> Config:
    """The config of what flags say, what a file says, and defaults, in this order."""
    settings = settings_of(config_type)
    said = {} if file is None else read_config_file(file, {s.key: s.kind for s in settings})
    values = {}
    for setting in settings:
        value = setting.given(flags)
        if value is None:
            value = said.get(setting.key)
        if value is not None:
            values[setting.name] = setting.value(value)
        elif setting.option.argument:
            raise ConfigError(f"{setting.option.metavar} is missing: give it, or `{setting.key}` in --config")
    return config_type(**values)


def configured_by(config_type: type[Config]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function of a config and of what reads it again, with the file as it is then."""
    parameters = [parameter for setting in settings_of(config_type) for parameter in setting.parameters()]
    parameters += [_parameter("config", Path, _CONFIG), _parameter("print_config", bool, _PRINT_CONFIG)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(config: Path | None, print_config: bool | None, **flags: Any) -> None:
            reread = partial(resolve, config_type, flags, config)
            resolved = reread()
            if print_config:
                values = [(s.key, getattr(resolved, s.name)) for s in settings_of(config_type)]
                typer.echo(as_toml(values), nl=False)
            else:
                command(resolved, reread)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
        run.__annotations__ = {}
        return run

    return decorate


def check_bits_option(bits: int | None) -> int | None:
    """A number of bits that matrices cannot have is a usage error; for commands without a config."""
    try:
        check_bits_named("", bits)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    return bits


def check_bits_named(option: str, bits: int | None) -> None:
    """Raises ConfigError for a number of bits that matrices cannot have; None is none of these."""
    if bits is None:
        return
    from common.hlwq.planes import check_bits  # PyTorch comes with it, and most commands do not need that

    try:
        check_bits(bits)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}" if option else str(error)) from None


def _parameter(name: str, kind: Any, declared: Any) -> inspect.Parameter:
    declared.show_default = False
    annotation: Any = Annotated[kind | None, declared]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind
