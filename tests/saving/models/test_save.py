from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import resource

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import output_of
from saving.sample_models import Plain, Split, X, Y, functional, same, sequential

import opensmp as smp
from opensmp.errors import SavingError
from opensmp.saving.models import save

TWO = {"partitions": 2, "microbatches": 2}
MANUAL = {**TWO, "auto_partition": False, "default_partition": 0}


def distributed(kind):
    if kind == "subclass":
        return Split()
    made = {"functional": functional, "sequential": sequential, "plain subclass": Plain}[kind]()
    return smp.DistributedModel.from_keras(made)


def texts_of(folder: pathlib.Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("kind", ["functional", "sequential", "plain subclass", "subclass"])
class TestSaveModel:
    def test_plain_tensorflow_loads_and_serves_it(self, smp_init, tmp_path, kind):
        smp_init(MANUAL)
        model = distributed(kind)
        expected = model(X)
        model.save_model(tmp_path / "served")
        loaded = tf.saved_model.load(tmp_path / "served")
        serving = loaded.signatures["serving_default"]
        np.testing.assert_allclose(
            next(iter(serving(tf.constant(X)).values())), expected, rtol=1e-6, atol=1e-6
        )
        assert loaded.serve(tf.constant(X[:3])).shape == (3, 3)  # another batch size
        same(loaded.variables, model.variables)

    def test_nothing_of_opensmp_is_in_it(self, smp_init, tmp_path, kind):
        smp_init(MANUAL)
        model = distributed(kind)
        model(X)
        model.save_model(tmp_path / "served")
        content = texts_of(tmp_path / "served")
        for trace in (b"smp", b"partition", b"CPU:1", b"Split"):
            assert trace not in content, trace


def test_integer_inputs_keep_their_type_in_the_signature(smp_init, tmp_path):
    smp_init(MANUAL)

    class Words(smp.DistributedModel):
        def __init__(self):
            super().__init__()
            self.table = keras.layers.Embedding(7, 3)

        def call(self, words, scale):
            with smp.partition(1):
                return keras.ops.mean(self.table(words), axis=1) * scale

    model = Words()
    words, scale = tf.ones([2, 4], tf.int32), tf.fill([2, 1], 2.0)
    expected = model(words, scale)
    model.save_model(path=str(tmp_path / "served"))
    loaded = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_array_equal(loaded.serve(words, scale), expected)


def test_the_weights_are_the_latest_after_training(smp_init, tmp_path):
    smp_init(TWO)
    model = distributed("functional")
    model(X)
    model.save_model(tmp_path / "served")
    model.layers[1].kernel.assign_add(tf.ones([5, 4]))
    model.save_model(tmp_path / "served")  # over the old one
    loaded = tf.saved_model.load(tmp_path / "served")
    same(loaded.variables, model.variables)


def test_other_files_of_the_directory_stay(smp_init, tmp_path):
    smp_init(TWO)
    model = distributed("sequential")
    model(X)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "inference.py").write_text("pass")
    model.save_model(tmp_path)
    model.save_model(tmp_path)
    names = {"assets", "code", "fingerprint.pb", "saved_model.pb", "variables"}
    assert set(os.listdir(tmp_path)) == names
    tf.saved_model.load(tmp_path)


def test_export_is_that_of_the_plain_model(smp_init, tmp_path):
    smp_init(TWO)
    model = distributed("functional")
    expected = model(X)
    model.export(tmp_path / "exported", verbose=False)
    assert b"smp" not in texts_of(tmp_path / "exported")
    layer = keras.layers.TFSMLayer(tmp_path / "exported", call_endpoint="serve")
    np.testing.assert_allclose(layer(X), expected, rtol=1e-6, atol=1e-6)


def test_files_load_where_opensmp_is_not_installed(smp_init, tmp_path):
    smp_init(TWO)
    model = distributed("functional")
    model.fit(X, Y, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    model.save_weights(tmp_path / "model.weights.h5")
    model.save_model(tmp_path / "served")
    split = Split()
    split(X)
    split.to_keras().save(tmp_path / "split.keras")
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "expected.npy", np.stack([np.asarray(m(X)) for m in (model, split)]))
    out = output_of(
        f"""
import sys
sys.modules["opensmp"] = sys.modules["smp"] = None
import keras, numpy as np, tensorflow as tf
x, (expected, other) = np.load("{tmp_path}/x.npy"), np.load("{tmp_path}/expected.npy")
model = keras.models.load_model("{tmp_path}/model.keras")
print(type(model).__name__, type(model.optimizer).__name__, int(model.optimizer.iterations))
found = [model(x)]
model.layers[1].kernel.assign(tf.zeros([5, 4]))
model.load_weights("{tmp_path}/model.weights.h5")
found.append(model(x))
found.append(keras.models.load_model("{tmp_path}/model.h5", compile=False)(x))
served = tf.saved_model.load("{tmp_path}/served")
found.append(served.serve(x))
print([bool(np.allclose(f, expected, rtol=1e-5, atol=1e-6)) for f in found])
split = keras.models.load_model("{tmp_path}/split.keras")
print(bool(np.allclose(split(x), other, rtol=1e-5, atol=1e-6)))
"""
    )
    assert out.splitlines() == ["Functional Adam 2", "[True, True, True, True]", "True"]


@pytest.mark.parametrize("kind", ["functional", "sequential", "plain subclass", "subclass"])
def test_the_keras_file_gives_model_optimizer_and_compilation(smp_init, tmp_path, kind):
    smp_init(MANUAL)
    model = distributed(kind)
    model(X)
    if not model.compiled:
        model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(X, Y, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, smp.DistributedModel) is (kind == "subclass")
    same(loaded.weights, model.weights)
    same(loaded.optimizer.variables, model.optimizer.variables)
    assert loaded.loss == "mse"


