"""A Stable Diffusion of a few thousand random parameters: real classes and files, and a run of well under a second."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


SIZE = 16  # pixels along the side of its pictures
TOKENIZER = Path(__file__).resolve().parent.parent / "demo" / "base" / "tokenizer"


def build_tiny_base(folder):
    """Writes the base into a new folder; the same weights every time, and the global generator stays as it was.

    The tokenizer is the demo's. A word has 16 entries; a picture of 16 px has 8 x 8 latents.
    """
    folder, width = Path(folder), 16
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPTextModel(text_config(width, layers=1)).save_pretrained(folder / "text_encoder")
        tiny_unet(cross_attention_dim=width).save_pretrained(folder / "unet")
        tiny_vae().save_pretrained(folder / "vae")
    write_schedule_and_index(folder, "StableDiffusionPipeline", safety_checker=None, feature_extractor=None)


def build_tiny_xl_base(folder):
    """The same of SDXL: words of 16 and 24 entries, and what SDXL has that trips: `eos_token_id` 2, padding with "!".

    Random words and cross-attention are amplified, so that what a prompt says matters to the prediction, by whichever
    of the text encoders.
    """
    folder, widths, pooled = Path(folder), (16, 24), 24
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    second = CLIPTokenizer.from_pretrained(TOKENIZER)
    second.pad_token = "!"
    second.save_pretrained(folder / "tokenizer_2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoders = (
            CLIPTextModel(text_config(widths[0], layers=2)),
            CLIPTextModelWithProjection(text_config(widths[1], layers=2, projection_dim=pooled, eos_token_id=2)),
        )
        for name, encoder in zip(("text_encoder", "text_encoder_2"), encoders):
            encoder.get_input_embeddings().weight.data.mul_(10)
            encoder.save_pretrained(folder / name)
        unet = tiny_unet(
            cross_attention_dim=sum(widths),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=pooled + 6 * 8,
        )
        for name, parameter in unet.named_parameters():
            if ".attn2." in name and "norm" not in name:
                parameter.data.mul_(6)
        unet.save_pretrained(folder / "unet")
        tiny_vae().save_pretrained(folder / "vae")
    write_schedule_and_index(
        folder,
        "StableDiffusionXLPipeline",
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        tokenizer_2=["transformers", "CLIPTokenizer"],
        force_zeros_for_empty_prompt=True,
    )


def text_config(width, layers, **more):
    ends = {"bos_token_id": 876, "eos_token_id": 877, "pad_token_id": 877}
    return CLIPTextConfig(
        vocab_size=878,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        **{"projection_dim": width, **ends, **more},
    )


def tiny_unet(**more):
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def tiny_vae():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def write_schedule_and_index(folder, pipeline, **parts):
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if pipeline == "StableDiffusionPipeline":
        index["requires_safety_checker"] = False
    index |= {name: [None, None] if part is None else part for name, part in parts.items()}
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
