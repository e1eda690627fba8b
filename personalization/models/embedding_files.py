"""Embedding files of all programs: which form a file has, what it holds, and how the same is written in another form.

A word is a row, or several, of the token table of each text encoder. Forms differ in how they call these rows:

| form | keys of the file |
|---|---|
| `diffusers` | the word itself, several of them where the file has several words; one file for each text encoder |
| `a1111` | a pickle with `string_to_param["*"]` |
| `kohya`, which ComfyUI reads, too | `emb_params`; where there are several text encoders `clip_l`, `clip_g`, `t5xxl` |
| `onetrainer` | `emp_params`, or `clip_l`, `clip_g`, `t5`; with `_out`, vectors for an encoder's output |
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import InputError, first_cause, quoted, shorten
from ..files import atomic_path, save_tensors


LONE = {"emb_params": "kohya", "emp_params": "onetrainer"}  # keys of the only encoder -> form
# Keys that name a text encoder, as files have them -> as they are called here.
ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "clip_h": "clip_h", "t5": "t5xxl", "t5xxl": "t5xxl"}
ENCODERS |= {name: name for name in ("qwen3_4b", "qwen3_8b", "qwen3_06b", "gemma2_2b")}
OUT = "_out"  # ends the key of vectors for an encoder's output
NAMES = "placeholder_token", "placeholder_token_of_output"  # entries of metadata with the word's name: without, with
ONE = ""  # the only encoder, of a file that does not name it
PICKLES = ".pt", ".bin", ".ckpt", ".pth"
RESULT = "learned_embeds.safetensors"  # of a run, in its folder
LONGEST_STEM = 200  # bytes; names of files end at 255, with those of temporary ones before them
FORMS = ("diffusers", "a1111", "comfyui", "kohya", "onetrainer")
FAMILIES = {  # encoders, or width of the only one -> what has such words
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "the second half of Stable Diffusion XL",
    ("clip_g", "clip_l"): "Stable Diffusion XL",
    ("clip_g", "clip_l", "t5xxl"): "Stable Diffusion 3",
    ("clip_l", "t5xxl"): "FLUX.1",
    ("t5xxl",): "a model with T5",
    ("qwen3_4b",): "Z-Image or FLUX.2 klein",
    ("gemma2_2b",): "Lumina 2",
}


class Word(NamedTuple):
    """A learned word."""

    name: str
    parts: dict  # text encoder, see `ENCODERS` (or `ONE`) -> vectors [k, d], float32
    form: str  # of the file that it is from
    outputs: dict = {}  # text encoder -> vectors for its output, which no prompt can carry elsewhere

    @property
    def num_vectors(self):
        return max(len(vectors) for vectors in self.parts.values())

    @property
    def family(self):
        """Whose text encoders it fits, in words, by its encoders and their widths."""
        names = tuple(sorted(self.parts))
        if len(names) == 1 and names[0] in (ONE, "clip_l", "clip_g", "clip_h"):
            names = self.parts[names[0]].shape[1]
        return FAMILIES.get(names, "a model that is not known here")


# =====================================================================================================
# Reading
# =====================================================================================================


def read_words(path, what):
    """The `Word`s of an embedding file, or of the folder of a run.

    Args:
        path: of it.
        what: begins error messages: the flag and its value.

    Raises:
        InputError: it cannot be read, or is none.
    """
    path = Path(path)
    path = path / RESULT if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{what}: there is no file {quoted(path, 300)}: give an embedding file.")
    content, metadata = (read_pickle if path.suffix.lower() in PICKLES else read_safetensors)(path, what)
    words = words_of(content, name_in(metadata), path.stem, what)
    for word in words:
        for key, vectors in {**word.parts, **word.outputs}.items():
            check_vectors(vectors, f"{what}: {key or word.name}")
    return [word._replace(parts=as_rows(word.parts), outputs=as_rows(word.outputs)) for word in words]


def name_in(metadata):
    """The word's name by a file's metadata, or None."""
    return next((metadata[entry] for entry in NAMES if entry in metadata), None)


def is_of_output(keys):
    """Whether a file with these keys has vectors for an encoder's output."""
    return any(key.endswith(OUT) for key in keys)


