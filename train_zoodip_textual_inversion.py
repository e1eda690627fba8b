#!/usr/bin/env python
# Copyright 2026 The ZOODiP textual inversion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Teach a quantized Stable Diffusion a new word with forward passes only (ZOODiP, arXiv 2503.14868).

The shortest command that works, offline, on the demo base of this repository:

    accelerate launch train_zoodip_textual_inversion.py \
        --pretrained_model_name_or_path demo/base --train_data_dir demo/subjects/checkered_heart \
        --placeholder_token "<my-toy>" --initializer_token heart --max_train_steps 300 --output_dir my-toy

and on Stable Diffusion 1.5:

    accelerate launch train_zoodip_textual_inversion.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir ./my-dog \
        --placeholder_token "<my-dog>" --initializer_token dog --output_dir my-dog-concept

Only the embedding of the placeholder token is learned; everything else is frozen and quantized, and no backward pass
is ever run. The result is a few kilobytes that `StableDiffusionPipeline.load_textual_inversion` reads.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import gc
import hashlib
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import time
import weakref
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
import jinja2
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator, init_empty_weights
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, set_module_tensor_to_device
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.utils import make_image_grid
from huggingface_hub import (
    ModelCard,
    ModelCardData,
    auth_check,
    create_repo,
    get_token,
    snapshot_download,
    upload_folder,
)
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id
from huggingface_hub.utils.sha import sha_fileobj
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


logger = get_logger(__name__)


class InputError(ValueError):
    """What the user gave cannot work; the message is one sentence that names it and the mend."""

    exit_code = 2


class PushError(InputError):
    """A finished run could not be uploaded; it is safe on disk, and the message has the command that pushes it."""

    exit_code = 3


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


def estimate_gradient(loss_fn, theta, num_perturbations, perturbation_scale, generator, estimator="rge"):
    """Zeroth-order estimate of the gradient of a loss at `theta`, from loss values alone.

    Args:
        loss_fn: takes candidates `[m, *theta.shape]`, returns their losses `[m]`. All candidates must see the same
            data, noise and timestep (common random numbers), or the differences mean nothing.
        theta: the point θ, any shape; it is read, never changed.
        num_perturbations: n, the number of Gaussian directions e_i.
        perturbation_scale: μ, the step of the finite difference.
        generator: source of the directions (and of nothing else); None takes the global one.
        estimator: "rge", forward differences, n + 1 losses (Eq. 3), or "spsa", central differences, 2n (Eq. S11).

    Returns:
        The estimate (shaped like `theta`) and the base loss: L(θ) for "rge"; for "spsa", which never evaluates θ
        itself, the mean of all losses, equal to L(θ) up to O(μ²).

    Raises:
        ValueError: unknown estimator.
    """
    draw_device = generator.device if generator is not None else theta.device
    pinned = draw_device.type == "cpu" and theta.device.type == "cuda"  # the copy must not make the host wait
    directions = torch.randn(
        (num_perturbations, *theta.shape), generator=generator, device=draw_device, pin_memory=pinned
    ).to(theta, non_blocking=True)
    steps = perturbation_scale * directions
    if estimator == "rge":
        losses = loss_fn(torch.cat([theta[None], theta + steps]))
        base_loss = losses[0]
        slopes = (losses[1:] - losses[0]) / perturbation_scale
    elif estimator == "spsa":
        losses = loss_fn(torch.cat([theta + steps, theta - steps]))
        base_loss = losses.mean()
        slopes = (losses[:num_perturbations] - losses[num_perturbations:]) / (2 * perturbation_scale)
    else:
        raise ValueError(f'estimator must be "rge" or "spsa", not {estimator!r}')
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
        centred = trajectory.double().cpu() - trajectory.double().cpu().mean(dim=0)
        spread = centred.std(dim=0, correction=0)
        standardised = centred / torch.where(spread > 0, spread, 1.0)  # a column that never moved stays zero
        _, singular, directions = torch.linalg.svd(standardised, full_matrices=False)
        variance = singular**2
        if not variance.sum() > 0:
            return None
        # i*: the smallest count of leading directions whose share of the variance exceeds 1 - ν (Eq. 7).
        share = variance.cumsum(0) / variance.sum()
        kept = int((share <= 1 - self.threshold).sum()) + 1
        # Centring leaves rank τ - 1, so the last direction is rounding noise: it is not evidence of anything.
        negligible = singular[0] * max(trajectory.shape) * torch.finfo(singular.dtype).eps
        rank = int((singular > negligible).sum())
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

_scratch = {}  # one dequantization buffer per (device, dtype), as large as the largest layer met so far


def quantize_per_channel(weight):
    """Symmetric absmax INT8 per output channel: weight `[out, ...]` -> int8 like it, float32 scale `[out, 1, ...]`."""
    weight = weight.float()
    scale = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize(weight, scale):
    """int8 weight times scale, in the scale's dtype.

    The result lives in one buffer that the next call overwrites: fresh memory for every layer costs several times the
    arithmetic. (Where autograd may need the weight later, or a compiler plans the memory, it is a new tensor.) The
    scale is applied before the product, not after it: the unscaled product of int8 values overflows float16.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return weight.to(scale.dtype) * scale
    key = (weight.device, scale.dtype)
    if key not in _scratch or _scratch[key].numel() < weight.numel():
        with torch.inference_mode(False):  # an ordinary tensor may be overwritten inside and outside inference mode
            _scratch[key] = torch.empty(weight.numel(), dtype=scale.dtype, device=weight.device)
    # as_strided rather than view keeps channels-last weights channels-last
    return _scratch[key].as_strided(weight.shape, weight.stride()).copy_(weight).mul_(scale)


class Int8Linear(torch.nn.Module):
    """A frozen `nn.Linear` with its weight in INT8, one scale per output channel; activations keep their dtype."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_per_channel(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, input):
        return F.linear(input, dequantize(self.weight, self.scale), self.bias)


class Int8Conv2d(torch.nn.Module):
    """A frozen `nn.Conv2d` (zero padding) with its weight in INT8, one scale per output channel."""

    def __init__(self, conv):
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        weight, scale = quantize_per_channel(conv.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = conv.bias

    def forward(self, input):
        weight = dequantize(self.weight, self.scale)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def quantize_layer(layer, quantization, dtype):
    """The quantized stand-in of a Linear or Conv2d ("int8" or "nf4"), computing in `dtype` (on meta, its shell)."""
    if quantization == "nf4" and isinstance(layer, torch.nn.Linear):
        import bitsandbytes as bnb

        shape = (layer.in_features, layer.out_features)
        nf4 = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        nf4.weight = bnb.nn.Params4bit(layer.weight.data.to(dtype), requires_grad=False, quant_type="nf4")
        nf4.bias = layer.bias
        # bitsandbytes packs the weight when it is moved to its device. In evaluation mode its CPU kernel would compute
        # in bfloat16, which drowns the differences between candidates.
        return nf4.train()
    quantized = Int8Linear(layer) if isinstance(layer, torch.nn.Linear) else Int8Conv2d(layer)
    quantized.scale = quantized.scale.to(dtype)
    return quantized


def quantize_in_place(model, quantization, dtype):
    """Quantizes every Linear and Conv2d of a model, loaded on the CPU or empty on meta."""
    if quantization == "quanto-int8":
        from optimum.quanto import freeze, qint8, quantize

        quantize(model, weights=qint8)
        freeze(model)
    elif quantization != "none":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                model.set_submodule(name, quantize_layer(layer, quantization, dtype))
    return model


def find_weight_files(args, subfolder):
    """The safetensors files (one, or its shards) of a component, from a local folder or the Hub.

    Raises:
        InputError: the component has no safetensors weights (of that variant).
    """
    stem = "model" if subfolder == "text_encoder" else "diffusion_pytorch_model"
    variant = f".{args.variant}" if args.variant else ""
    shard = "-[0-9]*-of-[0-9]*"
    patterns = [f"{stem}{variant}.safetensors", f"{stem}{variant}{shard}.safetensors"]
    patterns += [f"{stem}{shard}{variant}.safetensors"] if variant else []
    root = Path(args.pretrained_model_name_or_path)
    if not root.is_dir():
        allowed = [f"{subfolder}/{pattern}" for pattern in patterns]
        root = Path(snapshot_download(str(root), revision=args.revision, allow_patterns=allowed))
    files = next((found for p in patterns if (found := sorted((root / subfolder).glob(p)))), [])
    if not files:
        raise InputError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} has no {patterns[0]} in"
            f" {subfolder}/: choose another --variant or convert the weights to safetensors."
        )
    return files


def stored_tensors(files):
    """(name, tensor) of safetensors files, one memory-mapped tensor at a time."""
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            with safe_open(
                path, framework="pt"
            ) as tensors:  # opened anew, so that pages read before leave the process
                value = tensors.get_tensor(name)
            yield name.removeprefix("text_model."), value  # a prefix that transformers dropped in its version 5


def int8_tensors(model, tensors, dtype):
    """(name, tensor) of the INT8 model, one at a time: a quantized layer's weight and scale, all else in `dtype`."""
    for name, value in tensors:
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(layer), (Int8Linear, Int8Conv2d)):
            weight, scale = quantize_per_channel(value)
            yield name, weight
            yield f"{layer}.scale", scale.to(dtype)
        else:
            yield name, value.to(dtype)


