"""The configuration: its keys, the sources of their values, and their validation.

A value comes from the dict or file given to `smp.init`, from a launcher's flags or from the
environment, in this order of precedence. All faults of all sources are collected and reported in
one `ConfigError`, so that a user can fix them in one go.
"""

from __future__ import annotations

from opensmp.config.config import Config
from opensmp.config.sources import (
    ENVIRONMENT_PREFIX,
    IDLE_VARIABLE,
    LAUNCHER_PREFIX,
    SERVICE_VARIABLE,
    TRIAL_VARIABLE,
)

__all__ = [
    "ENVIRONMENT_PREFIX",
    "IDLE_VARIABLE",
    "LAUNCHER_PREFIX",
    "SERVICE_VARIABLE",
    "TRIAL_VARIABLE",
    "Config",
]
