"""Training pictures: read from a folder or a data set, each judged where it enters."""

import functools
import hashlib
import importlib.util
import io
import math
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from ..errors import InputError, first_cause, plain, quoted
from ..logs import get_logger
from ..models.weight_files import names_in
from .captions import METADATA_NAMES, SIDECARS, WRITTEN, all_captions, file_key, kohya_name, some


logger = get_logger(__name__)

MANY_PICTURES, MANY_WARNINGS = 1000, 10
SQUEEZED = 5 / 4  # of the sides, from which on it shows
HEIF = set(".heic .heics .heif .heifs .hif".split())  # which pillow-heif reads
MASK = "-masklabel"  # ends the name of a mask
FOREIGN_FORMATS = set(".heic .heif .hif .jxl .dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .svg".split())


class Framing(NamedTuple):
    """How a picture got its size: scaled to `scaled`, of which a square (or a bucket's shape) at `crop` was kept."""

    original: tuple  # height and width of the picture as it was
    scaled: tuple  # height and width before the crop
    crop: tuple  # top and left in it of what was kept
    kept: tuple  # height and width of that


class Picture(NamedTuple):
    """A training picture."""

    name: str
    pixels: torch.Tensor  # uint8 [3, resolution, resolution], or of a bucket's height and width
    caption: str | None
    framing: Framing | None = None
    repeats: int = 1  # how often it is drawn, in proportion
    class_words: str | None = None  # of kohya's folder name
    mask: torch.Tensor | None = None  # uint8 [1, ...] as pixels; 255 where the subject is, None: everywhere


class Sizing(NamedTuple):
    """The size that pictures get."""

    resolution: int  # side of the square
    center_crop: bool  # or else squeezed
    multiple: int | None = None  # with buckets, what divides their sides

    def of(self, height, width):
        """The height and width that a picture (upright) gets."""
        if self.multiple is None:
            return self.resolution, self.resolution
        return bucket(height, width, self.resolution, self.multiple)


LONGEST = 2  # times as long as the other may be a side of a bucket


def bucket(height, width, resolution, multiple):
    """The height and width nearest in shape to a picture's, of at most as many pixels as the square has.

    Both are multiples of `multiple`; of two that are as near, the larger one.
    """

    def distance(size):
        return round(abs(math.log(size[0] / size[1] * width / height)), 6), -size[0] * size[1]

    sizes = []
    for wide in range(multiple, LONGEST * resolution + 1, multiple):
        high = resolution**2 // wide // multiple * multiple
        if high and max(high, wide) <= LONGEST * min(high, wide):
            sizes.append((high, wide))
    return min(sizes, key=distance)


# =====================================================================================================
# Reading
# =====================================================================================================


def to_rgb(image):
    """Any PIL image as upright sRGB: EXIF orientation and colour profile applied, transparency over white, 16-bit grey
    scaled to 8."""
    image = in_srgb(ImageOps.exif_transpose(image))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    return (over(image, "white") if is_transparent(image) else image).convert("RGB")


def is_transparent(image):
    """Whether a PIL image has an alpha channel, or a colour that stands for one."""
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def over(image, colour):
    """A PIL image over a background of one colour."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)


def in_srgb(image):
    """A PIL image whose colours are those that a viewer shows by its embedded profile, if it has one."""
    if not image.info.get("icc_profile") or image.mode.startswith(("I", "F")):
        return image
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if "sRGB" in ImageCms.getProfileDescription(profile):  # rounding would be all that changes
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile, or of other colours than the image has
        return image


def upright_size(image):
    """Height and width of a PIL image, EXIF orientation applied."""
    on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size if on_its_side else image.size[::-1]


def frame(height, width, resolution, center_crop, multiple=None):
    """The `Framing` that `to_pixels` gives to a picture (upright) of this size."""
    kept = scaled = Sizing(resolution, center_crop, multiple).of(height, width)
    if center_crop or multiple:
        if kept[0] * width >= kept[1] * height:
            scaled = kept[0], round(width * kept[0] / height)
        else:
            scaled = round(height * kept[1] / width), kept[1]
    crop = tuple((side - part) // 2 for side, part in zip(scaled, kept))
    return Framing((height, width), scaled, crop, kept)


def to_pixels(image, resolution, center_crop, multiple=None):
    """A PIL image as uint8 `[3, height, width]`: a square, or with a `multiple` (see `Sizing`) a bucket's shape.

    Without `center_crop` it is squeezed to a square; a bucket's it is cropped to.
    """
    return sized(to_rgb(image), Sizing(resolution, center_crop, multiple))


def sized(image, sizing):
    """`to_pixels` of an upright image, which keeps its bands."""
    height, width = sizing.of(*image.size[::-1])
    if sizing.center_crop or sizing.multiple:
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    else:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def digest(pictures):
    """What tells a set of pictures from others, by pixels, captions and repeats: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for picture in pictures:
        found.update(picture.pixels.numpy().tobytes() + repr(picture.caption).encode())
        found.update(b"" if picture.mask is None else picture.mask.numpy().tobytes())
        found.update(b"" if picture.repeats == 1 else b"%d" % picture.repeats)
    return found.hexdigest()[:16]


