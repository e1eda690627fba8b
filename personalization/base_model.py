"""A base model: configs, tokenizer, scheduler and weights, found locally or on the Hub and read piece by piece."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .errors import InputError


class ModelSource(NamedTuple):
    """Where a base model comes from."""

    name: str  # a local folder or an id on the Hub
    revision: str | None = None
    variant: str | None = None


@dataclass(frozen=True)
class Base:
    """The small files of a Stable Diffusion 1.x or 2.x model.

    Args:
        source: where it comes from.
        tokenizer, scheduler: `CLIPTokenizer`, `DDPMScheduler`.
        unet_config, vae_config: as diffusers reads them.
        text_config: `CLIPTextConfig`.
    """

    source: ModelSource
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    unet_config: dict
    vae_config: dict
    text_config: CLIPTextConfig

    @property
    def vae_factor(self):
        """Pixels along the side of a latent entry."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def resolution(self):
        """Side of the pictures that the model was trained on."""
        return self.unet_config["sample_size"] * self.vae_factor

    @property
    def resolution_multiple(self):
        """What divides every possible side of a picture."""
        return math.lcm(8, self.vae_factor * 2 ** (len(self.unet_config["block_out_channels"]) - 1))

    @property
    def prompt_length(self):
        """Tokens of a prompt, padding included."""
        return self.tokenizer.model_max_length


def open_base(source, tokenizer_name=None):
    """Reads a base model's small files.

    Args:
        source: `ModelSource`.
        tokenizer_name: folder or id of a tokenizer, if not the model's own.

    Raises:
        InputError: it is no such model, or of a kind that cannot be trained.
    """
    name, revision = source.name, {"revision": source.revision}
    try:
        index = DiffusionPipeline.load_config(name, **revision)
        unet_config = UNet2DConditionModel.load_config(name, subfolder="unet", **revision)
        vae_config = AutoencoderKL.load_config(name, subfolder="vae", **revision)
        text_config = CLIPTextConfig.from_pretrained(name, subfolder="text_encoder", **revision)
        scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler", **revision)
        folder = {} if tokenizer_name else {"subfolder": "tokenizer"}
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_name or name, **folder, **revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--pretrained_model_name_or_path {name!r} is not a Stable Diffusion model in diffusers format, neither a"
            f" local folder nor on the Hub ({reason}): check the name and your connection."
        ) from None
    if "text_encoder_2" in index:
        raise InputError(
            f"--pretrained_model_name_or_path {name!r} has two text encoders (SDXL); this script trains Stable"
            " Diffusion 1.x and 2.x: choose one of those."
        )
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(
            f"--pretrained_model_name_or_path {name!r} predicts {scheduler.config.prediction_type!r}; only epsilon and"
            " v_prediction models can be trained: choose another."
        )
    return Base(source, tokenizer, scheduler, unet_config, vae_config, text_config)


def check_resolution(base, resolution):
    """Raises an `InputError` unless the model can draw pictures of `resolution`."""
    multiple = base.resolution_multiple
    if resolution % multiple:
        raise InputError(
            f"--resolution {resolution} must be divisible by {multiple} for this model: try"
            f" {max(1, round(resolution / multiple)) * multiple}."
        )


# =====================================================================================================
# Weights
# =====================================================================================================


class StoredModel(NamedTuple):
    """What a run's config says of a model."""

    bytes: int  # of its weights, as kept
    quantized_share: float  # of its parameters


def empty_model(base, component):
    """The "unet", "text_encoder" or "vae" as its config describes it, frozen, on the meta device."""
    with init_empty_weights():
        if component == "unet":
            model = UNet2DConditionModel.from_config(base.unet_config)
        elif component == "vae":
            model = AutoencoderKL.from_config(base.vae_config)
        else:
            model = CLIPTextModel(base.text_config)
    return model.requires_grad_(False).eval()


def find_weight_files(source, component):
    """The safetensors files (one, or its shards) of a component, from a local folder or the Hub.

    Raises:
        InputError: the component has no safetensors weights (of that variant).
    """
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    variant = f".{source.variant}" if source.variant else ""
    shard = "-[0-9]*-of-[0-9]*"
    patterns = [f"{stem}{variant}.safetensors", f"{stem}{variant}{shard}.safetensors"]
    patterns += [f"{stem}{shard}{variant}.safetensors"] if variant else []
    root = Path(source.name)
    if not root.is_dir():
        allowed = [f"{component}/{pattern}" for pattern in patterns]
        root = Path(snapshot_download(source.name, revision=source.revision, allow_patterns=allowed))
    files = next((found for p in patterns if (found := sorted((root / component).glob(p)))), [])
    if not files:
        raise InputError(
            f"--pretrained_model_name_or_path {source.name!r} has no {patterns[0]} in {component}/: choose another"
            " --variant or convert the weights to safetensors."
        )
    return files


def stored_tensors(files):
    """(name, tensor) of safetensors files, one memory-mapped tensor at a time."""
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            with safe_open(path, framework="pt") as tensors:  # opened anew, so that pages read before leave
                value = tensors.get_tensor(name)
            yield name.removeprefix("text_model."), value  # a prefix that transformers dropped in its version 5


def load_token_table(source):
    """The token table `[vocabulary, d]` of the text encoder, memory-mapped, as stored."""
    files = find_weight_files(source, "text_encoder")
    return next(value for name, value in stored_tensors(files) if name == "embeddings.token_embedding.weight")


def load_vae(source, dtype=torch.float32):
    """The frozen `AutoencoderKL`, on the CPU."""
    options = {"subfolder": "vae", "revision": source.revision, "variant": source.variant}
    vae = AutoencoderKL.from_pretrained(source.name, dtype=dtype, **options)
    return vae.requires_grad_(False).eval()
