"""Runs of the web page: each a script in a process of its own, found again from what it has written to its folder.

Nothing of a run is in the server's memory. `run.json` in its folder says how it was started and as which process, and
everything else is what the script itself writes, so that a run is found again after a reload, by another visitor, and
after a restart of the server, which it outlives.
"""

import contextlib
import json
import math
import re
import shutil
import statistics
import tempfile
import threading
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import filelock
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from ..errors import InputError, quoted, shorten
from ..files import atomic_path, read_json, write_json
from ..runs.checkpoints import list_checkpoints
from ..runs.run_folder import own_files, regular_files
from . import captioner, run_logs
from .checks import check_form
from .command_lines import (
    METHODS,
    Form,
    flag_of,
    flag_words,
    is_demo,
    launcher,
    offered_methods,
    training_command,
    with_flags,
)
from .drawing import Painter
from .processes import ask_to_stop, environment, new_mark, processes_of, spawn
from .run_logs import DRAWER
from .workspace import is_name, is_text, safe_name, saying_why


LONGEST_RECORD = 2**20  # bytes
LOCK = ".lock"  # in the folder of a trial


# =====================================================================================================
# Runs
# =====================================================================================================

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
READY, WAITING = "not started", "waiting"


def is_number(value):
    """Whether a value of a record is a time or a count."""
    return type(value) in (int, float) and 0 <= value < 2**53 and math.isfinite(value)


def is_setting(value):
    """Whether a value of a record is one of a form's."""
    return value is None or isinstance(value, (bool, str)) or (type(value) in (int, float) and abs(value) < 2**53)


