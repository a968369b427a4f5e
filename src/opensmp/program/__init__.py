"""Lower: from a planned graph to forward and backward functions per segment."""

from __future__ import annotations

from opensmp.program.passes import Backward, Forward, Pass
from opensmp.program.program import Program, lower
from opensmp.program.segments import Segment, cut

__all__ = ["Backward", "Forward", "Pass", "Program", "Segment", "cut", "lower"]
