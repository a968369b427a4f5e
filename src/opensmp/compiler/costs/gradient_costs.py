"""Which tensors the gradient of an operation reads, and its cost, by operation type.

The tensors that a gradient reads follow TensorFlow's gradient functions
(`tensorflow/python/ops/*_grad.py`); TensorFlow's own list of unused inputs is in
`tensorflow/python/eager/pywrap_gradient_exclusions.cc`. Tensors of which only the shape is read do
not count, since a shape does not require keeping the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opensmp.compiler.costs.op_costs import ALIASES, CONTRACTIONS, Call, Work


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


BLOCKING = _names(
    "StopGradient Sign Floor Ceil Round Rint FloorDiv TruncateDiv ZerosLike OnesLike Shape ShapeN "
    "Size Rank ArgMax ArgMin OneHot Range LinSpace Equal NotEqual Less LessEqual Greater "
    "GreaterEqual LogicalAnd LogicalOr LogicalNot IsFinite IsInf IsNan Bucketize Where Const "
    "RandomUniform RandomStandardNormal TruncatedNormal RandomShuffle StatelessRandomUniform "
    "StatelessRandomUniformV2 StatelessRandomNormal StatelessRandomNormalV2 "
    "StatelessTruncatedNormal StatelessTruncatedNormalV2 Multinomial StatelessMultinomial "
    "BroadcastGradientArgs NextAfter InTopKV2 NonMaxSuppressionV3 NonMaxSuppressionV5"
)
"""Types that no gradient flows through, though their tensors may be floating point."""

_READS_NOTHING = _names(
    "Identity IdentityN Reshape Squeeze ExpandDims PreventGradient EnsureShape Snapshot AddV2 Add "
    "Sub Neg AddN AccumulateNV2 BiasAdd Sum Mean Cast Transpose ConjugateTranspose Concat "
    "ConcatV2 Split SplitV Pack Unpack Pad PadV2 MirrorPad Tile BroadcastTo Fill Reverse "
    "ReverseV2 ReverseSequence Roll SpaceToDepth DepthToSpace SpaceToBatch SpaceToBatchND "
    "BatchToSpace BatchToSpaceND Slice StridedSlice AvgPool AvgPool3D Cumsum MatrixBandPart "
    "MatrixDiag MatrixDiagV2 MatrixDiagV3 MatrixDiagPart MatrixDiagPartV2 MatrixDiagPartV3 "
    "MatrixSetDiag MatrixSetDiagV2 MatrixSetDiagV3 Diag DiagPart Real Imag Complex Conj FFT FFT2D "
    "FFT3D IFFT IFFT2D IFFT3D RFFT RFFT2D IRFFT IRFFT2D ResizeNearestNeighbor CheckNumerics "
    "CheckNumericsV2 QuantizeAndDequantizeV2 ExtractImagePatches TensorListReserve "
    "TensorListFromTensor TensorListStack TensorListGetItem TensorListSetItem TensorListPushBack "
    "TensorListPopBack TensorListResize TensorListConcatV2 EmptyTensorList SparseSegmentSum"
)

_READS_OUTPUTS = _names(
    "Relu Relu6 Elu Selu Sigmoid Tanh Exp Rsqrt Sqrt Reciprocal Inv Softmax LogSoftmax Cholesky "
    "MatrixInverse Erfinv Ndtri"
)

_READS_INPUTS = _names(
    "Square Abs Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Log Log1p Erf Erfc Expm1 "
    "LeakyRelu Softplus Softsign Lgamma Digamma L2Loss Maximum Minimum SquaredDifference Prod "
    "MaxPool MaxPool3D ResizeBilinear ResizeBicubic Dilation2D Xlogy Xdivy Xlog1py Atan2 FloorMod "
    "Mod ComplexAbs Angle DivNoNan LRN CropAndResize"
)
"""Types whose gradient reads all inputs.

