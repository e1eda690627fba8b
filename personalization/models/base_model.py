"""A base model: configs, tokenizer, scheduler and weights, found locally or on the Hub and read piece by piece.

A base is judged as a whole before anything slow: `open_base` reads its small files and lets empty models show that
they fit each other, `check_weights` compares the headers of all weight files with them.
"""

import contextlib
import fnmatch
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModelWithProjection, PreTrainedModel

from ..errors import InputError
from . import families, single_file, weight_files
from .embedding_files import OUT
from .lean_vae import spare_memory


class ModelSource(NamedTuple):
    """Where a base model comes from."""

    name: str  # a local folder or file, or an id on the Hub
    revision: str | None = None
    variant: str | None = None

    @property
    def label(self):
        """The beginning of an error message."""
        return f"--pretrained_model_name_or_path {self.name!r}"


@dataclass(frozen=True)
class Base:
    """The small files of a base model.

    Args:
        family: of `families.FAMILIES`.
        source: where it comes from.
        root: the local folder, or the Hub's snapshot of it; of a single file, the folder of its family's configs.
        tokenizers: one for each text encoder.
        scheduler: of the family's class, with the noise levels of training.
        denoiser_config, vae_config: of diffusers, defaults filled in.
        text_configs: of transformers, one for each text encoder.
        single: the `SingleFile` that it is, or None.
        of_output: whether a word of it stands in what the text encoder puts out, and not in prompts.
        checked_files: component -> its weight files, once they have been checked.
    """

    family: families.Family
    source: ModelSource
    root: Path
    tokenizers: tuple
    scheduler: object
    denoiser_config: dict
    vae_config: dict
    text_configs: tuple
    single: single_file.SingleFile | None = None
    of_output: bool = False
    checked_files: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokenizer(self):
        """Of the first text encoder."""
        return self.tokenizers[0]

    @property
    def text_config(self):
        """Of the first text encoder."""
        return self.text_configs[0]

    @property
    def word_widths(self):
        """Entries of a word, those that are learned, for each text encoder."""
        if self.of_output:
            return (self.family.output_width(self),)
        return tuple(config.hidden_size for config in self.text_configs)

    @property
    def word_width(self):
        """Entries of a word: those of all text encoders, side by side."""
        return sum(self.word_widths)

    @property
    def word_parts(self):
        """How a word is saved in parts: key -> entries, in the order in which they lie side by side; {} if whole.

        One of the output has two: what stands in prompts, which text encoders need, and what is learned.
        """
        parts = dict(zip(self.family.word_keys, (config.hidden_size for config in self.text_configs)))
        outputs = {f"{key}{OUT}": width for key, width in zip(parts, self.word_widths)}
        return parts | outputs if self.of_output else parts

    @property
    def vae_factor(self):
        """Pixels along the side of a latent entry."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def resolution(self):
        """Side of the pictures that the model was trained on; None where its config does not say."""
        if "sample_size" not in self.denoiser_config:  # transformers take any, their VAE has seen one
            return self.vae_config["sample_size"]
        sizes = self.denoiser_config["sample_size"]
        sizes = set(sizes) if isinstance(sizes, (list, tuple)) else {sizes}
        size = sizes.pop() if len(sizes) == 1 else None
        return size * self.vae_factor if type(size) is int and size > 0 else None

    @property
    def resolution_multiple(self):
        """What divides every possible side of a picture."""
        return math.lcm(8, self.vae_factor * self.family.latent_multiple(self.denoiser_config))

    @property
    def prompt_length(self):
        """Tokens of a prompt, padding included."""
        return self.tokenizer.model_max_length

    def tokenize(self, texts):
        """Prompt ids `[len(texts), length]`, of all tokenizers side by side."""
        return self.family.tokenize(self.tokenizers, texts)


# =====================================================================================================
# The small files
# =====================================================================================================


def small_files():
    """Patterns of the files that tell what a base is, and under which terms, without its weights."""
    patterns = ["README.md", "model_index.json", "scheduler/*.json"]
    for family in families.FAMILIES.values():
        patterns += [f"{name}/*" for name in family.tokenizers]
        patterns += [f"{name}/config.json" for name in family.components]
    return list(dict.fromkeys(patterns))


class Configs(dict):
    """The content of each component's config.json, read when it is first asked for."""

    def __init__(self, root, label, overrides=None):
        super().__init__()
        self.root, self.label, self.overrides = root, label, overrides or {}

    def __missing__(self, component):
        content = read_json(self.root, f"{component}/config.json", self.label)
        self[component] = content | self.overrides.get(component, {})
        return self[component]


