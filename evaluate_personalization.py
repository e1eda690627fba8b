#!/usr/bin/env python
# Copyright 2026 The ZOODiP textual inversion authors. SPDX-License-Identifier: Apache-2.0
#
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11", "diffusers>=0.42.1", "transformers>=5.23", "accelerate>=1.15", "peft>=0.21",
#     "huggingface_hub>=2.4", "datasets>=5.2", "safetensors>=0.8", "bitsandbytes>=0.50", "psutil>=7.2", "Jinja2>=3.1",
#     "matplotlib>=3.10", "numpy>=2.0", "pillow>=12.0", "tensorboard>=2.21", "tqdm>=4.66",
# ]
# ///
"""Judge learned concepts: CLIP-T, CLIP-I, DINO and diversity over DreamBooth's prompts, with intervals and pictures.

    python evaluate_personalization.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --reference_images ./my-dog --class_word dog --prompts living --results mine=my-dog-concept --output_dir scores

on the demo base, with the demo's own scorer, offline:

    python evaluate_personalization.py --pretrained_model_name_or_path demo/base_eps \
        --reference_images demo/subjects/striped_star --class_word star --prompts demo/prompts.txt \
        --results learned=demo/output/striped_star --clip_model demo/scorer --dino_model demo/scorer/identity \
        --trust_remote_code --output_dir scores

A result is a learned embedding (ZOODiP), a LoRA (BP-low / ZO-high) or tuned scales (TuneQDM); scales are drawn with
the base quantized as in their training, the others with the base as it is. `--draw_only` leaves out references,
encoders and scores.
Every column (the plain word first, then the results) draws the same prompts from the same noise. Pictures that are
there already are not drawn again, so a run that was stopped goes on. Written to `--output_dir`: `images/`,
`evaluation.json`, `evaluation.md` (the table) and `contact_sheet.png`.
"""

import personalization.quick_help  # noqa: F401, before the libraries that take seconds
import personalization.quiet  # noqa: F401, before the libraries whose false alarms it silences


# isort: split
import contextlib
import functools
import itertools
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import convert_unet_state_dict_to_peft
from PIL import Image, ImageDraw
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

import tuneqdm_pipeline as tuneqdm
from personalization import flags
from personalization.data import images
from personalization.data.captions import check_unicode
from personalization.data.prompts import normalized, placeholder_names
from personalization.errors import InputError, is_outside, quoted, reason, run_script, shorten
from personalization.files import atomic_path, check_apart, check_writable, read_json, sha256, write_json
from personalization.models import base_model, embedding_files, families, weight_cache
from personalization.runs import embeddings, provenance
from personalization.runs.run_folder import occupied


# =====================================================================================================
# Metrics. Features are of length one; P prompts, N images of each, R references.
# =====================================================================================================


def prompt_fidelity(image_features, text_features):
    """CLIP-T by prompt `[P]`: mean cosine of `[P, N, d]` with its own prompt's `[P, d]`."""
    return torch.einsum("pnd,pd->pn", image_features, text_features).mean(dim=1)


def subject_fidelity(image_features, reference_features):
    """CLIP-I or DINO by prompt `[P]`: mean cosine over all pairs of `[P, N, d]` with `[R, d]`."""
    return torch.einsum("pnd,rd->pnr", image_features, reference_features).mean(dim=(1, 2))


def similarity_within_prompts(image_features):
    """DINO between images of one prompt `[P]` (lower is more diverse): mean cosine over pairs of different images."""
    count = image_features.shape[1]
    cosines = torch.einsum("pnd,pmd->pnm", image_features, image_features)
    return (cosines.sum(dim=(1, 2)) - count) / (count * (count - 1))


def bootstrap_interval(values, resamples=10_000, seed=0):
    """95 % percentile interval of the mean of `[P]` values, prompts drawn with replacement."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return tuple(float(x) for x in np.quantile(values[drawn].mean(axis=1), [0.025, 0.975]))


@dataclass(frozen=True)
class Score:
    """A metric of a column."""

    mean: float
    low: float  # of the 95 % interval over prompts
    high: float
    by_prompt: list


def score(values):
    """The `Score` of a metric's values by prompt."""
    values = [float(x) for x in values]
    return Score(sum(values) / len(values), *bootstrap_interval(values), values)


# =====================================================================================================
# Prompts
# =====================================================================================================

# DreamBooth's (Ruiz et al., CVPR 2023), {} where the subject stands.
_SHARED = (
    "in the jungle|in the snow|on the beach|on a cobblestone street|on top of pink fabric|on top of a wooden floor|"
    "with a city in the background|with a mountain in the background|with a blue house in the background|"
    "on top of a purple rug in a forest"
).split("|")
_OBJECT = (
    "with a wheat field in the background|with a tree and autumn leaves in the background|"
    "with the Eiffel Tower in the background|floating on top of water|floating in an ocean of milk|"
    "on top of green grass with sunflowers around it|on top of a mirror|on top of the sidewalk in a crowded street|"
    "on top of a dirt road|on top of a white rug"
).split("|")
_LIVING = (
    "wearing a red hat|wearing a santa hat|wearing a rainbow scarf|wearing a black top hat and a monocle|"
    "in a chef outfit|in a firefighter outfit|in a police outfit|wearing pink glasses|wearing a yellow shirt|"
    "in a purple wizard outfit"
).split("|")
_ATTRIBUTES = [f"a {word} {{}}" for word in ("red", "purple", "shiny", "wet", "cube shaped")]
PROMPTS = {
    name: [f"a {{}} {scene}" for scene in _SHARED + scenes] + _ATTRIBUTES
    for name, scenes in {"object": _OBJECT, "living": _LIVING}.items()
}


