"""Pictures and captions: read, turned into latent moments and prompt ids, and what a training step draws from them."""

import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import Image, ImageOps, UnidentifiedImageError

from .base_model import StoredModel, load_vae
from .captions import METADATA_NAMES, check_text, check_unicode, file_key, read_captions
from .errors import InputError, first_cause, quoted, shorten
from .memory import release_freed_memory, tensor_bytes


logger = get_logger(__name__)

MANY_PICTURES, MANY_WARNINGS = 1000, 10
FOREIGN_FORMATS = set(".heic .heif .hif .jxl .dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .svg".split())
WRITTEN_FOLDERS = "samples", "validation", "reference_images"  # in --output_dir
DEFAULT_CAPTION_COLUMN = "text"
TEXT_TYPES = "string", "large_string", "string_view"


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


def check_apart(data_dir, output_dir):
    """Refuses a run that would write its images (loss curve, samples ...) among the pictures it learns from.

    Raises:
        InputError: the output folder is the data folder, or the data folder is one that a run writes; or the name of
            one of them is not UTF-8, so that the results could not name it.
    """
    for flag, path in (("--train_data_dir", data_dir), ("--output_dir", output_dir)):
        check_unicode(str(path), f"{flag} {quoted(path, 300)}")
    if not str(data_dir).strip():  # `read_folder` has the words for it
        return
    data, output = os.path.realpath(data_dir), os.path.realpath(output_dir)
    if data == output or (os.path.isdir(output) and os.path.isdir(data) and os.path.samefile(data, output)):
        raise InputError(
            f"--output_dir {quoted(output_dir, 300)} is the folder of the training images: give another folder, or the"
            " next run would learn from the loss curve of this one."
        )
    if os.path.dirname(data) == output and os.path.basename(data) in WRITTEN_FOLDERS:
        raise InputError(
            f"--train_data_dir {quoted(data_dir, 300)} is a folder that this run writes its own images into: copy the"
            " pictures to another folder, or give another --output_dir."
        )


class Entries(NamedTuple):
    """What lies in a data folder, by what it is; the names of each, sorted."""

    pictures: list  # regular files named as images
    ignored: list  # other files
    foreign: list  # of these, images of formats that cannot be read here
    folders: list
    strange: list  # links to nothing, pipes, devices, sockets


def list_folder(folder):
    """The `Entries` of a data folder, metadata left out; nothing is opened.

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    shown, advice = quoted(folder, 300), "give the folder that holds your images."
    if not str(folder).strip():
        raise InputError(f"--train_data_dir {shown} is empty: {advice}")
    try:
        if not os.path.isdir(folder):
            raise InputError(f"--train_data_dir {shown} is not a folder: {advice}")
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"--train_data_dir {shown} cannot be read ({first_cause(error)}): {advice}") from None
    known, entries = set(Image.registered_extensions()), Entries([], [], [], [], [])
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        try:
            mode = os.stat(os.path.join(folder, name)).st_mode
        except OSError:  # a link to nothing or to itself, or gone since
            mode = 0
        if stat.S_ISDIR(mode):
            entries.folders.append(name)
        elif name in METADATA_NAMES:
            continue
        elif not stat.S_ISREG(mode):
            entries.strange.append(name)
        elif suffix in known and not name.startswith("."):
            entries.pictures.append(name)
        else:
            entries.ignored.append(name)
            if suffix in FOREIGN_FORMATS and not name.startswith("."):
                entries.foreign.append(name)
    return entries


def plain(name):
    """A file's name for a warning, with anything unprintable spelled out."""
    return quoted(name)[1:-1]


def some(names):
    """The first few of many names, for a warning."""
    return ", ".join(map(plain, names[:5])) + (", ..." if len(names) > 5 else "")


def read_folder(folder, resolution, center_crop):
    """The `Picture`s of a folder; what is not a readable image is reported.

    Raises:
        InputError: there is no such folder, no image in it, or its captions cannot be read.
    """
    entries = list_folder(folder)
    shown, folder = quoted(folder, 300), Path(folder)
    captions = read_captions(folder)
    foreign = f"{some(entries.foreign)} cannot be read here: save such images as JPEG or PNG"
    if entries.ignored:
        advice = f" ({foreign})" if entries.foreign else ""
        names = some(entries.ignored)
        logger.warning(f"Ignored {len(entries.ignored)} files in {shown} that are not images: {names}{advice}.")
    if any(not name.startswith(".") for name in entries.folders):
        logger.warning(f"Ignored folders in {shown}: {some(entries.folders)}; only pictures beside them are read.")
    if entries.strange:
        logger.warning(f"Skipped links to nothing, pipes or devices in {shown}: {some(entries.strange)}.")
    listed = [(name, lambda path=folder / name: Image.open(path)) for name in entries.pictures]
    pictures = [
        picture._replace(caption=captions.get(file_key(picture.name)))
        for picture in decode_pictures(listed, resolution, center_crop)
    ]
    others = sorted(captions.keys() - {file_key(picture.name) for picture in pictures})
    if others and pictures:
        logger.warning(f"The metadata lists files that are not among the images: {some(others)}.")
    if not pictures:
        looked_at = len(entries.pictures) + len(entries.ignored) + len(entries.strange)
        advice = "put 3 to 20 pictures of your concept there"
        if entries.foreign:
            advice = foreign
        elif entries.folders:
            advice += f", or give one of the folders in it ({some(entries.folders)})"
        raise InputError(f"--train_data_dir {shown} holds no readable image ({looked_at} files looked at): {advice}.")
    return pictures


