from __future__ import annotations

import pytest

from opensmp.compiler.cluster.links import LINKS, SHARE_OF_PEAK, Link, link_of
from opensmp.config.device import DEVICES
from opensmp.errors import PlanError


def test_transfer_takes_latency_and_bytes_over_bandwidth():
    assert Link(bytes_per_second=2e9, latency_seconds=1e-3).seconds(4e9) == pytest.approx(2.001)
    known = LINKS["infiniband-hdr"]
    assert known.seconds(25e9) == pytest.approx(known.latency_seconds + 1 / SHARE_OF_PEAK)


def test_links_are_given_by_name_or_bandwidth():
    assert link_of("NVLink4", "within") is LINKS["nvlink4"]
    assert link_of(1e10, "within") == link_of("10GB", "within") == link_of("10GB/s", "within")
    assert link_of(Link("", 3.0), "within").bytes_per_second == 3


@pytest.mark.parametrize("given", ["nvlink9", "", 0, -1, float("nan"), True, None, "0GB", 1e30])
def test_what_is_no_link_is_refused(given):
    with pytest.raises(PlanError, match=r"within|bytes_per_second"):
        link_of(given, "within")


def test_every_known_device_has_a_known_link_and_a_source():
    for device in DEVICES.values():
        assert device.link in LINKS
        assert device.source
    assert all(link.source for link in LINKS.values())
