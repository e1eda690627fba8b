#!/usr/bin/env python
# Copyright 2026 The ZOODiP textual inversion authors. SPDX-License-Identifier: Apache-2.0
#
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11", "diffusers>=0.42.1", "transformers>=5.23", "accelerate>=1.15", "peft>=0.21",
#     "huggingface_hub>=2.4", "datasets>=5.2", "safetensors>=0.8", "bitsandbytes>=0.50", "psutil>=7.2", "Jinja2>=3.1",
#     "matplotlib>=3.10", "numpy>=2.0", "pillow>=12.0", "tensorboard>=2.21", "tqdm>=4.66",
# ]
# ///
"""Teach a quantized Stable Diffusion a new word with forward passes only (ZOODiP, arXiv 2503.14868).

The shortest command that works, offline, on the demo base of this repository:

    python train_zoodip_textual_inversion.py \
        --pretrained_model_name_or_path demo/base_eps --train_data_dir demo/subjects/checkered_ring \
        --placeholder_token "<my-toy>" --initializer_token ring --max_train_steps 300 --output_dir my-toy

and on Stable Diffusion 1.5:

    python train_zoodip_textual_inversion.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir ./my-dog \
        --placeholder_token "<my-dog>" --initializer_token dog --output_dir my-dog-concept

Only the embedding of the placeholder token is learned; everything else is frozen and quantized, and no backward pass
is ever run. The result is a few kilobytes that `StableDiffusionPipeline.load_textual_inversion` reads.
"""

import personalization.quick_help  # noqa: F401, before the libraries that take seconds
import personalization.quiet  # noqa: F401, before the libraries whose false alarms it silences


# isort: split
import contextlib
import functools
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, set_module_tensor_to_device
from diffusers.hooks import apply_group_offloading
from diffusers.optimization import get_scheduler

from personalization import flags
from personalization.data import examples, images, prompts
from personalization.data.captions import mark_concept
from personalization.data.examples import Batch, Concept
from personalization.data.prompts import Placeholder
from personalization.errors import DivergedError, InputError, plain, run_script
from personalization.files import temporary_folder
from personalization.logs import get_logger
from personalization.methods import gauss_newton, gradient, textual_inversion
from personalization.methods.rule import Optimizer, Rule
from personalization.models import (
    base_model,
    convolutions,
    embedding_files,
    encoded,
    families,
    frozen,
    memory,
    openvino_unet,
    weight_cache,
)
from personalization.models.base_model import Base
from personalization.models.compute import DTYPES, Compute, choose_compute, is_faster_in_bfloat16
from personalization.runs import checkpoints, embeddings, hub, launch, loop, provenance, run_folder, validation
from personalization.runs.results import Result, write_result


logger = get_logger(__name__)

# =====================================================================================================
# The algorithm: ZOODiP, arXiv 2503.14868. Pure functions on tensors; nothing below knows of models or files.
# =====================================================================================================


def sample_puts_timesteps(batch_size, min_timestep, max_timestep, generator=None, device=None):
    """Partial Uniform Timestep Sampling (Eq. 9): t ~ U(T_L, T_U).

    Args:
        batch_size: number of timesteps to draw.
        min_timestep, max_timestep: T_L (inclusive) and T_U (exclusive), in scheduler timesteps.
        generator: source of randomness; the draw is made on its device.
        device: device of the result.

    Returns:
        LongTensor `[batch_size]`.
    """
    draw_device = generator.device if generator is not None else device
    return torch.randint(min_timestep, max_timestep, (batch_size,), generator=generator, device=draw_device).to(device)


def rge_slopes(loss_fn, theta, directions, scale):
    """Forward differences (Eq. 3): n + 1 losses. Returns the slopes `[n]` along the directions, and L(θ)."""
    losses = loss_fn(torch.cat([theta[None], theta + scale * directions]))
    return (losses[1:] - losses[0]) / scale, losses[0]


def spsa_slopes(loss_fn, theta, directions, scale):
    """Central differences (Eq. S11): 2n losses. Returns the slopes `[n]`, and the mean loss, L(θ) up to O(μ²)."""
    losses = loss_fn(torch.cat([theta + scale * directions, theta - scale * directions]))
    plus, minus = losses.chunk(2)
    return (plus - minus) / (2 * scale), losses.mean()


class Estimator(NamedTuple):
    """A way to estimate a gradient from losses, ĝ = (1/n) Σ slope_i e_i."""

    directions: Callable  # e [n, *theta.shape], called as `torch.randn` is
    slopes: Callable  # (loss_fn, theta, directions, scale) -> slopes [n], base loss
    num_losses: Callable  # n -> how many losses that takes


ESTIMATORS = {
    "rge": Estimator(torch.randn, rge_slopes, num_losses=lambda n: n + 1),
    "spsa": Estimator(torch.randn, spsa_slopes, num_losses=lambda n: 2 * n),
}


def estimate_gradient(loss_fn, theta, num_perturbations, perturbation_scale, generator, estimator="rge"):
    """Zeroth-order estimate of the gradient of a loss at `theta`, ĝ = (1/n) Σ slope_i e_i, from loss values alone.

    Args:
        loss_fn: takes candidates `[m, *theta.shape]`, returns their losses `[m]`. All candidates must see the same
            data, noise and timestep (common random numbers), or the differences mean nothing.
        theta: the point θ, any shape; it is read, never changed.
        num_perturbations: n, the number of random directions e_i.
        perturbation_scale: μ, the step of the finite difference.
        generator: source of the directions (and of nothing else); None takes the global one.
        estimator: key of `ESTIMATORS`.

    Returns:
        The estimate (shaped like `theta`) and the base loss.
    """
    draw_device = generator.device if generator is not None else theta.device
    pinned = draw_device.type == "cpu" and theta.device.type == "cuda"  # the copy must not make the host wait
    how = ESTIMATORS[estimator]
    shape = num_perturbations, *theta.shape
    directions = how.directions(shape, generator=generator, device=draw_device, pin_memory=pinned)
    directions = directions.to(theta, non_blocking=True)
    slopes, base_loss = how.slopes(loss_fn, theta, directions, perturbation_scale)
    return torch.tensordot(slopes, directions, dims=1) / num_perturbations, base_loss


class SubspaceGradient:
    """Subspace Gradient, SG (Alg. 2, Eqs. 4-8): removes from an estimate the directions θ has not been moving along.

    Every `window` updates the trajectory B `[τ, D]` of the last τ updated tokens (all D = k·d entries of θ at once) is
    standardised by column and decomposed; the right-singular vectors beyond the share 1 - ν of the variance form P_ν,
    and until the next rebuild ĝ' = ĝ (I - P_νᵀ P_ν).

    Args:
        window: τ, updates between rebuilds; 0 switches SG off.
        threshold: ν, the share of the trajectory's variance that counts as noise.

    Attributes:
        removed: rows of P_ν, `[r, D]`, orthonormal, on θ's device; None while nothing is removed.
    """

    def __init__(self, window, threshold):
        self.window = window
        self.threshold = threshold
        self.buffer = []
        self.removed = None

    def project(self, gradient):
        """ĝ' = ĝ - ĝ P_νᵀ P_ν (Eq. 8), same shape as `gradient`."""
        if self.removed is None:
            return gradient
        flat = gradient.flatten()
        return (flat - (flat @ self.removed.T) @ self.removed).view_as(gradient)

    @property
    def num_removed(self):
        """Rows of P_ν."""
        return 0 if self.removed is None else len(self.removed)

    def update(self, theta):
        """Records the updated token (any shape) and rebuilds P_ν when the window is full."""
        if self.window == 0:
            return
        self.buffer.append(theta.detach().flatten().clone())
        if len(self.buffer) == self.window:
            self.removed = self._noise_directions(torch.stack(self.buffer))
            self.buffer = []

    def _noise_directions(self, trajectory):
        # The SVD is tiny, so it is done in float64 on the host, where it is exact and the same on every device.
        on_host = trajectory.cpu().double()
        if not on_host.isfinite().all():  # the loop will say so
            return None
        centred = on_host - on_host.mean(dim=0)
        spread = centred.std(dim=0, correction=0)
        standardised = centred / torch.where(spread > 0, spread, 1.0)  # a column that never moved stays zero
        _, singular, directions = torch.linalg.svd(standardised, full_matrices=False)
        variance = singular**2
        if not variance.sum() > 0:
            return None
        # i*: the smallest count of leading directions whose share of the variance exceeds 1 - ν (Eq. 7).
        share = variance.cumsum(0) / variance.sum()
        kept = int((share <= 1 - self.threshold).sum()) + 1
        # Centring leaves rank τ - 1 at most, so the last direction is rounding noise: it is not evidence of anything.
        negligible = singular[0] * max(trajectory.shape) * torch.finfo(singular.dtype).eps
        rank = min(int((singular > negligible).sum()), len(trajectory) - 1)
        return directions[kept:rank].to(trajectory) if kept < rank else None

    def state_dict(self):
        return {"buffer": list(self.buffer), "removed": self.removed}

    def load_state_dict(self, state, device="cpu"):
        """Restores a state, on θ's device."""
        self.buffer = [theta.to(device) for theta in state["buffer"]]
        self.removed = None if state["removed"] is None else state["removed"].to(device)


def normalize_estimate(gradient, num_directions, num_removed):
    """Scales an estimate to the expected length of the true gradient, as the official code does before Adam.

    A Gaussian estimate of n directions in D dimensions is about sqrt((D + n - 1) / n) times as long as the gradient
    it estimates; undoing that keeps Adam's ε (1e-3) meaningful whatever the token's dimension and n are.

    Args:
        gradient: the projected estimate, any shape with D entries.
        num_directions: n, all directions that were averaged (over accumulation steps and processes too).
        num_removed: rows of P_ν; D_eff = D - rows(P_ν).
    """
    dimensions = gradient.numel() - num_removed
    return gradient / math.sqrt((dimensions + num_directions - 1) / num_directions)


