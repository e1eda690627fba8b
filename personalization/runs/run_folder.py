"""The folder of a run: one run at a time is in it, and what another run wrote there is neither lost nor taken over.

Rules:
- A run holds `.lock` (a lock of the operating system, which a killed process lets go) from before it writes anything.
- The run's config records the files of its result with their hashes, as "files". Only these are shown in the model
  card and pushed, and only while they are what was written.
- A file of another run is never overwritten or deleted: it moves to `earlier-N/`, at the moment when this run has
  something to put in its place, all the rest once this run's embedding is written. `earlier-N` can be pushed as it is.
"""

import contextlib
import errno
import os
import re
import shutil
import time
from pathlib import Path

import filelock
from accelerate.utils import broadcast_object_list

from ..errors import InputError, RunError, Stopped, is_outside, reason, uncovered
from ..files import PROBE, read_json, sha256
from ..logs import get_logger
from .checkpoints import list_checkpoints


logger = get_logger(__name__)

PIPELINE = "pipeline"  # folder of the full pipeline
DURING_TRAINING = ("learned_embeds-steps-*.safetensors", "validation/*.png")  # beside what is published
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


# =====================================================================================================
# One run at a time
# =====================================================================================================


@contextlib.contextmanager
def occupied(output_dir, accelerator=None):
    """Keeps other runs out of a folder, which exists, and removes what killed ones left half-written.

    Args:
        output_dir: the folder.
        accelerator: of this process: the first of a launch takes the lock for all; None is alone.

    Raises:
        InputError: another run is in it; all processes of the launch raise it.
    """
    lock = filelock.FileLock(Path(output_dir) / ".lock", timeout=0)
    first = accelerator is None or accelerator.is_main_process
    refusal = take_lock(lock, output_dir) if first else None
    if accelerator is not None:
        refusal = broadcast_object_list([refusal])[0]
    if refusal is not None:
        raise InputError(refusal)
    try:
        yield
    finally:
        lock.release()


def take_lock(lock, output_dir):
    """Locks a folder and removes leftovers in it; returns why it cannot, None when all is well."""
    try:
        lock.acquire()
    except filelock.Timeout:
        return f"--output_dir {str(output_dir)!r} is in use by another run: wait until it ends or choose another."
    except (NotImplementedError, OSError) as error:
        if not isinstance(error, NotImplementedError) and error.errno not in NO_LOCKS_HERE:
            return f"--output_dir {str(output_dir)!r} cannot be written ({reason(error)}): choose another."
        logger.warning(f"{output_dir} is on a file system without locks: let only one run write there at a time.")
    remove_leftovers(output_dir)
    return None


def remove_leftovers(output_dir):
    """Deletes half-written files, checkpoints and layers of runs that were killed; the lock must be held."""
    folder = Path(output_dir)
    for path in [*folder.glob(".tmp-*"), *folder.glob("*/.tmp-*")]:
        streamed = path.name.startswith((".tmp-layers-", ".tmp-checkpoint-")) or path.name.endswith(f"-{PIPELINE}")
        if path.is_dir() and not path.is_symlink():
            # A cache in this folder may be being filled by a run elsewhere, and a probe may be another process's.
            if path.parent == folder and (streamed or re.fullmatch(PROBE, path.name) and is_old(path)):
                shutil.rmtree(path, ignore_errors=True)
        elif re.match(r"\.tmp-\d+-", path.name) and not path.parent.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()


def is_old(path):
    """Whether a file was left by whoever wrote it: nobody probes for a minute."""
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > 60
    return False


@contextlib.contextmanager
def saying_what_is_safe(output_dir):
    """Turns a failure of disk, memory or network into a `RunError` that also says where to go on from.

    A request to stop, before there is a run that could be stopped (`loop.stoppable`), becomes a sentence as well.
    """
    try:
        with uncovered():
            yield
    except (InputError, RunError, Stopped):
        raise
    except KeyboardInterrupt:
        raise Stopped("Stopped before a step was done: nothing is lost, the same command starts again.") from None
    except Exception as error:
        if not is_outside(error):
            raise
        found = list_checkpoints(output_dir)
        go_on = f"{found[-1]} is safe, and --resume_from_checkpoint latest goes on" if found else "no checkpoint yet"
        raise RunError(f"the run broke off: {reason(error)} ({type(error).__name__}); {go_on}.") from error


