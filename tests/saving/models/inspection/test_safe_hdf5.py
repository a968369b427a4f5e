from __future__ import annotations

import io

import h5py
import numpy as np
import pytest

from opensmp.errors import SavingError, StepError
from opensmp.saving.models.inspection.safe_hdf5 import opened


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["layers/dense/kernel"] = np.ones((3, 2), "float32")
        file["layers/words"] = np.array([b"a", b"b"], dtype=object)
        file["empty"] = np.zeros((0, 3))
        file["nothing"] = h5py.Empty("f")
        file["scalar"] = 3.0
        file.attrs["text"] = '{"a": 1}'
        file.attrs["bytes"] = np.bytes_(b"\xff")
        file.attrs["number"] = 5
        file["layers"].attrs["names"] = [b"x", b"y"]
        file["layers"].attrs["long0"] = [b"x"]
        file["layers"].attrs["long1"] = ["z"]
    return tmp_path / "a.h5"


def test_all_datasets_have_their_shapes(path):
    with opened(path, path, "load") as file:
        assert file.shapes() == {
            "layers/dense/kernel": (3, 2),
            "layers/words": (2,),
            "empty": (0, 3),
            "nothing": (),
            "scalar": (),
        }


def test_a_file_may_be_bytes_in_memory(path):
    with opened(io.BytesIO(path.read_bytes()), path, "load") as file:
        assert file.shapes()["layers/dense/kernel"] == (3, 2)


def test_values_are_read_where_the_shape_is_the_expected_one(path):
    with opened(path, path, "load") as file:
        group = file.group("layers/dense")
        kernel = file.dataset("kernel", group)
        np.testing.assert_array_equal(file.array(kernel, (3, 2)), np.ones((3, 2)))
        with pytest.raises(SavingError, match=r"numbers of the shape \(2, 3\), received float32"):
            file.array(kernel, (2, 3))
        with pytest.raises(SavingError, match="expected numbers"):
            file.array(file.dataset("layers/words"), (2,))


def test_what_is_missing_or_another_thing_says_so(path):
    with opened(path, path, "load") as file:
        for name in ("layers/none", "layers/dense", "layers/dense/kernel/x"):
            with pytest.raises(SavingError, match=f"it has no dataset '{name}'"):
                file.dataset(name)
        with pytest.raises(SavingError, match="it has no group 'scalar'"):
            file.group("scalar")


def test_a_link_is_not_followed_on_the_way_to_a_dataset(path):
    with h5py.File(path, "r+") as file:
        file["layers/away"] = h5py.ExternalLink("other.h5", "/dense")
        file["layers/aside"] = h5py.SoftLink("/layers/dense")
    with opened(path, path, "load") as file:
        with pytest.raises(SavingError, match=r"'/layers/away' in it leads to another file, 'oth"):
            file.dataset("layers/away/kernel")
        with pytest.raises(SavingError, match="'/layers/aside' in it leads to another place"):
            file.dataset("layers/aside/kernel")


def test_attributes_are_text_json_or_lists_of_names(path):
    with opened(path, path, "load") as file:
        assert file.text("text") == '{"a": 1}'
        assert file.json("text") == {"a": 1}
        assert file.text("none") is None
        assert file.configuration("none") is None
        assert file.names(file.group("layers"), "names") == ["x", "y"]
        assert file.names(file.group("layers"), "long") == ["x", "z"]
        with pytest.raises(SavingError, match=r"bytes in .* is not UTF-8"):
            file.text("bytes")
        with pytest.raises(SavingError, match=r"number in .* is no text, but int"):
            file.text("number")


def test_chunks_that_were_never_written_are_not_zeros(path):
    with h5py.File(path, "r+") as file:
        made = file.create_dataset("late", (100, 100), chunks=(10, 10))
        made[:50] = 1
    with opened(path, path, "load") as file, pytest.raises(SavingError, match="not all there"):
        file.shapes()


def test_errors_of_the_library_are_of_the_file_and_ours_pass(path):
    with (
        pytest.raises(SavingError, match=r"a.h5 is damaged or half a file: .*gone"),
        opened(path, path, "load"),
    ):
        raise KeyError("gone")
    with pytest.raises(StepError), opened(path, path, "load"):
        raise StepError("mine")
    path.write_bytes(b"no HDF5")
    with pytest.raises(SavingError, match="damaged or half a file"), opened(path, path, "load"):
        pass
