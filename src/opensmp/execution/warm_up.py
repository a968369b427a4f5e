"""A first run of a step's function that only prepares the models.

`tf.function` likewise traces a function twice if it creates variables: in the second trace, which
is kept, all variables exist and are placed, so that variable lists, watching tapes and optimizers
see the same variables from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.trace import partition_tags
from opensmp.compiler.trace.structure import Structure
from opensmp.execution.context import Prepare, as_current
from opensmp.execution.emission.model_traces import ModelTraces


class WarmUpRunner:
    """Replaces the pipeline as runner: partitions models, then runs them as plain Keras models.

    The step's function may look at the type of a gradient, or whether there is one, so the models
    do run.

    Attributes:
        traces: The traces of the calls, for the run that counts.
    """

    def __init__(self, num_microbatches: int) -> None:
        self.num_microbatches = num_microbatches
        self.traces = ModelTraces()

    def run(
        self, model: Any, prepare: Prepare, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        """Partitions a model and runs it as a plain model; see `Pipeline.run`."""
        key = self.traces.key(model, Structure.of((args, dict(kwargs))))
        traced = self.traces.prepared(key, model, lambda: prepare(args, kwargs)).traced
        if any(tf.is_symbolic_tensor(outer) for outer, _ in traced.captures):
            self.traces.forget(key)  # a tensor of the temporary graph
        with partition_tags.tracing_into(tf.compat.v1.get_default_graph()):
            return model(*args, **kwargs), _private.own_losses(model)


@contextlib.contextmanager
def warming_up(num_microbatches: int) -> Iterator[ModelTraces]:
    """Context in which a step's function may run in a temporary graph."""
    runner = WarmUpRunner(num_microbatches)
    with _private.new_graph("rehearsal").as_default(), as_current(runner):
        yield runner.traces