def read_record(path):
    """The content of a `run.json`, complete; it may be damaged, of an earlier version, or by another program.

    Raises:
        ValueError: it is no record of a run.
        OSError: it cannot be read.
    """
    if not path.is_file() or path.stat().st_size > LONGEST_RECORD:
        raise ValueError("it is no file, or too long")
    content = read_json(path)
    if not is_text(json.dumps(content, ensure_ascii=False), LONGEST_RECORD) or "\\u0000" in json.dumps(content):
        raise ValueError("it has half characters or zero bytes in it")
    empty = {"created": 0, "launched": 0, "stopping": False, "process": None, "log_start": 0, "before": None}
    empty |= {"queued": 0, "finishing": False}
    record = {**empty, **content}
    form, command = record.get("form"), record.get("command")
    good = isinstance(form, dict) and isinstance(form.get("flags", {}), dict)
    good = good and set(form) <= set(Form.__dataclass_fields__) and form.get("method") in list(METHODS)
    good = good and all(isinstance(value, str) for name, value in form.items() if name != "flags")
    good = good and all(map(is_setting, form.get("flags", {}).values()))
    good = good and isinstance(command, list) and all(isinstance(word, str) for word in command)
    good = good and command[:1] in (["accelerate"], ["python"]) and METHODS[form["method"]].script in command
    good = good and all(is_number(record[name]) for name in ("created", "launched", "log_start", "queued"))
    if not good or set(form) | {"flags", "others"} != set(Form.__dataclass_fields__):
        raise ValueError("it is no record of a run")
    return record


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
        """What `read_record` returns; {} where it cannot be read."""
        try:
            return read_record(self.folder / "run.json")
        except (OSError, ValueError, RecursionError):
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
        """How many it is to have in all; 0 where the command line does not say."""
        steps = str(flag_of(self.record.get("command", []), "max_train_steps", 0))
        return int(steps) if re.fullmatch(r"[0-9]{1,9}", steps) else 0

    def is_readable(self):
        """Whether its name can be shown, and `run.json` is a record of a run."""
        return is_name(self.name) and bool(self.record)

    def is_alive(self):
        return bool(processes_of(self.record.get("process")))

    def written(self):
        """What tells the files of the result from those of another launch; None as long as one is missing."""
        found = []
        for name in (self.method.config_name, self.method.result_name):
            with contextlib.suppress(OSError):
                facts = (self.output / name).stat()
                found.append([facts.st_ino, facts.st_mtime_ns, facts.st_size])
        return found if len(found) == 2 else None

    def has_result(self):
        """Whether the last launch has written its result and everything beside it."""
        written = self.written()
        return written is not None and written != self.record["before"]

    def outcome(self):
        """State (one of the above), and the sentence that says why it broke off."""
        record = self.record
        if processes_of(record.get("process")):
            return RUNNING, ""
        if record.get("queued"):
            return WAITING, ""
        if not record.get("process"):
            return READY, ""
        if self.has_result():
            return FINISHED, ""
        text = self.log_tail(60, start=record["log_start"])
        if errors := run_logs.errors(text):
            return FAILED, errors[-1]
        if record.get("stopping"):
            return STOPPED, ""
        if last := [line for line in text.splitlines() if re.match(r"\w+(\.\w+)*(Error|Exception)\b", line)]:
            return FAILED, shorten(last[-1], 300)
        return FAILED, "The process ended without a word: it was killed, perhaps because memory was short."

    def can_resume(self):
        return bool(list_checkpoints(self.output))

    def log_tail(self, lines=200, start=0):
        """See `run_logs.tail`."""
        return run_logs.tail(self.log, lines, start)

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
                if after and is_text(record.get("prompt")):
                    result.append((record, before, after))
        return result

    def result_files(self):
        """The files that were learned, by what programs read them: paths."""
        config = self.read_config() or {}
        recorded = config.get("files")
        first, others = self.method.result_name, filter(is_below, recorded) if isinstance(recorded, dict) else []
        names = [first, *sorted({*others} - {first})]
        found = set(regular_files(self.output, names))
        return [self.output / name for name in names if name in found and name.endswith((".safetensors", ".pt"))]

    def read_config(self):
        """What the script wrote of its result; None where it cannot be read."""
        try:
            config = read_json(self.output / self.method.config_name)
        except (OSError, ValueError):
            return None
        return config if isinstance(config, dict) else None

    def package(self):
        """A ZIP of the result for download: what the run recorded as its own, config, card; None without one."""
        if self.is_alive() or not self.has_result():  # the card is what it writes last
            return None
        config = self.read_config()
        if config is None:
            return None
        recorded = config.get("files")
        recorded = recorded if isinstance(recorded, dict) else {}
        names = regular_files(self.output, [self.method.config_name, "README.md"])
        path = self.folder / f"{self.name}.zip"
        newest = (self.output / self.method.config_name).stat().st_mtime
        if not path.is_file() or path.stat().st_mtime < newest:
            with saying_why("The download could not be packed"), atomic_path(path) as temporary:
                with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                    names += own_files(self.output, filter(is_below, recorded), recorded)
                    for name in sorted(set(names)):
                        archive.write(self.output / name, f"{self.name}/{name}")
        return path


