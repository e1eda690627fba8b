"""Answers `--help` of a script at once, from the generated description of its flags; imported for this effect alone.

The libraries of a trainer take seconds to import, and its parser stands below them. `flags.json` says the same, which
tests/test_flags.py sees to.
"""

import sys
from pathlib import Path

from . import flags


def answer(main, words):
    """Prints the help and ends the process where that is what a script of this repository was started for."""
    path = Path(getattr(main, "__file__", None) or "").resolve()
    if path.parent == Path(__file__).resolve().parents[1] and {"-h", "--help"} & {*words}:
        if path.name in flags.descriptions():
            flags.described_parser(path.name).print_help()
            sys.exit()


answer(sys.modules["__main__"], sys.argv[1:])
