"""FLOPs and bytes of one operation, from its type, attributes and shapes.

A multiplication plus an addition is two FLOPs. An operation that computes each result element from
few others counts one FLOP per element, as TensorFlow's own statistics do
(`tensorflow/python/profiler/internal/flops_registry.py`). Bytes are the bytes read plus the bytes
written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opensmp.compiler.costs.op_graph import Array


@dataclass(frozen=True)
class Work:
    """The resources that some computation takes.

    Attributes:
        flops: Floating-point operations.
        bytes: Memory traffic.
        launches: Number of launched operations.
        narrow: FLOPs of narrow grouped convolutions, per channel of a group; see `narrow_flops`.
    """

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    narrow: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.narrow + other.narrow,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            self.flops * times, self.bytes * times, self.launches * times, self.narrow * times
        )


@dataclass(frozen=True)
class Call:
    """An operation without its graph.

    Attributes:
        type: Its type, such as `"MatMul"`.
        inputs: Its inputs.
        outputs: Its outputs.
        attribute: Returns an attribute's value by name; raises ValueError if there is none.
    """

    type: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    attribute: Callable[[str], Any]

    @property
    def read(self) -> int:
        """Bytes of all inputs."""
        return sum(array.nbytes for array in self.inputs)

    @property
    def written(self) -> int:
        """Bytes of all outputs."""
        return sum(array.nbytes for array in self.outputs)

    @property
    def elements(self) -> int:
        """Elements of all outputs."""
        return sum(array.elements for array in self.outputs)


Formula = Callable[[Call], tuple[float, float]]
"""Computes FLOPs and bytes of a call."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONTRACTIONS = _names(
    "MatMul BatchMatMul BatchMatMulV2 BatchMatMulV3 Einsum XlaEinsum Conv2D Conv3D "
    "DepthwiseConv2dNative Conv2DBackpropInput Conv2DBackpropFilter Conv3DBackpropInputV2 "
    "Conv3DBackpropFilterV2 DepthwiseConv2dNativeBackpropInput "
    "DepthwiseConv2dNativeBackpropFilter"
)
"""Sums of products of two tensors; each operand's gradient costs as much as the forward pass."""

ALIASES = _names(
    "Identity IdentityN Reshape Squeeze ExpandDims StopGradient PreventGradient EnsureShape "
    "Bitcast Snapshot"
)
"""Types whose results share their input's memory: `IdentityN` of all, the others of the first."""

_FREE = ALIASES | _names(
    "NoOp Const Placeholder PlaceholderWithDefault Shape ShapeN Size Rank "
    "BroadcastGradientArgs BroadcastArgs Assert StatelessRandomGetKeyCounter "
    "StatelessRandomGetAlg StatelessRandomGetKeyCounterAlg TensorListReserve EmptyTensorList "
    "TensorListLength TensorListElementShape TensorListFromTensor TensorListGetItem "
    "TensorListSetItem TensorListPushBack TensorListPopBack TensorListResize VarHandleOp "
    "ReadVariableOp VarIsInitializedOp VariableShape OptionalFromValue OptionalGetValue "
    "OptionalNone OptionalHasValue"
)

_MOVES = _names(
    "Transpose ConjugateTranspose Concat ConcatV2 Split SplitV Pack Unpack Pad PadV2 MirrorPad "
    "Tile BroadcastTo Fill Reverse ReverseV2 ReverseSequence Roll SpaceToDepth DepthToSpace "
    "SpaceToBatch SpaceToBatchND BatchToSpace BatchToSpaceND TensorListStack TensorListConcatV2 "
    "MatrixBandPart MatrixDiag MatrixDiagV2 MatrixDiagV3 MatrixDiagPart MatrixDiagPartV2 "
    "MatrixDiagPartV3 MatrixSetDiag MatrixSetDiagV2 MatrixSetDiagV3 Diag DiagPart "
    "ExtractImagePatches ExtractVolumePatches Where ZerosLike OnesLike Range LinSpace OneHot "
    "ResizeNearestNeighbor InvertPermutation DynamicStitch ParallelDynamicStitch "
    "DynamicPartition Complex Real Imag DeepCopy Copy TensorScatterUpdate ScatterNd "
    "TensorStridedSliceUpdate AssignVariableOp Unique UniqueV2 LookupTableFindV2"
)
"""Types without arithmetic that read their inputs once and write their outputs once."""