def open_base(source, tokenizer_name=None, accepted=(families.SD1, families.SD2)):
    """Reads a base model's small files and makes sure that its parts fit each other.

    Args:
        source: `ModelSource`.
        tokenizer_name: folder or id of a tokenizer, if not the model's own.
        accepted: families that the caller can serve.

    Raises:
        InputError: it is no such model, a file of it is missing or damaged, or it is of a kind that cannot be trained.
    """
    label, single = source.label, None
    if single_file.is_single_file(source.name):
        single = open_single_file(source)
    root, overrides = (find_root(source), {}) if single is None else (single.root, single.overrides)
    index, configs = read_json(root, "model_index.json", label), Configs(root, label, overrides)
    family = families.recognise(index, configs, accepted, label)
    for name in family.components:
        check_class(configs[name], name, family, label)
    text_configs = tuple(read_text_config(root, name, configs[name], family, label) for name in family.text_encoders)
    scheduler = read_scheduler(root, family, label, overrides.get("scheduler", {}))
    tokenizers = read_tokenizers(family, root, label, tokenizer_name, single, text_configs)
    whole = (build_empty(family.classes[name], configs[name], name, label) for name in (family.denoiser, "vae"))
    parts = tuple(tokenizers), scheduler, *(dict(model.config) for model in whole), text_configs
    base = Base(family, source, root, *parts, single)
    labels = [f"{label}: {name}/" for name in family.tokenizers]
    if tokenizer_name:
        labels[0] = f"--tokenizer_name {tokenizer_name!r}"
    family.check(base)
    check_tokenizers(base, labels)
    compute_empty(base)
    return base


def of_output(base):
    """The same base for words that stand in the text encoder's output.

    Raises:
        InputError: its family has no such words.
    """
    if base.family.learns_output:
        return replace(base, of_output=True)
    able = families.names_of([family for family in families.FAMILIES.values() if family.learns_output])
    raise InputError(
        f"--learn output is for models whose text encoder is a language model ({able}), and {base.source.label} is of"
        f" the kind {base.family.label}: drop it."
    )


def find_root(source):
    """The folder of a base model; of one on the Hub the small files are downloaded.

    Raises:
        InputError: there is none.
    """
    label, root = source.label, Path(source.name)
    if source.name and os.path.isdir(root):
        if source.revision:
            raise InputError(
                f"--revision {source.revision!r} names a version on the Hub, but {label} is a local folder, which has"
                " only one: leave out --revision, or give the model's id on the Hub."
            )
        return root
    try:
        return Path(snapshot_download(source.name, revision=source.revision, allow_patterns=small_files()))
    except Exception as error:  # huggingface_hub raises its own errors, the HTTP library's and the system's
        raise InputError(
            f"{label} is not a model in diffusers format, neither a local folder nor on the Hub ({first_line(error)}):"
            " check the name and your connection."
        ) from None


def open_single_file(source):
    """The `SingleFile` that a base is.

    Raises:
        InputError: it cannot be one.
    """
    for flag, value in (("--revision", source.revision), ("--variant", source.variant)):
        if value:
            raise InputError(f"{flag} {value!r} is for models in folders and {source.label} is a file: drop the flag.")
    return single_file.open_file(source.name, source.label)


def first_line(error):
    """An error's message, cut to what a sentence can carry."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()[:300].rstrip(".:")


def read_json(root, name, label):
    """The object in a JSON file of the base.

    Raises:
        InputError: it is missing or holds no such thing.
    """
    path = root / name
    if not os.path.isfile(path):
        raise InputError(
            f"{label} is not a whole model in diffusers format, {name} is missing: check the name or get the model"
            " again."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content:
            return content
        reason = "it holds no object with entries"
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
    raise InputError(f"{label}: {name} cannot be read ({reason}): get it again.")


def check_class(content, component, family, label):
    """Raises an `InputError` unless a config is of the class that the family's component has, as far as it says."""
    kind = family.classes[component]
    if issubclass(kind, PreTrainedModel):
        prefix = kind.config_class.model_type.partition("_")[0]
        kinds = [str(content.get("model_type", prefix)), *map(str, content.get("architectures") or [])]
        found = None if all(each.lower().startswith(prefix) for each in kinds) else kinds[-1]
    else:
        found = content.get("_class_name", kind.__name__)
        found = None if found == kind.__name__ else found
    if found is not None:
        raise InputError(
            f"{label}: {component}/config.json is of a {found!r} and must be of a {kind.__name__}: choose a model that"
            f" is {family.label}."
        )


