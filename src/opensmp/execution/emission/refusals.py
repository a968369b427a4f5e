"""Errors for operations that a step does not support."""

from __future__ import annotations

from opensmp import _private
from opensmp.errors import StepError

_NOTHING_TO_RUN = (
    "An smp.step function must call a smp.DistributedModel and return something that depends on "
    "the model's output. "
)
_NO_MODEL = (
    "No DistributedModel was called. Call one in the function and return, for example, the loss; "
    "smp.DistributedModel.from_keras(model) makes one of a Keras model."
)
_UNUSED = "The outputs are not used. Return, for example, the loss."
_FINISHED = (
    "A gradient was asked for through a call of a DistributedModel that was made outside of an "
    "smp.step function, by tf.gradients. Such a call is a forward pass alone. Expected: the call, "
    "and tf.gradients or a tf.GradientTape, in an smp.step function that returns the gradients."
)
_JACOBIAN = (
    "tape.{name} was called through DistributedModel '{model}', whose partitions are in several "
    "processes: TensorFlow computes all rows of a Jacobian by a loop over one, and what is sent "
    "between processes cannot be in it. Expected: one process; or tape.gradient once for each row, "
    "for example an smp.step function with one example per microbatch, whose gradients .stack() "
    "gives."
)


def nothing_to_run(has_calls: bool) -> StepError:
    """Error for a step whose results depend on no model; `has_calls` is whether one was called."""
    return StepError(_NOTHING_TO_RUN + (_UNUSED if has_calls else _NO_MODEL))


def finished() -> StepError:
    """Error for a gradient that is requested after the step's graph is complete."""
    return StepError(_FINISHED)


def called_in_another_graph(model: str) -> StepError:
    """Error for a call of the model with this name in a graph nested in that of the step."""
    return StepError(
        f"Model '{model}' was called inside a loop body, a branch or a nested "
        "tf.function of an smp.step function. A pipeline must see the call: call the "
        "model directly in the smp.step function, loop in Python, and take tf.function "
        "off the step function and its helpers."
    )


def refuse_jacobian(model: str) -> None:
    """Raises StepError inside a tape's Jacobian method; for models that span several processes."""
    _private.refuse_jacobian(lambda name: StepError(_JACOBIAN.format(name=name, model=model)))
