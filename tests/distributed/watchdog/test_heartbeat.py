from __future__ import annotations

import json
import random
import threading

import pytest

from opensmp.distributed.watchdog.call_log import CallLog
from opensmp.distributed.watchdog.heartbeat import Receiver, Sender


def sent(message):
    return json.loads(json.dumps(message))


@pytest.mark.parametrize("seed", range(20))
def test_receiver_knows_what_the_sender_does_whatever_was_lost(seed):
    rng = random.Random(seed)
    record, sender, receiver = CallLog(), Sender(), Receiver()
    groups = [(0, 1), tuple(range(12)), (3, 7, 9, 10), (5,), tuple(range(2, 1000, 7))]
    inside = []
    for generation in range(1, 200):
        for _ in range(rng.randint(0, 3)):
            if inside and rng.random() < 0.5:
                record.leave(inside.pop())
            elif rng.random() < 0.1:
                record.begin_anew(generation)
                inside.clear()
            else:
                enter = (rng.choice("abc"), rng.choice(groups), rng.choice(["", "0>1"]))
                if rng.random() < 0.2:
                    thread = threading.Thread(target=record.enter, args=enter)
                    thread.start()
                    thread.join()
                else:
                    inside.append(record.enter(*enter, computes=rng.random() < 0.2))
        report = record.report()
        message = sender.heartbeat(report)
        if rng.random() < 0.1:
            sender.start_anew()  # it was lost
            continue
        assert receiver.report(sent(message)) == report
    record.finish()
    assert receiver.report(sent(sender.heartbeat(record.report()))).state == "finished"


def test_heartbeat_without_a_change_is_short_for_any_number_of_ranks_and_groups():
    record, sender = CallLog(), Sender()
    for rank in range(1, 200):
        record.leave(record.enter("a message", (0, rank)))
    record.enter("smp.barrier", tuple(range(4096)))
    first = json.dumps(sender.heartbeat(record.report()))
    assert len(first) < 10_000
    for _ in range(2):
        record.progress()
        assert len(json.dumps(sender.heartbeat(record.report()))) < 80


def test_only_the_groups_that_have_changed_are_told():
    record, sender = CallLog(), Sender()
    for rank in range(1, 200):
        record.leave(record.enter("a message", (0, rank)))
    sender.heartbeat(record.report())
    record.enter("a message", (0, 7))
    message = sender.heartbeat(record.report())
    assert (len(message["entered"]), message["groups"], message["gone"]) == (1, [], [])
