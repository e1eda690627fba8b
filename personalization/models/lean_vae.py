"""A VAE in less memory: of a large picture its widest layers make tensors of 128 MB and more, several at a time."""

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D


STRIP_BYTES = 8 * 2**20  # of a tensor that is computed at a time
MOST_STRIPS = 128  # of a layer, so that a prediction for an absurd size ends, too; larger pictures have larger ones


def spare_memory(vae):
    """Has a frozen VAE compute its large layers some rows at a time and its sums in place; returns it.

    A CPU's kernels copy the input and the output of a convolution into a layout of their own, and diffusers' blocks
    keep what went into them: of a picture of 512 px each is 128 MB in float32, where one is enough. The price is one
    of the two convolutions of a block a second time. The results are the same but for the last bits. The layers change
    their class and nothing else, so that nothing refers to itself and a part that is dropped leaves at once.
    """
    for layer in vae.modules():
        if _is_plain_convolution(layer):
            layer.__class__ = StripConv2d
        elif type(layer) is ResnetBlock2D and _is_plain_block(layer):
            layer.__class__ = InPlaceResnet
        elif type(layer) is Downsample2D and _is_plain_scaling(layer) and layer.padding == 0:
            layer.__class__ = StripDownsample2D
        elif type(layer) is Upsample2D and _is_plain_scaling(layer) and layer.interpolate:
            layer.__class__ = StripUpsample2D
    return vae


def _is_plain_convolution(layer):
    """3 x 3, with zeros or nothing around the picture."""
    if type(layer) not in (torch.nn.Conv2d, StripConv2d) or layer.padding not in ((0, 0), (1, 1)):
        return False
    return layer.kernel_size == (3, 3) and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def _is_plain_block(block):
    """Whether a block only adds to its input what two norms and convolutions make of it."""
    others = block.time_emb_proj, block.upsample, block.downsample
    is_silu = isinstance(block.nonlinearity, torch.nn.SiLU)
    normed = all(isinstance(norm, torch.nn.GroupNorm) for norm in (block.norm1, block.norm2))
    convolved = _is_plain_convolution(block.conv1) and _is_plain_convolution(block.conv2)
    return is_silu and normed and convolved and block.output_scale_factor == 1 and others == (None, None, None)


def _is_plain_scaling(layer):
    """Whether a layer that halves or doubles the side has a convolution and nothing else."""
    return layer.use_conv and layer.norm is None and _is_plain_convolution(getattr(layer, "conv", None))


