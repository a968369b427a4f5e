"""Files that others made, through `smp.load_model`: what could do harm is refused by name."""

from __future__ import annotations

import json
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest
from saving.sample_models import X, Y, functional, same

import opensmp as smp
from opensmp.errors import SavingError
from opensmp.saving.models.inspection.safe_hdf5 import Hdf5

NAMES = ["model.h5", "model.keras", "model.weights.h5"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A trained model in each format, and one number file that is none of our business."""
    folder = tmp_path_factory.mktemp("files")
    model = functional()
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for name in NAMES:
        smp.save_model(model, folder / name)
    (folder / "secret.bin").write_bytes(np.full(4096, 7, "float32").tobytes())
    with h5py.File(folder / "secret.h5", "w") as file:
        file["values"] = np.full((5, 4), 7, "float32")
    return folder


def changed(files, folder, name, change):
    """A copy of a file, in whose HDF5 part something was changed."""
    path = folder / name
    if not name.endswith(".keras"):
        shutil.copyfile(files / name, path)
        with h5py.File(path, "r+") as file:
            change(file)
        return path
    with zipfile.ZipFile(files / name) as old, zipfile.ZipFile(path, "w") as new:
        for part in old.namelist():
            data = old.read(part)
            if part.endswith(".h5"):
                (folder / "inner.h5").write_bytes(data)
                with h5py.File(folder / "inner.h5", "r+") as file:
                    change(file)
                data = (folder / "inner.h5").read_bytes()
            new.writestr(part, data)
    return path


def load(path):
    return smp.load_model(path, functional() if path.name == "model.weights.h5" else None)


def places(file):
    """The first kernel of the layers, and the last of the optimizer's arrays of that shape."""
    found = []
    file.visititems(
        lambda name, item: (
            found.append(name) if isinstance(item, h5py.Dataset) and item.shape == (5, 4) else None
        )
    )
    return {"layer": found[0], "optimizer": [n for n in found if "optimizer" in n][-1]}


def external(file, name, files):
    file.create_dataset(name, (5, 4), "float32", external=[(str(files / "secret.bin"), 0, 80)])


def virtual(file, name, files):
    layout = h5py.VirtualLayout((5, 4), "float32")
    layout[:] = h5py.VirtualSource(str(files / "secret.h5"), "values", (5, 4))
    file.create_virtual_dataset(name, layout)


def external_link(file, name, files):
    file[name] = h5py.ExternalLink(str(files / "secret.h5"), "/values")


def soft_link(file, name, files):
    file["elsewhere"] = h5py.ExternalLink(str(files / "secret.h5"), "/")
    file[name] = h5py.SoftLink("/elsewhere/values")


def never_written(file, name, files):
    file.create_dataset(name, (1 << 19, 1 << 18), "float32", chunks=(1 << 10, 1 << 10))


def never_allocated(file, name, files):
    file.create_dataset(name, (1 << 19, 1 << 18), "float32")


def packed_twice(file, name, files):
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_chunk((16 << 20,))
    options.set_deflate(9)
    options.set_deflate(9)
    space = h5py.h5s.create_simple((64 << 20,))
    group = file.require_group(name.rpartition("/")[0]).id
    label = name.rpartition("/")[2].encode()
    made = h5py.h5d.create(group, label, h5py.h5t.IEEE_F32LE, space, options)
    h5py.Dataset(made)[:] = np.zeros(64 << 20, "float32")  # 256 MiB in 1 KiB


HARMFUL = {
    external: "has its values in another file, '.*secret.bin'",
    virtual: "is virtual",
    external_link: "leads to another file, '.*secret.h5'",
    soft_link: "leads to another (place|file)",
    never_written: "declares 549,755,813,888 bytes, which are not all there",
    never_allocated: "declares 549,755,813,888 bytes, which are not all there",
    packed_twice: "declares 268,435,456 bytes, of which [0-9,]+ are stored",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["layer", "optimizer"])
@pytest.mark.parametrize("harm", HARMFUL, ids=lambda harm: harm.__name__)
def test_a_dataset_that_could_do_harm_is_refused_by_name(files, tmp_path, name, place, harm):
    def change(file):
        at = places(file)[place]
        del file[at]
        harm(file, at, files)

    path = changed(files, tmp_path, name, change)
    with pytest.raises(SavingError, match=HARMFUL[harm]) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_the_optimizers_arrays_of_another_shape_are_not_read(files, tmp_path, monkeypatch):
    def change(file):
        at = places(file)["optimizer"]
        del file[at]
        file[at] = np.zeros((50, 40), "float32")

    path = changed(files, tmp_path, "model.h5", change)
    monkeypatch.setattr(Hdf5, "array", None)
    with pytest.warns(UserWarning, match="does not fit Adam"):
        load(path)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_were_packed_once_more_are_read(files, tmp_path, name):
    def change(file):
        at = places(file)["layer"]
        value = np.asarray(file[at])
        del file[at]
        file.create_dataset(at, data=value, chunks=(2, 2), compression="gzip", shuffle=True)

    same(load(changed(files, tmp_path, name, change)).weights, load(files / name).weights)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_has_itself_as_a_part_is_looked_at_once(files, tmp_path, name):
    def change(file):
        file.create_group("more")["again"] = file["/"]

    path = changed(files, tmp_path, name, change)
    same(load(path).weights, load(files / name).weights)


def test_groups_may_be_nested_deeper_than_python_calls_functions(files, tmp_path):
    def change(file):
        group = file
        for _ in range(3000):
            group = group.create_group("g")

    path = changed(files, tmp_path, "model.h5", change)
    same(load(path).weights, load(files / "model.h5").weights)


DEEP = "[" * 200_000 + "]" * 200_000
JSON = {
    "a number": ("42", "int, where an object"),
    "a list": ("[1, 2]", "list, where an object"),
    "null": ("null", "null, where an object"),
    "another object": ('{"layers": 1}', "no configuration of a model, but an object with 'layers'"),
    "a long number": ("1" * 10_000, "too many digits"),
    "half": ('{"class_name": "Func', r"not JSON \("),
    "deep": (DEEP, "nested too deeply"),
    "not UTF-8": (b'{"class_name": "\xff"}', "not UTF-8"),
}


def replaced(files, folder, name, part, text):
    """A copy of an archive in which one part is another one."""
    with zipfile.ZipFile(files / name) as old, zipfile.ZipFile(folder / name, "w") as new:
        for each in old.namelist():
            new.writestr(each, text if each == part else old.read(each))
    return folder / name


@pytest.mark.parametrize("case", JSON)
class TestJsonThatIsNoConfiguration:
    def test_in_an_archive(self, files, tmp_path, case):
        text, message = JSON[case]
        path = replaced(files, tmp_path, "model.keras", "config.json", text)
        with pytest.raises(SavingError, match=message) as caught:
            smp.load_model(path)
        assert f"config.json in {path}" in str(caught.value)

    @pytest.mark.parametrize("attribute", ["model_config", "training_config"])
    def test_in_an_attribute(self, files, tmp_path, case, attribute):
        text, message = JSON[case]
        if attribute == "training_config" and case == "another object":
            return  # a model that was compiled with nothing

        def change(file):
            del file.attrs[attribute]
            value = text if isinstance(text, str) else np.bytes_(text)
            file.attrs.create(attribute, value)

        path = changed(files, tmp_path, "model.h5", change)
        with pytest.raises(SavingError, match=message) as caught:
            smp.load_model(path)
        assert f"{attribute} in {path}" in str(caught.value)

    def test_in_a_json_file(self, files, tmp_path, case):
        text, message = JSON[case]
        path = tmp_path / "model.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        shutil.copyfile(files / "model.weights.h5", tmp_path / "model.weights.h5")
        with pytest.raises(SavingError, match=f"{message}|no configuration of a model"):
            smp.load_model(path)


def test_a_configuration_of_models_in_models_without_end_is_refused(files, tmp_path):
    config = {"class_name": "Dense", "config": {"units": 3}}
    for _ in range(240):
        config = {"class_name": "Sequential", "config": {"name": "s", "layers": [config]}}
    path = replaced(files, tmp_path, "model.keras", "config.json", json.dumps(config))
    with pytest.raises(SavingError, match=f"{path}"):
        smp.load_model(path)

    def change(file):
        file.attrs["model_config"] = json.dumps(config)

    path = changed(files, tmp_path, "model.h5", change)
    with pytest.raises(SavingError, match=f"{path}"):
        smp.load_model(path)


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_configuration_may_not_ask_for_more_than_the_file_has(files, tmp_path, name):
    def enlarged(text):
        config = json.loads(text)
        for layer in config["config"]["layers"]:
            if "units" in layer["config"]:
                layer["config"]["units"] = 10**9
        return json.dumps(config)

    if name == "model.keras":
        with zipfile.ZipFile(files / name) as archive:
            text = archive.read("config.json")
        path = replaced(files, tmp_path, name, "config.json", enlarged(text))
    else:

        def change(file):
            file.attrs["model_config"] = enlarged(file.attrs["model_config"])

        path = changed(files, tmp_path, name, change)
    with pytest.raises(SavingError, match=r"asks for a variable of the shape \(5, 1000000000\)"):
        smp.load_model(path)


def test_a_wrong_bit_in_the_weights_of_an_archive_is_found(files, tmp_path):
    content = bytearray((files / "model.keras").read_bytes())
    value = np.asarray(load(files / "model.keras").weights[0]).tobytes()
    at = content.find(value)
    assert at > 0
    content[at + 9] ^= 1
    path = tmp_path / "model.keras"
    path.write_bytes(content)
    for model in (None, functional()):
        with pytest.raises(SavingError, match=r"(?i)damaged or half a file: bad crc"):
            smp.load_model(path, model)


def test_an_archive_that_is_far_larger_when_unpacked_is_refused(files, tmp_path):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(files / "model.keras") as old, zipfile.ZipFile(path, "w") as new:
        new.writestr("assets/zeros", bytes(200 << 20), zipfile.ZIP_DEFLATED)
        for part in old.namelist():
            new.writestr(part, old.read(part))
    with pytest.raises(SavingError, match=r"'assets/zeros' would be 209,715,200 bytes, of which"):
        smp.load_model(path)


def test_names_that_lead_out_of_an_archive_are_refused(files, tmp_path):
    for name in ("../outside", "/outside", "assets\\..\\..\\outside"):
        path = shutil.copyfile(files / "model.keras", tmp_path / "model.keras")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"")
        with pytest.raises(SavingError, match="lies outside of the archive"):
            smp.load_model(path)


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_load_weights_of_a_distributed_model_looks_first(smp_init, files, tmp_path, name):
    def change(file):
        at = places(file)["layer"]
        del file[at]
        virtual(file, at, files)

    path = changed(files, tmp_path, name, change)
    smp_init({"partitions": 2, "microbatches": 2})
    model = smp.DistributedModel.from_keras(functional())
    with pytest.raises(SavingError, match="is virtual"):
        model.load_weights(path)
    model.load_weights(files / name)