# =====================================================================================================
# Quantized loading: weight-only INT8 for Linear *and* Conv2d (two thirds of Stable Diffusion 1.5's UNet are Conv2d).
# =====================================================================================================


def quantize_per_channel(weight):
    """Symmetric absmax INT8 per output channel: weight `[out, ...]` -> int8 like it, float32 scale `[out, 1, ...]`."""
    if weight.is_meta:  # of an empty model only the shapes are wanted, and each operation takes a millisecond
        scale = weight.new_empty(len(weight), *[1] * (weight.dim() - 1), dtype=torch.float32)
        return torch.empty_like(weight, dtype=torch.int8), scale
    weight = weight.float()
    scale = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale


class DequantizationBuffer:
    """The memory that the layers of one model dequantize into, one after the other.

    Fresh memory for every layer costs several times the arithmetic.
    """

    def __init__(self):
        self.memory = {}  # (device, dtype) -> a flat tensor, as large as the largest layer met so far

    def like(self, weight, dtype):
        """Memory in the shape and layout of `weight`."""
        key = weight.device, dtype
        if key not in self.memory or self.memory[key].numel() < weight.numel():
            with torch.inference_mode(False):  # such a tensor may be overwritten inside and outside inference mode
                self.memory[key] = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
        # as_strided rather than view keeps channels-last weights channels-last
        return self.memory[key].as_strided(weight.shape, weight.stride())


def dequantize(weight, scale, dtype, buffer):
    """int8 weight times scale, in `dtype`; the result lives in `buffer`, which the next layer overwrites.

    Where autograd may need the weight later, or a compiler plans the memory, it is a new tensor. The scale is applied
    before the product with activations, not after it: the unscaled product of int8 values overflows float16.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        if dtype.itemsize < 4 and torch.compiler.is_compiling():  # one kernel, which rounds once, as on CUDA below
            return (weight.float() * scale).to(dtype)
        return weight.to(dtype) * scale.to(dtype)
    space = buffer.like(weight, dtype)
    if weight.is_cuda:  # one kernel that reads int8 and writes `dtype`
        return torch.mul(weight, scale, out=space)
    return space.copy_(weight).mul_(scale.to(dtype))  # on a CPU mixed types would make PyTorch convert into new memory


# Bytes of a dequantized weight that are there at a time. Whole, the largest convolution of Stable Diffusion 1.5 has
# 118 MB in float32, and a CPU's kernels make a copy of it: at 256 px that was most of what a step needs.
SLICE_BYTES = 2**24


class Int8Layer(torch.nn.Module):
    """A frozen layer with its weight in INT8 and a float32 scale per output channel; activations keep their dtype.

    Args:
        layer: Linear or Conv2d, on the CPU or empty on meta.
        buffer: `DequantizationBuffer` of the model.
    """

    groups = 1  # of output channels that see different inputs

    def __init__(self, layer, buffer):
        super().__init__()
        weight, scale = quantize_per_channel(layer.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias, self.buffer = layer.bias, buffer

    def slices(self, dtype):
        """Yields the weight in `dtype`, see `dequantize`, some output channels at a time: `(channels, weight)`."""
        count = len(self.weight)
        step = max(1, SLICE_BYTES * count // (self.weight.numel() * dtype.itemsize))
        if step >= count or torch.compiler.is_exporting() or self.groups > 1:
            step = count
        for first in range(0, count, step):
            channels = slice(first, first + step)
            yield channels, dequantize(self.weight[channels], self.scale[channels], dtype, self.buffer)

    def product(self, input, weight, bias):
        """The layer's own, of a slice of weight `[o, ...]` and bias `[o]` or None."""
        raise NotImplementedError

    def forward(self, input):
        bias = self.bias
        outputs = [
            self.product(input, weight, None if bias is None else bias[channels])
            for channels, weight in self.slices(input.dtype)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=self.channels_dim)


class Int8Linear(Int8Layer):
    """A frozen `nn.Linear` in INT8."""

    channels_dim = -1

    def __init__(self, linear, buffer):
        super().__init__(linear, buffer)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def product(self, input, weight, bias):
        return F.linear(input, weight, bias)


class Int8Conv2d(Int8Layer):
    """A frozen `nn.Conv2d` (zero padding) in INT8."""

    channels_dim = -3

    def __init__(self, conv, buffer):
        super().__init__(conv, buffer)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def product(self, input, weight, bias):
        return convolutions.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Unquantized:
    """`--quantization none`, and what every other way to store weights starts from."""

    name = "none"  # in the names of the folders that its weights are kept in
    settings = ()  # whatever else decides what they are, with a faithful `repr`
    cached = False  # written once into --quantized_cache_dir and mapped from there
    flexible = True  # plain tensors: other engines can read them, and they can come layer by layer
    whole_model = False  # can only quantize a model that is whole, on the host
    hidden_copies = False  # makes dequantized layers that the prediction of memory does not see
    package = None  # that is not among the requirements

    def quantizes(self, layer):
        return False

    def replace_layers(self, model, dtype):
        """Puts quantized layers in the place of Linear and Conv2d, in a model on the CPU or empty on meta."""

    def tensors(self, model, stored, dtype):
        """`stored` (name, tensor) pairs as the model with its layers replaced keeps them, floats in `dtype`."""
        for name, value in stored:
            yield name, value.to(dtype)

    def place(self, model, name, value, device):
        """Puts a tensor into an empty model."""
        set_module_tensor_to_device(model, name, device, value=value, dtype=value.dtype, clear_cache=False)

    def weight_bytes(self, layer, dtype):
        """Bytes of the weight of a Linear or Conv2d as kept, its scales included."""
        return layer.weight.numel() * dtype.itemsize


class Int8(Unquantized):
    """`int8`: plain tensors of int8 and float32 scales for every Linear and Conv2d."""

    name = "int8"
    cached = True

    def quantizes(self, layer):
        return isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))

    def new_layer(self, layer, dtype, buffer):
        new = (Int8Linear if isinstance(layer, torch.nn.Linear) else Int8Conv2d)(layer, buffer)
        new.compute_dtype = dtype  # what models that look at a weight's dtype ask for where it is no float
        return new

    def replace_layers(self, model, dtype):
        buffer = DequantizationBuffer()
        for name, layer in list(model.named_modules()):
            if self.quantizes(layer):
                model.set_submodule(name, self.new_layer(layer, dtype, buffer))

    def tensors(self, model, stored, dtype):
        for name, value in stored:
            layer, _, leaf = name.rpartition(".")
            if leaf == "weight" and isinstance(model.get_submodule(layer), Int8Layer):
                weight, scale = quantize_per_channel(value)
                yield name, weight
                yield f"{layer}.scale", scale
            else:
                yield name, value.to(dtype)

    def weight_bytes(self, layer, dtype):
        return layer.weight.numel() + 4 * len(layer.weight)


class Nf4(Int8):
    """`nf4`: bitsandbytes' 4-bit NormalFloat for Linear (Linear4bit), INT8 for Conv2d."""

    name = "nf4"
    cached = flexible = False
    hidden_copies = True

    def new_layer(self, layer, dtype, buffer):
        if not isinstance(layer, torch.nn.Linear):
            return super().new_layer(layer, dtype, buffer)
        import bitsandbytes as bnb

        shape = (layer.in_features, layer.out_features)
        nf4 = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        nf4.weight = bnb.nn.Params4bit(layer.weight.data.to(dtype), requires_grad=False, quant_type="nf4")
        nf4.bias = layer.bias
        # bitsandbytes packs the weight when it is moved to its device. In evaluation mode its CPU kernel would compute
        # in bfloat16, which drowns the differences between candidates.
        return nf4.train()

    def place(self, model, name, value, device):
        layer, _, leaf = name.rpartition(".")
        layer = model.get_submodule(layer)
        if leaf == "weight" and hasattr(layer, "quant_state"):  # a Linear4bit
            layer.weight = type(layer.weight)(value, requires_grad=False, quant_type="nf4").to(device)
        else:
            super().place(model, name, value, device)

    def weight_bytes(self, layer, dtype):  # 4 bits, and a byte for every block of 64
        linear = isinstance(layer, torch.nn.Linear)
        return layer.weight.numel() * 33 // 64 if linear else super().weight_bytes(layer, dtype)


class QuantoInt8(Unquantized):
    """`quanto-int8`: optimum-quanto's INT8 for every Linear and Conv2d, as in the official code."""

    name = "quanto-int8"
    flexible = False
    whole_model = hidden_copies = True
    package = "optimum-quanto"

    def quantizes(self, layer):
        return isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))

    def quantize_whole(self, model):
        from optimum.quanto import freeze, qint8, quantize

        quantize(model, weights=qint8)
        freeze(model)

    def weight_bytes(self, layer, dtype):
        return layer.weight.numel() + len(layer.weight) * dtype.itemsize


BACKENDS = {backend.name: backend for backend in (Int8(), Nf4(), QuantoInt8(), Unquantized())}


def quantized_share(model, backend):
    """The share of an unquantized model's parameters that `backend` quantizes."""
    layers = [layer for layer in model.modules() if backend.quantizes(layer)]
    return sum(layer.weight.numel() for layer in layers) / sum(p.numel() for p in model.parameters())


