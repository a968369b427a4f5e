"""Lower: from a planned graph to forward and backward functions per segment."""

from __future__ import annotations

from opensmp.program.program import Backward, Forward, Program, lower
from opensmp.program.segments import Segment, cut

__all__ = ["Backward", "Forward", "Program", "Segment", "cut", "lower"]
