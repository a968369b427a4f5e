"""What callbacks do in several processes; that each gives Keras' numbers is in test_shared.py."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from processes import check_ranks
from training.fixtures import classifier, data
from turns import turn

import opensmp as smp

SCRIPT = """
    import json
    import pathlib
    import sys

    import keras
    import numpy as np

    import opensmp as smp
    from training.uses import classifier, data

    smp.init()
    rank, folder = smp.rank(), pathlib.Path(sys.argv[1])
    x, y = (a.astype("float32") for a in data(16))


    def model(**options):
        keras.utils.set_random_seed(1)
        return smp.DistributedModel.from_keras(classifier(**options))


    def fit(callback, model=None, epochs=3, **options):
        model = model or globals()["model"]()
        options = {"batch_size": 4, "epochs": epochs, "verbose": 0, "shuffle": False, **options}
        return model.fit(x, y, callbacks=[callback], **options)


    class Stops(keras.callbacks.Callback):
        batches = 0

        def __init__(self, at):
            super().__init__()
            if at == "batch":
                self.on_train_batch_end = self.stop_in_one
            else:
                self.on_epoch_end = self.stop_in_one

        def stop_in_one(self, number, logs=None):
            self.batches += 1
            if rank == 1 and number == 1:
                self.model.stop_training = True


    # Who stops in one process stops in all: after a batch, and after an epoch.
    stops = Stops("batch")
    assert len(fit(stops).history["loss"]) == 1 and stops.batches == 2
    assert len(fit(Stops("epoch")).history["loss"]) == 2

    # The learning rate of rank 0 is that of all.
    rates = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 / (1 + rank + epoch))
    one = model()
    history = fit(rates, one, epochs=2).history
    assert len({str(weights) for weights in smp.allgather(one.get_weights())}) == 1
    assert abs(float(one.optimizer.learning_rate) - 0.1 / 2) < 1e-6


    # A fit of the user's own, in whichever way it takes its arguments.
    class Named(keras.Model):
        def fit(self, x, y, times=1):
            return super().fit(x, y, batch_size=8, epochs=times, verbose=0, shuffle=False)


    class Passed(keras.Model):
        def fit(self, *args, **kwargs):
            return super().fit(*args, **kwargs)

    def own(kind):
        keras.utils.set_random_seed(1)
        plain = classifier()
        model = smp.DistributedModel.from_keras(kind(plain.inputs, plain.outputs))
        model.compile("sgd", "sparse_categorical_crossentropy")
        return model


    named = own(Named).fit(x, y, times=2).history["loss"]
    passed = own(Passed).fit(x, y, 8, epochs=2, verbose=0, shuffle=False).history["loss"]
    assert named == passed and len(named) == 2


    # A callback that runs in rank 0 alone, and asks for what needs all processes.
    class Diary(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.pages = []

        def set_model(self, model):
            assert rank == 0
            super().set_model(model)

        def on_epoch_end(self, epoch, logs=None):
            assert rank == 0
            model = self.model
            model.save(folder / f"{epoch}.keras")
            whole = model.to_keras()
            self.pages.append({
                "loss": model.evaluate(x, y, batch_size=4, verbose=0),
                "output": model.predict(x[:1], verbose=0).tolist(),
                "plain": whole(x[:1]).numpy().tolist(),
                "weights": [weights.tolist() for weights in model.get_weights()],
            })
            model.save_weights(folder / "latest.weights.h5")
            model.load_weights(folder / "latest.weights.h5")
            if epoch == 1:
                model.stop_training = True


    diary = Diary()
    one = model()
    fit(smp.OnRankZero(diary), one, epochs=4)
    assert len(diary.pages) == (2 if rank == 0 else 0)
    if rank == 0:
        last = diary.pages[-1]
        np.testing.assert_allclose(last["output"], last["plain"], rtol=1e-5)
        (folder / "diary.json").write_text(json.dumps(last))
    weights = one.get_weights()
    loaded = keras.models.load_model(folder / "1.keras").get_weights()
    for ours, theirs in zip(weights, loaded, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    one.set_weights([np.full(value.shape, 0.5, value.dtype) for value in weights])
    assert {float(value.flat[0]) for value in one.get_weights()} == {0.5}


    # Arguments that cannot be sent are an error in all processes, which name the method.
    class Sends(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(iter([(x, y)]), verbose=0, callbacks=[lambda: None])


    try:
        fit(smp.OnRankZero(Sends()))
    except smp.StepError as error:
        assert "can be pickled" in str(error), error
    else:
        raise AssertionError("expected a StepError")
    print("all well", flush=True)
    fit(keras.callbacks.EarlyStopping("loss", verbose=1), epochs=2, verbose=2)
"""


@turn(1, of=2)
def test_several_processes_decide_alike_and_write_once(tmp_path):
    results = check_ranks(SCRIPT, 2, {"partitions": 2, "microbatches": 2}, args=[tmp_path])
    for result in results:
        assert any(line == "all well" for line in result.lines)
    assert any("Epoch 2/2" in line for line in results[0].lines)
    assert results[1].lines[-1] == "all well"
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["0.keras", "1.keras", "diary.json", "latest.weights.h5"]
    page = json.loads((tmp_path / "diary.json").read_text())
    plain = keras.models.load_model(tmp_path / "1.keras")
    for ours, theirs in zip(page["weights"], plain.get_weights(), strict=True):
        np.testing.assert_array_equal(np.array(ours, "float32"), theirs)


def test_in_one_process_a_callback_on_rank_zero_is_a_callback(smp_init):
    smp_init({"partitions": 2, "microbatches": 2})
    model = smp.DistributedModel.from_keras(classifier())
    model.compile("sgd", "sparse_categorical_crossentropy")
    history = keras.callbacks.History()
    seen = []
    see = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    x, y = data(8)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[smp.OnRankZero(see), history])
    assert [logs["loss"] for logs in seen] == history.history["loss"]


def test_on_rank_zero_takes_a_callback():
    with pytest.raises(TypeError, match=r"expected a keras.callbacks.Callback, received .*print"):
        smp.OnRankZero(print)
