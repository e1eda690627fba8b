# Copyright 2026 The ZOODiP textual inversion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Stable Diffusion with a quantized UNet and scales that were tuned with TuneQDM (arXiv 2401.04339).

    pipeline = DiffusionPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        custom_pipeline="./tuneqdm_pipeline.py",  # or the repository of the scales: "user/scales"
        trust_remote_code=True,
        tuneqdm_scales="./my-dog-scales",  # a folder with tuneqdm_scales.safetensors, or a repository on the Hub
    )
    pipeline("a photo of sks dog on the beach").images[0].save("dog.png")
    pipeline.use_scales(False)  # the quantized base with its original scales

The UNet is quantized here exactly as it was for training: the trainer uses the quantizer and the layers of this file.
At every timestep each layer takes the set of scales that was trained there.
"""

import functools
import hashlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection


SCALES_FILE = "tuneqdm_scales.safetensors"
CONFIG_FILE = "tuneqdm_config.json"  # how a run made them, for readers
ABOUT = "tuneqdm"  # in the metadata of the file of scales: what it belongs to, as JSON
# How far the sketches of one base may lie apart, by bits: more than rounding to bfloat16 before quantization makes of
# weights with heavy tails (0.008 in INT8, 0.043 in INT4; on the demo base 0.005 and 0.028). Bases whose weights are
# 1 % apart are one by this measure (0.013 and 0.054 on the demo base): the scales of one do on the other as at home.
SAME_BASE = {8: 0.018, 4: 0.06}


# =====================================================================================================
# The quantizer: integers per output channel, asymmetric, W ≈ (W_int − z) s (TuneQDM v2, arXiv 2401.04339).
# =====================================================================================================

# How much of a channel's range the search for the least squared error tries: all of it, 98 %, ... 40 %.
SHARES = tuple(1 - i / 50 for i in range(31))


def affine(low, high, levels):
    """Scale and zero point that lay integers 0 ... levels − 1 over [low, high], where low ≤ 0 ≤ high."""
    scale = (high - low) / (levels - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round()


def to_integers(weight, scale, zero, levels):
    return (weight / scale).round_().add_(zero).clamp_(0, levels - 1)


def quantize(weight, bits, calibration="minmax"):
    """Quantizes a weight per output channel.

    Args:
        weight: `[out, ...]`, of any floating dtype.
        bits: 8 or 4.
        calibration: "minmax" lays the integers over the whole range of a channel, and 0 (so that every zero point is
            one of them, which half precision can hold); "mse" over the share of it (`SHARES`, of both ends alike) with
            the least squared error, cutting off outliers.

    Returns:
        Integers, uint8 like `weight`; scale and zero point, float32 `[out, 1, ...]`.
    """
    weight, levels = weight.float(), 2**bits
    inside = tuple(range(1, weight.dim()))
    low = weight.amin(inside, keepdim=True).clamp(max=0)
    high = weight.amax(inside, keepdim=True).clamp(min=0)
    scale, zero = affine(low, high, levels)
    if calibration == "mse":
        least = torch.full_like(scale, torch.inf)
        for share in SHARES:
            tried = affine(share * low, share * high, levels)
            error = to_integers(weight, *tried, levels).sub_(tried[1]).mul_(tried[0]).sub_(weight)
            error = error.square_().sum(inside, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return to_integers(weight, scale, zero, levels).to(torch.uint8), scale, zero


def pack(integers):
    """4-bit integers of any shape, two to a byte: the first half of them in the low bits, the second in the high."""
    flat = F.pad(integers.flatten(), (0, integers.numel() % 2))
    low, high = flat.chunk(2)
    return low | (high << 4)


def unpack(packed, out, first=0):
    """Writes what `pack` has packed, from number `first` on, into the flat tensor `out`, of any dtype; returns it."""
    half, end = len(packed), first + len(out)
    low, high = packed[first : min(end, half)], packed[max(first - half, 0) : max(end - half, 0)]
    out[: len(low)] = low & 15
    out[len(low) :] = high >> 4
    return out


def encode(weight, bits, calibration):
    """`quantize`, with the integers as a layer stores them: packed where they have 4 bits.

    Raises:
        ValueError: half a sentence; the weight holds NaN or infinity, which integers would hide.
    """
    integers, scale, zero = quantize(weight, bits, calibration)
    if not (scale.isfinite().all() and zero.isfinite().all()):
        raise ValueError("NaN or infinity")
    return (pack(integers) if bits == 4 else integers), scale, zero


# =====================================================================================================
# Sets of scales: which one is used at which timestep
# =====================================================================================================


def set_of_timestep(num_timesteps, num_sets=1, intervals=None):
    """The set that is trained and used at each timestep: LongTensor `[T]`, -1 where the original scales are.

    Args:
        num_timesteps: T of the model.
        num_sets: N; set floor(t N / T) (strategy S2 of TuneQDM v1, the "experts" of v2). 1 is PEQA.
        intervals: pairs [first, end) of timesteps; one set is used in all of them and nowhere else (S1).
    """
    timesteps = torch.arange(num_timesteps)
    if intervals is None:
        return timesteps * num_sets // num_timesteps
    inside = torch.zeros(num_timesteps, dtype=torch.bool)
    for first, end in intervals:
        inside[first:end] = True
    return inside.long() - 1


class Quantized(NamedTuple):
    """What `quantize_unet` leaves on a UNet as its attribute `tuneqdm`."""

    selection: "Selection"
    bits: int
    calibration: str


class Selection:
    """Which set of scales each example of a forward pass uses; the layers of one UNet share it, and working memory.

    Attributes:
        table: `set_of_timestep`; None while there are only the original scales.
        enabled: False brings the original scales back.
        rows: LongTensor, the set of each example `[b]` or of all `[1]`; None: the original scales.
    """

    def __init__(self):
        self.table = self.rows = None
        self.enabled, self.has_original = True, False
        self.memory = {}  # (device, dtype) -> a flat tensor, as large as the largest layer met so far

    def use(self, table):
        self.table, self.has_original = table, bool((table < 0).any())

    def before_forward(self, unet, args, kwargs):
        """The UNet's hook: chooses by its timestep, a number or a tensor `[]`, `[1]` or `[b]`; waits for no device."""
        if self.table is None or not self.enabled:
            self.rows = None
            return
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if self.table.device != sample.device:
            self.table = self.table.to(sample.device)
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).long()
        self.rows = self.table[timestep.clamp(0, len(self.table) - 1)]

    def choose(self, changes):
        """Of a layer's changes `[N, c]` those of each example: `[b, c]` or `[1, c]`, 0 at original scales; or None."""
        if changes is None or self.rows is None:
            return None
        if not self.has_original:
            return changes[self.rows]
        chosen = changes[self.rows.clamp(min=0)]
        return torch.where((self.rows < 0)[:, None], 0.0, chosen)

    def space(self, numel, dtype, device):
        """Memory that the layers dequantize into, one after the other: fresh memory would cost more than the work."""
        key = device, dtype
        if key not in self.memory or self.memory[key].numel() < numel:
            with torch.inference_mode(False):  # such a tensor may be overwritten inside and outside inference mode
                self.memory[key] = torch.empty(numel, dtype=dtype, device=device)
        return self.memory[key][:numel]


