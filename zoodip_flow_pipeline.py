# Copyright 2026 The ZOODiP textual inversion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Z-Image that knows concepts learned with ZOODiP, or any other embedding with `qwen3_4b`.

    pipeline = DiffusionPipeline.from_pretrained(
        "Tongyi-MAI/Z-Image",
        custom_pipeline="./zoodip_flow_pipeline.py",  # or the concept's repository: "user/concept"
        trust_remote_code=True,
        learned_embeds="./my-dog-concept",  # a file, a folder, a repository, or a list of them
    )
    pipeline("a photo of <my-dog> on the beach").images[0].save("dog.png")

diffusers' class has no `load_textual_inversion`. What this class adds: the vectors of a word become rows of the
language model's token table, its name stands for all of them in prompts, and a concept that does not fit the base
model is refused in plain words. A file with `qwen3_4b_out` as well (`--learn output`) has vectors that replace what
the language model says of these rows. A name takes the space before it along, so that vectors follow each other and
the text before them as in ComfyUI. A file (diffusers looks for one pipeline class in it) serves one family of models:
`zoodip_pipeline.py` is for Stable Diffusion 1.x and 2.x, `zoodip_xl_pipeline.py` for SDXL.
"""

import contextlib
import copy
import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedModel


logger = logging.get_logger(__name__)

KEY = "qwen3_4b"  # the language model that a word is for, as ComfyUI calls it
OUTPUT = f"{KEY}_out"  # what it says of such a word
LAYERS = (-2,)  # of the language model that are read, side by side
FILE = "learned_embeds.safetensors"
NAMES = "placeholder_token", "placeholder_token_of_output"  # entries of a file's metadata with the word's name


class ZOODiPFlowPipeline(ZImagePipeline):
    """`ZImagePipeline` with the keyword `learned_embeds`; everything else is inherited.

    Args:
        learned_embeds: a concept or a list of them, each a safetensors file with `qwen3_4b`, a folder with such a
            `learned_embeds.safetensors`, or a repository on the Hub. More can be added with `load_learned_embeds` and
            taken away with `unload_learned_embeds`.

    Attributes:
        concepts: by placeholder token, the concept's `zoodip_config.json` ({} where it has none).
    """

    def __init__(  # `from_pipe` takes over the components whose annotated type is theirs
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: AutoTokenizer,
        transformer: ZImageTransformer2DModel,
        learned_embeds: str | Path | list | tuple = None,
    ):
        super().__init__(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        )
        self.concepts = {}
        self._vectors, self._plain_tokenizer = {}, tokenizer  # token -> [k, d]; what there is without concepts
        self._outputs = {}  # token -> [k, D], of those that have it
        if learned_embeds is not None:
            self.load_learned_embeds(learned_embeds)

    def load_learned_embeds(self, learned_embeds):
        """Adds one concept or a list of them to tokenizer and text encoder.

        The name of the word is what the file's metadata say, or the config beside it, or else the name of the file, as
        ComfyUI has it.

        Raises:
            OSError: no embedding is found there.
            ValueError: it is no embedding of Z-Image, or does not fit this base model: another dimension, or a name
                that is taken.
        """
        for source in learned_embeds if isinstance(learned_embeds, (list, tuple)) else [learned_embeds]:
            if not isinstance(source, (str, Path)) or not str(source).strip():
                raise ValueError(
                    f"learned_embeds has {source!r}, which names no concept: give the path of a file or folder, or a"
                    " repository on the Hub."
                )
            path, content, said = _read_file(source)
            config = _read_config(source)
            token = said or config.get("placeholder_token") or path.stem
            vectors = _vectors(source, content, KEY)
            self._check_fit(source, token, vectors, config)
            if OUTPUT in content:
                said = _vectors(source, content, OUTPUT)
                self._check_output(source, vectors, said)
                self._outputs[token] = said
            self._vectors[token], self.concepts[token] = vectors, config
            self._write_concepts()
            logger.warning(f"Loaded {token!r}, {len(vectors)} vector(s), from {str(source)!r}.")

    def unload_learned_embeds(self, tokens=None):
        """Takes concepts away again, with *all* their vectors: those named, or by default every one.

        Raises:
            ValueError: nothing of that name is loaded.
        """
        wanted = list(self.concepts) if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
        unknown = [token for token in wanted if token not in self.concepts]
        if unknown or not wanted:
            raise ValueError(f"nothing to unload for {unknown}: the concepts loaded here are {list(self.concepts)}.")
        for token in wanted:
            del self._vectors[token], self.concepts[token]
            self._outputs.pop(token, None)
        self._write_concepts()

    def encode_prompt(self, prompt, device=None, do_classifier_free_guidance=True, negative_prompt=None, **more):
        """As inherited, with all vectors of its words in the place of their names."""
        prompt, negative_prompt = self._spelled(prompt), self._spelled(negative_prompt)
        with self._outputs_in_place():
            return super().encode_prompt(prompt, device, do_classifier_free_guidance, negative_prompt, **more)

    @contextlib.contextmanager
    def _outputs_in_place(self):
        """In here the language model says of words what their `qwen3_4b_out` has, whatever the prompt."""

        def hook(module, given, named, output):
            ids, states = named["input_ids"], list(output.hidden_states)
            for token, said in self._outputs.items():
                first = self.tokenizer.convert_tokens_to_ids(token)
                is_word = (ids >= first) & (ids < first + len(said))
                numbers = (ids - first).clamp(0, len(said) - 1)
                for layer, part in zip(LAYERS, said.chunk(len(LAYERS), dim=-1)):
                    states[layer] = torch.where(is_word[..., None], part.to(states[layer])[numbers], states[layer])
            output.hidden_states = tuple(states)

        handle = self.text_encoder.register_forward_hook(hook, with_kwargs=True) if self._outputs else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def save_pretrained(self, *given, **named):
        """As inherited.

        Raises:
            ValueError: a concept has vectors for the language model's output, which no plain pipeline can hold.
        """
        if self._outputs:
            raise ValueError(
                f"a saved pipeline cannot hold {list(self._outputs)}, learned with --learn output: unload them first."
            )
        super().save_pretrained(*given, **named)

    def to_json_string(self):
        # A saved pipeline holds its concepts in tokenizer and text encoder, so it is an ordinary Z-Image. Under this
        # class's name, which diffusers does not know, it could not be loaded again.
        content = json.loads(super().to_json_string())
        return json.dumps({**content, "_class_name": "ZImagePipeline"}, indent=2, sort_keys=True) + "\n"

    def _spelled(self, prompt):
        """A prompt, a list of them or None, with the names of all vectors where it has the name of a word."""
        if prompt is None or not self._vectors:
            return prompt
        if not isinstance(prompt, str):
            return [self._spelled(each) for each in prompt]
        tokens = sorted(self._vectors, key=len, reverse=True)
        words = {token: " ".join(_names(token, len(self._vectors[token]))) for token in tokens}
        pattern = f"({'|'.join(map(re.escape, tokens))})(?!_\\d)"
        return re.sub(pattern, lambda found: words[found[0]], prompt)

    def _write_concepts(self):
        """Makes the tokenizer that knows the names of all concepts, and writes their rows."""
        self.tokenizer = copy.deepcopy(self._plain_tokenizer)
        names = [name for token, vectors in self._vectors.items() for name in _names(token, len(vectors))]
        self.tokenizer.add_tokens([AddedToken(name, lstrip=True) for name in names])
        if not names:
            return
        ids = self.tokenizer.convert_tokens_to_ids(names)
        if max(ids) >= self.text_encoder.get_input_embeddings().num_embeddings:  # Qwen's has rows to spare
            self.text_encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = self.text_encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[ids] = torch.cat(list(self._vectors.values())).to(table)

    def _check_output(self, source, vectors, said):
        width = len(LAYERS) * self.text_encoder.get_input_embeddings().embedding_dim
        if said.shape != (len(vectors), width) or not said.isfinite().all():
            raise ValueError(
                f"learned_embeds {str(source)!r} has {list(said.shape)} under {OUTPUT!r} where finite"
                f" {[len(vectors), width]} should be: load the base that it was learned on, or get it again."
            )

    def _check_fit(self, source, token, vectors, config):
        name = f"learned_embeds {str(source)!r}"
        width = self.text_encoder.get_input_embeddings().embedding_dim
        if vectors.shape[1] != width:
            origin = f" ({config['base_model']!r})" if config.get("base_model") else ""
            raise ValueError(
                f"{name} does not fit this base model: its vectors have {vectors.shape[1]} entries and this text"
                f" encoder takes {width}; load the base it was learned on{origin}."
            )
        if not isinstance(token, str) or not token.isprintable() or not token or " " in token:
            raise ValueError(f"{name} names its token {str(token)[:80]!r}, which is not one word: rename the file.")
        dtype = self.text_encoder.get_input_embeddings().weight.dtype
        if not vectors.to(dtype).isfinite().all():
            raise ValueError(
                f"{name} has entries that are NaN, infinite or too large for {str(dtype).removeprefix('torch.')}: use"
                " an earlier save of it, or load the pipeline with dtype=torch.float32."
            )
        for word in _names(token, len(vectors)):
            if word in self.tokenizer.get_vocab():
                raise ValueError(
                    f"{name} cannot be added: this tokenizer already knows the name {word!r}; unload that concept"
                    " first, or rename the file."
                )


def _names(token, count):
    """The names of the vectors of a word: tok, tok_1, tok_2, ..."""
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def _printable(error):
    """What an exception says, on one line of characters."""
    return " ".join(str(error).encode(errors="backslashreplace").decode().split())[:300]


def _read_file(source):
    """The path, the tensors and the word's name, where the metadata say it, of an embedding file.

    Raises:
        OSError: there is none, or it is damaged.
    """
    path = Path(source)
    try:
        if not path.exists():
            path = Path(hf_hub_download(str(source), FILE))
        path = path / FILE if path.is_dir() else path
        with safe_open(path, framework="pt") as file:
            content, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
            return path, content, next((metadata[name] for name in NAMES if name in metadata), None)
    except Exception as error:  # Hub, safetensors and OS errors alike
        raise OSError(
            f"learned_embeds {str(source)!r} is neither an embedding file, nor a folder or a repository on the Hub"
            f" with a {FILE} ({_printable(error)})."
        ) from error


def _vectors(source, content, key):
    """The vectors `[k, d]` under a key in the content of an embedding file.

    Raises:
        ValueError: it holds something else.
    """
    name = f"learned_embeds {str(source)!r}"
    if key not in content:
        raise ValueError(
            f"{name} holds {sorted(content)[:10]} and not {KEY}: it is not of Z-Image; a word of Stable Diffusion goes"
            " with zoodip_pipeline.py, one of SDXL with zoodip_xl_pipeline.py, and the base that it was learned on."
        )
    vectors = content[key]
    if vectors.dim() not in (1, 2) or 0 in vectors.shape:
        raise ValueError(f"{name} holds no vectors [vectors, dimension] under {key!r}: save it again.")
    if not vectors.is_floating_point():
        raise ValueError(f"{name} holds {vectors.dtype} and not floating-point vectors: save it again.")
    return vectors.detach().reshape(-1, vectors.shape[-1])


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
