"""Answers `--help` of a script, and requests to stop it, at once; imported for this effect alone.

The libraries of a trainer take seconds to import, and its parser stands below them. `flags.json` says the same, which
tests/test_flags.py sees to. A quarter of those seconds went into looking for garbage, of which imports make none: that
waits until `errors.run_script`.
"""

import contextlib
import gc
import os
import signal
import sys
from pathlib import Path

from . import flags


def answer(main, words):
    """Prints the help and ends the process where that is what a script of this repository was started for."""
    path = Path(getattr(main, "__file__", None) or "").resolve()
    if path.parent != Path(__file__).resolve().parents[1] or path.name not in flags.descriptions():
        return
    if {"-h", "--help"} & {*words}:
        flags.described_parser(path.name).print_help()
        sys.exit()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # until `errors.run_script` takes them
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), stop)
    gc.disable()


def stop(number, frame):
    with contextlib.suppress(OSError):  # of a terminal that was closed
        print("Stopped.", file=sys.stderr, flush=True)
    os._exit(130)


answer(sys.modules["__main__"], sys.argv[1:])
