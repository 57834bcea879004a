"""Processes that learn at their own pace: each from a replay buffer, which a thread fills with what the process below
sends (Sec. 5.6, Algorithm 2).

 process r − 1                          process r                                  process r + 1
 learns ─▶ newest ──────▶ Inbox ─▶ replay buffer ─▶ learns ─▶ newest ──────▶ Inbox ─▶ …
          (Outbox)                                             (Outbox)
"""

import threading
import time
from datetime import timedelta

import torch
from noticeboard import Noticeboard
from replay_buffer import Sample
from torch import distributed
from turns import check_epochs

from decoupled import InputError
from decoupled.parallel.stages import Stage

# Messages instead of a mini-batch's step
MEET = -1  # all that was sent before has come
END = -2  # nothing more will come

EPOCH_OVER = -1  # why all meet, besides what Run.pending_request asks for: the slowest has finished an epoch

IDLE_SECONDS = 0.005  # pause of a process that has nothing to learn from
HEARTBEAT_SECONDS = 1.0
CLOSING_SECONDS = 3.0  # until a thread that does not end is left alone
FOREVER = timedelta(days=365)  # a process below may be as slow as it likes; heartbeats find one that hangs


class Inbox(threading.Thread):
    """Receives mini-batches of ``batch_size`` samples from process ``other`` and writes each into ``buffer`` as soon as
    it comes. ``tensor_format`` is that of the representations (decoupled.parallel.balance.TensorFormat).
    """

    def __init__(self, buffer, tensor_format, batch_size, other, group):
        super().__init__(daemon=True)
        self.buffer = buffer
        self.tensor_format = tensor_format
        self.other = other
        self.group = group
        self.step = torch.zeros((), dtype=torch.int64)
        self.labels = torch.empty(batch_size, dtype=torch.int64)
        self.packed = tensor_format.empty(batch_size, "cpu")
        self.lock = threading.Lock()  # of the buffer
        self.met = threading.Event()  # MEET has come, or there is an error
        self.received = 0  # mini-batches
        self.newest_step = 0
        self.error = None

    def run(self):
        try:
            self.receive_all()
        except RuntimeError as error:
            self.error = error
        self.met.set()

    def receive_all(self):
        """Receives until END comes."""
        while True:
            self.receive(self.step, tag=0)
            step = int(self.step)
            if step == END:
                return
            if step == MEET:
                self.met.set()
                continue
            self.receive(self.labels, tag=1)
            self.receive(self.packed, tag=2)
            with self.lock:
                self.buffer.write(self.tensor_format.unpack(self.packed), self.labels, step)
                self.newest_step = step
                self.received += 1

    def receive(self, tensor, tag):
        distributed.irecv(tensor, self.other, group=self.group, tag=tag).wait()

    def read(self):
        """(a Sample that no later write changes, its age in steps of the process below), or (None, None)."""
        with self.lock:
            sample = self.buffer.read()
            if sample is None:
                return None, None
            copy = Sample(sample.representation.clone(), sample.labels.clone(), sample.uses, sample.step)
            return copy, self.newest_step - sample.step


class Outbox(threading.Thread):
    """Sends the newest mini-batch to process ``other`` whenever that is ready for one. A mini-batch that still waits
    when a newer one is put is dropped, so ``put`` never waits.
    """

    def __init__(self, other, group):
        super().__init__(daemon=True)
        self.other = other
        self.group = group
        self.changed = threading.Condition()
        self.next = None  # the message that waits
        self.busy = False  # sending a message
        self.sent = 0  # mini-batches
        self.dropped = 0
        self.error = None

    def put(self, step, *tensors):
        """Hands over a mini-batch: its step, labels and packed representation. Or MEET or END, alone."""
        with self.changed:
            if self.next is not None:
                self.dropped += 1
            self.next = (torch.tensor(step), *tensors)
            self.changed.notify_all()

    def run(self):
        try:
            self.send_all()
        except RuntimeError as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def send_all(self):
        """Sends until END is sent."""
        message = (torch.tensor(0),)
        while message[0] != END:
            with self.changed:
                self.changed.wait_for(lambda: self.next is not None)
                message = self.next
                self.next = None
                self.busy = True
            for tag, tensor in enumerate(message):
                distributed.isend(tensor, self.other, group=self.group, tag=tag).wait()
            with self.changed:
                self.busy = False
                if len(message) > 1:
                    self.sent += 1
                self.changed.notify_all()

    def wait_until_empty(self, timeout):
        """Returns when all is sent. Raises RuntimeError when that fails or takes more than ``timeout`` seconds."""

        def is_over():
            return self.error is not None or (self.next is None and not self.busy)

        with self.changed:
            in_time = self.changed.wait_for(is_over, timeout)
        if self.error is not None:
            raise self.error
        if not in_time:
            raise RuntimeError("timed out")