def read_prompts(name):
    """The prompts of a set in `PROMPTS`, or the lines of a text file.

    Raises:
        InputError: no such set or file, no prompt in it, or one without {}.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    try:
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as error:
        sets = " or ".join(PROMPTS)
        raise InputError(f"--prompts {name!r} cannot be read ({error}): give {sets}, or a text file.") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"--prompts {name!r} holds no prompt: write one on each line, {{}} where the subject stands.")
    for prompt in prompts:
        if "{}" not in prompt:
            raise InputError(
                f"--prompts {name!r}: {prompt[:80]!r} does not say where the subject stands: put {{}} there."
            )
    return prompts


# =====================================================================================================
# What is compared
# =====================================================================================================


@dataclass(frozen=True)
class Column:
    """The plain word, or a result."""

    label: str
    word: str  # what the subject is called
    folder: Path | None  # of a result
    fingerprint: str  # of what it draws with
    kind: str = "embedding"  # of the result, key of `KINDS`
    base: base_model.Base | None = None  # of a result
    num_vectors: int = 1  # of the word
    pool_at_eos: bool = False  # whether it was trained with that flag

    @property
    def subject(self):
        """What stands for the subject in prompts of the family's pipeline: all vectors, where it wants them named."""
        if self.base is None or self.base.family.expands_words:
            return self.word
        return " ".join(placeholder_names(self.word, self.num_vectors))

    @property
    def config_path(self):
        return self.folder / KINDS[self.kind].config_name

    @property
    def trainer(self):
        return Path(__file__).with_name(KINDS[self.kind].trainer)


class Kind(NamedTuple):
    """A kind of result: the files in its folder, and who wrote them."""

    result_name: str
    config_name: str
    trainer: str


KINDS = {
    "embedding": Kind("learned_embeds.safetensors", "zoodip_config.json", "train_zoodip_textual_inversion.py"),
    "scales": Kind(tuneqdm.SCALES_FILE, tuneqdm.CONFIG_FILE, "train_tuneqdm_dreambooth.py"),
    "lora": Kind("pytorch_lora_weights.safetensors", "selective_config.json", "train_selective_dreambooth_lora.py"),
}
RESULT_FILE = KINDS["embedding"].result_name
INPUTS = "pretrained_model_name_or_path", "tokenizer_name", "reference_images", "clip_model", "dino_model"
PLAIN, DRAWING_FILE = "plain-word", "drawing.json"
LABEL = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"  # the name of a folder


def read_column(given, base):
    """A `label=folder` of the command line as a `Column`.

    Raises:
        InputError: it is no result, or one of another base.
    """
    label, _, folder = given.partition("=")
    if not re.fullmatch(LABEL, label) or label.lower() in (PLAIN, DRAWING_FILE) or not folder:
        raise InputError(f"--results {quoted(given)} is no label=folder: write for example mine=my-dog-concept.")
    result = Result(f"--results {quoted(given, 300)}", label, Path(folder), base)
    if result.folder.is_file():
        raise InputError(f"{result.shown} is a file: give the folder that it is in.")
    for kind, read in (("scales", read_scales), ("lora", read_lora), ("embedding", read_embedding)):
        if (result.folder / KINDS[kind].result_name).is_file():
            return read(result)
    names = [kind.result_name for kind in KINDS.values()]
    raise InputError(f"{result.shown} holds no {names[0]}, {names[1]} or {names[2]}: give the folder of a result.")


