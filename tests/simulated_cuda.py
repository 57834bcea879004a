"""A CUDA device where there is none: tensors that say they are on cuda:0, and are computed by the CPU.

with simulated_cuda() as gpu: ...

Inside, an operation on tensors of two devices raises DeviceError, as it would fail on a GPU. What makes the host wait
for the device is in ``gpu.syncs``, and what would be launched there in ``gpu.operations``, both by the line of this
repository that asked for it. fp16 is real: the CPU's autocast, and loss scales that see real overflows.

What it cannot show: cuDNN's kernels, the allocator, streams, NCCL, --compile, and the time anything takes.
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

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::set_"}  # may have tensors of both
SCALARS = {"aten::fill_", "aten::masked_fill", "aten::masked_fill_"}  # beside what is pointwise: take a CPU scalar
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the host must know a value
LIKE_ITSELF = {"new_tensor", "new_zeros", "new_ones", "new_full", "new_empty"}


class DeviceError(RuntimeError):
    """What a GPU would have refused."""


def place():
    """FILE:LINE (FUNCTION) of the innermost line of this repository that is being executed, tests left out."""
    frame = sys._getframe(1)
    while frame is not None:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        ours = name.startswith(f"{ROOT}/") and "site-packages" not in name and "/tests/" not in name
        if ours and not function.startswith("<"):  # a generator's line is in a function's
            return f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno} ({function})"
        frame = frame.f_back
    return "tests"


class Storages:
    """A set of storages, by address: the Python object of one may change (torch 2.9). While a weak reference is kept
    no other storage takes the address; the memory itself goes when the tensors do.
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
        except (NotImplementedError, RuntimeError, ValueError):  # it has no storage, or not yet
            return False


class SimulatedCuda:
    """The device: what lies there, and what it was asked for. Counters are by (operation, place)."""

    def __init__(self):
        self.tensors, self.pinned = Storages(), Storages()
        self.target = None  # the device of what is being made; None: that of the operands
        self.operations, self.syncs = Counter(), Counter()

    def device(self, tensor):
        return CUDA if tensor in self.tensors else CPU

    @contextmanager
    def making(self, device):
        before, self.target = self.target, device
        try:
            yield
        finally:
            self.target = before

    def wait(self, why):
        self.syncs[why, place()] += 1

    def copied(self, why, source, target, non_blocking):
        """Notes a copy between host and device. The host goes on meanwhile only when its side is pinned."""
        host = source if source not in self.tensors else target
        if not (non_blocking and host is not None and host in self.pinned):
            self.wait(why)


