"""All cases."""

from __future__ import annotations

from parity.cases import (
    attention,
    control_flow,
    convolution,
    dense,
    gradients,
    inputs,
    keras_models,
    recurrent,
    state,
    steps,
)

CASES = (
    *dense.CASES,
    *convolution.CASES,
    *attention.CASES,
    *recurrent.CASES,
    *control_flow.CASES,
    *inputs.CASES,
    *state.CASES,
    *keras_models.CASES,
    *steps.CASES,
    *gradients.CASES,
)
