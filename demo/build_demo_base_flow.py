"""Teach the demo base to a pipeline of Z-Image's kind: a transformer for flow matching, a language model for the text.

::

    python demo/build_demo_base.py --stages data,clip,vae,latents --keep demo/base --num_renders 20000
    python demo/build_demo_base_flow.py --precision fp32        # an hour and a half; resumable (run it again)

`demo/base` is the teacher. Stage "text" teaches a small Qwen3 to say of each word of a caption, and of its end, what
the teacher's CLIP says there: both read from left to right. Stage "flow" lets language model and transformer predict
what the teacher predicts of the same noisy latents. A velocity of the teacher's kind and one of flow matching are the
same knowledge: with α of the latents' variance left, σ = √(1-α) / (√α + √(1-α)), and the latents differ by a factor
and by the shift of the VAE. In stage "aligned" a layer of the transformer also learns what the middle of the teacher's
UNet says of each place, see `Features`. The VAE's weights are a link to the teacher's.

Prompts are in Qwen3's chat format, as the pipeline writes them.
"""

import json
import os

import build_demo_base as demo
import distillation
import numpy as np
import torch
import world
from torch import nn


WORD_WIDTH, TEXT_LAYERS = 128, 4  # of the language model, whose last layer the pipeline does not read
WIDTH, HEADS, LAYERS, REFINERS = 192, 6, 6, 1  # of the transformer
SHIFT = 3.0  # of the noise levels that pictures are drawn with, Z-Image's own
BATCH = 16
SETTINGS = ("seed", "text_steps", "flow_steps", "aligned_steps", "precision")  # in the record
CHAT = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{%- endif %}"""


# ------------------------------------------------------------------------------------------------------------------
# The models
# ------------------------------------------------------------------------------------------------------------------


def make_tokenizer():
    """Qwen's tokenizer with a small vocabulary: each known word is a token, with a space before it and without."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    words = [*demo.known_words(), "user", "assistant", "-tone", "-up"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=10**5, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    content = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=content["vocab"],
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_text_encoder(teacher, tokenizer):
    """A small Qwen3 whose words begin as those of the teacher's CLIP."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WORD_WIDTH,
        intermediate_size=3 * WORD_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = Qwen3Model(config)
    rows = teacher.encoder.get_input_embeddings().weight
    words = [tokenizer.decode([number]).strip() for number in range(len(tokenizer))]
    with torch.no_grad():
        for row, word in zip(model.embed_tokens.weight, words, strict=True):
            ids = teacher.tokenizer(word, add_special_tokens=False).input_ids
            if len(ids) == 1:
                row.copy_(rows[ids[0]])
    return model


def make_transformer():
    """A `ZImageTransformer2DModel` whose blocks change nothing at first (adaLN-zero, as in DiT)."""
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=LAYERS,
        n_refiner_layers=REFINERS,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=WORD_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 64, 64],
    )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if "adaLN" in name or "all_final_layer" in name:
                nn.init.zeros_(layer.weight)
    for token in (model.x_pad_token, model.cap_pad_token):
        nn.init.normal_(token, std=0.02)
    return model


class Student(nn.Module):
    """What is trained: the language model and the transformer."""

    def __init__(self, teacher, tokenizer):
        super().__init__()
        self.text_encoder, self.transformer = make_text_encoder(teacher, tokenizer), make_transformer()

    def states(self, batch):
        """The states of tokens that the pipeline reads `[B, L, d]`, of a batch of the tokenizer."""
        mask = batch["attention_mask"].bool()
        ids = batch["input_ids"]
        return self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]

    def forward(self, noisy, sigma, batch):
        """The flow's velocity, noise less picture `[B, C, h, w]`, of latents noised to levels `[B]`."""
        texts = [states[mask] for states, mask in zip(self.states(batch), batch["attention_mask"].bool(), strict=True)]
        pictures = list(noisy.unsqueeze(2))
        return -torch.stack(self.transformer(pictures, 1 - sigma, texts, return_dict=False)[0]).squeeze(2)


def tokenize(tokenizer, captions, device, **options):
    """Captions as the pipeline hands them to the language model, padded to the longest."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for caption in captions
    ]
    return chats, tokenizer(chats, padding=True, return_tensors="pt", **options).to(device)


# ------------------------------------------------------------------------------------------------------------------
# Stages
# ------------------------------------------------------------------------------------------------------------------


def aligned_states(teacher, captions, chats, batch):
    """What the teacher's CLIP says at the tokens of a batch `[B, L, d]`, and where it says anything `[B, L]`.

    A token is told what CLIP says of the text up to the same letter; those that follow the caption, what it says at
    the end.
    """
    clip = teacher.tokenizer(
        captions, padding="max_length", max_length=demo.MAX_LENGTH, truncation=True, return_offsets_mapping=True
    )
    states = teacher.text(torch.tensor(clip.input_ids, device=batch["input_ids"].device))
    offsets, mask = batch["offset_mapping"], batch["attention_mask"].bool()
    targets, known = torch.zeros(*mask.shape, states.shape[-1], device=states.device), torch.zeros_like(mask)
    for i, (caption, chat) in enumerate(zip(captions, chats, strict=True)):
        start = chat.index("\n") + 1
        length = len(caption)
        end = clip.input_ids[i].index(teacher.tokenizer.eos_token_id)
        place = {last: j for j, (_, last) in enumerate(clip.offset_mapping[i][:end]) if j}
        for j in range(int(mask[i].sum())):
            last = int(offsets[i, j, 1]) - start
            source = end if last > length else place.get(last)
            if source is not None and last > 0:
                targets[i, j], known[i, j] = states[i, source], True
    return targets, known


def stage_text(args, teacher, tokenizer, student):
    """The language model learns to say what the teacher's CLIP says."""

    def loss_of(step, rng, generator):
        captions = [world.caption(world.sample_scene(rng), rng) for _ in range(64)]
        captions[::16] = [""] * len(captions[::16])
        chats, batch = tokenize(tokenizer, captions, args.device, return_offsets_mapping=True)
        targets, known = aligned_states(teacher, captions, chats, batch)
        errors = (student.states(batch) - targets)[known].square()
        return errors.mean(), {"share": errors.detach().mean() / targets[known].var(dim=0).mean()}

    demo.train(args, "text", student.text_encoder, loss_of, args.text_steps, lr=2e-3)
    student.text_encoder.requires_grad_(True)


