"""What `fit`, `evaluate`, `predict` and Keras' callbacks are asked to do, plain and split.

Each use says which arguments and callbacks it covers: `docs/fit-table.md` is made from that.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

Record = dict[str, Any]
Folder = pathlib.Path

DOUBLE = 1e-12
DIVIDED = 1e-8
"""Adam divides by the size of a gradient plus 1e-7."""
RANK_ZERO = " (rank 0)"
"""Ending of what is there in rank 0 only."""


class Use(NamedTuple):
    """What is done with which model.

    Attributes:
        covers: Names such as `"fit.batch_size"` or `"callbacks.CSVLogger"`.
        build: Makes a compiled model, of double precision unless it says otherwise.
        run: Takes the model and a folder for files; gives numbers.
        bound: Largest difference, relative to the larger of the number and a thousandth.
        policy: The dtype policy.
    """

    covers: str
    build: Callable[[], keras.Model]
    run: Callable[[keras.Model, Folder], Record]
    bound: float = DOUBLE
    policy: str = "float64"

    @property
    def rows(self) -> frozenset[str]:
        """The names in `covers`."""
        return frozenset(self.covers.split())


@contextlib.contextmanager
def precision(policy: str) -> Iterator[None]:
    """Context in which models and losses are made with a dtype policy."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64" if policy == "float64" else "float32")
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_floatx(before[1])
        keras.config.set_dtype_policy(before[0])


def data(rows: int = 22, seed: int = 0) -> tuple[Any, Any]:
    """Rows of 6 numbers, and labels from 0 to 3."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 6)), rng.integers(0, 4, rows)


# ------------------------------------------------------------------------------------ models


def classifier(optimizer: Any = None, **options: Any) -> keras.Model:
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(
        8, activation="tanh", kernel_regularizer="l2", activity_regularizer="l1", name="hidden"
    )(inputs)
    outputs = keras.layers.Dense(4, activation="softmax", name="top")(hidden)
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer or keras.optimizers.SGD(0.1, momentum=0.9),
        **{"loss": "sparse_categorical_crossentropy", **options},
    )
    return model


def measured() -> keras.Model:
    return classifier(
        keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(name="entropy")],
    )


def several_steps() -> keras.Model:
    return classifier(steps_per_execution=2, loss_weights=0.5)


def fast() -> keras.Model:
    return classifier(keras.optimizers.SGD(3.0))


def averaging() -> keras.Model:
    return classifier(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8))


def eager() -> keras.Model:
    return classifier(run_eagerly=True)


def half() -> keras.Model:
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(4, dtype="float32")(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, auto_scale_loss=True)
    return model


class Coupled(keras.Model):
    """A loss over the whole batch, and losses of a layer: as a number, and one per example."""

    def __init__(self) -> None:
        super().__init__()
        self.table = keras.layers.Embedding(16, 6, mask_zero=True)
        self.hidden = keras.layers.Dense(8, activation="tanh")
        self.top = keras.layers.Dense(4, activation="softmax")

    def call(self, x: Any) -> Any:
        x = self.hidden(keras.ops.mean(self.table(x), axis=1))
        self.add_loss(0.1 * keras.ops.mean(x**2))
        self.add_loss(keras.ops.sum(x**2, axis=-1))
        return self.top(x)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
        training: bool = True,
    ) -> Any:  # fmt: skip
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss + 0.1 * keras.ops.logsumexp(y_pred)


def coupled() -> keras.Model:
    model = Coupled()
    # Adam squares each slice of an embedding's gradient: they must be those of the whole batch.
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    return model


# ---------------------------------------------------------------------------------- arguments


def arrays(model: keras.Model, folder: Folder) -> Record:
    """22 rows in batches of 8: the last one has 6; shuffled."""
    x, y = data()
    weights = np.random.default_rng(3).uniform(size=22)
    history = model.fit(
        x, y, batch_size=8, epochs=2, sample_weight=weights, verbose=0,
        validation_data=(x[:7], y[:7], weights[:7]), validation_batch_size=3,
    ).history  # fmt: skip
    return {
        "history": history,
        "evaluate": model.evaluate(x, y, batch_size=5, sample_weight=weights, verbose=0),
        "predict": model.predict(x, batch_size=9, verbose=0),
    }


def dataset(model: keras.Model, folder: Folder) -> Record:
    """Several steps at a time, and weights of classes, from a dataset that has more."""
    x, y = data()
    endless = tf.data.Dataset.from_tensor_slices((x, y)).batch(5).repeat()
    seen: list[int] = []
    see = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))
    history = model.fit(
        endless, steps_per_epoch=5, epochs=2, verbose=0, callbacks=[see],
        class_weight={0: 1.0, 1: 2.0, 2: 0.5, 3: 1.0},
        validation_data=endless, validation_steps=3, validation_freq=2,
    ).history  # fmt: skip
    scores = model.evaluate(endless, steps=4, verbose=0, return_dict=True)
    outputs = model.predict(endless, steps=3, verbose=0)
    return {"history": history, "seen": seen, "evaluate": scores, "predict": outputs}


class Small(keras.utils.PyDataset):
    """Batches of 3, 1 and 2 rows: fewer than microbatches, and fewer than replicas."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        x, y = data(6)
        rows = [slice(0, 3), slice(3, 4), slice(4, 6)][index]
        return x[rows], y[rows]


