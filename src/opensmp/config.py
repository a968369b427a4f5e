"""The configuration: its keys, where their values come from, and what is wrong with them.

A value comes from the dict given to `smp.init`, from a launcher's flags or from the
environment, in this order of precedence. Every fault of every source is collected first
and reported in one `ConfigError`, so that nobody has to mend a configuration one run at a
time.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, NamedTuple, Protocol

from opensmp.errors import ConfigError

ENVIRONMENT_PREFIX = "OPENSMP_"
"""`OPENSMP_PARTITIONS=2` sets the key `partitions`; an empty value counts as not set."""

LAUNCHER_PREFIX = "OPENSMP_RUN_"
"""Variables that the launcher sets for itself; they are no keys."""

IDLE_VARIABLE = "OPENSMP_IDLE_SECONDS"
"""How long a run of several processes may compute nothing; it is no key."""

SERVICE_VARIABLE = "SM_HP_MP_PARAMETERS"
"""The variable in which training services hand over all keys as one JSON object."""

ALIASES: Mapping[str, str] = {"pipeline_parallel_degree": "partitions"}
"""Second names of keys."""

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_DEVICE_NAME = re.compile(r"(?:/?device:)?(CPU|GPU):(\d+)", re.IGNORECASE)


# ------------------------------------------------------------------------- kinds of value


class _Kind(Protocol):
    """What a key accepts. Both methods raise `ValueError`, with a hint or empty."""

    @property
    def accepted(self) -> str:
        """What is accepted, in words."""

    def check(self, value: Any) -> Any:
        """The value in its canonical form."""

    def read(self, text: str) -> Any:
        """The value that a text of the environment stands for, still to be checked."""


class _IntegerKind(NamedTuple):
    minimum: int
    accepted: str

    def check(self, value: Any) -> int:
        # bool is an int to Python; NumPy's integers are not, but are meant as such.
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError
        if value < self.minimum:
            raise ValueError
        return int(value)

    def read(self, text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text.strip()):
            raise ValueError
        return int(text)


class _OptionalIntegerKind(NamedTuple):
    integer: _IntegerKind

    @property
    def accepted(self) -> str:
        return f"{self.integer.accepted}, or None to choose automatically"

    def check(self, value: Any) -> int | None:
        return None if value is None else self.integer.check(value)

    def read(self, text: str) -> int:
        return self.integer.read(text)


class _BooleanKind(NamedTuple):
    accepted: str = "True or False"

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def read(self, text: str) -> bool:
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError
        return word in _TRUE


class _ChoiceKind(NamedTuple):
    choices: tuple[str, ...]

    @property
    def accepted(self) -> str:
        *others, last = map(repr, self.choices)
        return f"{', '.join(others)} or {last}"

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        if value not in self.choices:
            raise ValueError(_did_you_mean(value, self.choices))
        return value

    def read(self, text: str) -> str:
        return text.strip()


class _DevicesKind(NamedTuple):
    accepted: str = (
        "'cpu', 'gpu', a list of different logical devices such as ['CPU:0', 'CPU:1'], "
        "or None to choose automatically"
    )

    def check(self, value: Any) -> str | tuple[str, ...] | None:
        if value is None:
            return None
        if isinstance(value, str):
            if value.lower() not in ("cpu", "gpu"):
                raise ValueError
            return value.lower()
        if not isinstance(value, Sequence) or not value:
            raise ValueError
        names = tuple(_device_name(item) for item in value)
        if len(set(names)) < len(names):
            raise ValueError("a device cannot hold two partitions")
        return names

    def read(self, text: str) -> str | list[str]:
        word = text.strip()
        if word.lower() in ("cpu", "gpu"):
            return word
        return [item.strip() for item in word.split(",")]


class _PlanKind(NamedTuple):
    accepted: str = (
        "the path of a plan's JSON file, a dict of such paths by the name of the model, or None"
    )

    def check(self, value: Any) -> str | tuple[tuple[str, str], ...] | None:
        if value is None:
            return None
        if isinstance(value, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in value):
            value = dict(value)
        if not isinstance(value, Mapping):
            return _path(value)
        if not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError("name the models")
        # As sorted pairs, so that the configuration stays hashable.
        return tuple(sorted((name, _path(path)) for name, path in value.items()))

    def read(self, text: str) -> Any:
        word = text.strip()
        if not word.startswith("{"):
            return word
        try:
            return json.loads(word)
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON ({error.msg})") from None


def _path(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError
    path = os.fspath(value)
    if not isinstance(path, str) or not path.strip():
        raise ValueError
    return path


_KINDS: Mapping[str, _Kind] = {
    "partitions": _IntegerKind(1, "an integer >= 1"),
    "microbatches": _IntegerKind(1, "an integer >= 1"),
    "pipeline": _ChoiceKind(("interleaved", "simple", "zero_bubble")),
    "optimize": _ChoiceKind(("memory", "speed")),
    "placement_strategy": _ChoiceKind(("cluster", "spread")),
    "auto_partition": _BooleanKind(),
    "default_partition": _IntegerKind(0, "an integer >= 0 and below partitions"),
    "contiguous": _BooleanKind(),
    "horovod": _BooleanKind(),
    "active_microbatches": _IntegerKind(1, "an integer >= 1"),
    "devices": _DevicesKind(),
    "plan": _PlanKind(),
    "processes_per_replica": _OptionalIntegerKind(_IntegerKind(1, "an integer >= 1")),
    "transport": _ChoiceKind(("auto", "collective")),
    "pieces_per_partition": _IntegerKind(1, "an integer >= 1"),
}


# ------------------------------------------------------------------------------- the value


@dataclass(frozen=True)
class Config:
    """What `smp.init` was asked for, complete and free of contradictions.

    Attributes:
        partitions: Number of partitions of the model.
        microbatches: Microbatches per step; the batch must be divisible by it.
        pipeline: `"interleaved"`: the backward pass of a microbatch goes first whenever it
            can (1F1B in steady state); `"simple"`: all forward passes, then all backward
            passes (GPipe); `"zero_bubble"`: as `"interleaved"`, and the gradients of weights,
            for which nobody waits, are computed when there is nothing else to do.
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

    def __post_init__(self) -> None:
        source = "Config"
        given = {
            field.name: _Given(field.name, getattr(self, field.name), source)
            for field in fields(self)
            if not (field.name == "active_microbatches" and self.active_microbatches == 0)
        }
        values, faults = _check_all(given.values())
        faults += _contradictions({key: given[key]._replace(value=values[key]) for key in values})
        _raise(faults)
        if "active_microbatches" not in values:
            values["active_microbatches"] = _default_active_microbatches(**values)
        for key, value in values.items():
            object.__setattr__(self, key, value)

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
        merged: dict[str, _Given] = {}
        broken: set[str] = set()
        layers = (
            _from_dict(explicit, "smp.init dict", faults),
            _from_dict(
                {key: value for key, value in (flags or {}).items() if value is not None},
                "flag",
                faults,
            ),
            _from_variables(environ or {}),
            _from_service(environ or {}, faults),
        )
        for layer in layers:
            known = _known_once(layer, faults)
            values, wrong = _check_all(known.values())
            faults += wrong
            broken |= known.keys() - values.keys()
            for key, value in values.items():
                merged.setdefault(key, known[key]._replace(value=value))
        sound = {key: given for key, given in merged.items() if key not in broken}
        if "partitions" not in sound and not broken & {"partitions", "devices"}:
            sound["partitions"] = _Given(
                "partitions", _implied_partitions(sound, default_partitions), "default"
            )
        faults += _contradictions(sound)
        if "auto_partition" in sound and "default_partition" not in merged.keys() | broken:
            faults += _missing_default_partition(sound["auto_partition"])
        _raise(faults)
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