def write_int8_file(path, model, tensors, dtype):
    """Streams an INT8 model into a safetensors file; never more than one layer of it is in memory.

    safetensors' own `save_file` wants the whole model at once. The format is an 8-byte length, a JSON header with
    every tensor's place, and the data; wide types come first, so that all are aligned.
    """
    names = {torch.int8: "I8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    empty = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    for name, tensor in sorted(empty.items(), key=lambda item: -item[1].element_size()):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    missing = set(empty)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)
        for name, tensor in int8_tensors(model, tensors, dtype):
            file.seek(8 + len(encoded) + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
            missing.discard(name)
        if missing:
            raise InputError(f"the weights lack {min(missing)!r}: the file is cut; get it again.")


def source_digest(files, cache_dir):
    """SHA-256 over the contents of weight files; the Hub's cache names its files by it, others are read only once."""
    digests = []
    for path in map(Path.resolve, files):
        if re.fullmatch(r"[0-9a-f]{64}", path.name):
            digests.append(path.name)
            continue
        stamp = repr((str(path), path.stat().st_size, path.stat().st_mtime_ns))
        note = Path(cache_dir) / f"source-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.sha256"
        if not note.is_file():
            with path.open("rb") as file, atomic_path(note) as temporary:
                temporary.write_text(sha_fileobj(file).hex())
        digests.append(note.read_text())
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def cached_int8_file(args, files, model, dtype, name):
    """The INT8 copy of weight files in `--quantized_cache_dir`, made on first use, named by what it is made of."""
    kind = str(dtype).removeprefix("torch.")
    path = Path(args.quantized_cache_dir) / f"{name}-int8-{kind}-{source_digest(files, args.quantized_cache_dir)[:20]}"
    path = path.with_suffix(".safetensors")
    if not path.is_file():
        logging.info(f"Quantizing the {name} once, into {path}")
        known = model.state_dict()
        write_int8_file(path, model, ((n, t) for n, t in stored_tensors(files) if n in known), dtype)
    return path


def empty_model(args, subfolder):
    """UNet ("unet") or text encoder ("text_encoder") as its config describes it, frozen, on the meta device."""
    name, where = args.pretrained_model_name_or_path, {"subfolder": subfolder, "revision": args.revision}
    with init_empty_weights():
        if subfolder == "unet":
            model = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(name, **where))
        else:
            model = CLIPTextModel(CLIPTextConfig.from_pretrained(name, **where))
    return model.requires_grad_(False).eval()


def load_frozen(args, subfolder, device, dtype):
    """Loads UNet or text encoder tensor by tensor, each quantized on its way: no full-precision copy is ever whole.

    With "int8" on the CPU the weights are the memory-mapped pages of a file in `--quantized_cache_dir`. The text
    encoder comes without its token table, see `PromptRows`.

    Returns:
        The frozen module on `device`, and the share of its parameters that is quantized.
    """
    model = empty_model(args, subfolder)
    share = quantizable_share(model) if args.quantization != "none" else 0.0
    files = find_weight_files(args, subfolder)
    if subfolder == "text_encoder":
        model.set_input_embeddings(torch.nn.Identity())
    if args.quantization in ("int8", "nf4"):
        quantize_in_place(model, args.quantization, dtype)
    known = model.state_dict()
    if args.quantization == "int8" and args.quantized_cache_dir != "none":
        path = cached_int8_file(args, files, model, dtype, subfolder)
        with safe_open(path, framework="pt") as file:
            tensors = [(name, file.get_tensor(name)) for name in file.keys()]
    else:
        tensors = ((n, t) for n, t in stored_tensors(files) if n in known)
        if args.quantization in ("int8", "nf4"):
            tensors = int8_tensors(model, tensors, dtype)
    staging = "cpu" if args.quantization == "quanto-int8" else device  # quanto quantizes whole models: on the host
    for name, value in tensors:
        layer, _, leaf = name.rpartition(".")
        layer = model.get_submodule(layer)
        if type(layer).__name__ == "Linear4bit" and leaf == "weight":
            layer.weight = type(layer.weight)(value.to(dtype), requires_grad=False, quant_type="nf4").to(device)
        else:
            set_module_tensor_to_device(model, name, staging, value=value, dtype=dtype)
    del tensors
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise InputError(
            f"the {subfolder} weights of {args.pretrained_model_name_or_path!r} lack {missing[0]!r}: they are cut."
        )
    if args.quantization == "quanto-int8":
        quantize_in_place(model, args.quantization, dtype)
    return model.requires_grad_(False).to(device), share


def load_token_table(args):
    """The token table `[vocabulary, d]` of the text encoder, memory-mapped, as stored."""
    files = find_weight_files(args, "text_encoder")
    return next(value for name, value in stored_tensors(files) if name == "embeddings.token_embedding.weight")


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
        index = torch.full((first_placeholder_id + num_rows,), -1)  # an id that was not announced fails loudly
        index[ids] = torch.arange(len(ids))
        index[first_placeholder_id:] = len(ids) + torch.arange(num_rows)
        rows = torch.cat([table[ids].to(dtype), torch.zeros(num_rows, table.shape[1], dtype=dtype)])
        self.register_buffer("index", index.to(device), persistent=False)
        self.register_buffer("weight", rows.to(device), persistent=False)
        self.first_candidate = len(ids)

    def write(self, candidates):
        """Puts candidates `[m, k, d]` into the placeholder's rows, the first where the prompts' own ids point."""
        rows = candidates.flatten(0, 1)
        self.weight[self.first_candidate : self.first_candidate + len(rows)] = rows.to(self.weight)

    def forward(self, ids):
        return F.embedding(self.index[ids], self.weight)


def stream_weights(unet, device, folder):
    """`--low_vram`: the UNet's weights come layer by layer for every pass and leave again (diffusers' offloading).

    A forward-only method reads every weight once per pass, whatever n and the batch are, so that all candidates share
    the cost. On CUDA they come from pinned host memory, the next layer while one computes; on a CPU from `folder`.
    """
    if device.type == "cpu":
        how = {"offload_to_disk_path": str(folder)}
    else:
        how = {"use_stream": True, "record_stream": True}
    apply_group_offloading(unet, onload_device=device, offload_type="leaf_level", **how)


def use_channels_last(model):
    """Lays convolution weights out channels-last, as cuDNN's half-precision kernels want them (quanto's stay)."""
    for layer in model.modules():
        if type(layer) in (torch.nn.Conv2d, Int8Conv2d):
            layer.to(memory_format=torch.channels_last)


def quantizable_share(model):
    """The share of a model's parameters that sits in weights of Linear and Conv2d layers."""
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    return sum(layer.weight.numel() for layer in layers) / sum(p.numel() for p in model.parameters())


def module_bytes(module):
    """Bytes of a module's parameters and buffers, quantized ones as stored."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in (getattr(t, "_data", t) for t in tensors))


# =====================================================================================================
# The UNet in OpenVINO: nothing here needs autograd, so any engine that computes a forward pass will do.
# =====================================================================================================

# torch.export finds that diffusers' upsampling branches at 64 examples; one graph serves every batch below.
OPENVINO_MAX_BATCH = 63


def export_openvino(unet, latent_size, prompt_length):
    """The UNet as an OpenVINO model with a free batch size, its INT8 weights as they are.

    `torch.export` runs on fake tensors: beside the weights this takes some 100 MB, where tracing takes gigabytes.
    """
    import openvino

    class Positional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, encoder_hidden_states):
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    sample = torch.zeros(2, unet.config.in_channels, latent_size, latent_size)
    context = torch.zeros(2, prompt_length, unet.config.cross_attention_dim)
    batch = torch.export.Dim("batch", min=1, max=OPENVINO_MAX_BATCH)
    example = (sample, torch.zeros(2), context)
    with torch.no_grad():
        program = torch.export.export(Positional().eval(), example, dynamic_shapes=({0: batch},) * 3)
    model = openvino.convert_model(program)
    for node, tensor in zip(model.inputs, example):  # the graph keeps only the batch open, its inputs should say so
        node.get_node().set_partial_shape(openvino.PartialShape([-1, *tensor.shape[1:]]))
    model.validate_nodes_and_infer_types()
    return model


class OpenVINOUNet(torch.nn.Module):
    """A UNet that OpenVINO computes, called like the torch one by training and by `StableDiffusionPipeline`.

    Args:
        model: an `openvino.Model`, or the path of its `.xml`.
        config: the torch UNet's.
        engine: OpenVINO's device: CPU, GPU, NPU.
        dtype: torch.float32, or torch.bfloat16 to let OpenVINO compute in it.
        device: torch device of what is returned.
    """

    def __init__(self, model, config, engine, dtype, device):
        super().__init__()
        import openvino

        self.config, self.dtype, self.device = config, dtype, device
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32"}
        optional = {
            # By default products are computed in INT8, which drowns the differences between candidates.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        supported = core.get_property(engine, "SUPPORTED_PROPERTIES")
        settings |= {name: value for name, value in optional.items() if name in supported}
        self.compiled = core.compile_model(model, engine, settings)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **unused):
        timesteps = torch.as_tensor(timestep).float().expand(len(sample))
        inputs = [x.float().cpu().numpy() for x in (sample, timesteps, encoder_hidden_states)]
        prediction = torch.from_numpy(self.compiled(inputs)[0]).to(sample)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def load_openvino_unet(args, device, dtype, latent_size, prompt_length):
    """Compiles the UNet for `--openvino_device`; the exported graph is kept in `--quantized_cache_dir`.

    Returns:
        The `OpenVINOUNet`, the share of its parameters that is quantized, and the bytes of its weights as stored.
    """
    import openvino

    unet, cpu = empty_model(args, "unet"), torch.device("cpu")
    config, share = unet.config, quantizable_share(unet) if args.quantization == "int8" else 0.0
    path = None
    if args.quantized_cache_dir != "none":
        made_of = [
            source_digest(find_weight_files(args, "unet"), args.quantized_cache_dir),
            json.dumps(dict(config), sort_keys=True),
        ]
        made_of += [args.quantization, latent_size, prompt_length, openvino.__version__]
        key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]
        path = Path(args.quantized_cache_dir) / f"unet-openvino-{key}.xml"
    if path is None or not path.is_file():
        logging.info("Exporting the UNet to OpenVINO" + (f" once, into {path}" if path else ""))
        unet, _ = load_frozen(args, "unet", cpu, torch.float32)
        graph = export_openvino(unet, latent_size, prompt_length)
        if path is None:
            size = module_bytes(unet)
            return OpenVINOUNet(graph, config, args.openvino_device, dtype, device), share, size
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            openvino.save_model(graph, Path(folder) / "unet.xml", compress_to_fp16=False)
            os.replace(Path(folder) / "unet.bin", path.with_suffix(".bin"))
            os.replace(Path(folder) / "unet.xml", path)
        del unet, graph
    size = path.with_suffix(".bin").stat().st_size
    return OpenVINOUNet(path, config, args.openvino_device, dtype, device), share, size


# =====================================================================================================
# The frozen model as a function of θ
# =====================================================================================================


def candidate_losses(candidates, batch, text_encoder, unet, first_placeholder_id, max_candidates=None):
    """Denoising losses of m candidates for the placeholder's vectors, all on the same batch, in one forward pass.

    Each candidate owns rows of the text encoder's token table (`PromptRows`): candidate j of a chunk sits at
    `first_placeholder_id + j·k` and its prompts use those ids, so m candidates are just a larger batch.

    Args:
        candidates: `[m, k, d]`.
        batch: what `noise_batch` returns, b examples.
        text_encoder, unet: frozen modules; the table has room for `max_candidates` (or m) candidates.
        first_placeholder_id: id of the placeholder's first vector; its k ids are consecutive.
        max_candidates: candidates per forward pass; None evaluates all at once.

    Returns:
        float32 losses `[m]`: mean over b examples and all latent entries (‖ε − ε_φ(z_t, t, c(y*))‖²).
    """
    table = text_encoder.get_input_embeddings()
    num_vectors = candidates.shape[1]
    losses = []
    for chunk in candidates.split(max_candidates or len(candidates)):
        m = len(chunk)
        table.write(chunk)
        shift = num_vectors * torch.arange(m, device=chunk.device).view(m, 1, 1)
        ids = batch["prompt_ids"].expand(m, -1, -1)
        ids = torch.where(ids >= first_placeholder_id, ids + shift, ids).flatten(0, 1)
        conditioning = text_encoder(ids)[0]
        noisy = batch["noisy_latents"].repeat(m, 1, 1, 1).to(conditioning)
        if noisy.is_cuda:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        prediction = unet(noisy, batch["timesteps"].repeat(m), conditioning, return_dict=False)[0]
        target = batch["target"].repeat(m, 1, 1, 1)
        losses.append(F.mse_loss(prediction.float(), target, reduction="none").view(m, -1).mean(dim=1))
    return torch.cat(losses)


def draw_examples(concept, batch_size, generator):
    """Draws b (latent, prompt) pairs with replacement: an image, maybe its flip, a sample of its latent, a caption."""
    flips, images = concept["moments"].shape[:2]
    chosen = torch.randint(images, (batch_size,), generator=generator)
    flipped = torch.rand(batch_size, generator=generator) < concept["flip_probability"]
    mean, logvar = concept["moments"][flipped.long().clamp(max=flips - 1), chosen].chunk(2, dim=1)
    latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn(mean.shape, generator=generator)
    prompts = [concept["prompts_of_image"][i] for i in chosen.tolist()]
    picks = [p[int(torch.randint(len(p), (1,), generator=generator))] for p in prompts]
    return latents * concept["scaling_factor"], concept["prompt_ids"][picks]


def noise_batch(latents, prompt_ids, timesteps, generator, scheduler, device):
    """Noises latents to timesteps t and pairs them with the model's target (noise, or velocity for v-prediction)."""
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicts_noise = scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else scheduler.get_velocity(latents, noise, timesteps)
    batch = {"noisy_latents": noisy, "target": target, "timesteps": timesteps, "prompt_ids": prompt_ids}
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


def to_device(tensor, device):
    """Moves a tensor of the host without making the host wait (only pinned memory travels by itself)."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# =====================================================================================================
# Predicting memory, without loading a weight
# =====================================================================================================


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive while a model runs on the meta device; `peak` is the most there were at once.

    Args:
        on_cpu: count what a CPU needs beside the tensors, too. For a convolution, oneDNN's own copies of input, weight
            and output in blocked layouts. For blocks of up to 32 MB, `heap_slack` of their size: glibc's heap keeps
            what was freed, and fragments.
    """

    heap_block = 2**25

    def __init__(self, on_cpu, heap_slack):
        super().__init__()
        self.on_cpu, self.heap_slack = on_cpu, heap_slack
        self.live = self.peak = 0
        self.known = set()

    def _need(self, size):
        return size * (1 + self.heap_slack) if self.on_cpu and size <= self.heap_block else size

    def _forget(self, key, size):
        self.known.discard(key)
        self.live -= self._need(size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage()._cdata for t in given}  # views of weights and inputs are no new memory
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for storage in (t.untyped_storage() for t in tensors):
            if storage._cdata not in self.known and storage._cdata not in given:
                self.known.add(storage._cdata)
                self.live += self._need(storage.nbytes())
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        copies = 0
        if self.on_cpu and func is torch.ops.aten.convolution.default:
            copies = sum(t.numel() * t.element_size() for t in (args[0], args[1], *tensors))
        self.peak = max(self.peak, self.live + copies)
        return result


# The share by which glibc's heap outgrows the tensors in it while training, measured; see `keep_freed_blocks`.
HEAP_SLACK = 0.8


def activation_bytes(run, device, heap_slack=HEAP_SLACK):
    """Peak bytes of the tensors that `run()` makes on the meta device, as they would be on `device`."""

    def fused(query, *args, **kwargs):  # PyTorch's fused attention: only the result takes memory
        return torch.empty_like(query)

    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused
    try:
        with torch.no_grad(), LiveBytes(device.type == "cpu", heap_slack) as live:
            run()
    finally:
        F.scaled_dot_product_attention = attention
        for key in [key for key in _scratch if key[0].type == "meta"]:
            del _scratch[key]
    return int(live.peak)


def weight_bytes(model, quantization, dtype):
    """Bytes of an empty model's weights once quantized: INT8 and a scale per output channel, NF4 and one per 64."""
    total = 0
    for layer in model.modules():
        linear, conv = isinstance(layer, torch.nn.Linear), isinstance(layer, torch.nn.Conv2d)
        for name, parameter in layer.named_parameters(recurse=False):
            if quantization == "none" or name != "weight" or not (linear or conv):
                total += parameter.numel() * dtype.itemsize
            elif quantization == "nf4" and linear:
                total += parameter.numel() * 33 // 64
            else:
                total += parameter.numel() + len(parameter) * dtype.itemsize
    return total


# Beside tensors, measured: the code and caches of the CPU kernels of PyTorch and of OpenVINO. CUDA's context is not
# counted.
CPU_KERNEL_BYTES = 30 * 2**20
OPENVINO_BYTES = 120 * 2**20


def estimate_memory(args, base, device, dtype):
    """The memory that a run will need, computed from the configs alone.

    Args:
        args: settings, completed by `read_base`.
        base: what `read_base` returned.
        device, dtype: where and in what activations are computed.

    Returns:
        dict of bytes. "libraries" (this process now; 0 on CUDA), "VAE", "VAE activations", "text encoder", "UNet",
        "activations"; "mapped": the part of the weights that are pages of files, which the system can drop; "peak":
        the largest sum of what is there at one time.
    """
    name, where = args.pretrained_model_name_or_path, {"subfolder": "vae", "revision": args.revision}
    on_cpu, quantization = device.type == "cpu", args.quantization
    text_encoder, unet = empty_model(args, "text_encoder"), empty_model(args, "unet")
    text_encoder.set_input_embeddings(torch.nn.Identity())
    with init_empty_weights():
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(name, **where)).eval()
    weights = {
        "VAE": weight_bytes(vae, "none", dtype),
        "text encoder": weight_bytes(text_encoder, quantization, dtype),
        "UNet": weight_bytes(unet, quantization, dtype),
    }
    whole = weight_bytes(unet, "none", dtype)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {kind: [m.weight.numel() for m in unet.modules() if isinstance(m, kind)] for kind in kinds}
    largest = max(max(sizes) for sizes in layers.values())
    if quantization == "int8":
        quantize_in_place(unet, quantization, dtype)
    for model in (vae, unet):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)

    examples = candidates_per_pass(args) * args.train_batch_size
    meta = {"device": "meta", "dtype": dtype}
    size = base["latent_size"]
    sample = torch.empty(examples, unet.config.in_channels, size, size, **meta)
    context = torch.empty(examples, base["tokenizer"].model_max_length, unet.config.cross_attention_dim, **meta)
    slack = 0.0 if args.low_vram else HEAP_SLACK
    activations = activation_bytes(lambda: unet(sample, torch.empty(examples, device="meta"), context), device, slack)
    if quantization in ("nf4", "quanto-int8"):  # a dequantized layer and its transposed copy, which meta does not see
        activations += 2 * largest * dtype.itemsize
    pixels, latent = torch.empty(1, 3, args.resolution, args.resolution, **meta), sample[:1]
    encoding = activation_bytes(lambda: vae.encode(pixels).latent_dist.parameters, device, heap_slack=0.0)
    decoding = activation_bytes(lambda: vae.decode(latent), device) if args.validation_prompt else 0
    vae.decoder = None  # as while encoding
    encoding_peak = max(weights["VAE"] if on_cpu else 0, weight_bytes(vae, "none", dtype) + encoding)

    is_mapped = on_cpu and quantization == "int8" and args.quantized_cache_dir != "none"
    mapped, before_streaming = weights["text encoder"] if is_mapped else 0, weights["text encoder"] + weights["UNet"]
    if args.unet_backend == "openvino":
        # Beside the stored weights it has all of them in float32, and those of products a second time, repacked.
        weights["UNet"] += 4 * sum(sum(sizes) for sizes in layers.values()) + 4 * sum(layers[torch.nn.Linear])
        weights["UNet"] += OPENVINO_BYTES
    elif is_mapped:
        mapped += weights["UNet"]
    if args.low_vram:  # one layer and the next one, as stored; pages of the mapped file stay until they are dropped
        streamed = 2 * largest * (dtype.itemsize if quantization == "none" else 1)
        weights["UNet"] = streamed + (weights["UNet"] if is_mapped else 0)
    resident = weights["text encoder"] + weights["UNet"]
    phases = {
        "encoding the images": encoding_peak,
        "quantizing": weights["text encoder"] + whole if on_cpu and quantization == "quanto-int8" else 0,
        "writing the layers to disk": before_streaming if args.low_vram and on_cpu else 0,
        "training": resident + activations,
        "validation images": resident + weights["VAE"] + decoding if args.validation_prompt else 0,
    }
    libraries = process_memory()["rss"] + CPU_KERNEL_BYTES if on_cpu else 0
    return {
        "libraries": libraries,
        **weights,
        "VAE activations": max(encoding, decoding),
        "activations": activations,
        "mapped": mapped,
        "phases": phases,
        "peak": libraries + max(phases.values()),
    }