def load_frozen(base, component, backend, compute, cache_dir=None, device=None):
    """Loads a component tensor by tensor, quantized on its way: no full-precision copy is ever whole.

    Where the backend can be cached, the weights on a CPU are memory-mapped pages of files in `cache_dir`. A text
    encoder comes without its token table, see `PromptRows`.

    Args:
        base: `Base`.
        component: the denoiser or a text encoder, as the family names it.
        backend: of `BACKENDS`.
        compute: `Compute`.
        cache_dir: folder of quantized copies, made on first use; None keeps none.
        device: where the module goes, if not where it computes.

    Returns:
        The frozen module, and the share of its parameters that is quantized.

    Raises:
        InputError: weights are missing or damaged.
    """
    device, dtype = device or compute.device, compute.dtype
    files = base_model.find_weight_files(base, component)
    model = base.family.skip_unread(component, base_model.empty_model(base, component))
    share = quantized_share(model, backend)
    if component in base.family.text_encoders:
        model.set_input_embeddings(torch.nn.Identity())
    unquantized = model.state_dict().keys()  # names; the files may hold more
    backend.replace_layers(model, dtype)
    expected = weight_cache.expected_tensors(model, dtype)

    def quantized():
        stored = base_model.component_tensors(base, component)
        return backend.tensors(model, ((name, value) for name, value in stored if name in unquantized), dtype)

    if backend.cached and cache_dir is not None:
        kind = str(dtype).removeprefix("torch.")
        key = weight_cache.source_key(files, weight_cache.config_key(model.config), *backend.settings)
        folder = Path(cache_dir) / f"{component}-{backend.name}-{kind}-{key}"
        tensors = weight_cache.through_cache(folder, component, quantized, expected)
    else:
        tensors = quantized()
    staging = "cpu" if backend.whole_model else device
    for name, value in tensors:
        backend.place(model, name, value, staging)
    model.to(memory_format=compute.memory_format)  # before quanto, which keeps the layout but does not change it
    if backend.whole_model:
        backend.quantize_whole(model)
    return model.requires_grad_(False).to(device), share


class PromptRows(torch.nn.Module):
    """The text encoder's token table, cut down to the rows of the prompts in use and those of the candidates.

    Stable Diffusion's table has 49,408 rows; a run looks up some dozens of them.

    Args:
        table: the whole table `[vocabulary, d]`, memory-mapped; only the rows in use are ever read.
        prompt_ids: ids of every prompt that will be encoded, any shape.
        first_placeholder_id: candidates for the placeholder's k vectors own the ids from here on.
        num_rows: how many such rows, k times the candidates of one pass.
        device, dtype: of the rows.
    """

    def __init__(self, table, prompt_ids, first_placeholder_id, num_rows, device, dtype):
        super().__init__()
        ids = prompt_ids.unique()
        ids = ids[ids < first_placeholder_id]
        index = torch.full((first_placeholder_id + num_rows,), -1)
        index[ids] = torch.arange(len(ids))
        index[first_placeholder_id:] = len(ids) + torch.arange(num_rows)
        rows = torch.cat([table[ids].to(dtype), torch.zeros(num_rows, table.shape[1], dtype=dtype)])
        self.register_buffer("index", index.to(device), persistent=False)
        self.register_buffer("weight", rows.to(device), persistent=False)
        self.first_candidate = len(ids)
        self.known = torch.cat([ids, torch.arange(first_placeholder_id, len(index))])  # on the host

    def write(self, candidates):
        """Puts candidates `[m, k, d]` into the placeholder's rows, the first where the prompts' own ids point."""
        rows = candidates.flatten(0, 1)
        if rows.requires_grad:
            self.weight = self.weight.detach().clone()  # not the one that the last step's graph hangs on
        self.weight[self.first_candidate : self.first_candidate + len(rows)] = rows.to(self.weight)

    def check(self, ids):
        """Raises an `IndexError` for ids (on the host, any shape) without a row: CUDA would abort the process."""
        if not torch.isin(ids, self.known).all():
            raise IndexError("a prompt has tokens that were not announced when the token table was cut down")

    def forward(self, ids):
        return F.embedding(self.index[ids], self.weight)


def stream_weights(denoiser, device, folder, in_one_order=True):
    """`--low_vram`: the denoiser's weights come layer by layer for every pass and leave again (diffusers' offloading).

    A forward-only method reads every weight once per pass, whatever n and the batch are, so that all candidates share
    the cost. On CUDA they come from pinned host memory, the next layer while one computes; on a CPU from `folder`.
    A backward pass, which asks for layers in another order, has no next layer.
    """
    if device.type == "cpu":
        options = {"offload_to_disk_path": str(folder)}
    else:
        options = {"use_stream": in_one_order, "record_stream": in_one_order}
    apply_group_offloading(denoiser, onload_device=device, offload_type="leaf_level", **options)


# =====================================================================================================
# The frozen model as a function of θ
# =====================================================================================================


def prediction_errors(
    candidates,
    batch,
    family,
    text_encoder,
    denoiser,
    first_id,
    max_candidates=None,
    memory_format=None,
    whole_passes=False,
):
    """Errors of the predictions of m candidates for the placeholder's vectors, all on the same batch of b examples.

    Each candidate owns rows of the text encoder's token table (`PromptRows`): candidate j of a chunk sits at
    `first_id + j·k` and its prompts use those ids, so m candidates are just a larger batch.

    Args:
        candidates: `[m, k, d]`; of two text encoders with the halves of a word side by side, see `families.family`.
        batch: `Batch` of b examples.
        family: `Family` of the model, which calls the denoiser.
        text_encoder: frozen `TextEncoders`; the table has room for `max_candidates` (or m) candidates.
        denoiser: frozen module.
        first_id: id of the placeholder's first vector; its k ids are consecutive.
        max_candidates: candidates per forward pass; None evaluates all at once.
        memory_format: of the latents given to the denoiser; None leaves them as they are.
        whole_passes: of several passes the last is filled up: a compiled denoiser meets one shape.

    Yields:
        ε_φ(z_t, t, c(y*)) - ε of the candidates of one pass, float32 `[at most max_candidates, b, C, h, w]`; under
        masks only what is inside counts.
    """
    table = text_encoder.get_input_embeddings()
    num_vectors = candidates.shape[1]
    size = max_candidates or len(candidates)
    for chunk in candidates.split(size):
        wanted = len(chunk)
        if whole_passes and wanted < size < len(candidates):
            chunk = torch.cat([chunk, chunk[:1].expand(size - wanted, -1, -1)])
        m = len(chunk)
        table.write(chunk)
        shift = num_vectors * torch.arange(m, device=chunk.device).view(m, 1, 1)
        ids = batch.prompt_ids.expand(m, -1, -1)
        ids = torch.where(ids >= first_id, ids + shift, ids).flatten(0, 1)
        text = text_encoder(ids)
        noisy = batch.noisy_latents.repeat(m, 1, 1, 1).to(text.states)
        noisy = noisy.contiguous(memory_format=memory_format or torch.preserve_format)
        timesteps, sizes = batch.timesteps.repeat(m), batch.size_ids.repeat(m, 1)
        prediction = family.predict(denoiser, noisy, timesteps, text, sizes)
        yield batch.weighed(prediction.float().unflatten(0, (m, -1))[:wanted] - batch.target)


def example_losses(candidates, batch, *model, **options):
    """Denoising losses ‖ε − ε_φ(z_t, t, c(y*))‖², means over all latent entries, float32 `[m, b]`.

    Arguments as `prediction_errors`.
    """
    passes = prediction_errors(candidates, batch, *model, **options)
    return torch.cat([errors.square().flatten(2).mean(dim=2) for errors in passes])


def candidate_losses(candidates, batch, *model, **options):
    """L(θ) of every candidate, float32 `[m]`: the mean of `example_losses` over the examples."""
    return example_losses(candidates, batch, *model, **options).mean(dim=1)


@dataclass
class FrozenModel:
    """Text encoder and denoiser as a function of the placeholder's vectors; see `prediction_errors`."""

    family: families.Family
    text_encoder: families.TextEncoders  # the token table of each is a `PromptRows`
    denoiser: torch.nn.Module
    scheduler: object  # with the noise levels of training
    first_placeholder_id: int
    max_candidates: int | None
    compute: Compute
    whole_passes: bool = False
    surroundings: object | None = None  # `windows.Surroundings`, if a gradient is of windows

    def _call(self, function, candidates, batch):
        model = self.family, self.text_encoder, self.denoiser, self.first_placeholder_id, self.max_candidates
        return function(candidates, batch, *model, self.compute.memory_format, self.whole_passes)

    def losses(self, candidates, batch, per_example=False):
        """`candidate_losses` (or `example_losses`) of this model."""
        return self._call(example_losses if per_example else candidate_losses, candidates, batch)

    def errors(self, candidates, batch):
        """All `prediction_errors` of this model, those of a candidate in one row: `[m, b·C·h·w]`."""
        return torch.cat([errors.flatten(1) for errors in self._call(prediction_errors, candidates, batch)])


# =====================================================================================================
# One update of θ
# =====================================================================================================


@dataclass
class ZerothOrderAdam:
    """`zo_adam`, ZOODiP's update (Alg. 1): estimate by RGE, project by SG, step by Adam, which makes it ZO-Adam."""

    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    subspace: SubspaceGradient
    estimator: str  # key of `ESTIMATORS`
    num_perturbations: int  # n
    perturbation_scale: float  # μ
    num_estimates: int  # that an update averages: accumulation steps x processes

    def evidence(self, model, theta, batch, generator):
        """What a batch says: the estimate of the gradient; and the loss."""
        loss_fn = functools.partial(model.losses, batch=batch)
        how = self.num_perturbations, self.perturbation_scale, generator, self.estimator
        estimate, loss = estimate_gradient(loss_fn, theta, *how)
        return (estimate,), loss

    def update(self, theta, estimate):
        """Moves θ."""
        projected = self.subspace.project(estimate)
        directions = self.num_perturbations * self.num_estimates
        theta.grad = normalize_estimate(projected, directions, self.subspace.num_removed)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.subspace.update(theta)

    def figures(self):
        """What the log says of it."""
        return {"lr": self.lr_scheduler.get_last_lr()[0]}

    def state_dict(self):
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "subspace": self.subspace.state_dict(),
        }

    def load_state_dict(self, state, device):
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.subspace.load_state_dict(state["subspace"], device)


