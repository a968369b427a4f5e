"""The configuration: its keys, where their values come from, and what is wrong with them.

A value comes from the dict given to `smp.init`, from a launcher's flags or from the
environment, in this order of precedence. Every fault of every source is collected first
and reported in one `ConfigError`, so that nobody has to mend a configuration one run at a
time.
"""

from __future__ import annotations

from opensmp.config.config import Config
from opensmp.config.sources import (
    ENVIRONMENT_PREFIX,
    IDLE_VARIABLE,
    LAUNCHER_PREFIX,
    SERVICE_VARIABLE,
)

__all__ = ["ENVIRONMENT_PREFIX", "IDLE_VARIABLE", "LAUNCHER_PREFIX", "SERVICE_VARIABLE", "Config"]
