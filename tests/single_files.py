"""Writes a base in diffusers format as the single file that it could be of: with the names of CompVis and OpenCLIP.

The inverse of diffusers' conversion, written from the structure of the original code (`input_blocks`, `middle_block`,
`output_blocks`; `encoder.down`, `decoder.up`; `resblocks`), and not from diffusers.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
OPENCLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OPENCLIP |= {"self_attn.out_proj": "attn.out_proj"}


def old_unet_name(name, layers, has_attention):
    """Of a UNet's tensor, by `layers_per_block`; `has_attention(i)`: whether up block i has."""
    for new, old in AROUND.items():
        if name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    block, rest = name.split(".", 1)
    if block == "mid_block":
        kind, number, rest = rest.split(".", 2)
        place = f"middle_block.{2 * int(number) if kind == 'resnets' else 2 * int(number) + 1}"
        return f"{place}.{resnet(rest) if kind == 'resnets' else rest}"
    i, kind, j, rest = rest.split(".", 3)
    i, j = int(i), int(j)
    if block == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(i + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        place = f"input_blocks.{i * (layers + 1) + j + 1}"
    else:
        if kind == "upsamplers":
            return f"output_blocks.{(i + 1) * (layers + 1) - 1}.{2 if has_attention(i) else 1}.{rest}"
        place = f"output_blocks.{i * (layers + 1) + j}"
    return f"{place}.0.{resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def resnet(name):
    part, leaf = name.rsplit(".", 1)
    return f"{RESNET[part]}.{leaf}"


def old_vae_name(name, blocks):
    """Of a VAE's tensor, by the number of its blocks."""
    name = name.replace("conv_norm_out", "norm_out").replace("mid_block.resnets.0", "mid.block_1")
    name = name.replace("mid_block.resnets.1", "mid.block_2").replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{blocks - 1 - int(match[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{blocks - 1 - int(match[1])}.upsample", name)
    for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    return name.replace("conv_shortcut", "nin_shortcut")


def old_openclip(tensors):
    """A text encoder of transformers as OpenCLIP's."""
    found, joined = {}, {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if match and re.fullmatch(r"self_attn\.[qkv]_proj", match[2]):
            joined.setdefault((match[1], match[3]), {})[match[2][10]] = tensor
        elif match:
            found[f"transformer.resblocks.{match[1]}.{OPENCLIP[match[2]]}.{match[3]}"] = tensor
        else:
            old = {"text_projection.weight": "text_projection", "embeddings.position_embedding.weight": None}
            names = {
                "embeddings.position_embedding.weight": "positional_embedding",
                "embeddings.token_embedding.weight": "token_embedding.weight",
                "final_layer_norm.weight": "ln_final.weight",
                "final_layer_norm.bias": "ln_final.bias",
            }
            found[old.get(name) or names[name]] = tensor.T if name in old and old[name] else tensor
    for (layer, leaf), parts in joined.items():
        found[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat([parts[each] for each in "qkv"])
    return found


def old_clip(tensors):
    """CLIP's own, with what transformers wrote into it in 2022."""
    found = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    return found | {"text_model.embeddings.position_ids": torch.arange(3)[None]}


PREFIXES = {  # family -> prefix, and what writes the names, of each text encoder
    "sd1": [("cond_stage_model.transformer.", old_clip)],
    "sd2": [("cond_stage_model.model.", old_openclip)],
    "sdxl": [("conditioner.embedders.0.transformer.", old_clip), ("conditioner.embedders.1.model.", old_openclip)],
}


def as_single_file(family, unet, vae, encoders, unet_config, vae_config):
    """Name -> tensor of the single file; arguments are dicts of tensors and configs of diffusers."""
    layers, ups = unet_config["layers_per_block"], unet_config["up_block_types"]
    of_unet = {old_unet_name(name, layers, lambda i: "CrossAttn" in ups[i]): tensor for name, tensor in unet.items()}
    found = {f"model.diffusion_model.{name}": tensor for name, tensor in of_unet.items()}
    for name, tensor in vae.items():
        old = old_vae_name(name, len(vae_config["block_out_channels"]))
        convolution = ".mid.attn_1." in old and tensor.dim() == 2
        found[f"first_stage_model.{old}"] = tensor[:, :, None, None] if convolution else tensor
    for (prefix, rename), tensors in zip(PREFIXES[family], encoders):
        found |= {prefix + name: tensor for name, tensor in rename(tensors).items()}
    return found | {"alphas_cumprod": torch.zeros(3)}


def read_folder(folder):
    """The tensors of a component in diffusers format."""
    (path,) = Path(folder).glob("*.safetensors")
    return load_file(path)


def write_single_file(path, base, family, configs):
    """Writes a base in diffusers format into a `.safetensors` or `.ckpt`; `configs`: of UNet and VAE."""
    names = ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
    encoders = [read_folder(Path(base) / name) for name in names]
    parts = read_folder(Path(base) / "unet"), read_folder(Path(base) / "vae")
    found = {name: tensor.contiguous() for name, tensor in as_single_file(family, *parts, encoders, *configs).items()}
    if Path(path).suffix == ".ckpt":
        torch.save({"state_dict": found, "global_step": 7}, path)
    else:
        save_file(found, path)
