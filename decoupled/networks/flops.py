"""FLOPs of a step, counted the same way everywhere in this repository. A multiply-add is 2 FLOPs; only matrix products,
convolutions, attention and recurrent layers count.

torch.utils.flop_counter has the formulas of most operators. This file adds those it lacks: attention on the CPU, the
fused operators that nn.MultiheadAttention and nn.TransformerEncoderLayer call in eval mode, and fused LSTMs and GRUs.
"""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def count_flops(step):
    """FLOPs of ``step()``, including its backward passes."""
    with flop_counter() as counter:
        step()
    return counter.get_total_flops()


def flop_counter():
    """A context manager whose ``get_total_flops()`` returns the FLOPs that have run inside it so far."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def operator_flops(operator, args, kwargs, result):
    """FLOPs of one call of a PyTorch operator, for example torch.ops.aten.mm.default, that returned ``result``."""
    formula = ALL_FORMULAS.get(operator.overloadpacket)
    if formula is None:
        return 0
    return formula(*args, **kwargs, out_val=result)


def attention_flops(query, key, value, *args, **kwargs):
    """Scores and their product with the values. Shapes: (B, heads, N, d), (B, heads, M, d), (B, heads, M, e)."""
    *batch, queries, width = query
    keys, out_width = value[-2:]
    return 2 * math.prod(batch) * queries * keys * (width + out_width)


def attention_backward_flops(gradient, query, key, value, *args, **kwargs):
    """The scores again, and one product each for the gradients of scores, values, queries and keys."""
    *batch, queries, width = query
    keys, out_width = value[-2:]
    return 2 * math.prod(batch) * queries * keys * (3 * width + 2 * out_width)


def multihead_flops(query, key, value, width, *args, **kwargs):
    """nn.MultiheadAttention. Shapes: (B, N, width), (B, M, width), (B, M, width)."""
    samples, queries = query[:2]
    keys = key[1]
    projections = 2 * samples * (2 * queries + 2 * keys) * width * width
    return projections + 4 * samples * queries * keys * width


def encoder_layer_flops(inputs, width, *args, **kwargs):
    """nn.TransformerEncoderLayer: attention and an MLP with one hidden layer. Shape: (B, N, width)."""
    first_matrix = args[12]  # ffn_weight_1: argument 14 of aten::_transformer_encoder_layer_fwd, after inputs and width
    samples, tokens = inputs[:2]
    mlp = 4 * samples * tokens * math.prod(first_matrix)
    return multihead_flops(inputs, inputs, inputs, width) + mlp


def mkldnn_rnn_flops(inputs, input_matrix, hidden_matrix, *args, **kwargs):
    """One layer and direction of an LSTM on the CPU. Shapes: (T, B, features), (4H, features), (4H, H)."""
    return 2 * math.prod(inputs[:-1]) * (math.prod(input_matrix) + math.prod(hidden_matrix))


def mkldnn_rnn_backward_flops(*args, **kwargs):
    return 2 * mkldnn_rnn_flops(*args, **kwargs)


def cudnn_rnn_flops(inputs, weights, *args, **kwargs):
    """All layers of an LSTM, GRU or RNN on CUDA. Shapes: (T, B, features), and those of its matrices and biases."""
    matrices = [math.prod(weight) for weight in weights if len(weight) == 2]
    return 2 * math.prod(inputs[:-1]) * sum(matrices)


def cudnn_rnn_backward_flops(*args, **kwargs):
    return 2 * cudnn_rnn_flops(*args, **kwargs)


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    aten._native_multi_head_attention: multihead_flops,
    aten._transformer_encoder_layer_fwd: encoder_layer_flops,
    aten.mkldnn_rnn_layer: mkldnn_rnn_flops,
    aten.mkldnn_rnn_layer_backward: mkldnn_rnn_backward_flops,
    aten._cudnn_rnn: cudnn_rnn_flops,
    aten._cudnn_rnn_backward: cudnn_rnn_backward_flops,
}

ALL_FORMULAS = flop_counter().flop_registry  # PyTorch's formulas and these