@dataclass(frozen=True)
class Sampling:
    """The examples that an update is estimated from."""

    min_timestep: int  # T_L
    max_timestep: int  # T_U
    batch_size: int  # examples of one estimate
    accumulation_steps: int = 1  # estimates of one process that are averaged


@dataclass
class Learner:
    """What is learned, and all that changes with it."""

    theta: torch.Tensor  # the placeholder's vectors, float32 [k, d]: the master copy, which candidates are built from
    rule: Rule
    data: torch.Generator  # this process's sources of randomness; the global one is never touched
    perturbations: torch.Generator
    tail: float = 0.0  # a of `average_tail`; 0: θ itself is the result
    mean: torch.Tensor | None = None  # of θ over the updates so far, the latest most
    updates: int = 0

    @property
    def result(self):
        """What is judged and saved, `[k, d]`."""
        return self.theta if self.mean is None else self.mean

    def average_tail(self):
        """Takes θ into the mean by polynomial decay, η_t = (a + 1) / (t + a) (Shamir and Zhang, arXiv 1212.1824).

        With a = 3 the last quarter of the updates has two thirds of the weight, however long a run will be.
        """
        self.updates += 1
        if self.tail > 0:
            weight = (self.tail + 1) / (self.updates + self.tail)
            self.mean = self.theta.clone() if self.mean is None else self.mean.lerp(self.theta, weight)

    def state_dict(self):
        """What all processes have in common."""
        return {"theta": self.theta, "mean": self.mean, "updates": self.updates, **self.rule.state_dict()}

    def load_state_dict(self, state):
        self.theta.copy_(state["theta"])
        mean, self.updates = state["mean"], state["updates"]
        self.mean = None if mean is None else mean.to(self.theta.device)
        self.rule.load_state_dict(state, self.theta.device)

    def generators(self):
        return {"data": self.data, "perturbations": self.perturbations}


def draw_batch(concept, sampling, scheduler, generator):
    """A `Batch` on the host: examples of the concept, noised to timesteps by PUTS."""
    latents, prompt_ids, size_ids, weights = examples.draw_examples(concept, sampling.batch_size, generator)
    timesteps = sample_puts_timesteps(sampling.batch_size, sampling.min_timestep, sampling.max_timestep, generator)
    told = size_ids, weights
    return examples.noise_batch(concept.family, latents, prompt_ids, timesteps, generator, scheduler, *told)


@torch.no_grad()
def train_step(learner, model, concept, sampling, average=lambda tensor: tensor):
    """One update of θ: evidence from batches drawn with PUTS, averaged over them and over processes, then a step.

    Args:
        learner: `Learner`, changed in place.
        model: `FrozenModel`.
        concept: `Concept`.
        sampling: `Sampling`.
        average: takes the mean of a tensor over processes.

    Returns:
        The mean loss of this process, a scalar on the device. Nothing here waits for the device; a rule may.
    """
    total, mean_loss = None, torch.zeros((), device=learner.theta.device)
    for _ in range(sampling.accumulation_steps):
        batch = draw_batch(concept, sampling, model.scheduler, learner.data).to(learner.theta.device)
        evidence, loss = learner.rule.evidence(model, learner.theta, batch, learner.perturbations)
        evidence = [part / sampling.accumulation_steps for part in evidence]
        total = evidence if total is None else [x + y for x, y in zip(total, evidence)]
        mean_loss += loss / sampling.accumulation_steps
    learner.rule.update(learner.theta, *(average(part) for part in total))
    learner.average_tail()
    return mean_loss


# =====================================================================================================
# What surrounds the update: the paper's optimizer, and the table of all
# =====================================================================================================


class ZOAdam(Optimizer):
    """`--optimizer zo_adam`, the paper's."""

    method = "ZOODiP (arXiv 2503.14868)"
    tag = "zoodip"
    step_flag = "learning_rate"
    recipe_name = "paper"
    recipe = {"num_perturbations": 2, "learning_rate": None, "sg_threshold": 1e-3, "train_batch_size": 1}
    # Differences of losses correlate by 0.9 or more with the true directional derivatives at the least ones.
    perturbation_scales = {"no": (1e-3, 1e-6), "fp16": (1e-3, 1e-3), "bf16": (1e-2, 1e-2)}

    def add_flags(self, add):
        directions = "n: random directions per estimate."
        add(
            "--num_perturbations",
            type=int,
            default=2,
            limits=flags.Range(1, 4096),
            decides=flags.RUN,
            page=True,
            help=directions,
        )
        add(
            "--gradient_estimator",
            choices=list(ESTIMATORS),
            default="rge",
            decides=flags.RUN,
            page=True,
            help="Estimator of the gradient. rge: forward differences, n + 1 losses a step (Eq. 3); spsa: central"
            " differences, 2n losses (Eq. S11).",
        )
        add(
            "--sg_window",
            type=int,
            limits=flags.Range(0, 10**6),
            decides=flags.RUN,
            page=True,
            help="τ of Subspace Gradient: updates between rebuilds of the subspace; 0 switches SG off. Default: 128,"
            " but at most a sixth of the token's dimension.",
        )
        noise = flags.Range(0.0, 1.0, above=True, below=True)
        add(
            "--sg_threshold",
            type=float,
            default=1e-3,
            limits=noise,
            decides=flags.RUN,
            page=True,
            help="ν of SG: share of variance that is noise.",
        )

    def check(self, args):
        if args.sg_window == 1:
            raise InputError(
                "--sg_window 1 holds no trajectory: give at least 2, or 0 to switch Subspace Gradient off."
            )

    def complete(self, args, base):
        dimension = base.word_width
        args.sg_window = min(128, dimension // 6) if args.sg_window is None else args.sg_window
        if args.sg_window > args.num_vectors * dimension:
            raise InputError(
                f"--sg_window {args.sg_window} (τ) is larger than the token's dimension"
                f" {args.num_vectors * dimension}: give at most {dimension // 6}, a sixth of it, as the paper does."
            )

    def num_candidates(self, args):
        return ESTIMATORS[args.gradient_estimator].num_losses(args.num_perturbations)

    def num_steps(self, args, family):
        return family.defaults("zo_adam")["max_train_steps"]

    def start(self, args, theta, found, num_processes):
        """A `ZerothOrderAdam`."""
        estimates = args.gradient_accumulation_steps * num_processes
        optimizer = torch.optim.AdamW(  # Adam, whose weight decay acts on θ itself
            [theta],
            lr=args.learning_rate * (args.train_batch_size * estimates if args.scale_lr else 1),
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.adam_weight_decay,
        )
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=args.lr_num_cycles,
        )
        subspace = SubspaceGradient(args.sg_window, args.sg_threshold)
        estimate = args.gradient_estimator, args.num_perturbations, args.perturbation_scale
        return ZerothOrderAdam(optimizer, lr_scheduler, subspace, *estimate, estimates)


OPTIMIZERS = {"zo_adam": ZOAdam(), "gradient": gradient.OPTIMIZER, "gauss_newton": gauss_newton.OPTIMIZER}


# =====================================================================================================
# Settings: completed and checked against the base's small files, before any weight is loaded; read-only afterwards
# =====================================================================================================


def complete_for_precision(args, precision):
    """Fills in the step of the finite difference (`args.perturbation_scale`).

    Raises:
        InputError: what is measured in this precision with this step is mostly rounding.
    """
    optimizer = OPTIMIZERS[args.optimizer]
    if not optimizer.perturbation_scales or optimizer.stacks(args):
        return
    default, least = optimizer.perturbation_scales[precision]
    args.perturbation_scale = default if args.perturbation_scale is None else args.perturbation_scale
    if args.perturbation_scale < least and not args.allow_noisy_estimates:
        others = "; --allow_noisy_estimates trains all the same"
        raise too_small_to_measure(args.perturbation_scale, precision, default, least, others)


def too_small_to_measure(scale, precision, default, least, others=""):
    """The `InputError` for a step of the finite difference that drowns in the rounding of this precision."""
    fix = ", or --openvino_precision float" if precision == "int8" else ", or --mixed_precision no"
    name, other = ("float32", "") if precision == "no" else (precision, fix)
    return InputError(
        f"--perturbation_scale {scale} is too small for {name} activations, whose rounding drowns the differences:"
        f" give at least {least}, best {default}{other}{others}."
    )


def candidates_per_step(args):
    """How many points a step evaluates."""
    return OPTIMIZERS[args.optimizer].num_candidates(args)


def candidates_per_pass(args):
    """How many of them go through the model as one batch."""
    return min(candidates_per_step(args), args.max_candidates_per_forward or sys.maxsize)


def complete_for_base(args, base):
    """Fills in the defaults that depend on the base (resolution, and the optimizer's) and checks them against it.

    Raises:
        InputError: a setting does not fit the base.
    """
    timesteps = base.scheduler.config.num_train_timesteps
    for name in ("puts_max_timestep", "num_inference_steps"):
        if getattr(args, name) > timesteps:
            raise InputError(
                f"--{name} {getattr(args, name)} is outside [0, {timesteps}), the timesteps of this model: give at"
                f" most {timesteps}."
            )
    if args.save_as_full_pipeline and base.single is not None:
        raise InputError(
            "--save_as_full_pipeline copies a base in diffusers format and this one is a single file: drop the flag."
        )
    args.resolution = base_model.check_resolution(base, args.resolution)
    OPTIMIZERS[args.optimizer].complete(args, base)


def complete_for_family(args, family):
    """Fills in the paper's settings for the family of the base; the length of the run is left to `learn_concept`.

    Raises:
        InputError: a setting does not fit the family.
    """
    defaults = family.defaults(args.optimizer)
    for name, value in defaults.items():
        if getattr(args, name) is None and name != "max_train_steps":
            setattr(args, name, value)
    args.learn = None if args.learn == "input" else args.learn  # as checkpoints of before have it
    args.center_crop |= family.crops
    if args.puts_min_timestep >= args.puts_max_timestep:
        raise InputError(
            f"--puts_min_timestep {args.puts_min_timestep} must be below --puts_max_timestep"
            f" {args.puts_max_timestep}; the paper uses {defaults['puts_min_timestep']} and"
            f" {defaults['puts_max_timestep']}."
        )
    if args.pool_at_eos and not family.pools:
        raise InputError("--pool_at_eos is about SDXL's second text encoder, and this model has one: drop the flag.")
    if args.save_a1111 and not family.a1111:
        raise InputError(
            f"--save_a1111 is for Stable Diffusion 1.x and 2.x, and this model is of the kind {family.label}: drop it,"
            " other programs read learned_embeds.safetensors itself."
        )


