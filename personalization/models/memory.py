"""Memory: what a process has, what a run will need, and glibc's habits."""

import argparse
import contextlib
import ctypes
import gc
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import InputError
from ..logs import get_logger
from . import frozen
from .lean_vae import spare_memory
from .paired import Paired
from .stacked import Dual, NoRule, Stacked


logger = get_logger(__name__)


# =====================================================================================================
# What a process has
# =====================================================================================================


HEAP_BLOCK = 2  # MB; from there on PyTorch lets a tensor lie in huge pages, see `quiet`


def keep_freed_memory(block, rest):
    """Sets what glibc keeps of freed memory, in MB; another C library does as it likes.

    What is loaded once should go back to the system. Tensors of a loop come again: large ones from the system, which
    clears huge pages quickly, as a heap with many sizes grows to two or three times what is in it; small ones from the
    heap, as clearing small pages takes longer than using them.

    Args:
        block: larger ones are the system's.
        rest: so much that is free at the heap's end stays there.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6").mallopt, -1, -3
        mallopt(mmap_threshold, block * 2**20)
        mallopt(trim_threshold, rest * 2**20)


def prepare_loading():
    """See `keep_freed_memory`."""
    keep_freed_memory(1, 2)


def prepare_training(small_heap=False):
    """See `keep_freed_memory`.

    Args:
        small_heap: for what has many sizes of 1 to 2 MB, too: backward passes, layers that are streamed.
    """
    keep_freed_memory(*((1, 32) if small_heap else (HEAP_BLOCK, 256)))


def release_freed_memory():
    """Gives what has been freed back to the system: after large models have left, glibc keeps hundreds of MB."""
    gc.collect()
    if hasattr(psutil, "heap_trim"):  # not every C library has such a call
        psutil.heap_trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class ProcessMemory(NamedTuple):
    """Bytes that a process has in memory."""

    rss: int
    anonymous: int | None  # what is no page of a file; None where the system does not say


def process_memory():
    """The `ProcessMemory` of this process."""
    rss, status = psutil.Process().memory_info().rss, Path("/proc/self/status")
    anonymous = re.search(r"RssAnon:\s+(\d+)", status.read_text()) if status.is_file() else None
    return ProcessMemory(rss, int(anonymous[1]) * 1024 if anonymous else None)


def peak_memory(device):
    """Peak memory so far, in MB: of the process, and of the CUDA allocator where there is one."""
    figures, status = {}, Path("/proc/self/status")
    if status.is_file():  # Linux; getrusage would count the launcher that this process was forked from, too
        figures["process_mb"] = round(int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10)
    elif sys.platform == "darwin":
        import resource

        figures["process_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    else:  # Windows
        figures["process_mb"] = round(psutil.Process().memory_info().peak_wset / 2**20)
    if device.type == "cuda":
        figures["cuda_allocated_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
        figures["cuda_reserved_mb"] = round(torch.cuda.max_memory_reserved(device) / 2**20)
    return figures


# =====================================================================================================
# What a run will need, without loading a weight
# =====================================================================================================


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive while a model runs on the meta device; `peak` is the most there were at once.

    Args:
        on_cpu: count what a CPU needs beside the tensors, too. For a convolution, oneDNN's own copies of input, weight
            and output in blocked layouts. For blocks of up to `HEAP_BLOCK`, `heap_slack` of their size: glibc's
            heap keeps what was freed, and fragments. For larger ones `slack`.
    """

    def __init__(self, on_cpu, heap_slack, slack=0.0):
        super().__init__()
        self.on_cpu, self.heap_slack, self.slack = on_cpu, heap_slack, slack
        self.live = self.peak = 0
        self.known = set()

    def _need(self, size):
        if not self.on_cpu:
            return size
        return size * (1 + (self.heap_slack if size <= HEAP_BLOCK * 2**20 else self.slack))

    def _forget(self, key, size):
        self.known.discard(key)
        self.live -= self._need(size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        inputs = {t.untyped_storage()._cdata for t in inputs}  # views of weights and inputs are no new memory
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for storage in (t.untyped_storage() for t in tensors):
            if storage._cdata not in self.known and storage._cdata not in inputs:
                self.known.add(storage._cdata)
                self.live += self._need(storage.nbytes())
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        copies = 0
        if self.on_cpu and func is torch.ops.aten.convolution.default:
            copies = sum(t.numel() * t.element_size() for t in (args[0], args[1], *tensors))
        self.peak = max(self.peak, self.live + copies)
        return result


# The share by which glibc's heap outgrows the tensors in it while training, measured; see `keep_freed_memory`.
HEAP_SLACK = 0.8
# What backward passes that compute again need on a CPU beside their tensors, as a share of these, measured at 512 px:
# memory of kernels. Where everything is kept, tensors are most at the end of the forward pass, which needs none of it.
BACKWARD_SLACK = 0.5


class FusedAttention(torch.autograd.Function):
    """PyTorch's fused attention on the meta device: only the result takes memory, and what its backward pass makes."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def activation_bytes(run, device, heap_slack=HEAP_SLACK, differentiates=False, slack=0.0):
    """Peak bytes of the tensors that `run()` makes on the meta device, as they would be on `device`.

    Args:
        run: a forward pass, with its backward pass if it `differentiates`.
        heap_slack, slack: see `LiveBytes`.
    """

    def fused(query, key, value, *args, **kwargs):
        if any(isinstance(x, Dual) for x in (query, key, value)):  # which makes tensors that are counted
            return attention(query, key, value, *args, **kwargs)
        return FusedAttention.apply(query, key, value)

    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused
    try:
        with torch.set_grad_enabled(differentiates), LiveBytes(device.type == "cpu", heap_slack, slack) as live:
            run()
    finally:
        F.scaled_dot_product_attention = attention
    return int(live.peak)


# Beside tensors, measured: the code and caches of the CPU kernels of PyTorch and of OpenVINO. CUDA's context is not
# counted.
CPU_KERNEL_BYTES = 30 * 2**20
OPENVINO_BYTES = 120 * 2**20


class MemoryPlan(NamedTuple):
    """How a run treats its memory."""

    examples: int  # of one forward pass of the denoiser; where it computes derivatives, of the value
    resolution: int  # of the pictures
    cached: bool  # quantized weights may be kept in files and mapped from there
    streamed: bool  # --low_vram
    openvino: bool
    images: bool  # validation images are drawn
    derivatives: int = 0  # of a value that a pass computes beside it, see `stacked`
    coordinates: int = 0  # of all candidates of a step, numbers
    checkpointing: str | None = None  # of a backward pass, see `frozen.CHECKPOINTING`; None: there is none
    look_around: Callable | None = None  # denoiser -> its `windows.Surroundings`; None: whole pictures
    encoded: int = 0  # prompts at most that the text encoders encode before they leave; 0: they stay


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes that a run needs, by component and by phase.

    Args:
        libraries: this process as it is now, on a CPU; 0 on CUDA.
        vae, text_encoder, denoiser: weights, the last as they are while training.
        vae_activations, activations: of encoding or decoding a picture, of a forward pass of the denoiser.
        mapped: the part of the weights that is pages of files, which the system can drop.
        phases: name -> bytes that are there in it, libraries left out; 0 where it does not take place.
        denoiser_label: what the table calls it.
    """

    libraries: int
    vae: int
    text_encoder: int
    denoiser: int
    vae_activations: int
    activations: int
    mapped: int
    phases: dict
    denoiser_label: str = "UNet"

    @property
    def peak(self):
        """The largest sum of what is there at one time."""
        return self.libraries + max(self.phases.values())

    def table(self):
        """The prediction as lines of text, in MB (2^20 bytes)."""
        rows = {
            "libraries": self.libraries,
            "VAE": self.vae,
            "VAE activations": self.vae_activations,
            "text encoder": self.text_encoder,
            self.denoiser_label: self.denoiser,
            "activations": self.activations,
            **{f"while {name}": self.libraries + size for name, size in self.phases.items() if size},
            "peak": self.peak,
        }
        lines = [f"  {name:<26}{size / 2**20:8.0f} MB" for name, size in rows.items()]
        if self.mapped:
            lines.append(f"  of it pages of files, which the system can drop: {self.mapped / 2**20:.0f} MB")
        return "\n".join(lines)


def predict_memory(text_encoder, denoiser, vae, backend, plan, base, compute):
    """The memory that a run will need, from empty models alone.

    Args:
        text_encoder, denoiser, vae: on the meta device, unquantized, the first `TextEncoders`; they are changed.
        backend: how weights are stored: `quantizes(layer)`, `weight_bytes(layer, dtype)`, `replace_layers(model,
            dtype)` and the properties cached, whole_model, hidden_copies.
        plan: `MemoryPlan`.
        base: `Base`.
        compute: `Compute`.

    Returns:
        `MemoryPrediction`.

    Raises:
        InputError: the run is too large for its tensors to be counted.
    """
    device, dtype = compute.device, compute.dtype
    on_cpu, is_mapped = device.type == "cpu", device.type == "cpu" and backend.cached and plan.cached
    prompts, saying = count_prompts(text_encoder, plan, base, compute) if plan.encoded else (0, 0)
    text_encoder.set_input_embeddings(torch.nn.Identity())  # only the rows in use come
    layers = [layer for layer in denoiser.modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    largest = max(layers, key=lambda layer: layer.weight.numel())
    largest_weights, largest_bytes = largest.weight.numel(), backend.weight_bytes(largest, dtype)
    linear_weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))
    all_weights = sum(layer.weight.numel() for layer in layers)
    text_bytes, denoiser_bytes = (stored_bytes(model, backend, dtype) for model in (text_encoder, denoiser))
    unquantized_bytes = sum(p.numel() for p in denoiser.parameters()) * dtype.itemsize
    vae_dtype = torch.float32 if base.family.vae_in_float32 else dtype
    vae_bytes = sum(p.numel() for p in vae.parameters()) * vae_dtype.itemsize

    if not backend.hidden_copies:
        backend.replace_layers(denoiser, dtype)
    if not plan.openvino:
        frozen.split_feed_forwards(denoiser)
    for model, its_dtype in ((vae, vae_dtype), (denoiser, dtype)):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(its_dtype)
    try:
        activations, encoding, decoding = count_activations(denoiser, vae, plan, base, compute)
    except (RuntimeError, OverflowError, TypeError) as error:  # PyTorch cannot count that far
        raise InputError(
            f"--resolution {plan.resolution} and {plan.examples} examples a pass make tensors too large to be counted"
            f" ({str(error).splitlines()[0][:200].rstrip('.')}): choose a smaller --resolution, --train_batch_size"
            " or --num_perturbations (Gauss-Newton: --max_candidates_per_forward)."
        ) from None
    if backend.hidden_copies:  # a dequantized layer and its transposed copy, which the meta device does not see
        activations += 2 * largest_weights * dtype.itemsize
    vae.decoder = None  # as while encoding

    staying = prompts if plan.encoded else text_bytes
    mapped, kept = text_bytes if is_mapped and not plan.encoded else 0, denoiser_bytes
    if plan.openvino:
        # Beside the stored weights it has all of them in float32, and those of products once more, repacked for the
        # activations' type; twice where derivatives go through them in a batch of their own.
        repacked = (2 if plan.derivatives else 1) * linear_weights
        kept += 4 * all_weights + dtype.itemsize * repacked + OPENVINO_BYTES
    elif is_mapped:
        mapped += kept
    if plan.streamed:  # one layer and the next one; pages of the mapped file stay until they are dropped
        kept = 2 * largest_bytes + (kept if is_mapped else 0)
    encoding_on_gpu = 0 if plan.streamed else tensor_bytes(vae) + encoding
    points = 4 * 4 * plan.coordinates  # directions, candidates and intermediate results, in float32
    phases = {
        # which the host does where a GPU is to be spared
        "encoding the images": tensor_bytes(vae) + encoding if on_cpu else encoding_on_gpu,
        "encoding the prompts": text_bytes + prompts + saying if plan.encoded else 0,
        "quantizing": staying + unquantized_bytes if on_cpu and backend.whole_model else 0,
        "writing the layers to disk": staying + denoiser_bytes if on_cpu and plan.streamed else 0,
        "training": staying + kept + activations + points,
        "validation images": staying + kept + vae_bytes + decoding if plan.images else 0,
    }
    if is_mapped and phases["encoding the prompts"] == max(phases.values()):  # the other model is not yet there
        mapped = text_bytes
    return MemoryPrediction(
        libraries=process_memory().rss + CPU_KERNEL_BYTES if on_cpu else 0,
        vae=vae_bytes if plan.images else tensor_bytes(vae),
        text_encoder=text_bytes,
        denoiser=kept,
        vae_activations=max(encoding, decoding),
        activations=activations,
        mapped=mapped,
        phases=phases,
        denoiser_label=base.family.denoiser_label,
    )


