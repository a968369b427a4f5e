from __future__ import annotations

import gc
import weakref

import pytest

from opensmp.base.garbage import collected_once


class Circle:
    def __init__(self):
        self.own = self


def test_cycles_are_collected_once_at_the_end():
    with collected_once():
        assert not gc.isenabled()
        reference = weakref.ref(Circle())
        assert reference() is not None
    assert gc.isenabled()
    assert reference() is None


def test_it_is_on_again_after_an_error():
    with pytest.raises(KeyError), collected_once():
        raise KeyError
    assert gc.isenabled()


def test_a_program_that_has_switched_it_off_keeps_it_off():
    gc.disable()
    try:
        with collected_once():
            reference = weakref.ref(Circle())
        assert not gc.isenabled()
        assert reference() is not None
    finally:
        gc.enable()
