"""The errors that end a script with one sentence and an exit code of their own, and what counts as one.

| exit code | when |
|---|---|
| 0 | all that was asked for is done |
| 1 | a run broke off or a result could not be written, for a reason outside the program (`RunError`) |
| 2 | the input cannot work (`InputError`); nothing was trained |
| 3 | the run is finished and safe, but not on the Hub (`PushError`) |
| 130 | Ctrl+C, SIGTERM or a closed terminal (`SIGNALS`) |

Anything else is a fault of the program, and shows its traceback.
"""

import contextlib
import gc
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError


class InputError(ValueError):
    """What the user gave cannot work; the message is one sentence that names it and how to fix it."""

    exit_code = 2


def shorten(text, limit=80):
    """`text` as a sentence echoes it: on one line, and at most `limit` characters of it."""
    text = " ".join(str(text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quoted(text, limit=80):
    """What a user gave, in quotes, with anything unprintable spelled out; at most `limit` characters of it."""
    text = str(text)
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def plain(name):
    """A file's name for a warning, with anything unprintable spelled out."""
    return quoted(name)[1:-1]


def first_cause(error, limit=200):
    """Why something of the outside world failed, by the first cause of an exception: one line of at most `limit`."""
    while error.__cause__ is not None:
        error = error.__cause__
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shorten(what, limit) or type(error).__name__


class PushError(InputError):
    """A finished run could not be uploaded; it is safe on disk, and the message has the command that pushes it."""

    exit_code = 3


class RunError(RuntimeError):
    """A run broke off, or part of its result could not be written; the message says what is safe, and where."""

    exit_code = 1


class DivergedError(RunError):
    """The loss is no longer finite; the last good embedding is saved."""


class Stopped(KeyboardInterrupt):
    """A signal asked a run to stop; the message is one sentence that says what is safe."""


HTTP_ERRORS = tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")  # of the Hub's client
DISTRIBUTED_ERRORS = (torch.distributed.DistError,) if torch.distributed.is_available() else ()
OUTSIDE_ERRORS = (OSError, MemoryError, torch.OutOfMemoryError, SafetensorError)
OUTSIDE_ERRORS += HTTP_ERRORS + DISTRIBUTED_ERRORS
# What PyTorch reports as a plain RuntimeError although it is the machine's.
OUTSIDE_MESSAGES = ("can't allocate memory", "out of memory", "PytorchStreamWriter", "inline_container", "by peer")
MEANINGS = {  # of sentences that say something else
    "could not create a primitive": "out of memory",  # oneDNN
    "could not create a memory": "out of memory",
    "Timed out waiting": "another process of this launch was silent for too long",  # Gloo
}
OUTSIDE_MESSAGES += tuple(MEANINGS)


def is_outside(error):
    """Whether an exception is a failure of disk, memory, network or files, and not of the program."""
    if isinstance(error, OUTSIDE_ERRORS):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OUTSIDE_MESSAGES)


def reason(error, limit=300):
    """What an exception says, on one line."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    else:
        text = str(error)
    text = " ".join(text.split()) or type(error).__name__
    meanings = [meaning for part, meaning in MEANINGS.items() if part in text]
    text = ": ".join([*meanings, text])
    return text if len(text) <= limit else text[:limit] + " ..."


# =====================================================================================================
# Requests to stop
# =====================================================================================================

# Ctrl+C, a system that shuts down, a terminal that was closed: all mean the same.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
TERMINALS = [number for number in (1, 2) if os.isatty(number)]  # of standard output and standard error


def leave_terminal(number):
    """Lets nobody write to a terminal that was closed, which would fail; `number` is that of the signal."""
    if number == getattr(signal, "SIGHUP", None):
        for terminal in TERMINALS:
            os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)


def interrupt(number, frame):
    leave_terminal(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def uncovered():
    """Lets a request to stop stay one, whatever was made of it where it came (Python's `__set_name__`, say)."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None


@contextlib.contextmanager
def handled(handler):
    """Gives `SIGNALS` a handler for a while, in the main thread; one that is ignored (nohup) stays so.

    Yields:
        Number -> the handler before.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def run_script(main, script):
    """Runs `main()` as a process: what is expected to go wrong becomes one sentence and its exit code.

    Args:
        main: called without arguments.
        script: path of the script, whose name stands before the sentence.
    """
    threading.excepthook = _quiet_thread
    gc.freeze()  # what is imported stays, and is not looked through again
    gc.enable()  # `quick_help` put it off
    with handled(interrupt) as before:
        _run(main, script, before)


def _run(main, script, handlers):
    try:
        with uncovered():
            main()
    except (InputError, RunError) as error:
        _say(script, error, error.exit_code, shared=isinstance(error, (InputError, DivergedError)))
    except KeyboardInterrupt as stopped:
        for number in handlers:  # it ends, and says so once
            signal.signal(number, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
            print(stopped if isinstance(stopped, Stopped) else "Stopped.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not is_outside(error):
            raise
        _say(script, f"{reason(error)} ({type(error).__name__}).", RunError.exit_code)


def _say(script, sentence, exit_code, shared=False):
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not shared:  # what all processes of a launch meet alike, the first one says
        process = "" if rank == "0" else f" (process {rank})"
        print(f"{Path(script).name}: error{process}: {sentence}", file=sys.stderr)
    sys.exit(exit_code)


def _quiet_thread(failure):
    """A library's own thread that fails (TensorBoard's writer on a full disk) tells whoever uses it next."""
    if failure.exc_type is not None and not is_outside(failure.exc_value):
        threading.__excepthook__(failure)
