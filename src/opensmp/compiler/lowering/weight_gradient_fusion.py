"""Computes the summed variable gradients of several microbatches in one call.

If a microbatch has few rows, most of its backward pass is memory traffic: each weight gradient is
written, then read again to be accumulated. Matrix products avoid this: concatenating the factors of
all microbatches along the summed axis yields the accumulated gradient in one product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import ConcreteFunction, Tensor
from opensmp.compiler.lowering.extraction import Extractor
from opensmp.compiler.lowering.gradients import components
from opensmp.compiler.lowering.matmul_gradients import Product, product_of
from opensmp.compiler.lowering.passes import Backward
from opensmp.compiler.lowering.sparse_gradients import SameRows


def is_worth_joining(weights: Backward, captured: Collection[int]) -> bool:
    """Returns whether products worth joining make up more than half of the gradients' elements."""
    if any(isinstance(gradient, SameRows) for gradient in weights.gradient.gradients):
        return False  # joining concatenates sparse gradients and would duplicate rows
    products = _products(weights, captured)
    sizes = [_size(gradient) for gradient in weights.gradient.gradients]
    return 2 * sum(_size(product.gradient) for product in products.values()) > sum(sizes)


def fuse_weight_gradients(
    extractor: Extractor,
    weights: Backward,
    is_shared: Sequence[bool],
    num_microbatches: int,
    captured: Collection[int],
    is_open: bool,
) -> ConcreteFunction:
    """Builds the function that `Program.fused_weight_gradients` returns."""
    feeds, gradient = weights.feeds, weights.gradient
    products = _products(weights, captured)
    wanted: dict[int, Tensor] = {}
    for each in gradient.gradients:
        product = products.get(id(each))
        wanted |= {id(t): t for t in (components(each) if product is None else _read(product))}
    single = extractor.part(feeds, tuple(wanted.values()))
    last = {
        key: extractor.part(_read(product), [product.gradient]) for key, product in products.items()
    }
    specs = [
        feed
        for feed, shared in zip(feeds, is_shared, strict=True)
        for _ in range(1 if shared else num_microbatches)
    ]

    def body(*args: Tensor) -> list[Tensor]:
        for spec, arg in zip(specs, args, strict=True):
            _private.copy_handle_data(spec, arg)
        waiting = iter(args)
        columns = []
        for shared in is_shared:
            own = [next(waiting) for _ in range(1 if shared else num_microbatches)]
            columns.append(own * num_microbatches if shared else own)
        pasted = [
            single.paste(values, f"microbatch_{index}")
            for index, values in enumerate(zip(*columns, strict=True))
        ]
        found = dict(zip(wanted, zip(*pasted, strict=True), strict=True))
        results: list[Tensor] = []
        for each in gradient.gradients:
            product = products.get(id(each))
            if product is not None:
                joined = _joined(product, found)
                results += last[id(each)].paste(joined, f"product_{len(results)}")
            elif isinstance(each, tf.IndexedSlices):
                values, indices, *shape = (found[id(t)] for t in components(each))
                results += [tf.concat(values, 0), tf.concat(indices, 0)]
                results += [all_shapes[0] for all_shapes in shape]
            elif each is not None:
                results.append(tf.add_n(found[id(each)]))
        return results

    return extractor.compiled("joint", body, specs, is_open)


def _products(weights: Backward, captured: Collection[int]) -> dict[int, Product]:
    """Returns the id of each gradient that is a product worth joining, mapped to that product."""
    stop = {id(t) for t in weights.feeds} | set(captured)
    found = [product_of(t, stop) for t in weights.gradient.gradients if t is not None]
    return {id(p.gradient): p for p in found if p is not None and p.is_worth_joining}


def _read(product: Product) -> list[Tensor]:
    """Returns the outside inputs of a product's operations: its factors, then target shapes."""
    shapes = [t for op in product.operations[1:] for t in op.inputs[1:]]
    return list({id(t): t for t in (*product.factors, *shapes)}.values())


def _joined(product: Product, found: Mapping[int, Sequence[Tensor]]) -> list[Tensor]:
    """Returns the inputs of `_read` for all microbatches together, factors concatenated."""
    axis_of = dict(zip(map(id, product.factors), product.axes, strict=True))
    return [
        tf.concat(found[id(t)], axis_of[id(t)]) if id(t) in axis_of else found[id(t)][0]
        for t in _read(product)
    ]


def _size(gradient: Any) -> int:
    if gradient is None:
        return 0
    return int(gradient.shape.num_elements() or 0)