class Entries(NamedTuple):
    """What lies in a data folder, by what it is; the names of each, sorted."""

    pictures: list  # regular files named as images
    ignored: list  # other files
    foreign: list  # of these, images of formats that cannot be read here
    folders: list
    strange: list  # links to nothing, pipes, devices, sockets
    masks: dict  # picture -> name of its mask
    sidecars: dict  # picture -> names of the text files with its name, the one that counts first


@functools.cache
def readable_suffixes():
    """Ends of the names of images that can be read; HEIF's are among them where pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return set(Image.registered_extensions())


IMAGES = "give the folder that holds your images."


def find_folder(folder, flag):
    """The folder, the value of `flag`; raises an `InputError` unless it is one."""
    if not str(folder).strip():
        raise InputError(f"{flag} {quoted(folder, 300)} is empty: {IMAGES}")
    if not os.path.isdir(folder):
        raise InputError(f"{flag} {quoted(folder, 300)} is not a folder: {IMAGES}")
    return folder


def list_folder(folder, flag="--train_data_dir"):
    """The `Entries` of a data folder, metadata left out; nothing is opened.

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    try:
        names = sorted(os.listdir(find_folder(folder, flag)))
    except OSError as error:
        raise InputError(f"{flag} {quoted(folder, 300)} cannot be read ({first_cause(error)}): {IMAGES}") from None
    known, entries = readable_suffixes(), Entries([], [], [], [], [], {}, {})
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
    masks = {os.path.splitext(name)[0]: name for name in entries.pictures}  # those of OneTrainer, by 01-masklabel
    for name in list(entries.pictures):  # a mask that belongs to no picture is a picture
        if mask := masks.get(os.path.splitext(name)[0] + MASK):
            entries.masks[name] = mask
    entries.pictures[:] = [name for name in entries.pictures if name not in entries.masks.values()]
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


def read_folder(folder, resolution, center_crop, flag="--train_data_dir", multiple=None, masked=False, mask_dir=None):
    """The `Picture`s of a folder, the value of `flag`; what is not a readable image is reported.

    With a `multiple` (see `Sizing`) they keep their shapes. Where they are `masked` they have the masks beside them,
    or in `mask_dir`, or else their alpha channels.

    A folder without pictures may hold folders of kohya's form, `10_my dog`, which are read instead.

    Raises:
        InputError: there is no such folder, no image in it, its captions cannot be read, or `mask_dir` is no folder of
            masks for them.
    """
    pictures = read_pictures(folder, Sizing(resolution, center_crop, multiple), flag, masked, mask_dir)
    if mask_dir is not None and all(picture.mask is None for picture in pictures):
        name = pictures[0].name
        raise InputError(
            f"--mask_dir {quoted(mask_dir, 300)} has no mask for any picture, such as"
            f" {plain(os.path.splitext(name)[0])}.png for {plain(name)}: give masks their names."
        )
    return pictures


