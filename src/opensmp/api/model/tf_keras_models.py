"""Error message for models of Keras 2 (tf_keras)."""

from __future__ import annotations

from typing import Any


def about_no_model(received: Any) -> str:
    """Error message for an argument of `from_keras` that is not a Keras 3 model.

    Keras 2 models could be traced, but not partitioned: their variables are allocated where they
    are created and cannot move, their layers leave no scopes in the graph, and neither the trainer
    nor the optimizers of Keras 3 know their weights.
    """
    kind = f"{type(received).__module__}.{type(received).__name__}"
    start = f"smp.DistributedModel.from_keras: expected a keras.Model, received {kind}"
    if not any(base.__module__.partition(".")[0] == "tf_keras" for base in type(received).__mro__):
        return f"{start}. Wrap a layer in a model."
    return (
        f"{start}, which is of Keras 2 (tf_keras): its variables cannot be put on the devices of "
        "partitions. Take it to Keras 3 with its weights:\n\n"
        '    model.save("old.h5")\n'
        '    model = keras.models.load_model("old.h5", compile=False)  # keras, not tf_keras\n'
        "    model = smp.DistributedModel.from_keras(model)\n\n"
        "Layers of your own need custom_objects={name: class}, written for Keras 3."
    )
