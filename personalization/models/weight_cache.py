"""Weights derived from a base model (quantized, say), kept in a folder of shards and memory-mapped from there.

What is in the cache is verified before it is read, by a manifest in its folder that is written last: sizes and
checksums of all files, names, shapes and dtypes of all tensors. What does not match is made anew, and what cannot be
written is done without.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
import zlib
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InputError
from ..files import check_writable, replace_folder, set_mode


logger = logging.getLogger(__name__)

SHARD_BYTES = 32 * 2**20  # what is in memory at one time while a model is written
MANIFEST = "manifest.json"
STALE_SECONDS = 24 * 3600  # nobody writes a model for longer


# =====================================================================================================
# The folder of the cache
# =====================================================================================================


def open_cache(folder, default, output_dir):
    """Makes sure that the cache can be written, and removes what killed runs left in it.

    The default lies in `$HF_HOME`, which clusters share read-only. Then the cache goes into the output folder: without
    any, the weights would be memory that the system cannot drop, where mapped files are pages that it can. What the
    default already holds is linked to, and read from there.

    Args:
        folder: `--quantized_cache_dir`.
        default: the flag's default.
        output_dir: of the run.

    Returns:
        The folder to use.

    Raises:
        InputError: the user chose the folder, and it cannot be written.
    """
    try:
        check_writable("--quantized_cache_dir", folder)
    except InputError:
        if folder != default:
            raise
        spare = str(Path(output_dir) / "quantized-cache")
        check_writable("--output_dir", spare)
        warn_once(
            f"The default --quantized_cache_dir {folder!r} cannot be written: quantized weights go into {spare!r},"
            " which may be deleted after the run."
        )
        link_entries(folder, spare)
        folder = spare
    remove_leftovers(folder)
    return folder


def link_entries(folder, spare):
    """Makes the entries of a cache that can only be read part of another one."""
    with contextlib.suppress(OSError):  # it may not be readable either, or not be there at all
        for path in Path(folder).resolve().iterdir():
            link = Path(spare) / path.name
            if (path / MANIFEST).is_file() and not os.path.lexists(link):
                link.symlink_to(path)


@functools.cache
def warn_once(message):
    """Logs a warning, the same one only once in a process, and by one process of a launch."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def remove_leftovers(folder):
    """Removes what killed runs were writing into a cache.

    Temporary names tell process and host (`.tmp-PID@HOST-...`; earlier versions left out the host). One of this host
    goes once its process does, one of another host that shares the folder when it has not changed for a day.
    """
    for path in Path(folder).glob(".tmp-*"):
        match = re.match(r"\.tmp-(\d+)(?:@([^@]*)@)?-", path.name)
        with contextlib.suppress(OSError):  # another process may be faster
            here = match is not None and match[2] in (None, host_name())
            if here and not process_lives(int(match[1])) or time.time() - last_change(path) > STALE_SECONDS:
                remove(path)


def host_name():
    """This host's name as temporary names have it."""
    return re.sub(r"[^\w.-]", "_", platform.node())


def process_lives(pid):
    """Whether a process of this host is alive (a killed one whose parent has not noticed is not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # another user's
        return True


def last_change(path):
    """When a file, or anything in a folder, was last changed, in seconds since 1970."""
    inside = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    return max(entry.lstat().st_mtime for entry in (path, *inside))


def remove(path):
    """Removes a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# =====================================================================================================
# Names of what is in it
# =====================================================================================================


