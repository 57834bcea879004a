"""FLOPs by torch.utils.flop_counter: a multiply-add is 2 FLOPs; only matrix products and convolutions count."""

from torch.utils.flop_counter import FlopCounterMode


def count_flops(step):
    """The FLOPs of ``step()``, including its backward passes."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
