"""The web page without a browser: its folder, command lines and runs as processes, and what goes wrong with them."""

import contextlib
import errno
import hashlib
import html
import importlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from conftest import REPO
from hub_server import TOKEN, HubServer
from page import served
from PIL import Image
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

import train_tuneqdm_dreambooth as tuneqdm
import train_zoodip_textual_inversion as zoodip
from personalization.data import images
from personalization.errors import InputError
from personalization.web import app_runs, app_words, captioner, processes, queue, run_logs, uploads, workspace
from personalization.web.app_runs import (
    FAILED,
    FINISHED,
    READY,
    RUNNING,
    STOPPED,
    WAITING,
    Histories,
    RunBook,
    TimedSteps,
)
from personalization.web.command_lines import (
    METHODS,
    Form,
    default_flags,
    flag_of,
    launcher,
    read_others,
    shown,
    to_copy,
)
from personalization.web.workspace import Workspace, safe_file_name, safe_name


app = pytest.importorskip("app", reason="gradio is not installed")

PARSERS = {"word": zoodip.parse_args, "scales": tuneqdm.parse_args}
if METHODS["lora"].path.is_file():
    PARSERS["lora"] = importlib.import_module(METHODS["lora"].path.stem).parse_args


@pytest.fixture
def space(tmp_path):
    return Workspace(tmp_path / "workspace", [REPO / "demo"])


@pytest.fixture
def demo_base():
    """The base that the page offers."""
    return str(app.DEMO_BASE)


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
    assert Workspace(space.root, [tmp_path]).add_pictures("my-toy", [tmp_path / "private.png"]).count == 1


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


def test_base_models_in_single_files(space, form, demo_base, monkeypatch):
    names = "conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x"
    prefixes = {"xl": names, "v1": ("cond_stage_model.transformer.x",)}
    for name, text in prefixes.items():
        content = {key: torch.zeros(1) for key in ("model.diffusion_model.x", "first_stage_model.x", *text)}
        save_file(content, space.root / "models" / f"{name}.safetensors")
    (space.root / "models" / "notes.txt").write_text("x")
    paths = [str(space.root / "models" / f"{name}.safetensors") for name in ("v1", "xl")]
    assert space.models() == paths and space.base_model("models/xl.safetensors") == paths[1]
    assert [app.model_resolution(path) for path in paths] == [512, 1024]
    assert app.model_resolution(space.root / "models" / "none.safetensors") == 512
    with pytest.raises(InputError, match="is no model in diffusers format .* and no .safetensors or .ckpt"):
        space.base_model("models/notes.txt")
    command = RunBook(space).command(replace(form, base="models/xl.safetensors"))
    assert flag_of(command, "pretrained_model_name_or_path") == paths[1]


# =====================================================================================================
# Pictures and captions
# =====================================================================================================


def test_pictures_are_copied_once_and_with_their_captions(space, subject):
    count = len(list(subject.glob("*.png")))
    assert space.add_folder("My Toy", subject) == (count, []) and space.add_folder("My Toy", subject) == (0, [])
    assert space.concepts() == ["My-Toy"]
    rows, notes = space.review("My-Toy", 64)
    wanted = [json.loads(line) for line in (subject / "metadata.jsonl").read_text().splitlines()]
    assert [(row.name, row.caption) for row in rows] == [(row["file_name"], row["text"]) for row in wanted]
    assert not notes and not any(row.problems for row in rows)

    (space.root / "uploads" / "other").mkdir()
    Image.new("RGB", (64, 64), "red").save(space.root / "uploads" / "other" / "0.png")
    another = space.root / "uploads" / "other" / "0.png"  # with this name
    assert space.add_pictures("My-Toy", [another]).count == 1
    assert "0-2.png" in [row.name for row in space.review("My-Toy", 64)[0]]
    space.remove_picture("My-Toy", "0.png")
    assert "0.png" not in (space.root / "concepts" / "My-Toy" / "metadata.jsonl").read_text()


def sent(space, name, content):
    """A file as a browser sends it: in a folder of its own below the workspace."""
    folder = Path(tempfile.mkdtemp(dir=space.root / "uploads"))
    if isinstance(content, str):
        picture = Image.new("RGB" if name.endswith("jpg") else "L", (64, 48), content)
        content = io.BytesIO()
        picture.save(content, "JPEG" if name.endswith("jpg") else "PNG")
        content = content.getvalue()
    (folder / name).write_bytes(content)
    return folder / name


