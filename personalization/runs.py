"""What every run needs: files written whole or not at all, its start, the history of losses, what made the result."""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import platform
import shutil
import signal
import stat
import tempfile
import threading
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration
from tqdm.auto import tqdm

from .errors import InputError, is_outside, reason
from .memory import peak_memory


logger = get_logger(__name__)


# =====================================================================================================
# Files
# =====================================================================================================


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path` (same suffix) and renames it into place when the block succeeds.

    Whoever writes it, the file gets the mode that the umask gives to new files (safetensors would keep it private).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")  # two runs may fill the same cache
    try:
        temporary.unlink(missing_ok=True)  # of a process with this id that was killed
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
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
    if not str(folder).strip():
        raise InputError(f"{flag} {folder!r} names no folder: give one.")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own: all processes of a launch pass here at once
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder!r} cannot be written ({error.strerror}): choose another.") from None


def check_folders(output_dir, logging_dir):
    """Makes sure that a run can write to its folder, and that its logs are to go there too.

    Raises:
        InputError: one of them cannot be; the message names the flag.
    """
    check_writable("--output_dir", output_dir)
    if not (Path(output_dir) / logging_dir).resolve().is_relative_to(Path(output_dir).resolve()):
        raise InputError(f"--logging_dir {logging_dir!r} is outside --output_dir: give the name of a folder in it.")


def save_tensors(path, content):
    """`torch.save`, written whole or not at all; a full disk is an `OSError`, as it is for any other file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def sha256(path):
    """Hash of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def tolerated(what):
    """For what a run can do without: if the disk, say, fails it, a warning says so and the run goes on."""
    try:
        yield
    except Exception as error:
        if not is_outside(error):
            raise
        logger.warning(f"{what} failed ({reason(error)}); training goes on without.")


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
    """Starts the trackers and tells them the settings, lists as text: TensorBoard cannot take others.

    Raises:
        InputError: a tracker does not start.
    """
    public = public_settings(args).items()
    plain = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in public}
    try:
        accelerator.init_trackers(name, config=plain)
    except Exception as error:  # whatever a tracker's library raises
        raise InputError(
            f"--report_to {args.report_to} does not start ({reason(error)}): set it up or give --report_to none."
        ) from error


@contextlib.contextmanager
def tracking(accelerator):
    """For what goes to trackers: one that fails, in whatever way, is left out from then on, with one warning."""
    try:
        yield
    except Exception as error:
        logger.warning(f"The tracker failed ({reason(error)}); training goes on without it.")
        accelerator.trackers.clear()


def log(accelerator, values, step):
    """Gives numbers by name to the trackers."""
    with tracking(accelerator):
        accelerator.log(values, step=step)


def end(accelerator):
    """Ends the trackers and the group of processes."""
    with tracking(accelerator):
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.trackers.clear()
    accelerator.end_training()


def progress_bar(accelerator, step, steps):
    """A bar over all steps, shown once on each machine."""
    return tqdm(total=steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)


@contextlib.contextmanager
def stop_requests(accelerator):
    """Lets Ctrl+C or SIGTERM end a training loop cleanly, after the step and with a checkpoint; a second one at once.

    In a launch of several processes, which would stop at different steps, and outside the main thread, signals keep
    what they do.

    Yields:
        Function without arguments: whether the loop is to write a checkpoint and raise `KeyboardInterrupt`.
    """
    requested = []

    def request(number, frame):
        requested.append(number)
        for name, before in handlers.items():
            signal.signal(name, before)

    alone = accelerator.num_processes == 1 and threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if alone else ()
    handlers = {number: signal.signal(number, request) for number in signals}
    try:
        yield lambda: bool(requested)
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)


def training_length(args, num_examples, num_processes, default):
    """Updates in all: from `--num_train_epochs` (of so many examples each) where it is given, else `default`."""
    if args.num_train_epochs is None:
        return default
    per_update = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    return args.num_train_epochs * math.ceil(num_examples / per_update)


def log_components(components):
    """Says how large the parts of the model (name -> `StoredModel`) are."""
    for name, facts in components.items():
        stays = "leaves after encoding" if name == "vae" else f"{facts.quantized_share:.1%} of parameters quantized"
        logger.info(f"{name}: {facts.bytes / 1e6:.1f} MB, {stays}")


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
    forward_passes: int = 0  # of one example and candidate, over all processes


@dataclass
class History:
    """Losses by step, as lists of (step, loss)."""

    loss: list = field(default_factory=list)
    validation_loss: list = field(default_factory=list)
    bp_share: list = field(default_factory=list)  # of updates by backpropagation, where there are others, too


def save_loss_curve(path, history):
    """Training loss (points and running mean) and held-out loss against the step, as a PNG.

    Where some updates are by backpropagation and others are not, their shares are beside it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 2 if history.bp_share else 1
    figure, axes = plt.subplots(1, panels, figsize=(7 * panels, 4), constrained_layout=True, squeeze=False)
    axes, of_shares = axes[0, 0], axes[0, -1]
    if history.bp_share:
        steps, shares = zip((0, history.bp_share[0][1]), *history.bp_share)
        of_shares.stackplot(steps, shares, [1 - share for share in shares], step="pre", labels=["BP-low", "ZO-high"])
        of_shares.set(xlabel="step", ylabel="share of updates since the last read-out", ylim=(0, 1))
        of_shares.legend(loc="lower left")
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
# What made a result
# =====================================================================================================

LOCAL_PATHS = ("train_data_dir", "instance_data_dir", "class_data_dir", "quantized_cache_dir", "output_dir")
LOCAL_PATHS += ("logging_dir", "resume_from_checkpoint")
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
    settings = public_settings(args)
    return {
        "method": method,
        "base_model": settings["pretrained_model_name_or_path"],
        "base_model_is_local": os.path.isdir(args.pretrained_model_name_or_path),
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
