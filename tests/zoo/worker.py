"""Compares one zoo model in a process of its own; prints one JSON object per comparison.

    python tests/zoo/worker.py ResNet50 --partitions 2 4 --dtype float64

A process of its own gives the memory back, can be stopped when it takes too long, and may
crash without taking the others along.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / "src"), str(_ROOT / "tests")]

for _name in [name for name in os.environ if name.startswith(("OPENSMP_", "SM_HP_MP_"))]:
    del os.environ[_name]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# tensorflow-cpu 2.21 can crash (SIGSEGV) in oneDNN's gradient of a 1x1 convolution with stride
# 2, an even input and few channels, on CPUs with AVX-512. Several of these models have one.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from zoo.models import ZOO  # noqa: E402
from zoo.parity import compare  # noqa: E402


def main() -> int:
    """Runs the comparisons; returns 1 if one of them could not be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=sorted(ZOO), metavar="MODEL")
    parser.add_argument("--partitions", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument(
        "--disable",
        nargs="+",
        default=[],
        metavar="OPTIMIZER",
        help="graph optimizers of TensorFlow to leave out, such as remapping, or all",
    )
    arguments = parser.parse_args()
    _disable(arguments.disable)
    _make_devices(max(arguments.partitions))
    keras.config.set_floatx(arguments.dtype)
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        try:
            for comparison in compare(ZOO[arguments.model], arguments.partitions, Path(folder)):
                row = dataclasses.asdict(comparison)
                row["peak_mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                print(json.dumps(row), flush=True)
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def _disable(optimizers: Sequence[str]) -> None:
    """Leaves out graph optimizers, to find out whether one of them causes a difference."""
    options = {name: False for name in optimizers if name != "all"}
    if "all" in optimizers:
        options["disable_meta_optimizer"] = True
    tf.config.optimizer.set_experimental_options(options)


def _make_devices(number: int) -> None:
    """Devices for the largest number of partitions; the plain model runs on the first.

    One thread per operation, for both: the same sums in the same order, however many cores
    the machine has.
    """
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration() for _ in range(number)],
    )
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(number)


if __name__ == "__main__":
    sys.exit(main())
