from __future__ import annotations

import os
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks
from saving import matrix
from saving.sample_models import X, Y, functional, same, sequential

import opensmp as smp
from opensmp.errors import SavingError


@pytest.fixture(scope="module")
def trained():
    model = functional()
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    return model


def saved(model, folder, name):
    path = folder / name
    smp.save_model(model, path)
    return path


WHOLE = ["model.keras", "model.h5", "model.json"]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_come_back_as_they_were(trained, tmp_path, name):
    loaded = smp.load_model(saved(trained, tmp_path, name))
    same(loaded.weights, trained.weights)
    same(loaded.optimizer.variables, trained.optimizer.variables)
    assert loaded.loss == "mse"
    assert not smp.load_model(tmp_path / name, compile=False).compiled


@pytest.mark.parametrize("name", [*WHOLE, "model.weights.h5", "model.ckpt", "served"])
def test_weights_go_into_a_model_or_what_a_function_makes(trained, tmp_path, name):
    path = saved(trained, tmp_path, name)
    other = functional(compiled=name != "served")
    assert smp.load_model(path, other) is other
    same(other.weights, trained.weights)
    if name != "served":
        same(other.optimizer.variables, trained.optimizer.variables)
    same(smp.load_model(path, lambda: functional(False)).weights, trained.weights)


def test_after_init_the_model_is_distributed_unless_said_otherwise(smp_init, trained, tmp_path):
    path = saved(trained, tmp_path, "model.keras")
    smp_init({"partitions": 2, "microbatches": 2})
    loaded = smp.load_model(path)
    assert isinstance(loaded, smp.DistributedModel)
    assert not isinstance(smp.load_model(path, distribute=False), smp.DistributedModel)
    np.testing.assert_allclose(loaded(X), trained(X), rtol=1e-5, atol=1e-6)
    inside = keras.Sequential([keras.Input((5,)), loaded, keras.layers.Dense(1)])
    inside.save(tmp_path / "outer.keras")  # a loaded model inside another leaves no trace
    assert type(keras.saving.load_model(tmp_path / "outer.keras").layers[0]) is type(trained)


def test_formats_are_told_by_contents(trained, tmp_path):
    for name, other in (("model.keras", "a"), ("model.h5", "b"), ("model.weights.h5", "c.h5")):
        saved(trained, tmp_path, name).rename(tmp_path / other)
    same(smp.load_model(tmp_path / "a", functional()).weights, trained.weights)
    same(smp.load_model(tmp_path / "b").weights, trained.weights)
    same(smp.load_model(tmp_path / "c.h5", functional()).weights, trained.weights)


def test_a_checkpoint_directory_gives_the_newest(trained, tmp_path):
    checkpoint = tf.train.Checkpoint(model=trained, optimizer=trained.optimizer)
    tf.train.CheckpointManager(checkpoint, str(tmp_path), 3).save()
    same(smp.load_model(tmp_path, functional()).weights, trained.weights)


def test_lambda_layers_need_consent_and_keras_says_so(tmp_path):
    inputs = keras.Input((5,))
    outputs = keras.layers.Lambda(lambda x: x + 1, output_shape=(5,))(inputs)
    path = saved(keras.Model(inputs, outputs), tmp_path, "model.keras")
    with pytest.raises(ValueError, match=r"(?s)[Ll]ambda.*safe_mode=False"):
        smp.load_model(path)
    np.testing.assert_array_equal(smp.load_model(path, safe_mode=False)(X), X + 1)


