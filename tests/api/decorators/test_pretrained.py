from __future__ import annotations

import keras
import numpy as np
import pytest
from saving.sample_models import X, Y, functional, same

import opensmp as smp
from opensmp.errors import SavingError


@pytest.fixture(scope="module")
def trained():
    model = functional()
    model.fit(X, Y, batch_size=8, verbose=0)
    return model


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("strategy", "m.keras"),
        ("strategy", "m.weights.h5"),
        ("opensmp", "m.ckpt"),
        ("opensmp", "served"),
    ],
)
def test_both_orders_with_scope_give_the_same_model(smp_init, trained, tmp_path, name, where):
    smp.save_model(trained, tmp_path / name)
    if where == "opensmp":
        smp_init({"partitions": 2, "microbatches": 2})
    places = {"strategy": ["CPU:0", "CPU:1"], "opensmp": None}[where]

    @smp.scope(places)
    @smp.pretrained_weights(tmp_path / name)
    def one():
        return functional()

    @smp.pretrained_weights(tmp_path / name)
    @smp.scope(places)
    def other():
        """Another."""
        return functional()

    assert (other.__name__, other.__doc__) == ("other", "Another.")
    for make in (one, other):
        model = make()
        same(model.get_weights(), trained.get_weights())
        assert isinstance(model, smp.DistributedModel) is (where == "opensmp")
        assert int(np.asarray(model.optimizer.iterations)) == 0
        model.fit(X, Y, batch_size=8, verbose=0)


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "m.weights.h5"])
def test_the_optimizer_starts_anew_unless_it_is_to_go_on(trained, tmp_path, name):
    smp.save_model(trained, tmp_path / name)

    def make():
        model = functional()
        model.optimizer.learning_rate = 0.5
        return model

    anew = smp.pretrained_weights(tmp_path / name)(make)()
    assert float(anew.optimizer.learning_rate) == 0.5
    assert int(anew.optimizer.iterations) == 0
    on = smp.pretrained_weights(tmp_path / name, optimizer=True)(make)()
    same(on.optimizer.variables, trained.optimizer.variables)


def test_what_does_not_fit_is_refused(trained, tmp_path):
    smp.save_model(trained, tmp_path / "m.keras")
    with pytest.raises(SavingError, match=r"(?s)pretrained_weights: .*another model.*\(5, 9\)"):
        smp.pretrained_weights(tmp_path / "m.keras")(functional)(units=9)
    with pytest.raises(SavingError, match=r"nothing at .*none.keras. Did you mean m.keras"):
        smp.pretrained_weights(tmp_path / "none.keras")(functional)()
    with pytest.raises(SavingError, match="returned int"):
        smp.pretrained_weights(tmp_path / "m.keras")(lambda: 3)()
    with pytest.raises(SavingError, match="has no weights yet"):
        smp.pretrained_weights(tmp_path / "m.keras")(
            lambda: keras.Sequential([keras.layers.Dense(1)])
        )()