_PICKS = _names(
    "Slice StridedSlice Gather GatherV2 GatherNd ResourceGather ResourceGatherNd TensorListGather"
)
"""Types without arithmetic that read only the returned part of their first input."""

_ELEMENTWISE = _names(
    "Abs Acos Acosh AddV2 Add Angle ApproximateEqual Asin Asinh Atan Atan2 Atanh BesselI0e "
    "BesselI1e BiasAdd BitwiseAnd BitwiseOr BitwiseXor Bucketize Cast Ceil CheckNumerics "
    "CheckNumericsV2 ClipByValue ComplexAbs Conj Cos Cosh Digamma Div DivNoNan Elu Equal Erf "
    "Erfc Erfinv Exp Expm1 Floor FloorDiv FloorMod Greater GreaterEqual Inv Invert IsFinite "
    "IsInf IsNan LeakyRelu LeftShift Less LessEqual Lgamma Log Log1p LogicalAnd LogicalNot "
    "LogicalOr Maximum Minimum Mod Mul MulNoNan Ndtri Neg NextAfter NotEqual Polygamma "
    "PopulationCount Pow RealDiv Reciprocal Relu Relu6 RightShift Rint Round Rsqrt Select "
    "SelectV2 Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Square Sub Tan Tanh "
    "TruncateDiv TruncateMod Xdivy Xlog1py Xlogy Zeta QuantizeAndDequantizeV2 "
    "QuantizeAndDequantizeV4 FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars "
    "ReluGrad SigmoidGrad TanhGrad EluGrad SeluGrad SoftplusGrad RsqrtGrad SqrtGrad "
    "ReciprocalGrad InvGrad"
)

_REDUCTIONS = _names(
    "Sum Mean Max Min Prod All Any EuclideanNorm ArgMax ArgMin Cumsum Cumprod "
    "CumulativeLogsumexp L2Loss AddN AccumulateNV2 SegmentSum SegmentMean SegmentMax SegmentMin "
    "SegmentSumV2 SegmentMaxV2 UnsortedSegmentSum UnsortedSegmentMax UnsortedSegmentMin "
    "UnsortedSegmentProd SparseSegmentSum SparseSegmentMean Bincount DenseBincount "
    "TensorScatterAdd TensorScatterSub TensorScatterMax TensorScatterMin BiasAddGrad"
)
"""Types that cost one FLOP per element of the first input (of all inputs for sums of tensors)."""

_RANDOM = _names(
    "RandomUniform RandomStandardNormal TruncatedNormal RandomUniformInt RandomShuffle "
    "StatelessRandomUniform StatelessRandomUniformV2 StatelessRandomNormal "
    "StatelessRandomNormalV2 StatelessTruncatedNormal StatelessTruncatedNormalV2 "
    "StatelessRandomUniformInt StatelessRandomUniformIntV2 StatelessRandomUniformFullInt "
    "StatelessRandomUniformFullIntV2 StatelessRandomBinomial StatelessRandomGammaV2 "
    "StatelessRandomGammaV3 StatelessMultinomial Multinomial StatelessParameterizedTruncatedNormal "
    "StatefulUniform StatefulStandardNormalV2 RandomGamma StatelessRandomPoisson"
)

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): ten rounds
# of two multiplications, four other operations and two key increments yield four numbers; one more
# multiplication per number converts it to a float.
_PHILOX_FLOPS = 10 * (2 + 4 + 2) / 4 + 1


def formula(call: Call) -> tuple[float, float] | None:
    """Returns FLOPs and bytes of an operation, or None if there is no formula for its type.

    Example:
        >>> float32 = {"itemsize": 4, "differentiable": True}
        >>> x, kernel, y = (Array(s, **float32) for s in [(8, 16), (16, 32), (8, 32)])
        >>> formula(Call("MatMul", (x, kernel), (y,), {"transpose_a": False}.__getitem__))
        (8192.0, 3584)
    """
    found = FORMULAS.get(call.type)
    return None if found is None else found(call)