def decode_pictures(listed, resolution, center_crop):
    """Decodes pictures one by one; one that cannot be decoded is skipped with a warning.

    Args:
        listed: (name, function that opens it as a PIL image) pairs.

    Returns:
        The `Picture`s, without captions.
    """
    if len(listed) > MANY_PICTURES:
        size = len(listed) * 3 * resolution**2 / 1e9
        logger.warning(
            f"{len(listed)} pictures are many (3 to 20 are usual): all are kept in memory ({size:.1f} GB) and encoded"
            " before training starts."
        )
    pictures, skipped, animated, tiny = [], [], [], []
    for name, open_image in listed:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, and below PIL's limit
                with open_image() as image:
                    pixels = to_pixels(image, resolution, center_crop)
                    moving, side = getattr(image, "is_animated", False) and image.format != "MPO", min(image.size)
            pictures.append(Picture(name, pixels, None))
        except Exception as error:  # PIL raises nearly anything on a damaged file
            skipped.append(name)
            if len(skipped) <= MANY_WARNINGS:
                logger.warning(f"Skipped {plain(name)}, which cannot be read as an image ({why_not(error)}).")
            continue
        if moving:
            animated.append(name)
        if side < resolution / 8:
            tiny.append(name)
    if len(skipped) > MANY_WARNINGS:
        logger.warning(f"Skipped {len(skipped)} of {len(listed)} files in all.")
    if animated:
        logger.warning(f"Of pictures that move or have pages, only the first is used: {some(animated)}.")
    if tiny:
        logger.warning(f"Pictures far smaller than the resolution of {resolution} will be a blur: {some(tiny)}.")
    return pictures


def why_not(error):
    """Why a picture could not be decoded, in words."""
    if isinstance(error, UnidentifiedImageError):  # it would name an object in memory, or the whole path again
        return "it is empty, or of no format that is known here"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels: scale it down"
    return first_cause(error)


def read_dataset(name, config_name, image_column, caption_column, resolution, center_crop):
    """The `Picture`s of a `datasets` dataset on the Hub or on disk (its train split).

    An image that cannot be decoded is skipped with a warning; a caption that is null, empty or blank is none.

    Raises:
        InputError: it cannot be loaded, has no such column, one of another kind, or no images.
    """
    shown = quoted(name, 300)
    if not name.strip():
        raise InputError("--dataset_name '' is empty: give the id of a dataset on the Hub, or --train_data_dir.")
    try:
        dataset = datasets.load_dataset(name, config_name, split="train")
    except Exception as error:  # datasets raises its own, huggingface_hub's, pyarrow's and OS errors here
        raise InputError(
            f"--dataset_name {shown} cannot be loaded ({first_cause(error)}): check the name, --dataset_config_name,"
            " and that it has a split train."
        ) from None
    has_captions = check_columns(dataset, shown, image_column, caption_column)
    if not len(dataset):
        raise InputError(f"--dataset_name {shown} has no images in its train split: choose another.")
    feature, count = dataset.features[image_column], len(dataset)
    stored = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    captions = {}
    if has_captions:
        what = f"--caption_column {quoted(caption_column)} of image"
        try:
            texts = list(dataset.select_columns([caption_column])[caption_column])
        except (OSError, ValueError) as error:  # pyarrow's are ValueErrors
            raise InputError(
                f"--dataset_name {shown} cannot be read ({first_cause(error)}): download it again."
            ) from None
        captions = {f"image {i}": check_text(text, f"{what} {i}") for i, text in enumerate(texts)}
    listed = [(f"image {i}", lambda i=i: decode_stored(feature, stored[i][image_column])) for i in range(count)]
    pictures = [
        picture._replace(caption=captions.get(picture.name))
        for picture in decode_pictures(listed, resolution, center_crop)
    ]
    if not pictures:
        raise InputError(
            f"--dataset_name {shown} has no readable image among the {count} of its train split: choose another"
            " or another --image_column."
        )
    return pictures


