"""`smp.init` and `smp.shutdown`: set up and tear down the current world."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.base import progress
from opensmp.base.message_text import shown
from opensmp.base.strict_json import JsonFault, parse_json
from opensmp.compiler.plan.methods.match import check_partitions
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.schedule.own_schedule import check_file
from opensmp.config import LAUNCHER_PREFIX, Config
from opensmp.config.pipelines import pipeline_name
from opensmp.distributed import devices, world
from opensmp.distributed.collectives import clipping
from opensmp.distributed.collectives.objects import allgather_objects
from opensmp.distributed.collectives.updates import updates_of
from opensmp.distributed.launch import cluster, horovod_finder, init_markers, launchers
from opensmp.distributed.launch.launch import Launch
from opensmp.distributed.launch.meeting import rendezvous
from opensmp.distributed.transport import shared_sums
from opensmp.distributed.watchdog import (
    call_log,
    exit_hooks,
    monitor,
    preemption,
    recovery,
    root_cause,
)
from opensmp.errors import AlreadyInitializedError, LaunchError
from opensmp.execution.emission import finite_checks
from opensmp.execution.memory.offload_places import check_offload, uses_files
from opensmp.execution.memory.slot_files import SlotKeeper
from opensmp.execution.models import hooks
from opensmp.execution.models.shared_layers import refuse_unwrapped_models
from opensmp.execution.profiling import peak_memory
from opensmp.execution.profiling.tuning import step_times, trial

_logger = logging.getLogger("opensmp")

# Keys that may differ between processes: device types and file paths.
_LOCAL_KEYS = ("devices", "plan", "offload_folder")


def init(config: Mapping[str, Any] | str | os.PathLike[str] | None = None) -> None:
    """Resolves the configuration, creates this process's devices and joins the other processes.

    In a process started by a launcher, such as `opensmp run`, `mpirun` or `torchrun`, it is
    collective: it returns once all processes of the run have called it.

    Call it once, right after the imports and before the first TensorFlow operation, variable or
    layer: the logical CPU devices that partitions run on cannot be created later.

    Each partition is assigned a GPU if there are any, otherwise a logical CPU device
    (`devices="cpu"` forces the latter). `partitions` defaults to the number of GPUs, or to 1
    without GPUs or with several processes. Keys missing from `config` are taken from the launcher's
    flags, then from the environment: `OPENSMP_<KEY>`, then the JSON object in
    `SM_HP_MP_PARAMETERS`.

    Running on GPUs has not been tested yet.

    Args:
        config: Keys and values as listed in `opensmp.config.Config`; all are optional. Or the path
            of a JSON file with them, such as `opensmp tune` writes.

    Raises:
        ConfigError: The configuration is invalid; the message lists all faults, and nothing was
            changed.
        PlanError: A file named by `plan` cannot be read, is damaged, or is for a different number
            of partitions.
        ScheduleError: A schedule's file named by `pipeline` cannot be read, is damaged, or is for a
            different number of partitions.
        AlreadyInitializedError: `init` was called before, or TensorFlow was used before and has too
            few devices.
        LaunchError: The processes of a run cannot connect, or their configurations differ.

    Example:
        ```python
        import opensmp as smp

        smp.init({"partitions": 2, "microbatches": 4})
        ```
    """
    if world.is_initialized():
        first = world.current("smp.init").config
        raise AlreadyInitializedError(
            "smp.init was called a second time. Expected: one call per process. Received first: "
            f"{first}. Remove one of the two calls, or call smp.shutdown() before the second one."
        )
    tried = trial.current(os.environ)
    launch = launchers.detect(os.environ)
    progress.start(launch.rank)
    num_gpus = devices.count_gpus()
    resolved = Config.resolve(
        config,
        tried=None if tried is None else tried.changes,
        flags=_flags(os.environ),
        environ=os.environ,
        default_partitions=(num_gpus or 1) if launch.size == 1 else 1,
    )
    _check_plans(resolved)
    check_file(resolved.pipeline, resolved.partitions)
    made = _alone(resolved, num_gpus) if launch.size == 1 else _together(resolved, num_gpus, launch)
    made = dataclasses.replace(made, resident_bytes=peak_memory.resident_bytes())
    _private.place_updates_with_variables()
    _private.follow_accumulators()
    if launch.size == 1:
        _private.call_functions_by(
            lambda function, work: step_times.call(
                function,
                lambda: root_cause.call(lambda: finite_checks.call(work), again=True),
            )
        )
    refuse_unwrapped_models()
    if resolved.horovod:
        horovod_finder.install()
    _private.clip_with(clipping.clipping(made.mp_group))
    _private.agree_on_finite_with(clipping.agreement_on_finite(made.mp_group))
    _private.shard_with(updates_of(made))
    _private.keep_slots_with(SlotKeeper.of(made))
    world.set_current(made)
    step_times.start(tried)
    own = [made.devices[partition] for partition in made.my_partitions]
    progress.say("%s", devices.described(resolved, own, made.size))
    _logger.debug("initialised: %s; partitions on %s", resolved, ", ".join(made.devices))


def _alone(config: Config, num_gpus: int) -> world.World:
    """World of a single process that owns all partitions."""
    assigned = devices.assign(config, num_gpus)
    own = range(config.partitions)
    check_offload(config, assigned, own)
    devices.prepare(assigned, writes=uses_files(config, assigned, own))
    return world.World(config=config, devices=assigned)


def _together(config: Config, num_gpus: int, launch: Launch) -> world.World:
    """World of one of several processes; starts the TensorFlow cluster unless it runs already."""
    launchers.claim(launch, os.environ, os.getpid())
    layout = init_markers.Layout(config.partitions, config.processes_per_replica)
    init_markers.mark(os.environ, launch.rank, layout)
    processes = world.replica_size(launch.size, config.partitions, config.processes_per_replica)
    mp, dp = world.groups(launch.size, processes, config.placement_strategy)
    mp_group = next(group for group in mp if launch.rank in group)
    dp_group = next(group for group in dp if launch.rank in group)
    own = world.owned(config.partitions, processes, mp_group.index(launch.rank))
    members = cluster.joined()
    if members is None:
        members = cluster.meet(launch, _facts(config))
        hosts = [cluster.host_of(peer.machine) for peer in members.meeting.peers]
        channels = members.meeting.channels
        watch = monitor.watch(launch.rank, hosts, channels, launch.idle_seconds)
        preemption.attach(watch, launch.rank, launch.size)
        exit_hooks.install(watch)
        _recover(launch, watch)
        assigned = _prepare(config, num_gpus, own, members)
        restore_sigterm = exit_hooks.keep_sigterm()
        cluster.start(members, nccl=any("GPU" in name for name in assigned))
        restore_sigterm()
        watch.answers = _private.answers
    else:  # the cluster still runs after smp.shutdown
        facts = allgather_objects(_facts(config), range(launch.size), "smp.init")
        difference = rendezvous.disagreement(dict(enumerate(facts)))
        if difference is not None:
            raise LaunchError(
                f"smp.init: the processes do not agree: {difference}. Expected: the same "
                "configuration in every process."
            )
        assigned = _prepare(config, num_gpus, own, members)
    if len(dp_group) > 1:
        shared_sums.connect(members, config.transport != "collective")
    own_devices = [assigned[partition] for partition in own]
    # The same in all ranks: the processes of a replica must lay out a step alike.
    machines = [{members.meeting.peers[rank].machine for rank in group} for group in dp]
    return world.World(
        config=config,
        devices=assigned,
        rank=launch.rank,
        size=launch.size,
        local_rank=members.local_rank,
        local_size=members.local_size,
        mp_group=mp_group,
        dp_group=dp_group,
        one_core_each=devices.have_one_core_each(own_devices),
        nested_calls=devices.nested_calls(own_devices),
        sums_early=len(dp_group) > 1
        and (max(map(len, machines)) > 1 or any("GPU" in device for device in own_devices)),
    )


def _recover(launch: Launch, watch: monitor.Watch) -> None:
    """Installs recovery: ranks can continue after errors that the user's program catches."""
    made = recovery.Recovery(
        launch.rank,
        launch.size,
        watch.tell,
        call_log.waits,
        is_consequence=exit_hooks.is_consequence,
        interrupt=_private.interrupt_collectives,
        renew=_private.renew_collectives,
    )
    watch.hear = made.hear
    recovery.install(made)
    _private.call_functions_by(
        lambda function, work: step_times.call(
            function,
            lambda: made.call(
                function,
                lambda: root_cause.call(lambda: finite_checks.call(work), again=False),
            ),
        )
    )