class Pace:
    """How far the modules of this process have come: the mini-batches they have ``learned`` from, out of ``epochs`` ×
    ``length``, and the turns since then, in which they were ``frozen``.

    ``modules_per_process``: the number of modules in each process, which a resumed run must have again.
    """

    def __init__(self, modules_per_process, length, epochs):
        self.modules_per_process = modules_per_process
        self.length = length
        self.epochs = epochs
        self.learned = 0
        self.frozen = 0

    @property
    def learns(self):
        """Whether there are epochs left to learn."""
        return self.learned < self.epochs * self.length

    @property
    def own_epochs(self):
        """The epochs that are finished."""
        return self.learned // self.length

    def state_dict(self):
        return {
            "modules": self.modules_per_process,
            "epochs": self.epochs,
            "learned": self.learned,
            "frozen": self.frozen,
        }

    def load_state_dict(self, state):
        before = state["modules"]
        if before != self.modules_per_process:
            modules = ",".join(map(str, before))
            raise InputError(
                f"the run had {modules} modules in its {len(before)} processes, and its buffers between these: "
                f"resume with --nproc-per-node {len(before)} and --modules-per-stage {modules}"
            )
        check_epochs(state["epochs"], self.epochs, frozen=state["frozen"] > 0)
        self.learned = state["learned"]
        self.frozen = state["frozen"]


