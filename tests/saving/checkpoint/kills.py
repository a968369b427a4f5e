"""Programs that save checkpoints and are killed while they do.

    python kills.py FOLDER SEED "random sync" "random background" "7 sync" "7 fixed" "count fixed"

Each argument after the seed is one program: it restores the newest checkpoint, tells what it
found, and saves on and on. It is killed with SIGKILL at a random moment, or before its n-th
change of the file system (of the first save; `count` tells how many there are). With `fixed`
every checkpoint has the same number and replaces the one before. One last program looks at
what all of them have left.

The programs are forked from one process that has imported TensorFlow and not used it yet, for
importing it takes longer than all the rest.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

import opensmp as smp

CHANGES = ("replace", "mkdir", "unlink", "rmdir", "fsync")
LARGEST_DELAY_SECONDS = 0.2


def main(folder: str, seed: int, programs: list[str]) -> None:
    moments = random.Random(seed)
    completed = 0  # number of the last save that has returned
    for number, program in enumerate([*programs, "look"]):
        when, _, how = program.partition(" ")
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            try:
                run(folder, writer, when, how)
            except BaseException as error:
                os.write(writer, f"error {type(error).__name__}: {error}\n".encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as lines:
            found = int(expect("restored", lines.readline(), program))
            # The save that was cut off may be there, or not.
            assert found in (completed, completed + 1), (program, found, completed)
            completed = found
            if when == "random":
                completed = int(expect("saved", lines.readline(), program))
                time.sleep(moments.uniform(0, LARGEST_DELAY_SECONDS))
                os.kill(process, signal.SIGKILL)
            for line in lines:
                kind, _, rest = line.partition(" ")
                assert kind in ("saved", "changes"), (program, line)
                if kind == "changes":
                    print("CHANGES", rest.strip(), flush=True)
                else:
                    completed = int(rest)
        _, status = os.waitpid(process, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed == (when not in ("look", "count")), (program, status)
        print(f"program {number} {program}: found {found}, completed {completed}", flush=True)


def expect(kind: str, line: str, program: str) -> str:
    first, _, rest = line.partition(" ")
    assert first == kind, (program, line)
    return rest


def run(folder: str, writer: int, when: str, how: str) -> None:
    """One program, in a process of its own."""
    warnings.simplefilter("error")  # a killed process leaves nothing that is damaged
    smp.init({"partitions": 1})
    values = [tf.Variable(tf.zeros([1 << 19])) for _ in range(3)]
    checkpoint = tf.train.Checkpoint(values=values)
    manager = smp.CheckpointManager(
        checkpoint, folder, max_to_keep=2, background=how == "background"
    )
    manager.restore()
    found = {float(x) for value in values for x in np.unique(value.numpy())}
    assert len(found) == 1, f"values of several checkpoints: {found}"
    number = int(found.pop())
    os.write(writer, f"restored {number}\n".encode())
    if when == "look":
        save(manager, values, number + 1, how)
        left = {name for name in os.listdir(folder) if "unfinished" in name}
        assert not left, left
        return
    changes = count_changes(None if when in ("random", "count") else int(when))
    while True:
        number += 1
        save(manager, values, number, how)
        os.write(writer, f"saved {number}\n".encode())
        if when == "count":
            os.write(writer, f"changes {changes[0]}\n".encode())
            return


def save(manager: Any, values: list[Any], number: int, how: str) -> None:
    for value in values:
        value.assign(tf.fill([1 << 19], float(number)))
    manager.save(checkpoint_number=1 if how == "fixed" else None)
    if how == "background":
        for value in values:
            value.assign(tf.fill([1 << 19], -1.0))  # training goes on
    manager.wait()


def count_changes(last: int | None) -> list[int]:
    """Counts changes of the file system, and ends the process before the one of this number."""
    count = [0]

    def counted(original: Any) -> Any:
        def change(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return change

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    return count


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
