"""When a receive is posted: as early as its sender may need it, and no earlier."""

from __future__ import annotations

import json
import textwrap

from processes import check_ranks
from small import STEP_OF_TWO, TWO_BY_FOUR

CASES = [
    ({"microbatches": 8, "active_microbatches": 3}, 3),
    ({"microbatches": 16, "active_microbatches": 3}, 3),
    ({"microbatches": 8, "active_microbatches": 1}, 1),
    ({"microbatches": 16, "pipeline": "zero_bubble", "active_microbatches": 4}, 4),
    ({"microbatches": 12, "pipeline": "simple"}, 12),
    ({"microbatches": 66, "pipeline": "simple"}, 64),  # each occupies a thread
    ({"microbatches": 16, "pipeline": "simple", "bytes": 80}, 5),  # of 16 bytes
]

SCRIPT = f"""
import json, sys
import opensmp as smp
from opensmp.distributed.transport.collective import CollectiveTransport
from opensmp.execution.multi_process import send_recv

posted = []
insert = CollectiveTransport.receive

def receive(self, transfer, number):
    received = insert(self, transfer, number)
    if transfer.tensor is not None and transfer.tensor.shape.rank == 2:
        posted.append(received.posted[0])
    return received

CollectiveTransport.receive = receive
found = []
for settings in json.loads(sys.argv[1]):
    send_recv.AHEAD_BYTES = settings.pop("bytes", 1 << 26)
    smp.init({{**{TWO_BY_FOUR}, "transport": "collective", **settings}})
{textwrap.indent(STEP_OF_TWO, "    ")}
    del posted[:]
    forward(tf.ones([settings["microbatches"], 4]))
    found.append([len(posted), sum(not op.control_inputs for op in posted)])
    smp.shutdown()
print(json.dumps(found))
"""


def test_as_many_receives_are_posted_at_once_as_microbatches_are_in_flight():
    for result in check_ranks(SCRIPT, 2, args=(json.dumps([case for case, _ in CASES]),)):
        for (case, at_once), found in zip(CASES, json.loads(result.lines[-1]), strict=True):
            assert found == [case["microbatches"], at_once], (case, result.rank)
