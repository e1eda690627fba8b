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

    python evaluate_personalization.py --pretrained_model_name_or_path demo/base \
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
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

import tuneqdm_pipeline as tuneqdm
from personalization import flags
from personalization.data import images
from personalization.errors import InputError, run_script
from personalization.files import atomic_path, check_writable, write_json
from personalization.models import base_model, families, weight_cache
from personalization.models.compute import Compute
from personalization.runs import embeddings, provenance, validation


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
    word: str  # what stands for the subject in prompts
    folder: Path | None  # of a result
    fingerprint: str  # of what it draws with
    kind: str = "embedding"  # of the result, key of `KINDS`
    base: base_model.Base | None = None  # for tuned scales, which want the base's UNet for themselves

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
RESULT_FILE, CONFIG_FILE, _ = KINDS["embedding"]
PLAIN = "plain-word"


def read_column(given, base):
    """A `label=folder` of the command line as a `Column`.

    Raises:
        InputError: it is no result, or one of another base.
    """
    label, _, folder = given.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", label) or not folder or label == PLAIN:
        raise InputError(f"--results {given!r} is no label=folder: write for example mine=my-dog-concept.")
    folder = Path(folder)
    if (folder / tuneqdm.CONFIG_FILE).is_file():
        return read_scales(given, label, folder, base)
    if (folder / KINDS["lora"].result_name).is_file():
        return read_lora(given, label, folder, base)
    file = folder / RESULT_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            widths = {name: tensors.get_slice(name).get_shape()[-1] for name in tensors.keys()}
            token = (tensors.metadata() or {}).get("placeholder_token") or next(iter(widths), None)
        if len(widths) != 1 and list(widths) != sorted(families.SDXL.word_keys):
            raise ValueError(f"it holds {list(widths)}")
        config = (
            json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")) if (folder / CONFIG_FILE).exists() else {}
        )
        fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"--results {given!r} holds no {RESULT_FILE} that can be read ({error}).") from None
    found = tuple(widths[key] for key in families.SDXL.word_keys) if len(widths) == 2 else tuple(widths.values())
    trained_on = config.get("base_model")
    if found != base.word_widths:
        numbers = [" and ".join(map(str, each)) for each in (found, base.word_widths)]
        raise InputError(
            f"--results {given!r} was learned on another base{f' ({trained_on})' if trained_on else ''}: its vectors"
            f" have {numbers[0]} entries and those of {base.source.name!r} {numbers[1]}."
        )
    check_base(given, trained_on, base)
    return Column(label, token, folder, fingerprint)


def check_base(given, trained_on, base):
    """Refuses a result of a base with another name."""
    if trained_on and trained_on != base.source.name and Path(trained_on).name != Path(base.source.name).name:
        raise InputError(f"--results {given!r} was learned on {trained_on!r} and not on {base.source.name!r}.")


def read_scales(given, label, folder, base):
    """A folder of tuned scales as a `Column`.

    Raises:
        InputError: a file is damaged, it is of another base, or it does not say what the subject is called.
    """
    try:
        config = json.loads((folder / tuneqdm.CONFIG_FILE).read_text(encoding="utf-8"))
        word, trained_on = config["settings"]["subject_name"], config["base_model"]
        tuneqdm.read_scales(folder / tuneqdm.SCALES_FILE)
        content = (folder / tuneqdm.SCALES_FILE).read_bytes()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"--results {given!r} holds no scales that can be read ({error!r}).") from None
    check_word(given, word, tuneqdm.CONFIG_FILE)
    check_base(given, trained_on, base)
    return Column(label, word, folder, hashlib.sha256(content).hexdigest()[:16], "scales", base)


def read_lora(given, label, folder, base):
    """A folder of LoRA weights as a `Column`.

    Raises:
        InputError: a file is damaged, it is of another base, or it does not say what the subject is called.
    """
    names = KINDS["lora"]
    try:
        config = json.loads((folder / names.config_name).read_text(encoding="utf-8"))
        word, trained_on = config["settings"]["subject_name"], config["base_model"]
        with safe_open(folder / names.result_name, framework="pt") as tensors:
            tensors.keys()
        fingerprint = hashlib.sha256((folder / names.result_name).read_bytes()).hexdigest()[:16]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(f"--results {given!r} holds no LoRA weights that can be read ({error!r}).") from None
    check_word(given, word, names.config_name)
    check_base(given, trained_on, base)
    return Column(label, word, folder, fingerprint, "lora")


