"""The page under attack: its records on the disk, and its forms through HTTP."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import types

import gradio.queueing
import orjson
from attack import JSON, NUMBERS, WORDS, changed, changed_file, room
from conftest import REPO
from hypothesis import strategies as st
from page import Refused, Visitor, app, form, served
from pydantic import ValidationError
from pytest import MonkeyPatch
from torch.utils.tensorboard import SummaryWriter

from personalization.errors import InputError
from personalization.web import app_runs, processes
from personalization.web.workspace import Workspace


MARK = "0" * 32
BASE = str(REPO / "demo" / "base_eps")
SUBJECT = sorted((REPO / "demo" / "subjects").glob("*/metadata.jsonl"))[0].parent


# =====================================================================================================
# Records
# =====================================================================================================


@contextlib.contextmanager
def records(folder):
    """A workspace with a finished run that is attacked, and another that is not."""
    book = app_runs.RunBook(Workspace(folder / "workspace", [REPO / "demo"]))
    book.workspace.add_folder("my-toy", SUBJECT)
    for name in ("attacked-1", "good-1"):
        (book.folder / name).mkdir()
        write_run(book, name)
    deaf = ["sh", "-c", "trap '' INT TERM; while :; do sleep 60; done"]
    living = subprocess.Popen(deaf, start_new_session=True, env=os.environ | {processes.MARK: MARK})
    try:
        yield types.SimpleNamespace(book=book, page=app.Handlers(book), files=files_of(book), living=living.pid)
    finally:
        os.killpg(living.pid, signal.SIGKILL)
        living.wait()


def write_run(book, name):
    chosen = app.read_form(*form(BASE))
    run = app_runs.Run(book.folder / name)
    facts = {"form": vars(chosen) | {"flags": chosen.flags}, "command": book.command(chosen, name), "created": 5.0}
    run.write(**facts, launched=6.0, log_start=3, process={"mark": MARK, "pid": 2**22 - 1}, before=None)
    run.output.mkdir()
    (run.output / run.method.result_name).write_bytes(b"learned")
    (run.output / "README.md").write_text("---\nx: y\n---\n# A card\n")
    (run.output / run.method.config_name).write_text(
        json.dumps({"files": {run.method.result_name: "0"}, "figures": {}})
    )
    run.log.write_text("Steps: 1\rSteps: 2\n")
    drawing = run.folder / "drawings" / "0001"
    for column in ("plain-word", "learned"):
        (drawing / "images" / column).mkdir(parents=True)
        (drawing / "images" / column / "000-00.png").write_bytes((SUBJECT / "0.png").read_bytes())
    (drawing / "drawing.json").write_text(json.dumps({"prompt": "a {}", "seed": 0, "subject": "<x>"}))


def files_of(book):
    """The files of the run that is attacked, and their content: JSON, or bytes."""
    paths = [path for path in (book.folder / "attacked-1").rglob("*") if path.is_file() and path.suffix != ".png"]
    paths += [book.workspace.root / "concepts" / "my-toy" / "metadata.jsonl"]
    drawing = book.workspace.root / ".drawing.json"
    drawing.write_text(json.dumps({"mark": MARK, "pid": 77}))
    return {path: path.read_bytes() for path in [*paths, drawing]}


@room("record files", records, examples=60)
def attack_records(world, data):
    """One visitor's damaged record is left out; every visitor is shown all the rest."""
    for path, content in world.files.items():
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
    path = data.draw(st.sampled_from(sorted(world.files)))
    before = world.files[path]
    if path.suffix == ".json":
        path.write_bytes(changed_file(data.draw, json.loads(before)))
    elif data.draw(st.integers(0, 5)) == 0:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(data.draw(st.binary(max_size=300)) + before[: data.draw(st.integers(0, 40))])
    write_events(data.draw, world.book.folder / "attacked-1" / "attacked-1" / "logs" / "word")
    if data.draw(st.booleans()):  # it is running
        with contextlib.suppress(InputError):
            world.book.open("attacked-1").write(process={"mark": MARK, "pid": world.living})
    names = world.book.names()
    assert "good-1" in names
    for name in ["good-1", "attacked-1"]:
        shown = [
            world.page.load({"run": name, "concept": "my-toy"}),
            world.page.observe(name, {}),
            world.page.push_line(name, "a/b", True),
            world.page.command(app.TRAINING, name, *form(BASE)),
            world.page.choose_concept("my-toy"),
        ]
        sendable(shown)
    assert "Finished" in world.page.observe("good-1", {})[2]
    for step in (lambda: world.page.stop("attacked-1"), world.book._check_free, world.book.remove_trials):
        with contextlib.suppress(InputError):
            step()


def write_events(draw, folder):
    """Losses of a run, as TensorBoard's files have them, of any step and time."""
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for _ in range(draw(st.integers(0, 4))):
            step, at = (
                draw(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9)),
                draw(st.floats() | st.integers(0, 9)),
            )
            writer.add_scalar(draw(st.sampled_from(["loss", "validation_loss"])), draw(st.floats()), step, at)