def small(model: keras.Model, folder: Folder) -> Record:
    history = model.fit(Small(), epochs=2, initial_epoch=1, shuffle=False, verbose=0).history
    return {"history": history, "predict": model.predict(Small(), verbose=0)}


def on_batch(model: keras.Model, folder: Folder) -> Record:
    x, y = data(10)
    weights = np.arange(10.0)
    return {
        "train": model.train_on_batch(x, y, class_weight={0: 1.0, 1: 2.0, 2: 0.5, 3: 1.0}),
        "again": model.train_on_batch(x, y, sample_weight=weights, return_dict=True),
        "test": model.test_on_batch(x, y),
        "predict": model.predict_on_batch(x),
    }


def tokens(model: keras.Model, folder: Folder) -> Record:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 16, (11, 5)), rng.integers(0, 4, 11)
    history = model.fit(x, y, batch_size=4, epochs=2, validation_split=0.2, verbose=0).history
    return {"history": history, "predict": model.predict(x, verbose=0)}


def printed(model: keras.Model, folder: Folder) -> Record:
    """What is printed, without the times."""
    x, y = data(8)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        model.fit(x, y, verbose=2, epochs=2)
        model.evaluate(x, y, verbose=2)
        model.predict(x, verbose=2, callbacks=[keras.callbacks.ProgbarLogger()])
    lines = re.sub(r"\d+\w*s(/\w+)?", "", text.getvalue()).splitlines()
    with contextlib.suppress(ValueError):  # an argument that there is not
        model.evaluate(x, y, no_such_argument=1)
        raise AssertionError("expected a ValueError")
    return {f"printed{RANK_ZERO}": lines}


def eagerly(model: keras.Model, folder: Folder) -> Record:
    x, y = data(10)
    return {"history": model.fit(x, y, batch_size=4, verbose=0).history}


def in_half_precision(model: keras.Model, folder: Folder) -> Record:
    x, y = data(16)
    history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "scale": float(model.optimizer.dynamic_scale)}


# ---------------------------------------------------------------------------------- callbacks