def read_text_config(root, component, content, family, label):
    """The config of a text encoder, of transformers.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return family.classes[component].config_class.from_pretrained(root / component)
    except Exception as error:  # transformers raises nearly anything on values of other types
        raise InputError(
            f"{label}: {component}/config.json cannot be read ({first_line(error)}): get it again."
        ) from None


def read_scheduler(root, family, label, overrides):
    """The scheduler with the noise levels of training; `overrides` are entries of its config.

    Raises:
        InputError: it is missing or damaged.
    """
    name = "scheduler/scheduler_config.json"
    content = read_json(root, name, label) | overrides
    try:
        check_counts(content)
        return family.open_scheduler(content)
    except Exception as error:  # whatever arithmetic raises on values of other types
        raise InputError(
            f"{label}: {name} describes no noise schedule ({first_line(error)}): get it again or choose another model."
        ) from None


def read_tokenizers(family, root, label, tokenizer_name, single, text_configs):
    """The tokenizers of a base, the first one by `--tokenizer_name` where that is given.

    Raises:
        InputError: one is missing, damaged or, for a single file, nowhere to be had.
    """
    given = None if tokenizer_name is None else find_tokenizer(tokenizer_name)
    if single is not None and given is None:
        return single_file.find_tokenizers(single, family, [config.vocab_size for config in text_configs], label)
    first = [] if given is None else [read_tokenizer(family, *given, "give another one")]
    if single is not None:  # which has none, and all of a model have the same vocabulary
        return single_file.same_tokenizers(family, given[0], [len(first[0])] * len(text_configs))
    return first + [
        read_tokenizer(family, root / name, f"{label}: {name}/", "get the model again")
        for name in family.tokenizers[len(first) :]
    ]


def find_tokenizer(name):
    """The folder of `--tokenizer_name`, downloaded where it is on the Hub, and the beginning of an error message."""
    label = f"--tokenizer_name {name!r}"
    if name and os.path.isdir(name):
        return Path(name), label
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt"])), label
    except Exception as error:  # see `find_root`
        raise InputError(
            f"{label} is neither a local folder nor a model on the Hub ({first_line(error)}): check the name and your"
            " connection."
        ) from None


def read_tokenizer(family, folder, label, fix):
    """The tokenizer of a folder.

    Raises:
        InputError: files are missing or damaged.
    """
    try:
        return family.read_tokenizer(folder)
    except Exception as error:  # tokenizers raises plain exceptions
        kind = family.tokenizer_kind
        raise InputError(f"{label} is no tokenizer of {kind} ({first_line(error)}): {fix}.") from None


# =====================================================================================================
# Do the parts fit each other, and can this script serve them?
# =====================================================================================================


def build_empty(kind, config, component, label):
    """The component, a `kind`, that a config describes, frozen, on the meta device.

    Raises:
        InputError: it describes none.
    """
    try:
        of_text = issubclass(kind, PreTrainedModel)
        check_counts(config.to_dict() if of_text else config)
        with init_empty_weights():
            model = kind(config) if of_text else kind.from_config(config)
    except Exception as error:  # diffusers and transformers raise nearly anything on values that make no sense
        raise InputError(
            f"{label}: {component}/config.json describes no model that can be built ({first_line(error)}): get it"
            " again."
        ) from None
    return model.requires_grad_(False).eval()


def check_counts(config):
    """Raises a `ValueError` where a config asks for so many layers or positions that building them would not end."""
    for name, value in config.items():
        many = name in ("max_position_embeddings", "num_train_timesteps")
        limit = 10**6 if many else 1000 if "layers" in name else None
        for count in value if isinstance(value, (list, tuple)) else [value]:
            if limit and isinstance(count, (int, float)) and count > limit:
                raise ValueError(f"{name} {value!r} is more than {limit}")


def empty_model(base, component):
    """The component as its config describes it, frozen, on the meta device."""
    kind = base.family.classes[component]
    return build_empty(kind, config_of(base, component), component, base.source.label)


def config_of(base, component):
    """The config of a component, of diffusers or transformers."""
    configs = {base.family.denoiser: base.denoiser_config, "vae": base.vae_config}
    return (configs | dict(zip(base.family.text_encoders, base.text_configs)))[component]


def empty_text_encoder(base):
    """The `TextEncoders`, frozen, on the meta device."""
    family = base.family
    parts = [family.skip_unread(name, empty_model(base, name)) for name in family.text_encoders]
    return families.TextEncoders(family, parts)


def check_tokenizers(base, labels):
    """Makes sure that tokenizers fit each other and their text encoders.

    Args:
        base: `Base`.
        labels: the beginnings of messages about the tokenizers.

    Raises:
        InputError: they do not.
    """
    vocabulary = base.tokenizer.get_vocab()
    for tokenizer, text, of_tokenizer in zip(base.tokenizers, base.text_configs, labels):
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
        if size > text.vocab_size:
            raise InputError(
                f"{of_tokenizer} has {size} tokens and the text encoder of {base.source.name!r} has rows for"
                f" {text.vocab_size}: it belongs to another model, give that model's own."
            )
        if tokenizer.model_max_length > text.max_position_embeddings:
            raise InputError(
                f"{of_tokenizer} makes prompts of {tokenizer.model_max_length} tokens and the text encoder of"
                f" {base.source.name!r} takes {text.max_position_embeddings}: it belongs to another model, give that"
                " model's own."
            )
        if tokenizer.get_vocab() != vocabulary or tokenizer.model_max_length != base.prompt_length:
            raise InputError(
                f"{of_tokenizer} has another vocabulary than the first tokenizer of {base.source.name!r}, or prompts"
                " of another length: one of them belongs to another model, get the model again."
            )


def compute_empty(base):
    """Lets the empty models of a base compute once, on the meta device.

    Raises:
        InputError: they cannot, or the prediction is not shaped like a latent.
    """
    family, side = base.family, base.resolution_multiple
    denoiser, vae = (empty_model(base, name).to("meta") for name in (family.denoiser, "vae"))  # their buffers, too
    text_encoder, what = empty_text_encoder(base), family.denoiser_label
    try:
        with torch.no_grad():
            pixels = torch.empty(1, 3, side, side, device="meta")
            moments = vae.encode(pixels).latent_dist.parameters
            ids = torch.zeros(1, len(base.tokenizers) * base.prompt_length, dtype=torch.long, device="meta")
            latents, text = moments.chunk(2, dim=1)[0], text_encoder(ids)
            example = family.example(base, 1, side, "meta")
            prediction = family.predict(denoiser, latents, example.timesteps, text, example.sizes)
            decoded = vae.decode(latents, return_dict=False)[0]
        fits = prediction.shape == latents.shape and decoded.shape == pixels.shape
        reason = f"a latent is {list(latents.shape)}, the {what}'s prediction {list(prediction.shape)}"
        fits = fits and latents.shape[-1] * base.vae_factor == side
    except Exception as error:  # whatever layers raise on shapes that do not fit, or inputs that they miss
        fits, reason = False, first_line(error)
    if not fits:
        raise InputError(
            f"{base.source.label} has a {what}, a text encoder and a VAE that cannot work together as in"
            f" {family.label} ({reason}): choose another model, or get its configs again."
        )


def check_resolution(base, resolution):
    """Raises an `InputError` unless the model can draw pictures of `resolution`, its own where that is None."""
    multiple, own = base.resolution_multiple, base.resolution
    size = base.denoiser_config.get("sample_size")
    if resolution is None and own is None:
        raise InputError(
            f"{base.source.label} does not say how large its pictures are (sample_size in"
            f" {base.family.denoiser}/config.json is {size!r}): give --resolution, a"
            f" multiple of {multiple}."
        )
    flag = (
        "--resolution" if resolution is not None else f"{base.source.label} draws pictures of a side that cannot be,"
    )
    resolution = own if resolution is None else resolution
    if resolution % multiple:
        raise InputError(
            f"{flag} {resolution} must be divisible by {multiple} for this model: try"
            f" {'' if flag == '--resolution' else '--resolution '}{max(1, round(resolution / multiple)) * multiple}."
        )
    return resolution


def check_low_resolution(low, high, multiple):
    """The side of BP-low's pictures, half of `--resolution` where none is given.

    Raises:
        InputError: the model cannot draw it, or it is above `--resolution`.
    """
    given = low is not None
    low = low if given else high // 2
    said = f"--low_resolution {low}" if given else f"half of --resolution {high}, {low},"
    if low > high:
        raise InputError(f"{said} is above --resolution {high}: give at most that.")
    if low % multiple or not low:
        near = max(1, min(round(low / multiple), high // multiple)) * multiple
        raise InputError(f"{said} must be divisible by {multiple} for this model: try --low_resolution {near}.")
    return low


# =====================================================================================================
# Weights
# =====================================================================================================


class StoredModel(NamedTuple):
    """What a run's config says of a model."""

    bytes: int  # of its weights, as kept
    quantized_share: float  # of its parameters


