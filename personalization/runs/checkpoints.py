"""Checkpoints: complete or not there, each with its run's id and the hashes of its files; found, checked, rotated."""

import contextlib
import json
import re
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object

from ..data.images import digest
from ..errors import InputError, is_outside, reason
from ..files import read_json, replace_folder, save_tensors, sha256, write_json
from ..logs import get_logger


logger = get_logger(__name__)

MANIFEST = "manifest.json"  # {"run": id, "step": N, "files": {name: {"size", "sha256"}}}, written last
PROCESSES = "number of processes"


def trajectory_settings(args, weights, num_processes, pictures, uses_length=False):
    """Everything that decides a run's trajectory: a checkpoint only resumes under the same.

    Args:
        args: `Settings`, complete.
        weights: `base_model.weights_digest`.
        num_processes: processes of the launch.
        pictures: `images.Picture`s, which are told apart by pixels and caption.
        uses_length: whether the course depends on the length of the run, even at a constant learning rate.

    Returns:
        dict, JSON-ready.
    """
    scheduled = () if args.lr_scheduler.startswith("constant") and not uses_length else ("schedule",)
    settings = args.deciding("run", *scheduled)
    found = {PROCESSES: num_processes, "weights of the model": weights, "training data": digest(pictures)}
    return settings | found


def new_run_id():
    """Tells the runs in a folder apart; a resumed run keeps its own."""
    return uuid.uuid4().hex[:12]


# =====================================================================================================
# Checked
# =====================================================================================================


class DamagedError(Exception):
    """A checkpoint cannot be used; the message says why."""


class Checkpoint(NamedTuple):
    """A checkpoint whose files are whole."""

    path: Path
    run: str  # id of the run that wrote it
    settings: dict  # `trajectory_settings` it was written under


def step_of(path):
    """N of checkpoint-N, or of checkpoint-N-ID, which another run had to leave its name to; None for others."""
    match = re.fullmatch(r"checkpoint-(\d+)(-\w+)?", Path(path).name)
    return int(match[1]) if match else None


def list_checkpoints(output_dir):
    """Checkpoints of whatever run, oldest first (one being written has another name)."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), -len(path.name)))


def owner_of(path):
    """Id of the run that wrote a checkpoint, None where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        owner = read_json(Path(path) / MANIFEST).get("run")
        return owner if isinstance(owner, str) else None
    return None


def check(path):
    """The `Checkpoint` in a folder.

    Raises:
        DamagedError: a file of it is missing, cut or changed.
    """
    try:
        settings = read_json(path / "settings.json")
        count = settings.get(PROCESSES, 1)
        if not isinstance(count, int) or count < 1:
            raise DamagedError(f"settings.json says {count!r} processes")
        parts = ["state.pt", *(f"generators_{rank}.pt" for rank in range(count))]
        check_hashes(path, ["settings.json", *parts])
    except FileNotFoundError as error:
        raise DamagedError(f"{Path(error.filename or 'a file').name} is missing") from None
    except (ValueError, OSError) as error:
        raise DamagedError(reason(error)) from None
    return Checkpoint(path, owner_of(path), settings)


def check_hashes(path, names):
    """Compares the files of a checkpoint with its manifest."""
    files = read_json(path / MANIFEST).get("files")
    for name in names:
        facts = files.get(name) if isinstance(files, dict) else None
        if not isinstance(facts, dict):
            raise DamagedError(f"{MANIFEST} does not know {name}")
        size = (path / name).stat().st_size
        if size != facts.get("size"):
            raise DamagedError(f"{name} has {size} bytes and was written with {facts.get('size')}")
        if sha256(path / name) != facts.get("sha256"):
            raise DamagedError(f"{name} is not what was written")


ONCE_COMPARED = ("max_train_steps", "center_crop")  # by earlier versions, where they do not count


def changed_settings(before, now):
    """The settings that differ, in words."""
    now = json.loads(json.dumps(now))
    before = {name: value for name, value in before.items() if name in now or name not in ONCE_COMPARED}
    changed = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} ({before.get(name)!r}, now {now.get(name)!r})" for name in changed)


# =====================================================================================================
# Found
# =====================================================================================================


