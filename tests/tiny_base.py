"""A Stable Diffusion of a few thousand random parameters: real classes and files, and a run of well under a second."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel


SIZE = 16  # pixels along the side of its pictures
TOKENIZER = Path(__file__).resolve().parent.parent / "demo" / "base" / "tokenizer"


def build_tiny_base(folder):
    """Writes the base into a new folder; the same weights every time, and the global generator stays as it was.

    The tokenizer is the demo's. A word has 16 entries; a picture of 16 px has 8 x 8 latents.
    """
    folder, width = Path(folder), 16
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    ends = {"bos_token_id": 876, "eos_token_id": 877, "pad_token_id": 877}
    text = CLIPTextConfig(
        vocab_size=878,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=width,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
        UNet2DConditionModel(
            sample_size=SIZE // 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            mid_block_type=None,
            up_block_types=("UpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=4,
            norm_num_groups=4,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=SIZE,
            mid_block_add_attention=False,
        ).save_pretrained(folder / "vae")
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def build_pictures(folder):
    """Writes three small pictures with captions into a new folder."""
    folder, rng = Path(folder), np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = []
    for name, words in (("a.png", "a {} on the beach"), ("b.png", "my {}"), ("c.png", "a photo of a {}")):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": words}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
