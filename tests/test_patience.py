from __future__ import annotations

import os

import pytest
from patience import patient


@pytest.mark.parametrize(("load", "cores", "expected"), [(70.0, 2, 350.0), (35.0, 1, 350.0)])
def test_a_limit_grows_with_the_load_of_a_core(monkeypatch, load, cores, expected):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert patient(10.0) >= expected


def test_on_a_free_machine_a_limit_is_what_it_says(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.3, 70.0, 70.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 10**6)
    assert patient(10.0) == 10.0