# =====================================================================================================
# Quantized layers with scales that can be trained
# =====================================================================================================

# Bytes of a dequantized weight that are there at a time: whole, the largest convolution of Stable Diffusion 1.5 has
# 118 MB in float32, and a CPU's kernels make a copy of it.
SLICE_BYTES = 2**24


def scaled(activations, change, channel):
    """Activations times 1 + change `[b or 1, c]` along dimension `channel`: as a + a·change, so that a change that
    half precision could not add to 1 counts all the same, and 0 leaves every bit as it is."""
    if change is None:
        return activations
    return torch.addcmul(activations, activations, along(change, activations, channel))


def along(values, activations, channel):
    """`[b or 1, c]` as it broadcasts over activations whose channels are dimension `channel`, in their dtype."""
    shape = [1] * activations.dim()
    shape[0], shape[channel] = values.shape
    return values.to(activations.dtype).view(shape)


PART = 2**20  # entries of activations that are multiplied at a time


def sum_products(a, b, channel, like):
    """Sums of a·b in float32 over everything but channels, and examples where `like` has one row for all.

    Part by part: a product of the whole would be as large as the activations, and in float32.
    """
    if channel == 1:
        a, b = a.flatten(2), b.flatten(2)
        parts = zip(*(x.split(max(1, PART * x.shape[1] // x.numel()), dim=1) for x in (a, b)))
        sums = torch.cat([(x.float() * y.float()).sum(dim=2) for x, y in parts], dim=1)
    else:
        a, b = (x.reshape(len(x), -1, x.shape[-1]) for x in (a, b))
        parts = zip(*(x.split(max(1, PART * x.shape[1] // x.numel()), dim=1) for x in (a, b)))
        sums = sum((x.float() * y.float()).sum(dim=1) for x, y in parts)
    return sums if len(like) == len(sums) else sums.sum(dim=0, keepdim=True)


class ScaledProduct(torch.autograd.Function):
    """y = (1 + δ_out) · W₀((1 + δ_in) · x) + bias, for a quantized layer W₀ = (W_int − z) s, a Linear or a Conv2d.

    That is the layer with weight (W_int − z) s_out s_in (TuneQDM v2, multi-channel-wise scale update) and scales
    relative to their start, s_out = s (1 + δ_out), s_in = 1 + δ_in. Because the scales act on activations, each
    example has its own; and of the weight autograd keeps nothing, `backward` dequantizes it again, for both of its
    products at once and some output channels at a time:

        ∂L/∂x = (1 + δ_in) · W₀ᵀ((1 + δ_out) · g),   ∂L/∂δ_in = Σ x · W₀ᵀ((1 + δ_out) · g),
        ∂L/∂δ_out = Σ g · W₀((1 + δ_in) · x), which is computed anew, too: kept, it would be as large as y.
    """

    @staticmethod
    def forward(ctx, input, out_change, in_change, layer):
        """input `[b, ...]`; δ_out `[b or 1, out]`, δ_in `[b or 1, in]`, or None; `QuantizedLayer`."""
        ctx.save_for_backward(input, out_change, in_change)
        ctx.layer = layer
        given = scaled(input, in_change, layer.channel)
        parts = [layer.product(given, weight) for _, weight in layer.slices(input.dtype)]
        product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=layer.channel)
        if out_change is not None:
            product.addcmul_(product, along(out_change, product, layer.channel))
        return product if layer.bias is None else product.add_(along(layer.bias[None], product, layer.channel))

    @staticmethod
    def backward(ctx, gradient):
        input, out_change, in_change = ctx.saved_tensors
        layer, channel = ctx.layer, ctx.layer.channel
        for_input, for_out, for_in, _ = ctx.needs_input_grad
        input_gradient = in_gradient = back = None
        out_gradients, given = [], scaled(input, in_change, channel) if for_out else None
        for channels, weight in layer.slices(input.dtype):
            change = None if out_change is None else out_change[:, channels]
            of_slice = gradient.narrow(channel, channels.start, len(weight))
            if for_out:
                out_gradients.append(sum_products(of_slice, layer.product(given, weight), channel, change))
            if for_input or for_in:
                part = layer.product_back(scaled(of_slice, change, channel), weight, input.shape)
                back = part if back is None else back.add_(part)
        if for_in:
            in_gradient = sum_products(input, back, channel, in_change)
        if for_input:
            input_gradient = scaled(back, in_change, channel)
        return input_gradient, torch.cat(out_gradients, dim=1) if for_out else None, in_gradient, None


class QuantizedLayer(torch.nn.Module):
    """A frozen layer with integer weights; how its scales are changed depends on the example's timestep.

    Args:
        layer: Linear or Conv2d; only its shape and its bias are used.
        bits: 8 or 4.
        selection: `Selection` of the model.

    Attributes:
        integers: uint8, like the weight, or packed two to a byte; scale, zero: float32 `[out, 1, ...]` (`encode`).
        out_change, in_change: δ `[N, out]` and `[N, in]` of the N sets, or None: the scales stay as they are.
    """

    channel = None  # the dimension of activations that counts channels
    groups = 1

    def __init__(self, layer, bits, selection):
        super().__init__()
        weight = layer.weight
        self.shape, self.bits, self.selection = weight.shape, bits, selection
        make = {"device": weight.device}
        stored = self.shape if bits == 8 else ((weight.numel() + 1) // 2,)
        per_channel = (len(weight), *[1] * (weight.dim() - 1))
        self.register_buffer("integers", torch.empty(stored, dtype=torch.uint8, **make))
        self.register_buffer("scale", torch.empty(per_channel, **make, dtype=torch.float32))
        self.register_buffer("zero", torch.empty(per_channel, **make, dtype=torch.float32))
        self.register_buffer("out_change", None, persistent=False)
        self.register_buffer("in_change", None, persistent=False)
        self.bias = layer.bias

    def _apply(self, function, recurse=True):
        """What moves a model to another dtype leaves the scales in float32, which small ones need."""
        precise = {name: getattr(self, name) for name in ("scale", "zero", "out_change", "in_change")}
        super()._apply(function, recurse)
        for name, value in precise.items():
            if value is not None and getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(self.integers.device))
        return self

    def slices(self, dtype):
        """Yields W₀, see `dequantize`, some output channels at a time: `(channels, weight)`."""
        count = len(self.scale)
        step = max(1, SLICE_BYTES * count // (self.shape.numel() * dtype.itemsize))
        if step >= count or self.groups > 1 or torch.compiler.is_compiling():
            step = count
        for first in range(0, count, step):
            channels = slice(first, min(first + step, count))
            yield channels, self.dequantize(dtype, channels)

    def dequantize(self, dtype, channels=slice(None)):
        """W₀ = (W_int − z) s of some output channels, in memory that the next weight overwrites.

        A compiler plans the memory itself.
        """
        zero, scale = self.zero[channels], self.scale[channels]
        shape = (len(zero), *self.shape[1:])
        size, first = math.prod(shape), (channels.start or 0) * self.shape[1:].numel()
        if torch.compiler.is_compiling():
            new = torch.empty(size, dtype=dtype, device=self.integers.device)
            integers = unpack(self.integers, new).view(shape) if self.bits == 4 else self.integers.to(dtype)
            return ((integers - zero).to(dtype) * scale).to(dtype)
        space = self.selection.space(size, dtype, self.integers.device)
        if self.bits == 4:
            space = unpack(self.integers, space, first).view(shape)
        else:  # as_strided rather than view keeps channels-last weights channels-last
            space = space.as_strided(shape, self.integers.stride()).copy_(self.integers[channels])
        return space.sub_(zero).mul_(scale)

    def forward(self, input):
        changes = (self.selection.choose(change) for change in (self.out_change, self.in_change))
        return ScaledProduct.apply(input, *changes, self)


class QuantizedLinear(QuantizedLayer):
    """A `QuantizedLayer` of an `nn.Linear`."""

    channel = -1

    def __init__(self, linear, bits, selection):
        super().__init__(linear, bits, selection)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def product(self, input, weight):
        return F.linear(input, weight)

    def product_back(self, gradient, weight, input_shape):
        return gradient @ weight


class QuantizedConv2d(QuantizedLayer):
    """A `QuantizedLayer` of an `nn.Conv2d` (zero padding)."""

    channel = 1

    def __init__(self, conv, bits, selection):
        super().__init__(conv, bits, selection)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.options, self.groups = (conv.stride, conv.padding, conv.dilation, conv.groups), conv.groups

    def product(self, input, weight):
        return F.conv2d(input, weight, None, *self.options)

    def product_back(self, gradient, weight, input_shape):
        return torch.nn.grad.conv2d_input(input_shape, weight, gradient, *self.options)


def new_layers(unet, bits):
    """Quantized layers, still without content, for every Linear and Conv2d of a UNet, which stays as it is.

    On meta, too.

    Returns:
        Name -> `QuantizedLayer`, and their `Selection`.
    """
    selection, layers = Selection(), {}
    for name, layer in unet.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            kind = QuantizedLinear if isinstance(layer, torch.nn.Linear) else QuantizedConv2d
            layers[name] = kind(layer, bits, selection)
    return layers, selection


def put_in_place(unet, layers, selection):
    """Gives a UNet its quantized layers; it tells their `Selection` its timesteps from now on."""
    for name, layer in layers.items():
        unet.set_submodule(name, layer)
    unet.register_forward_pre_hook(selection.before_forward, with_kwargs=True)


def replace_layers(unet, bits):
    """Puts quantized layers, still without content, in the place of every Linear and Conv2d; on meta, too.

    Returns:
        Their `Selection`.
    """
    layers, selection = new_layers(unet, bits)
    put_in_place(unet, layers, selection)
    return selection


def quantized_layers(unet):
    """Name -> `QuantizedLayer`; known by what they hold, as diffusers may load this file more than once."""
    return {name: layer for name, layer in unet.named_modules() if hasattr(layer, "integers")}


def quantize_beside(unet, bits, calibration):
    """What `new_layers` returns, with content; the UNet stays as it is.

    Raises:
        ValueError: half a sentence; a weight holds NaN or infinity.
    """
    layers, selection = new_layers(unet, bits)
    for name, layer in layers.items():
        weight = unet.get_submodule(name).weight.detach()
        layer.integers, layer.scale, layer.zero = encode(weight, bits, calibration)
    return layers, selection


def quantize_unet(unet, bits, calibration, beside=None):
    """Quantizes a UNet in place, which afterwards says so (`Quantized`) and can do less; returns its `Selection`.

    Args:
        unet, bits, calibration: as for `quantize_beside`.
        beside: what that returned, if it has been called.

    Raises:
        ValueError: half a sentence; a weight holds NaN or infinity.
    """
    layers, selection = beside or quantize_beside(unet, bits, calibration)
    put_in_place(unet, layers, selection)
    unet.tuneqdm = Quantized(selection, bits, calibration)
    for name, why in REFUSED.items():
        setattr(unet, name, functools.partial(refuse, why))
    return selection


# What a quantized UNet cannot do: methods, and why.
REFUSED = {
    "save_pretrained": "cannot be saved as a model: share the file of scales instead.",
    "load_lora_adapter": "takes no LoRA, whose layers are not integers: draw with one or with the other.",
    "add_adapter": "takes no LoRA, whose layers are not integers: draw with one or with the other.",
    "fuse_qkv_projections": "has no weights that could be fused: leave that out.",
}


def refuse(why, *_, **__):
    """In the place of a quantized UNet's methods.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"a UNet with tuned scales {why}")


def fingerprint(unet, layers=None):
    """What tells quantized bases apart: SHA-256 of all integers, scales and zero points.

    Args:
        unet: quantized.
        layers: its quantized layers, where they are not in place yet.
    """
    digest = hashlib.sha256()
    for name, layer in sorted((layers or quantized_layers(unet)).items()):
        digest.update(name.encode())
        for tensor in (layer.integers, layer.scale, layer.zero):
            digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def sketch(unet, layers=None):
    """A number for each quantized layer, by which near bases are known that no hash tells from far ones.

    One Fourier coefficient of the layer's weights W (the first 65,536), √2 Σ W_j cos(2.4 j) / ‖W‖: the root mean
    square of two bases' differences is about ‖ΔW‖ / ‖W‖. Arguments as for `fingerprint`.
    """
    values = []
    for _, layer in sorted((layers or quantized_layers(unet)).items()):
        weights = layer.dequantize(torch.float32).flatten()[: 2**16].double()
        wave = torch.cos(2.4 * torch.arange(len(weights), dtype=torch.float64, device=weights.device))
        values.append((2**0.5 * (weights @ wave) / weights.norm().clamp(min=1e-30)).item())
    return values


def same_base(found, wanted, bits):
    """Whether two bases are one but for the precision they were loaded in, by their `sketch`es."""
    if len(found) != len(wanted):
        return False
    squares = [(one - other) ** 2 for one, other in zip(found, wanted)]
    return math.sqrt(sum(squares) / len(squares)) <= SAME_BASE[bits]


def change_shapes(unet, num_sets, input_scales):
    """Name -> shape of the tensors in a file of scales: `LAYER.out` δ_out `[N, out]`, and `LAYER.in` δ_in `[N, in]`.

    Args:
        unet: quantized or not.
        num_sets: N.
        input_scales: whether there are scales of input channels.
    """
    shapes = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) or hasattr(layer, "integers"):
            linear = hasattr(layer, "in_features")
            shapes[f"{name}.out"] = (num_sets, layer.out_features if linear else layer.out_channels)
            if input_scales:
                shapes[f"{name}.in"] = (num_sets, layer.in_features if linear else layer.in_channels)
    return shapes


def attach(unet, changes):
    """Gives the layers of a quantized UNet their changes: tensors as `change_shapes` names them."""
    for name, layer in quantized_layers(unet).items():
        layer.out_change, layer.in_change = changes[f"{name}.out"], changes.get(f"{name}.in")


# =====================================================================================================
# The pipeline
# =====================================================================================================


class ScaleConfig(NamedTuple):
    """What a file of scales belongs to; `tuneqdm_config.json` repeats it under "scales"."""

    bits: int
    calibration: str
    scale_sets: int  # N
    scale_intervals: list | None  # pairs [first, end), see `set_of_timestep`
    train_input_scales: bool
    num_train_timesteps: int  # T of the base
    base_model: str  # its name
    base_sha256: str  # `fingerprint` of the quantized base
    base_sketch: list  # its `sketch`


def write_scales(changes, config):
    """The content of a file of scales: tensors as `change_shapes` names them, and their `ScaleConfig` as metadata."""
    # One entry only: safetensors writes several in an order that changes from process to process.
    return save(changes, metadata={ABOUT: json.dumps(config._asdict())})


# What each entry of a `ScaleConfig` can be.
SCHEMA = {
    "bits": lambda value: type(value) is int and value in (4, 8),
    "calibration": lambda value: value in ("minmax", "mse"),
    "scale_sets": lambda value: type(value) is int and 1 <= value <= 1000,
    "scale_intervals": lambda value: value is None or are_intervals(value),
    "train_input_scales": lambda value: type(value) is bool,
    "num_train_timesteps": lambda value: type(value) is int and 1 <= value <= 10**6,
    "base_model": lambda value: type(value) is str and len(value) <= 1000,
    "base_sha256": lambda value: type(value) is str and re.fullmatch("[0-9a-f]{64}", value),
    "base_sketch": lambda value: type(value) is list and all(type(x) in (int, float) and abs(x) < 1e6 for x in value),
}
LARGEST_CHANGE = 1000.0  # of a scale, relative to its start; trained ones stay far below 1


def are_intervals(value):
    """Whether a value is a list of pairs [first, end) in rising order that do not overlap."""
    if type(value) is not list or not 1 <= len(value) <= 1000:
        return False
    if not all(type(pair) is list and len(pair) == 2 and {*map(type, pair)} == {int} for pair in value):
        return False
    ends = [end for pair in value for end in pair]
    return ends[0] >= 0 and ends == sorted(ends) and all(first < end for first, end in value)


def check_config(text):
    """The `ScaleConfig` in JSON.

    Raises:
        ValueError: the end of a sentence about metadata; it is none.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read: {error}"[:200]) from None
    if type(content) is not dict or content.keys() != SCHEMA.keys():
        raise ValueError(f"cannot be read: they have not the entries {', '.join(SCHEMA)}")
    for name, is_good in SCHEMA.items():
        if not is_good(content[name]):
            raise ValueError(f"make no sense: they say {name} {str(content[name])[:60]!r}")
    config = ScaleConfig(**content)
    if config.scale_intervals and config.scale_sets > 1:
        raise ValueError("make no sense: they say both intervals and several sets")
    if max(config.scale_sets, *(end for _, end in config.scale_intervals or [[0, 0]])) > config.num_train_timesteps:
        raise ValueError("make no sense: they go beyond their timesteps")
    return config


def read_scales(path):
    """The `ScaleConfig` and the changes, in float32, of a file of scales.

    Raises:
        ValueError: half a sentence; the file is damaged, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(ABOUT)
            changes = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors and OS errors alike
        raise ValueError(f"it cannot be read: {error}") from None
    if about is None:
        raise ValueError(f"its metadata have no {ABOUT!r}, which says what the scales belong to")
    try:
        config = check_config(about)
    except ValueError as error:
        raise ValueError(f"its metadata {ABOUT!r} {error}") from None
    for name, change in changes.items():
        if not change.is_floating_point():
            raise ValueError(f"it holds {str(change.dtype).removeprefix('torch.')} under {name!r} and no scales")
    return config, {name: change.float() for name, change in changes.items()}


class TuneQDMPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` with the keyword `tuneqdm_scales`; everything else is inherited.

    Args:
        tuneqdm_scales: a folder with `tuneqdm_scales.safetensors`, that file, or a repository on the Hub. The UNet is
            quantized in place to fit it; pipelines that share the UNet share its scales.

    Attributes:
        scale_config: `ScaleConfig` of the scales that this pipeline has loaded; None while there are none.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
        tuneqdm_scales: str | Path = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.scale_config = None
        if tuneqdm_scales is not None:
            self.load_scales(tuneqdm_scales)

    def load_scales(self, tuneqdm_scales):
        """Loads scales, in the place of those in use; the UNet is quantized if it is not yet, and stays so.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, or of another base, or of other bits than this UNet is quantized to.
        """
        source = f"tuneqdm_scales {str(tuneqdm_scales)!r}"
        path = _find(tuneqdm_scales, source)
        try:
            config, changes = read_scales(path)
        except ValueError as error:
            raise ValueError(f"{source}: {Path(path).name} is damaged ({error}): get it again.") from None
        self._check(source, config, changes)
        layers = beside = None
        if self._quantized is None:  # it stays so until the scales are known to fit
            try:
                layers, _ = beside = quantize_beside(self.unet, config.bits, config.calibration)
            except ValueError as error:
                raise ValueError(f"{source}: the UNet holds {error}: get this base model again.") from None
        exact = fingerprint(self.unet, layers) == config.base_sha256  # as it is when loaded in the same precision
        if not exact and not same_base(sketch(self.unet, layers), config.base_sketch, config.bits):
            raise ValueError(
                f"{source} was trained on another base ({config.base_model!r}) than this one, quantized to"
                f" {config.bits} bits: load that base."
            )
        if beside is not None:
            quantize_unet(self.unet, config.bits, config.calibration, beside)
        attach(self.unet, {name: change.to(self.unet.device) for name, change in changes.items()})
        intervals = config.scale_intervals
        self._quantized.selection.use(set_of_timestep(config.num_train_timesteps, config.scale_sets, intervals))
        self._quantized.selection.enabled, self.scale_config = True, config

    def use_scales(self, enabled):
        """Switches the scales on, or off: then this is the quantized base with its original scales.

        Raises:
            ValueError: there are none.
        """
        if self._quantized is None:
            raise ValueError("there are no scales to switch: give tuneqdm_scales, or call load_scales.")
        self._quantized.selection.enabled = bool(enabled)

    def save_pretrained(self, *arguments, **options):
        """Refuses once the UNet is quantized, before anything is written."""
        if self._quantized is not None:
            refuse(REFUSED["save_pretrained"])
        return super().save_pretrained(*arguments, **options)

    @property
    def _quantized(self):
        """What the UNet, which other pipelines may share, says of itself: `Quantized`, or None."""
        return getattr(self.unet, "tuneqdm", None)

    def _check(self, source, config, changes):
        """What can be judged before the UNet is quantized."""
        if getattr(self.unet, "peft_config", None):
            raise ValueError(f"{source} cannot be loaded into a UNet with a LoRA: unload that (unload_lora_weights).")
        home = f"load the base it was trained on ({config.base_model!r})"
        wanted = change_shapes(self.unet, config.scale_sets, config.train_input_scales)
        found = {name: tuple(change.shape) for name, change in changes.items()}
        if different := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
            first = different[0]
            raise ValueError(
                f"{source} does not fit this base model: it has {found.get(first, 'nothing')} for {first!r}, where"
                f" {wanted.get(first, 'nothing')} belongs; {home}."
            )
        if not all((change.abs() <= LARGEST_CHANGE).all() for change in changes.values()):
            raise ValueError(
                f"{source} holds NaN or infinity, or changes beyond {LARGEST_CHANGE:g}, the sign of a training that"
                " diverged: train it again."
            )
        timesteps = self.scheduler.config.num_train_timesteps
        if timesteps != config.num_train_timesteps:
            raise ValueError(
                f"{source} does not fit this base model: it was trained for {config.num_train_timesteps} timesteps and"
                f" the scheduler has {timesteps}; {home}."
            )
        if self._quantized is not None and self._quantized[1:] != (config.bits, config.calibration):
            _, bits, calibration = self._quantized
            raise ValueError(
                f"{source} belongs to {config.bits} bits ({config.calibration}) and this UNet is quantized to {bits}"
                f" ({calibration}): load the base model anew with these scales."
            )


# So that `AutoPipelineForImage2Image.from_pipe` and the like know what belongs to this class.
AUTO_TEXT2IMAGE_PIPELINES_MAPPING["tuneqdm"] = TuneQDMPipeline
AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["tuneqdm"] = StableDiffusionImg2ImgPipeline
AUTO_INPAINT_PIPELINES_MAPPING["tuneqdm"] = StableDiffusionInpaintPipeline


def _find(source, shown):
    """The path of the file of scales.

    Raises:
        OSError: it is not there.
    """
    path = Path(source)
    if path.is_dir():
        path = path / SCALES_FILE
        if not path.is_file():
            raise OSError(f"{shown} has no {SCALES_FILE}: give the folder of a finished run.")
    if path.is_file():
        return path
    try:
        return hf_hub_download(str(source), SCALES_FILE)
    except Exception as error:  # Hub and OS errors alike
        reason = " ".join(str(error).encode(errors="backslashreplace").decode().split())[:300]
        raise OSError(
            f"{shown} is neither a folder nor a repository on the Hub with {SCALES_FILE} ({reason})."
        ) from error
