"""Batch norm over the mini-batch of all processes, so that a run's result does not depend on how many share the work.

PyTorch's SyncBatchNorm does this on CUDA only; GlobalBatchNorm does on every device, by plain tensor operations.
"""

import torch
from torch import distributed, nn


class Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is summed likewise, since each process's tensor enters every
    process's loss.
    """

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """(b, C) or (b, C, h, w) → the same shape, normalized by mean and variance of all processes' shares, whose sizes
    may differ.
    """

    def _check_input_dim(self, below):
        pass

    def forward(self, below):
        if not self.training:
            return super().forward(below)
        shape = (1, -1) + (1,) * (below.dim() - 2)
        axes = [axis for axis in range(below.dim()) if axis != 1]
        values = below if below.dtype == torch.float64 else below.float()
        local = below.numel() // below.shape[1]
        total = Sum.apply(torch.cat([values.sum(axes), values.new_tensor([local])]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = values - mean.view(shape)
        # In two passes: the mean of squares less the squared mean would cancel
        variance = Sum.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        weight = (variance + self.eps).rsqrt() * self.weight
        return (centred * weight.view(shape) + self.bias.view(shape)).to(below.dtype)


def globalize(net, device):
    """``net`` with every batch norm replaced by one over all processes: SyncBatchNorm on CUDA, whose kernels are
    faster, else GlobalBatchNorm.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        for child in module.children():
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                child.__class__ = GlobalBatchNorm  # same parameters, buffers and settings
    return net