class Result(NamedTuple):
    """A folder of `--results`, being judged."""

    shown: str  # the beginning of a sentence about it
    label: str
    folder: Path
    base: base_model.Base

    def column(self, kind, word, settings, **words):
        """The `Column` that it is."""
        fingerprint = sha256(self.folder / KINDS[kind].result_name)[:16]
        pooled = settings.get("pool_at_eos") is True
        return Column(self.label, word, self.folder, fingerprint, kind, self.base, pool_at_eos=pooled, **words)

    def read_config(self, kind, needed=True):
        """The config of a kind of result, its settings an object; {"settings": {}} where none is needed.

        Raises:
            InputError: it is not there, or damaged, or of another base.
        """
        path = self.folder / KINDS[kind].config_name
        if not path.is_file():
            if not needed:
                return {"settings": {}}
            raise InputError(
                f"{self.shown} has no {path.name}, which says what its subject is called: write"
                ' {"settings": {"subject_name": "sks dog"}} into that file, with the words that it was trained with.'
            )
        try:
            config = read_json(path)
            trained_on = config.get("base_model")
            if not isinstance(config.setdefault("settings", {}), dict) or not isinstance(
                trained_on, (str, type(None))
            ):
                raise ValueError(f"{path.name} has settings or a base_model of another type")
        except (OSError, ValueError) as error:
            raise InputError(f"{self.shown} holds no config that can be read ({reason(error)}).") from None
        name = self.base.source.name
        if trained_on and trained_on != name and Path(trained_on).name != Path(name).resolve().name:
            raise InputError(f"{self.shown} was learned on {quoted(trained_on)} and not on {name!r}.")
        return config

    def read_word(self, kind):
        """What the subject is called, and the settings.

        Raises:
            InputError: the config does not say.
        """
        settings = self.read_config(kind)["settings"]
        word = settings.get("subject_name")
        if not isinstance(word, str) or not word.strip():
            raise InputError(
                f"{self.shown} does not say what its subject is called: train with --subject_name, or write it into"
                f" the settings in {KINDS[kind].config_name}."
            )
        check_unicode(word, f"{self.shown}: subject_name")
        return word, settings

    def read_tensors(self, kind, what):
        """The tensors, which are numbers, and the metadata of the file of a result.

        Raises:
            InputError: it is damaged, or holds something else.
        """
        name = KINDS[kind].result_name
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                metadata = file.metadata() or {}
        except Exception as error:  # safetensors raises several kinds, and PyTorch for dtypes that it does not know
            raise InputError(f"{self.shown} holds no {what} that can be read: {name} ({reason(error)}).") from None
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise InputError(f"{self.shown}: {name} has {tensor.dtype} in {quoted(key)} and must have floats.")
            if not tensor.isfinite().all():
                raise InputError(
                    f"{self.shown}: {name} has NaN or infinity in {quoted(key)}, the sign of a training that diverged:"
                    " train it again."
                )
        return tensors, metadata


def read_embedding(result):
    """A folder with an embedding as a `Column`.

    Raises:
        InputError: it is damaged, holds another number of words than one, or is of another base.
    """
    config = result.read_config("embedding", needed=False)
    words, metadata = result.read_tensors("embedding", "embedding")
    named = config.get("placeholder_token") or embedding_files.name_in(metadata)
    named = named if isinstance(named, str) else None
    of_output = embedding_files.is_of_output(words) and result.base.family.learns_output
    base = replace(result.base, of_output=of_output)
    in_parts = [family.word_keys for family in families.FAMILIES.values() if family.word_keys] + [(*base.word_parts,)]
    keys = next((keys for keys in in_parts if sorted(words) == sorted(keys)), None)
    if keys is not None:
        vectors, token = [words[key] for key in keys], named
    else:
        token = named if named in words else next(iter(words), None)
        if len(words) > 1 and named not in words:
            raise InputError(
                f"{result.shown} holds {len(words)} words, {quoted(sorted(words))}: write the one that is the subject"
                f' into {KINDS["embedding"].config_name}, as "placeholder_token".'
            )
        vectors = [words[token]] if words else []
    if not vectors or any(each.dim() not in (1, 2) or 0 in each.shape for each in vectors):
        raise InputError(f"{result.shown} holds no {RESULT_FILE} with vectors of a word.")
    if not isinstance(token, str) or not token.isprintable() or not token or " " in token:
        raise InputError(f"{result.shown} calls its word {quoted(token)}, which is not one word.")
    found = tuple(each.shape[-1] for each in vectors)
    fitting = tuple(base.word_parts.values()) or base.word_widths
    if found != fitting:
        numbers = [" and ".join(map(str, each)) for each in (found, fitting)]
        home = f" ({quoted(config['base_model'])})" if config.get("base_model") else ""
        raise InputError(
            f"{result.shown} was learned on another base{home}: its vectors have {numbers[0]} entries and those of"
            f" {result.base.source.name!r} {numbers[1]}."
        )
    if (keys or ()) != tuple(base.word_parts):
        wanted = " and ".join(base.word_parts) or "the word"
        raise InputError(
            f"{result.shown} was learned on another kind of base: its vectors are called {quoted(sorted(words))} and"
            f" those of {result.base.family.label} {wanted}."
        )
    count = vectors[0].numel() // found[0]
    print(f"{result.label}: the word {token!r}, {count} vector(s), of {result.folder}")
    return result.column("embedding", token, config["settings"], num_vectors=count)


def read_scales(result):
    """A folder of tuned scales as a `Column`.

    Raises:
        InputError: a file is damaged, it is of another base, or it does not say what the subject is called.
    """
    word, settings = result.read_word("scales")
    try:
        tuneqdm.read_scales(result.folder / tuneqdm.SCALES_FILE)
    except ValueError as error:
        raise InputError(f"{result.shown} holds no scales that can be read ({reason(error)}).") from None
    return result.column("scales", word, settings)


