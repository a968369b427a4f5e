"""Makes `import horovod.tensorflow` work where Horovod is not installed.

The finder is the last in Python's module search, so that an installed Horovod takes precedence.
`opensmp run` starts every script by running this file:

    python .../opensmp/distributed/launch/horovod_finder.py script.py arguments

It imports only the standard library, since a script may set variables that TensorFlow reads when it
is imported.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file, whose modules would shadow others

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
    """Finds `horovod` and `horovod.tensorflow` if no other finder does.

    Rejects other submodules of Horovod with a message that says what to import instead.
    """

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Implements the finder protocol of Python's import system."""
        if name != _PACKAGE and not name.startswith(f"{_PACKAGE}."):
            return None
        if name != _PACKAGE and not _stands_in(sys.modules.get(_PACKAGE)):
            return None  # an installed Horovod without TensorFlow support reports that itself
        if name not in (_PACKAGE, _MODULE):
            # With `name=name`, `from horovod.tensorflow import nothing` would not show the message.
            raise ModuleNotFoundError(_absent(name), name=_PACKAGE)
        loader: Any = cls
        return importlib.machinery.ModuleSpec(name, loader, is_package=True)

    @classmethod
    def create_module(cls, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Leaves the creation of the module to Python."""
        return None

    @classmethod
    def exec_module(cls, module: ModuleType) -> None:
        """Fills the module with the names of the compatibility module."""
        if module.__name__ == _PACKAGE:
            module.__doc__ = "Stands in for Horovod, which is not installed."
            vars(module)["__getattr__"] = _no_name
            return
        face = importlib.import_module(_STAND_IN)
        module.__doc__ = face.__doc__
        vars(module).update({name: getattr(face, name) for name in face.__all__})
        vars(module).update(__all__=list(face.__all__), __getattr__=face.__getattr__)


def install() -> None:
    """Appends the finder to the module search, unless it is there."""
    names = {getattr(finder, "__qualname__", "") for finder in sys.meta_path}
    if HorovodFinder.__qualname__ not in names:  # this file may be loaded twice
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
    """Passes the exit status of the program to the library, which cannot see it otherwise."""
    endings = sys.modules.get("opensmp.distributed.watchdog.exit_hooks")
    if endings is not None:
        endings.note_exit(status)


def _show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an exception as if Python ran the script directly: without frames of this file."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


def _hint_at_init() -> None:
    """Prints a hint if several processes ran without ever calling smp.init."""
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
