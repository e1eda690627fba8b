"""Train the demo base model: a small latent diffusion model of the procedural world in `world.py`, and its scorer.

The whole recipe, in the order in which Stable Diffusion came to be, resumable at any moment (run it again)::

    python demo/build_demo_base.py                          # everything, hours on a 2-core CPU
    python demo/build_demo_base.py --keep demo/base         # the same with CLIP and VAE as they are in demo/base
    python demo/build_demo_base.py --smoke --out_dir /tmp/demo --work_dir /tmp/demo/work    # seconds: does it run

Stages (`--stages`): data (pre-rendered scenes), clip (text encoder, contrastive), vae, latents (cached moments at 64
and at 32 px), scorer (an independent CLIPModel), identity (an image encoder of objects), unet (at 32 px first, then
at 64 with a share of 32 px batches), export (`base/`, `scorer/`, `subjects/`). Every batch is drawn from a generator
seeded with (seed, stage, step), however many processes share it: a resumed run sees what an uninterrupted one sees.
A stage that has begun keeps its plan: other settings are refused, not mixed in. On a machine that others use, too,
take `--processes N`, one thread each: the threads of one process lose most of their time waiting for each other.
"""

import personalization.quiet  # noqa: F401, before the libraries that it is about


# isort: split
import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import world
from torch import nn


STAGES = ("data", "clip", "vae", "latents", "scorer", "identity", "unet", "export")
DISTILLED_STAGES = ("pooled", "unet_xl", "unet_eps", "text", "flow", "aligned")  # of build_demo_base_{xl,eps,flow}.py
ATTRIBUTES = {  # name -> its values, in the order of the columns of `scenes_*.npy`
    "shape": world.SHAPES,
    "colour": world.COLOUR_NAMES,
    "colour2": world.COLOUR_NAMES,
    "pattern": world.PATTERNS,
    "background": world.BACKGROUND_NAMES,
}
MAX_LENGTH = 32  # tokens of a prompt, start and end included

# Words beyond those of the captions that get a token of their own: other templates of textual inversion, and what
# people write. They stay untrained unless a caption has them.
EXTRA_WORDS = """an the of in on at with and to from for by my your his her our this that these it is are
photo photograph picture image rendering rendition painting drawing sketch depiction cartoon sculpture art artwork
style close up cropped clean dirty dark bright cool good nice small weird large big old new one many two three
object toy thing item object's figure plush doll shape color colour colored coloured colourful colorful pattern
background scene view top left right center front behind under over inside outside lying standing floating flying
wall floor sky night day sand sea ocean forest garden city street table room house cloth blanket sun moon light
beautiful cute simple plain solid""".split()


# ------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------


