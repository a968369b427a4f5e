"""Run by every rank: models trained with and without `shard_optimizer_state`, bit for bit the same.

    opensmp run -n 4 shards.py 2 "Adam" "SGD with momentum"

trains a model with each of these optimizers, with `smp.step` and with `fit`, without the key and
with it, and compares the weights of all replicas.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

BATCH = 16
NUM_STEPS = 5

_kinds = keras.optimizers


class WithNorms(_kinds.SGD):
    """A user's optimizer, with a slot of its own."""

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        self.norms = [self.add_variable_from_reference(v, name="norm") for v in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        gradient = tf.convert_to_tensor(gradient)
        norm = self.norms[self._get_variable_index(variable)]
        self.assign_add(norm, tf.square(gradient))
        super().update_step(gradient / (1 + tf.sqrt(norm)), variable, learning_rate)


def _several() -> Any:
    if not hasattr(_kinds, "MultiOptimizer"):  # Keras before 3.15
        return _kinds.Adam(1e-2)
    own = {".*bias": _kinds.SGD(0.1, momentum=0.9)}
    return _kinds.MultiOptimizer(_kinds.OptimizerMap(_kinds.Adam(1e-2), own))


OPTIMIZERS: Mapping[str, Callable[[], Any]] = {
    "SGD": lambda: _kinds.SGD(0.1),
    "SGD with momentum": lambda: _kinds.SGD(0.1, momentum=0.9, nesterov=True),
    "Adam": lambda: _kinds.Adam(1e-2),
    "Adam, amsgrad": lambda: _kinds.Adam(1e-2, amsgrad=True),
    "AdamW": lambda: _kinds.AdamW(1e-2, weight_decay=0.1),
    "Lion": lambda: _kinds.Lion(1e-2),
    "Adafactor": lambda: _kinds.Adafactor(1e-2),
    "Nadam": lambda: _kinds.Nadam(1e-2),
    "Adamax": lambda: _kinds.Adamax(1e-2),
    "Adagrad": lambda: _kinds.Adagrad(1e-1),
    "Adadelta": lambda: _kinds.Adadelta(1e-1),
    "RMSprop": lambda: _kinds.RMSprop(1e-2, momentum=0.9, centered=True),
    "Ftrl": lambda: _kinds.Ftrl(1e-1),
    "Lamb": lambda: _kinds.Lamb(1e-2),
    "Muon": lambda: _kinds.Muon(1e-2) if hasattr(_kinds, "Muon") else _kinds.Adam(),
    "ScheduleFreeAdamW": lambda: getattr(_kinds, "ScheduleFreeAdamW", _kinds.AdamW)(1e-2),
    "several": _several,
    "clipnorm": lambda: _kinds.Adam(1e-2, clipnorm=0.01),
    "clipvalue": lambda: _kinds.Adam(1e-2, clipvalue=0.001),
    "global_clipnorm": lambda: _kinds.SGD(0.3, momentum=0.9, global_clipnorm=0.03),
    "average": lambda: _kinds.Adam(1e-2, use_ema=True, ema_momentum=0.7),
    "average that overwrites": lambda: _kinds.Adam(
        1e-2, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=2
    ),
    "accumulation": lambda: _kinds.AdamW(1e-2, gradient_accumulation_steps=2),
    "accumulation, global_clipnorm": lambda: _kinds.SGD(
        0.3, momentum=0.9, gradient_accumulation_steps=2, global_clipnorm=0.03
    ),
    "accumulation, average": lambda: _kinds.SGD(
        0.3, 0.9, gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=2
    ),
    "loss_scale_factor": lambda: _kinds.Adam(1e-2, loss_scale_factor=8.0, global_clipnorm=0.03),
    "LossScaleOptimizer": lambda: _kinds.LossScaleOptimizer(
        _kinds.Adam(1e-2, global_clipnorm=0.03, use_ema=True), initial_scale=3e38
    ),
    "LossScaleOptimizer, accumulation": lambda: _kinds.LossScaleOptimizer(
        _kinds.Nadam(1e-2, global_clipnorm=0.03, gradient_accumulation_steps=2),
        initial_scale=3e38,
        dynamic_growth_steps=2,
    ),
    "schedule": lambda: _kinds.Adam(_kinds.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "a user's": lambda: WithNorms(0.1, momentum=0.9),
}


def network() -> keras.Model:
    """Layers of unequal sizes: sparse gradients, a constraint, a frozen layer, an unused weight."""
    tokens = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(29, 24)(tokens)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(16, activation="tanh", kernel_constraint="max_norm")(x)
    frozen = keras.layers.Dense(32, activation="tanh")
    frozen.trainable = False
    x = frozen(x)
    x = keras.layers.Dense(48, activation="tanh", bias_constraint="non_neg")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dense(20, activation="tanh")(x)
    return keras.Model(tokens, keras.layers.Dense(5)(x))


def batches(number: int = NUM_STEPS) -> list[tuple[Any, Any]]:
    random = np.random.default_rng(3)
    return [
        (random.integers(0, 29, (BATCH, 6)).astype("int32"), random.integers(0, 5, BATCH))
        for _ in range(number)
    ]


def loss_function() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def prepared(partitions: int, sharded: bool, **keys: Any) -> Any:
    """A new model under a new configuration."""
    import opensmp as smp

    smp.shutdown()
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    config = {"partitions": partitions, "microbatches": 2, "shard_optimizer_state": sharded}
    smp.init({**config, **keys})
    return smp.DistributedModel.from_keras(network())


def step_of(model: Any, optimizer: Any) -> Any:
    """A training step with `smp.step`."""
    import opensmp as smp

    loss_fn = loss_function()

    @smp.step
    def forward_backward(inputs: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(inputs, training=True))
            scaled = optimizer.scale_loss(loss)
        return tape.gradient(scaled, model.trainable_variables), loss

    @tf.function
    def train_step(inputs: Any, labels: Any) -> Any:
        gradients, loss = forward_backward(inputs, labels)
        gradients = smp.allreduce([g.accumulate() for g in gradients])
        if getattr(optimizer, "loss_scale_factor", None):  # Keras divides no sparse gradients
            gradients = [tf.convert_to_tensor(g) for g in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return smp.allreduce(loss.reduce_mean())

    return train_step


def share(batch: tuple[Any, Any]) -> list[Any]:
    """The rows of this replica."""
    import opensmp as smp

    size = BATCH // smp.dp_size()
    return [part[smp.dp_rank() * size :][:size] for part in batch]


def by_steps(model: Any, optimizer: Any) -> None:
    train_step = step_of(model, optimizer)
    for batch in batches():
        train_step(*share(batch))
    optimizer.finalize_variable_values(model.trainable_variables)


def by_fit(model: Any, optimizer: Any) -> None:
    model.compile(optimizer, loss_function())
    x, y = (np.concatenate(part) for part in zip(*batches(), strict=True))
    model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)


FACES = {"steps": by_steps, "fit": by_fit}


def state(model: Any, optimizer: Any) -> dict[str, Any]:
    """What this rank has; `moving` are statistics of a replica's own rows."""
    from opensmp import _private

    trained = {id(variable) for variable in model.trainable_variables}
    here = {
        f"{'weight' if id(v) in trained else 'moving'} {i}": v
        for i, v in enumerate(model.variables)
    }
    here |= {f"slot {i}": v for i, v in enumerate(optimizer.variables)}
    return {k: np.array(v) for k, v in here.items() if not _private.is_elsewhere(v)}


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: hashlib.sha256(value.tobytes()).hexdigest() for key, value in values.items()}


def slot_bytes(optimizer: Any) -> int:
    """Bytes of slots that have memory here."""
    import opensmp as smp

    return sum(v.numpy().nbytes for v in smp.local_variables(optimizer.variables) if len(v.shape))


def _slots_of(variable: Any) -> int:
    """Bytes of the slots of a variable, here or in another replica."""
    from opensmp import _private

    _, *slots = _private.with_slots(variable)
    return sum(math.prod(slot.shape) * 4 for slot in slots)


def compare(partitions: int, name: str, face: str) -> None:
    import opensmp as smp

    model = prepared(partitions, sharded=False)
    optimizer = OPTIMIZERS[name]()
    FACES[face](model, optimizer)
    expected, whole = state(model, optimizer), slot_bytes(optimizer)
    initial = digests(state(prepared(partitions, sharded=False), OPTIMIZERS[name]()))
    model = prepared(partitions, sharded=True)
    optimizer = OPTIMIZERS[name]()
    FACES[face](model, optimizer)
    found, part = state(model, optimizer), slot_bytes(optimizer)
    assert found.keys() <= expected.keys()
    weights = {key for key in expected if key.startswith("weight")}
    assert weights <= found.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=f"{name}, {face}, {key}")
    assert any(digests(found)[key] != initial.get(key) for key in weights), "it trained nothing"
    group = smp.get_dp_group()
    everywhere = smp.allgather((smp.get_dp_group(), digests(found), part), smp.WORLD)
    of_replicas = [(prints, size) for members, prints, size in everywhere if members == group]
    first: dict[str, str] = {}
    for prints, _ in of_replicas:
        for key, value in prints.items():
            differs = first.setdefault(key, value) != value
            assert not differs or key.startswith("moving"), f"{name}: {key} differs in replicas"
    assert first.keys() == expected.keys(), "every slot is in some replica"
    sizes = [size for _, size in of_replicas]
    if whole:
        assert sum(sizes) == whole, (sizes, whole)
        largest = max(_slots_of(v) for v in smp.local_variables(model.trainable_variables))
        assert max(sizes) <= max(0.6 * whole, largest), (sizes, whole)
    print(f"{name}, {face}: {whole} bytes, divided into {sizes}", flush=True)


def main(partitions: int, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name in names or OPTIMIZERS:
        for face in FACES if name != "loss_scale_factor" else ["steps"]:
            compare(partitions, name, face)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
