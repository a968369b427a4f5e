"""The programs by name: what each is of, how equal it must be, and where it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Numbers = dict[str, Any]

WORLDS: dict[str, tuple[int, int, int]] = {
    "one process": (1, 2, 2),
    "four partitions": (1, 4, 3),
    "one microbatch": (1, 2, 1),
    "four microbatches": (1, 2, 4),
    "2 ranks": (2, 2, 2),
    "2 x 2": (4, 2, 2),
}
"""Number of processes, partitions, and microbatches."""

FACES = ("fit", "train_step", "smp.step")


class Refusal(NamedTuple):
    """How a program is refused.

    Attributes:
        error: Name of the exception's class.
        says: A piece of its message.
        why: In words, for the table.
    """

    error: str
    says: str
    why: str


class Apart(NamedTuple):
    """How a program means something else where each replica has a part of the batch.

    Attributes:
        why: In words, for the table.
        says: A piece of the warning that all ranks give; "" where nothing can be seen, and the
            ranks have to agree with each other.
    """

    why: str
    says: str = ""


class Program(NamedTuple):
    """A training program.

    Attributes:
        name: Name of its function.
        run: Takes a `Wrap`; gives numbers by name.
        face: How it trains: `"fit"`, `"train_step"` (of its own, under fit), or `"smp.step"`.
        bound: The largest difference from plain Keras, relative to the larger of the number and a
            thousandth.
        policy: The dtype policy.
        microbatches: How many, where it must be another number than that of the world.
        refused: Refusals by world.
        apart: Worlds in which it means something else, as the documentation says.
        why: Why there is another number of microbatches, or a wide bound.
        needs: A module that may not be installed.
    """

    name: str
    run: Callable[[Any], Numbers]
    face: str
    bound: float = 1e-7
    policy: str = "float64"
    microbatches: int | None = None
    refused: Mapping[str, Refusal] = {}
    apart: Mapping[str, Apart] = {}
    why: str = ""
    needs: str = ""

    @property
    def title(self) -> str:
        """What it is, in words."""
        return (self.run.__doc__ or self.name).strip().splitlines()[0].rstrip(".")

    def config(self, world: str) -> dict[str, Any]:
        """The configuration in a world."""
        _, partitions, microbatches = WORLDS[world]
        return {"partitions": partitions, "microbatches": self.microbatches or microbatches}

    def looped(self, world: str) -> int:
        """Over how many microbatches plain Keras loops in a step."""
        processes, partitions, _ = WORLDS[world]
        return self.config(world)["microbatches"] * max(1, processes // partitions)


PROGRAMS: dict[str, Program] = {}


def program(face: str, **options: Any) -> Callable[[Callable[[Any], Numbers]], Any]:
    """Decorator of a program; see `Program` for the options."""
    assert face in FACES

    def register(run: Callable[[Any], Numbers]) -> Callable[[Any], Numbers]:
        name = run.__name__
        assert name not in PROGRAMS, name
        PROGRAMS[name] = Program(name, run, face, **options)
        return run

    return register


RANKS = tuple(world for world, (processes, *_) in WORLDS.items() if processes > 1)
ALONE = tuple(world for world in WORLDS if world not in RANKS)


def refused(worlds: tuple[str, ...], error: str, says: str, why: str) -> dict[str, Refusal]:
    """The same refusal in several worlds."""
    return dict.fromkeys(worlds, Refusal(error, says, why))


READ_EAGERLY = refused(
    RANKS,
    "ElsewhereError",
    "was read in a process that does not own it",
    "a loop over weights outside of a `tf.function`, see `smp.local_variables`",
)
"""Of programs that compute with weights eagerly."""
