"""`smp.record_timeline`: measures when each action of a step runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from opensmp.api.timeline.timeline import Event, StepTimeline, Timeline
from opensmp.errors import StepError
from opensmp.execution.profiling.timestamps import Measurement, listening


@contextlib.contextmanager
def record_timeline() -> Iterator[Timeline]:
    """Context in which every run of an `smp.step` function is measured.

    A step is traced once more for it, with an operation before and after each action that
    reads the clock; so is a `tf.function` that calls it. The traces without them stay, and
    are used again outside of the context. The first run of a new trace pays for TensorFlow's
    preparations: run two steps or more, and look at the last one.

    In several processes each measures its own partitions.

    The clock is that of the host; a GPU works through a queue of its own, so that times there
    are not those of the kernels. Recording has not been tried on a GPU yet.

    Yields:
        A timeline that grows by one `StepTimeline` with each run.

    Raises:
        StepError: At the end of the context, if no step was measured in it.

    Example:
        ```python
        with smp.record_timeline() as timeline:
            for images, labels in batches.take(3):
                train_step(images, labels)
        print(timeline)
        timeline.to_chrome_trace("timeline.json")
        ```
    """
    timeline = Timeline()
    origin: list[float] = []

    def add(measured: Measurement) -> None:
        if not origin:
            origin.append(float(measured.seconds.min()))
        timeline.append(_relative(measured, len(timeline.steps), origin[0]))

    with listening(add):
        yield timeline
    if not timeline.steps:
        raise StepError(
            "smp.record_timeline: no run of an smp.step function was measured. Expected: at "
            "least one inside the `with` block, called directly or through a tf.function. "
            "Received: none. Call the step inside the block. What was fixed before the block "
            "cannot be measured: a function from get_concrete_function, a SavedModel, a "
            "tf.data pipeline. Get or make it inside the block."
        )


def _relative(measured: Measurement, index: int, origin: float) -> StepTimeline:
    events = [
        Event(index, action, partition, measured.devices[partition], start, end)
        for action, partition, (start, end) in zip(
            measured.actions,
            measured.partitions,
            (measured.seconds - origin).tolist(),
            strict=True,
        )
    ]
    return StepTimeline(index, measured.name, measured.devices, tuple(sorted(events, key=_start)))


def _start(event: Event) -> tuple[float, float]:
    return event.start_seconds, event.end_seconds
