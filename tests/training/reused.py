"""Layers of a model that is split, used in other models: plain and split, number by number.

Each program takes `wrap`, which is the identity for plain Keras and `from_keras` for a split
model, and gives numbers. Run by every rank of several processes:

    opensmp run -n 2 --partitions 2 --microbatches 2 reused.py head chain
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp

Wrap = Callable[[keras.Model], keras.Model]
Numbers = list[Any]
Program = Callable[[Wrap], Numbers]

BOUND = 1e-10
SINGLE = {"lora": 1e-6}
"""Programs with weights that Keras makes of single precision."""
ROWS = 8
L = keras.layers


def data(columns: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, columns))


def labels() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, 2))


def body() -> keras.Model:
    inputs = keras.Input((6,))
    h = L.Dense(8, activation="tanh", name="h1")(inputs)
    h = L.Dense(8, activation="tanh", name="h2")(h)
    h = L.Dense(8, activation="tanh", name="h3")(h)
    return keras.Model(inputs, L.Dense(2, name="top")(h), name="base")


def trained(wrap: Wrap, model: keras.Model | None = None) -> keras.Model:
    return retrained(wrap(model or body()))


def compiled(model: keras.Model) -> keras.Model:
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


def retrained(model: keras.Model) -> keras.Model:
    fit(compiled(model))
    return model


def fit(model: keras.Model) -> Numbers:
    history = model.fit(data(), labels(), batch_size=4, epochs=2, shuffle=False, verbose=0)
    return [history.history["loss"]]


def state(*models: keras.Model) -> Numbers:
    """What models compute and hold."""
    found: Numbers = []
    for model in models:
        found += [model.predict(data(), batch_size=4, verbose=0), *model.get_weights()]
    return found


def in_turns(*models: keras.Model) -> Numbers:
    """Trains models one after the other, twice; each goes on where another has left it."""
    found: Numbers = []
    for model in (*models, *models):
        found += fit(model)
    return found + state(*models)


# --- programs -------------------------------------------------------------------------------


def head(wrap: Wrap) -> Numbers:
    """A new head, as large as the base, on a trained base; then the base again."""
    base = trained(wrap)
    h = L.Dense(24, activation="tanh")(base.get_layer("h3").output)
    return in_turns(compiled(wrap(keras.Model(base.input, L.Dense(2)(h)))), base)


def long_head(wrap: Wrap) -> Numbers:
    """All that is kept lies in one partition, and the rest is larger."""
    base = trained(wrap)
    h = base.get_layer("h1").output
    for _ in range(4):
        h = L.Dense(16, activation="tanh")(h)
    return in_turns(compiled(wrap(keras.Model(base.input, L.Dense(2)(h)))), base)


def late_part(wrap: Wrap) -> Numbers:
    """Layers of the last partition come first, those of the first one last."""
    base = trained(wrap)
    inputs = keras.Input((8,))
    h = base.get_layer("h2")(base.get_layer("h3")(inputs))
    top = keras.Model(inputs, base.get_layer("top")(L.Dense(8)(h)))
    inputs = keras.Input((6,))
    return in_turns(compiled(wrap(keras.Model(inputs, top(L.Dense(8)(inputs))))), base)


def extractor(wrap: Wrap) -> Numbers:
    """What a layer inside gives."""
    base = trained(wrap)
    features = wrap(keras.Model(base.input, [base.get_layer("h1").output, base.output]))
    found = list(features.predict(data(), batch_size=4, verbose=0))
    found += [*features(data()), *fit(base)]
    return [*found, *features.predict(data(), batch_size=4, verbose=0)]


def frozen(wrap: Wrap) -> Numbers:
    """A base that is not trained, then the last layer of it, then all of it."""
    base = trained(wrap)
    base.trainable = False
    h = L.Dense(8, activation="tanh")(base.get_layer("h2").output)
    new = compiled(wrap(keras.Model(base.input, L.Dense(2)(h))))
    found = fit(new) + state(new, base)
    base.trainable = True
    base.get_layer("h1").trainable = False
    return found + in_turns(compiled(new), compiled(base))


def predicted(wrap: Wrap) -> Numbers:
    """A base that has only been predicted with."""
    base = wrap(body())
    found = [base.predict(data(), batch_size=4, verbose=0)]
    new = wrap(keras.Model(base.input, L.Dense(2)(base.get_layer("h3").output)))
    return [*found, *in_turns(compiled(new), compiled(base))]


def nested(wrap: Wrap) -> Numbers:
    """A model that is split as a layer of another one."""
    base = trained(wrap)
    return in_turns(compiled(wrap(keras.Sequential([base, L.Dense(3), L.Dense(2)]))), base)


def nested_call(wrap: Wrap) -> Numbers:
    """The same, called as a function of another model's tensors."""
    base = trained(wrap)
    inputs = keras.Input((6,))
    outputs = L.Dense(2)(base(L.Dense(6, activation="tanh")(inputs)))
    return in_turns(compiled(wrap(keras.Model(inputs, outputs))), base)