def sendable(value):
    """Whether what a handler returned can be sent to a browser."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if not hasattr(v, "columns")}
        return [sendable(k) and sendable(v) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [sendable(each) for each in value]
    if not hasattr(value, "columns") and not hasattr(value, "save"):
        orjson.dumps(value)
    return True


# =====================================================================================================
# Forms
# =====================================================================================================


@contextlib.contextmanager
def forms(folder):
    """A server with a finished run, whose processes are judged and do nothing."""

    def spawn(command, log, mark, environment):
        judge_command(command)
        marked = environment | {processes.MARK: mark}
        process = subprocess.Popen(["true"], start_new_session=True, env=marked)
        process.wait()
        return process, {"mark": mark, "pid": process.pid}

    def raised():
        error = sys.exc_info()[1]
        not_of_a_page = isinstance(error, ValidationError) or "Could not preprocess input" in str(error)
        if not isinstance(error, app.gr.Error) and not not_of_a_page:
            faults.append(error)

    faults = []
    with MonkeyPatch.context() as patch, served(folder / "workspace", "--host", "0.0.0.0") as page:
        patch.setattr(app_runs, "spawn", spawn)
        patch.setattr(gradio.queueing.traceback, "print_exc", raised)
        book = app_runs.RunBook(Workspace(folder / "workspace", [REPO / "demo"]))
        book.workspace.add_folder("my-toy", SUBJECT)
        (book.folder / "good-1").mkdir()
        write_run(book, "good-1")
        yield types.SimpleNamespace(book=book, page=page, faults=faults)


def judge_command(command):
    """Whether a command line can be run as it is meant, and names nothing outside."""
    assert all(isinstance(word, str) and "\0" not in word and len(word) < 2**17 for word in command)
    assert sum(len(word.encode()) for word in command) < 2**20
    assert command[0] in ("python", "accelerate")
    assert shlex.split(shlex.join(command)) == command


def value_of(draw, component, good):
    """A value for a component of the page: one like that which belongs there, or anything."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return good
    if kind == 1:
        return draw(JSON)
    if component["type"] in ("number", "slider"):
        return draw(NUMBERS)
    if isinstance(good, (dict, list)) and good:
        return changed(draw, good)
    return draw(WORDS)


LOOKS = BASE, "word", "--center_crop"
EVENTS = {  # what a component's own script sends beside the values
    "remove_picture": {"remove": "nothing.png"},
    "save_caption": {"picture": "0.png", "caption": "a {}"},
}

GOOD = {
    "command": lambda: [2, "good-1", *form(BASE)],
    "predict": lambda: form(BASE),
    "start": lambda: ["", *form(BASE)],
    "observe": lambda: ["good-1", None],
    "stop": lambda: ["good-1"],
    "resume": lambda: ["good-1", ""],
    "draw": lambda: ["good-1", "a {}", 1, 0, 2, 4.0],
    "push_line": lambda: ["good-1", "a/b", True],
    "push": lambda: ["good-1", "a/b", True, "hf_x"],
    "choose_concept": lambda: ["my-toy"],
    "pictures": lambda: ["my-toy", *LOOKS],
    "copy_folder": lambda: [str(SUBJECT), "my-toy", "star", *LOOKS],
    "upload": lambda: [[], "my-toy", *LOOKS],
    "remove_picture": lambda: ["my-toy", *LOOKS],
    "save_caption": lambda: ["my-toy"],
    "rename_concept": lambda: ["other", "new"],
    "delete_concept": lambda: ["other"],
    "rename_run": lambda: ["other-1", "new"],
    "delete_run": lambda: ["other-1"],
    "finish": lambda: ["good-1"],
    "default_values": lambda: ["word", BASE],
    "load": lambda: [{"run": "good-1", "concept": "my-toy"}],
}


@room("forms", forms, examples=40)
def attack_forms(world, data):
    """Whatever is sent, the answer is a sentence, and the page is there for the next visitor."""
    visitor, name = Visitor(world.page), data.draw(st.sampled_from(sorted(GOOD)))
    components = {each["id"]: each for each in world.page.config["components"]}
    function, good = visitor.functions[name], GOOD[name]()
    inputs = [components[number] for number in function["inputs"]]
    assert len(inputs) == len(good), f"{name} takes {[each['props'].get('label') for each in inputs]}"
    hit = data.draw(st.sets(st.integers(0, len(good) - 1), min_size=1, max_size=2))
    values = [value_of(data.draw, c, v) if i in hit else v for i, (c, v) in enumerate(zip(inputs, good))]
    world.faults.clear()
    try:
        event = EVENTS.get(name) and value_of(data.draw, {"type": "html"}, EVENTS[name])
        visitor.do(name, *values, event=event)
    except Refused as refusal:
        assert is_said(str(refusal)), refusal
    assert not world.faults, f"{name}: {world.faults}"
    other = Visitor(world.page)
    assert "good-1" in str(other.do("load", {})), "the page is there for the next visitor"
    other.do("observe", "good-1", None)
    assert not world.faults, f"after {name}: {world.faults}"
    for extra in ("concepts", "runs"):
        for path in (world.book.workspace.root / extra).iterdir():
            assert path.name.isprintable() and len(path.name.encode()) < 256


def is_said(text):
    return 0 < len(text) < 3000 and "Traceback" not in text
