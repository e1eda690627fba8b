"""Describes pictures by a model of transformers that lies on this computer, for captions; nothing is downloaded.

    python -m personalization.web.captioner MODEL PICTURE ...

prints a line of JSON for each picture: {"picture": its path, "caption": what the model says}. It is a process of its
own, so that the page needs no memory for the model.
"""

import json
import os
import re
import sys
from pathlib import Path


LONGEST = 40  # tokens of a caption


def command(model, pictures):
    """The command line that describes pictures."""
    return ["python", "-m", "personalization.web.captioner", str(model), *map(str, pictures)]


def read_captions(text):
    """What the process printed, as path -> caption."""
    rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"picture"')]
    return {row["picture"]: row["caption"] for row in rows}


def with_concept(caption, class_word):
    """A model's caption with {} where the concept stands: instead of the plain word, or in front of the caption.

    Args:
        caption: such as "a brown dog on a beach".
        class_word: such as dog; "" where nobody has said.
    """
    caption = " ".join(str(caption).split()).strip(" .")
    if not caption:
        return ""
    marked = re.sub(rf"\b{re.escape(class_word)}\b", "{}", caption, count=1, flags=re.IGNORECASE) if class_word else ""
    return marked if "{}" in marked else f"a photo of {{}}, {caption}"


def describe(model, pictures):
    """Yields a caption for each picture.

    Args:
        model: folder of a model that makes text of an image.
        pictures: paths.

    Raises:
        ValueError: the folder holds no such model.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..data.images import to_rgb
    from .workspace import open_picture

    processor = AutoProcessor.from_pretrained(model, local_files_only=True)
    network = AutoModelForImageTextToText.from_pretrained(model, local_files_only=True).eval()
    for path in pictures:
        with open_picture(path) as image, torch.inference_mode():
            inputs = processor(images=to_rgb(image), return_tensors="pt")
            tokens = network.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        yield processor.batch_decode(tokens, skip_special_tokens=True)[0]


def main(model, pictures):
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        for path, caption in zip(pictures, describe(model, pictures)):
            print(json.dumps({"picture": path, "caption": caption}), flush=True)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{Path(model).name} is no model that describes pictures: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