def check_weights(base):
    """Makes sure that the weights of all components are there, whole, and those that the configs describe.

    Only headers are read; of a model on the Hub the weights are downloaded first, which training needs anyway.

    Raises:
        InputError: they are not.
    """
    for component in base.family.components:
        find_weight_files(base, component)


def weights_digest(base):
    """Tells models of one name apart: a hash of 16 pieces of every weight file, 16 hexadecimal digits.

    All of them would take seconds to read; weights that were trained on differ nearly everywhere.
    """
    digest = hashlib.sha256()
    for path in (path for component in base.family.components for path in find_weight_files(base, component)):
        size = path.stat().st_size
        with open(path, "rb") as file:
            for i in range(16):
                file.seek(size * i // 16)  # the first piece holds the shapes
                digest.update(file.read(2**12))
    return digest.hexdigest()[:16]


def find_weight_files(base, component):
    """The files (one, or its shards) of a component, checked against its config.

    Raises:
        InputError: they are missing (in that variant), damaged, or hold other tensors than the config describes.
    """
    if component in base.checked_files:
        return base.checked_files[component]
    label = base.source.label
    headers = read_headers(base, component)
    known = {name: tuple(tensor.shape) for name, tensor in empty_model(base, component).state_dict().items()}
    missing = set(known)
    for path, header in headers.items():
        where = path.name if base.single else f"{component}/{path.name}"
        for name, stored in header.items():
            name = current_name(name, base.family.classes[component])
            if name not in known:
                if name.startswith(NO_WEIGHTS) or name.rpartition(".")[2] == "position_ids":
                    continue
                reason = f"holds {name!r}, which the config has no place for"
            elif name not in missing:
                reason = f"holds {name!r} a second time"
            elif stored.shape != known[name]:
                reason = f"holds {name!r} of shape {list(stored.shape)}, the config wants {list(known[name])}"
            elif not stored.dtype.startswith(("F", "BF")) and not name.endswith("num_batches_tracked"):
                reason = f"holds {name!r} as {stored.dtype}, which are no floating-point weights"
            else:
                missing.discard(name)
                continue
            raise InputError(
                f"{label}: {where} does not fit {component}/config.json, it {reason}: one of them belongs to another"
                " model or is damaged, get both again."
            )
    files = list(headers)
    if missing:
        raise InputError(
            f"{label}: the {component} weights ({files[0].name}) lack {min(missing)!r}, which {component}/config.json"
            " asks for: one of them belongs to another model or is damaged, get both again."
        )
    base.checked_files[component] = files
    return files


def read_headers(base, component):
    """The files of a component -> what each holds, name -> `StoredTensor`; of a single file the component's part."""
    source, label = base.source, base.source.label
    if base.single is not None:
        return {base.single.path: {name: later.stored for name, later in part_of_file(base, component).items()}}
    of_text = issubclass(base.family.classes[component], PreTrainedModel)
    stem = "model" if of_text else "diffusion_pytorch_model"
    folder, files = base.root / component, None
    if base.root != Path(source.name):
        with contextlib.suppress(InputError):  # whole files of this commit are not asked for again
            files = weight_files.find_files(folder, stem, source.variant, label)
        if files is None:
            download_weights(base, component, stem)
    files = files or weight_files.find_files(folder, stem, source.variant, label)
    return {path: weight_files.read_header(path, label) for path in files}


def part_of_file(base, component):
    """`single_file.component_tensors` of a base that is one."""
    how = component, config_of(base, component), base.source.label
    return single_file.component_tensors(base.single, base.family, *how)


# Tensors that files may hold beside the weights: of the CLIP or language model that a text encoder was cut out of.
NO_WEIGHTS = ("text_projection.", "visual_projection.", "vision_model.", "logit_scale", "lm_head.")


def download_weights(base, component, stem):
    """Downloads the weight files of a component of a base on the Hub, of the commit whose small files were read.

    Raises:
        InputError: the Hub has none (of that variant), or cannot be reached.
    """
    source, commit = base.source, base.root.name
    patterns = [pattern for group in weight_files.file_patterns(stem, source.variant) for pattern in group]
    try:
        snapshot_download(source.name, revision=commit, allow_patterns=[f"{component}/{name}" for name in patterns])
        there = weight_files.names_in(base.root / component)
        if any(fnmatch.filter(there, pattern) for pattern in patterns):
            return
        names = HfApi().list_repo_files(source.name, revision=commit)
    except Exception as error:  # see `find_root`
        raise InputError(
            f"{source.label}: the {component} weights cannot be downloaded ({first_line(error)}): check your"
            " connection and the space on disk, and start again."
        ) from None
    names = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
    raise InputError(
        f"{source.label} has no {weight_files.printable(patterns[0])} in {component}/:"
        f" {weight_files.advice(names, stem, source.variant)}"
    )


def current_name(name, kind=None):
    """A tensor's name in a file as today's models, here one of a class, spell it."""
    if kind is not CLIPTextModelWithProjection:
        name = name.removeprefix("text_model.")  # a prefix that transformers dropped for the others in its version 5
    if getattr(kind, "base_model_prefix", None) == "model":  # of a language model saved with its head
        name = name.removeprefix("model.")
    old = re.fullmatch(r"(.*\bmid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    if old:  # VAEs of 2022
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[old[2]]
        name = f"{old[1]}.{new}.{old[3]}"
    return name


def stored_tensors(files, kind=None):
    """(name, tensor) of the safetensors files of a model of a class, one memory-mapped tensor at a time.

    Raises:
        InputError: a file cannot be read, or holds what are no weights (`weight_files.check_values`).
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                names = list(tensors.keys())
            for name in names:
                with safe_open(path, framework="pt") as tensors:
                    weight_files.check_values(path, name, tensors.get_tensor(name))
                with safe_open(path, framework="pt") as tensors:  # opened anew, so that pages read before leave
                    value = tensors.get_tensor(name)
                yield current_name(name, kind), value
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}): get the model again.") from None


def component_tensors(base, component):
    """(name, tensor) of a component's weights, one tensor at a time.

    Raises:
        InputError: they are missing, damaged, or others than the config describes.
    """
    files, kind = find_weight_files(base, component), base.family.classes[component]
    if base.single is None:
        yield from stored_tensors(files, kind)
    else:
        for name, later in part_of_file(base, component).items():
            weight_files.check_values(base.single.path, name, later.read())
            yield current_name(name, kind), later.read()


def load_token_table(base, component="text_encoder"):
    """The token table `[vocabulary, d]` of a text encoder, memory-mapped, as stored."""
    empty = empty_model(base, component)
    table = next(name for name, module in empty.named_modules() if module is empty.get_input_embeddings())
    return next(value for name, value in component_tensors(base, component) if name == f"{table}.weight")


def load_token_tables(base):
    """The token tables of all text encoders."""
    return [load_token_table(base, component) for component in base.family.text_encoders]


def load_text_encoder(base, dtype=torch.float32):
    """The frozen, unquantized `TextEncoders`, on the CPU."""
    parts = [load_component(base, name, dtype) for name in base.family.text_encoders]
    return families.TextEncoders(base.family, parts)


def load_vae(base, dtype=torch.float32):
    """The frozen VAE, on the CPU."""
    return spare_memory(load_component(base, "vae", dtype))


def load_vae_encoder(base, dtype=torch.float32):
    """The frozen VAE, on the CPU, without its decoder, which is 60 % of it and None."""
    return spare_memory(load_component(base, "vae", dtype, without="decoder"))


def load_component(base, component, dtype=torch.float32, without=None):
    """A frozen, unquantized component, on the CPU, without the part of that name."""
    model = empty_model(base, component)
    if without is not None:
        setattr(model, without, None)
    known = model.state_dict()
    for name, value in component_tensors(base, component):
        if name in known:
            set_module_tensor_to_device(model, name, "cpu", value=value.to(dtype), dtype=dtype, clear_cache=False)
    return model.requires_grad_(False)