def check_word(given, word, config_name):
    """Refuses a result that does not say what its subject is called."""
    if not word:
        raise InputError(
            f"--results {given!r} does not say what its subject is called: train with --subject_name, or write it into"
            f" the settings in {config_name}."
        )


def read_columns(given, class_word, base):
    """The plain word and all results as `Column`s."""
    columns = [Column(PLAIN, class_word, None, class_word)] + [read_column(one, base) for one in given]
    labels = [column.label for column in columns]
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
        InputError: they are of another drawing.
    """
    settings, found = Path(output_dir) / "images" / "drawing.json", None
    if settings.is_file():
        found = json.loads(settings.read_text(encoding="utf-8"))
        if found["drawing"] != asdict(drawing):
            changed = [name for name, value in asdict(drawing).items() if found["drawing"].get(name) != value]
            raise InputError(
                f"--output_dir {str(output_dir)!r} has pictures drawn otherwise ({', '.join(changed)}): give another."
            )
    known = found["fingerprints"] if found else {}
    for column in columns:
        if known.get(column.label, column.fingerprint) != column.fingerprint:
            for path in (Path(output_dir) / "images" / column.label).glob("*.png"):
                path.unlink()
    fingerprints = known | {column.label: column.fingerprint for column in columns}
    write_json(settings, {"drawing": asdict(drawing), "fingerprints": fingerprints})


def draw_missing(output_dir, columns, drawing, pipeline, batch_size):
    """Draws every picture of every column that is not there yet."""
    grid = list(itertools.product(range(len(drawing.prompts)), range(drawing.num_images)))
    missing = {c.label: [cell for cell in grid if not image_path(output_dir, c, *cell).is_file()] for c in columns}
    options = {"num_inference_steps": drawing.num_inference_steps, "guidance_scale": drawing.guidance_scale}
    options |= {"height": drawing.resolution, "width": drawing.resolution}
    bar = tqdm(total=sum(map(len, missing.values())), desc="Drawing")
    for column in columns:
        if not missing[column.label]:
            continue
        with showing(column, pipeline) as draw:
            for start in range(0, len(missing[column.label]), batch_size):
                cells = missing[column.label][start : start + batch_size]
                prompts = [drawing.prompts[p].replace("{}", column.word) for p, _ in cells]
                generators = [torch.Generator().manual_seed(seed_of(drawing, *cell)) for cell in cells]
                for cell, image in zip(cells, draw(prompts, generator=generators, **options).images):
                    with atomic_path(image_path(output_dir, column, *cell)) as temporary:
                        image.save(temporary)
                bar.update(len(cells))
    bar.close()


@contextlib.contextmanager
def pooled_as_trained(column, pipeline):
    """Pools SDXL's text at the end of the prompt where a result was trained with `--pool_at_eos`."""
    config = json.loads(column.config_path.read_text(encoding="utf-8")) if column.config_path.is_file() else {}
    if not config.get("settings", {}).get("pool_at_eos"):
        yield
        return
    encoder = pipeline.text_encoder_2.text_model
    before, encoder.eos_token_id = encoder.eos_token_id, pipeline.tokenizer_2.eos_token_id
    yield
    encoder.eos_token_id = before