def make_parser(description):
    """The arguments of this recipe; those of the distilled bases add their own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--stages", default="all", help=f"comma-separated, of {', '.join(STAGES)}; default all")
    parser.add_argument("--out_dir", type=Path, default=here, help="where base/, scorer/ and subjects/ are written")
    parser.add_argument("--work_dir", type=Path, default=here / ".build", help="caches and checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch, over all processes")
    parser.add_argument("--processes", type=int, default=1, help="that share the batches of the VAE and the UNet")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of matrix products (autocast)")
    parser.add_argument("--keep", type=Path, help="a base whose CLIP and VAE are taken instead of trained anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_renders", type=int, default=50_000, help="pre-rendered training scenes")
    parser.add_argument("--clip_steps", type=int, default=1500)
    parser.add_argument("--vae_steps", type=int, default=4000)
    parser.add_argument("--scorer_steps", type=int, default=6000)
    parser.add_argument("--identity_steps", type=int, default=400)
    parser.add_argument("--unet_steps", type=int, default=10_000, help="in all")
    parser.add_argument("--unet_low_steps", type=int, default=3000, help="the first of them, at 32 px alone")
    parser.add_argument("--unet_low_share", type=float, default=0.2, help="of 32 px batches among the later steps")
    parser.add_argument("--unet_batch", type=int, default=32, help="at 64 px; twice as many at 32 px")
    parser.add_argument("--unet_lr", type=float, default=1e-3)
    parser.add_argument("--unet_lr_decay", type=float, default=0.3, help="last share of the steps, when it falls to 0")
    parser.add_argument("--unet_ema", type=float, default=0.999, help="decay of the moving average of the weights")
    parser.add_argument("--checkpoint_every", type=float, default=90, help="seconds between checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds: few renders, two steps per stage")
    return parser


def parse_args(argv=None):
    parser = make_parser(__doc__)
    args = parser.parse_args(argv)
    args.stages = STAGES if args.stages == "all" else tuple(args.stages.split(","))
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stages {sorted(unknown)}: choose from {', '.join(STAGES)}")
    if args.smoke:
        args.num_renders = 64
        args.clip_steps = args.vae_steps = args.scorer_steps = args.identity_steps = args.unet_steps = 2
        args.unet_low_steps, args.unet_batch = 1, 4
    return make_folders(args)


def make_folders(args):
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    return args


# ------------------------------------------------------------------------------------------------------------------
# Data: pre-rendered scenes
# ------------------------------------------------------------------------------------------------------------------

CHUNK = 500  # renders per seed
SETS = {"wide": world.WIDE_JITTER, "world": world.JITTER}  # of renders, with the jitter of their poses


def render_chunk(job):
    """(seed, chunk, count, jitter) -> images uint8 (count, 64, 64, 3), attribute indices int8 (count, 5)."""
    *seed, count, jitter = job
    rng = np.random.default_rng(seed)
    images, rows = [], []
    for _ in range(count):
        scene = world.sample_scene(rng)
        rows.append([values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()])
        images.append(world.render(scene, rng, jitter))
    return np.stack(images), np.array(rows, np.int8)


def scene_of(row):
    """A row of attribute indices -> the `world.Scene`."""
    return world.Scene(**{name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row, strict=True)})


def stage_data(args):
    """Write `renders_SET.npy` (N, 64, 64, 3) and `scenes_SET.npy` (N, 5) into the work folder.

    The wide set is for the text encoder and the autoencoder (none is needed to keep those), the one of the world
    itself for the rest.
    """
    count = args.num_renders
    for which, jitter in SETS.items():
        if (args.work_dir / f"scenes_{which}.npy").exists() or (which == "wide" and args.keep):
            continue
        started = time.time()
        seed = (args.seed,) if which == "wide" else (args.seed, 1)
        jobs = [(*seed, k, min(CHUNK, count - k * CHUNK), jitter) for k in range(-(-count // CHUNK))]
        workers = min(args.threads, len(jobs))
        if workers > 1:
            with multiprocessing.get_context("fork").Pool(workers) as pool:
                parts = pool.map(render_chunk, jobs, chunksize=1)
        else:
            parts = [render_chunk(job) for job in jobs]
        for name, column in (("renders", 0), ("scenes", 1)):  # scenes last: it says that both are there
            temporary = args.work_dir / f"{name}.tmp.npy"
            np.save(temporary, np.concatenate([part[column] for part in parts]))
            os.replace(temporary, args.work_dir / f"{name}_{which}.npy")
        print(f"data: {count} renders ({which}) in {time.time() - started:.0f} s", flush=True)


class Renders:
    """The pre-rendered scenes: `images(index)` float (B, 3, 64, 64) in [-1, 1], `rows` (N, 5) long."""

    def __init__(self, args, which):
        self.pixels = np.load(args.work_dir / f"renders_{which}.npy")
        self.rows = np.load(args.work_dir / f"scenes_{which}.npy").astype(np.int64)
        self.device = args.device

    def __len__(self):
        return len(self.rows)

    def images(self, index):
        pixels = torch.from_numpy(self.pixels[index]).to(self.device)
        return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ------------------------------------------------------------------------------------------------------------------


def known_words():
    """Every word that must be one token: those of the captions, the templates and `EXTRA_WORDS`, sorted."""
    text = [*world.TEMPLATES, *world.SHAPES, *world.COLOURS, *world.PATTERNS, *world.BACKGROUNDS.values()]
    words = " ".join([*text, *world.NOUNS, *EXTRA_WORDS]).lower()
    return sorted(set(words.replace("{}", " ").replace("-", " ").replace("'", " ").split()))


def make_tokenizer(folder):
    """Write a `CLIPTokenizer` with a small byte-pair vocabulary into `folder` and return it.

    The merges are learned on the known words alone until each is one token; any other text falls back to pieces and
    bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(known_words(), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_LENGTH,
    )
    part = fresh_folder(folder.with_name(f".{folder.name}.{os.getpid()}"))  # several processes may come here at once
    tokenizer.save_pretrained(part)
    folder.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        os.replace(file, folder / file.name)
    part.rmdir()
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, captions, device, padding="max_length"):
    """List of str -> token ids (B, L) on `device`."""
    batch = tokenizer(captions, padding=padding, max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return batch.input_ids.to(device)


# ------------------------------------------------------------------------------------------------------------------
# The training loop all stages share
# ------------------------------------------------------------------------------------------------------------------


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


def learning_rate(step, peak, warmup, decay_from, steps):
    """Linear warm-up, `peak` until the step `decay_from`, then a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, decay_from)
    return peak * 0.5 * (1 + math.cos(math.pi * max(0, step - start) / max(1, steps - start)))


def rank_and_count():
    """(rank, processes) of data-parallel training; (0, 1) outside of it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_share(*batch):
    """What this process computes of a batch that every process has drawn: each (B, ...) -> (B / processes, ...)."""
    rank, processes = rank_and_count()
    return [values[rank::processes] for values in batch]


def average_gradients(parameters):
    """The mean over the processes, in one flat message."""
    gradients = [p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, parts, strict=True):
        gradient.copy_(mean.view(gradient.shape))


def save_atomically(state, path):
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(args, stage):
    """The state that `train` stored, or None."""
    path = args.work_dir / f"{stage}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def train(args, stage, model, loss_of, steps, lr, weight_decay=0.01, lr_decay=1.0, ema_decay=None, **recipe):
    """Train `model` for `steps` AdamW steps, or go on from the checkpoint `STAGE.pt`; return it, frozen.

    `loss_of(step, rng, generator)` draws a batch from the numpy and torch generators of the step and returns
    (loss, {name: 0-d tensor}). The learning rate falls from `lr` to 0 over the last share `lr_decay` of the steps.
    With `ema_decay` the moving average of the weights (diffusers' `EMAModel`) is what is returned, and stored as
    "ema". Raises ValueError where the checkpoint was made otherwise: with another `lr` or `recipe` (whatever else must
    not change on the way), or planned for other `steps` and past the first step at which that makes a difference.
    """
    from diffusers.training_utils import EMAModel

    model.to(args.device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    ema = EMAModel(parameters, decay=ema_decay, foreach=True) if ema_decay else None
    rank, processes = rank_and_count()
    decay_from = round((1 - lr_decay) * steps)
    plan = {"planned": steps, "decay_from": decay_from}
    recipe = {"lr": lr, "precision": args.precision, **recipe}
    start, seconds, log = 0, 0.0, []
    state = load_checkpoint(args, stage)
    if state is not None:
        same_so_far = state["plan"] == plan or state["step"] <= min(decay_from, state["plan"]["decay_from"])
        if state["recipe"] != recipe or not same_so_far:
            before, path = state["plan"] | state["recipe"], args.work_dir / f"{stage}.pt"
            raise ValueError(f"{path} follows the plan {before}, not {plan | recipe}: delete it to train anew")
        model.load_state_dict(state["model"])
        start, seconds, log = state["step"], state["seconds"], state["log"]
        if start < steps:
            optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.load_state_dict(state["ema"])
            ema.to(args.device)
        print(f"{stage}: resumed at step {start} of {steps}", flush=True)

    stage_id = (*STAGES, *DISTILLED_STAGES).index(stage)
    began = saved = printed = time.time()
    printed_step, metrics_sum, counts = start, {}, {}

    def store(step):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state |= {"plan": plan, "recipe": recipe, "seconds": seconds + time.time() - began, "log": log}
        if ema:
            state["ema"] = ema.state_dict()
        save_atomically(state, args.work_dir / f"{stage}.pt")

    model.train()
    for step in range(start, steps):
        rng = np.random.default_rng([args.seed, stage_id, step])
        generator = torch.Generator(args.device).manual_seed(int(rng.integers(2**62)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, min(200, steps // 10 + 1), decay_from, steps)
        loss, metrics = loss_of(step, rng, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if processes > 1:
            average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if rank > 0:
            continue
        if ema:
            ema.step(parameters)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            metrics_sum[name] = metrics_sum.get(name, 0.0) + float(value.detach())
            counts[name] = counts.get(name, 0) + 1

        moment = time.time()
        if moment - printed > 10 or step + 1 == steps:
            means = {name: round(total / counts[name], 4) for name, total in metrics_sum.items()}
            pace = (moment - printed) / (step + 1 - printed_step)
            log.append({"step": step + 1, **means})
            left = pace * (steps - step - 1) / 60
            print(f"{stage} {step + 1}/{steps} {pace:.3f} s/step, {left:.1f} min left {means}", flush=True)
            printed, printed_step, metrics_sum, counts = moment, step + 1, {}, {}
        if moment - saved > args.checkpoint_every:
            store(step + 1)
            saved = time.time()
    if start < steps and rank == 0:
        store(steps)
    if ema:
        ema.copy_to(parameters)
    return model.eval().requires_grad_(False)


def keep(args, stage, part, prefix=""):
    """Make the checkpoint of `stage` from the folder `part` of the base `--keep`, with the record that lies there."""
    from safetensors.torch import load_file

    path = args.work_dir / f"{stage}.pt"
    if path.exists():
        return
    file = next((args.keep / part).glob("*.safetensors"))
    weights = {prefix + name: value.float() for name, value in load_file(file).items()}
    record = json.loads((args.keep / "demo_base.json").read_text())["stages"][stage]
    state = {
        "model": weights,
        "step": record["steps"],
        "plan": {"planned": record["planned"]},
        "recipe": {"kept": True},
    }
    save_atomically(state | {"seconds": record["seconds"], "log": [record["last"]]}, path)
    print(f"{stage}: kept {file}", flush=True)


# ------------------------------------------------------------------------------------------------------------------
# (a) The text encoder, by contrastive learning
# ------------------------------------------------------------------------------------------------------------------


class ConvTower(nn.Module):
    """A small convolutional image encoder: (B, 3, 64, 64) -> (B, width_out)."""

    def __init__(self, width=32, width_out=128):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        layers = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = 2 if i < 3 else 1
            layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.GroupNorm(8, b), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.AvgPool2d(2))
        self.head = nn.Linear(4 * width * 16, width_out)

    def forward(self, images):
        return self.head(self.features(images).flatten(1))


class AttributeHeads(nn.Module):
    """One linear classifier per attribute; only used in training, to reach a fine reading sooner."""

    def __init__(self, width, shape_weight=1):
        super().__init__()
        self.shape_weight = shape_weight
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})

    def loss(self, features, rows, told=None):
        """Mean cross-entropy; rows (B, 5) long; told (B, 5) bool: which attributes the text tells at all."""
        total = 0.0
        for column, (name, head) in enumerate(self.heads.items()):
            losses = F.cross_entropy(head(features).float(), rows[:, column], reduction="none")
            losses = losses * (self.shape_weight if name == "shape" else 1)
            total = total + (losses.mean() if told is None else (losses * told[:, column]).sum() / len(losses))
        return total / len(self.heads)


def draw_captions(rows, rng, single=0.0):
    """Rows (B, 5) -> captions, and told (B, 5) bool in the order of `ATTRIBUTES`; `single` as in `world.caption`."""
    captions, told = [], []
    for row in rows:
        text, (colour, pattern, shape, background) = world.caption(scene_of(row), rng, single=single, return_told=True)
        captions.append(text)
        told.append((shape, colour, colour, pattern, background))
    return captions, torch.tensor(told)


def contrastive_loss(image_features, text_features, scale, rows, told):
    """CLIP's symmetric loss where *every* pair whose caption is true of the image is a positive.

    image_features, text_features: (B, D); rows (B, 5) long; told (B, 5) bool. A caption that tells little is true of
    many images of the batch; as a one-of-B target it would push true pairs apart.
    """
    image_features, text_features = F.normalize(image_features.float()), F.normalize(text_features.float())
    agree = (rows[:, None] == rows[None]) | ~told[:, None]  # (captions, images, attributes)
    target = agree.all(-1).float()
    logits = scale.exp().clamp(max=100) * text_features @ image_features.T
    of_text = -(F.log_softmax(logits, 1) * target / target.sum(1, keepdim=True)).sum(1).mean()
    of_image = -(F.log_softmax(logits, 0) * target / target.sum(0, keepdim=True)).sum(0).mean()
    return (of_text + of_image) / 2


def text_settings(tokenizer, width, layers):
    """The keyword arguments of `CLIPTextConfig`."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "hidden_act": "quick_gelu",
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_text_encoder(tokenizer):
    """The pipeline's text encoder: width 128, 3 layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer, 128, 3)))


class Clip(nn.Module):
    """The contrastive pair of which only the text encoder is kept."""

    def __init__(self, tokenizer, width=128):
        super().__init__()
        self.text = make_text_encoder(tokenizer)
        self.image = ConvTower(32, width)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.image_heads, self.text_heads = AttributeHeads(width), AttributeHeads(width)


def stage_clip(args):
    if args.keep:
        return keep(args, "clip", "text_encoder", prefix="text.")
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.work_dir / "tokenizer")
    renders, model = Renders(args, "wide"), Clip(tokenizer)
    batch = 8 if args.smoke else 128

    def loss_of(step, rng, generator):
        index = rng.integers(len(renders), size=batch)
        rows = renders.rows[index]
        captions, told = draw_captions(rows, rng)
        rows, told = torch.from_numpy(rows).to(args.device), told.to(args.device)
        with autocast(args):
            image = model.image(renders.images(index))
            text = model.text(tokenize(tokenizer, captions, args.device, "longest")).pooler_output
            contrast = contrastive_loss(image, model.text_projection(text), model.scale, rows, told)
            of_image, of_text = model.image_heads.loss(image, rows), model.text_heads.loss(text, rows, told)
        return contrast + of_image + of_text, {"contrast": contrast, "image": of_image, "text": of_text}

    train(args, "clip", model, loss_of, args.clip_steps, lr=1e-3)


def load_text_encoder(args):
    """(tokenizer, frozen text encoder) as far as they are trained."""
    from transformers import CLIPTokenizer

    folder = args.work_dir / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder) if folder.exists() else make_tokenizer(folder)
    torch.manual_seed(args.seed)
    encoder, state = make_text_encoder(tokenizer), load_checkpoint(args, "clip")
    if state:
        encoder.load_state_dict({k[5:]: v for k, v in state["model"].items() if k.startswith("text.")})
    return tokenizer, encoder.to(args.device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------
# (b) The autoencoder
# ------------------------------------------------------------------------------------------------------------------


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.RESOLUTION,
        mid_block_add_attention=False,
    )


def gradients(images):
    """Differences to the right and lower neighbour: (B, C, H, W) -> two tensors."""
    return images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]


