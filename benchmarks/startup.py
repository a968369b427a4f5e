"""What a training step takes before it first returns, and how that grows.

    python benchmarks/startup.py                       # the table, about ten minutes
    python benchmarks/startup.py --quick               # two small rows
    python benchmarks/startup.py --against OTHER/src   # beside another version, in turns

A Transformer of small layers (width 32, 8 positions), so that nothing but the start takes time,
trained for one step in a new process: "trace" is Python building the graph, "first run" is
TensorFlow optimising and running it. Both are processor seconds without the import of TensorFlow;
"steady" is a step after that, in milliseconds. Each column of growth is the exponent between two
rows: 1 is as many times as long as there is more of it.

"plain" is a `tf.function` of plain Keras that loops over the same microbatches.

What changes of the start were expected to give, of 4 blocks and 64 microbatches, and what was found
on a busy machine:

- The search of XLA for reference types ended: 30 % of the first run, by `perf`. Found: a quarter of
  it, but functions with a mark that ends the search cannot be used in a dataset or a SavedModel, so
  it stays.
- Equal constants are one: a tenth of the first run. Found: no more than the noise.
- Prepared attributes of calls, and no inference of their shapes: no number was expected. Found: a
  quarter of the trace.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PARTITIONS = 4
ROWS = (  # face, layers, microbatches
    ("step", 4, 4),
    ("step", 4, 16),
    ("step", 4, 64),
    ("step", 16, 4),
    ("step", 48, 4),
    ("fit", 4, 4),
    ("fit", 4, 64),
    ("fit", 16, 4),
    ("plain", 4, 4),
    ("plain", 4, 16),
    ("plain", 16, 4),
)
QUICK = (("step", 2, 4), ("step", 2, 16))
WIDTH, LENGTH = 32, 8


def build(layers: int) -> Any:
    import keras

    x = inputs = keras.Input((LENGTH, WIDTH))
    for _ in range(layers):
        h = keras.layers.LayerNormalization()(x)
        x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(2, WIDTH // 2)(h, h)])
        h = keras.layers.LayerNormalization()(x)
        h = keras.layers.Dense(2 * WIDTH, activation="relu")(h)
        x = keras.layers.Add()([x, keras.layers.Dense(WIDTH)(h)])
    return keras.Model(inputs, keras.layers.Dense(4)(x[:, 0]))


def train_step(face: str, model: Any, loss_fn: Any, optimizer: Any, microbatches: int) -> Any:
    """A `tf.function` of one training step, for the faces that are not `fit`."""
    import tensorflow as tf

    import opensmp as smp

    def forward_backward(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    if face == "step":
        pipelined = smp.step(forward_backward)

        @tf.function
        def train(x: Any, y: Any) -> Any:
            gradients, loss = pipelined(x, y)
            means = [gradient.accumulate() for gradient in gradients]
            optimizer.apply_gradients(zip(means, model.trainable_variables, strict=True))
            return loss.reduce_mean()

        return train

    @tf.function
    def train_plain(x: Any, y: Any) -> Any:
        totals: list[Any] = []
        losses = []
        parts = zip(tf.split(x, microbatches), tf.split(y, microbatches), strict=True)
        for part_x, part_y in parts:
            gradients, loss = forward_backward(part_x, part_y)
            pairs = zip(totals, gradients, strict=True)
            totals = [a + b for a, b in pairs] if totals else gradients
            losses.append(loss)
        means = [total / microbatches for total in totals]
        optimizer.apply_gradients(zip(means, model.trainable_variables, strict=True))
        return tf.add_n(losses) / microbatches

    return train_plain


def measure(face: str, layers: int, microbatches: int) -> dict[str, float]:
    """Runs one row in this process."""
    import keras
    import numpy as np
    import tensorflow as tf

    import opensmp as smp

    if face != "plain":
        smp.init({"partitions": PARTITIONS, "microbatches": microbatches})
    keras.utils.set_random_seed(0)
    model = build(layers)
    if face != "plain":
        model = smp.DistributedModel.from_keras(model)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.01)
    random = np.random.default_rng(0)
    x = random.normal(size=(microbatches, LENGTH, WIDTH)).astype("float32")
    y = np.arange(microbatches) % 4
    trace = 0.0
    began = time.process_time()
    if face == "fit":
        model.compile(optimizer, loss_fn)

        def run() -> float:
            history = model.fit(x, y, batch_size=microbatches, epochs=1, verbose=0, shuffle=False)
            return float(history.history["loss"][0])

    else:
        train = train_step(face, model, loss_fn, optimizer, microbatches)
        data = tf.constant(x), tf.constant(y)
        train.get_concrete_function(*data)
        trace = time.process_time() - began

        def run() -> float:
            return float(train(*data))

    loss = run()
    total = time.process_time() - began
    run()
    began, steps = time.process_time(), 5
    for _ in range(steps):
        run()
    steady = (time.process_time() - began) / steps
    return {
        "trace": trace,
        "first_run": total - trace,
        "total": total,
        "steady": 1000 * steady,
        "loss": loss,
    }


def in_new_process(row: tuple[str, int, int], source: Path | None) -> dict[str, float]:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    if source is not None:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    command = [sys.executable, __file__, "--row", *map(str, row)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    measured: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return measured


def growth(rows: dict[tuple[str, int, int], dict[str, float]]) -> list[str]:
    """One line per face and pair of neighbouring rows that differ in one number only."""
    lines = []
    for face in dict.fromkeys(row[0] for row in rows):
        for position, name in ((1, "layers"), (2, "microbatches")):
            alike: dict[int, list[tuple[str, int, int]]] = {}
            for row in rows:
                if row[0] == face:
                    alike.setdefault(row[3 - position], []).append(row)
            for present in alike.values():
                ordered = sorted(present, key=lambda row: row[position])
                for small, large in itertools.pairwise(ordered):
                    times = rows[large]["total"] / rows[small]["total"]
                    exponent = math.log(times) / math.log(large[position] / small[position])
                    lines.append(
                        f"{face}: {small[position]} to {large[position]} {name}: "
                        f"{times:.2f} times as long, exponent {exponent:.2f}"
                    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small rows")
    parser.add_argument("--against", type=Path, metavar="SRC", help="src of another version")
    parser.add_argument("--row", nargs=3, metavar=("FACE", "LAYERS", "MICROBATCHES"))
    given = parser.parse_args()
    if given.row:
        face, layers, microbatches = given.row
        print(json.dumps(measure(face, int(layers), int(microbatches))))
        return
    sources: dict[str, Path | None] = {"here": None}
    if given.against is not None:
        sources["other"] = given.against.resolve()
    found: dict[str, dict[tuple[str, int, int], dict[str, float]]] = {name: {} for name in sources}
    print("face   layers  microbatches  version  trace  first run  total  steady (ms)  loss")
    for row in QUICK if given.quick else ROWS:
        for name, source in sources.items():
            if name != "here" and row[0] == "plain":
                continue
            measured = found[name][row] = in_new_process(row, source)
            face, layers, microbatches = row
            print(
                f"{face:6} {layers:6} {microbatches:13}  {name:7} {measured['trace']:6.1f} "
                f"{measured['first_run']:10.1f} {measured['total']:6.1f} "
                f"{measured['steady']:12.1f}  {measured['loss']:.6f}",
                flush=True,
            )
    for name, rows in found.items():
        print(f"\nGrowth ({name}):")
        print("\n".join(growth(rows)))


if __name__ == "__main__":
    main()
