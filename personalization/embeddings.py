"""A learned embedding as files that other programs read."""

import tempfile
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save

from .errors import RunError, is_outside, reason
from .run_folder import PIPELINE
from .runs import atomic_folder, atomic_path, save_tensors, tolerated


def save_embeds(path, placeholder_token, theta):
    """`{placeholder: [k, d]}`, float32: what `load_textual_inversion` of any diffusers reads."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(as_bytes(placeholder_token, theta))


def as_bytes(placeholder_token, theta):
    """The content of a file by `save_embeds`."""
    return save({placeholder_token: theta.detach().cpu().clone()}, metadata={"format": "pt"})


def try_to_save_embeds(results, name, placeholder_token, theta):
    """Saves an embedding that a run can do without: if the disk, say, fails it, a warning says so."""
    with tolerated(f"Writing {name}"), results.file(name) as path:
        save_embeds(path, placeholder_token, theta)


def save_result(results, name, placeholder_token, theta):
    """Saves what a run has learned: in its folder or, if that fails, in the system's folder for temporary files.

    Args:
        results: `run_folder.ResultFolder`.
        name: of the file.
        placeholder_token, theta: as for `save_embeds`.

    Raises:
        RunError: it is not in the run's folder; the message says where it is instead.
    """
    save_content(results, name, as_bytes(placeholder_token, theta))


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


def save_full_pipeline(results, embeds, source, dtype):
    """An unquantized pipeline that knows the new word, in `pipeline/`; an older one there stays until this is whole.

    Args:
        results: `run_folder.ResultFolder`.
        embeds: name of the file by `save_embeds` in it.
        source: `ModelSource` of the base.
        dtype: to save in.

    Raises:
        OSError: a part of the base is missing, or the disk is full.
    """
    options = {"revision": source.revision, "variant": source.variant, "dtype": dtype}
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(source.name, **options)
    except Exception as error:  # diffusers says that a part is missing in many ways
        raise OSError(f"no full pipeline can be made of {source.name} ({reason(error)})") from error
    pipeline.load_textual_inversion(str(results.folder), weight_name=embeds)
    with atomic_folder(results.folder / PIPELINE) as temporary:
        pipeline.save_pretrained(temporary)
        written = [path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()]
    results.files |= {f"{PIPELINE}/{name}" for name in written}
