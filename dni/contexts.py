"""The context of synthesizers, and deferred back-propagation.

Both are context variables: each thread has its own, and a new thread starts with none.
"""

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

_context = ContextVar("dni synthesizer context", default=None)
_deferred = ContextVar("dni deferred back-propagation", default=None)


@contextmanager
def synthesizer_context(context):
    """Passes ``context``, such as one-hot labels (B, classes), to every synthesizer that runs inside the block; None
    means no context.

    Contexts nest: the innermost applies, and the outer one is restored after the block, even after an exception.
    """
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


def current_context():
    """The context of this thread's innermost synthesizer_context; None outside."""
    return _context.get()


@contextmanager
def defer_backward():
    """Collects all calls of ``dni.backward`` inside the block, including those of interfaces, and back-propagates them
    together when the block ends.

    Needed if gradients start from several tensors of one graph, such as a loss and the last hidden state of a recurrent
    network: the first backward pass would free the graph that the second one needs. If an exception ends the block,
    nothing is back-propagated. Raises RuntimeError when nested.
    """
    if _deferred.get() is not None:
        raise RuntimeError("dni.defer_backward cannot be nested: the outer block back-propagates everything at its end")
    collected = []
    token = _deferred.set(collected)
    try:
        yield
    finally:
        _deferred.reset(token)
    if collected:
        tensors, gradients = zip(*collected, strict=True)
        _propagate(tensors, gradients)


def backward(tensor, gradient=None):
    """Back-propagates ``gradient`` (default: ones), of the same shape as ``tensor``, from ``tensor``: immediately or,
    inside defer_backward, at the end of the block.

    Inside defer_backward, use it for the loss as well. Raises RuntimeError for a tensor that requires no gradient, for
    different shapes, and inside a transform of torch.func, which allows no backward pass.
    """
    refuse_transforms()
    if not tensor.requires_grad:
        raise RuntimeError("dni.backward: nothing to back-propagate into, the tensor does not require a gradient")
    if gradient is None:
        gradient = torch.ones_like(tensor)
    gradient = gradient.to(tensor.dtype)  # under autocast, the two may differ in precision
    if gradient.shape != tensor.shape:
        raise RuntimeError(
            f"dni.backward: a gradient of shape {tuple(gradient.shape)} for a tensor of shape {tuple(tensor.shape)}"
        )
    collected = _deferred.get()
    if collected is None:
        _propagate([tensor], [gradient])
    else:
        collected.append((tensor, gradient))


def refuse_transforms():
    """Raises RuntimeError inside torch.func.grad, vmap and the like, which allow no backward pass and hide whether the
    layers below require gradients.
    """
    if torch._C._are_functorch_transforms_active():  # the same check as in torch.autograd.backward
        raise RuntimeError(
            "dni back-propagates in the forward pass, which torch.func.grad, vmap and the like do not allow: call "
            "torch.func.functional_call and backward() outside of them, or put the interface into eval mode"
        )


def _propagate(tensors, gradients):
    # Interfaces back-propagate in the forward pass, where autocast may be on. It must be off in a backward pass, whose
    # precision the forward pass has set.
    device = tensors[0].device.type
    without_autocast = nullcontext()
    if torch.amp.is_autocast_available(device):  # not on the meta device
        without_autocast = torch.autocast(device, enabled=False)
    with without_autocast:
        torch.autograd.backward(tensors, gradients)
