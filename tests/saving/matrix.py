"""Every set-up that saves, and every one that loads: what the matrix of test_matrix.py runs.

As a program it is one set-up in processes of its own: `python matrix.py save FOLDER SETUP` writes
all formats, `python matrix.py load FOLDER SETUP NAME ...` opens files and writes what it found.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SETUPS = (
    "none",
    "mirrored-2",
    "mirrored-4",
    "multi-worker",
    "opensmp-2",
    "opensmp-4",
    "hybrid",
)
# Those in one process with four devices; each of the others starts processes.
HERE = ("none", "mirrored-2", "mirrored-4", "opensmp-2", "opensmp-4")
# Ending of the file to the name in the table; the empty one is a SavedModel's directory.
FORMATS = {
    ".keras": "`.keras`",
    ".h5": "`.h5`",
    ".weights.h5": "`.weights.h5`",
    "": "SavedModel",
    ".ckpt": "TF checkpoint",
    ".json": "weights + JSON",
}
WHOLE = (".keras", ".h5", ".json")  # the model and how it is compiled
STATEFUL = (".keras", ".h5", ".weights.h5", ".ckpt", ".json")  # the optimizer's state
PROCESSES = {"multi-worker": 1, "hybrid": 2}
PARTITIONS = {"opensmp-2": 2, "opensmp-4": 4, "hybrid": 2}
MICROBATCHES = 2
BATCH = 8

X = np.random.default_rng(0).normal(size=(16, 5)).astype("float32")
Y = np.random.default_rng(1).normal(size=(16, 3)).astype("float32")


def made() -> Any:
    """Four layers with weights, and no randomness: replicas see other halves of a batch."""
    import keras

    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,), name="features")
    x = keras.layers.Dense(6, activation="tanh", name="first")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(4, activation="tanh", name="second")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="top")(x), name="net")
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def config_of(setup: str) -> dict[str, Any]:
    """What `smp.init` is given under a set-up of opensmp."""
    config: dict[str, Any] = {"partitions": PARTITIONS[setup], "microbatches": MICROBATCHES}
    if setup == "hybrid":
        config["processes_per_replica"] = 1
    return config


def scope_of(setup: str) -> Any:
    """The scope in which models are made; `smp.init` comes before, where it is needed."""
    import tensorflow as tf

    if setup.startswith("mirrored"):
        names = [f"CPU:{i}" for i in range(int(setup[-1]))]
        ops = tf.distribute.ReductionToOneDevice()
        return tf.distribute.MirroredStrategy(names, cross_device_ops=ops).scope()
    if setup == "multi-worker":
        return _multi_worker().scope()
    return contextlib.nullcontext()


_strategies: list[Any] = []


def _multi_worker() -> Any:
    import tensorflow as tf

    if not _strategies:  # it must be made before anything else, and once
        _strategies.append(tf.distribute.MultiWorkerMirroredStrategy())
    return _strategies[0]


def train(model: Any, epochs: int) -> list[float]:
    """Trains on whole batches, the same under all set-ups; gives the losses."""
    history = model.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    return [float(loss) for loss in history.history["loss"]]


def save_all(setup: str, folder: Path) -> None:
    """Trains under a set-up, writes all formats, and what must be found in them."""
    import opensmp as smp

    with scope_of(setup):
        model = made()
        if setup in PARTITIONS:
            model = smp.DistributedModel.from_keras(model)
        train(model, 2)
        for ending in FORMATS:
            smp.save_model(model, folder / f"{setup}{ending}")
        weights, state = values_of(model)
        after = train(model, 1)
    if is_first():
        np.savez(
            folder / f"{setup}.expected.npz",
            after=after,
            **{f"weight-{i}": w for i, w in enumerate(weights)},
            **{f"state-{i}": s for i, s in enumerate(state)},
        )


def values_of(model: Any) -> tuple[list[Any], list[Any]]:
    """Weights, and the optimizer's variables."""
    return (
        [np.asarray(v) for v in model.weights],
        [np.asarray(v) for v in model.optimizer.variables],
    )


def load_one(setup: str, folder: Path, name: str) -> dict[str, Any]:
    """Loads one file under a set-up; says what was found, and what was not as it should be."""
    import keras

    import opensmp as smp

    source, ending = split(name)
    expected = np.load(folder / f"{source}.expected.npz")
    faults = []
    with scope_of(setup):
        model = smp.load_model(folder / name, None if ending in WHOLE else made)
        weights, state = values_of(model)
        if not equal(weights, expected, "weight"):
            faults.append("weights differ")
        if ending in WHOLE and (
            model.loss != "mse" or type(model.optimizer) is not keras.optimizers.Adam
        ):
            faults.append("the compilation differs")
        difference = None
        if ending in STATEFUL:
            if not equal(state, expected, "state"):
                faults.append("the optimizer's state differs")
            after = train(model, 1)
            difference = float(np.max(np.abs(np.subtract(after, expected["after"]))))
            if not np.allclose(after, expected["after"], rtol=1e-5):
                faults.append(f"training goes on with {after}, not {expected['after']}")
        elif setup in PARTITIONS:
            model.predict(X, batch_size=BATCH, verbose=0)
    return {"setup": setup, "name": name, "faults": faults, "difference": difference}


def split(name: str) -> tuple[str, str]:
    """Set-up and ending of a file's name."""
    source = next(s for s in SETUPS if name.startswith(s))
    return source, name[len(source) :]


def equal(found: Sequence[Any], expected: Any, kind: str) -> bool:
    """Whether arrays have the bits of those that were written."""
    names = [name for name in expected.files if name.startswith(f"{kind}-")]
    return len(names) == len(found) and all(
        np.array_equal(expected[f"{kind}-{i}"], value) for i, value in enumerate(found)
    )


def is_first() -> bool:
    """Whether this process writes what it found."""
    import opensmp as smp

    return not smp.is_initialized() or smp.rank() == 0


def main(arguments: list[str]) -> None:
    """One set-up in processes of its own."""
    import opensmp as smp

    what, folder, setup, *names = arguments
    if setup in PARTITIONS:
        smp.init(config_of(setup))
    else:
        _multi_worker()
    if what == "save":
        save_all(setup, Path(folder))
        return
    results = [load_one(setup, Path(folder), name) for name in names]
    if is_first():
        Path(folder, f"{setup}.results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
