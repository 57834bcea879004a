"""Simulates a CUDA device: tensors that say they are on cuda:0 but are computed on the CPU.

with simulated_cuda() as gpu: ...

Inside the block an operation on tensors of two devices raises DeviceError, since it would fail on a GPU. ``gpu.syncs``
counts what makes the host wait for the device, and ``gpu.operations`` what would be launched on it, both by the line of
this repository that caused it. fp16 is real: the CPU's autocast, and loss scales with real overflows.

It cannot show cuDNN's kernels, the allocator, streams, NCCL, --compile, or how long anything takes.
"""

import sys
from collections import Counter, OrderedDict
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch
from running import ROOT
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::set_"}  # may have tensors on both devices
SCALARS = {"aten::fill_", "aten::masked_fill", "aten::masked_fill_"}  # accept a CPU scalar, as pointwise operations do
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the host needs a value from the device
LIKE_ITSELF = {"new_tensor", "new_zeros", "new_ones", "new_full", "new_empty"}


class DeviceError(RuntimeError):
    """Raised for what would fail on a GPU."""


def place():
    """FILE:LINE (FUNCTION) of the innermost frame in this repository outside tests/."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        function = frame.f_code.co_name
        is_ours = name.startswith(f"{ROOT}/") and "site-packages" not in name and "/tests/" not in name
        if is_ours and not function.startswith("<"):  # not a comprehension: the function around it
            return f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno} ({function})"
        frame = frame.f_back
    return "tests"


class Storages:
    """A set of storages by address, because a storage's Python object may change (torch 2.9). The weak reference keeps
    the address from being used by another storage, but the memory is freed with the tensors.
    """

    def __init__(self):
        self.references = {}

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.references:
            self.references[storage._cdata] = StorageWeakRef(storage)

    def __contains__(self, tensor):
        try:
            return tensor.untyped_storage()._cdata in self.references
        except (NotImplementedError, RuntimeError, ValueError):  # it has no storage, or none yet
            return False


class SimulatedCuda:
    """The device: the tensors on it, and what it was asked to do. Counters are by (operation, place)."""

    def __init__(self):
        self.tensors = Storages()
        self.pinned = Storages()
        self.target = None  # where new tensors are created; None: on the device of the operands
        self.operations = Counter()
        self.syncs = Counter()

    def device(self, tensor):
        return CUDA if tensor in self.tensors else CPU

    @contextmanager
    def creating_on(self, device):
        before = self.target
        self.target = device
        try:
            yield
        finally:
            self.target = before

    def wait(self, why):
        self.syncs[why, place()] += 1

    def note_copy(self, why, source, target, non_blocking):
        """Notes a copy between host and device. The host need not wait if its side is pinned."""
        host = source if source not in self.tensors else target
        if not (non_blocking and host is not None and host in self.pinned):
            self.wait(why)


class Dispatch(TorchDispatchMode):
    """Sees every operation that runs, in backward passes too."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        gpu = self.gpu
        name = func._schema.name
        if torch.is_inference_mode_enabled() and func is not torch.ops.aten.lift_fresh.default:
            with self:  # composite operations are not decomposed before they arrive here
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        uses_gpu = any(tensor in gpu.tensors for tensor in tensors)
        if uses_gpu:
            self.check(func, name, args, kwargs, tensors)
        creates_on_gpu = uses_gpu
        if gpu.target is not None and (not tensors or name in COPIES):
            creates_on_gpu = gpu.target == CUDA
        before = {tensor.untyped_storage()._cdata for tensor in tensors}
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        created = [tensor for tensor in results if tensor.untyped_storage()._cdata not in before]
        if creates_on_gpu:
            for tensor in created:
                gpu.tensors.add(tensor)
        # Views and empty tensors launch nothing
        launches = (created and "empty" not in name) or (func._schema.is_mutable and name != "aten::set_")
        if (creates_on_gpu or uses_gpu) and launches:
            gpu.operations[name, place()] += 1
        return result

    def check(self, func, name, args, kwargs, tensors):
        """Raises DeviceError if the operation would fail on a GPU, and notes if the host must wait for it."""
        gpu = self.gpu
        if WAITING & set(func.tags) and name not in INDEXING:
            gpu.wait(name)
        if name == "aten::copy_":
            target, source = args[:2]
            if gpu.device(source) != gpu.device(target):
                gpu.note_copy(name, source, target, kwargs.get("non_blocking", len(args) > 2 and args[2]))
        if name in INDEXING and args[0] in gpu.tensors:
            indices = [index for index in args[1] if index is not None]
            if any(index not in gpu.tensors or index.dtype in (torch.bool, torch.uint8) for index in indices):
                gpu.wait(name)  # the index is copied to the device, or the host must know how much it selects
            tensors = [tensor for tensor in tensors if not any(tensor is index for index in indices)]
        accepts_scalars = torch.Tag.pointwise in func.tags or name in SCALARS or name in INDEXING
        on_cpu = [tensor for tensor in tensors if tensor not in gpu.tensors]
        if accepts_scalars:
            on_cpu = [tensor for tensor in on_cpu if tensor.dim() > 0]
        if on_cpu and name not in COPIES:
            shapes = [tuple(tensor.shape) for tensor in on_cpu]
            raise DeviceError(f"{func} has tensors on cuda:0, and on cpu those of shapes {shapes}, in {place()}")
        generator = kwargs.get("generator")
        if generator is not None:
            raise DeviceError(f"{func} on cuda:0 draws from a generator of the CPU in {place()}")