class Everything(keras.callbacks.Callback):
    """A callback of the user's: all that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []
        for name in dir(self):
            if name.startswith("on_") and name not in ("on_batch_begin", "on_batch_end"):
                setattr(self, name, self._hear(name))

    def _hear(self, name: str) -> Callable[..., None]:
        def hear(*args: Any, logs: Any = None) -> None:
            numbers = [a for a in args if isinstance(a, int)]
            found = logs or next((a for a in args if isinstance(a, dict)), {})
            self.heard.append(
                [name, *numbers, *(float(v) for k, v in sorted(found.items()) if k != "outputs")]
            )

        return hear


def told(model: keras.Model, folder: Folder) -> Record:
    x, y = data(10)
    one, two, seen = Everything(), keras.callbacks.History(), []
    each = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs))
    model.fit(
        x, y, batch_size=4, epochs=2, callbacks=[one, two, each], validation_split=0.3, verbose=0
    )
    model.evaluate(x, y, callbacks=[one], verbose=0)
    model.predict(x, callbacks=[one], verbose=0)
    return {"heard": one.heard, "history": two.history, "seen": seen}


def stopping(model: keras.Model, folder: Folder) -> Record:
    x, y = data(16)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    history = model.fit(
        x, y, batch_size=8, epochs=9, callbacks=[stop], validation_split=0.25, verbose=0
    ).history
    assert 1 < len(history["loss"]) < 9
    return {"history": history, "best": stop.best, "epoch": stop.best_epoch}


def rates(model: keras.Model, folder: Folder) -> Record:
    x, y = data(16)
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (1 + epoch))
    first = model.fit(x, y, batch_size=8, epochs=3, callbacks=[schedule], verbose=0).history
    between = float(model.optimizer.learning_rate)
    reduce = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0)
    second = model.fit(x, y, batch_size=8, epochs=4, callbacks=[reduce], verbose=0).history
    assert second["learning_rate"][-1] < between < 0.1
    return {"first": first, "between": between, "second": second}


def logged(model: keras.Model, folder: Folder) -> Record:
    x, y = data(16)
    sent: list[Any] = []
    import requests

    post, requests.post = requests.post, lambda path, **kwargs: sent.append(kwargs)
    try:
        monitor = keras.callbacks.RemoteMonitor("http://nowhere", send_as_json=True)
        table = keras.callbacks.CSVLogger(str(folder / "log.csv"))
        model.fit(x, y, batch_size=8, epochs=2, callbacks=[monitor, table], verbose=0)
    finally:
        requests.post = post
    head, *rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    table = [[cell if cell == "NA" else float(cell) for cell in row] for row in rows]
    return {"head": head, "table": table, f"sent{RANK_ZERO}": sent}


def saved(model: keras.Model, folder: Folder) -> Record:
    x, y = data(16)
    kind = keras.callbacks.ModelCheckpoint
    model.fit(
        x, y, batch_size=8, epochs=2, verbose=0,
        callbacks=[
            kind(str(folder / "sub" / "{epoch}.keras")),
            kind(str(folder / "best.weights.h5"), "loss", 0, True, True),
            kind(str(folder / "at-{epoch}-{batch}.keras"), save_freq=3),
        ],
    )  # fmt: skip
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found: Record = {"files": [str(file.relative_to(folder)) for file in files]}
    for file in files:
        if file.suffix == ".keras":
            loaded = keras.models.load_model(file)
            assert type(loaded).__module__.startswith("keras.")
            found[file.name] = [*loaded.get_weights(), *map(np.asarray, _slots(loaded))]
    return found


def _slots(model: keras.Model) -> list[Any]:
    return list(model.optimizer.variables)


class Fails(keras.callbacks.Callback):
    """Ends training at the beginning of an epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 2:
            raise RuntimeError("the machine was taken away")


def resumed(model: keras.Model, folder: Folder) -> Record:
    """Training that breaks off and goes on from the backup, with other initial weights."""
    x, y = data(16)
    backup = {"double_checkpoint": True, "delete_checkpoint": False}
    fit = {"x": x, "y": y, "batch_size": 8, "epochs": 4, "shuffle": False, "verbose": 0}
    callbacks = [keras.callbacks.BackupAndRestore(str(folder / "backup"), **backup), Fails()]
    with contextlib.suppress(RuntimeError):
        model.fit(**fit, callbacks=callbacks)
        raise AssertionError("expected a RuntimeError")
    model.set_weights([np.zeros(weight.shape) for weight in model.weights])
    again = keras.callbacks.BackupAndRestore(str(folder / "backup"), save_freq=1)
    history = model.fit(**fit, callbacks=[again]).history
    return {"history": history, "kept": (folder / "backup").exists()}


