"""Training pictures of a `datasets` dataset, on the Hub or on disk, each judged where it enters.

Only a run that has one imports this: `datasets` and what it brings take half a second.
"""

import os

import datasets

from ..errors import InputError, first_cause, quoted, shorten
from ..logs import get_logger
from .captions import check_text
from .images import Sizing, decode_pictures


logger = get_logger(__name__)

DEFAULT_CAPTION_COLUMN = "text"
TEXT_TYPES = "string", "large_string", "string_view"


def read_dataset(
    name, config_name, image_column, caption_column, resolution, center_crop, multiple=None, masked=False
):
    """The `Picture`s of a `datasets` dataset on the Hub or on disk (its train split).

    An image that cannot be decoded is skipped with a warning; a caption that is null, empty or blank is none.

    Raises:
        InputError: it cannot be loaded, has no such column, one of another kind, or no images.
    """
    shown = quoted(name, 300)
    if not name.strip():
        raise InputError("--dataset_name '' is empty: give the id of a dataset on the Hub, or --train_data_dir.")
    try:
        dataset = saved_dataset(name) or datasets.load_dataset(name, config_name, split="train")
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
        for picture in decode_pictures(
            listed, Sizing(resolution, center_crop, multiple), (lambda name: None) if masked else None
        )
    ]
    if not pictures:
        raise InputError(
            f"--dataset_name {shown} has no readable image among the {count} of its train split: choose another"
            " or another --image_column."
        )
    return pictures


def saved_dataset(name):
    """The dataset, or its train split, in a folder that `save_to_disk` wrote; None for any other."""
    if not any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
        return None
    dataset = datasets.load_from_disk(name)
    return dataset["train"] if isinstance(dataset, datasets.DatasetDict) else dataset


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