def _prepare(
    config: Config, num_gpus: int, own: tuple[int, ...], members: cluster.Cluster
) -> tuple[str, ...]:
    """Assigns devices to all partitions and creates those of the partitions this process owns."""
    assigned = devices.assign(config, num_gpus, own, members.local_rank, members.local_size)
    check_offload(config, assigned, own)
    own_devices = [assigned[partition] for partition in own]
    nests, writes = finite_checks.is_wanted(config), uses_files(config, assigned, own)
    devices.prepare(own_devices, members.local_size, nests, writes)
    return assigned


def _facts(config: Config) -> dict[str, Any]:
    """Configuration values and library versions that must be equal in all processes of a run."""
    values = {key: value for key, value in config.to_dict().items() if key not in _LOCAL_KEYS}
    # The orders themselves are compared when a step is traced.
    values["pipeline"] = pipeline_name(config.pipeline)
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
    return {**values, **versions}


def _flags(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Configuration keys passed as flags to the launcher; None if there are none."""
    variable = f"{LAUNCHER_PREFIX}FLAGS"
    text = environ.get(variable, "")
    if not text:
        return None
    try:
        given = parse_json(text)
        if not isinstance(given, dict):
            raise JsonFault("it is no JSON object")
    except JsonFault as error:
        raise LaunchError(
            f"{variable} is what `opensmp run` tells its ranks; it cannot be read: {error}. "
            f"Expected: a JSON object. Received: {shown(text)}. Remove the variable from the "
            "environment, or start the script with `opensmp run`."
        ) from None
    return given


def shutdown() -> None:
    """Discards the configuration, so that `smp.init` can be called again.

    Devices remain: TensorFlow can neither remove them nor create more after it has run an
    operation. The next `smp.init` can therefore use at most as many partitions as there are
    devices. Existing models are partitioned again at their next call; pending post-partition hooks
    are discarded. Without a configuration it does nothing.

    Example:
        ```python
        smp.init({"partitions": 4})
        smp.shutdown()
        smp.init({"partitions": 2, "microbatches": 8})
        ```
    """
    world.clear()
    hooks.clear()


def _check_plans(config: Config) -> None:
    """Loads the plan files named in the configuration, so that faults are raised by `smp.init`."""
    named = dict(config.plan) if isinstance(config.plan, tuple) else {"": config.plan}
    for path in named.values():
        if path is not None:
            check_partitions(Plan.load(path), config.partitions)