`MaxPool`, `MaxPool3D` and `LRN` run again in the backward pass, which needs their input.
"""

_RUN_AGAIN = _names("MaxPool MaxPool3D LRN")

_PRODUCTS = _names("Mul MulNoNan") | CONTRACTIONS

_READS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "Select": ((0,), ()),
    "SelectV2": ((0,), ()),
    "Gather": ((1,), ()),
    "GatherV2": ((1,), ()),
    "GatherNd": ((1,), ()),
    "ScatterNd": ((0,), ()),
    "TensorScatterAdd": ((1,), ()),
    "TensorScatterUpdate": ((1,), ()),
    "SegmentSum": ((1,), ()),
    "UnsortedSegmentSum": ((1,), ()),
    "DynamicPartition": ((1,), ()),
    "DynamicStitch": ((0,), ()),
    "Max": ((0,), (0,)),
    "Min": ((0,), (0,)),
    "Cumprod": ((0,), (0,)),
    "TopK": ((), (1,)),
    "TopKV2": ((), (1,)),
    "MaxPoolWithArgmax": ((0,), (1,)),
    "SoftmaxCrossEntropyWithLogits": ((), (1,)),
    "SparseSoftmaxCrossEntropyWithLogits": ((), (1,)),
}
"""Maps a type to the indices of the inputs and outputs that its gradient reads."""

# Number of elementwise operations that TensorFlow composes the gradient of one input from; 1 for
# types not listed.
_PASSES = {
    "Square": 2,
    "Log": 2,
    "Log1p": 3,
    "Sin": 2,
    "Cos": 3,
    "Abs": 2,
    "Erf": 5,
    "Erfc": 5,
    "SquaredDifference": 3,
    "Maximum": 3,
    "Minimum": 3,
    "Max": 4,
    "Min": 4,
    "Select": 2,
    "SelectV2": 2,
    "Pow": 5,
    "Softmax": 4,
    "LogSoftmax": 4,
    "Mean": 2,
    "Sum": 1,
    "Prod": 6,
}

_PASSED_ON = _names("AddV2 Add AddN AccumulateNV2 BiasAdd")
"""Types whose upstream gradient is the gradient of each input, except for its shape."""

_SPARSE = _names("Gather GatherV2 ResourceGather")


def reads(call: Call, wanted: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the indices of the inputs and outputs that an operation's gradient reads.

    For an unknown type these are all inputs and outputs.

    Args:
        call: The operation.
        wanted: Indices of the inputs whose gradients are needed.

    Example:
        >>> x = Array((8, 16), 4, True)
        >>> reads(Call("Mul", (x, x), (x,), {}.__getitem__), wanted=[0])
        ((1,), ())
    """
    if not wanted or call.type in _READS_NOTHING:
        return (), ()
    every_input = tuple(range(len(call.inputs)))
    every_output = tuple(range(len(call.outputs)))
    if call.type in _PRODUCTS:
        operands = [i for i in every_input if call.inputs[i].differentiable]
        return tuple(i for i in operands if any(w != i for w in wanted)), ()
    if call.type in _READS_OUTPUTS:
        return (), every_output
    if call.type in _READS_INPUTS:
        return every_input, ()
    if call.type in _READS:
        return _READS[call.type]
    if call.type in ("RealDiv", "Div"):
        return ((0, 1) if 1 in wanted else (1,)), ()
    if call.type == "Pow":
        return ((0, 1), (0,)) if 1 in wanted else ((0, 1), ())
    if call.type.startswith("FusedBatchNorm"):
        if call.attribute("is_training"):
            return (0, 1), tuple(o for o in every_output if o >= 3)
        return (0, 1, 3, 4), ()
    return every_input, every_output


def knows(op_type: str) -> bool:
    """Returns whether the gradient of a type is known, or known not to exist."""
    return (
        op_type in _READS_NOTHING | _READS_INPUTS | _READS_OUTPUTS | _PRODUCTS | BLOCKING
        or op_type in _READS
        or op_type in ("RealDiv", "Div", "Pow")
        or op_type.startswith("FusedBatchNorm")
    )


def backward(call: Call, wanted: Sequence[int], forward: Work, *, sparse: bool = False) -> Work:
    """Returns the work of computing the gradients of an operation's inputs.

    Args:
        call: The operation.
        wanted: Indices of the inputs whose gradients are needed.
        forward: Work of its forward pass.
        sparse: Whether the gradient of a gathered table may stay sparse (`tf.IndexedSlices`).
    """
    if not wanted:
        return Work()
    num_wanted = len(wanted)
    if call.type in CONTRACTIONS:
        return replace(forward * num_wanted, launches=num_wanted)
    if call.type in ALIASES:
        return Work(launches=num_wanted)
    if call.type in _SPARSE and sparse:
        return Work(0.0, 2 * call.written, 2)
    if call.type.startswith("FusedBatchNorm"):
        x = call.inputs[0]
        return Work(8.0 * x.elements, 5 * x.nbytes, 1)
    result = forward if call.type in _RUN_AGAIN else Work()
    for i in wanted:
        result = result + _elementwise(call, i)
    return result


def _elementwise(call: Call, i: int) -> Work:
    """Work of one input's gradient, as elementwise passes over the larger of input and result."""
    x, y = call.inputs[i], max(call.outputs, key=lambda array: array.elements)
    large = max(x, y, key=lambda array: array.elements)
    result = Work()
    if call.type not in _PASSED_ON:
        passes = _PASSES.get(call.type, 1)
        if call.type in ("RealDiv", "Div") and i == 1:
            passes = 4
        if call.type == "Sub":
            passes = i
        result = Work(float(passes * large.elements), 3 * passes * large.nbytes, passes)
    if x.elements < y.elements and call.type not in _RESHAPING:  # it was broadcast
        result = result + Work(float(y.elements), y.nbytes + x.nbytes, 2)
    return result


_RESHAPING = _names(
    "Concat ConcatV2 Pack Pad PadV2 MirrorPad Tile ResizeNearestNeighbor ResizeBilinear "
    "Gather GatherV2 GatherNd Fill TensorListStack TensorListConcatV2"
)
"""Types whose result may be larger than an input without broadcasting."""
