"""FLOPs of a step. One multiply-add is 2 FLOPs; matrix products and convolutions count, nothing else does
(torch.utils.flop_counter).
"""

from torch.utils.flop_counter import FlopCounterMode


def count_flops(step):
    """FLOPs of ``step()``, backward passes in it included."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
