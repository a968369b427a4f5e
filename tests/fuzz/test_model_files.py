"""Damaged and hostile files of models: `smp.load_model` opens them, or raises an error of its own.

A case is a number that stands for a change of a small file. What comes out is a model, or a
`SavingError`, whatever HDF5, zipfile, JSON and Keras raise inside. Archives have checksums, so that
what is opened of them has the values that were saved; HDF5 files have none.
"""

from __future__ import annotations

import io
import json
import random
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
from fuzz.bounds import cases, taken
from hypothesis import given
from hypothesis import strategies as st

import opensmp as smp

NAMES = ["model.h5", "model.keras", "model.weights.h5"]
SEEDS = st.integers(0, 2**63 - 1)
ONE_IN = 12  # of the usual number of cases: each makes a model


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 3), name="series")
    x = keras.layers.Masking(name="mask")(inputs)
    x = keras.layers.LSTM(2, name="rnn")(x)
    x = keras.layers.BatchNormalization(name="norm")(x) + x * 2.0
    model = keras.Model(inputs, keras.layers.Dense(2, name="top")(x), name="net")
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


class Files:
    """A folder, the contents of the files in it by name, and the weights that they have."""

    def __init__(self, folder, contents, weights):
        self.all = folder, contents, weights


def written(folder):
    """Files of a trained model in a folder."""
    model = network()
    model.fit(np.ones((4, 4, 3)), np.ones((4, 2)), verbose=0)
    for name in [*NAMES, "model.json"]:
        smp.save_model(model, folder / name)
    (folder / "secret.h5").write_bytes((folder / "model.h5").read_bytes())
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Files(folder, contents, model.get_weights())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return written(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def other():
    """A model that takes weights."""
    return network()


def load(path, model=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return taken(lambda: smp.load_model(path, model))


# ----------------------------------------------------------------------------------- bytes


def damaged(content, rng):
    """Some bytes changed, cut off, doubled or moved."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(content))
        kind = rng.choice(["bit", "bit", "bit", "byte", "cut", "zeros", "ones", "move", "insert"])
        if kind == "bit":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            content[at] = rng.randrange(256)
        elif kind == "cut":
            del content[max(1, at) :]
        elif kind == "zeros":
            content[at : at + rng.choice([4, 8, 512])] = b""
        elif kind == "ones":
            content[at : at + 8] = b"\xff" * 8
        elif kind == "move":
            to = rng.randrange(len(content))
            content[at : at + 64], content[to : to + 64] = (
                content[to : to + 64],
                content[at : at + 64],
            )
        else:
            content[at:at] = rng.randbytes(rng.randrange(1, 40))
        if not content:
            return b"\0"
    return bytes(content)


@pytest.mark.parametrize("name", NAMES)
@cases(one_in=ONE_IN)
@given(seed=SEEDS)
def test_bytes(files, other, name, seed):
    folder, contents, weights = files.all
    path = folder / f"case-{name}"
    path.write_bytes(damaged(contents[name], random.Random(seed)))
    result = load(path, other if "weights" in name else None)
    if result.error is None and name.endswith(".keras"):
        for mine, saved in zip(result.value.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(mine, saved)


# ------------------------------------------------------------------------------------ JSON

ODD = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**6,
    2**31,
    10**30,
    1e300,
    float("nan"),
    "",
    "x",
    "os.system",
    "../../etc/passwd",
    "\ud800",
    "Dense",
    "LSTM",
    "Masking",
    "Functional",
    "Sequential",
    "Lambda",
    "NotEqual",
    "Map",
    "Function",
    "float16",
    "string",
    [],
    [[]],
    {},
    [None, 2**40],
    ["rnn", 0, 0],
    ["rnn", 99, 99],
    {"class_name": "__lambda__", "config": {"value": "4wA="}},
    {"class_name": "Dense", "config": {"units": 3}},
    {"class_name": "function", "config": "system", "module": "os"},
    {"class_name": "__numpy__", "config": {"value": [1], "dtype": "object"}},
    {"class_name": "__keras_tensor__", "config": {"shape": [9], "dtype": "q", "keras_history": 3}},
]


def places(node, found):
    """All places in a JSON value, as container and key."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        found.append((node, key))
        if isinstance(node[key], (dict, list)):
            places(node[key], found)
    return found


def edited(text, rng):
    """A JSON text with some values changed."""
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        found = places(value, [])
        if not found:
            break
        node, key = rng.choice(found)
        kind = rng.choice(["odd", "odd", "odd", "delete", "swap", "deep", "double"])
        if kind == "odd":
            node[key] = rng.choice(ODD)
        elif kind == "delete":
            del node[key]
        elif kind == "swap":
            other, at = rng.choice(found)
            node[key] = json.loads(json.dumps(other[at]))
        elif kind == "deep":
            for _ in range(rng.choice([3, 100])):
                node[key] = {"class_name": "Sequential", "config": {"layers": [node[key]]}}
        else:
            node[key] = [node[key], node[key]]
        if rng.random() < 0.02:
            value = rng.choice(ODD)
            break
        value = json.loads(json.dumps(value))
    return json.dumps(value)


def with_part(content, part, change):
    """An archive in which one part is another one."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name == part else data)
    return made.getvalue()


@pytest.mark.parametrize("part", ["config.json", "model_config", "training_config", "model.json"])
@cases(one_in=ONE_IN)
@given(seed=SEEDS)
def test_configurations(files, part, seed):
    folder, contents, _ = files.all
    rng = random.Random(seed)
    if part == "model.json":
        path = folder / "case.json"
        path.write_text(edited(contents[part], rng), encoding="utf-8", errors="surrogatepass")
        (folder / "case.weights.h5").write_bytes(contents["model.weights.h5"])
    elif part == "config.json":
        path = folder / "case.keras"
        path.write_bytes(
            with_part(contents["model.keras"], part, lambda text: edited(text, rng).encode())
        )
    else:
        path = folder / "case.h5"
        path.write_bytes(contents["model.h5"])
        with h5py.File(path, "r+") as file:
            file.attrs[part] = edited(file.attrs[part], rng)
    load(path)


# ------------------------------------------------------------------------- HDF5 and archives


def restructured(content, folder, rng):
    """An HDF5 file with some of its groups, datasets and attributes changed."""
    path = folder / "inner.h5"
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        for _ in range(rng.choice([1, 1, 2, 4])):
            names: list[str] = []
            file.visit(names.append)
            if names:
                change_one(file, rng.choice(sorted(names)), folder, rng)
    return path.read_bytes()


def change_one(file, name, folder, rng):
    item = file[name]
    shape = getattr(item, "shape", (2, 2)) or (2, 2)
    kind = rng.choice(
        [
            "delete",
            "shape",
            "type",
            "external",
            "virtual",
            "link",
            "soft",
            "late",
            "chunks",
            "group",
        ]
        + ["attribute"] * 4
    )
    if kind == "attribute":
        change_attribute(item if item.attrs else file, rng)
        return
    del item
    del file[name]
    if kind == "shape":
        file[name] = np.zeros(rng.choice([(), (1,), (0,), (7, 9), (2, 2, 2), (1000,)]), "float32")
    elif kind == "type":
        file[name] = rng.choice([b"text", np.array([b"a"]), np.zeros((2, 2), "complex64"), True])
    elif kind == "external":
        outside = [(str(folder / "secret.h5"), 0, 1 << 20)]
        file.create_dataset(name, shape, "float32", external=outside)
    elif kind == "virtual":
        layout = h5py.VirtualLayout(shape, "float32")
        file.create_virtual_dataset(name, layout)
    elif kind == "link":
        file[name] = h5py.ExternalLink(str(folder / "secret.h5"), "/model_weights")
    elif kind == "soft":
        file[name] = h5py.SoftLink(rng.choice(["/", "/nowhere", "/model_weights", "/optimizer"]))
    elif kind == "late":
        file.create_dataset(name, rng.choice([shape, (1 << 40,), (1 << 20, 1 << 20)]), "float32")
    elif kind == "chunks":
        file.create_dataset(
            name, (1 << 40,), "float64", chunks=(1 << 20,), compression="gzip", shuffle=True
        )
    elif kind == "group":
        file.create_group(name)["again"] = file["/"]


def change_attribute(item, rng):
    name = rng.choice(sorted(item.attrs) or ["weight_names"])
    old = item.attrs.get(name)
    if rng.random() < 0.3 and isinstance(old, np.ndarray):
        new = [old[:-1], np.concatenate([old, old[:1]]), np.repeat(old, 300)][rng.randrange(3)]
        item.attrs[name] = new[: 4000 // max(1, new.dtype.itemsize)]
    elif rng.random() < 0.2 and name in item.attrs:
        del item.attrs[name]
    else:
        item.attrs[name] = rng.choice(
            [
                "",
                "2.4.0",
                "1",
                "x",
                5,
                np.bytes_(b"\xff"),
                [b"a"],
                [1, 2],
                np.zeros((3, 3)),
                "[" * 9000,
            ]
        )


@pytest.mark.parametrize("name", NAMES)
@cases(one_in=ONE_IN)
@given(seed=SEEDS)
def test_structure(files, other, name, seed):
    folder, contents, _ = files.all
    rng = random.Random(seed)
    path = folder / f"structure-{name}"
    if name.endswith(".keras"):
        content = with_part(
            contents[name], "model.weights.h5", lambda data: restructured(data, folder, rng)
        )
    else:
        content = restructured(contents[name], folder, rng)
    path.write_bytes(content)
    load(path, other if "weights" in name or rng.random() < 0.3 else None)


@cases(one_in=ONE_IN)
@given(seed=SEEDS)
def test_archives(files, seed):
    folder, contents, _ = files.all
    rng = random.Random(seed)
    path = folder / "archive.keras"
    with zipfile.ZipFile(io.BytesIO(contents["model.keras"])) as old:
        parts = [(name, old.read(name)) for name in old.namelist()]
    for _ in range(rng.choice([1, 2])):
        at, to = rng.randrange(len(parts)), rng.randrange(len(parts))
        name, data = parts[at]
        kind = rng.choice(["drop", "swap", "rename", "twice", "bomb", "empty", "half", "many"])
        if kind == "drop":
            parts[at] = ("nothing", b"")
        elif kind == "swap":
            parts[at], parts[to] = (name, parts[to][1]), (parts[to][0], data)
        elif kind == "rename":
            parts[at] = (
                rng.choice(["../x", "/x", " ", "model.weights.npz", "assets/a", "config.json/"]),
                data,
            )
        elif kind == "twice":
            parts.append((name, b"[]"))
        elif kind == "bomb":
            parts.append((rng.choice(["assets/z", name]), bytes(70 << 20)))
        elif kind == "empty":
            parts[at] = (name, b"")
        elif kind == "half":
            parts[at] = (name, data[: len(data) // 2])
        else:
            parts += [(f"assets/{i}", b"") for i in range(300)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        kind = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
        with zipfile.ZipFile(path, "w") as made:
            for name, data in parts:
                bomb = len(data) > 1 << 20
                made.writestr(name, data, zipfile.ZIP_DEFLATED if bomb else kind)
    load(path)
