"""All models of `keras.applications`, with random weights and few classes."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
from zoo.entry import Entry, cross_entropy

NUM_CLASSES = 10
# Side of the images. 32 is possible for most, but leaves one pixel to the last layers, and
# the variance that batch normalisation takes over one microbatch would be next to nothing.
SIDE = 64
# What the architecture needs at least.
_SIDES = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}

# By the time of a comparison, the quickest first; a name that is nowhere is medium, and last.
_SMALL = ("MobileNet", "MobileNetV3Small", "MobileNetV2", "MobileNetV3Large")
_MEDIUM = ("ResNet50", "ResNet50V2", "Xception", "InceptionV3", "EfficientNetB0")
_MEDIUM += ("EfficientNetV2B0", "EfficientNetB1", "EfficientNetV2B1", "DenseNet121")
_MEDIUM += ("ConvNeXtTiny", "ResNet101V2", "ResNet101", "EfficientNetV2B2", "EfficientNetB2")
_MEDIUM += ("ConvNeXtSmall", "EfficientNetV2B3", "EfficientNetB3", "DenseNet169", "NASNetMobile")
_MEDIUM += ("ResNet152V2", "ResNet152", "DenseNet201", "InceptionResNetV2", "EfficientNetB4")
_MEDIUM += ("EfficientNetV2S",)
_LARGE = ("ConvNeXtBase", "VGG16", "VGG19", "EfficientNetB5", "EfficientNetV2M", "ConvNeXtLarge")
_LARGE += ("EfficientNetB6", "NASNetLarge", "EfficientNetV2L", "EfficientNetB7", "ConvNeXtXLarge")
_QUICKEST_FIRST = (*_SMALL, *_MEDIUM, *_LARGE)


def names() -> list[str]:
    """Names of the functions that make a model, in alphabetical order."""
    public = vars(keras.applications).items()
    return sorted(name for name, value in public if inspect.isfunction(value))


def entry(name: str) -> Entry:
    """The entry of one `keras.applications` function."""
    side = _SIDES.get(name, SIDE)
    large = name in _LARGE

    def build() -> keras.Model:
        make = getattr(keras.applications, name)
        return make(weights=None, input_shape=(side, side, 3), classes=NUM_CLASSES)

    def batch(random: np.random.Generator, size: int) -> tuple[Any, Any]:
        images = random.normal(size=(size, side, side, 3)).astype(keras.config.floatx())
        return images, random.integers(NUM_CLASSES, size=size).astype("int32")

    return Entry(
        name=name,
        family="keras.applications",
        build=build,
        batch=batch,
        loss=cross_entropy,
        size="small" if name in _SMALL else "large" if large else "medium",
        per_microbatch=1 if large else 2,
    )


APPLICATIONS = {name: entry(name) for name in names()}


def order(name: str) -> int:
    """The place of a model when the quickest come first; less than all of these for others."""
    if name not in APPLICATIONS:
        return -1
    return _QUICKEST_FIRST.index(name) if name in _QUICKEST_FIRST else len(_QUICKEST_FIRST)
