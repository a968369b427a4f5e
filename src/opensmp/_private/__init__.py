"""Wraps every private API of TensorFlow and Keras that opensmp uses.

No other package imports private names. Each wrapper says why the public API is not enough, and a
canary test per private name fails clearly on a version that moved or removed it.
"""

from __future__ import annotations

from keras.src.models.functional import Functional

from opensmp._private.keras.averages import averages_of_own
from opensmp._private.keras.kept_slots import keep_slots_with
from opensmp._private.keras.layers import (
    BOOKKEEPING,
    all_layers,
    eager_builds,
    forget_compiled_functions,
    functional_nodes,
    get_logits,
    get_mask,
    in_stateless_scope,
    in_symbolic_scope,
    is_variable_creation_error,
    keep_losses,
    layer_calls,
    layer_calls_by,
    layers_inside,
    makes_variables,
    new_nodes,
    order_losses,
    own_losses,
    own_variables,
    regularization_losses,
    set_logits,
    set_mask,
)
from opensmp._private.keras.moved_variables import is_lent, place_of, take_in, with_slots
from opensmp._private.keras.optimizers import (
    agree_on_finite_with,
    before_updates,
    check_gradients_with,
    clip_with,
    leave_to_others,
    place_updates_with_variables,
    scales_loss,
)
from opensmp._private.keras.saving import (
    compilation_kept,
    in_safe_mode,
    inlined,
    operation_modules,
    silence_deprecations,
    weights_layout,
)
from opensmp._private.keras.shards import (
    Shards,
    is_left_to_another,
    is_shard,
    set_shard,
    set_updater,
    shard_with,
    updater_of,
)
from opensmp._private.keras.trainer import (
    arrays_shuffled_by,
    backup_path,
    build_loss,
    build_metrics,
    call_in_training,
    compiled_loss,
    compiled_metrics,
    compiled_with,
    epochs_begun_by,
    function_within,
    global_seed,
    global_seed_state,
    initial_epoch,
    kept_seeds,
    overrides,
    pass_over_epoch,
    rows_count,
    set_initial_epoch,
    track,
    track_loss,
    tracked_values,
)
from opensmp._private.keras.variable_creation import before_variables
from opensmp._private.keras.variables import (
    assignments_elsewhere_ignored,
    give_up,
    initialize_on,
    is_elsewhere,
    is_initialized,
    is_kept_here,
    lend,
    move_to,
    own_pending_variables,
    set_copy,
    shed_slots,
    storage,
    take_back,
    take_pending_variables,
    variable_access,
    variable_dtype,
)
from opensmp._private.patching import replaced
from opensmp._private.tensorflow.api_calls import refuse_in_api_calls
from opensmp._private.tensorflow.autodiff.custom_gradients import reads_in_custom_gradients
from opensmp._private.tensorflow.autodiff.forward_mode import (
    accumulators,
    follow_accumulators,
    is_accumulated,
    without_accumulators,
)
from opensmp._private.tensorflow.autodiff.gradient_sources import (
    check_sources,
    note_source,
    refuse_jacobian,
)
from opensmp._private.tensorflow.autodiff.tapes import (
    is_bridge,
    is_watched,
    lifted,
    record_call,
    recording,
    release_gradients,
    stop_recording,
    tape_is_active,
    watches_variable,
    with_gradient,
)
from opensmp._private.tensorflow.checkpoints import (
    OBJECT_GRAPH_KEY,
    CheckpointValue,
    HeldBackRestores,
    before_late_restores,
    checkpoint_nodes,
    checkpoint_root,
    checkpoint_values,
    iterator_state,
    keep_with_restore,
    restore_where_values_are,
    set_iterator_state,
    track_all_variables,
    values_at_hand,
)
from opensmp._private.tensorflow.cluster import (
    answers,
    fetch,
    interrupt_collectives,
    is_tensorflow_started,
    join_cluster,
    post,
    renew_collectives,
)
from opensmp._private.tensorflow.flop_registry import registered_flops
from opensmp._private.tensorflow.function_calls import (
    CallAttributes,
    call_functions_by,
)
from opensmp._private.tensorflow.function_graphs import (
    add_control_input,
    at_end_of_trace,
    automatic_control_dependencies,
    captured_from_outside,
    captures,
    copy_handle_data,
    follow_traces,
    forget_bodies,
    function_graphs,
    functions_of,
    graphs_around,
    has_custom_gradient,
    is_of_function,
    is_stateful,
    is_traced_by_function,
    keep_functions,
    leave_out,
    must_run,
    new_graph,
    note_body,
    read_nothing,
    replace_input,
    set_control_inputs,
    strip_attributes,
    tag_of,
    tagged,
)
from opensmp._private.tensorflow.host_calls import host_call
from opensmp._private.tensorflow.indexed_slices import NotedSlices
from opensmp._private.tensorflow.tracing import (
    UNORDERED,
    call_attributes,
    hand_out_results,
    trace_apart_while,
    unspecialized,
    variant_of,
    with_autograph,
)
from opensmp._private.tensorflow.variable_placement import (
    Home,
    follow_reads,
    home_of,
    home_of_handle,
    is_followed,
    not_followed,
    note_assigned,
    record_read,
    set_home,
)
