"""Writes a pipeline of a real architecture with random weights, for memory and speed where no model hub is reached.

    python benchmarks/random_base.py sd15 benchmarks/.cache/sd15

Shapes, layer types and file formats are those of the real model; the tokenizer is the demo's (a small vocabulary in
the real format) beside a token table of the real size. Nothing such a model draws means anything. One component is in
memory at a time; weights are float16 safetensors. An existing complete folder is left as it is.
"""

import argparse
import gc
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


HERE = Path(__file__).resolve().parent
ARCHITECTURES = sorted(path.parent.name for path in (HERE / "configs").glob("*/text_encoder.json"))
TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}  # SDXL has both
TOKENIZER = HERE.parent / "demo" / "base" / "tokenizer"


def build(architecture, folder):
    """Builds `benchmarks/configs/<architecture>` into `folder`; `model_index.json` is written last."""
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    configs = {path.stem: json.loads(path.read_text()) for path in (HERE / "configs" / architecture).glob("*.json")}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        UNet2DConditionModel.from_config(configs["unet"]).save_pretrained(folder / "unet")
        gc.collect()
        AutoencoderKL.from_config(configs["vae"]).save_pretrained(folder / "vae")
        gc.collect()
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        for name in TEXT_ENCODERS.keys() & configs.keys():
            old = {"eos_token_id": 2} if name == "text_encoder_2" else {}  # as SDXL's own config has it
            TEXT_ENCODERS[name](CLIPTextConfig(**configs[name], **special | old)).save_pretrained(folder / name)
            gc.collect()
    finally:
        torch.set_default_dtype(torch.float32)
    tokenizer.model_max_length = configs["text_encoder"]["max_position_embeddings"]
    tokenizer.save_pretrained(folder / "tokenizer")
    paired = {}
    if "text_encoder_2" in configs:
        tokenizer.pad_token = "!"
        tokenizer.save_pretrained(folder / "tokenizer_2")
        paired["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        paired["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        paired |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    DDPMScheduler.from_config(configs["scheduler"]).save_pretrained(folder / "scheduler")
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
    (folder / "model_index.json").write_text(json.dumps(index | paired, indent=2))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(build(arguments.architecture, arguments.folder))
