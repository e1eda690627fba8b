"""The web page without a browser: its folder, command lines and runs as processes, and what goes wrong with them."""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import REPO
from hub_server import TOKEN, HubServer
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import train_tuneqdm_dreambooth as tuneqdm
import train_zoodip_textual_inversion as zoodip
from personalization.errors import InputError
from personalization.web import app_runs, app_words, processes, workspace
from personalization.web.app_runs import FAILED, FINISHED, RUNNING, STOPPED, Histories, RunBook, TimedSteps
from personalization.web.command_lines import METHODS, Form, default_flags, flag_of, launcher, read_others, shown
from personalization.web.workspace import Workspace, safe_file_name, safe_name


app = pytest.importorskip("app", reason="gradio is not installed")

PARSERS = {"word": zoodip.parse_args, "scales": tuneqdm.parse_args}
if METHODS["lora"].path.is_file():
    PARSERS["lora"] = importlib.import_module(METHODS["lora"].path.stem).parse_args


@pytest.fixture
def space(tmp_path):
    return Workspace(tmp_path / "workspace", [REPO / "demo"])


@pytest.fixture
def form(demo_base):
    flags = default_flags("word", demo_base) | {"max_train_steps": 3, "num_inference_steps": 1, "train_batch_size": 1}
    return Form("my-toy", demo_base, "word", "star", "<my-toy>", "a photo of a {}", flags)


@pytest.fixture
def book(space, subject):
    """Runs of a workspace with the pictures of a demo subject; whatever still runs at the end is killed."""
    space.add_folder("my-toy", subject)
    made = RunBook(space)
    yield made
    for path in made.folder.glob("*/run.json"):
        for process in app_runs.processes_of(app_runs.Run(path.parent).record.get("process")):
            with contextlib.suppress(psutil.Error):
                process.kill()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)
    return found


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# =====================================================================================================
# Paths
# =====================================================================================================


@pytest.mark.parametrize(
    "given, expected",
    [
        ("my dog!.JPG", "my-dog.JPG"),
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\a.png", "a.png"),
        (".hidden", "hidden"),
        ("", "unnamed"),
        ("..", "unnamed"),
        ("ein süßer Hund.png", "ein-süßer-Hund.png"),
        ("x" * 300 + ".png", "x" * 48 + ".png"),
        ("a\nb\0c.png", "a-b-c.png"),
    ],
)
def test_names_of_files_are_made_safe(given, expected):
    assert safe_file_name(given) == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ("my dog!", "my-dog"),
        ("v1.2-dog", "v1.2-dog"),
        ("a.very-long-suffix", "a.very-long-suffix"),
        ("x" * 300, "x" * 48),
        ("x" * 47 + " y", "x" * 47),
        ("../..", "unnamed"),
        ("a/b/", "b"),
        ("\ud800", "unnamed"),
        ("e\u0301", "é"),
    ],
)
def test_a_safe_name_is_its_own_safe_name(given, expected):
    assert safe_name(given) == expected == safe_name(expected)


@pytest.mark.parametrize("concept", ["v1.2-dog", "my.dog", "x" * 47, "x" * 300, "ein süßer Hund"])
def test_runs_of_any_concept_are_seen_stopped_and_resumed(space, subject, form, sleeping, concept):
    """Every run opens under the name that it is listed by, the tenth of `v1.2-dog`, too."""
    space.add_folder(concept, subject)
    book, form = RunBook(space, at_once=20), replace(form, concept=concept)
    names = [book.start(form).name for _ in range(11)]
    try:
        assert len(set(names)) == 11 and set(book.names()) == set(names)
        assert all(book.open(name).folder == book.folder / name for name in names)
        assert space.review(book.open(names[0]).form.concept, 64)[0], "its pictures are found again"
        book.stop(book.open(names[9]))
        wait_for(lambda: not book.open(names[9]).is_alive())
        assert book.open(names[0]).is_alive()
        book.resume(book.open(names[9]))
        assert book.open(names[9]).is_alive()
    finally:
        for name in names:
            book.stop(book.open(name))


