"""Writes a pipeline of a real architecture with random weights, for memory and speed where no model hub is reached.

    python benchmarks/random_base.py sd15 benchmarks/.cache/sd15

Shapes, layer types and file formats are those of the real model; the tokenizer is that of a demo base (a small
vocabulary in the real format) beside a token table of the real size. Nothing such a model draws means anything. One
component is in memory at a time; weights are safetensors in half precision. An existing complete folder is left as it
is.
"""

import argparse
import gc
import json
import shutil
from pathlib import Path

import diffusers
import torch
import transformers


HERE = Path(__file__).resolve().parent
ARCHITECTURES = sorted(path.parent.name for path in (HERE / "configs").glob("*/text_encoder.json"))
# Of each pipeline class: the demo base whose tokenizer it gets, the precision of its weights, and what else its
# model_index.json says. Schedulers, UNets, VAEs and transformers say in their configs which class they are of.
STABLE_DIFFUSION = {
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
PIPELINES = {
    "StableDiffusionPipeline": ("base", torch.float16, STABLE_DIFFUSION),
    "StableDiffusionXLPipeline": (
        "base",
        torch.float16,
        {
            **STABLE_DIFFUSION,
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        },
    ),
    "ZImagePipeline": (
        "base_flow",
        torch.bfloat16,
        {"text_encoder": ["transformers", "Qwen3Model"], "tokenizer": ["transformers", "Qwen2Tokenizer"]},
    ),
}


def pipeline_of(configs):
    """Name of the pipeline class that an architecture's configs are of."""
    if "transformer" in configs:
        return "ZImagePipeline"
    return "StableDiffusionXLPipeline" if "text_encoder_2" in configs else "StableDiffusionPipeline"


def build(architecture, folder):
    """Builds `benchmarks/configs/<architecture>` into `folder`; `model_index.json` is written last."""
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    configs = {path.stem: json.loads(path.read_text()) for path in (HERE / "configs" / architecture).glob("*.json")}
    pipeline = pipeline_of(configs)
    demo, dtype, entries = PIPELINES[pipeline]
    index = {"_class_name": pipeline, **entries}
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE.parent / "demo" / demo / "tokenizer")
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        for name in sorted(configs, key=lambda name: (name.startswith("text_encoder"), name != "unet", name)):
            if name.startswith("text_encoder"):
                build_text_encoder(index[name][1], configs[name], tokenizer).save_pretrained(folder / name)
            else:
                made = configs[name]["_class_name"]
                getattr(diffusers, made).from_config(configs[name]).save_pretrained(folder / name)
                index[name] = ["diffusers", made]
            gc.collect()
    finally:
        torch.set_default_dtype(torch.float32)
    if pipeline != "ZImagePipeline":
        tokenizer.model_max_length = configs["text_encoder"]["max_position_embeddings"]
    tokenizer.save_pretrained(folder / "tokenizer")
    if "tokenizer_2" in index:
        tokenizer.pad_token = "!"
        tokenizer.save_pretrained(folder / "tokenizer_2")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def build_text_encoder(made, config, tokenizer):
    """A text encoder of the class called `made`, whose special tokens are those of the tokenizer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if made == "CLIPTextModelWithProjection":
        special["eos_token_id"] = 2  # as SDXL's own config has it
    encoder = getattr(transformers, made)
    return encoder(encoder.config_class(**config, **special))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(build(arguments.architecture, arguments.folder))
