"""The files of a run: written whole or not at all, checkpoints, the history of losses, and what made the result."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration

from .errors import InputError


logger = get_logger(__name__)


# =====================================================================================================
# Files
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


@contextlib.contextmanager
def atomic_folder(path):
    """Yields a temporary folder beside `path` and renames it into place (over an older one) when all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new, path):
    """Renames a folder into place, over an older one; another process may have done the same in between."""
    shutil.rmtree(path, ignore_errors=True)
    os.replace(new, path)


def temporary_folder(parent):
    """A folder that is deleted with this process (`.name` is its path)."""
    return tempfile.TemporaryDirectory(prefix=".tmp-layers-", dir=parent)


def check_writable(flag, folder):
    """Creates a folder and makes sure that it can be written.

    Raises:
        InputError: it cannot; the message names the flag.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own: all processes of a launch pass here at once
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder!r} cannot be written ({error.strerror}): choose another.") from None


def write_json(path, content):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# =====================================================================================================
# Start
# =====================================================================================================


def start(output_dir, logging_dir, report_to, allow_tf32):
    """The `Accelerator` of this process, with logging and the precision of float32 products set up.

    Args:
        output_dir: of the run.
        logging_dir: of trackers, inside it.
        report_to: which tracker; "none" for none.
        allow_tf32: on CUDA.
    """
    accelerator = Accelerator(
        mixed_precision="no",  # weights and activations are cast once, by hand: autocast would cast them every step
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=Path(output_dir) / logging_dir),
    )
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    return accelerator


def start_trackers(accelerator, name, args):
    """Starts the trackers and tells them the settings, lists as text: TensorBoard cannot take others."""
    public = public_settings(args).items()
    plain = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in public}
    accelerator.init_trackers(name, config=plain)


# =====================================================================================================
# History
# =====================================================================================================


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0  # of training, over all its parts
    best_loss: float = float("inf")  # least held-out loss, and the step that had it
    best_step: int | None = None
    validations_without_gain: int = 0


@dataclass
class History:
    """Losses by step, as lists of (step, loss)."""

    loss: list = field(default_factory=list)
    validation_loss: list = field(default_factory=list)


def save_loss_curve(path, history):
    """Training loss (points and running mean) and held-out loss against the step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    if history.loss:
        steps, losses = zip(*history.loss)
        width = max(1, len(losses) // 20)
        smooth = np.convolve(np.pad(losses, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
        axes.plot(steps, losses, ".", alpha=0.3, label="training loss")
        axes.plot(steps, smooth, label=f"mean over {width} read-outs")
    if history.validation_loss:
        axes.plot(*zip(*history.validation_loss), "o-", label="held-out loss")
    axes.set(xlabel="step", ylabel="denoising loss")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


# =====================================================================================================
# Checkpoints
# =====================================================================================================


def trajectory_settings(args, names, num_processes, pictures):
    """What decides a run's trajectory: a checkpoint only resumes under the same.

    Args:
        args: resolved settings.
        names: which of them count.
        num_processes: processes of the launch.
        pictures: `images.Picture`s, which are told apart by pixels and caption.

    Returns:
        dict, JSON-ready.
    """
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.pixels.numpy().tobytes() + repr(picture.caption).encode())
    settings = {name: getattr(args, name) for name in names}
    return {**settings, "number of processes": num_processes, "training data": digest.hexdigest()[:16]}


def list_checkpoints(output_dir):
    """Complete checkpoints, oldest first (one being written has another name)."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(resume_from, output_dir, settings):
    """The checkpoint that `--resume_from_checkpoint` asks for, or None for a fresh start.

    Args:
        resume_from: the flag: None, "latest" or a folder.
        output_dir: of this run.
        settings: `trajectory_settings` of this run.

    Raises:
        InputError: it does not exist, or it was written under other settings.
    """
    if resume_from is None:
        return None
    if resume_from == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            logger.warning(f"No checkpoint in {output_dir} yet: starting from step 0.")
            return None
        checkpoint = checkpoints[-1]
    else:
        checkpoint = Path(resume_from)
        if not checkpoint.exists() and (Path(output_dir) / checkpoint.name).exists():
            checkpoint = Path(output_dir) / checkpoint.name
    if not (checkpoint / "settings.json").is_file():
        raise InputError(
            f'--resume_from_checkpoint {resume_from!r} is not a checkpoint: give "latest" or a checkpoint-N folder.'
        )
    before = json.loads((checkpoint / "settings.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    # Checkpoints of earlier versions know fewer settings.
    changed = [
        f"{name} ({before[name]!r}, now {value!r})"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    if changed:
        raise InputError(
            f"--resume_from_checkpoint {str(checkpoint)!r} belongs to other settings: {', '.join(changed)}; repeat"
            " them as they were or start in another --output_dir."
        )
    return checkpoint


class CheckpointState(NamedTuple):
    """What a checkpoint holds."""

    step: int  # updates done
    shared: dict  # what all processes have in common, tensors and plain values
    generators: dict  # name -> `torch.Generator` of this process
    settings: dict  # `trajectory_settings`


def save_checkpoint(accelerator, output_dir, state, total_limit=None):
    """Writes `checkpoint-{step}` under a temporary name and renames it once every process has written its part.

    Args:
        accelerator: every process of the launch calls this.
        output_dir: of the run.
        state: `CheckpointState`; the first process writes what is shared.
        total_limit: how many checkpoints stay; None keeps all.
    """
    name = f"checkpoint-{state.step}"
    final, temporary = Path(output_dir) / name, Path(output_dir) / f".tmp-{name}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        torch.save(state.shared, temporary / "state.pt")
        write_json(temporary / "settings.json", state.settings)
    accelerator.wait_for_everyone()
    states = {name: generator.get_state() for name, generator in state.generators.items()}
    torch.save(states, temporary / f"generators_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_folder(temporary, final)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(checkpoint, generators, process_index):
    """The shared state of a checkpoint, on the CPU; `generators` take up where those of this process stopped."""
    states = torch.load(checkpoint / f"generators_{process_index}.pt", weights_only=True)
    for name, generator in generators.items():
        generator.set_state(states[name])
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)


# =====================================================================================================
# What made a result
# =====================================================================================================

LOCAL_PATHS = ("train_data_dir", "quantized_cache_dir", "output_dir", "logging_dir", "resume_from_checkpoint")
PATHS_OR_NAMES = ("pretrained_model_name_or_path", "tokenizer_name", "dataset_name")  # a folder, or on the Hub


def public_settings(args):
    """The settings that may be published: no token, and only the last part of local paths."""
    settings = {name: value for name, value in vars(args).items() if name not in ("hub_token", "push_only")}
    for name in LOCAL_PATHS:
        if value := settings.get(name):
            settings[name] = Path(value).resolve().name
    for name in PATHS_OR_NAMES:
        if (value := settings.get(name)) and os.path.exists(value):
            settings[name] = Path(value).resolve().name
    return settings


def installed_versions(
    packages="torch diffusers transformers accelerate huggingface_hub bitsandbytes optimum-quanto openvino",
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


def describe_result(args, method, base_license, compute, components, figures):
    """The content of a run's config file: what made the result, with which versions, at what cost.

    Args:
        args: resolved settings.
        method: its name and paper.
        base_license: what `hub.base_license` returned.
        compute: `Compute`.
        components: name -> `StoredModel`.
        figures: what was measured.
    """
    settings = public_settings(args)
    return {
        "method": method,
        "base_model": settings["pretrained_model_name_or_path"],
        "base_model_is_local": os.path.isdir(args.pretrained_model_name_or_path),
        "base_license": base_license,
        "placeholder_token": args.placeholder_token,
        "settings": settings,
        "versions": installed_versions(),
        "hardware": describe_hardware(compute.device, compute.dtype),
        "components": {
            name: {"bytes": model.bytes, "quantized_share": round(model.quantized_share, 4)}
            for name, model in components.items()
        },
        "figures": figures,
    }
