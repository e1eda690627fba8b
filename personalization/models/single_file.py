"""Checkpoints in a single file, as Automatic1111 and ComfyUI have them: Stable Diffusion 1.x, 2.x and XL.

diffusers' own conversion says which tensor is called what. It is given tensors that are not read yet (`Later`), so
that one tensor at a time is in memory, as of a base in folders. Configs of the families are in `configs/`; names and
shapes in the file say which of them fits. Tokenizers are of a base that is here already, or of a package.
"""

import gzip
import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open

from ..errors import InputError, first_cause
from ..logs import get_logger
from .weight_files import StoredTensor, what_is_wrong


logger = get_logger(__name__)

CONFIGS = Path(__file__).with_name("configs")  # a folder in diffusers format, without weights, for each family
SUFFIXES = ".safetensors", ".ckpt"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
# Names that begin with this -> name of a family, and of each of its text encoders the prefix; the surest first.
OF_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
OF_1, OF_2 = "cond_stage_model.transformer.", "cond_stage_model.model."
TEXT = {OF_XL[1]: ("sdxl", *OF_XL), OF_2: ("sd2", OF_2), OF_1: ("sd1", OF_1)}
TOKENIZER = "openai/clip-vit-large-patch14"  # a small repository with the vocabulary of all of them
FIRST_LAYER = f"{UNET}input_blocks.0.0.weight"
OF_EDM = {"edm_mean", "edm_vpred.sigma_max"}  # tensors of models with noise levels of their own
LAST_NORM = re.compile(rf"{re.escape(UNET)}output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias")
SPREAD = 0.09  # of its entries, above which a 2.x predicts velocity: the rule that ComfyUI goes by
VELOCITY = re.compile(r"parameterization:\s*[\"']?v\b")


class SingleFile(NamedTuple):
    """A checkpoint in a single file."""

    path: Path
    root: Path  # folder of its configs
    prefixes: tuple  # of its text encoders' tensors
    overrides: dict  # component, or "scheduler" -> entries of its config that are this file's own


class Later:
    """A tensor of a file that is read when it is asked for, with what was done to it by then."""

    def __init__(self, stored, read):
        self.stored, self.read = stored, read
        self.shape, self.ndim = torch.Size(stored.shape), len(stored.shape)

    def then(self, change):
        shape = tuple(change(torch.empty(self.shape, device="meta")).shape)
        return Later(StoredTensor(self.stored.dtype, shape), lambda: change(self.read()))

    def __getitem__(self, index):
        return self.then(lambda tensor: tensor[index])

    @property
    def T(self):
        return self.then(lambda tensor: tensor.T)

    def contiguous(self):
        return self.then(lambda tensor: tensor.contiguous())

    def clone(self):  # of a slice
        return self

    detach = clone


def is_single_file(name):
    """Whether the name of a base is that of a file, and not of a folder or a model on the Hub."""
    return os.path.isfile(name)


def open_file(path, label):
    """The `SingleFile` of a path.

    Args:
        label: the flag and the file, for error messages.

    Raises:
        InputError: it cannot be read, or is of no family that is known here.
    """
    path, names = Path(path), tensors(Path(path), label)
    text = next((TEXT[prefix] for prefix in TEXT if any(name.startswith(prefix) for name in names)), None)
    refiner = any(name.startswith("conditioner.embedders.0.model.") for name in names)
    missing = [what for what, prefix in (("UNet", UNET), ("VAE", VAE)) if not any(n.startswith(prefix) for n in names)]
    if text is None or missing:
        what = "is SDXL's refiner" if refiner else f"holds no {' and no '.join(missing or ['text encoder'])}"
        raise InputError(
            f"{label} {what}, as checkpoints of Stable Diffusion 1.x, 2.x and XL in a single file do: choose one that"
            " is whole, or a model in diffusers format."
        )
    family, *prefixes = text
    if FIRST_LAYER in names and names[FIRST_LAYER].shape[1] == 9:
        raise InputError(f"{label} is for inpainting (its UNet has 9 input channels): choose its text-to-image model.")
    if OF_EDM & names.keys():
        raise InputError(
            f"{label} has noise levels of its own (EDM, as Playground 2.5), which nothing here trains with: choose a"
            " model that predicts noise or velocity."
        )
    overrides = overrides_of(names, predicts_velocity(path, names, OF_2 in prefixes), OF_2 in prefixes)
    return SingleFile(path, CONFIGS / family, tuple(prefixes), overrides)


