"""The digits by `fit`: an ordinary Keras script with two lines more.

    python examples/fit_digits.py --epochs 4

In two processes, of which each holds one half of the model, and in two that hold all of it:

    opensmp run -n 2 examples/fit_digits.py
    opensmp run -n 2 examples/fit_digits.py --partitions 1

The history is that of plain Keras in all cases. `--checkpoint model.keras` writes the best model,
which plain Keras loads. The program fails if fewer than 90 % of 1,000 images that the model was
not trained on are recognised.
"""

from __future__ import annotations

import argparse
import sys

import keras

import opensmp as smp
from digits_data import load_digits

LEAST_ACCURACY = 0.90


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--partitions", type=int, default=2)
    parser.add_argument("--checkpoint", metavar="FILE.keras", help="write the best model")
    arguments = parser.parse_args()

    smp.init({"partitions": arguments.partitions, "microbatches": 4})  # the first line more

    digits = load_digits()
    keras.utils.set_random_seed(1234)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model = smp.DistributedModel.from_keras(model)  # the second one

    model.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callbacks = [keras.callbacks.ReduceLROnPlateau("val_loss", patience=1)]
    if arguments.checkpoint:
        best = keras.callbacks.ModelCheckpoint(arguments.checkpoint, save_best_only=True)
        callbacks.append(best)
    model.fit(
        digits.train_images,
        digits.train_labels,
        batch_size=80,
        epochs=arguments.epochs,
        validation_split=0.1,
        callbacks=callbacks,
        verbose=2,
    )
    _, accuracy = model.evaluate(digits.test_images, digits.test_labels, batch_size=200, verbose=0)
    if smp.rank() == 0:
        print(f"test accuracy {accuracy:.4f} on {len(digits.test_labels)} images")
    if accuracy <= LEAST_ACCURACY:
        print(f"expected a test accuracy above {LEAST_ACCURACY}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
