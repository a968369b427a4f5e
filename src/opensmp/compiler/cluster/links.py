"""Links between devices: bandwidth and latency, and the known ones by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from opensmp.base.message_text import did_you_mean, shown
from opensmp.base.sizes import parse_bytes
from opensmp.errors import ConfigError, PlanError

SHARE_OF_PEAK = 0.8
"""Share of the bandwidth of a known link that transfers reach: an assumption."""

_MOST_BYTES_PER_SECOND = 2.0**60
_MOST_SECONDS = 1e3


@dataclass(frozen=True)
class Link:
    """A way between two devices.

    Attributes:
        name: Its name here; empty for one of a user's own.
        bytes_per_second: What one device can send while it receives as much.
        latency_seconds: Time that a transfer of nothing takes.
        source: Where the numbers are from.

    Raises:
        PlanError: If a number is out of range.

    Example:
        >>> Link(bytes_per_second=1e9, latency_seconds=1e-5).seconds(8e6)
        0.01001
    """

    name: str = ""
    bytes_per_second: float = 25e9
    latency_seconds: float = 1e-5
    source: str = "given"

    def __post_init__(self) -> None:
        if not (
            1 <= self.bytes_per_second <= _MOST_BYTES_PER_SECOND
            and 0 <= self.latency_seconds <= _MOST_SECONDS
        ):
            raise PlanError(
                f"Link: bytes_per_second={self.bytes_per_second!r} must be from 1 to 2**60, and "
                f"latency_seconds={self.latency_seconds!r} from 0 to {_MOST_SECONDS:g}."
            )

    @property
    def reached_bytes_per_second(self) -> float:
        """What transfers reach of the bandwidth; all of it for a link of a user's own numbers."""
        return self.bytes_per_second * (SHARE_OF_PEAK if self.name else 1.0)

    def seconds(self, num_bytes: float) -> float:
        """Returns the time to send so many bytes."""
        return self.latency_seconds + num_bytes / self.reached_bytes_per_second

    def __str__(self) -> str:
        share = f" x {SHARE_OF_PEAK:g}" if self.name else ""
        speed = f"{self.bytes_per_second / 1e9:g} GB/s{share} + {1e6 * self.latency_seconds:g} µs"
        return f"{self.name} ({speed})" if self.name else speed


_NVLINK, _PCIE, _IB, _TCP = 5e-6, 1e-5, 1e-5, 5e-5
_GIGABIT = 1e9 / 8
_LATENCIES = "; latency assumed"

_ROWS = (
    Link("nvlink2", 150e9, _NVLINK, "NVIDIA V100 data sheet: 300 GB/s both ways" + _LATENCIES),
    Link("nvlink3", 300e9, _NVLINK, "NVIDIA A100 data sheet: 600 GB/s both ways" + _LATENCIES),
    Link("nvlink4", 450e9, _NVLINK, "NVIDIA H100 data sheet: 900 GB/s both ways" + _LATENCIES),
    Link("nvlink5", 900e9, _NVLINK, "NVIDIA HGX B200: 1,800 GB/s both ways" + _LATENCIES),
    Link("pcie3", 15.75e9, _PCIE, "PCI Express 3.0, 16 lanes" + _LATENCIES),
    Link("pcie4", 31.5e9, _PCIE, "PCI Express 4.0, 16 lanes" + _LATENCIES),
    Link("pcie5", 63e9, _PCIE, "PCI Express 5.0, 16 lanes" + _LATENCIES),
    Link("infiniband-edr", 100 * _GIGABIT, _IB, "InfiniBand EDR, 4 lanes" + _LATENCIES),
    Link("infiniband-hdr", 200 * _GIGABIT, _IB, "InfiniBand HDR, 4 lanes" + _LATENCIES),
    Link("infiniband-ndr", 400 * _GIGABIT, _IB, "InfiniBand NDR, 4 lanes" + _LATENCIES),
    Link("infiniband-xdr", 800 * _GIGABIT, _IB, "InfiniBand XDR, 4 lanes" + _LATENCIES),
    Link("ethernet-10", 10 * _GIGABIT, _TCP, "Ethernet of 10 Gbit/s" + _LATENCIES),
    Link("ethernet-25", 25 * _GIGABIT, _TCP, "Ethernet of 25 Gbit/s" + _LATENCIES),
    Link("ethernet-100", 100 * _GIGABIT, _TCP, "Ethernet of 100 Gbit/s" + _LATENCIES),
    Link("ethernet-200", 200 * _GIGABIT, _TCP, "Ethernet of 200 Gbit/s" + _LATENCIES),
    Link("ethernet-400", 400 * _GIGABIT, _TCP, "Ethernet of 400 Gbit/s" + _LATENCIES),
)

LINKS: Mapping[str, Link] = MappingProxyType({row.name: row for row in _ROWS})
"""Known links by name; bandwidths are those of one direction."""

Given = str | float | Link
"""A link, its name, or its bandwidth in bytes per second, also as text: "25GB"."""


def link_of(given: Given, what: str) -> Link:
    """Returns the link that a user has given.

    Raises:
        PlanError: If it is none; `what` names the argument.
    """
    if isinstance(given, Link):
        return given
    if isinstance(given, str):
        if given.lower() in LINKS:
            return LINKS[given.lower()]
        try:
            return Link(bytes_per_second=parse_bytes(given.removesuffix("/s"), what))
        except ConfigError:
            pass
    elif isinstance(given, int | float) and not isinstance(given, bool):
        return Link(bytes_per_second=float(given))
    near = did_you_mean(given, LINKS)
    raise PlanError(
        f"{what}: received {shown(given)}. Expected: {', '.join(LINKS)}, or bytes per second such "
        f"as 25e9 or '25GB'{'; ' + near if near else '.'}"
    )