@contextlib.contextmanager
def showing(column, pipeline):
    """Yields a pipeline that draws with a column's result; `pipeline` itself is afterwards as it was.

    Raises:
        InputError: scales or a LoRA do not fit the base.
    """
    if column.kind == "scales":
        unet = base_model.load_component(column.base, "unet")  # float32, so that it is quantized as in training
        parts = {**pipeline.components, "unet": unet, "requires_safety_checker": False}
        try:
            tuned = tuneqdm.TuneQDMPipeline(**parts, tuneqdm_scales=column.folder)
        except ValueError as error:
            raise InputError(f"--results {column.label}={column.folder}: {error}") from None
        if pipeline.unet.dtype != torch.float32:
            unet.to(pipeline.unet.dtype)
        unet.to(pipeline.unet.device)
        tuned.set_progress_bar_config(disable=True)
        yield tuned
    elif column.kind == "lora":
        try:
            pipeline.load_lora_weights(column.folder, weight_name=KINDS["lora"].result_name)
        except (ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(f"--results {column.label}={column.folder} does not fit this base ({why}).") from None
        yield pipeline
        pipeline.unload_lora_weights()
    elif column.folder is not None:
        embeddings.load_concept(pipeline, column.folder, column.word, RESULT_FILE)
        with pooled_as_trained(column, pipeline):
            yield pipeline
        embeddings.unload_concepts(pipeline)
    else:
        yield pipeline


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
        try:
            flag, name = "--clip_model", clip_model
            self.clip = CLIPModel.from_pretrained(clip_model, dtype=torch.float32).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(clip_model)
            self.clip_processor = AutoImageProcessor.from_pretrained(clip_model)
            flag, name = "--dino_model", dino_model
            self.dino = AutoModel.from_pretrained(dino_model, dtype=torch.float32, **code).to(device).eval()
            self.dino_processor = AutoImageProcessor.from_pretrained(dino_model, **code)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{flag} {name!r} is not such a model, in a folder or on the Hub ({reason}).") from None
        if self.clip.config.model_type != "clip":
            raise InputError(f"--clip_model {clip_model!r} is a {self.clip.config.model_type} model and no CLIP.")

    def _images(self, encode, processor, pictures):
        parts = []
        for start in range(0, len(pictures), self.batch_size):
            pixels = processor(images=pictures[start : start + self.batch_size], return_tensors="pt").pixel_values
            parts.append(encode(pixels.to(self.device)).float().cpu())
        return F.normalize(torch.cat(parts), dim=-1)

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
        return F.normalize(self.clip.get_text_features(input_ids=tokens.input_ids).pooler_output.float().cpu(), dim=-1)


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
        InputError: the result has no config, or the push failed.
    """
    path = column.config_path
    if not path.is_file():
        raise InputError(f"--push: {str(column.folder)!r} has no {path.name} to write the scores into.")
    config = json.loads(path.read_text(encoding="utf-8"))
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
    add("--push", action="store_true", help="Write each result's scores into its config and card, and push it.")
    return parser


def labelled_folder(text):
    """LABEL=FOLDER of the command line, the user's home spelled out, which no shell does behind a label."""
    label, equals, folder = text.partition("=")
    return label + equals + os.path.expanduser(folder)


def main(args):
    prompts = read_prompts(args.prompts)
    source = base_model.ModelSource(args.pretrained_model_name_or_path, args.revision)
    base = base_model.open_base(source, args.tokenizer_name, families.FAMILIES.values())
    columns = read_columns(args.results, args.class_word, base)
    resolution = base_model.check_resolution(base, args.resolution)
    output_dir = Path(args.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not args.draw_only:
        pictures = images.read_folder(args.reference_images, resolution, True, "--reference_images")
        references = [Image.fromarray(picture.pixels.permute(1, 2, 0).numpy()) for picture in pictures]
        encoders = Encoders(args.clip_model, args.dino_model, args.trust_remote_code, device, args.batch_size)
    check_writable("--output_dir", args.output_dir)
    drawing = Drawing(
        weight_cache.source_key(base_model.find_weight_files(base, "unet")),
        prompts,
        args.num_images_per_prompt,
        args.seed,
        resolution,
        args.num_inference_steps,
        args.guidance_scale,
    )
    claim_images(output_dir, columns, drawing)

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if base.single is None:
        options = {"revision": args.revision, "dtype": dtype, **base.family.pipeline_options}
        pipeline = base.family.pipeline.from_pretrained(base.source.name, **options).to(device)
    else:
        parts = base_model.load_text_encoder(base, dtype), base_model.load_component(base, base.family.denoiser, dtype)
        pipeline = validation.open_pipeline(base, *parts, Compute(device, dtype, torch.contiguous_format)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    draw_missing(output_dir, columns, drawing, pipeline, args.batch_size)
    del pipeline
    if args.draw_only:
        print(f"Look at {output_dir / 'images'}")
        return

    def open_image(column, prompt_index, image_index):
        return Image.open(image_path(output_dir, column, prompt_index, image_index)).convert("RGB")

    texts, scores = [prompt.replace("{}", args.class_word) for prompt in prompts], {}
    for column in tqdm(columns, desc="Scoring"):
        drawn = [[open_image(column, p, i) for i in range(drawing.num_images)] for p in range(len(prompts))]
        scores[column.label] = score_column(drawn, references, texts, encoders)
    write_report(output_dir, args, columns, drawing, scores, references, open_image)
    print(f"\n{markdown_table(scores)}\nLook at {output_dir / 'contact_sheet.png'}")
    if args.push:
        for column in columns[1:]:
            push_scores(column, scores[column.label])


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), __file__)
