"""Run folders made by hand, as `smp.RunReport` writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from compiler.plan.hand_made import chain, plan_of

from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.simulation.plan_step import timed_passes
from opensmp.execution.profiling import run_files

BEGIN = 1_750_000_000.0


def planned(partitions: int, microbatches: int = 4, **settings: Any) -> Plan:
    """A chain with two layers in each partition."""
    assignment = [unit // 2 for unit in range(2 * partitions)]
    return plan_of(
        chain(2 * partitions), assignment, partitions, microbatches=microbatches, **settings
    )


def write_run(
    folder: Path,
    plan: Plan,
    *,
    name: str = "20260101-120000-abcd",
    ranks: int = 1,
    slow: int = 1,
    losses: tuple[float, ...] = (3.0, 2.0, 1.0),
    loss_name: str = "loss",
    end: str | None = "",
    shift: float = 0.0,
    machines: tuple[str, ...] = ("one",),
    skip: tuple[int, ...] = (),
) -> None:
    """Writes a run of which each step goes as the plan predicts, `slow` times as slowly."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks, simulation = timed_passes(plan)
    plan.save(run_files.plan_file(folder, name, 0))
    each = plan.num_partitions // ranks
    for rank in range(ranks):
        if rank in skip:
            continue
        own = list(range(rank * each, (rank + 1) * each))
        file = run_files.RunFile(run_files.rank_file(folder, name, rank))
        file.append(
            "run",
            {
                "format": run_files.FORMAT,
                "version": run_files.VERSION,
                "run": name,
                "time": BEGIN + shift,
                "rank": rank,
                "size": ranks,
                "replica": 0,
                "replicas": 1,
                "partitions": own,
                "devices": [f"/device:CPU:{p}" for p in own],
                "config": {
                    "partitions": plan.num_partitions,
                    "microbatches": plan.settings.microbatches,
                    "pipeline": plan.settings.pipeline,
                },
                "environment": {
                    "machine": machines[rank % len(machines)],
                    "script": "<script>alert(1)</script>.py",
                },
            },
        )
        for step, loss in enumerate(losses, start=1):
            file.append(
                "steps",
                {
                    "count": 1,
                    "seconds": 0.5,
                    "examples": 64,
                    "warm": step > 1,
                    "last": step,
                    "time": BEGIN + shift + step,
                    "values": {loss_name: loss},
                },
            )
        actions = [action for action, device in tasks.device.items() if device in own]
        for step in (0, 1):
            at = BEGIN + 100 * step
            file.append(
                "timeline",
                {
                    "step": step,
                    "name": "fit",
                    "devices": [],
                    "actions": [action.text for action in actions],
                    "partitions": [tasks.device[action] for action in actions],
                    "seconds": [
                        [at + slow * simulation.start[a], at + slow * simulation.end[a]]
                        for a in actions
                    ],
                },
            )
        rows = [
            {
                "partition": p,
                "rank": rank,
                "device": f"/device:GPU:{p}",
                "predicted_bytes": 1000 + p,
                "peak_bytes": 2000 + p,
                "before_bytes": 0,
                "measured_by": "allocator",
                "shares": [p],
            }
            for p in own
        ]
        file.append("memory", {"step": len(losses), "partitions": rows})
        if end is not None:
            file.append("end", {"time": BEGIN + shift + 10, "step": len(losses), "error": end})


NAN = math.nan