def zipped(space, name, **files):
    path = Path(tempfile.mkdtemp(dir=space.root / "uploads")) / name
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in files.items():
            archive.writestr(each, content)
    return path


CAPTION = "\ufeffa photo of a {}\r\non a sofa\r\n".encode()


def test_captions_and_masks_come_with_their_pictures(space):
    """Text files and masks by the names of pictures, which change where they are taken or not safe."""
    files = {"IMG 01.jpg": "red", "IMG 01.txt": CAPTION, "IMG 01-masklabel.png": "white", "b.jpg": "blue"}
    files |= {"b.caption": b"a {} in grass", "b-masklabel.png": "white", "c.jpg": "green", "c.txt": b""}
    assert space.add_pictures("toy", [sent(space, *file) for file in files.items()]) == (3, [])
    folder = space.root / "concepts" / "toy"
    names = {"IMG-01.jpg", "IMG-01-masklabel.png", "b.jpg", "b-masklabel.png", "c.jpg", "metadata.jsonl"}
    assert set(os.listdir(folder)) == names
    rows, notes = space.review("toy", 32)
    captions = {"IMG-01.jpg": "a photo of a {} on a sofa", "b.jpg": "a {} in grass", "c.jpg": ""}
    assert {row.name: row.caption for row in rows} == captions
    assert "2 of the pictures have a mask: with --masked_loss among the other flags" in notes[0]
    more = {"b.jpg": "yellow", "b.txt": b"another {}", "b-masklabel.png": "gray"}
    assert space.add_pictures("toy", [sent(space, *file) for file in more.items()]) == (1, [])
    assert {row.name: row.caption for row in space.review("toy", 32)[0]} == captions | {"b-2.jpg": "another {}"}
    assert space.add_pictures("toy", [sent(space, "c-masklabel.png", "white")]) == (0, [])
    pictures = images.read_folder(folder, 32, True, masked=True)
    assert {picture.name for picture in pictures if picture.mask is not None} == {*captions, "b-2.jpg"}
    space.remove_picture("toy", "b.jpg")
    assert not {"b.jpg", "b-masklabel.png"} & set(os.listdir(folder)) and "b-2-masklabel.png" in os.listdir(folder)


def test_a_zip_file_is_unpacked(space):
    red, blue = (sent(space, "x.jpg", colour).read_bytes() for colour in ("red", "blue"))
    files = {"10_my dog/01.jpg": red, "10_my dog/01.txt": b"a {} here", "4_my dog/01.jpg": blue, "readme.pdf": b"x"}
    files |= {"4_my dog/metadata.csv": b"file_name,text\n01.jpg,a {} there\n", "dog.json": b"{}", ".DS_Store": b"x"}
    files |= {"__MACOSX/._01.jpg": b"x", "../evil.jpg": red, "/evil.jpg": red, "4_my dog/sub/": b""}
    count, notes = space.add_pictures("dog", [zipped(space, "dog.ZIP", **files), sent(space, "02.jpg", "green")])
    assert count == 3
    assert {row.name: row.caption for row in space.review("dog", 32)[0]} == {
        "01.jpg": "a {} here",
        "01-2.jpg": "a {} there",
        "02.jpg": "",
    }
    assert "Not taken: dog.json, readme.pdf." in notes[0] and "If dog.json hold captions, they are lost" in notes[0]
    assert "drawn equally often" in notes[1]
    assert not list((space.root / "uploads").glob("brought-*")) and not list(space.root.rglob("evil*"))


