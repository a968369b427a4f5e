"""The segments of a model with their costs on a device, which are all that a simulation reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.cluster.collectives import Group
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.compiler.simulation.transformer import Transformer

HIDDEN_TRAFFIC = 8.0
"""Bytes that a pass moves for each byte of hidden activations that is kept."""

SCORE_TRAFFIC = 2.0
"""The same for the scores of attention.

Both are fitted to the forward passes in table 9 of Qi et al., "Zero Bubble Pipeline Parallelism",
2024 (arXiv 2401.10241): A100, Megatron-LM, models of 1.5 to 28 billion parameters.
`benchmarks/simulation.py` shows what is left.
"""

WEIGHT_BYTES, GRADIENT_BYTES, SLOT_BYTES, COPY_BYTES = 4, 4, 8, 2
"""Bytes for each parameter: its value, its gradient, two slots as Adam has, and the copy of 16 bits
that is computed with if the model computes in such a dtype."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Costs of the segments in model order, for one microbatch on one device; float64 arrays.

    Attributes:
        forward: Seconds of a forward pass.
        backward: Seconds of a backward pass without the gradients of weights.
        weights: Seconds of the gradients of weights.
        shared: Of the seconds of a forward pass and again of a backward pass, those in which
            devices that share a partition exchange results.
        traffic: Of the seconds of a forward pass, those that memory and not arithmetic takes.
        parameter_bytes: Bytes of the weights, with gradients, slots and copies left out.
        state_bytes: Gradients and copies of the weights.
        slot_bytes: Slots of the optimizer.
        kept_bytes: What the forward pass keeps for the backward pass.
        selective_bytes: The same with selective recomputation.
        full_bytes: The same with full recomputation: what a segment receives.
        selective_seconds: What selective recomputation adds to a backward pass.
        sent_bytes: What is sent to the next segment; as much comes back.
        layers: Layers, which gradients are ready by.
    """

    forward: NDArray[np.float64]
    backward: NDArray[np.float64]
    weights: NDArray[np.float64]
    shared: NDArray[np.float64]
    traffic: NDArray[np.float64]
    parameter_bytes: NDArray[np.float64]
    state_bytes: NDArray[np.float64]
    slot_bytes: NDArray[np.float64]
    kept_bytes: NDArray[np.float64]
    selective_bytes: NDArray[np.float64]
    full_bytes: NDArray[np.float64]
    selective_seconds: NDArray[np.float64]
    sent_bytes: NDArray[np.float64]
    layers: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.forward)


def layers_of(model: Transformer, count: int) -> NDArray[np.int64]:
    """Returns the number of layers of each segment, so that the slowest one is as quick as can be.

    The output layer counts as its FLOPs; segments with fewer layers come first, where the embedding
    is.
    """
    head = model.head_flops / (model.product_flops + model.attention_flops)
    if count == 1:
        return np.array([model.layers])
    best = min(
        range(model.layers + 1),
        key=lambda last: (max(last + head, math.ceil((model.layers - last) / (count - 1))), -last),
    )
    each, more = divmod(model.layers - best, count - 1)
    before = np.full(count - 1, each)
    before[count - 1 - more :] += 1
    return np.append(before, best)


def segments_of(
    model: Transformer, count: int, examples: int, machine: Machine, sharers: Group
) -> Segments:
    """Returns the segments of a Transformer.

    Args:
        model: The model.
        count: Number of segments.
        examples: Examples of a microbatch.
        machine: One device; `flops_per_second` is what matrix products reach.
        sharers: The devices that share a partition; one for this library.
    """
    share, b = sharers.size, float(examples)
    layers = layers_of(model, count).astype(np.float64)
    last, first = np.zeros(count), np.zeros(count)
    last[-1] = first[0] = 1.0
    flops = machine.flops_per_second * share
    products = b * (layers * model.product_flops + last * model.head_flops) / flops
    attention = b * layers * model.attention_flops / flops
    hidden = b * layers * (model.shared_bytes + model.product_bytes / share)
    scores = b * layers * model.score_bytes / share
    head = b * last * model.head_bytes / share
    moved = HIDDEN_TRAFFIC * hidden + SCORE_TRAFFIC * (scores + head)
    traffic = moved / machine.bytes_per_second
    # Two sums of hidden states in each pass through a layer, as in Shoeybi et al., 2019.
    shared = 2 * layers * sharers.all_reduce_seconds(b * model.boundary_bytes)
    parameters = layers * model.layer_parameters + (first + last) * model.head_parameters
    if count == 1:
        parameters -= model.head_parameters * (first * last)  # tied, as papers count them
    parameters = parameters / share
    copies = COPY_BYTES if model.value_bytes < WEIGHT_BYTES else 0
    products_only = b * layers * (model.product_bytes / share + model.boundary_bytes)
    return Segments(
        forward=products + attention + traffic + shared,
        backward=products + 2 * attention + traffic + shared,
        weights=products,
        shared=shared,
        traffic=traffic,
        parameter_bytes=WEIGHT_BYTES * parameters,
        state_bytes=(GRADIENT_BYTES + copies) * parameters,
        slot_bytes=SLOT_BYTES * parameters,
        kept_bytes=hidden + scores + head,
        selective_bytes=np.minimum(products_only, hidden) + head,
        full_bytes=np.full(count, b * model.boundary_bytes),
        # All that are no products with weights, and so not expensive.
        selective_seconds=traffic + (0.0 if model.fused_attention else 1.0) * attention,
        sent_bytes=np.full(count, b * model.boundary_bytes / share),
        layers=layers,
    )