class Dispatch(TorchDispatchMode):
    """Sees every operation that runs, in backward passes too."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, gpu, name = kwargs or {}, self.gpu, func._schema.name
        if torch.is_inference_mode_enabled() and func is not torch.ops.aten.lift_fresh.default:
            with self:  # there, composite operations come whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor in gpu.tensors for tensor in tensors]
        if any(there):
            self.check(func, name, args, kwargs, tensors, there)
        made = any(there)
        if gpu.target is not None and (not tensors or name in COPIES):
            made = gpu.target == CUDA
        before = {tensor.untyped_storage()._cdata for tensor in tensors}
        result = func(*args, **kwargs)
        fresh = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        fresh = [leaf for leaf in fresh if leaf.untyped_storage()._cdata not in before]
        for tensor in fresh if made else ():
            gpu.tensors.add(tensor)
        # A view, and memory that nothing is written to, launch nothing.
        launches = (fresh and "empty" not in name) or (func._schema.is_mutable and name != "aten::set_")
        if (made or any(there)) and launches:
            gpu.operations[name, place()] += 1
        return result

    def check(self, func, name, args, kwargs, tensors, there):
        gpu = self.gpu
        if WAITING & set(func.tags) and name not in INDEXING:
            gpu.wait(name)
        if name == "aten::copy_" and there[0] != there[1]:
            gpu.copied(name, args[1], args[0], kwargs.get("non_blocking", len(args) > 2 and args[2]))
        if name in INDEXING and args[0] in gpu.tensors:
            indices = [index for index in args[1] if index is not None]
            if any(index not in gpu.tensors or index.dtype in (torch.bool, torch.uint8) for index in indices):
                gpu.wait(name)  # an index is sent to the device, or how much it selects must be known
            tensors = [tensor for tensor in tensors if not any(tensor is index for index in indices)]
        scalars = torch.Tag.pointwise in func.tags or name in SCALARS or name in INDEXING
        strays = [t for t in tensors if t not in gpu.tensors and not (scalars and t.dim() == 0)]
        if strays and name not in COPIES:
            shapes = [tuple(tensor.shape) for tensor in strays]
            raise DeviceError(f"{func} has tensors on cuda:0, and on cpu those of shapes {shapes}, in {place()}")
        generator = kwargs.get("generator")
        if generator is not None:
            raise DeviceError(f"{func} on cuda:0 draws from a generator of the CPU in {place()}")


class Functions(TorchFunctionMode):
    """Sees what Python calls: where devices are asked for and named."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, gpu, name = dict(kwargs or {}), self.gpu, getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        there = first is not None and first in gpu.tensors
        if name == "__get__":
            return self.attribute(getattr(getattr(func, "__self__", None), "__name__", ""), func, args, there)
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
                return 0 if there else -1
            if name in ("numpy", "__array__") and there:
                raise DeviceError(f"a tensor on cuda:0 is no numpy array, in {place()}")
            if name == "tolist" and there:
                gpu.wait(name)
                with mock.patch.object(gpu, "wait", lambda why: None):
                    return func(*args, **kwargs)
            if name == "one_hot" and there:  # it looks at its labels on the CPU only; of how many operations: see torch
                quiet = {"wait": lambda why: None, "operations": Counter()}
                with gpu.making(CUDA), mock.patch.multiple(gpu, **quiet):
                    made = func(*args, **kwargs)
                gpu.operations[name, place()] += 1
                return made
        if kwargs.get("device") is not None:
            return self.make(func, args, kwargs, name)
        if first is not None and (name in LIKE_ITSELF or (there and not hasattr(func, "__code__"))):
            with gpu.making(gpu.device(first)):  # what C++ makes on the way has its operand's device
                made = func(*args, **kwargs)
            if name in LIKE_ITSELF and there:
                gpu.tensors.add(made)
            return made
        return func(*args, **kwargs)

    def attribute(self, attribute, func, args, there):
        real = func(*args)
        answers = {"device": CUDA, "is_cuda": True, "is_cpu": False}
        return answers[attribute] if there and attribute in answers else real

    def make(self, func, args, kwargs, name):
        """A factory with a device."""
        gpu, device = self.gpu, kwargs["device"]
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise DeviceError(f"{name} on {device} draws from a generator of {generator.device} in {place()}")
        pinned = kwargs.pop("pin_memory", False)
        with gpu.making(CUDA if device.type == "cuda" else CPU):
            made = func(*args, **{**kwargs, "device": CPU})
        if device.type == "cuda":
            if name in ("tensor", "as_tensor"):
                gpu.wait(name)
            gpu.tensors.add(made)
        if pinned:
            gpu.pinned.add(made)
        return made

    def to(self, tensor, name, *args, **kwargs):
        gpu = self.gpu
        if name != "to":
            args, kwargs = (CUDA if name == "cuda" else CPU, *args), kwargs
        if args and isinstance(args[0], torch.Tensor):
            args = (gpu.device(args[0]), args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        options = {"dtype": dtype} if dtype is not None else {}
        options |= {"memory_format": layout} if layout is not None else {}
        now = gpu.device(tensor)
        if device is not None and device.type not in ("cpu", "cuda"):
            return torch.Tensor.to(tensor, device, **options)
        if device is None or device.type == now.type:
            return torch.Tensor.to(tensor, **options, copy=copy) if options or copy else tensor
        gpu.copied("to", tensor, None, non_blocking)
        with gpu.making(CUDA if device.type == "cuda" else CPU):
            return torch.Tensor.to(tensor, **{"dtype": tensor.dtype, **options}, copy=True)


class Autocast(torch.autocast):
    """torch.autocast, of the CPU where it is asked for CUDA's."""

    def __init__(self, device_type, dtype=None, *args, **options):
        simulated = device_type == "cuda"
        super().__init__(
            "cpu" if simulated else device_type, dtype or (torch.float16 if simulated else None), *args, **options
        )


def by_device(gpu, group, lists, with_indices=False):
    """What optimizers sort their tensors by."""
    groups = OrderedDict()
    for (device, dtype), found in group(lists, with_indices).items():
        first = next((tensor for tensors in found[0] for tensor in tensors if isinstance(tensor, torch.Tensor)), None)
        groups[CUDA if first is not None and first in gpu.tensors else device, dtype] = found
    return groups


@contextmanager
def simulated_cuda():
    """A SimulatedCuda, which is the only GPU inside the block."""
    gpu = SimulatedCuda()
    group = torch.optim.Optimizer._group_tensors_by_device_and_dtype
    optimizers = {"_group_tensors_by_device_and_dtype": staticmethod(partial(by_device, gpu, group))}
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
