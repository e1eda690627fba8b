"""A VAE in less memory: of a large picture its widest layers make tensors of 128 MB and more, several at a time."""

import functools

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D


STRIP_BYTES = 16 * 2**20  # of a convolution's input or output that is computed at a time


def spare_memory(vae):
    """Has a frozen VAE compute its large convolutions some rows at a time and its sums in place; returns it.

    A CPU's kernels copy the input and the output of a convolution into a layout of their own, and diffusers' blocks
    keep what went into them: of a picture of 512 px each is 128 MB in float32, where three are enough. The results are
    the same but for the last bits.
    """
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) and layer.padding_mode == "zeros":
            layer.forward = functools.partial(_convolve, layer, layer.forward)
        elif isinstance(layer, ResnetBlock2D) and _is_plain(layer):
            layer.nonlinearity = torch.nn.SiLU(inplace=True)
            layer.forward = functools.partial(_resnet, layer)
    return vae


def _is_plain(block):
    """Whether a block only adds to its input what two norms and convolutions make of it."""
    others = block.time_emb_proj, block.upsample, block.downsample
    is_silu = isinstance(block.nonlinearity, torch.nn.SiLU)
    return is_silu and block.output_scale_factor == 1 and others == (None, None, None)


def _resnet(block, pixels, temb=None):
    """As the block's own forward pass; `pixels` are those of the layer before and overwritten with the result."""
    hidden = block.conv1(block.nonlinearity(block.norm1(pixels)))
    hidden = block.norm2(hidden)
    hidden = block.conv2(block.nonlinearity(hidden))
    if block.conv_shortcut is not None:
        pixels = block.conv_shortcut(pixels)
    return pixels.add_(hidden)


def _convolve(layer, whole, pixels):
    """The result of `whole`, the layer's own forward pass, for `[b, C, h, w]`, in strips if it is large."""
    (stride, _), (padding, _), width = layer.stride, layer.padding, pixels.shape[3]
    bytes_of_row = len(pixels) * max(layer.in_channels * stride, layer.out_channels) * width * pixels.itemsize
    rows, height = max(1, STRIP_BYTES // bytes_of_row), (pixels.shape[2] + 2 * padding - 3) // stride + 1
    if rows >= height:
        return whole(pixels)
    result = pixels.new_empty(len(pixels), layer.out_channels, height, (width + 2 * padding - 3) // stride + 1)
    for first in range(0, height, rows):
        last = min(first + rows, height)
        top, bottom = first * stride - padding, (last - 1) * stride - padding + 3
        strip = pixels[:, :, max(top, 0) : bottom]
        if padding:  # beyond the picture it is zero
            strip = F.pad(strip, (0, 0, max(-top, 0), max(bottom - pixels.shape[2], 0)))
        options = {"stride": layer.stride, "padding": (0, padding), "groups": layer.groups}
        result[:, :, first:last] = F.conv2d(strip, layer.weight, layer.bias, **options)
    return result
