"""Input specs of a model, from `--input` options and the model's own symbolic inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.base.message_text import sentence, shown
from opensmp.errors import PlanError

_SIZES = r"[0-9]{1,18}(?:[x,][0-9]{1,18})*"
_INPUT = re.compile(rf"(?:(?P<name>[\w.-]+)=)?(?P<shape>{_SIZES})?(?:/(?P<dtype>\w+))?")
_MOST_ELEMENTS = 2**40  # per example: TensorFlow counts bytes in 63 bits
_MOST_RANK = 254
_LONGEST = 1_000  # characters
_EXAMPLES = "224x224x3, 128/int32, token_ids=128/int32, or /float32 for one number per example"


class GivenInput(NamedTuple):
    """One parsed `--input` option.

    Attributes:
        name: Name of the input; None if not given.
        shape: Shape without the batch axis; empty for a scalar per example, or if only the dtype
            was given.
        dtype: Element type; None if not given.
        text: The option's original text.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: Any
    text: str


def parse_input(text: str) -> GivenInput:
    """Parses `[name=]shape[/dtype]`."""
    match = _INPUT.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None or not text.strip():
        raise PlanError(
            f"--input: received {shown(text)}; expected [name=]shape[/dtype] of one example, "
            f"without the batch: {_EXAMPLES}."
        )
    dtype = None
    if match["dtype"]:
        dtype = _dtype(match["dtype"])
        if dtype is None:
            raise PlanError(
                f"--input: received {shown(text)}, but {shown(match['dtype'])} is no element "
                "type; use float32, int32, bool, string or another of TensorFlow's names."
            )
    shape = tuple(int(size) for size in re.split("[x,]", match["shape"])) if match["shape"] else ()
    if len(shape) > _MOST_RANK or not 0 < math.prod(shape) <= _MOST_ELEMENTS:
        raise PlanError(
            f"--input: received {shown(text)}, but an example has from 1 to {_MOST_ELEMENTS} "
            f"elements in up to {_MOST_RANK} dimensions."
        )
    return GivenInput(match["name"], shape, dtype, text)


def _dtype(name: str) -> Any | None:
    """The dtype of this name; None if there is none or inputs cannot have it."""
    try:
        dtype = tf.as_dtype(name)
    except TypeError:
        return None
    # Reference dtypes are for TensorFlow 1 graphs; resource and variant tensors hold no data.
    return None if name.endswith("_ref") or dtype in (tf.resource, tf.variant) else dtype


def input_specs(symbolic: Any | None, given: Sequence[GivenInput], microbatch: int) -> Any:
    """Builds the nest of `tf.TensorSpec`s to call a model with one microbatch.

    The user's `given` inputs fill in what the model's own `symbolic` ones, if any, leave unknown.
    """
    if symbolic is None:
        return _from_given(given, microbatch)
    leaves = tf.nest.flatten(symbolic)
    chosen, faults = _matched(leaves, given)
    specs = []
    for leaf, match in zip(leaves, chosen, strict=True):
        shape = tuple(leaf.shape[1:])
        if match is not None:
            fault = _contradiction(leaf, match)
            if fault:
                faults.append(fault)
                continue
            shape = match.shape or shape
        if None in shape:
            faults.append(
                f"'{leaf.name}' has the shape {tuple(leaf.shape)}: say what is unknown besides "
                f"the batch, such as --input {leaf.name}={_example(shape)}"
            )
            continue
        dtype = match.dtype if match is not None and match.dtype is not None else leaf.dtype
        specs.append(tf.TensorSpec((microbatch, *shape), dtype))
    if faults:
        raise PlanError(f"The inputs of the model: {sentence(faults)}")
    return tf.nest.pack_sequence_as(symbolic, specs)


def _from_given(given: Sequence[GivenInput], microbatch: int) -> Any:
    if not given:
        raise PlanError(
            "The model does not know the shape of its inputs before it is called. Say what one "
            f"example looks like: --input shape/dtype, such as {_EXAMPLES}; several for several "
            "inputs."
        )
    specs = [tf.TensorSpec((microbatch, *g.shape), g.dtype or tf.float32) for g in given]
    names = [g.name for g in given if g.name is not None]
    if not names:
        return specs[0] if len(specs) == 1 else specs
    if len(names) < len(given) or len(set(names)) < len(names):
        raise PlanError(
            "--input: give all inputs a name of their own, or none; received "
            f"{', '.join(g.text for g in given)}."
        )
    return dict(zip(names, specs, strict=True))


def _matched(
    leaves: Sequence[Any], given: Sequence[GivenInput]
) -> tuple[list[GivenInput | None], list[str]]:
    """Assigns `--input` options to the model's inputs, first by name, then in order."""
    names = [leaf.name for leaf in leaves]
    faults = [
        f"--input {g.text}: there is no input '{g.name}', only {', '.join(map(repr, names))}"
        for g in given
        if g.name is not None and g.name not in names
    ]
    by_name = {g.name: g for g in given if g.name is not None}
    in_order = iter([g for g in given if g.name is None])
    chosen = [by_name.get(name) or next(in_order, None) for name in names]
    left = list(in_order)
    if left:
        faults.append(
            f"{len(given)} were given with --input, the model has {len(leaves)}: "
            f"{', '.join(map(repr, names))}"
        )
    return chosen, faults


def _contradiction(leaf: Any, given: GivenInput) -> str:
    known = tuple(leaf.shape[1:])
    if given.shape and (
        len(given.shape) != len(known)
        or any(k not in (None, g) for k, g in zip(known, given.shape, strict=True))
    ):
        return f"--input {given.text} contradicts the shape of '{leaf.name}', {tuple(leaf.shape)}"
    return ""


def _example(shape: Sequence[int | None]) -> str:
    return "x".join("128" if size is None else str(size) for size in shape)