# =====================================================================================================
# Whose files
# =====================================================================================================


def regular_files(folder, patterns):
    """Relative names of the files that match, without links and what lies behind links."""
    folder = Path(folder).resolve()
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file() and path.resolve() == path)


def own_files(folder, patterns, recorded):
    """Those of `regular_files` that a run recorded as its own and that are as it wrote them.

    Args:
        folder: of the run.
        patterns: what may be published.
        recorded: "files" of the run's config; None for runs older than that, which own all that matches.
    """
    found = regular_files(folder, patterns)
    if recorded is None:
        return found
    return [name for name in found if name in recorded and sha256(Path(folder) / name) == recorded[name]]


class ResultFolder:
    """What one run writes as its result.

    Args:
        folder: of the run.
        foreign: relative names (files, or a whole folder) that another run left there.
    """

    def __init__(self, folder, foreign=()):
        self.folder, self.foreign, self.files = Path(folder), set(foreign), set()
        self.earlier = None  # where files of the other run go

    @contextlib.contextmanager
    def file(self, name):
        """Yields the path to write a file to (whole or not at all) and records it as this run's."""
        self._keep(name)
        yield self.folder / name
        self.files.add(name)

    def set_aside(self):
        """Moves everything that another run left, now that this run has a result."""
        for name in sorted(self.foreign):
            self._move(name)

    def hashes(self, patterns):
        """Name -> SHA-256 of the files that this run wrote, that match and that are still there."""
        names = sorted(self.files.intersection(regular_files(self.folder, patterns)))
        return {name: sha256(self.folder / name) for name in names}

    def _keep(self, name):
        """Before a file is overwritten: another run's stays as a second name in `earlier-N`."""
        for parent in {Path(name).parts[0]} - {name}:  # a link to a folder is not written into
            if parent in self.foreign:
                self._move(parent)
        path = self.folder / name
        if name not in self.foreign or not path.is_file() or path.is_symlink():
            return self._move(name)
        target = self._earlier_path(name)
        try:
            os.link(path, target)
        except OSError:
            shutil.copy2(path, target)
        self.foreign.discard(name)

    def _move(self, name):
        if name in self.foreign:
            if os.path.lexists(self.folder / name):
                os.replace(self.folder / name, self._earlier_path(name))
            self.foreign.discard(name)

    def _earlier_path(self, name):
        if self.earlier is None:
            numbers = (n for n in range(1, 10**6) if not os.path.lexists(self.folder / f"earlier-{n}"))
            self.earlier = self.folder / f"earlier-{next(numbers)}"
            logger.info(f"What an earlier run left in {self.folder} moves to {self.earlier}.")
        (self.earlier / name).parent.mkdir(parents=True, exist_ok=True)
        return self.earlier / name


def open_results(output_dir, publication, run, resumed):
    """The `ResultFolder` of a run that starts or goes on.

    Args:
        output_dir: of the run.
        publication: `hub.Publication`.
        run: its id.
        resumed: whether it goes on from a checkpoint; at a fresh start everything there is another's.
    """
    folder = Path(output_dir)
    try:
        config = read_json(folder / publication.config_name)
    except (OSError, ValueError):
        config = {}
    known = publication.of_concept(config.get("placeholder_token")).all_files  # and those of an earlier run's concept
    patterns = [*known, publication.reference_images, *DURING_TRAINING]
    if not resumed:
        foreign = {_top_link(folder, path) for pattern in patterns for path in folder.glob(pattern)}
        foreign |= {PIPELINE} & {path.name for path in folder.glob(PIPELINE)}
    elif config.get("run", run) != run and isinstance(config.get("files"), dict):
        recorded = own_files(folder, [*patterns, f"{PIPELINE}/**/*"], config["files"])
        foreign = {PIPELINE if name.startswith(f"{PIPELINE}/") else name for name in recorded}
        foreign |= {publication.config_name, "README.md"} & {path.name for path in folder.iterdir()}
    else:
        foreign = set()
    return ResultFolder(folder, foreign)


def _top_link(folder, path):
    """The name to set aside for a file: its own, or that of the link to a folder it lies behind."""
    parts = path.relative_to(folder).parts
    return parts[0] if (folder / parts[0]).is_symlink() else Path(*parts).as_posix()
