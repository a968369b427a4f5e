"""What the models of `pipeline_speed.py` keep in torch from the forward to the backward pass.

Run by `kept.py` with a Python that has torch; imports nothing of TensorFlow. Prints a line of JSON
for each workload: bytes by the type of the autograd node that made the tensors. Each storage counts
once, parameters do not. The loss is not part of it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

import peer_torch

INPUT = "(input)"
# Nodes whose result shares the memory of their first operand.
VIEWS = ("View", "Permute", "Transpose", "Reshape", "Unsafe", "Select", "Unbind", "TBackward")


def maker(tensor: torch.Tensor, reader: Any, inputs: int) -> str:
    """The type of the node that made a tensor; the reader's own for what has no gradient."""
    node: Any = tensor.grad_fn
    if node is None and tensor.untyped_storage().data_ptr() != inputs:
        node = reader
    while node is not None and node.name().startswith(VIEWS):
        node = node.next_functions[0][0]
    return INPUT if node is None else node.name().removesuffix("Backward0")


def makers(output: torch.Tensor, inputs: torch.Tensor) -> dict[int, str]:
    """The storages that the nodes behind a tensor have saved, and what made them."""
    found: dict[int, str] = {}
    given = inputs.untyped_storage().data_ptr()
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [before for before, _ in node.next_functions]
        for name in dir(node):
            saved = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(saved, torch.Tensor):
                found[saved.untyped_storage().data_ptr()] = maker(saved, node, given)
    return found


def kept(workload: str, microbatches: int) -> dict[str, int]:
    torch.manual_seed(0)
    model = peer_torch.stage(workload, 0, 1)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    inputs = peer_torch.batch(workload)[0].chunk(microbatches)[0].clone()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(inputs)
    made_by = makers(output, inputs)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    sizes: dict[str, int] = {}
    for pointer, size in storages.items():
        if pointer not in parameters:
            kind = made_by[pointer]
            sizes[kind] = sizes.get(kind, 0) + size
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workloads", nargs="+")
    parser.add_argument("--microbatches", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for workload in arguments.workloads:
        print(json.dumps(kept(workload, arguments.microbatches)))


if __name__ == "__main__":
    main()