def is_below(name):
    """Whether a name that a file gives is of something in the folder of that file."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name


class RunBook:
    """All runs of a workspace.

    Args:
        workspace: `workspace.Workspace`.
        at_once: how many may train at the same time.
        own_login: whether visitors are the owner of this computer, whose login and models of the Hub are theirs.
    """

    def __init__(self, workspace, at_once=1, own_login=True):
        self.workspace, self.at_once, self.own_login = workspace, at_once, own_login
        self.folder, self._histories = workspace.root / "runs", Histories()
        self._starting = filelock.FileLock(workspace.root / ".starting", timeout=30)  # servers may share a workspace
        self._tokens = {}  # of runs in the queue, which no file has
        self.painter = Painter(workspace.root, self._spawn)

    def names(self):
        """Of all runs whose record can be read, the newest first."""
        runs = [Run(path.parent) for path in self.folder.glob("*/run.json")]
        created = {run.name: run.record["created"] for run in runs if run.is_readable()}
        return sorted(created, key=created.get, reverse=True)

    def open(self, name):
        """The `Run` of a name.

        Raises:
            InputError: there is none.
        """
        if not is_name(name) or not Run(self.folder / name).is_readable():
            raise InputError(f"There is no run {quoted(name)}: choose another.")
        return Run(self.folder / name)

    def history(self, run):
        return self._histories.read(run.output)

    def command(self, form, name=None):
        """The command line of a form, for a run of this name (None: the next one)."""
        form = checked(form, self.workspace)
        name = name or self._next_name(form.concept)
        pictures = self.workspace.root / "concepts" / (form.concept or "my-concept")
        return training_command(form, pictures, Run(self.folder / name).output, self.workspace.root / "cache")

    def start(self, form, token=None):
        """Starts a run, or puts it into the queue while others train; returns it.

        Raises:
            InputError: something is missing, or the disk fails.
        """
        form = checked(form, self.workspace)
        self.command(form)  # says what is missing
        check_form(form, self.workspace)
        with self._starting:
            name = self._next_name(form.concept)
            command = self.command(form, name)
            with saying_why("The run could not be made"):
                (self.folder / name).mkdir(parents=True)
            run = Run(self.folder / name)
            run.write(form=asdict(form), command=command, created=time.time())
            self._launch_in_turn(run, token)
        return run

    def resume(self, run, token=None, finish=False):
        """Starts the very command of a run again, which goes on from its newest checkpoint, in its turn.

        Args:
            run: that is not on.
            token: of the Hub.
            finish: train no further, and write the result of that checkpoint.
        """
        with self._starting:
            if run.is_alive():
                raise InputError(f"{run.name} is training already.")
            if finish and not run.can_resume():
                raise InputError(f"{run.name} has no checkpoint yet: resume it, and stop it later.")
            run.write(finishing=bool(finish))
            self._launch_in_turn(run, token)

    def stop(self, run):
        """Asks a run to end, with a checkpoint; one that waits leaves the queue."""
        with self._starting:
            run.write(queued=0)
            if run.is_alive():
                run.write(stopping=True)
                ask_to_stop(run.record["process"])

    def _launch_in_turn(self, run, token):
        """Launches a run, or lets it wait; `self._starting` is held."""
        if self._is_free() and not self.waiting():
            return self._launch(run, token)
        self._tokens[run.name] = token
        run.write(queued=time.time())

    def waiting(self):
        """Runs in the queue, the next one first."""
        runs = [Run(path.parent) for path in self.folder.glob("*/run.json")]
        queued = {run: run.record.get("queued") for run in runs if is_name(run.name)}
        return sorted(filter(queued.get, queued), key=queued.get)

    def advance(self):
        """Launches what waits as long as there is room; returns the runs."""
        launched = []
        if not self.waiting():
            return launched
        with self._starting:
            for run in self.waiting():
                if not self._is_free():
                    break
                self._launch(run, self._tokens.pop(run.name, None))
                launched.append(run)
        return launched

    def _launch(self, run, token):
        mark, start = new_mark(), run.log.stat().st_size if run.log.is_file() else 0
        facts = {"launched": time.time(), "stopping": False, "queued": 0, "log_start": start}
        run.write(**facts, before=run.written(), process={"mark": mark})
        self.painter.leave()  # its memory is the training's
        finish = {"finish_now": True} if run.record["finishing"] else {}
        _, process = self._spawn(with_flags(run.record["command"], **finish), run.log, mark, token)
        run.write(process=process, finishing=False)

    # Renamed and deleted ------------------------------------------------------------------------------

    def delete(self, run):
        """Deletes a run with all that is in its folder.

        Raises:
            InputError: it is training, or the disk fails.
        """
        with self._starting, saying_why(f"{run.name} could not be deleted"):
            self._check_at_rest(run)
            gone = Path(tempfile.mkdtemp(prefix=".trial-", dir=self.folder))
            run.folder.rename(gone / run.name)  # at once, and what is slow afterwards
        shutil.rmtree(gone, ignore_errors=True)

    def rename(self, run, name):
        """Gives a run another name, which its folders and its command line carry; returns the `Run`.

        Raises:
            InputError: it is training, the name is taken, or the disk fails.
        """
        new = safe_name(name, "")
        if not new:
            raise InputError("Give the run a new name first, such as my-dog-best.")
        with self._starting, saying_why(f"{run.name} could not be renamed"):
            if new == run.name:
                return run
            self._check_at_rest(run)
            if (self.folder / new).exists():
                raise InputError(f"There is a run {new} already: choose another name.")
            renamed = Run(self.folder / new)
            command = with_flags(run.record["command"], output_dir=renamed.output)
            run.folder.rename(renamed.folder)
            if (renamed.folder / run.name).is_dir():
                (renamed.folder / run.name).rename(renamed.output)
            (renamed.folder / f"{run.name}.zip").unlink(missing_ok=True)
            renamed.write(command=command)
        return renamed

    def runs_of(self, concept):
        """All runs of a concept, the newest first."""
        return [run for run in map(self.open, self.names()) if run.form.concept == concept]

    def rename_concept(self, concept, name):
        """Gives a concept another name, in the records of its runs, too; returns it as it is on the disk.

        Raises:
            InputError: a run of it is on, the name is taken, or the disk fails.
        """
        with self._starting:
            self._check_at_rest(*self.runs_of(concept))
            renamed = self.workspace.rename_concept(concept, name)
            for run in self.runs_of(concept):
                pictures = {run.method.pictures_flag: self.workspace.root / "concepts" / renamed}
                form = {**run.record["form"], "concept": renamed}
                run.write(form=form, command=with_flags(run.record["command"], **pictures))
        return renamed

    def delete_concept(self, concept):
        """Deletes the pictures of a concept; runs that are done keep what they have learned.

        Raises:
            InputError: a run of it is on, or the disk fails.
        """
        with self._starting:
            self._check_at_rest(*self.runs_of(concept))
            self.workspace.delete_concept(concept)

    def _check_at_rest(self, *runs):
        for run in runs:
            if run.outcome()[0] in (RUNNING, WAITING):
                raise InputError(f"{run.name} is {run.outcome()[0]}: stop it first.")

    def _spawn(self, command, log, mark, token=None):
        return spawn(command, log, mark, environment(token, None if self.own_login else self.workspace.hub))

    def _spawn_alone(self, kind, command, log):
        """Starts a process of which there is one at a time, whoever asks; `self._starting` is held.

        Args:
            kind: what it makes, as a noun.
            command, log: as for `spawn`.

        Raises:
            InputError: another is on the way.
        """
        path, mark = self.workspace.root / f".{kind}.json", new_mark()
        try:
            last = read_json(path)
        except (OSError, ValueError):  # there was none, or nobody can say
            last = None
        if processes_of(last):
            raise InputError(f"A {kind} is on the way: one at a time, so that memory is enough. Try again soon.")
        with saying_why(f"The {kind} could not be recorded"):
            write_json(path, {"mark": mark})
            process, record = self._spawn(command, log, mark)
            write_json(path, record)
        return process

    def alive(self):
        """Names of what trains now, trials among them."""
        return [path.parent.name for path in self.folder.glob("*/run.json") if Run(path.parent).is_alive()]

    def _is_free(self):
        return len(self.alive()) < self.at_once

    def _check_free(self):
        if not self._is_free():
            name = next(filter(is_name, self.alive()), "A trial")
            raise InputError(f"{name} is training: steps are timed when it is done, so that the times are true.")

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
        with self._scratch() as folder:
            with self._starting:
                process = self._spawn_alone("prediction", command, folder / "memory.txt")
            if process.wait():
                raise InputError(run_logs.refusal(folder / "memory.txt"))
            with saying_why("The prediction cannot be read"):
                return (folder / "memory.txt").read_text(encoding="utf-8", errors="replace").partition("Predicted")[2]

    def write_captions(self, concept, model, class_word):
        """Has the missing captions of a concept written by a model; returns how many.

        Args:
            concept: its name.
            model: folder of the model.
            class_word: what the concept is, in one plain word; "" where nobody has said.

        Raises:
            InputError: there is no such concept, the model cannot, or the disk fails.
        """
        folder = self.workspace.existing_concept(concept)
        rows, _ = self.workspace.review(concept, 1)
        names = [row.name for row in rows if row.thumbnail is not None and not row.caption]
        if not names:
            return 0
        with self._scratch() as scratch:
            with self._starting:
                command = captioner.command(model, [folder / name for name in names])
                process = self._spawn_alone("captioning", command, scratch / "captions.txt")
            if process.wait():
                raise InputError(run_logs.refusal(scratch / "captions.txt"))
            with saying_why("The captions cannot be read"):
                text = (scratch / "captions.txt").read_text(encoding="utf-8", errors="replace")
        found = captioner.read_captions(text)
        described = [(Path(path).name, captioner.with_concept(said, class_word)) for path, said in found.items()]
        self.workspace.save_captions(concept, described)
        return len(described)

    def time_steps(self, form):
        """Trains a few steps with the very settings, and measures them.

        Returns:
            `TimedSteps`.

        Raises:
            InputError: there is no room for it now, or the script refuses; the sentence is its own.
        """
        with self._scratch() as folder:
            run, mark, started = Run(folder), new_mark(), time.time()
            command = with_flags(self.command(form), **TRIAL, output_dir=run.output, resume_from_checkpoint=None)
            with self._starting:
                self._check_free()
                facts = {"form": asdict(form), "command": command, "launched": started}
                run.write(**facts, process={"mark": mark})
                process, _ = self._spawn(command, run.log, mark)
            if process.wait():
                raise InputError(run_logs.refusal(run.log))
            with saying_why("The trial cannot be read"):
                config = read_json(run.output / METHODS[form.method].config_name)
            return timed_steps(Histories().read(run.output), started, config["figures"]["peak_memory"])

    @contextlib.contextmanager
    def _scratch(self):
        """A folder for a trial; a lock of the operating system says that its server is alive."""
        with saying_why("The trial could not be made"):
            with self._starting:
                folder = Path(tempfile.mkdtemp(prefix=".trial-", dir=self.folder))
                lock = filelock.FileLock(folder / LOCK)
                lock.acquire()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()

    def remove_trials(self):
        """Deletes what trials of servers that were killed left behind."""
        with self._starting:
            for folder in self.folder.glob(".trial-*"):
                with contextlib.suppress(filelock.Timeout, OSError):
                    with filelock.FileLock(folder / LOCK, timeout=0):
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
            raise InputError("There is nothing to generate with yet: the run has written no result.")
        flags = {"pretrained_model_name_or_path": form.base, "class_word": form.class_word, "draw_only": True}
        flags |= {name: flag_of(run.record["command"], name) for name in ("revision", "variant")}
        flags |= {"results": f"learned={run.output}", "num_images_per_prompt": int(count)}
        flags |= {"num_inference_steps": int(steps), "guidance_scale": float(guidance)}
        flags |= {"batch_size": 1 if not is_demo(form.base) else 4}
        with self._starting, saying_why("The images could not be started"):
            numbers = [int(path.name) for path in run.folder.glob("drawings/[0-9]*") if path.name.isdecimal()]
            folder = run.folder / "drawings" / f"{max(numbers, default=0) + 1:04d}"
            folder.mkdir(parents=True)
            (folder / "prompts.txt").write_text(f"{prompt}\n", encoding="utf-8")
            write_json(folder / "drawing.json", {"prompt": prompt, "seed": seed, "subject": form.subject})
            command = ["python", DRAWER, *flag_words(flags), "--prompts", str(folder / "prompts.txt")]
            command += ["--output_dir", str(folder), "--seed", str(int(seed))]
            try:
                self.painter.ask(command, folder)
            except InputError:
                shutil.rmtree(folder)
                raise
        yield from self.painter.wait(command, folder)

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
        with self._scratch() as folder:
            log = folder / "push.txt"
            process, _ = self._spawn(command, log, new_mark(), str(token or "").strip() or None)
            if process.wait():
                raise InputError(run_logs.refusal(log))
            found = re.search(r"^Pushed to (\S+)", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
            return found[1] if found else repo_id


def push_command(run, repo_id, private):
    flags = {"push_only": True, "output_dir": run.output, "hub_model_id": repo_id, "hub_private_repo": bool(private)}
    return ["python", run.method.script, *flag_words(flags)]


def checked(form, workspace):
    """The form with its concept and its base as they are on the disk; a `Form` again."""
    if form.method not in offered_methods():
        raise InputError(f"{quoted(form.method)} is no method that is here: choose another.")
    changed = {"base": workspace.base_model(form.base), "concept": workspace.concept_name(form.concept)}
    return Form(**{**asdict(form), **changed})


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
                for value in event.summary.value if is_number(event.step) and is_number(event.wall_time) else ():
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
    held_out: float  # the validation loss once
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