class Functions(TorchFunctionMode):
    """Sees every function that Python calls on tensors, and answers those that have to do with devices."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        gpu = self.gpu
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        on_gpu = first is not None and first in gpu.tensors
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            return self.get_attribute(attribute, func, args, on_gpu)
        if first is not None:
            if name in ("to", "cuda", "cpu"):
                return self.to(first, name, *args[1:], **kwargs)
            if name == "pin_memory":
                pinned = first.clone()
                gpu.pinned.add(pinned)
                return pinned
            if name == "is_pinned":
                return first in gpu.pinned
            if name == "get_device":
                return 0 if on_gpu else -1
            if name in ("numpy", "__array__") and on_gpu:
                raise DeviceError(f"a tensor on cuda:0 is no numpy array, in {place()}")
            if name == "tolist" and on_gpu:
                gpu.wait(name)
                with mock.patch.object(gpu, "wait", lambda why: None):
                    return func(*args, **kwargs)
            if name == "one_hot" and on_gpu:  # counted as one operation; only on the CPU does it look at its labels
                uncounted = {"wait": lambda why: None, "operations": Counter()}
                with gpu.creating_on(CUDA), mock.patch.multiple(gpu, **uncounted):
                    created = func(*args, **kwargs)
                gpu.operations[name, place()] += 1
                return created
        if kwargs.get("device") is not None:
            return self.create(func, args, kwargs, name)
        is_cpp = not hasattr(func, "__code__")
        if first is not None and (name in LIKE_ITSELF or (on_gpu and is_cpp)):
            with gpu.creating_on(gpu.device(first)):  # C++ creates its temporary tensors on the operand's device
                created = func(*args, **kwargs)
            if name in LIKE_ITSELF and on_gpu:
                gpu.tensors.add(created)
            return created
        return func(*args, **kwargs)

    def get_attribute(self, attribute, func, args, on_gpu):
        real = func(*args)
        answers = {"device": CUDA, "is_cuda": True, "is_cpu": False}
        return answers[attribute] if on_gpu and attribute in answers else real

    def create(self, func, args, kwargs, name):
        """Calls a function that creates a tensor on kwargs["device"]."""
        gpu = self.gpu
        device = kwargs["device"]
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise DeviceError(f"{name} on {device} draws from a generator of {generator.device} in {place()}")
        pinned = kwargs.pop("pin_memory", False)
        with gpu.creating_on(CUDA if device.type == "cuda" else CPU):
            created = func(*args, **(kwargs | {"device": CPU}))
        if device.type == "cuda":
            if name in ("tensor", "as_tensor"):
                gpu.wait(name)
            gpu.tensors.add(created)
        if pinned:
            gpu.pinned.add(created)
        return created

    def to(self, tensor, name, *args, **kwargs):
        """Tensor.to, Tensor.cuda and Tensor.cpu."""
        gpu = self.gpu
        if name == "cuda":
            args = (CUDA, *args)
        elif name == "cpu":
            args = (CPU, *args)
        if args and isinstance(args[0], torch.Tensor):
            args = (gpu.device(args[0]), args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        options = {}
        if dtype is not None:
            options["dtype"] = dtype
        if layout is not None:
            options["memory_format"] = layout
        now = gpu.device(tensor)
        if device is not None and device.type not in ("cpu", "cuda"):
            return torch.Tensor.to(tensor, device, **options)
        if device is None or device.type == now.type:
            return torch.Tensor.to(tensor, **options, copy=copy) if options or copy else tensor
        gpu.note_copy("to", tensor, None, non_blocking)
        with gpu.creating_on(CUDA if device.type == "cuda" else CPU):
            return torch.Tensor.to(tensor, **({"dtype": tensor.dtype} | options), copy=True)


class Autocast(torch.autocast):
    """torch.autocast with the CPU in place of CUDA."""

    def __init__(self, device_type, dtype=None, *args, **options):
        if device_type == "cuda":
            device_type = "cpu"
            dtype = dtype or torch.float16
        super().__init__(device_type, dtype, *args, **options)


def group_by_device(gpu, real_group, lists, with_indices=False):
    """Optimizer._group_tensors_by_device_and_dtype with the simulated device. All tensors of a group are on one."""
    groups = OrderedDict()
    for (device, dtype), group in real_group(lists, with_indices).items():
        tensors = [leaf for leaf in tree_leaves(group[0]) if isinstance(leaf, torch.Tensor)]
        if tensors and tensors[0] in gpu.tensors:
            device = CUDA
        groups[device, dtype] = group
    return groups


@contextmanager
def simulated_cuda():
    """A SimulatedCuda, which is the only GPU inside the block."""
    gpu = SimulatedCuda()
    real_group = torch.optim.Optimizer._group_tensors_by_device_and_dtype
    optimizers = {"_group_tensors_by_device_and_dtype": staticmethod(partial(group_by_device, gpu, real_group))}
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "simulated",
        "mem_get_info": lambda device=None: (1 << 36, 1 << 36),
        "synchronize": lambda device=None: None,
        "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: False,
    }
    accelerator = {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": lambda: 0,
        "device_count": lambda: 1,
        "current_stream": lambda device=None: mock.Mock(is_capturing=lambda: False),
    }
    with ExitStack() as stack:
        for owner, names in (
            (torch.cuda, cuda),
            (torch.accelerator, accelerator),
            (torch.optim.Optimizer, optimizers),
            (torch, {"autocast": Autocast}),
            (torch.amp, {"autocast": Autocast}),
        ):
            stack.enter_context(mock.patch.multiple(owner, **names))
        stack.enter_context(Dispatch(gpu))
        stack.enter_context(Functions(gpu))
        yield gpu
