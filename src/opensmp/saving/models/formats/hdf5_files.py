"""HDF5 files with one group per layer, as Keras 2 wrote them; Keras 3 still writes whole models."""

from __future__ import annotations

from opensmp.base.types import Model, PathLike
from opensmp.saving.models import save, weight_check
from opensmp.saving.models.formats.file_format import FileFormat, Loading
from opensmp.saving.models.formats.paths import named
from opensmp.saving.models.inspection.inspection import of_hdf5
from opensmp.saving.models.inspection.safe_hdf5 import opened
from opensmp.saving.models.keras2.hdf5 import load_hdf5, restore_optimizer

_OF_WEIGHTS = {"layer_names", "layer_names0", "model_weights"}


def _layers_file(model: Model, path: PathLike, what: str, state: bool) -> None:
    with opened(path, path, what) as file:
        within = file.group("model_weights") if "model_weights" in file.root else file.root
        weight_check.check(weight_check.of_layers(model, file, within), path, what)
    with named(path, ".h5") as name:
        model.load_weights(name)
    if state:
        restore_optimizer(model, path, what)


def _load_model(path: PathLike, loading: Loading) -> Model:
    return load_hdf5(
        path,
        loading.what,
        compile=loading.compile,
        custom_objects=loading.custom_objects,
        safe_mode=loading.safe_mode,
    )


H5 = FileFormat(
    "a whole model in HDF5",
    recognises=lambda target: "model_config" in target.in_hdf5,
    load_weights=_layers_file,
    load_model=_load_model,
    inspect=of_hdf5,
    endings=(".h5", ".hdf5"),
    save=save.save,
)
H5_WEIGHTS = FileFormat(
    "weights in HDF5, as Keras 2 wrote them",
    recognises=lambda target: not _OF_WEIGHTS.isdisjoint(target.in_hdf5),
    load_weights=_layers_file,
    inspect=of_hdf5,
)
