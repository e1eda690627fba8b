"""Runs of the web page: each a script in a process of its own, found again from what it has written to its folder.

Nothing of a run is in the server's memory. `run.json` in its folder says how it was started and as which process, and
everything else is what the script itself writes, so that a run is found again after a reload, by another visitor, and
after a restart of the server, which it outlives.
"""

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import filelock
import psutil
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from ..errors import InputError, quoted, shorten
from ..files import atomic_path, read_json, write_json
from ..runs.checkpoints import list_checkpoints
from ..runs.run_folder import regular_files
from .command_lines import (
    METHODS,
    REPO,
    Form,
    flag_of,
    flag_words,
    is_demo,
    launcher,
    offered_methods,
    training_command,
    with_flags,
)
from .workspace import safe_name, saying_why


DRAWER = "evaluate_personalization.py"


# =====================================================================================================
# Processes
# =====================================================================================================

START_TOLERANCE = 2.0  # seconds by which the system's time of a start may differ between two looks
PROCESS_KEYS = {"pid", "started"}


def spawn(command, log, token=None):
    """Starts a command in a session of its own, which outlives the server, with its output appended to a log.

    Args:
        command: words; the first is accelerate or python, of this environment.
        log: path.
        token: of the Hub; it is in the environment of this process and nowhere else.

    Returns:
        Its `subprocess.Popen`, and {"pid", "started"} to find it again.

    Raises:
        InputError: the disk fails, or the system has no room for a process.
    """
    python = {"accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"], "python": [sys.executable]}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
    environment |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if token:
        environment |= {"HF_TOKEN": token}
    with saying_why("The process could not be started"):
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [*python[command[0]], *command[1:]],
                cwd=REPO,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    threading.Thread(target=process.wait, daemon=True).start()  # no zombie is left
    try:
        started = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        started = time.time()
    return process, {"pid": process.pid, "started": started}


def processes_of(record):
    """The living processes of a session that `spawn` started.

    The process with this id may be another by now: then it has another start. The id is not given away while one of
    the session is alive, so those that are left when the first has died are of this session, too.

    Args:
        record: {"pid", "started"}, or None.

    Returns:
        list of `psutil.Process`, the first of the session first if it is alive.
    """
    if not record or not PROCESS_KEYS <= record.keys():
        return []
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(pid) == record["pid"] and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                members.append(psutil.Process(pid))
    with contextlib.suppress(psutil.Error):
        leader = [process for process in members if process.pid == record["pid"]]
        if leader and abs(leader[0].create_time() - record["started"]) > START_TOLERANCE:
            return []
        return leader + [p for p in members if p not in leader and p.create_time() >= record["started"] - 1]
    return []


def ask_to_stop(record):
    """Ends a session: its script gets Ctrl+C, which writes a checkpoint; a launcher without one yet ends at once."""
    launcher, *others = processes_of(record) or [None]
    if launcher is None:
        return
    scripts = others or [launcher]
    for process in scripts:
        with contextlib.suppress(psutil.Error):
            if any(word.endswith(".py") for word in process.cmdline()):
                process.send_signal(signal.SIGINT)
            elif not others:
                process.terminate()


# =====================================================================================================
# Runs
# =====================================================================================================

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "broke off"
READY = "not started"
ERROR_LINE = r"^\S+\.py: error[^:\n]*: (.+)$"  # how the scripts end


