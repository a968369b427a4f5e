"""What is known of each type of operation: its cost, and that of its gradient.

The tensors that a gradient reads follow TensorFlow's gradient functions
(`tensorflow/python/ops/*_grad.py`); TensorFlow's own list of unused inputs is in
`tensorflow/python/eager/pywrap_gradient_exclusions.cc`. Tensors of which only the shape is read do
not count, since a shape does not require keeping the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from opensmp.compiler.costs.formulas import (
    batch_norm,
    convolution,
    cubic,
    depthwise,
    depthwise_gradient,
    einsum,
    fourier,
    free,
    kernel_gradient,
    matmul,
    move,
    per_input,
    per_output,
    pick,
    pooling,
    random,
    reduction,
    sort,
    transposed_convolution,
)
from opensmp.compiler.costs.gradient_reads import (
    Reads,
    all_inputs,
    all_outputs,
    batch_norm_values,
    divisor,
    nothing,
    only,
    other_operands,
    power,
)
from opensmp.compiler.costs.work import Formula


class Family(NamedTuple):
    """Types of operations with the same costs.

    Attributes:
        names: The types, separated by spaces.
        formula: FLOPs and bytes; None if unknown.
        reads: Which tensors the gradient reads; None if unknown, which counts as all of them.
        passes: Number of elementwise operations that TensorFlow composes the gradient of an input
            from, for each input if they differ. 0 means that the upstream gradient is the gradient,
            except for its shape.
        blocks: Whether no gradient flows through, though the tensors may be floating point.
        alias: Whether results share their input's memory: `IdentityN` of all, the others of the
            first.
        contraction: Whether it sums products of two tensors, so that the gradient of each operand
            costs as much as the forward pass.
        normalizes: Whether it is a batch normalisation.
        sparse: Whether the gradient of the first input, a table, may stay sparse.
        reshapes: Whether the result may be larger than an input without broadcasting.
        runs_again: Whether the backward pass runs the forward pass again.
    """

    names: str
    formula: Formula | None
    reads: Reads | None = None
    passes: int | tuple[int, ...] = 1
    blocks: bool = False
    alias: bool = False
    contraction: bool = False
    normalizes: bool = False
    sparse: bool = False
    reshapes: bool = False
    runs_again: bool = False


UNKNOWN = Family("", None)
"""What is assumed of a type without a row."""

_ROWS = (
    Family(
        "Assert BroadcastArgs NoOp OptionalFromValue OptionalGetValue OptionalHasValue "
        "OptionalNone Placeholder PlaceholderWithDefault ReadVariableOp "
        "StatelessRandomGetAlg StatelessRandomGetKeyCounter "
        "StatelessRandomGetKeyCounterAlg TensorListElementShape TensorListLength "
        "VarHandleOp VarIsInitializedOp VariableShape",
        free,
    ),
    Family("Bitcast", free, alias=True),
    Family("BroadcastGradientArgs Const Rank Shape ShapeN Size", free, blocks=True),
    Family(
        "EmptyTensorList TensorListFromTensor TensorListGetItem TensorListPopBack "
        "TensorListPushBack TensorListReserve TensorListResize TensorListSetItem",
        free,
        reads=nothing,
    ),
    Family("StopGradient", free, blocks=True, alias=True),
    Family(
        "EnsureShape ExpandDims Identity IdentityN PreventGradient Reshape Snapshot Squeeze",
        free,
        reads=nothing,
        alias=True,
    ),
    Family(
        "AssignVariableOp Copy DeepCopy ExtractVolumePatches InvertPermutation "
        "LookupTableFindV2 ParallelDynamicStitch TensorStridedSliceUpdate Unique UniqueV2",
        move,
    ),
    Family("LinSpace OneHot OnesLike Range Where ZerosLike", move, blocks=True),
    Family(
        "BatchToSpace BatchToSpaceND BroadcastTo Complex ConjugateTranspose DepthToSpace "
        "Diag DiagPart ExtractImagePatches Imag MatrixBandPart MatrixDiag MatrixDiagPart "
        "MatrixDiagPartV2 MatrixDiagPartV3 MatrixDiagV2 MatrixDiagV3 MatrixSetDiag "
        "MatrixSetDiagV2 MatrixSetDiagV3 Real Reverse ReverseSequence ReverseV2 Roll "
        "SpaceToBatch SpaceToBatchND SpaceToDepth Split SplitV Transpose Unpack",
        move,
        reads=nothing,
    ),
    Family("DynamicStitch ScatterNd", move, reads=only(inputs=(0,))),
    Family("DynamicPartition TensorScatterUpdate", move, reads=only(inputs=(1,))),
    Family(
        "Concat ConcatV2 Fill MirrorPad Pack Pad PadV2 ResizeNearestNeighbor "
        "TensorListConcatV2 TensorListStack Tile",
        move,
        reads=nothing,
        reshapes=True,
    ),
    Family("ResourceGatherNd TensorListGather", pick),
    Family("Slice StridedSlice", pick, reads=nothing),
    Family("ResourceGather", pick, sparse=True),
    Family("GatherNd", pick, reads=only(inputs=(1,)), reshapes=True),
    Family("Gather GatherV2", pick, reads=only(inputs=(1,)), sparse=True, reshapes=True),
    Family(
        "ApproximateEqual BesselI0e BesselI1e BitwiseAnd BitwiseOr BitwiseXor ClipByValue "
        "EluGrad FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars InvGrad Invert LeftShift "
        "Polygamma PopulationCount QuantizeAndDequantizeV4 ReciprocalGrad ReluGrad "
        "RightShift RsqrtGrad SeluGrad SigmoidGrad SoftplusGrad SqrtGrad TanhGrad "
        "TruncateMod Zeta",
        per_output(1),
    ),
    Family(
        "Bucketize Ceil Equal Floor FloorDiv Greater GreaterEqual IsFinite IsInf IsNan "
        "Less LessEqual LogicalAnd LogicalNot LogicalOr NextAfter NotEqual Rint Round "
        "Sign TruncateDiv",
        per_output(1),
        blocks=True,
    ),
    Family(
        "Acos Acosh Angle Asin Asinh Atan Atan2 Atanh ComplexAbs Cosh Digamma DivNoNan "
        "Expm1 FloorMod LeakyRelu Lgamma Mod Sinh Softplus Softsign Tan Xdivy Xlog1py "
        "Xlogy",
        per_output(1),
        reads=all_inputs,
    ),
    Family(
        "Elu Erfinv Exp Inv Ndtri Reciprocal Relu Relu6 Rsqrt Selu Sigmoid Sqrt Tanh",
        per_output(1),
        reads=all_outputs,
    ),
    Family(
        "Cast CheckNumerics CheckNumericsV2 Conj Neg QuantizeAndDequantizeV2",
        per_output(1),
        reads=nothing,
    ),
    Family("Mul MulNoNan", per_output(1), reads=other_operands),
    Family("Abs Log Sin Square", per_output(1), reads=all_inputs, passes=2),
    Family("Cos Log1p Maximum Minimum", per_output(1), reads=all_inputs, passes=3),
    Family("Erf Erfc", per_output(1), reads=all_inputs, passes=5),
    Family("Div RealDiv", per_output(1), reads=divisor, passes=(1, 4)),
    Family("Sub", per_output(1), reads=nothing, passes=(0, 1)),
    Family("Add AddV2 BiasAdd", per_output(1), reads=nothing, passes=0),
    Family("Select SelectV2", per_output(1), reads=only(inputs=(0,)), passes=2),
    Family("Pow", per_output(1), reads=power, passes=5),
    Family("LRN", per_output(10), reads=all_inputs, runs_again=True),
    Family("SquaredDifference", per_output(2), reads=all_inputs, passes=3),
    Family("ImageProjectiveTransformV3", per_output(20)),
    # Bilinear: three interpolations of a difference, a product and a sum each. Bicubic: 16 points
    # instead of 4.
    Family("ResizeBicubic", per_output(36), reads=nothing),
    Family("ScaleAndTranslate", per_output(9)),
    Family("CropAndResize", per_output(9), reads=all_inputs),
    Family("ResizeBilinear", per_output(9), reads=nothing, reshapes=True),
    # Maximum, difference, exponential, sum, quotient.
    Family("LogSoftmax Softmax", per_input(5), reads=all_outputs, passes=4),
    # Softmax, then the loss and the difference to the labels.
    Family("SparseSoftmaxCrossEntropyWithLogits", per_input(7), reads=only(outputs=(1,))),
    Family("SoftmaxCrossEntropyWithLogits", per_input(8), reads=only(outputs=(1,))),
    Family(
        "All Any BiasAddGrad Bincount CumulativeLogsumexp DenseBincount EuclideanNorm "
        "SegmentMax SegmentMaxV2 SegmentMean SegmentMin SegmentSumV2 SparseSegmentMean "
        "TensorScatterMax TensorScatterMin TensorScatterSub UnsortedSegmentMax "
        "UnsortedSegmentMin UnsortedSegmentProd",
        reduction,
    ),
    Family("ArgMax ArgMin", reduction, blocks=True),
    Family("L2Loss", reduction, reads=all_inputs),
    Family("Cumsum SparseSegmentSum Sum", reduction, reads=nothing),
    Family("Cumprod", reduction, reads=only(inputs=(0,), outputs=(0,))),
    Family("SegmentSum TensorScatterAdd UnsortedSegmentSum", reduction, reads=only(inputs=(1,))),
    Family("Prod", reduction, reads=all_inputs, passes=6),
    Family("AccumulateNV2 AddN", reduction, reads=nothing, passes=0),
    Family("Mean", reduction, reads=nothing, passes=2),
    Family("Max Min", reduction, reads=only(inputs=(0,), outputs=(0,)), passes=4),
    Family(
        "RandomGamma RandomUniformInt StatefulStandardNormalV2 StatefulUniform "
        "StatelessParameterizedTruncatedNormal StatelessRandomBinomial "
        "StatelessRandomGammaV2 StatelessRandomGammaV3 StatelessRandomPoisson "
        "StatelessRandomUniformFullInt StatelessRandomUniformFullIntV2 "
        "StatelessRandomUniformInt StatelessRandomUniformIntV2",
        random,
    ),
    Family(
        "Multinomial RandomShuffle RandomStandardNormal RandomUniform "
        "StatelessMultinomial StatelessRandomNormal StatelessRandomNormalV2 "
        "StatelessRandomUniform StatelessRandomUniformV2 StatelessTruncatedNormal "
        "StatelessTruncatedNormalV2 TruncatedNormal",
        random,
        blocks=True,
    ),
    Family(
        "BatchMatMul BatchMatMulV2 BatchMatMulV3 MatMul",
        matmul,
        reads=other_operands,
        contraction=True,
    ),
    Family("Einsum XlaEinsum", einsum, reads=other_operands, contraction=True),
    Family("Dilation2D", convolution, reads=all_inputs),
    Family("Conv2D Conv3D", convolution, reads=other_operands, contraction=True),
    Family(
        "Conv2DBackpropInput Conv3DBackpropInputV2",
        transposed_convolution,
        reads=other_operands,
        contraction=True,
    ),
    Family(
        "Conv2DBackpropFilter Conv3DBackpropFilterV2",
        kernel_gradient,
        reads=other_operands,
        contraction=True,
    ),
    Family("DepthwiseConv2dNative", depthwise, reads=other_operands, contraction=True),
    Family(
        "DepthwiseConv2dNativeBackpropFilter DepthwiseConv2dNativeBackpropInput",
        depthwise_gradient,
        reads=other_operands,
        contraction=True,
    ),
    Family("AvgPool AvgPool3D", pooling, reads=nothing),
    Family("MaxPoolWithArgmax", pooling, reads=only(inputs=(0,), outputs=(1,))),
    Family("MaxPool MaxPool3D", pooling, reads=all_inputs, runs_again=True),
    Family(
        "FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3",
        batch_norm,
        reads=batch_norm_values,
        normalizes=True,
    ),
    Family("FFT IFFT IRFFT RFFT", fourier(1), reads=nothing),
    Family("FFT2D IFFT2D IRFFT2D RFFT2D", fourier(2), reads=nothing),
    Family("IRFFT3D RFFT3D", fourier(3)),
    Family("FFT3D IFFT3D", fourier(3), reads=nothing),
    Family("InTopKV2", sort, blocks=True),
    Family("TopK TopKV2", sort, reads=only(outputs=(1,))),
    Family("MatrixSolve MatrixTriangularSolve Qr Svd", cubic),
    Family("Cholesky MatrixInverse", cubic, reads=all_outputs),
    Family("NonMaxSuppressionV3 NonMaxSuppressionV5", None, blocks=True),
    Family(
        "FusedBatchNormGrad FusedBatchNormGradV2 FusedBatchNormGradV3",
        None,
        reads=batch_norm_values,
        normalizes=True,
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {name: family for family in _ROWS for name in family.names.split()}
)
"""Maps an operation type to its family."""

ALIASES = frozenset(name for name, family in FAMILIES.items() if family.alias)
BLOCKING = frozenset(name for name, family in FAMILIES.items() if family.blocks)
CONTRACTIONS = frozenset(name for name, family in FAMILIES.items() if family.contraction)
