"""The table of all processes that each of them gets at the rendezvous.

It is packed once for all, in about a dozen bytes for each process: every rank gets it from rank 0.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opensmp.distributed.channel.channel import Message

_PEER_BYTES = 1 << 12  # at most, unpacked


@dataclass(frozen=True)
class Peer:
    """One process, as all others know it.

    Attributes:
        rank: Its rank.
        address: `host:port` of its TensorFlow server.
        machine: Name of its machine, equal for processes of one machine.
        process: Its process id there.
        network: Name of its network namespace on that machine.
    """

    rank: int
    address: str
    machine: str
    process: int
    network: str = ""


_COLUMNS = {"address": str, "machine": str, "process": int, "network": str}


def packed(peers: Sequence[Peer]) -> Message:
    """The message that carries the rows of all ranks, in rank order."""
    columns = {name: [getattr(peer, name) for peer in peers] for name in _COLUMNS}
    text = json.dumps(columns, separators=(",", ":")).encode()
    return {"kind": "table", "rows": base64.b64encode(zlib.compress(text, 6)).decode()}


def unpacked(message: Message, size: int) -> tuple[Peer, ...] | None:
    """The rows of a message; None if it is not a table of so many ranks."""
    columns = _columns(message.get("rows"), _PEER_BYTES * (size + 1))
    if message.get("kind") != "table" or not isinstance(columns, dict):
        return None
    for name, kind in _COLUMNS.items():
        column = columns.get(name)
        if not isinstance(column, list) or len(column) != size:
            return None
        if not all(type(value) is kind for value in column):
            return None
        if kind is int and not all(0 <= value < 1 << 63 for value in column):
            return None
    rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
    return tuple(Peer(rank, *row) for rank, row in enumerate(rows))


def _columns(text: Any, most_bytes: int) -> Any:
    if not isinstance(text, str):
        return None
    try:
        unpacking = zlib.decompressobj()
        found = unpacking.decompress(base64.b64decode(text, validate=True), most_bytes)
        return None if unpacking.unconsumed_tail else json.loads(found)
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        return None
