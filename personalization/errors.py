"""The errors that end a script with one sentence and an exit code of their own."""

import os
import sys
from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot work; the message is one sentence that names it and how to fix it."""

    exit_code = 2


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
