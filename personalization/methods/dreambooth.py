"""What DreamBooth trainers share: subject and class, their pictures and prompts, the loss with prior preservation."""

import contextlib
import hashlib
import itertools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..data import examples, images, prompts
from ..data.captions import mark_concept, some
from ..data.examples import Concept
from ..errors import InputError, plain, quoted
from ..files import atomic_path, check_apart, check_writable
from ..flags import NOTHING, SHARE, Range
from ..logs import get_logger
from ..models import base_model, memory
from ..models.base_model import StoredModel
from ..models.families import Text
from ..runs import validation


logger = get_logger(__name__)

# =====================================================================================================
# Flags
# =====================================================================================================

PRIOR_DEFAULTS = {"num_class_images": 100, "prior_loss_weight": 1.0}  # where the prior is preserved

CROPS = "Crop the centre square: here always, as diffusers' scripts crop."  # help of --center_crop

REFUSED_FLAGS = {
    "--train_text_encoder": "the text encoder is frozen, and leaves once the prompts are encoded: drop it.",
    "--pre_compute_text_embeddings": "prompts are always encoded once, before training: drop it.",
    "--sample_batch_size": "class images are drawn one at a time: drop it.",
    "--prior_generation_precision": "class images are drawn by the quantized model, as trained: drop it.",
    "--train_data_dir": "it is called --instance_data_dir here.",
    "--placeholder_token": "no word is added: --subject_name is any words that the model can read.",
    "--enable_xformers_memory_efficient_attention": "PyTorch's own fused attention is always on: drop the flag.",
    "--dataloader_num_workers": "latents are computed once, before training, so nothing is loaded in a step: drop it.",
    "--snr_gamma": "the loss weighs all timesteps alike, as the paper's: drop it.",
    "--offset_noise": "noise is as the base was trained with: drop it.",
    "--lr_power": "--lr_scheduler polynomial has the power 1: drop it.",
    "--validation_epochs": "use --validation_steps.",
    "--local_rank": "accelerate launch sets the rank: drop the flag.",
}


def add_subject_arguments(add):
    """Adds the flags of the subject, its class and their prompts."""
    add("--instance_prompt", help='Prompt of the pictures that have no caption: "a photo of sks dog".')
    add("--subject_name", help="Words for the subject, which {} in captions and prompts stands for: sks dog.")
    mirrored = "Share of the draws that mirror an image; 0 if sides matter."
    add("--flip_probability", type=float, default=0.0, limits=SHARE, page=True, help=mirrored)
    prior = "Also train on images of the class, to keep it."
    add("--with_prior_preservation", action="store_true", help=prior)
    add(
        "--class_data_dir",
        path=True,
        decides=NOTHING,  # beside the pictures in it
        help="Folder of class images; those that are missing are drawn into it.",
    )
    add("--class_prompt", help='Prompt of class images: "a photo of a dog".')
    add(
        "--num_class_images",
        type=int,
        limits=Range(1, 10**6),
        decides=NOTHING,  # beside the pictures that it comes to
        help="Number of class images; missing ones are drawn by the quantized base, with the settings of validation"
        f" images. Default: {PRIOR_DEFAULTS['num_class_images']}.",
    )
    weight = f"λ: weight of the class images' loss. Default: {PRIOR_DEFAULTS['prior_loss_weight']:g}."
    add("--prior_loss_weight", type=float, limits=Range(0.0, 1e6), help=weight)


def add_backward_arguments(add):
    """Adds the flags of a backward pass."""
    longest = "Length that longer gradients are shortened to."
    add("--max_grad_norm", type=float, default=1.0, limits=Range(0.0, 1e30, above=True), page=True, help=longest)
    less = "Compute activations twice to keep fewer of them."
    add("--gradient_checkpointing", action="store_true", decides=NOTHING, page=True, help=less)


def check_subject_arguments(parser, args):
    """Ends with exit code 2 and one sentence where the flags of `add_subject_arguments` do not go together."""
    for name in ("class_prompt", "class_data_dir"):
        value = getattr(args, name)
        if value is not None and not args.with_prior_preservation:
            parser.error(f"--{name} is for --with_prior_preservation: add that or drop it.")
        if value is None and args.with_prior_preservation:
            parser.error(f"--with_prior_preservation needs --{name}.")
    for name, default in PRIOR_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.with_prior_preservation:
            parser.error(f"--{name} is for --with_prior_preservation: add that or drop it.")
    for name in ("instance_prompt", "subject_name", "class_prompt"):
        value = getattr(args, name)
        if value is not None and not value.strip():
            parser.error(f"--{name} is empty: drop it or say something.")
        try:
            prompts.check_quotes(value or "", f"--{name}")
        except InputError as error:
            parser.error(str(error))
    if args.with_prior_preservation and args.use_aspect_ratio_buckets:
        parser.error("--use_aspect_ratio_buckets and --with_prior_preservation, whose images are squares: drop one.")
    if args.subject_name is not None and "{}" in args.subject_name:
        parser.error("--subject_name is what {} stands for: give words without {}.")
    if "{}" in (args.class_prompt or ""):
        parser.error("--class_prompt is of the class and {} the subject: name the class, as in a photo of a dog.")


