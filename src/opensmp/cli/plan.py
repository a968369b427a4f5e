"""`opensmp plan`: partitions a model without running or allocating it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import keras
import tensorflow as tf
import typer
from rich.console import Console

from opensmp.base.divisors import nearest_divisors
from opensmp.base.message_text import shown
from opensmp.cli.dry_run import build_model, checked_model, dry_trace, symbolic_inputs
from opensmp.cli.inputs import input_specs, parse_input
from opensmp.cli.target import load_target, parse_arguments
from opensmp.compiler.format import parse_bytes
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
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.config import Config
from opensmp.distributed import world
from opensmp.errors import ConfigError, PlanError, SmpError

_PICTURES = (".svg", ".png", ".pdf")
_NUM_SHOWN = 12
_MOST_FLOPS = 1e24
_MOST_BATCH = 1_000_000_000


def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function that returns a Keras model, or a class that is one: "
            "keras.applications:ResNet50, my_models:build, path/to/file.py:build.",
        ),
    ],
    partitions: Annotated[
        int, typer.Option(min=1, help="Number of partitions; with --recommend, of devices.")
    ],
    batch: Annotated[int, typer.Option(min=1, max=_MOST_BATCH, help="Examples per step.")],
    microbatches: Annotated[
        int, typer.Option(min=1, help="Microbatches per step; it must divide the batch.")
    ] = 1,
    pipeline: Annotated[
        str, typer.Option("--pipeline", "--schedule", help="interleaved, simple or zero_bubble.")
    ] = "interleaved",
    active_microbatches: Annotated[
        int | None, typer.Option(min=1, help="Most microbatches in flight.")
    ] = None,
    optimize: Annotated[
        str | None,
        typer.Option(
            help="What to make small first, memory or speed (step time).",
            show_default="memory; with --recommend, speed",
        ),
    ] = None,
    contiguous: Annotated[
        bool, typer.Option(help="Whether each partition must be one connected piece.")
    ] = True,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of one device, such as 16GiB or 16GB.")
    ] = None,
    device_flops: Annotated[
        float | None, typer.Option(help="Speed of one device in FLOPs per second: 1e13.")
    ] = None,
    device_bandwidth: Annotated[
        str | None, typer.Option(help="Memory bandwidth of one device per second: 900GB.")
    ] = None,
    link_bandwidth: Annotated[
        str | None, typer.Option(help="Bandwidth between devices per second: 25GB.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]SHAPE[/DTYPE]",
            help="What one example looks like: 224x224x3, token_ids=128/int32. Needed where "
            "the model does not know.",
        ),
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Argument of the factory: weights=null."),
    ] = None,
    allocate: Annotated[
        bool, typer.Option("--allocate", help="Give variables their memory while planning.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the plan here, as JSON.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the plan here: .svg, .png or .pdf.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why, and what other cuts would cost.")
    ] = False,
    recommend: Annotated[
        bool,
        typer.Option(
            "--recommend",
            help="Try other numbers of partitions and microbatches and both schedules, and "
            "plan for the best.",
        ),
    ] = False,
) -> None:
    """Cuts a model into partitions and predicts time and memory of a training step.

    Nothing is run and nothing is allocated: a model that no machine at hand could hold is
    planned as well.
    """
    faults: list[str] = []
    machine = _machine(device_memory, device_flops, device_bandwidth, link_bandwidth, faults)
    settings = PlanSettings(
        microbatches=microbatches,
        pipeline=pipeline,
        active_microbatches=active_microbatches,
        optimize=optimize or ("speed" if recommend else "memory"),
        contiguous=contiguous,
        machine=machine,
    )
    given = [i for text in inputs or () if (i := _read(faults, parse_input, text)) is not None]
    arguments = _read(faults, parse_arguments, arg or ()) or {}
    _check(partitions, batch, settings, recommend, output, picture, faults)
    _hide_gpus()
    _enter_world(partitions, settings)
    model = _model(target, arguments, allocate)
    symbolic = symbolic_inputs(model)

    def traced_for(count: int) -> TracedGraph:
        return dry_trace(model, input_specs(symbolic, given, batch // count), training=True)

    console = Console(soft_wrap=False)
    if recommend:
        best = _recommended(console, traced_for, batch, partitions, settings)
        partitions, settings = best.num_partitions, best.settings
    traced = traced_for(settings.microbatches)
    result = plan_units(traced, coarsen(traced, machine), partitions, settings)
    warn_of_empty(result)
    console.print(heading(result), highlight=False, markup=False)
    console.print(plan_table(result, compact=console.width < WIDE))
    console.print(summary(result), highlight=False)
    if explain:
        console.print()
        console.print(str(result.explain()), highlight=False, markup=False)
    if output is not None:
        result.save(output)
    if picture is not None:
        result.plot(picture)
    _print_next(console, result, output, picture)


def _check(
    partitions: int,
    batch: int,
    settings: PlanSettings,
    recommend: bool,
    output: Path | None,
    picture: Path | None,
    faults: list[str],
) -> None:
    """Validates all options before the model is built; raises one error, including `faults`."""
    if not recommend and batch % settings.microbatches:
        near = nearest_divisors(batch, settings.microbatches, 2)
        faults.append(
            f"--batch {batch} cannot be divided into --microbatches {settings.microbatches} of "
            f"equal size; choose {' or '.join(map(str, near))} microbatches, or a "
            f"batch of {-(-batch // settings.microbatches) * settings.microbatches}"
        )
    if picture is not None and picture.suffix.lower() not in _PICTURES:
        suffixes = ", ".join(_PICTURES)
        faults.append(f"--picture {shown(str(picture))}: the suffix must be one of {suffixes}")
    for option, path in (("--output", output), ("--picture", picture)):
        if path is not None and not _is_directory(path.absolute().parent):
            parent = shown(str(path.absolute().parent), 200)
            faults.append(f"{option} {shown(str(path))}: there is no directory {parent}")
    try:
        _config(partitions, settings)
    except ConfigError as error:
        faults += [line.split(". ", 1)[1] for line in str(error).splitlines()[1:]]
    if faults:
        raise PlanError("opensmp plan: " + "; ".join(faults) + ".")


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # e.g. a name that is too long
        return False


def _read(faults: list[str], read: Callable[[Any], Any], given: Any) -> Any | None:
    """Parses an option; returns None and appends to `faults` if it is invalid."""
    try:
        return read(given)
    except SmpError as error:
        faults.append(str(error).removesuffix("."))
        return None


def _config(partitions: int, settings: PlanSettings) -> Config:
    return Config(
        partitions=partitions,
        microbatches=settings.microbatches,
        pipeline=settings.pipeline,
        optimize=settings.optimize,
        contiguous=settings.contiguous,
        active_microbatches=settings.active_microbatches or 0,
    )


def _machine(
    memory: str | None,
    flops: float | None,
    bandwidth: str | None,
    link: str | None,
    faults: list[str],
) -> Machine:
    given: dict[str, Any] = {}
    for key, option, text in (
        ("memory_bytes", "--device-memory", memory),
        ("bytes_per_second", "--device-bandwidth", bandwidth),
        ("transfer_bytes_per_second", "--link-bandwidth", link),
    ):
        size = None if text is None else _read(faults, partial(parse_bytes, what=option), text)
        if size is not None:
            given[key] = size
    if flops is not None:
        if 1 <= flops <= _MOST_FLOPS:
            given["flops_per_second"] = flops
        else:
            faults.append(
                f"--device-flops: received {flops:g}; give a number from 1 to {_MOST_FLOPS:g}"
            )
    return Machine(**given)


def _hide_gpus() -> None:
    """Prevents TensorFlow from allocating GPU memory, which a dry run does not need."""
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        logging.getLogger("opensmp").info("TensorFlow was used before; its GPUs stay visible")


def _enter_world(partitions: int, settings: PlanSettings) -> None:
    """Sets a world, so that factories can create `smp.DistributedModel`s; creates no devices."""
    if not world.is_initialized():
        config = _config(partitions, settings)
        world.set_current(world.World(config, ("/device:CPU:0",) * partitions))


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
    traced_for: Callable[[int], TracedGraph],
    batch: int,
    num_devices: int,
    settings: PlanSettings,
) -> Candidate:
    """Ranks configurations, prints the table and returns the best one that fits."""

    def graph_for(count: int) -> CoarseGraph:
        return coarsen(traced_for(count), settings.machine)

    powers = [2**i for i in range(num_devices.bit_length())]
    tried = range(1, num_devices + 1) if num_devices <= 8 else [*powers, num_devices]
    candidates = rank_configurations(
        graph_for,
        batch,
        settings.machine,
        partitions=tuple(tried),
        optimize=settings.optimize,
        contiguous=settings.contiguous,
    )
    limit = settings.machine.memory_bytes
    console.print(recommendation_table(candidates[:_NUM_SHOWN], limit))
    if len(candidates) > _NUM_SHOWN:
        console.print(f"and {len(candidates) - _NUM_SHOWN} more\n", highlight=False)
    missing = shortfall(candidates, settings.machine)
    if missing:
        raise PlanError(missing)
    return candidates[0]


def _print_next(console: Console, result: Plan, output: Path | None, picture: Path | None) -> None:
    """Prints the written files, and the `smp.init` call that uses the plan."""
    settings = result.settings
    keys: dict[str, Any] = {
        "partitions": result.num_partitions,
        "microbatches": settings.microbatches,
    }
    if settings.pipeline != "interleaved":
        keys["pipeline"] = settings.pipeline
    if settings.active_microbatches is not None:
        keys["active_microbatches"] = settings.active_microbatches
    if picture is not None:
        console.print(f"picture: {picture}", highlight=False, markup=False, soft_wrap=True)
    if output is not None:
        keys["plan"] = str(output)
        text = ", ".join(f'"{key}": {value!r}' for key, value in keys.items())
        console.print(f"plan: {output}", highlight=False, markup=False, soft_wrap=True)
        console.print(
            f"use it: smp.init({{{text}}})".replace("'", '"'),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
