"""Validation of configuration values, individually and against each other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opensmp.base.divisors import nearest_divisors
from opensmp.base.message_text import did_you_mean, numbered
from opensmp.config import offload, recompute
from opensmp.config.foreign_keys import FOREIGN_KEYS, is_neutral
from opensmp.config.foreign_keys import fault as foreign_fault
from opensmp.config.keys import KEYS
from opensmp.config.pipelines import DEFAULT_PIPELINE, row_of
from opensmp.config.sources import ALIASES, Given, shown
from opensmp.errors import ConfigError

_MOST_DIVISORS = 12

_logger = logging.getLogger("opensmp")


def known_once(layer: Iterable[Given], faults: list[str]) -> dict[str, Given]:
    """Returns one source's keys by canonical name; unknown and conflicting ones go to `faults`."""
    known: dict[str, Given] = {}
    names = [*KEYS, *ALIASES]
    listed = f"known keys: {', '.join(names)}"
    for given in layer:
        if given.key in FOREIGN_KEYS:
            if is_neutral(given.key, given.value):
                _logger.info("%s; this key changes nothing here", given)
            else:
                faults.append(f"{given}; {foreign_fault(given.key)}")
        elif given.key not in KEYS:
            hint = did_you_mean(given.name, names, faults) or listed
            listed = "known keys: see above" if hint == listed else listed  # they are many
            faults.append(f"{given}; this key is unknown; {hint}")
        elif given.key in known and not _same(known[given.key].value, given.value):
            other = known[given.key]
            faults.append(
                f"{given}, but {other.name} ({other.source}) is {shown(other.value)}; both name "
                f"the number of partitions; accepted: one of them, or the same value"
            )
        else:
            known[given.key] = given
    return known


def _same(one: Any, other: Any) -> bool:
    """Compares two unvalidated values of any type; an error in the comparison means unequal."""
    try:
        return bool(one == other)
    except Exception:
        return False


def check_all(layer: Iterable[Given]) -> tuple[dict[str, Any], list[str]]:
    """Returns the canonical values of the valid keys, and the faults of the others."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    for given in layer:
        kind = KEYS[given.key].kind
        try:
            value = kind.read(given.value) if given.text else given.value
            values[given.key] = kind.check(value)
        except ValueError as error:
            hint = f"; {error}" if str(error) else ""
            faults.append(f"{given}; accepted: {kind.accepted}{hint}")
    return values, faults


def contradictions(given: Mapping[str, Given]) -> list[str]:
    """Returns the faults between individually valid keys; checks that lack a key are skipped."""
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
    for module in (recompute, offload):
        setting = given.get(module.__name__.rpartition(".")[2])
        if not partitions or not setting:
            continue
        beyond = [p for p in module.partitions_of(setting.value) if p >= partitions.value]
        if beyond:
            written = setting._replace(value=module.as_dict(setting.value))
            faults.append(
                f"{written}, which names partition {beyond[0]}, but partitions is "
                f"{partitions.value}; accepted: partitions from 0 to {partitions.value - 1}"
            )
    processes = given.get("processes_per_replica")
    if partitions and processes and processes.value and partitions.value % processes.value:
        accepted = nearest_divisors(partitions.value, processes.value, _MOST_DIVISORS)
        faults.append(
            f"{processes}, but partitions is {partitions.value}, and every process owns the same "
            f"number of them; accepted: {', '.join(map(str, accepted))}"
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
        and active.value is not None
        and pipeline
        and microbatches
        and row_of(pipeline.value).holds_all
        and active.value < microbatches.value
    ):
        faults.append(
            f"{active}, but pipeline is {pipeline.value!r}, which keeps all {microbatches.value} "
            f"microbatches in flight; accepted: {microbatches.value} or more, no "
            f"active_microbatches at all, or pipeline {DEFAULT_PIPELINE!r}"
        )
    pieces = given.get("pieces_per_partition")
    if pieces and pipeline:
        wanted = row_of(pipeline.value).pieces
        # The default, 1, stands for what the schedule is for.
        if wanted is not None and pieces.value not in (1, wanted):
            faults.append(
                f"{pieces}, but pipeline is {pipeline.value!r}, which is for {wanted} "
                f"piece{'s' * (wanted != 1)} a partition; accepted: {wanted}, no "
                f"pieces_per_partition at all, or pipeline {DEFAULT_PIPELINE!r}"
            )
    return faults


def missing_default_partition(auto_partition: Given) -> list[str]:
    """Returns the fault that `default_partition` is missing though partitioning is manual."""
    if auto_partition.value:
        return []
    return [
        f"default_partition: not given, but auto_partition is False ({auto_partition.source}); "
        "then it must say which partition takes the operations outside every smp.partition; "
        'accepted: an integer >= 0 and below partitions, such as "default_partition": 0'
    ]


def raise_all(faults: Sequence[str]) -> None:
    """Raises one `ConfigError` that lists all faults, if there are any."""
    if not faults:
        return
    count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise ConfigError("\n".join([f"Config: the configuration has {count}.", *numbered(faults)]))