def check_class_folder(args):
    """Makes sure that missing class images can be written, and lie apart from the subject's and the base model.

    Raises:
        InputError: they cannot, or do not.
    """
    for name in ("instance_data_dir", "pretrained_model_name_or_path"):
        if getattr(args, name) is not None and os.path.exists(getattr(args, name)):
            check_apart(f"--{name}", getattr(args, name), args.class_data_dir, "--class_data_dir")
    if not os.path.isdir(args.class_data_dir) or missing_class_images(args) > 0:
        check_writable("--class_data_dir", args.class_data_dir)


def missing_class_images(args):
    """How many class images are to be drawn."""
    return args.num_class_images - len(images.list_folder(args.class_data_dir, "--class_data_dir").pictures)


# =====================================================================================================
# Prompts
# =====================================================================================================


def fill_in(text, subject_name, what):
    """`text` with the subject's name where it says {}.

    Raises:
        InputError: there is no name.
    """
    if "{}" in text and subject_name is None:
        raise InputError(f"{what}, {text[:80]!r}, says {{}} where the subject goes: give --subject_name.")
    return text.replace("{}", subject_name or "")


def instance_texts(pictures, instance_prompt, subject_name):
    """The prompt of each picture: its caption, or else `--instance_prompt`, or else kohya's class words.

    Returns:
        List of strings.

    Raises:
        InputError: a picture has none of these, {} is said and there is no name for it, or the name is never said.
    """
    captioned = sum(picture.caption is not None for picture in pictures)
    prompt = "--instance_prompt"
    if instance_prompt is None and subject_name is not None:
        instance_prompt, prompt = "a photo of a {}", "the prompt made of --subject_name"
    elif instance_prompt is not None and captioned:
        others = f"the {len(pictures) - captioned} others" if captioned < len(pictures) else "no picture"
        logger.warning(
            f"{captioned} of {len(pictures)} pictures have a caption, which counts: --instance_prompt"
            f" {quoted(instance_prompt)} is for {others}."
        )
    texts = []
    for picture in pictures:
        text, what = picture.caption, f"the caption of {plain(picture.name)}"
        if text is None:
            text, what = instance_prompt, prompt
        if text is None:
            text, what = picture.class_words, "the name of the folder"
        if text is None:
            raise InputError(f"{plain(picture.name)} has no caption: give --instance_prompt or --subject_name.")
        texts.append(fill_in(text, subject_name, what))
    if subject_name is not None and not any(subject_name.lower() in text.lower() for text in texts):
        raise InputError(never_said(subject_name, instance_prompt, captioned == len(pictures)))
    return texts


def never_said(subject_name, instance_prompt, all_captioned):
    """The sentence for a subject whose name is in no prompt that is trained."""
    name = f"--subject_name {subject_name[:80]!r}"
    if all_captioned:
        return (
            f"{name} is in no caption, and every picture has one, so that no other prompt is trained: say {{}} in the"
            ' captions, call the subject as they do, or give --caption_token "WORDS" with what they call it.'
        )
    return (
        f"{name} is in no caption and not in --instance_prompt {quoted(instance_prompt)}: say {{}} there, or call the"
        " subject as they do."
    )


def draw_subject(subject, batch_size, generator):
    """Examples of the subject, then as many of its class: latents, rows of prompts, and weights, `[b or 2b, ...]`."""
    concepts = [concept for concept in (subject.instance, subject.prior) if concept is not None]
    drawn = [examples.draw_examples(concept, batch_size, generator) for concept in concepts]
    latents, rows = (torch.cat(parts) for parts in list(zip(*drawn))[:2])
    weights = [each[3] for each in drawn]
    if all(each is None for each in weights):
        return latents, rows, None
    everywhere = torch.ones(batch_size, 1, *latents.shape[-2:])
    return latents, rows, torch.cat([everywhere if each is None else each for each in weights])


