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
from opensmp.execution.context import Prepare, as_current


class WarmUpRunner:
    """Replaces the pipeline as runner: partitions models, then runs them as plain Keras models.

    Args:
        num_microbatches: Like that of `Pipeline`.
    """

    def __init__(self, num_microbatches: int) -> None:
        self.num_microbatches = num_microbatches

    def run(
        self, model: Any, prepare: Prepare, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        """Partitions a model and runs it as a plain model; see `Pipeline.run`."""
        prepare(args, kwargs)
        with partition_tags.tracing_into(tf.compat.v1.get_default_graph()):
            return model(*args, **kwargs), _private.own_losses(model)


@contextlib.contextmanager
def warming_up(num_microbatches: int) -> Iterator[None]:
    """Context in which a step's function may run in a temporary graph."""
    with _private.new_graph("rehearsal").as_default(), as_current(WarmUpRunner(num_microbatches)):
        yield
