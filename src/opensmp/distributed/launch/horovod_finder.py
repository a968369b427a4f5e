"""Makes `import horovod.tensorflow` work where Horovod is not installed.

The finder comes last in Python's search for modules, so that an installed Horovod is found
before. `opensmp run` starts every script by running this file:

    python .../opensmp/distributed/launch/horovod_finder.py script.py arguments

It imports nothing but the standard library, since a script may set variables that TensorFlow
reads when it is imported.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file: its modules would hide others of their names

import builtins
import importlib
import importlib.machinery
import io
import os
import runpy
import zipfile
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any

_PACKAGE, _MODULE = "horovod", "horovod.tensorflow"
_STAND_IN = "opensmp.compat.horovod"


class HorovodFinder:
    """Finds `horovod` and `horovod.tensorflow` when nothing else does.

    What else there may be of Horovod it refuses, with what to write instead.
    """

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """What Python's import asks every finder."""
        if name != _PACKAGE and not name.startswith(f"{_PACKAGE}."):
            return None
        if name != _PACKAGE and not _stands_in(sys.modules.get(_PACKAGE)):
            return None  # a Horovod without TensorFlow: it tells so itself
        if name not in (_PACKAGE, _MODULE):
            # With its own name `from horovod.tensorflow import nothing` would not show the text.
            raise ModuleNotFoundError(_absent(name), name=_PACKAGE)
        loader: Any = cls
        return importlib.machinery.ModuleSpec(name, loader, is_package=True)

    @classmethod
    def create_module(cls, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Leaves the making of the module to Python."""
        return None

    @classmethod
    def exec_module(cls, module: ModuleType) -> None:
        """Fills the module."""
        if module.__name__ == _PACKAGE:
            module.__doc__ = "Stands in for Horovod, which is not installed."
            vars(module)["__getattr__"] = _no_name
            return
        face = importlib.import_module(_STAND_IN)
        module.__doc__ = face.__doc__
        vars(module).update({name: getattr(face, name) for name in face.__all__})
        vars(module).update(__all__=list(face.__all__), __getattr__=face.__getattr__)


def install() -> None:
    """Adds the finder, last of all; nothing happens if it is there."""
    names = {getattr(finder, "__qualname__", "") for finder in sys.meta_path}
    if HorovodFinder.__qualname__ not in names:  # another copy of this file may have done it
        sys.meta_path.append(HorovodFinder)


def _stands_in(package: ModuleType | None) -> bool:
    spec = getattr(package, "__spec__", None)
    return getattr(spec and spec.loader, "__qualname__", "") == HorovodFinder.__qualname__


def _no_name(name: str) -> Any:
    raise AttributeError(_absent(f"{_PACKAGE}.{name}"))


def _absent(name: str) -> str:
    if name.startswith(f"{_MODULE}."):
        return str(importlib.import_module(_STAND_IN).absent(name))
    return (
        f"{name} does not exist here: Horovod is not installed, and opensmp stands in for "
        "horovod.tensorflow only. Write `import horovod.tensorflow as hvd`."
    )


def _run(arguments: list[str]) -> None:
    """Runs a script, or with -m a module, as Python itself would."""
    safe = getattr(sys.flags, "safe_path", False)
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        sys.path[:0] = [] if safe else [os.getcwd()]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv[:] = arguments
    script = os.path.abspath(arguments[0])
    if os.path.isdir(script) or zipfile.is_zipfile(script):
        runpy.run_path(script, run_name="__main__")
        return
    sys.path[:0] = [] if safe else [os.path.dirname(os.path.realpath(script))]
    with io.open_code(script) as file:
        code = compile(file.read(), script, "exec", dont_inherit=True)
    main = ModuleType("__main__")
    main.__file__ = script
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", script)
    vars(main)["__builtins__"] = builtins
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _note_exit(status: Any) -> None:
    """Tells the library how the program has ended; nobody else sees which exit was the last."""
    endings = sys.modules.get("opensmp.distributed.watchdog.exit_hooks")
    if endings is not None:
        endings.note_exit(status)


def _show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Shows an exception as Python does that runs the script itself: without this file."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


def _hint_at_init() -> None:
    """Says that the processes knew nothing of each other, where they never met."""
    rank, size = (os.environ.get(f"OPENSMP_RUN_{name}") for name in ("RANK", "SIZE"))
    cluster = sys.modules.get("opensmp.distributed.launch.cluster")
    have_met = cluster is not None and cluster.joined() is not None
    if rank == "0" and size not in (None, "1") and not have_met:
        print(
            f"opensmp run: the program never called smp.init, so that its {size} processes knew "
            "nothing of each other and each did the whole work. To train one model together, call "
            "smp.init at its top and split the model or the data.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    install()
    sys.excepthook = _show_error
    try:
        _run(sys.argv[1:])
    except SystemExit as ended:
        _note_exit(ended.code)
        raise
    _note_exit(None)
    _hint_at_init()