def read_lora(result):
    """A folder of LoRA weights as a `Column`.

    Raises:
        InputError: a file is damaged, it is of another base, or it does not say what the subject is called.
    """
    word, settings = result.read_word("lora")
    tensors, _ = result.read_tensors("lora", "LoRA weights")
    unet = base_model.empty_model(result.base, result.base.family.denoiser)
    options = {"unet_config": unet.config} if len(result.base.tokenizers) > 1 else {}  # as diffusers loads it
    try:
        tensors = result.base.family.pipeline.lora_state_dict(tensors, **options)[0]
        of_unet = {key[5:]: tensor for key, tensor in tensors.items() if key.startswith("unet.")}
        if not any(".lora_A." in key for key in of_unet):
            of_unet = convert_unet_state_dict_to_peft(of_unet)
    except Exception as error:  # whatever diffusers raises on names of other kinds
        raise InputError(f"{result.shown} holds no LoRA weights that can be read ({reason(error)}).") from None
    check_lora(result, of_unet, dict(unet.named_modules()))
    return result.column("lora", word, settings)


def check_lora(result, tensors, layers):
    """Makes sure that every matrix of a LoRA has a layer that it fits; diffusers passes over what has none.

    Args:
        result: `Result`.
        tensors: by PEFT's names.
        layers: of the UNet, by name.

    Raises:
        InputError: a matrix does not fit, or there is none.
    """
    matrices = {key: re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", key) for key in tensors}
    for key, match in matrices.items():
        if match is None:
            continue
        side, weight = "BA".index(match[2]), getattr(layers.get(match[1]), "weight", None)
        shape = list(tensors[key].shape)
        if weight is None or len(shape) != weight.dim() or shape[side] != weight.shape[side]:
            raise InputError(
                f"{result.shown} does not fit this base: its UNet has no layer for {quoted(key)}, which is {shape}."
            )
    if not any(matrices.values()):
        raise InputError(f"{result.shown} has no tensor for the UNet of this base: nothing of it would be drawn.")


def read_columns(given, class_word, base):
    """The plain word and all results as `Column`s."""
    columns = [Column(PLAIN, class_word, None, class_word)] + [read_column(one, base) for one in given]
    labels = [column.label.lower() for column in columns]  # some disks know no capitals
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InputError(f"--results has the label {min(twice)!r} twice: give each result its own.")
    return columns


# =====================================================================================================
# Drawing
# =====================================================================================================


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; a change of it makes other pictures."""

    base: str  # which weights
    prompts: list
    num_images: int  # of each prompt
    seed: int
    resolution: int
    num_inference_steps: int
    guidance_scale: float


def image_path(output_dir, column, prompt_index, image_index):
    return Path(output_dir) / "images" / column.label / f"{prompt_index:03d}-{image_index:02d}.png"


def seed_of(drawing, prompt_index, image_index):
    """Every picture has noise of its own, the same for all columns."""
    return drawing.seed + 1000 * prompt_index + image_index


def claim_images(output_dir, columns, drawing):
    """Makes sure that pictures in `output_dir` are of this drawing and these results; older ones of a result go.

    Raises:
        InputError: they are of another drawing, or nobody can say of which.
    """
    settings = Path(output_dir) / "images" / DRAWING_FILE
    known = read_claim(settings, output_dir, asdict(drawing))
    for column in columns:
        paths = [image_path(output_dir, column, *cell) for cell in cells_of(drawing)]
        if column.label not in known and (there := [path for path in paths if os.path.lexists(path)]):
            raise unknown_pictures(output_dir, f"{DRAWING_FILE} does not know {column.label}/{there[0].name}")
    for column in columns:
        if known.get(column.label, column.fingerprint) != column.fingerprint:
            for cell in cells_of(drawing):
                image_path(output_dir, column, *cell).unlink(missing_ok=True)
    fingerprints = known | {column.label: column.fingerprint for column in columns}
    write_json(settings, {"drawing": asdict(drawing), "fingerprints": fingerprints})


def read_claim(path, output_dir, drawing):
    """The fingerprints, by label, of the pictures that are there; {} where there are none.

    Raises:
        InputError: see `claim_images`.
    """
    if not os.path.lexists(path):
        return {}
    try:
        content = read_json(path)
        before, known = content["drawing"], content["fingerprints"]
        if not isinstance(before, dict) or not isinstance(known, dict):
            raise ValueError(f"{path.name} has entries of another type")
    except (OSError, ValueError, KeyError) as error:
        raise unknown_pictures(output_dir, f"{path.name}: {reason(error)}") from None
    if before != drawing:
        changed = [name for name, value in drawing.items() if before.get(name) != value] or sorted(before)
        raise InputError(
            f"--output_dir {str(output_dir)!r} has pictures drawn otherwise ({', '.join(changed)}): give another."
        )
    return known


def unknown_pictures(output_dir, why):
    return InputError(
        f"--output_dir {str(output_dir)!r} has pictures of which nobody can say how they were drawn (images/{why}):"
        " give another."
    )


def cells_of(drawing):
    """(prompt, image) of all pictures of a column."""
    return list(itertools.product(range(len(drawing.prompts)), range(drawing.num_images)))


def is_drawn(path, resolution):
    """Whether a picture is there, whole and of the size that is drawn."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return image.size == (resolution, resolution)
    except Exception:  # PIL raises nearly anything on a damaged file
        return False


def draw_missing(output_dir, columns, drawing, pipeline, batch_size):
    """Draws every picture of every column that is not there yet.

    Raises:
        InputError: a result does not fit the base, and nothing was drawn, or what it draws is no numbers.
    """
    missing = {
        c.label: [n for n in cells_of(drawing) if not is_drawn(image_path(output_dir, c, *n), drawing.resolution)]
        for c in columns
    }
    options = {"num_inference_steps": drawing.num_inference_steps, "guidance_scale": drawing.guidance_scale}
    options |= {"height": drawing.resolution, "width": drawing.resolution}
    columns = [column for column in columns if missing[column.label]]
    for column in columns[1:]:  # all are judged before the first is drawn
        with showing(column, pipeline):
            pass
    bar = tqdm(total=sum(map(len, missing.values())), desc="Drawing")
    for column in columns:
        options["callback_on_step_end"] = functools.partial(check_latents, column)
        with showing(column, pipeline) as draw:
            for start in range(0, len(missing[column.label]), batch_size):
                cells = missing[column.label][start : start + batch_size]
                prompts = [drawing.prompts[p].replace("{}", column.subject) for p, _ in cells]
                prompts = [normalized(pipeline.tokenizer, prompt) for prompt in prompts]  # as words are named there
                generators = [torch.Generator().manual_seed(seed_of(drawing, *cell)) for cell in cells]
                for cell, image in zip(cells, draw(prompt=prompts, generator=generators, **options).images):
                    with atomic_path(image_path(output_dir, column, *cell)) as temporary:
                        image.save(temporary)
                bar.update(len(cells))
    bar.close()


def check_latents(column, pipeline, step, timestep, tensors):
    """A callback of pipelines, which make black pictures of what is no number.

    Raises:
        InputError: a step came to NaN or infinity.
    """
    if not tensors["latents"].isfinite().all():
        whose = "the base model" if column.folder is None else f"--results {column.label}={column.folder}"
        raise InputError(f"{whose} draws NaN or infinity: its numbers are too large, get or train it again.")
    return tensors


@contextlib.contextmanager
def pooled_as_trained(column, pipeline):
    """Pools SDXL's text at the end of the prompt where a result was trained with `--pool_at_eos`."""
    if not column.pool_at_eos or getattr(pipeline, "text_encoder_2", None) is None:
        yield
        return
    encoder = pipeline.text_encoder_2.text_model
    before, encoder.eos_token_id = encoder.eos_token_id, pipeline.tokenizer_2.eos_token_id
    yield
    encoder.eos_token_id = before


@contextlib.contextmanager
def fitting(column):
    """Turns what libraries say of a result that does not fit the base into an `InputError`."""
    try:
        yield
    except Exception as error:  # diffusers and PEFT raise several kinds
        if is_outside(error):
            raise
        raise InputError(f"--results {column.label}={column.folder} does not fit this base: {reason(error)}") from None


@contextlib.contextmanager
def showing(column, pipeline):
    """Yields a pipeline that draws with a column's result; `pipeline` itself is afterwards as it was.

    Raises:
        InputError: the result does not fit the base.
    """
    if column.folder is None:
        yield pipeline
    elif column.kind == "scales":
        unet = base_model.load_component(column.base, "unet")  # float32, so that it is quantized as in training
        parts = {**pipeline.components, "unet": unet, "requires_safety_checker": False}
        with fitting(column):
            tuned = tuneqdm.TuneQDMPipeline(**parts, tuneqdm_scales=column.folder)
        if pipeline.unet.dtype != torch.float32:
            unet.to(pipeline.unet.dtype)
        unet.to(pipeline.unet.device)
        tuned.set_progress_bar_config(disable=True)
        yield tuned
    elif column.kind == "lora":
        with fitting(column):
            pipeline.load_lora_weights(column.folder, weight_name=KINDS["lora"].result_name)
        yield pipeline
        pipeline.unload_lora_weights()
    else:
        with fitting(column):
            embeddings.load_concept(pipeline, column.folder, column.word, column.base.family, RESULT_FILE)
        with pooled_as_trained(column, pipeline):
            yield pipeline
        column.base.family.unload_words(pipeline)


# =====================================================================================================
# Features
# =====================================================================================================


class Encoders:
    """CLIP and DINO.

    Args:
        clip_model, dino_model: folders or Hub ids of a `CLIPModel` and of any image encoder that `AutoModel` loads.
        trust_remote_code: run model code that lies beside their weights.
        device: torch device.
        batch_size: images at a time.

    Raises:
        InputError: they cannot be loaded, or the first is no CLIP.
    """

    def __init__(self, clip_model, dino_model, trust_remote_code, device, batch_size):
        self.device, self.batch_size = device, batch_size
        code = {"trust_remote_code": trust_remote_code}
        with judging("--clip_model", clip_model):
            self.clip = load_encoder(CLIPModel, clip_model).to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(clip_model)
            self.clip_processor = AutoImageProcessor.from_pretrained(clip_model)
            if self.clip.config.model_type != "clip":
                raise ValueError(f"it is a {self.clip.config.model_type} model and no CLIP")
            if len(self.tokenizer) > self.clip.config.text_config.vocab_size:
                raise ValueError("its tokenizer belongs to another model, with more words")
            self.clip_texts(["a photo"]), self.clip_images([Image.new("RGB", (64, 64))])
        with judging("--dino_model", dino_model):
            self.dino = load_encoder(AutoModel, dino_model, **code).to(device)
            self.dino_processor = AutoImageProcessor.from_pretrained(dino_model, **code)
            self.dino_images([Image.new("RGB", (64, 64))])

    def _images(self, encode, processor, pictures):
        parts = []
        for start in range(0, len(pictures), self.batch_size):
            pixels = processor(images=pictures[start : start + self.batch_size], return_tensors="pt").pixel_values
            parts.append(encode(pixels.to(self.device)).float().cpu())
        return finite(F.normalize(torch.cat(parts), dim=-1))

    @torch.inference_mode()
    def clip_images(self, pictures):
        """PIL images -> `[N, d]`."""
        return self._images(
            lambda pixels: self.clip.get_image_features(pixel_values=pixels).pooler_output,
            self.clip_processor,
            pictures,
        )

    @torch.inference_mode()
    def dino_images(self, pictures):
        """PIL images -> `[N, d]`: the class token after the last norm."""
        return self._images(lambda pixels: self.dino(pixel_values=pixels).pooler_output, self.dino_processor, pictures)

    @torch.inference_mode()
    def clip_texts(self, texts):
        """Strings -> `[N, d]`."""
        length = self.clip.config.text_config.max_position_embeddings
        limit = {"padding": "max_length", "truncation": True, "max_length": length}
        tokens = self.tokenizer(list(texts), return_tensors="pt", **limit).to(self.device)
        found = self.clip.get_text_features(input_ids=tokens.input_ids).pooler_output.float().cpu()
        return finite(F.normalize(found, dim=-1))


@contextlib.contextmanager
def judging(flag, name):
    """Turns what is wrong with an encoder into an `InputError`."""
    try:
        yield
    except Exception as error:  # transformers raises nearly anything on what is no such model
        why = reason(error, 200).rstrip(".")
        raise InputError(f"{flag} {quoted(name)} is not such a model, in a folder or on the Hub ({why}).") from None


def load_encoder(kind, name, **options):
    """A model of transformers with all of its own weights, which makes up what is missing, and loads NaN.

    Raises:
        ValueError: a weight is missing, of another shape, or no number.
    """
    model, report = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    for what in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[what])):
            raise ValueError(f"its weights lack {len(keys)} tensors of this kind of model, such as {shorten(keys[0])}")
    for key, weight in model.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(f"its weights have NaN or infinity in {key}")
    return model.eval()


