"""The safetensors files of a model's component: which there are, whether they are whole, what they hold."""

import fnmatch
import glob
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import InputError


class StoredTensor(NamedTuple):
    """What a file says of a tensor."""

    dtype: str  # as safetensors spells it: F32, BF16, I8
    shape: tuple


def file_patterns(stem, variant):
    """Patterns of the names that weights (one file, or shards) and their index can have, the likeliest first."""
    dot, shard = f".{glob.escape(variant)}" if variant else "", "-[0-9]*-of-[0-9]*"
    weights = [f"{stem}{dot}.safetensors", f"{stem}{dot}{shard}.safetensors"]
    weights += [f"{stem}{shard}{dot}.safetensors"] if variant else []
    indexes = [f"{stem}.safetensors.index{dot}.json", f"{stem}{dot}.safetensors.index.json"]
    return weights, list(dict.fromkeys(indexes))


def find_files(folder, stem, variant, label):
    """The safetensors files of a component.

    Args:
        folder: of the component.
        stem: what their names begin with.
        variant: of the weights, such as "fp16", or None.
        label: the flag and the model, for error messages.

    Returns:
        One path, or those of all shards.

    Raises:
        InputError: there are none (of that variant), or a shard is missing.
    """
    folder = Path(folder)
    weights, indexes = file_patterns(stem, variant)
    names = names_in(folder)
    files = next((found for pattern in weights if (found := fnmatch.filter(names, pattern))), [])
    files = [folder / name for name in files]
    index = next((folder / name for name in indexes if os.path.isfile(folder / name)), None)
    whole = len(files) == 1 and files[0].name == weights[0]
    if not files and index is None:
        raise InputError(f"{label} has no {printable(weights[0])} in {folder.name}/: {advice(names, stem, variant)}")
    if whole:
        return files
    if index is not None:
        names = sorted(set(read_index(index, label).values()))
    else:
        names = sorted({name for path in files for name in shard_names(path.name)})
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if missing:
        raise InputError(
            f"{label} lacks {folder.name}/{missing[0]}, {len(missing)} of the {len(names)} shards of its"
            f" {folder.name}: get them again."
        )
    return [folder / name for name in names]


def printable(name):
    """A file's name as a sentence can carry it."""
    return name.encode("unicode_escape").decode()[-100:]


def names_in(folder):
    """Names of the entries of a folder, none where it is missing or cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def read_index(path, label):
    """The names of shards by tensor."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if content and all(isinstance(n, str) and Path(n).name == n for n in content.values()):
            return content
        reason = "its weight_map names no files"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = repr(error)
    raise InputError(f"{label}: {path.parent.name}/{path.name} cannot be read ({reason[:200]}): get it again.")


def shard_names(name):
    """The names of all shards that belong to one."""
    count = re.search(r"-\d+-of-(\d+)", name)[1]
    numbers = (f"{number:0{len(count)}d}" for number in range(1, min(int(count), 10_000) + 1))
    return [re.sub(r"-\d+-of-", f"-{number}-of-", name) for number in numbers]


def variants(names, stem):
    """The variants that file names speak of, "" for weights without one."""
    found = set()
    for name in names:
        match = re.fullmatch(rf"{stem}(.*)\.safetensors(\.index(\..+)?\.json)?", name)
        if match:
            found.add((re.sub(r"-\d+-of-\d+", "", match[1]) or match[3] or "").strip("."))
    return sorted(found)


def advice(names, stem, variant):
    """What to do about missing weights.

    Args:
        names: of the files that are there instead.
        stem, variant: as for `find_files`.
    """
    others = [name for name in variants(names, stem) if name != (variant or "")]
    if "" in others:
        return "leave out --variant, there are weights without one."
    if others:
        return f"give --variant {others[0]}, which there is."
    pickles = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth", ".msgpack"))]
    if pickles:
        return f"convert the weights there, {pickles[0]}, to safetensors, or choose another model."
    return "get the model again, or choose another one, with weights as safetensors."


def read_header(path, label):
    """What a safetensors file holds, from its header alone: name -> `StoredTensor`.

    Raises:
        InputError: it is no whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: StoredTensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        where = f"{path.parent.name}/{path.name}"
        raise InputError(f"{label}: {where} {what_is_wrong(path, error)}") from None


def what_is_wrong(path, error):
    """Why a safetensors file cannot be read, and what to do."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as reason:
        return f"cannot be read ({reason.strerror or reason}): check its permissions."
    if size == 0:
        return "is empty: get it again."
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer and not the weights themselves: run git lfs pull in the model's folder."
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return f"is cut or damaged, {size} bytes ({reason}): get it again."


LARGEST_WEIGHT = 1e30  # sums of larger ones overflow


def check_values(path, name, tensor):
    """Judges a tensor of a file: weights are finite numbers that can be computed with.

    Raises:
        InputError: they are not.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    ends = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()  # NaN, if there is one
    low, high = (end.item() for end in ends)  # in half precision the bound itself would be infinite
    if not (low >= -LARGEST_WEIGHT and high <= LARGEST_WEIGHT):
        raise InputError(
            f"{path}: the weights hold NaN or infinity in {name[:100]!r}, or numbers beyond {LARGEST_WEIGHT:g}, as"
            " damage or a training that diverged leave them: get the model again, or choose another one."
        )
