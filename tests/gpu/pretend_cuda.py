"""Runs a script's CUDA code path on a machine without a GPU: tensors "on cuda" have a shape and a layout, no values.

    .venv-cuda/bin/python tests/gpu/pretend_cuda.py SCRIPT [arguments of the script]

What is on the CPU is computed as usual. What is on cuda:0 is a FakeTensor: PyTorch checks devices, dtypes, shapes,
strides and views as on a GPU and computes nothing. A value that is read back is 1 (an integer: 0, a truth: True), a
tensor that is read back is random around 1. This needs a CUDA build of PyTorch: without one, "cuda" is no device.

It finds mixed devices and dtypes, views that a memory layout does not allow, CPU tensors handed to CUDA modules, and,
by its count of them, places where the host waits for the device. It says nothing of speed, memory or numbers, and has
no driver: streams (`--low_vram`), CUDA graphs (`--torch_compile`), the kernels of bitsandbytes (nf4) and a second
process need a GPU.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves, tree_map_only


CUDA = torch.device("cuda", 0)
RANDOM = torch.Generator().manual_seed(0)  # of its own: the script's draws stay what they are
aten = torch.ops.aten


class PretendedCuda(TorchDispatchMode):
    """Computes what is on the CPU and only follows what is on CUDA.

    Attributes:
        operations: how many operations ran on the pretended device.
        waits: how many of them make the host wait for it: values read back, and copies to it that are not
            `non_blocking`.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)  # only CPU scalars pass beside CUDA tensors
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a quantized tensor: it knows which plain tensors it consists of
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else torch.device("cpu")
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with self:  # in inference mode such operations arrive whole
                return func.decompose(*args, **kwargs)
        on_cuda = any(isinstance(tensor, FakeTensor) for tensor in tree_leaves((args, kwargs)))
        if not on_cuda and not is_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        self.operations += 1
        if func is aten._local_scalar_dense.default:
            self.waits += 1
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 0)
        if func is aten._to_copy.default and not on_cuda:
            self.waits += not kwargs.get("non_blocking", False)
            return self.to_cuda(args[0].to(kwargs.get("dtype")))
        if func is aten._to_copy.default and kwargs.get("device") and not is_cuda(kwargs["device"]):
            self.waits += 1
            return values(args[0]).to(kwargs.get("dtype"))
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):  # to the host
            self.waits += 1
            return args[0].copy_(values(args[1]))
        if func is aten.copy_.default and not isinstance(args[1], FakeTensor):  # from the host
            self.waits += not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            args = (args[0], self.to_cuda(args[1]))
        if func is aten.nonzero.default:  # how many there are is unknown: say one, the first
            self.waits += 1
            args, func = ([1, args[0].dim()],), aten.zeros.default
            kwargs = {"dtype": torch.int64, "device": CUDA}
        with self.fake:
            return func(*args, **kwargs)

    def to_cuda(self, tensor):
        """A CPU tensor on the pretended device, in the memory layout that it has."""
        with _disable_current_modes():
            shell = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self.fake, shell, CUDA)


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def values(tensor):
    """What the host reads back of a pretended tensor: numbers that differ, and never the same ones twice."""
    return torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=RANDOM).to(tensor.dtype)


def pretend():
    """Replaces what asks a driver, or needs to know a pretended tensor's memory."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(CUDA)
    torch.Tensor.pin_memory = lambda self, device=None: self
    randn, save, swap = torch.randn, torch.save, torch.utils.swap_tensors
    torch.randn = lambda *size, pin_memory=False, **settings: randn(*size, **settings)
    torch.save = lambda content, *to, **settings: save(tree_map_only(FakeTensor, values, content), *to, **settings)

    def swap_tensors(old, new):  # how `module.to()` renews weights
        if isinstance(old, FakeTensor):
            old.data = new  # the fake mode has a weak reference to it, with which it cannot be swapped
        else:
            swap(old, new)

    torch.utils.swap_tensors = swap_tensors
    cuda = torch.cuda
    cuda._lazy_init = cuda.synchronize = cuda.reset_peak_memory_stats = cuda.empty_cache = lambda *_: None
    cuda.get_device_name = lambda *_: "pretended"
    cuda.mem_get_info = lambda *_: (80 * 2**30, 80 * 2**30)
    cuda.max_memory_allocated = cuda.max_memory_reserved = cuda.memory_allocated = lambda *_: 0


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    pretend()
    with PretendedCuda() as mode:
        runpy.run_path(sys.argv[0], run_name="__main__")
    print(f"pretended device: {mode.operations} operations, {mode.waits} waits", file=sys.stderr)
