"""The validated configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from opensmp.config import device as device_setting
from opensmp.config import offload as offloading
from opensmp.config.faults import (
    check_all,
    contradictions,
    known_once,
    missing_default_partition,
    raise_all,
)
from opensmp.config.pipelines import DEFAULT_PIPELINE, OwnPipeline
from opensmp.config.recompute import NONE, Setting, as_dict
from opensmp.config.sources import (
    Given,
    from_dict,
    from_explicit,
    from_service,
    from_variables,
)


@dataclass(frozen=True)
class Config:
    """The validated, complete configuration passed to `smp.init`.

    Attributes:
        partitions: Number of partitions of the model.
        microbatches: Number of microbatches per step; it must divide the batch size.
        pipeline: The pipeline schedule: one of `opensmp.config.pipelines.PIPELINES`, or one of your
            own, as the path of a JSON file or as a function of a task graph.
            `"interleaved"` prefers the backward pass of a microbatch as soon as it is ready (1F1B
            in steady state). `"simple"` runs all forward passes, then all backward passes (GPipe).
            `"zero_bubble"` is `"interleaved"` with weight gradients deferred to fill the bubble at
            the end, since no other partition depends on them.
        optimize: What automatic partitioning balances, `"memory"` or `"speed"`. With `"speed"`,
            weight gradients may also be computed for several microbatches at once.
        placement_strategy: Which ranks form one model replica: `"cluster"` (adjacent ranks) or
            `"spread"`.
        auto_partition: Whether to choose partitions automatically; otherwise `smp.partition`
            assigns them.
        default_partition: The partition of operations outside every `smp.partition`.
        contiguous: Whether each partition must be a connected part of the graph.
        horovod: Whether the script is a hybrid script that makes Horovod-style calls.
        active_microbatches: Maximum number of microbatches in flight. None means as few, up to
            `partitions + 2`, as give the same predicted step time within 1 %. Schedules that keep
            all microbatches in flight, such as `"simple"`, accept no fewer than `microbatches`.
        devices: `"cpu"`, `"gpu"`, the logical device of each partition such as
            `("CPU:0", "CPU:1")`, or None for the GPUs if there are any, else the CPU.
        plan: Path of a plan's JSON file to use instead of computing a plan; or, if several models
            are distributed, pairs (model name, path), given as a dict. Models without an entry get
            a computed plan.
        processes_per_replica: Number of processes that hold one replica of the model; it divides
            `partitions` and the number of processes. None means one process per partition if the
            number of processes allows it, else one replica over all processes.
        transport: How to transfer tensors between partitions of different processes. `"auto"` uses
            shared memory on the same machine and TensorFlow collectives between machines;
            `"collective"` always uses TensorFlow collectives.
        pieces_per_partition: Number of pieces (interleaved stages) that automatic partitioning
            gives to each partition, assigned round-robin; always 2, assigned forth and back, if
            `pipeline` is a schedule of a V. More pieces give a smaller bubble and
            more transfers.
        check_finite: Whether each step checks activations and gradients for NaN and infinity, and
            raises `opensmp.NonFiniteError`, which names the first such tensor.
        shard_optimizer_state: Whether each replica keeps the optimizer's slots of a part of the
            weights only, updates these and sends them to the other replicas (stage 1 of ZeRO). It
            has no effect with one replica.
        recompute: Which activations backward passes compute again instead of keeping them:
            `"none"`, `"selective"` (those that are large and cheap), `"full"` (all but the inputs
            of a partition), `"auto"` (as many as the memory limit of the plan asks for), or a dict
            with the keys `"default"`, `"partitions"` (level by partition) and `"layers"` (level by
            name or pattern of layers; it overrides the partitions, and the last match counts).
        offload: What partitions keep elsewhere while they do not need it, in the memory of the
            host or, for partitions on CPUs, in files: `"none"`, `"residuals"` (what forward passes
            keep for backward passes), `"optimizer"` (the state of optimizers), `"all"` (both), or a
            dict of these by partition.
        offload_folder: Existing folder on a disk for these files. They have no names, so that
            nothing is left behind however the process ends.
        wire_dtype: Type in which float32 activations and their gradients travel between processes:
            `"none"` (as they are), `"bfloat16"` or `"float16"`. Both round them.
        device: The device that plans are for, which need not be one of this machine: a name of
            `opensmp.config.device.DEVICES`, or a dict with some of `"memory"` in bytes, `"flops"`
            per second and `"bandwidth"` in bytes per second. Automatic partitioning keeps to its
            memory. None means that nothing is known: no limit, and times of a CPU.

    Raises:
        ConfigError: A value is invalid, or two values contradict each other.

    Example:
        ```python
        config = Config(partitions=2, microbatches=4)
        print(config)  # partitions=2, microbatches=4, pipeline='interleaved', ...
        config.active_microbatches  # None: chosen with the schedule
        ```
    """

    partitions: int
    microbatches: int = 1
    pipeline: OwnPipeline = DEFAULT_PIPELINE
    optimize: str = "memory"
    placement_strategy: str = "cluster"
    auto_partition: bool = True
    default_partition: int = 0
    contiguous: bool = True
    horovod: bool = False
    active_microbatches: int | None = None
    devices: str | tuple[str, ...] | None = None
    plan: str | tuple[tuple[str, str], ...] | None = None
    processes_per_replica: int | None = None
    transport: str = "auto"
    pieces_per_partition: int = 1
    check_finite: bool = False
    shard_optimizer_state: bool = False
    recompute: Setting = NONE
    offload: offloading.Setting = offloading.NONE
    offload_folder: str | None = None
    wire_dtype: str = "none"
    device: device_setting.Setting = None

    _given: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        source = "Config"
        given = {
            field.name: Given(field.name, getattr(self, field.name), source)
            for field in fields(self)
        }
        values, faults = check_all(given.values())
        faults += contradictions({key: given[key]._replace(value=values[key]) for key in values})
        raise_all(faults)
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @classmethod
    def resolve(
        cls,
        explicit: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        tried: Mapping[str, Any] | None = None,
        flags: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        default_partitions: int = 1,
    ) -> Config:
        """Merges all sources into one configuration.

        The sources in descending precedence are `explicit`, `flags`, the variables
        `OPENSMP_<KEY>`, and the JSON object in `SM_HP_MP_PARAMETERS`. The numbers and booleans in
        that object may be strings, since services pass hyperparameters as text. Overridden values
        must be valid as well.

        Args:
            explicit: The dict given to `smp.init`, or the path of a JSON file with one.
            tried: Values that `opensmp tune` tries in place of all others.
            flags: Values of a launcher's flags; None means that the flag was not given.
            environ: The environment, such as `os.environ`; None means an empty one.
            default_partitions: Number of partitions if neither a source nor `devices` determines
                it.

        Returns:
            The configuration.

        Raises:
            ConfigError: The configuration has faults; the message lists all of them.

        Example:
            ```python
            Config.resolve({"partitions": 2}, environ={"OPENSMP_MICROBATCHES": "4"})
            # Config(partitions=2, microbatches=4, ...)
            ```
        """
        faults: list[str] = []
        merged: dict[str, Given] = {}
        broken: set[str] = set()
        layers = (
            from_dict(tried, "opensmp tune", faults),
            from_explicit(explicit, faults),
            from_dict(
                {key: value for key, value in (flags or {}).items() if value is not None},
                "flag",
                faults,
            ),
            from_variables(environ or {}),
            from_service(environ or {}, faults),
        )
        for layer in layers:
            known = known_once(layer, faults)
            values, wrong = check_all(known.values())
            faults += wrong
            broken |= known.keys() - values.keys()
            for key, value in values.items():
                merged.setdefault(key, known[key]._replace(value=value))
        sound = {key: given for key, given in merged.items() if key not in broken}
        if "partitions" not in sound and not broken & {"partitions", "devices"}:
            sound["partitions"] = Given(
                "partitions", _implied_partitions(sound, default_partitions), "default"
            )
        faults += contradictions(sound)
        if "auto_partition" in sound and "default_partition" not in merged.keys() | broken:
            faults += missing_default_partition(sound["auto_partition"])
        raise_all(faults)
        made = cls(**{key: given.value for key, given in sound.items()})
        object.__setattr__(made, "_given", frozenset(merged))
        return made

    @property
    def given(self) -> frozenset[str]:
        """The keys that a source has named; none of a configuration that was made directly."""
        return self._given

    def changed(self, **changes: Any) -> Config:
        """Returns the configuration with other values, which count as given.

        Raises:
            ConfigError: A value is invalid, or contradicts another.
        """
        made = replace(self, **changes)
        object.__setattr__(made, "_given", self._given | changes.keys())
        return made

    def to_dict(self) -> dict[str, Any]:
        """Returns all keys and values in a form that JSON and `smp.init` accept.

        Example:
            ```python
            assert Config.resolve(config.to_dict()) == config
            ```
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.devices, tuple):
            values["devices"] = list(self.devices)
        if isinstance(self.plan, tuple):
            values["plan"] = dict(self.plan)
        values["recompute"] = as_dict(self.recompute)
        values["offload"] = offloading.as_dict(self.offload)
        values["device"] = device_setting.as_dict(self.device)
        return values

    @property
    def plan_paths(self) -> tuple[str, ...]:
        """All plan files."""
        if isinstance(self.plan, tuple):
            return tuple(path for _, path in self.plan)
        return () if self.plan is None else (self.plan,)

    def plan_path(self, model: str) -> str | None:
        """Returns the plan file for the model named `model`; None if its plan is to be computed."""
        return dict(self.plan).get(model) if isinstance(self.plan, tuple) else self.plan

    def __str__(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.to_dict().items())


def _implied_partitions(given: Mapping[str, Given], default_partitions: int) -> int:
    devices = given["devices"].value if "devices" in given else None
    if isinstance(devices, tuple):
        return len(devices)
    return 1 if devices == "cpu" else default_partitions
