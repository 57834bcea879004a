"""Decoupled neural interfaces (Jaderberg et al. 2017, arXiv 1608.05343) for any PyTorch model: layers that learn from
synthetic gradients.

README.md in this folder shows feed-forward, recurrent and completely unlocked networks. In the paper's terms, a message
crosses an interface, and a synthesizer predicts it from a trigger. A synthesizer is any module that is called as
``synthesizer(trigger, context)`` and returns the synthetic message.
"""

from dni.contexts import backward, defer_backward, synthesizer_context
from dni.interfaces import BackwardInterface, BidirectionalInterface, ForwardInterface, UnidirectionalInterface
from dni.synthesizers import BasicSynthesizer

__all__ = [
    "BackwardInterface",
    "BasicSynthesizer",
    "BidirectionalInterface",
    "ForwardInterface",
    "UnidirectionalInterface",
    "backward",
    "defer_backward",
    "synthesizer_context",
]
