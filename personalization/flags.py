"""The command line that trainers share: a parser that answers in one sentence, groups of flags, checks of ranges."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType
from huggingface_hub.constants import HF_HOME

from .models.compute import DTYPES


DEFAULT_CACHE = os.path.join(HF_HOME, "zoodip")  # of quantized weights


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


# Piecewise constant would need rules of its own on the command line.
LR_SCHEDULERS = [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT]


LONGEST_SENTENCE = 400  # characters


class OneSentenceParser(argparse.ArgumentParser):
    """Reports an error as one sentence, without the usage of sixty flags above it."""

    def error(self, message):
        words = " ".join(message.split())  # what a user typed may have any length, and lines
        message = words if len(words) <= LONGEST_SENTENCE else f"{words[:LONGEST_SENTENCE]} ..."
        self.exit(2, f"{self.prog}: error: {message}\n")


def new_parser(script, description, usage):
    """An empty parser for a script (its path), whatever started it."""
    return OneSentenceParser(
        prog=Path(script).name, description=description, usage=usage, formatter_class=HelpFormatter, allow_abbrev=False
    )


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


def given_flags(parser, words):
    """Names of the flags that a command line (list of strings) gives, so that their defaults do not count."""
    said = {word.split("=")[0] for word in words}
    return {action.dest for action in parser._actions if said & set(action.option_strings)}


# =====================================================================================================
# Groups of flags
# =====================================================================================================


def add_model_arguments(parser, predicts_memory=True):
    """Adds the group "model", which base; returns it, for a trainer's own flags.

    Args:
        predicts_memory: whether the trainer has `--estimate_memory`.
    """
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
    if predicts_memory:
        add(
            "--estimate_memory",
            action="store_true",
            help="Print the memory that this run would need, by component, and exit; no weight is loaded.",
        )
    add("--allow_tf32", action="store_true", help="Allow TF32 in float32 products on CUDA.")
    return group


def add_data_arguments(parser, folder="train_data_dir", concept="{} or the placeholder marks the concept"):
    """Adds the group "data", pictures and captions; returns it.

    Args:
        folder: name of the flag of the folder.
        concept: its help says how a caption speaks of the concept.
    """
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        f"--{folder}",
        help="Folder of images, with captions in metadata.jsonl or metadata.csv (fields file_name, text) if you have"
        f" them; {concept} in a caption.",
    )
    add("--dataset_name", help="Instead of a folder: a dataset id on the Hub (its train split).")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--image_column", default="image", help="Column of the dataset that holds the images.")
    add("--caption_column", default="text", help="Column of the dataset that holds captions, if any.")
    add("--resolution", type=int, help="Side of the training images. Default: the model's own.")
    add(
        "--center_crop",
        action="store_true",
        help="Crop the centre square, as for SDXL always; otherwise images are squeezed to a square.",
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
    add("--max_train_steps", type=int, help="Updates in all. Default: the method's own.")
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


def adapt(parser, name, default, words):
    """Gives a shared flag the default that is right for a trainer, and the help that goes with it."""
    (action,) = [action for action in parser._actions if action.dest == name]
    action.default, action.help = default, words


# =====================================================================================================
# Checks
# =====================================================================================================


class Range(NamedTuple):
    """The values that a numeric flag may have: finite ones, both ends included where nothing else is said."""

    least: float
    most: float
    above: bool = False  # than `least`, which is not in the range itself
    below: bool = False  # than `most`, likewise

    def __contains__(self, value):  # comparisons with nan are all false
        return (self.least < value if self.above else self.least <= value) and (
            value < self.most if self.below else value <= self.most
        )

    def __str__(self):
        kind, form = ("a finite number ", "g") if isinstance(self.most, float) else ("", "d")
        least = f"{'above' if self.above else 'of at least' if kind else 'at least'} {self.least:{form}}"
        return f"{kind}{least} and {'below' if self.below else 'at most'} {self.most:{form}}"


COUNT, EVERY = Range(1, 10**9), Range(1, 2**63 - 1)  # so many updates; at every so many, however seldom

# What every numeric flag of every trainer may be: whole numbers end where tensors, steps or seeds would overflow (a
# model may end them sooner), real ones where the float32 arithmetic of an update would no longer move θ, or overflow.
RANGES = {
    "resolution": Range(8, 8192),
    "seed": Range(0, 2**63 - 1),  # 64 bits, as generators take them, with room for the seeds that are derived from it
    "train_batch_size": Range(1, 1024),
    "num_train_epochs": COUNT,
    "max_train_steps": COUNT,
    "gradient_accumulation_steps": Range(1, 10**6),
    "learning_rate": Range(1e-12, 1e30, above=True),
    "lr_warmup_steps": Range(0, 10**9),
    "lr_num_cycles": COUNT,
    "adam_beta1": Range(0.0, 1.0, below=True),
    "adam_beta2": Range(0.0, 1.0, below=True),
    "adam_weight_decay": Range(0.0, 1e6),
    "adam_epsilon": Range(1e-30, 1.0),
    "num_vectors": Range(1, 75),  # a prompt of CLIP has 77 tokens, two of which mark its ends
    "repeats": COUNT,
    "flip_probability": Range(0.0, 1.0),
    "num_perturbations": Range(1, 4096),
    "perturbation_scale": Range(0.0, 1.0, above=True),  # the precision of activations says what it is at least
    "max_candidates_per_forward": Range(1, 8192),
    "subspace_dimension": Range(1, 10**5),
    "subspace_steps": Range(1, 10**9),
    "subspace_words": Range(2, 10**6),
    "gn_ridge": Range(1e-9, 1e9),
    "gn_memory": Range(0.0, 1.0),
    "gn_averaging": Range(0.0, 1000.0),
    "gn_max_step": Range(0.0, 1e9, above=True),
    "sg_window": Range(0, 10**6),
    "sg_threshold": Range(0.0, 1.0, above=True, below=True),
    "puts_min_timestep": Range(0, 10**6),
    "puts_max_timestep": Range(1, 10**6),
    "num_validation_samples": Range(0, 4096),
    "early_stopping_patience": Range(0, 10**9),
    "num_validation_images": Range(1, 1024),
    "num_inference_steps": Range(1, 1000),
    "guidance_scale": Range(0.0, 1000.0),
    "validation_steps": EVERY,
    "logging_steps": EVERY,
    "save_steps": EVERY,
    "checkpointing_steps": EVERY,
    "checkpoints_total_limit": COUNT,
}


def numeric_flags(parser):
    """Names of the flags that take a number."""
    return [action.dest for action in parser._actions if action.type in (int, float)]


def check_ranges(parser, args, ranges=RANGES):
    """Ends with exit code 2 where a number (that is given) is outside its range (name -> `Range`)."""
    for name in numeric_flags(parser):
        value = getattr(args, name)
        if value is not None and value not in ranges[name]:
            parser.error(f"--{name} {value} must be {ranges[name]}.")


def check_shared_arguments(parser, args, folder="train_data_dir", ranges=RANGES):
    """Checks the flags of the groups above: ends with exit code 2 and one sentence where one cannot work.

    Args:
        folder: name of the flag of the folder of images.
        ranges: name -> `Range` of every numeric flag of the parser.
    """
    check_ranges(parser, args, ranges)
    if args.resolution is not None and args.resolution % 8:
        parser.error(
            f"--resolution {args.resolution} must be divisible by 8: try {round(args.resolution / 8) * 8 or 8}."
        )
    if (getattr(args, folder) is None) == (args.dataset_name is None):
        parser.error(f"give either --{folder}, a folder of images, or --dataset_name, a dataset on the Hub.")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        parser.error("--lr_warmup_steps is not for --lr_scheduler constant: choose constant_with_warmup, or drop it.")
    if args.lr_num_cycles != 1 and args.lr_scheduler != "cosine_with_restarts":
        parser.error("--lr_num_cycles is for --lr_scheduler cosine_with_restarts: choose that or drop it.")
    check_tracker(parser, args)


def check_tracker(parser, args):
    """Ends with exit code 2 unless `--report_to` is a tracker that is installed."""
    known = [tracker.value for tracker in LoggerType if tracker.value != "all"]
    available = [str(tracker) for tracker in get_available_trackers()]
    if args.report_to not in known + ["all", "none"]:
        parser.error(f"--report_to {args.report_to!r} is not a tracker: choose from {', '.join(known)}, all or none.")
    if args.report_to in known and args.report_to not in available:
        parser.error(f"--report_to {args.report_to} is not installed: pip install {args.report_to} or choose another.")
