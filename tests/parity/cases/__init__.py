"""All cases."""

from __future__ import annotations

from parity.cases import dense

CASES = (*dense.CASES,)
