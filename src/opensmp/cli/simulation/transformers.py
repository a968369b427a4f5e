"""What `opensmp simulate` does for a Transformer; imports no TensorFlow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from opensmp.base.message_text import sentence, shown
from opensmp.cli.options import checking
from opensmp.cli.simulation.simulate import SimulateOptions
from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.format import format_bytes, format_seconds
from opensmp.compiler.simulation.run import Run
from opensmp.compiler.simulation.search import SEARCHED, search
from opensmp.compiler.simulation.simulate import simulate_transformer
from opensmp.compiler.simulation.step import SimulatedStep
from opensmp.compiler.simulation.transformer import Transformer, model_named
from opensmp.config.pipelines import DEFAULT_PIPELINE, pipeline_name
from opensmp.config.recompute import LEVELS
from opensmp.errors import PlanError, SmpError

_NUMBERS = ("layers", "width", "heads", "sequence", "vocabulary")
_MORE = ("key_value_heads", "mlp_width", "precision")


def simulate_described(options: SimulateOptions) -> None:
    """Simulates or searches what the options ask for, and prints it."""
    with checking():
        faults: list[str] = []
        model = _read(faults, lambda: _model(options))
        cluster = _read(faults, lambda: cluster_of(options))
        run = None if options.search else _read(faults, lambda: run_of(options))
        if options.arg or options.inputs:
            faults.append("--input and --arg are for Keras models; name one, or leave them out")
        if faults or model is None or cluster is None:
            raise PlanError(f"opensmp simulate: {sentence(faults)}")
    if run is not None:
        print_step(options, simulate_transformer(model, cluster, run, options.batch))
        return
    with checking():
        steps = _searched(options, model, cluster)
    if options.json:
        print(json.dumps({"steps": [step.to_dict() for step in steps]}))
        return
    console = Console(soft_wrap=False)
    console.print(_table(steps))
    print_step(options, steps[0])


def cluster_of(options: SimulateOptions) -> Cluster:
    """Returns the cluster of the options."""
    return Cluster(
        options.nodes,
        options.devices_per_node,
        options.flags.get("device"),
        within=options.within,
        between=options.between,
        host=options.host,
    )


def run_of(options: SimulateOptions, **others: Any) -> Run:
    """Returns the run of the options."""
    flags = {key: value for key, value in options.flags.items() if key != "device"}
    flags["pieces"] = flags.pop("pieces_per_partition")
    return Run(
        **{
            **flags,
            "replicas": options.replicas,
            "overlap_all_reduce": options.overlap_all_reduce,
            "tensor_parallel": options.tensor_parallel,
            **others,
        }
    )


def print_step(options: SimulateOptions, step: SimulatedStep) -> None:
    """Prints a step as text or as JSON; if it does not fit, the command fails."""
    # Without wrapping, so that the last line can be copied; the others are short.
    print(json.dumps(step.to_dict()) if options.json else step)
    if not step.fits:
        raise typer.Exit(1)


def _read(faults: list[str], make: Any) -> Any:
    try:
        return make()
    except SmpError as error:
        faults.append(str(error).removesuffix("."))
        return None


def _model(options: SimulateOptions) -> Transformer:
    given = {name: getattr(options, name) for name in (*_NUMBERS, *_MORE)}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"gated": True} if options.gated else {}
    if options.model is not None:
        return replace(model_named(options.model), **given)
    missing = [f"--{name}" for name in _NUMBERS if name not in given]
    if missing:
        raise PlanError(
            f"name a Keras model or a --model such as llama3-70b, or give {', '.join(missing)} "
            "of a Transformer."
        )
    return Transformer(**given)


def _searched(
    options: SimulateOptions, model: Transformer, cluster: Cluster
) -> tuple[SimulatedStep, ...]:
    flags = options.flags
    if flags["partitions"] > 1 or flags["microbatches"] > 1 or options.replicas > 1:
        raise PlanError(
            "opensmp simulate: --search finds the numbers of partitions, microbatches and "
            "replicas; leave these out, or --search."
        )
    level = flags.get("recompute")
    if level is not None and level not in LEVELS:
        raise PlanError(
            f"opensmp simulate: --recompute {shown(level)} cannot be searched; give one of "
            f"{', '.join(LEVELS)}, or none to try all."
        )
    name = flags["pipeline"]
    return search(
        model,
        cluster,
        options.batch,
        pipelines=SEARCHED if name == DEFAULT_PIPELINE else (name,),
        recompute=LEVELS if level is None else (level,),
        offload=flags.get("offload", "none") != "none",
        tensor_parallel=options.tensor_parallel,
    )


def _table(steps: Sequence[SimulatedStep]) -> Table:
    """The steps of a search, for 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    titles = ("step", "memory", "parti-\ntions", "pieces", "repli-\ncas", "micro-\nbatches")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("schedule", "recompute"):
        table.add_column(title, no_wrap=True)
    for step in steps:
        run = step.run
        table.add_row(
            format_seconds(step.seconds),
            format_bytes(step.peak_bytes),
            str(run.partitions),
            str(run.pieces),
            str(run.replicas),
            str(run.microbatches),
            pipeline_name(run.pipeline),
            str(run.recompute),
        )
    return table
