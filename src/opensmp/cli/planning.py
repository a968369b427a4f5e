"""What `opensmp plan` does: partitions a model without running or allocating it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
from rich.console import Console

from opensmp import _private
from opensmp.base.divisors import nearest_divisors
from opensmp.base.message_text import counted, sentence, shown
from opensmp.base.sizes import parse_bytes
from opensmp.cli.models.dry_run import (
    build_model,
    checked_model,
    dry_trace,
    enter_world,
    hide_gpus,
    symbolic_inputs,
)
from opensmp.cli.models.inputs import input_specs, parse_input
from opensmp.cli.models.target import load_target, parse_arguments
from opensmp.cli.options import checking
from opensmp.cli.plan import CARRIED, REFUSED, PlanOptions
from opensmp.compiler.cluster.machine import assumptions, machine_of
from opensmp.compiler.costs.precision import precision_of
from opensmp.compiler.format import format_seconds
from opensmp.compiler.plan.coarsening.coarsen import coarsen
from opensmp.compiler.plan.methods.auto import plan_units
from opensmp.compiler.plan.methods.build import warn_of_empty
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.report.recommendation import Candidate, shortfall
from opensmp.compiler.plan.report.recommendation import recommend as rank_configurations
from opensmp.compiler.plan.report.table import (
    WIDE,
    heading,
    plan_table,
    recommendation_table,
    summary,
)
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.config import Config, offload, recompute
from opensmp.config.device import has_speed
from opensmp.errors import ConfigError, PlanError, SmpError
from opensmp.execution.profiling.calibration import a_device, calibrate, measure

_PICTURES = (".svg", ".png", ".pdf")
_NUM_SHOWN = 12
_MOST_FLOPS = 1e24
_LEAST_ROWS = 2
_NUM_SIMULATED = 8


class Request(NamedTuple):
    """What the options ask for, checked."""

    config: Config
    settings: PlanSettings
    machine: Mapping[str, Any]
    inputs: list[Any]
    arguments: dict[str, Any]

    def for_precision(self, precision: str) -> Request:
        """The request for a model that multiplies in this dtype."""
        machine = replace(machine_of(self.config.device, None, precision), **self.machine)
        return self._replace(settings=replace(self.settings, machine=machine))


def make_plan(options: PlanOptions) -> None:
    """Makes a plan of what the options ask for, prints it and writes the files."""
    with checking():
        request = _checked(options)
    if not options.measure:
        hide_gpus()
    enter_world(request.config)
    model = _model(options.target, request.arguments, options.allocate)
    symbolic = symbolic_inputs(model)
    console = Console(soft_wrap=False)

    @cache
    def traced_for(count: int) -> TracedGraph:
        specs = input_specs(symbolic, request.inputs, options.batch // count)
        return dry_trace(model, specs, training=True)

    if options.measure:
        request = _measured(console, request)
    else:
        count = 1 if options.recommend else request.settings.microbatches
        request = request.for_precision(precision_of(traced_for(count)))

    def graph_of(traced: TracedGraph) -> CoarseGraph:
        graph = coarsen(traced, request.settings.machine)
        if not options.measure:
            return graph
        with console.status(f"running the {counted(len(graph), 'piece')} of the model one by one"):
            return measure(traced, graph, device=a_device())

    partitions, settings = request.config.partitions, request.settings
    best: Candidate | None = None
    if options.recommend:
        best = _recommended(
            console,
            lambda count: graph_of(traced_for(count)),
            options.batch,
            partitions,
            settings,
            _normalising(model),
        )
        partitions, settings = best.num_partitions, best.settings
    traced = traced_for(settings.microbatches)
    result = plan_units(traced, graph_of(traced), partitions, settings)
    warn_of_empty(result)
    _print_and_write(console, result, options, best)


def _checked(options: PlanOptions) -> Request:
    """Validates all options before the model is built; raises one error with all faults."""
    faults: list[str] = []
    machine = _machine(options, faults)
    given = [_read(faults, parse_input, text) for text in options.inputs or ()]
    arguments = _read(faults, parse_arguments, options.arg or ()) or {}
    _check_batch(options, faults)
    faults += _refused(options.flags)
    _check_paths(options, faults)
    config = None
    try:
        config = Config(**{"optimize": "speed" if options.recommend else "memory", **options.flags})
    except ConfigError as error:
        faults += [line.split(". ", 1)[1] for line in str(error).splitlines()[1:]]
    if config is not None and options.measure and has_speed(config.device):
        faults.append(
            "--measure takes measured times in place of those of --device; leave out one of them, "
            'or give only the memory: --device \'{"memory": "16GiB"}\''
        )
    if faults or config is None:
        raise PlanError(f"opensmp plan: {sentence(faults)}")
    settings = replace(
        replace(PlanSettings.of(config), machine=replace(machine_of(config.device), **machine)),
        active_microbatches=options.flags.get("active_microbatches"),
    )
    return Request(config, settings, machine, given, arguments)


def _refused(flags: Mapping[str, Any]) -> list[str]:
    """Faults of keys that have one possible value where a plan is made."""
    return [
        f"{'--no-' if flags[key] is False else '--'}{key.replace('_', '-')}: {why}"
        for key, why in REFUSED.items()
        if key in flags and flags[key] != getattr(Config, key)
    ]


def _check_batch(options: PlanOptions, faults: list[str]) -> None:
    batch, microbatches = options.batch, options.flags["microbatches"]
    if options.recommend:
        if options.flags["pieces_per_partition"] > 1:
            faults.append(
                "--recommend compares plans of one piece per partition; leave out "
                "--pieces-per-partition, or --recommend"
            )
    elif batch % microbatches:
        near = nearest_divisors(batch, microbatches, 2)
        faults.append(
            f"--batch {batch} cannot be divided into --microbatches {microbatches} of "
            f"equal size; choose {' or '.join(map(str, near))} microbatches, or a "
            f"batch of {-(-batch // microbatches) * microbatches}"
        )


def _check_paths(options: PlanOptions, faults: list[str]) -> None:
    output, picture = options.output, options.picture
    if picture is not None and picture.suffix.lower() not in _PICTURES:
        suffixes = ", ".join(_PICTURES)
        faults.append(f"--picture {shown(str(picture))}: the suffix must be one of {suffixes}")
    for option, path in (("--output", output), ("--picture", picture)):
        if path is not None and not os.path.isdir(path.absolute().parent):
            parent = shown(str(path.absolute().parent), 200)
            faults.append(f"{option} {shown(str(path))}: there is no directory {parent}")


def _read(faults: list[str], read: Callable[[Any], Any], given: Any) -> Any | None:
    """Parses an option; returns None and appends to `faults` if it is invalid."""
    try:
        return read(given)
    except SmpError as error:
        faults.append(str(error).removesuffix("."))
        return None


def _machine(options: PlanOptions, faults: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for key, option, text in (
        ("memory_bytes", "--device-memory", options.device_memory),
        ("bytes_per_second", "--device-bandwidth", options.device_bandwidth),
        ("transfer_bytes_per_second", "--link-bandwidth", options.link_bandwidth),
    ):
        size = None if text is None else _read(faults, partial(parse_bytes, what=option), text)
        if size is not None:
            given[key] = size
    flops = options.device_flops
    if options.measure and (flops is not None or options.device_bandwidth is not None):
        faults.append(
            "--measure takes measured times in place of those that --device-flops and "
            "--device-bandwidth predict; leave out these, or --measure"
        )
    if flops is not None:
        if 1 <= flops <= _MOST_FLOPS:
            given["flops_per_second"] = flops
        else:
            faults.append(
                f"--device-flops: received {flops:g}; give a number from 1 to {_MOST_FLOPS:g}"
            )
    return given


def _measured(console: Console, request: Request) -> Request:
    """The request with the measured speed of this machine, but for what was given."""
    with console.status("measuring the speed of this machine"):
        limit = request.settings.machine.memory_bytes
        machine = replace(calibrate(), **{"memory_bytes": limit, **request.machine})
    console.print(
        f"measured: {machine.flops_per_second:.2g} FLOPs and {machine.bytes_per_second:.2g} bytes "
        "of memory per second",
        highlight=False,
    )
    return request._replace(settings=replace(request.settings, machine=machine))


def _model(target: str, arguments: dict[str, Any], allocate: bool) -> keras.Model:
    factory = load_target(target)
    if isinstance(factory, keras.Model):
        return factory  # created when its module was imported
    if not callable(factory):
        raise PlanError(
            f"{shown(target)} is a value of type {type(factory).__name__}. Expected: a function "
            "that returns a keras.Model, or a class that is one."
        )
    if allocate:
        return checked_model(factory(**arguments), target)
    return build_model(factory, arguments, target)


def _recommended(
    console: Console,
    graph_for: Callable[[int], CoarseGraph],
    batch: int,
    num_devices: int,
    settings: PlanSettings,
    normalising: str | None,
) -> Candidate:
    """Ranks configurations, prints the table and returns the best one that fits."""
    powers = [2**i for i in range(num_devices.bit_length())]
    tried = range(1, num_devices + 1) if num_devices <= 8 else [*powers, num_devices]
    candidates = rank_configurations(
        graph_for,
        batch,
        settings.machine,
        partitions=tuple(tried),
        optimize=settings.optimize,
        contiguous=settings.contiguous,
        least_rows=1 if normalising is None else _LEAST_ROWS,
        simulated=_NUM_SIMULATED,
    )
    limit = settings.machine.memory_bytes
    compact = console.width < WIDE
    console.print(recommendation_table(candidates[:_NUM_SHOWN], limit, compact))
    if normalising is not None and batch > 1:
        console.print(
            f"without microbatches of one row, which layer '{normalising}' cannot normalise; "
            "fewer rows give less exact statistics\n",
            highlight=False,
            markup=False,
        )
    if len(candidates) > _NUM_SHOWN:
        console.print(f"and {len(candidates) - _NUM_SHOWN} more\n", highlight=False)
    missing = shortfall(candidates, settings.machine)
    if missing:
        raise PlanError(missing)
    return candidates[0]


def _normalising(model: keras.Model) -> str | None:
    """The name of a layer that normalises with the statistics of a microbatch, if there is one."""
    layers = _private.all_layers(model)
    return next((x.name for x in layers if isinstance(x, keras.layers.BatchNormalization)), None)


def _print_and_write(
    console: Console, result: Plan, options: PlanOptions, best: Candidate | None
) -> None:
    """Prints a plan, writes the requested files, and prints how to use them."""
    console.print(heading(result), highlight=False, markup=False)
    console.print(plan_table(result, compact=console.width < WIDE))
    console.print(summary(result), highlight=False)
    if best is not None and best.simulation is not None:
        console.print(
            f"with its schedule simulated: step {format_seconds(best.step_seconds)}, bubble "
            f"{100 * best.bubble:.0f} %",
            highlight=False,
        )
    console.print(assumptions(result.settings.machine), highlight=False)
    if options.explain:
        console.print()
        console.print(str(result.explain()), highlight=False, markup=False)
    lines = []
    if options.output is not None:
        result.save(options.output)
        use = _use_of(result, options.output, options.flags)
        lines += [f"plan: {options.output}", use]
    if options.picture is not None:
        result.plot(options.picture)
        lines.insert(0, f"picture: {options.picture}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _use_of(result: Plan, output: Path, flags: Mapping[str, Any]) -> str:
    """The `smp.init` call that uses a written plan."""
    settings = result.settings
    keys: dict[str, Any] = {
        "partitions": result.num_partitions,
        "microbatches": settings.microbatches,
    }
    if settings.pipeline != Config.pipeline:
        keys["pipeline"] = settings.pipeline
    if settings.active_microbatches is not None:
        keys["active_microbatches"] = settings.active_microbatches
    if settings.pieces != Config.pieces_per_partition:
        keys["pieces_per_partition"] = settings.pieces
    if settings.optimize != Config.optimize:
        keys["optimize"] = settings.optimize
    if settings.recompute != Config.recompute:
        keys["recompute"] = recompute.as_dict(settings.recompute)
    if settings.offload != Config.offload:
        keys["offload"] = offload.as_dict(settings.offload)
    keys["plan"] = str(output)
    given = [key for key in CARRIED if key in flags and flags[key] != getattr(Config, key)]
    keys |= {key: flags[key] for key in given}
    text = ", ".join(f'"{key}": {value!r}' for key, value in keys.items())
    return f"use it: smp.init({{{text}}})".replace("'", '"')
