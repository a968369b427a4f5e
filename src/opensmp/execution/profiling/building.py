"""Tells that a step is being built, which takes from seconds to minutes, and that it is there."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from opensmp.base import progress
from opensmp.base.message_text import counted
from opensmp.config.pipelines import pipeline_name
from opensmp.distributed.world import World

_told: weakref.WeakKeyDictionary[Any, World] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def building(name: str, world: World, key: Any, quiet: bool = False) -> Iterator[None]:
    """Context in which a step is traced; logs a line for the first trace of `key` in a world.

    It is quiet where a line of Keras's progress bar would be broken.
    """
    clock = progress.Clock()
    with progress.phase(f"building {name}"):
        yield
    if quiet or _told.get(key) is world:
        return
    _told[key] = world
    progress.say(
        "%s: built with %s, schedule '%s', in %s",
        name,
        counted(world.config.microbatches, "microbatch"),
        pipeline_name(world.config.pipeline),
        clock,
    )


def show_microbatch(index: int, count: int) -> None:
    """Shows in the status line which microbatch is being compiled."""
    progress.show(f"compiling microbatch {index + 1} of {count}")
