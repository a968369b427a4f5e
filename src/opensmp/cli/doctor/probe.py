"""What a child process finds in TensorFlow: its build, devices, and the faults of its kernels.

`opensmp doctor` executes this file as a script, so that a crash of TensorFlow is a finding too. It
prints one line of JSON for each thing it has found, and must not import opensmp.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def _tell(kind: str, **values: Any) -> None:
    print(json.dumps({"kind": kind, **values}), flush=True)


def _build() -> None:
    import keras
    import tensorflow as tf

    info = dict(tf.sysconfig.get_build_info())
    _tell(
        "build",
        tensorflow=tf.__version__,
        keras=keras.__version__,
        backend=keras.backend.backend(),
        cuda=info.get("cuda_version") if info.get("is_cuda_build") else None,
        cudnn=info.get("cudnn_version") if info.get("is_cuda_build") else None,
    )


def _devices() -> None:
    import tensorflow as tf

    found = []
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        found.append({"name": gpu.name, "model": str(details.get("device_name", ""))})
    _tell("devices", gpus=found, cpus=len(tf.config.list_physical_devices("CPU")))


def _memory() -> None:
    """Memory of each GPU, which TensorFlow knows once it uses it."""
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    for index, _ in enumerate(tf.config.list_physical_devices("GPU")):
        with tf.device(f"GPU:{index}"):
            total = tf.reduce_sum(tf.ones([64, 64]) @ tf.ones([64, 64]))
        _tell("gpu", index=index, works=float(total) == 64.0**3)


def _convolution() -> None:
    """The gradient in which oneDNN has crashed: 1x1, stride 2, an even size, few channels."""
    import tensorflow as tf

    with tf.device("CPU:0"):
        for channels in (1, 2, 3, 4, 8):
            images = tf.ones([2, 8, 8, channels])
            filters = tf.ones([1, 1, channels, 4])
            with tf.GradientTape() as tape:
                tape.watch([images, filters])
                result = tf.nn.conv2d(images, filters, 2, "SAME")
                loss = tf.reduce_sum(result)
            tape.gradient(loss, [images, filters])
    _tell("convolution", works=True)


def main() -> None:
    """Looks at one thing after the other, the most dangerous last."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for look in (_build, _devices, _memory, _convolution):
        _tell("look", at=look.__name__.strip("_"))
        try:
            look()
        except Exception as error:
            _tell("failed", error=f"{type(error).__name__}: {error}"[:500])
            if look is _build:
                sys.exit(3)


if __name__ == "__main__":
    main()
