"""Flags, each of which says everything about itself in one place, and the command line that the scripts share.

`add` declares a flag: what argparse wants to know and, beside it, what else follows from its value (`Flag`). Ranges,
what a checkpoint compares, what is published, what the web page offers and docs/usage.md are all read from these
declarations, so that there is no second list to forget. A word that is left out costs comfort and never safety: the
value is compared at resume, counts in the calibration's key and is not offered on the page.
"""

import argparse
import difflib
import functools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.constants import HF_HOME


DEFAULT_CACHE = os.path.join(HF_HOME, "zoodip")  # of quantized weights

# =====================================================================================================
# What a flag says
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


# Ranges of several flags. Whole numbers end where tensors, steps or seeds would overflow (a model may end them
# sooner), real ones where the float32 arithmetic of an update would no longer move what is learned, or overflow.
COUNT, EVERY = Range(1, 10**9), Range(1, 2**63 - 1)  # so many updates; at every so many, however seldom
SEED = Range(0, 2**63 - 1)  # 64 bits, as generators take them, with room for the seeds that are derived from it
SIDE = Range(8, 8192)  # of pictures
RATE = Range(1e-12, 1e30, above=True)  # of learning
SHARE = Range(0.0, 1.0)

# What the value of a flag can decide.
KINDS = ("run", "schedule", "calibration")
EVERYTHING = ("run", "calibration")  # unless a flag says less
RUN = ("run",)  # the course of training: a checkpoint resumes under the same value only
SCHEDULE = ("schedule",)  # the same, but only where the learning rate follows a schedule
NOTHING = ()  # harmless: where things lie, how much is said and saved, how fast the same is computed

OR_NAME = "or name"  # of a path: it may be a name on the Hub as well
WRITTEN = "written"  # of a path: the run writes there. All others are read, and `--output_dir` is kept apart from them


class Flag(NamedTuple):
    """What a flag says beside what argparse knows.

    Args:
        limits: `Range` of a number.
        decides: which of `KINDS`.
        optimizer: the value of `--optimizer` that it belongs to, or several of them; None for all.
        page: whether a visitor of the web page may set it.
        path: whether it names files, of which only the last part is published; `OR_NAME` if it may be a name instead,
            `WRITTEN` if they are the run's own.
        secret: whether it is never published: a token, or what says nothing of a result.
    """

    limits: Range | None = None
    decides: tuple = EVERYTHING
    optimizer: str | tuple | None = None
    page: bool = False
    path: bool | str = False
    secret: bool = False


def group(parser, title):
    """Makes a group of flags; returns `add` for it."""
    return functools.partial(add, parser.add_argument_group(title))


def add(group, name, *, help, path=None, **words):
    """Declares a flag.

    Args:
        group: of a parser, or a parser.
        name: with its dashes.
        help: a sentence with a subject.
        path: see `Flag`; by default whether the type is `Path`. "~" at its start is the user's home.
        words: fields of `Flag`, and whatever else argparse takes.
    """
    facts = {field: words.pop(field) for field in Flag._fields if field in words}
    kind = words.get("type", str)
    facts = Flag(path=kind is Path if path is None else path, **facts)
    check_facts(name, kind, facts, words)
    if facts.path:
        words["type"] = functools.partial(expanded, kind)
    group.add_argument(name, help=help, **words).facts = facts


def check_facts(name, kind, facts, words):
    """Raises a `TypeError` where a declaration cannot be meant."""
    if kind in (int, float) and facts.limits is None and "choices" not in words:
        raise TypeError(f"{name} is a number without limits")
    if not set(facts.decides) <= set(KINDS):
        raise TypeError(f"{name} decides {facts.decides}, which is none of {KINDS}")
    if facts.page and (facts.path or facts.secret):
        raise TypeError(f"{name} names a file or is secret: no visitor of the page may set it")


def expanded(kind, text):
    """A path of the command line, the user's home spelled out."""
    return kind(os.path.expanduser(text))


def none_or_path(text):
    """A path of the command line, or None for "none"."""
    return None if text == "none" else text


def override(parser, name, **changes):
    """Declares something about a shared flag anew, as it is right for one trainer: any word of `add`."""
    action = actions(parser)[name]
    for word, value in changes.items():
        if word in Flag._fields:
            action.facts = action.facts._replace(**{word: value})
        elif hasattr(action, word):
            setattr(action, word, value)
        else:
            raise TypeError(f"--{name}: {word} is no word of a flag")