def finite(features):
    """Features, if they are numbers.

    Raises:
        ValueError: they are not.
    """
    if features.dim() != 2 or not features.isfinite().all():
        raise ValueError("its features are no vectors of finite numbers")
    return features


def score_column(pictures, references, texts, encoders):
    """All metrics of P x N pictures: name -> `Score`.

    Args:
        pictures: P lists of N PIL images.
        references: PIL images.
        texts: P prompts with the plain word.
        encoders: `Encoders`, or anything with its three methods.
    """
    flat, shape = [image for row in pictures for image in row], (len(pictures), len(pictures[0]), -1)
    clip, dino = encoders.clip_images(flat).view(shape), encoders.dino_images(flat).view(shape)
    scores = {
        "CLIP-T": score(prompt_fidelity(clip, encoders.clip_texts(texts))),
        "CLIP-I": score(subject_fidelity(clip, encoders.clip_images(references))),
        "DINO": score(subject_fidelity(dino, encoders.dino_images(references))),
    }
    if shape[1] > 1:
        scores["DINO between images"] = score(similarity_within_prompts(dino))
    return scores


# =====================================================================================================
# Report
# =====================================================================================================


def markdown_table(scores):
    """Label -> metric -> `Score`, as a table of means and intervals."""
    metrics = list(next(iter(scores.values())))
    lines = [f"| | {' | '.join(metrics)} |", "| --- " * (len(metrics) + 1) + "|"]
    for label, row in scores.items():
        cells = [f"{row[name].mean:.3f} ({row[name].low:.3f}–{row[name].high:.3f})" for name in metrics]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def contact_sheet(references, columns, drawing, open_image, side=128, margin=230):
    """Rows: prompts; columns: references (in turn), the plain word, each result; a PIL image."""
    titles = ["reference", *(column.label for column in columns)]
    sheet = Image.new("RGB", (margin + side * len(titles), 24 + side * len(drawing.prompts)), "white")
    ink = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        ink.text((margin + i * side + 4, 6), title[:20], fill="black", font_size=12)
    for row, prompt in enumerate(drawing.prompts):
        words, lines = prompt.split(), [""]
        for word in words:
            lines = lines if len(lines[-1]) + len(word) < 34 else [*lines, ""]
            lines[-1] += f"{word} "
        ink.multiline_text((6, 24 + row * side + 8), "\n".join(lines), fill="black", font_size=12)
        shown = [references[row % len(references)], *(open_image(column, row, 0) for column in columns)]
        for i, image in enumerate(shown):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (margin + i * side, 24 + row * side))
    return sheet


