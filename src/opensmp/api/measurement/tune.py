"""`smp.tune`: measures training steps of a model with several settings."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console

from opensmp import _private
from opensmp.api.model.model import DistributedModel
from opensmp.base import notebook, progress
from opensmp.base.message_text import numbered
from opensmp.base.types import Model, PathLike, Variable
from opensmp.distributed import world
from opensmp.errors import StepError
from opensmp.execution.models import hooks
from opensmp.execution.profiling.tuning import step_times
from opensmp.execution.profiling.tuning.candidates import Ranked, TrainedCall, rank
from opensmp.execution.profiling.tuning.report import table
from opensmp.execution.profiling.tuning.trial import (
    WARM_STEPS,
    Candidate,
    Measured,
    Outcome,
    save_settings,
    settings,
)

_WIDTH = 80


@dataclass(frozen=True)
class Tuned:
    """What `smp.tune` has found; `print` shows it as a table.

    Attributes:
        outcomes: What came of each candidate; that of the current settings is the first.
        config: The best settings, for `smp.init`.
        seconds: Median time of a training step with them.
        note: Why the cost model could not rank the candidates; empty if it could.
    """

    outcomes: tuple[Outcome, ...]
    config: dict[str, Any]
    seconds: float
    note: str = ""

    def save(self, path: PathLike) -> None:
        """Writes the best settings to a JSON file for `smp.init` and `opensmp run --config`.

        Args:
            path: File to write; an existing file is replaced.

        Example:
            ```python
            smp.tune(model, (x, y)).save("tuned.json")
            # the next run: smp.init("tuned.json")
            ```
        """
        save_settings(self.config, Path(os.fspath(path)))

    def __repr__(self) -> str:
        return f"Tuned({self.config}, {1e3 * self.seconds:.3g} ms a step)"

    def __str__(self) -> str:
        best = min(self.outcomes, key=lambda outcome: outcome.seconds)
        console = Console(width=_WIDTH, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(table(self.outcomes, best), highlight=False)
        errors = [f"{each.changes}: {each.error}" for each in self.outcomes if each.error]
        notes = [f"No predictions: {self.note}."] if self.note else []
        return "\n".join([captured.get().rstrip(), *errors, *notes])

    def _repr_html_(self) -> str:
        return notebook.preformatted(str(self))


def tune(
    model: Model, data: Any, *, seconds: float = 60.0, steps: int = 5, candidates: int = 6
) -> Tuned:
    """Finds the fastest microbatches, schedule and pieces for a model by measuring.

    Trains the compiled model on one batch for a few steps with the current settings and with each
    of some others, which the cost model ranks. Weights, optimizer, metrics, the states of random
    generators and those of `random` and `numpy.random` are afterwards what they were, and the
    current settings hold again. Compiled steps are built again at their next call.

    What a `train_step` of your own changes beside variables of the model is not restored. For
    scripts with `smp.step`, and for several processes, there is `opensmp tune script.py`.

    Args:
        model: A compiled `smp.DistributedModel`.
        data: One batch of the usual size: `(x, y)` or `(x, y, sample_weight)`, arrays or tensors.
        seconds: After this time no further candidate is started.
        steps: Training steps that are measured of each.
        candidates: How many other settings to try.

    Returns:
        The best settings and what was measured.

    Raises:
        StepError: The model is not compiled or not distributed, `data` is no batch, a number is
            wrong, or there are several processes; the message lists all faults.

    Example:
        ```python
        found = smp.tune(model, (images[:64], labels[:64]))
        print(found)
        found.save("tuned.json")  # for smp.init("tuned.json")
        ```
    """
    here = world.current("smp.tune")
    _check(model, data, seconds, steps, candidates, here.size)
    until = time.monotonic() + seconds
    with progress.phase("tuning"), progress.muted(), hooks.set_aside(), _kept(model, data):
        outcomes, ranked = _search(model, data, until, steps, candidates)
    first = outcomes[0]
    if first.measured is None:
        raise StepError(
            f"smp.tune: the model could not be trained with the current settings: {first.error}. "
            "Train it on the batch once, model.train_on_batch(x, y), to see the whole error."
        )
    best = min(outcomes, key=lambda outcome: outcome.seconds).measured
    assert best is not None
    return Tuned(tuple(outcomes), settings(best), best.seconds, ranked.note)


def _search(
    model: Model, data: Any, until: float, steps: int, candidates: int
) -> tuple[list[Outcome], Ranked]:
    """Measures the current settings, then the candidates that the cost model makes of them."""
    with step_times.trained_calls() as found:
        outcomes = [_outcome(model, data, Candidate({}), steps)]
    if outcomes[0].measured is None or not found:
        return outcomes, Ranked([])
    config = world.current("smp.tune").config
    trained = max(found, key=lambda each: len(each.call.traced.operations))
    ranked = rank(config, TrainedCall(trained.call, config.microbatches), candidates)
    for number, candidate in enumerate(ranked.candidates, start=1):
        if time.monotonic() > until:
            error = "not tried: the time was up; give more seconds"
            outcomes.append(Outcome(candidate, error=error))
            continue
        name = Outcome(candidate).changes
        progress.show(f"tuning, {number} of {len(ranked.candidates)}: {name}")
        outcomes.append(_outcome(model, data, candidate, steps))
    return outcomes, ranked


def _outcome(model: Model, data: Any, candidate: Candidate, steps: int) -> Outcome:
    """Trains with the settings of a candidate for some steps, and restores the world."""
    here = world.current("smp.tune")
    try:
        config = here.config.changed(**candidate.changes)
        world.set_current(replace(here, config=config))
        times = []
        for _ in range(WARM_STEPS + steps):
            began = time.perf_counter()
            _train(model, data)
            times.append(time.perf_counter() - began)
        middle = statistics.median(times[WARM_STEPS:])
        return Outcome(candidate, Measured(middle, config.to_dict(), sorted(config.given)))
    except Exception as error:
        text = " ".join(str(error).split())
        return Outcome(candidate, error=f"failed: {type(error).__name__}: {text[:300]}")
    finally:
        world.set_current(here)


def _train(model: Model, data: Any) -> None:
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    model.train_on_batch(x, y, sample_weight=sample_weight)


@contextlib.contextmanager
def _kept(model: Model, data: Any) -> Iterator[None]:
    """Context after which the model and the random generators are as before."""
    here = world.current("smp.tune")
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    function = model.train_function
    python, numpy = random.getstate(), np.random.get_state()
    with _private.kept_seeds():
        model(x)  # makes the variables that a model makes at its first call
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        values = [(variable, np.array(variable.numpy())) for variable in _variables(model)]
        try:
            yield
        finally:
            world.set_current(replace(here))  # another one: what was compiled for it is stale
            known = {id(variable) for variable, _ in values}
            for metric in model.metrics:
                if any(id(variable) not in known for variable in metric.variables):
                    metric.reset_state()
            for variable, value in values:
                variable.assign(value)
            model.train_function = function
            model(x)  # so that model.plan is that of the current settings
            random.setstate(python)
            np.random.set_state(numpy)


def _variables(model: Model) -> list[Variable]:
    """All variables that training may change."""
    found = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    found += model._smp_partitions.read
    seeds = _private.global_seed_state()
    found += [] if seeds is None else [seeds]
    return list({id(variable): variable for variable in found}.values())


def _check(
    model: Any, data: Any, seconds: Any, steps: Any, candidates: Any, num_processes: int
) -> None:
    """Raises one error with all faults of the arguments."""
    faults = []
    if not isinstance(model, DistributedModel):
        faults.append(
            f"model: received {type(model).__name__}; expected a smp.DistributedModel, such as "
            "smp.DistributedModel.from_keras(model)"
        )
    elif not model.compiled or model.optimizer is None:
        faults.append(
            "model: it is not compiled; call model.compile(optimizer, loss) first, or use "
            "`opensmp tune script.py` for a training loop of your own"
        )
    leaves = tf.nest.flatten(data)
    if not leaves or not all(leaf is None or hasattr(leaf, "shape") for leaf in leaves):
        kind = type(data).__name__
        faults.append(
            f"data: received {kind}; expected one batch of arrays or tensors, (x, y); of a "
            "tf.data.Dataset, next(iter(dataset))"
        )
    if not _is_number(seconds) or not seconds > 0:
        faults.append(f"seconds: received {seconds!r}; expected a number above 0")
    for name, value in (("steps", steps), ("candidates", candidates)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            faults.append(f"{name}: received {value!r}; expected an integer of 1 or more")
    if num_processes > 1:
        faults.append(
            f"there are {num_processes} processes, and smp.tune works in one; use "
            f"`opensmp tune -n {num_processes} script.py`"
        )
    if faults:
        raise StepError("\n".join(["smp.tune:", *numbered(faults)]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
