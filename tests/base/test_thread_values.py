from __future__ import annotations

import threading

import pytest

from opensmp.base.thread_values import ThreadValue


def test_a_context_replaces_the_value_until_it_ends():
    value = ThreadValue("outside")
    with value.set_to("one"):
        with value.set_to("two"):
            assert value.get() == "two"
        assert value.get() == "one"
    assert value.get() == "outside"


def test_an_error_restores_the_value():
    value = ThreadValue(0)
    with pytest.raises(ZeroDivisionError), value.set_to(1):
        raise ZeroDivisionError
    assert value.get() == 0


def test_other_threads_have_the_default():
    value, found = ThreadValue(0), []
    with value.set_to(1):
        thread = threading.Thread(target=lambda: found.append(value.get()))
        thread.start()
        thread.join()
    assert found == [0]
