"""Around the training loop of every trainer: the run and how far it is, its log, requests to stop, its end."""

import contextlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..errors import InputError, Stopped, handled, leave_terminal, reason, uncovered
from ..flags import Settings
from ..logs import get_logger
from ..models.base_model import Base
from . import checkpoints, launch, run_folder


logger = get_logger(__name__)


# =====================================================================================================
# The run
# =====================================================================================================


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0  # of training, over all its parts
    best_loss: float = float("inf")  # least validation loss, and the step that had it
    best_step: int | None = None
    validations_without_gain: int = 0
    forward_passes: int = 0  # of one example and candidate, over all processes


@dataclass
class History:
    """Losses by step, as lists of (step, loss)."""

    loss: list = field(default_factory=list)
    validation_loss: list = field(default_factory=list)
    bp_share: list = field(default_factory=list)  # of updates by backpropagation, where there are others, too


@dataclass(kw_only=True)
class Run:
    """A training run: what was loaded, what is learned and how far it is. A trainer's own adds what it needs."""

    args: Settings  # complete and frozen
    accelerator: Accelerator
    base: Base
    model: Any  # the trainer's frozen model; None once it has left
    learner: Any  # what is learned and all that changes with it: `state_dict`, `load_state_dict`, `generators`
    settings: dict  # what a checkpoint compares
    id: str = field(default_factory=checkpoints.new_run_id)  # kept over resumes
    results: run_folder.ResultFolder | None = None  # what it writes for others to read
    progress: Progress = field(default_factory=Progress)
    history: History = field(default_factory=History)

    @property
    def output_dir(self):
        return Path(self.args.output_dir)

    @property
    def is_over(self):
        """Whether nothing is left to train."""
        args = self.args
        return args.finish_now or self.progress.step >= args.max_train_steps

    def state_dict(self):
        """What all processes have in common."""
        return {"progress": asdict(self.progress), "history": asdict(self.history), **self.learner.state_dict()}

    def load_state_dict(self, state):
        self.learner.load_state_dict(state)
        self.progress, self.history = Progress(**state["progress"]), History(**state["history"])

    def save_checkpoint(self):
        """Writes a checkpoint, and deletes the oldest ones above `--checkpoints_total_limit`."""
        args, step, generators = self.args, self.progress.step, self.learner.generators()
        state = checkpoints.CheckpointState(step, self.state_dict(), generators, self.settings, self.id)
        checkpoints.save_checkpoint(self.accelerator, self.output_dir, state, args.checkpoints_total_limit)

    def stopped(self):
        """The `Stopped` that says what is safe."""
        name = next(
            (
                path.name
                for path in reversed(checkpoints.list_checkpoints(self.output_dir))
                if checkpoints.owner_of(path) == self.id
            ),
            None,
        )
        go_on = f"--resume_from_checkpoint latest goes on from {name}" if name else "there is no checkpoint yet"
        return Stopped(f"Stopped at step {self.progress.step}; {go_on}.")

    def begin(self, publication, checkpoint):
        """Takes the run up where a `Checkpoint` has it (None: at its start), opens its results and its trackers.

        Args:
            publication: `hub.Publication`.
            checkpoint: what `checkpoints.find_checkpoint` found.

        Raises:
            InputError: there is none, and nothing is to be trained.
        """
        if checkpoint is not None:
            self.resume(checkpoint)
        elif self.args.finish_now:
            raise InputError("--finish_now has no checkpoint to write the result of: leave it out to train.")
        self.results = run_folder.open_results(self.output_dir, publication, self.id, checkpoint is not None)
        if self.args.report_to != "none":
            launch.start_trackers(self.accelerator, publication.name, self.args)

    def resume(self, checkpoint):
        state = checkpoints.load_checkpoint(checkpoint, self.learner.generators(), self.accelerator.process_index)
        self.load_state_dict(state)
        self.id, step = checkpoint.run, self.progress.step
        logger.info(f"Resumed from {checkpoint.path} at step {step}")
        if self.is_over and not self.args.finish_now:
            logger.warning(
                f"{checkpoint.path} is at step {step} of --max_train_steps {self.args.max_train_steps}: nothing is"
                " left to train; its results are written again. Give more steps to go on."
            )


class Clock:
    """The time of training, which a run has over all its parts.

    Args:
        progress: `Progress`.
    """

    def __init__(self, progress):
        self.progress, self.step, self.seconds = progress, progress.step, progress.seconds
        self.started = time.perf_counter()

    @property
    def steps_per_second(self):
        """Of this part of the run."""
        return (self.progress.step - self.step) / (time.perf_counter() - self.started)

    def read(self):
        """Puts the time so far into the progress."""
        self.progress.seconds = self.seconds + time.perf_counter() - self.started


# =====================================================================================================
# Around the loop
# =====================================================================================================


@contextlib.contextmanager
def tracking(accelerator):
    """For what goes to trackers: one that fails, in whatever way, is left out from then on, with one warning."""
    try:
        yield
    except Exception as error:
        logger.warning(f"The tracker failed ({reason(error)}); training goes on without it.")
        accelerator.trackers.clear()


def log(accelerator, values, step):
    """Gives numbers by name to the trackers."""
    with tracking(accelerator):
        accelerator.log(values, step=step)


def end(accelerator):
    """Ends the trackers and the group of processes."""
    with tracking(accelerator):
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.trackers.clear()
    accelerator.end_training()


def progress_bar(accelerator, step, steps):
    """A bar over all steps, shown once on each machine."""
    return tqdm(total=steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)


@contextlib.contextmanager
def stop_requests(run):
    """Lets `SIGNALS` end a training loop cleanly, after the step and with a checkpoint; a later second one at once.

    Yields:
        Function of whether this step reads out what the device has: whether the loop is to write a checkpoint and
        raise `KeyboardInterrupt`. Several processes, which are asked at different steps, agree when they read out.

    Raises:
        Stopped: the loop was left for such a request; the sentence says what is safe.
    """
    requested, several = [], run.accelerator.num_processes > 1

    def request(number, frame):
        leave_terminal(number)
        requested.append(time.monotonic())
        if requested[-1] - requested[0] > REPEATED_SECONDS:
            raise KeyboardInterrupt

    def stop_requested(reads_out):
        if not (several and reads_out):
            return bool(requested) and not several
        asked = torch.tensor(float(bool(requested)), device=run.accelerator.device)
        return run.accelerator.reduce(asked).item() > 0

    with handled(request):
        try:
            yield stop_requested
        except KeyboardInterrupt:
            raise run.stopped() from None
    if requested:  # after the last step
        raise KeyboardInterrupt


# A launcher passes on the Ctrl+C that its processes have had already: within this time it is the same request.
REPEATED_SECONDS = 2


@contextlib.contextmanager
def stoppable(run):
    """Around training and all that follows: `SIGNALS` end it with what is learned in a checkpoint, and say so.

    Raises:
        Stopped: with that sentence.
    """
    try:
        with uncovered():
            yield
    except Stopped:
        raise
    except KeyboardInterrupt:
        with handled(lambda number, frame: leave_terminal(number)):
            if run.is_over and run.accelerator.num_processes == 1:
                run.save_checkpoint()
            raise run.stopped() from None


def log_components(components):
    """Says how large the parts of the model (name -> `StoredModel`) are."""
    for name, facts in components.items():
        stays = "leaves after encoding" if name == "vae" else f"{facts.quantized_share:.1%} of parameters quantized"
        logger.info(f"{name}: {facts.bytes / 1e6:.1f} MB, {stays}")
