"""Logs of the scripts, read as they grow: why one ended, what it is doing, and how far its progress bar is."""

import re
from pathlib import Path
from typing import NamedTuple

from ..errors import shorten
from .command_lines import METHODS


DRAWER = "evaluate_personalization.py"
SCRIPTS = "|".join(re.escape(name) for name in (*(method.script for method in METHODS.values()), DRAWER))
ERROR_LINE = rf"(?:{SCRIPTS}): error[^:\n]*: (.+)$"  # how the scripts end, perhaps right behind a progress bar
MOST_READ = 200_000  # bytes of the end of a log


def tail(path, lines=200, start=0):
    """The end of a log, as a terminal would show it: of a progress bar only its last state, on its own line.

    Args:
        path: of the log.
        lines: so many at most.
        start: byte that the log begins at.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(int(start), path.stat().st_size - MOST_READ))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    text = re.sub(rf"(?<=[^\n])(?=(?:{SCRIPTS}): error)", "\n", text)
    kept = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join(kept[-lines:]).strip()


def errors(text):
    """The sentences that scripts ended with, in a log."""
    return re.findall(ERROR_LINE, text, re.MULTILINE)


def refusal(log):
    """What a script said before it ended, as the sentence it ended with."""
    text = Path(log).read_text(encoding="utf-8", errors="replace") if Path(log).is_file() else ""
    if found := errors(text):
        return found[-1]
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return f"The process ended early: {shorten(lines[-1] if lines else 'it was killed', 300)}"


class Doing(NamedTuple):
    """What a training is doing, by its log."""

    phase: str
    step: int = 0  # of the progress bar; 0 where there is none yet
    bar: str = ""  # what stands behind the step: times, speed, loss


BAR = re.compile(r"(\w[\w .-]*): +\d+%\|[^|]*\| *(\d+)/(\d+) \[([^\]]*)\]")
# What is written at the beginning of a phase, the later the further down.
PHASES = (
    ("", "Starting Python and its libraries"),
    ("Recipe ", "Reading the pictures and the base model"),
    ("Fetching ", "Downloading the base model"),
    ("Quantizing the ", "Quantizing the base model, once for all runs"),
    ("of parameters quantized", "The base model is loaded: encoding pictures and prompts"),
    ("Resumed from ", "Going on from a checkpoint"),
    ("Steps: ", "Drawing samples and judging the start"),
)


def doing(text):
    """What a training is doing, by the text of its log since it was launched: a `Doing`."""
    phase = next(words for mark, words in reversed(PHASES) if mark in text)
    bars = [match for match in BAR.finditer(text) if match[1] == "Steps"]
    if not bars:
        return Doing(phase)
    step, bar = int(bars[-1][2]), bars[-1][4]
    return Doing("Training" if step else phase, step, bar)
