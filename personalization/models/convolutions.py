"""Convolutions of few positions with large weights, on a CPU, as products of matrices.

PyTorch's kernels first bring the weight of a convolution into a layout of their own. At the inner levels of a UNet,
where a hundred positions meet ten million weights, that takes longer than the product, and a layer that is dequantized
for each pass cannot keep it.
"""

import torch
import torch.nn.functional as F


FEW = 256  # positions of all examples; with more, PyTorch's own is as fast (Xeon with AMX, float32 and bfloat16)
LARGE = 2**20  # numbers of a weight


def conv2d(input, weight, bias, stride, padding, dilation, groups):
    """`F.conv2d` of `[B, C, h, w]` by `[O, C, k, l]`, all options given: `[B, O, h', w']`."""
    options = stride, padding, dilation
    if type(input) is not torch.Tensor or not is_large(weight, groups):
        return F.conv2d(input, weight, bias, *options, groups)
    height, width = (
        (side + 2 * pad - spread * (reach - 1) - 1) // move + 1
        for side, reach, move, pad, spread in zip(input.shape[2:], weight.shape[2:], *options)
    )
    if len(input) * height * width > FEW:
        return F.conv2d(input, weight, bias, *options, groups)
    columns = F.unfold(input, weight.shape[2:], dilation, padding, stride)  # [B, C k l, h' w']
    columns, rows = columns.transpose(0, 1).flatten(1), weight.flatten(1)
    output = rows @ columns if bias is None else torch.addmm(bias[:, None], rows, columns)
    return output.view(len(weight), len(input), height, width).transpose(0, 1).contiguous()


def input_gradient(shape, weight, gradient, stride, padding, dilation, groups):
    """Of an output's gradient `[B, O, h', w']`, that of the input, whose shape is given."""
    positions = len(gradient) * gradient.shape[2] * gradient.shape[3]
    if not is_large(weight, groups) or positions > FEW:
        return torch.nn.grad.conv2d_input(shape, weight, gradient, stride, padding, dilation, groups)
    columns = weight.flatten(1).T @ gradient.transpose(0, 1).flatten(1)  # [C k l, B h' w']
    columns = columns.unflatten(1, (len(gradient), -1)).transpose(0, 1)
    return F.fold(columns, shape[2:], weight.shape[2:], dilation, padding, stride)


def is_large(weight, groups):
    """Whether the layout of a weight may cost more than its product, and a product of matrices can be had."""
    return (
        weight.is_cpu
        and weight.numel() >= LARGE
        and groups == 1
        and weight.is_contiguous()
        and weight.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
    )
