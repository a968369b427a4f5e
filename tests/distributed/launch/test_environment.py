from __future__ import annotations

import pytest

from opensmp.base.message_text import shown
from opensmp.distributed.launch.environment import (
    Variables,
    first_host,
    is_host,
    parse_address,
    parse_port,
)
from opensmp.errors import LaunchError


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[07-09,12],login", "node07"),
        ("a,b", "a"),
        ("gpu-1", "gpu-1"),
        ("r[1,3]c[02-04]", "r1c02"),
        ("n[003]", "n003"),
        ("a" + ",b" * 1_000_000, "a"),
    ],
    ids=shown,
)
def test_first_host_of_a_short_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "nodes",
    [
        "[" * 50_000,
        "a[" * 50_000,
        "[1]" * 50_000,
        "n[",
        "n[]",
        "n[,1]",
        "n]",
        "",
        "a b",
        ",a",
        "a\0",
    ],
    ids=shown,
)
def test_list_of_nodes_whose_brackets_do_not_fit_is_refused_at_once(nodes):
    with pytest.raises(ValueError, match=r"brackets do not fit|names no host"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node0:2222", ("node0", 2222)),
        ("10.0.0.8:1", ("10.0.0.8", 1)),
        ("[fe80::1]:2222", ("fe80::1", 2222)),
        ("::1:2222", ("::1", 2222)),
    ],
)
def test_address_is_host_and_port(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", ":1", "a:", "a:0", "a:65536", "a:\u0663", "a:1_0", "a:+1", "a:-1", "a:1 "),
        *("a b:1", "a\0b:1", "\ud800:1", "a..b:1", "a" * 64 + ":1", "a." * 200 + "a:1", "[::1:1"),
        "a:" + "9" * 5000,
    ],
    ids=shown,
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="expected host:port, such as node0:2222"):
        parse_address(text)


def test_ports_are_written_in_ascii():
    assert parse_port("65535") == 65535
    assert [parse_port(text) for text in ("0", "65536", "\u0663", "9" * 5000, "")] == [None] * 5


def test_names_of_other_scripts_are_hosts():
    assert is_host("b\u00fccher.example")
    assert not is_host("\udcff")


def test_all_faults_of_the_variables_come_at_once():
    variables = Variables({"A": "\u0663", "B": "9" * 5000, "C": "soon", "D": "x", "E": "["})
    assert variables.whole("A") is None
    assert variables.whole("B") is None
    assert variables.whole("Z", required=True) is None
    assert variables.seconds("C", "a time", "above 0", lambda seconds: seconds > 0) is None
    assert variables.address("D") is None
    assert variables.hosts("E") == ()
    with pytest.raises(LaunchError) as caught:
        variables.raise_faults("A launcher")
    first, *lines = str(caught.value).splitlines()
    assert first == "A launcher: the variables have 6 faults."
    starts = [
        "1. A is ",
        "2. B is ",
        "3. Z is not set",
        "4. C is a time",
        "5. D is ",
        "6. E is no ",
    ]
    for line, start in zip(lines, starts, strict=True):
        assert line.strip().startswith(start)
        assert len(line) < 300


@pytest.mark.parametrize(
    "text", ["nan", "inf", "1e999", "1_0", "\u0663", "9" * 400_000, "0x1"], ids=shown
)
def test_seconds_are_a_finite_number_in_ascii(text):
    variables = Variables({"S": text})
    assert variables.seconds("S", "a time", "below for ever", lambda s: s < float("inf")) is None
    assert len(variables.faults) == 1


def test_seconds_may_be_written_as_any_decimal_number():
    for text, expected in (("7.5", 7.5), ("1e2", 100.0), (".5", 0.5), (" 3 ", 3.0), ("+1.", 1.0)):
        assert Variables({"S": text}).seconds("S", "", "", lambda s: s > 0) == expected