def overrides_of(found, velocity, is_2):
    """What the configs of a checkpoint say otherwise than its family's: component -> entries.

    Args:
        found: names of its tensors.
        velocity: whether it predicts velocity, and not noise.
        is_2: whether it is of 2.x, whose models have 768 px where they predict velocity, and else 512.
    """
    zero_snr = "ztsnr" in found
    scheduler = {"prediction_type": "v_prediction" if velocity else "epsilon", "rescale_betas_zero_snr": zero_snr}
    return {"scheduler": scheduler} | ({"unet": {"sample_size": 64}} if is_2 and not velocity else {})


def predicts_velocity(path, found, is_2):
    """Whether a checkpoint predicts velocity, by the first of these that says so.

    A tensor `v_pred`; the `.yaml` beside the file, as for Automatic1111; `modelspec.prediction_type` in its metadata;
    of 2.x, which has models of both kinds, the spread of a weight. Without any of them it predicts noise.
    """
    settings, said = path.with_suffix(".yaml"), metadata_of(path).get("modelspec.prediction_type", "")
    norms = {int(match[1]): name for name in found if (match := LAST_NORM.fullmatch(name))}
    if "v_pred" in found:
        velocity, by = True, "a tensor in it"
    elif settings.is_file():
        velocity, by = bool(VELOCITY.search(settings.read_text("utf-8", errors="replace"))), settings.name
    elif said:
        velocity, by = said.startswith("v"), "its metadata"
    elif is_2 and norms:
        spread = found[norms[max(norms)]].read().float().std(correction=0)
        velocity, by = bool(spread > SPREAD), f"the spread of its weights; {settings.name} beside it would say it"
    else:
        return False
    logger.info(f"{path.name} predicts {'velocity' if velocity else 'noise'}, by {by}.")
    return velocity


def metadata_of(path):
    """What a safetensors file says of itself; {} for others."""
    if path.suffix.lower() == ".ckpt":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def tensors(path, label):
    """Name -> `Later` of all tensors of a file; nothing but its header is read.

    Raises:
        InputError: it is of no form that is known, damaged, or more than plain tensors in a pickle.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{label} is a file, and no {' or '.join(SUFFIXES)}: give such a checkpoint, a folder in diffusers format"
            " or a model id on the Hub."
        )
    if path.suffix.lower() == ".ckpt":
        return pickled(path, label)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            stored = {name: StoredTensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{label} {what_is_wrong(path, error)}") from None

    def read(name):
        try:
            with safe_open(path, framework="pt") as file:  # opened anew, so that pages read before leave
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{label} cannot be read ({first_cause(error)}): get it again.") from None

    return {name: Later(facts, lambda name=name: read(name)) for name, facts in stored.items()}


def pickled(path, label):
    """`tensors` of a `.ckpt` that holds plain tensors alone; they are pages of the mapped file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what it likes on files of others
        raise InputError(
            f"{label} is no pickle of plain tensors ({first_cause(error, 120)}), and anything else in one could run"
            " code: get the model as .safetensors."
        ) from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    found = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    names = {name: "F" if value.is_floating_point() else str(value.dtype) for name, value in found.items()}
    return {
        name: Later(StoredTensor(names[name], tuple(value.shape)), lambda value=value: value)
        for name, value in found.items()
    }


