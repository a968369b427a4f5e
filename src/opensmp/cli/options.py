"""Makes commands whose options are fields of a dataclass and keys of the configuration."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from opensmp.config.keys import KEYS
from opensmp.config.kinds import BooleanKind, IntegerKind, Kind, OptionalIntegerKind
from opensmp.errors import SmpError

Options = TypeVar("Options")

FLAGS = "flags"
"""The field of such a dataclass that takes the keys that were given."""


USAGE = 2
"""Exit code of a command whose options or values are wrong, as of most programs."""


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Context in which a command checks its options, before it starts anything."""
    try:
        yield
    except SmpError as error:
        error.exit_code = USAGE
        raise


def key_option(
    name: str, *names: str, default: Any = None, bounded: bool = False, **texts: Any
) -> inspect.Parameter:
    """The option of a configuration key, as a parameter of a command.

    A default of None leaves the key to other sources; `bounded` refuses numbers below the minimum
    as a usage error; `texts` are `help` and `show_default` in place of those of the key.
    """
    key = KEYS[name]
    kind = _option_type(key.kind)
    limits = {"min": key.kind.minimum} if bounded and isinstance(key.kind, IntegerKind) else {}
    option = typer.Option(*names, **{"help": key.help, **limits, **texts})
    annotation = Annotated[kind if default is not None else kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def command(
    options: type[Options], keys: Sequence[inspect.Parameter]
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Decorator: makes a command for Typer of a function of one dataclass.

    Its fields are annotated as the parameters of a command are, except for `flags`, which takes the
    keys that were given, of `keys`, and their values.
    """
    hints = get_type_hints(options, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for field in fields(options):  # type: ignore[arg-type]
        if field.name == FLAGS:
            parameters += keys
            continue
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=hints[field.name],
            )
        )

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def called(**values: Any) -> None:
            given = {key.name: values.pop(key.name) for key in keys}
            flags = {key: _read(key, value) for key, value in given.items() if value is not None}
            function(options(**{FLAGS: flags}, **values))

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def _option_type(kind: Kind) -> type:
    """The type that Typer converts to; other kinds read text themselves."""
    if isinstance(kind, IntegerKind | OptionalIntegerKind):
        return int
    return bool if isinstance(kind, BooleanKind) else str


def _read(key: str, value: Any) -> Any:
    """Converts text to a value of the key, if its kind can; it still has to be checked."""
    if not isinstance(value, str):
        return value
    try:
        return KEYS[key].kind.read(value)
    except ValueError:
        return value
