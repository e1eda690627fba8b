"""Around the training loop of every trainer: its progress, its log, requests to stop, its end."""

import contextlib
import signal
import threading
from dataclasses import dataclass, field

from accelerate.logging import get_logger
from tqdm.auto import tqdm

from ..errors import reason


logger = get_logger(__name__)


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
def stop_requests(accelerator):
    """Lets Ctrl+C or SIGTERM end a training loop cleanly, after the step and with a checkpoint; a second one at once.

    In a launch of several processes, which would stop at different steps, and outside the main thread, signals keep
    what they do.

    Yields:
        Function without arguments: whether the loop is to write a checkpoint and raise `KeyboardInterrupt`.
    """
    requested = []

    def request(number, frame):
        requested.append(number)
        for name, before in handlers.items():
            signal.signal(name, before)

    alone = accelerator.num_processes == 1 and threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if alone else ()
    handlers = {number: signal.signal(number, request) for number in signals}
    try:
        yield lambda: bool(requested)
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)


def log_components(components):
    """Says how large the parts of the model (name -> `StoredModel`) are."""
    for name, facts in components.items():
        stays = "leaves after encoding" if name == "vae" else f"{facts.quantized_share:.1%} of parameters quantized"
        logger.info(f"{name}: {facts.bytes / 1e6:.1f} MB, {stays}")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0  # of training, over all its parts
    best_loss: float = float("inf")  # least held-out loss, and the step that had it
    best_step: int | None = None
    validations_without_gain: int = 0
    forward_passes: int = 0  # of one example and candidate, over all processes


@dataclass
class History:
    """Losses by step, as lists of (step, loss)."""

    loss: list = field(default_factory=list)
    validation_loss: list = field(default_factory=list)
    bp_share: list = field(default_factory=list)  # of updates by backpropagation, where there are others, too
