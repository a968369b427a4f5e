from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from processes import check_ranks
from saving.models import X

SCRIPT = """
import os, sys
import keras, numpy as np, tensorflow as tf
import opensmp as smp
from opensmp import _private
from opensmp.errors import SavingError
from saving.models import X, functional

smp.init({"partitions": 2, "microbatches": 2})
folder = sys.argv[1]
model = smp.DistributedModel.from_keras(functional())
expected = np.asarray(model(X))
own = [not _private.is_elsewhere(v) for v in model.variables]
assert not all(own), own
model.save(folder + "/model.keras")
model.save_weights(folder + "/model.weights.h5")
model.save_model(folder + "/served")
plain = model.to_keras()
assert not isinstance(plain, smp.DistributedModel)
np.testing.assert_allclose(plain(X), expected, rtol=1e-5, atol=1e-6)
assert own == [not _private.is_elsewhere(v) for v in model.variables]
try:
    model.save(folder + "/served/saved_model.pb/model.keras")
except SavingError as error:
    print("refused:", str(error).splitlines()[0])
for variable, here in zip(model.variables, own):
    if here:
        variable.assign(tf.zeros_like(variable.value))
model.load_weights(folder + "/model.weights.h5")
np.testing.assert_allclose(np.asarray(model(X)), expected, rtol=1e-6, atol=1e-6)
if smp.rank() == 0:
    np.save(folder + "/expected.npy", expected)
"""


def test_several_processes_write_one_whole_model(tmp_path):
    results = check_ranks(SCRIPT, 2, args=[tmp_path])
    expected = np.load(tmp_path / "expected.npy")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(X), expected, rtol=1e-5, atol=1e-6)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(X), expected, rtol=1e-5, atol=1e-6)
    for file in (tmp_path / "served").rglob("*"):
        assert not file.is_file() or b"opensmp" not in file.read_bytes()
    for result in results:  # both ranks are told
        assert "refused:" in result.output
        assert "could not be written" in result.output
