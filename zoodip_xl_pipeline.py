# Copyright 2026 The ZOODiP textual inversion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""SDXL that knows concepts learned with ZOODiP, or any other embedding with `clip_l` and `clip_g`.

    pipeline = DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-base-1.0",
        custom_pipeline="./zoodip_xl_pipeline.py",  # or the concept's repository: "user/concept"
        trust_remote_code=True,
        learned_embeds="./my-dog-concept",  # a file, a folder, a repository, or a list of them
    )
    pipeline("a photo of <my-dog> on the beach").images[0].save("dog.png")

The images are those of two calls of `load_textual_inversion`, one for each text encoder. What this class adds: it
reads the file with both halves, it pools the text where the concept was trained to have it pooled, and a concept that
does not fit the base model is refused in plain words. A file (diffusers looks for one pipeline class in it) serves one
family of models: `zoodip_pipeline.py` is for Stable Diffusion 1.x and 2.x.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)


logger = logging.get_logger(__name__)

KEYS = "clip_l", "clip_g"  # the halves of a word: of the first and of the second text encoder


class ZOODiPXLPipeline(StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with the keyword `learned_embeds`; everything else is inherited.

    Args:
        learned_embeds: a concept or a list of them, each a safetensors file with `clip_l` and `clip_g`, a folder with
            such a `learned_embeds.safetensors`, or a repository on the Hub. More can be added with
            `load_learned_embeds` and taken away with `unload_learned_embeds`.

    Attributes:
        concepts: by placeholder token, the concept's `zoodip_config.json` ({} where it has none).
    """

    def __init__(  # `from_pipe` takes over the components whose annotated type is theirs
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        learned_embeds: str | Path | list | tuple = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=None if isinstance(image_encoder, (list, tuple)) else image_encoder,
            feature_extractor=None if isinstance(feature_extractor, (list, tuple)) else feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.concepts = {}
        if learned_embeds is not None:
            self.load_learned_embeds(learned_embeds)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """A pipeline of the same components, which are shared; it knows the concepts that `pipeline` knows."""
        new = super().from_pipe(pipeline, **kwargs)
        if hasattr(new, "concepts"):  # `custom_pipeline` can make it another class
            new.concepts = {**getattr(pipeline, "concepts", {}), **new.concepts}
        return new

    def load_learned_embeds(self, learned_embeds):
        """Adds one concept or a list of them to both tokenizers and text encoders.

        The name of the word is what the file's metadata say, or the config beside it, or else the name of the file, as
        ComfyUI has it.

        Raises:
            OSError: no embedding is found there.
            ValueError: it is no embedding of SDXL, or does not fit this base model: other dimensions, or a name that
                is taken.
        """
        for source in learned_embeds if isinstance(learned_embeds, (list, tuple)) else [learned_embeds]:
            if not isinstance(source, (str, Path)) or not str(source).strip():
                raise ValueError(
                    f"learned_embeds has {source!r}, which names no concept: give the path of a file or folder, or a"
                    " repository on the Hub."
                )
            try:
                (content,) = load_textual_inversion_state_dicts([str(source)])
            except Exception as error:  # Hub, safetensors, pickle and OS errors alike
                raise OSError(
                    f"learned_embeds {str(source)!r} is neither an embedding file, nor a folder or a repository on the"
                    f" Hub with a learned_embeds.safetensors ({_printable(error)})."
                ) from error
            config = _read_config(source)
            token = _said_name(source) or config.get("placeholder_token") or Path(source).stem
            halves = _halves(source, content)
            self._check_fit(source, token, halves, config)
            for half, (text_encoder, tokenizer) in zip(halves, self._encoders()):
                rows = len(tokenizer) + len(half)
                if rows > text_encoder.get_input_embeddings().num_embeddings:
                    # as `load_textual_inversion` would, but without guessing rows that it overwrites at once
                    text_encoder.resize_token_embeddings(rows, mean_resizing=False)
                self.load_textual_inversion({token: half}, text_encoder=text_encoder, tokenizer=tokenizer)
            self.concepts[token] = config
            logger.warning(
                f"Loaded {token!r}, {len(halves[0])} vector(s) for each text encoder, from {str(source)!r}."
            )
            self._pool_as_trained()

    def unload_learned_embeds(self, tokens=None):
        """Takes concepts away again, with *all* their vectors: those named, or by default every one.

        Raises:
            ValueError: nothing of that name is loaded.
        """
        wanted = list(self.concepts) if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
        unknown = [token for token in wanted if token not in self.concepts]
        if unknown or not wanted:
            raise ValueError(f"nothing to unload for {unknown}: the concepts loaded here are {list(self.concepts)}.")
        pattern = "|".join(map(re.escape, wanted))
        for text_encoder, tokenizer in self._encoders():
            added = [str(name) for name in tokenizer.added_tokens_encoder]
            names = [name for name in added if re.fullmatch(rf"({pattern})(_\d+)?", name)]
            self.unload_textual_inversion(names, tokenizer=tokenizer, text_encoder=text_encoder)
        self.concepts = {token: config for token, config in self.concepts.items() if token not in wanted}
        self._pool_as_trained()

    def _maybe_convert_prompt(self, prompt, tokenizer):
        """A prompt with all vectors of its words, which are compared as the tokenizer reads them: CLIP knows no
        capitals."""
        added, words = tokenizer.added_tokens_encoder, {}
        for name in sorted((name for name in added if f"{name}_1" in added), key=len, reverse=True):
            count = next(i for i in range(1, len(added) + 1) if f"{name}_{i}" not in added)
            words[name.lower()] = " ".join([name, *(f"{name}_{i}" for i in range(1, count))])
        if not words:
            return prompt
        names = "|".join(map(re.escape, words))
        return re.sub(rf"({names})(?!_\d)", lambda found: words.get(found[0].lower(), found[0]), prompt, flags=re.I)

    def to_json_string(self):
        # A saved pipeline holds its concepts in tokenizers and text encoders, so it is an ordinary SDXL. Under this
        # class's name, which diffusers does not know, it could not be loaded again.
        content = json.loads(super().to_json_string())
        return json.dumps({**content, "_class_name": "StableDiffusionXLPipeline"}, indent=2, sort_keys=True) + "\n"

    def _encoders(self):
        return (self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)

    def _pool_as_trained(self):
        """Pools the text at the end of the prompt where the concepts were trained so (`--pool_at_eos`)."""
        wishes = {bool(config.get("settings", {}).get("pool_at_eos")) for config in self.concepts.values() if config}
        if len(wishes) == 2:
            logger.warning(
                f"Of {', '.join(self.concepts)}, some were trained with --pool_at_eos and some without: the text is"
                " pooled at the end of the prompt, and the others look different."
            )
        at_end, config = True in wishes, self.text_encoder_2.config
        self.text_encoder_2.text_model.eos_token_id = self.tokenizer_2.eos_token_id if at_end else config.eos_token_id

    def _check_fit(self, source, token, halves, config):
        name = f"learned_embeds {str(source)!r}"
        widths = [encoder.get_input_embeddings().embedding_dim for encoder, _ in self._encoders()]
        found = [half.shape[1] for half in halves]
        if found != widths:
            origin = f" ({config['base_model']!r})" if config.get("base_model") else ""
            raise ValueError(
                f"{name} does not fit this base model: its vectors have {found} entries and these text encoders take"
                f" {widths}; load the base it was learned on{origin}."
            )
        if not isinstance(token, str) or not token.isprintable() or not token or " " in token:
            raise ValueError(f"{name} names its token {str(token)[:80]!r}, which is not one word: rename the file.")
        for half, (text_encoder, _) in zip(halves, self._encoders()):
            if not half.to(text_encoder.dtype).isfinite().all():
                raise ValueError(
                    f"{name} has entries that are NaN, infinite or too large for"
                    f" {str(text_encoder.dtype).removeprefix('torch.')}: use an earlier save of it, or load the"
                    " pipeline with dtype=torch.float32."
                )
        vocabulary = self.tokenizer.get_vocab() | self.tokenizer_2.get_vocab()
        vocabulary |= {name.lower(): None for name in self.tokenizer.added_tokens_encoder}
        for word in [token, *(f"{token}_{i}" for i in range(1, len(halves[0])))]:
            if {word, word.lower(), f"{word.lower()}</w>"} & vocabulary.keys():
                raise ValueError(
                    f"{name} cannot be added: this tokenizer already knows the name {word!r}; unload that concept"
                    " first, or rename the file."
                )


# So that `AutoPipelineForImage2Image.from_pipe` and the like know what belongs to this class.
AUTO_TEXT2IMAGE_PIPELINES_MAPPING["zoodip-xl"] = ZOODiPXLPipeline
AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["zoodip-xl"] = StableDiffusionXLImg2ImgPipeline
AUTO_INPAINT_PIPELINES_MAPPING["zoodip-xl"] = StableDiffusionXLInpaintPipeline


def _printable(error):
    """What an exception says, on one line of characters."""
    return " ".join(str(error).encode(errors="backslashreplace").decode().split())[:300]


def _halves(source, content):
    """Both halves of a word, `[k, d1]` and `[k, d2]`, in the content of an embedding file.

    Raises:
        ValueError: it holds something else.
    """
    name = f"learned_embeds {str(source)!r}"
    if not isinstance(content, dict) or not set(KEYS) <= content.keys():
        held = sorted(map(str, content))[:10] if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{name} holds {held} and not clip_l and clip_g: it is not of SDXL, or half of it; a word of Stable"
            " Diffusion 1.x or 2.x goes with zoodip_pipeline.py and the base it was learned on."
        )
    halves = []
    for key in KEYS:
        half = content[key]
        if not isinstance(half, torch.Tensor) or half.dim() not in (1, 2) or 0 in half.shape:
            raise ValueError(f"{name} holds no vectors [vectors, dimension] under {key!r}: save it again.")
        if not half.is_floating_point():
            raise ValueError(f"{name} holds {half.dtype} and not floating-point vectors: save it again.")
        halves.append(half.detach().reshape(-1, half.shape[-1]))
    if len(halves[0]) != len(halves[1]):
        raise ValueError(
            f"{name} has {len(halves[0])} vectors in clip_l and {len(halves[1])} in clip_g: save it again."
        )
    return halves


def _said_name(source):
    """The name of the word in the metadata of an embedding file or folder of files; None where there is none."""
    path = Path(source)
    try:
        if not path.exists():
            path = Path(hf_hub_download(str(source), "learned_embeds.safetensors"))
        with safe_open(path / "learned_embeds.safetensors" if path.is_dir() else path, framework="pt") as file:
            return (file.metadata() or {}).get("placeholder_token")
    except Exception:  # Hub, safetensors and OS errors alike: another kind of file, or another name
        return None


def _read_config(source):
    """The `zoodip_config.json` beside a concept; {} where there is none."""
    try:
        path = Path(source)
        folder = path if path.is_dir() else path.parent
        file = folder / "zoodip_config.json" if path.exists() else hf_hub_download(str(source), "zoodip_config.json")
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        return config if isinstance(config.get("settings", {}), dict) else {}
    except (OSError, ValueError, AttributeError, RecursionError):  # not there, or not ours
        return {}
