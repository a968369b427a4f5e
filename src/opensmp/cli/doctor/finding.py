"""One finding of `opensmp doctor`."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """What was found about one topic.

    Attributes:
        topic: A word or two, the same for all findings of one check.
        level: `"error"` if opensmp cannot run, `"warning"` if it may run worse than it could.
        text: What was found.
        mend: The line that mends it, or what to do; empty if there is nothing to mend.
    """

    topic: str
    level: Level
    text: str
    mend: str = ""


def ok(topic: str, text: str) -> Finding:
    """Something that is as it should be."""
    return Finding(topic, "ok", text)


def warning(topic: str, text: str, mend: str) -> Finding:
    """Something with which opensmp runs, but worse than it could."""
    return Finding(topic, "warning", text, mend)


def error(topic: str, text: str, mend: str) -> Finding:
    """Something with which opensmp does not run."""
    return Finding(topic, "error", text, mend)
