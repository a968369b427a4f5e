"""The page of the vendor's API: complete, and true of the package and of the tests it names."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import keras
import pytest

import opensmp as smp
from opensmp.compat import horovod, keras2
from opensmp.config import sources
from opensmp.config.foreign_keys import FOREIGN_KEYS
from opensmp.config.keys import KEYS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "smp-api.md").read_text(encoding="utf-8")

# What the vendor's documentation names, of which the specification of this project is made.
MODULES = "smdistributed.modelparallel.tensorflow smp horovod.tensorflow"
CONFIGURATION = """
partitions pipeline_parallel_degree microbatches pipeline optimize placement_strategy auto_partition
default_partition contiguous horovod active_microbatches
"""
FUNCTIONS = """
init rank size local_rank local_size mp_rank mp_size dp_rank dp_size pp_rank pp_size tp_rank tp_size
rdp_rank rdp_size get_mp_group get_dp_group CommGroup WORLD MP_GROUP DP_GROUP PP_GROUP TP_GROUP
RDP_GROUP RankType broadcast recv_from send allgather barrier mp_barrier dp_barrier step StepOutput
StepOutput.outputs StepOutput.reduce_mean StepOutput.reduce_sum StepOutput.concat StepOutput.stack
StepOutput.merge StepOutput.accumulate DistributedModel DistributedModel.call DistributedModel.fit
DistributedModel.save_model partition register_post_partition_hook CheckpointManager
CheckpointManager.save CheckpointManager.restore
"""
RANK_TYPES = "WORLD_RANK MP_RANK DP_RANK PP_RANK TP_RANK RDP_RANK"
OTHER = "SM_HP_MP_PARAMETERS non_split_inputs input_split_axes smp_slice input_signature"
OF_A_TF_FUNCTION = """
get_concrete_function pretty_printed_concrete_signatures function_spec function_type
experimental_get_tracing_count experimental_get_compiler_ir get_initialization_function
python_function name
"""
KERAS_2 = """
Optimizer.get_gradients Optimizer.compute_gradients Optimizer.variables Optimizer.lr
Optimizer.get_weights Optimizer.set_weights Metric.reset_states Model.reset_states
"""
HOROVOD = """
hvd.init hvd.rank hvd.size hvd.local_rank hvd.local_size hvd.allreduce hvd.broadcast_variables
hvd.Average hvd.Sum
"""
ALL = " ".join(
    (MODULES, CONFIGURATION, FUNCTIONS, OTHER, OF_A_TF_FUNCTION, KERAS_2, HOROVOD)
).split()


def rows() -> list[tuple[list[str], str, str]]:
    """Symbols, explanation and test of each row of the page."""
    found = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            found.append((re.findall(r"`([^`]+)`", cells[0]), cells[1], cells[2]))
    return found


ROWS = rows()
SYMBOLS = [symbol for symbols, _, _ in ROWS for symbol in symbols]


def test_every_documented_symbol_is_on_the_page():
    assert sorted(set(ALL) - set(SYMBOLS)) == []
    assert all(f"`{name}`" in PAGE for name in RANK_TYPES.split())


@pytest.mark.parametrize("test", sorted({test for _, _, test in ROWS}))
def test_every_test_on_the_page_exists(test):
    path, _, name = test.strip("`").partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert name.startswith("test_")
    assert name in functions


def value_of(symbol: str) -> object:
    """The object of a symbol that is no argument, key or variable."""
    owners = {"Optimizer": keras.Optimizer, "Metric": keras.Metric, "Model": keras.Model}
    first, _, rest = symbol.partition(".")
    if symbol in MODULES.split():
        return horovod if first == "horovod" else importlib.import_module(symbol)
    if first == "hvd":
        return getattr(horovod, rest)
    owner = owners[first] if first in owners else getattr(smp, first)
    return getattr(owner, rest) if rest else owner


def test_every_symbol_on_the_page_exists():
    keras2.install()
    keys = {*KEYS, *sources.ALIASES, *FOREIGN_KEYS}
    step = smp.step(lambda x: x)
    others = {*OTHER.split(), "...", "tf.function", *(name for name in keys)}
    for symbol in SYMBOLS:
        if symbol in OF_A_TF_FUNCTION.split():
            assert hasattr(type(step), symbol) or hasattr(step, symbol), symbol
        elif symbol not in others:
            assert value_of(symbol) is not None, symbol
    assert set(CONFIGURATION.split()) <= keys
    for name in RANK_TYPES.split():
        assert hasattr(smp.RankType, name)
