"""The exceptions that opensmp raises, all below one base class."""

from __future__ import annotations


class SmpError(Exception):
    """Base class of every error that opensmp raises on purpose."""

    # AutoGraph replaces an exception that leaves a converted function by one of its own
    # type, with the source lines in its message; those that carry this mark it lets through.
    ag_pass_through = True


class ConfigError(SmpError, ValueError):
    """The configuration given to `smp.init` has one or more faults."""


class NotInitializedError(SmpError, RuntimeError):
    """Something was used before `smp.init`."""


class AlreadyInitializedError(SmpError, RuntimeError):
    """`smp.init` was called a second time, or too late."""


class PartitionError(SmpError, ValueError):
    """A partition index or an `smp.partition` context is not possible."""


class TraceError(SmpError, RuntimeError):
    """The model does something that cannot be captured as one graph."""


class StepError(SmpError, ValueError):
    """A call of an `smp.step` function, or of a model, is not possible."""


class NonFiniteError(StepError, ArithmeticError):
    """An activation or a gradient of a step is nan or infinite; see `check_finite`.

    The run of the step has not changed the variables of the model.

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
    """A schedule is incomplete, breaks a dependency or would deadlock."""


class PlanError(SmpError, ValueError):
    """A plan cannot be made, read, or applied to a model."""


class LaunchError(SmpError, RuntimeError):
    """The processes of a run cannot find each other, or do not fit together."""


class CommunicationError(SmpError, RuntimeError):
    """A message between processes is not possible, or did not arrive."""


class SavingError(SmpError, ValueError):
    """A model cannot be written to a file, or read from one."""


class CheckpointError(SmpError, RuntimeError):
    """A checkpoint cannot be written, read, or does not fit the objects to restore."""


class ElsewhereError(SmpError, RuntimeError):
    """Something was asked of this process that only another process has.

    Example:
        ```python
        try:
            print(layer.kernel.numpy())
        except ElsewhereError:
            print("the kernel lives in another process")
        ```
    """