def find_checkpoint(resume_from, output_dir, settings):
    """The `Checkpoint` that `--resume_from_checkpoint` asks for, or None for a fresh start.

    Args:
        resume_from: the flag: None, "latest" or a folder.
        output_dir: of this run.
        settings: `trajectory_settings` of this run.

    Raises:
        InputError: it does not exist, is damaged, or was written under other settings.
    """
    if resume_from is None:
        return None
    if resume_from == "latest":
        return find_latest(output_dir, settings)
    path = Path(resume_from)
    if not path.exists() and (Path(output_dir) / path.name).exists():
        path = Path(output_dir) / path.name
    if not path.is_dir() or step_of(path) is None and not (path / "settings.json").is_file():
        raise InputError(
            f'--resume_from_checkpoint {resume_from!r} is not a checkpoint: give "latest" or a checkpoint-N folder.'
        )
    try:
        found = check(path)
    except DamagedError as error:
        raise InputError(
            f"--resume_from_checkpoint {str(path)!r} is damaged ({error}): give another checkpoint, or latest, which"
            " takes the newest that is whole."
        ) from None
    if changed := changed_settings(found.settings, settings):
        raise other_settings(path, changed)
    return found


def find_latest(output_dir, settings):
    """The newest checkpoint that is whole and fits the settings; None where no checkpoint is whole.

    Raises:
        InputError: those that are whole were all written under other settings.
    """
    others = []
    for path in reversed(list_checkpoints(output_dir)):
        try:
            found = check(path)
        except DamagedError as error:
            logger.warning(f"{path} is damaged ({error}): looking for the one before.")
            continue
        changed = changed_settings(found.settings, settings)
        if not changed:
            for other, why in others:
                logger.warning(f"{other} belongs to other settings, {why}: left alone.")
            return found
        others.append((path, changed))
    if others:
        raise other_settings(*others[0])
    logger.warning(f"No checkpoint to resume from in {output_dir}: starting from step 0.")
    return None


def other_settings(path, changed):
    return InputError(
        f"--resume_from_checkpoint {str(path)!r} belongs to other settings: {changed}; repeat them as they were or"
        " start in another --output_dir."
    )


# =====================================================================================================
# Written and read
# =====================================================================================================


class CheckpointState(NamedTuple):
    """What a checkpoint holds."""

    step: int  # updates done
    shared: dict  # what all processes have in common, tensors and plain values
    generators: dict  # name -> `torch.Generator` of this process
    settings: dict  # `trajectory_settings`
    run: str  # `new_run_id`


@contextlib.contextmanager
def noted(problems):
    """Adds to `problems` what fails in the block for a reason outside the program."""
    try:
        yield
    except Exception as error:
        if not is_outside(error):
            raise
        problems.append(reason(error))


def save_checkpoint(accelerator, output_dir, state, total_limit=None):
    """Writes `checkpoint-{step}` under a temporary name and renames it once every process has written its part.

    If one of them cannot, a warning says so, the checkpoints before stay, and training goes on.

    Args:
        accelerator: every process of the launch calls this.
        output_dir: of the run.
        state: `CheckpointState`; the first process writes what is shared.
        total_limit: how many checkpoints of this run stay; None keeps all.
    """
    name, problems = f"checkpoint-{state.step}", []
    temporary = Path(output_dir) / f".tmp-{name}"
    with noted(problems):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_tensors(temporary / "state.pt", state.shared)
            write_json(temporary / "settings.json", state.settings)
    accelerator.wait_for_everyone()
    states = {name: generator.get_state() for name, generator in state.generators.items()}
    with noted(problems):
        if temporary.is_dir():
            save_tensors(temporary / f"generators_{accelerator.process_index}.pt", states)
    problems = gather_object(problems)
    if accelerator.is_main_process:
        with noted(problems):
            if not problems:
                seal(temporary, state)
                put_in_place(temporary, Path(output_dir) / name, state.run)
                rotate(output_dir, state, total_limit)
        if problems:
            logger.warning(f"{name} is not complete ({problems[0]}); training goes on.")
            shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()


def seal(folder, state):
    """Writes the manifest."""
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"run": state.run, "step": state.step, "files": files})


def put_in_place(new, path, run):
    """Renames a checkpoint into place; one of another run that has its name keeps its files under a longer name."""
    owner = owner_of(path)
    if path.exists() and owner != run:
        path.rename(path.with_name(f"{path.name}-{owner or new_run_id()}"))
    replace_folder(new, path)


def rotate(output_dir, state, total_limit):
    """Deletes the oldest checkpoints of this run, and of no other.

    Those of later steps stay: they are of the same run before it went back to an earlier checkpoint, and it will write
    them again.
    """
    if total_limit is None:
        return
    reached = [path for path in list_checkpoints(output_dir) if step_of(path) <= state.step]
    for old in [path for path in reached if owner_of(path) == state.run][:-total_limit]:
        shutil.rmtree(old)


def load_checkpoint(checkpoint, generators, process_index):
    """The shared state of a `Checkpoint`, on the CPU; `generators` take up where those of this process stopped."""
    states = torch.load(checkpoint.path / f"generators_{process_index}.pt", weights_only=True)
    for name, generator in generators.items():
        generator.set_state(states[name])
    return torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True)
