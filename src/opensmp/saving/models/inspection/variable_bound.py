"""A bound on the variables that a file's configuration asks for."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

from opensmp import _private
from opensmp.errors import SavingError
from opensmp.saving.models.inspection.inspection import Sizes

# Variables that no file has, such as the matrix of a metric, are smaller than this.
_FLOOR = 4 << 20
# Slots of an optimizer that has not run yet are not in the file, and up to three for a weight.
_LARGEST, _TOTAL = 4, 16


@contextlib.contextmanager
def variables_bounded(
    sizes: Sizes | None, path: str | os.PathLike[str], what: str
) -> Iterator[None]:
    """Context in which a model takes no more memory than the file that it comes from has values.

    A configuration is text: `{"units": 99999999999}` is a short one. All that is made of it gets
    values from the same file, so that what does not fit the file need not be made.

    Args:
        sizes: What the file stores; None for no bound.
        path: The file, for messages.
        what: What is done, for messages.

    Raises:
        SavingError: The configuration asks for more.
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
        if refusals and error is not refusals[0]:  # Keras makes another error of it
            raise refusals[0] from error
        raise