def source_key(files, *settings):
    """A name for what is derived from weight files under `settings` (anything with a faithful `repr`).

    Files of the Hub's cache are named by the hash of their content; others are told apart by path, size and times, of
    which the system sets the last one itself whenever the content changes.

    Returns:
        20 hexadecimal digits.
    """
    identities = []
    for path in map(Path.resolve, files):
        if re.fullmatch(r"[0-9a-f]{64}", path.name):
            identities.append(path.name)
        else:
            facts = path.stat()
            identities.append((str(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
    return hashlib.sha256(repr((identities, settings)).encode()).hexdigest()[:20]


def config_key(config):
    """A model's config as text that is the same for the same config."""
    content = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.dumps({k: v for k, v in content.items() if k != "_name_or_path"}, sort_keys=True, default=str)


# =====================================================================================================
# Entries: folders of files with a manifest
# =====================================================================================================


def checksum(path):
    """CRC-32 of a file, read in pieces: 0.2 s for the 0.9 GB of Stable Diffusion 1.5, where SHA-256 takes 0.7 s."""
    value, piece = 0, memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            value = zlib.crc32(piece[:count], value)
    return value


def write_manifest(folder, name=None):
    """Says of every file in a folder how large it is and what its checksum is; and the entry's name, if it differs.

    The name has the key of what the entry was made from: under another one it is another's.
    """
    files = {p.name: {"size": p.stat().st_size, "crc32": checksum(p)} for p in sorted(Path(folder).iterdir())}
    content = {"entry": name or Path(folder).name, "files": files}
    (Path(folder) / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def find_damage(folder, expected=None, name=None):
    """Compares an entry with its manifest.

    Args:
        folder: of the entry.
        name: of the entry, if it is not the folder's.
        expected: name -> (shape, dtype) of the tensors that its safetensors files must hold; None: they hold none.

    Returns:
        What is wrong, in some words; None if nothing is.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest.get("entry") != (name or folder.name):
            return "it is another's"
        there = {path.name for path in folder.iterdir()} - {MANIFEST}
        if there != files.keys() or not files:
            return "files are missing or do not belong there"
        for name, facts in files.items():
            if (folder / name).stat().st_size != facts["size"] or checksum(folder / name) != facts["crc32"]:
                return f"{name} has changed"
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in read_shards(folder)}
    except FileNotFoundError as error:
        return f"{Path(error.filename or MANIFEST).name} is missing"
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read: {error!r}"[:200]
    return None if found == (expected or {}) else "its tensors are not those of the model"


def expected_tensors(model, dtype):
    """Name -> (shape, dtype) of a model's tensors, its parameters in `dtype`; `model` may be on meta."""
    parameters = dict(model.named_parameters())
    state = model.state_dict().items()
    return {name: (tuple(t.shape), dtype if name in parameters else t.dtype) for name, t in state}


def provide(folder, write, expected=None):
    """Makes sure that an entry is there and whole: verifies it, or writes it.

    Args:
        folder: of the entry.
        write: fills a new folder.
        expected: see `find_damage`.

    Returns:
        Whether it is; if not, it could not be written, which has been said.
    """
    folder, damage = Path(folder), None
    if os.path.lexists(folder):
        damage = find_damage(folder, expected)
        if damage is None:
            return True
        logger.warning(f"{folder} is damaged or of an earlier version ({damage}): it is made anew.")
    try:
        with temporary_entry(folder) as temporary:
            write(temporary)
            for path in temporary.iterdir():  # safetensors writes for its owner alone
                set_mode(path, 0o666 & ~current_umask())
            write_manifest(temporary, folder.name)
            damage = find_damage(temporary, expected, folder.name)
            if damage is not None:
                raise OSError(damage)
            if find_damage(folder, expected) is not None:  # no other process was faster, whose files may be in use
                if folder.is_symlink() or folder.is_file():
                    folder.unlink()
                replace_folder(temporary, folder)
        return True
    except (OSError, SafetensorError, RuntimeError) as error:  # OpenVINO raises the last
        if find_damage(folder, expected) is None:  # another process was faster
            return True
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        warn_once(
            f"--quantized_cache_dir {str(folder.parent)!r} cannot be written ({reason}): this run goes on without,"
            " which takes more memory."
        )
        return False


@contextlib.contextmanager
def temporary_entry(folder):
    """Yields a new folder beside `folder`, and removes it if it is still there in the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".tmp-{os.getpid()}@{host_name()}@-{folder.name}-"
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        set_mode(temporary, 0o777 & ~current_umask())  # mkdtemp's is for its owner alone
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def current_umask():
    """What the process leaves out of the permissions of new files; reading it means setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_shards(folder, tensors):
    """Streams `(name, tensor)` pairs into safetensors files of a folder.

    Never more than `SHARD_BYTES` and one tensor are in memory.
    """
    shard, size, count = {}, 0, 0

    def flush():
        nonlocal shard, size, count
        save_file(shard, folder / f"{count:05d}.safetensors", metadata={"format": "pt"})
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


def through_cache(folder, component, make, expected):
    """The `(name, tensor)` pairs that `make()` gives, from a cache.

    Args:
        folder: of the entry; it is written if it is not there yet.
        component: what they are the weights of.
        make: returns the pairs anew each time.
        expected: name -> (shape, dtype) of them, see `expected_tensors`.

    Returns:
        Pages of mapped files; where the cache cannot be written, the pairs of `make()` themselves.
    """

    def write(temporary):
        logger.info(f"Quantizing the {component} once, into {folder}")
        write_shards(temporary, make())

    return read_shards(folder) if provide(folder, write, expected) else make()
