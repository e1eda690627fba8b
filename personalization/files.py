"""Files written whole or not at all, and folders that can be written."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import threading
from pathlib import Path

import torch

from .errors import InputError, is_outside, quoted, reason
from .logs import get_logger


logger = get_logger(__name__)


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path` (same suffix) and renames it into place when the block succeeds.

    Whoever writes it, the file gets the mode that the umask gives to new files (safetensors would keep it private).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.unlink(missing_ok=True)  # of a thread with this id that was killed
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        set_mode(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path):
    """A path beside `path` of this thread alone: two runs may fill the same cache, two visitors pack the same run."""
    return path.with_name(f".tmp-{os.getpid()}-{threading.get_native_id()}-{path.name}")


def set_mode(path, mode):
    """Gives a file or folder its permissions, where it has others and the file system (SMB, object stores) has any."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with contextlib.suppress(OSError):
            path.chmod(mode)


@contextlib.contextmanager
def atomic_folder(path):
    """Yields a temporary folder beside `path` and renames it into place (over an older one) when all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new, path):
    """Renames a folder into place, over an older one; another process may have done the same in between."""
    shutil.rmtree(path, ignore_errors=True)
    os.replace(new, path)


def temporary_folder(parent):
    """A folder that is deleted with this process (`.name` is its path)."""
    return tempfile.TemporaryDirectory(prefix=".tmp-layers-", dir=parent)


PROBE = r"\.tmp-\d+-\w{8}"  # names of folders by which it is tried whether one can be written


def check_writable(flag, folder):
    """Creates a folder and makes sure that files and folders can be written there and renamed, as a run does.

    Raises:
        InputError: it cannot; the message names the flag.
    """
    if not str(folder).strip():
        raise InputError(f"{flag} {folder!r} names no folder: give one.")
    folder, mine = Path(folder), f".tmp-{os.getpid()}-"  # all processes of a launch pass here at once
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe = Path(tempfile.mkdtemp(prefix=mine, dir=folder))
            (probe / "new").write_bytes(b"probe")
            os.rename(probe / "new", probe / "file")
            (probe / "folder").mkdir()
            os.rename(probe / "folder", probe / "renamed")
        finally:
            for probe in folder.glob(mine + 8 * "?"):  # wherever a signal came
                shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{flag} {str(folder)!r} cannot be written ({error.strerror or error}): choose another."
        ) from None


def check_apart(flag, path, folder, written="--output_dir", over=False):
    """Refuses a folder that is written to where it is in, over or under what is read.

    A run moves what others left in its folder aside, and a later one would learn from the pictures of this one.

    Args:
        flag: that names what is read.
        path: its value.
        folder: that is written to.
        written: the flag that names it.
        over: whether it may hold what is read.

    Raises:
        InputError: they are not apart.
    """
    read, target = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    same = read == target or os.path.exists(read) and os.path.exists(target) and os.path.samefile(read, target)
    where = "is" if same else "lies in" if target.is_relative_to(read) else "holds"
    if where != "holds" or not over and read.is_relative_to(target):
        raise InputError(
            f"{written} {quoted(folder, 300)} {where} {flag} {quoted(path, 300)}, which is read: give a folder apart"
            " from it."
        )


def save_tensors(path, content):
    """`torch.save`, written whole or not at all; a full disk is an `OSError`, as it is for any other file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def sha256(path):
    """Hash of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def tolerated(what):
    """For what a run can do without: if the disk, say, fails it, a warning says so and the run goes on."""
    try:
        yield
    except Exception as error:
        if not is_outside(error):
            raise
        logger.warning(f"{what} failed ({reason(error)}); training goes on without.")


def write_json(path, content):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path):
    """A JSON object from a file that may be damaged.

    Raises:
        ValueError: it holds something else; the message says what, in half a sentence.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content