@pytest.mark.parametrize("path", ["/etc", "../outside", "models/../../outside", "link/secret", "a\0b"])
def test_a_path_outside_is_refused_in_one_sentence(space, tmp_path, path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").mkdir()
    (space.root / "link").symlink_to(tmp_path / "outside")
    for refuse in (space.readable_path, lambda path: space.add_folder("my-toy", path), space.base_model):
        with pytest.raises(InputError) as refused:
            refuse(path)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    assert not list((space.root / "concepts").glob("*/*"))


def test_pictures_behind_a_link_and_sent_paths_are_refused(space, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "private.png")
    (space.root / "models" / "mine").mkdir()
    (space.root / "models" / "mine" / "a.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(InputError, match="outside the workspace"):
        space.add_folder("my-toy", "models/mine")
    with pytest.raises(InputError, match="outside the workspace"):
        space.add_pictures("my-toy", [tmp_path / "private.png"])
    assert Workspace(space.root, [tmp_path]).add_pictures("my-toy", [tmp_path / "private.png"]) == 1


def test_base_models(space, demo_base):
    assert (
        space.base_model("stable-diffusion-v1-5/stable-diffusion-v1-5")
        == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    assert space.base_model(demo_base) == demo_base
    for name, said in (("", "Choose a base"), ("models", "no model_index.json"), (str(REPO), "outside the workspace")):
        with pytest.raises(InputError, match=said):
            space.base_model(name)
    assert app.model_resolution(demo_base) == 64 and app.model_resolution("user/model") == 512


# =====================================================================================================
# Pictures and captions
# =====================================================================================================


def test_pictures_are_copied_once_and_with_their_captions(space, subject):
    count = len(list(subject.glob("*.png")))
    assert space.add_folder("My Toy", subject) == count and space.add_folder("My Toy", subject) == 0
    assert space.concepts() == ["My-Toy"]
    rows, notes = space.review("My-Toy", 64)
    wanted = [json.loads(line) for line in (subject / "metadata.jsonl").read_text().splitlines()]
    assert [(row.name, row.caption) for row in rows] == [(row["file_name"], row["text"]) for row in wanted]
    assert not notes and not any(row.problems for row in rows)

    (space.root / "uploads" / "other").mkdir()
    Image.new("RGB", (64, 64), "red").save(space.root / "uploads" / "other" / "0.png")
    assert space.add_pictures("My-Toy", [space.root / "uploads" / "other" / "0.png"]) == 1  # another with this name
    assert "0-2.png" in [row.name for row in space.review("My-Toy", 64)[0]]
    space.remove_picture("My-Toy", "0.png")
    assert "0.png" not in (space.root / "concepts" / "My-Toy" / "metadata.jsonl").read_text()


def test_what_is_wrong_with_pictures(space, subject):
    folder, good = space.concept_folder("my-toy"), Image.open(subject / "0.png")
    assert space.review("my-toy", 64) == ([], [])
    good.resize((512, 512)).save(folder / "a.png")
    assert "One picture only" in space.review("my-toy", 512)[1][0]
    good.resize((300, 300)).save(folder / "b.jpg", quality=70)
    (folder / "c.png").write_bytes(b"no picture")
    (folder / "d.heic").write_bytes(b"of a phone")
    problems = {row.name: "; ".join(row.problems) for row in space.review("my-toy", 512)[0]}
    assert problems["a.png"] == ""
    assert "only 300 x 300 pixels" in problems["b.jpg"] and "looks the same as a.png" in problems["b.jpg"]
    assert "cannot be read (it is empty" in problems["c.png"] and "save it as JPEG" in problems["d.heic"]


def test_captions_are_saved_whole_or_not_at_all(space, subject, monkeypatch):
    space.add_folder("my-toy", subject)
    path = space.root / "concepts" / "my-toy" / "metadata.jsonl"
    space.save_captions("my-toy", [("0.png", ' a {} "quoted"\nü '), ("1.png", None), ("../x.png", "gone")])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"file_name": "0.png", "text": 'a {} "quoted" ü'},
        {"file_name": "1.png", "text": ""},
    ]
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="disk is full, free some space"):
        patch.setattr(os, "replace", no_room)
        space.save_captions("my-toy", [("0.png", "lost")])
    assert path.read_bytes() == before
    with monkeypatch.context() as patch, pytest.raises(InputError, match="Not all pictures could be copied"):
        patch.setattr(workspace.shutil, "copyfile", no_room)
        space.add_folder("other", subject)
    assert not list((space.root / "concepts" / "other").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_really_full_disk_of_the_workspace(tmp_path, subject):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        space = Workspace(small, [REPO / "demo"])
        space.add_folder("my-toy", subject)
        written = (small / "concepts" / "my-toy" / "metadata.jsonl").read_text()
        with contextlib.suppress(OSError):
            (small / "filler").write_bytes(b"x" * 100_000)
        for attempt in (lambda: space.save_captions("my-toy", [("0.png", "a {} " * 3000)]), lambda: start(space)):
            with pytest.raises(InputError, match="No space left on device.*disk is full"):
                attempt()
        assert (small / "concepts" / "my-toy" / "metadata.jsonl").read_text() == written
    finally:
        subprocess.run(["umount", small], check=True)


def start(space):
    base = str(REPO / "demo" / "base")
    flags = default_flags("word", base)
    return RunBook(space).start(Form("my-toy", base, "word", "star", "<my-toy>", "a {}", flags))


# =====================================================================================================
# Command lines
# =====================================================================================================


@pytest.mark.parametrize("method", PARSERS)
@pytest.mark.parametrize("real", [False, True])
def test_the_scripts_read_the_command_line(book, form, method, real):
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5" if real else form.base
    others, *fields = app.default_values(method, base)
    chosen = app.read_form("my toy", base, method, "star", "", 'a "photo" of a {}', others, *fields)
    assert chosen.subject == ("<my-toy>" if method == "word" else "sks star" if real else "star")
    words = book.command(chosen)
    assert shlex.split(shown(words).replace("\\\n", "")) == [
        os.path.relpath(w, REPO) if w.startswith(str(REPO)) else w for w in words
    ]
    args = PARSERS[method](words[len(launcher()) + 1 :])
    assert args.validation_prompt == 'a "photo" of a {}' and args.resume_from_checkpoint == "latest"
    assert args.max_train_steps == default_flags(method, base)["max_train_steps"]
    assert Path(args.output_dir).is_relative_to(book.folder) and args.quantized_cache_dir == str(
        book.workspace.root / "cache"
    )
    assert app.form_values(chosen) == [base, method, "star", "", 'a "photo" of a {}', others, *fields]


@pytest.mark.parametrize("method", PARSERS)
def test_flags_that_may_be_added_name_no_file(method, book, form):
    offered = [name for name, flag in METHODS[method].flags.items() if flag["page"]]
    assert len(offered) > 30 and not [name for name in offered if re_path(name) and name != "caption_token"]
    defaults = METHODS[method].defaults | METHODS[method].demo | dict.fromkeys(app.FIELDS)
    assert defaults.keys() <= set(offered)
    flags = default_flags(method, form.base)
    command = book.command(replace(form, method=method, flags=flags))
    assert {f"--{name}" for name in METHODS[method].fields} <= set(command)
    assert read_others("--seed 3 --center_crop --learning_rate=-1", method) == {
        "seed": "3",
        "center_crop": True,
        "learning_rate": "-1",
    }


def re_path(name):
    return any(part in name for part in ("dir", "path", "dataset", "hub", "push", "token", "checkpoint_", "tokenizer"))


@pytest.mark.parametrize(
    "others", ["--output_dir /etc", "--hub_token hf_x", "--push_to_hub", "loose", "--seed 1 2", "'open", "--help"]
)
def test_other_flags_are_refused_in_one_sentence(others):
    with pytest.raises(InputError) as refused:
        read_others(others, "word")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "others, reason",
    [
        ("--num_vektors 2", "is no flag of train_zoodip_textual_inversion.py: did you mean --num_vectors?"),
        ("--bits 4", "is no flag of train_zoodip_textual_inversion.py."),
        ("--placeholder_token <x>", "has a field of its own on this page."),
        ("--pretrained_model_name_or_path /etc", "has a field of its own on this page."),
        ("--logging_dir /etc", "names a file on the server."),
        ("--report_to all", "is not offered to visitors of this page."),
        ("--hub_token x", "is not offered to visitors of this page."),
    ],
)
def test_a_refusal_says_why(others, reason):
    with pytest.raises(InputError) as refused:
        read_others(others, "word")
    assert str(refused.value).endswith(f"cannot be set here: it {reason}")
    assert read_others("--pool_at_eos", "word") == {"pool_at_eos": True}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"class_word": " "}, "one plain word"),
        ({"subject": " "}, "a name in prompts"),
        ({"prompt": "a dog"}, "does not say where the concept goes"),
        ({"base": "/etc"}, "outside the workspace"),
        ({"method": "magic"}, "is no method"),
    ],
)
def test_a_form_that_is_not_complete(book, form, change, said):
    with pytest.raises(InputError, match=said):
        book.command(replace(form, **change))
    assert (
        app.Handlers(book)
        .command(0, None, "my-toy", "/etc", "word", "x", "", "", "")
        .startswith("# '/etc' is outside")
    )


