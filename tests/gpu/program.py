"""Trains models on the devices of this machine, beside plain Keras, and prints what it saw.

    python program.py KIND MODEL PARTITIONS SCHEDULE STEPS
    opensmp run -n 2 --partitions 2 program.py KIND MODEL 2 SCHEDULE STEPS

KIND is `gpu` or `cpu`. A GPU that several partitions of one process need is divided into logical
GPUs. Rank 0 prints one line of JSON after REPORT. Plain Keras trains on the first device of the
same kind, over the same microbatches of the whole batch.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if os.environ.get("GPU_CHECK_ONE_EACH") == "1":  # as launchers do that hide the other GPUs
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["OPENSMP_RUN_LOCAL_RANK"]

import keras
import numpy as np
import tensorflow as tf

MICROBATCHES, ROWS = 4, 32
MIB_OF_A_DIVIDED_GPU = 4096
LEARNING_RATE = 0.05


def mlp(width: int = 64, layers: int = 6) -> keras.Model:
    inputs = x = keras.Input((width,))
    for _ in range(layers):
        x = keras.layers.Dense(width, activation="gelu")(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def cnn() -> keras.Model:
    inputs = x = keras.Input((16, 16, 3))
    for filters in (8, 16):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.MaxPooling2D()(keras.layers.ReLU()(x))
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)))


def transformer(width: int = 32, blocks: int = 2, length: int = 16) -> keras.Model:
    tokens = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(100, width)(tokens)
    for _ in range(blocks):
        h = keras.layers.LayerNormalization()(x)
        attended = keras.layers.MultiHeadAttention(4, width // 4)(h, h, use_causal_mask=True)
        x = keras.layers.Add()([x, attended])
        h = keras.layers.Dense(4 * width, activation="gelu")(keras.layers.LayerNormalization()(x))
        x = keras.layers.Add()([x, keras.layers.Dense(width)(h)])
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(10)(x))


def large() -> keras.Model:
    return mlp(width=2048, layers=16)


MODELS: dict[str, tuple[Callable[[], keras.Model], tuple[int, ...], int]] = {
    "mlp": (mlp, (64,), ROWS),
    "cnn": (cnn, (16, 16, 3), ROWS),
    "transformer": (transformer, (16,), ROWS),
    "large": (large, (2048,), 512),
}


def batch(name: str) -> tuple[Any, Any]:
    _, shape, rows = MODELS[name]
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, rows)
    if name == "transformer":
        return random.integers(0, 100, (rows, *shape)).astype("int32"), labels
    return random.normal(size=(rows, *shape)).astype("float32"), labels


def build(name: str) -> keras.Model:
    keras.utils.set_random_seed(1)
    return MODELS[name][0]()


def loss_function() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def optimizer() -> Any:
    return keras.optimizers.SGD(LEARNING_RATE, momentum=0.9)


def divide_gpu(partitions: int) -> None:
    """Makes logical GPUs if this process has fewer physical ones than partitions."""
    gpus = tf.config.list_physical_devices("GPU")
    missing = partitions - len(gpus)
    if missing > 0:
        limit = tf.config.LogicalDeviceConfiguration(memory_limit=MIB_OF_A_DIVIDED_GPU)
        tf.config.set_logical_device_configuration(gpus[-1], [limit] * (missing + 1))


def plain_step(model: keras.Model, device: str) -> Callable[..., Any]:
    loss_of, updates = loss_function(), optimizer()

    @tf.function
    def step(x: Any, y: Any) -> Any:
        losses, sums = [], None
        pairs = zip(tf.split(x, MICROBATCHES), tf.split(y, MICROBATCHES), strict=True)
        for part_x, part_y in pairs:
            with tf.GradientTape() as tape:
                losses.append(loss_of(part_y, model(part_x, training=True)))
            found = tape.gradient(losses[-1], model.trainable_variables)
            found = [tf.convert_to_tensor(gradient) for gradient in found]
            sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        means = [total / MICROBATCHES for total in sums]
        updates.apply_gradients(zip(means, model.trainable_variables, strict=True))
        return tf.add_n(losses) / MICROBATCHES

    def on_device(x: Any, y: Any) -> Any:
        with tf.device(device):
            return step(x, y)

    return on_device


def split_step(model: Any, replicas: int) -> Callable[..., Any]:
    import opensmp as smp

    loss_of, updates = loss_function(), optimizer()

    @smp.step
    def forward_backward(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        return loss, tape.gradient(loss, model.trainable_variables)

    @tf.function
    def step(x: Any, y: Any) -> Any:
        loss, gradients = forward_backward(x, y)
        gradients = [gradient.accumulate() for gradient in gradients]
        loss = loss.reduce_mean()
        if replicas > 1:
            gradients, loss = smp.allreduce(gradients), smp.allreduce(loss)
        updates.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return step


def allocated(device: str, which: str) -> int:
    """Bytes of TensorFlow's allocator on a GPU; it does not count those of a CPU."""
    return int(tf.config.experimental.get_memory_info(device)[which])


