"""Batch norm over the mini-batch of all replicas, so that a run's result does not depend on how many share the work.

PyTorch's SyncBatchNorm does this on CUDA only; GlobalBatchNorm does on every device, by plain tensor operations.
"""

import torch
from torch import distributed, nn


class Sum(torch.autograd.Function):
    """The sum of a tensor over the processes of ``group``; its gradient is summed likewise, since each process's tensor
    enters every process's loss.
    """

    @staticmethod
    def forward(ctx, tensor, group):
        total, ctx.group = tensor.clone(), group
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """(b, C) or (b, C, h, w) → the same shape, normalized by mean and variance of the shares of all processes of
    ``group``, whose sizes may differ.
    """

    group = None  # all processes

    def _check_input_dim(self, below):
        pass

    def forward(self, below):
        if not self.training:
            return super().forward(below)
        shape = (1, -1) + (1,) * (below.dim() - 2)
        axes = [axis for axis in range(below.dim()) if axis != 1]
        values = below if below.dtype == torch.float64 else below.float()
        local = below.numel() // below.shape[1]
        total = Sum.apply(torch.cat([values.sum(axes), values.new_tensor([local])]), self.group)
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = values - mean.view(shape)
        # In two passes: the mean of squares less the squared mean would cancel
        variance = Sum.apply(centred.square().sum(axes), self.group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        weight = (variance + self.eps).rsqrt() * self.weight
        return (centred * weight.view(shape) + self.bias.view(shape)).to(below.dtype)


def globalize(net, device, group=None):
    """``net`` with every batch norm replaced by one over the processes of ``group``, None: all of them. It is
    SyncBatchNorm on CUDA, whose kernels are faster, else GlobalBatchNorm.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net, group)
    for module in net.modules():
        for child in module.children():
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                child.__class__, child.group = GlobalBatchNorm, group  # same parameters, buffers and settings
    return net
