"""The dtype that a model computes its products in."""

from __future__ import annotations

from collections import Counter

from opensmp.compiler.trace.trace import TracedGraph
from opensmp.config.device import FLOAT32

_PRODUCTS = ("MatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "Conv3D")


def precision_of(traced: TracedGraph) -> str:
    """Returns the dtype of most matrix products and convolutions: that of mixed precision, if any.

    Operations inside loops and branches are not looked at. Without any, it is float32.
    """
    counts = Counter(
        op.outputs[0].dtype.base_dtype.name for op in traced.operations if op.type in _PRODUCTS
    )
    return max(counts, key=lambda dtype: (counts[dtype], dtype), default=FLOAT32)
