"""Processes that learn at their own pace (Sec. 5.6, Algorithm 2). Each learns from a replay buffer, which a thread
fills with what the process below sends.

 process r − 1                          process r                                  process r + 1
 learns ─▶ newest ──────▶ Inbox ─▶ replay buffer ─▶ learns ─▶ newest ──────▶ Inbox ─▶ …
          (Outbox)                                             (Outbox)
"""

import threading
import time
from datetime import timedelta
from typing import NamedTuple

import torch
from noticeboard import Noticeboard
from replay_buffer import Sample
from torch import distributed
from turns import check_epochs

from decoupled import InputError
from decoupled.parallel.stages import Stage

# What an Outbox sends instead of a mini-batch, in place of its step
MEET = -1  # everything sent before this has arrived
END = -2  # nothing will follow

# A request, in addition to those of Run.pending_request, which are positive
EPOCH_OVER = -3  # all processes have finished the epoch

IDLE_SECONDS = 0.005  # seconds that a process pauses if it has nothing to do
HEARTBEAT_SECONDS = 1.0
CLOSING_SECONDS = 3.0  # seconds that `close` waits for each thread
FOREVER = timedelta(days=365)  # a process below may be arbitrarily slow; heartbeats detect one that hangs


class Traffic(NamedTuple):
    """How many mini-batches a process has learned from, received, sent and dropped."""

    learned: int
    received: int
    sent: int
    dropped: int


