"""Exceptions raised by opensmp; all derive from `SmpError`."""

from __future__ import annotations


class SmpError(Exception):
    """Base class of all exceptions that opensmp raises deliberately."""

    # AutoGraph replaces an exception that leaves a converted function with one of its own type that
    # lists source lines. It passes exceptions with this attribute through unchanged.
    ag_pass_through = True

    exit_code = 1
    """Exit code of a command of `opensmp` that ends with this error."""


class ConfigError(SmpError, ValueError):
    """The configuration given to `smp.init` is invalid; the message lists every fault."""


class NotInitializedError(SmpError, RuntimeError):
    """An operation that needs `smp.init` was used before it was called."""


class AlreadyInitializedError(SmpError, RuntimeError):
    """`smp.init` was called twice, or after TensorFlow had created its devices."""


class PartitionError(SmpError, ValueError):
    """A partition index or an `smp.partition` context is invalid."""


class TraceError(SmpError, RuntimeError):
    """The model cannot be traced as one graph."""


class StepError(SmpError, ValueError):
    """A call of an `smp.step` function, or of a model, is invalid."""


class NonFiniteError(StepError, ArithmeticError):
    """An activation or a gradient in a step is NaN or infinite; see `check_finite`.

    The step leaves the variables of the model unchanged.

    Example:
        ```python
        smp.init({"partitions": 2, "check_finite": True})
        try:
            train_step(images, labels)
        except smp.NonFiniteError as error:
            print(error)  # names layer, variable, partition and microbatch
        ```
    """


class ScheduleError(SmpError, ValueError):
    """A schedule is incomplete, violates a dependency or would deadlock."""


class PlanError(SmpError, ValueError):
    """A plan cannot be created, read or applied to a model."""


class LaunchError(SmpError, RuntimeError):
    """The processes of a run cannot connect, or their settings are inconsistent."""


class CommunicationError(SmpError, RuntimeError):
    """A message between processes cannot be sent or did not arrive."""


class SavingError(SmpError, ValueError):
    """A model cannot be saved to a file or loaded from one."""


class CheckpointError(SmpError, RuntimeError):
    """A checkpoint cannot be written or read, or does not match the objects to restore."""


class ElsewhereError(SmpError, RuntimeError):
    """A value was requested that only another process owns.

    Example:
        ```python
        try:
            print(layer.kernel.numpy())
        except ElsewhereError:
            print("the kernel lives in another process")
        ```
    """
