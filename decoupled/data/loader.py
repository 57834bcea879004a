"""Mini-batches of any data set, read by worker processes. Order and random numbers depend only on the seed.

torchdata's StatefulDataLoader keeps one random state per worker process. It resumes only with the same number of
workers, and its transforms draw other random numbers unless the data set saves their random state. Here, the random
numbers of a sample come from (seed, epoch, index). So the number of workers does not matter, and a checkpoint only
needs the place in the epoch.
"""

import atexit
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import zlib
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, default_collate

from decoupled.data.batches import mix_seed
from decoupled.errors import InputError


class Loader:
    """The mini-batches (inputs, labels) of ``dataset`` on ``device``. decoupled.data.batches describes their interface.

    dataset      map-style: len(dataset), and dataset[index] is (input, label), each a tensor, array or number. Random
                 transforms belong here. If it raises an InputError, the run ends with that message
    batch_size   total over all ``replicas``; the last mini-batch is smaller unless ``drop_last``
    shuffle      whether each epoch has a new order and new random numbers. Otherwise all epochs are the same, as needed
                 for evaluation
    workers      number of processes that read samples; 0: this process reads them
    collate      a function that turns a list of samples into (inputs, labels); default: PyTorch's default_collate
    limit        the largest number of mini-batches in an epoch
    replica      this process gets share ``replica`` of ``replicas`` of each mini-batch
    fingerprint  an integer that identifies the data set. A run resumes only with the same one. By default it is
                 computed from three samples
    description  names the data in the log
    form         the decoupled.data.images.InputForm that other images need for the same network

    The random numbers of a sample (Python's, NumPy's and PyTorch's) come from (``seed``, epoch, index); those of
    ``collate`` from (``seed``, epoch, index of the first sample). ``weight`` is the weight of the latest share's mean
    loss in the mean over replicas.
    """

    def __init__(
        self,
        dataset,
        batch_size,
        *,
        shuffle=False,
        seed=1,
        workers=0,
        device="cpu",
        collate=default_collate,
        drop_last=False,
        limit=None,
        replica=0,
        replicas=1,
        fingerprint=None,
        description=None,
        form=None,
    ):
        count = len(dataset)
        if count == 0:
            raise InputError(f"{type(dataset).__name__} has no samples")
        if drop_last:
            full = count // batch_size
            limit = full if limit is None else min(full, limit)
        self.samples = Samples(dataset, seed, collate)
        self.sampler = ShareSampler(count, batch_size, shuffle, seed, replica, replicas, limit)
        self.device = torch.device(device)
        self.form = form
        self.description = description or f"{count} samples of {type(dataset).__name__}"
        self.fingerprint = self.samples.fingerprint() if fingerprint is None else fingerprint
        self.done = len(self.sampler)  # completed mini-batches of this epoch; all of them before the first epoch
        self.weight = 1.0
        self.loader = DataLoader(
            self.samples,
            batch_sampler=self.sampler,
            collate_fn=do_nothing,  # the samples are already collated
            pin_memory=self.device.type == "cuda",
            **worker_options(workers),
        )

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        self.begin()
        return self.rest()

    def begin(self):
        """Begins a new epoch."""
        self.sampler.epoch += 1
        self.done = 0

    def rest(self):
        """Iterates over the rest of the current epoch."""
        if self.done == len(self):
            return
        self.sampler.start = self.done
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise batch
            inputs, labels = batch
            self.weight = count_samples(inputs) * self.sampler.replicas / self.sampler.size(self.done)
            self.done += 1
            yield self.prepare(inputs), tree_map(self.to_device, labels)

    def prepare(self, inputs):
        """The collated ``inputs`` as the network needs them."""
        return tree_map(self.to_device, inputs)

    def to_device(self, tensor):
        """``tensor`` on the device; tensors with four dimensions, such as images, in channels-last memory."""
        memory_format = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(self.device, non_blocking=True, memory_format=memory_format)

    @property
    def example(self):
        """A mini-batch of two samples."""
        inputs, labels = self.samples.collated([0, len(self.samples) - 1])
        return self.prepare(inputs), tree_map(self.to_device, labels)

    @property
    def outline_arguments(self):
        """The first three arguments of the decoupled.data.batches.Outline of these mini-batches."""
        return self.sampler.count, self.sampler.batch_size, len(self)

    @property
    def common(self):
        """The number of mini-batches of which every replica has a share."""
        if self.sampler.batch_size < self.sampler.replicas:
            return 0
        full, rest = divmod(self.sampler.count, self.sampler.batch_size)
        return full + (rest >= self.sampler.replicas)

    def close(self):
        """Ends the worker processes, which the loader keeps between epochs. They exit once no iterator refers
        to them.
        """
        self.loader = None

    def __str__(self):
        return self.description

    def state_dict(self):
        return {"fingerprint": self.fingerprint, "epoch": self.sampler.epoch, "place": self.done}

    def load_state_dict(self, state):
        if state["fingerprint"] != self.fingerprint:
            raise InputError(f"the checkpoint is from a run on other data than these {self}: use that run's data")
        if not 0 <= state["place"] <= len(self):
            raise InputError(
                f"the checkpoint is {state['place']} mini-batches into an epoch, which has only {len(self)} here: use "
                "its batch size"
            )
        self.sampler.epoch = state["epoch"]
        self.done = state["place"]


