"""A first run of a step's function that only prepares the models.

`tf.function` likewise traces a function twice if it creates variables: in the second trace, which
is kept, all variables exist and are placed, so that variable lists, watching tapes and optimizers
see the same variables from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from opensmp import _private
from opensmp.distributed.world import World
from opensmp.execution.context import as_current
from opensmp.execution.emission.model_traces import ModelTraces
from opensmp.execution.emission.pipeline import Pipeline


@contextlib.contextmanager
def warming_up(world: World, num_microbatches: int, joins: bool) -> Iterator[ModelTraces]:
    """Context in which a step's function may run for one microbatch, in a temporary graph.

    The models are partitioned and lowered; the calls are emitted, because the function may look at
    the type of a gradient or whether there is one, and are dropped with the graph. Yields the
    traces and programs for the run that counts, which is with the same `joins`.
    """
    with _private.new_graph("rehearsal").as_default():
        traces = ModelTraces()
        with as_current(Pipeline(world, num_microbatches, joins=joins, traces=traces)):
            yield traces
        traces.forget_symbolic()  # tensors of the temporary graph