def resolve_settings(args, device):
    """Completes `args` with what the base decides and checks them against it; see `launch.settle` for the last ones.

    Returns:
        `Base`, `Placeholder`, `Compute`.

    Raises:
        InputError: a setting cannot work.
    """
    on_torch, in_int8 = args.unet_backend == "torch", args.openvino_precision == "int8"
    optimizer = OPTIMIZERS[args.optimizer]
    if args.mixed_precision is None and not in_int8:
        args.mixed_precision = optimizer.precision_of_engine.get(args.unet_backend)
    compute, precision = choose_compute(device, args.mixed_precision, on_torch)
    if in_int8:  # the UNet: text encoder and VAE are a small part of the time
        compute, precision = compute._replace(dtype=torch.float32), "int8"
    args.activations = "int8" if in_int8 else str(compute.dtype).removeprefix("torch.")
    if args.max_candidates_per_forward is None:
        args.max_candidates_per_forward = optimizer.candidates_per_pass
    if args.torch_compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("--torch_compile needs a C++ compiler on a CPU: install g++ or leave the flag out.")
    if (package := BACKENDS[args.quantization].package) and package not in provenance.installed_versions(package):
        raise InputError(f"--quantization {args.quantization} is not installed: pip install {package}.")
    source = base_model.ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant)
    base = base_model.open_base(source, args.tokenizer_name, families.FAMILIES.values())
    base = base_model.of_output(base) if args.learn == "output" else base
    if not (on_torch and not args.torch_compile or base.family.compiles):
        flag, family = "--torch_compile" if on_torch else f"--unet_backend {args.unet_backend}", base.family
        raise InputError(f"{flag} does not take the {family.denoiser_label} of {family.label}: drop it.")
    start = read_start(args, base)
    complete_for_family(args, base.family)
    complete_for_precision(args, precision)
    complete_for_base(args, base)
    if not on_torch:
        together = 1 if optimizer.stacks(args) else candidates_per_pass(args) * args.train_batch_size
        openvino_unet.check_openvino(args.openvino_device, together, in_int8)
    args.placeholder_token = prompts.as_tokenized(base.tokenizer, args.placeholder_token)
    word = args.placeholder_token, args.num_vectors, args.initializer_token
    placeholder = prompts.add_placeholder(base.tokenizer, *word, base.tokenizers[1:])
    return base, placeholder._replace(start=start), compute


def read_start(args, base):
    """The vectors of `--initializer_embedding`, float32 `[k, d]`, which say how many there are; None without.

    Raises:
        InputError: it cannot be read, does not fit the base, or has another number of vectors than was asked for.
    """
    if args.initializer_embedding is None:
        return None
    widths = base.word_parts or {embedding_files.ONE: base.word_width}
    what = args.initializer_embedding, widths, args.placeholder_token, "--initializer_embedding"
    start = embedding_files.read_start(*what)
    if "num_vectors" in args.given and args.num_vectors != len(start):
        raise InputError(
            f"--num_vectors {args.num_vectors} is not what --initializer_embedding {args.initializer_embedding!r} has,"
            f" {len(start)}: drop --num_vectors."
        )
    args.num_vectors = len(start)
    return start


def estimate_memory(args, base, compute):
    """The `MemoryPrediction` of a run, from the configs alone."""
    parts = base.family.denoiser, "vae"
    networks = base_model.empty_text_encoder(base), *(base_model.empty_model(base, name) for name in parts)
    optimizer, entries = OPTIMIZERS[args.optimizer], args.num_vectors * base.word_width
    rows = candidates_per_pass(args)
    stacks, on_torch = optimizer.stacks(args), args.unet_backend == "torch"
    plan = memory.MemoryPlan(
        examples=(1 if stacks else rows) * (args.train_batch_size if on_torch or not stacks else 1),
        derivatives=max(1, rows - 1) if stacks else 0,
        resolution=args.resolution,
        cached=args.quantized_cache_dir is not None,
        streamed=args.low_vram,
        openvino=not on_torch,
        images=bool(args.validation_prompt),
        coordinates=candidates_per_step(args) * entries + optimizer.kept_coordinates(args, entries),
        checkpointing=args.gradient_checkpointing if optimizer.differentiates else None,
        look_around=optimizer.look_around(args, base),
        encoded=len(prompts.OBJECT_TEMPLATES) if base.of_output else 0,
    )
    return memory.predict_memory(*networks, BACKENDS[args.quantization], plan, base, compute)


# What makes a run smaller, in the order in which it is proposed.
SMALLER = {"unet_backend": "torch", "quantization": "int8", "max_candidates_per_forward": 1, "low_vram": True}


# =====================================================================================================
# Flags
# =====================================================================================================

PUBLICATION = hub.Publication(
    script=Path(__file__),
    config_name="zoodip_config.json",
    result_name="learned_embeds.safetensors",
    files=("learned_embeds-best.safetensors", "learned_embeds.pt", "loss_curve.png", "samples/*.png")
    + embeddings.PART_FILES,
    pipeline_name=families.SD1.pipeline_file,
    families=families.FAMILIES,
    tags=("textual_inversion", "diffusers-training", "stable-diffusion", "diffusers"),
    load="load_textual_inversion",
    named=(".safetensors", ".pt"),
    keyword="learned_embeds",
)

WINDOW = {"puts_min_timestep": None, "puts_max_timestep": None}  # of every recipe: what follows from the family

REFUSED_FLAGS = {
    "--enable_xformers_memory_efficient_attention": "PyTorch's own fused attention is always on: drop the flag.",
    "--dataloader_num_workers": "latents are computed once, before training, so nothing is loaded in a step: drop it.",
    "--no_safe_serialization": "embeddings are saved as safetensors; for a pickle add --save_a1111 instead.",
    "--validation_epochs": "use --validation_steps.",
    "--local_rank": "accelerate launch sets the rank: drop the flag.",
}


def parse_args(input_args=None):
    """Parses and checks the command line (of the process, or a list of strings); bad input exits with code 2."""
    parser = make_parser()
    args = flags.parse(parser, input_args, REFUSED_FLAGS)
    flags.apply_recipe(args, choose_recipe(parser, args))
    if not args.push_only:
        try:
            check_arguments(parser, args)
            OPTIMIZERS[args.optimizer].check(args)
        except InputError as error:
            parser.error(str(error))
    return args


def choose_recipe(parser, args):
    """The defaults of `--recipe`, or of the optimizer where none is named: flag -> value."""
    fitting = [name for name, how in OPTIMIZERS.items() if args.recipe in (None, how.recipe_name)]
    if "optimizer" in args.given or args.recipe is None:
        if args.optimizer not in fitting:
            its = " or ".join(fitting)
            parser.error(f"--recipe {args.recipe} is one of --optimizer {its}: drop one of the two.")
        fitting = [args.optimizer]
    if args.unet_backend != "torch":  # which alone has a backward pass
        fitting = [name for name in fitting if not OPTIMIZERS[name].differentiates] or fitting
    return {"optimizer": fitting[0], **WINDOW, **OPTIMIZERS[fitting[0]].recipe}


def make_parser():
    """The parser, with every flag."""
    parser = flags.new_parser(
        __file__,
        "ZOODiP: textual inversion on a quantized Stable Diffusion, Z-Image or FLUX.2 klein by forward passes only.",
        "%(prog)s --pretrained_model_name_or_path MODEL --train_data_dir FOLDER --placeholder_token TOKEN"
        " --initializer_token WORD [options]",
    )
    engine = flags.add_model_arguments(parser, "Stable Diffusion 1.x, 2.x or SDXL, Z-Image or FLUX.2 klein")
    textual_inversion.add_engine_arguments(engine, list(BACKENDS))
    textual_inversion.add_concept_arguments(flags.add_data_arguments(parser))
    add_optimization_arguments(flags.group(parser, "optimization"))
    for name, optimizer in OPTIMIZERS.items():
        optimizer.add_flags(functools.partial(flags.group(parser, f"--optimizer {name}"), optimizer=name))
    flags.add_training_arguments(parser, optimizer=("zo_adam", "gradient"))
    rate = (
        "Learning rate of Adam. Default: the paper's, 5e-3 (Stable Diffusion 2.x: 1e-2); gradient: half the root mean"
        " square of the starting word's entries."
    )
    flags.override(parser, "learning_rate", default=None, help=rate)
    textual_inversion.add_held_out_arguments(flags.add_validation_arguments(parser))
    textual_inversion.add_result_arguments(flags.add_saving_arguments(parser))
    flags.add_hub_arguments(parser)
    return parser