def write_report(output_dir, args, columns, drawing, scores, references, open_image):
    """`evaluation.json`, `evaluation.md`, `contact_sheet.png`."""
    content = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "drawing": asdict(drawing),
        "versions": provenance.installed_versions(),
        "fingerprints": {column.label: column.fingerprint for column in columns},
        "scores": {label: {name: asdict(value) for name, value in row.items()} for label, row in scores.items()},
    }
    write_json(output_dir / "evaluation.json", content)
    with atomic_path(output_dir / "evaluation.md") as temporary:
        temporary.write_text(markdown_table(scores), encoding="utf-8")
    with atomic_path(output_dir / "contact_sheet.png") as temporary:
        contact_sheet(references, columns, drawing, open_image).save(temporary)


def push_scores(column, scores):
    """Writes a result's scores into its config and pushes it again, card renewed, with its own trainer.

    Raises:
        InputError: the push failed.
    """
    path = column.config_path
    config = read_json(path)
    values = {name: f"{s.mean:.3f} ({s.low:.3f} to {s.high:.3f})" for name, s in scores.items()}
    write_json(path, {**config, "scores": values})
    command = [sys.executable, str(column.trainer), "--push_only", "--output_dir", str(column.folder)]
    done = subprocess.run(command)
    if done.returncode:
        raise InputError(f"--push: the scores are in {str(path)!r}, but the push of {str(column.folder)!r} failed.")