def warn_about_long_prompts(tokenizer, texts):
    """Says which prompts are longer than the text encoder reads."""
    limit = prompts.words_in_prompt(tokenizer)
    for text in dict.fromkeys(texts):
        if len(tokenizer.encode(text, add_special_tokens=False)) > limit:
            logger.warning(f"The prompt {text[:80]!r} is longer than {limit} tokens: its end is cut off.")


def encode_prompts(base, texts, compute):
    """The text encoder comes, encodes every prompt once, and leaves.

    Returns:
        Text embeddings `[P, length, d]` where and in what is computed, and the text encoder's `StoredModel`.
    """
    text_encoder = base_model.load_text_encoder(base, compute.dtype).to(compute.device)
    ids = base.tokenize(texts).to(compute.device)
    with torch.no_grad():  # inference mode's tensors could not take part in training
        encoded = torch.cat([text_encoder(part).states for part in ids.split(8)])
    stored = StoredModel(memory.tensor_bytes(text_encoder), 0.0)
    del text_encoder
    memory.release_freed_memory()
    return encoded, stored


def encode_texts(args, texts, base, compute):
    """The text encoder comes, encodes every prompt once, and leaves.

    Args:
        args: resolved settings.
        texts: the prompt of each picture of the subject.
        base: `Base`.
        compute: `Compute`.

    Returns:
        Text embeddings `[P, length, d]` of distinct prompts, the class's last; those of validation images as keywords
        of a pipeline's call, in the place of prompt and text encoder; and the text encoder's `StoredModel`.
    """
    shown = fill_in(args.validation_prompt or "", args.subject_name, "--validation_prompt")
    everything = [*dict.fromkeys(texts), args.class_prompt or "", shown, ""]
    warn_about_long_prompts(base.tokenizer, everything)
    encoded, stored = encode_prompts(base, everything, compute)
    return encoded[:-2], {"prompt_embeds": encoded[-2:-1], "negative_prompt_embeds": encoded[-1:]}, stored


# =====================================================================================================
# Pictures
# =====================================================================================================


@dataclass(frozen=True)
class Subject:
    """What is learned from; prompts are rows of their embeddings (`encode_texts`)."""

    instance: Concept
    prior: Concept | None  # the class, for prior preservation


def read_instances(args, resolution=None, base=None):
    """The `Picture`s of the subject, in `--resolution` or another: centre squares, as diffusers' scripts crop them.

    With `--use_aspect_ratio_buckets` they keep their shape, in sizes that the `Base` takes.
    """
    options = resolution or args.resolution, True
    more = base.resolution_multiple if args.use_aspect_ratio_buckets else None, args.masked_loss
    if args.instance_data_dir is not None:
        pictures = images.read_folder(args.instance_data_dir, *options, "--instance_data_dir", *more, args.mask_dir)
    else:
        from ..data.dataset import read_dataset  # with libraries that few runs need

        names = args.dataset_name, args.dataset_config_name, args.image_column, args.caption_column
        pictures = read_dataset(*names, *options, *more)
    return mark_concept(pictures, args.caption_token, [args.subject_name] * (args.subject_name is not None))


def read_class(args, base, compute, load_unet):
    """The `Picture`s of the class; those that are missing are drawn first, by the quantized base.

    Processes that share the folder, of one launch or of several, fill it one after the other.

    Args:
        args: resolved settings.
        base: `Base`.
        compute: `Compute`.
        load_unet: loads the frozen UNet; called only where images are missing.
    """
    folder = Path(args.class_data_dir)
    with lone_process(folder) if missing_class_images(args) > 0 else contextlib.nullcontext():
        missing = missing_class_images(args)
        if missing > 0:
            draw_class(args, folder, missing, base, compute, load_unet)
    return read_class_folder(args, args.resolution)


@contextlib.contextmanager
def lone_process(folder):
    """Waits until no other process of this machine fills a folder; the lock is no file in it."""
    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:20]
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"zoodip-class-images-{name}.lock")
    with contextlib.suppress(OSError, NotImplementedError):  # of another user: then several may draw the same
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def draw_class(args, folder, missing, base, compute, load_unet):
    """Draws class images; arguments as `read_class`."""
    logger.info(f"Drawing {missing} class images of {args.class_prompt!r} into {folder}")
    unet = load_unet()
    text_encoder = base_model.load_text_encoder(base, compute.dtype).to(compute.device)
    pipeline = validation.open_pipeline(base, text_encoder, unet, compute)
    paths = ((number, folder / f"class-{number:06d}.png") for number in itertools.count())
    free = itertools.islice(((number, path) for number, path in paths if not path.exists()), missing)
    for number, path in tqdm(free, desc="Class images", total=missing):
        seed = args.seed + CLASS_SEEDS + number
        with torch.inference_mode():
            image = validation.draw_image(pipeline, args.class_prompt, seed, **drawing_options(args))
        with atomic_path(path) as temporary:
            image.save(temporary)
    del unet, text_encoder, pipeline
    memory.release_freed_memory()


