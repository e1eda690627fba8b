"""SDXL: two text encoders, of both the penultimate states; pooled text and sizes of pictures go to the UNet, too."""

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from .family import Text
from .stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """SDXL.

    Where the second text encoder's config has transformers' old `eos_token_id` of 2, as SDXL's own has, transformers
    pools at the largest id of a prompt, which is the placeholder's and not the end's.
    """

    name = "sdxl"
    label = "Stable Diffusion XL"
    tag = "stable-diffusion-xl"
    mark = "has two text encoders (SDXL)"
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    classes = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "vae": AutoencoderKL,
    }
    padding = (None, "!")
    addition_embed_types = ("text_time",)
    pipeline = StableDiffusionXLPipeline
    pipeline_options = {"add_watermarker": False}
    pipeline_file = "zoodip_xl_pipeline.py"
    word_keys = ("clip_l", "clip_g")  # as kohya, OneTrainer and ComfyUI call the halves of a word
    a1111 = False
    vae_in_float32 = True  # the original one overflows in float16
    crops = pools = True
    timestep_window = 700, 900
    settings_of_optimizer = {"zo_adam": {"learning_rate": 5e-3, "max_train_steps": 20_000, "perturbation_scale": 1e-2}}
    settings_of_lora = {"learning_rate": 1e-4, "zo_learning_rate": 1e-4}  # as in diffusers' and kohya's trainers

    def recognises(self, index, configs):
        return "text_encoder_2" in index and ("unet" in index or "transformer" not in index)

    def fault(self, index):
        if not all(index.get("text_encoder") or [None]):
            return "has text_encoder_2 alone, as SDXL's refiner has: choose the base model beside the refiner"
        return None

    def encode(self, encoders, ids):
        parts = zip(encoders, ids.chunk(2, dim=1))
        first, second = (encoder(part, output_hidden_states=True) for encoder, part in parts)
        return Text(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds)

    def load_word(self, pipeline, token, parts):
        """Each text encoder has a call of its own."""
        for vectors, (text_encoder, tokenizer) in zip(parts.values(), halves(pipeline)):
            pipeline.load_textual_inversion({token: vectors}, text_encoder=text_encoder, tokenizer=tokenizer)

    def unload_words(self, pipeline):
        for text_encoder, tokenizer in halves(pipeline):
            pipeline.unload_textual_inversion(text_encoder=text_encoder, tokenizer=tokenizer)

    def pool_at_end(self, encoders, tokenizers):
        encoders[1].text_model.eos_token_id = tokenizers[1].eos_token_id

    def predict(self, denoiser, noisy, timesteps, text, sizes):
        added = {"text_embeds": text.pooled, "time_ids": sizes}
        return denoiser(noisy, timesteps, text.states, added_cond_kwargs=added, return_dict=False)[0]

    def example(self, base, count, resolution, device="cpu", dtype=torch.float32):
        inputs = super().example(base, count, resolution, device, dtype)
        pooled = torch.zeros(count, base.text_configs[1].projection_dim, device=device, dtype=dtype)
        return inputs._replace(text=inputs.text._replace(pooled=pooled))


def halves(pipeline):
    """The text encoders of a pipeline, each with its tokenizer."""
    return (pipeline.text_encoder, pipeline.tokenizer), (pipeline.text_encoder_2, pipeline.tokenizer_2)
