"""FLOPs and bytes of an operation, by the kind of its computation.

A multiplication plus an addition is two FLOPs. An operation that computes each result element from
few others counts one FLOP per element, as TensorFlow's own statistics do
(`tensorflow/python/profiler/internal/flops_registry.py`). Bytes are the bytes read plus the bytes
written.
"""

from __future__ import annotations

import math

from opensmp.compiler.costs.work import Call, Formula

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): ten rounds
# of two multiplications, four other operations and two key increments yield four numbers; one more
# multiplication per number converts it to a float.
_PHILOX_FLOPS = 10 * (2 + 4 + 2) / 4 + 1


def free(call: Call) -> tuple[float, float]:
    """No work."""
    return 0.0, 0


def move(call: Call) -> tuple[float, float]:
    """Reads the inputs once, writes the outputs once."""
    return 0.0, call.read + call.written


def pick(call: Call) -> tuple[float, float]:
    """Reads only the returned part of the first input."""
    return 0.0, 2 * call.written + sum(array.nbytes for array in call.inputs[1:])


def reduction(call: Call) -> tuple[float, float]:
    """Counts one FLOP per element of the first input, or of all inputs for sums of tensors."""
    num_inputs = len(call.inputs) if call.type in ("AddN", "AccumulateNV2") else 1
    return float(sum(a.elements for a in call.inputs[:num_inputs])), call.read + call.written


def random(call: Call) -> tuple[float, float]:
    """Counts Philox4x32-10 per number."""
    return _PHILOX_FLOPS * call.elements, call.written


def per_output(flops_per_element: float) -> Formula:
    """Counts a number of FLOPs per element of the first output."""

    def count(call: Call) -> tuple[float, float]:
        return flops_per_element * call.outputs[0].elements, call.read + call.written

    return count


def per_input(flops_per_element: float) -> Formula:
    """Counts a number of FLOPs per element of the first input."""

    def count(call: Call) -> tuple[float, float]:
        return flops_per_element * call.inputs[0].elements, call.read + call.written

    return count


def matmul(call: Call) -> tuple[float, float]:
    """Counts 2 m k n per batch element."""
    adjoint = "transpose_a" if call.type == "MatMul" else "adj_x"
    shape = call.inputs[0].shape
    summed = shape[-2] if call.attribute(adjoint) else shape[-1]
    return 2.0 * summed * call.outputs[0].elements, call.read + call.written


def einsum(call: Call) -> tuple[float, float]:
    """Counts the product of all label sizes, times two for two operands.

    This is how `numpy.einsum_path` counts a contraction without intermediate results.
    """
    equation = call.attribute("equation")
    equation = equation.decode() if isinstance(equation, bytes) else equation
    sizes: dict[str, int] = {}
    left = equation.partition("->")[0]
    for operand, array in zip(left.split(","), call.inputs, strict=True):
        before, dots, after = operand.partition("...")
        shape = array.shape
        sizes.update(zip(before, shape, strict=False))
        sizes.update(zip(reversed(after), reversed(shape), strict=False))
        if dots:
            batch = math.prod(shape[len(before) : len(shape) - len(after)])
            sizes["..."] = max(sizes.get("...", 1), batch)
    products = 1.0 * math.prod(sizes.values())
    return (2 if len(call.inputs) > 1 else 1) * products, call.read + call.written


def convolution(call: Call) -> tuple[float, float]:
    """Counts two FLOPs per output element, kernel position and input channel of the group.

    Kernels have the shape (*spatial, input channels, output channels).
    """
    kernel = call.inputs[1].shape
    return 2.0 * call.outputs[0].elements * math.prod(kernel[:-1]), call.read + call.written


def depthwise(call: Call) -> tuple[float, float]:
    """Counts two FLOPs per output element and kernel position."""
    kernel = call.inputs[1].shape
    return 2.0 * call.outputs[0].elements * math.prod(kernel[:-2]), call.read + call.written


def transposed_convolution(call: Call) -> tuple[float, float]:
    """Counts the convolution whose input gradient this is, from the upstream gradient's shape."""
    kernel = call.inputs[1].shape
    return 2.0 * call.inputs[2].elements * math.prod(kernel[:-1]), call.read + call.written


def kernel_gradient(call: Call) -> tuple[float, float]:
    """Counts the convolution whose kernel gradient this is: kernel size times output positions."""
    kernel, upstream = call.outputs[0].shape, call.inputs[2]
    return 2.0 * upstream.elements * math.prod(kernel[:-1]), call.read + call.written


def depthwise_gradient(call: Call) -> tuple[float, float]:
    """Counts the depthwise convolution whose input or kernel gradient this is."""
    input_wanted = call.type.endswith("Input")
    kernel = call.inputs[1].shape if input_wanted else call.outputs[0].shape
    return 2.0 * call.inputs[2].elements * math.prod(kernel[:-2]), call.read + call.written


def pooling(call: Call) -> tuple[float, float]:
    """Counts one FLOP per element of each window."""
    area = math.prod(call.attribute("ksize"))
    return float(area * call.outputs[0].elements), call.read + call.written


def batch_norm(call: Call) -> tuple[float, float]:
    """Counts mean (1) and variance (3) per element in training, and scale and shift (2) always."""
    flops = 6 if call.attribute("is_training") else 2
    x, y = call.inputs[0], call.outputs[0]
    passes = 2 if call.attribute("is_training") else 1
    return float(flops * x.elements), passes * x.nbytes + y.nbytes


def fourier(axes: int) -> Formula:
    """Counts 5 N log2 N for a complex transform of N points, and half of it for a real one.

    This is the convention of FFTW (Frigo and Johnson, 2005, "The design and implementation of
    FFTW3").
    """

    def count(call: Call) -> tuple[float, float]:
        shape = max(call.inputs[0].shape, call.outputs[0].shape, key=math.prod)
        points = max(2, math.prod(shape[-axes:]))
        share = 0.5 if "RFFT" in call.type else 1.0
        return share * 5 * math.prod(shape) * math.log2(points), call.read + call.written

    return count


def sort(call: Call) -> tuple[float, float]:
    """Counts n log2 k comparisons, for a heap of the k largest."""
    kept = call.outputs[0].shape[-1] if call.outputs[0].shape else 1
    return call.inputs[0].elements * math.log2(max(2, kept)), call.read + call.written


def cubic(call: Call) -> tuple[float, float]:
    """Counts n^3 per matrix, the order of the factorisations (Golub and Van Loan)."""
    shape = call.inputs[0].shape
    return float(math.prod(shape) * (shape[-1] if shape else 1)), call.read + call.written
