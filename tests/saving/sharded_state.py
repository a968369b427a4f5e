"""Run by every rank: writes and reads optimizer state with and without `shard_optimizer_state`.

    opensmp run -n 2 sharded_state.py write FOLDER 1
    opensmp run -n 4 sharded_state.py read FOLDER 2

`write` trains, saves by all ways, trains on, and leaves what is expected of whoever reads that.
`read` restores each file, with the key and without it. `go on` trains with checkpoints until all
batches are done, and kills a rank once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from parity.shards import batches, loss_function, prepared, share, state, step_of

EARLY, LATE = 3, 6
KINDS = (False, True)


def optimizer() -> Any:
    return keras.optimizers.AdamW(1e-2, weight_decay=0.1, use_ema=True, global_clipnorm=0.1)


def train(model: Any, made: Any, first: int, last: int) -> None:
    train_step = step_of(model, made)
    for batch in batches(last)[first:]:
        train_step(*share(batch))


def merged(values: dict[str, Any]) -> dict[str, Any]:
    """What all ranks have; each replica has its own moving statistics, the first is taken."""
    import opensmp as smp

    whole: dict[str, Any] = {}
    for part in smp.allgather(values, smp.WORLD):
        for key, value in part.items():
            if not np.array_equal(whole.setdefault(key, value), value):
                assert key.startswith("moving"), key
    return whole


def check(found: dict[str, Any], path: Path, what: str) -> None:
    expected = np.load(path)
    missing = set(expected.files) - set(merged(found))
    assert not missing, f"{what}: nobody has {missing}"
    for key, value in found.items():
        if not key.startswith("moving"):
            np.testing.assert_array_equal(value, expected[key], err_msg=f"{what}, {key}")


def write(folder: Path, partitions: int) -> None:
    import opensmp as smp

    for sharded in KINDS:
        model, made = prepared(partitions, sharded), optimizer()
        model.compile(made, loss_function())
        train(model, made, 0, EARLY)
        values = merged(state(model, made))
        for background in KINDS:
            kind = f"{sharded}-{background}"
            checkpoint = tf.train.Checkpoint(model=model, optimizer=made)  # counts its saves
            manager = smp.CheckpointManager(checkpoint, folder / kind, background=background)
            manager.save()
            manager.wait()
        model.save(folder / f"{sharded}.keras")
        model.save_weights(folder / f"{sharded}.weights.h5")
        train(model, made, EARLY, LATE)
        later = merged(state(model, made))
        if smp.rank() == 0:
            np.savez(folder / f"early-{sharded}.npz", **values)
            np.savez(folder / f"late-{sharded}.npz", **later)
    if smp.rank() == 0:
        for when in ("early", "late"):
            same = [dict(np.load(folder / f"{when}-{kind}.npz")) for kind in KINDS]
            assert same[0].keys() == same[1].keys()
            for key, value in same[0].items():
                np.testing.assert_array_equal(value, same[1][key], err_msg=key)
        files = [
            tf.train.load_checkpoint(str(folder / f"{kind}-{background}"))
            for kind in KINDS
            for background in KINDS
        ]
        shapes = files[0].get_variable_to_shape_map()
        for file in files[1:]:
            assert file.get_variable_to_shape_map() == shapes
            for key in shapes:
                if "OBJECT_GRAPH" not in key:
                    first, second = files[0].get_tensor(key), file.get_tensor(key)
                    np.testing.assert_array_equal(first, second, err_msg=key)
    print("written", flush=True)


def read(folder: Path, partitions: int) -> None:
    import opensmp as smp

    prepared(partitions, sharded=False)
    first = share(batches(1)[0])
    # As many replicas as wrote it add up gradients in the same order.
    is_alike = (folder / f"size-{smp.size()}").exists()
    for sharded in KINDS:
        for source in KINDS:
            for ready in ("new", "built") if sharded == source else ("partitioned", "trained"):
                model, made = prepared(partitions, sharded), optimizer()
                model.compile(made, loss_function())
                if ready != "new":
                    model(first[0])
                if ready == "built":
                    made.build(model.trainable_variables)
                if ready == "trained":
                    train(model, made, 0, 1)
                checkpoint = tf.train.Checkpoint(model=model, optimizer=made)
                manager = smp.CheckpointManager(checkpoint, folder / f"{source}-False")
                assert manager.restore()
                what = f"checkpoint of {source}, {sharded}, {ready}"
                if ready in ("built", "trained"):
                    check(state(model, made), folder / f"early-{source}.npz", what)
                train(model, made, EARLY, LATE)
                if is_alike:
                    check(state(model, made), folder / f"late-{source}.npz", what)
                assert int(made.iterations) == LATE
                print(what, flush=True)
            for name in (f"{source}.weights.h5", f"{source}.keras"):
                model, made = prepared(partitions, sharded), optimizer()
                if name.endswith(".keras"):
                    model = smp.load_model(folder / name)
                    made = model.optimizer
                    model(first[0])
                else:
                    model.compile(made, loss_function())
                    model(first[0])
                    made.build(model.trainable_variables)
                    model.load_weights(folder / name)
                what = f"{name}, {sharded}"
                check(state(model, made), folder / f"early-{source}.npz", what)
                train(model, made, EARLY, LATE)
                if is_alike:
                    check(state(model, made), folder / f"late-{source}.npz", what)
                print(what, flush=True)


def go_on(folder: Path, partitions: int) -> None:
    """Trains from the newest checkpoint on; in the first run, a rank is killed on the way."""
    import opensmp as smp

    model, made = prepared(partitions, sharded=True), optimizer()
    checkpoint = tf.train.Checkpoint(model=model, optimizer=made)
    manager = smp.CheckpointManager(checkpoint, folder / "killed", max_to_keep=2)
    if manager.restore():
        model(share(batches(1)[0])[0])
        made.build(model.trainable_variables)
    is_first = int(made.iterations) == 0
    for step in range(int(made.iterations), LATE):
        train(model, made, step, step + 1)
        manager.save()
        if is_first and step == EARLY and smp.rank() == smp.size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    check(state(model, made), folder / "late-False.npz", "what was killed")
    print(f"went on{' in one run' * is_first}", flush=True)


def main(what: str, folder: Path, partitions: int) -> None:
    import opensmp as smp

    {"write": write, "read": read, "go on": go_on}[what](folder, partitions)
    if what == "write" and smp.rank() == 0:
        (folder / f"size-{smp.size()}").touch()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