def default(call: Call) -> tuple[float, float]:
    """Returns FLOPs and bytes of an operation of unknown type, counted as elementwise."""
    return float(call.elements), call.read + call.written


def narrow_flops(call: Call, flops: float) -> float:
    """Returns the FLOPs of a grouped convolution per channel of a group; 0 for other operations.

    Keras compiles grouped convolutions with XLA, and XLA for CPUs turns them into scalar loops,
    which approach matrix products only as the groups get wide
    (`xla/service/cpu/ir_emission_utils.cc`). `DepthwiseConv2dNative` has its own kernel and is
    excluded.

    Args:
        call: The operation.
        flops: Its FLOPs.
    """
    if call.type not in ("Conv2D", "Conv3D"):
        return 0.0
    layout = call.attribute("data_format")
    layout = layout.decode() if isinstance(layout, bytes) else layout
    channels = call.inputs[0].shape[1 if layout.startswith("NC") else -1]
    of_group = call.inputs[1].shape[-2]
    return flops / max(of_group, 1) if of_group < channels else 0.0


# --- the formulas -------------------------------------------------------------------------


def _free(call: Call) -> tuple[float, float]:
    return 0.0, 0


def _move(call: Call) -> tuple[float, float]:
    return 0.0, call.read + call.written


def _pick(call: Call) -> tuple[float, float]:
    return 0.0, 2 * call.written + sum(array.nbytes for array in call.inputs[1:])


def _reduction(call: Call) -> tuple[float, float]:
    num_inputs = len(call.inputs) if call.type in ("AddN", "AccumulateNV2") else 1
    return float(sum(a.elements for a in call.inputs[:num_inputs])), call.read + call.written


def _random(call: Call) -> tuple[float, float]:
    return _PHILOX_FLOPS * call.elements, call.written


def _times_output(flops_per_element: float) -> Formula:
    def count(call: Call) -> tuple[float, float]:
        return flops_per_element * call.outputs[0].elements, call.read + call.written

    return count


def _times_input(flops_per_element: float) -> Formula:
    def count(call: Call) -> tuple[float, float]:
        return flops_per_element * call.inputs[0].elements, call.read + call.written

    return count


def _matmul(call: Call) -> tuple[float, float]:
    """Counts 2 m k n per batch element."""
    adjoint = "transpose_a" if call.type == "MatMul" else "adj_x"
    shape = call.inputs[0].shape
    summed = shape[-2] if call.attribute(adjoint) else shape[-1]
    return 2.0 * summed * call.outputs[0].elements, call.read + call.written


def _einsum(call: Call) -> tuple[float, float]:
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


def _convolution(call: Call) -> tuple[float, float]:
    """Counts two FLOPs per output element, kernel position and input channel of the group.

    Kernels have the shape (*spatial, input channels, output channels).
    """
    kernel = call.inputs[1].shape
    return 2.0 * call.outputs[0].elements * math.prod(kernel[:-1]), call.read + call.written


def _depthwise(call: Call) -> tuple[float, float]:
    kernel = call.inputs[1].shape
    return 2.0 * call.outputs[0].elements * math.prod(kernel[:-2]), call.read + call.written


def _transposed_convolution(call: Call) -> tuple[float, float]:
    """Counts the convolution whose input gradient this is, from the upstream gradient's shape."""
    kernel = call.inputs[1].shape
    return 2.0 * call.inputs[2].elements * math.prod(kernel[:-1]), call.read + call.written


def _kernel_gradient(call: Call) -> tuple[float, float]:
    """Counts the convolution whose kernel gradient this is: kernel size times output positions."""
    kernel, upstream = call.outputs[0].shape, call.inputs[2]
    return 2.0 * upstream.elements * math.prod(kernel[:-1]), call.read + call.written


