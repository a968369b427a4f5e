"""The workloads of `pipeline_speed.py` in torch, as a measured process.

Run by `pipeline_speed.py` (torch.distributed.pipelining) and `replicas.py`
(DistributedDataParallel) with a Python that has torch; imports nothing of TensorFlow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

LEARNING_RATE = 1e-3
STAGES_PER_RANK = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "zero bubble": 2,
    "zero bubble V": 2,
}
SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zero bubble V": ScheduleZBVZeroBubble,
}


class Block(nn.Module):
    """A Transformer block as that of `models.transformer`."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps=1e-3), nn.LayerNorm(width, eps=1e-3)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x)), approximate="none"))


def layers(workload: str) -> list[list[nn.Module]]:
    """The model's layers, in groups that may be separated."""
    if workload == "mlp":
        dense = [[nn.Linear(1024, 1024), nn.GELU()] for _ in range(16)]
        return [*dense[:-1], [*dense[-1], nn.Linear(1024, 10)]]
    if workload == "quick":
        dense = [[nn.Linear(64, 64), nn.GELU()] for _ in range(4)]
        return [*dense[:-1], [*dense[-1], nn.Linear(64, 10)]]
    blocks: list[list[nn.Module]] = [[Block(256)] for _ in range(8)]
    blocks[0].insert(0, nn.Embedding(2000, 256))
    blocks[-1] += [nn.LayerNorm(256, eps=1e-3), nn.Linear(256, 2000)]
    return blocks


def stage(workload: str, number: int, count: int) -> nn.Module:
    groups = layers(workload)
    each = len(groups) // count
    return nn.Sequential(*(m for g in groups[number * each : (number + 1) * each] for m in g))


def batch(workload: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if workload == "transformer":
        size = (32, 128)
        return (
            torch.randint(0, 2000, size, generator=generator),
            torch.randint(0, 2000, size, generator=generator),
        )
    rows, width = (256, 1024) if workload == "mlp" else (16, 64)
    return (
        torch.randn(rows, width, generator=generator),
        torch.randint(0, 10, (rows,), generator=generator),
    )


def loss_fn(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, -2), labels.flatten())


def plain(workload: str, microbatches: int, rows: slice) -> Callable[[], None]:
    model = stage(workload, 0, 1)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    x, y = (data[rows] for data in batch(workload))

    def step() -> None:
        optimizer.zero_grad()
        for inputs, labels in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
            (loss_fn(model(inputs), labels) / microbatches).backward()
        optimizer.step()

    return step


def replicated(workload: str, microbatches: int, rows: slice) -> Callable[[], None]:
    """DistributedDataParallel; only the last microbatch sums up over the replicas."""
    model = nn.parallel.DistributedDataParallel(
        stage(workload, 0, 1), gradient_as_bucket_view=True, static_graph=False
    )
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    x, y = (data[rows] for data in batch(workload))
    pairs = list(zip(x.chunk(microbatches), y.chunk(microbatches), strict=True))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with model.no_sync():
            for inputs, labels in pairs[:-1]:
                (loss_fn(model(inputs), labels) / microbatches).backward()
        inputs, labels = pairs[-1]
        (loss_fn(model(inputs), labels) / microbatches).backward()
        optimizer.step()

    return step


def pipelined(workload: str, microbatches: int, schedule: str) -> Callable[[], None]:
    rank, size = dist.get_rank(), dist.get_world_size()
    count = size * STAGES_PER_RANK[schedule]
    is_v = SCHEDULES[schedule] is ScheduleZBVZeroBubble
    numbers = [rank, count - 1 - rank] if is_v else range(rank, count, size)
    modules = [stage(workload, number, count) for number in numbers]
    stages = [
        pipelining.PipelineStage(module, number, count, torch.device("cpu"))
        for module, number in zip(modules, numbers, strict=True)
    ]
    given = stages[0] if STAGES_PER_RANK[schedule] == 1 else stages
    run = SCHEDULES[schedule](given, microbatches, loss_fn=loss_fn)
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], LEARNING_RATE)
    x, y = batch(workload)

    def step() -> None:
        optimizer.zero_grad()
        arguments = (x,) if rank == 0 else ()
        if count - 1 in numbers:
            run.step(*arguments, target=y, losses=[])
        else:
            run.step(*arguments)
        optimizer.step()
        dist.barrier()

    return step


def commands(path: str) -> Iterator[list[Any]]:
    with open(path) as file:
        yield from map(json.loads, file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload")
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--schedule")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--fifos", nargs="+")
    parser.add_argument("--answers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)
    rows = slice(rank, None, 2) if arguments.half else slice(None)
    if arguments.schedule == "one thread":
        step = plain(arguments.workload, arguments.microbatches, rows)
    elif arguments.schedule == "ddp":
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})  # as `opensmp run --bind-cores`
        dist.init_process_group("gloo")
        step = replicated(arguments.workload, arguments.microbatches, rows)
    else:
        dist.init_process_group("gloo")
        step = pipelined(arguments.workload, arguments.microbatches, arguments.schedule)
    for _, count in commands(arguments.fifos[rank]):
        times = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        if rank == 0:
            with open(arguments.answers, "w") as file:
                answer = {"seconds": statistics.median(times), "loss": 0.0}
                file.write(json.dumps(answer) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
