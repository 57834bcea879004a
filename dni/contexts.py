"""What interfaces read from around them: the synthesizers' context, and whether back-propagation waits.

Both are context variables: a thread neither sees nor disturbs another's, and a new one starts without any.
"""

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

_context = ContextVar("dni synthesizer context", default=None)
_deferred = ContextVar("dni deferred back-propagation", default=None)


@contextmanager
def synthesizer_context(context):
    """Gives ``context``, such as one-hot labels (B, classes), to every synthesizer that runs inside the block; None
    gives none.

    Nests: the innermost counts, and the one around it is back after the block, also when an exception ends it.
    """
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


def current_context():
    """What the innermost synthesizer_context of this thread gives; None outside of any."""
    return _context.get()


@contextmanager
def defer_backward():
    """Collects all that is given to ``dni.backward`` inside the block, by interfaces too, and back-propagates it in one
    pass at its end.

    Needed where gradients start from several tensors of one graph, as a loss and the last hidden state of a recurrent
    network: a first backward pass would free the graph for the second. When an exception ends the block, nothing is
    back-propagated. Raises RuntimeError when nested.
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
        _propagate(*zip(*collected, strict=True))


def backward(tensor, gradient=None):
    """Back-propagates ``gradient`` (of the tensor's shape; None: ones) from ``tensor``: at once, or at the end of the
    enclosing defer_backward.

    Use it for the loss too inside defer_backward. Raises RuntimeError when ``tensor`` needs no gradient, when the
    shapes differ, and inside a transform of torch.func, which has no backward pass.
    """
    refuse_transforms()
    if not tensor.requires_grad:
        raise RuntimeError("dni.backward: nothing to back-propagate into, the tensor does not require a gradient")
    # Under autocast the two may differ in precision
    gradient = torch.ones_like(tensor) if gradient is None else gradient.to(tensor.dtype)
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
    """Raises RuntimeError inside torch.func.grad, vmap and the like: they allow no backward pass, and hide from the
    layers below that they are to learn.
    """
    if torch._C._are_functorch_transforms_active():  # what torch.autograd.backward asks
        raise RuntimeError(
            "dni back-propagates in the forward pass, which torch.func.grad, vmap and the like do not allow: call "
            "torch.func.functional_call and backward() outside of them, or put the interface into eval mode"
        )


def _propagate(tensors, gradients):
    # Interfaces back-propagate amid the forward pass, where autocast may be on; it must not touch a backward pass,
    # whose precision the forward set.
    device = tensors[0].device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():  # meta
        torch.autograd.backward(tensors, gradients)
