"""Z-Image: a transformer for flow matching that reads prompts and pictures as one sequence; its text is Qwen3's."""

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from transformers import Qwen3Model

from .language import LanguageFamily
from .stable_diffusion import vae_faults


PATCH = 2  # latent entries along the side of a token, which the pipeline does not choose


class ZImage(LanguageFamily):
    """Z-Image and Z-Image-Turbo: of the language model the last states but one, before its norm."""

    name = "z_image"
    label = "Z-Image"
    tag = "z-image"
    classes = {"transformer": ZImageTransformer2DModel, "text_encoder": Qwen3Model, "vae": AutoencoderKL}
    pipeline = ZImagePipeline
    pipeline_file = "zoodip_flow_pipeline.py"
    word_keys = ("qwen3_4b",)  # as ComfyUI calls them
    layers_read = (-2,)
    timestep_window = 600, 1000  # on the demo base 300 to 800 teaches next to nothing, see docs/models.md
    settings_of_optimizer = {"zo_adam": {"learning_rate": 5e-3, "max_train_steps": 30_000}}

    def recognises(self, index, configs):
        return index.get("_class_name") == "ZImagePipeline"

    def faults(self, base):
        config, vae = base.denoiser_config, base.vae_config
        yield from vae_faults(base)
        if type(vae["shift_factor"]) not in (int, float):
            yield f"has a VAE with shift_factor {vae['shift_factor']!r}: get vae/config.json again"
        if config["in_channels"] != vae["latent_channels"]:
            yield (
                f"has a transformer of {config['in_channels']} channels and a VAE of {vae['latent_channels']}: choose"
                " another model"
            )
        if config["cap_feat_dim"] != self.output_width(base):
            yield (
                f"has a transformer for text of width {config['cap_feat_dim']} and a text encoder of width"
                f" {self.output_width(base)}: transformer/ or text_encoder/ belongs to another model, get it again"
            )
        if PATCH not in config["all_patch_size"] or 1 not in config["all_f_patch_size"]:
            yield f"has a transformer with patches of {config['all_patch_size']!r}: choose one with patches of {PATCH}"
        if config["siglip_feat_dim"] is not None:
            yield "takes pictures as input (siglip_feat_dim): choose its text-to-image model"

    def latent_multiple(self, config):
        return PATCH

    def image_shift(self, latents, config):
        tokens = (latents.shape[-2] // PATCH) * (latents.shape[-1] // PATCH)
        sizes = config.base_image_seq_len, config.max_image_seq_len
        return calculate_shift(tokens, *sizes, config.base_shift, config.max_shift)

    def predict(self, denoiser, noisy, timesteps, text, sizes):
        """The transformer is told 1 - σ and predicts x - ε, whose sign is turned as the pipeline turns it."""
        texts = [states[:length] for states, length in zip(text.states, text.lengths)]
        pictures = list(noisy.unsqueeze(2).unbind(0))
        found = denoiser(pictures, (1000 - timesteps) / 1000, texts, return_dict=False)[0]
        return -torch.stack(found, dim=0).squeeze(2)
