"""The configuration, complete and free of contradictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from opensmp.config.faults import (
    check_all,
    contradictions,
    known_once,
    missing_default_partition,
    raise_all,
)
from opensmp.config.sources import Given, from_dict, from_service, from_variables


@dataclass(frozen=True)
class Config:
    """What `smp.init` was asked for, complete and free of contradictions.

    Attributes:
        partitions: Number of partitions of the model.
        microbatches: Microbatches per step; the batch must be divisible by it.
        pipeline: `"interleaved"`: the backward pass of a microbatch goes first whenever it
            can (1F1B in steady state); `"simple"`: all forward passes, then all backward
            passes (GPipe); `"zero_bubble"`: as `"interleaved"`, and the gradients of weights,
            for which nobody waits, fill the bubble at the end.
        optimize: What automatic partitioning balances, `"memory"` or `"speed"`. With `"speed"`
            gradients of weights may also be computed for several microbatches at once.
        placement_strategy: Which ranks form one model replica, `"cluster"` (neighbours) or
            `"spread"`.
        auto_partition: Whether partitions are chosen automatically; otherwise by
            `smp.partition`.
        default_partition: Where operations outside every `smp.partition` go.
        contiguous: Whether partitions must be connected pieces of the graph.
        horovod: Whether the script is a hybrid one that makes Horovod-style calls.
        active_microbatches: Most microbatches in flight. The default is `partitions + 2`;
            the pipeline `"simple"` holds all microbatches, so there it is at least
            `microbatches`.
        devices: `"cpu"`, `"gpu"`, the logical device of each partition such as
            `("CPU:0", "CPU:1")`, or None: the GPUs if there are any, else the CPU.
        plan: Path of a plan's JSON file, to be used instead of a new plan; or pairs (name of
            a model, path) where several models are distributed, given as a dict. Models that
            are not named get a new plan.
        processes_per_replica: Number of processes that hold one replica of the model; it
            divides `partitions` and the number of processes. None: one process per partition
            if the number of processes allows it, else one replica over all processes.
        transport: How tensors travel between partitions of different processes: `"auto"`,
            through shared memory on the same machine and by TensorFlow's collectives between
            machines; `"collective"`, always by the latter.
        pieces_per_partition: Into how many pieces automatic partitioning cuts the model for
            each partition, which the partitions take by turns (interleaved stages): more of
            them make a smaller bubble and more transfers.
        check_finite: Whether each step looks for activations and gradients that are nan or
            infinite, and raises `opensmp.NonFiniteError`, which names the first one.

    Raises:
        ConfigError: A value is not accepted, or two contradict each other.

    Example:
        ```python
        config = Config(partitions=2, microbatches=4)
        print(config)  # partitions=2, microbatches=4, pipeline='interleaved', ...
        config.active_microbatches  # 4
        ```
    """

    partitions: int
    microbatches: int = 1
    pipeline: str = "interleaved"
    optimize: str = "memory"
    placement_strategy: str = "cluster"
    auto_partition: bool = True
    default_partition: int = 0
    contiguous: bool = True
    horovod: bool = False
    active_microbatches: int = 0  # 0 stands for the default, which needs other keys
    devices: str | tuple[str, ...] | None = None
    plan: str | tuple[tuple[str, str], ...] | None = None
    processes_per_replica: int | None = None
    transport: str = "auto"
    pieces_per_partition: int = 1
    check_finite: bool = False

    def __post_init__(self) -> None:
        source = "Config"
        given = {
            field.name: Given(field.name, getattr(self, field.name), source)
            for field in fields(self)
            if not (field.name == "active_microbatches" and self._leaves_active_open())
        }
        values, faults = check_all(given.values())
        faults += contradictions({key: given[key]._replace(value=values[key]) for key in values})
        raise_all(faults)
        if "active_microbatches" not in values:
            values["active_microbatches"] = _default_active_microbatches(**values)
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def _leaves_active_open(self) -> bool:
        active = self.active_microbatches  # of any type so far
        return isinstance(active, int) and not isinstance(active, bool) and active == 0

    @classmethod
    def resolve(
        cls,
        explicit: Mapping[str, Any] | None = None,
        *,
        flags: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        default_partitions: int = 1,
    ) -> Config:
        """Merges all sources into one configuration.

        A key is taken from `explicit`; if it is not there, from `flags`; if not there, from
        the variable `OPENSMP_<KEY>`; if not there, from the JSON object in
        `SM_HP_MP_PARAMETERS`, whose numbers and booleans may be strings, since services
        pass hyperparameters as text. Values that are overridden must be right as well.

        Args:
            explicit: The dict given to `smp.init`.
            flags: Values of a launcher's flags; None stands for a flag that was not given.
            environ: The environment, such as `os.environ`; nothing is read when None.
            default_partitions: Number of partitions when no source says it and `devices`
                leaves it open.

        Returns:
            The configuration.

        Raises:
            ConfigError: One or more faults, all of them listed.

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
            from_dict(explicit, "smp.init dict", faults),
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
        return cls(**{key: given.value for key, given in sound.items()})

    def to_dict(self) -> dict[str, Any]:
        """All keys and values, fit for JSON and for `smp.init`.

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
        return values

    def plan_path(self, model: str) -> str | None:
        """The file of a model's plan; None if a new plan is wanted.

        Args:
            model: Name of the model.
        """
        return dict(self.plan).get(model) if isinstance(self.plan, tuple) else self.plan

    def __str__(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.to_dict().items())


def _implied_partitions(given: Mapping[str, Given], default_partitions: int) -> int:
    devices = given["devices"].value if "devices" in given else None
    if isinstance(devices, tuple):
        return len(devices)
    return 1 if devices == "cpu" else default_partitions


def _default_active_microbatches(
    partitions: int, microbatches: int, pipeline: str, **_: Any
) -> int:
    limit = partitions + 2
    return max(limit, microbatches) if pipeline == "simple" else limit
