"""The import path of existing scripts: everything of `opensmp`, and the habits of Keras 2.

Importing this module makes `optimizer.get_gradients`, `metric.reset_states` and their like
work on Keras 3 objects, see `opensmp.compat.keras2`, and `import horovod.tensorflow` where
Horovod is not installed, see `opensmp.compat.horovod`.

Example:
    ```python
    import smdistributed.modelparallel.tensorflow as smp

    smp.init()
    ```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import opensmp as _opensmp
from opensmp.compat import keras2 as _keras2
from opensmp.distributed.launch import horovod_finder as _finder

if TYPE_CHECKING:
    from opensmp import *  # noqa: F403  # what a type checker sees

_finder.install()
_keras2.install()


if not TYPE_CHECKING:  # a module __getattr__ would make type checkers accept any name

    def __getattr__(name: str) -> Any:
        # Asked for at every access: names that are added to opensmp later are here as well. This
        # holds for __all__ too, so that `from smp import *` gives what opensmp gives.
        # __path__ is left out, or submodules would be imported a second time under this name.
        if name != "__path__" and hasattr(_opensmp, name):
            return getattr(_opensmp, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return dir(_opensmp)
