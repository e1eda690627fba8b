"""Pictures and captions: read, turned into latent moments and prompt ids, and what a training step draws from them."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import Image, ImageOps

from .base_model import StoredModel, load_vae
from .errors import InputError
from .memory import release_freed_memory, tensor_bytes


logger = get_logger(__name__)


class Picture(NamedTuple):
    """A training picture."""

    name: str
    pixels: torch.Tensor  # uint8 [3, resolution, resolution]
    caption: str | None


# =====================================================================================================
# Reading
# =====================================================================================================


def to_rgb(image):
    """Any PIL image as upright RGB: EXIF orientation applied, transparency over white, 16-bit grey scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image, resolution, center_crop):
    """A PIL image as uint8 `[3, resolution, resolution]`; without `center_crop` it is squeezed to a square."""
    image = to_rgb(image)
    if center_crop:
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
    else:
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_captions(folder):
    """Captions by file name from `metadata.jsonl` or `metadata.csv` (the imagefolder format), {} if there is none."""
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    try:
        if jsonl.is_file():
            lines = jsonl.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
        elif table.is_file():
            with table.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        else:
            return {}
        return {row["file_name"]: row["text"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        name = jsonl.name if jsonl.is_file() else table.name
        raise InputError(
            f"--train_data_dir {str(folder)!r}: {name} cannot be read ({error!r}); every row needs the fields"
            " file_name and text."
        ) from None


def read_folder(folder, resolution, center_crop):
    """The `Picture`s of a folder; what is not a readable image is reported.

    Raises:
        InputError: there is no such folder, no image in it, or its captions cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--train_data_dir {str(folder)!r} is not a folder: give the folder that holds your images.")
    captions = read_captions(folder)
    known = set(Image.registered_extensions())
    files = sorted(path for path in folder.iterdir() if path.is_file())
    image_files = [path for path in files if path.suffix.lower() in known and not path.name.startswith(".")]
    ignored = [p.name for p in files if p not in image_files and p.name not in ("metadata.jsonl", "metadata.csv")]
    if ignored:
        logger.warning(f"Ignored {len(ignored)} files in {folder} that are not images: {', '.join(ignored[:5])}.")
    pictures = []
    for path in image_files:
        try:
            with Image.open(path) as image:
                pixels = to_pixels(image, resolution, center_crop)
            pictures.append(Picture(path.name, pixels, captions.pop(path.name, None)))
        except Exception as error:  # PIL raises nearly anything on a damaged file
            logger.warning(f"Skipped {path.name}, which cannot be read as an image ({error}).")
    if captions and pictures:
        logger.warning(f"The metadata lists files that are not among the images: {', '.join(list(captions)[:5])}.")
    if not pictures:
        raise InputError(
            f"--train_data_dir {str(folder)!r} holds no readable image ({len(files)} files looked at): put 3 to 20"
            " pictures of your concept there."
        )
    return pictures


def read_dataset(name, config_name, image_column, caption_column, resolution, center_crop):
    """The `Picture`s of a `datasets` dataset on the Hub or on disk (its train split).

    Raises:
        InputError: it cannot be loaded, has no such column or no images.
    """
    try:
        dataset = datasets.load_dataset(name, config_name, split="train")
    except Exception as error:  # datasets raises its own, huggingface_hub's, pyarrow's and OS errors here
        raise InputError(f"--dataset_name {name!r} cannot be loaded ({error}): check the name.") from None
    if image_column not in dataset.column_names:
        raise InputError(f"--image_column {image_column!r} is not in {name}: choose from {dataset.column_names}.")
    has_captions = caption_column in dataset.column_names
    pictures = []
    for i, row in enumerate(dataset):
        caption = row[caption_column] if has_captions else None
        pictures.append(Picture(f"image {i}", to_pixels(row[image_column], resolution, center_crop), caption))
    if not pictures:
        raise InputError(f"--dataset_name {name!r} has no images in its train split.")
    return pictures


# =====================================================================================================
# Prompts
# =====================================================================================================

OBJECT_TEMPLATES = [
    f"{words} {{}}"
    for words in (
        "a photo of a|a rendering of a|a cropped photo of the|the photo of a|a photo of a clean|a photo of a dirty|"
        "a dark photo of the|a photo of my|a photo of the cool|a close-up photo of a|a bright photo of the|"
        "a cropped photo of a|a photo of the|a good photo of the|a photo of one|a close-up photo of the|"
        "a rendition of the|a photo of the clean|a rendition of a|a photo of a nice|a good photo of a|"
        "a photo of the nice|a photo of the small|a photo of the weird|a photo of the large|a photo of a cool|"
        "a photo of a small"
    ).split("|")
]
STYLE_TEMPLATES = [
    f"{words} in the style of {{}}"
    for words in (
        "a painting|a rendering|a cropped painting|the painting|a clean painting|a dirty painting|a dark painting|"
        "a picture|a cool painting|a close-up painting|a bright painting|a good painting|a rendition|a nice painting|"
        "a small painting|a weird painting|a large painting"
    ).split("|")
]


class Placeholder(NamedTuple):
    """The new word."""

    token: str  # such as "<my-dog>"
    num_vectors: int  # k
    first_id: int  # of its k consecutive token ids
    initializer_id: int  # of the word that it starts from

    @property
    def names(self):
        return placeholder_names(self.token, self.num_vectors)

    def fill(self, text):
        """`text` with the placeholder where it says {}."""
        return text.replace("{}", self.token)

    def expand(self, text):
        """`text` with all vectors of the placeholder where it says {} or names it."""
        return self.fill(text).replace(self.token, " ".join(self.names))


def placeholder_names(token, num_vectors):
    """The names diffusers gives the vectors of a multi-vector token: tok, tok_1, tok_2, ..."""
    return [token] + [f"{token}_{i}" for i in range(1, num_vectors)]


def add_placeholder(tokenizer, token, num_vectors, initializer_token):
    """Adds the new word's k names to the tokenizer.

    Returns:
        `Placeholder`.

    Raises:
        InputError: a name is taken, or the initializer is not one known token.
    """
    if not token or token.split() != [token] or "{}" in token:
        raise InputError(f'--placeholder_token {token!r} must be one word, such as "<my-dog>".')
    vocabulary = tokenizer.get_vocab()
    for word in placeholder_names(token, num_vectors):
        if word in vocabulary or f"{word.lower()}</w>" in vocabulary:
            raise InputError(
                f"--placeholder_token {token!r}: {word!r} is already in the vocabulary of the tokenizer: choose a new"
                f' word, such as "<my-{token.strip("<>").lower()}>".'
            )
    if token != token.lower() or not (token.startswith("<") and token.endswith(">")):
        logger.warning(
            f"--placeholder_token {token!r} is upper-case or without <>: it can match inside other words, and many"
            f' readers lower-case it; "<{token.strip("<>").lower()}>" is safe.'
        )
    initializer = tokenizer.encode(initializer_token, add_special_tokens=False)
    if len(initializer) != 1:
        raise InputError(
            f"--initializer_token {initializer_token!r} is {len(initializer)} tokens and must be one: choose a"
            " simpler word for the same kind of thing."
        )
    if initializer[0] == tokenizer.unk_token_id and initializer_token != tokenizer.unk_token:
        raise InputError(
            f"--initializer_token {initializer_token!r} is unknown to the tokenizer: choose another word."
        )
    tokenizer.add_tokens(placeholder_names(token, num_vectors))
    return Placeholder(token, num_vectors, tokenizer.convert_tokens_to_ids(token), initializer[0])


def tokenize(tokenizer, texts):
    """Prompt ids `[len(texts), length]`, padded and cut as the text encoder wants them."""
    limit = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer(list(texts), return_tensors="pt", **limit).input_ids


def build_prompts(pictures, placeholder, tokenizer, learnable_property="object"):
    """Tokenizes the captions (or the templates, for pictures without one) with the placeholder's vectors in place.

    Args:
        pictures: `Picture`s.
        placeholder: `Placeholder`, known to the tokenizer.
        tokenizer: `CLIPTokenizer`.
        learnable_property: "object" or "style", which templates.

    Returns:
        Prompt ids `[P, length]` and, for each picture, the list of its rows.

    Raises:
        InputError: a caption has no placeholder, or is so long that the placeholder is cut off.
    """
    templates = STYLE_TEMPLATES if learnable_property == "style" else OBJECT_TEMPLATES
    rows_of_text, prompts_of_image = {}, []
    for picture in pictures:
        caption = picture.caption
        if caption is not None and "{}" not in caption and placeholder.token not in caption:
            raise InputError(
                f"the caption of {picture.name}, {caption!r}, does not say where the concept goes: put {{}} or"
                f" {placeholder.token} there."
            )
        texts = [placeholder.expand(text) for text in (templates if caption is None else [caption])]
        prompts_of_image.append([rows_of_text.setdefault(text, len(rows_of_text)) for text in texts])
    prompt_ids = tokenize(tokenizer, rows_of_text)
    vector_ids = torch.tensor(tokenizer.convert_tokens_to_ids(placeholder.names))
    for text, ids in zip(rows_of_text, prompt_ids):
        if not torch.isin(vector_ids, ids).all():
            raise InputError(
                f"the caption {text!r} is longer than the {tokenizer.model_max_length} tokens of the text encoder,"
                f" which cut off {placeholder.token}: shorten it."
            )
    return prompt_ids, prompts_of_image


# =====================================================================================================
# What a training step draws
# =====================================================================================================


@dataclass(frozen=True)
class Concept:
    """Everything that is known of the concept, on the host.

    Args:
        moments: mean and log-variance of the latents, float32 `[1 or 2, N, 2C, h, w]`: of N pictures, and of their
            flips where the first dimension is 2.
        flip_probability: how often the flip is drawn.
        scaling_factor: of the VAE.
        prompt_ids: `[P, length]`.
        prompts_of_image: for each picture, the rows of `prompt_ids` that fit it.
    """

    moments: torch.Tensor
    flip_probability: float
    scaling_factor: float
    prompt_ids: torch.Tensor
    prompts_of_image: list


class Batch(NamedTuple):
    """b examples of a denoising task."""

    noisy_latents: torch.Tensor  # [b, C, h, w]
    target: torch.Tensor  # [b, C, h, w], noise or velocity
    timesteps: torch.Tensor  # [b]
    prompt_ids: torch.Tensor  # [b, length]

    def to(self, device):
        return Batch(*(to_device(tensor, device) for tensor in self))


def encode_images(vae, pictures, device):
    """Latent moments of every picture and of its flip: float32 `[2, N, 2C, h, w]` on the host."""
    rows = []
    for picture in pictures:
        both = torch.stack([picture.pixels, picture.pixels.flip(-1)]).to(device, vae.dtype) / 127.5 - 1
        rows.append(torch.cat([vae.encode(one[None]).latent_dist.parameters for one in both]).float().cpu())
    return torch.stack(rows, dim=1)


def load_concept(pictures, prompts, base, flip_probability, compute):
    """The VAE encodes every picture and its flip once, then leaves before the UNet arrives.

    Args:
        pictures: `Picture`s.
        prompts: what `build_prompts` returned.
        base: `Base`.
        flip_probability: how often a flip will be drawn.
        compute: `Compute`.

    Returns:
        `Concept`, and the VAE's `StoredModel`.
    """
    vae = load_vae(base, compute.dtype)
    stored = StoredModel(tensor_bytes(vae), 0.0)
    vae.decoder = None  # 60 % of it, and not needed here
    vae.to(compute.device)
    with torch.inference_mode():
        moments = encode_images(vae, pictures, compute.device)
    concept = Concept(
        moments if flip_probability > 0 else moments[:1], flip_probability, vae.config.scaling_factor, *prompts
    )
    del vae
    release_freed_memory()
    return concept, stored


def draw_examples(concept, batch_size, generator):
    """Draws b (latent, prompt) pairs with replacement: an image, maybe its flip, a sample of its latent, a caption.

    Returns:
        Latents `[b, C, h, w]` and prompt ids `[b, length]`.
    """
    flips, images = concept.moments.shape[:2]
    chosen = torch.randint(images, (batch_size,), generator=generator)
    flipped = torch.rand(batch_size, generator=generator) < concept.flip_probability
    mean, logvar = concept.moments[flipped.long().clamp(max=flips - 1), chosen].chunk(2, dim=1)
    latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn(mean.shape, generator=generator)
    prompts = [concept.prompts_of_image[i] for i in chosen.tolist()]
    picks = [p[int(torch.randint(len(p), (1,), generator=generator))] for p in prompts]
    return latents * concept.scaling_factor, concept.prompt_ids[picks]


def noise_batch(latents, prompt_ids, timesteps, generator, scheduler):
    """Noises latents to timesteps t and pairs them with the model's target (noise, or velocity for v-prediction)."""
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicts_noise = scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else scheduler.get_velocity(latents, noise, timesteps)
    return Batch(noisy, target, timesteps, prompt_ids)


def to_device(tensor, device):
    """Moves a tensor of the host without making the host wait (only pinned memory travels by itself)."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