def add_optimization_arguments(add):
    add(
        "--recipe",
        choices=list(dict.fromkeys(how.recipe_name for how in OPTIMIZERS.values())),
        decides=flags.NOTHING,  # beside the flags that it stands for
        page=True,
        help="Set of defaults, which flags that are given overrule. paper: exactly ZOODiP's; fast: --optimizer"
        " gradient, or gauss_newton where the engine has no backward pass.",
    )
    add(
        "--optimizer",
        choices=list(OPTIMIZERS),
        default="zo_adam",
        decides=flags.RUN,
        page=True,
        help="Way to move θ. zo_adam: the paper's, from differences of losses; gradient: the exact gradient, by"
        " backpropagation through the quantized model; gauss_newton: from whole predictions, by forward passes alone"
        " (docs/results/README.md).",
    )
    add(
        "--perturbation_scale",
        optimizer=tuple(name for name, how in OPTIMIZERS.items() if how.perturbation_scales),
        type=float,
        limits=flags.Range(0.0, 1.0, above=True),  # the precision of activations says what it is at least
        page=True,
        help="μ: finite-difference step. Default: by optimizer and precision of the activations"
        " (docs/results/README.md); gauss_newton: none where derivatives are exact, unless this gives h.",
    )
    noisy = "Train even where rounding drowns the loss differences."
    add("--allow_noisy_estimates", action="store_true", decides=flags.NOTHING, page=True, help=noisy)
    add(
        "--max_candidates_per_forward",
        type=int,
        limits=flags.Range(1, 8192),
        decides=flags.NOTHING,
        page=True,
        help="Candidates of a step (θ and its perturbations, or derivatives) in one forward pass at most; fewer take"
        " less memory, with the same result. Default: all in one; with gauss_newton 9.",
    )
    low = "T_L of PUTS, inclusive. Default: 500, for SDXL 700, for Z-Image and klein 600."
    add("--puts_min_timestep", type=int, limits=flags.Range(0, 10**6), page=True, help=low)
    high = "T_U of PUTS, exclusive; 0/1000 is uniform. Default: 900, for Z-Image and klein 1000."
    add("--puts_max_timestep", type=int, limits=flags.Range(1, 10**6), page=True, help=high)


def check_arguments(parser, args):
    """Everything that can be judged without looking at a file; each fault is one sentence and exit code 2."""
    flags.check_shared_arguments(parser, args)
    if (args.initializer_token is None) == (args.initializer_embedding is None):
        parser.error("give either --initializer_token, a word to start from, or --initializer_embedding, a file.")
    if args.unet_backend == "openvino" and not BACKENDS[args.quantization].flexible:
        parser.error(f"--unet_backend openvino takes --quantization int8 or none, not {args.quantization}.")
    in_int8 = args.openvino_precision == "int8"
    if in_int8 and (args.unet_backend != "openvino" or "int8" not in OPTIMIZERS[args.optimizer].perturbation_scales):
        parser.error(
            "--openvino_precision int8 belongs to --unet_backend openvino --optimizer gauss_newton: give both, or drop"
            " it; differences of losses drown in INT8 activations."
        )
    if args.unet_backend == "openvino" and OPTIMIZERS[args.optimizer].differentiates:
        parser.error(
            f"--unet_backend openvino has no backward pass for --optimizer {args.optimizer}: drop one of them."
        )
    if args.low_vram and not BACKENDS[args.quantization].flexible:
        parser.error(f"--low_vram streams --quantization int8 or none, not {args.quantization}: choose one of them.")
    if args.low_vram and (args.torch_compile or args.unet_backend == "openvino"):
        other = "--torch_compile" if args.torch_compile else "--unet_backend openvino"
        parser.error(f"--low_vram and {other} exclude each other: a compiled UNet needs its weights in one place.")
    if args.use_aspect_ratio_buckets and (args.torch_compile or args.unet_backend == "openvino"):
        other = "--torch_compile" if args.torch_compile else "--unet_backend openvino"
        parser.error(f"--use_aspect_ratio_buckets has many sizes, and {other} compiles for one: drop one of them.")
    if args.torch_compile and args.unet_backend == "openvino":
        parser.error("--torch_compile has nothing to compile with --unet_backend openvino: drop one of them.")
    if args.early_stopping_patience and not args.num_validation_samples:
        parser.error("--early_stopping_patience judges the validation loss: give --num_validation_samples above 0.")
    if args.validation_data_dir and not args.num_validation_samples:
        parser.error("--validation_data_dir is for the validation loss: give --num_validation_samples above 0.")
    if args.learn == "output" and (args.save_a1111 or args.save_as_full_pipeline):
        other = "--save_a1111" if args.save_a1111 else "--save_as_full_pipeline"
        parser.error(f"{other} is for words that stand in prompts, and --learn output learns none: drop one of them.")
    flags.check_optimizer(parser, args)


# =====================================================================================================
# The chapters of a run
# =====================================================================================================


@dataclass
class Task:
    """What is to be learned, and a frozen model as a function of it: what `prepare` makes of settings and pictures."""

    args: flags.Settings  # complete
    base: Base
    placeholder: Placeholder
    concept: Concept
    model: FrozenModel | None  # None once it has left
    initial: torch.Tensor  # where the placeholder's vectors start, float32 [d], or [k, d] each at its own
    sampling: Sampling
    components: dict  # name -> `StoredModel`
    held_out: Concept | None = None  # of pictures that are not trained on; None: those of `concept` judge, too

    def draw_batch(self, generator):
        """A `Batch` on the host, as the settings say."""
        return draw_batch(self.concept, self.sampling, self.base.scheduler, generator)


@dataclass(kw_only=True)
class Run(loop.Run):
    """A training run; its `model` is a `FrozenModel`, its `learner` a `Learner`."""

    placeholder: Placeholder
    concept: Concept
    sampling: Sampling
    held_out: list  # (`Batch` on the host, how many of its examples count)
    best: torch.Tensor | None = None  # θ with the least validation loss
    standing: torch.Tensor | None = None  # `encoded.EncodedPrompts.standing`

    @property
    def is_over(self):
        """Whether the last step is done or patience at an end."""
        return super().is_over or 0 < self.args.early_stopping_patience <= self.progress.validations_without_gain

    def save(self, name, theta, save=embeddings.save_result):
        """Saves an embedding `[k, d]` in the run's folder."""
        save(self.results, name, self.args.placeholder_token, self.word(theta), self.base.word_parts)

    def word(self, theta):
        """θ as files have it: of an output beside what stands in prompts, `Base.word_parts`."""
        return theta if self.standing is None or theta is None else torch.cat([self.standing, theta], dim=1)

    def state_dict(self):
        return super().state_dict() | {"best": self.best}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.best = state["best"]


def read_pictures(args, base=None):
    """The `Picture`s to learn from; the base says which sizes there are for `--use_aspect_ratio_buckets`."""
    multiple = base.resolution_multiple if args.use_aspect_ratio_buckets else None
    how = args.resolution, args.center_crop, "--train_data_dir", multiple, args.masked_loss
    if args.train_data_dir is not None:
        pictures = images.read_folder(args.train_data_dir, *how, args.mask_dir)
    else:
        from personalization.data.dataset import read_dataset  # with libraries that few runs need

        names = args.dataset_name, args.dataset_config_name, args.image_column, args.caption_column
        pictures = read_dataset(*names, args.resolution, args.center_crop, multiple, args.masked_loss)
    return mark_concept(pictures, args.caption_token, [args.placeholder_token])


def read_held_out(args, base, placeholder, pictures):
    """The `Picture`s of `--validation_data_dir` and `prompts.build_prompts` of them; None without that folder.

    Raises:
        InputError: they cannot be read, or one is among the `Picture`s that are trained on.
    """
    folder, flag = args.validation_data_dir, "--validation_data_dir"
    if folder is None:
        return None
    multiple = base.resolution_multiple if args.use_aspect_ratio_buckets else None
    found = images.read_folder(folder, args.resolution, args.center_crop, flag, multiple, args.masked_loss)
    found = mark_concept(found, args.caption_token, [args.placeholder_token])
    for picture in found:
        for other in pictures:
            if torch.equal(picture.pixels, other.pixels):
                raise InputError(
                    f"{flag}: {plain(picture.name)} is trained on, as {plain(other.name)}: keep it in one of the two."
                )
    return found, prompts.build_prompts(found, placeholder, base, args.learnable_property)


def load_networks(args, base, compute, layers_dir=None):
    """`TextEncoders` and the denoiser, frozen and quantized, and name -> `StoredModel`. Arguments: `load_denoiser`.

    With `--openvino_precision int8` there is no denoiser yet, but None: it is calibrated with the rest of the model.
    Nor with `--learn output`: it comes when the text encoders have left.
    """
    where = compute, args.quantized_cache_dir, args.pool_at_eos
    text_encoder, stored = load_text_encoder(base, BACKENDS[args.quantization], *where)
    if args.openvino_precision == "int8" or base.of_output:
        return text_encoder, None, {"text_encoder": stored}
    denoiser, stored_denoiser = load_denoiser(args, base, compute, layers_dir)
    return text_encoder, denoiser, {"text_encoder": stored, base.family.denoiser: stored_denoiser}


def load_text_encoder(base, backend, compute, cache_dir=None, pool_at_eos=False):
    """The `TextEncoders` of a base, frozen and quantized, and their `StoredModel`. Arguments: `load_frozen`."""
    family, share = base.family, quantized_share(base_model.empty_text_encoder(base), backend)
    parts = [load_frozen(base, name, backend, compute, cache_dir)[0] for name in family.text_encoders]
    text_encoder = families.TextEncoders(family, parts)
    if pool_at_eos:
        family.pool_at_end(text_encoder.encoders, base.tokenizers)
    return text_encoder, base_model.StoredModel(memory.tensor_bytes(text_encoder), share)


def load_denoiser(args, base, compute, layers_dir=None, calibration=None):
    """The denoiser, frozen and quantized, ready for its engine; and its `StoredModel`.

    Args:
        args: resolved settings.
        base: `Base`.
        compute: `Compute`.
        layers_dir: `TemporaryDirectory` of the layers that `--low_vram` streams from disk on a CPU.
        calibration: `openvino_unet.Calibration` of INT8 activations, or None.
    """
    backend, name = BACKENDS[args.quantization], base.family.denoiser
    if args.unet_backend == "openvino":
        on_host = Compute(torch.device("cpu"), torch.float32, torch.contiguous_format)
        load = functools.partial(load_frozen, base, name, backend, on_host, args.quantized_cache_dir)
        where = args.openvino_device, compute, args.quantized_cache_dir
        differentiated = OPTIMIZERS[args.optimizer].stacks(args)
        how = args.resolution, backend.name, load, *where, calibration, differentiated
        denoiser, size = openvino_unet.open_denoiser(base, *how)
        share = quantized_share(base_model.empty_model(base, name), backend)
        return denoiser, base_model.StoredModel(size, share)
    staging = torch.device("cpu") if args.low_vram else None
    denoiser, share = load_frozen(base, name, backend, compute, args.quantized_cache_dir, staging)
    stored = base_model.StoredModel(memory.tensor_bytes(denoiser), share)
    frozen.split_feed_forwards(denoiser)
    if args.low_vram:
        one_order = not OPTIMIZERS[args.optimizer].differentiates
        stream_weights(denoiser, compute.device, layers_dir and layers_dir.name, one_order)
    if args.torch_compile:
        denoiser.compile(mode="reduce-overhead", dynamic=False)
    return denoiser, stored


