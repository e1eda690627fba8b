"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise or velocity, told by the last states of one text encoder.

The two differ in the width of their words and in the settings that suit them.
"""

import math

from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from ...errors import InputError
from .clip import ClipFamily
from .family import Text


SD2_WIDTH = 1024  # of a word of 2.x: OpenCLIP ViT-H


class StableDiffusion(ClipFamily):
    """Stable Diffusion 1.x."""

    name = "sd1"
    label = "Stable Diffusion 1.x"
    tag = "stable-diffusion"
    classes = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
    scheduler = DDPMScheduler
    addition_embed_types = (None, "text")  # inputs of the UNet beside noise, time and text: none, or made of the text
    pipeline = StableDiffusionPipeline
    pipeline_options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline_file = "zoodip_pipeline.py"
    a1111 = stacks = True
    # The settings of ZOODiP's paper.
    timestep_window = 500, 900
    settings_of_optimizer = {"zo_adam": {"learning_rate": 5e-3, "max_train_steps": 30_000}}
    settings_of_lora = {"learning_rate": 1e-4, "zo_learning_rate": 1e-4}  # as in diffusers' and kohya's trainers

    def recognises(self, index, configs):
        """A UNet and one text encoder; a base whose index says next to nothing is taken for one, too."""
        has_unet = "unet" in index or not index.keys() & {"transformer", "prior"}
        return has_unet and "text_encoder_2" not in index and self.takes_words_of(word_width(configs["text_encoder"]))

    def takes_words_of(self, width):
        return width != SD2_WIDTH

    def check(self, base):
        label, faults = base.source.label, [*unet_faults(base, self.addition_embed_types), *vae_faults(base)]
        if faults:
            raise InputError(f"{label} {faults[0]}.")
        prediction = base.scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise InputError(
                f"{label} predicts {prediction!r}; only epsilon and v_prediction models can be trained: choose"
                " another."
            )

    def open_scheduler(self, config):
        missing = [key for key in ("beta_schedule", "beta_start", "beta_end") if key not in config]
        if missing and config.get("trained_betas") is None:
            raise ValueError(f"it has no {', '.join(missing)}")
        scheduler = DDPMScheduler.from_config(config)
        levels, count = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
        if type(count) is not int or len(levels) != count or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError("its noise levels lie outside [0, 1]")
        return scheduler

    def sampler(self, scheduler):
        return DPMSolverMultistepScheduler.from_config(scheduler.config)

    def latent_multiple(self, config):
        return 2 ** (len(config["block_out_channels"]) - 1)

    def encode(self, encoders, ids):
        return Text(encoders[0](ids)[0])

    def to_latents(self, sample, vae_config):
        """Scaled only: the pipeline that draws knows no shift."""
        return sample * vae_config["scaling_factor"]

    def noise(self, latents, noise, timesteps, scheduler):
        """z_t = √ᾱ_t z + √(1 - ᾱ_t) ε; the target is the noise ε, or the velocity √ᾱ_t ε - √(1 - ᾱ_t) z."""
        predicts_noise = scheduler.config.prediction_type == "epsilon"
        target = noise if predicts_noise else scheduler.get_velocity(latents, noise, timesteps)
        return scheduler.add_noise(latents, noise, timesteps), target

    def predict(self, denoiser, noisy, timesteps, text, sizes):
        return denoiser(noisy, timesteps, text.states, return_dict=False)[0]


class StableDiffusion2(StableDiffusion):
    """Stable Diffusion 2.x."""

    name = "sd2"
    label = "Stable Diffusion 2.x"
    padding = ("!",)
    settings_of_optimizer = {"zo_adam": {"learning_rate": 1e-2, "max_train_steps": 30_000, "perturbation_scale": 1e-2}}

    def takes_words_of(self, width):
        return width == SD2_WIDTH


def word_width(config):
    """Entries of a word, by the config of a text encoder, which may be a part of that of the whole CLIP."""
    inner = config.get("text_config")
    return (inner if isinstance(inner, dict) else config).get("hidden_size")


def unet_faults(base, addition_embed_types):
    """What is wrong with the UNet of a `Base`, ends of sentences."""
    unet, vae = base.denoiser_config, base.vae_config
    if unet["in_channels"] == 9 and vae["latent_channels"] == 4:
        yield "is for inpainting (its UNet has 9 input channels): choose its text-to-image model"
    elif not unet["in_channels"] == unet["out_channels"] == vae["latent_channels"]:
        channels = f"takes {unet['in_channels']} channels and returns {unet['out_channels']}"
        yield f"has a UNet that {channels}, and a VAE with {vae['latent_channels']}: choose another model"
    if unet["addition_embed_type"] not in addition_embed_types:
        yield (
            f"has a UNet with addition_embed_type {unet['addition_embed_type']!r}, whose input this script does not"
            " have (SDXL, Kandinsky): choose a Stable Diffusion model whose UNet fits its text encoders"
        )
    for name in ("class_embed_type", "num_class_embeds"):
        if unet[name] is not None:
            yield f"has a UNet with class labels ({name}: {unet[name]!r}): choose a text-to-image model"
    width = unet["encoder_hid_dim"] or unet["cross_attention_dim"]
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    if widths != {base.word_width}:
        of_encoders = " and ".join(map(str, base.word_widths))
        yield (
            f"has a UNet for text embeddings of width {width} and a text encoder of width {of_encoders}: unet/ or"
            " text_encoder/ belongs to another model, get it again"
        )


def vae_faults(base):
    """What is wrong with the VAE of a `Base`, ends of sentences."""
    if base.vae_config["latents_mean"] is not None:
        yield "has a VAE with latents_mean (Playground v2.5), which this script cannot serve: choose another"
    scaling = base.vae_config["scaling_factor"]
    if type(scaling) not in (int, float) or not 0 < scaling < math.inf:
        yield f"has a VAE with scaling_factor {scaling!r}: get vae/config.json again"