def test_weights_in_several_files_are_looked_at_each(smp_init, files, tmp_path):
    smp_init({"partitions": 2, "microbatches": 2})
    model = smp.DistributedModel.from_keras(functional())
    path = tmp_path / "model.weights.json"
    model.save_weights(path, max_shard_size=2e-7)
    shards = sorted(tmp_path.glob("*.weights.h5"))
    assert len(shards) > 1
    model.load_weights(path)
    with h5py.File(shards[-1], "r+") as file:
        file["more"] = h5py.ExternalLink(str(files / "secret.h5"), "/values")
    with pytest.raises(SavingError, match=f"{shards[-1].name} is not read: 'more' in it leads to"):
        model.load_weights(path)
    text = path.read_text()
    path.write_text(text.replace(shards[-1].name, "../" + shards[-1].name))
    with pytest.raises(SavingError, match=r"names '\.\./.*' as a file of its weights"):
        model.load_weights(path)
    path.write_text("7")
    with pytest.raises(SavingError, match="int, where an object"):
        model.load_weights(path)


def test_a_class_that_is_not_given_is_an_error_of_opensmp_with_the_words_of_keras(tmp_path):
    class Mine(keras.layers.Layer):
        def call(self, x):
            return x * 2.0

    for name in ("model.keras", "model.h5"):
        keras.Sequential([keras.Input((5,)), Mine()]).save(tmp_path / name)
        with pytest.raises(SavingError, match="Mine") as caught:
            smp.load_model(tmp_path / name)
        assert caught.value.__cause__ is not None
        loaded = smp.load_model(tmp_path / name, custom_objects={"Mine": Mine})
        np.testing.assert_array_equal(loaded(X), 2 * X)
