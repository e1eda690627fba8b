"""Weights derived from a base model (quantized, say), kept in a folder of shards and memory-mapped from there."""

import hashlib
import json
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from .runs import atomic_folder


SHARD_BYTES = 64 * 2**20  # what is in memory at one time while a model is written


def source_key(files, *settings):
    """A name for what is derived from weight files under `settings` (anything with a faithful `repr`).

    Files of the Hub's cache are named by the hash of their content; others are told apart by path, size and time.

    Returns:
        20 hexadecimal digits.
    """
    identities = []
    for path in map(Path.resolve, files):
        if re.fullmatch(r"[0-9a-f]{64}", path.name):
            identities.append(path.name)
        else:
            identities.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
    return hashlib.sha256(repr((identities, settings)).encode()).hexdigest()[:20]


def config_key(config):
    """A model's config as text that is the same for the same config."""
    content = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.dumps({k: v for k, v in content.items() if k != "_name_or_path"}, sort_keys=True, default=str)


def write_shards(folder, tensors):
    """Streams `(name, tensor)` pairs into the safetensors files of a new folder, which appears when it is complete.

    Never more than `SHARD_BYTES` and one tensor are in memory.
    """
    with atomic_folder(folder) as temporary:
        shard, size, count = {}, 0, 0

        def flush():
            nonlocal shard, size, count
            save_file(shard, temporary / f"{count:05d}.safetensors", metadata={"format": "pt"})
            shard, size, count = {}, 0, count + 1

        for name, tensor in tensors:
            bytes_more = tensor.numel() * tensor.element_size()
            if shard and size + bytes_more > SHARD_BYTES:
                flush()
            shard[name], size = tensor.contiguous(), size + bytes_more
        if shard:
            flush()


def read_shards(folder):
    """The `(name, tensor)` pairs of a folder of shards; each tensor is pages of a mapped file."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