def flow_levels(alpha):
    """σ of flow matching `[B, 1, 1, 1]` at which as much of the picture is left as where it has the share α."""
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    return noise / (signal + noise)


class Features(nn.Module):
    """Reads off a layer of the student what the middle of the teacher's UNet says of each token of the picture.

    The UNet's middle has as many places as the transformer has tokens of a picture, and its states say early on what
    shape and colours the text asks for.
    """

    LAYER = 2  # of the transformer, counted from 0
    WEIGHT = 0.5  # of their error

    def __init__(self, teacher, student):
        super().__init__()
        width = teacher.unet.config.block_out_channels[-1]
        self.student, self.head = student, nn.Linear(WIDTH, width)
        self.wanted = self.found = None
        teacher.unet.mid_block.register_forward_hook(self.keep_wanted)
        student.transformer.layers[self.LAYER].register_forward_hook(self.keep_found)

    def keep_wanted(self, module, given, output):
        self.wanted = output

    def keep_found(self, module, given, output):
        self.found = output

    def error(self):
        """The mean squared error of the features, in units of their variance."""
        wanted = self.wanted.float().flatten(2).transpose(1, 2)  # [B, places, width]
        error = (self.head(self.found[:, : wanted.shape[1]]) - wanted).square()
        return (error.mean((0, 1)) / wanted.var((0, 1))).mean()


def stage_flow(args, teacher, tokenizer, student, shift, name, steps, lr_decay, features=None):
    """The student predicts what the teacher predicts; with `Features`, these as well."""
    latents = distillation.Latents(args, teacher.alphas, low_share=0.0, size=BATCH)

    def loss_of(step, rng, generator):
        batch = latents.draw(rng, generator)
        ids = demo.tokenize(teacher.tokenizer, batch.captions, args.device)
        _, texts = tokenize(tokenizer, batch.captions, args.device)
        signal, noise = batch.alpha.sqrt(), (1 - batch.alpha).sqrt()
        sigma = flow_levels(batch.alpha)
        with demo.autocast(args):
            velocity = teacher.predict(batch.noisy, batch.timesteps, ids)
            noisy = batch.noisy / (signal + noise) - (1 - sigma) * shift
            output = student(noisy, sigma.flatten(), texts)
        picture = signal * batch.noisy - noise * velocity
        target = (noise * batch.noisy + signal * velocity) - (picture - shift)
        errors = (output.float() - target).square().mean((1, 2, 3))
        told = distillation.noisy_and_clear(errors, batch.alpha)
        if features is None:
            return errors.mean(), told
        error = features.error()
        return errors.mean() + features.WEIGHT * error, told | {"features": error}

    options = {"weight_decay": 0.0, "lr_decay": lr_decay, "ema_decay": 0.995, "batch": BATCH}
    demo.train(args, name, features or student, loss_of, steps, 1e-3, **options)
    student.requires_grad_(True)


def vae_shift(args):
    """The mean of the latents, the VAE's `shift_factor`."""
    record = json.loads((args.work_dir / "latents.json").read_text())
    return float(np.mean(record["64"]["mean"]))


def export(args, tokenizer, student):
    """Writes `base_flow/`, the float16 pipeline."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline

    vae = AutoencoderKL.from_pretrained(args.teacher / "vae")
    vae.register_to_config(shift_factor=vae_shift(args))
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=student.text_encoder,
        tokenizer=tokenizer,
        transformer=student.transformer,
    )
    folder = distillation.export(args, pipeline, "base_flow", ("text", "flow", "aligned"), SETTINGS)
    if args.out_dir.resolve() == args.teacher.resolve().parent:
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        weights.unlink()
        os.symlink(f"../../{args.teacher.name}/vae/{weights.name}", weights)
    demo.replace_folder(folder, args.out_dir / "base_flow")
    print(f"export: {args.out_dir / 'base_flow'}", flush=True)


def main(argv=None):
    args = distillation.parse_args(argv, __doc__, text_steps=300, flow_steps=900, aligned_steps=1900)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed + 4)
    teacher, tokenizer = distillation.Teacher(args), make_tokenizer()
    student = Student(teacher, tokenizer).to(args.device)
    scale = json.loads((args.teacher / "vae" / "config.json").read_text())["scaling_factor"]
    features = Features(teacher, student)
    given = args, teacher, tokenizer, student, vae_shift(args) * scale
    if demo.load_checkpoint(args, "aligned") is None:
        if demo.load_checkpoint(args, "flow") is None:
            stage_text(args, teacher, tokenizer, student)
        stage_flow(*given, "flow", args.flow_steps, lr_decay=0.0)
    stage_flow(*given, "aligned", args.aligned_steps, lr_decay=0.5, features=features)
    export(args, make_tokenizer(), student)  # a fresh one: the other would be saved with its last padding


if __name__ == "__main__":
    main()
