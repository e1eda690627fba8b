"""Backpropagation through windows of pictures, with the rest of them as it was in a forward pass without a graph.

A UNet's prediction in a window depends on what lies around it in three ways: convolutions reach over its edge, group
norms average over the whole picture, and self-attention looks everywhere. A forward pass on the whole picture keeps
just that: the pixels next to the window, two numbers for each group, the tokens outside. With it, the UNet on the
window alone predicts exactly what it predicts there on the whole picture, and autograd keeps the activations of a
window; what is made of them and the surroundings is made again in the backward pass. The gradient is that of the
window's part of the loss, but for ways that leave the window and come back.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention, SpatialNorm
from diffusers.models.normalization import AdaGroupNorm
from torch.utils.checkpoint import checkpoint

from ..data.examples import to_device
from ..errors import InputError


def tile_starts(length, side, grid):
    """Where the fewest windows that cover a length start, evenly spaced on the grid: they meet, or overlap a bit."""
    count = math.ceil(length / side)
    return [i * (length - side) // (max(1, count - 1) * grid) * grid for i in range(count)]


def evening(length, side, grid):
    """What makes up for entries that lie in several windows of `tile_starts`: float32 `[length]`, mean 1 over them.

    Of windows drawn alike, an entry is seen in proportion to how many it lies in; weighed with this, as often as all.
    """
    starts, seen = tile_starts(length, side, grid), torch.zeros(length)
    for start in starts:
        seen[start : start + side] += 1
    return len(starts) * side / length / seen


class Windows(NamedTuple):
    """A square of each of b pictures; lengths in entries of their latents."""

    corners: list  # b times (top, left)
    side: int
    height: int  # of the pictures
    width: int

    def shrunk(self, factor):
        """As they lie in feature maps that are smaller by a factor."""
        corners = [(top // factor, left // factor) for top, left in self.corners]
        return Windows(corners, self.side // factor, self.height // factor, self.width // factor)

    def of(self, pictures, margin=0):
        """The windows `[b, C, side, side]` of `[b, C, height, width]`, and `margin` entries on each side of them.

        Beyond the picture they are zero.
        """
        found = []
        for picture, (top, left) in zip(pictures, self.corners):
            top, left, bottom, right = top - margin, left - margin, top + self.side + margin, left + self.side + margin
            missing = max(-left, 0), max(right - self.width, 0), max(-top, 0), max(bottom - self.height, 0)
            found.append(F.pad(picture[:, max(top, 0) : bottom, max(left, 0) : right], missing))
        return torch.stack(found)

    def outside(self):
        """Where, row by row, the entries lie that are outside the windows: `[b, height · width - side²]`."""
        outside = torch.ones(len(self.corners), self.height, self.width, dtype=torch.bool)
        for one, (top, left) in zip(outside, self.corners):
            one[top : top + self.side, left : left + self.side] = False
        return outside.flatten(1).nonzero()[:, 1].view(len(outside), -1)


def check_pictures(side, pictures):
    """Raises an `InputError` unless windows of `side` pixels fit into all `Picture`s."""
    shortest = min(min(picture.pixels.shape[1:]) for picture in pictures)
    if side > shortest:
        raise InputError(
            f"--low_resolution {side} is the side of windows and one of a picture is {shortest} px: give at most that."
        )


def check_layers(unet, instead="scaled"):
    """Raises an `InputError` unless it is known of all layers of a UNet what they need of a window's surroundings."""
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            known = (module.kernel_size, module.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
            known = known and module.dilation == (1, 1) and module.padding_mode == "zeros"
        else:
            known = not isinstance(module, (torch.nn.ConvTranspose2d, AdaGroupNorm, SpatialNorm))
        if not known:
            raise InputError(
                f"--bp_view window cannot be used with this model, whose UNet has a layer of another kind"
                f" ({name!r}, {type(module).__name__}): give --bp_view {instead}."
            )


class Surroundings:
    """What the UNet's layers have kept of the surroundings of windows.

    Args:
        unet: `UNet2DConditionModel` of Stable Diffusion; adapters are in it already.
        side: of the windows, in latents; a multiple of the UNet's own scaling.
    """

    def __init__(self, unet, side):
        self.side, self.grid = side, 2 ** (len(unet.config.block_out_channels) - 1)
        self.windows, self.stage, self.convolutions, self.hooks = None, None, [], []
        self.places = {}  # of the tokens outside the windows, by how much smaller the feature map is
        for module in list(unet.modules()):
            if getattr(module, "padding", 0) == (1, 1):
                self.convolutions.append(module)
                self._watch(module, Edge(self))
            elif isinstance(module, torch.nn.GroupNorm):
                self._watch(module, Statistics(self))
            elif isinstance(module, Attention) and not module.is_cross_attention:
                attention = SelfAttention(self)
                self._watch(module, attention)
                for projection in (module.to_k, module.to_v):
                    self._watch(projection, Joined(self, attention))

    def _watch(self, module, hook):
        self.hooks.append(hook)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "window")

    def draw_windows(self, latents, generator):
        """`Windows` of latents `[b, C, height, width]`, on the grid of the UNet's smallest feature map.

        They are tiles of the pictures, each drawn as often as the others. Any other way to draw windows within a
        picture sees its middle more often than its corners: only one window reaches a corner.
        """
        corners, (height, width) = [], latents.shape[2:]
        for length in (height, width):
            starts = tile_starts(length, self.side, self.grid)
            picks = torch.randint(len(starts), (len(latents),), generator=generator)
            corners.append([starts[pick] for pick in picks.tolist()])
        return Windows(list(zip(*corners)), self.side, height, width)

    def weigh(self, weights, windows):
        """Weights of errors `[b, 1, height, width]` (or `[b, 0]`: none) in windows, so that all entries count alike.

        Where tiles meet edge to edge they do so by themselves; where they overlap, less is made of each.
        """
        rows, columns = (evening(length, self.side, self.grid) for length in (windows.height, windows.width))
        even = (rows[:, None] * columns).sqrt()  # errors are multiplied, and then squared
        if weights.numel():
            return windows.of(weights * to_device(even, weights.device))
        if (even == 1).all():
            return weights
        return windows.of(to_device(even, weights.device).expand(len(windows.corners), 1, -1, -1))

    def part(self, batch, windows):
        """What windows see of a `Batch`."""
        weights = self.weigh(batch.weights, windows)
        latents, target = windows.of(batch.noisy_latents), windows.of(batch.target)
        return batch._replace(noisy_latents=latents, target=target, weights=weights)

    @contextlib.contextmanager
    def kept(self, windows):
        """Forward passes in here are of whole pictures and keep what `windows` will need; without a graph, please."""
        self.windows, self.stage, self.places = windows, "keep", {}
        try:
            yield
        finally:
            self.stage = None

    @contextlib.contextmanager
    def standing_in(self):
        """Forward and backward passes in here are of the windows that were last kept."""
        self.stage = "stand in"
        for convolution in self.convolutions:
            convolution.padding = (0, 0)  # the edge is real
        try:
            yield
        finally:
            self.stage = None
            for convolution in self.convolutions:
                convolution.padding = (1, 1)
            for hook in self.hooks:
                hook.kept = None