def count_samples(inputs):
    return len(tree_leaves(inputs)[0])


def do_nothing(batch):
    return batch


# Samples and their order


class Samples(Dataset):
    """``samples[epoch, index]`` is ``dataset[index]`` with the random numbers of that ``epoch``."""

    def __init__(self, dataset, seed, collate):
        self.dataset = dataset
        self.seed = seed
        self.collate = collate

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        with random_numbers(mix_seed(self.seed, epoch, index)):
            return self.dataset[index]

    def __getitems__(self, keys):
        """Called by a DataLoader: a mini-batch, or the InputError that ends the run, because a worker cannot raise it
        in the training process.
        """
        try:
            samples = [self[key] for key in keys]
        except InputError as error:
            return error
        epoch, first_index = keys[0]
        with random_numbers(
            mix_seed(self.seed, epoch, first_index, 1)
        ):  # 1: different random numbers than the sample's
            return self.collate(samples)

    def collated(self, indices):
        """A mini-batch of the samples ``indices``, outside any epoch. Raises InputError if the data set does."""
        batch = self.__getitems__([(0, index) for index in indices])
        if isinstance(batch, InputError):
            raise batch
        return batch

    def fingerprint(self):
        """A checksum of the number of samples and of the first, middle and last sample."""
        last = len(self) - 1
        checksum = len(self)
        for index in (0, last // 2, last):
            for value in tree_leaves(self[0, index]):
                checksum = zlib.crc32(np.ascontiguousarray(np.asarray(value)).tobytes(), checksum)
        return checksum


@contextmanager
def random_numbers(seed):
    """Seeds Python's, NumPy's and PyTorch's random numbers with ``seed`` inside the block, and restores their states
    afterwards.
    """
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002  the ones transforms use
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        python_state, numpy_state, torch_state = before
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


class ShareSampler:
    """A batch sampler: the keys (epoch, index) of this process's share of each mini-batch, starting at mini-batch
    ``start``.

    Each mini-batch of a single process is divided into as many runs of nearly equal length as there are ``replicas``.
    With ``shuffle``, mini-batches come in a new order every epoch; otherwise in order, with the keys of epoch 0.
    """

    def __init__(self, count, batch_size, shuffle, seed, replica=0, replicas=1, limit=None):
        self.count = count
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.replica = replica
        self.replicas = replicas
        self.limit = limit  # number of mini-batches per epoch
        self.epoch = 0
        self.start = 0

    def __len__(self):
        count = -(-self.count // self.batch_size)
        if self.limit is None:
            return count
        return min(count, self.limit)

    def size(self, index):
        """The number of samples in mini-batch ``index``, over all replicas."""
        return min(self.batch_size, self.count - index * self.batch_size)

    def __iter__(self):
        epoch = self.epoch if self.shuffle else 0
        if self.shuffle:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mix_seed(self.seed, epoch)))
        else:
            order = torch.arange(self.count)
        for batch in order.split(self.batch_size)[self.start : len(self)]:
            share = batch.tensor_split(self.replicas)[self.replica]
            if len(share):
                yield [(epoch, index) for index in share.tolist()]


# Worker processes


def worker_options(workers):
    """The DataLoader's arguments for this number of worker processes. Raises InputError if they could not send
    tensors.
    """
    if workers == 0:
        return {}
    check_sockets()
    ending = multiprocessing.Value("b", 0, lock=False)  # set when the training process ends
    atexit.register(setattr, ending, "value", 1)
    return {"num_workers": workers, "persistent_workers": True, "worker_init_fn": partial(ignore_signals, ending)}


def check_sockets():
    """Raises InputError if workers could not open the sockets through which they send tensors: each would print a
    traceback, and the run would wait forever. A socket's path has at most 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="pymp-") as folder, socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(os.path.join(folder, "listener-abcdefgh"))  # as long as the names that multiprocessing generates
        except OSError as error:
            raise InputError(
                f"TMPDIR {tempfile.gettempdir()} is too long for the sockets of worker processes ({error}): "
                "set TMPDIR to a short path such as /tmp, or pass --workers 0"
            ) from error


def ignore_signals(ending, worker):
    """Makes a worker ignore Ctrl-C and, until ``ending`` is set, SIGTERM: the signals are meant for the training
    process, which needs its workers until the mini-batch is finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if ending.value else None)