def read_pictures(folder, sizing, flag, masked, mask_dir):
    """`read_folder`, of a folder or of one in it."""
    entries = list_folder(folder, flag)
    shown, folder, of_class = quoted(folder, 300), Path(folder), flag == "--class_data_dir"
    inside = [name for name in entries.folders if kohya_name(name)[1]] if not entries.pictures else []
    captions = all_captions(folder, entries.sidecars, flag)
    report(entries, shown, folder, inside)
    class_words = kohya_name(folder)[1]
    listed = [(name, lambda path=folder / name: Image.open(path)) for name in entries.pictures]
    if entries.masks and not masked:
        masks = len(set(entries.masks.values()))
        logger.warning(f"Left out {masks} masks in {shown}: --masked_loss counts the loss inside them.")
    open_mask = find_masks(folder, entries, mask_dir) if masked else None
    pictures = decode_pictures(listed, sizing, open_mask, " of the class" if of_class else "")
    pictures = [picture._replace(class_words=class_words) for picture in pictures]
    for name in inside:
        repeats = kohya_name(name)[0]
        inner = mask_dir if mask_dir is None or not (Path(mask_dir) / name).is_dir() else Path(mask_dir) / name
        of_folder = read_pictures(folder / name, sizing, flag, masked, inner)
        logger.info(f"{plain(name)}: {len(of_folder)} pictures, each drawn {repeats} times as often as one of 1_name.")
        pictures += [each._replace(name=f"{name}/{each.name}", repeats=repeats) for each in of_folder]
    pictures = [each._replace(caption=captions.get(file_key(each.name), each.caption)) for each in pictures]
    others = sorted(captions.keys() - {file_key(picture.name) for picture in pictures})
    if others and pictures:
        logger.warning(f"The metadata lists files that are not among the images: {some(others)}.")
    if not pictures:
        looked_at = len(entries.pictures) + len(entries.ignored) + len(entries.strange)
        advice = "empty it, and images are drawn" if of_class else "put 3 to 20 pictures of your concept there"
        if entries.foreign:
            advice = unreadable(entries.foreign)
        elif entries.folders:
            advice += f", or give one of the folders in it ({some(entries.folders)})"
        raise InputError(f"{flag} {shown} holds no readable image ({looked_at} files looked at): {advice}.")
    return pictures


def find_masks(folder, entries, mask_dir=None):
    """A function from the name of a picture to that of its mask's path, None where it has none.

    Raises:
        InputError: `--mask_dir` is no folder.
    """
    found = {name: folder / mask for name, mask in entries.masks.items()}
    if mask_dir is not None and not os.path.samefile(folder, find_folder(mask_dir, "--mask_dir")):
        there = list_folder(mask_dir, "--mask_dir")
        names = [*there.pictures, *there.masks.values()]
        by_stem = {os.path.splitext(name)[0].removesuffix(MASK): name for name in names}
        stems = {name: os.path.splitext(name)[0] for name in entries.pictures}
        found |= {name: Path(mask_dir) / by_stem[stem] for name, stem in stems.items() if stem in by_stem}
    return found.get


def read_mask(name, image, path, sizing):
    """The mask of a picture, uint8 `[1, height, width]`: that in a file, or its alpha channel; None where it has none.

    Args:
        name: of the picture.
        image: it, as PIL opens it.
        path: of the mask, or None.
        sizing: `Sizing`.

    Raises:
        InputError: the mask cannot be read, is of another shape, or black.
    """
    if path is None:
        image = ImageOps.exif_transpose(image)
        if not is_transparent(image):
            return None
        mask = image.convert("RGBA").getchannel("A")
        if mask.getextrema() == (255, 255):
            return None
    else:
        try:
            with Image.open(path) as opened:  # where it is transparent it has nothing painted
                mask = to_rgb(over(opened, "black") if is_transparent(opened) else opened).convert("L")
        except Exception as error:  # PIL raises nearly anything on a damaged file
            raise InputError(
                f"the mask {plain(path.name)} of {plain(name)} cannot be read ({why_not(error)}): save it as PNG."
            ) from None
        size = upright_size(image)[::-1]
        if abs(math.log(mask.width / mask.height * size[1] / size[0])) > 0.05:
            raise InputError(
                f"the mask {plain(path.name)} has {mask.width} x {mask.height} pixels and {plain(name)} {size[0]} x"
                f" {size[1]}: draw it over the picture as it is, uncropped."
            )
        mask = mask.resize(size, Image.Resampling.BILINEAR)
    mask = sized(mask, sizing)
    if not mask.any():
        raise InputError(f"the mask of {plain(name)} is black where it is trained: paint the subject white in it.")
    return mask


