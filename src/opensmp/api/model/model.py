"""`smp.DistributedModel`: a Keras model whose operations are distributed over partitions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.api.model.refusals import refuse_gradients_of_activations, refuse_tape
from opensmp.api.model.summary import partitions_text
from opensmp.api.model.tf_keras_models import about_no_model
from opensmp.base.types import Tensor
from opensmp.compiler.plan.plan import Plan
from opensmp.distributed import world
from opensmp.errors import PlanError, StepError
from opensmp.execution.autodiff.forward_mode import first_watched, refuse_forward_mode
from opensmp.execution.context import Runner, current_runner
from opensmp.execution.emission.pipeline import Pipeline
from opensmp.execution.models import registry
from opensmp.execution.models.attributes import attributes
from opensmp.execution.models.divided_batch import Division, prepare_divided
from opensmp.execution.models.hooks import run_post_partition_hooks
from opensmp.execution.models.layer_calls import is_inside_keras
from opensmp.execution.models.nested_models import PartPlans, plans_by_layer, plans_of_parts
from opensmp.execution.models.plain_model import calls_are_plain, note_inputs
from opensmp.execution.multi_process.remote_values import note_step
from opensmp.execution.partitioning import Partitioning
from opensmp.saving.models import save as export
from opensmp.saving.models.inspection.inspection import check_weights
from opensmp.saving.models.to_keras import to_keras
from opensmp.training.batch.batch_call import BatchCallResult, call_with_batch
from opensmp.training.call_mode import calls_are, current_mode
from opensmp.training.callbacks.rank_zero import everywhere
from opensmp.training.trainer import Trainer

_STATE = "_smp_partitioning"
_FUNCTIONS = "_smp_functions"
_MOST_FUNCTIONS = 4
"""Inference functions kept for states of the attributes, such as two adapters used in turn."""


class _NoPlanYet(PlanError, AttributeError):
    """Raised by `model.plan` before the first call.

    It is an `AttributeError` because Keras reads an attribute before it sets one.
    """


class _PlanOf:
    """Descriptor of `model.plan`; an attribute of that name in a user's model takes precedence."""

    def __get__(self, model: DistributedModel | None, owner: type) -> Any:
        if model is None:
            return self
        return model._smp_plan()


