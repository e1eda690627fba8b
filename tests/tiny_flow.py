"""A family from outside: a flow-matching transformer of diffusers' own class, a few thousand random parameters.

The transformer is Stable Diffusion 3's, with both of its CLIP text encoders and without its T5, which its pipeline
allows. Nothing in the package knows of it: a test puts `TINY_FLOW` into the registry, in one line.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_base import SIZE, TOKENIZER, text_config, tiny_vae
from transformers import CLIPTextModelWithProjection

from personalization.models.families import Text
from personalization.models.families.clip import ClipFamily


WIDTHS, STATE_WIDTH, T5_LENGTH = (16, 24), 48, 256


class TinyFlow(ClipFamily):
    """x_σ = (1 - σ) x + σ ε with σ = t / 1000; the transformer predicts where noise flows from, ε - x."""

    name = "tiny_flow"
    label = "Tiny Flow"
    tag = "tiny-flow"
    denoiser = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    classes = {
        "transformer": SD3Transformer2DModel,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "vae": AutoencoderKL,
    }
    scheduler = FlowMatchEulerDiscreteScheduler
    pipeline = StableDiffusion3Pipeline
    pipeline_options = {"text_encoder_3": None, "tokenizer_3": None}
    word_keys = ("clip_l", "clip_g")
    timestep_window = 200, 800
    settings_of_optimizer = {"zo_adam": {"learning_rate": 5e-3, "max_train_steps": 100}}

    def recognises(self, index, configs):
        return index.get("_class_name") == "StableDiffusion3Pipeline"

    def latent_multiple(self, config):
        return config["patch_size"]

    def encode(self, encoders, ids):
        parts = zip(encoders, ids.chunk(2, dim=1))
        outputs = [encoder(part, output_hidden_states=True) for encoder, part in parts]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        states = F.pad(states, (0, STATE_WIDTH - states.shape[-1], 0, T5_LENGTH))  # zeros, too, where T5 would be
        return Text(states, torch.cat([output.text_embeds for output in outputs], dim=-1))

    def noise(self, latents, noise, timesteps, scheduler):
        sigmas = (timesteps / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise, noise - latents

    def predict(self, denoiser, noisy, timesteps, text, sizes):
        return denoiser(noisy, text.states, text.pooled, timesteps, return_dict=False)[0]

    def example(self, base, count, resolution, device="cpu", dtype=torch.float32):
        inputs, made = super().example(base, count, resolution, device, dtype), {"device": device, "dtype": dtype}
        states = torch.zeros(count, base.prompt_length + T5_LENGTH, STATE_WIDTH, **made)
        return inputs._replace(text=Text(states, torch.zeros(count, sum(WIDTHS), **made)))


TINY_FLOW = TinyFlow()


def build_tiny_flow_base(folder):
    """Writes the base into a new folder; the same weights every time, and the global generator stays as it was."""
    folder = Path(folder)
    for name in TinyFlow.tokenizers:
        shutil.copytree(TOKENIZER, folder / name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, width in zip(TinyFlow.text_encoders, WIDTHS):
            encoder = CLIPTextModelWithProjection(text_config(width, layers=2, projection_dim=width))
            encoder.get_input_embeddings().weight.data.mul_(10)  # so that words matter
            encoder.save_pretrained(folder / name)
        SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=STATE_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=sum(WIDTHS),
            pos_embed_max_size=8,
        ).save_pretrained(folder / "transformer")
        vae = tiny_vae()
        vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
        vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = {name: ["transformers", "CLIPTextModelWithProjection"] for name in TinyFlow.text_encoders}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in TinyFlow.tokenizers}
    index |= {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
