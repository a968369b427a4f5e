"""The result of a simulation: the time of a step, the memory it needs, and what bounds it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opensmp.base import notebook
from opensmp.base.message_text import counted
from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.format import format_bytes, format_seconds
from opensmp.compiler.simulation.run import Run

ARITHMETIC, TRAFFIC, SHARED, TRANSFERS, IDLE, REDUCTION, UPDATE, OFFLOAD = PARTS = (
    "arithmetic",
    "memory bandwidth",
    "tensor parallelism",
    "sending",
    "waiting in the pipeline",
    "sum of gradients",
    "update of weights",
    "offloading",
)
"""What the time of a step is made of."""


_WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class SimulatedStep:
    """A step as it would be on a cluster, predicted.

    Attributes:
        run: How the model is run.
        cluster: On what.
        seconds: Time of a step.
        bubble: Idle share of the devices' time in the pipeline, 0 <= bubble < 1.
        memory_bytes: Peak memory of each partition's device.
        limit_bytes: Memory of a device; None if it is not known.
        parts: Seconds of the device that ends last, by what they are for: `PARTS`.
        held: Most microbatches whose activations a device holds, of all devices.
        active_microbatches: What gives this schedule as `active_microbatches`; None if it needs
            none.
        examples: Examples of a step, 0 if they are not known.
        flops_share: FLOPs of the model, without those of recomputation, as a share of what the
            devices could do at their peak; None if it is not known.
        assumed: What was assumed, one line each.
    """

    run: Run
    cluster: Cluster
    seconds: float
    bubble: float
    memory_bytes: tuple[int, ...]
    limit_bytes: int | None
    parts: Mapping[str, float]
    held: int
    active_microbatches: int | None
    examples: int = 0
    flops_share: float | None = None
    assumed: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest device."""
        return max(self.memory_bytes)

    @property
    def fits(self) -> bool:
        """Whether all partitions fit their devices; True if the limit is not known."""
        return self.limit_bytes is None or self.peak_bytes <= self.limit_bytes

    @property
    def bound(self) -> str:
        """What takes most of the time of the device that ends last: one of `PARTS`."""
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def settings(self) -> dict[str, Any]:
        """The keys for `smp.init` that run it so."""
        return self.run.settings(self.active_microbatches)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in a form that JSON accepts."""
        return {
            "seconds": self.seconds,
            "bubble": self.bubble,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "memory_bytes": list(self.memory_bytes),
            "limit_bytes": self.limit_bytes,
            "bound": self.bound,
            "parts": dict(self.parts),
            "held": self.held,
            "examples": self.examples,
            "examples_per_second": self.examples / self.seconds if self.seconds else None,
            "flops_share": self.flops_share,
            "replicas": self.run.replicas,
            "tensor_parallel": self.run.tensor_parallel,
            "settings": self.settings,
            "cluster": self.cluster.to_dict(),
            "assumed": list(self.assumed),
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        return notebook.preformatted(str(self))

    def _lines(self) -> Iterator[str]:
        yield from textwrap.wrap(f"Step of {self.run}", _WIDTH, subsequent_indent="  ")
        yield f"on {str(self.cluster).partition(';')[0]}"
        speed = f", {self.examples / self.seconds:.4g} examples/s" if self.examples else ""
        share = ""
        if self.flops_share is not None:
            share = f", {100 * self.flops_share:.1f} % of the devices' peak"
        yield f"step     {format_seconds(self.seconds)}{speed}{share}"
        limit = self.limit_bytes
        room = "no limit is known"
        if limit is not None:
            verb = "fits" if self.fits else "DOES NOT FIT"
            room = f"{verb} {format_bytes(limit)}"
        fullest = self.memory_bytes.index(self.peak_bytes)
        yield f"memory   {format_bytes(self.peak_bytes)} in partition {fullest}; {room}"
        count = counted(self.held, "microbatch")
        yield f"bubble   {100 * self.bubble:.1f} %; activations of {count} are held"
        total = sum(self.parts.values()) or 1.0
        yield f"bound by {self.bound}"
        for part, seconds in sorted(self.parts.items(), key=lambda item: -item[1]):
            if seconds > 0:
                yield f"  {part:<24} {format_seconds(seconds):>8}  {100 * seconds / total:5.1f} %"
        for number, line in enumerate(self.assumed):
            yield f"{'assumed ' if not number else ' ' * 8} {line}"
        if self.run.tensor_parallel > 1:
            yield "not for smp.init: this library has no tensor parallelism"
        elif self.fits:
            text = repr(self.settings).replace("'", '"')
            yield f"use it: smp.init({text})"