def shown(model: keras.Model, folder: Folder) -> Record:
    """What TensorBoard shows: scalars, and sums over histograms and images."""
    x, y = data(16)
    board = keras.callbacks.TensorBoard(
        str(folder), histogram_freq=1, write_images=True, update_freq=1, embeddings_freq=1
    )
    model.fit(x, y, batch_size=8, epochs=2, callbacks=[board], validation_split=0.25, verbose=0)
    found: Record = {"files": [len(list((folder / kind).glob("events*"))) for kind in _KINDS]}
    for kind in _KINDS:
        for file in (folder / kind).glob("events*"):
            for record in tf.compat.v1.io.tf_record_iterator(str(file)):
                event = tf.compat.v1.Event.FromString(record)
                for value in event.summary.value:
                    number = tf.make_ndarray(value.tensor)
                    if "keras" not in value.tag and number.dtype != object:
                        found[f"{kind} {value.tag} {event.step}"] = number.sum()
                    else:
                        found[f"{kind} {value.tag} {event.step}"] = len(number.ravel())
    assert any("histogram" in name for name in found)
    return found


_KINDS = ("train", "validation")


def not_a_number(model: keras.Model, folder: Folder) -> Record:
    x, y = data(20)
    x[9] = np.nan
    seen: list[int] = []
    see = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))
    history = model.fit(
        x, y, batch_size=4, epochs=3, shuffle=False, verbose=0,
        callbacks=[keras.callbacks.TerminateOnNaN(), see],
    ).history  # fmt: skip
    assert seen == [0, 1, 2]
    return {"history": history, "seen": seen}


def swapped(model: keras.Model, folder: Folder) -> Record:
    x, y = data(16)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    history = model.fit(
        x, y, batch_size=8, epochs=2, callbacks=[swap], validation_split=0.25, verbose=0
    ).history
    scores = model.evaluate(x, y, callbacks=[keras.callbacks.SwapEMAWeights()], verbose=0)
    return {"history": history, "evaluate": scores}


def listed(model: keras.Model, folder: Folder) -> Record:
    x, y = data(8)
    callbacks = keras.callbacks.CallbackList([], add_history=True, model=model, epochs=2, steps=1)
    return {"history": model.fit(x, y, epochs=2, callbacks=callbacks, verbose=0).history}


USES: Mapping[str, Use] = {
    "arrays": Use(
        "compile.optimizer compile.loss compile.metrics compile.weighted_metrics "
        "fit.x fit.y fit.batch_size fit.epochs fit.shuffle fit.sample_weight fit.validation_data "
        "fit.validation_batch_size evaluate.x evaluate.y evaluate.batch_size "
        "evaluate.sample_weight predict.x predict.batch_size",
        measured, arrays,
    ),
    "dataset": Use(
        "compile.steps_per_execution compile.loss_weights fit.steps_per_epoch fit.class_weight "
        "fit.validation_steps fit.validation_freq evaluate.steps evaluate.return_dict "
        "predict.steps",
        several_steps, dataset,
    ),
    "small": Use("fit.initial_epoch", classifier, small),
    "on_batch": Use("", measured, on_batch),
    "tokens": Use("fit.validation_split", coupled, tokens, DIVIDED),
    "printed": Use(
        "fit.verbose evaluate.verbose evaluate.kwargs predict.verbose callbacks.ProgbarLogger",
        classifier, printed,
    ),
    "half": Use("compile.auto_scale_loss", half, in_half_precision, 2e-2, "mixed_float16"),
    "told": Use(
        "fit.callbacks evaluate.callbacks predict.callbacks callbacks.Callback callbacks.History "
        "callbacks.LambdaCallback",
        measured, told,
    ),
    "stopping": Use("callbacks.EarlyStopping", fast, stopping),
    "rates": Use(
        "callbacks.LearningRateScheduler callbacks.ReduceLROnPlateau", classifier, rates
    ),
    "logged": Use("callbacks.CSVLogger callbacks.RemoteMonitor", measured, logged),
    "saved": Use("callbacks.ModelCheckpoint", measured, saved),
    "resumed": Use("callbacks.BackupAndRestore", classifier, resumed),
    "shown": Use("callbacks.TensorBoard", measured, shown, 1e-6),
    "not_a_number": Use("callbacks.TerminateOnNaN", classifier, not_a_number),
    "swapped": Use("callbacks.SwapEMAWeights", averaging, swapped),
}  # fmt: skip

