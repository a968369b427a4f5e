from __future__ import annotations

import zipfile

import pytest

from opensmp.errors import SavingError
from opensmp.saving.models.inspection.archives import (
    WEIGHTS,
    check_archive,
    opened_member,
    read_member,
)


def archive(folder, parts, kind=zipfile.ZIP_STORED):
    path = folder / "a.keras"
    with zipfile.ZipFile(path, "w", kind) as made:
        for name, data in parts.items():
            made.writestr(name, data)
    return path


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_parts_are_read_here_and_there(tmp_path, kind):
    data = bytes(range(256)) * 100
    path = archive(tmp_path, {"first": b"1", WEIGHTS: data}, kind)
    assert check_archive(path, "load") == {"first", WEIGHTS}
    assert read_member(path, "first", "load") == b"1"
    with opened_member(path, WEIGHTS) as member:
        member.seek(-10, 2)
        assert member.read() == data[-10:]
        member.seek(700)
        assert member.read(5) == data[700:705]


def test_packing_that_can_gain_more_than_a_thousandfold_is_not_read(tmp_path):
    path = archive(tmp_path, {"zeros": bytes(1 << 20)}, zipfile.ZIP_BZIP2)
    with pytest.raises(SavingError, match=r"'zeros' is packed in a way that is not read"):
        check_archive(path, "load")


def test_parts_that_lie_over_each_other_are_counted_each(tmp_path):
    path = archive(tmp_path, {f"{i}": bytes(50 << 20) for i in range(3)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(SavingError, match=r"unpacked it would be 157,286,400 bytes"):
        check_archive(path, "load")


def test_a_part_that_is_missing_has_its_name_in_the_message(tmp_path):
    path = archive(tmp_path, {"a": b""})
    with pytest.raises(SavingError, match=r"config.json is missing in it"):
        read_member(path, "config.json", "load")