def train(step: Callable[..., Any], x: Any, y: Any, steps: int) -> tuple[list[float], float]:
    """The losses, and the median seconds of a step but for the first two."""
    losses, seconds = [], []
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(float(step(x, y)))
        seconds.append(time.perf_counter() - began)
    return losses, statistics.median(seconds[2:] or seconds)


def difference(one: Any, other: Any) -> float:
    one, other = np.asarray(one, "float64"), np.asarray(other, "float64")
    scale = max(1e-3, float(np.max(np.abs(other), initial=0.0)))
    return float(np.max(np.abs(one - other), initial=0.0)) / scale


def main(kind: str, name: str, partitions: int, schedule: str, steps: int) -> None:
    import opensmp as smp

    tf.config.experimental.enable_tensor_float_32_execution(False)
    ranks = int(os.environ.get("OPENSMP_RUN_SIZE", "1"))
    if kind == "gpu" and ranks == 1:
        divide_gpu(partitions)
    smp.init(
        {
            "partitions": partitions,
            "microbatches": MICROBATCHES,
            "pipeline": schedule,
            "devices": kind,
        }
    )
    replicas = smp.dp_size()
    model = smp.DistributedModel.from_keras(build(name))
    x, y = batch(name)
    # Microbatches of replicas together are those of plain Keras.
    mine = [part[smp.dp_rank() :: replicas] for part in np.split(np.arange(len(x)), MICROBATCHES)]
    rows = np.concatenate(mine)
    step = split_step(model, replicas)
    losses, seconds = train(step, tf.constant(x[rows]), tf.constant(y[rows]), steps)
    memory = smp.memory_report(gather=ranks > 1).as_dict()["partitions"]
    with smp.record_timeline() as timeline:
        step(tf.constant(x[rows]), tf.constant(y[rows]))
    weights = model.get_weights()
    placed = sorted(
        {variable.value.device.rpartition("device:")[2] for variable in model.variables}
        if ranks == 1
        else []
    )
    if smp.rank() == 0:
        device = f"{kind.upper()}:0"
        with tf.device(device):
            expected_model = build(name)
        expected_step = plain_step(expected_model, device)
        is_counted = kind == "gpu"
        if is_counted:
            tf.config.experimental.reset_memory_stats(device)
        before = allocated(device, "current") if is_counted else 0
        expected, alone = train(expected_step, tf.constant(x), tf.constant(y), steps)
        expected_step(tf.constant(x), tf.constant(y))  # as the step that was recorded
        report = {
            "devices": placed,
            "ranks": ranks,
            "replicas": replicas,
            "loss difference": difference(losses, expected),
            "weight difference": max(map(difference, weights, expected_model.get_weights())),
            "seconds": seconds,
            "seconds of plain Keras": alone,
            "overlap": timeline.overlap if partitions > 1 and ranks == 1 else None,
            "peak bytes": [each["peak_bytes"] for each in memory],
            "peak bytes of plain Keras": (
                allocated(device, "peak") - before if is_counted else None
            ),
        }
        print("REPORT", json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
