"""The command line that trainers share: a parser that answers in one sentence, groups of flags, checks of ranges."""

import argparse
import math
import os

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType
from huggingface_hub.constants import HF_HOME

from .compute import DTYPES


DEFAULT_CACHE = os.path.join(HF_HOME, "zoodip")  # of quantized weights


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


def new_parser(description, usage):
    """An empty parser."""
    return OneSentenceParser(description=description, usage=usage, formatter_class=HelpFormatter, allow_abbrev=False)


def parse(parser, words, refused):
    """Parses the command line; `--push_only` makes every other flag optional.

    Args:
        parser: with all groups added.
        words: list of strings.
        refused: flag -> why it means nothing here, for flags that users of similar scripts expect.
    """
    for flag, reason in refused.items():
        parser.add_argument(flag, nargs="?", const=True, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if any(word.split("=")[0] == flag for word in words):
            parser.error(f"{flag} means nothing here: {reason}")
    if "--push_only" in words:  # the run is finished, and its config knows how it was made
        for action in parser._actions:
            action.required = False
    return parser.parse_args(words)


# =====================================================================================================
# Groups of flags
# =====================================================================================================


def add_model_arguments(parser):
    """Adds the group "model", which base; returns it, for a trainer's own flags."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="Stable Diffusion 1.x or 2.x in diffusers format: a local folder or a model id on the Hub.",
    )
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help='Variant of the weight files, such as "fp16".')
    add("--tokenizer_name", help="Tokenizer folder or id, if not the model's own.")
    add(
        "--mixed_precision",
        choices=list(DTYPES),
        help="Activations; the loss is always float32. Default: fp16 on CUDA, no (float32) elsewhere.",
    )
    add(
        "--quantized_cache_dir",
        default=DEFAULT_CACHE,
        help="Folder of INT8 weights, quantized once and memory-mapped by every later run (0.9 GB for SD 1.5);"
        ' "none" keeps none.',
    )
    add(
        "--estimate_memory",
        action="store_true",
        help="Print the memory that this run would need, by component, and exit; no weight is loaded.",
    )
    add("--allow_tf32", action="store_true", help="Allow TF32 in float32 products on CUDA.")
    return group


def add_data_arguments(parser):
    """Adds the group "data", pictures and captions; returns it."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--train_data_dir",
        help="Folder of images, with captions in metadata.jsonl or metadata.csv (fields file_name, text) if you have"
        " them; {} or the placeholder marks the concept in a caption.",
    )
    add("--dataset_name", help="Instead of a folder: a dataset id on the Hub (its train split).")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--image_column", default="image", help="Column of the dataset that holds the images.")
    add("--caption_column", default="text", help="Column of the dataset that holds captions, if any.")
    add("--resolution", type=int, help="Side of the training images. Default: the model's own.")
    add(
        "--center_crop", action="store_true", help="Crop the centre square; otherwise images are squeezed to a square."
    )
    return group


def add_training_arguments(parser):
    """Adds the group "training"; returns it."""
    group = parser.add_argument_group("training")
    add = group.add_argument
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
    return group


def add_validation_arguments(parser):
    """Adds the group "validation and logging"; returns it."""
    group = parser.add_argument_group("validation and logging")
    add = group.add_argument
    add("--validation_prompt", help="Prompt of the validation images; {} or the placeholder in it.")
    add("--num_validation_images", type=int, default=4, help="Images per validation.")
    add("--validation_steps", type=int, default=500, help="Updates between validations.")
    add("--num_inference_steps", type=int, default=25, help="Denoising steps of validation images.")
    add("--guidance_scale", type=float, default=7.5, help="Guidance of validation images.")
    add("--logging_steps", type=int, default=10, help="Updates between read-outs of the loss.")
    add("--logging_dir", default="logs", help="Tracker folder inside --output_dir.")
    add("--report_to", default="tensorboard", help='Any tracker of accelerate that is installed, "all" or "none".')
    return group


def add_saving_arguments(parser):
    """Adds the group "saving and resuming"; returns it."""
    group = parser.add_argument_group("saving and resuming")
    add = group.add_argument
    add("--checkpointing_steps", type=int, default=500, help="Updates between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Keep only this many checkpoints.")
    add("--resume_from_checkpoint", help='A checkpoint-N folder, or "latest" (which starts afresh if there is none).')
    return group


def add_hub_arguments(parser):
    """Adds the group "hub"; returns it."""
    group = parser.add_argument_group("hub")
    add = group.add_argument
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
    return group


# =====================================================================================================
# Checks
# =====================================================================================================


def check_ranges(parser, args, at_least_one=(), at_least_zero=(), positive=()):
    """Ends with exit code 2 where a number (that is given) is below 1, below 0, or not above 0 and finite."""
    for name in (*at_least_one, *at_least_zero, *positive):
        value = getattr(args, name)
        floor = 1 if name in at_least_one else 0
        if value is not None and (value < floor or name in positive and not 0 < value < math.inf):
            parser.error(f"--{name} {value} must be {'above 0' if name in positive else f'at least {floor}'}.")


def check_shared_arguments(parser, args):
    """Checks the flags of the groups above: ends with exit code 2 and one sentence where one cannot work."""
    check_ranges(
        parser,
        args,
        at_least_one=(
            "resolution train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps lr_num_cycles"
            " num_validation_images validation_steps num_inference_steps logging_steps checkpointing_steps"
            " checkpoints_total_limit"
        ).split(),
        at_least_zero="lr_warmup_steps adam_weight_decay seed".split(),
        positive="learning_rate adam_epsilon".split(),
    )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must lie in [0, 1).")
    if args.resolution is not None and args.resolution % 8:
        parser.error(
            f"--resolution {args.resolution} must be divisible by 8: try {round(args.resolution / 8) * 8 or 8}."
        )
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --train_data_dir, a folder of images, or --dataset_name, a dataset on the Hub.")
    check_tracker(parser, args)


def check_tracker(parser, args):
    """Ends with exit code 2 unless `--report_to` is a tracker that is installed."""
    known = [tracker.value for tracker in LoggerType if tracker.value != "all"]
    available = [str(tracker) for tracker in get_available_trackers()]
    if args.report_to not in known + ["all", "none"]:
        parser.error(f"--report_to {args.report_to!r} is not a tracker: choose from {', '.join(known)}, all or none.")
    if args.report_to in known and args.report_to not in available:
        parser.error(f"--report_to {args.report_to} is not installed: pip install {args.report_to} or choose another.")
