"""A base model: configs, tokenizer, scheduler and weights, found locally or on the Hub and read piece by piece.

A base is judged as a whole before anything slow: `open_base` reads its small files and lets empty models show that
they fit each other, `check_weights` compares the headers of all weight files with them.
"""

import fnmatch
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import InputError
from . import families, weight_files


CLASSES = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "vae": AutoencoderKL,
}
COMPONENTS = families.SD1.components
SMALL_FILES = ["model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*"]
SMALL_FILES += [f"{name}/config.json" for name in CLASSES]


class ModelSource(NamedTuple):
    """Where a base model comes from."""

    name: str  # a local folder or an id on the Hub
    revision: str | None = None
    variant: str | None = None

    @property
    def label(self):
        """The beginning of an error message."""
        return f"--pretrained_model_name_or_path {self.name!r}"


@dataclass(frozen=True)
class Base:
    """The small files of a Stable Diffusion model.

    Args:
        family: of `families.FAMILIES`.
        source: where it comes from.
        root: the local folder, or the Hub's snapshot of it.
        tokenizers: a `CLIPTokenizer` for each text encoder.
        scheduler: `DDPMScheduler`.
        unet_config, vae_config: of diffusers, defaults filled in.
        text_configs: a `CLIPTextConfig` for each text encoder.
        checked_files: component -> its weight files, once they have been checked.
    """

    family: families.StableDiffusion
    source: ModelSource
    root: Path
    tokenizers: tuple
    scheduler: DDPMScheduler
    unet_config: dict
    vae_config: dict
    text_configs: tuple
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
        """Entries of a word, for each text encoder."""
        return tuple(config.hidden_size for config in self.text_configs)

    @property
    def word_width(self):
        """Entries of a word: those of all text encoders, side by side."""
        return sum(self.word_widths)

    @property
    def vae_factor(self):
        """Pixels along the side of a latent entry."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def resolution(self):
        """Side of the pictures that the model was trained on; None where its config does not say."""
        sizes = self.unet_config["sample_size"]
        sizes = set(sizes) if isinstance(sizes, (list, tuple)) else {sizes}
        size = sizes.pop() if len(sizes) == 1 else None
        return size * self.vae_factor if type(size) is int and size > 0 else None

    @property
    def resolution_multiple(self):
        """What divides every possible side of a picture."""
        return math.lcm(8, self.vae_factor * 2 ** (len(self.unet_config["block_out_channels"]) - 1))

    @property
    def prompt_length(self):
        """Tokens of a prompt, padding included."""
        return self.tokenizer.model_max_length


# =====================================================================================================
# The small files
# =====================================================================================================


def open_base(source, tokenizer_name=None, accepted=(families.SD1, families.SD2)):
    """Reads a base model's small files and makes sure that its parts fit each other.

    Args:
        source: `ModelSource`.
        tokenizer_name: folder or id of a tokenizer, if not the model's own.
        accepted: families that the caller can serve.

    Raises:
        InputError: it is no such model, a file of it is missing or damaged, or it is of a kind that cannot be trained.
    """
    label, root = source.label, find_root(source)
    index = read_json(root, "model_index.json", label)
    served = "Stable Diffusion 1.x and 2.x"
    if families.SDXL in accepted:
        served = "Stable Diffusion 1.x, 2.x and XL"
    for name in ("transformer", "prior"):
        if name in index and "unet" not in index:
            raise InputError(f"{label} has a {name} and no UNet; this script trains {served}: choose one of those.")
    if "text_encoder_2" in index and families.SDXL not in accepted:
        raise InputError(f"{label} has two text encoders (SDXL); this script trains {served}: choose one of those.")
    if "text_encoder_2" in index and not all(index.get("text_encoder") or [None]):
        raise InputError(
            f"{label} has text_encoder_2 alone, as SDXL's refiner has; this script trains {served}: choose the base"
            " model beside the refiner."
        )
    family = families.recognise(index, None)  # of how many text encoders; their width is not known yet
    configs = {name: read_json(root, f"{name}/config.json", label) for name in family.components}
    for name, expected in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        found = configs[name].get("_class_name", expected)
        if found != expected:
            raise InputError(
                f"{label}: {name}/config.json is of a {found!r} and must be of a {expected}: choose a Stable Diffusion"
                " model."
            )
    text_configs = [read_text_config(root, name, configs[name], label) for name in family.text_encoders]
    family = families.recognise(index, text_configs[0].hidden_size)
    scheduler = read_scheduler(root, label)
    tokenizers = [
        read_tokenizer(root / name, f"{label}: {name}/", "get the model again")
        for name in family.tokenizers[tokenizer_name is not None :]
    ]
    if tokenizer_name is not None:
        tokenizers.insert(0, read_tokenizer(*find_tokenizer(tokenizer_name), "give another one"))
    configs = {name: build_empty(name, configs[name], label).config for name in ("unet", "vae")}
    parts = tuple(tokenizers), scheduler, dict(configs["unet"]), dict(configs["vae"]), tuple(text_configs)
    base = Base(family, source, root, *parts)
    labels = [f"{label}: {name}/" for name in family.tokenizers]
    if tokenizer_name:
        labels[0] = f"--tokenizer_name {tokenizer_name!r}"
    check_fit(base, labels)
    return base


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
    if os.path.isfile(root):
        raise InputError(
            f"{label} is a file; this script reads models in diffusers format, which are folders: convert it"
            " (scripts/convert_original_stable_diffusion_to_diffusers.py of diffusers)."
        )
    try:
        return Path(snapshot_download(source.name, revision=source.revision, allow_patterns=SMALL_FILES))
    except Exception as error:  # huggingface_hub raises its own errors, the HTTP library's and the system's
        raise InputError(
            f"{label} is not a Stable Diffusion model in diffusers format, neither a local folder nor on the Hub"
            f" ({first_line(error)}): check the name and your connection."
        ) from None


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
            f"{label} is not a whole Stable Diffusion model in diffusers format, {name} is missing: check the name or"
            " get the model again."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content:
            return content
        reason = "it holds no object with entries"
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
    raise InputError(f"{label}: {name} cannot be read ({reason}): get it again.")


def read_text_config(root, component, content, label):
    """The `CLIPTextConfig` of a text encoder.

    Raises:
        InputError: it describes another kind of model.
    """
    kinds = [str(content.get("model_type", "clip_text_model")), *map(str, content.get("architectures") or [])]
    if not all(kind.lower().startswith("clip") for kind in kinds):
        raise InputError(
            f"{label}: {component}/config.json is of a {kinds[-1]} and must be of a {CLASSES[component].__name__}:"
            " choose a Stable Diffusion model."
        )
    try:
        return CLIPTextConfig.from_pretrained(root / component)
    except Exception as error:  # transformers raises nearly anything on values of other types
        raise InputError(
            f"{label}: {component}/config.json cannot be read ({first_line(error)}): get it again."
        ) from None


def read_scheduler(root, label):
    """The `DDPMScheduler`.

    Raises:
        InputError: it is damaged, or the model predicts something else than noise or velocity.
    """
    name = "scheduler/scheduler_config.json"
    content = read_json(root, name, label)
    prediction = content.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(
            f"{label} predicts {prediction!r}; only epsilon and v_prediction models can be trained: choose another."
        )
    missing = [key for key in ("beta_schedule", "beta_start", "beta_end") if key not in content]
    reason = f"it has no {', '.join(missing)}"
    if not missing or content.get("trained_betas") is not None:
        try:
            check_counts(content)
            scheduler = DDPMScheduler.from_config(content)
            noise, count = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
            if type(count) is int and len(noise) == count and bool(((noise >= 0) & (noise <= 1)).all()):
                return scheduler
            reason = "its noise levels lie outside [0, 1]"
        except Exception as error:  # whatever arithmetic raises on values of other types
            reason = first_line(error)
    raise InputError(f"{label}: {name} describes no noise schedule ({reason}): get it again or choose another model.")


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


def read_tokenizer(folder, label, fix):
    """The `CLIPTokenizer` of a folder; without its files transformers would make an empty one in silence.

    Raises:
        InputError: files are missing or damaged.
    """
    names = set(weight_files.names_in(folder))
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise InputError(f"{label} has neither tokenizer.json nor vocab.json and merges.txt: {fix}.")
    try:
        if "tokenizer.json" not in names:
            check_merges(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        length = tokenizer.model_max_length
        if type(length) is not int or not 3 <= length < 10**6:
            raise ValueError("tokenizer_config.json is missing or gives no model_max_length")
        ids = tokenizer(["a photo"], padding="max_length", truncation=True, max_length=length).input_ids[0]
        if len(ids) != length:
            raise ValueError(f"it pads to {len(ids)} tokens and not to {length}")
    except Exception as error:  # tokenizers raises plain exceptions
        raise InputError(f"{label} is no tokenizer of CLIP ({first_line(error)}): {fix}.") from None
    return tokenizer


def check_merges(folder):
    """Raises a `ValueError` if merges.txt has lost lines: words would fall into letters in silence."""
    vocabulary = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = sum(bool(line.strip()) and not line.startswith("#version") for line in lines)
    if merges + 2 * 256 + 16 < vocabulary:  # every token but bytes and a few special ones is made by a merge
        raise ValueError(f"merges.txt has {merges} merges for {vocabulary} tokens, it is cut")


# =====================================================================================================
# Do the parts fit each other, and can this script serve them?
# =====================================================================================================


def build_empty(component, config, label):
    """The component (of `CLASSES`) that a config describes, frozen, on the meta device.

    Raises:
        InputError: it describes none.
    """
    try:
        kind, of_text = CLASSES[component], component.startswith("text_encoder")
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
    configs = {"unet": base.unet_config, "vae": base.vae_config}
    configs |= dict(zip(base.family.text_encoders, base.text_configs))
    return build_empty(component, configs[component], base.source.label)


def empty_text_encoder(base):
    """All text encoders as one module (see `families`), frozen, on the meta device."""
    return base.family.join([empty_model(base, name) for name in base.family.text_encoders])


def check_fit(base, tokenizer_labels):
    """Makes sure that tokenizers, text encoders, UNet and VAE fit each other and need nothing that training lacks.

    What has a sentence of its own comes first; then empty models compute once, with the shapes that training has.

    Args:
        base: `Base`.
        tokenizer_labels: the beginnings of messages about the tokenizers.

    Raises:
        InputError: they do not.
    """
    label, unet, vae = base.source.label, base.unet_config, base.vae_config
    faults = []
    if unet["in_channels"] == 9 and vae["latent_channels"] == 4:
        faults.append("is for inpainting (its UNet has 9 input channels): choose its text-to-image model")
    elif not unet["in_channels"] == unet["out_channels"] == vae["latent_channels"]:
        channels = f"takes {unet['in_channels']} channels and returns {unet['out_channels']}"
        faults.append(f"has a UNet that {channels}, and a VAE with {vae['latent_channels']}: choose another model")
    if unet["addition_embed_type"] not in base.family.addition_embed_types:
        faults.append(
            f"has a UNet with addition_embed_type {unet['addition_embed_type']!r}, whose input this script does not"
            " have (SDXL, Kandinsky): choose a Stable Diffusion model whose UNet fits its text encoders"
        )
    for name in ("class_embed_type", "num_class_embeds"):
        if unet[name] is not None:
            faults.append(f"has a UNet with class labels ({name}: {unet[name]!r}): choose a text-to-image model")
    width = unet["encoder_hid_dim"] or unet["cross_attention_dim"]
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    if widths != {base.word_width}:
        of_encoders = " and ".join(map(str, base.word_widths))
        faults.append(
            f"has a UNet for text embeddings of width {width} and a text encoder of width {of_encoders}: unet/ or"
            " text_encoder/ belongs to another model, get it again"
        )
    if vae["latents_mean"] is not None:
        faults.append("has a VAE with latents_mean (Playground v2.5), which this script cannot serve: choose another")
    scaling = vae["scaling_factor"]
    if type(scaling) not in (int, float) or not 0 < scaling < math.inf:
        faults.append(f"has a VAE with scaling_factor {scaling!r}: get vae/config.json again")
    if faults:
        raise InputError(f"{label} {faults[0]}.")
    vocabulary = base.tokenizer.get_vocab()
    for tokenizer, text, of_tokenizer in zip(base.tokenizers, base.text_configs, tokenizer_labels):
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
    compute_empty(base)


def compute_empty(base):
    """Lets the empty models of a base compute once, on the meta device.

    Raises:
        InputError: they cannot, or the UNet's prediction is not shaped like a latent.
    """
    networks, text_encoder = {name: empty_model(base, name) for name in ("unet", "vae")}, empty_text_encoder(base)
    side = base.resolution_multiple
    try:
        with torch.no_grad():
            pixels = torch.empty(1, 3, side, side, device="meta")
            moments = networks["vae"].encode(pixels).latent_dist.parameters
            ids = torch.zeros(1, len(base.tokenizers) * base.prompt_length, dtype=torch.long, device="meta")
            latents, encoded = moments.chunk(2, dim=1)[0], text_encoder(ids)
            added = base.family.added_conditions(encoded, torch.empty(1, 6, device="meta"))
            inputs = latents, torch.empty(1, device="meta"), encoded[0]
            prediction = networks["unet"](*inputs, **added, return_dict=False)[0]
            decoded = networks["vae"].decode(latents, return_dict=False)[0]
        fits = prediction.shape == latents.shape and decoded.shape == pixels.shape
        reason = f"a latent is {list(latents.shape)}, the UNet's prediction {list(prediction.shape)}"
        fits = fits and latents.shape[-1] * base.vae_factor == side
    except Exception as error:  # whatever layers raise on shapes that do not fit, or inputs that they miss
        fits, reason = False, first_line(error)
    if not fits:
        raise InputError(
            f"{base.source.label} has a UNet, a text encoder and a VAE that cannot work together as in Stable"
            f" Diffusion ({reason}): choose another model, or get its configs again."
        )


def check_resolution(base, resolution):
    """Raises an `InputError` unless the model can draw pictures of `resolution`, its own where that is None."""
    multiple, own = base.resolution_multiple, base.resolution
    if resolution is None and own is None:
        raise InputError(
            f"{base.source.label} does not say how large its pictures are (sample_size in unet/config.json is"
            f" {base.unet_config['sample_size']!r}): give --resolution, a multiple of {multiple}."
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
    """The safetensors files (one, or its shards) of a component, checked against its config.

    Raises:
        InputError: they are missing (in that variant), damaged, or hold other tensors than the config describes.
    """
    if component in base.checked_files:
        return base.checked_files[component]
    source, label = base.source, base.source.label
    stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
    folder = base.root / component
    if base.root != Path(source.name):
        download_weights(base, component, stem)
    files = weight_files.find_files(folder, stem, source.variant, label)
    known = {name: tuple(tensor.shape) for name, tensor in empty_model(base, component).state_dict().items()}
    missing = set(known)
    for path in files:
        where = f"{component}/{path.name}"
        for name, stored in weight_files.read_header(path, label).items():
            name = current_name(name, component)
            if name not in known:
                if name.startswith(NO_WEIGHTS) or name.rpartition(".")[2] == "position_ids":
                    continue
                reason = f"holds {name!r}, which the config has no place for"
            elif name not in missing:
                reason = f"holds {name!r} a second time"
            elif stored.shape != known[name]:
                reason = f"holds {name!r} of shape {list(stored.shape)}, the config wants {list(known[name])}"
            elif not stored.dtype.startswith(("F", "BF")):
                reason = f"holds {name!r} as {stored.dtype}, which are no floating-point weights"
            else:
                missing.discard(name)
                continue
            raise InputError(
                f"{label}: {where} does not fit {component}/config.json, it {reason}: one of them belongs to another"
                " model or is damaged, get both again."
            )
    if missing:
        raise InputError(
            f"{label}: the {component} weights ({files[0].name}) lack {min(missing)!r}, which {component}/config.json"
            " asks for: one of them belongs to another model or is damaged, get both again."
        )
    base.checked_files[component] = files
    return files


# Tensors that files may hold beside the weights: of the CLIP model that a text encoder was cut out of.
NO_WEIGHTS = ("text_projection.", "visual_projection.", "vision_model.", "logit_scale")


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


def current_name(name, component=None):
    """A tensor's name in a file as today's models spell it."""
    if component != "text_encoder_2":
        name = name.removeprefix("text_model.")  # a prefix that transformers dropped for the first in its version 5
    old = re.fullmatch(r"(.*\bmid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    if old:  # VAEs of 2022
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[old[2]]
        name = f"{old[1]}.{new}.{old[3]}"
    return name


def stored_tensors(files):
    """(name, tensor) of safetensors files, one memory-mapped tensor at a time.

    Raises:
        InputError: a file cannot be read.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                names = list(tensors.keys())
            for name in names:
                with safe_open(path, framework="pt") as tensors:  # opened anew, so that pages read before leave
                    value = tensors.get_tensor(name)
                yield current_name(name, Path(path).parent.name), value  # the folder is named by the component
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}): get the model again.") from None


def load_token_table(base, component="text_encoder"):
    """The token table `[vocabulary, d]` of a text encoder, memory-mapped, as stored."""
    files = find_weight_files(base, component)
    return next(value for name, value in stored_tensors(files) if name.endswith("embeddings.token_embedding.weight"))


def load_token_tables(base):
    """The token tables of all text encoders."""
    return [load_token_table(base, component) for component in base.family.text_encoders]


def load_vae(base, dtype=torch.float32):
    """The frozen `AutoencoderKL`, on the CPU."""
    return load_component(base, "vae", dtype)


def load_component(base, component, dtype=torch.float32):
    """A frozen, unquantized component, on the CPU."""
    model = empty_model(base, component)
    known = model.state_dict()
    for name, value in stored_tensors(find_weight_files(base, component)):
        if name in known:
            set_module_tensor_to_device(model, name, "cpu", value=value.to(dtype), dtype=dtype, clear_cache=False)
    return model.requires_grad_(False)