def candidates_per_step(args):
    """How many points a step evaluates: θ and n perturbed ones, or n pairs."""
    return args.num_perturbations + 1 if args.gradient_estimator == "rge" else 2 * args.num_perturbations


def candidates_per_pass(args):
    """How many of them go through the model as one batch."""
    return min(candidates_per_step(args), args.max_candidates_per_forward or candidates_per_step(args))


def keep_freed_blocks(megabytes):
    """Sets up to which size glibc keeps freed blocks for itself; larger ones go back to the system at once.

    What is loaded once should go back. In the training loop that would cost 30 % of a step in page faults.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6").mallopt, -1, -3
        mallopt(mmap_threshold, megabytes * 2**20)
        mallopt(trim_threshold, 2 * megabytes * 2**20)


def release_freed_memory():
    """Gives what has been freed back to the system: after large models have left, glibc keeps hundreds of MB."""
    gc.collect()
    if hasattr(psutil, "heap_trim"):  # not every C library has such a call
        psutil.heap_trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def process_memory():
    """Bytes this process has in memory: "rss" in all, "anonymous" what is no page of a file (None where unknown)."""
    rss, status = psutil.Process().memory_info().rss, Path("/proc/self/status")
    anonymous = re.search(r"RssAnon:\s+(\d+)", status.read_text()) if status.is_file() else None
    return {"rss": rss, "anonymous": int(anonymous[1]) * 1024 if anonymous else None}


def warn_if_too_large(args, base, device, dtype):
    """Says before anything is loaded that the device has less memory than the run needs, and which flags would fit."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available + process_memory()["rss"]

    def need(**changes):
        figures = estimate_memory(argparse.Namespace(**{**vars(args), **changes}), base, device, dtype)
        return figures["peak"] - figures["mapped"]

    needed = need()
    if needed <= free:
        return
    ways = {"unet_backend": "torch", "quantization": "int8", "max_candidates_per_forward": 1, "low_vram": True}
    flags, changes = [], {}
    for name, value in ways.items():
        if getattr(args, name) == value:
            continue
        changes[name] = value
        flags.append(f"--{name}" + ("" if value is True else f" {value}"))
        if need(**changes) <= free:
            mend = " ".join(flags) + " would fit."
            break
    else:
        mend = "no choice of flags makes it fit; try a smaller --resolution."
    logger.warning(
        f"This run needs about {needed / 2**20:.0f} MB and the {device.type} has {free / 2**20:.0f} MB free: {mend}"
    )


def print_estimate(args, figures, device):
    """The prediction as a table, in MB (2^20 bytes)."""
    print(f"Predicted peak on {device.type}, {args.resolution} px, {candidates_per_pass(args)} candidates a pass:")
    parts = ("libraries", "VAE", "VAE activations", "text encoder", "UNet", "activations")
    lines = [(name, figures[name]) for name in parts]
    lines += [(f"while {name}", figures["libraries"] + size) for name, size in figures["phases"].items() if size]
    lines.append(("peak", figures["peak"]))
    for name, size in lines:
        print(f"  {name:<26}{size / 2**20:8.0f} MB")
    if figures["mapped"]:
        print(f"  of it pages of files, which the system can drop: {figures['mapped'] / 2**20:.0f} MB")


# =====================================================================================================
# Data
# =====================================================================================================