# =====================================================================================================
# What is read and predicted
# =====================================================================================================


def test_history_of_a_resumed_run(tmp_path):
    """Two files of TensorBoard, the second from a checkpoint before the end of the first; read as they grow."""
    histories = Histories()
    assert histories.read(tmp_path) == ([], [])
    writer = SummaryWriter(tmp_path / "logs" / "zoodip", filename_suffix=".first")
    for step in range(1, 6):
        writer.add_scalar("loss", step, step)
    writer.add_scalar("validation_loss", 0.5, 3)
    writer.flush()
    assert [row[:2] for row in histories.read(tmp_path).loss] == [(n, n) for n in range(1, 6)]
    writer.close()
    time.sleep(1.1)  # files are told apart by the second they were begun
    with SummaryWriter(tmp_path / "logs" / "zoodip") as writer:
        for step in range(4, 8):
            writer.add_scalar("loss", 10 * step, step)
    history = histories.read(tmp_path)
    assert [row[:2] for row in history.loss] == [(1, 1), (2, 2), (3, 3), *((n, 10 * n) for n in range(4, 8))]
    assert [row[:2] for row in history.held_out] == [(3, 0.5)]
    table = app.curve(history)
    assert len(table) == 8 and set(table["series"]) == set(app_words.SERIES)
    assert set(app.curve(history._replace(held_out=[]))["series"]) == set(app_words.SERIES)
    assert not len(app.curve(app_runs.History([], [])))