class DistributedModel(Trainer, keras.Model):
    """A Keras model that is distributed over the partitions of `smp.init`.

    Three ways to create one:

    - subclass it and write `call`, as with `keras.Model`;
    - give it Functional inputs and outputs: `smp.DistributedModel(inputs, outputs)`;
    - wrap any Keras model: `smp.DistributedModel.from_keras(model)`.

    Inside an `smp.step` function a call of the model is pipelined. Its outputs are
    ordinary tensors, and gradients are taken with `tf.GradientTape` or `tf.gradients` as
    usual. Outside of a step a call runs one forward pass, for inference. Otherwise it
    behaves like `keras.Model`.

    The model is traced, partitioned and placed at its first call: each variable goes to
    the device of the partition that uses it first. From then on `model.plan` shows where
    each layer runs and the cost model's estimates; see `opensmp.compiler.plan.plan.Plan`.

    Raises:
        NotInitializedError: if created or called before `smp.init`.

    Example:
        ```python
        class Net(smp.DistributedModel):
            def __init__(self):
                super().__init__()
                self.hidden = keras.layers.Dense(128, activation="relu")
                self.top = keras.layers.Dense(10)

            def call(self, x, training=None):
                with smp.partition(0):
                    x = self.hidden(x)
                with smp.partition(1):
                    return self.top(x)
        ```
    """

    plan = _PlanOf()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Returns a view of a new Functional model if given inputs and outputs."""
        if cls is DistributedModel and _is_functional(args, kwargs):
            return cls.from_keras(keras.Model(*args, **kwargs))
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if type(self) in _views.values() and "name" in self.__dict__:
            return  # already initialized by from_keras, called from __new__
        world.current("smp.DistributedModel")
        if _is_functional(args, kwargs):
            if not isinstance(self, _private.Functional):
                # Keras would add Functional to the bases of DistributedModel itself.
                self.__class__ = _view_class(type(self), _private.Functional)
            _private.Functional.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)
        registry.add(self)

    @classmethod
    def from_keras(cls, model: keras.Model) -> DistributedModel:
        """Creates a distributed view of an existing Keras model.

        The view subclasses the model's class and shares all of its state: layers, weights,
        compilation. The model itself remains usable as a plain Keras model.

        Args:
            model: Any `keras.Model`, built or not: Functional, Sequential or subclassed.

        Raises:
            StepError: if `model` is not a Keras 3 model.

        Example:
            ```python
            model = smp.DistributedModel.from_keras(keras.applications.ResNet50(weights=None))
            ```
        """
        world.current("smp.DistributedModel.from_keras")
        if isinstance(model, DistributedModel):
            return model
        if not isinstance(model, keras.Model):
            raise StepError(about_no_model(model))
        view: DistributedModel = object.__new__(_view_class(cls, type(model)))
        # Keras' __setattr__ would store a tracked copy of the dictionary.
        object.__setattr__(view, "__dict__", model.__dict__)
        registry.add(view)
        return view

    @tf.autograph.experimental.do_not_convert
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model: pipelined inside a step, as one forward pass outside of one."""
        if is_inside_keras(args, kwargs) or current_mode() == "plain":
            return super().__call__(*args, **kwargs)
        here = world.current(f"calling the DistributedModel '{self.name}'")
        runner = current_runner()
        if active := _private.accumulators():
            return self._smp_call_under(active, here, args, kwargs)
        note_step()
        if runner is not None and not tf.executing_eagerly():
            outputs, losses = self._smp_run(runner, here, args, kwargs)
        elif current_mode() == "whole" and not tf.executing_eagerly():
            result = self._smp_call_whole(here, args, kwargs)
            outputs, losses = result.outputs, result.losses
            refuse_gradients_of_activations(self.name, outputs, self._smp_partitions.tapped)
        else:
            refuse_tape(self.name)
            outputs, losses = self._smp_infer(*args, **kwargs)
        _private.keep_losses(self, self._smp_partitions.loss_layers[len(losses)], losses)
        return outputs

    @property
    def losses(self) -> list[Tensor]:
        """Losses of the last call: from `add_loss` and activity and weight regularizers."""
        found = list(super().losses)
        return found if is_inside_keras((), {}) else list(filter(_is_usable, found))

    # --- running -------------------------------------------------------------------

    @property
    def _smp_partitions(self) -> Partitioning:
        return self._smp_partitions_of(super().__call__, self)

    def _smp_partitions_of(self, plain_call: Callable[..., Any], layer: Any) -> Partitioning:
        """Creates, once, the `Partitioning` of this model, which traces `plain_call`."""
        if _STATE not in self.__dict__:

            def forward(*args: Any, **kwargs: Any) -> Any:
                outputs = plain_call(*args, **kwargs)
                added_by = _private.order_losses(layer)
                partitions.loss_layers[len(added_by)] = added_by
                return outputs

            is_part = getattr(type(layer), "_smp_is_part", False)
            holders = registry.holders_of(layer)
            is_leaf = is_part and len(_private.all_layers(layer)) == 1
            self.__dict__[_STATE] = Partitioning(self, forward, holders, is_part, is_leaf)
        partitions: Partitioning = self.__dict__[_STATE]
        return partitions

    def _smp_plan(self) -> Plan | PartPlans:
        plan = self._smp_partitions.plan
        if plan is None:
            if parts := plans_of_parts(self):
                return PartPlans(self.name, parts)
            raise _NoPlanYet(
                f"model.plan: model '{self.name}' has no plan yet. It is made when the model is "
                "called for the first time, in an smp.step function or outside of one: "
                "call it with one batch, or look at the plan without running anything by "
                "`opensmp plan module:factory`."
            )
        return plan

    def _smp_run(
        self,
        runner: Runner,
        here: world.World,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_replicas: int | None = None,
    ) -> tuple[Any, list[Tensor]]:
        plan = functools.partial(self._smp_partitions.prepare, here)
        division = Division(runner.num_microbatches, num_replicas or len(here.dp_group))
        prepare = functools.partial(prepare_divided, self, plan, division)
        note_inputs(self, args)
        return runner.run(self, prepare, args, kwargs)

    def _smp_call_whole(
        self, here: world.World, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BatchCallResult:
        return call_with_batch(self, here, args, kwargs)

    @everywhere
    def _smp_infer(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """Runs one forward pass as one microbatch; eager calls use a cached `tf.function`."""
        here = world.current(f"calling the DistributedModel '{self.name}'")
        if not tf.executing_eagerly():
            return self._smp_forward(here, args, kwargs)
        functions = self.__dict__.setdefault(_FUNCTIONS, [])  # those used last come first
        made_for = self._smp_made_for(here)
        function = next((each for known, each in functions if known == made_for), None)
        if function is None:

            def model_call(args: Any, kwargs: Any) -> Any:  # errors have this name
                return self._smp_forward(here, args, kwargs)

            function = tf.function(model_call, autograph=False, reduce_retracing=True)
        traces = function.experimental_get_tracing_count()
        outputs, losses = function(args, kwargs)
        if function.experimental_get_tracing_count() != traces:  # read again: attributes may differ
            made_for = self._smp_made_for(here)
        others = [each for each in functions if each[1] is not function and each[0][0] is here]
        self.__dict__[_FUNCTIONS] = [(made_for, function), *others[: _MOST_FUNCTIONS - 1]]
        return outputs, list(losses)

    def _smp_made_for(self, here: world.World) -> tuple[Any, ...]:
        """Cache key of the inference function, besides the arguments of the call."""
        return (here, *map(id, self.variables), attributes(self))  # layers may create variables

    def _smp_forward(
        self, here: world.World, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        pipeline = Pipeline(here, 1)
        with pipeline.tracing():
            outputs, losses = self._smp_run(pipeline, here, args, kwargs, num_replicas=1)
        result: tuple[Any, list[Tensor]] = pipeline.finish_nest((outputs, losses))
        with tf.init_scope():
            run_post_partition_hooks()
        return result

    def _smp_call_under(
        self, accumulators: list[Any], here: world.World, args: Any, kwargs: Any
    ) -> Any:
        """Runs under a `tf.autodiff.ForwardAccumulator`: plainly if possible, else refuses."""
        outside = current_runner() is None and current_mode() is None
        with _private.without_accumulators():
            taped = _private.tape_is_active()
        values = [(args, kwargs), self.variables, self._smp_partitions.read]
        plain_is_right = outside and here.size == 1 and not taped
        if plain_is_right and (not tf.executing_eagerly() or first_watched(accumulators, values)):
            with calls_are("plain"):  # lets TensorFlow see every operation
                return self(*args, **kwargs)
        refuse_forward_mode(accumulators, f"Model '{self.name}'", values)
        with _private.without_accumulators():
            outputs = self(*args, **kwargs)
        # The call has found the variables that the model reads without tracking them.
        read = self._smp_partitions.read
        refuse_forward_mode(accumulators, f"Model '{self.name}'", [read])
        return outputs

    # --- looking at it ---------------------------------------------------------------

    def summary(
        self,
        line_length: int | None = None,
        positions: Any = None,
        print_fn: Any = None,
        expand_nested: bool = False,
        show_trainable: bool = False,
        layer_range: Any = None,
    ) -> None:
        """Prints `keras.Model.summary`, followed by the partition and device of each layer."""
        super().summary(
            line_length=line_length,
            positions=positions,
            print_fn=print_fn,
            expand_nested=expand_nested,
            show_trainable=show_trainable,
            layer_range=layer_range,
        )
        here = world.current(f"the summary of model '{self.name}'")
        plan = self._smp_partitions.plan if self._smp_partitions.is_done(here) else None
        parts = plans_by_layer(self, here)
        text = partitions_text(self, plan, here, expand_nested, layer_range, parts)
        (print if print_fn is None else print_fn)(text)

    # --- on disk -------------------------------------------------------------------

    @everywhere
    def save_model(self, save_path: Any = "/opt/ml/model", *, path: Any = None) -> None:
        """Saves the whole, unpartitioned model as a TensorFlow SavedModel.

        Plain TensorFlow loads and serves it, without opensmp. With several processes the call
        is collective; rank 0 gathers the weights in host memory and writes.

        Args:
            save_path: A directory. Other files in it are kept.
            path: Alias of `save_path`.

        Raises:
            SavingError: if the model has not been called yet, or cannot be written.

        Example:
            ```python
            model.save_model("served/1")
            tf.saved_model.load("served/1").signatures["serving_default"](images)
            ```
        """
        export.write_saved_model(self, save_path if path is None else path)

    @everywhere
    def to_keras(self) -> keras.Model:
        """Returns a plain Keras model with the latest weights, independent of opensmp.

        With one process it shares layers, weights and optimizer with this model, like
        `from_keras` in the other direction. With several processes the call is collective, and
        each process gets its own complete copy in host memory.

        A view returns a model of its original class. A subclass with its own `call` becomes a
        Functional model, if its call consists of Keras layers and `keras.ops`.

        Raises:
            SavingError: if the call of a subclass cannot be expressed as a Functional model; the
                message says what to do instead.

        Example:
            ```python
            model.to_keras().save("model.keras")  # loads where opensmp is not installed
            ```
        """
        return to_keras(self)

    @everywhere
    def save(
        self, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any
    ) -> None:
        """Like `keras.Model.save`: atomically writes the whole model as a plain Keras model."""
        if calls_are_plain():
            super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)
        else:
            export.save(self, filepath, overwrite, zipped, **kwargs)

    @everywhere
    def save_weights(
        self,
        filepath: Any,
        overwrite: bool = True,
        max_shard_size: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        """Like `keras.Model.save_weights`: writes the weights of all partitions to one file."""
        if calls_are_plain():
            super().save_weights(filepath, overwrite, max_shard_size, **kwargs)
        else:
            export.save_weights(self, filepath, overwrite, max_shard_size, **kwargs)

    @everywhere
    def load_weights(self, filepath: Any, skip_mismatch: bool = False, **kwargs: Any) -> None:
        """Like `keras.Model.load_weights`: each process loads the weights of its partitions.

        Raises:
            SavingError: The file is damaged, or refers to values in other files.
        """
        check_weights(filepath, "model.load_weights")
        with _private.assignments_elsewhere_ignored():
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    @everywhere
    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Like `keras.Model.export`, applied to the plain model."""
        if calls_are_plain():
            super().export(filepath, format, verbose, input_signature, **kwargs)
        else:
            export.export(self, filepath, format, input_signature, **kwargs)


_private.track_all_variables(DistributedModel)

_views: dict[tuple[type, type], type] = {}


def _view_class(distributed: type, plain: type) -> type:
    """Class of distributed views of models of class `plain`; cached."""
    key = (distributed, plain)
    if key not in _views:
        named_after = plain if distributed is DistributedModel else distributed
        body: dict[str, Any] = {
            "__module__": named_after.__module__,
            "__qualname__": named_after.__qualname__,
        }
        own = distributed.__mro__[: distributed.__mro__.index(DistributedModel)]
        if not any("call" in vars(kind) for kind in own):  # else it overrides `plain`'s
            body["_smp_plain"] = plain
        _views[key] = type(named_after.__name__, (distributed, plain), body)
    return _views[key]


def _is_functional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these are constructor arguments of a Functional model."""
    given = len(args) + ("inputs" in kwargs) + ("outputs" in kwargs)
    return given >= 2 and (len(args) == 2 or "outputs" in kwargs)


def _is_usable(tensor: Tensor) -> bool:
    """Whether a tensor is eager, or belongs to the graph being built or an outer graph of it."""
    if isinstance(tensor, keras.KerasTensor):
        return bool(tf.executing_eagerly())
    if not hasattr(tensor, "graph"):  # graphs capture eager tensors as constants, as in plain Keras
        return True
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph is not tensor.graph:
        graph = getattr(graph, "outer_graph", None)
    return graph is not None and not tf.executing_eagerly()