def assemble_model(args, base, placeholder, prompt_ids, text_encoder, denoiser, compute):
    """The networks as a function of θ: of the token table only the rows of the prompts and of the candidates stay.

    Args:
        args: resolved settings.
        prompt_ids: of the concept's prompts, any shape; or a list of such tensors, those that are trained on first.

    Returns:
        `FrozenModel`, and where θ starts, float32: at the initializer `[d]`, of two text encoders the word of each, or
        at `--initializer_embedding` `[k, d]`. With `--learn output` the text encoders are needed no more, and θ
        `[k, D]` starts where they say.
    """
    tables = base_model.load_token_tables(base)
    prompt_ids = prompt_ids if isinstance(prompt_ids, list) else [prompt_ids]
    prompt_ids = [*prompt_ids, base.tokenize([placeholder.expand(args.validation_prompt or ""), ""])]
    in_use = torch.cat([ids.flatten() for ids in prompt_ids])
    num_rows = candidates_per_pass(args) * placeholder.num_vectors
    for encoder, table in zip(text_encoder.encoders, tables):
        rows = PromptRows(table, in_use, placeholder.first_id, num_rows, compute.device, compute.dtype)
        encoder.set_input_embeddings(rows)
    initial = placeholder.start
    if initial is None:
        initial = torch.cat([table[placeholder.initializer_id].float() for table in tables])
    initial = initial.to(compute.device)
    if base.of_output:
        words = initial, prompt_ids, placeholder, num_rows, base.tokenizer.pad_token_id
        text_encoder, initial = encoded.encode_prompts(text_encoder, *words)
    limit = args.max_candidates_per_forward
    parts = base.family, text_encoder, denoiser, base.scheduler
    model = FrozenModel(*parts, placeholder.first_id, limit, compute, args.torch_compile)
    return model, initial


CALIBRATION_PASSES, CALIBRATION_CANDIDATES = 24, 9


def calibrate(task, rule, pictures):
    """The `openvino_unet.Calibration` of `--openvino_precision int8`, on what training asks of the denoiser at first.

    Args:
        task: `Task` whose model has no denoiser yet.
        rule: before its first step; it has `probes`.
        pictures: `Picture`s of the concept.
    """
    args, base, concept = task.args, task.base, task.concept
    theta = task.initial.expand(args.num_vectors, -1)

    @torch.inference_mode()
    def draw():
        generator, calls = torch.Generator().manual_seed(args.seed), []
        model = replace(task.model, denoiser=openvino_unet.recorder(base.family, calls))
        for _ in range(CALIBRATION_PASSES):
            batch = task.draw_batch(generator).to(theta.device)
            steps = rule.probes(min(CALIBRATION_CANDIDATES, candidates_per_pass(args)) - 1, generator).to(theta)
            model.errors(torch.cat([theta[None], theta + steps]), batch)
        return calls

    digest = images.digest(pictures)
    source = args.deciding("calibration"), digest, concept.prompt_ids.tolist(), concept.prompts_of_image
    files = [path for part in base.family.components[1:] for path in base_model.find_weight_files(base, part)]
    return openvino_unet.Calibration(source, files, draw)


def prepare(
    args, base, placeholder, compute, pictures, captions, found=None, in_turn=None, layers_dir=None, held_out=None
):
    """Loads what settings and pictures ask for: the VAE comes and goes, then text encoder and denoiser arrive, frozen.

    Args:
        args: complete settings.
        base, placeholder, compute: what `resolve_settings` returned.
        pictures, captions: `read_pictures`, and `prompts.build_prompts` of them.
        found: what the optimizer's `look_ahead` returned.
        in_turn: makes a context manager in which the first process of a machine is before the others, so that it
            fills the cache and they read it.
        layers_dir: see `load_denoiser`.
        held_out: what `read_held_out` returned.

    Returns:
        `Task`.
    """
    in_turn, sampling = in_turn or contextlib.nullcontext, choose_sampling(args)
    encode = compute
    if args.low_vram and compute.device.type == "cuda":  # where encoding would take more than training does
        encode = Compute(torch.device("cpu"), torch.float32, compute.memory_format)
    concept, stored_vae = examples.load_concept(pictures, captions, base, args.flip_probability, encode)
    judged = examples.load_concept(*held_out, base, 0.0, encode)[0] if held_out else None  # as they are
    prompt_ids = [each.prompt_ids for each in (concept, judged) if each]
    with in_turn():
        text_encoder, denoiser, stored = load_networks(args, base, compute, layers_dir)
    model, initial = assemble_model(args, base, placeholder, prompt_ids, text_encoder, denoiser, compute)
    task = Task(args, base, placeholder, concept, model, initial, sampling, {"vae": stored_vae, **stored}, judged)
    del text_encoder
    if base.of_output:
        memory.release_freed_memory()
        with in_turn():
            model.denoiser, stored = load_denoiser(args, base, compute, layers_dir)
        task.components[base.family.denoiser] = stored
    OPTIMIZERS[args.optimizer].make_ready(args, model, base)
    if model.denoiser is None:
        rule = OPTIMIZERS[args.optimizer].start(
            args, initial.expand(args.num_vectors, -1).clone(), found, num_processes=1
        )
        in_float = compute._replace(dtype=DTYPES[args.mixed_precision or "no"])  # of what is not INT8
        with in_turn():
            model.denoiser, stored = load_denoiser(args, base, in_float, None, calibrate(task, rule, pictures))
        task.components[base.family.denoiser] = stored
    memory.release_freed_memory()
    return task


def start_learner(args, initial, found=None, num_processes=1, process_index=0):
    """A `Learner` at its first step.

    Args:
        args: resolved settings.
        initial: where it starts, see `Task`.
        found: what the optimizer's `look_ahead` returned.
        num_processes, process_index: of the run.
    """
    theta = initial.expand(args.num_vectors, -1).clone()
    optimizer = OPTIMIZERS[args.optimizer]
    rule = optimizer.start(args, theta, found, num_processes)
    seeds = (np.random.SeedSequence([args.seed, i, process_index]).generate_state(1)[0] for i in range(2))
    generators = (torch.Generator().manual_seed(int(seed)) for seed in seeds)
    return Learner(theta, rule, *generators, optimizer.tail(args))


def choose_sampling(args):
    """The `Sampling` that the settings ask for."""
    timesteps = args.puts_min_timestep, args.puts_max_timestep
    return Sampling(*timesteps, args.train_batch_size, args.gradient_accumulation_steps)


def draw_held_out(task):
    """Fixed examples for the validation loss: (`Batch` on the host, how many of its examples count).

    All batches are as large as a training pass, the last one padded, so that a compiled UNet meets one shape only.
    """
    args, batches = task.args, []
    generator = torch.Generator().manual_seed(args.seed + 1_000_003)
    whole = candidates_per_pass(args) * args.train_batch_size
    task = replace(task, concept=task.held_out or task.concept)
    for first in range(0, args.num_validation_samples, whole):
        count = min(whole, args.num_validation_samples - first)
        batch = replace(task, sampling=replace(task.sampling, batch_size=count)).draw_batch(generator)
        repeated = torch.arange(whole) % count
        batches.append((Batch(*(tensor[repeated] for tensor in batch)), count))
    return batches


def held_out_loss(model, theta, batches):
    """The mean denoising loss of θ over the examples of `draw_held_out`."""
    losses = [model.losses(theta[None], b.to(theta.device), per_example=True)[0, :count] for b, count in batches]
    return torch.cat(losses).mean().item()