def stage_vae(args):
    if args.keep:
        return keep(args, "vae", "vae")
    torch.manual_seed(args.seed + 1)
    renders, vae = Renders(args, "wide"), make_vae().to(memory_format=torch.channels_last)
    batch = 2 if args.smoke else 8

    def loss_of(step, rng, generator):
        (index,) = own_share(rng.integers(len(renders), size=batch))
        images = renders.images(index)
        with autocast(args):
            mean, logvar = vae.quant_conv(vae.encoder(images)).float().chunk(2, 1)
            logvar = logvar.clamp(-20, 5)
            noise = torch.randn((batch, *mean.shape[1:]), generator=generator, device=mean.device)
            (noise,) = own_share(noise)
            output = vae.decoder(vae.post_quant_conv(mean + (0.5 * logvar).exp() * noise)).float()
        squared = F.mse_loss(output, images)
        edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(output), gradients(images), strict=True))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = F.l1_loss(output, images) + 2 * squared + 0.5 * edges + 1e-4 * kl
        return loss, {"psnr": 10 * torch.log10(4 / squared.detach()), "kl": kl.detach()}

    train(args, "vae", vae, loss_of, args.vae_steps, lr=2e-3, weight_decay=0)


def load_vae(args):
    """The frozen autoencoder as far as it is trained, its `scaling_factor` set where the latents were measured."""
    torch.manual_seed(args.seed + 1)
    vae, state = make_vae(), load_checkpoint(args, "vae")
    if state:
        vae.load_state_dict(state["model"])
    if (args.work_dir / "latents.json").exists():
        statistics = json.loads((args.work_dir / "latents.json").read_text())
        vae.register_to_config(scaling_factor=statistics["scaling_factor"])
    return vae.to(args.device).eval().requires_grad_(False)