def count_prompts(text_encoder, plan, base, compute):
    """Bytes of `plan.encoded` prompts, as they are kept, and of the activations of encoding one."""
    one = base.family.example(base, 1, plan.resolution, "meta", compute.dtype).text.states
    ids = torch.zeros(one.shape[:2], dtype=torch.long, device="meta")
    text_encoder.to("meta")  # its buffers, too
    for parameter in text_encoder.parameters():
        parameter.data = parameter.data.to(compute.dtype)
    saying = activation_bytes(lambda: text_encoder(ids), compute.device)
    return plan.encoded * one.numel() * one.element_size(), saying


def count_activations(denoiser, vae, plan, base, compute):
    """Bytes of the activations of a denoiser's pass, of encoding and of decoding a picture; see `predict_memory`."""
    device, family = compute.device, base.family
    denoiser.to("meta")  # its buffers, which even an empty model has
    inputs = family.example(base, plan.examples, plan.resolution, "meta", compute.dtype)
    slack = 0.0 if plan.streamed else HEAP_SLACK

    surroundings = None

    def step(inputs):
        seen = inputs
        if surroundings is not None:
            drawn = surroundings.draw_windows(inputs.noisy, torch.Generator().manual_seed(0))
            with torch.no_grad(), surroundings.kept(drawn):
                family.predict(denoiser, *inputs)
            seen = inputs._replace(noisy=drawn.of(inputs.noisy))
        with surroundings.standing_in() if surroundings is not None else contextlib.nullcontext():
            prediction = family.predict(denoiser, *seen)
            if plan.checkpointing is not None:
                prediction.float().square().sum().backward()

    if plan.checkpointing is not None:
        frozen.make_differentiable(denoiser.requires_grad_(False), plan.checkpointing)
        for tensor in inputs.text:
            if isinstance(tensor, torch.Tensor):
                tensor.requires_grad_(True)
        if plan.look_around is not None:
            surroundings = plan.look_around(denoiser)
    activations = None
    if plan.derivatives:
        rows = {name: x for name, x in inputs.text._asdict().items() if isinstance(x, torch.Tensor)}

        def with_derivatives(x):
            if plan.openvino:
                return Paired(x, x.expand(plan.derivatives, *x.shape[1:]))
            return Stacked(x.expand(1 + plan.derivatives, *x.shape))

        rows = {name: with_derivatives(x) for name, x in rows.items()}
        stacked = inputs._replace(text=inputs.text._replace(**rows))
        with contextlib.suppress(NoRule):  # PyTorch's forward mode is counted as so many candidates
            if family.stacks:
                activations = activation_bytes(lambda: step(stacked), device, slack)
        inputs = family.example(base, (1 + plan.derivatives) * plan.examples, plan.resolution, "meta", compute.dtype)
    if activations is None:
        kernels = 0.0 if plan.checkpointing in (None, "none") else BACKWARD_SLACK
        differentiates = plan.checkpointing is not None
        activations = activation_bytes(lambda: step(inputs), device, slack, differentiates, kernels)
    pixels = torch.empty(1, 3, plan.resolution, plan.resolution, device="meta", dtype=vae.dtype)
    latent = inputs.noisy[:1].to(vae.dtype)
    spare_memory(vae)
    encoding = activation_bytes(lambda: vae.encode(pixels).latent_dist.parameters, device, heap_slack=0.0)
    decoding = activation_bytes(lambda: vae.decode(latent), device) if plan.images else 0
    return activations, encoding, decoding


