"""A learned embedding as files that other programs read."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from .runs import atomic_path


def save_embeds(path, placeholder_token, theta):
    """`{placeholder: [k, d]}`, float32: what `load_textual_inversion` of any diffusers reads."""
    with atomic_path(path) as temporary:
        save_file({placeholder_token: theta.detach().cpu().clone()}, temporary, metadata={"format": "pt"})


def save_a1111(path, placeholder_token, theta, step):
    """The `.pt` of the Automatic1111 web UI, plain tensors only (readable with `weights_only=True`)."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": theta.detach().cpu().clone()}}
    with atomic_path(path) as temporary:
        torch.save({**content, "name": placeholder_token, "step": step}, temporary)


def save_full_pipeline(folder, embeds, source, dtype):
    """An unquantized pipeline that knows the new word, in `folder`.

    Args:
        folder: to write.
        embeds: path of a file by `save_embeds`.
        source: `ModelSource` of the base.
        dtype: to save in.
    """
    options = {"revision": source.revision, "variant": source.variant, "dtype": dtype}
    pipeline = StableDiffusionPipeline.from_pretrained(source.name, **options)
    pipeline.load_textual_inversion(str(Path(embeds).parent), weight_name=Path(embeds).name)
    pipeline.save_pretrained(folder)
