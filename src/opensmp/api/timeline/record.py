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

    The step, and any `tf.function` that calls it, is traced once more, with operations that
    read the clock before and after each action. The original traces are kept and used again
    outside of the context. The first run of a new trace includes TensorFlow's setup costs:
    run at least two steps, and use the last one.

    With several processes each measures its own partitions.

    Times are host times; a GPU executes asynchronously, so that they are not kernel times.
    Recording has not been tested on GPUs yet.

    Yields:
        A timeline that grows by one `StepTimeline` with each run.

    Raises:
        StepError: On exit, if no step was measured.

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
        timeline.append(relative(measured, len(timeline.steps), origin[0]))

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


def relative(measured: Measurement, index: int, origin: float) -> StepTimeline:
    """Returns a measured step with times since `origin`."""
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