ALONE: Mapping[str, Use] = {
    "eagerly": Use("compile.run_eagerly", eager, eagerly),
    "listed": Use("callbacks.CallbackList", classifier, listed),
}
"""In one process only; the tests hold what several say to it."""

LEFT_OUT: Mapping[str, str] = {
    "compile.jit_compile": "left out with a warning: XLA compiles for one device",
    "callbacks.OrbaxCheckpoint": "not compared: it needs the package orbax-checkpoint, and with "
    "it JAX; use ModelCheckpoint or smp.CheckpointManager",
}
NOT_SHARED: Mapping[str, str] = {
    "compile.run_eagerly": "refused: what runs layer by layer needs all layers in one process",
    "callbacks.CallbackList": "refused: give a list, from which each rank takes its part",
    "callbacks.OrbaxCheckpoint": "refused: it saves several processes with JAX only",
    "compile.jit_compile": LEFT_OUT["compile.jit_compile"],
}


def all_rows() -> list[str]:
    """Every argument and callback that the Keras at hand has."""
    rows = []
    for name in ("compile", "fit", "evaluate", "predict"):
        parameters = inspect.signature(getattr(keras.Model, name)).parameters
        rows += [f"{name}.{parameter}" for parameter in parameters if parameter != "self"]
    return rows + [f"callbacks.{name}" for name in dir(keras.callbacks) if name[0].isupper()]


def record(name: str, folder: Folder, plain: bool = False) -> Record:
    """What a use gives, and the weights afterwards."""
    use = {**USES, **ALONE}[name]
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.clear_session(free_memory=False)  # forgets the dtype policy as well
    with precision(use.policy):
        keras.utils.set_random_seed(1)
        model = use.build()
        if not plain:
            import opensmp as smp

            model = smp.DistributedModel.from_keras(model)
        keras.utils.set_random_seed(2)
        return {**use.run(model, folder), "weights": model.get_weights()}


def difference(plain: Record, ours: Record, rank: int = 0) -> float:
    """The largest relative difference of all numbers; texts and names must be the same."""
    assert list(plain) == list(ours), f"{list(plain)} and {list(ours)}"
    worst = 0.0
    for key, value in plain.items():
        if rank and key.endswith(RANK_ZERO):
            assert not ours[key], f"rank {rank}, {key}: {ours[key]}"
            continue
        worst = max(worst, _difference(value, ours[key], key))
    return worst


def _difference(plain: Any, ours: Any, where: str) -> float:
    if isinstance(plain, Mapping):
        assert list(plain) == list(ours), where
        plain, ours = list(plain.values()), list(ours.values())
    if isinstance(plain, (list, tuple)):
        assert len(plain) == len(ours), f"{where}: {plain} and {ours}"
        pairs = zip(plain, ours, strict=True)
        return max((_difference(one, other, where) for one, other in pairs), default=0.0)
    if isinstance(plain, (str, bytes)) or plain is None:
        assert plain == ours, f"{where}: {plain!r} and {ours!r}"
        return 0.0
    plain, ours = np.asarray(plain, float), np.asarray(ours, float)
    assert plain.shape == ours.shape, where
    assert np.array_equal(np.isnan(plain), np.isnan(ours)), where
    with np.errstate(invalid="ignore"):
        error = np.abs(plain - ours) / np.maximum(np.abs(plain), 1e-3)
    return float(np.max(np.nan_to_num(error, nan=0.0, posinf=np.inf), initial=0.0))