OBJECT_TEMPLATES = [
    f"{words} {{}}"
    for words in (
        "a photo of a|a rendering of a|a cropped photo of the|the photo of a|a photo of a clean|a photo of a dirty|"
        "a dark photo of the|a photo of my|a photo of the cool|a close-up photo of a|a bright photo of the|"
        "a cropped photo of a|a photo of the|a good photo of the|a photo of one|a close-up photo of the|"
        "a rendition of the|a photo of the clean|a rendition of a|a photo of a nice|a good photo of a|"
        "a photo of the nice|a photo of the small|a photo of the weird|a photo of the large|a photo of a cool|"
        "a photo of a small"
    ).split("|")
]
STYLE_TEMPLATES = [
    f"{words} in the style of {{}}"
    for words in (
        "a painting|a rendering|a cropped painting|the painting|a clean painting|a dirty painting|a dark painting|"
        "a picture|a cool painting|a close-up painting|a bright painting|a good painting|a rendition|a nice painting|"
        "a small painting|a weird painting|a large painting"
    ).split("|")
]


def to_rgb(image):
    """Any PIL image as upright RGB: EXIF orientation applied, transparency over white, 16-bit grey scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image, resolution, center_crop):
    """A PIL image as uint8 `[3, resolution, resolution]`; without `center_crop` it is squeezed to a square."""
    image = to_rgb(image)
    if center_crop:
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
    else:
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_captions(folder):
    """Captions by file name from `metadata.jsonl` or `metadata.csv` (the imagefolder format), {} if there is none."""
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    try:
        if jsonl.is_file():
            lines = jsonl.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
        elif table.is_file():
            with table.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        else:
            return {}
        return {row["file_name"]: row["text"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        name = jsonl.name if jsonl.is_file() else table.name
        raise InputError(
            f"--train_data_dir {str(folder)!r}: {name} cannot be read ({error!r}); every row needs the fields"
            " file_name and text."
        ) from None


def read_folder(args):
    """Images of `--train_data_dir` as `(name, pixels, caption or None)`; what is not a readable image is reported."""
    folder = Path(args.train_data_dir)
    if not folder.is_dir():
        raise InputError(f"--train_data_dir {str(folder)!r} is not a folder: give the folder that holds your images.")
    captions = read_captions(folder)
    known = set(Image.registered_extensions())
    files = sorted(path for path in folder.iterdir() if path.is_file())
    image_files = [path for path in files if path.suffix.lower() in known and not path.name.startswith(".")]
    ignored = [p.name for p in files if p not in image_files and p.name not in ("metadata.jsonl", "metadata.csv")]
    if ignored:
        logger.warning(f"Ignored {len(ignored)} files in {folder} that are not images: {', '.join(ignored[:5])}.")
    examples = []
    for path in image_files:
        try:
            with Image.open(path) as image:
                pixels = to_pixels(image, args.resolution, args.center_crop)
            examples.append((path.name, pixels, captions.pop(path.name, None)))
        except Exception as error:  # PIL raises nearly anything on a damaged file
            logger.warning(f"Skipped {path.name}, which cannot be read as an image ({error}).")
    if captions and examples:
        logger.warning(f"The metadata lists files that are not among the images: {', '.join(list(captions)[:5])}.")
    if not examples:
        raise InputError(
            f"--train_data_dir {str(folder)!r} holds no readable image ({len(files)} files looked at): put 3 to 20"
            " pictures of your concept there."
        )
    return examples


def read_dataset(args):
    """Images of a Hub (or local) `datasets` dataset as `(name, pixels, caption or None)`."""
    try:
        dataset = datasets.load_dataset(args.dataset_name, args.dataset_config_name, split="train")
    except Exception as error:  # datasets raises its own, huggingface_hub's, pyarrow's and OS errors here
        raise InputError(f"--dataset_name {args.dataset_name!r} cannot be loaded ({error}): check the name.") from None
    if args.image_column not in dataset.column_names:
        raise InputError(
            f"--image_column {args.image_column!r} is not in {args.dataset_name}: choose from {dataset.column_names}."
        )
    has_captions = args.caption_column in dataset.column_names
    examples = []
    for i, row in enumerate(dataset):
        caption = row[args.caption_column] if has_captions else None
        examples.append((f"image {i}", to_pixels(row[args.image_column], args.resolution, args.center_crop), caption))
    if not examples:
        raise InputError(f"--dataset_name {args.dataset_name!r} has no images in its train split.")
    return examples


def build_prompts(args, examples, tokenizer):
    """Tokenizes the captions (or the templates, for images without one) with the placeholder's vectors in place.

    Returns:
        Prompt ids `[P, length]` and, for each image, the list of its rows.

    Raises:
        InputError: a caption has no placeholder, or is so long that the placeholder is cut off.
    """
    vectors = placeholder_names(args.placeholder_token, args.num_vectors)
    templates = STYLE_TEMPLATES if args.learnable_property == "style" else OBJECT_TEMPLATES
    captions, prompts_of_image = {}, []
    for name, _, caption in examples:
        if caption is not None and "{}" not in caption and args.placeholder_token not in caption:
            raise InputError(
                f"the caption of {name}, {caption!r}, does not say where the concept goes: put {{}} or"
                f" {args.placeholder_token} there."
            )
        texts = templates if caption is None else [caption]
        texts = [
            t.replace("{}", args.placeholder_token).replace(args.placeholder_token, " ".join(vectors)) for t in texts
        ]
        prompts_of_image.append([captions.setdefault(text, len(captions)) for text in texts])
    limit = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    prompt_ids = tokenizer(list(captions), return_tensors="pt", **limit).input_ids
    vector_ids = torch.tensor(tokenizer.convert_tokens_to_ids(vectors))
    for text, ids in zip(captions, prompt_ids):
        if not torch.isin(vector_ids, ids).all():
            raise InputError(
                f"the caption {text!r} is longer than the {tokenizer.model_max_length} tokens of the text encoder,"
                f" which cut off {args.placeholder_token}: shorten it."
            )
    return prompt_ids, prompts_of_image


def validation_ids(args, tokenizer):
    """Flat ids of what the validation images need beside the captions: their prompt and the empty, negative one."""
    prompt = (args.validation_prompt or "").replace("{}", args.placeholder_token)
    prompt = prompt.replace(
        args.placeholder_token, " ".join(placeholder_names(args.placeholder_token, args.num_vectors))
    )
    limit = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer([prompt, ""], return_tensors="pt", **limit).input_ids.flatten()


def placeholder_names(token, num_vectors):
    """The names diffusers gives the vectors of a multi-vector token: tok, tok_1, tok_2, ..."""
    return [token] + [f"{token}_{i}" for i in range(1, num_vectors)]


def encode_images(vae, examples, device):
    """Latent moments of every image and of its flip: float32 `[2, N, 2C, h, w]` on the host. The VAE then leaves."""
    rows = []
    for _, pixels, _ in examples:
        both = torch.stack([pixels, pixels.flip(-1)]).to(device, vae.dtype) / 127.5 - 1
        rows.append(torch.cat([vae.encode(one[None]).latent_dist.parameters for one in both]).float().cpu())
    return torch.stack(rows, dim=1)


# =====================================================================================================
# Saving, validation, model card
# =====================================================================================================


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path` (same suffix) and renames it into place when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")  # two runs may fill the same cache
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_embeds(path, placeholder_token, theta):
    """`{placeholder: [k, d]}`, float32: what `load_textual_inversion` of any diffusers reads."""
    with atomic_path(path) as temporary:
        save_file({placeholder_token: theta.detach().cpu().clone()}, temporary, metadata={"format": "pt"})


def save_a1111(path, placeholder_token, theta, step):
    """The `.pt` of the Automatic1111 web UI, plain tensors only (readable with `weights_only=True`)."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": theta.detach().cpu().clone()}}
    with atomic_path(path) as temporary:
        torch.save({**content, "name": placeholder_token, "step": step}, temporary)


# Settings that decide a run's trajectory: a checkpoint only resumes under the same ones.
TRAJECTORY_SETTINGS = (
    "pretrained_model_name_or_path revision variant tokenizer_name quantization unet_backend mixed_precision"
    " placeholder_token initializer_token num_vectors learnable_property resolution center_crop flip_probability"
    " train_batch_size gradient_accumulation_steps seed num_perturbations perturbation_scale gradient_estimator"
    " sg_window sg_threshold puts_min_timestep puts_max_timestep learning_rate scale_lr lr_scheduler lr_warmup_steps"
    " lr_num_cycles adam_beta1 adam_beta2 adam_weight_decay adam_epsilon"
).split()


def trajectory_settings(args, accelerator, examples):
    """The settings above, the number of processes and a fingerprint of the training data, as JSON-ready values."""
    settings = {name: getattr(args, name) for name in TRAJECTORY_SETTINGS}
    digest = hashlib.sha256()
    for _, pixels, caption in examples:
        digest.update(pixels.numpy().tobytes() + repr(caption).encode())
    return {**settings, "number of processes": accelerator.num_processes, "training data": digest.hexdigest()[:16]}


def list_checkpoints(output_dir):
    """Complete checkpoints, oldest first (one being written has another name)."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(args, settings):
    """The checkpoint `--resume_from_checkpoint` asks for, or None for a fresh start.

    Raises:
        InputError: it does not exist, or it was written under other settings.
    """
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(args.output_dir)
        if not checkpoints:
            logger.warning(f"No checkpoint in {args.output_dir} yet: starting from step 0.")
            return None
        checkpoint = checkpoints[-1]
    else:
        checkpoint = Path(args.resume_from_checkpoint)
        if not checkpoint.exists() and (Path(args.output_dir) / checkpoint.name).exists():
            checkpoint = Path(args.output_dir) / checkpoint.name
    if not (checkpoint / "settings.json").is_file():
        raise InputError(
            f'--resume_from_checkpoint {args.resume_from_checkpoint!r} is not a checkpoint: give "latest" or a'
            " checkpoint-N folder."
        )
    before = json.loads((checkpoint / "settings.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    changed = [
        f"{name} ({before.get(name)!r}, now {value!r})" for name, value in now.items() if before.get(name) != value
    ]
    if changed:
        raise InputError(
            f"--resume_from_checkpoint {str(checkpoint)!r} belongs to other settings: {', '.join(changed)}; repeat"
            " them as they were or start in another --output_dir."
        )
    return checkpoint


def save_checkpoint(args, accelerator, step, shared, generators, settings):
    """Writes `checkpoint-{step}` under a temporary name and renames it once every process has written its part."""
    output_dir = Path(args.output_dir)
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".tmp-checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        torch.save(shared, temporary / "state.pt")
        write_json(temporary / "settings.json", settings)
    accelerator.wait_for_everyone()
    states = {name: generator.get_state() for name, generator in generators.items()}
    torch.save(states, temporary / f"generators_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        if args.checkpoints_total_limit is not None:
            for old in list_checkpoints(output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


@torch.inference_mode()
def generate_images(args, base, text_encoder, unet, theta, device, dtype):
    """Images of `--validation_prompt` with θ in place; the VAE is here only while it decodes."""
    text_encoder.get_input_embeddings().write(theta[None])
    pipeline = StableDiffusionPipeline(
        vae=load_vae(args, dtype),
        text_encoder=text_encoder,
        tokenizer=base["tokenizer"],
        unet=unet,
        scheduler=DPMSolverMultistepScheduler.from_config(base["scheduler"].config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(device)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_validation_images)]
    eager = torch.compiler.set_stance("force_eager") if args.torch_compile else contextlib.nullcontext()
    with eager:  # another shape than training's would be compiled for minutes
        return [
            pipeline(
                args.validation_prompt.replace("{}", args.placeholder_token),
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                generator=generator,
            ).images[0]
            for generator in generators
        ]


def log_images(accelerator, images, step):
    """The validation images, in the trackers that take images."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(image) for image in images])
            tracker.log_images({"validation": stacked}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": images}, step=step)


def load_vae(args, dtype):
    where = {"subfolder": "vae", "revision": args.revision, "variant": args.variant}
    vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, torch_dtype=dtype, **where)
    return vae.requires_grad_(False).eval()


