"""The kinds of Stable Diffusion that can be trained, and everything that sets them apart.

A family is recognised from `model_index.json` and the width of its words. Where a text encoder has a partner, a word
is a pair of vectors that lie side by side, `[k, d1 + d2]`, and the ids of a prompt lie side by side, too, `[b, 2L]`:
so the algorithm sees one vector and one prompt, whatever the family.
"""

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ..errors import InputError


class StableDiffusion:
    """Stable Diffusion 1.x, and what all families have in common."""

    name = "sd1"
    text_encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    addition_embed_types = (None, "text")  # inputs of the UNet beside noise, time and text: none, or made of the text
    pipeline = StableDiffusionPipeline
    pipeline_options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline_file = "zoodip_pipeline.py"  # travels with a concept
    tag = "stable-diffusion"  # of its model card
    vae_in_float32 = False  # while it encodes
    crops = False  # pictures are cropped, never squeezed, and the UNet is told where
    # The settings of ZOODiP's paper where they depend on the family.
    paper = {"learning_rate": 5e-3, "puts_min_timestep": 500, "puts_max_timestep": 900, "max_train_steps": 30_000}

    @property
    def components(self):
        return ("unet", *self.text_encoders, "vae")

    def join(self, text_encoders):
        """One module that takes prompt ids and returns (text states `[b, L, d]`, ...)."""
        (text_encoder,) = text_encoders
        return text_encoder

    def parts(self, joined):
        """The text encoders of such a module again."""
        return (joined,)

    def added_conditions(self, encoded, size_ids):
        """Keyword arguments of the UNet beside its text states; see the function of this name."""
        return {}


class StableDiffusion2(StableDiffusion):
    """Stable Diffusion 2.x, whose words are 1,024 wide."""

    name = "sd2"
    paper = StableDiffusion.paper | {"learning_rate": 1e-2, "perturbation_scale": 1e-2}


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, of both the penultimate states; pooled text and picture sizes go to the UNet, too."""

    name = "sdxl"
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    addition_embed_types = ("text_time",)
    pipeline = StableDiffusionXLPipeline
    pipeline_options = {"add_watermarker": False}
    pipeline_file = "zoodip_xl_pipeline.py"
    tag = "stable-diffusion-xl"
    vae_in_float32 = True  # the original one overflows in float16
    crops = True
    paper = {"learning_rate": 5e-3, "perturbation_scale": 1e-2, "puts_min_timestep": 700, "puts_max_timestep": 900}
    paper |= {"max_train_steps": 20_000}

    def join(self, text_encoders):
        return PairedTextEncoder(*text_encoders)

    def parts(self, joined):
        return joined.first, joined.second

    def added_conditions(self, encoded, size_ids):
        return added_conditions(encoded, size_ids)


SD1, SD2, SDXL = StableDiffusion(), StableDiffusion2(), StableDiffusionXL()
FAMILIES = {family.name: family for family in (SD1, SD2, SDXL)}
SD2_WIDTH = 1024  # of a word: OpenCLIP ViT-H


def recognise(index, word_width):
    """The family of a base.

    Args:
        index: content of its `model_index.json`.
        word_width: entries of a word of its first text encoder.
    """
    if "text_encoder_2" in index:
        return SDXL
    return SD2 if word_width == SD2_WIDTH else SD1


def added_conditions(encoded, size_ids):
    """Keyword arguments of the UNet beside its text states: pooled text and sizes, {} where there are no sizes.

    Args:
        encoded: what a `PairedTextEncoder` returned.
        size_ids: `[b, 6]`, see `examples.describe_sizes`; `[b, 0]` for the other families.
    """
    if not size_ids.numel():
        return {}
    return {"added_cond_kwargs": {"text_embeds": encoded[1], "time_ids": size_ids}}


def complete_settings(args, family):
    """Fills in the paper's settings for the family of the base; the length of the run is left to `learn_concept`.

    Raises:
        InputError: a setting does not fit the family.
    """
    for name, value in family.paper.items():
        of_other_optimizer = name == "perturbation_scale" and args.optimizer != "zo_adam"
        if getattr(args, name) is None and name != "max_train_steps" and not of_other_optimizer:
            setattr(args, name, value)
    args.center_crop |= family.crops
    if args.puts_min_timestep >= args.puts_max_timestep:
        raise InputError(
            f"--puts_min_timestep {args.puts_min_timestep} must be below --puts_max_timestep"
            f" {args.puts_max_timestep}; the paper uses {family.paper['puts_min_timestep']} and"
            f" {family.paper['puts_max_timestep']}."
        )
    if args.pool_at_eos and len(family.text_encoders) == 1:
        raise InputError("--pool_at_eos is about SDXL's second text encoder, and this model has one: drop the flag.")
    if args.save_a1111 and len(family.text_encoders) == 2:
        raise InputError(
            "--save_a1111 is for Stable Diffusion 1.x and 2.x: drop it, of SDXL Automatic1111 reads"
            " learned_embeds.safetensors itself."
        )


class PairedTextEncoder(torch.nn.Module):
    """SDXL's two text encoders as one.

    Args:
        first: `CLIPTextModel`.
        second: `CLIPTextModelWithProjection`. Where its config has transformers' old `eos_token_id` of 2, as SDXL's
            own has, transformers pools at the largest id of a prompt, which is the placeholder's and not the end's.
    """

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def pool_at(self, token_id):
        """Pools at the first token with this id, as programs other than diffusers do at the end of the prompt."""
        self.second.text_model.eos_token_id = token_id

    def forward(self, ids):
        """Prompt ids `[b, 2L]`, each encoder's own -> text states `[b, L, d1 + d2]`, pooled text `[b, p]`."""
        first, second = ids.chunk(2, dim=1)
        first = self.first(first, output_hidden_states=True)
        second = self.second(second, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds

    def get_input_embeddings(self):
        return PairedRows(self.first.get_input_embeddings(), self.second.get_input_embeddings())

    def set_input_embeddings(self, rows):
        """`PairedRows`, or one module for both."""
        tables = rows.tables if isinstance(rows, PairedRows) else (rows, rows)
        self.first.set_input_embeddings(tables[0])
        self.second.set_input_embeddings(tables[1])


class PairedRows:
    """The token rows of both encoders of a pair, seen as one table.

    Args:
        tables: the script's `PromptRows` of each.
    """

    def __init__(self, *tables):
        self.tables = tables

    def write(self, candidates):
        """Puts candidates `[m, k, d1 + d2]` into the placeholder's rows of both."""
        widths = [table.weight.shape[1] for table in self.tables]
        for table, part in zip(self.tables, candidates.split(widths, dim=-1)):
            table.write(part)

    def check(self, ids):
        """Raises an `IndexError` for ids `[n, 2L]` without a row."""
        for table, part in zip(self.tables, ids.chunk(len(self.tables), dim=-1)):
            table.check(part)
