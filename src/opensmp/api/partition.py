"""`smp.partition`: assigns operations to a partition."""

from __future__ import annotations

import contextlib
import logging
import numbers
from collections.abc import Iterator

from opensmp.compiler.trace import partition_tags
from opensmp.config import Config
from opensmp.distributed import world
from opensmp.errors import PartitionError

_logger = logging.getLogger("opensmp")


@contextlib.contextmanager
def partition(index: int) -> Iterator[None]:
    """Assigns the operations created inside the context to partition `index`.

    Use it in the `call` of a `smp.DistributedModel`, or around layer calls while a
    Functional model is being built. Contexts nest; the innermost applies. Operations
    outside of any context go to `default_partition`. With `auto_partition` on, contexts
    are ignored.

    Args:
        index: Index of the partition, from 0.

    Raises:
        PartitionError: if there is no such partition, or it is used in the body of a loop.
        NotInitializedError: before `smp.init`.

    Example:
        ```python
        def call(self, x):
            with smp.partition(0):
                x = self.first(x)
            with smp.partition(1):
                return self.second(x)
        ```
    """
    here = world.current("smp.partition")
    config = here.config
    if isinstance(index, bool) or not isinstance(index, numbers.Integral):
        raise PartitionError(
            f"smp.partition: the index must be an integer from 0 to {config.partitions - 1}, "
            f"received {index!r} of type {type(index).__name__}."
        )
    if not 0 <= index < config.partitions:
        last = config.partitions - 1
        there = f"are {last + 1} partitions, numbered 0 to {last}" if last else "is 1 partition, 0"
        more = f", or set 'partitions' to at least {index + 1} in smp.init" if index > last else ""
        raise PartitionError(f"smp.partition({index}): there {there}. Use one of these{more}.")
    if config.auto_partition:
        if not here.rank:
            _warn_ignored(config)
        yield
        return
    with partition_tags.tag(int(index)):
        yield


_logged_for: Config | None = None


def _warn_ignored(config: Config) -> None:
    """Warns once per configuration that contexts are ignored."""
    global _logged_for
    if _logged_for is not config:
        _logged_for = config
        _logger.warning(
            "smp.partition contexts are ignored because auto_partition is on. Set "
            "'auto_partition': False and a 'default_partition' in smp.init to use them."
        )
