from __future__ import annotations

import pytest
import tensorflow as tf

from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint.restoring.reader import Files

KEY = "value/.ATTRIBUTES/VARIABLE_VALUE"


def test_a_checkpoint_tells_shapes_types_and_values(tmp_path):
    value = tf.Variable([[1.0, 2.0, 3.0]], dtype=tf.bfloat16)
    files = Files(tf.train.Checkpoint(value=value).write(str(tmp_path / "c")))
    assert files.stored[KEY] == ((1, 3), tf.bfloat16)
    assert files.object_graph
    tensor = files.read([KEY], threads=1)[KEY]
    assert tensor.dtype == tf.bfloat16
    assert tensor.numpy().tolist() == [[1.0, 2.0, 3.0]]


def test_a_wrong_checksum_is_found_without_keeping_values(tmp_path):
    path = tf.train.Checkpoint(value=tf.Variable(tf.ones([100]))).write(str(tmp_path / "c"))
    (data,) = tmp_path.glob("c.data*")
    Files(path).check([KEY])
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    with pytest.raises(tf.errors.DataLossError):
        Files(path).check([KEY])


def test_names_instead_of_objects_are_refused(tmp_path):
    path = str(tmp_path / "c")
    tf.raw_ops.SaveV2(
        prefix=path, tensor_names=["w"], shape_and_slices=[""], tensors=[tf.ones([1])]
    )
    with pytest.raises(CheckpointError, match=r"has no object graph: expected .* tensors: w"):
        Files(path)
