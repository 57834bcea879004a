"""Modules that learn at their own pace, each process's from a replay buffer that a thread of its own fills (Sec. 5.6,
Algorithm 2).
"""

import threading
import time
from datetime import timedelta

import torch
from replay_buffer import Sample
from torch import distributed

from decoupled import InputError
from decoupled.parallel.processes import GRACE
from decoupled.parallel.stages import Stage

EPOCH = (
    -1
)  # why all meet: the slowest has finished an epoch; or else what decoupled.training.run.Run.pending_request asks for
MEET, END = -1, -2  # instead of a mini-batch's step: what was sent before has all come; nothing more will
IDLE = 0.005  # seconds between looks of a process that has nothing to do
BEAT = 1.0  # seconds between looks at the others' heartbeats
FOREVER = timedelta(days=365)  # a lower module may be as slow as it likes; who hangs is found by heartbeats


class Inbox(threading.Thread):
    """Writes into ``buffer`` whatever has come from process ``other``, as soon as it comes: mini-batches of so many
    ``samples`` in the form of ``layout`` (decoupled.parallel.balance.Layout).
    """

    def __init__(self, buffer, layout, samples, other, link):
        super().__init__(daemon=True)
        self.buffer, self.layout, self.other, self.link = buffer, layout, other, link
        self.tensors = torch.zeros((), dtype=torch.int64), torch.empty(samples, dtype=torch.int64)
        self.tensors += (layout.room(samples, "cpu"),)
        self.lock, self.arrived, self.met = threading.Lock(), threading.Event(), threading.Event()
        self.received, self.newest, self.error = 0, 0, None

    def get(self, tag):
        distributed.irecv(self.tensors[tag], self.other, group=self.link, tag=tag).wait()

    def run(self):
        step, labels, packed = self.tensors
        try:
            while self.get(0) or step != END:
                if step == MEET:
                    self.met.set()
                    continue
                self.get(1)
                self.get(2)
                with self.lock:
                    self.buffer.write(self.layout.unpack(packed), labels, int(step))
                    self.received, self.newest = self.received + 1, int(step)
                self.arrived.set()
        except RuntimeError as error:
            self.error = error
        self.met.set()

    def read(self):
        """A Sample of its own, which no later write changes, or None; and its age in steps of the module below."""
        with self.lock:
            sample = self.buffer.read()
            if sample is None:
                self.arrived.clear()
                return None, None
            kept = Sample(sample.representation.clone(), sample.labels.clone(), sample.uses, sample.step)
            return kept, self.newest - sample.step


class Outbox(threading.Thread):
    """Sends the newest mini-batch to process ``other`` when that has room for it; one that came before and could not be
    sent yet is dropped, so that ``put`` waits for nobody.
    """

    def __init__(self, layout, other, link):
        super().__init__(daemon=True)
        self.layout, self.other, self.link = layout, other, link
        self.changed, self.next, self.busy = threading.Condition(), None, False
        self.sent, self.dropped, self.error = 0, 0, None

    def put(self, step, *tensors):
        """Hands over (step, labels, packed representation), or MEET or END alone."""
        with self.changed:
            self.dropped += self.next is not None
            self.next = torch.tensor(step), *tensors
            self.changed.notify_all()

    def run(self):
        try:
            going = True
            while going:
                with self.changed:
                    self.changed.wait_for(lambda: self.next is not None)
                    message, self.next, self.busy = self.next, None, True
                for tag, tensor in enumerate(message):
                    distributed.isend(tensor, self.other, group=self.link, tag=tag).wait()
                going = message[0] != END
                with self.changed:
                    self.sent, self.busy = self.sent + (len(message) > 1), False
                    self.changed.notify_all()
        except RuntimeError as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def empty(self, timeout):
        """Returns when all is sent. Raises RuntimeError where that fails, or takes longer than ``timeout`` seconds."""
        with self.changed:
            done = self.changed.wait_for(lambda: self.error or not (self.busy or self.next), timeout)
        if self.error or not done:
            raise self.error or RuntimeError("timed out")


