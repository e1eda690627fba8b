"""What families whose text encoders are CLIP's have in common: tokenizers, and prompts of one length."""

import json

import torch
from transformers import CLIPTokenizer

from ..weight_files import names_in
from .family import Family, Inputs, Text


class ClipFamily(Family):
    """A family with one or more of CLIP's text encoders, each with a tokenizer of its own."""

    tokenizer_kind = "CLIP"
    padding = (None,)  # what each tokenizer pads with, None for the end's token; the rest of their files is the same

    def read_tokenizer(self, folder):
        """The `CLIPTokenizer` of a folder; without its files transformers would make an empty one in silence."""
        names = set(names_in(folder))
        if "tokenizer.json" not in names:
            if not {"vocab.json", "merges.txt"} <= names:
                raise ValueError("it has neither tokenizer.json nor vocab.json and merges.txt")
            check_merges(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        length = tokenizer.model_max_length
        if type(length) is not int or not 3 <= length < 10**6:
            raise ValueError("tokenizer_config.json is missing or gives no model_max_length")
        ids = tokenizer(["a photo"], padding="max_length", truncation=True, max_length=length).input_ids[0]
        if len(ids) != length:
            raise ValueError(f"it pads to {len(ids)} tokens and not to {length}")
        return tokenizer

    def tokenize(self, tokenizers, texts):
        texts = list(texts)

        def ids(tokenizer):
            limit = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
            return tokenizer(texts, return_tensors="pt", **limit).input_ids

        return torch.cat([ids(tokenizer) for tokenizer in tokenizers], dim=1)

    def example(self, base, count, resolution, device="cpu", dtype=torch.float32):
        """`Inputs` of a denoiser that takes the states of all encoders side by side, and nothing else of the text."""
        side = resolution // base.vae_factor
        noisy = torch.zeros(count, base.denoiser_config["in_channels"], side, side, device=device, dtype=dtype)
        states = torch.zeros(count, base.prompt_length, base.word_width, device=device, dtype=dtype)
        sizes = torch.zeros(count, 6 if self.crops else 0, device=device)
        return Inputs(noisy, torch.zeros(count, device=device), Text(states), sizes)


def check_merges(folder):
    """Raises a `ValueError` if merges.txt has lost lines: words would fall into letters in silence."""
    vocabulary = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = sum(bool(line.strip()) and not line.startswith("#version") for line in lines)
    if merges + 2 * 256 + 16 < vocabulary:  # every token but bytes and a few special ones is made by a merge
        raise ValueError(f"merges.txt has {merges} merges for {vocabulary} tokens, it is cut")