def unreadable(names):
    """What to do about images of foreign formats, in a sentence."""
    heif = all(os.path.splitext(name)[1].lower() in HEIF for name in names)
    return f"{some(names)} cannot be read here: {'pip install pillow-heif, or ' * heif}save such images as JPEG or PNG"


def report(entries, shown, folder, inside=()):
    """Says what of the `Entries` of a folder is not used.

    Args:
        shown: the folder, as a sentence has it.
        folder: its path.
        inside: names of folders in it that are read.
    """
    folders = [name for name in entries.folders if name not in inside and not name.startswith(".")]
    if entries.ignored:
        advice = f" ({unreadable(entries.foreign)})" if entries.foreign else ""
        names = some(entries.ignored)
        logger.warning(f"Ignored {len(entries.ignored)} files in {shown} that are not images: {names}{advice}.")
    others = [f"{name}/{each}" for name in folders for each in names_in(folder / name)]
    if written := [name for name in entries.ignored + others if os.path.splitext(name)[1].lower() in WRITTEN]:
        logger.warning(
            f"If {some(written)} hold captions, they are lost: captions are read from {' or '.join(METADATA_NAMES)}"
            " (fields file_name, text), and from 01.txt or 01.caption beside a picture 01.jpg."
        )
    if folders:
        logger.warning(f"Ignored folders in {shown}: {some(folders)}; only pictures beside them are read.")
    if entries.strange:
        logger.warning(f"Skipped links to nothing, pipes or devices in {shown}: {some(entries.strange)}.")


def decode_pictures(listed, sizing, open_mask=None, whose=""):
    """Decodes pictures one by one; one that cannot be decoded is skipped with a warning.

    Args:
        listed: (name, function that opens it as a PIL image) pairs.
        sizing: `Sizing`.
        open_mask: what `find_masks` returned; None reads no masks.
        whose: they are, for warnings.

    Returns:
        The `Picture`s, without captions.
    """
    resolution = sizing.resolution
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
                    pixels = to_pixels(image, *sizing)
                    mask = None if open_mask is None else read_mask(name, image, open_mask(name), sizing)
                    size = upright_size(image)
                    moving, side = getattr(image, "is_animated", False) and image.format != "MPO", min(image.size)
            pictures.append(Picture(name, pixels, None, frame(*size, *sizing), mask=mask))
        except InputError:
            raise
        except Exception as error:  # PIL raises nearly anything on a damaged file
            skipped.append(name)
            if len(skipped) <= MANY_WARNINGS:
                why = why_not(error)
                logger.warning(f"Skipped {plain(name)}{whose}, which cannot be read as an image ({why}).")
            continue
        if moving:
            animated.append(name)
        if side < resolution / 8:
            tiny.append(name)
    if len(skipped) > MANY_WARNINGS:
        logger.warning(f"Skipped {len(skipped)} of {len(listed)} files{whose} in all.")
    if animated:
        logger.warning(f"Of pictures that move or have pages, only the first is used: {some(animated)}.")
    if open_mask is not None and (without := [picture.name for picture in pictures if picture.mask is None]):
        logger.warning(f"The loss counts everywhere in pictures without a mask: {some(without)}.")
    if tiny:
        logger.warning(f"Pictures far smaller than the resolution of {resolution} will be a blur: {some(tiny)}.")
    return pictures


def warn_about_squeezed(pictures):
    """Says which of `Picture`s were so far from square that it shows in what is learned."""
    shapes = {p.name: p.framing.original for p in pictures if p.framing.scaled[0] == p.framing.scaled[1]}
    if squeezed := [name for name, shape in shapes.items() if max(shape) >= SQUEEZED * min(shape)]:
        logger.warning(
            f"Pictures that are far from square are squeezed, and learned like that: {some(squeezed)}; --center_crop"
            " takes their middle instead."
        )


def why_not(error):
    """Why a picture could not be decoded, in words."""
    if isinstance(error, UnidentifiedImageError):  # it would name an object in memory, or the whole path again
        return "it is empty, or of no format that is known here"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels: scale it down"
    return first_cause(error)
