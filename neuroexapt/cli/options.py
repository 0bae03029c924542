"""Command-line options generated from a config class: a setting is declared once, in its dataclass field."""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from neuroexapt.engine.config import RunConfig
from neuroexapt.errors import UserError

ALIASES = {"data_root": ["--data"], "controls": ["--control"]}
"""Further names of options: from the original example, or in the singular."""


def with_settings(cls: type[RunConfig]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command, in place of its parameter ``settings``, one option for every field of ``cls``.

    The command gets a dict of those that were given. ``--save_dir`` and ``--exp_name`` together name ``out``.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        options = [
            _option(field, typing.get_type_hints(cls)[field.name]) for field in dataclasses.fields(cls)
        ]
        options += [_legacy_option("save_dir", Path), _legacy_option("exp_name", str)]
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]

        def wrapped(**arguments: Any) -> Any:
            mine = {p.name: arguments.pop(p.name) for p in own}
            return command(settings=_given(arguments), **mine)

        parameters = [*own, *options]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapped.__doc__ = command.__doc__
        wrapped.__name__ = command.__name__
        return wrapped

    return decorate


def _option(field: dataclasses.Field, hint: Any) -> inspect.Parameter:
    name = f"--{field.name.replace('_', '-')}"
    is_flag = bool in (hint, *typing.get_args(hint))
    names = [f"{name}/--no-{name[2:]}" if is_flag else name, *ALIASES.get(field.name, [])]
    default = field.default if isinstance(field.default, (bool, int, float, str, Path)) else None
    shown = " [on]" if default is True else "" if is_flag or default in (None, "") else f" [{default}]"
    annotation = Annotated[hint | None, typer.Option(*names, help=f"{field.metadata['help']}{shown}")]
    return _keyword(field.name, annotation)


def _legacy_option(name: str, kind: type) -> inspect.Parameter:
    return _keyword(name, Annotated[kind | None, typer.Option(f"--{name.replace('_', '-')}", hidden=True)])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    save_dir, exp_name = arguments.pop("save_dir"), arguments.pop("exp_name")
    given = {name: value for name, value in arguments.items() if value is not None}
    if save_dir or exp_name:
        if "out" in given:
            raise UserError("--out and --save_dir/--exp_name both name the run folder; give one of them")
        given["out"] = (save_dir or Path("runs")) / (exp_name or "run")
    return given


def dashes(option: str) -> str:
    """Options may be written with underscores, as in the original example."""
    return option.replace("_", "-")
