"""Second name of `opensmp`, for scripts that say `import smp`.

Example:
    ```python
    import smp

    smp.init({"partitions": 2})
    ```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import opensmp as _opensmp

if TYPE_CHECKING:
    from opensmp import *  # noqa: F403  # what a type checker sees


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
