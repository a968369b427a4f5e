"""Whether all processes are about to do the same, asked at each batch.

Within a machine the processes exchange digests by pipes, which takes them a tenth of the processor
time of a gather. Between machines there is no pipe, and what each process does is gathered.
"""

from __future__ import annotations

import contextlib
import hashlib

from opensmp.distributed.channel.pipes import DIGEST_BYTES, Offer, Pipes
from opensmp.distributed.collectives.objects import allgather_objects
from opensmp.distributed.launch import cluster
from opensmp.distributed.watchdog import recovery

_MOST_RANKS = 64
"""Each rank writes to all others; from so many on a gather takes less."""


class Agreement:
    """Compares texts between all processes of a run. One per process; see `agreement`.

    All processes make the same sequence of calls. The pipes are made at the first one, and again
    after an error, which may have reached the processes in different states of making them.
    """

    def __init__(self) -> None:
        self._pipes: Pipes | None = None
        self._is_made = False
        self._is_interrupted = False
        recovery.interruptible.add(self)

    def is_same(self, text: str, name: str) -> bool:
        """Whether all processes have given this text; False also where that is not known.

        `name` is the call, for messages about processes that wait. The answer is the same in all.
        """
        here = cluster.needed(name, None)
        ranks = tuple(range(len(here.meeting.peers)))
        if not self._is_made:
            self._make(here.rank, ranks, name)
        if self._pipes is None:
            return False
        digest = hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=DIGEST_BYTES)
        with recovery.entered(name, ranks):
            digests = self._pipes.exchange(digest.digest(), lambda: self._is_interrupted)
        return len(set(digests)) == 1

    def interrupt(self) -> None:
        """See `recovery.Interruptible`."""
        self._is_interrupted = True
        if self._pipes is not None:
            self._pipes.wake()

    def restart(self, generation: int) -> None:
        """See `recovery.Interruptible`."""
        if self._pipes is not None:
            self._pipes.close()
        self._pipes, self._is_made, self._is_interrupted = None, False, False

    def _make(self, rank: int, ranks: tuple[int, ...], name: str) -> None:
        peers = cluster.needed(name, ranks).meeting.peers
        if len(ranks) > _MOST_RANKS or len({peer.machine for peer in peers}) > 1:
            self._is_made = True
            return
        pipes: Pipes | None = None
        with contextlib.suppress(OSError, AttributeError):  # pipe2 is of Linux
            pipes = Pipes(rank)
        offers: list[Offer | None] = allgather_objects(pipes and pipes.offer, ranks, name)
        known = [offer for offer in offers if offer is not None]
        is_open = pipes is not None and len(known) == len(ranks) and pipes.open(known)
        if not all(allgather_objects(is_open, ranks, name)):
            if pipes is not None:
                pipes.close()
            pipes = None
        self._pipes, self._is_made = pipes, True


agreement = Agreement()
"""That of this process."""
