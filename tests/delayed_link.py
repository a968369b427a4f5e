"""Joins network namespaces by TUN devices: what a network of some length and width does.

    python delayed_link.py FILE NAMESPACE...

FILE has two native doubles that may change meanwhile: the seconds that a packet takes in one
direction, and how many bytes a second go to each namespace, where 0 is no limit. Namespace number i
gets the device `tun0`. Ends with its standard input.
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import mmap
import os
import struct
import sys
import threading
import time

_NEW_NETWORK = 0x40000000
_SET_INTERFACE = 0x400454CA
_TUN_WITHOUT_HEADER = 0x1001
DEVICE = "tun0"


def open_device(namespace: str) -> int:
    """A new TUN device in a namespace; must be called in a thread of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}", "rb") as file:
        if libc.setns(file.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(
        device, _SET_INTERFACE, struct.pack("16sH22x", DEVICE.encode(), _TUN_WITHOUT_HEADER)
    )
    return device


def target_of(packet: bytes) -> int:
    """Number of the namespace that a packet goes to: the last byte of its address, less one."""
    return (packet[19] if packet[0] >> 4 == 4 else packet[39]) - 1


class Direction:
    """The packets on their way to one namespace."""

    def __init__(self, device: int, link: memoryview) -> None:
        self._device, self._link = device, link
        self._free = 0.0  # when the last packet has been sent
        self._queue: collections.deque[tuple[float, bytes]] = collections.deque()
        self._changed = threading.Condition()

    def put(self, packet: bytes) -> None:
        with self._changed:
            delay, rate = self._link
            self._free = max(self._free, time.monotonic())
            self._free += len(packet) / rate if rate else 0.0
            self._queue.append((self._free + delay, packet))
            self._changed.notify()

    def deliver(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                moment, packet = self._queue.popleft()
            left = moment - time.monotonic()
            if left > 0:
                time.sleep(left)
            try:
                os.write(self._device, packet)
            except OSError:  # the device is down
                continue


def main(path: str, *namespaces: str) -> None:
    devices: list[int] = []
    for namespace in namespaces:
        thread = threading.Thread(target=lambda name=namespace: devices.append(open_device(name)))
        thread.start()
        thread.join()
    with open(path, "r+b") as file:
        link = memoryview(mmap.mmap(file.fileno(), 16)).cast("d")
    ways = [Direction(device, link) for device in devices]

    def read(device: int) -> None:
        while True:
            packet = os.read(device, 65536)
            target = target_of(packet)
            if 0 <= target < len(ways):
                ways[target].put(packet)

    for device, way in zip(devices, ways, strict=True):
        threading.Thread(target=read, args=[device], daemon=True).start()
        threading.Thread(target=way.deliver, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
