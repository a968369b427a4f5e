"""The configuration's `device`: the device that a plan is for, by name or by its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

from opensmp.base.message_text import did_you_mean, shown
from opensmp.base.sizes import parse_bytes
from opensmp.config.kinds import word_or_json
from opensmp.config.partition_levels import pairs
from opensmp.errors import ConfigError

FLOAT32, TENSORFLOAT32, FLOAT16, BFLOAT16 = "float32", "tensorfloat32", "float16", "bfloat16"


@dataclass(frozen=True)
class Device:
    """What is known of a kind of device. All are peak values of the vendor, without sparsity.

    Attributes:
        name: Its name here.
        memory_bytes: Its memory; of the gigabytes of the vendor, as powers of ten: what it has
            beyond that is for the driver.
        flops_per_second: Arithmetic speed by the dtype of matrix products.
        bytes_per_second: Memory bandwidth.
        link: The link to other devices of the same machine, a name of
            `opensmp.compiler.cluster.links.LINKS`.
        source: Where the numbers are from.
    """

    name: str
    memory_bytes: int
    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    link: str
    source: str

    def flops_of(self, dtype: str) -> float:
        """Returns the speed of products of a dtype; of float32 what TensorFlow uses by default.

        TensorFlow multiplies float32 in TensorFloat-32 where the device can. A dtype that the
        device does not know counts as float32 without that.
        """
        speeds = self.flops_per_second
        if dtype == FLOAT32 and TENSORFLOAT32 in speeds:
            return speeds[TENSORFLOAT32]
        return speeds.get(dtype, speeds[FLOAT32])


def _gpu(
    name: str,
    gigabytes: float,
    gigabytes_per_second: float,
    teraflops: tuple[float, float | None, float, float | None],
    link: str,
    source: str,
) -> Device:
    """Returns a device; `teraflops` of float32, TensorFloat-32, float16 and bfloat16."""
    speeds = zip((FLOAT32, TENSORFLOAT32, FLOAT16, BFLOAT16), teraflops, strict=True)
    return Device(
        name,
        round(gigabytes * 1e9),
        MappingProxyType({dtype: 1e12 * speed for dtype, speed in speeds if speed is not None}),
        1e9 * gigabytes_per_second,
        link,
        source,
    )


_ROWS = (
    _gpu("v100", 32, 900, (15.7, None, 125, None), "nvlink2", "NVIDIA V100 data sheet, SXM2"),
    _gpu("v100-16gb", 16, 900, (15.7, None, 125, None), "nvlink2", "NVIDIA V100 data sheet, SXM2"),
    _gpu("t4", 16, 320, (8.1, None, 65, None), "pcie3", "NVIDIA T4 data sheet"),
    _gpu("a100", 80, 2039, (19.5, 156, 312, 312), "nvlink3", "NVIDIA A100 data sheet, SXM 80GB"),
    _gpu(
        "a100-40gb", 40, 1555, (19.5, 156, 312, 312), "nvlink3", "NVIDIA A100 data sheet, SXM 40GB"
    ),
    _gpu("a10", 24, 600, (31.2, 62.5, 125, 125), "pcie4", "NVIDIA A10 data sheet"),
    _gpu("l4", 24, 300, (30.3, 60, 121, 121), "pcie4", "NVIDIA L4 data sheet"),
    _gpu("l40s", 48, 864, (91.6, 183, 362, 362), "pcie4", "NVIDIA L40S data sheet"),
    _gpu("h100", 80, 3350, (67, 494.7, 989.4, 989.4), "nvlink4", "NVIDIA H100 data sheet, SXM5"),
    _gpu("h200", 141, 4800, (67, 494.7, 989.4, 989.4), "nvlink4", "NVIDIA H200 data sheet, SXM"),
    _gpu("b200", 180, 8000, (80, 1100, 2250, 2250), "nvlink5", "NVIDIA HGX B200, 1,000 W"),
)

DEVICES: Mapping[str, Device] = MappingProxyType({row.name: row for row in _ROWS})
"""Known devices by name."""

MEMORY, FLOPS, BANDWIDTH = "memory", "flops", "bandwidth"
_PARTS = (MEMORY, FLOPS, BANDWIDTH)
_MOST = {MEMORY: 2.0**60, FLOPS: 1e24, BANDWIDTH: 2.0**60}
_UNITS = {MEMORY: "bytes", FLOPS: "FLOPs per second", BANDWIDTH: "bytes per second"}

Setting = str | tuple[tuple[str, float], ...] | None
"""The name of a device, or pairs of `"memory"` (bytes), `"flops"` and `"bandwidth"` (bytes per
second), of which some may be missing; None if nothing is known."""


class DeviceKind:
    """The name of a device, a dict of its numbers, which becomes sorted pairs, or None."""

    @property
    def accepted(self) -> str:
        """See `opensmp.config.kinds.Kind`."""
        return (
            f"{', '.join(map(repr, DEVICES))}, a dict with some of 'memory' (bytes), 'flops' "
            "(FLOPs per second) and 'bandwidth' (bytes per second), or None"
        )

    def check(self, value: Any) -> Setting:
        """See `opensmp.config.kinds.Kind`."""
        if value is None:
            return None
        if isinstance(value, str):
            if value.lower() not in DEVICES:
                raise ValueError(did_you_mean(value, DEVICES))
            return value.lower()
        found: dict[str, float] = {}
        for key, number in pairs(value):
            if not isinstance(key, str) or key not in _PARTS:
                raise ValueError(f"unknown key {shown(key, 40)}; {did_you_mean(key, _PARTS)}")
            found[key] = _amount(key, number)
        if not found:
            raise ValueError
        return tuple(sorted(found.items()))

    def read(self, text: str) -> Any:
        """See `opensmp.config.kinds.Kind`."""
        return word_or_json(text)


def as_dict(setting: Setting) -> str | dict[str, float] | None:
    """Returns the setting in a form that JSON and `DeviceKind` accept."""
    return dict(setting) if isinstance(setting, tuple) else setting


def has_speed(setting: Setting) -> bool:
    """Whether the setting says how fast a device is, not only how much memory it has."""
    return isinstance(setting, str) or bool(set(dict(setting or ())) - {MEMORY})


def _amount(key: str, value: Any) -> float:
    """Returns a number of the dict; raises `ValueError` with a hint."""
    hint = f"'{key}' is {shown(value, 40)}; give a number of {_UNITS[key]}, above 0"
    if isinstance(value, str) and key != FLOPS:
        try:
            return parse_bytes(value.strip().removesuffix("/s"), f"'{key}'")
        except ConfigError as error:
            raise ValueError(str(error).removesuffix(".")) from None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(hint)
    try:
        number = float(value)
    except (OverflowError, ValueError):
        raise ValueError(hint) from None
    if not (math.isfinite(number) and 1 <= number <= _MOST[key]):
        raise ValueError(hint)
    return int(number) if key == MEMORY else number
