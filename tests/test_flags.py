"""Flags say everything about themselves, once: what is forgotten fails safe, and what is generated is up to date."""

import argparse
import ast
import gc
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, as_arguments

import train_zoodip_textual_inversion as zoodip
from docs import generate
from personalization import flags, quick_help
from personalization.errors import InputError, run_script
from personalization.web.command_lines import METHODS, read_others


pytest.importorskip("gradio", reason="app.py has flags, too")
PARSERS = {name: importlib.import_module(Path(name).stem).make_parser for name in generate.SCRIPTS}
TRAINERS = [name for name in PARSERS if name.startswith("train_")]


def parser(*declarations):
    """A parser with some flags; a declaration is a name and words of `flags.add`."""
    made = flags.new_parser("toy.py", "A toy.", "%(prog)s")
    for name, words in declarations:
        flags.add(made, name, help="Toy of a test.", **words)
    return made


# =====================================================================================================
# A flag that says nothing but its name and type
# =====================================================================================================


@pytest.fixture
def with_toys(monkeypatch):
    """The flagship script with two flags of which nothing more is said."""
    original = zoodip.textual_inversion.add_result_arguments

    def add_more(add):
        original(add)
        add("--toy", default="a", help="Toy of a test.")
        add("--toy_folder", type=Path, help="Folder of a toy.")

    monkeypatch.setattr(zoodip.textual_inversion, "add_result_arguments", add_more)


def test_a_forgotten_flag_keeps_a_run_from_resuming_under_another_value(with_toys, train):
    steps = {"checkpointing_steps": 1, "num_validation_samples": 0, "quantization": "none"}
    train(max_train_steps=1, **steps)
    with pytest.raises(InputError, match=r"belongs to other settings: toy \('a', now 'b'\); repeat them"):
        train(max_train_steps=2, resume_from_checkpoint="latest", toy="b", **steps)
    train(max_train_steps=2, resume_from_checkpoint="latest", **steps)


def test_a_forgotten_flag_counts_in_the_calibrations_key(with_toys, basics):
    sources = []
    concept = SimpleNamespace(prompt_ids=torch.zeros(1), prompts_of_image=[[0]])
    for chosen in ({}, {"--toy": "b"}, {"--gn_memory": 0.5}, {"--seed": 1}, {"--save_steps": 7}):
        args = zoodip.parse_args(as_arguments(basics | {"--optimizer": "gauss_newton"} | chosen))
        base, *_ = zoodip.resolve_settings(args, torch.device("cpu"))
        task = zoodip.Task(args, base, None, concept, None, torch.zeros(base.word_width), None, {})
        sources.append(zoodip.calibrate(task, None, []).source)
    plain, toy, memory, seed, saving = map(repr, sources)
    assert plain == memory == saving and len({plain, toy, seed}) == 3


def test_a_forgotten_path_is_published_by_its_last_part(with_toys, basics, tmp_path):
    chosen = {"--toy_folder": tmp_path / "secret" / "name", "--toy": tmp_path / "also" / "name", "--hub_token": "hf_x"}
    public = zoodip.parse_args(as_arguments(basics | chosen)).public()
    assert public["toy_folder"] == public["toy"] == "name" and "hub_token" not in public
    assert str(tmp_path) not in str(public)
    assert public["placeholder_token"] == "<my-toy>" and public["pretrained_model_name_or_path"] == "base"


def test_a_forgotten_flag_is_not_offered_on_the_page(with_toys, monkeypatch):
    name = "train_zoodip_textual_inversion.py"
    described = {**flags.descriptions(), name: json.loads(json.dumps(flags.describe(zoodip.make_parser())))}
    monkeypatch.setattr(flags, "descriptions", lambda: described)
    for given, why in (("--toy b", "is not offered to visitors"), ("--toy_folder /etc", "names a file on the server")):
        with pytest.raises(InputError, match=why):
            read_others(given, "word")
    assert METHODS["word"].flags["toy"]["decides"] == ["run", "calibration"]


@pytest.mark.parametrize(
    "words",
    [
        {"type": int},
        {"type": float, "default": 1.0},
        {"page": True, "type": Path},
        {"page": True, "path": flags.OR_NAME},
        {"page": True, "secret": True},
        {"decides": ("trajectory",)},
        {"limit": flags.COUNT},
    ],
    ids=str,
)
def test_a_declaration_that_cannot_be_meant(words):
    with pytest.raises(TypeError):
        parser(("--toy", words))


# =====================================================================================================
# Settings
# =====================================================================================================


def test_settings_are_frozen_once_a_run_knows_its_pictures(train, monkeypatch):
    seen = []

    def load_concept(*_):
        raise InputError("far enough")

    original = zoodip.checkpoints.trajectory_settings
    monkeypatch.setattr(
        zoodip.checkpoints, "trajectory_settings", lambda args, *_: seen.append(args) or original(args, *_)
    )
    monkeypatch.setattr(zoodip.examples, "load_concept", load_concept)
    with pytest.raises(InputError, match="far enough"):
        train()
    (args,) = seen
    with pytest.raises(AttributeError, match="the settings are complete: max_train_steps cannot become 5 any more"):
        args.max_train_steps = 5
    assert args.max_train_steps == 3 and args == argparse.Namespace(**vars(args))


