"""What `opensmp simulate` does for a Keras model: plans it, and simulates the plan."""

from __future__ import annotations

from dataclasses import replace

import keras

from opensmp.base.message_text import sentence
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
from opensmp.cli.simulation.simulate import SimulateOptions
from opensmp.cli.simulation.transformers import cluster_of, print_step, run_of
from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.costs.precision import precision_of
from opensmp.compiler.plan.coarsening.coarsen import coarsen
from opensmp.compiler.plan.methods.auto import plan_units
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.simulation.plan_step import simulate_plan
from opensmp.compiler.simulation.run import Run
from opensmp.compiler.simulation.simulate import examples_of, machine_for
from opensmp.compiler.simulation.step import SimulatedStep
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.config import Config
from opensmp.config.pipelines import DEFAULT_PIPELINE, PIPELINES, pipeline_name
from opensmp.errors import PlanError, SmpError

_OF_TRANSFORMERS = ("model", "layers", "width", "heads", "sequence", "vocabulary", "precision")


def simulate_keras(options: SimulateOptions) -> None:
    """Plans a model for the devices of the cluster, simulates a step and prints it."""
    assert options.target is not None
    with checking():
        cluster, run, examples = _checked(options)
        given = [parse_input(text) for text in options.inputs or ()]
        arguments = parse_arguments(options.arg or ())
    hide_gpus()
    enter_world(Config(run.partitions))
    factory = load_target(options.target)
    if isinstance(factory, keras.Model):
        model = checked_model(factory, options.target)
    elif callable(factory):
        model = build_model(factory, arguments, options.target)
    else:
        raise PlanError(f"opensmp simulate: {options.target} is no function that returns a model.")
    traced = dry_trace(model, input_specs(symbolic_inputs(model), given, examples), training=True)
    precision = precision_of(traced)
    print_step(options, _simulated(traced, cluster, run, precision, options.batch))


def _checked(options: SimulateOptions) -> tuple[Cluster, Run, int]:
    faults = [
        f"--{name.replace('_', '-')} is for Transformers, not for a Keras model"
        for name in _OF_TRANSFORMERS
        if getattr(options, name) is not None
    ]
    if options.search:
        faults.append(
            "--search is for Transformers; `opensmp plan --recommend` compares plans of a Keras "
            "model"
        )
    if options.tensor_parallel > 1:
        faults.append("--tensor-parallel describes other systems, which run no Keras model")
    try:
        cluster, run = cluster_of(options), run_of(options)
        examples = examples_of(run, options.batch)
        machine_for(cluster, "float32")
    except SmpError as error:
        faults.append(str(error))
    if faults:
        raise PlanError(f"opensmp simulate: {sentence(faults)}")
    return cluster, run, examples


def _simulated(
    traced: TracedGraph, cluster: Cluster, run: Run, precision: str, batch: int
) -> SimulatedStep:
    name = pipeline_name(run.pipeline)
    settings = PlanSettings(
        microbatches=run.microbatches,
        pipeline=name if name in PIPELINES else DEFAULT_PIPELINE,
        active_microbatches=run.active_microbatches,
        optimize="speed",
        machine=replace(machine_for(cluster, precision), memory_bytes=None),
        pieces=run.pieces,
        recompute=run.recompute,
        offload=run.offload,
    )
    plan = plan_units(traced, coarsen(traced, settings.machine), run.partitions, settings)
    step = simulate_plan(plan, cluster, run, precision)
    return replace(step, examples=batch)