def actions(parser):
    """The declared flags of a parser: name -> argparse's action, whose `facts` are the `Flag`."""
    return {action.dest: action for action in parser._actions if hasattr(action, "facts")}


# =====================================================================================================
# Values
# =====================================================================================================


class Settings(argparse.Namespace):
    """The values of a command line, which know their flags; they are completed, then frozen: a later write raises.

    Attributes:
        declared: name -> `Flag`.
        given: names of the flags on the command line, whose values are no defaults.
    """

    __slots__ = ("declared", "given", "frozen")  # so that `vars` has the values and nothing else

    def __init__(self, declared, given=frozenset()):
        super().__init__()
        self.declared, self.given, self.frozen = declared, given, False

    def __setattr__(self, name, value):
        if getattr(self, "frozen", False):
            raise AttributeError(f"the settings are complete: {name} cannot become {value!r} any more")
        super().__setattr__(name, value)

    def freeze(self):
        self.frozen = True

    def deciding(self, *kinds):
        """The values that decide any of these `KINDS`, by name; a setting that no flag declares decides everything."""
        decides = {name: self.declared.get(name, Flag()).decides for name in vars(self)}
        return {name: value for name, value in vars(self).items() if set(kinds) & set(decides[name])}

    def public(self):
        """The values that may be published: no secret, and of a path only its last part."""
        flags = {name: self.declared.get(name, Flag()) for name in vars(self)}
        return {name: published(flags[name], value) for name, value in vars(self).items() if not flags[name].secret}


def published(flag, value):
    """A value as it may be published. Text that is a path of this machine is one, whatever its flag says."""
    if isinstance(value, (list, tuple)):
        return [published(flag, each) for each in value]
    if not isinstance(value, (str, Path)) or not str(value):
        return value
    text = str(value)
    of_a_name = flag.path == OR_NAME and os.path.exists(text)
    by_itself = not flag.path and os.sep in text and (os.path.isabs(text) or os.path.exists(text))
    if flag.path in (True, WRITTEN) or isinstance(value, Path) or of_a_name or by_itself:
        return Path(text).resolve().name
    return text


# =====================================================================================================
# The command line
# =====================================================================================================


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        default = shown_default(action.default)
        return f"{action.help} (default: {default.replace('%', '%%')})" if default else action.help


def shown_default(default):
    """A default in words, the same on every machine; the empty string where there is nothing to say."""
    if default is None or default is False or default == [] or default is argparse.SUPPRESS:
        return ""
    return str(default).replace(HF_HOME, "$HF_HOME")


LONGEST_SENTENCE = 400  # characters


class OneSentenceParser(argparse.ArgumentParser):
    """Reports an error as one sentence, without the usage of sixty flags above it."""

    def error(self, message):
        words = " ".join(message.split())  # what a user typed may have any length, and lines
        message = words if len(words) <= LONGEST_SENTENCE else f"{words[:LONGEST_SENTENCE]} ..."
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        for word in words:  # before argparse misses a required flag that is only mistyped
            name = word.split("=")[0]
            if name.startswith("--") and name != "--" and " " not in name and name not in self._option_string_actions:
                self.error(f"there is no flag {shortened(name)}{did_you_mean(name, self._offered())}")
            if name in self._option_string_actions and word == f"{name}=--":  # of which argparse makes a list
                self.error(f"{word} gives no value: give one, or leave the flag out.")
        return super().parse_known_args(words, namespace)

    def _offered(self):
        return [name for name, action in self._option_string_actions.items() if action.help is not argparse.SUPPRESS]


def shortened(name, limit=60):
    return name if len(name) <= limit else f"{name[:limit]}…"