class ReplayStage(Stage):
    """A Stage that does not wait for the others while it learns. All meet only when the slowest has finished an epoch,
    to evaluate, and when the run is saved or stopped: then everything that was sent is in the buffers. In evaluation,
    representations stream through all processes.

    After ``connect``: ``waited``, the seconds in which there was nothing to learn from; ``about``, the log's line about
    the last epoch.
    """

    def connect(self, pace, images, buffer, batch_size, min_seconds=0.0, slow_down=1.0):
        """Prepares this process. All processes must call this.

        images       the ImageStream that the lowest process reads
        buffer       the replay buffer that the others read; None in the lowest
        min_seconds  that a turn takes at least
        slow_down    factor by which a turn takes longer than it would
        """
        self.pace = pace
        self.images = images
        self.batch_size = batch_size
        self.min_seconds = min_seconds
        self.slow_down = slow_down
        self.rank = self.processes.rank
        self.size = self.processes.size
        self.noticeboard = Noticeboard(self.processes)
        self.learning = False  # or evaluating
        self.epoch = 0
        self.meetings = 0
        self.about = ""
        self.counts_before = None  # at the end of the last epoch
        self.heartbeats = {}  # rank → (number of heartbeats, time of the last)
        self.last_beat = 0.0
        self.connect_threads(buffer)

    def connect_threads(self, buffer):
        """Makes the Inbox and the Outbox, where there is a process below and above."""
        groups = []
        for lower in range(self.size - 1):
            groups.append(distributed.new_group([lower, lower + 1], backend="gloo", timeout=FOREVER))
        self.inbox = None
        self.outbox = None
        if not self.lowest:
            self.inbox = Inbox(buffer, self.input_format, self.batch_size, self.rank - 1, groups[self.rank - 1])
        if not self.last:
            self.outbox = Outbox(self.rank + 1, groups[self.rank])
        self.threads = [thread for thread in (self.inbox, self.outbox) if thread is not None]

    # Turns

    def turns(self, epoch):
        """Yields once for each turn of this process, until all processes have finished ``epoch`` of their own."""
        if self.counts_before is None:  # the first turns: the buffer holds what the checkpoint held
            self.counts_before = self.counts()
            for thread in self.threads:
                thread.start()
        self.learning = True
        self.epoch = epoch
        self.heartbeats = {}
        self.waited = 0.0
        self.epoch_began = time.perf_counter()
        self.post_progress()
        while self.learning:
            self.turn_began = time.perf_counter()
            yield

    def read(self):
        """(Sample, its age in steps of the process below): the next images in the lowest process (age None), else from
        the replay buffer. (None, None), after a moment, when there is nothing to do.
        """
        sample = None
        age = None
        if self.pace.learns or self.feeds():
            if self.lowest:
                sample = self.images.read()
            else:
                sample, age = self.inbox.read()
        if sample is None:
            time.sleep(IDLE_SECONDS)
            self.waited += time.perf_counter() - self.turn_began
        return sample, age

    def feeds(self):
        """Whether a process above still learns."""
        return not self.last and not self.noticeboard.has(*(f"done {rank}" for rank in range(self.rank + 1, self.size)))

    def send(self, representation, labels, *ensemble_sum):
        """Sends what this turn has made to the replay buffer of the process above, and ends the turn. In evaluation:
        see Stage.
        """
        if not self.learning:
            super().send(representation, labels, *ensemble_sum)
            return
        self.post_progress()
        taken = time.perf_counter() - self.turn_began
        time.sleep(max(0, self.slow_down * max(taken, self.min_seconds) - taken))
        if self.outbox is not None:
            packed = self.output_format.pack(representation).cpu()
            self.outbox.put(self.pace.learned, labels.cpu(), packed)

    def post_progress(self):
        """Tells the others when this process has finished the epoch, or all its epochs."""
        if self.pace.learned >= self.epoch * self.pace.length:
            self.noticeboard.post(f"finished {self.epoch} {self.rank}")
        if not self.pace.learns:
            self.noticeboard.post(f"done {self.rank}")

    # Meetings

    def take_tag(self):
        """What the run is to do after this turn, as Stage.take_tag; if it is anything, all processes have met."""
        if not self.learning:
            return super().take_tag()
        self.look_after_others()
        reason = self.reason_to_meet()
        if reason:
            self.meet()
        if reason == EPOCH_OVER:
            self.learning = False
            self.about = self.describe_epoch()
            return 0
        return reason

    def reason_to_meet(self):
        """EPOCH_OVER, what Run.pending_request asks for, or 0. The lowest process decides and tells the others."""
        note = f"meeting {self.meetings}"
        if not self.lowest:
            return int(self.noticeboard.read(note) or 0)
        reason = self.pending_request()
        if not reason and self.noticeboard.has(*(f"finished {self.epoch} {rank}" for rank in range(self.size))):
            reason = EPOCH_OVER
        if reason:
            self.noticeboard.post(note, reason)
        return reason

    def meet(self):
        """Returns when all that was sent to this process is in its buffer, and all that it has sent has come."""
        timeout = self.processes.timeout.total_seconds()
        if self.outbox is not None:
            with self.processes.waiting(self.outbox.other):
                self.outbox.wait_until_empty(timeout)
                self.outbox.put(MEET)
                self.outbox.wait_until_empty(timeout)
        if self.inbox is not None:
            with self.processes.waiting(self.inbox.other):
                in_time = self.inbox.met.wait(timeout)
                if self.inbox.error is not None:
                    raise self.inbox.error
                if not in_time:
                    raise RuntimeError("timed out")
            self.inbox.met.clear()
        self.meetings += 1
        self.heartbeats = {}

    def look_after_others(self):
        """Raises InputError when a thread has failed, or a process has taken no turn for ``timeout`` seconds."""
        for thread in self.threads:
            if thread.error is not None:
                with self.processes.waiting(thread.other):
                    raise thread.error
        now = time.monotonic()
        if now - self.last_beat < HEARTBEAT_SECONDS:
            return
        self.last_beat = now
        for rank, count in enumerate(self.noticeboard.beat()):
            count_before, _ = self.heartbeats.get(rank, (None, None))
            if count != count_before:
                self.heartbeats[rank] = (count, now)
            _, since = self.heartbeats[rank]
            if now - since > self.processes.timeout.total_seconds():
                with self.processes.waiting(rank):
                    raise RuntimeError("timed out")

    def close(self):
        """Ends the threads, before the processes part."""
        alive = [thread for thread in self.threads if thread.is_alive()]
        if self.outbox in alive:
            self.outbox.put(END)
        for thread in reversed(alive):
            thread.join(CLOSING_SECONDS)

    # The log

    def counts(self):
        """Mini-batches that this process has learned from, received, sent and dropped since it began."""
        received = self.inbox.received if self.inbox else 0
        sent = self.outbox.sent if self.outbox else 0
        dropped = self.outbox.dropped if self.outbox else 0
        return self.pace.learned, received, sent, dropped

    def describe_epoch(self):
        """The log's line about this process's epoch: its speed, and the mini-batches that went in and out."""
        seconds = time.perf_counter() - self.epoch_began
        counts = self.counts()
        differences = [now - before for now, before in zip(counts, self.counts_before, strict=True)]
        self.counts_before = counts
        learned, received, sent, dropped = differences
        speed = learned * self.batch_size / seconds
        line = (
            f"process {self.rank}, epoch {self.epoch}: {speed:.1f} images/s, "
            f"waited {self.waited:.2f} s of {seconds:.2f}, learned from {learned}"
        )
        if not self.lowest:
            line += f", received {received}"
        if not self.last:
            line += f", sent {sent}, dropped {dropped}"
        return line