class TestRefusals:
    def test_a_path_that_is_missing(self, trained, tmp_path):
        saved(trained, tmp_path, "model.keras")
        with pytest.raises(SavingError, match=r"nothing at .*modle.keras. Did you mean model.kera"):
            smp.load_model(tmp_path / "modle.keras")
        with pytest.raises(SavingError, match=f"nearest directory that exists is {tmp_path}"):
            smp.load_model(tmp_path / "no" / "where" / "model.keras")

    def test_a_file_that_may_not_be_read(self, trained, tmp_path, monkeypatch):
        path = saved(trained, tmp_path, "model.keras")

        def refuse(self, *args, **kwargs):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(pathlib.Path, "open", refuse)
        with pytest.raises(SavingError, match=r"may not read .*model.keras"):
            smp.load_model(path)

    @pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5", "model.json"])
    @pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
    def test_half_a_file(self, trained, tmp_path, name, part):
        path = saved(trained, tmp_path, name)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])
        model = functional()
        before = model.get_weights()
        with pytest.raises(SavingError, match="half"):
            smp.load_model(path, model)
        same(model.get_weights(), before)

    def test_half_a_saved_model(self, trained, tmp_path):
        path = saved(trained, tmp_path, "served")
        os.remove(path / "variables" / "variables.data-00000-of-00001")
        with pytest.raises(SavingError, match="cannot be read, or is half written"):
            smp.load_model(path)
        os.remove(path / "saved_model.pb")
        with pytest.raises(SavingError, match=r"half a SavedModel: saved_model.pb is missing"):
            smp.load_model(path)

    @pytest.mark.parametrize(
        "name", ["model.keras", "model.h5", "model.weights.h5", "model.ckpt", "served"]
    )
    def test_weights_of_another_model_change_nothing(self, trained, tmp_path, name):
        path = saved(trained, tmp_path, name)
        for other in (functional(units=7), sequential()):
            before = other.get_weights()
            with pytest.raises(SavingError, match=r"(?s)another model.*(5, 4|4,)") as caught:
                smp.load_model(path, other)
            same(other.get_weights(), before)
            assert other.weights[0].path in str(caught.value) or "nothing" in str(caught.value)

    def test_weights_without_a_model(self, trained, tmp_path):
        path = saved(trained, tmp_path, "model.weights.h5")
        with pytest.raises(SavingError, match=r"says nothing of the layers. .*load_model\(path, m"):
            smp.load_model(path)

    def test_pickles_are_not_read(self, tmp_path):
        np.save(tmp_path / "weights.npy", np.array([None], dtype=object), allow_pickle=True)
        with pytest.raises(SavingError, match="run code of whoever wrote them"):
            smp.load_model(tmp_path / "weights.npy", functional())

    def test_other_files(self, tmp_path):
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(SavingError, match=r"no format that is known. Expected: a .keras"):
            smp.load_model(tmp_path / "notes.txt")
        with pytest.raises(SavingError, match=r"holds no model. .*found: notes.txt"):
            smp.load_model(tmp_path)

    def test_a_name_that_says_no_format(self, trained, tmp_path):
        with pytest.raises(SavingError, match="does not say the format"):
            smp.save_model(trained, tmp_path / "model.onnx")
        saved(trained, tmp_path, "model.json")
        with pytest.raises(SavingError, match="exists already"):
            smp.save_model(trained, tmp_path / "model.json", overwrite=False)


SCRIPT = """
import sys
import numpy as np
import opensmp as smp
from saving.sample_models import X, Y

smp.init({"partitions": 2, "microbatches": 2})
model = smp.load_model(sys.argv[1] + "/model.keras")
print("sum", float(np.sum(np.asarray(model(X)))))
model.fit(X, Y, batch_size=16, verbose=0)
for ending in (".keras", ".h5", ".weights.h5", ".json", ".ckpt", ""):
    smp.save_model(model, f"{sys.argv[1]}/again{ending}")
for ending in (".keras", ".h5", ".weights.h5", ".json", ".ckpt", ""):  # while it is split
    smp.load_model(f"{sys.argv[1]}/again{ending}", model)
after = model.fit(X, Y, batch_size=16, verbose=0).history["loss"][0]
print("after", after)
own = f"{sys.argv[1]}/other-{smp.rank()}"
try:
    smp.load_model(own)
except smp.SavingError as error:
    print("refused:", error)
import os
os.chdir(f"{sys.argv[1]}/{smp.rank()}")
try:
    smp.load_model("model.keras")
except smp.SavingError as error:
    print("differs:", error)
"""


def test_several_processes_read_the_same_file_or_all_raise(tmp_path):
    whole = matrix.made()  # no dropout: microbatches train as the batch does
    whole.fit(X, Y, batch_size=8, verbose=0)
    saved(whole, tmp_path, "model.keras")
    saved(whole, tmp_path / "0", "model.keras")
    saved(functional(), tmp_path / "1", "model.keras")
    (tmp_path / "other-0").write_bytes((tmp_path / "model.keras").read_bytes())
    results = check_ranks(SCRIPT, 2, args=[tmp_path])
    sums = [float(r.lines[0].split()[1]) for r in results]
    np.testing.assert_allclose(sums, float(np.sum(np.asarray(whole(X)))), rtol=1e-4)
    for ending in ("keras", "h5", "weights.h5", "json", "ckpt"):
        again = smp.load_model(tmp_path / f"again.{ending}", matrix.made)
        after = again.fit(X, Y, batch_size=16, verbose=0).history["loss"][0]
        for result in results:
            (line,) = [line for line in result.lines if line.startswith("after")]
            np.testing.assert_allclose(after, float(line.split()[1]), rtol=1e-4)
    smp.load_model(tmp_path / "again", matrix.made)
    assert "refused: smp.load_model failed: rank 1: smp.load_model: there is no" in (
        results[0].output
    )
    for result in results:
        assert "differs: smp.load_model: model.keras is not the same file" in result.output


def test_writing_h5_leaves_the_compilation_for_files_that_are_written_later(tmp_path):
    model = functional()
    for name in ("model.h5", "model.keras"):
        saved(model, tmp_path, name)
    assert type(smp.load_model(tmp_path / "model.keras").optimizer) is keras.optimizers.Adam
