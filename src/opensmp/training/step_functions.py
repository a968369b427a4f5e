"""The functions that `fit`, `evaluate` and `predict` call, compiled once per batch size."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.distributed import world
from opensmp.distributed.watchdog import recovery
from opensmp.errors import StepError
from opensmp.execution.models.layer_calls import calls_taken
from opensmp.execution.multi_process.remote_values import note_step
from opensmp.execution.profiling.building import building
from opensmp.execution.unreduced import refuse_unreduced
from opensmp.execution.variables.early_reads import ReadEarly, noticed
from opensmp.training.batch.batch_split import num_rows
from opensmp.training.call_mode import calls_are
from opensmp.training.moving_statistics import average_statistics
from opensmp.training.resume.progress import Progress, progress_of
from opensmp.training.sync.fit_settings import Settings, settings_of, settings_of_optimizer
from opensmp.training.sync.sync import is_in_call, is_shared, meet_at_batch

_numbers = itertools.count()

NAMES = ("train_function", "test_function", "predict_function")


class StepFunction:
    """Runs a model's `train_step`, `test_step` or `predict_step` on batches.

    Takes batches from an iterator outside of any graph, so that the number of examples is known
    when a step is traced. A smaller last batch gets a trace of its own, with other microbatch
    sizes, and all epochs use both traces.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model = model
        self._name = name
        self._run_eagerly = bool(model.run_eagerly)
        self._world: world.World | None = None
        self._functions: dict[tuple[int | None, bool], Any] = {}
        self._rows_known = True
        self._settings: Settings | None = None
        self.batches = 0  # that were run
        self.rows: int | None = 0  # of these; None once it is not known

    @property
    def tracing_count(self) -> int:
        """Number of traces of the step."""
        counts = (f.experimental_get_tracing_count() for f in self._functions.values())
        return sum(map(int, counts))

    def forget(self) -> None:
        """Discards the compiled functions, because variables have moved."""
        self._functions.clear()

    def __call__(self, data: Any) -> Any:
        """Runs the step on the next batches of an iterator, or of a list for predictions."""
        if self._name == "predict":
            outputs = [self._run(batch) for batch in data]
            return outputs[0] if len(outputs) == 1 else tf.nest.map_structure(_concat, *outputs)
        self._rows_known = _rows_known(data)
        progress = progress_of(self._model)
        if progress is not None:
            progress.at_boundary()
        batches = itertools.islice(iter(data), int(self._model.steps_per_execution))
        if progress is None or self._name != "train":
            return self._last_of(batches)[0]
        if progress.is_replaying:
            return self._replay(batches, progress)
        logs, count = self._last_of(batches)
        progress.ran(count, logs)
        return logs

    def _last_of(self, batches: Iterator[Any]) -> tuple[Any, int]:
        logs, count = None, 0
        for batch in batches:
            logs = self._run(batch)
            count += 1
        if not count:
            raise StopIteration
        return logs, count

    def _replay(self, batches: Iterator[Any], progress: Progress) -> Any:
        """Skips batches that an earlier program has trained, but traces the step for them."""
        for batch in map(_without_optionals, batches):
            with self._staying():
                self._trace_for(batch)
        progress.set_metrics()
        progress.is_replaying = False
        return progress.logs

    @recovery.guarded
    def _run(self, data: Any) -> Any:
        here = world.current(f"{self._name}ing a DistributedModel")
        data = _without_optionals(data)
        rows = num_rows(data)
        self.batches += 1
        self.rows = None if rows is None or self.rows is None else self.rows + rows
        meet_at_batch(self._name, data, self._settings_of_batch())
        if self._run_eagerly:
            self._refuse_to_run_eagerly(here)
            progress = progress_of(self._model)
            if self._name == "train" and progress is not None and progress.metrics_are_awaited:
                self._trace_for(data)
            with calls_are("plain"):
                return self._step(data)
        with self._staying():
            return self._traced_for(data, lambda function: function(data))

    def _settings_of_batch(self) -> Settings | None:
        """Settings of `train_on_batch` etc. that must be the same in all processes.

        The arguments of `compile` do not change during this object's lifetime; the learning rate
        may change with each batch.
        """
        if is_in_call() or not is_shared():
            return None
        if self._settings is None or None in self._settings.values():
            self._settings = settings_of(self._model, f"{self._name}_on_batch")
        if self._name != "train":
            return self._settings
        return {**self._settings, **settings_of_optimizer(self._model)}

    def _trace_for(self, data: Any) -> None:
        self._traced_for(data, lambda function: function.get_concrete_function(data))

    def _traced_for(self, data: Any, use: Callable[[Any], Any]) -> Any:
        """Applies `use` to a batch's function, traced with all variables that it reads placed."""
        while True:
            try:
                return use(self._function_for(data))
            except ReadEarly:
                self.forget()

    def _function_for(self, data: Any) -> Any:
        here = world.current(f"{self._name}ing a DistributedModel")
        if self._world is not here:
            self._world = here
            self.forget()
        key = num_rows(data), self._rows_known
        if key not in self._functions:
            self._functions[key] = self._compile(self._rows_known)
        return self._functions[key]

    @contextlib.contextmanager
    def _staying(self) -> Iterator[None]:
        functions = {name: getattr(self._model, name) for name in NAMES}
        try:
            yield
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
        here = world.current("a step of Keras")

        def step(data: Any) -> Any:
            note_step()
            name = f"{self._name} step of model '{self._model.name}'"
            with (
                noticed(),
                calls_are("whole"),
                calls_taken(),
                _private.rows_count(rows_known),
                building(name, here, self, quiet=self._name != "train"),
            ):
                result = self._step(data)
            refuse_unreduced(result, f"{self._name}_step")
            self._go_on_counting()
            return result

        step.__name__ = f"smp_{self._name}_step"
        # TensorFlow warns of code that is traced too often; each of these is traced once or twice.
        step.__code__ = step.__code__.replace(co_name=f"{step.__name__}_{next(_numbers)}")
        return tf.function(step, autograph=False, reduce_retracing=True)

    def _go_on_counting(self) -> None:
        """Restores the values of metrics that were just created from an earlier program."""
        progress = progress_of(self._model) if self._name == "train" else None
        if progress is not None:
            with tf.init_scope():
                progress.set_metrics()

    def _step(self, data: Any) -> Any:
        result = self._model._smp_step(self._name)(data)
        if self._name == "train":
            average_statistics(self._model)
        return result

    def _bring_back(self, functions: dict[str, Any]) -> None:
        """Restores this function, in use, after partitioning has reset the model's functions."""
        for name, function in functions.items():
            if isinstance(function, StepFunction) and getattr(self._model, name) is None:
                if function is not self:
                    function.forget()
                setattr(self._model, name, function)


def _without_optionals(data: Any) -> Any:
    return tf.nest.map_structure(
        lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data
    )


def _rows_known(data: Any) -> bool:
    """Whether each batch of an iterator has the same, known number of rows."""
    if not isinstance(data, tf.data.Iterator):
        return True
    return num_rows(data.element_spec) is not None


def _concat(*values: Any) -> Any:
    return tf.concat(values, 0)