def did_you_mean(name, known):
    """The end of a sentence about a flag that there is not; both with their dashes."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f": did you mean {close[0]}?" if close else "."


def new_parser(script, description, usage):
    """An empty parser for a script (its path), whatever started it."""
    return OneSentenceParser(
        prog=Path(script).name, description=description, usage=usage, formatter_class=HelpFormatter, allow_abbrev=False
    )


def parse(parser, words, refused=None):
    """Parses the command line; `--push_only` makes every other flag optional.

    Args:
        parser: with all groups added.
        words: list of strings; None takes those of the process.
        refused: flag -> why it means nothing here, for flags that users of similar scripts expect.

    Returns:
        `Settings`.
    """
    words = sys.argv[1:] if words is None else list(words)
    said = {word.split("=")[0] for word in words}
    for flag, reason in (refused or {}).items():
        parser.add_argument(flag, nargs="?", const=True, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if flag in said:
            parser.error(f"{flag} means nothing here: {reason}")
    if "--push_only" in words:  # the run is finished, and its config knows how it was made
        for action in parser._actions:
            action.required = False
    found = actions(parser)
    given = frozenset(name for name, action in found.items() if said & set(action.option_strings))
    args = parser.parse_args(words, Settings({name: action.facts for name, action in found.items()}, given))
    check_text(parser, args)
    return args


def check_text(parser, args):
    """Ends with exit code 2 where a value is none: `--name=--`, or text with half of a character in it."""
    for name in args.given:
        value = getattr(args, name)
        if value == []:  # what argparse makes of it
            parser.error(f"--{name} -- gives no value: give one.")
        try:
            " ".join(map(str, value if isinstance(value, list) else [value])).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            parser.error(
                f"--{name} has {half} in it, which is half of a character (text that is not UTF-8): write it again."
            )


def apply_recipe(args, recipe):
    """Puts a recipe's defaults (name -> value) in the place of the flags' own; what was given stays."""
    if unknown := recipe.keys() - args.declared.keys():
        raise KeyError(f"a recipe names what is no flag: {', '.join(sorted(unknown))}")
    vars(args).update({name: value for name, value in recipe.items() if name not in args.given})


# =====================================================================================================
# Descriptions: what the web page, --help and docs/usage.md know without importing a script
# =====================================================================================================

DESCRIPTIONS = Path(__file__).with_name("flags.json")  # written by `make docs`


def describe(parser):
    """All that a parser says, JSON-ready."""
    groups = [
        {"title": group.title, "flags": [describe_flag(a) for a in group._group_actions if hasattr(a, "facts")]}
        for group in parser._action_groups
    ]
    words = {"description": parser.description, "usage": parser.usage}
    return words | {"groups": [group for group in groups if group["flags"]]}


def describe_flag(action):
    """A flag, JSON-ready."""
    kinds = {int: "whole number", float: "number"}
    kind = "switch" if action.nargs == 0 else "path" if action.facts.path else kinds.get(action.type, "text")
    words = {"name": action.dest, "kind": kind, "default": action.default, "required": action.required}
    words |= {name: getattr(action, name) for name in ("choices", "nargs", "metavar", "help")}
    if isinstance(action.default, str):
        words["default"] = shown_default(action.default)
    return words | action.facts._asdict()


@functools.cache
def descriptions():
    """Script -> what `describe` returned when `make docs` last ran."""
    return json.loads(DESCRIPTIONS.read_text(encoding="utf-8"))


def described_flags(script):
    """Name -> what `describe_flag` returned, of a script."""
    return {flag["name"]: flag for group in descriptions()[script]["groups"] for flag in group["flags"]}


def described_parser(script):
    """A parser that says of itself what that of a script does; it is not for parsing."""
    words = descriptions()[script]
    parser = new_parser(script, words["description"], words["usage"])
    for group in words["groups"]:
        add_to = parser if group["title"] == "options" else parser.add_argument_group(group["title"])
        for flag in group["flags"]:
            options = {name: flag[name] for name in ("default", "required", "help")}
            if flag["kind"] == "switch":
                options["action"] = "store_true"
            else:
                options |= {name: flag[name] for name in ("choices", "nargs", "metavar")}
            add_to.add_argument(f"--{flag['name']}", **options)
    return parser


# =====================================================================================================
# Groups of flags
# =====================================================================================================


def add_model_arguments(parser, models="Stable Diffusion 1.x or 2.x", predicts_memory=True):
    """Adds the group "model", which base; returns `add` for a trainer's own flags in it.

    Args:
        models: the kinds of base models that the trainer takes.
        predicts_memory: whether the trainer has `--estimate_memory`.
    """
    from .models.compute import DTYPES  # and with it torch: here, so that --help and the page do without

    add = group(parser, "model")
    add(
        "--pretrained_model_name_or_path",
        required=True,
        path=OR_NAME,
        decides=RUN,
        help=f"{models}: a local folder in diffusers format, a single file (.safetensors, .ckpt), or a model id on the"
        " Hub.",
    )
    # The calibration's key has the weights and the prompts' ids themselves.
    add("--revision", decides=RUN, page=True, help="Branch, tag or commit of the model on the Hub.")
    add("--variant", decides=RUN, page=True, help='Variant of the weight files, such as "fp16".')
    add("--tokenizer_name", path=OR_NAME, decides=RUN, help="Tokenizer folder or id, if not the model's own.")
    add(
        "--mixed_precision",
        choices=list(DTYPES),
        decides=RUN,
        page=True,
        help="Precision of activations; the loss is always float32. Default: fp16 on CUDA, no (float32) elsewhere.",
    )
    add(
        "--quantized_cache_dir",
        type=none_or_path,
        default=DEFAULT_CACHE,
        path=WRITTEN,
        decides=NOTHING,
        help="Folder of INT8 weights, quantized once and memory-mapped by every later run (0.9 GB for SD 1.5);"
        ' "none" keeps none.',
    )
    if predicts_memory:
        add(
            "--estimate_memory",
            action="store_true",
            decides=NOTHING,
            help="Print the memory that this run would need, by component, and exit; no weight is loaded.",
        )
    tf32 = "Allow TF32 in float32 products on CUDA."
    add("--allow_tf32", action="store_true", decides=NOTHING, page=True, help=tf32)
    return add


def add_data_arguments(parser, folder="train_data_dir", concept="{} or the placeholder marks the concept"):
    """Adds the group "data", pictures and captions; returns `add` for it.

    Args:
        folder: name of the flag of the folder.
        concept: its help says how a caption speaks of the concept.
    """
    add = group(parser, "data")
    # The pictures themselves are compared at resume, and not where they are from.
    add(
        f"--{folder}",
        path=True,
        decides=NOTHING,
        help="Folder of images, with captions in metadata.jsonl or metadata.csv (fields file_name, text), or in 01.txt"
        f" or 01.caption beside 01.jpg, if you have them; {concept} in a caption.",
    )
    add(
        "--dataset_name",
        path=OR_NAME,
        decides=NOTHING,
        help="Dataset id on the Hub, instead of a folder (its train split is used).",
    )
    add("--dataset_config_name", decides=NOTHING, help="Configuration of the dataset.")
    add("--image_column", default="image", decides=NOTHING, help="Column of the dataset that holds the images.")
    add("--caption_column", default="text", decides=NOTHING, help="Column of the dataset that holds captions, if any.")
    add(
        "--caption_token",
        decides=NOTHING,  # beside the captions, which are compared as they become
        page=True,
        help='Words that captions without {} have for the concept, which {} takes the place of: "dog".',
    )
    side = "Side of the training images in pixels. Default: the model's own."
    add("--resolution", type=int, limits=SIDE, decides=RUN, page=True, help=side)
    add(
        "--center_crop",
        action="store_true",
        decides=RUN,
        page=True,
        help="Crop the centre square, as for SDXL always; otherwise images are squeezed to a square.",
    )
    add(
        "--use_aspect_ratio_buckets",
        action="store_true",
        default=None,  # as checkpoints of before have it
        decides=RUN,
        page=True,
        help="Keep the shape of pictures: each is trained at the size, of about as many pixels as the square, whose"
        " shape is the nearest, and cropped the little that is left.",
    )
    add(
        "--masked_loss",
        action="store_true",
        default=None,
        decides=RUN,
        page=True,
        help="Count the loss where the subject is: by a mask 01-masklabel.png beside 01.jpg (white is the subject), or"
        " else by the picture's alpha channel.",
    )
    add(
        "--mask_dir",
        path=True,
        decides=NOTHING,  # beside the masks in it
        help="Folder of masks with the names of the pictures, 01.png for 01.jpg, for --masked_loss.",
    )
    return add


def add_training_arguments(parser, optimizer=None):
    """Adds the group "training"; returns `add` for it.

    Args:
        optimizer: those that learning rate, its schedule and Adam's settings belong to, where there are others.
    """
    from diffusers.optimization import SchedulerType

    # Piecewise constant would need rules of its own on the command line.
    schedulers = [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT]
    add = group(parser, "training")
    add(
        "--output_dir",
        default="text-inversion-model",
        path=WRITTEN,
        decides=NOTHING,
        help="Folder that everything is written to.",
    )
    add("--seed", type=int, default=0, limits=SEED, page=True, help="Seed of data, noise and perturbations.")
    size = "Examples per step and process."
    add("--train_batch_size", type=int, default=1, limits=Range(1, 1024), page=True, help=size)
    add(
        "--num_train_epochs",
        type=int,
        limits=COUNT,
        decides=NOTHING,  # beside the number of updates that it comes to
        help="Length in epochs, if --max_train_steps is not given.",
    )
    add(
        "--max_train_steps",
        type=int,
        limits=COUNT,
        decides=SCHEDULE,
        page=True,
        help="Updates in all. Default: the method's own.",
    )
    add(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        limits=Range(1, 10**6),
        decides=RUN,
        page=True,
        help="Estimates averaged before one update.",
    )
    add_adam_arguments(functools.partial(add, optimizer=optimizer), schedulers)
    return add


def add_adam_arguments(add, schedulers):
    """Adds the learning rate, its schedule and the settings of Adam."""
    add(
        "--learning_rate", type=float, default=5e-3, limits=RATE, decides=RUN, page=True, help="Learning rate of Adam."
    )
    add(
        "--scale_lr",
        action="store_true",
        decides=RUN,
        page=True,
        help="Multiply the learning rate by processes x accumulation steps x batch size.",
    )
    add(
        "--lr_scheduler",
        choices=schedulers,
        default="constant",
        decides=RUN,
        page=True,
        help="Learning-rate schedule.",
    )
    add(
        "--lr_warmup_steps",
        type=int,
        default=0,
        limits=Range(0, 10**9),
        decides=RUN,
        page=True,
        help="Warm-up updates of the schedule.",
    )
    add(
        "--lr_num_cycles",
        type=int,
        default=1,
        limits=COUNT,
        decides=RUN,
        page=True,
        help="Restarts of cosine_with_restarts.",
    )
    beta = Range(0.0, 1.0, below=True)
    add("--adam_beta1", type=float, default=0.9, limits=beta, decides=RUN, page=True, help="β1 of Adam.")
    add("--adam_beta2", type=float, default=0.999, limits=beta, decides=RUN, page=True, help="β2 of Adam.")
    add(
        "--adam_weight_decay",
        type=float,
        default=0.0,
        limits=Range(0.0, 1e6),
        decides=RUN,
        page=True,
        help="Weight decay of Adam.",
    )
    large = "ε of Adam; large, so that a tiny gradient is a tiny step."
    add("--adam_epsilon", type=float, default=1e-3, limits=Range(1e-30, 1.0), decides=RUN, page=True, help=large)


def add_validation_arguments(parser):
    """Adds the group "validation and logging"; returns `add` for it."""
    add = group(parser, "validation and logging")
    add("--validation_prompt", decides=NOTHING, help="Prompt of the validation images; {} or the placeholder in it.")
    images = "Images per validation."
    add("--num_validation_images", type=int, default=4, limits=Range(1, 1024), decides=NOTHING, page=True, help=images)
    add(
        "--validation_steps",
        type=int,
        default=500,
        limits=EVERY,
        decides=NOTHING,
        page=True,
        help="Updates between validations.",
    )
    steps = "Denoising steps of validation images."
    add("--num_inference_steps", type=int, default=25, limits=Range(1, 1000), decides=NOTHING, page=True, help=steps)
    add(
        "--guidance_scale",
        type=float,
        default=7.5,
        limits=Range(0.0, 1000.0),
        decides=NOTHING,
        page=True,
        help="Guidance of validation images.",
    )
    add(
        "--logging_steps",
        type=int,
        default=10,
        limits=EVERY,
        decides=NOTHING,
        page=True,
        help="Updates between read-outs of the loss.",
    )
    add("--logging_dir", default="logs", path=WRITTEN, decides=NOTHING, help="Folder of trackers inside --output_dir.")
    add(
        "--report_to",
        default="tensorboard",
        decides=NOTHING,
        help='Tracker that is told the figures: any of accelerate\'s that is installed, "all" or "none".',
    )
    return add


CHECKPOINTING_STEPS = 500  # at most, where nothing is said


def add_saving_arguments(parser):
    """Adds the group "saving and resuming"; returns `add` for it."""
    add = group(parser, "saving and resuming")
    add(
        "--checkpointing_steps",
        type=int,
        limits=EVERY,
        page=True,
        decides=NOTHING,
        help=f"Updates between checkpoints. Default: {CHECKPOINTING_STEPS}, or a quarter of a run that is shorter than"
        " four times that.",
    )
    kept = "Checkpoints of this run that are kept, the newest. Default: all."
    add("--checkpoints_total_limit", type=int, limits=COUNT, page=True, decides=NOTHING, help=kept)
    add(
        "--resume_from_checkpoint",
        path=WRITTEN,
        decides=NOTHING,
        help='Checkpoint to go on from: a checkpoint-N folder, or "latest" (which starts afresh if there is none).',
    )
    finish = "Train no further: write the result of the checkpoint that --resume_from_checkpoint finds."
    add("--finish_now", action="store_true", decides=NOTHING, help=finish)
    return add


def add_hub_arguments(parser):
    """Adds the group "hub"; returns `add` for it."""
    add = group(parser, "hub")
    add("--push_to_hub", action="store_true", decides=NOTHING, help="Upload the result, a few files, to the Hub.")
    add(
        "--push_only",
        action="store_true",
        secret=True,  # it tells nothing of a run
        decides=NOTHING,
        help="Upload the finished run in --output_dir, train nothing; only the flags of this group count beside it.",
    )
    add("--hub_model_id", decides=NOTHING, help="Repository to push to. Default: the name of --output_dir.")
    add("--hub_private_repo", action="store_true", decides=NOTHING, help="Make a new repository private.")
    add(
        "--hub_token",
        secret=True,
        decides=NOTHING,
        help="Token to push with. Better: hf auth login or HF_TOKEN, since shells and trackers record command lines.",
    )
    add(
        "--push_reference_images",
        action="store_true",
        decides=NOTHING,
        help="Publish the training images too (as trained on, without their metadata); otherwise they stay private.",
    )
    return add


# =====================================================================================================
# Checks
# =====================================================================================================


def check_ranges(parser, args):
    """Ends with exit code 2 where a number (that is given) is outside its range."""
    for name, flag in args.declared.items():
        value = getattr(args, name)
        if flag.limits is not None and value is not None and value not in flag.limits:
            parser.error(f"--{name} {value} must be {flag.limits}.")


def owners_of(optimizer):
    """The optimizers that a flag belongs to, as a tuple; none for all."""
    return (optimizer,) if isinstance(optimizer, str) else tuple(optimizer or ())


def check_optimizer(parser, args):
    """Ends with exit code 2 where a flag was given that `--optimizer` has no use for."""
    for name, flag in args.declared.items():
        owners = owners_of(flag.optimizer)
        if name in args.given and owners and args.optimizer not in owners:
            parser.error(f"--{name} belongs to --optimizer {' or '.join(owners)}, this is {args.optimizer}: drop one.")


def check_shared_arguments(parser, args, folder="train_data_dir"):
    """Checks the flags of the groups above: ends with exit code 2 and one sentence where one cannot work.

    Args:
        folder: name of the flag of the folder of images.
    """
    check_ranges(parser, args)
    if args.resolution is not None and args.resolution % 8:
        parser.error(
            f"--resolution {args.resolution} must be divisible by 8: try {round(args.resolution / 8) * 8 or 8}."
        )
    if (getattr(args, folder) is None) == (args.dataset_name is None):
        parser.error(f"give either --{folder}, a folder of images, or --dataset_name, a dataset on the Hub.")
    if args.mask_dir is not None and not args.masked_loss:
        parser.error("--mask_dir is for --masked_loss: add that or drop it.")
    if args.masked_loss and args.dataset_name is not None and args.mask_dir is not None:
        parser.error("--mask_dir goes by the names of pictures in a folder, and a dataset has none: drop one of them.")
    if args.caption_token is not None and not args.caption_token.strip():
        parser.error("--caption_token is empty: drop it or give the words that captions have for the concept.")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        parser.error("--lr_warmup_steps is not for --lr_scheduler constant: choose constant_with_warmup, or drop it.")
    if args.lr_num_cycles != 1 and args.lr_scheduler != "cosine_with_restarts":
        parser.error("--lr_num_cycles is for --lr_scheduler cosine_with_restarts: choose that or drop it.")
    check_tracker(parser, args)


def check_tracker(parser, args):
    """Ends with exit code 2 unless `--report_to` is a tracker that is installed."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [tracker.value for tracker in LoggerType if tracker.value != "all"]
    available = [str(tracker) for tracker in get_available_trackers()]
    if args.report_to not in known + ["all", "none"]:
        parser.error(f"--report_to {args.report_to!r} is not a tracker: choose from {', '.join(known)}, all or none.")
    if args.report_to in known and args.report_to not in available:
        parser.error(f"--report_to {args.report_to} is not installed: pip install {args.report_to} or choose another.")
