"""Ends all processes soon after one has failed, and makes each report which one and why.

TensorFlow alone would hang forever in many of these cases. One thread per process communicates with
rank 0 over the connections of the rendezvous, and that of rank 0 with all:

- the connection of a process that was killed, or crashed, closes at once;
- if the heartbeats of a process stop, its system tells whether the network is interrupted, see
  `opensmp.distributed.channel.link`; if not, the process is probed through TensorFlow's C++
  threads, which answer even when Python is busy: if they do not, the process is frozen;
- a process that ends by an exception reports it first;
- `opensmp.distributed.watchdog.verdicts.deadlock` finds calls that can never complete;
- `opensmp.distributed.watchdog.verdicts.stalls` finds runs in which all ranks are in some call and
  none has computed for minutes.

The work per message is the same for any number of ranks; rank 0 judges once per heartbeat.

Rank 0 determines the cause, since a failure makes other ranks fail in turn, and tells all. A
process that computes is never ended for being slow. Survivors end by `os._exit`, because
TensorFlow's teardown may crash or hang after a failure: their `atexit` functions and `finally`
blocks do not run.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opensmp.distributed.channel.channel import Channel, Message, as_text
from opensmp.distributed.channel.link import Link, LinkState
from opensmp.distributed.watchdog import heartbeat
from opensmp.distributed.watchdog.call_log import CallLog, waits
from opensmp.distributed.watchdog.verdicts import silence
from opensmp.distributed.watchdog.verdicts.judge import Judge, Verdict, beat_seconds
from opensmp.distributed.watchdog.verdicts.recovery_rounds import Reaction, Rounds
from opensmp.distributed.watchdog.verdicts.stalls import DEFAULT_SECONDS

ENDED_BY_PEER = 75
"""Exit code of a process that ends because another one failed (`EX_TEMPFAIL`: retry)."""

PREEMPTED = 143
"""Exit code after a preemption signal (128 + SIGTERM): restart."""

_SILENT_SECONDS = 4.0  # without a heartbeat, before a process is probed
_DOUBT_SECONDS = 1.5  # without a heartbeat, before the connection is observed
_ANSWER_SECONDS, _ACKNOWLEDGE_SECONDS = 2.75, 0.25
_CAUSE_SECONDS = 1.5  # to wait for the cause after a consequence
_VERDICT_SECONDS = 8.0
_PARTING_SECONDS = 10.0
_STALL_SECONDS = 1.0
_MANY = 64  # ranks from which on messages that arrive within _PAUSE_SECONDS are read together
_PAUSE_SECONDS = 0.05


@dataclass
class _Neighbour:
    """State of the process at the other end of a channel."""

    rank: int
    channel: Channel
    heard: float
    link: Link
    heartbeats: heartbeat.Receiver = field(default_factory=heartbeat.Receiver)
    gone: bool = False


class Watch:
    """Watches the other processes of a run, and sends them heartbeats.

    Args:
        rank: This process.
        channels: Connections by rank: rank 0 has one to each other rank, which have one to rank 0.
        record: The call log of this process.
        leave: Ends this process with an exit code.
        idle_seconds: How long all ranks may be in some call without any of them computing; 0: no
            limit. Rank 0's value counts.
        size: Number of ranks, if it is not that of the channels and this process.
        machines: Names of the machines of all ranks, for messages.
    """

    def __init__(
        self,
        rank: int,
        channels: Mapping[int, Channel],
        record: CallLog,
        leave: Callable[[int], None] = os._exit,
        idle_seconds: float = DEFAULT_SECONDS,
        size: int | None = None,
        machines: Sequence[str] = (),
    ) -> None:
        now = time.monotonic()
        self._rank, self._machines = rank, machines
        self._neighbours = {
            peer: _Neighbour(peer, c, now, Link(c.connection)) for peer, c in channels.items()
        }
        self._record = record
        self._leave = leave
        self._lock = threading.Lock()
        self._verdict: Verdict | None = None
        self._decided = threading.Event()
        self._together = threading.Event()  # all programs have ended without an error
        self._consequence: tuple[float, Verdict] | None = None
        size = len(channels) + 1 if size is None else size
        self._beat_seconds = beat_seconds(size)
        self._judge = Judge(size, idle_seconds)
        self._heartbeats = heartbeat.Sender()
        self._sending = threading.Lock()
        self._arrivals = selectors.DefaultSelector()
        for neighbour in self._neighbours.values():
            self._arrivals.register(neighbour.channel, selectors.EVENT_READ, neighbour)
        self._awake_since = now  # this thread, which the interpreter's lock may keep from working
        self._probing = 0.0  # seconds that the last turn has spent for that
        self._failing = False  # this process is ending with its own error
        self._leaving = threading.Lock()
        self._rounds = Rounds(size)
        self._in_round = threading.Lock()
        self.hear: Callable[[Message], None] = lambda message: None
        self._process = os.getpid()
        # Whether the process of a rank answers within some seconds; None while it cannot be probed.
        self.answers: Callable[[int, float], bool] | None = None
        # Handles messages that are not about failures.
        self.hears: Callable[[int, Message], None] | None = None

    def start(self) -> None:
        """Starts the watching thread."""
        os.register_at_fork(after_in_child=self._let_go)
        threading.Thread(target=self._run, name="opensmp-watch", daemon=True).start()

    def fail(self, text: str, *, consequence: bool = False, code: int = 1) -> None:
        """Tells the others that this process fails, and ends it. Does not return.

        As a `consequence`, such as a broken connection, it is probably caused by another process;
        then rank 0 waits for the cause first.
        """
        self._failing = True
        own = Verdict(self._rank, text)
        if self._rank == 0:
            self._note(own, consequence)
        else:
            with contextlib.suppress(OSError):
                self._neighbours[0].channel.send(
                    {"kind": "failed", "text": text, "consequence": consequence}
                )
        self._decided.wait(_VERDICT_SECONDS)
        self._end(None, code)

    def send(self, rank: int, message: Message) -> None:
        """Sends a message to the `hears` of a process to which this one has a connection."""
        neighbour = self._neighbours[rank]
        if not neighbour.gone:  # `_hear` notices it
            with contextlib.suppress(OSError):
                neighbour.channel.send(message)

    def tell(self, message: Message) -> None:
        """Reports to rank 0 an error that the run may survive; see `recovery_rounds.py`."""
        if self._rank == 0:
            self._take_round(0, message)
        else:
            with contextlib.suppress(OSError):
                self._neighbours[0].channel.send(message)

    def finish(self) -> None:
        """Waits until the programs of all processes have ended without an error.

        A process that ends earlier breaks TensorFlow's runtime for the others. There is no time
        limit: others may have much left to do. A failure ends this process meanwhile.
        """
        if os.getpid() != self._process:
            return
        self._record.finish()
        with contextlib.suppress(OSError):
            self._send_reports()
        self._together.wait()
        if self._rank == 0:
            # The service at which the others sign off runs in this process.
            end = time.monotonic() + _PARTING_SECONDS
            while time.monotonic() < end and any(not n.gone for n in self._neighbours.values()):
                time.sleep(0.02)

    # ------------------------------------------------------------------------------ thread

    def _run(self) -> None:
        next_beat, turn = 0.0, time.monotonic()
        while True:
            now = time.monotonic()
            if now - turn - self._probing > self._beat_seconds + _STALL_SECONDS:
                self._awake_since = now
            turn, self._probing = now, 0.0
            is_beat = now >= next_beat
            if is_beat:
                next_beat = now + self._beat_seconds
                self._send_reports()
            self._receive(max(0.0, next_beat - time.monotonic()))
            if not self._together.is_set():
                if is_beat:
                    self._look_for_silence()
                if self._rank == 0:
                    self._look(is_beat)
            elif self._rank or all(n.gone for n in self._neighbours.values()):
                return

    def _send_reports(self) -> None:
        if self._rank == 0:
            self._send_to_all(as_text({"kind": "alive"}))
            return
        with self._sending:
            # `_hear` notices a closed connection, after its last messages.
            try:
                message = self._heartbeats.heartbeat(self._record.report())
                self._neighbours[0].channel.send(message, seconds=1.0)
            except OSError:
                self._heartbeats.start_anew()

    def _receive(self, seconds: float) -> None:
        ready = self._arrivals.select(seconds)
        if len(self._neighbours) >= _MANY and ready:
            time.sleep(_PAUSE_SECONDS)
            ready = self._arrivals.select(0.0)
        for key, _ in ready:
            self._hear(key.data)

    def _hear(self, neighbour: _Neighbour) -> None:
        """Takes a message of a process that has arrived, and what was read with it."""
        while True:
            try:
                message = neighbour.channel.receive_now()
            except OSError:
                self._lose(neighbour)
                return
            if message is None:
                return
            neighbour.heard = time.monotonic()
            self._take(neighbour, message)
            if not neighbour.channel.has_rest:
                return

    def _lose(self, neighbour: _Neighbour) -> None:
        neighbour.gone = True
        self._arrivals.unregister(neighbour.channel)
        if not self._together.is_set():
            self._note(Verdict(neighbour.rank, _GONE), consequence=False)

    def _take(self, neighbour: _Neighbour, message: Message) -> None:
        kind = message.get("kind")
        if kind == "alive":
            if self._rank == 0:
                report = neighbour.heartbeats.report(message)
                self._judge.hear(neighbour.rank, report, neighbour.heard)
        elif kind == "failed":
            verdict = Verdict(neighbour.rank, message["text"])
            self._note(verdict, message["consequence"])
        elif kind == "verdict":
            self._decide(Verdict(message["rank"], message["text"]))
        elif kind == "warning":
            self._warn(message["text"])
        elif kind == "together":
            self._together.set()
        elif kind in ("fault", "settle", "ready"):
            self._take_round(neighbour.rank, message)
        elif kind in ("halt", "renew", "go"):
            self.hear(message)
        elif self.hears is not None:
            self.hears(neighbour.rank, message)

    def _take_round(self, rank: int, message: Message) -> None:
        with self._in_round:
            self._carry_out(self._rounds.take(rank, message, time.monotonic()))

    def _carry_out(self, outcome: Reaction) -> None:
        for message in outcome.tell:
            self._tell(message)
            self.hear(message)
        if outcome.lost is not None:
            self._decide(Verdict(*outcome.lost))

    def _look_for_silence(self) -> None:
        unheard: list[tuple[_Neighbour, LinkState]] = []
        for neighbour in self._neighbours.values():
            if neighbour.channel.fileno() == -1 and not neighbour.gone:  # closed by this process
                self._lose(neighbour)
            now = time.monotonic()
            silent = now - neighbour.heard
            if neighbour.gone or silent < _DOUBT_SECONDS:
                continue
            link = neighbour.link.sample(now)
            if silent < _SILENT_SECONDS:
                continue
            # If this thread was kept from sending, there was nothing to acknowledge.
            was_awake = now - self._awake_since >= _SILENT_SECONDS
            if link is not None and link.is_lost and was_awake:
                unheard.append((neighbour, link))
            elif self.answers is not None:
                self._probe(neighbour, self.answers)
        if not unheard:
            return
        (first, link), *others = unheard
        seconds = time.monotonic() - first.heard
        if seconds >= _SILENT_SECONDS + _ANSWER_SECONDS + _ACKNOWLEDGE_SECONDS:
            here, there = self._place(self._rank), self._place(first.rank)
            ranks = [other.rank for other, _ in others]
            text = silence.interrupted(here, there, seconds, link, ranks)
            self._note(Verdict(None, text), consequence=False)

    def _probe(self, neighbour: _Neighbour, answers: Callable[[int, float], bool]) -> None:
        """Finds out whether a process that is not heard is frozen."""
        began = time.monotonic()
        if answers(neighbour.rank, _ANSWER_SECONDS):
            neighbour.heard = time.monotonic()
        else:
            # What is sent now is acknowledged if the network works. Messages that arrived while
            # this thread was waiting count.
            self._send_reports()
            time.sleep(_ACKNOWLEDGE_SECONDS)
            self._receive(0.0)
            now = time.monotonic()
            link = neighbour.link.sample(now)
            is_lost = link is not None and link.is_deaf
            if neighbour.heard < began and not neighbour.gone and not is_lost:
                text = silence.frozen(now - neighbour.heard, link)
                self._note(Verdict(neighbour.rank, text), consequence=False)
        self._probing += time.monotonic() - began

    def _place(self, rank: int) -> silence.Place:
        is_known = rank < len(self._machines)
        return silence.Place(rank, self._machines[rank] if is_known else "")

    # ---------------------------------------------------------------------------- decision

    def _note(self, verdict: Verdict, consequence: bool) -> None:
        """Accepts a failure as the cause, or keeps it until the cause is known."""
        if not consequence:
            self._decide(verdict)
            return
        with self._lock:
            if self._consequence is None:
                self._consequence = (time.monotonic(), verdict)

    def _look(self, is_beat: bool) -> None:
        """Rank 0: ends runs that can never continue, and releases all when all have finished."""
        now = time.monotonic()
        if self._consequence is not None and now - self._consequence[0] > _CAUSE_SECONDS:
            self._decide(self._consequence[1])
            return
        with self._in_round:
            self._carry_out(self._rounds.due(now))
        if is_beat or self._record.is_finished:
            self._judge.hear(0, self._record.report(), now)
        if self._judge.all_finished:
            self._tell({"kind": "together"})
            self._together.set()
            return
        if not is_beat or any(n.gone for n in self._neighbours.values()):
            return
        found = self._judge.judge(now)
        if isinstance(found, Verdict):
            self._decide(found)
        elif found is not None and found.ends:
            self._decide(Verdict(0, found.text))
        elif found is not None:
            self._tell({"kind": "warning", "text": found.text})
            self._warn(found.text)

    def _decide(self, verdict: Verdict) -> None:
        """Accepts the first verdict only: tells all ranks, and ends this process."""
        with self._lock:
            if self._verdict is not None:
                return
            self._verdict = verdict
        if self._rank == 0:
            self._tell({"kind": "verdict", "rank": verdict.rank, "text": verdict.text})
        self._decided.set()
        if not (self._failing and verdict.rank == self._rank):
            self._end(verdict, ENDED_BY_PEER)

    def _end(self, verdict: Verdict | None, code: int) -> None:
        """Ends this process, printing the verdict of another rank if given."""
        self._leaving.acquire()  # never released: a second thread must not print as well
        if verdict is not None:
            print(f"opensmp: rank {self._rank} ends: {verdict}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._leave(code)

    def _warn(self, text: str) -> None:
        print(f"opensmp: rank {self._rank} warns: {text}", file=sys.stderr, flush=True)

    def _tell(self, message: Message) -> None:
        self._send_to_all(as_text(message), seconds=1.0)

    def _send_to_all(self, text: bytes, seconds: float = 0.0) -> None:
        for neighbour in self._neighbours.values():
            if not neighbour.gone:  # `_hear` notices it
                with contextlib.suppress(OSError):
                    neighbour.channel.send_text(text, seconds)

    def _let_go(self) -> None:
        """In a forked child: closes the connections, which must end with the parent."""
        for neighbour in self._neighbours.values():
            with contextlib.suppress(OSError):
                os.close(neighbour.channel.fileno())
        self._arrivals.close()


_GONE = "it ended without notice: it was killed, as by a signal or for want of memory, or crashed"

_watch: Watch | None = None


def watch(
    rank: int, machines: Sequence[str], channels: Mapping[int, Channel], idle_seconds: float
) -> Watch:
    """Creates and starts the watch of this process; `machines` are those of all ranks."""
    global _watch
    _watch = Watch(
        rank, channels, waits, idle_seconds=idle_seconds, size=len(machines), machines=machines
    )
    _watch.start()
    return _watch


def fail(message: str) -> None:
    """Ends this process and all others of the run. Does nothing in a process that runs alone."""
    if _watch is not None:
        print(f"opensmp: this rank fails: {message}", file=sys.stderr, flush=True)
        _watch.fail(message)