def test_time_left_and_time_in_all():
    history = app_runs.History([(10, 1.0, 100.0), (20, 1.0, 105.0), (30, 1.0, 110.0)], [])
    assert history.seconds_left(50, 0) == 10.0 and history.seconds_left(50, 108) is None
    # Steps take 2 s, the held-out loss in the middle 5 s, the drawing 3 s, the start 7 s.
    at, losses = 1000 + 7 + 5 + 3, []
    for step in range(1, 7):
        at += 2.0
        losses.append((step, 1.0, at))
        at += 8.0 if step == 3 else 0.0
    history = app_runs.History(losses, [(0, 1.0, 1012.0), (3, 1.0, losses[2][2] + 5.0)])
    timed = app_runs.timed_steps(history, 1000.0, {"process_mb": 600})
    assert timed == TimedSteps(7.0, 2.0, 5.0, 3.0, 600)
    # 100 steps, validated at 0, 50 and 100; a drawing is two images of 10 steps, the trial's one of 2.
    flags = {"max_train_steps": 100, "validation_steps": 50, "num_validation_images": 2, "num_inference_steps": 10}
    assert timed.total(flags) == 7 + 100 * 2 + 3 * (5 + 3 * 10)
    with pytest.raises(InputError, match="no times"):
        app_runs.timed_steps(app_runs.History([], []), 0, {"process_mb": 1})


