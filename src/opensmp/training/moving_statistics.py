"""Averages the moving statistics of batch normalization over the replicas."""

from __future__ import annotations

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Model
from opensmp.compiler.trace.variables import tf_variable
from opensmp.distributed import world
from opensmp.execution.multi_process.gradient_reduction import reduce_tensors


def average_statistics(model: Model) -> None:
    """Sets the moving statistics of all replicas to their mean, at the end of a training step.

    Each replica normalizes its own rows of the batch. The mean of the moving means is that of the
    whole batch; the mean of the moving variances is the mean of the variances within the replicas.
    """
    replicas = world.current("fitting a DistributedModel").dp_group
    if len(replicas) == 1:
        return
    variables = [
        tf_variable(variable)
        for layer in _private.all_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built and layer.trainable
        for variable in (layer.moving_mean, layer.moving_variance)
        if not _private.is_elsewhere(variable)
    ]
    means = reduce_tensors([tf.identity(variable) for variable in variables], "mean", replicas)
    for variable, mean in zip(variables, means, strict=True):
        variable.assign(mean)
