"""Training pictures: read from a folder or a data set, each judged where it enters."""

import hashlib
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import InputError, first_cause, plain, quoted, shorten
from .captions import (
    METADATA_NAMES,
    SIDECARS,
    WRITTEN,
    all_captions,
    check_text,
    check_unicode,
    file_key,
    kohya_name,
    some,
)


logger = get_logger(__name__)

MANY_PICTURES, MANY_WARNINGS = 1000, 10
FOREIGN_FORMATS = set(".heic .heif .hif .jxl .dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .svg".split())
WRITTEN_FOLDERS = "samples", "validation", "reference_images"  # in --output_dir
DEFAULT_CAPTION_COLUMN = "text"
TEXT_TYPES = "string", "large_string", "string_view"


class Framing(NamedTuple):
    """How a picture became a square: scaled to `scaled`, of which the square at `crop` was kept."""

    original: tuple  # height and width of the picture as it was
    scaled: tuple  # height and width before the crop
    crop: tuple  # top and left of the square in it
    side: int  # of the square


class Picture(NamedTuple):
    """A training picture."""

    name: str
    pixels: torch.Tensor  # uint8 [3, resolution, resolution]
    caption: str | None
    framing: Framing | None = None
    repeats: int = 1  # how often it is drawn, in proportion
    class_words: str | None = None  # of kohya's folder name


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


def upright_size(image):
    """Height and width of a PIL image, EXIF orientation applied."""
    on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size if on_its_side else image.size[::-1]


