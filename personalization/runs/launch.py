"""The start of a run: its Accelerator, its folders, its trackers and its length, the last of its settings."""

import contextlib
import logging
import math
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from .. import flags
from ..errors import InputError, is_outside, quoted, reason
from ..files import check_apart, check_writable
from ..logs import get_logger
from ..models import memory, weight_cache
from ..models.compute import DTYPES


logger = get_logger(__name__)


def open_folders(args):
    """Makes sure that a run can write to its folder and to the cache of quantized weights, or completes where that is.

    Raises:
        InputError: it cannot, its folder is not apart from what it reads, or its logs would not go into it; the
            message names the flag.
    """
    for name, flag in args.declared.items():
        value = getattr(args, name) if args.output_dir.strip() else None
        if value and (flag.path is True or flag.path == flags.OR_NAME and os.path.exists(value)):
            check_apart(f"--{name}", value, args.output_dir)
            if args.quantized_cache_dir is not None:
                check_apart(f"--{name}", value, args.quantized_cache_dir, "--quantized_cache_dir", over=True)
    output_dir = Path(args.output_dir)
    check_writable("--output_dir", args.output_dir)
    if not (output_dir / args.logging_dir).resolve().is_relative_to(output_dir.resolve()):
        raise InputError(
            f"--logging_dir {args.logging_dir!r} is outside --output_dir: give the name of a folder in it."
        )
    if args.quantized_cache_dir is not None:
        cache = weight_cache.open_cache(args.quantized_cache_dir, flags.DEFAULT_CACHE, args.output_dir)
        args.quantized_cache_dir = cache


def start(args):
    """The `Accelerator` of this process, with logging, memory and the precision of float32 products set up.

    Raises:
        InputError: accelerate's launch or configuration asks for what there is not.
    """
    memory.prepare_loading()
    logging_dir = Path(args.output_dir) / args.logging_dir
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    check_engines()
    timeout = timedelta(seconds=group_seconds())
    try:
        accelerator = Accelerator(
            mixed_precision="no",  # weights and activations are cast once, by hand: autocast would cast at every step
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=logging_dir),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    except Exception as error:  # whatever accelerate raises on settings in the environment
        if is_outside(error):
            raise
        raise InputError(
            f"accelerate cannot start as its launch, its configuration or ACCELERATE_... in the environment say"
            f" ({reason(error)}): set that right, or start the script with python."
        ) from error
    check_world(accelerator)
    take_precision(args, accelerator.device)
    for name in ("httpx", "httpx2"):  # a line for every request to the Hub
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


# ACCELERATE_USE_...
ENGINES = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}
ENGINES |= {"PARALLELISM_CONFIG": "a parallelism configuration"}


def group_seconds():
    """Seconds that a process waits for the others of its launch, which may be drawing validation images.

    Raises:
        InputError: ZOODIP_GROUP_TIMEOUT is no such number.
    """
    given = os.environ.get("ZOODIP_GROUP_TIMEOUT", "600")
    with contextlib.suppress(ValueError):
        if 0 < float(given) <= 10**6:
            return float(given)
    raise InputError(f"ZOODIP_GROUP_TIMEOUT is {quoted(given)} and must be seconds, at most 1000000: set it anew.")


def check_engines():
    """Refuses what accelerate's launch or configuration would wrap around a model, before it fails there.

    Raises:
        InputError: it is to be wrapped.
    """
    for name, engine in ENGINES.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes"):
            raise InputError(
                f"accelerate is set up for {engine}, which shards models that are trained, and here next to nothing"
                " is: start the script with python, or by accelerate launch with a configuration without it."
            )


def check_world(accelerator):
    """Makes sure that the processes of a launch know each other.

    Raises:
        InputError: each is alone.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started != accelerator.num_processes:
        raise InputError(
            f"the launch started {started} processes, and each of them is alone: on {accelerator.device.type} they"
            " cannot work together as accelerate is set up; give accelerate launch --cpu, or --num_processes 1."
        )


def take_precision(args, device):
    """Takes `--mixed_precision` of accelerate's launch or configuration, where the script was given none.

    What else it can ask for is not taken, and said.
    """
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        logger.warning(f"accelerate's dynamo_backend {compiler} is not taken: --torch_compile is, where there is one.")
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted == "no" or args.mixed_precision is not None:
        return
    if wanted in DTYPES and (wanted, device.type) != ("fp16", "cpu"):
        args.mixed_precision = wanted
        logger.info(f"--mixed_precision {wanted} is taken from accelerate's launch.")
    else:
        logger.warning(f"accelerate's mixed_precision {wanted} is not for {device.type} here and is not taken.")


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
    """Completes the last of the settings, the length and what follows from it, and freezes them all.

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
    if args.checkpointing_steps is None:  # so that no run is without
        args.checkpointing_steps = min(flags.CHECKPOINTING_STEPS, math.ceil(args.max_train_steps / 4))
    args.freeze()
