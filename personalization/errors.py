"""The errors that end a script with one sentence and an exit code of their own."""

import os
import sys
from pathlib import Path


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


def first_cause(error, limit=200):
    """Why something of the outside world failed, by the first cause of an exception: one line of at most `limit`."""
    while error.__cause__ is not None:
        error = error.__cause__
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shorten(what, limit) or type(error).__name__


class PushError(InputError):
    """A finished run could not be uploaded; it is safe on disk, and the message has the command that pushes it."""

    exit_code = 3


def run_script(main, script):
    """Runs `main()` as a process: an `InputError` becomes one sentence and its exit code, Ctrl+C becomes 130.

    Args:
        main: called without arguments.
        script: path of the script, whose name stands before the sentence.
    """
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # one process of a launch says it
            print(f"{Path(script).name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Stopped; --resume_from_checkpoint latest goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