def as_rows(parts):
    """Vectors as `[k, d]` in float32, text encoders in the order of `ENCODERS`."""
    order = [ONE, *ENCODERS]
    found = {key: parts[key] for key in sorted(parts, key=order.index)}
    return {key: vectors.detach().float().reshape(-1, vectors.shape[-1]) for key, vectors in found.items()}


def read_safetensors(path, what):
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{what} is no whole safetensors file ({first_cause(error)}): get it again.") from None


def read_pickle(path, what):
    """The content of a pickle, of plain tensors alone: nothing that PyTorch does not know as harmless is loaded."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # torch raises what it likes on files of others
        raise InputError(
            f"{what} is no pickle of plain tensors ({shorten(first_cause(error), 120)}), and anything else in one"
            " could run code: save it as safetensors with the program that made it."
        ) from None


def words_of(content, name, stem, what):
    """The `Word`s in the content of a file.

    Args:
        content: dict.
        name: of the word, by the file's metadata; None where they do not say.
        stem: of the file's name, which is the word's where nothing else is.
        what: see `read_words`.
    """
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{what} holds {'nothing' if not content else f'a {type(content).__name__}'} and no embedding."
        )
    if "string_to_param" in content:
        vectors, inner = content["string_to_param"], content.get("name")
        vectors = next(iter(vectors.values()), None) if isinstance(vectors, dict) else None
        return [Word(name or (inner if isinstance(inner, str) and inner else stem), {ONE: vectors}, "a1111")]
    keys = {key: str(key).removesuffix(OUT) for key in content}
    if set(keys.values()) <= LONE.keys() | ENCODERS.keys():
        parts = {ENCODERS.get(plain, ONE): content[key] for key, plain in keys.items() if key == plain}
        outputs = {ENCODERS.get(plain, ONE): content[key] for key, plain in keys.items() if key != plain}
        if not parts:
            raise InputError(f"{what} holds vectors for the output of text encoders alone: no prompt can carry them.")
        form = next((LONE[key] for key in keys if key in LONE), "onetrainer" if outputs or "t5" in keys else "kohya")
        return [Word(name or stem, parts, form, outputs)]
    return [Word(str(key), {ONE: vectors}, "diffusers") for key, vectors in content.items()]


def check_vectors(vectors, what):
    """Raises an `InputError` unless these are vectors `[k, d]` or `[d]`, of finite floating-point numbers."""
    if not isinstance(vectors, torch.Tensor) or vectors.dim() not in (1, 2) or 0 in vectors.shape:
        found = list(vectors.shape) if isinstance(vectors, torch.Tensor) else f"a {type(vectors).__name__}"
        raise InputError(f"{what} holds {found} where vectors [number, width] should be: it is no embedding file.")
    if not vectors.is_floating_point() or not bool(vectors.float().isfinite().all()):
        raise InputError(f"{what} holds NaN, infinity or whole numbers: use an earlier save of it.")


# =====================================================================================================
# A word for a base
# =====================================================================================================


def read_start(path, widths, token, flag):
    """Where training starts from by an embedding file, float32 `[k, sum(widths)]`.

    Args:
        path: the value of `flag`.
        widths: key of a part -> width, see `Base.word_parts`; of one text encoder {`ONE`: width}.
        token: the placeholder, which chooses among several words.

    Raises:
        InputError: it holds no word, several, or one that does not fit the base.
    """
    what = f"{flag} {quoted(path, 300)}"
    words = read_words(path, what)
    if len(words) > 1:
        words = [word for word in words if word.name == token] or words
    if len(words) > 1:
        names = shorten(", ".join(word.name for word in words), 200)
        raise InputError(f"{what} holds {len(words)} words ({names}): split it with convert_embedding.py --split.")
    word = words[0]
    parts, wants_output = word.parts, is_of_output(widths)
    if wants_output != bool(word.outputs):
        fix = "give one that was learned with it, or drop --learn output" if wants_output else "add --learn output"
        raise InputError(f"{what} has {'no ' * wants_output}vectors for a text encoder's output: {fix}.")
    parts = parts | {f"{key}{OUT}": vectors for key, vectors in word.outputs.items()}
    if len(widths) == 1 == len(parts):  # whatever the file calls the only encoder
        parts = dict(zip(widths, parts.values()))
    found = {key or "vectors": vectors.shape[1] for key, vectors in parts.items()}
    if parts.keys() != widths.keys() or any(parts[key].shape[1] != width for key, width in widths.items()):
        wanted = {key or "vectors": width for key, width in widths.items()}
        raise InputError(
            f"{what} is of {word.family} ({entries(found)}) and this base model takes {entries(wanted)}: give a word"
            " that was learned on such a model."
        )
    if len({len(vectors) for vectors in parts.values()}) > 1:
        raise InputError(f"{what} has different numbers of vectors for the text encoders: get it again.")
    return torch.cat([parts[key] for key in widths], dim=1)


def entries(widths):
    """Widths in a sentence: "clip_l of 768 and clip_g of 1280 entries"."""
    return " and ".join(f"{key} of {width}" for key, width in widths.items()) + " entries"


# =====================================================================================================
# Writing
# =====================================================================================================


def file_stem(name):
    """A file's name for a concept's, "my-dog" for "<my-dog>": without what shells and file systems trip over."""
    short = re.sub(r"[^\w.-]+", "-", name).strip("-.").encode(errors="ignore")[:LONGEST_STEM].decode(errors="ignore")
    return short.strip("-.") or "concept"


def files_of(words, form, stem):
    """The files that hold `Word`s in a form.

    Args:
        words: one, or several with the same text encoders, which only `diffusers` has in one file.
        form: of `FORMS`.
        stem: of the files' names.

    Returns:
        Name -> dict of tensors; a name ends with .pt where it is a pickle.

    Raises:
        InputError: the form has no place for them.
    """
    encoders = list(words[0].parts)
    if any(word.outputs for word in words):
        raise InputError(
            f"a file of the form {form} has no place for vectors that replace an encoder's output: draw with the"
            " pipeline that came with the word."
        )
    if any(list(word.parts) != encoders for word in words):
        raise InputError("the words are of different kinds of models: convert them one by one.")
    if form == "diffusers":
        numbers = [""] if len(encoders) == 1 else [f"_{i}" for i in range(1, len(encoders) + 1)]
        return {
            f"{stem}{number}.safetensors": {word.name: word.parts[encoder] for word in words}
            for number, encoder in zip(numbers, encoders)
        }
    if len(words) > 1:
        raise InputError(f"a file of the form {form} holds one word: give --split or --join.")
    (word,) = words
    if len(encoders) > 1:  # which all of them, Automatic1111 included, read under the same keys
        names = {"t5xxl": "t5"} if form == "onetrainer" else {}
        return {f"{stem}.safetensors": {names.get(key, key): word.parts[key] for key in encoders}}
    (vectors,) = word.parts.values()
    if form == "a1111":
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": word.name, "step": 0}
        return {f"{stem}.pt": content}
    key = "emp_params" if form == "onetrainer" else "emb_params" if encoders == [ONE] else encoders[0]
    return {f"{stem}.safetensors": {key: vectors}}


def write(path, content, name):
    """Writes one of `files_of`, whole or not at all; where its keys do not say the word's name, its metadata do."""
    if path.suffix == ".pt":
        return save_tensors(path, content)
    content = {key: vectors.contiguous() for key, vectors in content.items()}
    said = name in content
    with atomic_path(path) as temporary:  # one entry of metadata: the order of several changes between processes
        temporary.write_bytes(save(content, metadata={"format": "pt"} if said else {"placeholder_token": name}))


def joined(words, name):
    """One `Word` of the vectors of several, one after the other."""
    if any(word.parts.keys() != words[0].parts.keys() for word in words):
        raise InputError("the words are of different kinds of models and cannot be joined: give words of one kind.")
    parts = {key: torch.cat([word.parts[key] for word in words]) for key in words[0].parts}
    return Word(name, parts, words[0].form)


def paired(words):
    """Words whose halves are in files of their own (`learned_embeds_1`, `_2` of diffusers), put together."""
    of_name, whole = {}, []
    for word in words:
        of_name.setdefault(word.name, []).append(word)
    for name, found in of_name.items():
        lone = [next(iter(word.parts.values())) for word in found if len(word.parts) == 1]
        halves = sorted(lone, key=lambda vectors: vectors.shape[1])
        if len(found) == 2 and [half.shape[1] for half in halves] == [768, 1280]:
            found = [Word(name, dict(zip(("clip_l", "clip_g"), halves)), "diffusers")]
        whole += found
    return whole