@pytest.mark.parametrize(
    "seconds, words", [(3.4, "3 s"), (59.6, "1 min"), (83, "1 min 20 s"), (1500, "25 min"), (7800, "2 h 10 min")]
)
def test_durations(seconds, words):
    assert app_words.duration(seconds) == words


# =====================================================================================================
# Processes
# =====================================================================================================


def test_a_run_is_known_by_its_mark_and_by_no_number(tmp_path, monkeypatch):
    """What other processes have of it is an id, a session or a start; the clock may be set."""
    (tmp_path / "sleep.py").write_text("import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)")
    mark = app_runs.new_mark()
    process, record = app_runs.spawn(["python", str(tmp_path / "sleep.py")], tmp_path / "log", mark, dict(os.environ))
    try:
        assert len(wait_for(lambda: len(found := app_runs.processes_of(record)) == 2 and found)) == 2
        assert app_runs.processes_of(record)[0].pid == process.pid
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: 0.0)
        assert len(app_runs.processes_of(record)) == 2, "a clock that was set does not end a run"
        assert len(app_runs.processes_of({"mark": mark})) == 2, "the server was killed before it knew the id"
        assert app_runs.processes_of({**record, "mark": app_runs.new_mark()}) == []
        process.kill()
        process.wait()
        (child,) = app_runs.processes_of(record)  # what is left of the session is still the run
        child.kill()
        wait_for(lambda: not app_runs.processes_of(record))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("pid", [0, 1, -1, True, "1", 1.0, 10**30, None, "own"])
@pytest.mark.parametrize("mark", ["", None, 0, "x" * 32, "0" * 32])
def test_no_record_names_a_process_of_somebody_else(pid, mark, monkeypatch):
    monkeypatch.setattr(psutil.Process, "send_signal", lambda *_: pytest.fail("a signal was sent"))
    pid = os.getpid() if pid == "own" else pid  # no number in the test's name: workers collect the same tests
    record = {"pid": pid, "mark": mark, "started": 0.0}
    app_runs.ask_to_stop(record)
    assert app_runs.processes_of(record) == [] and app_runs.processes_of({"pid": pid, "started": 0.0}) == []
    assert app_runs.processes_of(None) == app_runs.processes_of({}) == app_runs.processes_of([]) == []


@pytest.fixture
def sleeping(monkeypatch):
    """Runs only sleep."""

    def sleep(command, log, mark, environment):
        marked = environment | {processes.MARK: mark}
        process = subprocess.Popen(["sleep", "60"], start_new_session=True, env=marked)
        started.append(process)
        threading.Thread(target=process.wait, daemon=True).start()
        return process, {"pid": process.pid, "mark": mark}

    started = []
    monkeypatch.setattr(app_runs, "spawn", sleep)
    yield
    for process in started:
        process.kill()


def test_two_visitors_start_at_the_same_time(book, form, sleeping):
    started, refused = [], []

    def visitor():
        try:
            started.append(book.start(form))
        except InputError as error:
            refused.append(str(error))

    visitors = [threading.Thread(target=visitor) for _ in range(4)]
    [thread.start() for thread in visitors]
    [thread.join() for thread in visitors]
    assert len(started) == 1 and len(refused) == 3 and all("my-toy-1 is training" in said for said in refused)
    assert book.names() == ["my-toy-1"] and started[0].outcome() == (RUNNING, "")
    with pytest.raises(InputError, match="is training already"):
        book.resume(started[0])
    two = RunBook(book.workspace, at_once=2)  # another server on this workspace, which allows more
    assert two.start(replace(form, concept="my-toy")).name == "my-toy-2"


