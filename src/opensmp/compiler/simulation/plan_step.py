"""Simulates a step of a planned Keras model on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensmp.base.message_text import counted, did_you_mean, shown
from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.cluster.layout import Layout
from opensmp.compiler.cluster.links import Link
from opensmp.compiler.cluster.machine import assumptions
from opensmp.compiler.plan.cost_model import evaluate
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.recompute_levels import Choice, of_levels, recomputed
from opensmp.compiler.plan.report.predicted_schedule import passes_of, stages
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine
from opensmp.compiler.schedule.actions import Action, TaskGraph
from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.schedule.simulate import Simulation, simulate
from opensmp.compiler.simulation.finish import Loads, finished
from opensmp.compiler.simulation.run import Run
from opensmp.compiler.simulation.step import SimulatedStep
from opensmp.compiler.simulation.timing import MOST_OBJECTS, Timing, time_graph
from opensmp.config.device import FLOAT32
from opensmp.config.offload import MOST_RESIDENT, offloads_optimizer, offloads_residuals
from opensmp.config.pipelines import pipeline_name, row_of
from opensmp.errors import PlanError

_WEIGHTS_SHARE = 0.5
"""Of the backward pass of a unit with weights: a product has as many FLOPs for its weights as for
its inputs."""

_NOT_OF_PLANS = ("partitions", "pieces", "tensor_parallel", "blocking_transfers")

_GRADIENT_SHARE = 1 / 3
"""Of the state of weights that are trained; the rest are the two slots of Adam."""


def simulate_plan(
    plan: Plan, cluster: Cluster | None, run: Run, precision: str = FLOAT32
) -> SimulatedStep:
    """Simulates a step of a plan.

    The stages, their times and the tensors between them are those of the plan; on devices other
    than those of the plan, times are scaled: arithmetic by FLOPs per second, the rest by the
    memory bandwidth. The time grows with the number of passes, some 50 microseconds for each.

    Args:
        plan: A plan with costs.
        cluster: The devices; None for those of the plan, in one machine.
        run: How it is run; its partitions are those of the plan.
        precision: Dtype of matrix products, for known devices.

    Raises:
        PlanError: If the plan has no costs, or a step has too many passes.
    """
    if not isinstance(cluster, Cluster | None):
        raise PlanError(
            f"Plan.simulate: the cluster is an smp.Cluster or None; received {shown(cluster)}. "
            'Give, for example, smp.Cluster(nodes=1, devices_per_node=8, device="a100").'
        )
    before = plan.settings.machine
    cluster = cluster or _planned(plan, run)
    machine = cluster.machine(before, precision)
    graph = rescaled(plan.costs, before, machine)
    layout = Layout(cluster, run.partitions, run.replicas, strategy=run.placement_strategy)
    settings = replace(plan.settings, machine=machine, recompute=run.recompute, offload=run.offload)
    if len(graph) == 0:
        raise PlanError(f"Plan of '{plan.model}': it has no units, so that nothing takes time.")
    predicted = evaluate(
        graph, plan.assignment, run.partitions, settings, monotone=False, by_schedule=True
    )
    chain = _Stages.of(plan, graph, settings, predicted.recompute)
    count = chain.num_stages * run.microbatches * 3
    if count > MOST_OBJECTS:
        raise PlanError(
            f"Simulation: {chain.num_stages} stages and {run.microbatches} microbatches have up to "
            f"{count} passes, more than the {MOST_OBJECTS} that are simulated for a plan; give "
            "fewer microbatches."
        )
    tasks, waits = chain.tasks(run, layout)
    timing = time_graph(run, tasks, waits, chain.num_stages, layout.is_on_several_machines)
    step = finished(run, layout, timing, machine, chain.loads(run, timing), 0)
    lines: tuple[str, ...] = (
        assumptions(machine).removeprefix("assumed: ").split("; transfers")[0],
        f"within machines {cluster.inner}",
        f"between machines {cluster.outer}",
        "half of a backward pass is for the weights, where a layer has some",
    )
    wanted = row_of(run.pipeline)
    if wanted.pieces is not None and chain.num_stages != run.num_segments:
        lines += (
            f"the plan has {counted(chain.num_stages, 'stage')}, not the {run.num_segments} of "
            f"{pipeline_name(run.pipeline)!r}, which is then only the priority of a list schedule: "
            "make the plan for this schedule",
        )
    away = any(offloads_residuals(run.offload, p) for p in range(run.partitions))
    if away and max(timing.held, default=0) <= MOST_RESIDENT:
        lines += (
            "no residuals are offloaded: no partition holds more than "
            f"{MOST_RESIDENT} microbatches",
        )
    return replace(step, assumed=lines)


def of_plan(plan: Plan, given: Mapping[str, Any]) -> Run:
    """Returns the run that a plan is made for, with what is given in place of its settings.

    Raises:
        PlanError: If a name is none of `Run`, or only for Transformers.
    """
    known = [field.name for field in fields(Run) if field.name not in _NOT_OF_PLANS]
    for name in given:
        if name not in known:
            near = did_you_mean(name, known)
            raise PlanError(
                f"Plan.simulate: the argument {shown(name)} is not known; choose among "
                f"{', '.join(known)}{'; ' + near if near else '.'}"
            )
    settings = plan.settings
    pipeline = given.get("pipeline", settings.scheduled)
    own = pipeline == settings.scheduled
    return Run(
        **{
            "partitions": plan.num_partitions,
            "microbatches": settings.microbatches,
            "pipeline": pipeline,
            "pieces": settings.pieces if own else 1,
            "active_microbatches": settings.active_microbatches if own else None,
            "recompute": settings.recompute,
            "offload": settings.offload,
            **given,
        }
    )


def tasks_of(plan: Plan) -> TaskGraph:
    """Returns the passes of a step, whose times include the transfers that they wait for."""
    run = of_plan(plan, {})
    cluster = _planned(plan, run)
    chain = _Stages.of(plan, plan.costs, plan.settings, ())
    tasks, waits = chain.tasks(run, Layout(cluster, run.partitions, 1))
    seconds = {action: time + waits.get(action, 0.0) for action, time in tasks.seconds.items()}
    return TaskGraph(tasks.device, tasks.needs, seconds, tasks.num_devices)


def timed_passes(plan: Plan) -> tuple[TaskGraph, Simulation]:
    """Returns the passes of a step of a plan and when they run, as `simulate_plan` has them."""
    run = of_plan(plan, {})
    layout = Layout(_planned(plan, run), run.partitions, run.replicas)
    chain = _Stages.of(plan, plan.costs, plan.settings, plan.prediction.recompute)
    tasks, waits = chain.tasks(run, layout)
    schedule = build(run.pipeline, tasks, run.active_microbatches)
    return tasks, simulate(schedule, tasks, waits)


def _planned(plan: Plan, run: Run) -> Cluster:
    """Returns one machine with the devices of the plan, and its link."""
    machine = plan.settings.machine
    link = Link("", machine.transfer_bytes_per_second, machine.transfer_seconds)
    return Cluster(1, run.partitions * run.replicas, within=link, between=link, host=link)


def rescaled(graph: CoarseGraph, before: Machine, after: Machine) -> CoarseGraph:
    """Returns the units with their times on another machine."""
    if before == replace(after, memory_bytes=before.memory_bytes):
        return graph

    def scaled(
        seconds: NDArray[np.float64], flops: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        arithmetic = seconds
        if flops is not None:
            arithmetic = np.minimum(seconds, flops / before.flops_per_second)
        return np.asarray(
            arithmetic * (before.flops_per_second / after.flops_per_second)
            + (seconds - arithmetic) * (before.bytes_per_second / after.bytes_per_second)
        )

    again = graph.selective_seconds
    return replace(
        graph,
        forward_seconds=scaled(graph.forward_seconds, graph.forward_flops),
        backward_seconds=scaled(graph.backward_seconds, graph.backward_flops),
        selective_seconds=None if again is None else scaled(again, None),
    )


@dataclass(frozen=True, eq=False)
class _Stages:
    """The stages of a plan with their costs for a microbatch; arrays have one entry for each."""

    graph: CoarseGraph
    of_unit: NDArray[np.int64]
    partition: NDArray[np.int64]
    seconds: NDArray[np.float64]  # shape (3, stages): forward, backward, weights
    kept: NDArray[np.float64]  # residuals of a microbatch
    whole: NDArray[np.float64]  # the same without recomputation
    fixed: NDArray[np.float64]  # weights and their gradients
    slots: NDArray[np.float64]
    gradients: NDArray[np.float64]
    choices: tuple[Choice, ...]
    in_memory: NDArray[np.int64]  # microbatches that the choices are of

    @property
    def num_stages(self) -> int:
        return len(self.partition)

    @classmethod
    def of(
        cls,
        plan: Plan,
        graph: CoarseGraph,
        settings: PlanSettings,
        choices: tuple[Choice, ...],
    ) -> _Stages:
        placed = plan.assignment
        stage = stages(graph, placed)
        count = int(stage.max(initial=-1)) + 1
        partition = np.zeros(count, dtype=np.int64)
        partition[stage] = placed
        again = recomputed(graph, settings, placed)

        def summed(values: NDArray[Any]) -> NDArray[np.float64]:
            return np.bincount(stage, values, count).astype(np.float64)

        trained = graph.state_bytes > 0
        backward = graph.backward_seconds
        weights = _WEIGHTS_SHARE * np.where(trained, backward, 0.0)
        seconds = np.stack(
            [
                summed(graph.forward_seconds),
                summed(backward - weights + again.seconds),
                summed(weights),
            ]
        )
        fixed = summed(graph.parameter_bytes + _GRADIENT_SHARE * graph.state_bytes)
        gradients = summed(_GRADIENT_SHARE * graph.state_bytes)
        for variable in graph.shared:
            readers = sorted({int(stage[unit]) for unit in variable.units})
            fixed[readers] += variable.parameter_bytes + variable.gradient_bytes
            gradients[readers[0]] += variable.gradient_bytes
        # With one choice for each partition, a share of the microbatches recomputes.
        kept, whole = summed(again.kept_bytes), summed(graph.residual_bytes)
        return cls(
            graph,
            stage,
            partition,
            seconds,
            kept,
            whole,
            fixed,
            summed((1 - _GRADIENT_SHARE) * graph.state_bytes),
            gradients,
            choices,
            settings.microbatches_resident(plan.num_partitions)[partition],
        )

    def tasks(self, run: Run, layout: Layout) -> tuple[TaskGraph, Mapping[Action, float]]:
        """The passes of a step, and the transfers that they wait for."""
        needs, returns, delays = self._links(layout)
        seconds = self._with_choices()
        trains = seconds[1] + seconds[2] > 0
        # A stage that nothing is sent back from computes both halves at once.
        leads = np.array([not any(s in back for back in returns) for s in range(self.num_stages)])
        splits = run.split_backward & (seconds[2] > 0) & ~leads
        seconds[1] += np.where(splits, 0.0, seconds[2])
        graph = passes_of(
            self.partition,
            needs,
            returns,
            seconds,
            trains,
            splits,
            run.microbatches,
            run.partitions,
        )
        waits = {
            action: float(delays["FB".index(action.kind), action.segment])
            for action in graph.device
            if action.kind != "W"
        }
        return graph, waits

    def _links(self, layout: Layout) -> tuple[list[set[int]], list[set[int]], NDArray[np.float64]]:
        """What stages need and get back from which others, and how long that travels."""
        count = self.num_stages
        needs: list[set[int]] = [set() for _ in range(count)]
        returns: list[set[int]] = [set() for _ in range(count)]
        delays = np.zeros((2, count))

        def travels(source: int, target: int, num_bytes: int) -> float:
            link = layout.link(int(self.partition[source]), int(self.partition[target]))
            return link.seconds(num_bytes) if link is not None else 0.0

        for tensor in self.graph.tensors:
            home = int(self.of_unit[tensor.producer])
            for reader in sorted({int(self.of_unit[unit]) for unit in tensor.consumers} - {home}):
                needs[reader].add(home)
                delays[0, reader] += travels(home, reader, tensor.forward_bytes)
                if tensor.backward_bytes:
                    returns[home].add(reader)
                    delays[1, home] += travels(reader, home, tensor.backward_bytes)
        for variable in self.graph.shared:
            home = int(self.of_unit[variable.units[0]])
            for reader in sorted({int(self.of_unit[unit]) for unit in variable.units} - {home}):
                delays[0, reader] += travels(home, reader, variable.parameter_bytes)
                if variable.gradient_bytes:
                    delays[1, home] += travels(reader, home, variable.gradient_bytes)
        return needs, returns, delays

    def _with_choices(self) -> NDArray[np.float64]:
        """The times, with those of `recompute="auto"` spread over all microbatches."""
        seconds = self.seconds.copy()
        for partition, choice in enumerate(self.choices):
            if choice.recomputed:
                units = np.array([choice.level] * len(self.graph))
                added = of_levels(self.graph, units.tolist()).seconds
                own = np.bincount(self.of_unit, added, self.num_stages)
                share = choice.recomputed / np.maximum(self.in_memory, 1)
                seconds[1] += np.where(self.partition == partition, share * own, 0.0)
        return seconds

    def loads(self, run: Run, timing: Timing) -> Loads:
        """What the partitions have to do besides their passes."""

        def of_partition(values: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.bincount(self.partition, values, run.partitions).astype(np.float64)

        away = np.array([offloads_residuals(run.offload, int(p)) for p in self.partition])
        held = timing.held.astype(np.float64)
        resident = np.where(away, np.minimum(held, MOST_RESIDENT), held)
        slots = self.slots / (run.replicas if run.shard_optimizer_state else 1)
        gone = np.array([offloads_optimizer(run.offload, int(p)) for p in self.partition])
        slots = np.where(gone, 0.0, slots)
        memory = of_partition(self.fixed + slots + resident * self.kept)
        passing = np.zeros(run.partitions)
        np.maximum.at(passing, self.partition, self.whole - self.kept)
        memory += passing + self._borders(run, timing) - self._spared(run, held)
        nothing = np.zeros(run.partitions)
        pieces = np.maximum(of_partition(np.ones(self.num_stages)), 1.0)
        return Loads(
            weights=of_partition(self.gradients),
            slots=of_partition(self.slots),
            offloaded_slots=of_partition(np.where(gone, self.slots, 0.0)),
            last=of_partition(self.seconds[1] + self.seconds[2]),
            layers=np.bincount(
                self.partition[self.of_unit], self.graph.state_bytes > 0, run.partitions
            ).astype(np.float64),
            traffic=nothing,
            shared=nothing,
            sending=nothing,
            offloaded=of_partition(np.where(away & (held > MOST_RESIDENT), self.kept, 0.0)),
            memory=memory,
            held=of_partition(held) / pieces,
        )

    def _borders(self, run: Run, timing: Timing) -> NDArray[np.float64]:
        """Bytes of the tensors between partitions, of all microbatches that are held."""
        found = np.zeros(run.partitions)
        for tensor in self.graph.tensors:
            home = int(self.of_unit[tensor.producer])
            readers = {int(self.of_unit[unit]) for unit in tensor.consumers} - {home}
            others = [s for s in readers if self.partition[s] != self.partition[home]]
            for stage in [home] * bool(others) + others:
                found[self.partition[stage]] += tensor.forward_bytes * timing.held[stage]
        return found

    def _spared(self, run: Run, held: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bytes that `recompute="auto"` does not keep; what is recomputed exists once."""
        found = np.zeros(run.partitions)
        for partition, choice in enumerate(self.choices):
            if choice.recomputed:
                spared = of_levels(self.graph, [choice.level] * len(self.graph)).passing_bytes
                own = self.partition[self.of_unit] == partition
                most = min(float(choice.recomputed), held[self.partition == partition].max())
                found[partition] = max(0.0, most - 1) * float(spared[own].sum())
        return found