@pytest.mark.parametrize("name", TRAINERS)
def test_no_chapter_of_a_run_writes_settings(name):
    """Only what completes them does, and that comes first."""
    source = (REPO / name).read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    writers = {f.name for f in functions if any(map(writes_a_setting, ast.walk(f)))}
    completes = {
        "parse_args",
        "resolve_settings",
        "read_start",
        "complete_for_precision",
        "complete_for_base",
        "complete_for_family",
    }
    assert writers <= completes | {"complete"}  # the last one of optimizers
    assert "launch.settle(args, " in source


def writes_a_setting(node):
    """Whether a node of a syntax tree is `args.name = ...` or `setattr(args, ...)`."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == "setattr" and ast.unparse(node.args[0]) == "args"
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "args"


def test_the_users_home_is_spelled_out(basics, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = zoodip.parse_args([*as_arguments(basics), "--output_dir=~/my-dog", "--tokenizer_name", "user/~name"])
    assert args.output_dir == str(tmp_path / "my-dog") and args.tokenizer_name == "user/~name"
    evaluate = importlib.import_module("evaluate_personalization").make_parser()
    words = "--pretrained_model_name_or_path x --class_word dog --results mine=~/my-dog".split()
    assert evaluate.parse_args(words).results == [f"mine={tmp_path}/my-dog"]


def test_recipes_name_flags_and_values_that_they_take(basics):
    actions = flags.actions(zoodip.make_parser())
    for optimizer in zoodip.OPTIMIZERS.values():
        for name, value in (zoodip.WINDOW | optimizer.recipe).items():
            action = actions[name]
            assert value is None or (value in action.choices if action.choices else value in action.facts.limits), name
    args = zoodip.parse_args(as_arguments(basics))
    with pytest.raises(KeyError, match="no flag: savesteps"):
        flags.apply_recipe(args, {"savesteps": 1})


@pytest.mark.parametrize(
    "word, said",
    [
        ("--learing_rate", "there is no flag --learing_rate: did you mean --learning_rate?"),
        ("--placeholder_tokn=<x>", "there is no flag --placeholder_tokn: did you mean --placeholder_token?"),
        ("--max_train", "there is no flag --max_train: did you mean"),  # no abbreviations
        ("--xyzzy", "there is no flag --xyzzy."),
        ("--dataloader_num_worker", "there is no flag --dataloader_num_worker."),  # nor what means nothing here
    ],
)
def test_a_mistyped_flag(word, said, capsys):
    with pytest.raises(SystemExit) as end:
        zoodip.parse_args([word, "1"])
    assert end.value.code == 2 and said in capsys.readouterr().err


# =====================================================================================================
# All scripts
# =====================================================================================================


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("value, said", [("--", "gives no value"), ("a\ud800b", "half of a character")])
def test_what_argparse_or_no_file_can_hold(name, value, said, capsys):
    """Of `--flag=--` argparse makes a list; half a character ends whatever writes it down."""
    made = PARSERS[name]()
    texts = [flag for flag, action in flags.actions(made).items() if action.type is None and action.nargs is None]
    for flag in [flag for flag in texts if not flags.actions(made)[flag].choices]:
        made = PARSERS[name]()
        for action in made._actions:
            action.required = False
        with pytest.raises(SystemExit) as end:
            flags.parse(made, [f"--{flag}={value}"])
        assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_was_declared(name):
    made = PARSERS[name]()
    assert {action.dest for action in made._actions} - {"help"} == flags.actions(made).keys()


@pytest.mark.parametrize("name", PARSERS)
def test_help_has_a_subject(name):
    for flag, action in flags.actions(PARSERS[name]()).items():
        assert not re.match(r"(Of|Those|What|Which|Where|When|How)\b|[a-z]+\b(?!:)", action.help), (flag, action.help)
        assert action.help.endswith((".", ".)")), flag


def test_what_is_generated_from_the_flags_is_up_to_date():
    found = generate.describe_scripts()
    assert found == json.loads(flags.DESCRIPTIONS.read_text(encoding="utf-8")), "run make docs"
    assert generate.USAGE.read_text(encoding="utf-8") == generate.usage(found), "run make docs"
    assert flags.DESCRIPTIONS.read_text(encoding="utf-8") == generate.as_json(found), "run make docs"


@pytest.mark.parametrize("name", PARSERS)
def test_the_quick_help_is_the_parsers(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert flags.described_parser(name).format_help() == PARSERS[name]().format_help()


def test_help_needs_no_library_that_takes_seconds(tmp_path):
    command = [sys.executable, "-X", "importtime", str(REPO / "train_zoodip_textual_inversion.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "SDXL" in done.stdout and "--placeholder_token" in done.stdout
    assert not re.search(r"\| +(torch|diffusers|accelerate|transformers|datasets)$", done.stderr, flags=re.M)


def test_garbage_is_looked_for_again_once_a_script_runs(monkeypatch):
    script, enabled = SimpleNamespace(__file__=str(REPO / "app.py")), []
    monkeypatch.setattr(quick_help.signal, "signal", lambda number, handler: None)
    try:
        quick_help.answer(SimpleNamespace(__file__=__file__), [])
        enabled.append(gc.isenabled())
        quick_help.answer(script, [])
        enabled.append(gc.isenabled())
        run_script(lambda: enabled.append(gc.isenabled()), script.__file__)
    finally:
        gc.enable()
        gc.unfreeze()
    assert enabled == [True, False, True]
