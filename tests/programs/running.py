"""Runs programs, and compares what they give with plain Keras."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import logging
import math
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from processes import run_ranks
from programs.catalogue import PROGRAMS
from programs.registry import WORLDS, Apart, Program
from programs.wrap import Plain, Wrap
from training.uses import difference, precision

APART = "by parts:"
"""How the words begin where the ranks mean something else than a whole batch."""

RANKS = str(pathlib.Path(__file__).with_name("ranks.py"))


class Outcome(NamedTuple):
    """What became of a program.

    Attributes:
        numbers: What it gave; None if it failed.
        error: Name of the exception's class; "" if it did not fail.
        message: Its message.
        split: Whether a model was split.
        told: What opensmp has warned of.
    """

    numbers: Any = None
    error: str = ""
    message: str = ""
    split: bool = False
    told: str = ""


class Verdict(NamedTuple):
    """How an outcome compares with plain Keras.

    Attributes:
        right: Whether it is what the registry says.
        difference: The largest difference; NaN if there are no numbers.
        words: For people.
    """

    right: bool
    difference: float
    words: str


def is_there(program: Program) -> bool:
    """Whether what the program needs is installed."""
    return not program.needs or importlib.util.find_spec(program.needs) is not None


def run(program: Program, wrap: Wrap) -> Outcome:
    """Runs a program; whatever it raises is an outcome, too."""
    keras.utils.set_random_seed(0)
    try:
        with (
            _warnings() as told,
            precision(program.policy),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            numbers = _bare(program.run(wrap))
            return Outcome(numbers, split=wrap.was_split(), told="\n".join(told))
    except Exception as error:
        return Outcome(error=type(error).__name__, message=str(error))


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """The warnings that opensmp logs."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("opensmp")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def _bare(value: Any) -> Any:
    """The same in lists and numbers."""
    if isinstance(value, Mapping):
        return {str(key): _bare(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bare(each) for each in value]
    return np.asarray(value, dtype=float).tolist()


def plain(name: str, world: str) -> Any:
    """What plain Keras gives: in a loop over the microbatches of a world, if there are steps."""
    program = PROGRAMS[name]
    return _plain(name, program.looped(world) if program.face == "smp.step" else 1)


@functools.cache
def _plain(name: str, microbatches: int) -> Any:
    found = run(PROGRAMS[name], Plain(microbatches))
    assert not found.error, f"{name}, plain Keras: {found.error}: {found.message}"
    assert all(map(math.isfinite, _flat(found.numbers))), f"{name}, plain Keras: not finite"
    return found.numbers


def _flat(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    return [each for part in value for each in _flat(part)] if isinstance(value, list) else [value]


def judge(name: str, world: str, outcomes: Sequence[Outcome]) -> Verdict:
    """Compares the outcomes of all ranks with plain Keras, or with the refusal expected."""
    program = PROGRAMS[name]
    expected = program.refused.get(world)
    errors = [outcome for outcome in outcomes if outcome.error]
    if errors:
        first = errors[0]
        words = f"{first.error}: {first.message}"
        right = expected is not None and all(
            each.error == expected.error and expected.says in each.message for each in outcomes
        )
        return Verdict(right, math.nan, f"refused: {expected.why}" if right else words)
    if world in program.apart:
        return _apart(program.apart[world], program.bound, outcomes)
    try:
        reference = plain(name, world)
        worst = max(difference(reference, outcome.numbers) for outcome in outcomes)
    except AssertionError as error:
        return Verdict(False, math.nan, f"other numbers: {error}")
    if expected is not None:
        return Verdict(False, worst, f"expected {expected.error}, but it ran ({worst:.1e})")
    if not all(outcome.split for outcome in outcomes):
        return Verdict(False, worst, f"nothing was split ({worst:.1e})")
    right = worst <= program.bound
    return Verdict(right, worst, f"equal ({worst:.0e})" if right else f"DIFFERENT ({worst:.1e})")


def _apart(expected: Apart, bound: float, outcomes: Sequence[Outcome]) -> Verdict:
    """Whether ranks that each see a part have warned of it, or agree with each other."""
    if expected.says:
        right = all(expected.says in outcome.told for outcome in outcomes)
        return Verdict(right, math.nan, f"{APART} {expected.why}" if right else "NO WARNING")
    first, *rest = outcomes
    worst = max(difference(first.numbers, other.numbers) for other in rest)
    right = worst <= bound and all(map(math.isfinite, _flat(first.numbers)))
    return Verdict(right, worst, f"{APART} {expected.why}" if right else f"RANKS DIFFER ({worst})")


def run_in_processes(world: str, names: Sequence[str], seconds: float = 1200) -> dict[str, list]:
    """Runs programs in as many processes as a world has, which start as seldom as can be.

    Args:
        world: Name of a world.
        names: Of programs; those that need the same configuration share a start.
        seconds: After this a start is over, and what hangs counts as failed.

    Returns:
        The outcomes by name, one for each rank.
    """
    found: dict[str, list[Outcome]] = {}
    for microbatches in sorted({PROGRAMS[n].config(world)["microbatches"] for n in names}):
        left = [n for n in names if PROGRAMS[n].config(world)["microbatches"] == microbatches]
        while left:
            started, last = _start(world, left, seconds)
            found |= started
            left = [name for name in left if name not in started]
            if left:  # whatever ended the ranks did so in the first one of these
                found[left[0]] = [Outcome(error="Ended", message=last)]
                left = left[1:]
    return {name: found[name] for name in names}


def _start(
    world: str, names: Sequence[str], seconds: float
) -> tuple[dict[str, list[Outcome]], str]:
    """The outcomes of programs that all ranks came through, and the last lines of a failure."""
    processes, partitions, _ = WORLDS[world]
    config = {
        "partitions": partitions,
        "microbatches": PROGRAMS[names[0]].config(world)["microbatches"],
    }
    last = ""
    with tempfile.TemporaryDirectory() as folder:
        environ = {"OPENSMP_IDLE_SECONDS": 40}
        try:
            results = run_ranks(
                RANKS, processes, config, args=[folder, *names], environ=environ, seconds=seconds
            )
            last = "\n".join(
                f"rank {r.rank}, exit code {r.code}: " + "\n".join(r.lines[-12:])
                for r in results
                if r.code
            )
        except AssertionError as error:
            last = str(error)[-2000:]
        found: dict[str, list[Outcome]] = {}
        for name in names:
            files = [pathlib.Path(folder) / f"{name}-{rank}.json" for rank in range(processes)]
            if all(file.exists() for file in files):
                found[name] = [Outcome(*json.loads(file.read_text())) for file in files]
    return found, last
