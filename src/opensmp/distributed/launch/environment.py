"""Reads launcher variables from the environment: numbers, addresses and host names.

Reading continues after a fault, so that one error lists all faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NoReturn

from opensmp.base.message_text import numbered, plain, shown
from opensmp.base.strict_json import JsonFault, parse_json
from opensmp.errors import LaunchError

MOST_PROCESSES = 100_000
"""Upper limit of accepted numbers of processes; loops over more would take too long."""

# ASCII digits only: Python's `int` accepts digits of all scripts, and underscores.
_WHOLE = re.compile(r"[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,99}\.?[0-9]{0,99}|\.[0-9]{1,99})(?:[eE][+-]?[0-9]{1,4})?")
_NO_HOST = re.compile(r"[\s/\\,;'\"()\[\]{}<>?#@&|$`*=!^~+\x00-\x1f\x7f]")
_LONGEST_HOST = 253
_NODE_NUMBER = re.compile(r"[0-9A-Za-z]+")


class Variables:
    """Environment variables, and the faults found in those that were read."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.faults: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._environ

    def text(self, name: str) -> str:
        """The stripped text of a variable; "" if it is not set."""
        return self._environ.get(name, "").strip()

    def whole(self, name: str, *, required: bool = False, most: int = MOST_PROCESSES) -> int | None:
        """A whole number from 0 to `most`; None if not set, or invalid, which is a fault."""
        text = self.text(name)
        if _WHOLE.fullmatch(text) and int(text) <= most:
            return int(text)
        if text or required:
            received = f"is {shown(text)}" if text else "is not set"
            self.faults.append(
                f"{name} {received}; expected a whole number up to {most}, as the launcher sets it"
            )
        return None

    def pair(self, rank: str, size: str) -> tuple[int, int] | None:
        """Rank and size, or None unless both are numbers; records no fault."""
        texts = self.text(rank), self.text(size)
        if not all(map(_WHOLE.fullmatch, texts)):
            return None
        return int(texts[0]), int(texts[1])

    def seconds(
        self, name: str, meaning: str, accepted: str, fits: Callable[[float], bool]
    ) -> float | None:
        """Seconds; None if not set, or invalid, which is a fault."""
        text = self.text(name)
        if not text:
            return None
        if _DECIMAL.fullmatch(text) and fits(float(text)):
            return float(text)
        self.faults.append(
            f"{name} is {meaning}. Expected: seconds, {accepted}. Received: {plain(text)}"
        )
        return None

    def address(self, name: str) -> tuple[str, int] | None:
        """Host and port from `host:port`; None, and a fault, if invalid."""
        try:
            return parse_address(self.text(name))
        except ValueError as error:
            self.faults.append(f"{name} {error}")
            return None

    def host_and_port(self, host: str, port: str) -> tuple[str, int] | None:
        """Host and port from two variables; None if one is unset, or invalid, which is a fault."""
        name, number = self.text(host), self.text(port)
        if not name or not number:
            return None
        found = parse_port(number)
        if found is None or found > 65534:
            self.faults.append(
                f"{port} is {shown(number)}; expected a free port on the host of rank 0, such as "
                "29400"
            )
        if not is_host(name):
            self.faults.append(
                f"{host} is {shown(name)}; expected the name or the address of the host of rank 0, "
                "such as node0"
            )
            return None
        return None if found is None else (name, found)

    def hosts(self, name: str) -> tuple[str, ...]:
        """A JSON list of hosts; empty if not set, or invalid, which is a fault."""
        text = self.text(name)
        if not text:
            return ()
        try:
            given = parse_json(text)
        except JsonFault as error:
            self.faults.append(f"{name} is no JSON list of hosts ({error}): {shown(text)}")
            return ()
        if not isinstance(given, list) or not all(isinstance(h, str) and is_host(h) for h in given):
            self.faults.append(f'{name} is {shown(text)}; expected hosts, such as ["a", "b"]')
            return ()
        return tuple(given)

    def raise_faults(self, source: str) -> None:
        """Raises one error with all faults, if there are any."""
        if self.faults:
            raise_launch_faults(source, self.faults)


def raise_launch_faults(source: str, faults: list[str]) -> NoReturn:
    """Raises one `LaunchError` that lists all faults."""
    if len(faults) == 1:
        raise LaunchError(f"{source}: {faults[0]}.")
    lines = "\n".join(numbered(faults))
    raise LaunchError(f"{source}: the variables have {len(faults)} faults.\n{lines}")


def parse_port(text: str) -> int | None:
    """A port number; None if invalid."""
    return int(text) if _WHOLE.fullmatch(text) and 0 < int(text) < 65536 else None


def parse_address(text: str) -> tuple[str, int]:
    """Host and port from `host:port`; brackets around an IPv6 address are removed."""
    host, _, number = text.rpartition(":")
    port = parse_port(number)
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    if port is None or not is_host(host):
        raise ValueError(f"is {shown(text)}; expected host:port, such as node0:2222")
    return host, port


def is_host(text: str) -> bool:
    """Whether a text can be a host name or address; does not look it up.

    A lookup of an invalid name would raise errors of other types.
    """
    if not 0 < len(text) <= _LONGEST_HOST or _NO_HOST.search(text):
        return False
    try:
        text.encode("idna")
    except UnicodeError:  # a label is empty, too long or not encodable
        return False
    return True


def first_host(nodes: str) -> str:
    """The first host of a node list in Slurm's compact form: "node07" of "node[07-09,12],login"."""
    text = nodes.strip()
    name, position, comma = "", 0, -1
    while True:
        if comma < position:
            comma = text.find(",", position)
            comma = len(text) if comma < 0 else comma
        opening = text.find("[", position, comma)
        if opening < 0:
            name += text[position:comma]
            break
        closing = text.find("]", opening)
        first = _NODE_NUMBER.match(text, opening + 1)
        if closing < 0 or first is None:
            raise ValueError("its brackets do not fit")
        name += text[position:opening] + first.group(0)
        position = closing + 1
        if len(name) > _LONGEST_HOST:
            break
    if not is_host(name):
        raise ValueError("it names no host")
    return name
