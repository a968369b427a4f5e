from __future__ import annotations

import pathlib

import pytest
from saving.sample_models import functional

import opensmp as smp
from opensmp.errors import SavingError
from opensmp.saving.models.formats.formats import Format, format_for, format_of
from opensmp.saving.models.formats.paths import checkpoint_prefix, named


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m.keras", Format.KERAS),
        ("m.h5", Format.H5),
        ("m.weights.h5", Format.WEIGHTS),
        ("m.json", Format.JSON),
        ("m.ckpt", Format.CHECKPOINT),
        ("m", Format.SAVED_MODEL),
    ],
)
def test_the_contents_tell_the_format(tmp_path, name, expected):
    smp.save_model(functional(), tmp_path / name)
    assert format_of(tmp_path / name, "load") is expected


def test_every_ending_of_a_name_belongs_to_one_format():
    endings = [ending for each in Format for ending in each.value.endings]
    assert len(endings) == len(set(endings))
    assert [format_for(f"m{ending}").title for ending in endings if ending] == [
        each.value.title for each in Format for ending in each.value.endings if ending
    ]
    assert format_for("served/1") is Format.SAVED_MODEL.value
    assert format_for("m.pth") is None


def test_names_tell_the_format_on_other_machines():
    assert format_of("gs://bucket/m.keras", "load") is Format.KERAS
    with pytest.raises(SavingError, match="is on another machine"):
        format_of("gs://bucket/model.h5", "load")


def test_a_checkpoint_may_be_named_by_its_index_or_its_directory(tmp_path):
    smp.save_model(functional(), tmp_path / "m.ckpt")
    assert format_of(tmp_path / "m.ckpt.index", "load") is Format.CHECKPOINT
    assert checkpoint_prefix(tmp_path / "m.ckpt.index", "load") == str(tmp_path / "m.ckpt")
    with pytest.raises(SavingError, match="names no checkpoint that is there"):
        checkpoint_prefix(tmp_path, "load")


def test_keras_gets_names_with_the_ending_it_wants(tmp_path):
    (tmp_path / "a").write_text("it")
    with named(tmp_path / "a", ".keras") as name:
        assert name.endswith(".keras")
        assert pathlib.Path(name).read_text() == "it"
    assert not pathlib.Path(name).exists()
    for other in ("a.hdf5", "a.h5"):
        with named(other, ".h5") as name:
            assert name == other
    with named(tmp_path / "a.weights.h5", ".h5") as name:
        assert not name.endswith(".weights.h5")