def save_loss_curve(path, history):
    """Training loss (points and running mean) and held-out loss against the step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    if history["loss"]:
        steps, losses = zip(*history["loss"])
        width = max(1, len(losses) // 20)
        smooth = np.convolve(np.pad(losses, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
        axes.plot(steps, losses, ".", alpha=0.3, label="training loss")
        axes.plot(steps, smooth, label=f"mean over {width} read-outs")
    if history["validation_loss"]:
        axes.plot(*zip(*history["validation_loss"]), "o-", label="held-out loss")
    axes.set(xlabel="step", ylabel="denoising loss")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def peak_memory(device):
    """Peak memory so far, in MB: of the process, and of the CUDA allocator where there is one."""
    figures, status = {}, Path("/proc/self/status")
    if status.is_file():  # Linux; getrusage would count the launcher that this process was forked from, too
        figures["process_mb"] = round(int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10)
    elif sys.platform == "darwin":
        import resource

        figures["process_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    else:  # Windows
        import psutil

        figures["process_mb"] = round(psutil.Process().memory_info().peak_wset / 2**20)
    if device.type == "cuda":
        figures["cuda_allocated_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
        figures["cuda_reserved_mb"] = round(torch.cuda.max_memory_reserved(device) / 2**20)
    return figures


def public_settings(args):
    """The settings that may be published: no token, and only the last part of local paths."""
    settings = {name: value for name, value in vars(args).items() if name not in ("hub_token", "push_only")}
    for name in LOCAL_PATHS:
        if value := settings[name]:
            settings[name] = Path(value).resolve().name
    for name in ("pretrained_model_name_or_path", "tokenizer_name", "dataset_name"):  # or a name on the Hub
        if (value := settings[name]) and os.path.exists(value):
            settings[name] = Path(value).resolve().name
    return settings


LOCAL_PATHS = ("train_data_dir", "quantized_cache_dir", "output_dir", "logging_dir", "resume_from_checkpoint")


def write_config(args, device, dtype, components, figures):
    """`zoodip_config.json`: what made this embedding, with which versions, at what cost."""
    versions = {"python": platform.python_version()}
    for (
        package
    ) in "torch diffusers transformers accelerate huggingface_hub bitsandbytes optimum-quanto openvino".split():
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    host = f"{os.cpu_count()} cores, {platform.machine()}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else host
    config = {
        "method": "ZOODiP (arXiv 2503.14868)",
        "base_model": public_settings(args)["pretrained_model_name_or_path"],
        "base_model_is_local": os.path.isdir(args.pretrained_model_name_or_path),
        "base_license": base_license(args),
        "placeholder_token": args.placeholder_token,
        "settings": public_settings(args),
        "versions": versions,
        "hardware": {"device": device.type, "name": name, "activations": str(dtype).removeprefix("torch.")},
        "components": components,
        "figures": figures,
    }
    write_json(Path(args.output_dir) / "zoodip_config.json", config)
    return config


MODEL_CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md")


def write_model_card(output_dir, config, repo_id=None):
    """Fills `model_card_template.md` into `README.md`, from the config and the files of a finished run.

    Args:
        output_dir: folder of the run.
        config: its `zoodip_config.json`; what an evaluation adds there as "scores" (name: value) is shown too.
        repo_id: "namespace/name" on the Hub; None writes the card for local use.

    Raises:
        ValueError: the template uses a variable that is not given (`from_template` would leave a blank).
    """
    if not MODEL_CARD_TEMPLATE.is_file():
        logging.warning(f"{MODEL_CARD_TEMPLATE.name} is not beside the script: no model card was written.")
        return
    output_dir, settings = Path(output_dir), config["settings"]
    local, base, token = config["base_model_is_local"], config["base_model"], config["placeholder_token"]
    prompt = (settings["validation_prompt"] or "a photo of {}").replace("{}", token)
    samples = [f"samples/{path.name}" for path in sorted((output_dir / "samples").glob("*.png"))]
    references = sorted((output_dir / "reference_images").glob("*.png")) if settings["push_reference_images"] else []
    data = ModelCardData(
        base_model=None if local else base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["zoodip", "textual_inversion", "diffusers-training", "stable-diffusion", "diffusers"],
        instance_prompt=token,
        widget=[{"text": prompt, "output": {"url": url}} for url in samples] or None,
        **config["base_license"],
    )
    name = repo_id.split("/")[-1] if repo_id else output_dir.resolve().name
    values = {
        **{key: config[key] for key in ("placeholder_token", "settings", "components", "figures", "hardware")},
        "repo_id": repo_id,
        "name": name,
        "concept": repo_id or f"./{name}",
        "pipeline_source": repo_id or "./zoodip_pipeline.py",
        "base_model": f"path/to/{base}" if local else base,
        "base_link": f"the local model `{base}`" if local else f"[{base}](https://huggingface.co/{base})",
        "base_is_local": local,
        "prompt": json.dumps(prompt, ensure_ascii=False),
        "samples": samples,
        "reference_images": [f"reference_images/{path.name}" for path in references],
        "has_best": (output_dir / "learned_embeds-best.safetensors").is_file(),
        "has_loss_curve": (output_dir / "loss_curve.png").is_file(),
        "scores": config.get("scores", {}),
        "license": config["base_license"].get("license_name") or config["base_license"].get("license"),
    }
    strict = jinja2.Environment(undefined=jinja2.StrictUndefined)
    try:
        strict.from_string(MODEL_CARD_TEMPLATE.read_text(encoding="utf-8")).render(card_data="", **values)
    except jinja2.UndefinedError as error:
        raise ValueError(f"{MODEL_CARD_TEMPLATE.name} uses a variable that nobody fills: {error}") from None
    card = ModelCard.from_template(data, template_path=str(MODEL_CARD_TEMPLATE), **values)
    with atomic_path(output_dir / "README.md") as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def base_license(args):
    """The licence fields of the base model's card, carried over to what was learned from it; {} where it has none."""
    base = args.pretrained_model_name_or_path
    card = Path(base) / "README.md" if os.path.isdir(base) else base
    if isinstance(card, Path) and not card.is_file():
        return {}
    with contextlib.suppress(Exception):  # no card, no network, no licence: then the card says nothing of it
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        return {name: data[name] for name in ("license", "license_name", "license_link") if name in data}
    return {}


# What a user of the concept needs; never checkpoints, logs, validation grids or the base model.
PUSHED_FILES = (
    "learned_embeds.safetensors learned_embeds-best.safetensors learned_embeds.pt pipeline.py README.md"
    " zoodip_config.json loss_curve.png samples/*.png"
).split()


def hub_reason(error, token):
    """What the Hub or the way to it said, on one line and without the token, which HTTP clients sometimes quote."""
    if isinstance(error, RuntimeError) and error.__cause__:  # "Error while uploading ...": the reason is behind it
        error = error.__cause__
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return text.replace(token, "[token]") if token else text


def prepare_hub(args):
    """Checks that a push can work (name, token, right to write), before any training, and makes the repository.

    Returns:
        Its id, "namespace/name".

    Raises:
        InputError: it cannot work.
    """
    wanted, token = args.hub_model_id or Path(args.output_dir).resolve().name, args.hub_token or get_token()
    try:
        validate_repo_id(wanted)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {wanted!r} is no name for a repository ({error}): give another.") from None
    if not token:
        raise InputError("--push_to_hub needs a token with the right to write: run hf auth login or set HF_TOKEN.")
    try:
        repo_id = create_repo(wanted, token=token, private=args.hub_private_repo or None, exist_ok=True).repo_id
        try:  # a repository of someone else "exists" too
            auth_check(repo_id, token=token, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):  # others: a Hub that does not know this question
                raise
    except Exception as error:  # HTTP, connection and offline errors alike
        status = getattr(getattr(error, "response", None), "status_code", None)
        mends = {
            401: "log in again with hf auth login",
            403: "use a token with the right to write there, or another --hub_model_id",
        }
        mend = mends.get(status, "try again later, or train without --push_to_hub and push with --push_only")
        raise InputError(f"the Hub refused {wanted!r} ({hub_reason(error, token)}): {mend}.") from None
    return repo_id


def push_to_hub(args, config, repo_id):
    """Uploads a finished run in one commit (a full pipeline, if asked for, in a second); returns the commit's URL.

    Raises:
        PushError: the upload failed; the results stay in `--output_dir`.
    """
    output_dir, settings = Path(args.output_dir), config["settings"]
    pipeline_file = Path(__file__).with_name("zoodip_pipeline.py")
    if pipeline_file.is_file():  # on the Hub, diffusers looks for custom code under this name only
        shutil.copyfile(pipeline_file, output_dir / "pipeline.py")
    allowed = PUSHED_FILES + ["reference_images/*.png"] * settings["push_reference_images"]
    stale = PUSHED_FILES + ["reference_images/*.png"]  # what an earlier push left there and this one does not renew
    to = {"repo_id": repo_id, "token": args.hub_token, "commit_message": f"Learn {config['placeholder_token']}"}
    try:
        commit = upload_folder(folder_path=output_dir, allow_patterns=allowed, delete_patterns=stale, **to)
        if settings["save_as_full_pipeline"]:
            commit = upload_folder(folder_path=output_dir / "pipeline", **to)
    except Exception as error:  # huggingface_hub, httpx and OS errors alike: nothing is lost, and the user is told how
        raise PushError(
            f"the run in {args.output_dir} is finished and safe, but not on the Hub"
            f" ({hub_reason(error, args.hub_token or get_token())}); push it later with: python {Path(__file__).name}"
            f" --push_only --output_dir {shlex.quote(str(args.output_dir))} --hub_model_id {repo_id}"
        ) from None
    return commit.commit_url


def push_only(args):
    """`--push_only`: uploads the finished run in `--output_dir` as it was set up, with its model card renewed.

    Raises:
        InputError: there is no finished run.
        PushError: the Hub refused it or the upload failed.
    """
    output_dir = Path(args.output_dir)
    for name in ("zoodip_config.json", "learned_embeds.safetensors"):
        if not (output_dir / name).is_file():
            raise InputError(f"--push_only finds no {name} in {args.output_dir!r}: give the folder of a finished run.")
    config = json.loads((output_dir / "zoodip_config.json").read_text(encoding="utf-8"))
    settings = config["settings"]
    args.hub_model_id = args.hub_model_id or settings["hub_model_id"]
    args.hub_private_repo = args.hub_private_repo or settings["hub_private_repo"]
    settings["push_reference_images"] |= args.push_reference_images
    if settings["push_reference_images"] and not any((output_dir / "reference_images").glob("*.png")):
        raise InputError(f"--push_reference_images: put the pictures as PNG into {output_dir / 'reference_images'}.")
    try:
        repo_id = prepare_hub(args)
    except InputError as error:
        raise PushError(error) from None
    write_model_card(output_dir, config, repo_id)
    print(f"Pushed to {push_to_hub(args, config, repo_id)}")


# =====================================================================================================
# Arguments
# =====================================================================================================

