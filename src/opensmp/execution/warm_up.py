"""A first run of a step's function that only makes the models ready.

Like `tf.function`, which traces twice where a function makes variables: in the second
run, the one that counts, all variables exist and lie on their devices, so that lists of
them, tapes that watch them and optimizers see the same variables from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace import partition_tags
from opensmp.execution.context import Prepare, as_current

Tensor = Any


class Rehearsal:
    """Stands in for a pipeline: models are partitioned, then run as plain Keras models.

    Args:
        num_microbatches: As for the pipeline.
    """

    def __init__(self, num_microbatches: int) -> None:
        self.num_microbatches = num_microbatches

    def run(
        self, model: Any, prepare: Prepare, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        """Partitions a model and runs it plainly; see `Pipeline.run`."""
        prepare(args, kwargs)
        with partition_tags.tracing_into(tf.compat.v1.get_default_graph()):
            return model(*args, **kwargs), _private.own_losses(model)


@contextlib.contextmanager
def rehearsing(num_microbatches: int) -> Iterator[None]:
    """Context in which a step's function may run in a graph that is thrown away."""
    with _private.new_graph("rehearsal").as_default(), as_current(Rehearsal(num_microbatches)):
        yield
