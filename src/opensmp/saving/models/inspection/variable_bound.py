"""Bounds the size of variables created from an untrusted configuration."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

from opensmp import _private
from opensmp.errors import SavingError
from opensmp.saving.models.inspection.inspection import Sizes

# Variables that are not in the file, such as a metric's confusion matrix, are smaller.
_FLOOR = 4 << 20
# Slots of an optimizer without updates are not in the file; there are up to three per weight.
_LARGEST, _TOTAL = 4, 16


@contextlib.contextmanager
def variables_bounded(
    sizes: Sizes | None, path: str | os.PathLike[str], what: str
) -> Iterator[None]:
    """Context that limits the memory of a model's variables according to the values in its file.

    A short configuration can ask for any size: `{"units": 99999999999}`. All variables get their
    values from the same file, so larger ones than it stores are never needed.
    """
    if sizes is None:
        yield
        return
    largest = max(_FLOOR, _LARGEST * sizes.largest)
    total = 4 * _FLOOR + _TOTAL * sizes.total
    made = 0
    refusals: list[SavingError] = []

    def note(shape: tuple[int, ...]) -> None:
        nonlocal made
        elements = math.prod(shape)
        made += elements
        if elements > largest or made > total:
            refusals.append(
                SavingError(
                    f"{what}: {os.fspath(path)} is not read: its configuration asks for a variable "
                    f"of the shape {shape}, {elements:,} elements, and its weights are "
                    f"{sizes.total:,} elements in all, the largest of {sizes.largest:,}. The file "
                    "is damaged, or its configuration is that of another model."
                )
            )
            raise refusals[-1]

    try:
        with _private.before_variables(note):
            yield
    except Exception as error:
        if refusals and error is not refusals[0]:  # Keras replaces exceptions with its own
            raise refusals[0] from error
        raise