# --------------------------------------------------------------------------------- sources


class _Given(NamedTuple):
    """A value as one source gave it. `text` marks one that still has to be read."""

    name: str  # as the source spelled it, perhaps an alias
    value: Any
    source: str
    text: bool = False

    @property
    def key(self) -> str:
        return ALIASES.get(self.name, self.name)

    def __str__(self) -> str:
        return f"{self.name} ({self.source}): received {_shown(self.value)}"


def _from_dict(values: Any, source: str, faults: list[str]) -> list[_Given]:
    if values is None:
        return []
    if not isinstance(values, Mapping):
        faults.append(
            f"{source}: received {_shown(values)}; accepted: a dict such as "
            '{"partitions": 2, "microbatches": 4}'
        )
        return []
    return [_Given(name, value, source) for name, value in values.items()]


def _from_variables(environ: Mapping[str, str]) -> list[_Given]:
    return [
        _Given(variable[len(ENVIRONMENT_PREFIX) :].lower(), text, variable, text=True)
        for variable, text in sorted(environ.items())
        if variable.startswith(ENVIRONMENT_PREFIX)
        and not variable.startswith(LAUNCHER_PREFIX)
        and variable != IDLE_VARIABLE
        and text.strip()
    ]


def _from_service(environ: Mapping[str, str], faults: list[str]) -> list[_Given]:
    text = environ.get(SERVICE_VARIABLE, "")
    if not text.strip():
        return []
    accepted = 'a JSON object such as {"partitions": 2, "microbatches": 4}'
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        faults.append(
            f"{SERVICE_VARIABLE}: received {_shown(text)}, which is not JSON "
            f"({error.msg} at character {error.pos}); accepted: {accepted}"
        )
        return []
    if not isinstance(values, dict):
        faults.append(f"{SERVICE_VARIABLE}: received {_shown(values)}; accepted: {accepted}")
        return []
    return [
        _Given(name, value, SERVICE_VARIABLE, text=isinstance(value, str))
        for name, value in values.items()
    ]