def train(run):
    """The training loop.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    args, accelerator, learner, progress = run.args, run.accelerator, run.learner, run.progress
    memory.prepare_training(small_heap=OPTIMIZERS[args.optimizer].differentiates or args.low_vram)
    average = functools.partial(accelerator.reduce, reduction="mean")
    last_good = learner.result.clone()
    clock = loop.Clock(progress)
    interval_loss, interval = torch.zeros((), device=learner.theta.device), 0
    if progress.step == 0:
        validate(run)
        draw_validation_images(run)
    examples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    passes = OPTIMIZERS[args.optimizer].num_forwards(args) * examples_per_step
    bar = loop.progress_bar(accelerator, progress.step, args.max_train_steps)
    with loop.stop_requests(run) as stop_requested, bar:
        while not run.is_over:
            progress.forward_passes += passes
            interval_loss += train_step(learner, run.model, run.concept, run.sampling, average)
            progress.step = step = progress.step + 1
            interval += 1
            bar.update()
            last = step == args.max_train_steps

            # The one read-out of the device: everything above runs without waiting for it. It also comes before
            # anything is judged or saved, so that no NaN ever replaces a good checkpoint or ends in the result.
            intervals = args.logging_steps, args.validation_steps, args.save_steps, args.checkpointing_steps
            due = last or any(step % every == 0 for every in intervals)
            stop = stop_requested(due)
            if due or stop:
                mean_loss = average(interval_loss / interval).item()
                check_finite(run, mean_loss, last_good)
                last_good.copy_(learner.result)
                run.history.loss.append((step, mean_loss))
                figures = learner.rule.figures()
                bar.set_postfix(loss=f"{mean_loss:.4f}", **{name: f"{x:.2g}" for name, x in figures.items()})
                loop.log(accelerator, {"loss": mean_loss, **figures, "steps_per_second": clock.steps_per_second}, step)
                interval_loss.zero_()
                interval = 0
            if step % args.validation_steps == 0 or last:
                validate(run)
            if step % args.save_steps == 0 and accelerator.is_main_process:
                name = f"learned_embeds-steps-{step}.safetensors"
                run.save(name, learner.result, embeddings.try_to_save_embeds)
            clock.read()
            if stop or step % args.checkpointing_steps == 0:
                run.save_checkpoint()
            if stop:
                raise KeyboardInterrupt
            if step % args.validation_steps == 0 and not run.is_over:  # the last ones follow the embedding
                draw_validation_images(run)
    clock.read()


def check_finite(run, loss, last_good):
    """Ends the run with the last good embedding saved once its loss or θ is no longer finite."""
    if math.isfinite(loss) and bool(run.learner.theta.isfinite().all()):
        return
    if run.accelerator.is_main_process:
        run.save(PUBLICATION.result_name, last_good)
    length = OPTIMIZERS[run.args.optimizer].step_flag
    raise DivergedError(
        f"the loss became {loss} at step {run.progress.step}: training stopped and the last good embedding is in"
        f" {run.args.output_dir}/{PUBLICATION.result_name}; try a smaller --{length} than"
        f" {getattr(run.args, length)}, or --mixed_precision no."
    )


@torch.inference_mode()
def validate(run):
    """Validation loss by the first process, whose verdict all follow; saves the embedding that has the least."""
    progress, step, theta = run.progress, run.progress.step, run.learner.result
    if not run.held_out:
        return
    loss = held_out_loss(run.model, theta, run.held_out) if run.accelerator.is_main_process else None
    loss = broadcast_object_list([loss])[0]  # processes that differ in the last bit must stop at the same step
    run.history.validation_loss.append((step, loss))
    loop.log(run.accelerator, {"validation_loss": loss}, step)
    progress.validations_without_gain += 1
    if loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.validations_without_gain = loss, step, 0
        run.best = theta.clone()
        if run.accelerator.is_main_process:
            run.save(PUBLICATION.best_name, theta, embeddings.try_to_save_embeds)


@torch.inference_mode()
def draw_validation_images(run):
    """Draws `--validation_prompt`, saves and logs it, by the first process; returns the images, or None."""
    if run.args.validation_prompt and run.accelerator.is_main_process:
        return validation.show(run.accelerator, run.results, run.progress.step, lambda: draw_samples(run))


def draw_samples(run):
    """Images of `--validation_prompt` with θ in place."""
    args, model = run.args, run.model
    rows, placeholder = model.text_encoder.get_input_embeddings(), run.placeholder
    texts = [placeholder.expand(args.validation_prompt), ""]
    prompt = placeholder.fill(args.validation_prompt) if run.base.family.expands_words else texts[0]
    ids, text_encoder = run.base.tokenize(texts), model.text_encoder
    rows.check(ids)
    rows.write(run.learner.result[None])
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    options |= {"height": args.resolution, "width": args.resolution}
    if run.base.of_output:
        options |= run.base.family.encoded_prompts(text_encoder(ids.to(model.compute.device)))
        prompt = text_encoder = None
    what = prompt, args.num_validation_images, args.seed
    eager = torch.compiler.set_stance("force_eager") if args.torch_compile else contextlib.nullcontext()
    with eager:  # another shape than training's would be compiled for minutes
        samples = validation.draw_images(run.base, text_encoder, model.denoiser, model.compute, *what, **options)
    if model.compute.device.type == "cuda":
        memory.release_freed_memory()  # decoding takes more than training does, and would stay reserved
    return samples


def finish(run, pictures, components, repo_id):
    """Writes the results, the embedding before all else; returns `zoodip_config.json`'s content.

    Args:
        run: the trained `Run`.
        pictures: `Picture`s it learned from.
        components: name -> `StoredModel`.
        repo_id: where it will be pushed, or None.

    Raises:
        RunError: something could not be written; what could is there.
    """
    args, theta, compute = run.args, run.learner.result, run.model.compute
    run.save(PUBLICATION.result_name, theta)
    samples = draw_validation_images(run) or []
    figures = provenance.describe_figures(run.progress, run.history, compute.device) | run.learner.rule.figures()
    method = OPTIMIZERS[args.optimizer].method
    base_license = hub.base_license(run.base.root)
    config = provenance.describe_result(args, method, base_license, compute, components, figures)
    config["run"], run.model = run.id, None  # the full pipeline takes its place in memory
    family, parts = run.base.family, run.base.word_parts
    config |= {"family": family.name, "tags": [OPTIMIZERS[args.optimizer].tag]}
    name, base = args.placeholder_token, args.pretrained_model_name_or_path
    result = Result(name, run.word(theta), run.word(run.best), run.history, samples, pictures, config, base, parts)
    what = run.base.source, compute.dtype, args.placeholder_token, family
    full_pipeline = what if args.save_as_full_pipeline else None
    write_result(result, run.results, PUBLICATION, repo_id, args.save_a1111, full_pipeline)
    return config


# =====================================================================================================
# Main
# =====================================================================================================


def main(args):
    if args.push_only:
        if os.environ.get("RANK", "0") == "0":
            print(f"Pushed to {hub.push_only(args, PUBLICATION)}")
        return
    accelerator = launch.start(args)
    base, placeholder, compute = resolve_settings(args, accelerator.device)
    if args.estimate_memory:
        if accelerator.is_main_process:
            size = f"{compute.device.type}, {args.resolution} px, {candidates_per_pass(args)} candidates a pass"
            print(f"Predicted peak on {size}:\n{estimate_memory(args, base, compute).table()}")
        return
    launch.open_folders(args)
    with run_folder.occupied(args.output_dir, accelerator), run_folder.saying_what_is_safe(args.output_dir):
        learn_concept(args, accelerator, base, placeholder, compute)


def learn_concept(args, accelerator, base, placeholder, compute):
    """A run in `--output_dir`, which is its own, from the pictures to the push."""
    # 1. Everything that can be wrong is checked before anything slow starts.
    optimizer = OPTIMIZERS[args.optimizer]
    memory.warn_if_too_large(args, SMALLER, lambda settings: estimate_memory(settings, base, compute), compute.device)
    if args.validation_prompt and not placeholder.is_in(placeholder.fill(args.validation_prompt)):
        logger.warning(f"--validation_prompt {args.validation_prompt!r} does not contain {placeholder.token}.")
    pictures = read_pictures(args, base)
    images.warn_about_squeezed(pictures)
    optimizer.check_pictures(args, pictures)
    captions = prompts.build_prompts(pictures, placeholder, base, args.learnable_property)
    held_out = read_held_out(args, base, placeholder, pictures)
    steps = optimizer.num_steps(args, base.family)
    launch.settle(args, len(pictures) * args.repeats, accelerator.num_processes, steps)
    if args.recipe:
        names = ["optimizer", *WINDOW, *optimizer.recipe, "max_train_steps"]
        chosen = ", ".join(f"{name} {getattr(args, name)}" for name in names)
        logger.info(f"Recipe {args.recipe}: {chosen}")
    survives = optimizer.differentiates or optimizer.stacks(args)  # bfloat16, with the same result
    if survives and "mixed_precision" not in args.given and is_faster_in_bfloat16(compute):
        logger.info("This CPU has units for bfloat16: with --mixed_precision bf16 a step takes about half the time.")
    base_model.check_weights(base)  # of a model on the Hub it downloads the weights
    data = base_model.weights_digest(base), accelerator.num_processes, pictures
    settings = checkpoints.trajectory_settings(args, *data)
    checkpoint = checkpoints.find_checkpoint(args.resume_from_checkpoint, args.output_dir, settings)
    found = optimizer.look_ahead(args, base, placeholder, captions[0])
    repo_id = hub.prepare(args, accelerator)

    # 2. Pictures and prompts, and a frozen model as a function of θ.
    layers_dir = temporary_folder(args.output_dir) if args.low_vram and compute.device.type == "cpu" else None
    given = args, base, placeholder, compute, pictures, captions, found
    task = prepare(*given, accelerator.local_main_process_first, layers_dir, held_out)
    loop.log_components(task.components)

    # 3. What is learned: θ, from its start or from a checkpoint.
    found = optimizer.look_at(task.model, found, args, base, placeholder, captions[0])
    learner = start_learner(args, task.initial, found, accelerator.num_processes, accelerator.process_index)
    run = Run(
        args=args,
        accelerator=accelerator,
        base=base,
        placeholder=placeholder,
        concept=task.concept,
        model=task.model,
        learner=learner,
        sampling=task.sampling,
        held_out=draw_held_out(task),
        settings=settings,
        standing=task.model.text_encoder.standing,
    )
    task.model = None  # the run's is the only one, so that it can leave
    run.begin(PUBLICATION.of_concept(args.placeholder_token), checkpoint)
    counts = f"{len(pictures)} images, {len(task.concept.prompt_ids)} prompts"
    logger.info(f"{counts}, {candidates_per_step(args)} candidates a step ({candidates_per_pass(args)} a pass)")

    # 4. The loop, and its results.
    with loop.stoppable(run):
        train(run)
        if learner.result.cpu().equal(task.initial.cpu().expand(learner.theta.shape)):
            start = args.initializer_token or args.initializer_embedding
            logger.warning(f"Nothing was learned: {placeholder.token} is {start!r} to the last bit.")
        if accelerator.is_main_process:
            config = finish(run, pictures, task.components, repo_id)
        loop.end(accelerator)
        if repo_id is not None:
            commit = hub.push_to_hub(args.output_dir, config, PUBLICATION, repo_id, args.hub_token)
            logger.info(f"Pushed to {commit}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), __file__)