def component_tensors(single, family, component, config, label):
    """Name -> `Later` of a component, under the names that diffusers' conversion gives them.

    Args:
        single: `SingleFile`.
        family: its `Family`.
        component: of the family.
        config: of the component.
        label: see `open_file`.
    """
    found = tensors(single.path, label)
    if component not in family.text_encoders:
        prefix, convert = (
            (VAE, convert_ldm_vae_checkpoint) if component == "vae" else (UNET, convert_ldm_unet_checkpoint)
        )
        return convert({name: value for name, value in found.items() if name.startswith(prefix)}, config)
    prefix = single.prefixes[family.text_encoders.index(component)]
    of_encoder = {name: value for name, value in found.items() if name.startswith(prefix)}
    if prefix.endswith(".model."):  # OpenCLIP's
        return convert_open_clip_checkpoint(SimpleNamespace(config=config), of_encoder, prefix)
    return convert_ldm_clip_checkpoint(of_encoder)


# =====================================================================================================
# Tokenizers
# =====================================================================================================


def find_tokenizers(single, family, sizes, label):
    """The tokenizers of a checkpoint, which has none: of a base beside it or in the Hub's cache, of a package, or of
    the Hub.

    Args:
        single: `SingleFile`.
        family: its `Family`.
        sizes: tokens of each.
        label: see `open_file`.

    Raises:
        InputError: there is none.
    """
    found = [single.path.parent / "tokenizer", *sorted(single.path.parent.glob("*/tokenizer"))]
    found += sorted(Path(HF_HUB_CACHE).glob("models--*/snapshots/*/tokenizer"))
    found += sorted(Path(HF_HUB_CACHE).glob(f"models--{TOKENIZER.replace('/', '--')}/snapshots/*"))
    for folder in found:
        try:
            return same_tokenizers(family, folder, sizes)
        except Exception:  # of another family, or not whole
            continue
    if (package := importlib.util.find_spec(PACKAGE)) and package.origin:
        with tempfile.TemporaryDirectory() as folder:
            try:
                unpack_vocabulary(Path(package.origin).with_name(VOCABULARY), Path(folder))
                return same_tokenizers(family, Path(folder), sizes)
            except Exception as error:  # another version of the package may have it elsewhere
                logger.warning(f"{PACKAGE} has no vocabulary that can be read ({first_cause(error, 120)}).")
    try:
        return same_tokenizers(family, Path(snapshot_download(TOKENIZER, allow_patterns=["*.json", "*.txt"])), sizes)
    except Exception as error:  # huggingface_hub raises its own errors, the HTTP library's and the system's
        raise InputError(
            f"{label} is a single file, which has no tokenizer; there is none beside it or in the Hub's cache, nor"
            f" does the Hub give one ({first_cause(error, 120)}): put the folder tokenizer/ of any Stable Diffusion"
            " beside the file or give it as --tokenizer_name, or pip install open_clip_torch, which has the words."
        ) from None


PACKAGE, VOCABULARY = (
    "open_clip",
    "bpe_simple_vocab_16e6.txt.gz",
)  # a package with CLIP's vocabulary, as OpenAI gave it
MERGES = 49152 - 256 - 2  # of its lines so many count


def unpack_vocabulary(path, folder):
    """Writes CLIP's vocabulary, as OpenAI published it, as a tokenizer's folder of transformers."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = [line for line in file.read().split("\n")[1 : MERGES + 1] if line.strip()]
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = 256 - len(shown)  # bytes that print as nothing are written as characters that do
    letters = [*map(chr, shown), *(chr(256 + i) for i in range(hidden))]
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(pair.split()) for pair in merges),
        start,
        end,
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def same_tokenizers(family, folder, sizes):
    """Tokenizers of a folder for each text encoder; they differ in how they pad.

    Raises:
        Exception: it holds none, or one of another vocabulary.
    """
    found = [family.read_tokenizer(folder) for _ in family.text_encoders]
    if [len(tokenizer) for tokenizer in found] != list(sizes):
        raise ValueError(f"it has {len(found[0])} tokens and not {sizes[0]}")
    for tokenizer, pad in zip(found, family.padding):
        tokenizer.pad_token = pad or tokenizer.eos_token
    return found
