"""Plan: which operation runs in which partition, by hand or by a balanced cut."""

from __future__ import annotations

from opensmp.plan.auto import auto_plan
from opensmp.plan.manual import manual_plan
from opensmp.plan.plan import Plan, layer_partitions, variable_homes

__all__ = ["Plan", "auto_plan", "layer_partitions", "manual_plan", "variable_homes"]
