"""Checkpoints in a single file, as Automatic1111 and ComfyUI have them: Stable Diffusion 1.x, 2.x and XL.

diffusers' own conversion says which tensor is called what. It is given tensors that are not read yet (`Later`), so
that one tensor at a time is in memory, as of a base in folders. Configs of the families are in `configs/`; names and
shapes in the file say which of them fits. Tokenizers are of a base that the Hub's cache has already.
"""

import os
import re
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
from .weight_files import StoredTensor, what_is_wrong


CONFIGS = Path(__file__).with_name("configs")  # a folder in diffusers format, without weights, for each family
SUFFIXES = ".safetensors", ".ckpt"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
# Names that begin with this -> name of a family, and of each of its text encoders the prefix; the surest first.
OF_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
OF_1, OF_2 = "cond_stage_model.transformer.", "cond_stage_model.model."
TEXT = {OF_XL[1]: ("sdxl", *OF_XL), OF_2: ("sd2", OF_2), OF_1: ("sd1", OF_1)}
TOKENIZER = "openai/clip-vit-large-patch14"  # a small repository with the vocabulary of all of them
FIRST_LAYER = f"{UNET}input_blocks.0.0.weight"


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
    return SingleFile(path, CONFIGS / family, tuple(prefixes), overrides_of(path, prefixes, names))


def overrides_of(path, prefixes, names):
    """What a checkpoint's config says otherwise than its family's: whether it predicts noise or velocity.

    The file of SDXL says so by a tensor `v_pred`. That of 2.x does not say it: the `.yaml` beside it does, as for
    Automatic1111; without one it is taken for 2.1, which predicts velocity.
    """
    settings = path.with_suffix(".yaml")
    velocity = re.search(r"parameterization:\s*[\"']?v\b", settings.read_text("utf-8")) if settings.is_file() else None
    if OF_2 in prefixes and settings.is_file() and not velocity:
        return {"unet": {"sample_size": 64}, "scheduler": {"prediction_type": "epsilon"}}
    if velocity or "v_pred" in names:
        return {"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names}}
    return {}


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


def find_tokenizers(family, sizes, label):
    """The tokenizers of a family whose checkpoint has none: of any base in the Hub's cache, or else of the Hub.

    Args:
        family: `Family`.
        sizes: tokens of each.
        label: see `open_file`.

    Raises:
        InputError: there is none.
    """
    cached = sorted(Path(HF_HUB_CACHE).glob("models--*/snapshots/*/tokenizer"))
    cached += sorted(Path(HF_HUB_CACHE).glob(f"models--{TOKENIZER.replace('/', '--')}/snapshots/*"))
    for folder in cached:
        try:
            return same_tokenizers(family, folder, sizes)
        except Exception:  # of another family, or not whole
            continue
    try:
        return same_tokenizers(family, Path(snapshot_download(TOKENIZER, allow_patterns=["*.json", "*.txt"])), sizes)
    except Exception as error:  # huggingface_hub raises its own errors, the HTTP library's and the system's
        raise InputError(
            f"{label} is a single file, which has no tokenizer; the Hub's cache has none either, nor does the Hub give"
            f" one ({first_cause(error, 120)}): where there is a network, run hf download {TOKENIZER} vocab.json"
            " merges.txt tokenizer_config.json once, or give --tokenizer_name, the folder tokenizer/ of any Stable"
            " Diffusion."
        ) from None


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
