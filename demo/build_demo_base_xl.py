"""Teach the demo base to a pipeline of SDXL's kind: two text encoders, pooled text and picture sizes.

::

    python demo/build_demo_base.py --stages data,clip,vae,latents --keep demo/base --num_renders 20000
    python demo/build_demo_base_xl.py                   # under an hour on one core; resumable (run it again)

`demo/base_eps` is the teacher, and nearly all weights start as its own. The first text encoder is the teacher's with
one layer more, so that its penultimate states are those that the teacher normalizes; the UNet's projections of text
take over that normalization. The second encoder is new: stage "pooled" teaches its pooled text to say what the
teacher's UNet made of all text states; stage "unet_xl" then lets the UNet predict what the teacher predicts, of the
same noisy latents. In half of the examples the text is pooled at an earlier word than its end, as diffusers does for
new words (at the largest token id), so that the base also listens to what follows it. The VAE is a link to the
teacher's. What the teacher predicts, noise or velocities, on which schedule, the pupil predicts, too.
"""

import os
import shutil

import build_demo_base as demo
import distillation
import numpy as np
import torch
import world
from torch import nn


WIDTH, LAYERS, POOLED = 64, 2, 128  # of the second text encoder
SIZE_WIDTH = 16  # sines and cosines of each of the six sizes
SETTINGS = ("seed", "pooled_steps", "xl_steps", "precision")  # in the record


# ------------------------------------------------------------------------------------------------------------------
# The models
# ------------------------------------------------------------------------------------------------------------------


def make_first_encoder(teacher):
    """The teacher's text encoder with a last layer that changes nothing."""
    from transformers import CLIPTextConfig, CLIPTextModel

    layers = teacher.encoder.config.num_hidden_layers
    settings = teacher.encoder.config.to_dict() | {"num_hidden_layers": layers + 1}
    encoder = CLIPTextModel(CLIPTextConfig(**settings))
    encoder.load_state_dict(teacher.encoder.state_dict(), strict=False)
    for parameter in encoder.encoder.layers[layers].parameters():
        parameter.data.zero_()
    return encoder.eval().requires_grad_(False)


def make_second_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    settings = demo.text_settings(tokenizer, WIDTH, LAYERS) | {"projection_dim": POOLED, "eos_token_id": 2}
    return CLIPTextModelWithProjection(CLIPTextConfig(**settings))


def make_unet(teacher):
    """The teacher's UNet for text states of both encoders, pooled text and sizes."""
    from diffusers import UNet2DConditionModel

    config = dict(teacher.unet.config)
    del config["addition_embed_type_num_heads"]
    config |= {
        "cross_attention_dim": teacher.encoder.config.hidden_size + WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": POOLED + 6 * SIZE_WIDTH,
    }
    return UNet2DConditionModel.from_config(config)


def take_over(unet, teacher):
    """Starts a UNet as the teacher's: projections of text include the normalization that their input no longer has."""
    state, norm = teacher.unet.state_dict(), teacher.encoder.final_layer_norm
    width = norm.weight.numel()
    captions = [world.caption(world.sample_scene(rng), rng) for rng in [np.random.default_rng(5)] for _ in range(256)]
    with torch.no_grad():
        states = teacher.encoder(demo.tokenize(teacher.tokenizer, captions, "cpu"), output_hidden_states=True)
    spread = states.hidden_states[-1].std(dim=-1, correction=0)
    spread = spread[:, 1:].median()  # the first token's is another
    centre = torch.eye(width) - 1 / width
    for name in [name for name in state if ".attn2.to_k." in name or ".attn2.to_v." in name]:
        weight = state[name]
        if ".to_v." in name:  # what the norm adds to all states alike, attention passes on whole
            out = name.replace("to_v.weight", "to_out.0")
            state[f"{out}.bias"] = state[f"{out}.bias"] + state[f"{out}.weight"] @ (weight @ norm.bias)
        folded = (weight * norm.weight) @ centre / spread
        state[name] = torch.cat([folded, torch.zeros(len(folded), WIDTH)], dim=1)
    own = {name: value for name, value in state.items() if not name.startswith("add_embedding.")}
    missing, unknown = unet.load_state_dict(own, strict=False)
    assert not unknown and all(name.startswith("add_embedding.") for name in missing)


class Student(nn.Module):
    """What is trained: the UNet and the second text encoder."""

    def __init__(self, teacher):
        super().__init__()
        self.second, self.unet = make_second_encoder(teacher.tokenizer), make_unet(teacher)
        take_over(self.unet, teacher)

    def encode(self, ids, places):
        """Prompt ids `[B, L]` -> penultimate states `[B, L, d]`, and the text `[B, p]` pooled at `places` `[B]`."""
        encoded = self.second(ids, output_hidden_states=True)
        last = encoded.last_hidden_state[torch.arange(len(ids), device=ids.device), places]
        return encoded.hidden_states[-2], self.second.text_projection(last)

    def added(self, pooled, size_ids):
        """What pooled text and sizes add to the embedding of time."""
        sizes = self.unet.add_time_proj(size_ids.flatten()).view(len(pooled), -1)
        return self.unet.add_embedding(torch.cat([pooled, sizes], dim=-1))