def test_weights_travel_between_distributed_and_plain(smp_init, tmp_path):
    smp_init(TWO)
    model, plain = distributed("functional"), functional()
    model(X)
    plain.layers[1].kernel.assign(np.ones((5, 4)))
    plain.save_weights(tmp_path / "plain.weights.h5")
    model.load_weights(tmp_path / "plain.weights.h5")
    same(model.weights, plain.weights)
    model.layers[1].kernel.assign(np.full((5, 4), 2.0))
    model.save_weights(tmp_path / "split.weights.h5")
    plain.load_weights(tmp_path / "split.weights.h5")
    same(model.weights, plain.weights)


def test_keras_callbacks_save_as_ever(smp_init, tmp_path):
    smp_init(TWO)
    model = distributed("sequential")
    callback = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callback])
    assert sorted(os.listdir(tmp_path)) == ["1.keras", "2.keras"]
    same(keras.models.load_model(tmp_path / "2.keras").weights, model.weights)


class TestRefusals:
    def test_a_model_without_weights(self, smp_init, tmp_path):
        smp_init(MANUAL)
        for write in (Split().save_model, Split().save):
            with pytest.raises(SavingError, match=r"has no weights yet.*Call it with one batch"):
                write(tmp_path / "model.keras")
        assert os.listdir(tmp_path) == []

    def test_a_place_where_nothing_may_be_written(self, smp_init, tmp_path):
        smp_init(TWO)
        model = distributed("sequential")
        (tmp_path / "file").write_text("in the way")
        for write, name in ((model.save, "m.keras"), (model.save_model, "served")):
            with pytest.raises(SavingError, match=r"could not be written: .*still there"):
                write(tmp_path / "file" / name)
        with pytest.raises(SavingError, match="is a file; expected the name of a directory"):
            model.save_model(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "in the way"

    def test_a_full_disk_leaves_the_old_file(self, smp_init, tmp_path, monkeypatch):
        smp_init(TWO)
        model = distributed("sequential")
        model.save(tmp_path / "model.keras")
        before = (tmp_path / "model.keras").read_bytes()

        def full(number):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SavingError, match=r"No space left.*still there.*MiB are free"):
            model.save(tmp_path / "model.keras")
        assert os.listdir(tmp_path) == ["model.keras"]
        assert (tmp_path / "model.keras").read_bytes() == before

    def test_an_existing_file_that_must_not_be_overwritten(self, smp_init, tmp_path):
        smp_init(TWO)
        model = distributed("sequential")
        model.save(tmp_path / "model.keras")
        with pytest.raises(SavingError, match="exists already"):
            model.save(tmp_path / "model.keras", overwrite=False)


def contents(folder):
    """All that is in a directory, byte by byte."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def no_room():
    """A context in which no file may be larger than some KiB, as on a disk that is full."""

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def network(width):
    keras.utils.set_random_seed(width)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(width), keras.layers.Dense(3)])
    model.compile("adam", "mse")
    return model


def unzipped(model, path):
    save.save(model, path, True, False)


def sharded(model, path):
    save.save_weights(model, path, True, 0.1)


WRITERS = {
    "m.keras": smp.save_model,
    "m.h5": smp.save_model,
    "m.weights.h5": smp.save_model,
    "m.json": smp.save_model,
    "m.ckpt": smp.save_model,
    "served": smp.save_model,
    "unzipped": unzipped,
    "shards.weights.json": sharded,
}


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "again"])
@pytest.mark.parametrize("name", WRITERS)
def test_no_room_leaves_all_as_it_was_and_a_second_try_works(tmp_path, no_room, name, earlier):
    small, large = network(2), network(1500)
    (tmp_path / "mine.txt").write_text("mine")
    path = tmp_path / ("" if earlier else "deep/er") / name
    if earlier:
        WRITERS[name](small, path)
    before = contents(tmp_path)
    with (
        pytest.raises(SavingError, match=r"could not be written: .*What was there.*MiB are free"),
        no_room(),
    ):
        WRITERS[name](large, path)
    gc.collect()
    assert contents(tmp_path) == before
    WRITERS[name](large, path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith(".saving")]
    if name == "shards.weights.json":
        again = network(1500)
        again.set_weights([np.zeros_like(w) for w in again.get_weights()])
        again.load_weights(path)
    else:
        again = smp.load_model(path, lambda: network(1500))
    same(again.weights, large.weights)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_the_way_of_a_directory_and_the_reverse(tmp_path, name):
    model = network(2)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SavingError, match=r"could not be written: (Not a directory|File exists)"):
        WRITERS[name](model, tmp_path / "file" / name)
    if WRITERS[name] is unzipped or name == "served":
        (tmp_path / name).write_text("mine")
    else:
        endings = [".index"] if name == "m.ckpt" else [""]
        for ending in endings:
            (tmp_path / f"{name}{ending}").mkdir()
            (tmp_path / f"{name}{ending}" / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(SavingError, match=r"expected the name of a (file|directory) to write"):
        WRITERS[name](model, tmp_path / name)
    assert contents(tmp_path) == before


def test_a_configuration_and_its_weights_are_written_both_or_not_at_all(tmp_path, monkeypatch):
    smp.save_model(network(2), tmp_path / "m.json")
    before = contents(tmp_path)
    replace = pathlib.Path.rename

    def fails(self, target):
        if pathlib.Path(target).name == "m.json" and "replaced" not in str(self):
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails)
    with pytest.raises(SavingError, match="Input/output error"):
        smp.save_model(network(3), tmp_path / "m.json")
    monkeypatch.undo()
    assert contents(tmp_path) == before
