"""Processes that run training steps when asked, so that several programs can take turns."""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 3
STEPS_PER_TURN = 5  # threads that slept need a step or two


def answer_steps(
    train_step: Callable[..., Any],
    data: tuple[Any, Any],
    rank: int,
    fifos: Sequence[str],
    answers: str,
) -> None:
    """In a process that is measured: runs what the lines of this rank's FIFO ask for.

    Args:
        train_step: From inputs and labels to a loss.
        data: Inputs and labels.
        rank: Which FIFO is this process's; rank 0 answers.
        fifos: The FIFOs of all ranks.
        answers: Where the answers go.
    """
    with open(fifos[rank]) as commands:
        for _, count in map(json.loads, commands):
            times = []
            for _ in range(count):
                start = time.perf_counter()
                loss = float(train_step(*data))
                times.append(time.perf_counter() - start)
            if rank == 0:
                answer = {"seconds": statistics.median(times), "loss": loss}
                Path(answers).write_text(json.dumps(answer) + "\n")


class Measured:
    """Processes that run steps when asked, through a FIFO for each."""

    def __init__(self, folder: Path, name: str, command: list[str], ranks: int, **options: Any):
        self.name = name
        self.fifos = [folder / f"{name}-{rank}.in".replace(" ", "-") for rank in range(ranks)]
        self.answers = folder / f"{name}.out".replace(" ", "-")
        for path in (*self.fifos, self.answers):
            os.mkfifo(path)
        command += ["--fifos", *map(str, self.fifos), "--answers", str(self.answers)]
        environments = options.pop("environments", [{}])
        self.log = open(folder / f"{name}.log".replace(" ", "-"), "w+")  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
            )
            for environment in environments
        ]
        self.inputs: list[Any] = []
        try:
            self.inputs += map(self._open, self.fifos)
        except BaseException:
            for process in self.processes:
                process.kill()
            raise

    def _open(self, path: Path) -> Any:
        """The writing end; a process that ends before it opens its own would block us."""
        while True:
            with contextlib.suppress(OSError):
                return os.fdopen(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "w")
            self._check()
            time.sleep(0.05)

    def _check(self) -> None:
        codes = [process.poll() for process in self.processes]
        if any(codes):
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended with {codes}:\n{self.log.read()[-3000:]}")

    def steps(self, count: int) -> dict[str, Any]:
        """Runs steps and gives the median time of one."""
        for file in self.inputs:
            file.write(json.dumps(["steps", count]) + "\n")
            file.flush()
        descriptor = os.open(self.answers, os.O_RDONLY | os.O_NONBLOCK)
        try:
            text = b""
            # Asleep until something comes: who looks often takes time from those it measures.
            while not text.endswith(b"\n"):
                if select.select([descriptor], [], [], 1.0)[0]:
                    with contextlib.suppress(BlockingIOError):
                        text += os.read(descriptor, 4096)
                if not text:
                    time.sleep(0.02)
                    self._check()
            return dict(json.loads(text))
        finally:
            os.close(descriptor)

    def end(self) -> None:
        for file in self.inputs:
            with contextlib.suppress(OSError):
                file.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.terminate()
        self.log.close()


def in_turns(
    running: Mapping[str, Measured], rounds: int, steps: int = STEPS_PER_TURN
) -> dict[str, list[float]]:
    """Seconds of a step of each, for each round; while one runs, the others wait."""
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, process in running.items():
            times[name].append(process.steps(steps)["seconds"])
    return times


def spread(ratios: Sequence[float]) -> str:
    """The median and the quartiles."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
