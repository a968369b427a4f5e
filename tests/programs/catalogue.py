"""All programs; importing this registers them."""

from __future__ import annotations

from programs import (  # noqa: F401 - they register themselves
    adversarial,
    attacks,
    autoencoders,
    contrastive,
    gradients,
    hub,
    inputs,
    inspecting,
    meta,
    optimizing,
    rewards,
    second_order,
    sequences,
    teachers,
    tuning,
)
from programs.registry import PROGRAMS

__all__ = ["PROGRAMS"]
