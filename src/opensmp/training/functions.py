"""What `fit`, `evaluate` and `predict` call with data: one compiled function per batch size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.errors import StepError
from opensmp.runtime import recovery, world
from opensmp.training.meeting import meet_at_batch
from opensmp.training.microbatches import num_rows
from opensmp.training.modes import calls_are

_numbers = itertools.count()

NAMES = ("train_function", "test_function", "predict_function")


class StepFunction:
    """Runs a model's `train_step`, `test_step` or `predict_step` on batches.

    Batches are taken from an iterator outside of any graph, so that the number of examples is
    known when a step is traced: a last batch that is smaller is traced once more, with
    microbatches of its own, and both traces serve all epochs.

    Args:
        model: The DistributedModel.
        name: `"train"`, `"test"` or `"predict"`.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model = model
        self._name = name
        self._run_eagerly = bool(model.run_eagerly)
        self._world: world.World | None = None
        self._functions: dict[tuple[int | None, bool], Any] = {}
        self._rows_known = True

    @property
    def tracing_count(self) -> int:
        """How many times the step was traced."""
        counts = (f.experimental_get_tracing_count() for f in self._functions.values())
        return sum(map(int, counts))

    def forget(self) -> None:
        """Drops what was compiled, for variables have moved."""
        self._functions.clear()

    def __call__(self, data: Any) -> Any:
        """Runs the step on the next batches of an iterator, or of a list for predictions.

        Raises:
            StopIteration: There is no batch left.
        """
        if self._name == "predict":
            outputs = [self._run(batch) for batch in data]
            return outputs[0] if len(outputs) == 1 else tf.nest.map_structure(_concat, *outputs)
        self._rows_known = _rows_known(data)
        return self._last_of(itertools.islice(iter(data), int(self._model.steps_per_execution)))

    def _last_of(self, batches: Iterator[Any]) -> Any:
        logs = None
        for batch in batches:
            logs = self._run(batch)
        if logs is None:
            raise StopIteration
        return logs

    @recovery.guarded
    def _run(self, data: Any) -> Any:
        here = world.current(f"{self._name}ing a DistributedModel")
        data = tf.nest.map_structure(
            lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data
        )
        meet_at_batch(self._name, data)
        if self._run_eagerly:
            self._refuse_to_run_eagerly(here)
            with calls_are("plain"):
                return self._step(data)
        if self._world is not here:
            self._world = here
            self.forget()
        rows = num_rows(data)
        key = rows, self._rows_known
        if key not in self._functions:
            self._functions[key] = self._compile(self._rows_known)
        functions = {name: getattr(self._model, name) for name in NAMES}
        try:
            return self._functions[key](data)
        finally:
            self._bring_back(functions)

    def _refuse_to_run_eagerly(self, here: world.World) -> None:
        if here.size > 1:
            raise StepError(
                f"model.compile(run_eagerly=True): model '{self._model.name}' lies in {here.size} "
                "processes, and what runs layer by layer needs all of them in one. Expected: "
                "run_eagerly=False; or run the script in one process, without a launcher, to look "
                "into it."
            )

    def _compile(self, rows_known: bool) -> Any:
        def step(data: Any) -> Any:
            with calls_are("whole"), _private.rows_count(rows_known):
                return self._step(data)

        step.__name__ = f"smp_{self._name}_step"
        # TensorFlow warns of code that is traced too often: each of these is traced once or twice.
        step.__code__ = step.__code__.replace(co_name=f"{step.__name__}_{next(_numbers)}")
        return tf.function(step, autograph=False, reduce_retracing=True)

    def _step(self, data: Any) -> Any:
        return self._model._smp_step(self._name)(data)

    def _bring_back(self, functions: dict[str, Any]) -> None:
        """Partitioning a model makes it forget its functions; this one is in use."""
        for name, function in functions.items():
            if isinstance(function, StepFunction) and getattr(self._model, name) is None:
                if function is not self:
                    function.forget()
                setattr(self._model, name, function)


def _rows_known(data: Any) -> bool:
    """Whether each batch of an iterator has the same known number of rows."""
    if not isinstance(data, tf.data.Iterator):
        return True
    return num_rows(data.element_spec) is not None


def _concat(*values: Any) -> Any:
    return tf.concat(values, 0)