def test_two_visitors_see_their_own_run(book, form, sleeping):
    page, first = app.Handlers(book), book.start(form)
    other = RunBook(book.workspace, at_once=2).start(form)
    other_record = other.record
    seen, runs, *_ = page.observe(first.name, {})
    again, *nothing_new = page.observe(first.name, seen)
    assert again == seen and all(update == app.gr.skip() for update in nothing_new)
    first.log.write_text("of the first")
    assert "of the first" in page.observe(first.name, {}) and "of the first" not in page.observe(other.name, {})
    assert "value" not in runs, "what is chosen is the visitor's"
    assert [name for _, name in runs["choices"]] == [other.name, first.name]
    assert "Nothing has been trained yet" in page.observe("gone", {})[2]
    (book.folder / other.name / "run.json").write_text('{"form": {"method": "magic"}}')
    assert book.names() == [first.name] and page.load({"run": other.name, "concept": "gone"})[1]["value"] == first.name
    (book.folder / other.name / "run.json").write_text(json.dumps(other_record))


def test_a_full_disk_at_the_start(book, form, sleeping, monkeypatch):
    monkeypatch.setattr(app_runs, "write_json", no_room)
    with pytest.raises(InputError, match="could not be written .*disk is full, free some space"):
        book.start(form)
    assert not book.names()


def test_how_a_run_ended_is_read_from_its_log(book, form, sleeping):
    run = book.start(form)
    book.stop(run)
    wait_for(lambda: not run.is_alive())
    assert run.outcome() == (STOPPED, "")
    run.write(stopping=False)
    assert run.outcome()[0] == FAILED and "it was killed" in run.outcome()[1]
    run.log.write_text("Steps: 1\rSteps: 2\n\ntrain_zoodip_textual_inversion.py: error: --seed -1 must be more.\n")
    assert run.outcome() == (FAILED, "--seed -1 must be more.")
    assert run.log_tail().startswith("Steps: 2\n")
    assert "it broke off" in app.status_card(*run.outcome(), 5, 10, None).lower()


def test_a_reason_is_of_this_launch_and_stands_on_its_own_line(book, form, sleeping):
    run = book.start(form)
    book.stop(run)
    wait_for(lambda: not run.is_alive())
    said = "train_zoodip_textual_inversion.py: error: the disk is full.\n"
    run.log.write_text(f"Steps:   0%|  | 5/100 [00:01<66:30:30,  4.18it/s, loss=0.4394]{said}UserWarning: old\n")
    assert run.outcome() == (FAILED, "the disk is full.")
    assert "loss=0.4394]\ntrain_zoodip" in run.log_tail()
    book.resume(run)
    book.stop(run)
    wait_for(lambda: not run.is_alive())
    assert run.outcome() == (STOPPED, "")
    run.write(stopping=False)
    assert run.outcome()[0] == FAILED and "it was killed" in run.outcome()[1]


def test_a_clock_that_is_set_back_does_not_unfinish_a_run(book, form, sleeping, monkeypatch):
    run = book.start(form)
    run.output.mkdir()
    book.stop(run)
    wait_for(lambda: not run.is_alive())
    for name in (run.method.config_name, run.method.result_name):
        (run.output / name).write_text("{}")
        os.utime(run.output / name, (1e9, 1e9))
    assert run.outcome() == (FINISHED, "")
    book.resume(run)
    book.stop(run)
    wait_for(lambda: not run.is_alive())
    assert run.outcome()[0] == STOPPED, "that result is of the launch before"


def test_a_server_leaves_alone_what_another_one_is_trying(book, form, monkeypatch):
    """Two servers on a workspace: a prediction in progress is not deleted; what a killed server left behind is."""
    other = RunBook(book.workspace)
    with book._scratch() as folder:
        (folder / "memory.txt").write_text("half")
        other.remove_trials()
        assert (folder / "memory.txt").is_file()
        kept = Path(shutil.copytree(folder, folder.with_name(".trial-of-a-killed-server")))
    other.remove_trials()
    assert not kept.exists() and not folder.exists()


