"""A cluster: machines of equal devices, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opensmp.base.message_text import shown
from opensmp.compiler.cluster.links import Given, Link, link_of
from opensmp.compiler.cluster.machine import machine_of, rate
from opensmp.compiler.format import format_bytes
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.config.device import DEVICES, FLOAT32, DeviceKind, Setting, as_dict
from opensmp.config.kinds import is_count
from opensmp.errors import PlanError

MOST_NODES = 100_000
_DEFAULT_WITHIN, _DEFAULT_BETWEEN, _DEFAULT_HOST = "pcie4", "infiniband-hdr", "pcie4"


@dataclass(frozen=True)
class Cluster:
    """The machines and links that a run is simulated on; they need not exist.

    Attributes:
        nodes: Number of machines, >= 1.
        devices_per_node: Devices of each machine, >= 1.
        device: A name such as `"h100"`, or a dict with some of `"memory"` (bytes), `"flops"` (per
            second) and `"bandwidth"` (bytes per second), as the key `device` of the configuration;
            None for what a plan was made for.
        within: Link between devices of a machine: a name of `opensmp.compiler.cluster.links.LINKS`,
            bytes per second of one direction, or a `Link`. None for the link of a known device, and
            `"pcie4"` otherwise.
        between: Link of one device to other machines; `"infiniband-hdr"` by default.
        host: Link of a device to the memory of its machine, for what is offloaded.

    Raises:
        PlanError: If a value is invalid; the message lists all faults.

    Example:
        ```python
        cluster = smp.Cluster(512, 8, device="h100", between="infiniband-ndr")
        print(model.plan.simulate(cluster, replicas=64))
        ```
    """

    nodes: int = 1
    devices_per_node: int = 1
    device: Any = None
    within: Given | None = None
    between: Given = _DEFAULT_BETWEEN
    host: Given = _DEFAULT_HOST

    def __post_init__(self) -> None:
        faults = []
        for name in ("nodes", "devices_per_node"):
            value = getattr(self, name)
            if not is_count(value, MOST_NODES):
                faults.append(
                    f"{name} is an integer from 1 to {MOST_NODES}; received {shown(value)}"
                )
        checked: Setting = None
        try:
            checked = DeviceKind().check(self.device)
        except ValueError as error:
            hint = f"; {error}" if str(error) else ""
            accepted = DeviceKind().accepted
            faults.append(f"device is {accepted}; received {shown(self.device)}{hint}")
        object.__setattr__(self, "device", checked)
        within = self.within
        if within is None:
            within = DEVICES[checked].link if isinstance(checked, str) else _DEFAULT_WITHIN
        for name, given in (("within", within), ("between", self.between), ("host", self.host)):
            try:
                object.__setattr__(self, name, link_of(given, name))
            except PlanError as error:
                faults.append(str(error).removesuffix("."))
        if faults:
            raise PlanError(f"Cluster: {'; '.join(faults)}.")

    @property
    def num_devices(self) -> int:
        """Number of all devices."""
        return self.nodes * self.devices_per_node

    @property
    def inner(self) -> Link:
        """The link within a machine."""
        return _known(self.within)

    @property
    def outer(self) -> Link:
        """The link between machines."""
        return _known(self.between)

    @property
    def to_host(self) -> Link:
        """The link between a device and the memory of its machine."""
        return _known(self.host)

    def machine(self, base: Machine | None = None, precision: str = FLOAT32) -> Machine:
        """Returns the numbers of the cost model for one device; see `machine_of`."""
        return machine_of(self.device, base, precision)

    def to_dict(self) -> dict[str, Any]:
        """Returns the cluster in a form that JSON accepts."""
        links = {
            name: {
                "name": link.name,
                "bytes_per_second": link.bytes_per_second,
                "latency_seconds": link.latency_seconds,
            }
            for name, link in (
                ("within", self.inner),
                ("between", self.outer),
                ("host", self.to_host),
            )
        }
        return {
            "nodes": int(self.nodes),
            "devices_per_node": int(self.devices_per_node),
            "device": as_dict(self.device),
            **links,
        }

    def __str__(self) -> str:
        return (
            f"{self.num_devices} devices: {self.nodes} x {self.devices_per_node} {self._device()}; "
            f"within {self.inner}, between {self.outer}"
        )

    def _device(self) -> str:
        if isinstance(self.device, str):
            return self.device
        units = {"flops": "FLOP/s", "bandwidth": "B/s"}
        numbers = [
            format_bytes(value) if key == "memory" else rate(value, units[key])
            for key, value in self.device or ()
        ]
        return f"of {', '.join(numbers)}" if numbers else "as planned"


def _known(link: Given | None) -> Link:
    assert isinstance(link, Link), "checked by __post_init__"
    return link