class Inbox(threading.Thread):
    """Receives mini-batches of ``batch_size`` samples from process ``other`` and writes each one to ``buffer`` as soon
    as it arrives. ``tensor_format`` describes the representations (decoupled.parallel.balance.TensorFormat).
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
        self.lock = threading.Lock()  # guards the buffer
        self.met = threading.Event()  # set when MEET has arrived or the thread has failed
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
        """Receives until END arrives."""
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

    def wait_until_met(self, timeout):
        """Waits until MEET has arrived. Raises RuntimeError if receiving fails or takes more than ``timeout``
        seconds.
        """
        in_time = self.met.wait(timeout)
        if self.error is not None:
            raise self.error
        if not in_time:
            raise RuntimeError("timed out")
        self.met.clear()

    def read(self):
        """(Sample, its staleness in steps of the process below), or (None, None) if the buffer has nothing to read.
        Later writes do not change the Sample.
        """
        with self.lock:
            sample = self.buffer.read()
            if sample is None:
                return None, None
            copy = Sample(sample.representation.clone(), sample.labels.clone(), sample.uses, sample.step)
            return copy, self.newest_step - sample.step


class Outbox(threading.Thread):
    """Sends the newest mini-batch to process ``other`` whenever the previous one has been sent. ``put`` never waits: it
    replaces a mini-batch that has not been sent yet, which is dropped.
    """

    def __init__(self, other, group):
        super().__init__(daemon=True)
        self.other = other
        self.group = group
        self.changed = threading.Condition()
        self.next = None  # the message to send next
        self.busy = False  # whether a message is being sent
        self.sent = 0  # mini-batches
        self.dropped = 0
        self.error = None

    def put(self, step, *tensors):
        """Sends a mini-batch (step, labels, packed representation), or MEET or END in place of the step, without
        tensors.
        """
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
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.next is not None)
                message = self.next
                self.next = None
                self.busy = True
            step, *tensors = message
            for tag, tensor in enumerate(message):
                distributed.isend(tensor, self.other, group=self.group, tag=tag).wait()
            with self.changed:
                self.busy = False
                if tensors:  # neither MEET nor END
                    self.sent += 1
                self.changed.notify_all()
            if step == END:
                return

    def wait_until_empty(self, timeout):
        """Waits until everything has been sent. Raises RuntimeError if that fails or takes more than ``timeout``
        seconds.
        """

        def failed_or_empty():
            return self.error is not None or (self.next is None and not self.busy)

        with self.changed:
            in_time = self.changed.wait_for(failed_or_empty, timeout)
        if self.error is not None:
            raise self.error
        if not in_time:
            raise RuntimeError("timed out")


class Pace:
    """The progress of this process's modules, which all learn in the same turns.

    learned            mini-batches that they have learned from, out of ``epochs`` × ``length``
    frozen             turns since then, in which they only computed representations
    modules_per_stage  a list with the number of modules in each process; a resumed run must have the same
    """

    def __init__(self, modules_per_stage, length, epochs):
        self.modules_per_stage = modules_per_stage
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
        """The number of epochs that these modules have finished."""
        return self.learned // self.length

    def state_dict(self):
        return {
            "modules": self.modules_per_stage,
            "epochs": self.epochs,
            "learned": self.learned,
            "frozen": self.frozen,
        }

    def load_state_dict(self, state):
        before = state["modules"]
        if before != self.modules_per_stage:
            modules = ",".join(map(str, before))
            raise InputError(
                f"the run had {modules} modules in its {len(before)} processes, and saved the buffers between them: "
                f"resume with --nproc-per-node {len(before)} and --modules-per-stage {modules}"
            )
        check_epochs(state["epochs"], self.epochs, frozen=state["frozen"] > 0)
        self.learned = state["learned"]
        self.frozen = state["frozen"]


class ReplayStage(Stage):
    """A Stage that does not wait for others while it learns. The processes meet only to evaluate, when the slowest has
    finished an epoch, and when the run is saved or stopped. By then, everything that was sent is in the buffers.
    Evaluation is the same as in Stage.

    In a script, a turn is ``read``, a step of each module, and ``end_turn``. ``epoch_summary`` is the log's line about
    the latest epoch.
    """

    def connect(self, pace, images, buffer, batch_size, min_seconds=0.0, slow_down=1.0):
        """Connects this process with those below and above. All processes must call this.

        images       the ImageStream that the lowest process learns from; the others do not use it
        buffer       the replay buffer that the others learn from; None in the lowest process
        min_seconds  the minimum duration of a turn
        slow_down    factor by which a turn of this process takes longer
        """
        self.pace = pace
        self.images = images
        self.batch_size = batch_size
        self.min_seconds = min_seconds
        self.slow_down = slow_down
        self.rank = self.processes.rank
        self.size = self.processes.size
        self.noticeboard = Noticeboard(self.processes)
        self.learning = False  # whether this process is taking turns in an epoch
        self.epoch = 0
        self.meetings = 0  # number of meetings so far
        self.epoch_summary = ""
        self.traffic_before = None  # Traffic at the end of the last epoch
        self.seen_alive = {}  # rank → (number of heartbeats, when it last rose)
        self.last_beat = 0.0
        self.connect_threads(buffer)

    def connect_threads(self, buffer):
        """Makes the Inbox, if there is a process below, and the Outbox, if there is one above."""
        groups = []
        for lower in range(self.size - 1):
            groups.append(distributed.new_group([lower, lower + 1], backend="gloo", timeout=FOREVER))
        self.inbox = None
        self.outbox = None
        if not self.lowest:
            self.inbox = Inbox(buffer, self.input_format, self.batch_size, self.rank - 1, groups[self.rank - 1])
        if not self.highest:
            self.outbox = Outbox(self.rank + 1, groups[self.rank])
        self.threads = [thread for thread in (self.inbox, self.outbox) if thread is not None]

    # Turns

    def turns(self, epoch):
        """Yields once for each turn of this process, until all processes have finished their own ``epoch``."""
        if self.traffic_before is None:  # the run begins: a checkpoint's mini-batches are already in the buffer
            self.traffic_before = self.traffic()
            for thread in self.threads:
                thread.start()
        self.learning = True
        self.epoch = epoch
        self.seen_alive = {}
        self.idle_seconds = 0.0  # seconds without anything to do
        self.epoch_began = time.perf_counter()
        self.post_progress()
        while (
            self.learning
        ):  # until take_request, called by Run.progress after each turn, finds that the epoch has ended
            self.turn_began = time.perf_counter()
            yield

    def read(self):
        """(Sample, its staleness in steps of the process below) for this turn: from the replay buffer or, in the lowest
        process, the next images, with staleness None.

        Returns (None, None) after a short pause if there is nothing to do: nothing has arrived yet, every mini-batch
        has been read as often as allowed, or the modules here and above have learned all their epochs.
        """
        sample = None
        staleness = None
        if self.pace.learns or self.feeds():
            if self.lowest:
                sample = self.images.read()
            else:
                sample, staleness = self.inbox.read()
        if sample is None:
            time.sleep(IDLE_SECONDS)
            self.idle_seconds += time.perf_counter() - self.turn_began
        return sample, staleness

    def feeds(self):
        """Whether a process above still learns."""
        if self.highest:
            return False
        above = range(self.rank + 1, self.size)
        return not self.noticeboard.has(*(f"done {rank}" for rank in above))

    def end_turn(self, representation, labels):
        """Makes the turn last as long as it should, then sends the mini-batch, ``representation`` (B, …) and ``labels``
        (B,), to the replay buffer of the process above, if there is one.
        """
        self.post_progress()
        taken = time.perf_counter() - self.turn_began
        duration = self.slow_down * max(taken, self.min_seconds)
        time.sleep(duration - taken)
        if self.outbox is not None:
            packed = self.output_format.pack(representation).cpu()
            self.outbox.put(self.pace.learned, labels.cpu(), packed)

    def post_progress(self):
        """Tells the others if this process has finished the epoch, or all its epochs."""
        if self.pace.learned >= self.epoch * self.pace.length:
            self.noticeboard.post(f"finished {self.epoch} {self.rank}")
        if not self.pace.learns:
            self.noticeboard.post(f"done {self.rank}")

    # Meetings

    def take_request(self):
        """Like Stage.take_request, after a turn. Also shows that this process is alive, raises the exceptions of its
        threads, and meets the other processes if there is a request or the epoch has ended.
        """
        if not self.learning:
            return super().take_request()
        self.check_threads()
        self.check_heartbeats()
        request = self.next_request()
        if request:
            self.meet()
        if request == EPOCH_OVER:
            self.end_epoch()
            return 0
        return request

    def next_request(self):
        """EPOCH_OVER, the request of Run.pending_request, or 0. The lowest process decides and tells the others."""
        note = f"meeting {self.meetings}"
        if not self.lowest:
            return int(self.noticeboard.read(note) or 0)
        request = self.pending_request()
        if not request and self.noticeboard.has(*(f"finished {self.epoch} {rank}" for rank in range(self.size))):
            request = EPOCH_OVER
        if request:
            self.noticeboard.post(note, request)
        return request

    def meet(self):
        """Waits until everything that was sent to this process is in its buffer, and everything that it has sent has
        arrived.
        """
        timeout = self.processes.timeout.total_seconds()
        if self.outbox is not None:
            with self.processes.waiting(self.outbox.other):
                self.outbox.wait_until_empty(timeout)
                self.outbox.put(MEET)
                self.outbox.wait_until_empty(timeout)
        if self.inbox is not None:
            with self.processes.waiting(self.inbox.other):
                self.inbox.wait_until_met(timeout)
        self.meetings += 1
        self.seen_alive = {}

    def check_threads(self):
        """Raises InputError if a thread of this process has failed."""
        for thread in self.threads:
            if thread.error is not None:
                raise self.processes.lost(thread.other) from thread.error

    def check_heartbeats(self):
        """Shows that this process is alive. Raises InputError if another one has taken no turn for ``timeout``
        seconds.
        """
        now = time.monotonic()
        if now - self.last_beat < HEARTBEAT_SECONDS:
            return
        self.last_beat = now
        self.noticeboard.beat()
        for rank, count in enumerate(self.noticeboard.heartbeat_counts()):
            if rank not in self.seen_alive or self.seen_alive[rank][0] != count:
                self.seen_alive[rank] = (count, now)
            _, since = self.seen_alive[rank]
            if now - since > self.processes.timeout.total_seconds():
                raise self.processes.lost(rank)

    def close(self):
        """Ends the threads. Call this before the process group is destroyed."""
        alive = [thread for thread in self.threads if thread.is_alive()]
        if self.outbox in alive:
            self.outbox.put(END)
        for thread in reversed(alive):
            thread.join(CLOSING_SECONDS)

    # The log

    def traffic(self):
        """The Traffic of this process since the run began."""
        received = self.inbox.received if self.inbox else 0
        sent = self.outbox.sent if self.outbox else 0
        dropped = self.outbox.dropped if self.outbox else 0
        return Traffic(self.pace.learned, received, sent, dropped)

    def end_epoch(self):
        """Ends the turns of this epoch and summarizes them for the log."""
        self.learning = False
        seconds = time.perf_counter() - self.epoch_began
        traffic = self.traffic()
        differences = [now - before for now, before in zip(traffic, self.traffic_before, strict=True)]
        self.traffic_before = traffic
        self.epoch_summary = self.describe_epoch(seconds, Traffic(*differences))

    def describe_epoch(self, seconds, traffic):
        """The log's line about an epoch that took ``seconds``, with the Traffic ``traffic``."""
        speed = traffic.learned * self.batch_size / seconds
        line = (
            f"process {self.rank}, epoch {self.epoch}: {speed:.1f} images/s, "
            f"waited {self.idle_seconds:.2f} s of {seconds:.2f}, learned from {traffic.learned}"
        )
        if not self.lowest:
            line += f", received {traffic.received}"
        if not self.highest:
            line += f", sent {traffic.sent}, dropped {traffic.dropped}"
        return line
