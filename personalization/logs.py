"""The logger of every module: works before, without and beside an Accelerator, and only the first process speaks.

accelerate's own raises where there is no Accelerator, so that a warning ended whatever was not a training.
"""

import logging
import os


class FirstProcessLogger(logging.LoggerAdapter):
    """A logger that is silent in all processes of a launch but the first."""

    def isEnabledFor(self, level):
        return os.environ.get("RANK", "0") == "0" and super().isEnabledFor(level)


def get_logger(name):
    """The logger of a module."""
    return FirstProcessLogger(logging.getLogger(name), {})
