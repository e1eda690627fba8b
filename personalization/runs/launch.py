"""The start of a run: its Accelerator, its folders, its trackers and its length."""

import logging
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ..errors import InputError, reason
from ..files import check_writable
from .provenance import public_settings


def check_folders(output_dir, logging_dir):
    """Makes sure that a run can write to its folder, and that its logs are to go there too.

    Raises:
        InputError: one of them cannot be; the message names the flag.
    """
    check_writable("--output_dir", output_dir)
    if not (Path(output_dir) / logging_dir).resolve().is_relative_to(Path(output_dir).resolve()):
        raise InputError(f"--logging_dir {logging_dir!r} is outside --output_dir: give the name of a folder in it.")


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
    for name in ("httpx", "httpx2"):  # a line for every request to the Hub
        logging.getLogger(name).setLevel(logging.WARNING)
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


def training_length(args, num_examples, num_processes, default):
    """Updates in all: from `--num_train_epochs` (of so many examples each) where it is given, else `default`."""
    if args.num_train_epochs is None:
        return default
    per_update = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    return args.num_train_epochs * math.ceil(num_examples / per_update)
