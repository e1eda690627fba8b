"""A VAE in less memory: of a large picture its widest layers make tensors of 128 MB and more, several at a time."""

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D


STRIP_BYTES = 16 * 2**20  # of a convolution's input or output that is computed at a time


def spare_memory(vae):
    """Has a frozen VAE compute its large convolutions some rows at a time and its sums in place; returns it.

    A CPU's kernels copy the input and the output of a convolution into a layout of their own, and diffusers' blocks
    keep what went into them: of a picture of 512 px each is 128 MB in float32, where three are enough. The results are
    the same but for the last bits. The layers change their class and nothing else, so that nothing refers to itself
    and a part that is dropped leaves at once.
    """
    for layer in vae.modules():
        if type(layer) is torch.nn.Conv2d and layer.kernel_size == (3, 3) and layer.padding_mode == "zeros":
            layer.__class__ = StripConv2d
        elif type(layer) is ResnetBlock2D and _is_plain(layer):
            layer.__class__ = InPlaceResnet
            layer.nonlinearity = torch.nn.SiLU(inplace=True)
    return vae


def _is_plain(block):
    """Whether a block only adds to its input what two norms and convolutions make of it."""
    others = block.time_emb_proj, block.upsample, block.downsample
    is_silu = isinstance(block.nonlinearity, torch.nn.SiLU)
    return is_silu and block.output_scale_factor == 1 and others == (None, None, None)


class InPlaceResnet(ResnetBlock2D):
    """A block of a VAE whose result takes the place of its input, which is that of the layer before."""

    def forward(self, pixels, temb=None):
        hidden = self.conv1(self.nonlinearity(self.norm1(pixels)))
        hidden = self.norm2(hidden)
        hidden = self.conv2(self.nonlinearity(hidden))
        if self.conv_shortcut is not None:
            pixels = self.conv_shortcut(pixels)
        return pixels.add_(hidden)


class StripConv2d(torch.nn.Conv2d):
    """A 3 x 3 convolution of `[b, C, h, w]`, in strips of rows where its input or output is large."""

    def forward(self, pixels):
        (stride, _), (padding, _), width = self.stride, self.padding, pixels.shape[3]
        bytes_of_row = len(pixels) * max(self.in_channels * stride, self.out_channels) * width * pixels.itemsize
        rows, height = max(1, STRIP_BYTES // bytes_of_row), (pixels.shape[2] + 2 * padding - 3) // stride + 1
        if rows >= height:
            return super().forward(pixels)
        result = pixels.new_empty(len(pixels), self.out_channels, height, (width + 2 * padding - 3) // stride + 1)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            top, bottom = first * stride - padding, (last - 1) * stride - padding + 3
            strip = pixels[:, :, max(top, 0) : bottom]
            if padding:  # beyond the picture it is zero
                strip = F.pad(strip, (0, 0, max(-top, 0), max(bottom - pixels.shape[2], 0)))
            options = {"stride": self.stride, "padding": (0, padding), "groups": self.groups}
            result[:, :, first:last] = F.conv2d(strip, self.weight, self.bias, **options)
        return result
