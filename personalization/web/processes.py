"""Processes of the page: started in sessions of their own, which outlive the server, and known again by a mark.

The mark is a random word in the environment of a process and of all that it starts. No number tells processes apart
for long: ids are given anew, clocks are set, machines start again.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading

import psutil

from .command_lines import REPO
from .workspace import saying_why


MARK = "PERSONALIZATION_PAGE_MARK"
SECRETS = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", re.IGNORECASE)
PLACES_OF_HUB = re.compile(r"^(HF|HUGGING_?FACE|TRANSFORMERS|DIFFUSERS)_\w*(HOME|CACHE|PATH)$")


def new_mark():
    return secrets.token_hex(16)


def environment(token=None, strangers_home=None):
    """The environment of a process that a visitor starts.

    Args:
        token: of the Hub; it is in the environment of this process and nowhere else.
        strangers_home: where the visitor is not the owner of this computer: the folder that models of the Hub are kept
            in, instead of the owner's, and nothing secret of the owner goes with it.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_") and name != MARK}
    if strangers_home is not None:
        found = {k: v for k, v in found.items() if not SECRETS.search(k) and not PLACES_OF_HUB.match(k)}
        found["HF_HOME"] = str(strangers_home)
    found |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return found | ({"HF_TOKEN": token} if token else {})


def spawn(command, log, mark, environment):
    """Starts a command with its output appended to a log.

    Args:
        command: words; the first is accelerate or python, of this environment.
        log: path.
        mark: of `new_mark`.
        environment: of `environment`.

    Returns:
        Its `subprocess.Popen`, and {"mark", "pid"} to find it again.

    Raises:
        InputError: the disk fails, or the system has no room for a process.
    """
    python = {"accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"], "python": [sys.executable]}
    with saying_why("The process could not be started"):
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [*python[command[0]], *command[1:]],
                cwd=REPO,
                env=environment | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    threading.Thread(target=process.wait, daemon=True).start()  # no zombie is left
    return process, {"mark": mark, "pid": process.pid}


def is_process(record):
    """Whether a value is what `spawn` returns; the id is None as long as it is not known."""
    if not isinstance(record, dict) or not re.fullmatch(r"[0-9a-f]{32}", str(record.get("mark"))):
        return False
    pid = record.get("pid")
    return pid is None or (type(pid) is int and pid > 1)


def processes_of(record):
    """The living processes with the mark of a record of `spawn`, that with its id first; [] where it is no record.

    The id is that of their session, too, and only tells where to look: without it, everywhere.
    """
    if not is_process(record):
        return []
    members, session = [], record.get("pid")
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if pid > 1 and (session is None or os.getsid(pid) == session):
                process = psutil.Process(pid)
                if process.environ().get(MARK) == record["mark"]:
                    members.append(process)
    return sorted(members, key=lambda process: process.pid != session)


def ask_to_stop(record):
    """Ends a session: its script writes a checkpoint first; a launcher without one yet ends at once.

    Not by Ctrl+C's signal: a page that a shell started in the background ignores it, and its runs with it.
    """
    processes = processes_of(record)
    scripts = [process for process in processes if is_script(process)]
    for process in scripts or processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)


def is_script(process):
    """Whether a process runs a script itself, and does not launch one."""
    with contextlib.suppress(psutil.Error):
        return any(word.endswith(".py") for word in process.cmdline()[1:3])
    return False
