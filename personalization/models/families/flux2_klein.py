"""FLUX.2 klein: a transformer for flow matching of patches, told what three layers of Qwen3 say side by side."""

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from transformers import Qwen3Model

from .language import LanguageFamily


PATCH = 2  # latent entries along the side of a token
STEPS = 50  # of the pipeline, on which its shift of the noise levels depends


class Flux2Klein(LanguageFamily):
    """FLUX.2 klein 4B, base and distilled.

    Latents here are as the VAE has them, `[b, C, h, w]`; that patches of them are normalized and are the transformer's
    tokens is seen in `to_latents` and `predict` alone. Prompts are padded to 512 tokens, which all count.
    """

    name = "flux2_klein"
    label = "FLUX.2 klein"
    tag = "flux2-klein"
    classes = {"transformer": Flux2Transformer2DModel, "text_encoder": Qwen3Model, "vae": AutoencoderKLFlux2}
    pipeline = Flux2KleinPipeline
    pipeline_file = "zoodip_flux2_pipeline.py"
    word_keys = ("qwen3_4b",)  # as ComfyUI calls them
    layers_read = (9, 18, 27)
    thinks = packs = False
    timestep_window = 600, 1000
    settings_of_optimizer = {"zo_adam": {"learning_rate": 5e-3, "max_train_steps": 30_000}}

    def recognises(self, index, configs):
        return index.get("_class_name") == "Flux2KleinPipeline"

    def faults(self, base):
        config, channels = base.denoiser_config, base.vae_config["latent_channels"]
        if config["in_channels"] != PATCH**2 * channels:
            yield (
                f"has a transformer of {config['in_channels']} channels and a VAE of {channels}, of which patches have"
                f" {PATCH**2 * channels}: choose another model"
            )
        width = self.output_width(base)
        if config["joint_attention_dim"] != width:
            yield (
                f"has a transformer for text of width {config['joint_attention_dim']} and a text encoder whose layers"
                f" make {width}: transformer/ or text_encoder/ belongs to another model, get it again"
            )
        if base.text_config.num_hidden_layers < max(self.layers_read):
            yield f"has a text encoder of {base.text_config.num_hidden_layers} layers, too few: get it again"

    def latent_multiple(self, config):
        return PATCH

    def latent_channels(self, base):
        return base.vae_config["latent_channels"]

    def joined(self, states):
        return torch.cat(states, dim=-1)

    def vae_facts(self, vae, config):
        """With the statistics of patches, which are among the VAE's weights."""
        return config | {
            "patch_mean": vae.bn.running_mean.float().cpu(),
            "patch_var": vae.bn.running_var.float().cpu(),
        }

    def to_latents(self, sample, vae_config):
        mean, variance = (vae_config[name].view(1, -1, 1, 1) for name in ("patch_mean", "patch_var"))
        patches = (Flux2KleinPipeline._patchify_latents(sample) - mean) / torch.sqrt(
            variance + vae_config["batch_norm_eps"]
        )
        return Flux2KleinPipeline._unpatchify_latents(patches)

    def image_shift(self, latents, config):
        return compute_empirical_mu((latents.shape[-2] // PATCH) * (latents.shape[-1] // PATCH), STEPS)

    def predict(self, denoiser, noisy, timesteps, text, sizes):
        patches = Flux2KleinPipeline._patchify_latents(noisy)
        found = denoiser(
            hidden_states=Flux2KleinPipeline._pack_latents(patches),
            encoder_hidden_states=text.states,
            timestep=timesteps / 1000,
            img_ids=Flux2KleinPipeline._prepare_latent_ids(patches).to(noisy.device),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(text.states).to(noisy.device),
            return_dict=False,
        )[0]
        return Flux2KleinPipeline._unpatchify_latents(found.permute(0, 2, 1).reshape(patches.shape))