def stored_bytes(model, backend, dtype):
    """Bytes of an unquantized (or empty) model's weights as `backend` keeps them, everything else in `dtype`."""
    total = 0
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            quantized = name == "weight" and backend.quantizes(layer)
            total += backend.weight_bytes(layer, dtype) if quantized else parameter.numel() * dtype.itemsize
    return total


# A run that needs more than this many times all memory of the machine, swap included, is refused: no estimate is so
# far off, and no system could page it.
ABSURD = 4


def device_memory(device):
    """Bytes that are free, and bytes that there are in all (of a host: with swap)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    host = psutil.virtual_memory()
    return host.available + process_memory().rss, host.total + psutil.swap_memory().total


def warn_if_too_large(args, smaller, predict, device):
    """Says before anything is loaded that a run needs more memory than there is, and which flags would make it fit.

    Args:
        args: settings.
        smaller: setting -> the value that takes less memory, in the order in which they are tried.
        predict: settings -> `MemoryPrediction`.
        device: whose memory counts.

    Raises:
        InputError: it needs several times what the machine has, swap included.
    """
    free, total = device_memory(device)

    def need(**changes):
        prediction = predict(argparse.Namespace(**{**vars(args), **changes}))
        return prediction.peak - prediction.mapped

    needed = need()
    if needed <= free:
        return
    flags, changes, fix = (
        [],
        {},
        "no choice of flags makes it fit; try a smaller --resolution, --train_batch_size or --num_vectors.",
    )
    for name, value in smaller.items():
        if getattr(args, name) == value:
            continue
        changes[name] = value
        flags.append(f"--{name}" + ("" if value is True else f" {value}"))
        if need(**changes) <= free:
            fix = " ".join(flags) + " would fit."
            break
    message = (
        f"his run needs about {needed / 2**20:.0f} MB and the {device.type} has {free / 2**20:.0f} MB free: {fix}"
    )
    if needed > ABSURD * total:
        raise InputError(f"t{message}")
    logger.warning(f"T{message}")


def tensor_bytes(model):
    """Bytes of a model's parameters and buffers, quantized ones as stored."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in (getattr(t, "_data", t) for t in tensors))