# ---------------------------------------------------------------------------------- faults


def _known_once(layer: Iterable[_Given], faults: list[str]) -> dict[str, _Given]:
    """The known keys of one source by canonical name; a key said twice must agree."""
    known: dict[str, _Given] = {}
    for given in layer:
        if given.key not in _KINDS:
            names = [*_KINDS, *ALIASES]
            hint = _did_you_mean(given.name, names) or f"known keys: {', '.join(names)}"
            faults.append(f"{given}; this key is unknown; {hint}")
        elif given.key in known and known[given.key].value != given.value:
            other = known[given.key]
            faults.append(
                f"{given}, but {other.name} ({other.source}) is {_shown(other.value)}; both name "
                f"the number of partitions; accepted: one of them, or the same value"
            )
        else:
            known[given.key] = given
    return known


def _check_all(layer: Iterable[_Given]) -> tuple[dict[str, Any], list[str]]:
    """Canonical values of the sound keys, and the faults of the others."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    for given in layer:
        kind = _KINDS[given.key]
        try:
            value = kind.read(given.value) if given.text else given.value
            values[given.key] = kind.check(value)
        except ValueError as error:
            hint = f"; {error}" if str(error) else ""
            faults.append(f"{given}; accepted: {kind.accepted}{hint}")
    return values, faults


def _contradictions(given: Mapping[str, _Given]) -> list[str]:
    """Faults between keys that are sound one by one; keys that are missing are left out."""
    faults: list[str] = []
    partitions = given.get("partitions")
    default = given.get("default_partition")
    devices = given.get("devices")
    if partitions and default and default.value >= partitions.value:
        faults.append(
            f"{default}, but partitions is {partitions.value}; accepted: an integer from 0 to "
            f"{partitions.value - 1}"
        )
    if partitions and devices and isinstance(devices.value, tuple):
        count = len(devices.value)
        if count != partitions.value:
            faults.append(
                f"{devices}, which names {count} device{'s' * (count != 1)}, but partitions is "
                f"{partitions.value}; accepted: one device per partition"
            )
    processes = given.get("processes_per_replica")
    if partitions and processes and processes.value and partitions.value % processes.value:
        divisors = [n for n in range(1, partitions.value + 1) if partitions.value % n == 0]
        faults.append(
            f"{processes}, but partitions is {partitions.value}, and every process owns the same "
            f"number of them; accepted: {', '.join(map(str, divisors))}"
        )
    plan = given.get("plan")
    auto = given.get("auto_partition")
    if plan and plan.value is not None and auto and not auto.value:
        faults.append(
            f"{plan}, but auto_partition is False; a plan says where everything goes, so that "
            "smp.partition has nothing to say; accepted: a plan with auto_partition True, or no "
            "plan"
        )
    active = given.get("active_microbatches")
    pipeline = given.get("pipeline")
    microbatches = given.get("microbatches")
    if (
        active
        and pipeline
        and microbatches
        and pipeline.value == "simple"
        and active.value < microbatches.value
    ):
        faults.append(
            f"{active}, but pipeline is 'simple', which keeps all {microbatches.value} "
            f"microbatches in flight; accepted: {microbatches.value} or more, no "
            "active_microbatches at all, or pipeline 'interleaved'"
        )
    return faults


def _missing_default_partition(auto_partition: _Given) -> list[str]:
    if auto_partition.value:
        return []
    return [
        f"default_partition: not given, but auto_partition is False ({auto_partition.source}); "
        "then it must say which partition takes the operations outside every smp.partition; "
        'accepted: an integer >= 0 and below partitions, such as "default_partition": 0'
    ]


def _raise(faults: Sequence[str]) -> None:
    if not faults:
        return
    count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
    lines = [f"  {number}. {fault}" for number, fault in enumerate(faults, start=1)]
    raise ConfigError("\n".join([f"Config: the configuration has {count}.", *lines]))


# --------------------------------------------------------------------------------- helpers


def _implied_partitions(given: Mapping[str, _Given], default_partitions: int) -> int:
    devices = given["devices"].value if "devices" in given else None
    if isinstance(devices, tuple):
        return len(devices)
    return 1 if devices == "cpu" else default_partitions


def _default_active_microbatches(
    partitions: int, microbatches: int, pipeline: str, **_: Any
) -> int:
    limit = partitions + 2
    return max(limit, microbatches) if pipeline == "simple" else limit


def _device_name(item: Any) -> str:
    match = _DEVICE_NAME.fullmatch(item.strip()) if isinstance(item, str) else None
    if match is None:
        raise ValueError(f"{item!r} is not a logical device")
    return f"{match[1].upper()}:{int(match[2])}"


def _did_you_mean(name: Any, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(str(name).lower(), known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
