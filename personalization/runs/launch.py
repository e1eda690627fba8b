"""The start of a run: its Accelerator, its folders, its trackers and its length, the last of its settings."""

import logging
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ..errors import InputError, reason
from ..files import check_writable
from ..flags import DEFAULT_CACHE
from ..models import weight_cache


def open_folders(args):
    """Makes sure that a run can write to its folder and to the cache of quantized weights, or completes where that is.

    Raises:
        InputError: it cannot, or its logs would not go into its folder; the message names the flag.
    """
    output_dir = Path(args.output_dir)
    check_writable("--output_dir", args.output_dir)
    if not (output_dir / args.logging_dir).resolve().is_relative_to(output_dir.resolve()):
        raise InputError(
            f"--logging_dir {args.logging_dir!r} is outside --output_dir: give the name of a folder in it."
        )
    if args.quantized_cache_dir != "none":
        cache = weight_cache.open_cache(args.quantized_cache_dir, DEFAULT_CACHE, args.output_dir)
        args.quantized_cache_dir = cache


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
    public = args.public()
    plain = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in public.items()}
    try:
        accelerator.init_trackers(name, config=plain)
    except Exception as error:  # whatever a tracker's library raises
        raise InputError(
            f"--report_to {args.report_to} does not start ({reason(error)}): set it up or give --report_to none."
        ) from error


def settle(args, num_examples, num_processes, default):
    """Completes the last of the settings, the length, which is known once the pictures are, and freezes them all.

    Args:
        args: settings.
        num_examples: of an epoch, for `--num_train_epochs`.
        num_processes: of the launch.
        default: updates in all, if neither steps nor epochs were given.
    """
    if args.max_train_steps is None and args.num_train_epochs is not None:
        per_update = args.train_batch_size * args.gradient_accumulation_steps * num_processes
        args.max_train_steps = args.num_train_epochs * math.ceil(num_examples / per_update)
    elif args.max_train_steps is None:
        args.max_train_steps = default
    args.freeze()
