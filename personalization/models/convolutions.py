"""Convolutions of few positions with large weights, on a CPU, as products of matrices.

PyTorch's kernels first bring the weight of a convolution into a layout of their own. At the inner levels of a UNet,
where a hundred positions meet ten million weights, that takes longer than the product, and a layer that is dequantized
for each pass cannot keep it.
"""

import torch
import torch.nn.functional as F


FEW = 256  # positions of all examples; with more, PyTorch's own is as fast (Xeon with AMX, float32 and bfloat16)
LARGE = 2**20  # numbers of a weight
MOST_BYTES = 18 * 2**20  # of columns, about as much as the copy of a slice of weights that they save


def conv2d(input, weight, bias, stride, padding, dilation, groups):
    """`F.conv2d` of `[B, C, h, w]` by `[O, C, k, l]`, all options given: `[B, O, h', w']`."""
    options = stride, padding, dilation
    if type(input) is not torch.Tensor or not has_product(weight, groups):
        return F.conv2d(input, weight, bias, *options, groups)
    height, width = (
        (side + 2 * pad - spread * (reach - 1) - 1) // move + 1
        for side, reach, move, pad, spread in zip(input.shape[2:], weight.shape[2:], *options)
    )
    if not is_small(len(input) * height * width, weight):
        return F.conv2d(input, weight, bias, *options, groups)
    columns = input.new_empty(weight[0].numel(), len(input), height * width)  # the input's values under the kernel
    for i, each in enumerate(input):
        columns[:, i] = F.unfold(each, weight.shape[2:], dilation, padding, stride)
    columns = columns.flatten(1)
    rows = weight.flatten(1)
    output = rows @ columns if bias is None else torch.addmm(bias[:, None], rows, columns)
    return output.view(len(weight), len(input), height, width).transpose(0, 1).contiguous()


def input_gradient(shape, weight, gradient, stride, padding, dilation, groups):
    """Of an output's gradient `[B, O, h', w']`, that of the input, whose shape is given."""
    positions = gradient.shape[2] * gradient.shape[3]
    if not has_product(weight, groups) or not is_small(len(gradient) * positions, weight):
        return torch.nn.grad.conv2d_input(shape, weight, gradient, stride, padding, dilation, groups)
    columns = weight.flatten(1).T @ gradient.transpose(0, 1).flatten(1)  # [C k l, B h' w']
    options = shape[2:], weight.shape[2:], dilation, padding, stride
    return torch.stack([F.fold(each, *options) for each in columns.split(positions, dim=1)])


def has_product(weight, groups):
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


def is_small(positions, weight):
    """Whether the columns of so many positions are few, and take little memory."""
    return positions <= FEW and positions * weight[0].numel() * weight.element_size() <= MOST_BYTES
