"""A learned embedding as files that other programs read."""

import tempfile
from pathlib import Path

from safetensors.torch import load_file, save

from ..data.prompts import normalized
from ..errors import RunError, is_outside, reason
from ..files import atomic_folder, atomic_path, save_tensors, tolerated
from ..models.embedding_files import NAMES, ONE, OUT, is_of_output
from ..models.families import SD1
from .run_folder import PIPELINE


PART_FILES = "learned_embeds_1.safetensors", "learned_embeds_2.safetensors"  # each half of a pair, for diffusers


def save_embeds(path, placeholder_token, theta, parts=None):
    """`{placeholder: [k, d]}`, float32: what `load_textual_inversion` of any diffusers reads.

    Where a word is saved in parts (key -> width, see `Base.word_parts`) each has its key: of SDXL it is
    `{"clip_l": [k, d1], "clip_g": [k, d2]}`, what the programs around it read. One of the output has what stands in
    prompts beside what was learned, `{"qwen3_4b": [k, d], "qwen3_4b_out": [k, D]}`.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(as_bytes(placeholder_token, theta, parts))


def as_bytes(placeholder_token, theta, parts=None):
    """The content of a file by `save_embeds`."""
    theta = theta.detach().cpu()
    if not parts:
        return save({placeholder_token: theta.clone()}, metadata={"format": "pt"})
    halves = {key: half.contiguous() for key, half in zip(parts, theta.split(list(parts.values()), dim=-1))}
    # One entry only: safetensors writes several in an order that changes from process to process.
    return save(halves, metadata={NAMES[is_of_output(parts)]: placeholder_token})


def save_halves(results, placeholder_token, theta, parts=None):
    """Each half of a pair as `{placeholder: [k, d]}`, for two calls of `load_textual_inversion`; others have none."""
    is_pair = parts and len(parts) == 2 and not is_of_output(parts)
    halves = theta.split(list(parts.values()), dim=-1) if is_pair else ()
    for name, half in zip(PART_FILES, halves):
        with results.file(name) as path:
            save_embeds(path, placeholder_token, half)


def load_concept(pipeline, folder, placeholder_token, family=SD1, name="learned_embeds.safetensors"):
    """Teaches a family's pipeline of plain diffusers the word in a run's folder, and others that are in the same file.

    Under the names that the tokenizer has for them: in prompts, too, it is these that stand for all vectors of a word.
    """
    content = load_file(Path(folder) / name)
    words = {placeholder_token: content} if family.word_keys else {token: {ONE: content[token]} for token in content}
    for token, found in words.items():
        parts = {key: found[key] for key in family.word_keys or (ONE,)}
        if family.learns_output:
            parts |= {key: vectors for key, vectors in found.items() if key.endswith(OUT)}
        family.load_word(pipeline, normalized(pipeline.tokenizer, token), parts)


def try_to_save_embeds(results, name, placeholder_token, theta, parts=None):
    """Saves an embedding that a run can do without: if the disk, say, fails it, a warning says so."""
    with tolerated(f"Writing {name}"), results.file(name) as path:
        save_embeds(path, placeholder_token, theta, parts)


def save_result(results, name, placeholder_token, theta, parts=None):
    """Saves what a run has learned: in its folder or, if that fails, in the system's folder for temporary files.

    Args:
        results: `run_folder.ResultFolder`.
        name: of the file.
        placeholder_token, theta, parts: as for `save_embeds`.

    Raises:
        RunError: it is not in the run's folder; the message says where it is instead.
    """
    save_content(results, name, as_bytes(placeholder_token, theta, parts))


def save_content(results, name, content):
    """`save_result` of whatever a run has learned: `content` is that of the file, bytes."""
    try:
        with results.file(name) as path, atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except Exception as error:
        if not is_outside(error):
            raise
        sentence = f"{results.folder / name} could not be written ({reason(error)})"
        try:
            path = Path(tempfile.mkdtemp(prefix="learned-")) / name
            path.write_bytes(content)
        except Exception as second:
            raise RunError(
                f"{sentence}, nor could {tempfile.gettempdir()} ({reason(second)}): make room and repeat the command"
                " with --resume_from_checkpoint latest."
            ) from error
        raise RunError(
            f"{sentence}: what was learned is in {path}; make room and move it, or repeat the command with"
            " --resume_from_checkpoint latest."
        ) from error


def save_a1111(path, placeholder_token, theta, step):
    """The `.pt` of the Automatic1111 web UI, plain tensors only (readable with `weights_only=True`)."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": theta.detach().cpu().clone()}}
    save_tensors(path, {**content, "name": placeholder_token, "step": step})


def save_full_pipeline(results, embeds, source, dtype, placeholder_token=None, family=SD1):
    """An unquantized pipeline that knows the new word, in `pipeline/`; an older one there stays until this is whole.

    Args:
        results: `run_folder.ResultFolder`.
        embeds: name of the file by `save_embeds` in it.
        source: `ModelSource` of the base.
        dtype: to save in.
        placeholder_token: the word, where that file does not say it.
        family: of the base.

    Raises:
        OSError: a part of the base is missing, or the disk is full.
    """
    options = {"revision": source.revision, "variant": source.variant, "dtype": dtype}
    try:
        pipeline = family.pipeline.from_pretrained(source.name, **options)
    except Exception as error:  # diffusers says that a part is missing in many ways
        raise OSError(f"no full pipeline can be made of {source.name} ({reason(error)})") from error
    load_concept(pipeline, results.folder, placeholder_token, family, embeds)
    with atomic_folder(results.folder / PIPELINE) as temporary:
        pipeline.save_pretrained(temporary)
        written = [path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()]
    results.files |= {f"{PIPELINE}/{name}" for name in written}
