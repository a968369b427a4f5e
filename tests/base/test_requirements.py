from __future__ import annotations

import pytest
from helpers import run_python

CALL = (
    "from opensmp.base.requirements import require_tensorflow; require_tensorflow(); print('fine')"
)
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "{name}":
            raise ModuleNotFoundError("No module named '{name}'", name="{name}")
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize(
    ("before", "env", "parts"),
    [
        (
            HIDE.format(name="tensorflow"),
            {},
            [
                "opensmp needs TensorFlow",
                "No module named 'tensorflow'",
                'pip install "tensorflow-cpu>=',
                'pip install "tensorflow[and-cuda]>=',
            ],
        ),
        (
            HIDE.format(name="keras"),
            {},
            ["opensmp needs Keras 3", "No module named 'keras'", 'pip install "keras>=3.9"'],
        ),
        (
            "",
            {"KERAS_BACKEND": "jax"},
            ["'tensorflow', but KERAS_BACKEND=jax", "Set it before Keras is imported"],
        ),
        (
            "import os, keras; keras.backend.backend = lambda: 'torch'\n",
            {},
            ["'tensorflow', but Keras uses the backend 'torch'", "KERAS_BACKEND=tensorflow"],
        ),
        (
            "import keras; keras.__version__ = '2.15.0'\n",
            {},
            ["keras 2.15.0 is installed", 'pip install --upgrade "keras>=3.9"'],
        ),
        (
            "",
            {"TF_USE_LEGACY_KERAS": "1"},
            ["TF_USE_LEGACY_KERAS=1 makes tf.keras Keras 2", "Remove the variable"],
        ),
    ],
    ids=["no TensorFlow", "no Keras", "other backend", "backend in use", "Keras 2", "legacy"],
)
def test_what_is_missing_is_an_import_error_that_says_how_to_mend_it(before, env, parts):
    done = run_python(before + CALL, env=env)
    assert done.returncode == 1
    last = next(
        line for line in reversed(done.stderr.split("\n")) if line.startswith("ImportError")
    )
    for part in parts:
        assert part in last


def test_backend_in_the_configuration_file_of_keras_is_noticed(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    done = run_python(CALL, env={"KERAS_HOME": str(tmp_path)})
    assert "ImportError: opensmp needs Keras on the backend 'tensorflow', but" in done.stderr
    assert '"backend": "tensorflow" into ~/.keras/keras.json' in done.stderr


def test_tensorflow_and_keras_3_are_enough():
    assert run_python(CALL, env={"KERAS_BACKEND": "tensorflow"}).stdout.strip() == "fine"
