"""All programs; importing this registers them."""

from __future__ import annotations

from programs import (  # noqa: F401 - they register themselves
    adversarial,
    autoencoders,
    contrastive,
    hub,
    inputs,
    inspecting,
    optimizing,
    second_order,
    sequences,
    teachers,
    tuning,
)
from programs.registry import PROGRAMS

__all__ = ["PROGRAMS"]