def test_zip_files_that_are_refused(space, monkeypatch):
    good = zipped(space, "a.zip", **{"a.jpg": b"x" * 100, "b.jpg": b"y"}).read_bytes()
    locked = bytearray(good)
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        locked[locked.index(mark) + at] |= 1
    for content, said in ((b"no zip", "a.zip is no ZIP file"), (good[:-30], "no ZIP"), (bytes(locked), "password")):
        with pytest.raises(InputError, match=said):
            space.add_pictures("dog", [sent(space, "a.zip", content)])
    for name, value, said in (("MOST_BYTES", 50, "more than 0 GB unpacked"), ("MOST_FILES", 1, "holds 2 files")):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=said):
            patch.setattr(uploads, name, value)
            space.add_pictures("dog", [sent(space, "a.zip", good)])
    link = zipfile.ZipInfo("a.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path := space.root / "uploads" / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert space.add_pictures("dog", [path]) == (0, [])
    assert not list((space.root / "uploads").glob("brought-*"))


def test_photos_of_a_phone(space):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    content = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(content, "HEIF")
    assert space.add_pictures("dog", [sent(space, "IMG_1.HEIC", content.getvalue())]).count == 1
    ((name, _, thumbnail, problems),), _ = space.review("dog", 32)
    assert name == "IMG_1.HEIC" and thumbnail.size == (64, 48) and not problems


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


def test_pictures_are_shown_as_they_are_trained(space, form):
    """A photo of 3:4 is cropped, by default and in every method; the page shows the square that is kept."""
    folder = space.concept_folder("my-toy")
    Image.new("RGB", (300, 400), "red").save(folder / "a.png")
    rows, _ = space.review("my-toy", 64)
    for method in METHODS:
        others = app.default_values(method, form.base)[0]
        assert app.fit_of(method, others) == "cropped"
        assert "top: 12.5%; left: 0.0%; width: 100.00%; height: 75.00%" in app.shots(rows, "cropped")
    assert "--center_crop" in app.default_values("word", "user/model")[0]
    assert app.fit_of("word", "") == "squeezed" and 'class="squeezed"' in app.shots(rows, "squeezed")
    assert app.fit_of("word", "--use_aspect_ratio_buckets --center_crop") == "whole"
    rows = [rows[0]._replace(name='"><img>.png', caption="</textarea><img>")]
    assert "<img>" not in app.shots(rows, "whole"), "names and captions are text"


def test_captions_are_saved_whole_or_not_at_all(space, subject, monkeypatch):
    space.add_folder("my-toy", subject)
    path = space.root / "concepts" / "my-toy" / "metadata.jsonl"
    space.save_captions("my-toy", [("0.png", ' a {} "quoted"\nü '), ("1.png", None), ("../x.png", "gone")])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:2] == [
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
    base = str(app.DEMO_BASE)
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


@pytest.mark.parametrize("threads, expected", [("4,2", "4"), ("3", "3"), ("", None), ("many", None), ("0", None)])
def test_a_number_of_threads_from_outside(threads, expected, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert launcher()[-1] == (expected or str(psutil.cpu_count(logical=False) or 1))


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
    line = app.Handlers(book).command(0, None, "my-toy", "/etc", "word", "x", "", "", "")
    assert "&#x27;/etc&#x27; is outside" in line and "data-copy" not in line


@pytest.mark.parametrize(
    "change, said",
    [
        ({"class_word": "golden retriever"}, "'golden retriever' is 2 words: choose one, such as 'retriever'"),
        ({"class_word": "labradoodle"}, "does not know 'labradoodle' as one word"),
        ({"subject": "my dog"}, "'my dog', must be one word without spaces"),
        ({"subject": "Star"}, "'Star', is a word that the base model has already: choose a new one, such as '<my-st"),
        ({"flags": {"max_train_steps": 0}}, "Steps is 0 and must be at least 1 and at most 1e"),
        ({"flags": {"learning_rate": -1.0}}, "Learning rate is -1.0 and must be above 1e-12"),
        ({"others": "--seed x"}, "Seed: 'x' is no whole number"),
        ({"others": "--lr_scheduler sideways"}, "--lr_scheduler: 'sideways' is none of .*cosine"),
        ({"concept": "empty"}, "There are no pictures yet"),
    ],
)
def test_a_form_is_judged_before_anything_starts(book, form, change, said):
    """In the words of the page, and not after 20 seconds in those of a script."""
    with pytest.raises(InputError, match=said):
        book.start(replace(form, **change))
    assert not book.names()


def test_a_base_whose_vocabulary_is_not_here_is_left_to_the_script(space, tmp_path):
    from personalization.web import checks

    assert checks.vocabulary("stable-diffusion-v1-5/stable-diffusion-v1-5", space) is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text('{"dog</w>": 1, "do": 2}')
    assert checks.vocabulary(str(tmp_path), space) == {"dog"}
    (tmp_path / "tokenizer" / "vocab.json").write_text("[1]")
    assert checks.vocabulary(str(tmp_path), space) is None


@pytest.mark.parametrize("method", METHODS)
def test_a_command_line_works_as_copied(book, form, method, tmp_path):
    """From any folder, with the Python of the server; --help at its end, so that it trains nothing."""
    line = to_copy(book.command(replace(form, method=method, flags=default_flags(method, form.base))))
    assert line in html.unescape(app.command_box(line))
    done = subprocess.run(["bash", "-c", f"{line} --help"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and METHODS[method].script in done.stdout, done.stderr


def test_no_sentence_is_taken_for_html(book, monkeypatch):
    """Toasts are HTML to Gradio: what a visitor typed is shown as it was typed, and no image in it is fetched."""
    said = []
    monkeypatch.setattr(app.gr, "Warning", lambda text, **_: said.append(text))
    monkeypatch.setattr(app.gr, "Info", lambda text, **_: said.append(text))
    page = app.Handlers(book)
    page.upload(["<img src=x>.mp3"], "my-toy", None, "word", "")
    app.tell("<striped_star> waits")
    with pytest.raises(app.gr.Error) as refused:
        app.answering(page.copy_folder)("<img src=//evil.com/x>", "my-toy", "", None, "word", "")
    for text in [*said, refused.value.message]:
        assert "<" not in text and "&lt;" in text


def test_an_error_belongs_into_the_card(book):
    """No card says for ever that something is on the way."""
    page = app.Handlers(book)
    for handler, values in ((page.draw, ["gone", "a {}", 1, 0, 1, 4]), (page.push, ["gone", "a/b", True, ""])):
        *_, last = app.answering(app.in_its_card(handler))(*values)
        assert 'class="card bad"' in last and "There is no run" in last


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


def test_what_a_run_is_doing():
    """Phases before the first step, and then the last state of the progress bar, whatever is logged how seldom."""
    assert run_logs.doing("").phase == "Starting Python and its libraries"
    assert "once" in run_logs.doing("INFO - Recipe fast: ...\nINFO - Quantizing the unet once, into /x\n").phase
    bar = "Steps:  12%|█▏        | 18/150 [00:05<00:40,  3.29it/s, loss=0.4339]"
    found = run_logs.doing(f"12 images, 3 prompts\nSteps:   0%|  | 0/150 [00:00<?, ?it/s]\n{bar}\nand more")
    assert (found.phase, found.step) == ("Training", 18) and "loss=0.4339" in found.bar
    shown = app.status_card(RUNNING, "", found.step, 150, None, found)
    assert "step 18 of 150" in shown and "3.29it/s" in shown and 'data-title="12% step 18 of 150"' in shown


@pytest.mark.parametrize(
    "losses, said",
    [
        ([0.5, 0.4], ""),
        ([0.5, 0.4, 0.3], "best at step 50 (0.3000), still improving."),
        ([0.5, 0.3, 0.4], "best at step 25 (0.3000), now 0.4000: no better in the last 1 look."),
        ([0.3, 0.4, 0.5, 0.6], "now 0.6000: no better in the last 3 looks. It no longer improves: stop?"),
    ],
)
def test_the_validation_loss_as_a_sentence(losses, said):
    history = app_runs.History([], [(25 * n, loss, 0.0) for n, loss in enumerate(losses)])
    sentence = app.validation_sentence(history, 100)
    assert sentence.endswith(said) and bool(sentence) == bool(said)


@pytest.mark.parametrize(
    "caption, word, expected",
    [
        ("a brown Dog on a beach.", "dog", "a brown {} on a beach"),
        ("an animal", "dog", "a photo of {}, an animal"),
        ("a hotdog", "dog", "a photo of {}, a hotdog"),
        (" \n", "dog", ""),
        ("a dog", "", "a photo of {}, a dog"),
    ],
)
def test_a_model_s_caption_names_the_concept(caption, word, expected):
    assert captioner.with_concept(caption, word) == expected


def test_captions_are_written_by_a_model_on_this_disk(book, tmp_path):
    """A tiny BLIP of random weights, in a process of its own; captions that are there stay as they are."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "star", "on", "the", "beach"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab={word: n for n, word in enumerate(words)})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": len(words),
        "bos_token_id": 2,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    text |= {"encoder_hidden_size": 16, "max_position_embeddings": 64}
    config = BlipConfig(
        text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=16
    )
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
    book.workspace.save_captions("my-toy", [("0.png", ""), ("1.png", "my own {}")])
    assert book.write_captions("my-toy", tmp_path, "star") == 1 and book.write_captions("my-toy", tmp_path, "") == 0
    captions = {row.name: row.caption for row in book.workspace.review("my-toy", 64)[0]}
    assert "{}" in captions["0.png"] and captions["1.png"] == "my own {}"
    (tmp_path / "config.json").write_text("{}")
    book.workspace.save_captions("my-toy", [("0.png", "")])
    *_, (said, _) = app.Handlers(book, tmp_path).write_captions("my-toy", "star", None, "word", "")
    assert 'class="card bad"' in said and "no model that describes pictures" in said


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
    """One trains, the others wait for their turn; a server that is started again still has the queue."""
    visitors = [threading.Thread(target=book.start, args=[form]) for _ in range(3)]
    [thread.start() for thread in visitors]
    [thread.join() for thread in visitors]
    first, second, third = (book.open(f"my-toy-{n}") for n in (1, 2, 3))
    assert [run.outcome()[0] for run in (first, second, third)] == [RUNNING, WAITING, WAITING]
    assert [run.name for run in book.waiting()] == ["my-toy-2", "my-toy-3"] and not book.advance()
    status = app.Handlers(book).observe("my-toy-3", {})[2]
    assert "<b>Waiting</b> for its turn: 1 other before it" in status
    with pytest.raises(InputError, match="is training already"):
        book.resume(first)
    with pytest.raises(InputError, match="my-toy-1 is running: stop it first"):
        book.delete(first)
    book.stop(second)  # leaves the queue
    assert second.outcome()[0] == READY
    end(book, first)
    again = RunBook(book.workspace)
    assert [run.name for run in again.advance()] == ["my-toy-3"] and not again.waiting()
    again.resume(second)
    assert second.outcome()[0] == WAITING and third.outcome()[0] == RUNNING
    two = RunBook(book.workspace, at_once=2)  # another server on this workspace, which allows more
    assert [run.name for run in two.advance()] == ["my-toy-2"]


def test_the_queue_moves_without_a_visitor(book, form, sleeping, monkeypatch):
    monkeypatch.setattr(queue, "SECONDS", 0.05)
    monkeypatch.setattr(app.Handlers, "observe", lambda *_: pytest.fail("nobody looks"))
    first, second = book.start(form, "hf_first"), book.start(form, "hf_second")
    queue.keep_moving(book, lambda: second.outcome()[0] != RUNNING)
    end(book, first)
    wait_for(lambda: second.outcome()[0] == RUNNING, 10)
    assert b"hf_" not in b"".join(path.read_bytes() for path in book.folder.rglob("run.json"))


def end(book, run):
    book.stop(run)
    wait_for(lambda: not run.is_alive())


def test_runs_and_concepts_are_renamed_and_deleted(book, form, sleeping):
    page, run = app.Handlers(book), book.start(form)
    for refused in (lambda: book.rename(run, "x"), lambda: book.rename_concept("my-toy", "x")):
        with pytest.raises(InputError, match="my-toy-1 is running: stop it first"):
            refused()
    end(book, run)
    run.output.mkdir()
    (run.output / run.method.result_name).write_bytes(b"learned")
    renamed = book.rename(run, "The best one!")
    assert book.names() == ["The-best-one"] and not run.folder.exists()
    assert (renamed.output / renamed.method.result_name).read_bytes() == b"learned"
    assert flag_of(renamed.record["command"], "output_dir") == str(renamed.output), "Resume finds its checkpoints"
    for name, said in (("The-best-one", ""), ("", "a new name first")):
        with pytest.raises(InputError, match=said) if said else contextlib.nullcontext():
            book.rename(renamed, name)

    assert page.rename_concept("my-toy", "my star")[0]["value"] == "my-star"
    assert renamed.form.concept == "my-star" and book.workspace.concepts() == ["my-star"]
    pictures = flag_of(renamed.record["command"], "train_data_dir")
    assert Path(pictures) == book.workspace.root / "concepts" / "my-star" and list(Path(pictures).glob("*.png"))
    page.delete_concept(None), page.delete_run(None)  # a visitor who thought again
    assert book.names() and book.workspace.concepts()
    page.delete_concept("my-star")
    assert not book.workspace.concepts() and renamed.output.is_dir(), "what was learned stays"
    page.delete_run("The-best-one")
    assert not list(book.folder.iterdir()) and not book.names()
    for gone in (lambda: book.workspace.delete_concept(".."), lambda: book.workspace.rename_concept("gone", "x")):
        with pytest.raises(InputError, match="There is no concept"):
            gone()


def test_settings_belong_to_a_concept(book, form, sleeping, subject):
    """What was chosen for one is not left on the page for the next, nor for another visitor."""
    page, run = app.Handlers(book), book.start(replace(form, class_word="cross", method="lora"))
    book.workspace.add_folder("moon", subject)
    of_the_first, of_the_next = page.choose_concept("my-toy"), page.choose_concept("moon")
    assert of_the_first[1:3] == ["lora", "cross"] and of_the_next[1:3] == ["word", ""]
    concept, runs, _, tab, step, base, method, word, *_ = page.load({})  # another visitor
    assert concept["value"] is None and (method, word) == ("word", "") and step == app.PICTURES
    assert runs["value"] == run.name, "the run is there to look at"
    uploaded = page.upload([], None, base, method, "")
    assert uploaded[1]["value"] not in (None, "my-toy", "moon"), "pictures of nobody's concept make a new one"
    concept, _, _, _, step, base, method, word, *_ = page.load({"run": run.name, "concept": "my-toy"})
    assert concept["value"] == "my-toy" and (method, word, step) == ("lora", "cross", app.TRAINING)


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
    assert "<b>Failed</b> at step 5 of 10. --seed -1" in app.status_card(*run.outcome(), 5, 10, None)


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
    waits = other.start(form)
    assert waits.outcome()[0] == WAITING
    other.stop(waits), other.delete(waits)

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
    assert not found.has_result()
    other.resume(found, finish=True)  # a stopped run has a result, too
    wait_for(lambda: not found.is_alive())
    assert found.outcome() == (FINISHED, ""), found.log_tail()
    assert [row[0] for row in other.history(found).loss] == list(range(1, last + 1))
    with zipfile.ZipFile(found.package()) as archive:
        assert {
            f"{found.name}/{name}" for name in ("learned_embeds.safetensors", "README.md", "zoodip_config.json")
        } <= set(archive.namelist())
    assert found.grids()[0][1] == 0
    found.package().unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", no_room)
        assert "disk is full" in str(app.Handlers(book).observe(found.name, {}))
    pids = set()
    for n in range(2):  # the second time the pipeline is there
        list(other.draw(found, "a photo of a <my-toy> in the snow", 1, 3 + n, 1, 4))
        painters = app_runs.processes_of(other.painter.record())
        assert len(painters) == 1 and not other.painter.is_busy()
        pids.add(painters[0].pid)
    assert len(pids) == 1
    other.painter.leave()
    wait_for(lambda: not other.painter.is_alive(), 20)
    assert "Drawing" in (found.folder / "drawings" / "0001" / "log.txt").read_text()
    (_, (record, before, after)) = found.drawings()
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
def serve(root, port=None, **environment):
    """`python app.py`; yields its address."""
    command = [sys.executable, str(REPO / "app.py"), "--workspace", str(root)]
    command += ["--port", str(port)] if port else []
    root.mkdir(exist_ok=True)
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


def test_a_port_in_use_is_said_in_one_sentence(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(InputError, match="--port .* is in use, perhaps by this page"):
            with served(tmp_path / "w", "--port", port):
                pass


def test_without_gradio_it_is_one_sentence(tmp_path):
    """Python is told by a finder that there is no such module."""
    code = "import importlib.util as u, runpy, sys; f = u.find_spec\n"
    code += "u.find_spec = lambda name, *a: None if name == 'gradio' else f(name, *a)\n"
    code += f"sys.argv = ['app.py']; runpy.run_path({str(REPO / 'app.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode and done.stderr.count("\n") == 1 and "pip install -r requirements-app.txt" in done.stderr


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