def _depthwise_gradient(call: Call) -> tuple[float, float]:
    input_wanted = call.type.endswith("Input")
    kernel = call.inputs[1].shape if input_wanted else call.outputs[0].shape
    return 2.0 * call.inputs[2].elements * math.prod(kernel[:-2]), call.read + call.written


def _pooling(call: Call) -> tuple[float, float]:
    area = math.prod(call.attribute("ksize"))
    return float(area * call.outputs[0].elements), call.read + call.written


def _batch_norm(call: Call) -> tuple[float, float]:
    """Counts mean (1) and variance (3) per element in training, and scale and shift (2) always."""
    flops = 6 if call.attribute("is_training") else 2
    x, y = call.inputs[0], call.outputs[0]
    passes = 2 if call.attribute("is_training") else 1
    return float(flops * x.elements), passes * x.nbytes + y.nbytes


def _fourier(axes: int) -> Formula:
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


def _sort(call: Call) -> tuple[float, float]:
    """Counts n log2 k comparisons, for a heap of the k largest."""
    kept = call.outputs[0].shape[-1] if call.outputs[0].shape else 1
    return call.inputs[0].elements * math.log2(max(2, kept)), call.read + call.written


def _cubic(call: Call) -> tuple[float, float]:
    """Counts n^3 per matrix, the order of the factorisations (Golub and Van Loan)."""
    shape = call.inputs[0].shape
    return float(math.prod(shape) * (shape[-1] if shape else 1)), call.read + call.written


FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(_FREE, _free),
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_PICKS, _pick),
    **dict.fromkeys(_ELEMENTWISE, _times_output(1)),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_RANDOM, _random),
    **dict.fromkeys(["MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"], _matmul),
    **dict.fromkeys(["Einsum", "XlaEinsum"], _einsum),
    **dict.fromkeys(["Conv2D", "Conv3D", "Dilation2D"], _convolution),
    "DepthwiseConv2dNative": _depthwise,
    **dict.fromkeys(["Conv2DBackpropInput", "Conv3DBackpropInputV2"], _transposed_convolution),
    **dict.fromkeys(["Conv2DBackpropFilter", "Conv3DBackpropFilterV2"], _kernel_gradient),
    "DepthwiseConv2dNativeBackpropInput": _depthwise_gradient,
    "DepthwiseConv2dNativeBackpropFilter": _depthwise_gradient,
    **dict.fromkeys(["MaxPool", "AvgPool", "MaxPool3D", "AvgPool3D"], _pooling),
    "MaxPoolWithArgmax": _pooling,
    **dict.fromkeys(["FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"], _batch_norm),
    # Maximum, difference, exponential, sum, quotient.
    **dict.fromkeys(["Softmax", "LogSoftmax"], _times_input(5)),
    # Softmax, then the loss and the difference to the labels.
    "SoftmaxCrossEntropyWithLogits": _times_input(8),
    "SparseSoftmaxCrossEntropyWithLogits": _times_input(7),
    "SquaredDifference": _times_output(2),
    # Bilinear: three interpolations of a difference, a product and a sum each. Bicubic: 16 points
    # instead of 4.
    "ResizeBilinear": _times_output(9),
    "ResizeBicubic": _times_output(36),
    "ScaleAndTranslate": _times_output(9),
    "CropAndResize": _times_output(9),
    "ImageProjectiveTransformV3": _times_output(20),
    "LRN": _times_output(10),
    **dict.fromkeys(["FFT", "IFFT", "RFFT", "IRFFT"], _fourier(1)),
    **dict.fromkeys(["FFT2D", "IFFT2D", "RFFT2D", "IRFFT2D"], _fourier(2)),
    **dict.fromkeys(["FFT3D", "IFFT3D", "RFFT3D", "IRFFT3D"], _fourier(3)),
    **dict.fromkeys(["TopK", "TopKV2", "InTopKV2"], _sort),
    **dict.fromkeys(
        ["Cholesky", "MatrixInverse", "MatrixSolve", "MatrixTriangularSolve", "Qr", "Svd"], _cubic
    ),
}
"""Maps an operation type to its formula."""
