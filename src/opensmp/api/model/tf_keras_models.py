"""What is said of models of Keras 2 (tf_keras)."""

from __future__ import annotations

from typing import Any


def about_no_model(received: Any) -> str:
    """The message for what `from_keras` received and is no model of Keras 3.

    A model of Keras 2 could be traced, but has nothing to hold on to: its variables take memory
    where they are made and cannot move, its layers leave no marks in the graph, and neither
    Keras' trainer nor its optimizers know its weights.
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
