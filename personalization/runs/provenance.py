"""What made a result: settings, versions, hardware, figures."""

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ..models.memory import peak_memory


def installed_versions(
    packages="torch diffusers transformers accelerate peft huggingface_hub bitsandbytes optimum-quanto openvino",
):
    """Versions of Python and of those packages that are installed, by name."""
    versions = {"python": platform.python_version()}
    for package in packages.split():
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def describe_hardware(device, dtype):
    """Device type and name, and the dtype of activations, JSON-ready."""
    host = f"{os.cpu_count()} cores, {platform.machine()}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else host
    return {"device": device.type, "name": name, "activations": str(dtype).removeprefix("torch.")}


def describe_figures(progress, history, device):
    """What was measured, JSON-ready.

    Args:
        progress, history: of the run.
        device: whose memory counts.
    """
    return {
        "steps": progress.step,
        "forward_passes": progress.forward_passes,
        "seconds": round(progress.seconds, 1),
        "steps_per_second": round(progress.step / max(progress.seconds, 1e-9), 3),
        "best_validation_loss": progress.best_loss if history.validation_loss else None,
        "best_step": progress.best_step,
        "validation_losses": history.validation_loss,
        "final_loss": history.loss[-1][1] if history.loss else None,
        "peak_memory": peak_memory(device),
    }


def describe_result(args, method, base_license, compute, components, figures, subject=None):
    """The content of a run's config file: what made the result, with which versions, at what cost.

    Args:
        args: resolved settings.
        method: its name and paper.
        base_license: what `hub.base_license` returned.
        compute: `Compute`.
        components: name -> `StoredModel`.
        figures: what was measured.
        subject: what stands for the subject in prompts, if not `args.placeholder_token`.
    """
    settings = args.public()
    return {
        "method": method,
        "base_model": settings["pretrained_model_name_or_path"],
        "base_model_is_local": os.path.exists(args.pretrained_model_name_or_path),
        "base_license": base_license,
        "placeholder_token": args.placeholder_token if subject is None else subject,
        "settings": settings,
        "versions": installed_versions(),
        "hardware": describe_hardware(compute.device, compute.dtype),
        "components": {
            name: {"bytes": model.bytes, "quantized_share": round(model.quantized_share, 4)}
            for name, model in components.items()
        },
        "figures": figures,
    }