# =====================================================================================================
# Main
# =====================================================================================================


def parse_args(input_args=None):
    """Parses and checks the command line; bad input exits with code 2."""
    parser = make_parser()
    args = flags.parse(parser, input_args)
    flags.check_ranges(parser, args)
    if not args.class_word.strip():
        parser.error("--class_word must be a word, such as dog.")
    if (args.reference_images is None) != args.draw_only:
        parser.error("give either --reference_images, a folder of the subject's pictures, or --draw_only.")
    if args.push and args.draw_only:
        parser.error("--push needs scores: leave out --draw_only.")
    if args.orders is not None and not args.draw_only:
        parser.error("--orders is for drawing: give --draw_only, too.")
    return args


def make_parser():
    """The parser, with every flag."""
    parser = flags.new_parser(
        __file__,
        "Judge learned concepts by CLIP-T, CLIP-I, DINO and diversity.",
        "%(prog)s --pretrained_model_name_or_path MODEL --reference_images FOLDER --class_word WORD"
        " --results LABEL=FOLDER ... [options]",
    )
    add = functools.partial(flags.add, parser)
    name = "Base model: a local folder, a single file (.safetensors, .ckpt), or a model id on the Hub."
    add("--pretrained_model_name_or_path", required=True, path=flags.OR_NAME, help=name)
    add("--revision", help="Branch, tag or commit of the base on the Hub.")
    add("--variant", help='Variant of the weight files of the base, such as "fp16".')
    own = "Tokenizer folder or id, if not the base's own, as for a single file."
    add("--tokenizer_name", path=flags.OR_NAME, help=own)
    add(
        "--results",
        nargs="*",
        default=[],
        metavar="LABEL=FOLDER",
        type=labelled_folder,
        help="Folders of embeddings, LoRAs or scales.",
    )
    add("--reference_images", path=True, help="Folder of the subject's pictures.")
    add("--draw_only", action="store_true", help="Draw the pictures and judge nothing: no reference, no encoder.")
    add("--class_word", required=True, help="Plain word for the subject: dog.")
    add(
        "--prompts",
        default="object",
        path=flags.OR_NAME,
        help='Prompts to draw: "object" or "living" (DreamBooth\'s 25 each), or a text file.',
    )
    count, most = "Pictures of each prompt.", flags.Range(1, 1000)
    add("--num_images_per_prompt", type=int, default=5, limits=most, help=count)
    noise = "Seed of the noise, the same for all columns."
    add("--seed", type=int, default=0, limits=flags.SEED, help=noise)
    side = "Side of the pictures in pixels. Default: the model's own."
    add("--resolution", type=int, limits=flags.SIDE, help=side)
    add("--num_inference_steps", type=int, default=50, limits=most, help="Denoising steps.")
    add("--guidance_scale", type=float, default=7.5, limits=flags.Range(0.0, 1000.0), help="Guidance.")
    add("--batch_size", type=int, default=4, limits=flags.Range(1, 1024), help="Pictures at a time.")
    clip, dino = (f"Folder or Hub id of the {model} that judges." for model in ("CLIP", "DINO"))
    add("--clip_model", default="openai/clip-vit-base-patch32", path=flags.OR_NAME, help=clip)
    add("--dino_model", default="facebook/dinov2-base", path=flags.OR_NAME, help=dino)
    add("--trust_remote_code", action="store_true", help="Run model code beside the weights of --dino_model.")
    add("--output_dir", default="evaluation", path=True, help="Folder that everything is written to.")
    stay = "With --draw_only: stay, and draw what is ordered in this folder (by the web page), until nothing comes."
    add("--orders", path=True, metavar="FOLDER", help=stay)
    add("--push", action="store_true", help="Write each result's scores into its config and card, and push it.")
    return parser


def labelled_folder(text):
    """LABEL=FOLDER of the command line, the user's home spelled out, which no shell does behind a label."""
    label, equals, folder = text.partition("=")
    return label + equals + os.path.expanduser(folder)


