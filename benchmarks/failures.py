"""How long the survivors of a failure take to end: `python benchmarks/failures.py`.

Each row is a way to fail; ranks are started without the launcher, so that nobody but they
themselves ends them. Each row runs ten times, with `--once` once; `--only freeze absent` runs
these alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from processes import RankResult, run_ranks

SCRIPT = """
import os, signal, sys, time
row, victim = sys.argv[1], int(sys.argv[2])
if row == "absent" and int(os.environ["OPENSMP_RUN_RANK"]) == victim:
    time.sleep(1000)
import opensmp as smp
if row == "absent":
    print("AT", time.time(), flush=True)
if row == "kill at start" and int(os.environ["OPENSMP_RUN_RANK"]) == victim:
    # The other one waits inside of TensorFlow.
    from opensmp import _private
    def join_cluster(*args, **kwargs):
        time.sleep(1)
        print("AT", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    _private.join_cluster = join_cluster
smp.init()
for call in range(20):
    smp.barrier()
if row == "all in one step":
    import tensorflow as tf
    class Model(smp.DistributedModel):
        def call(self, x):
            for part in (0, 1):
                with smp.partition(part):
                    x = x + 1.0
            return x
    model = Model()
    never = tf.queue.FIFOQueue(1, [tf.float32], shapes=[()])
    print("AT", time.time(), flush=True)
    smp.step(lambda x: tf.reduce_sum(model(x)) + never.dequeue())(tf.ones((2, 4)))
if smp.rank() == victim:
    print("AT", time.time(), flush=True)
    if row == "kill -9":
        os.kill(os.getpid(), signal.SIGKILL)
    if row == "exception":
        raise ValueError("a bug of the user")
    if row == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if row == "program ends early":
        sys.exit(0)
    if row == "another call":
        smp.allgather(1)
    if row == "another group":
        smp.recv_from(1 - victim)
smp.barrier()
"""


class Row(NamedTuple):
    name: str
    victim: int
    cause: str  # part of what every survivor says
    lost: bool = False


ROWS = [
    Row("kill -9", 0, "rank 0 failed: it ended without notice"),
    Row("kill -9", 1, "rank 1 failed: it ended without notice"),
    Row("kill at start", 0, "rank 0 failed: it ended without notice"),
    Row("kill at start", 1, "rank 1 failed: it ended without notice"),
    Row("exception", 0, "rank 0 failed: ValueError: a bug of the user"),
    Row("exception", 1, "rank 1 failed: ValueError: a bug of the user"),
    Row("freeze", 0, "rank 0 failed: it is frozen", lost=True),
    Row("freeze", 1, "rank 1 failed: it is frozen", lost=True),
    Row("absent", 0, "did not find rank 0", lost=True),
    Row("absent", 1, "rank 1 of 2 did not call smp.init", lost=True),
    Row("program ends early", 1, "the program of rank 1 has ended"),
    Row("another call", 1, "rank 0 is in smp.barrier, rank 1 came to smp.allgather"),
    Row("another group", 1, "rank 0 waits in smp.barrier for rank 1"),
    Row("all in one step", 1, "no rank has computed anything for"),
]
JOIN_SECONDS = 5.0
IDLE_SECONDS = 4.0


def measure(row: Row) -> tuple[float, str]:
    """Seconds from the failure to the end of the survivor, and what is wrong with that."""
    results = run_ranks(
        SCRIPT,
        2,
        {"partitions": 2, "auto_partition": False, "default_partition": 0},
        args=[row.name, row.victim],
        lost={row.victim} if row.lost else (),
        join_seconds=JOIN_SECONDS,
        environ={"OPENSMP_IDLE_SECONDS": IDLE_SECONDS},
        seconds=90,
    )
    survivor = results[1 - row.victim]
    seconds = survivor.at - began(results)
    if survivor.code == 0:
        return seconds, "exit code 0"
    return seconds, "" if row.cause in survivor.output else f"said: {survivor.output[-300:]}"


def began(results: list[RankResult]) -> float:
    return min(float(line[3:]) for r in results for line in r.lines if line.startswith("AT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="each row once instead of ten times")
    names = list(dict.fromkeys(row.name for row in ROWS))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW")
    arguments = parser.parse_args()
    times = 1 if arguments.once else 10
    print(f"seconds until the survivor has ended ({times} x, limit 15)\n")
    print(f"{'row':24}{'rank':>5}{'least':>8}{'median':>8}{'most':>8}  as expected")
    bad = 0
    for row in [row for row in ROWS if row.name in arguments.only]:
        measured = [measure(row) for _ in range(times)]
        seconds = [one for one, _ in measured]
        wrong = [fault for one, fault in measured if fault or one > 15]
        bad += bool(wrong)
        print(
            f"{row.name:24}{row.victim:5}{min(seconds):8.2f}{statistics.median(seconds):8.2f}"
            f"{max(seconds):8.2f}  {times - len(wrong)} of {times} {' '.join(wrong[:1])}",
            flush=True,
        )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