def frame(height, width, resolution, center_crop):
    """The `Framing` that `to_pixels` gives to a picture (upright) of this size."""
    scaled = resolution, resolution
    if center_crop:
        scaled = tuple(round(side * resolution / min(height, width)) for side in (height, width))
    crop = tuple((side - resolution) // 2 for side in scaled)
    return Framing((height, width), scaled, crop, resolution)


def to_pixels(image, resolution, center_crop):
    """A PIL image as uint8 `[3, resolution, resolution]`; without `center_crop` it is squeezed to a square."""
    image = to_rgb(image)
    if center_crop:
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
    else:
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def digest(pictures):
    """What tells a set of pictures from others, by pixels, captions and repeats: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for picture in pictures:
        found.update(picture.pixels.numpy().tobytes() + repr(picture.caption).encode())
        found.update(b"" if picture.repeats == 1 else b"%d" % picture.repeats)
    return found.hexdigest()[:16]


def check_apart(data_dir, output_dir, flag="--train_data_dir"):
    """Refuses a run that would write its images (loss curve, samples ...) among the pictures it learns from.

    Args:
        data_dir: of the pictures, the value of `flag`.
        output_dir: of the run.

    Raises:
        InputError: the output folder is the data folder, or the data folder is one that a run writes; or the name of
            one of them is not UTF-8, so that the results could not name it.
    """
    for name, path in ((flag, data_dir), ("--output_dir", output_dir)):
        check_unicode(str(path), f"{name} {quoted(path, 300)}")
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
            f"{flag} {quoted(data_dir, 300)} is a folder that this run writes its own images into: copy the"
            " pictures to another folder, or give another --output_dir."
        )


class Entries(NamedTuple):
    """What lies in a data folder, by what it is; the names of each, sorted."""

    pictures: list  # regular files named as images
    ignored: list  # other files
    foreign: list  # of these, images of formats that cannot be read here
    folders: list
    strange: list  # links to nothing, pipes, devices, sockets
    sidecars: dict  # picture -> names of the text files with its name, the one that counts first


def list_folder(folder, flag="--train_data_dir"):
    """The `Entries` of a data folder, metadata left out; nothing is opened.

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    shown, advice = quoted(folder, 300), "give the folder that holds your images."
    if not str(folder).strip():
        raise InputError(f"{flag} {shown} is empty: {advice}")
    try:
        if not os.path.isdir(folder):
            raise InputError(f"{flag} {shown} is not a folder: {advice}")
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{flag} {shown} cannot be read ({first_cause(error)}): {advice}") from None
    known, entries = set(Image.registered_extensions()), Entries([], [], [], [], [], {})
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
    of_stem = {}
    for name in entries.ignored:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SIDECARS:
            of_stem.setdefault(stem, []).append(name)
    for name in entries.pictures:
        if found := of_stem.get(os.path.splitext(name)[0]):
            entries.sidecars[name] = sorted(found, key=lambda each: SIDECARS.index(os.path.splitext(each)[1].lower()))
    read = {each for names in entries.sidecars.values() for each in names}
    entries.ignored[:] = [name for name in entries.ignored if name not in read]
    return entries


def read_folder(folder, resolution, center_crop, flag="--train_data_dir"):
    """The `Picture`s of a folder, the value of `flag`; what is not a readable image is reported.

    A folder without pictures may hold folders of kohya's form, `10_my dog`, which are read instead.

    Raises:
        InputError: there is no such folder, no image in it, or its captions cannot be read.
    """
    entries = list_folder(folder, flag)
    shown, folder = quoted(folder, 300), Path(folder)
    inside = [name for name in entries.folders if kohya_name(name)[1]] if not entries.pictures else []
    captions = all_captions(folder, entries.sidecars, flag)
    report(entries, shown, inside)
    class_words = kohya_name(folder)[1]
    listed = [(name, lambda path=folder / name: Image.open(path)) for name in entries.pictures]
    pictures = [
        picture._replace(class_words=class_words) for picture in decode_pictures(listed, resolution, center_crop)
    ]
    for name in inside:
        repeats = kohya_name(name)[0]
        of_folder = read_folder(folder / name, resolution, center_crop, flag)
        logger.info(f"{plain(name)}: {len(of_folder)} pictures, each drawn {repeats} times as often as one of 1_name.")
        pictures += [each._replace(name=f"{name}/{each.name}", repeats=repeats) for each in of_folder]
    pictures = [each._replace(caption=captions.get(file_key(each.name), each.caption)) for each in pictures]
    others = sorted(captions.keys() - {file_key(picture.name) for picture in pictures})
    if others and pictures:
        logger.warning(f"The metadata lists files that are not among the images: {some(others)}.")
    if not pictures:
        looked_at = len(entries.pictures) + len(entries.ignored) + len(entries.strange)
        advice = "put 3 to 20 pictures of your concept there"
        if entries.foreign:
            advice = unreadable(entries.foreign)
        elif entries.folders:
            advice += f", or give one of the folders in it ({some(entries.folders)})"
        raise InputError(f"{flag} {shown} holds no readable image ({looked_at} files looked at): {advice}.")
    return pictures


def unreadable(names):
    """What to do about images of foreign formats, in a sentence."""
    return f"{some(names)} cannot be read here: save such images as JPEG or PNG"


def report(entries, shown, inside=()):
    """Says what of the `Entries` of a folder is not used.

    Args:
        shown: the folder, as a sentence has it.
        inside: names of folders in it that are read.
    """
    if entries.ignored:
        advice = f" ({unreadable(entries.foreign)})" if entries.foreign else ""
        names = some(entries.ignored)
        logger.warning(f"Ignored {len(entries.ignored)} files in {shown} that are not images: {names}{advice}.")
    written = [name for name in entries.ignored if os.path.splitext(name)[1].lower() in WRITTEN]
    if written:
        logger.warning(
            f"If {some(written)} hold captions, they are lost: captions are read from {' or '.join(METADATA_NAMES)}"
            " (fields file_name, text), and from 01.txt or 01.caption beside a picture 01.jpg."
        )
    folders = [name for name in entries.folders if name not in inside]
    if any(not name.startswith(".") for name in folders):
        logger.warning(f"Ignored folders in {shown}: {some(folders)}; only pictures beside them are read.")
    if entries.strange:
        logger.warning(f"Skipped links to nothing, pipes or devices in {shown}: {some(entries.strange)}.")


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
                    size = upright_size(image)
                    moving, side = getattr(image, "is_animated", False) and image.format != "MPO", min(image.size)
            pictures.append(Picture(name, pixels, None, frame(*size, resolution, center_crop)))
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