def chain(wrap: Wrap) -> Numbers:
    """Three models in a row, each of the one before."""
    base = trained(wrap)
    h = L.Dense(24, activation="tanh", name="h4")(base.get_layer("h3").output)
    second = trained(wrap, keras.Model(base.input, L.Dense(2)(h), name="second"))
    h = L.Dense(8, activation="tanh")(second.get_layer("h4").output)
    third = trained(wrap, keras.Model(second.input, L.Dense(2)(h), name="third"))
    return in_turns(third, base, second)


def embedding(wrap: Wrap) -> Numbers:
    """Two models that share an embedding, the second one made before the first is trained."""
    table = L.Embedding(12, 6, name="table")

    def reader(width: int) -> keras.Model:
        inputs = keras.Input((6,), dtype="int32")
        h = L.Dense(width, activation="tanh")(L.Flatten()(table(inputs)))
        return compiled(wrap(keras.Model(inputs, L.Dense(2)(h))))

    first, second = reader(3), reader(40)
    tokens = np.random.default_rng(2).integers(0, 12, (ROWS, 6))
    found: Numbers = []
    for model in (first, second, first, second):
        history = model.fit(tokens, labels(), batch_size=4, shuffle=False, verbose=0)
        found.append(history.history["loss"])
        for each in (first, second):
            found.append(each.predict(tokens, batch_size=4, verbose=0))
    return found + first.get_weights() + second.get_weights()


def cloned(wrap: Wrap) -> Numbers:
    """A copy with the weights of the first, and no more in common with it."""
    base = trained(wrap)
    copy = wrap(keras.models.clone_model(base))
    copy.set_weights(base.get_weights())
    return in_turns(compiled(copy), base)


def cloned_target(wrap: Wrap) -> Numbers:
    """The same, where the copy has been split before it gets the weights."""
    base = trained(wrap)
    copy = wrap(keras.models.clone_model(base))
    found = [np.shape(copy.predict(data(), batch_size=4, verbose=0))]
    copy.set_weights(base.get_weights())
    return found + in_turns(compiled(copy), base)


def lora(wrap: Wrap) -> Numbers:
    """Some layers of a base get small matrices beside their kernels; then it serves a new head."""
    base = trained(wrap)
    for name in ("h1", "h3"):
        start = keras.initializers.RandomNormal(seed=3)
        base.get_layer(name).enable_lora(2, a_initializer=start)
    new = compiled(wrap(keras.Model(base.input, L.Dense(2)(base.get_layer("h3").output))))
    return in_turns(new, compiled(base))


