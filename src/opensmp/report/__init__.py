"""Reports: what a step did, as values to print, to plot and to open in other tools."""

from __future__ import annotations

from opensmp.report.record import record_timeline
from opensmp.report.timeline import Event, StepTimeline, Timeline

__all__ = ["Event", "StepTimeline", "Timeline", "record_timeline"]
