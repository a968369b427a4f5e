from __future__ import annotations

import pytest
from saving.sample_models import X, Y, functional

from opensmp.errors import SavingError
from opensmp.saving.models import weight_check
from opensmp.saving.models.weight_check import Pair


def test_all_differences_are_counted_and_the_first_are_named():
    pairs = [Pair("a", (1,), "x", (1,)), Pair("b", (2,), "y", (3,)), Pair(None, None, "z", (4,))]
    pairs += [Pair("c", (1,), None, None)] * 5
    with pytest.raises(SavingError) as caught:
        weight_check.check(pairs, "file", "load")
    text = str(caught.value)
    assert "7 of 8 differ, and none was assigned" in text
    assert "the model has b (2,), the file has y (3,)" in text
    assert "the model has nothing, the file has z (4,)" in text
    assert "and 2 more" in text
    weight_check.check(pairs[:1], "file", "load")


def test_the_optimizer_is_no_weight(tmp_path):
    model = functional()
    model.fit(X, Y, verbose=0)
    for name in ("m.weights.h5", "m.keras"):
        getattr(model, "save" if name.endswith("keras") else "save_weights")(tmp_path / name)
        pairs = weight_check.of_weights_file(model, tmp_path / name, "smp.load_model")
        assert {pair.mine for pair in pairs} >= {v.path for v in model.weights}
        assert all(pair.my_shape == pair.their_shape for pair in pairs)
        assert weight_check.has_optimizer(tmp_path / name, "smp.load_model")
