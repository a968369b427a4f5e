"""Canaries of methods that are replaced for a while."""

from __future__ import annotations

import pytest

from opensmp import _private


def test_replaced():
    class Owner:
        def name(self) -> str:
            return "own"

    def use():
        with _private.replaced(Owner, "name", lambda original: lambda self: original(self) + "!"):
            assert Owner().name() == "own!"
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert Owner().name() == "own"
