"""Plan: which operation runs in which partition, by hand, by costs, or from a file."""

from __future__ import annotations

from opensmp.plan.auto import auto_plan
from opensmp.plan.beside import beside, in_one_place
from opensmp.plan.coarse import PROCESSES
from opensmp.plan.fit import Places, fit, follow, follow_twin
from opensmp.plan.homes import variable_homes
from opensmp.plan.make import warn_of_empty
from opensmp.plan.manual import manual_plan
from opensmp.plan.plan import Plan
from opensmp.plan.settings import PlanSettings

__all__ = [
    "PROCESSES",
    "Places",
    "Plan",
    "PlanSettings",
    "auto_plan",
    "beside",
    "fit",
    "follow",
    "follow_twin",
    "in_one_place",
    "manual_plan",
    "variable_homes",
    "warn_of_empty",
]