REFUSED_FLAGS = {
    "--gradient_checkpointing": "no backward pass is ever run, so there are no activations to recompute: drop it.",
    "--enable_xformers_memory_efficient_attention": "PyTorch's own fused attention is always on: drop the flag.",
    "--dataloader_num_workers": "latents are computed once, before training, so nothing is loaded in a step: drop it.",
    "--no_safe_serialization": "embeddings are saved as safetensors; for a pickle add --save_a1111 instead.",
    "--validation_epochs": "use --validation_steps.",
    "--local_rank": "accelerate launch sets the rank: drop the flag.",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


# Piecewise constant would need rules of its own on the command line.
LR_SCHEDULERS = [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT]


class OneSentenceParser(argparse.ArgumentParser):
    """Reports an error as one sentence, without the usage of sixty flags above it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(input_args=None):
    """Parses and checks the command line (of the process, or a list of strings); bad input exits with code 2."""
    parser = OneSentenceParser(
        description="ZOODiP: textual inversion on a quantized Stable Diffusion with forward passes only.",
        usage="%(prog)s --pretrained_model_name_or_path MODEL --train_data_dir FOLDER --placeholder_token TOKEN"
        " --initializer_token WORD [options]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="Stable Diffusion 1.x or 2.x in diffusers format: a local folder or a model id on the Hub.",
    )
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help='Variant of the weight files, such as "fp16".')
    add("--tokenizer_name", help="Tokenizer folder or id, if not the model's own.")
    add(
        "--quantization",
        choices=["int8", "nf4", "quanto-int8", "none"],
        default="int8",
        help="Weights of UNet and text encoder: int8 (Linear and Conv2d, per output channel), nf4 (bitsandbytes 4-bit"
        " Linear, int8 Conv2d), quanto-int8 (as the official code) or none.",
    )
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Activations; the loss is always float32. Default: fp16 on CUDA, no (float32) elsewhere.",
    )
    add(
        "--quantized_cache_dir",
        default=os.path.join(HF_HOME, "zoodip"),
        help="Folder of INT8 weights, quantized once and memory-mapped by every later run (0.9 GB for SD 1.5);"
        ' "none" keeps none.',
    )
    add(
        "--unet_backend",
        choices=["torch", "openvino"],
        default="torch",
        help="What computes the UNet. openvino (pip install openvino) is faster on CPUs and takes more memory; it is"
        " exported once into --quantized_cache_dir.",
    )
    add("--openvino_device", default="CPU", help="OpenVINO's device: CPU, GPU or NPU.")
    add(
        "--low_vram",
        action="store_true",
        help="Stream the UNet's weights layer by layer, from pinned host memory (CUDA) or from disk (CPU).",
    )
    add(
        "--torch_compile",
        action="store_true",
        help="Compile the UNet (static shapes, CUDA graphs); the first step takes minutes. Worth it on CUDA only.",
    )
    add(
        "--estimate_memory",
        action="store_true",
        help="Print the memory that this run would need, by component, and exit; no weight is loaded.",
    )
    add("--allow_tf32", action="store_true", help="Allow TF32 in float32 products on CUDA.")

    add = parser.add_argument_group("data").add_argument
    add(
        "--train_data_dir",
        help="Folder of images, with captions in metadata.jsonl or metadata.csv (fields file_name, text) if you have"
        " them; {} or the placeholder marks the concept in a caption.",
    )
    add("--dataset_name", help="Instead of a folder: a dataset id on the Hub (its train split).")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--image_column", default="image", help="Column of the dataset that holds the images.")
    add("--caption_column", default="text", help="Column of the dataset that holds captions, if any.")
    add("--placeholder_token", required=True, help='The new word, such as "<my-dog>".')
    add("--initializer_token", required=True, help="Existing one-token word to start from: dog.")
    add("--num_vectors", type=int, default=1, help="k: embedding vectors of the new word.")
    add(
        "--learnable_property",
        choices=["object", "style"],
        default="object",
        help="Which Textual Inversion templates caption the images that have no caption.",
    )
    add("--repeats", type=int, default=100, help="Times an epoch shows every image.")
    add("--resolution", type=int, help="Side of the training images. Default: the model's own.")
    add(
        "--center_crop", action="store_true", help="Crop the centre square; otherwise images are squeezed to a square."
    )
    add(
        "--flip_probability",
        type=float,
        default=0.5,
        help="How often an image is mirrored; 0 if left and right matter.",
    )

    add = parser.add_argument_group("zeroth-order optimization").add_argument
    add("--num_perturbations", type=int, default=2, help="n: random directions per estimate.")
    add(
        "--perturbation_scale",
        type=float,
        help="μ: finite-difference step. Default: by the precision of the activations (docs/results.md).",
    )
    add(
        "--allow_noisy_estimates",
        action="store_true",
        help="Train in a precision that was measured to drown the loss differences, such as bf16 at a small μ.",
    )
    add(
        "--gradient_estimator",
        choices=["rge", "spsa"],
        default="rge",
        help="rge: forward differences, n + 1 losses a step (Eq. 3); spsa: central differences, 2n losses (Eq. S11).",
    )
    add(
        "--max_candidates_per_forward",
        type=int,
        help="Split the step's candidates (θ and its perturbations) into forward passes of at most this many; less"
        " memory, same result. Default: all in one.",
    )
    add(
        "--sg_window",
        type=int,
        help="τ of Subspace Gradient: updates between rebuilds of the subspace; 0 switches SG off. Default: 128, but"
        " at most a sixth of the token's dimension.",
    )
    add("--sg_threshold", type=float, default=1e-3, help="ν of SG: share of variance that is noise.")
    add("--puts_min_timestep", type=int, default=500, help="T_L of PUTS, inclusive.")
    add("--puts_max_timestep", type=int, default=900, help="T_U of PUTS, exclusive; 0/1000 is uniform.")

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="text-inversion-model", help="Where everything is written.")
    add("--seed", type=int, default=0, help="Of data, noise and perturbations.")
    add("--train_batch_size", type=int, default=1, help="Examples per step and process.")
    add("--num_train_epochs", type=int, help="Length in epochs, if --max_train_steps is not given.")
    add("--max_train_steps", type=int, help="Updates in all. Default: 30000, as in the paper.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Estimates averaged before one update.")
    add("--learning_rate", type=float, default=5e-3, help="Learning rate of ZO-Adam.")
    add(
        "--scale_lr",
        action="store_true",
        help="Multiply the learning rate by processes x accumulation steps x batch size.",
    )
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="Learning-rate schedule.")
    add("--lr_warmup_steps", type=int, default=0, help="Warm-up updates of the schedule.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--adam_beta1", type=float, default=0.9, help="β1 of Adam.")
    add("--adam_beta2", type=float, default=0.999, help="β2 of Adam.")
    add("--adam_weight_decay", type=float, default=0.0, help="Weight decay of Adam.")
    add("--adam_epsilon", type=float, default=1e-3, help="ε of Adam; large, so that a tiny gradient is a tiny step.")

    add = parser.add_argument_group("validation and logging").add_argument
    add("--validation_prompt", help="Prompt of the validation images; {} or the placeholder in it.")
    add("--num_validation_images", type=int, default=4, help="Images per validation.")
    add("--validation_steps", type=int, default=500, help="Updates between validations.")
    add(
        "--num_validation_samples",
        type=int,
        default=16,
        help="Fixed (image, noise, timestep) triples of the held-out loss, which picks the best embedding; 0: none.",
    )
    add(
        "--early_stopping_patience",
        type=int,
        default=0,
        help="Stop after this many validations without a better held-out loss; 0: never.",
    )
    add("--num_inference_steps", type=int, default=25, help="Denoising steps of validation images.")
    add("--guidance_scale", type=float, default=7.5, help="Guidance of validation images.")
    add("--logging_steps", type=int, default=10, help="Updates between read-outs of the loss.")
    add("--logging_dir", default="logs", help="Tracker folder inside --output_dir.")
    add("--report_to", default="tensorboard", help='Any tracker of accelerate that is installed, "all" or "none".')

    add = parser.add_argument_group("saving and resuming").add_argument
    add("--save_steps", type=int, default=500, help="Updates between learned_embeds-steps-N.safetensors.")
    add("--save_a1111", action="store_true", help="Also save a .pt for the Automatic1111 web UI.")
    add(
        "--save_as_full_pipeline",
        action="store_true",
        help="Also save an unquantized pipeline with the new word to --output_dir/pipeline.",
    )
    add("--checkpointing_steps", type=int, default=500, help="Updates between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Keep only this many checkpoints.")
    add("--resume_from_checkpoint", help='A checkpoint-N folder, or "latest" (which starts afresh if there is none).')

    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", action="store_true", help="Upload the result, a few files, to the Hub.")
    add(
        "--push_only",
        action="store_true",
        help="Upload the finished run in --output_dir, train nothing; only the flags of this group count beside it.",
    )
    add("--hub_model_id", help="Repository to push to. Default: the name of --output_dir.")
    add("--hub_private_repo", action="store_true", help="Make a new repository private.")
    add(
        "--hub_token",
        help="Token to push with. Better: hf auth login or HF_TOKEN, since shells and trackers record command lines.",
    )
    add(
        "--push_reference_images",
        action="store_true",
        help="Publish the training images too (as trained on, without their metadata); otherwise they stay private.",
    )

    for flag in REFUSED_FLAGS:
        parser.add_argument(flag, nargs="?", const=True, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
    given = sys.argv[1:] if input_args is None else input_args
    for flag, reason in REFUSED_FLAGS.items():
        if any(word.split("=")[0] == flag for word in given):
            parser.error(f"{flag} means nothing here: {reason}")
    if "--push_only" in given:  # the run is finished, and zoodip_config.json knows how it was made
        for action in parser._actions:
            action.required = False
    args = parser.parse_args(input_args)
    if not args.push_only:
        check_arguments(parser, args)
    return args


def check_arguments(parser, args):
    """Everything that can be judged without looking at a file; each fault is one sentence and exit code 2."""
    at_least_one = (
        "num_vectors repeats resolution num_perturbations max_candidates_per_forward train_batch_size num_train_epochs"
        " max_train_steps gradient_accumulation_steps lr_num_cycles num_validation_images validation_steps"
        " num_inference_steps logging_steps save_steps checkpointing_steps checkpoints_total_limit"
    ).split()
    at_least_zero = (
        "sg_window lr_warmup_steps adam_weight_decay num_validation_samples early_stopping_patience seed".split()
    )
    positive = "perturbation_scale learning_rate adam_epsilon".split()
    for name in at_least_one + at_least_zero + positive:
        value = getattr(args, name)
        floor = 1 if name in at_least_one else 0
        if value is not None and (value < floor or name in positive and not 0 < value < math.inf):
            parser.error(f"--{name} {value} must be {'above 0' if name in positive else f'at least {floor}'}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must lie in [0, 1).")
    if not 0 < args.sg_threshold < 1:
        parser.error(
            f"--sg_threshold {args.sg_threshold} (ν) must lie strictly between 0 and 1; the paper uses 0.001."
        )
    if args.sg_window == 1:
        parser.error("--sg_window 1 holds no trajectory: give at least 2, or 0 to switch Subspace Gradient off.")
    if not 0 <= args.flip_probability <= 1:
        parser.error(f"--flip_probability {args.flip_probability} must lie in [0, 1].")
    if args.puts_min_timestep < 0 or args.puts_min_timestep >= args.puts_max_timestep:
        parser.error(
            f"--puts_min_timestep {args.puts_min_timestep} must be at least 0 and below --puts_max_timestep"
            f" {args.puts_max_timestep}; the paper uses 500 and 900."
        )
    if args.resolution is not None and args.resolution % 8:
        parser.error(
            f"--resolution {args.resolution} must be divisible by 8: try {round(args.resolution / 8) * 8 or 8}."
        )
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --train_data_dir, a folder of images, or --dataset_name, a dataset on the Hub.")
    if args.unet_backend == "openvino" and args.quantization not in ("int8", "none"):
        parser.error(f"--unet_backend openvino takes --quantization int8 or none, not {args.quantization}.")
    if args.low_vram and args.quantization not in ("int8", "none"):
        parser.error(f"--low_vram streams --quantization int8 or none, not {args.quantization}: choose one of them.")
    if args.low_vram and (args.torch_compile or args.unet_backend == "openvino"):
        other = "--torch_compile" if args.torch_compile else "--unet_backend openvino"
        parser.error(f"--low_vram and {other} exclude each other: a compiled UNet needs its weights in one place.")
    if args.torch_compile and args.unet_backend == "openvino":
        parser.error("--torch_compile has nothing to compile with --unet_backend openvino: drop one of them.")
    if not args.placeholder_token or len(args.placeholder_token.split()) != 1 or "{}" in args.placeholder_token:
        parser.error(f'--placeholder_token {args.placeholder_token!r} must be one word, such as "<my-dog>".')
    if args.early_stopping_patience and not args.num_validation_samples:
        parser.error("--early_stopping_patience judges the held-out loss: give --num_validation_samples above 0.")
    known = [tracker.value for tracker in LoggerType if tracker.value != "all"]
    available = [str(tracker) for tracker in get_available_trackers()]
    if args.report_to not in known + ["all", "none"]:
        parser.error(f"--report_to {args.report_to!r} is not a tracker: choose from {', '.join(known)}, all or none.")
    if args.report_to in known and args.report_to not in available:
        parser.error(f"--report_to {args.report_to} is not installed: pip install {args.report_to} or choose another.")


# =====================================================================================================
# Checks that read small files (configs, tokenizer, output folder), before any weight is loaded
# =====================================================================================================


def check_folders(args):
    """Creates `--output_dir` and `--quantized_cache_dir` and makes sure that they can be written."""
    for name in ("output_dir", "quantized_cache_dir"):
        folder = getattr(args, name)
        if name == "quantized_cache_dir" and folder == "none":
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # a name of its own: all processes of a launch pass here at once
                pass
        except OSError as error:
            raise InputError(f"--{name} {folder!r} cannot be written ({error.strerror}): choose another.") from None


# How small μ may be for losses in this precision: the default, and the least at which loss differences still correlate
# with the true directional derivatives by 0.9 or more (benchmarks/bench_signal.py, docs/results.md).
PERTURBATION_SCALES = {"no": (1e-3, 0.0), "fp16": (1e-3, 3e-4), "bf16": (1e-2, 3e-3)}


def choose_precision(args, device):
    """The dtype of activations: float32 on CPU, float16 on CUDA, unless asked otherwise; fills in its default μ.

    Raises:
        InputError: losses in this precision cannot tell candidates apart at this μ.
    """
    name = args.mixed_precision or ("fp16" if device.type == "cuda" and args.unet_backend == "torch" else "no")
    if name == "fp16" and (device.type == "cpu" or args.unet_backend == "openvino"):
        raise InputError("--mixed_precision fp16 is unusably slow on a CPU: leave the flag out (float32).")
    default, least = PERTURBATION_SCALES[name]
    if args.perturbation_scale is None:
        args.perturbation_scale = default
    if args.perturbation_scale < least and not args.allow_noisy_estimates:
        raise InputError(
            f"--perturbation_scale {args.perturbation_scale} is too small for {name} activations, whose rounding"
            f" drowns the loss differences (correlation with the true ones below 0.9): give at least {least}, best"
            f" {default}, or --mixed_precision no; --allow_noisy_estimates trains all the same."
        )
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def check_backend(args, device):
    """Makes sure that the engine of the UNet is there and can do what is asked.

    Raises:
        InputError: it cannot.
    """
    if args.torch_compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("--torch_compile needs a C++ compiler on a CPU: install g++ or leave the flag out.")
    if args.unet_backend != "openvino":
        return
    try:
        import openvino
    except ImportError:
        raise InputError("--unet_backend openvino is not installed: pip install openvino.") from None
    devices = openvino.Core().available_devices
    if args.openvino_device not in devices:
        raise InputError(f"--openvino_device {args.openvino_device!r} is not there: choose from {', '.join(devices)}.")
    if candidates_per_pass(args) * args.train_batch_size > OPENVINO_MAX_BATCH:
        raise InputError(
            f"--unet_backend openvino takes at most {OPENVINO_MAX_BATCH} examples a pass and gets"
            f" {candidates_per_pass(args) * args.train_batch_size}: split them with --max_candidates_per_forward."
        )


def read_base(args):
    """Reads the base model's small files, fills in the defaults that depend on them and checks the rest against them.

    Returns:
        dict: tokenizer (placeholder added), scheduler, first_placeholder_id, initializer_id, latent_size.
    """
    name, where = args.pretrained_model_name_or_path, {"revision": args.revision}
    try:
        index = DiffusionPipeline.load_config(name, **where)
        unet_config = UNet2DConditionModel.load_config(name, subfolder="unet", **where)
        vae_config = AutoencoderKL.load_config(name, subfolder="vae", **where)
        text_config = CLIPTextConfig.from_pretrained(name, subfolder="text_encoder", **where)
        scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **where)
        own = args.tokenizer_name or name
        folder = {} if args.tokenizer_name else {"subfolder": "tokenizer"}
        tokenizer = CLIPTokenizer.from_pretrained(own, **folder, **where)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--pretrained_model_name_or_path {name!r} is not a Stable Diffusion model in diffusers format, neither a"
            f" local folder nor on the Hub ({reason}): check the name and your connection."
        ) from None
    if "text_encoder_2" in index:
        raise InputError(
            f"--pretrained_model_name_or_path {name!r} has two text encoders (SDXL); this script trains Stable"
            " Diffusion 1.x and 2.x: choose one of those."
        )
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(
            f"--pretrained_model_name_or_path {name!r} predicts {scheduler.config.prediction_type!r}; only epsilon and"
            " v_prediction models can be trained: choose another."
        )

    timesteps = scheduler.config.num_train_timesteps
    if args.puts_max_timestep > timesteps:
        raise InputError(
            f"--puts_max_timestep {args.puts_max_timestep} is outside [0, {timesteps}), the timesteps of this model:"
            f" give at most {timesteps}."
        )
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    args.resolution = args.resolution or unet_config["sample_size"] * factor
    multiple = math.lcm(8, factor * 2 ** (len(unet_config["block_out_channels"]) - 1))
    if args.resolution % multiple:
        raise InputError(
            f"--resolution {args.resolution} must be divisible by {multiple} for this model: try"
            f" {max(1, round(args.resolution / multiple)) * multiple}."
        )
    dimension = text_config.hidden_size
    args.sg_window = min(128, dimension // 6) if args.sg_window is None else args.sg_window
    if args.sg_window > args.num_vectors * dimension:
        raise InputError(
            f"--sg_window {args.sg_window} (τ) is larger than the token's dimension {args.num_vectors * dimension}:"
            f" give at most {dimension // 6}, a sixth of it, as the paper does."
        )

    vocabulary, token = tokenizer.get_vocab(), args.placeholder_token
    for word in placeholder_names(token, args.num_vectors):
        if word in vocabulary or f"{word.lower()}</w>" in vocabulary:
            raise InputError(
                f"--placeholder_token {token!r}: {word!r} is already in the vocabulary of the tokenizer: choose a new"
                f' word, such as "<my-{token.strip("<>").lower()}>".'
            )
    if token != token.lower() or not (token.startswith("<") and token.endswith(">")):
        logger.warning(
            f"--placeholder_token {token!r} is upper-case or without <>: it can match inside other words, and many"
            f' readers lower-case it; "<{token.strip("<>").lower()}>" is safe.'
        )
    initializer = tokenizer.encode(args.initializer_token, add_special_tokens=False)
    if len(initializer) != 1:
        raise InputError(
            f"--initializer_token {args.initializer_token!r} is {len(initializer)} tokens and must be one: choose a"
            " simpler word for the same kind of thing."
        )
    if initializer[0] == tokenizer.unk_token_id and args.initializer_token != tokenizer.unk_token:
        raise InputError(
            f"--initializer_token {args.initializer_token!r} is unknown to the tokenizer: choose another word."
        )
    tokenizer.add_tokens(placeholder_names(token, args.num_vectors))
    first = tokenizer.convert_tokens_to_ids(token)
    return {
        "tokenizer": tokenizer,
        "scheduler": scheduler,
        "first_placeholder_id": first,
        "initializer_id": initializer[0],
        "latent_size": args.resolution // factor,
    }


# =====================================================================================================
# Main
# =====================================================================================================


def main(args):
    if args.push_only:
        return push_only(args) if os.environ.get("RANK", "0") == "0" else None

    # 1. Everything that can be wrong is checked before anything slow starts.
    keep_freed_blocks(1)
    check_folders(args)
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision="no",  # weights and activations are cast once, by hand: autocast would cast them every step
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=output_dir / args.logging_dir),
    )
    device = accelerator.device
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    dtype = choose_precision(args, device)
    check_backend(args, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    base = read_base(args)
    if args.estimate_memory:
        if accelerator.is_main_process:
            print_estimate(args, estimate_memory(args, base, device, dtype), device)
        return
    warn_if_too_large(args, base, device, dtype)
    if args.validation_prompt and not re.search(r"\{\}|" + re.escape(args.placeholder_token), args.validation_prompt):
        logger.warning(f"--validation_prompt {args.validation_prompt!r} does not contain {args.placeholder_token}.")
    examples = read_folder(args) if args.train_data_dir else read_dataset(args)
    prompt_ids, prompts_of_image = build_prompts(args, examples, base["tokenizer"])
    examples_per_update = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.max_train_steps is None:
        updates_per_epoch = math.ceil(len(examples) * args.repeats / examples_per_update)
        args.max_train_steps = args.num_train_epochs * updates_per_epoch if args.num_train_epochs else 30_000
    settings = trajectory_settings(args, accelerator, examples)
    checkpoint = find_checkpoint(args, settings)
    repo_id = prepare_hub(args) if args.push_to_hub and accelerator.is_main_process else None

    # 2. The VAE encodes every image and its flip once, then leaves before the UNet arrives.
    vae = load_vae(args, dtype)
    components = {"vae": {"bytes": module_bytes(vae), "quantized_share": 0.0}}
    vae.decoder = None  # 60 % of it, and not needed here
    vae.to(device)
    with torch.inference_mode():
        moments = encode_images(vae, examples, device)
    concept = {
        "moments": moments if args.flip_probability > 0 else moments[:1],
        "flip_probability": args.flip_probability,
        "scaling_factor": vae.config.scaling_factor,
        "prompt_ids": prompt_ids,
        "prompts_of_image": prompts_of_image,
    }
    del vae
    release_freed_memory()

    # 3. Text encoder and UNet, frozen and quantized; of the token table, the rows of the prompts and the candidates.
    per_step, per_pass = candidates_per_step(args), candidates_per_pass(args)
    with accelerator.local_main_process_first():  # the first process fills the cache, the others read it
        text_encoder, text_share = load_frozen(args, "text_encoder", device, dtype)
        if args.unet_backend == "openvino":
            length = base["tokenizer"].model_max_length
            unet, share, size = load_openvino_unet(args, device, dtype, base["latent_size"], length)
        else:
            unet, share = load_frozen(args, "unet", torch.device("cpu") if args.low_vram else device, dtype)
            size = module_bytes(unet)
    components["text_encoder"] = {"bytes": module_bytes(text_encoder), "quantized_share": round(text_share, 4)}
    components["unet"] = {"bytes": size, "quantized_share": round(share, 4)}
    if device.type == "cuda" and args.unet_backend == "torch":
        use_channels_last(unet)
    if args.low_vram:
        layers_on_disk = tempfile.TemporaryDirectory(prefix=".tmp-layers-", dir=output_dir)
        stream_weights(unet, device, layers_on_disk.name)
    if args.torch_compile:
        unet.compile(mode="reduce-overhead", dynamic=False)
    table = load_token_table(args)
    in_use = torch.cat([prompt_ids.flatten(), validation_ids(args, base["tokenizer"])])
    rows = per_pass * args.num_vectors
    text_encoder.set_input_embeddings(PromptRows(table, in_use, base["first_placeholder_id"], rows, device, dtype))
    initial = table[base["initializer_id"]].float().to(device)
    del table
    release_freed_memory()
    for name, facts in components.items():
        stays = "leaves after encoding" if name == "vae" else f"{facts['quantized_share']:.1%} of parameters quantized"
        logger.info(f"{name}: {facts['bytes'] / 1e6:.1f} MB, {stays}")

    # 4. What is learned: θ, a float32 master copy, updated by plain Adam on the projected estimate.
    theta = initial.repeat(args.num_vectors, 1)
    learning_rate = args.learning_rate * (examples_per_update if args.scale_lr else 1)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.Adam(
        [theta], lr=learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.adam_weight_decay
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
    )
    subspace = SubspaceGradient(args.sg_window, args.sg_threshold)
    # Each process draws its own data and directions; the global generator is never touched.
    generators = {
        name: torch.Generator().manual_seed(
            int(np.random.SeedSequence([args.seed, i, accelerator.process_index]).generate_state(1)[0])
        )
        for i, name in enumerate(["data", "perturbations"])
    }
    progress = {"step": 0, "seconds": 0.0, "best_loss": math.inf, "best_step": None, "validations_without_gain": 0}
    history = {"loss": [], "validation_loss": []}
    if checkpoint is not None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        theta.copy_(state["theta"])
        optimizer.load_state_dict(state["optimizer"])
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        subspace.load_state_dict(state["subspace"], device)
        progress, history = state["progress"], state["history"]
        own = torch.load(checkpoint / f"generators_{accelerator.process_index}.pt", weights_only=True)
        for name, generator in generators.items():
            generator.set_state(own[name])
        logger.info(f"Resumed from {checkpoint} at step {progress['step']}")

    loss_of = functools.partial(
        candidate_losses,
        text_encoder=text_encoder,
        unet=unet,
        first_placeholder_id=base["first_placeholder_id"],
        max_candidates=args.max_candidates_per_forward,
    )
    directions = args.num_perturbations * args.gradient_accumulation_steps * accelerator.num_processes
    timestep_bounds = (args.puts_min_timestep, args.puts_max_timestep)
    held_out = torch.Generator().manual_seed(args.seed + 1_000_003)
    held_out_batches = []
    for start in range(0, args.num_validation_samples, per_pass * args.train_batch_size):
        size = min(per_pass * args.train_batch_size, args.num_validation_samples - start)
        latents, ids = draw_examples(concept, size, held_out)
        timesteps = sample_puts_timesteps(size, *timestep_bounds, generator=held_out)
        held_out_batches.append(noise_batch(latents, ids, timesteps, held_out, base["scheduler"], "cpu"))

    if args.report_to != "none":
        plain = {n: v if isinstance(v, (int, float, str, bool)) else str(v) for n, v in public_settings(args).items()}
        accelerator.init_trackers("zoodip", config=plain)
    logger.info(f"{len(examples)} images, {len(prompt_ids)} prompts, {per_step} candidates a step ({per_pass} a pass)")

    def validate(step):
        """Held-out loss (on every process: all reach the same verdict) and, on the main one, images."""
        if held_out_batches:
            losses = [
                len(b["timesteps"]) * loss_of(theta[None], {n: t.to(device) for n, t in b.items()}).item()
                for b in held_out_batches
            ]
            loss = sum(losses) / args.num_validation_samples
            history["validation_loss"].append((step, loss))
            accelerator.log({"validation_loss": loss}, step=step)
            progress["validations_without_gain"] += 1
            if loss < progress["best_loss"]:
                progress.update(best_loss=loss, best_step=step, validations_without_gain=0)
                if accelerator.is_main_process:
                    save_embeds(output_dir / "learned_embeds-best.safetensors", args.placeholder_token, theta)
        if args.validation_prompt and accelerator.is_main_process:
            images = generate_images(args, base, text_encoder, unet, theta, device, dtype)
            with atomic_path(output_dir / "validation" / f"step-{step:06d}.png") as temporary:
                make_image_grid(images, 1, len(images)).save(temporary)
            log_images(accelerator, images, step)
            return images

    def patience_is_over():
        return 0 < args.early_stopping_patience <= progress["validations_without_gain"]

    # 5. The training loop: forward passes only.
    keep_freed_blocks(1 if args.low_vram else 32)  # 32: the most that glibc allows, and what it comes to by itself
    images = None
    last_good = theta.clone()
    resumed_at, started, seconds_before = progress["step"], time.perf_counter(), progress["seconds"]
    bar = tqdm(
        total=args.max_train_steps,
        initial=progress["step"],
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    )
    with torch.inference_mode():
        interval_loss, interval = torch.zeros((), device=device), 0
        if progress["step"] == 0:
            images = validate(0)
        while progress["step"] < args.max_train_steps and not patience_is_over():
            estimate = torch.zeros_like(theta)
            for _ in range(args.gradient_accumulation_steps):
                latents, ids = draw_examples(concept, args.train_batch_size, generators["data"])
                timesteps = sample_puts_timesteps(args.train_batch_size, *timestep_bounds, generators["data"])
                batch = noise_batch(latents, ids, timesteps, generators["data"], base["scheduler"], device)
                gradient, loss = estimate_gradient(
                    functools.partial(loss_of, batch=batch),
                    theta,
                    args.num_perturbations,
                    args.perturbation_scale,
                    generators["perturbations"],
                    args.gradient_estimator,
                )
                estimate += gradient / args.gradient_accumulation_steps
                interval_loss += loss / args.gradient_accumulation_steps
            estimate = accelerator.reduce(estimate, reduction="mean")
            num_removed = 0 if subspace.removed is None else len(subspace.removed)
            theta.grad = normalize_estimate(subspace.project(estimate), directions, num_removed)
            optimizer.step()
            lr_scheduler.step()
            subspace.update(theta)
            progress["step"] = step = progress["step"] + 1
            interval += 1
            bar.update()
            last = step == args.max_train_steps

            # The one read-out of the device: everything above runs without waiting for it. It also comes before
            # anything is judged or saved, so that no NaN ever replaces a good checkpoint or ends in the result.
            due = (args.logging_steps, args.validation_steps, args.save_steps, args.checkpointing_steps)
            if last or any(step % every == 0 for every in due):
                mean_loss = accelerator.reduce(interval_loss / interval, reduction="mean").item()
                if not math.isfinite(mean_loss) or not bool(theta.isfinite().all()):
                    if accelerator.is_main_process:
                        save_embeds(output_dir / "learned_embeds.safetensors", args.placeholder_token, last_good)
                    raise InputError(
                        f"the loss became {mean_loss} at step {step}: training stopped and the last good embedding is"
                        f" in {args.output_dir}/learned_embeds.safetensors; try a smaller --learning_rate than"
                        f" {args.learning_rate}, or --mixed_precision no."
                    )
                last_good.copy_(theta)
                history["loss"].append((step, mean_loss))
                rate = lr_scheduler.get_last_lr()[0]
                speed = (step - resumed_at) / (time.perf_counter() - started)
                bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{rate:.1e}")
                accelerator.log({"loss": mean_loss, "lr": rate, "steps_per_second": speed}, step=step)
                interval_loss.zero_()
                interval = 0
            if step % args.validation_steps == 0 or last:
                images = validate(step)
            if step % args.save_steps == 0 and accelerator.is_main_process:
                path = output_dir / f"learned_embeds-steps-{step}.safetensors"
                save_embeds(path, args.placeholder_token, theta)
            if step % args.checkpointing_steps == 0:
                progress["seconds"] = seconds_before + time.perf_counter() - started
                shared = {
                    "theta": theta,
                    "optimizer": optimizer.state_dict(),
                    "lr_scheduler": lr_scheduler.state_dict(),
                    "subspace": subspace.state_dict(),
                    "progress": progress,
                    "history": history,
                }
                save_checkpoint(args, accelerator, step, shared, generators, settings)
    bar.close()

    # 6. Results.
    seconds = seconds_before + time.perf_counter() - started
    steps = progress["step"]
    figures = {
        "steps": steps,
        "forward_passes": steps * per_step * args.gradient_accumulation_steps * accelerator.num_processes,
        "seconds": round(seconds, 1),
        "steps_per_second": round(steps / max(seconds, 1e-9), 3),
        "best_validation_loss": progress["best_loss"] if held_out_batches else None,
        "best_step": progress["best_step"],
        "validation_losses": history["validation_loss"],
        "final_loss": history["loss"][-1][1] if history["loss"] else None,
        "peak_memory": peak_memory(device),
    }
    if accelerator.is_main_process:
        save_embeds(output_dir / "learned_embeds.safetensors", args.placeholder_token, theta)
        if args.save_a1111:
            save_a1111(output_dir / "learned_embeds.pt", args.placeholder_token, theta, steps)
        save_loss_curve(output_dir / "loss_curve.png", history)
        if images:
            shutil.rmtree(output_dir / "samples", ignore_errors=True)  # an earlier run may have made more of them
        for i, image in enumerate(images or []):
            with atomic_path(output_dir / "samples" / f"image_{i}.png") as temporary:
                image.save(temporary)
        config = write_config(args, device, dtype, components, figures)
        if args.push_reference_images:
            shutil.rmtree(output_dir / "reference_images", ignore_errors=True)
            for i, (_, pixels, _) in enumerate(examples):
                with atomic_path(output_dir / "reference_images" / f"image_{i}.png") as temporary:
                    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary)
        write_model_card(output_dir, config, repo_id)
        if args.save_as_full_pipeline:
            del unet, text_encoder, loss_of
            save_full_pipeline(args, dtype)
        logger.info(
            f"Done: {steps} steps, {figures['forward_passes']} forward passes of one candidate, {seconds:.1f} s"
            f" ({figures['steps_per_second']} it/s), peak memory {figures['peak_memory']}; results in"
            f" {args.output_dir}"
        )
    accelerator.end_training()
    if repo_id is not None:
        logger.info(f"Pushed to {push_to_hub(args, config, repo_id)}")


def save_full_pipeline(args, dtype):
    """An unquantized pipeline that knows the new word, in `--output_dir/pipeline`."""
    where = {"revision": args.revision, "variant": args.variant, "torch_dtype": dtype}
    pipeline = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, **where)
    pipeline.load_textual_inversion(args.output_dir, weight_name="learned_embeds.safetensors")
    pipeline.save_pretrained(Path(args.output_dir) / "pipeline")


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Stopped; --resume_from_checkpoint latest goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
