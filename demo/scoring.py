"""The offline scorer of the demo: CLIP-I, CLIP-T, identity and a zero-shot reading of attributes.

It reads `demo/scorer` (a CLIPModel trained apart from the base, see `build_demo_base.py`)::

    scorer = Scorer("demo/scorer")
    scorer.clip_i(references, generated), scorer.clip_t(prompts, generated), scorer.read(generated)["shape"]

Images are PIL images, or uint8 arrays (H, W, 3), of any size; they are resized to 64x64 and mapped to [-1, 1].
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from build_demo_base import MAX_LENGTH, ConvTower
from PIL import Image


SCORER = Path(__file__).resolve().parent / "scorer"


def preprocess(images):
    """Images -> float (N, 3, 64, 64) in [-1, 1]."""
    pixels = []
    for image in images:
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image, np.uint8))
        image = image.convert("RGB")
        if image.size != (world.RESOLUTION, world.RESOLUTION):
            image = image.resize((world.RESOLUTION, world.RESOLUTION), Image.BICUBIC)
        pixels.append(np.asarray(image))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def appearance_prompts():
    """The appearances that can be read, as [((colour, colour2, pattern), prompt)]: 12 plain, 4 x 132 two-coloured."""
    prompts = [((c, c, "plain"), f"a photo of a plain {c} object") for c in world.COLOUR_NAMES]
    for pattern in world.PATTERNS[1:]:
        for a in world.COLOUR_NAMES:
            for b in world.COLOUR_NAMES:
                if a != b:
                    prompts.append(((a, b, pattern), world.fix_articles(f"a photo of a {a} and {b} {pattern} object")))
    return prompts


class Scorer:
    """A CLIPModel, its tokenizer, and the identity encoder where there is one."""

    def __init__(self, folder=SCORER, device="cpu"):
        from transformers import CLIPModel, CLIPTokenizer

        self.device = device
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).to(device).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.identity_encoder = None
        folder = Path(folder) / "identity"
        if folder.exists():
            from safetensors.torch import load_file

            config = json.loads((folder / "config.json").read_text())
            self.identity_encoder = ConvTower(config["width"], config["width_out"])
            weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
            self.identity_encoder.load_state_dict(weights)
            self.identity_encoder.to(device).eval().requires_grad_(False)
        self._prompts = {}

    def _batched(self, function, images, size=64):
        pixels = preprocess(images)
        return F.normalize(torch.cat([function(part.to(self.device)) for part in pixels.split(size)]), dim=-1)

    @torch.no_grad()
    def image_features(self, images):
        """N images -> (N, 96), of length one."""
        vision, project = self.model.vision_model, self.model.visual_projection
        return self._batched(lambda pixels: project(vision(pixel_values=pixels).pooler_output), images)

    @torch.no_grad()
    def text_features(self, prompts):
        """N strings -> (N, 96), of length one."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)
        pooled = [self.model.text_model(input_ids=part).pooler_output for part in tokens.split(256)]
        return F.normalize(self.model.text_projection(torch.cat(pooled)), dim=-1)

    @torch.no_grad()
    def identity_features(self, images):
        """N images -> (N, 64), of length one; the same object has the same features on any background."""
        if self.identity_encoder is None:
            raise ValueError("this scorer folder has no identity/: build it with --stages identity,export")
        return self._batched(self.identity_encoder, images)

    def clip_i(self, references, generated):
        """Mean cosine over all (reference, generated) pairs of CLIP image features."""
        return float((self.image_features(references) @ self.image_features(generated).T).mean())

    def identity(self, references, generated):
        """Mean cosine over all (reference, generated) pairs of identity features: the stand-in for DINO."""
        return float((self.identity_features(references) @ self.identity_features(generated).T).mean())

    def clip_t(self, prompts, images):
        """Mean cosine between each image and its own prompt."""
        return float((self.text_features(prompts) * self.image_features(images)).sum(-1).mean())

    def _choices(self, name):
        if name not in self._prompts:
            if name == "shape":
                pairs = [(s, f"a photo of a {s}") for s in world.SHAPES]
            elif name == "background":
                pairs = [(b, f"a photo of an object {phrase}") for b, phrase in world.BACKGROUNDS.items()]
            else:
                pairs = appearance_prompts()
            self._prompts[name] = [value for value, _ in pairs], self.text_features([text for _, text in pairs])
        return self._prompts[name]

    def read(self, images):
        """Zero-shot: N images -> {"shape", "background", "colour", "colour2", "pattern": lists of N names}.

        The colours and the pattern are read together, as the likeliest of 540 appearances.
        """
        features, found = self.image_features(images), {}
        for name in ("shape", "background", "appearance"):
            values, prompts = self._choices(name)
            found[name] = [values[i] for i in (features @ prompts.T).argmax(1).tolist()]
        appearance = zip(*found.pop("appearance"), strict=True)
        return found | dict(zip(("colour", "colour2", "pattern"), map(list, appearance), strict=True))


def accuracy(found, scenes):
    """What `Scorer.read` got right of the scenes, in [0, 1].

    `colour`: the whole *set* of colours is right (both of a two-coloured object, in either order).
    """
    count = len(scenes)
    right = {
        name: sum(a == getattr(s, name) for a, s in zip(found[name], scenes, strict=True)) / count
        for name in ("shape", "background", "pattern")
    }
    read = zip(found["colour"], found["colour2"], scenes, strict=True)
    right["colour"] = sum({a, b} == {s.colour, s.colour2} for a, b, s in read) / count
    return right