class Pace:
    """How many mini-batches of its own the modules of one process have learned from, of ``epochs`` times ``length``;
    ``modules`` counts those of each process, which a resumed run must have again.
    """

    def __init__(self, modules, length, epochs):
        self.modules, self.length, self.epochs, self.learned, self.frozen = modules, length, epochs, 0, 0

    @property
    def learns(self):
        return self.learned < self.epochs * self.length

    @property
    def own_epochs(self):
        return self.learned // self.length

    def state_dict(self):
        return {name: getattr(self, name) for name in ("modules", "epochs", "learned", "frozen")}

    def load_state_dict(self, state):
        if state["modules"] != self.modules:
            told = ",".join(map(str, state["modules"]))
            raise InputError(
                f"the run had {told} modules in its {len(state['modules'])} processes, and its buffers between these: "
                f"resume with --nproc-per-node {len(state['modules'])} and --modules-per-stage {told}"
            )
        if state["epochs"] != self.epochs and state["frozen"]:
            raise InputError(
                f"a module has stopped learning after its epoch {state['epochs']}: resume with "
                f"--nepochs {state['epochs']}"
            )
        self.learned, self.frozen = state["learned"], state["frozen"]


class ReplayStage(Stage):
    """A Stage whose processes wait for each other only to meet: when the slowest has finished an epoch, to evaluate; to
    save; to stop. Then all that was sent has come, and is in the buffers. Evaluation streams through all processes.

    After ``connect``: ``inbox`` and ``outbox``, None in the lowest and in the last process; ``waited``, the seconds in
    which this process had nothing to learn from; ``about``, the log's line about its last epoch.
    """

    def connect(self, pace, images, buffer, samples, least=0.0, slow=1.0):
        """Prepares this process. ``images``: what the lowest reads, an ImageStream; ``buffer``: what the others do. A
        turn takes at least ``least`` seconds, and ``slow`` times as long as it would. All processes call this.
        """
        self.pace, self.stream, self.samples = pace, images, samples
        self.least, self.slow = least, slow
        self.learning, self.meetings, self.epoch = False, 0, 0
        self.before, self.about = None, ""
        self.beats, self.looked = {}, 0.0  # rank → (turns it had taken, since when)
        rank, size = self.processes.rank, self.processes.size
        links = [distributed.new_group([low, low + 1], backend="gloo", timeout=FOREVER) for low in range(size - 1)]
        self.inbox = None if self.lowest else Inbox(buffer, self.below, samples, rank - 1, links[rank - 1])
        self.outbox = None if self.last else Outbox(self.above, rank + 1, links[rank])

    def open(self):
        """Begins to receive and to send, once the buffer holds what it held."""
        if self.before is None:
            self.before = self.counts()
        for box in (self.inbox, self.outbox):
            if box is not None and not box.is_alive():
                box.start()

    # Turns

    def turns(self, epoch):
        """Yields what this process learns from, (Sample, its age in steps of the module below), turn by turn until all
        have finished ``epoch`` of their own; (None, None) in a turn in which there is nothing.
        """
        self.open()
        self.learning, self.epoch, self.beats = True, epoch, {}
        self.began, self.waited = time.perf_counter(), 0.0
        self.note_epoch()
        while self.learning:
            self.since = time.perf_counter()
            found = self.read()
            if found[0] is None:
                time.sleep(IDLE)
                self.waited += time.perf_counter() - self.since
            yield found

    def read(self):
        if not self.pace.learns and (self.last or self.processes.noted(*self.done(self.processes.rank + 1))):
            return None, None  # nobody needs what would be made of it
        return (self.stream.read(), None) if self.lowest else self.inbox.read()

    def done(self, first):
        """The notes by which the processes from ``first`` on say that they have learned enough."""
        return [f"done {rank}" for rank in range(first, self.processes.size)]

    def send(self, representation, labels, *totals):
        """Hands on what this turn has made; in evaluation as Stage does."""
        if not self.learning:
            super().send(representation, labels, *totals)
            return
        self.note_epoch()
        taken = time.perf_counter() - self.since
        time.sleep(max(0, self.slow * max(taken, self.least) - taken))
        if self.outbox is not None:
            self.outbox.put(self.pace.learned, labels.cpu(), self.above.pack(representation).cpu())

    def note_epoch(self):
        """Lets the others know how far this one is."""
        rank, pace = self.processes.rank, self.pace
        if pace.learned >= self.epoch * pace.length:
            self.processes.note(f"finished {self.epoch} {rank}")
        if not pace.learns:
            self.processes.note(f"done {rank}")

    # Meetings

    def take_tag(self):
        """What is to be done after this turn; where it is anything, after a meeting of all."""
        if not self.learning:
            return super().take_tag()
        self.look_after_others()
        asked = self.pending_request()  # counts in the lowest, whom the others tell of their signals
        name = f"meeting {self.meetings}"
        if self.lowest:
            finished = [f"finished {self.epoch} {rank}" for rank in range(self.processes.size)]
            asked = asked or EPOCH * self.processes.noted(*finished)
            if asked:
                self.processes.note(name, asked)
        else:
            asked = int(self.processes.note_of(name) or 0)
        if asked:
            self.meet()
        if asked == EPOCH:
            self.learning, self.about = False, self.account()
        return max(asked, 0)

    def meet(self):
        """Returns when all that was sent to this process is in its buffer, and all that it has sent has come."""
        timeout = self.processes.timeout.total_seconds()
        if self.outbox is not None:
            with self.processes.waiting(self.outbox.other):
                self.outbox.empty(timeout)
                self.outbox.put(MEET)
                self.outbox.empty(timeout)
        if self.inbox is not None:
            with self.processes.waiting(self.inbox.other):
                met = self.inbox.met.wait(timeout)
                if self.inbox.error or not met:
                    raise self.inbox.error or RuntimeError("timed out")
            self.inbox.met.clear()
        self.meetings, self.beats = self.meetings + 1, {}

    def look_after_others(self):
        """Raises InputError where a thread has met an error, or a process has taken no turn for ``timeout`` seconds."""
        for box in (self.inbox, self.outbox):
            if box is not None and box.error:
                with self.processes.waiting(box.other):
                    raise box.error
        now = time.monotonic()
        if now - self.looked < BEAT:
            return
        self.looked = now
        for rank, beat in enumerate(self.processes.beats()):
            before, since = self.beats.get(rank, (None, now))
            self.beats[rank] = (beat, now if beat != before else since)
            if now - self.beats[rank][1] > self.processes.timeout.total_seconds():
                with self.processes.waiting(rank):
                    raise RuntimeError("timed out")

    def close(self):
        """Lets the threads end, before the processes part."""
        if self.outbox is not None and self.outbox.is_alive():
            self.outbox.put(END)
        for box in (self.outbox, self.inbox):
            if box is not None and box.is_alive():
                box.join(GRACE)

    def counts(self):
        """Mini-batches that this process has learned from, received, sent and dropped so far."""
        received = self.inbox.received if self.inbox else 0
        sent, dropped = (self.outbox.sent, self.outbox.dropped) if self.outbox else (0, 0)
        return self.pace.learned, received, sent, dropped

    def account(self):
        """What this process did since the last epoch: its pace, and the mini-batches that went in and out."""
        seconds, counts = time.perf_counter() - self.began, self.counts()
        learned, received, sent, dropped = (now - then for now, then in zip(counts, self.before, strict=True))
        self.before = counts
        speed = f"{learned * self.samples / seconds:.1f} images/s, waited {self.waited:.2f} s of {seconds:.2f}"
        told = f"process {self.processes.rank}, epoch {self.epoch}: {speed}, learned from {learned}"
        told += "" if self.lowest else f", received {received}"
        return told if self.last else f"{told}, sent {sent}, dropped {dropped}"