def custom_steps(wrap: Wrap) -> Numbers:
    """A subclass that uses layers of a base, trained by a loop of its own."""
    base = trained(wrap)

    class Head(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = base.get_layer("h2"), base.get_layer("h1")
            self.top = L.Dense(2)

        def call(self, x: Any) -> Any:
            return self.top(self.first(self.second(x)))

    new = wrap(Head())
    optimizer = keras.optimizers.Adam(0.05)
    found = []
    for _ in range(3):
        gradients, loss = gradients_of(new, data(), labels())
        optimizer.apply(gradients, new.trainable_variables)
        found.append(loss)
    return [*found, *in_turns(base, compiled(new))]


def configured_again(wrap: Wrap) -> Numbers:
    """A base from before another `smp.init`: other partitions, other owners."""
    base = trained(wrap)
    number = 2  # as the programs begin with
    found: Numbers = []
    for partitions in (1, number):
        configure(partitions)
        found += fit(base)  # the optimizer goes on, too
        h = L.Dense(4, activation="tanh")(base.get_layer("h2").output)
        found += in_turns(compiled(wrap(keras.Model(base.input, L.Dense(2)(h)))), base)
    configure(1)
    features = wrap(keras.Model(base.input, base.get_layer("h3").output))
    found += state(features)
    configure(number)
    return [*found, *state(features, base)]


def configure(partitions: int) -> None:
    smp.shutdown()
    smp.init({"partitions": partitions, "microbatches": 2})


def files(wrap: Wrap) -> Numbers:
    """All ways to take the new model's numbers out, and back in."""
    base = trained(wrap)
    h = L.Dense(8, activation="tanh")(base.get_layer("h2").output)
    new = trained(wrap, keras.Model(base.input, L.Dense(2)(h), name="new"))
    found: Numbers = [new.get_weights()]
    with tempfile.TemporaryDirectory() as own, shared_folder(own) as shared:
        # Each rank writes the files of a plain model, and only one those of a split model.
        folder = shared if isinstance(new, smp.DistributedModel) else pathlib.Path(own)
        new.save(folder / "new.keras")
        new.save_weights(folder / "new.weights.h5")
        wait()
        loaded = keras.models.load_model(folder / "new.keras")
        found += [loaded.get_weights(), loaded.optimizer.variables[2:]]
        plain = new.to_keras() if isinstance(new, smp.DistributedModel) else new
        found.append(plain.get_weights())
        fit(base)
        new.load_weights(folder / "new.weights.h5")
        found += state(new, base)
        found += fit(new)
    return found


def checkpoint(wrap: Wrap) -> Numbers:
    """The new model's state, its optimizer's included, comes back."""
    base = trained(wrap)
    h = L.Dense(8, activation="tanh")(base.get_layer("h2").output)
    new = trained(wrap, keras.Model(base.input, L.Dense(2)(h), name="new"))
    if not isinstance(new, smp.DistributedModel):
        values = [v.numpy() for v in (*new.variables, *new.optimizer.variables)]
        found = fit(base)
        for variable, value in zip((*new.variables, *new.optimizer.variables), values, strict=True):
            variable.assign(value)
        return [*found, *in_turns(new, base)]
    with tempfile.TemporaryDirectory() as own, shared_folder(own) as folder:
        manager = smp.CheckpointManager(
            tf.train.Checkpoint(model=new, optimizer=new.optimizer), str(folder)
        )
        manager.save()
        found = fit(base)
        manager.restore_or_initialize()
        return [*found, *in_turns(new, base)]


def images() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(ROWS, 8, 8, 3))


def pictures(wrap: Wrap) -> keras.Model:
    """A trained classifier of images."""
    inputs = keras.Input((8, 8, 3))
    h = L.Conv2D(4, 3, activation="relu", name="c1")(inputs)
    h = L.Conv2D(4, 3, activation="relu", name="c2")(h)
    outputs = L.Dense(2, name="top")(L.GlobalAveragePooling2D()(h))
    model = compiled(wrap(keras.Model(inputs, outputs, name="pictures")))
    model.fit(images(), labels(), batch_size=4, shuffle=False, verbose=0)
    return model


def heat(model: keras.Model, x: Any) -> tuple[Any, Any]:
    """Grad-CAM: activations, and the gradient of a score with respect to them."""
    with tf.GradientTape() as tape:
        activations, outputs = model(x, training=False)
        score = outputs[:, 1]
    return tape.gradient(score, activations), activations


def activations(wrap: Wrap) -> Numbers:
    """Gradients with respect to activations of a trained model, after each of its layers."""
    model = pictures(wrap)
    found: Numbers = []
    for name in ("c1", "c2", "top"):
        inside = model.get_layer(name).output
        part = wrap(keras.Model(model.inputs[0], [inside, model.outputs[0] * 2.0]))
        found += heat_of(part, images())
    return found