def read_class_folder(args, resolution):
    """The `Picture`s of the class that are there, in a resolution.

    Raises:
        InputError: there are too few that can be read.
    """
    pictures = images.read_folder(args.class_data_dir, resolution, True, "--class_data_dir")
    if captioned := [picture.name for picture in pictures if picture.caption is not None]:
        logger.warning(f"Captions in --class_data_dir are lost ({some(captioned)}): class images have --class_prompt.")
    if len(pictures) < args.num_class_images:
        raise InputError(
            f"--class_data_dir {args.class_data_dir!r} has {len(pictures)} images that can be read, and"
            f" --num_class_images are {args.num_class_images}: delete the others, which are drawn again."
        )
    return pictures[: args.num_class_images]


CLASS_SEEDS = 1_000_003  # so far from those of validation images


def drawing_options(args):
    """How validation and class images are drawn, as keywords of a pipeline's call."""
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    return options | {"height": args.resolution, "width": args.resolution}


@torch.inference_mode()
def draw_validation_images(run):
    """Draws `--validation_prompt`, saves and logs it, by the first process; returns the images, or None.

    `run` is the `Run` of either trainer.
    """

    def draw():
        args, model = run.args, run.model
        what = model.compute, None, args.num_validation_images, args.seed
        options = run.validation_embeddings | drawing_options(args)
        return validation.draw_images(run.base, None, model.unet, *what, **options)

    if run.args.validation_prompt and run.accelerator.is_main_process:
        return validation.show(run.accelerator, run.results, run.progress.step, draw)


def encode_pictures(pictures, texts, class_pictures, base, flip_probability, compute):
    """The VAE encodes every picture once and leaves.

    Args:
        pictures: of the subject.
        texts: the prompt of each.
        class_pictures: of its class; None without prior preservation.
        base: `Base`.
        flip_probability: how often the subject's pictures are mirrored.
        compute: `Compute`.

    Returns:
        `Subject`, whose prompts are rows of what `encode_texts` returns, and the VAE's `StoredModel`.
    """
    distinct = list(dict.fromkeys(texts))
    rows = [[distinct.index(text)] for text in texts]
    known = torch.arange(len(distinct) + 1)  # prompts as rows of their embeddings; the last is the class's
    instance, vae = examples.load_concept(pictures, (known, rows), base, flip_probability, compute)
    prior = None
    if class_pictures is not None:
        of_class = known, [[len(distinct)]] * len(class_pictures)
        prior, _ = examples.load_concept(class_pictures, of_class, base, 0.0, compute)
    return Subject(instance, prior), vae


# =====================================================================================================
# The loss
# =====================================================================================================


def denoising_errors(family, denoiser, batch, conditioning, memory_format=None):
    """‖ε − ε_φ(z_t, t, c)‖² of each example, float32 `[b]`: means over its latent entries.

    Args:
        family: of the model.
        denoiser: any, frozen but for what is trained.
        batch: `Batch`.
        conditioning: text embeddings `[b, length, d]`.
        memory_format: of the latents; None leaves them as they are.
    """
    noisy = batch.noisy_latents.to(conditioning)
    noisy = noisy.contiguous(memory_format=memory_format or torch.preserve_format)
    prediction = family.predict(denoiser, noisy, batch.timesteps, Text(conditioning), batch.size_ids)
    if batch.weights.numel():  # under masks only what is inside counts
        return batch.weighed(prediction.float() - batch.target).square().flatten(1).mean(dim=1)
    return F.mse_loss(prediction.float(), batch.target, reduction="none").flatten(1).mean(dim=1)


def dreambooth_loss(errors, num_instances, prior_weight):
    """DreamBooth's loss (Ruiz et al., CVPR 2023, Eq. 2): the subject, and λ times the prior of its class.

    Args:
        errors: `[b]` or `[2b]`; of the subject's examples, then of the class's, if there are any.
        num_instances: b.
        prior_weight: λ.
    """
    loss = errors[:num_instances].mean()
    return loss if len(errors) == num_instances else loss + prior_weight * errors[num_instances:].mean()