def draw_places(ids, rng):
    """Where texts are pooled: at their end, or (half of them) at an earlier word."""
    ends = ids.argmax(dim=1).cpu().numpy()
    early = rng.integers(1, np.maximum(ends, 2))
    return torch.from_numpy(np.where(rng.random(len(ends)) < 0.5, ends, early)).to(ids.device)


def draw_sizes(rng, count, side, device):
    """`time_ids` `[count, 6]`: pictures that were larger once, whole or cropped."""
    original = rng.choice([64, 64, 128, 256, 512], size=(count, 2))
    crop = rng.integers(0, 33, size=(count, 2)) * (rng.random((count, 1)) < 0.25)
    target = np.full((count, 2), side)
    return torch.from_numpy(np.concatenate([original, crop, target], axis=1)).float().to(device)


# ------------------------------------------------------------------------------------------------------------------
# Stages
# ------------------------------------------------------------------------------------------------------------------


def draw_captions(rng, count):
    return [world.caption(world.sample_scene(rng), rng) for _ in range(count)]


def stage_pooled(args, teacher, student):
    """The second encoder's pooled text learns to add what the teacher's UNet adds to the embedding of time."""
    model = nn.ModuleDict({"second": student.second, "add_embedding": student.unet.add_embedding})
    pool = teacher.unet.add_embedding

    def loss_of(step, rng, generator):
        ids = demo.tokenize(teacher.tokenizer, draw_captions(rng, 128), args.device)
        with torch.no_grad():
            target = pool(teacher.text(ids))
        _, pooled = student.encode(ids, draw_places(ids, rng))
        found = student.added(pooled, draw_sizes(rng, len(ids), 64, args.device))
        loss = (found - target).square().mean()
        return loss, {"share": loss.detach() / target.var(dim=0).mean()}

    demo.train(args, "pooled", model, loss_of, args.pooled_steps, lr=2e-3)
    model.requires_grad_(True)


def stage_unet(args, teacher, first, student):
    """The UNet predicts what the teacher predicts."""
    from diffusers.models.attention_processor import AttnProcessor

    latents = distillation.Latents(args, teacher.alphas)
    student.unet.set_attn_processor(AttnProcessor())
    device = args.device

    def loss_of(step, rng, generator):
        batch = latents.draw(rng, generator)
        ids = demo.tokenize(teacher.tokenizer, batch.captions, device)
        with demo.autocast(args):
            target = teacher.predict(batch.noisy, batch.timesteps, ids)
            with torch.no_grad():
                states = first(ids, output_hidden_states=True).hidden_states[-2]
            more, pooled = student.encode(ids, draw_places(ids, rng))
            said = torch.from_numpy(~batch.empty).float().to(device)  # SDXL's empty prompt is zeros
            states = torch.cat([states, more], dim=-1) * said[:, None, None]
            sizes = draw_sizes(rng, len(ids), batch.side, device)
            added = {"text_embeds": pooled * said[:, None], "time_ids": sizes}
            output = student.unet(batch.noisy, batch.timesteps, states, added_cond_kwargs=added).sample
        errors = distillation.squared_errors(output, target, batch.alpha, teacher.prediction_type)
        return errors.mean(), distillation.noisy_and_clear(errors, batch.alpha)

    options = {"weight_decay": 0.0, "lr_decay": 0.6, "ema_decay": 0.995}
    demo.train(args, "unet_xl", student, loss_of, args.xl_steps, 5e-4, **options)


def export(args, teacher, first, student):
    """Writes `base_xl/`, the float16 pipeline."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    second_tokenizer = CLIPTokenizer.from_pretrained(args.teacher / "tokenizer")
    second_tokenizer.pad_token = "!"  # as SDXL's
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(args.teacher / "vae"),
        text_encoder=first,
        text_encoder_2=student.second,
        tokenizer=teacher.tokenizer,
        tokenizer_2=second_tokenizer,
        unet=student.unet,
        scheduler=DPMSolverMultistepScheduler.from_pretrained(args.teacher / "scheduler"),
        add_watermarker=False,
    )
    folder = distillation.export(args, pipeline, "base_xl", ("pooled", "unet_xl"), SETTINGS)
    if args.out_dir.resolve() == args.teacher.resolve().parent:
        shutil.rmtree(folder / "vae")
        os.symlink(f"../{(args.teacher / 'vae').resolve().parent.name}/vae", folder / "vae")  # no link to a link
    demo.replace_folder(folder, args.out_dir / "base_xl")
    print(f"export: {args.out_dir / 'base_xl'}", flush=True)


def main(argv=None):
    args = distillation.parse_args(argv, __doc__, "base_eps", pooled_steps=800, xl_steps=2500)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed + 3)
    teacher = distillation.Teacher(args)
    first, student = make_first_encoder(teacher).to(args.device), Student(teacher).to(args.device)
    if demo.load_checkpoint(args, "unet_xl") is None:
        stage_pooled(args, teacher, student)
    stage_unet(args, teacher, first, student)
    export(args, teacher, first, student)


if __name__ == "__main__":
    main()
