"""Batch norm over the mini-batches of all replicas, so that results do not depend on the number of replicas.

PyTorch's SyncBatchNorm works on CUDA only; GlobalBatchNorm works on every device, with plain tensor operations.
"""

import torch
from torch import distributed, nn


class AllReduceSum(torch.autograd.Function):
    """The sum of a tensor over the processes of ``group``. Its gradient is summed as well, because each process's
    tensor contributes to the loss of every process.
    """

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        total = tensor.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """(b, C, …) → the same shape, normalized by the mean and variance over the samples of all processes of
    ``group``. Processes may have different numbers of samples.
    """

    group = None  # all processes

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        per_channel = (1, -1) + (1,) * (x.dim() - 2)  # the shape in which (C,) broadcasts over x
        axes = [axis for axis in range(x.dim()) if axis != 1]
        values = x if x.dtype == torch.float64 else x.float()
        local_count = x.numel() // x.shape[1]
        total = AllReduceSum.apply(torch.cat([values.sum(axes), values.new_tensor([local_count])]), self.group)
        count = total[-1].detach()
        mean = total[:-1] / count
        centered = values - mean.view(per_channel)
        # A second pass, because the mean of the squares minus the squared mean suffers from cancellation.
        variance = AllReduceSum.apply(centered.square().sum(axes), self.group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
        weight = (variance + self.eps).rsqrt() * self.weight
        return (centered * weight.view(per_channel) + self.bias.view(per_channel)).to(x.dtype)


def globalize(net, device, group=None):
    """Replaces every batch norm in ``net`` with one over the processes of ``group`` (None: all processes):
    SyncBatchNorm on CUDA, where its kernels are faster, GlobalBatchNorm elsewhere. Returns the network; without
    torchrun, unchanged.
    """
    if not distributed.is_initialized():
        return net
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net, group)
    for module in net.modules():
        for child in module.children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.__class__ = GlobalBatchNorm  # keeps parameters, buffers and settings
                child.group = group
    return net