class StripConv2d(torch.nn.Conv2d):
    """A convolution in strips of rows where its input or output is large."""

    def forward(self, pixels):
        (padding, _), height = self.padding, pixels.shape[2]

        def of_rows(first, last):
            return convolve(self, rows_of(pixels), height, first, last, (padding, padding))

        return in_strips(of_rows, (height + 2 * padding - 3) // self.stride[0] + 1, rows_at_a_time(self, pixels))


class StripDownsample2D(Downsample2D):
    """A convolution of stride 2 with zeros below and to the right, which are not added to the whole picture."""

    def forward(self, pixels, *args, **kwargs):
        def of_rows(first, last):
            return convolve(self.conv, rows_of(pixels), pixels.shape[2], first, last, (0, 1))

        return in_strips(of_rows, pixels.shape[2] // 2, rows_at_a_time(self.conv, pixels))


class StripUpsample2D(Upsample2D):
    """Every pixel four times and a convolution; what is repeated is never whole."""

    def forward(self, pixels, output_size=None, *args, **kwargs):
        if output_size is not None:
            return super().forward(pixels, output_size)

        def doubled(first, last):
            start = first // 2
            repeated = F.interpolate(pixels[:, :, start : (last + 1) // 2], scale_factor=2.0)
            return repeated[:, :, first - 2 * start : last - 2 * start]

        def of_rows(first, last):
            return convolve(self.conv, doubled, 2 * pixels.shape[2], first, last, (1, 1))

        return in_strips(of_rows, 2 * pixels.shape[2], max(1, rows_at_a_time(self.conv, pixels) // 2))


class InPlaceResnet(ResnetBlock2D):
    """A block whose result takes the place of its input, which is that of the layer before.

    What is between its convolutions is never whole: it is computed for its statistics, and again for the result.
    """

    def forward(self, pixels, temb=None):
        height = pixels.shape[2]
        rows = max(2, min(rows_at_a_time(layer, pixels) for layer in (self.conv1, self.conv2)))
        given = normalized(self.norm1, rows_of(pixels), height, rows)

        def between(first, last):
            return convolve(self.conv1, given, height, first, last, (1, 1))

        if rows >= height:
            between = rows_of(between(0, height))
        hidden = normalized(self.norm2, between, height, rows)

        def of_rows(first, last):
            kept = pixels[:, :, first:last]
            kept = kept if self.conv_shortcut is None else self.conv_shortcut(kept)
            return convolve(self.conv2, hidden, height, first, last, (1, 1)).add_(kept)

        return in_strips(of_rows, height, rows, pixels if self.conv_shortcut is None else None)


# What follows computes rows `first` to `last` of a picture `[b, C, h, w]`; a function of both is how a layer gets the
# rows that it needs of the layer before.


def rows_of(pixels):
    return lambda first, last: pixels[:, :, first:last]


def rows_at_a_time(layer, pixels):
    """Rows whose input and output of a convolution are no larger than a strip."""
    channels = max(layer.in_channels * layer.stride[0], layer.out_channels)
    rows = STRIP_BYTES // (len(pixels) * channels * pixels.shape[3] * pixels.itemsize)
    return max(1, rows, pixels.shape[2] // MOST_STRIPS)


def in_strips(of_rows, height, rows, place=None):
    """All rows of a picture, into `place` or a new tensor.

    `of_rows` may read two rows more than it makes, on each side, from `place` itself: a strip is written when the next
    one is computed.
    """
    waiting, start = of_rows(0, min(rows, height)), 0
    if rows >= height and place is None:
        return waiting
    place = waiting.new_empty(*waiting.shape[:2], height, waiting.shape[3]) if place is None else place
    for first in range(rows, height, rows):
        strip = of_rows(first, min(first + rows, height))
        place[:, :, start:first] = waiting
        waiting, start = strip, first
    place[:, :, start:] = waiting
    return place


def convolve(layer, given, height, first, last, zeros):
    """Rows of a 3 x 3 convolution.

    Args:
        layer: the convolution.
        given: first, last -> rows of its input.
        height: of all of its input.
        first, last: of its output.
        zeros: how many are around the input, above and left, below and right.
    """
    stride, (before, after) = layer.stride[0], zeros
    top, bottom = first * stride - before, (last - 1) * stride - before + 3
    above, below = max(-top, 0), max(bottom - height, 0)
    strip = F.pad(given(top + above, bottom - below), (before, after, above, below))
    return F.conv2d(strip, layer.weight, layer.bias, layer.stride, groups=layer.groups)


def normalized(norm, given, height, rows):
    """First, last -> rows of a group norm and its SiLU; `given` are those of its input, which it reads once before.

    Statistics are taken in float32, whatever the pictures are kept in.
    """
    means, variances, sizes = [], [], []
    for first in range(0, height, rows):
        strip = given(first, min(first + rows, height)).float().unflatten(1, (norm.num_groups, -1)).flatten(2)
        variance, mean = torch.var_mean(strip, dim=2, correction=0)
        means.append(mean)
        variances.append(variance)
        sizes.append(strip.shape[2])
    shares = torch.tensor(sizes, device=mean.device)[:, None, None] / sum(sizes)
    means, variances = torch.stack(means), torch.stack(variances)  # [strips, b, groups]
    mean = (shares * means).sum(dim=0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(dim=0)

    def of_channels(x):
        return x.repeat_interleave(norm.num_channels // norm.num_groups, dim=1)[:, :, None, None]

    scale = of_channels((variance + norm.eps).rsqrt()) * norm.weight.float()[:, None, None]
    shift = norm.bias.float()[:, None, None] - of_channels(mean) * scale

    def of_rows(first, last):
        strip = given(first, last)
        return F.silu(torch.addcmul(shift, strip.float(), scale), inplace=True).to(strip.dtype)

    return of_rows
