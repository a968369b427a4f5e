from __future__ import annotations

from opensmp.distributed.channel.link import LinkState
from opensmp.distributed.watchdog.verdicts.silence import Place, frozen, interrupted

HERE, THERE = Place(0, "node0"), Place(12, "node1")


def test_network_in_which_nothing_arrives_is_named_with_both_machines():
    text = interrupted(HERE, THERE, 7.2, LinkState(7.0, 6.8), [13, 14])
    assert text == (
        "rank 0 on node0 and rank 12 on node1 cannot hear each other: rank 0 has had no message "
        "of rank 12 for 7 s, and no packet of it for 7 s; nothing that rank 0 has sent since then "
        "was acknowledged. Ranks 13, 14 cannot be heard either. The network between node0 and "
        "node1 is interrupted, or node1 is down"
    )


def test_network_of_one_direction_is_named_with_the_direction():
    text = interrupted(HERE, THERE, 7.2, LinkState(4.0, 6.8), [])
    assert text == (
        "rank 0 on node0 and rank 12 on node1 are connected in one direction only, from rank 12 "
        "to rank 0: rank 0 has had no message of rank 12 for 7 s; packets of rank 12 arrive, but "
        "none acknowledges what rank 0 sends to it. The network between node0 and node1 is "
        "interrupted"
    )


def test_machines_without_a_name_are_left_out():
    text = interrupted(Place(0, ""), Place(1, ""), 7.2, LinkState(7.0, 0.0), [])
    assert text.startswith("rank 0 and rank 1 cannot hear each other")
    assert text.endswith("between them is interrupted, or the machine of rank 1 is down")


def test_frozen_process_is_one_whose_machine_answers():
    assert frozen(7.1, None) == "it is frozen: it has given no sign of life for 7 s"
    assert frozen(7.1, LinkState(0.1, 0.0)).endswith("its machine acknowledges what it is sent")