SIDES = (world.RESOLUTION, world.RESOLUTION // 2)  # px at which the UNet learns, the one of the base first


def stage_latents(args):
    """Cache the moments of every render: `latents_SIDE.npy` float16 (N, 8, SIDE / 4, SIDE / 4), means, log-variances.

    At 32 px a render is downscaled with antialiasing, as Stable Diffusion's pictures were at 256 px.
    """
    if (args.work_dir / "latents.json").exists():
        return
    renders, vae, started, record = Renders(args, "world"), load_vae(args), time.time(), {}
    vae.to(memory_format=torch.channels_last)
    for side in SIDES:
        parts = []
        with torch.no_grad(), autocast(args):
            for chunk in np.array_split(np.arange(len(renders)), -(-len(renders) // 64)):
                images = renders.images(chunk)
                if side < world.RESOLUTION:
                    images = F.interpolate(images, size=side, mode="bilinear", antialias=True)
                parts.append(vae.quant_conv(vae.encoder(images)).half().cpu().numpy())
        moments = np.concatenate(parts)
        mean, logvar = np.split(moments.astype(np.float32), 2, 1)
        np.save(args.work_dir / f"latents_{side}.npy", moments)
        record[str(side)] = {"mean": mean.mean((0, 2, 3)).tolist(), "std": mean.std((0, 2, 3)).tolist()}
        if side == world.RESOLUTION:
            record["scaling_factor"] = 1 / float(np.sqrt(mean.var() + np.exp(logvar).mean()))
    record["seconds"] = time.time() - started
    (args.work_dir / "latents.json").write_text(json.dumps(record, indent=2))
    print(f"latents: {record}", flush=True)


# ------------------------------------------------------------------------------------------------------------------
# (c) The UNet
# ------------------------------------------------------------------------------------------------------------------


def make_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=world.RESOLUTION // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads: diffusers' historic misnomer
        # The pooled text joins the time embedding, computed by the UNet itself from the same text states (as in
        # DeepFloyd IF): through cross-attention alone, shapes do not follow the text within hours of a CPU.
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
        # The time and that text scale the features as well as shift them (as in ADM): 3 to 8 % less loss than shifts
        # alone in a pilot at 32 px, at equal steps (200 to 300).
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=16,
    )


# Stable Diffusion's, for DDPM in training and DPM-Solver in the pipeline.
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise_schedule():
    """The scheduler's settings: the last noise level has no picture left in it."""
    return {
        **BETAS,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # unused by trailing spacing; what StableDiffusionPipeline wants to see
    }


def alphas_cumprod(device):
    from diffusers import DDPMScheduler

    return DDPMScheduler(**noise_schedule()).alphas_cumprod.to(device)


def stage_unet(args):
    """32 px alone for `--unet_low_steps`, then 64 px with a share of 32 px batches: Stable Diffusion's 256 and 512."""
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(args.seed + 2)
    rows = np.load(args.work_dir / "scenes_world.npy").astype(np.int64)
    moments = {side: torch.from_numpy(np.load(args.work_dir / f"latents_{side}.npy")) for side in SIDES}
    scaling_factor = json.loads((args.work_dir / "latents.json").read_text())["scaling_factor"]
    tokenizer, encoder = load_text_encoder(args)
    unet = make_unet().to(args.device)
    if args.device == "cpu":  # the backward pass of torch's fused attention takes half of a whole step there
        unet.set_attn_processor(AttnProcessor())
    alphas = alphas_cumprod(args.device)

    def loss_of(step, rng, generator):
        low = step < args.unet_low_steps or rng.random() < args.unet_low_share
        side, batch = (SIDES[1], 2 * args.unet_batch) if low else (SIDES[0], args.unet_batch)
        index = rng.integers(len(rows), size=batch)
        captions = ["" if rng.random() < 0.1 else world.caption(scene_of(row), rng) for row in rows[index]]
        # Stratified timesteps: one from each of B equal parts, which lowers the variance of the loss.
        times = (rng.permutation(batch) + rng.random(batch)) / batch
        timesteps = torch.from_numpy((times * 1000).astype(np.int64)).to(args.device)
        mean, logvar = moments[side][index].to(args.device).float().chunk(2, 1)
        shape, device = mean.shape, mean.device
        latents = mean + (0.5 * logvar).exp() * torch.randn(shape, generator=generator, device=device)
        noise = torch.randn(shape, generator=generator, device=device)
        latents, noise, timesteps, captions = own_share(latents * scaling_factor, noise, timesteps, captions)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        with autocast(args):
            with torch.no_grad():
                text = encoder(tokenize(tokenizer, captions, device)).last_hidden_state
            output = unet(noisy, timesteps, text).sample
        errors = (output.float() - target).square().mean((1, 2, 3))
        # Low noise counts less, as in min-SNR (Hang et al. 2023); high noise, where the text alone says what to
        # draw, keeps its full weight.
        weight = (5 / ((alpha / (1 - alpha)).flatten() + 5)).clamp(min=0.25)
        return (weight * errors).mean(), {f"mse_{side}": errors.detach().mean()}

    recipe = {"low_steps": args.unet_low_steps, "low_share": args.unet_low_share, "batch": args.unet_batch}
    decays = {"lr_decay": args.unet_lr_decay, "ema_decay": args.unet_ema}
    train(args, "unet", unet, loss_of, args.unet_steps, args.unet_lr, **decays, **recipe)


def load_unet(args):
    """The UNet with its averaged weights, as far as it is trained."""
    torch.manual_seed(args.seed + 2)
    unet, state = make_unet(), load_checkpoint(args, "unet")
    if state:
        for parameter, average in zip(unet.parameters(), state["ema"]["shadow_params"], strict=True):
            parameter.data.copy_(average)
    return unet.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------
# (d) The scorer and the identity encoder
# ------------------------------------------------------------------------------------------------------------------


def make_scorer(tokenizer):
    """A CLIPModel of another width than the base's: a ViT of patch 8 and a two-layer text tower."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": world.RESOLUTION,
        "patch_size": 8,
        "projection_dim": 96,
    }
    text = text_settings(tokenizer, 64, 2)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))
    model.vision_model.embeddings.position_embedding.weight.data[1:] = 0.3 * positions_2d(8, 96)
    return model


def positions_2d(side, width):
    """Sines and cosines of the place on a side x side grid, (side * side, width).

    CLIP's own random positions are a tenth of the patches in size at the start, and shapes, which are nothing but
    places of edges, were not learned from them: 45 % right after 1,400 steps where all else was above 98 %.
    """
    frequency = math.pi / (2 * 16 ** (torch.arange(width // 4) / (width // 4)))
    angle = torch.arange(side)[:, None] * frequency
    one = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)], 2).flatten(0, 1)


class ScorerWithHeads(nn.Module):
    def __init__(self, tokenizer):
        super().__init__()
        self.clip = make_scorer(tokenizer)
        self.heads = AttributeHeads(96, shape_weight=2)


def stage_scorer(args):
    torch.manual_seed(args.seed + 1000)
    renders = Renders(args, "world")
    tokenizer = make_tokenizer(args.work_dir / "tokenizer_scorer")
    model = ScorerWithHeads(tokenizer)
    model.clip.set_attn_implementation("eager")  # on a CPU in bfloat16, torch's fused attention is 30 times slower
    batch = 8 if args.smoke else 128

    def loss_of(step, rng, generator):
        index = rng.integers(len(renders), size=batch)
        rows = renders.rows[index]
        captions, told = draw_captions(rows, rng, single=0.5)
        rows, told = torch.from_numpy(rows).to(args.device), told.to(args.device)
        tokens = tokenize(tokenizer, captions, args.device, "longest")
        with autocast(args):
            vision = model.clip.vision_model(pixel_values=renders.images(index)).pooler_output
            image = model.clip.visual_projection(vision)
            text = model.clip.text_projection(model.clip.text_model(input_ids=tokens).pooler_output)
            contrast = contrastive_loss(image, text, model.clip.logit_scale, rows, told)
            heads = model.heads.loss(vision, rows)
        return contrast + heads, {"contrast": contrast, "heads": heads}

    train(args, "scorer", model, loss_of, args.scorer_steps, lr=1e-3, weight_decay=0.02)


IDENTITY_CONFIG = {  # with `modeling_identity.py` beside it, AutoModel reads the encoder
    "model_type": "demo_identity",
    "architectures": ["IdentityEncoder"],
    "width": 32,
    "width_out": 64,
    "auto_map": {"AutoConfig": "modeling_identity.IdentityConfig", "AutoModel": "modeling_identity.IdentityEncoder"},
}


def stage_identity(args):
    """An encoder that maps renders of one object together, whatever the background and the pose (SupCon)."""
    torch.manual_seed(args.seed + 2000)
    renders = Renders(args, "world")
    model = nn.ModuleDict({"tower": ConvTower(32, 64)})
    _, subject = np.unique(renders.rows[:, :4], axis=0, return_inverse=True)
    order = np.argsort(subject, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(subject[order])) + 1)
    members = [m for m in members if len(m) > 1] or members
    subjects, views = (4, 2) if args.smoke else (48, 3)

    def loss_of(step, rng, generator):
        chosen = rng.choice(len(members), min(subjects, len(members)), replace=False)
        index = np.concatenate([rng.choice(members[k], views, replace=len(members[k]) < views) for k in chosen])
        label = torch.arange(len(chosen), device=args.device).repeat_interleave(views)
        with autocast(args):
            features = model["tower"](renders.images(index))
        features = F.normalize(features.float())
        logits = (features @ features.T / 0.1).fill_diagonal_(-1e4)
        same = (label[:, None] == label[None]).float().fill_diagonal_(0)
        loss = -(F.log_softmax(logits, 1) * same).sum(1).div(same.sum(1)).mean()
        hit = (label[logits.detach().argmax(1)] == label).float().mean()
        return loss, {"nearest_is_same": hit}

    train(args, "identity", model, loss_of, args.identity_steps, lr=1e-3)


# ------------------------------------------------------------------------------------------------------------------
# Export
# ------------------------------------------------------------------------------------------------------------------


def replace_folder(new, final):
    """Put the folder `new` in the place of `final`, which is never seen half written."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(new, final)
    shutil.rmtree(old, ignore_errors=True)


def fresh_folder(path):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def record_stages(args, names):
    """{name: steps, plan, recipe, seconds and last log line} of the stages that have a checkpoint."""
    stages = {}
    for name in names:
        state = load_checkpoint(args, name)
        if state:
            last = state["log"][-1] if state["log"] else {}
            stages[name] = {"steps": state["step"], **state["plan"], **state["recipe"]}
            stages[name] |= {"seconds": round(state["seconds"]), "last": last}
    return stages


def record_machine(args):
    """Versions and hardware."""
    import diffusers
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}" if args.device == "cpu" else args.device
    return {"versions": versions, "hardware": hardware}


def record_of(args):
    """Origin of the weights: settings, steps and seconds of each stage, versions, hardware."""
    stages = record_stages(args, STAGES)
    if (args.work_dir / "latents.json").exists():
        stages["latents"] = json.loads((args.work_dir / "latents.json").read_text())
    skipped = ("stages", "out_dir", "work_dir", "checkpoint_every")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in skipped}
    return {"settings": settings, "stages": stages, **record_machine(args)}