class Keeper(ModelHook):
    """Keeps of a layer what the windows will need: in `kept`, if anything."""

    def __init__(self, surroundings):
        super().__init__()
        self.surroundings, self.kept = surroundings, None


class Edge(Keeper):
    """Of a 3 x 3 convolution: the pixels next to the windows, which are zero beyond the picture."""

    def pre_forward(self, module, pixels):
        if self.surroundings.stage == "keep":
            windows = self.surroundings.windows
            around = windows.shrunk(windows.height // pixels.shape[2]).of(pixels, margin=1)
            edges = around[:, :, :1], around[:, :, -1:], around[:, :, 1:-1, :1], around[:, :, 1:-1, -1:]
            self.kept = [edge.clone() for edge in edges]
        elif self.surroundings.stage == "stand in":
            above, below, left, right = self.kept
            pixels = torch.cat([above, torch.cat([left, pixels, right], dim=3), below], dim=2)
        return (pixels,), {}


class Statistics(Keeper):
    """Of a group norm: mean and variance of every group over the whole picture."""

    def new_forward(self, module, pixels):
        if self.surroundings.stage is None:
            return self.fn_ref.original_forward(pixels)
        if self.surroundings.stage == "keep":
            groups = pixels.float().reshape(len(pixels), module.num_groups, -1)
            variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
            self.kept = mean, variance, groups.shape[2]
            return self.fn_ref.original_forward(pixels)
        return checkpoint(self._normalize, module, pixels, use_reentrant=False)

    def _normalize(self, module, pixels):
        # Their values are those of the whole picture; their derivatives, what the window adds to them.
        groups, (mean, variance, count) = pixels.float().reshape(len(pixels), module.num_groups, -1), self.kept
        variance = variance + change((groups - mean).square().sum(dim=2, keepdim=True) / count)
        mean = mean + change(groups.sum(dim=2, keepdim=True) / count)
        normed = ((groups - mean) * (variance + module.eps).rsqrt()).view_as(pixels)
        weight, bias = (one.view(-1, *[1] * (pixels.dim() - 2)) for one in (module.weight, module.bias))
        return (normed * weight + bias).to(pixels.dtype)


def change(value):
    """Zero, with the derivatives of `value`."""
    return value - value.detach()


class SelfAttention(Keeper):
    """The tokens outside the windows; what is made of them is made again in the backward pass."""

    def new_forward(self, module, tokens, **options):
        if self.surroundings.stage == "keep":
            windows = self.surroundings.windows
            factor, places = round((windows.height * windows.width / tokens.shape[1]) ** 0.5), self.surroundings.places
            if factor not in places:  # the host finds them and does not wait for the device
                places[factor] = to_device(windows.shrunk(factor).outside(), tokens.device)
            self.kept = tokens.gather(1, places[factor][:, :, None].expand(-1, -1, tokens.shape[2]))
        elif self.surroundings.stage == "stand in":
            return checkpoint(self.fn_ref.original_forward, tokens, use_reentrant=False, **options)
        return self.fn_ref.original_forward(tokens, **options)


class Joined(Keeper):
    """Keys or values, of the window's tokens and those outside."""

    def __init__(self, surroundings, attention):
        super().__init__(surroundings)
        self.attention = attention

    def pre_forward(self, module, tokens):
        if self.surroundings.stage == "stand in":
            tokens = torch.cat([tokens, self.attention.kept], dim=1)  # in any order: attention does not know places
        return (tokens,), {}