def heat_of(model: keras.Model, x: Any) -> Numbers:
    if not isinstance(model, smp.DistributedModel):
        return list(heat(model, tf.constant(x)))
    return [output.concat() for output in smp.step(heat)(model, tf.constant(x))]


def activations_in_fit(wrap: Wrap) -> Numbers:
    """The same in a `train_step`, as a part of the loss: attention that is pulled to a target."""
    model = pictures(wrap)
    inside = model.get_layer("c2").output
    part = wrap(keras.Model(model.inputs[0], [inside, model.outputs[0]]))

    class Teacher(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.student = L.Conv2D(4, 3)

        def call(self, x: Any) -> Any:
            return self.student(x)

        def train_step(self, x: Any) -> dict[str, Any]:
            gradient = heat_in_graph(part, x)[0]
            with tf.GradientTape() as tape:
                found = self(x, training=True)
                loss = tf.reduce_mean((found[:, :4, :4] - gradient) ** 2)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    teacher = compiled(wrap(Teacher()))
    history = teacher.fit(images(), batch_size=4, epochs=2, shuffle=False, verbose=0)
    return [history.history["loss"], *teacher.get_weights()]


def heat_in_graph(model: keras.Model, x: Any) -> Any:
    if not isinstance(model, smp.DistributedModel):
        return heat(model, x)
    return [output.concat() for output in smp.step(heat)(model, x)]


def quantized(wrap: Wrap) -> Numbers:
    """Integers in place of the weights, after training."""
    base = trained(wrap)
    found = [np.asarray(base(data()))]
    base.quantize("int8")
    found += [np.asarray(base(data())), *state(base)]
    new = wrap(keras.Model(base.input, base.get_layer("h2").output))
    return [*found, new.predict(data(), batch_size=4, verbose=0), *new.get_weights()]


PROGRAMS: dict[str, Program] = {
    program.__name__: program
    for program in (
        head,
        long_head,
        late_part,
        extractor,
        frozen,
        predicted,
        nested,
        nested_call,
        chain,
        embedding,
        cloned,
        cloned_target,
        lora,
        custom_steps,
        configured_again,
        files,
        checkpoint,
        activations,
        activations_in_fit,
        quantized,
    )
}


# --- running them ---------------------------------------------------------------------------


def gradients_of(model: keras.Model, x: Any, y: Any) -> tuple[list[Any], Any]:
    """Gradients and loss of one batch, which all replicas get."""

    def plain(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    if not isinstance(model, smp.DistributedModel):
        return plain(x, y)
    gradients, loss = smp.step(plain)(x, y)
    return smp.allreduce([g.accumulate() for g in gradients]), loss.reduce_mean()


@contextlib.contextmanager
def shared_folder(own: str) -> Iterator[pathlib.Path]:
    """The folder of rank 0, in all ranks, until all are done with it."""
    yield pathlib.Path(smp.allgather(own, smp.WORLD)[0] if smp.size() > 1 else own)
    wait()


def wait() -> None:
    if smp.size() > 1:
        smp.barrier()


def check(program: Program) -> None:
    """Compares a program with plain Keras."""
    with _precision():
        keras.utils.set_random_seed(0)
        right = _flat(program(lambda model: model))
        keras.utils.set_random_seed(0)
        found = _flat(program(smp.DistributedModel.from_keras))
    assert len(right) == len(found)
    for number, (one, other) in enumerate(zip(right, found, strict=True)):
        name = f"{program.__name__}, number {number} of {len(right)}"
        bound = SINGLE.get(program.__name__, BOUND)
        np.testing.assert_allclose(other, one, bound, bound, err_msg=name)


@contextlib.contextmanager
def _precision() -> Iterator[None]:
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before[0])
        keras.config.set_floatx(before[1])


def _flat(numbers: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in tf.nest.flatten(numbers)]


def main(names: Sequence[str]) -> None:
    smp.init()
    for name in names:
        check(PROGRAMS[name])
        print(f"{name} equal", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(PROGRAMS))