class Run:
    """A run in its folder.

    Args:
        folder: with `run.json`.
    """

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        self.output, self.log = self.folder / self.name, self.folder / "log.txt"  # the result carries the run's name

    @property
    def record(self):
        """{"form", "command", "created", "launched", "process", "stopping"}; {} where it cannot be read."""
        try:
            return read_json(self.folder / "run.json")
        except (OSError, ValueError):
            return {}

    def write(self, **changed):
        with saying_why(f"The run {self.name} could not be written"):
            write_json(self.folder / "run.json", {**self.record, **changed})

    @property
    def form(self):
        return Form(**self.record["form"])

    @property
    def method(self):
        return METHODS[self.record["form"]["method"]]

    @property
    def steps(self):
        """How many it is to have in all."""
        return int(flag_of(self.record.get("command", []), "max_train_steps", 0))

    def is_readable(self):
        """Whether `run.json` is whole, and of a method that is known."""
        with contextlib.suppress(KeyError, TypeError):
            return self.form.method in METHODS
        return False

    def is_alive(self):
        return bool(processes_of(self.record.get("process")))

    def has_result(self):
        """Whether the last launch has written its result and everything beside it."""
        paths = self.output / self.method.config_name, self.output / self.method.result_name
        with contextlib.suppress(OSError):
            return all(path.stat().st_mtime >= self.record.get("launched", 0) - 1 for path in paths)
        return False

    def outcome(self):
        """State (one of the above), and the sentence that says why it broke off."""
        record = self.record
        if processes_of(record.get("process")):
            return RUNNING, ""
        if not record.get("process"):
            return READY, ""
        if self.has_result():
            return FINISHED, ""
        text = self.log_tail(60)
        if errors := re.findall(ERROR_LINE, text, re.MULTILINE):
            return FAILED, errors[-1]
        if record.get("stopping"):
            return STOPPED, ""
        if last := [line for line in text.splitlines() if re.match(r"\w+(\.\w+)*(Error|Exception)\b", line)]:
            return FAILED, shorten(last[-1], 300)
        return FAILED, "The process ended without a word: it was killed, perhaps because memory was short."

    def can_resume(self):
        return bool(list_checkpoints(self.output))

    def log_tail(self, lines=200):
        """The end of the log, as a terminal would show it: of a progress bar only its last state."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 200_000))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        kept = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
        return "\n".join(kept[-lines:]).strip()

    def grids(self):
        """Validation images as (path, step), the oldest first."""
        found = [(path, re.search(r"step-(\d+)", path.name)) for path in self.output.glob("validation/step-*.png")]
        return sorted((path, int(match[1])) for path, match in found if match)

    def drawings(self):
        """What was drawn with the result, the newest first: (record of the drawing, before, after), lists of paths."""
        result = []
        for folder in sorted(self.folder.glob("drawings/*"), reverse=True):
            with contextlib.suppress(OSError, ValueError):
                record = read_json(folder / "drawing.json")
                before, after = (sorted(folder.glob(f"images/{name}/*.png")) for name in ("plain-word", "learned"))
                if after:
                    result.append((record, before, after))
        return result

    def package(self):
        """A ZIP of the result for download: what the run recorded as its own, config, card; None without one."""
        if self.is_alive() or not self.has_result():  # the card is what it writes last
            return None
        try:
            config = read_json(self.output / self.method.config_name)
        except (OSError, ValueError):
            return None
        names = [*config.get("files", {}), self.method.config_name, "README.md"]
        path = self.folder / f"{self.name}.zip"
        newest = (self.output / self.method.config_name).stat().st_mtime
        if not path.is_file() or path.stat().st_mtime < newest:
            with saying_why("The download could not be packed"), atomic_path(path) as temporary:
                with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                    for name in regular_files(self.output, names):
                        archive.write(self.output / name, f"{self.name}/{name}")
        return path


class RunBook:
    """All runs of a workspace.

    Args:
        workspace: `workspace.Workspace`.
        at_once: how many may train at the same time.
        own_login: whether a visitor without a token may push with the login of this computer.
    """

    def __init__(self, workspace, at_once=1, own_login=True):
        self.workspace, self.at_once, self.own_login = workspace, at_once, own_login
        self.folder, self._histories = workspace.root / "runs", Histories()
        self._starting = filelock.FileLock(workspace.root / ".starting", timeout=30)  # servers may share a workspace
        self._drawing = workspace.root / ".drawing.json"

    def names(self):
        """Of all runs whose record can be read, the newest first."""
        runs = [Run(path.parent) for path in self.folder.glob("*/run.json")]
        runs = [run for run in runs if run.is_readable()]
        return [run.name for run in sorted(runs, key=lambda run: run.record.get("created", 0), reverse=True)]

    def open(self, name):
        """The `Run` of a name.

        Raises:
            InputError: there is none.
        """
        folder = self.folder / safe_name(name or "")
        if not name or not Run(folder).is_readable():
            raise InputError(f"There is no run {quoted(name)}: choose another.")
        return Run(folder)

    def history(self, run):
        return self._histories.read(run.output)

    def command(self, form, name=None):
        """The command line of a form, for a run of this name (None: the next one)."""
        form = checked(form, self.workspace)
        name = name or self._next_name(form.concept)
        pictures = self.workspace.root / "concepts" / safe_name(form.concept or "my-concept")
        return training_command(form, pictures, Run(self.folder / name).output, self.workspace.root / "cache")

    def start(self, form, token=None):
        """Starts a run; returns it.

        Raises:
            InputError: something is missing, another is training, or the disk fails.
        """
        form = checked(form, self.workspace)
        rows, _ = self.workspace.review(form.concept, 1)
        if not any(row.thumbnail is not None for row in rows):
            raise InputError("There are no pictures yet: add some in step 1.")
        with self._starting:
            self._check_free()
            name = self._next_name(form.concept)
            command = self.command(form, name)
            with saying_why("The run could not be made"):
                (self.folder / name).mkdir(parents=True)
            run = Run(self.folder / name)
            run.write(form=asdict(form), command=command, created=time.time())
            self._launch(run, token)
        return run

    def resume(self, run, token=None):
        """Starts the very command of a run again, which goes on from its newest checkpoint."""
        with self._starting:
            if run.is_alive():
                raise InputError(f"{run.name} is training already.")
            self._check_free()
            self._launch(run, token)

    def stop(self, run):
        """Asks a run to end, with a checkpoint."""
        with self._starting:
            if run.is_alive():
                run.write(stopping=True)
                ask_to_stop(run.record["process"])

    def _launch(self, run, token):
        run.write(launched=time.time(), stopping=False)
        _, process = spawn(run.record["command"], run.log, token)
        run.write(process=process)

    def _check_free(self):
        alive = [path.parent.name for path in self.folder.glob("*/run.json") if Run(path.parent).is_alive()]
        if len(alive) >= self.at_once:
            raise InputError(
                f"{alive[0]} is training, and this server trains {self.at_once} at a time: wait until it ends, or stop"
                " it; it can go on later."
            )

    def _next_name(self, concept):
        stem = safe_name(concept or "my-concept")
        return next(f"{stem}-{n}" for n in range(1, 10**6) if not (self.folder / f"{stem}-{n}").exists())

    # Before the start ---------------------------------------------------------------------------------

    def predict_memory(self, form):
        """The table of the script's `--estimate_memory`, which loads nothing; None where a method has none.

        Raises:
            InputError: the script refuses the settings; the sentence is its own.
        """
        if "estimate_memory" not in METHODS[form.method].flags:
            return None
        command = ["python", *self.command(form)[len(launcher()) :], "--estimate_memory"]
        folder = self._scratch()
        try:
            process, _ = spawn(command, folder / "memory.txt")
            if process.wait():
                raise InputError(refusal(folder / "memory.txt"))
            return (folder / "memory.txt").read_text(encoding="utf-8").partition("Predicted")[2]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def time_steps(self, form):
        """Trains a few steps with the very settings, and measures them.

        Returns:
            `TimedSteps`.

        Raises:
            InputError: there is no room for it now, or the script refuses; the sentence is its own.
        """
        folder = self._scratch()
        run = Run(folder)
        command = with_flags(self.command(form), **TRIAL, output_dir=run.output, resume_from_checkpoint=None)
        with self._starting:
            self._check_free()
            started = time.time()
            process, record = spawn(command, run.log)
            run.write(form=asdict(form), command=command, process=record, launched=started)
        try:
            if process.wait():
                raise InputError(refusal(run.log))
            config = read_json(run.output / METHODS[form.method].config_name)
            return timed_steps(Histories().read(run.output), started, config["figures"]["peak_memory"])
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _scratch(self):
        folder = self.folder / f".trial-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
        with saying_why("The trial could not be made"):
            folder.mkdir(parents=True)
        return folder

    def remove_trials(self):
        """Deletes what trials of servers that were killed left behind."""
        for folder in self.folder.glob(".trial-*"):
            if not Run(folder).is_alive():
                shutil.rmtree(folder, ignore_errors=True)

    # After the end ------------------------------------------------------------------------------------

    def draw(self, run, prompt, count, seed, steps, guidance):
        """Draws a prompt for the plain word and with what was learned, from the same noise, in a process of its own.

        Args:
            run: with a result.
            prompt: {} (or the concept's name) where the subject stands.
            count, seed, steps, guidance: how many images, from which noise and how.

        Yields:
            The end of the process's log, about once a second.

        Raises:
            InputError: there is nothing to draw with, a drawing is on the way, or the script refuses.
        """
        form = run.form
        prompt = " ".join(str(prompt or "").split()).replace(form.subject, "{}")
        if "{}" not in prompt:
            raise InputError(f"Put {{}} or {form.subject} into the prompt, where the concept goes.")
        if not (run.output / run.method.result_name).is_file():
            raise InputError("There is nothing to draw with yet: the run has written no result.")
        with self._starting:
            with contextlib.suppress(OSError, ValueError):
                if processes_of(read_json(self._drawing)):
                    raise InputError(
                        "A drawing is on the way: one at a time, so that memory is enough. Try again soon."
                    )
            with saying_why("The drawing could not be started"):
                numbers = [int(path.name) for path in run.folder.glob("drawings/[0-9]*")]
                folder = run.folder / "drawings" / f"{max(numbers, default=0) + 1:04d}"
                folder.mkdir(parents=True)
                (folder / "prompts.txt").write_text(f"{prompt}\n", encoding="utf-8")
                write_json(folder / "drawing.json", {"prompt": prompt, "seed": seed, "subject": form.subject})
            flags = {"pretrained_model_name_or_path": form.base, "class_word": form.class_word, "draw_only": True}
            flags |= {"results": f"learned={run.output}", "prompts": folder / "prompts.txt", "output_dir": folder}
            flags |= {"num_images_per_prompt": int(count), "num_inference_steps": int(steps)}
            flags |= {"guidance_scale": float(guidance), "batch_size": 1 if not is_demo(form.base) else 4}
            command = ["python", DRAWER, *flag_words(flags), "--seed", str(int(seed))]
            process, record = spawn(command, folder / "log.txt")
            with saying_why("The drawing could not be recorded"):
                write_json(self._drawing, record)
        while process.poll() is None:
            yield Run(folder).log_tail(1)
            time.sleep(0.5)
        if process.returncode:
            raise InputError(refusal(folder / "log.txt"))

    def push(self, run, repo_id, private, token):
        """Publishes a finished run with its trainer's `--push_only`; returns the address of the commit.

        Raises:
            InputError: it was refused; the run is as it was.
        """
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id or ""):
            raise InputError(f"{quoted(repo_id)} is no name for a repository: give one such as user/my-dog.")
        if not self.own_login and not str(token or "").strip():
            raise InputError("Give a token of your own: this server does not push with its own login for visitors.")
        command = push_command(run, repo_id, private)
        log = run.folder / "push.txt"
        log.unlink(missing_ok=True)
        process, _ = spawn(command, log, str(token or "").strip() or None)
        if process.wait():
            raise InputError(refusal(log))
        found = re.search(r"^Pushed to (\S+)", log.read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else repo_id


def push_command(run, repo_id, private):
    flags = {"push_only": True, "output_dir": run.output, "hub_model_id": repo_id, "hub_private_repo": bool(private)}
    return ["python", run.method.script, *flag_words(flags)]


def checked(form, workspace):
    """The form with its base as the scripts take it; a `Form` again."""
    if form.method not in offered_methods():
        raise InputError(f"{quoted(form.method)} is no method that is here: choose another.")
    return Form(**{**asdict(form), "base": workspace.base_model(form.base)})


def refusal(log):
    """What a script said before it ended, as the sentence it ended with."""
    text = Path(log).read_text(encoding="utf-8", errors="replace") if Path(log).is_file() else ""
    if errors := re.findall(ERROR_LINE, text, re.MULTILINE):
        return errors[-1]
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return f"The process ended early: {shorten(lines[-1] if lines else 'it was killed', 300)}"


# =====================================================================================================
# What a run has written
# =====================================================================================================


class History(NamedTuple):
    """Losses of a run, as lists of (step, loss, time of the read-out in seconds since 1970)."""

    loss: list
    held_out: list

    def seconds_left(self, steps, launched):
        """How long a run still takes, from the speed of this launch; None as long as it is not known."""
        read = [(step, at) for step, _, at in self.loss if at >= launched]
        if len(read) < 2 or read[-1][0] <= read[0][0]:
            return None
        return (steps - read[-1][0]) * (read[-1][1] - read[0][1]) / (read[-1][0] - read[0][0])


class Histories:
    """Reads TensorBoard's files of runs as they grow."""

    def __init__(self):
        self._lock, self._files = threading.Lock(), {}

    def read(self, output):
        """The `History` of a run's folder. What a resumed run did anew takes the place of what it did before."""
        loss, held_out = [], []
        paths = sorted(Path(output).glob("logs/*/events.out.tfevents.*"), key=lambda path: path.name)
        with self._lock:
            for path in paths:
                for tag, step, value, at in self._events(path):
                    series = {"loss": loss, "validation_loss": held_out}.get(tag)
                    if series is None:
                        continue
                    while series and series[-1][0] >= step:
                        series.pop()
                    series.append((step, value, at))
        return History(loss, held_out)

    def _events(self, path):
        """(tag, step, value, time) of all numbers in a file so far; only what is new is read from the disk."""
        loader, events = self._files.setdefault(str(path), (EventFileLoader(str(path)), []))
        with contextlib.suppress(Exception):  # half a record, or no file any more
            for event in loader.Load():
                for value in event.summary.value:
                    if value.tensor.float_val:
                        events.append((value.tag, event.step, value.tensor.float_val[0], event.wall_time))
        return events


# A trial: so many steps, with a validation in the middle, which is a small one and counted as the real one.
TRIAL = {
    "max_train_steps": 6,
    "validation_steps": 3,
    "logging_steps": 1,
    "checkpointing_steps": 10**6,
    "num_validation_images": 1,
    "num_inference_steps": 2,
}


class TimedSteps(NamedTuple):
    """What a trial measured, seconds."""

    start: float  # until the first step, without its validation
    step: float
    held_out: float  # the held-out loss once
    drawing: float  # one image with `TRIAL`'s inference steps
    peak_mb: int  # of the process

    def total(self, flags):
        """Seconds that a run will take.

        Args:
            flags: name -> value, as in a `Form`.
        """
        steps, every = int(flags["max_train_steps"]), int(flags.get("validation_steps") or 500)
        times = len(range(0, steps, every)) + 1
        images = int(flags.get("num_validation_images") or 4) * int(flags.get("num_inference_steps") or 25)
        drawing = self.drawing * images / TRIAL["num_inference_steps"]
        return self.start + steps * self.step + times * (self.held_out + drawing)


def timed_steps(history, started, peak_memory):
    """The `TimedSteps` of a trial's `History`.

    Raises:
        InputError: it wrote too little.
    """
    if len(history.loss) < TRIAL["max_train_steps"]:
        raise InputError("The trial wrote no times: nothing can be said of how long a run takes.")
    at, middle = {step: when for step, _, when in history.loss}, TRIAL["validation_steps"]
    step = statistics.median(at[n + 1] - at[n] for n in range(1, len(at)) if n != middle)
    seen = {n: when for n, _, when in history.held_out}
    held_out = max(0.0, seen[middle] - at[middle]) if middle in seen else 0.0
    drawing = max(0.0, at[middle + 1] - at[middle] - held_out - step)
    start = max(0.0, at[1] - started - step - held_out - drawing)
    return TimedSteps(start, step, held_out, drawing, int(peak_memory["process_mb"]))