def check_columns(dataset, shown, image_column, caption_column):
    """Judges the columns of a dataset by their types, before anything is decoded.

    Returns:
        Whether there are captions.

    Raises:
        InputError: a column is not there or of another kind.
    """
    features = dataset.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    texts = [name for name, feature in features.items() if getattr(feature, "dtype", None) in TEXT_TYPES]
    if image_column not in features:
        raise InputError(
            f"--image_column {quoted(image_column)} is not in {shown}: choose from {shorten(list(features), 300)}."
        )
    if image_column not in images:
        raise InputError(
            f"--image_column {quoted(image_column)} of {shown} does not hold images but"
            f" {type_of(features[image_column])}: choose from {images}."
        )
    if not caption_column:
        return False
    if caption_column not in features and caption_column == DEFAULT_CAPTION_COLUMN:
        if texts:
            logger.warning(f"{shown} has no column {caption_column!r}: --caption_column would choose from {texts}.")
        return False
    choose = f"choose from {texts}, or give '' for no captions."
    if caption_column not in features:
        raise InputError(f"--caption_column {quoted(caption_column)} is not in {shown}: {choose}")
    if caption_column not in texts:
        raise InputError(
            f"--caption_column {quoted(caption_column)} of {shown} does not hold text but"
            f" {type_of(features[caption_column])}: {choose}"
        )
    return True


def type_of(feature):
    """What a column of a dataset holds, in words."""
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else f"the type {kind}"


def decode_stored(feature, value):
    """An image of a dataset as PIL decodes it."""
    if value is None:
        raise ValueError("it is null")
    return feature.decode_example(value)


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
        InputError: the token is not one visible word, a name is taken, no prompt could hold all vectors, or the
            initializer is not one known token.
    """
    if not token or " " in token or not token.isprintable() or "{}" in token:
        raise InputError(
            f"--placeholder_token {quoted(token)} must be one word without spaces or invisible characters, such as"
            ' "<my-dog>".'
        )
    check_unicode(initializer_token, "--initializer_token")
    room = words_in_prompt(tokenizer)
    if num_vectors > room:
        raise InputError(
            f"--num_vectors {num_vectors} does not fit into a prompt, which takes {room} tokens: give fewer."
        )
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


def words_in_prompt(tokenizer):
    """How many tokens a prompt has room for."""
    return tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()


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
        InputError: a caption has no placeholder, or is so long, or the vectors so many, that it is cut off.
    """
    templates = STYLE_TEMPLATES if learnable_property == "style" else OBJECT_TEMPLATES
    rows_of_text, prompts_of_image, of_templates = {}, [], {placeholder.expand(text) for text in templates}
    for picture in pictures:
        caption = picture.caption
        if caption is not None and "{}" not in caption and placeholder.token not in caption:
            raise InputError(
                f"the caption of {plain(picture.name)}, {quoted(caption)}, does not say where the concept goes: put"
                f" {{}} or {plain(placeholder.token)} there."
            )
        texts = [placeholder.expand(text) for text in (templates if caption is None else [caption])]
        prompts_of_image.append([rows_of_text.setdefault(text, len(rows_of_text)) for text in texts])
    prompt_ids = tokenize(tokenizer, rows_of_text)
    vector_ids = torch.tensor(tokenizer.convert_tokens_to_ids(placeholder.names))
    for text, ids in zip(rows_of_text, prompt_ids):
        if not torch.isin(vector_ids, ids).all():
            raise cut_off(text, of_templates, placeholder, tokenizer)
    return prompt_ids, prompts_of_image


def cut_off(text, of_templates, placeholder, tokenizer):
    """The `InputError` for a prompt that does not hold all vectors of the placeholder; it names what is too long."""
    limit = f"the {tokenizer.model_max_length} tokens of the text encoder"
    if text in of_templates:
        others = (words.replace(" ".join(placeholder.names), "") for words in of_templates)
        most = max(len(tokenizer.encode(words, add_special_tokens=False)) for words in others)
        return InputError(
            f"--num_vectors {placeholder.num_vectors} does not fit into {limit} beside the other words of a prompt:"
            f" give at most {words_in_prompt(tokenizer) - most}."
        )
    or_fewer = f", or lower --num_vectors {placeholder.num_vectors}" if placeholder.num_vectors > 1 else ""
    return InputError(
        f"the caption {quoted(text)} is longer than {limit}, which cut off {plain(placeholder.token)}: shorten"
        f" it{or_fewer}."
    )


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
