"""Where and in what a model computes: the one place that decides dtype and memory layout for a device."""

from typing import NamedTuple

import torch

from ..errors import InputError


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of --mixed_precision


class Compute(NamedTuple):
    """Where and in what the models of a run compute."""

    device: torch.device
    dtype: torch.dtype  # of activations
    memory_format: torch.memory_format  # of activations and convolution weights


class DeviceLayout(NamedTuple):
    """How a device computes best."""

    precision: str  # key of DTYPES
    memory_format: torch.memory_format


def device_layout(device):
    """The `DeviceLayout` of a device; a test on a CPU puts CUDA's in its place."""
    if device.type == "cuda":  # cuDNN's half-precision convolutions want channels-last
        return DeviceLayout("fp16", torch.channels_last)
    return DeviceLayout("no", torch.contiguous_format)


def choose_compute(device, precision=None, on_torch=True):
    """Decides where and in what is computed.

    Args:
        device: torch device.
        precision: `--mixed_precision`; None takes what is best for the device.
        on_torch: whether PyTorch computes the UNet.

    Returns:
        `Compute`, and the name of the precision.

    Raises:
        InputError: the device is too slow in this precision.
    """
    if precision == "fp16" and (device.type == "cpu" or not on_torch):
        raise InputError("--mixed_precision fp16 is unusably slow on a CPU: leave the flag out (float32).")
    layout = device_layout(device)
    name = precision or (layout.precision if on_torch else "no")
    memory_format = layout.memory_format if on_torch else torch.contiguous_format
    return Compute(device, DTYPES[name], memory_format), name


def is_faster_in_bfloat16(compute):
    """Whether float32 takes about twice the time of bfloat16, for which some CPUs have units of their own (AMX)."""
    tell = getattr(torch.cpu, "get_capabilities", dict)  # older versions of PyTorch cannot
    return compute.device.type == "cpu" and compute.dtype == torch.float32 and tell().get("amx_bf16", False)
