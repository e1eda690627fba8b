# Copyright 2026 The ZOODiP textual inversion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Stable Diffusion that knows concepts learned with ZOODiP (or any other textual inversion).

    pipeline = DiffusionPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        custom_pipeline="./zoodip_pipeline.py",  # or the concept's repository: "user/concept"
        trust_remote_code=True,
        learned_embeds="./my-dog-concept",  # a file, a folder, a repository, or a list of them
    )
    pipeline("a photo of <my-dog> on the beach", negative_prompt="<bad-hands>").images[0].save("dog.png")

or from a pipeline that is loaded already, whose tokenizer and text encoder both then share:

    pipeline = DiffusionPipeline.from_pipe(
        stable_diffusion, custom_pipeline="./zoodip_pipeline.py", trust_remote_code=True, learned_embeds=...
    )

The images are those of `load_textual_inversion`; what this class adds is that a concept which does not fit the base
model is refused in plain words, or warned about, before it silently does nothing.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection


logger = logging.get_logger(__name__)

SDXL_KEYS = {"clip_l", "clip_g"}  # halves of one word


FORMATS = "emb_params", "clip_l", "*"  # keys that say how a file is written, and not what its word is


class ZOODiPPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` with the keyword `learned_embeds`; everything else is inherited.

    Args:
        learned_embeds: a concept or a list of them, each a safetensors (or `.pt`, `.bin`) file, a folder with
            `learned_embeds.safetensors`, or a repository on the Hub. More can be added with `load_learned_embeds`
            and taken away with `unload_textual_inversion`.

    Attributes:
        concepts: by placeholder token, the concept's `zoodip_config.json` ({} where it has none).
    """

    def __init__(  # `from_pipe` takes over the components whose annotated type is theirs
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
        learned_embeds: str | Path | list | tuple = None,
    ):
        if isinstance(image_encoder, (list, tuple)):  # `DiffusionPipeline.from_pipe` passes what the config says of it
            image_encoder = None
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
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
        """Adds one concept or a list of them to tokenizer and text encoder.

        A file that does not say the name of its word gives it the name of the file, as other programs do.

        Raises:
            OSError: no embedding is found there.
            ValueError: it is no embedding (of floating-point numbers that are finite, with a name that is one word),
                or does not fit this base model: another dimension, or a name that is taken.
        """
        for source in learned_embeds if isinstance(learned_embeds, (list, tuple)) else [learned_embeds]:
            if not isinstance(source, (str, Path)) or not str(source).strip():
                raise ValueError(
                    f"learned_embeds has {_quoted(source)}, which names no concept: give the path of a file or folder,"
                    " or a repository on the Hub."
                )
            try:
                (content,) = load_textual_inversion_state_dicts([str(source)])
            except Exception as error:  # Hub, safetensors, pickle and OS errors alike
                if _is_old_pickle(error):
                    raise ValueError(
                        f"learned_embeds {str(source)!r} is a pickle of an older program, which may run code when it"
                        " is opened: save it again as safetensors."
                    ) from error
                raise OSError(
                    f"learned_embeds {str(source)!r} is neither an embedding file, nor a folder or a repository on the"
                    f" Hub with a learned_embeds.safetensors ({_printable(error)})."
                ) from error
            words = [_token_and_embedding(source, word) for word in _words(content)]
            configs = {token: _read_config(source, token) for token, _ in words}
            for token, embedding in words:
                self._check_fit(source, token, embedding, configs[token])
            for token, embedding in words:
                rows = len(self.tokenizer) + len(embedding)
                if rows > self.text_encoder.get_input_embeddings().num_embeddings:
                    # as `load_textual_inversion` would, but without guessing rows that it overwrites at once
                    self.text_encoder.resize_token_embeddings(rows, mean_resizing=False)
                self.load_textual_inversion({token: embedding})
                self.concepts[token] = configs[token]
                logger.warning(f"Loaded {token!r}, {len(embedding)} vector(s), from {str(source)!r}.")
                self._warn_about_other_base(token)

    def unload_textual_inversion(self, tokens=None, tokenizer=None, text_encoder=None):
        """Takes concepts away again: those named, with *all* their vectors, or by default every one."""
        tokenizer = tokenizer or self.tokenizer
        if tokens is not None:
            wanted = "|".join(re.escape(token) for token in ([tokens] if isinstance(tokens, str) else tokens))
            added = [str(name) for name in tokenizer.added_tokens_encoder]
            tokens = [name for name in added if re.fullmatch(rf"({wanted})(_\d+)?", name)]
            if not tokens:  # an empty list would mean every token
                raise ValueError(f"nothing to unload: the concepts loaded here are {list(self.concepts)}.")
        super().unload_textual_inversion(tokens, tokenizer=tokenizer, text_encoder=text_encoder)
        left = tokenizer.get_vocab()
        self.concepts = {token: config for token, config in self.concepts.items() if token in left}

    def register_to_config(self, **kwargs):
        super().register_to_config(**kwargs)
        if "_name_or_path" in kwargs:  # the last thing `from_pretrained` does: only now is the base's name known
            for token in self.concepts:
                self._warn_about_other_base(token)

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
        # A saved pipeline holds its concepts in tokenizer and text encoder, so it is an ordinary Stable Diffusion.
        # Under this class's name, which diffusers does not know, it could not be loaded again.
        content = json.loads(super().to_json_string())
        return json.dumps({**content, "_class_name": "StableDiffusionPipeline"}, indent=2, sort_keys=True) + "\n"

    def _check_fit(self, source, token, embedding, config):
        expected, shape = self.text_encoder.get_input_embeddings().embedding_dim, embedding.shape
        if shape[1] != expected:
            origin = f" ({config['base_model']!r})" if config.get("base_model") else ""
            raise ValueError(
                f"learned_embeds {str(source)!r} does not fit this base model: its vectors have {shape[1]} entries and"
                f" this text encoder takes {expected}; load the base it was learned on{origin}."
            )
        if not embedding.to(self.text_encoder.dtype).isfinite().all():
            dtype = str(self.text_encoder.dtype).removeprefix("torch.")
            raise ValueError(
                f"learned_embeds {str(source)!r} has entries that are too large for {dtype}, the precision of this"
                " text encoder: load the pipeline with dtype=torch.float32."
            )
        vocabulary = self.tokenizer.get_vocab()
        vocabulary |= {name.lower(): None for name in self.tokenizer.added_tokens_encoder}
        for name in [token, *(f"{token}_{i}" for i in range(1, shape[0]))]:
            if {name, name.lower(), f"{name.lower()}</w>"} & vocabulary.keys():
                raise ValueError(
                    f"learned_embeds {str(source)!r} cannot be added: this tokenizer already knows the name {name!r};"
                    " unload that concept first, or give this one another name with"
                    f' load_textual_inversion({str(source)!r}, token="<another-name>").'
                )

    def _warn_about_other_base(self, token):
        trained_on, here = self.concepts[token].get("base_model"), self.name_or_path
        if not trained_on or not here:
            return
        # Of a local folder only its name is published, so only names can be compared then.
        if self.concepts[token].get("base_model_is_local") or Path(here).is_dir():
            same = Path(trained_on).name == Path(here).resolve().name
        else:
            same = trained_on == here
        if not same:
            logger.warning(
                f"{token} was learned on {trained_on!r} and this base model is {str(here)!r}: the concept may look"
                " different or not appear at all."
            )


# So that `AutoPipelineForImage2Image.from_pipe` and the like know what belongs to this class.
AUTO_TEXT2IMAGE_PIPELINES_MAPPING["zoodip"] = ZOODiPPipeline
AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["zoodip"] = StableDiffusionImg2ImgPipeline
AUTO_INPAINT_PIPELINES_MAPPING["zoodip"] = StableDiffusionInpaintPipeline


def _quoted(value):
    """A name as a sentence echoes it: on one line, and not all of a long one."""
    text = str(value)
    return repr(text if len(text) <= 80 else text[:79] + "…")


def _printable(error):
    """What an exception says, on one line of characters."""
    return " ".join(str(error).encode(errors="backslashreplace").decode().split())[:300]


def _is_old_pickle(error):
    """Whether PyTorch refused to open a file because it holds more than tensors in plain containers."""
    while error is not None and "Weights only load failed" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


def _words(content):
    """The content of an embedding file, one word each; of what holds no words by name, the whole."""
    words = isinstance(content, dict) and len(content) > 1 and not SDXL_KEYS & content.keys()
    if words and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        return [{token: content[token]} for token in sorted(content)]
    return [content]


def _token_and_embedding(source, content):
    """The name and the vectors `[k, d]` in the content of an embedding file.

    Raises:
        ValueError: it holds something else, or vectors or a name that cannot be used.
    """
    name = f"learned_embeds {str(source)!r}"
    if isinstance(content, dict) and "string_to_param" in content:  # Automatic1111
        token, vectors = content.get("name"), content["string_to_param"]
        if not token or not isinstance(token, str):
            token = Path(source).stem if Path(source).is_file() else Path(source).name
        if not hasattr(vectors, "keys") or "*" not in vectors.keys():
            raise ValueError(
                f'{name} has no vectors under string_to_param["*"], where Automatic1111 files keep them: save it again'
                " from the program that made it."
            )
        embedding = vectors["*"]
    elif isinstance(content, dict) and len(content) == 1:
        ((token, embedding),) = content.items()
        token = Path(source).stem if token in FORMATS else token
    else:
        held = sorted(map(str, content))[:10] if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{name} holds {held} and not one token with its embedding: files of other kinds, such as those of SDXL,"
            " do not fit Stable Diffusion 1.x and 2.x."
        )
    if not isinstance(embedding, torch.Tensor) or embedding.dim() not in (1, 2) or 0 in embedding.shape:
        shape = list(embedding.shape) if isinstance(embedding, torch.Tensor) else type(embedding).__name__
        raise ValueError(
            f"{name} holds {shape} where the vectors of its token should be, [vectors, dimension] with at least one of"
            " each: save it again from the program that made it."
        )
    if not embedding.is_floating_point():
        raise ValueError(
            f"{name} holds {str(embedding.dtype).removeprefix('torch.')} and not floating-point vectors: save it again"
            " from the program that made it."
        )
    if not embedding.float().isfinite().all():
        raise ValueError(
            f"{name} holds NaN or infinite entries, the sign of a training that diverged: use an earlier save of it,"
            " or train again with a smaller learning rate."
        )
    if not isinstance(token, str) or not token.isprintable() or not token or " " in token:
        raise ValueError(
            f"{name} names its token {_quoted(token)}, which is not one word: give it another name with"
            f' load_textual_inversion({str(source)!r}, token="<another-name>").'
        )
    return token, embedding.detach().reshape(-1, embedding.shape[-1])


def _read_config(source, token):
    """The `zoodip_config.json` beside a concept, if it speaks of this token; else {}."""
    try:
        path = Path(source)
        folder = path if path.is_dir() else path.parent
        file = folder / "zoodip_config.json" if path.exists() else hf_hub_download(str(source), "zoodip_config.json")
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        ours = config.get("placeholder_token") == token and isinstance(config.get("base_model", ""), str)
        return config if ours else {}
    except (OSError, ValueError, AttributeError, RecursionError):  # not there, or not ours
        return {}