def main(args):
    opened = {}
    evaluate(args, opened)
    if args.orders is not None:
        take_orders(Path(args.orders), opened)


PATIENCE = 300  # seconds that a loaded pipeline waits for more to draw


def take_orders(folder, opened, patience=PATIENCE):
    """Draws what is ordered, with the pipeline that is loaded if the base is the same.

    An order is `order.json` in a folder: {"words": a command line of this script, "log": the file that says how it
    went}. One that fails ends the process, as it would have ended one of its own.

    Args:
        folder: of orders.
        opened: see `evaluate`.
        patience: seconds without an order after which it returns.
    """
    last, order = time.monotonic(), folder / "order.json"
    while time.monotonic() - last < patience:
        try:
            given = read_json(order)
            order.unlink()
        except FileNotFoundError:
            time.sleep(0.1)
            continue
        except ValueError as error:
            raise InputError(f"{order}: {error}; draw again.") from None
        with open(given["log"], "ab") as log:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(log.fileno(), stream.fileno())
        evaluate(parse_args(given["words"]), opened)
        last = time.monotonic()


def evaluate(args, opened):
    """Draws, and unless it is told otherwise judges.

    Args:
        args: settings.
        opened: base -> its pipeline; of one base at most, and kept for the next call.
    """
    prompts = read_prompts(args.prompts)
    source = base_model.ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant)
    base = base_model.open_base(source, args.tokenizer_name, families.FAMILIES.values())
    columns = read_columns(args.results, args.class_word, base)
    resolution = base_model.check_resolution(base, args.resolution)
    output_dir = Path(args.output_dir)
    check_folders(args, columns, output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    references = encoders = None
    if not args.draw_only:
        pictures = images.read_folder(args.reference_images, resolution, True, "--reference_images")
        references = [Image.fromarray(picture.pixels.permute(1, 2, 0).numpy()) for picture in pictures]
        encoders = Encoders(args.clip_model, args.dino_model, args.trust_remote_code, device, args.batch_size)
    check_writable("--output_dir", args.output_dir)
    drawing = Drawing(
        weight_cache.source_key(base_model.find_weight_files(base, base.family.denoiser)),
        prompts,
        args.num_images_per_prompt,
        args.seed,
        resolution,
        args.num_inference_steps,
        args.guidance_scale,
    )
    with occupied(output_dir):
        claim_images(output_dir, columns, drawing)
        if drawing.base not in opened:
            opened.clear()
            opened[drawing.base] = open_pipeline(base, device)
        draw_missing(output_dir, columns, drawing, opened[drawing.base], args.batch_size)
        if args.draw_only:
            print(f"Look at {output_dir / 'images'}")
            write_json(output_dir / "done.json", {"fingerprints": {c.label: c.fingerprint for c in columns}})
            return
        scores = score_columns(args, columns, drawing, references, encoders)
    if args.push:
        for column in columns[1:]:
            push_scores(column, scores[column.label])


def check_folders(args, columns, output_dir):
    """Refuses an output folder that is not apart from the inputs, and results that scores cannot be pushed with.

    Raises:
        InputError: see above.
    """
    inputs = [("--results", column.folder) for column in columns[1:]]
    inputs += [(f"--{name}", getattr(args, name)) for name in INPUTS if getattr(args, name)]
    for flag, path in inputs:
        if os.path.exists(path):  # others are names on the Hub
            check_apart(flag, path, output_dir)
    for column in columns[1:]:
        if args.push and not column.config_path.is_file():
            raise InputError(
                f"--push: {str(column.folder)!r} has no {column.config_path.name} to write the scores into."
            )


def open_pipeline(base, device):
    """The pipeline that everything is drawn with, as plain diffusers draws; its weights are judged as for a training.

    Raises:
        InputError: they are missing, damaged or no numbers.
    """
    family, dtype = base.family, torch.float16 if device.type == "cuda" else torch.float32
    parts = {name: base_model.load_component(base, name, dtype) for name in family.components}
    parts |= dict(zip(family.tokenizers, base.tokenizers))
    if base.single is not None:  # a file says nothing of how it is drawn with
        parts["scheduler"] = family.sampler(base.scheduler)
    pipeline = family.pipeline.from_pretrained(base.root, **parts, **family.pipeline_options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def score_columns(args, columns, drawing, references, encoders):
    """Judges all columns, writes the report and prints the table; returns label -> metric -> `Score`."""
    output_dir = Path(args.output_dir)

    def open_image(column, prompt_index, image_index):
        return Image.open(image_path(output_dir, column, prompt_index, image_index)).convert("RGB")

    texts, scores = [prompt.replace("{}", args.class_word) for prompt in drawing.prompts], {}
    for column in tqdm(columns, desc="Scoring"):
        drawn = [[open_image(column, p, i) for i in range(drawing.num_images)] for p in range(len(drawing.prompts))]
        scores[column.label] = score_column(drawn, references, texts, encoders)
    write_report(output_dir, args, columns, drawing, scores, references, open_image)
    print(f"\n{markdown_table(scores)}\nLook at {output_dir / 'contact_sheet.png'}")
    return scores


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), __file__)
