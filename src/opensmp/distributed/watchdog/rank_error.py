"""Represents an error of one rank so that all ranks can raise it."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, NamedTuple

from opensmp.errors import StepError

_MOST_LETTERS = 100_000  # control messages are small


_RANK = "_opensmp_rank"


def from_rank(error: Exception, rank: int) -> Exception:
    """Marks an exception as raised here because another rank has failed."""
    setattr(error, _RANK, rank)
    return error


def is_from_elsewhere(error: BaseException) -> bool:
    """Whether an exception is raised here because another rank has failed."""
    return hasattr(error, _RANK)


class RankError(NamedTuple):
    """An error that a rank has raised.

    Attributes:
        rank: The rank.
        kinds: Its class and base classes, up to but not including Exception, as `"module:name"`.
        text: Its message.
    """

    rank: int
    kinds: list[str]
    text: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> RankError:
        """Converts an exception that a rank has raised."""
        kinds = type(error).__mro__
        kinds = kinds[: kinds.index(Exception)] if Exception in kinds else kinds[:1]
        text = str(error)[:_MOST_LETTERS]
        return cls(rank, [f"{kind.__module__}:{kind.__qualname__}" for kind in kinds], text)

    def as_exception(self) -> Exception:
        """An exception of the same class, whose message also names the rank.

        A class that this process has not imported, or that cannot be constructed from a message, is
        replaced by the next base class, and at last by `StepError`.
        """
        text = f"{self.text}\n\nThis error was raised in rank {self.rank}."
        for kind in filter(None, map(_class, self.kinds)):
            with contextlib.suppress(Exception):  # a user's constructor may raise anything
                made = kind(None, None, text) if hasattr(kind, "error_code") else kind(text)
                if isinstance(made, Exception) and text in (str(made), *made.args):
                    return made
        return StepError(f"{self.name}: {text}")

    @property
    def name(self) -> str:
        """Name of its class."""
        return self.kinds[0].rpartition(":")[2]

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" if self.text else self.name


def _class(kind: str) -> Any:
    module, _, names = kind.rpartition(":")
    found: Any = sys.modules.get(module)
    for name in names.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None
