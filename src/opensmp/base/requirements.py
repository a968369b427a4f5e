"""Checks that a supported TensorFlow and Keras are installed, before the package imports them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from opensmp.base import versions

_BACKEND_MENDING = (
    "Set it before Keras is imported for the first time: `KERAS_BACKEND=tensorflow` in the "
    'environment, or `os.environ["KERAS_BACKEND"] = "tensorflow"` as the first line of the '
    'script; or write "backend": "tensorflow" into ~/.keras/keras.json.'
)


def require_installed() -> None:
    """Checks the installed TensorFlow and Keras versions and settings without importing either."""
    # These are the values that TensorFlow itself recognizes.
    legacy = os.environ.get("TF_USE_LEGACY_KERAS")
    if legacy in ("1", "true", "True"):
        raise ImportError(
            f"opensmp needs Keras 3, but TF_USE_LEGACY_KERAS={legacy} makes tf.keras Keras 2. "
            "Remove the variable from the environment before TensorFlow is imported. A model that "
            'tf_keras has saved by model.save("old.h5") is taken to Keras 3, weights and all, by '
            'keras.models.load_model("old.h5", compile=False).'
        )
    # Checked before the import: importing Keras with a backend that is not installed fails with an
    # unhelpful message about that backend.
    asked = os.environ.get("KERAS_BACKEND")
    if "keras" not in sys.modules and asked and asked != "tensorflow":
        raise ImportError(_wrong_backend(f"KERAS_BACKEND={asked}"))
    found = {package: _installed(package) for package in versions.OLDEST}
    too_old = versions.too_old(found)
    if too_old is not None:
        raise ImportError(too_old)


def require_tensorflow() -> None:
    """Imports TensorFlow and Keras and checks that Keras 3 runs on the TensorFlow backend."""
    require_installed()
    try:
        import tensorflow  # noqa: F401, I001  # imports Keras itself, so that either may be missing
        import keras
    except ImportError as error:
        raise ImportError(_not_importable(error)) from error
    # Packages built from source or copied may lack metadata, so `require_installed` cannot see
    # their version.
    too_old = versions.too_old({name: _loaded(name) for name in versions.OLDEST})
    if too_old is not None:
        raise ImportError(too_old)
    if keras.backend.backend() != "tensorflow":
        raise ImportError(_wrong_backend(f"Keras uses the backend {keras.backend.backend()!r}"))


def _installed(package: str) -> dict[str, str]:
    """Returns distribution name to version of a package; of the imported module if there is one."""
    if package in sys.modules:
        return _loaded(package)
    try:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    except ImportError as error:
        raise ImportError(_not_importable(error)) from error
    if spec.origin is None:
        return {}
    return versions.installed(package, Path(spec.origin).parent.parent)


def _loaded(package: str) -> dict[str, str]:
    """Returns the version of an imported package, keyed by the name of its distribution."""
    module = sys.modules[package]
    version = getattr(module, "__version__", None)  # missing while its import is in progress
    origin = getattr(module, "__file__", None)
    if not isinstance(version, str):
        return {}
    names = versions.installed(package, Path(origin).parent.parent) if origin else {}
    return {next(iter(names), package): version}


def _not_importable(error: ImportError) -> str:
    """Returns the message for a failed import of TensorFlow, Keras or another Keras backend."""
    missing = (error.name or "").partition(".")[0]
    if missing in ("jax", "jaxlib", "torch", "openvino"):
        return _wrong_backend(f"Keras was told to use another one ({error})")
    if missing == "keras":
        return (
            f"opensmp needs Keras 3, which could not be imported ({error}). Install it with: "
            f'pip install "keras>={versions.oldest("keras")}".'
        )
    oldest = versions.oldest("tensorflow")
    return (
        f"opensmp needs TensorFlow, which could not be imported ({error}). Install it with one "
        f'of: pip install "tensorflow-cpu>={oldest}" for machines without a GPU, or '
        f'pip install "tensorflow[and-cuda]>={oldest}" for NVIDIA GPUs.'
    )


def _wrong_backend(received: str) -> str:
    return f"opensmp needs Keras on the backend 'tensorflow', but {received}. {_BACKEND_MENDING}"
