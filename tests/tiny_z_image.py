"""A tiny base of Z-Image's kind: diffusers' and transformers' own classes, a few thousand random parameters."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tiny_base import tiny_vae
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model


TOKENIZER = Path(__file__).resolve().parents[1] / "demo" / "base_flow" / "tokenizer"
WIDTH, LAYERS, SHIFT = 16, 3, 3.0


def build_tiny_z_image_base(folder, **scheduler):
    """Writes the base into a new folder; the same weights every time, and the global generator stays as it was."""
    folder = Path(folder)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = tiny_language_model(len(AutoTokenizer.from_pretrained(TOKENIZER)) + 16)
        encoder.save_pretrained(folder / "text_encoder")
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 32, 32],
        )
        for parameter in (transformer.x_pad_token, transformer.cap_pad_token):
            parameter.data.normal_()
        transformer.save_pretrained(folder / "transformer")
        vae = tiny_vae()
        vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
        vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**{"shift": SHIFT, **scheduler}).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def tiny_language_model(words, layers=LAYERS):
    """A `Qwen3Model` with rows for more words than its tokenizer has, as Qwen's own."""
    model = Qwen3Model(
        Qwen3Config(
            vocab_size=words,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=1024,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(10)  # so that words matter
    return model