def save_pipeline(pipeline, folder, record):
    """Write a pipeline in float16, and the record of its making, into a fresh `folder`."""
    fresh_folder(folder)
    pipeline.to("cpu", torch.float16).save_pretrained(folder)
    # transformers 5 loads a model in the dtype its config names, diffusers loads the rest in float32: name float32, or
    # a plain `from_pretrained` gets a float16 text encoder beside a float32 UNet and fails at the first image.
    for file in folder.glob("text_encoder*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for file in folder.glob("*/config.json"):  # paths of this machine say nothing elsewhere
        settings = json.loads(file.read_text())
        if settings.pop("_name_or_path", None):
            file.write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "demo_base.json").write_text(json.dumps(record, indent=2) + "\n")


def export_base(args):
    """Write `base/`: the fp16 pipeline from the newest checkpoints; stages not yet trained are random."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    tokenizer, encoder = load_text_encoder(args)
    scheduler = DPMSolverMultistepScheduler(**noise_schedule(), algorithm_type="dpmsolver++", solver_order=2)
    pipeline = StableDiffusionPipeline(
        vae=load_vae(args).cpu(),
        text_encoder=encoder.cpu(),
        tokenizer=tokenizer,
        unet=load_unet(args),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = args.out_dir / ".base.tmp"
    save_pipeline(pipeline, folder, record_of(args))
    replace_folder(folder, args.out_dir / "base")
    print(f"export: {args.out_dir / 'base'}", flush=True)


def export_scorer(args):
    """Write `scorer/` (CLIPModel, tokenizer, preprocessing) and `scorer/identity/`, where they are trained."""
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    state = load_checkpoint(args, "scorer")
    if state is None:
        return
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer_scorer")
    model = make_scorer(tokenizer)
    model.load_state_dict({k[5:]: v for k, v in state["model"].items() if k.startswith("clip.")})
    folder = fresh_folder(args.out_dir / ".scorer.tmp")
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": world.RESOLUTION, "width": world.RESOLUTION}
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        **{"do_resize": True, "size": size, "resample": 3, "do_center_crop": False, "do_convert_rgb": True},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
    identity = load_checkpoint(args, "identity")
    if identity:
        (folder / "identity").mkdir()
        weights = {k.removeprefix("tower."): v.half().contiguous() for k, v in identity["model"].items()}
        save_file(weights, folder / "identity" / "model.safetensors")
        (folder / "identity" / "config.json").write_text(json.dumps(IDENTITY_CONFIG, indent=2) + "\n")
        (folder / "identity" / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
        shutil.copyfile(Path(__file__).with_name("modeling_identity.py"), folder / "identity" / "modeling_identity.py")
    replace_folder(folder, args.out_dir / "scorer")
    print(f"export: {args.out_dir / 'scorer'}", flush=True)


EXPORTED_SUBJECTS = tuple(world.SUBJECTS)[:6]
REFERENCES = 5


def export_subjects(args):
    """Write `subjects/<name>/`: renders of a held-out object on 5 backgrounds, with captions in `metadata.jsonl`."""
    from dataclasses import replace

    folder = fresh_folder(args.out_dir / ".subjects.tmp")
    for number, name in enumerate(EXPORTED_SUBJECTS):
        rng = np.random.default_rng([args.seed, 3000, number])
        (folder / name).mkdir()
        backgrounds = rng.choice(world.BACKGROUND_NAMES, REFERENCES, replace=False)
        scenes = [replace(world.SUBJECTS[name], background=str(background)) for background in backgrounds]
        world.save_pictures(folder / name, [(world.render(scene, rng), scene) for scene in scenes])
    replace_folder(folder, args.out_dir / "subjects")


def stage_export(args):
    export_base(args)
    export_scorer(args)
    export_subjects(args)


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------


PARALLEL = ("vae", "unet")  # stages that `--processes` splits; a contrastive batch must be in one piece


def worker(rank, stage, args):
    """One of the processes of a data-parallel stage."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, args.threads // args.processes))
    store = f"file://{(args.work_dir / 'rendezvous').resolve()}"
    patience = timedelta(days=1)  # a run may be stopped (SIGSTOP) for long and go on
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.processes, timeout=patience)
    globals()[f"stage_{stage}"](args)
    dist.destroy_process_group()


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    for stage in STAGES:
        if stage not in args.stages:
            continue
        if args.processes > 1 and stage in PARALLEL:
            (args.work_dir / "rendezvous").unlink(missing_ok=True)
            torch.multiprocessing.spawn(worker, (stage, args), nprocs=args.processes)
        else:
            globals()[f"stage_{stage}"](args)


if __name__ == "__main__":
    main()