def test_two_visitors_pack_a_run_at_the_same_time(book, form, sleeping):
    run = book.start(form)
    book.stop(run)
    wait_for(lambda: not run.is_alive())
    run.output.mkdir()
    content = os.urandom(3_000_000)
    (run.output / run.method.result_name).write_bytes(content)
    (run.output / "README.md").write_text("a card")
    files = {run.method.result_name: hashlib.sha256(content).hexdigest(), "/etc/passwd": "", "../x": "", "gone": ""}
    (run.output / run.method.config_name).write_text(json.dumps({"files": files}))
    broken = []

    def visitor():
        for _ in range(4):
            (run.folder / f"{run.name}.zip").unlink(missing_ok=True)
            try:
                with contextlib.suppress(FileNotFoundError), zipfile.ZipFile(run.package()) as archive:
                    assert archive.testzip() is None and len(archive.namelist()) == 3
            except Exception as error:
                broken.append(error)

    visitors = [threading.Thread(target=visitor) for _ in range(4)]
    [thread.start() for thread in visitors]
    [thread.join() for thread in visitors]
    assert not broken and not list(run.folder.glob(".tmp-*"))


def test_whole_life_of_a_run(book, form, tmp_path):
    """Started, found by another server, killed, resumed, stopped, resumed to the end, packed, drawn with."""
    flags = form.flags | {"max_train_steps": 10**6, "checkpointing_steps": 2, "validation_steps": 10**6}
    flags |= {"num_validation_samples": 2, "num_validation_images": 1}
    run = book.start(replace(form, flags=flags, others="--logging_steps 1 --lr_scheduler constant"), token="hf_secret")
    other = RunBook(Workspace(book.workspace.root, [REPO / "demo"]))
    found = other.open(run.name)
    wait_for(lambda: len(other.history(found).loss) > 4)
    assert found.outcome() == (RUNNING, "") and len(app_runs.processes_of(found.record["process"])) >= 2
    with pytest.raises(InputError, match="is training"):
        other.start(form)

    launcher_process, script, *_ = app_runs.processes_of(found.record["process"])
    assert os.getsid(script.pid) == launcher_process.pid, "a session of its own: what ends the server does not end it"
    script.kill()
    wait_for(lambda: not found.is_alive())
    assert found.outcome()[0] == FAILED and found.can_resume()
    reached = other.history(found).loss[-1][0]

    other.resume(found, token="hf_secret")
    wait_for(lambda: found.is_alive() and other.history(found).loss[-1][0] > reached + 2)
    other.stop(found)
    wait_for(lambda: not found.is_alive())
    assert found.outcome() == (STOPPED, "")
    steps = [app_runs.list_checkpoints(found.output)[-1].name, f"checkpoint-{other.history(found).loss[-1][0]}"]
    assert steps[0] == steps[1], "the last step has a checkpoint"

    last = other.history(found).loss[-1][0]
    command = found.record["command"]
    command[command.index("--max_train_steps") + 1] = str(last + 1)
    found.write(command=command)
    other.resume(found)
    wait_for(lambda: not found.is_alive())
    assert found.outcome() == (FINISHED, ""), found.log_tail()
    assert [row[0] for row in other.history(found).loss] == list(range(1, last + 2))
    with zipfile.ZipFile(found.package()) as archive:
        assert {
            f"{found.name}/{name}" for name in ("learned_embeds.safetensors", "README.md", "zoodip_config.json")
        } <= set(archive.namelist())
    assert found.grids()[0][1] == 0
    found.package().unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", no_room)
        assert "disk is full" in str(app.Handlers(book).observe(found.name, {}))
    assert flag_of(found.record["command"], "max_train_steps") == str(last + 1)

    for _ in other.draw(found, "a photo of a <my-toy> in the snow", 1, 3, 1, 4):
        pass
    assert "Drawing" in (found.folder / "drawings" / "0001" / "log.txt").read_text()
    ((record, before, after),) = found.drawings()
    assert record["prompt"] == "a photo of a {} in the snow" and len(before) == len(after) == 1
    assert before[0].read_bytes() != after[0].read_bytes()
    with pytest.raises(InputError, match="into the prompt"):
        next(other.draw(found, "a dog", 1, 0, 1, 4))

    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment(tmp_path / "home").items():
            patch.setenv(name, value)
        patch.delenv("HF_TOKEN")
        with pytest.raises(InputError, match="is not on the Hub|refused|token"):
            other.push(found, "alice/toy", True, "hf_wrong")
        with pytest.raises(InputError, match="a token of your own"):
            RunBook(book.workspace, own_login=False).push(found, "alice/toy", True, "")
        with pytest.raises(InputError, match="no name for a repository"):
            other.push(found, "--hub_token", True, TOKEN)
        assert "/commit/" in other.push(found, "alice/toy", True, TOKEN)
        assert "learned_embeds.safetensors" in server.repos["alice/toy"].files
    for path in book.workspace.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert TOKEN.encode() not in content and b"hf_secret" not in content, path


