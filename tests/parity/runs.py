"""Runs a case: as plain Keras over the same microbatches, and split over partitions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from parity.case import Case
from parity.exact import tapes_as_graph_gradients, without_graph_optimizer
from parity.layout import Layout, PlainMaker, SplitMaker
from parity.records import Record, add

import opensmp as smp
from opensmp import _private
from opensmp.api import init

NUM_STEPS = 3
SEED = 20

Nest = Any
Tensor = Any
# From the arguments of a whole batch: the results of each microbatch, the mean gradients.
Pass = Callable[..., tuple[list[Nest], Nest]]


def run_plain(case: Case, num_microbatches: int, *, exact: bool = False) -> Record:
    """The reference: plain Keras models and a Python loop over the microbatches.

    Args:
        case: What to run.
        num_microbatches: Number of microbatches.
        exact: Whether to keep TensorFlow from adding numbers in another order, see `exact`.
    """
    with contextlib.ExitStack() as stack:
        if exact:
            stack.enter_context(without_graph_optimizer())
            stack.enter_context(tapes_as_graph_gradients())
        return _run_plain(case, num_microbatches)


def run_split(case: Case, layout: Layout, *, exact: bool = False) -> Record:
    """The same case through `smp.step` and distributed models.

    Args:
        case: What to run.
        layout: How to lay it out.
        exact: As in `run_plain`.
    """
    with without_graph_optimizer() if exact else contextlib.nullcontext():
        return _run_split(case, layout)


def _run_plain(case: Case, num_microbatches: int) -> Record:
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(SEED)
    parts = _parts(case.parts(PlainMaker()))

    def looped(make: Callable[[Any], Any]) -> Pass:
        step = make(parts)

        def whole_batch(*batch: Nest) -> tuple[list[Nest], Nest]:
            results = [step(*part) for part in split(batch, num_microbatches)]
            gradients = [result.get("gradients", {}) for result in results]
            return results, map_leaves(mean, *gradients)

        return whole_batch

    return _run(case, num_microbatches, parts, looped)


def _run_split(case: Case, layout: Layout) -> Record:
    init.shutdown()
    smp.init(layout.config)
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(SEED)
    parts = _parts(case.parts(SplitMaker(layout, case.num_stages)))

    def stepped(make: Callable[[Any], Any]) -> Pass:
        step = smp.step(make(parts))

        def whole_batch(*batch: Nest) -> tuple[list[Nest], Nest]:
            outputs = step(*batch)
            results = [
                map_leaves(lambda leaf, m=m: None if leaf is None else leaf[m], outputs)
                for m in range(layout.microbatches)
            ]
            gradients = outputs.get("gradients", {})
            return results, map_leaves(lambda g: None if g is None else g.accumulate(), gradients)

        return whole_batch

    return _run(case, layout.microbatches, parts, stepped)


@functools.cache
def reference(case: Case, num_microbatches: int, *, exact: bool = False) -> Record:
    """`run_plain`, once for all layouts with this number of microbatches."""
    return run_plain(case, num_microbatches, exact=exact)


def split(batch: Nest, num_microbatches: int) -> list[Nest]:
    """A batch cut along the first axis of all its tensors."""
    pieces = map_leaves(lambda leaf: tf.split(leaf, num_microbatches), batch)
    return [
        map_leaves(lambda leaf, m=m: leaf[m], pieces, is_leaf=_is_list_of_tensors)
        for m in range(num_microbatches)
    ]


def mean(*gradients: Any) -> Any:
    """The mean over microbatches, added in their order; None where there is no gradient."""
    first = gradients[0]
    if first is None:
        return None
    if isinstance(first, tf.IndexedSlices):
        values = tf.concat([g.values for g in gradients], 0) / len(gradients)
        indices = tf.concat([g.indices for g in gradients], 0)
        return tf.IndexedSlices(values, indices, first.dense_shape)
    return functools.reduce(lambda total, g: total + g, gradients) / len(gradients)


def map_leaves(function: Any, *nests: Nest, is_leaf: Any = lambda nest: False) -> Nest:
    """Applies a function leaf by leaf to nests of dicts, lists and tuples."""
    first = nests[0]
    if is_leaf(first):
        return function(*nests)
    again = functools.partial(map_leaves, function, is_leaf=is_leaf)
    if isinstance(first, Mapping):
        return {name: again(*(nest[name] for nest in nests)) for name in first}
    if isinstance(first, (list, tuple)):
        return type(first)(again(*items) for items in zip(*nests, strict=True))
    return function(*nests)


def _is_list_of_tensors(nest: Nest) -> bool:
    return isinstance(nest, list) and all(map(tf.is_tensor, nest))


def _parts(made: Any) -> dict[str, Any]:
    return made if isinstance(made, dict) else {"model": made}


def variables(part: Any) -> list[Any]:
    """All variables of a model, a metric, a module, or the variable itself."""
    return [part] if isinstance(part, tf.Variable) else list(part.variables)


def trainable_variables(part: Any) -> list[Any]:
    """Likewise, those that a step has gradients for."""
    return [part] if isinstance(part, tf.Variable) else list(part.trainable_variables)


def _run(
    case: Case, num_microbatches: int, parts: Mapping[str, Any], make: Callable[[Any], Pass]
) -> Record:
    """What both runs have in common: optimizer steps, and a record of everything."""
    record: Record = {}
    size = num_microbatches * case.per_microbatch
    sizes = [size, size, 2 * size if case.dynamic else size]
    batches = [_batch(case, number, count) for number, count in enumerate(sizes)]
    whole_batch = _compiled(make(case.step), batches[0], case.dynamic)
    whole_batch.get_concrete_function(*batches[0])  # makes the variables, runs nothing
    _add_state(record, "start", parts, {})
    optimizers = _optimizers(case, parts)

    def train(*batch: Nest) -> tuple[list[Nest], Nest]:
        results, gradients = whole_batch(*batch)
        for name, of_part in gradients.items():
            _apply(optimizers.get(name), of_part, trainable_variables(parts[name]))
        return results, gradients

    train = _compiled(train, batches[0], case.dynamic)
    for number, batch in enumerate(batches, start=1):
        results, gradients = train(*batch)
        _add_results(record, f"step {number}", results, gradients)
        _add_state(record, f"step {number}", parts, optimizers)
    if case.evaluate is not None:
        batch = _batch(case, len(batches), num_microbatches * (case.per_microbatch + 2))
        test = _compiled(make(case.evaluate), batch, case.dynamic)
        _add_results(record, "test", *test(*batch))
        _add_state(record, "test", parts, optimizers)
    return record


def _batch(case: Case, number: int, size: int) -> Nest:
    random = np.random.default_rng((SEED, number))
    return map_leaves(tf.constant, case.batch(random, size))


def _compiled(function: Pass, batch: Nest, dynamic: bool) -> Any:
    if not dynamic:
        return tf.function(function, autograph=False)
    specs = map_leaves(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), batch)
    return tf.function(function, input_signature=specs, autograph=False)


def _optimizers(case: Case, parts: Mapping[str, Any]) -> dict[str, Any]:
    optimizers = {}
    for name, part in parts.items():
        if isinstance(part, keras.Model):
            optimizers[name] = case.optimizer()
            optimizers[name].build(part.trainable_variables)
    return optimizers


def _apply(optimizer: Any, gradients: Sequence[Any], targets: Sequence[Any]) -> None:
    pairs = [(g, v) for g, v in zip(gradients, targets, strict=True) if g is not None]
    if not pairs:
        return
    if optimizer is not None:
        optimizer.apply_gradients(pairs)
    else:  # Keras optimizers take Keras variables only
        for gradient, variable in pairs:
            variable.assign_sub(0.1 * tf.convert_to_tensor(gradient))


def _add_results(record: Record, moment: str, results: list[Nest], average: Nest) -> None:
    for microbatch, result in enumerate(results):
        path = f"microbatch {microbatch}"
        rest = {name: value for name, value in result.items() if name != "gradients"}
        add(record, moment, "results", path, rest)
        add(record, moment, "gradients", path, result.get("gradients", {}))
    add(record, moment, "average", "mean", average)


def _add_state(
    record: Record, moment: str, parts: Mapping[str, Any], optimizers: Mapping[str, Any]
) -> None:
    for name, part in parts.items():
        for i, variable in enumerate(variables(part)):
            if _private.is_elsewhere(variable):
                continue  # in another process
            add(record, moment, "state", f"{name}/{i} {_name(variable)}", variable)
    for name, optimizer in optimizers.items():
        for i, variable in enumerate(optimizer.variables):
            if _private.is_elsewhere(variable):
                continue
            add(record, moment, "optimizer", f"{name}/{i} {_name(variable)}", variable)


def _name(variable: Any) -> str:
    return str(variable.path if isinstance(variable, keras.Variable) else variable.name)