def test_prediction_is_measured(book, form):
    table = book.predict_memory(form)
    assert "peak" in table and "MB" in table
    timed = book.time_steps(form)
    assert timed.step > 0 and timed.start > 0 and timed.peak_mb > 100
    assert not list(book.folder.iterdir()), "a trial leaves nothing"
    text = app.prediction_card(table, timed, form.flags, book.workspace)
    assert "of memory, predicted" in text and "in all" in text
    assert "measured" in app.prediction_card(None, timed, form.flags, book.workspace)
    with pytest.raises(InputError, match="flip_probability"):
        book.predict_memory(replace(form, flags=form.flags | {"flip_probability": 7}))
    assert not list(book.folder.iterdir())


# =====================================================================================================
# The server
# =====================================================================================================


def test_the_server_shows_the_workspace_and_nothing_else(tmp_path):
    """As it is started: on this computer only, nothing below / but pictures and runs; no address of anyone else."""
    root = tmp_path / "workspace"
    with serve(root) as url:
        assert url.startswith("http://127.0.0.1:")
        (root / "concepts" / "a.txt").write_text("shown")
        assert get(f"{url}/gradio_api/file={root}/concepts/a.txt") == (200, b"shown")
        (root / "secret.txt").write_text("hidden")
        for path in ("/etc/passwd", REPO / "README.md", root / "secret.txt", root / "concepts" / ".." / "secret.txt"):
            assert get(f"{url}/gradio_api/file={path}")[0] in (403, 404), path
        page = get(url)[1].decode()
        assert "googleapis" not in page and "cdnjs" not in page and "Teach a model" in page


@contextlib.contextmanager
def serve(root, port=0, **environment):
    """`python app.py`; yields its address."""
    command = [sys.executable, str(REPO / "app.py"), "--workspace", str(root)]
    root.mkdir()
    log = root / "server.txt"
    with log.open("w") as output:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        }
        server = subprocess.Popen(command, cwd=REPO, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        words = wait_for(lambda: (text := log.read_text()).count("http://") and text or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield next(word for word in words.split() if word.startswith("http://"))
    finally:
        server.terminate()
        server.wait(20)


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


@pytest.mark.parametrize(
    "words, said",
    [
        (["--port", "0"], "--port 0 must be"),
        (["--trainings", "0"], "--trainings 0 must be"),
        (["--read", "/nowhere"], "--read '/nowhere' is not a folder"),
    ],
)
def test_bad_flags_of_the_server(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        app.parse_args(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_workspace_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--workspace .* cannot be used"):
        Workspace(tmp_path / "file")


def test_the_head_of_a_space_fits_what_is_here():
    import yaml

    head = yaml.safe_load((REPO / "docs" / "space_README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert head["sdk"] == "gradio" and (REPO / head["app_file"]).is_file() and len(head["short_description"]) <= 60
    needed = next(
        line for line in (REPO / "requirements-app.txt").read_text().splitlines() if line.startswith("gradio")
    )
    assert app.gr.__version__.split(".")[0] == head["sdk_version"].split(".")[0]
    assert f">={head['sdk_version'].rsplit('.', 1)[0]}" in needed
