"""Faults that were found from outside (issue 26), by kind: of all trainers, what they read and what they write."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import REPO, as_arguments
from damage import QUICK
from diffusers import AutoPipelineForImage2Image, UNet2DConditionModel
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import build_pictures, build_tiny_xl_base, tiny_unet

import evaluate_personalization as evaluation
import train_selective_dreambooth_lora as lora
import train_tuneqdm_dreambooth as scales_script
import train_zoodip_textual_inversion as zoodip
import tuneqdm_pipeline as tuneqdm
import zoodip_pipeline
import zoodip_xl_pipeline
from personalization import errors, files
from personalization.data import images, prompts
from personalization.data.dataset import read_dataset
from personalization.errors import DivergedError, InputError, Stopped
from personalization.methods import dreambooth
from personalization.models import base_model, weight_cache
from personalization.runs import hub, launch, loop


SCRIPTS = {"word": zoodip, "scales": scales_script, "lora": lora}
RESULTS = {"word": "learned_embeds.safetensors", "scales": tuneqdm.SCALES_FILE, "lora": lora.WEIGHTS_FILE}
KINDS = [*SCRIPTS]


@pytest.fixture
def words(tiny, tmp_path):
    """Returns the shortest command line of a trainer, with changes."""

    def of(kind, **changes):
        pictures, name = {"word": ("train_data_dir", "placeholder_token")}.get(
            kind, ("instance_data_dir", "subject_name")
        )
        flags = {
            "pretrained_model_name_or_path": tiny / "base",
            pictures: tiny / "pictures",
            name: "<my-toy>" if kind == "word" else "star",
            "output_dir": tmp_path / "out",
            "max_train_steps": 3,
            "report_to": "none",
        }
        flags |= {"initializer_token": "star", "num_validation_samples": 0} if kind == "word" else {}
        return as_arguments({f"--{name}": value for name, value in (flags | changes).items()})

    return of


@pytest.fixture
def train(words, tmp_path):
    """Trains in this process; returns the output folder."""

    def run(kind, **changes):
        script = SCRIPTS[kind]
        script.main(script.parse_args(words(kind, **changes)))
        return Path(changes.get("output_dir", tmp_path / "out"))

    return run


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """As it would be in what a shell has started in the background."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in errors.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def refusal(function, *args, **options):
    with pytest.raises((InputError, SystemExit)) as caught:
        function(*args, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 700
    return sentence


# =====================================================================================================
# What is lost
# =====================================================================================================


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_folder_is_in_over_or_under_what_is_read(train, tiny, tmp_path, kind):
    world = shutil.copytree(tiny, tmp_path / "world")
    pictures = "train_data_dir" if kind == "word" else "instance_data_dir"
    base = {"pretrained_model_name_or_path": world / "base"}
    before = sorted(world.rglob("*"))
    for output, flags, flag in (
        (world / "base", base, "pretrained_model"),
        (world / "base" / "unet", base, "pretrained_model"),
        (world, base, "pretrained_model"),
        (world / "base" / "tokenizer", {"tokenizer_name": world / "base" / "tokenizer"}, "tokenizer_name"),
        (world / "pictures" / "new", {pictures: world / "pictures"}, pictures),
        (world, {pictures: world / "pictures"}, pictures),
    ):
        assert f"--{flag}" in refusal(train, kind, output_dir=output, **flags)
    cache = {"quantized_cache_dir": world / "base" / "cache"}
    assert "--quantized_cache_dir" in refusal(train, kind, **base, **cache)
    if kind != "word":
        flags = {"with_prior_preservation": True, "class_prompt": "a star", "class_data_dir": world / "class"}
        assert "--class_data_dir" in refusal(train, kind, output_dir=world, **flags)
        for folder in (world / "base" / "class", world / "pictures" / "class", world):
            flags |= {"class_data_dir": folder, pictures: world / "pictures"}
            assert f"--class_data_dir '{folder}'" in refusal(train, kind, **flags, **base)
    assert sorted(world.rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [None, 1, 7, 450, 100_000])
def test_a_run_with_defaults_has_a_checkpoint(words, kind, steps):
    script = SCRIPTS[kind]
    args = script.parse_args(words(kind, max_train_steps=steps))
    default = {"scales": scales_script.OFFICIAL_STEPS, "lora": lora.DEFAULT_STEPS, "word": 500}[kind]
    launch.settle(args, 3, 1, default)
    assert 1 <= args.checkpointing_steps <= min(500, args.max_train_steps)
    assert script.parse_args(words(kind, checkpointing_steps=9)).checkpointing_steps == 9


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(train, monkeypatch, kind, name):
    script, done = SCRIPTS[kind], []
    step = script.train_step

    def stopped_in_the_second(*args):
        done.append(None)
        if len(done) == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return step(*args)

    monkeypatch.setattr(script, "train_step", stopped_in_the_second)
    with errors.handled(errors.interrupt), pytest.raises(Stopped) as stopped:
        train(kind, checkpointing_steps=100)
    assert str(stopped.value) == "Stopped at step 2; --resume_from_checkpoint latest goes on from checkpoint-2."
    train(kind, checkpointing_steps=100, resume_from_checkpoint="latest")
    assert len(done) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_while_finishing_loses_nothing(train, tmp_path, monkeypatch, kind):
    script = SCRIPTS[kind]
    with monkeypatch.context() as patch, errors.handled(errors.interrupt), pytest.raises(Stopped) as stopped:
        patch.setattr(script, "finish", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
        train(kind, checkpointing_steps=100)
    assert "Stopped at step 3; " in str(stopped.value) and "goes on from checkpoint-3" in str(stopped.value)
    monkeypatch.setattr(script, "train_step", lambda *_: pytest.fail("all steps were done"))
    out = train(kind, checkpointing_steps=100, resume_from_checkpoint="latest")
    assert (out / RESULTS[kind]).is_file()


def test_a_signal_stays_one_whatever_a_library_makes_of_it(train, monkeypatch):
    """Python makes a RuntimeError of what comes while a class is made, as in an import on the way."""

    def importing(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as interrupt:
            raise RuntimeError("Error calling __set_name__") from interrupt

    for where in ("load_component", "finish"):
        with monkeypatch.context() as patch, errors.handled(errors.interrupt), pytest.raises(Stopped):
            patch.setattr(base_model if where == "load_component" else zoodip, where, importing)
            train("word")


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_while_loading_promises_no_checkpoint(train, monkeypatch, kind):
    monkeypatch.setattr(base_model, "load_component", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with errors.handled(errors.interrupt), pytest.raises(Stopped, match="^Stopped before a step was done: nothing is"):
        train(kind)


def test_a_second_signal_ends_a_run_at_once_and_says_the_truth(train, monkeypatch):
    monkeypatch.setattr("personalization.runs.loop.REPEATED_SECONDS", -1)
    monkeypatch.setattr(zoodip, "train_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="^Stopped at step 0; there is no checkpoint yet.$"):
        train("word")


def test_several_processes_agree_when_they_read_out():
    """Whichever of them was asked: all of them stop after the same step."""
    for other, here, agreed in ((0.0, False, False), (1.0, False, True), (0.0, True, True)):
        group = SimpleNamespace(num_processes=2, device="cpu", reduce=lambda asked, other=other: asked + other)
        run = SimpleNamespace(accelerator=group, stopped=lambda: Stopped("at once"))
        with contextlib.suppress(KeyboardInterrupt), loop.stop_requests(run) as stop_requested:
            if here:
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop_requested(False) is False and stop_requested(True) is agreed


def test_signals_while_the_libraries_are_imported(words):
    command = [sys.executable, str(REPO / "train_zoodip_textual_inversion.py"), *words("word")]
    code = "import os, signal, runpy, sys\nsys.argv = sys.argv[1:]\n"
    code += "sys.meta_path.insert(0, type('F', (), {'find_spec': staticmethod(lambda name, *_: os.kill(os.getpid(), "
    code += "signal.SIGHUP) if name == 'diffusers' else None)}))\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([command[0], "-c", code, *command[1:]], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.strip() == "Stopped."


def test_numbers_that_are_none_do_not_end_subspace_gradient():
    subspace = zoodip.SubspaceGradient(window=3, threshold=0.1)
    for value in (1.0, torch.inf, torch.nan):
        subspace.update(torch.full((1, 4), value))
    assert subspace.num_removed == 0


def test_a_run_that_diverges_within_a_step_keeps_what_it_learned(train, tmp_path, monkeypatch):
    step, steps = zoodip.train_step, itertools.count(1)

    def diverging(learner, *args):
        loss = step(learner, *args)
        if next(steps) == 3:
            learner.theta.fill_(torch.nan)
        return loss

    monkeypatch.setattr(zoodip, "train_step", diverging)
    with pytest.raises(DivergedError, match="the last good embedding is in"):
        train("word", max_train_steps=8, sg_window=2, logging_steps=2)
    (learned,) = load_file(tmp_path / "out" / "learned_embeds.safetensors").values()
    assert learned.isfinite().all()


# =====================================================================================================
# What is wrong in silence
# =====================================================================================================

PLACES = {
    "a bias of the UNet": ("unet", "conv_in.bias"),
    "a norm of the UNet": ("unet", "conv_norm_out.weight"),
    "a weight of the UNet": ("unet", "conv_out.weight"),
    "the text encoder": ("text_encoder", "final_layer_norm.weight"),
    "a word": ("text_encoder", "token_embedding.weight"),
    "the VAE's encoder": ("vae", "encoder.conv_in.bias"),
    "the VAE's decoder": ("vae", "decoder.conv_out.weight"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_of_a_base_are_judged(train, tiny, tmp_path, kind, place):
    component, ending = PLACES[place]
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    (path,) = (base / component).glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name].view(-1)[-1] = {"a norm of the UNet": torch.inf, "the text encoder": 1e38}.get(place, torch.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    for flags in [{}, {"quantization": "none"}, {"quantization": "nf4"}][: 1 if kind == "scales" else 3]:
        sentence = refusal(train, kind, pretrained_model_name_or_path=base, quantized_cache_dir="none", **flags)
        assert f"{path}: the weights hold NaN or infinity in" in sentence and ending in sentence
    assert not (tmp_path / "out" / RESULTS[kind]).exists()


def test_directions_below_rounding_are_refused_for_a_lora_as_well(train):
    assert "--perturbation_scale 1e-12 is too small for float32" in refusal(train, "lora", perturbation_scale=1e-12)
    assert "give at least 0.01" in refusal(train, "lora", perturbation_scale=1e-3, mixed_precision="bf16")


@pytest.fixture(scope="module")
def learned_scales(tiny, tmp_path_factory):
    """A file of scales: where it is, what it says of itself, its tensors."""
    folder = tmp_path_factory.mktemp("scales")
    flags = {
        "--pretrained_model_name_or_path": tiny / "base",
        "--instance_data_dir": tiny / "pictures",
        "--subject_name": "star",
        "--max_train_steps": 2,
        "--report_to": "none",
        "--output_dir": folder,
    }
    scales_script.main(scales_script.parse_args(as_arguments(flags)))
    path = folder / tuneqdm.SCALES_FILE
    with safe_open(path, framework="pt") as file:
        return path, json.loads(file.metadata()[tuneqdm.ABOUT]), load_file(path)


def a_unet(tiny):
    return UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet")


def tuneqdm_pipeline_of(tiny, **more):
    return tuneqdm.TuneQDMPipeline.from_pretrained(tiny / "base", **more)


def test_refused_scales_leave_the_model_as_it_was(tiny, learned_scales, tmp_path):
    path, about, changes = learned_scales
    wrong = tmp_path / tuneqdm.SCALES_FILE
    other = about | {"base_sha256": "0" * 64, "base_sketch": [value + 1 for value in about["base_sketch"]]}
    save_file(changes, wrong, metadata={tuneqdm.ABOUT: json.dumps(other)})
    pipeline = tuneqdm_pipeline_of(tiny)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    with pytest.raises(ValueError, match="was trained on another base"):
        pipeline.load_scales(wrong)
    after = pipeline.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    pipeline.load_scales(path)
    assert pipeline.scale_config.bits == 8


LIES = [
    *({"bits": x} for x in (16, 0, True, "8", 8.0, None, 10**400)),
    *({"calibration": x} for x in ("", "max", None, ["mse"])),
    *({"scale_sets": x} for x in (0, -1, 10**400, 1.5, True, 1001)),
    *({"scale_intervals": x} for x in ([], [[5, 2]], [[0, 5], [3, 9]], [[0, 1, 2]], [[0, True]], "0-5", [[-1, 5]])),
    {"scale_intervals": [[0, 10**400]]},
    {"scale_intervals": [[0, 1001]]},
    {"scale_intervals": [[0, 5]], "scale_sets": 2},
    *({"train_input_scales": x} for x in (0, "no", None)),
    *({"num_train_timesteps": x} for x in (0, 10**7, "1000", 10**400)),
    *({"base_model": x} for x in (None, 3, "x" * 2000)),
    *({"base_sha256": x} for x in ("", None, "zz", "0" * 63)),
    *({"base_sketch": x} for x in (None, "", [10**400], [float("nan")], ["1"], {}, [True])),
    {"more": 1},
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: str(lie)[:50])
def test_scales_that_lie_about_themselves(learned_scales, lie, tmp_path):
    _, about, changes = learned_scales
    save_file(changes, tmp_path / "scales.safetensors", metadata={tuneqdm.ABOUT: json.dumps(about | lie)})
    with pytest.raises(ValueError, match="make no sense|cannot be read") as caught:
        tuneqdm.read_scales(tmp_path / "scales.safetensors")
    assert len(str(caught.value)) < 400


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@QUICK
@given(st.dictionaries(st.sampled_from([*tuneqdm.SCHEMA, "x"]), ANY, max_size=3) | ANY)
def test_any_metadata_of_scales(learned_scales, lie):
    content = learned_scales[1] | lie if isinstance(lie, dict) else lie
    with contextlib.suppress(ValueError):
        assert isinstance(tuneqdm.check_config(json.dumps(content)), tuneqdm.ScaleConfig)


@pytest.mark.parametrize("about", ["", "{}", "[]", "null", '"x"', "[" * 10**5, "1" * 5000])
def test_metadata_of_scales_that_are_no_record(learned_scales, about, tmp_path):
    save_file(learned_scales[2], tmp_path / "scales.safetensors", metadata={tuneqdm.ABOUT: about})
    with pytest.raises(ValueError, match="cannot be read"):
        tuneqdm.read_scales(tmp_path / "scales.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(torch.int32),
        lambda x: x.bool(),
        lambda x: x.to(torch.complex64),
        lambda x: torch.full_like(x, 1e6),
        lambda x: torch.full_like(x, torch.nan),
    ],
    ids=["int", "bool", "complex", "huge", "nan"],
)
def test_scales_that_are_no_scales(tiny, learned_scales, change, tmp_path):
    _, about, changes = learned_scales
    changes = {name: change(value) for name, value in changes.items()}
    save_file(changes, tmp_path / tuneqdm.SCALES_FILE, metadata={tuneqdm.ABOUT: json.dumps(about)})
    pipeline = tuneqdm_pipeline_of(tiny)
    with pytest.raises(ValueError, match="is damaged|holds NaN or infinity, or changes beyond 1000"):
        pipeline.load_scales(tmp_path)
    assert pipeline._quantized is None


def test_an_entry_of_the_cache_under_anothers_name_is_not_taken(tmp_path):
    def write(value):
        return lambda folder: save_file({"x": torch.full((2,), value)}, folder / "x.safetensors")

    expected = {"x": ((2,), torch.float32)}
    for name, value in (("one", 1.0), ("two", 2.0)):
        assert weight_cache.provide(tmp_path / name, write(value), expected)
    shutil.rmtree(tmp_path / "two")
    (tmp_path / "one").rename(tmp_path / "two")
    assert weight_cache.find_damage(tmp_path / "two", expected) == "it is another's"
    assert weight_cache.provide(tmp_path / "two", write(2.0), expected)
    assert dict(weight_cache.read_shards(tmp_path / "two"))["x"][0] == 2


def test_a_base_replaced_at_equal_size_and_time_is_another(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(10**6))
    key, facts = weight_cache.source_key([path]), path.stat()
    content = bytearray(10**6)
    content[70_001] = 1
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.stat().st_mtime_ns == facts.st_mtime_ns and weight_cache.source_key([path]) != key


# =====================================================================================================
# Tracebacks and wrong sentences
# =====================================================================================================


@pytest.mark.parametrize("kind", KINDS)
def test_half_characters_and_values_that_are_none(words, capsys, kind):
    script, half = SCRIPTS[kind], "a \udc80 star"
    names = ["validation_prompt", "hub_model_id", "output_dir"]
    names += ["placeholder_token", "initializer_token"] if kind == "word" else ["subject_name", "instance_prompt"]
    names += [] if kind == "word" else ["class_prompt"]
    for name in names:
        assert refusal(script.parse_args, words(kind, **{name: half})) == "2"
        said = capsys.readouterr().err
        assert f"--{name} has '\\udc80' in it, which is half of a character" in said and said.count("\n") == 1
    assert refusal(script.parse_args, [*words(kind), "--validation_prompt=--"]) == "2"
    assert "--validation_prompt=-- gives no value" in capsys.readouterr().err


def test_half_characters_in_lists(capsys):
    words = ["--pretrained_model_name_or_path=x", "--class_word=star", "--draw_only", "--results", "a=b", "b=\udc80"]
    assert refusal(evaluation.parse_args, words) == "2"
    assert "--results has '\\udc80' in it, which is half of a character" in capsys.readouterr().err


def test_onednn_without_memory_is_no_fault_of_the_program():
    error = RuntimeError("could not create a primitive")
    assert errors.is_outside(error) and errors.reason(error) == "out of memory: could not create a primitive"


NASTY = [
    'a "quoted" star',
    "a\n# heading\n```python\nimport os\n```",
    "x'); import os; os.system('id') #",
    "---\nlicense: mit\n---",
    "a | b `code` <script> [link](http://evil) \\",
]


@pytest.mark.parametrize("name", NASTY, ids=ascii)
@pytest.mark.parametrize("kind", KINDS)
def test_names_stay_names_in_a_model_card(finished, tmp_path, kind, name):
    """What a reader copies and runs is what was meant, whatever a name has in it."""
    script = SCRIPTS[kind]
    folder = finished(kind)
    config = json.loads((folder / script.PUBLICATION.config_name).read_text())
    config["placeholder_token"], config["base_model"] = name, name
    config["settings"] |= {"validation_prompt": None, "instance_prompt": name, "initializer_token": name}
    config["settings"] |= {"with_prior_preservation": True, "class_prompt": name, "num_class_images": 1}
    config["scores"], config["base_license"] = {name: name}, {"license": "other", "license_name": name}
    (tmp_path / "a").mkdir()
    for local in (True, False):
        config["base_model_is_local"] = local
        hub.write_model_card(tmp_path / "a", config, script.PUBLICATION)
        text = (tmp_path / "a" / "README.md").read_text()
        card = ModelCard(text)
        assert card.data.instance_prompt == hub.one_line(name)
        body = text.split("\n---\n", 1)[1]
        programs = [part.split("```")[0] for part in body.split("```python\n")[1:]]
        for program in programs:
            compile(program, "README.md", "exec")
            literals = [node.value for node in ast_strings(program)]
            assert f"path/to/{name}" in literals if local else name in literals
        assert "\n# heading" not in body and "\nlicense: mit" not in body
        plain = re.sub(r"(`+) .*? \1|`[^`]*`", "", "".join(body.split("```")[::2]))  # without blocks and code spans
        assert not re.search(r"(?<!\\)\]\(http://evil", plain) and "<script" not in plain.replace(r"\<", "")
        rows = [line.replace(r"\|", "") for line in body.split("\n") if line.startswith("|")]
        assert {row.count("|") for row in rows} == {3}


def ast_strings(program):
    import ast

    tree = ast.parse(program)
    return [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a finished run of a trainer."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            pictures = "--train_data_dir" if kind == "word" else "--instance_data_dir"
            flags = {"--pretrained_model_name_or_path": tiny / "base", pictures: tiny / "pictures"}
            more = {"--placeholder_token": "<my-toy>", "--initializer_token": "star", "--num_validation_samples": 0}
            flags |= more if kind == "word" else {"--subject_name": "star"}
            flags |= {"--max_train_steps": 2, "--report_to": "none", "--output_dir": made[kind]}
            flags |= {"--rank": 2, "--lora_alpha": 8, "--output_kohya_format": True} if kind == "lora" else {}
            SCRIPTS[kind].main(SCRIPTS[kind].parse_args(as_arguments(flags)))
        return made[kind]

    return of


PRIOR = {"with_prior_preservation": True, "class_prompt": "a star", "num_class_images": 2, "num_inference_steps": 1}


def test_a_class_folder_that_is_complete_may_be_read_only(train, tmp_path, monkeypatch):
    folder = tmp_path / "class"
    build_pictures(folder)
    monkeypatch.setattr(dreambooth, "check_writable", lambda *_: pytest.fail("nothing is written there"))
    train("scales", class_data_dir=folder, **PRIOR)


def test_faults_of_class_images_are_told_as_theirs(train, tmp_path, caplog):
    folder = tmp_path / "class"
    build_pictures(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "b.png").write_bytes(b"no picture")
    sentence = refusal(train, "scales", class_data_dir=folder, **PRIOR)
    assert "--class_data_dir" in sentence and "has 1 images that can be read" in sentence
    assert "Skipped a.png of the class, which cannot be read" in caplog.text


def test_runs_that_fill_one_class_folder_at_once_draw_each_image_once(words, tmp_path, monkeypatch):
    folder, drawn = tmp_path / "class", []
    folder.mkdir()
    args = scales_script.parse_args(words("scales", resolution=16, class_data_dir=folder, **PRIOR))

    def draw(args, folder, missing, *_):
        for number in range(missing):
            drawn.append(number)
            Image.new("RGB", (16, 16)).save(folder / f"class-{number:06d}.png")

    monkeypatch.setattr(dreambooth, "draw_class", draw)
    runs = [threading.Thread(target=dreambooth.read_class, args=(args, None, None, None)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert drawn == [0, 1] and len(list(folder.iterdir())) == 2


def test_a_lora_is_the_same_bytes_and_of_full_strength_for_all(finished, tiny, tmp_path):
    """Metadata of one entry have one order, and alpha is in the matrices."""
    folder = finished("lora")
    for name, wanted in ((lora.WEIGHTS_FILE, 1), (lora.KOHYA_FILE, 1)):
        with safe_open(folder / name, framework="pt") as file:
            assert len(file.metadata()) == wanted
            if name == lora.WEIGHTS_FILE:
                (about,) = map(json.loads, file.metadata().values())
                assert about["unet.lora_alpha"] == about["unet.r"] == 2
            else:
                alphas = {float(file.get_tensor(key)) for key in file.keys() if key.endswith(".alpha")}
                assert alphas == {2.0}


# =====================================================================================================
# Cases of others
# =====================================================================================================


@pytest.fixture
def sd(tiny):
    return zoodip_pipeline.ZOODiPPipeline.from_pretrained(tiny / "base")


def states(pipeline, prompt):
    return pipeline.encode_prompt(prompt, "cpu", 1, False)[0]


def test_a_word_in_capitals_is_all_its_vectors(sd, tmp_path):
    save_file({"<My-Toy>": torch.randn(3, 16)}, tmp_path / "toy.safetensors")
    sd.load_learned_embeds(tmp_path / "toy.safetensors")
    names = "a <My-Toy> <My-Toy>_1 <My-Toy>_2 here"
    assert sd.maybe_convert_prompt("a <My-Toy> here", sd.tokenizer) == names
    expected = states(sd, "a <my-toy> here")
    assert not torch.equal(expected, states(sd, "a here"))
    for prompt in ("a <My-Toy> here", "a <my-toy> here", "a <MY-TOY> here"):
        assert torch.equal(states(sd, prompt), expected), prompt
    save_file({"<my-toy>": torch.randn(1, 16)}, tmp_path / "again.safetensors")
    with pytest.raises(ValueError, match="already knows the name"):
        sd.load_learned_embeds(tmp_path / "again.safetensors")


def test_what_was_loaded_is_said_and_named_by_its_file(sd, tmp_path, caplog):
    save_file({"emb_params": torch.randn(2, 16)}, tmp_path / "EasyX.safetensors")
    save_file({"emb_params": torch.randn(1, 16)}, tmp_path / "other.safetensors")
    base = states(sd, "a photo of EasyX")
    sd.load_learned_embeds([tmp_path / "EasyX.safetensors", tmp_path / "other.safetensors"])
    assert not torch.equal(states(sd, "a photo of EasyX"), base) and [*sd.concepts] == ["EasyX", "other"]
    line = next(record.getMessage() for record in caplog.records if "EasyX" in record.getMessage())
    assert "'EasyX'" in line and "2 vector" in line and "EasyX.safetensors" in line


def test_a_word_of_sdxl_has_the_name_that_its_file_says(tmp_path):
    build_tiny_xl_base(tmp_path / "base")
    halves = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)}
    save_file(halves, tmp_path / "learned_embeds.safetensors", metadata={"placeholder_token": "<My-Toy>"})
    pipeline = zoodip_xl_pipeline.ZOODiPXLPipeline.from_pretrained(tmp_path / "base")
    pipeline.load_learned_embeds(tmp_path / "learned_embeds.safetensors")
    assert [*pipeline.concepts] == ["<My-Toy>"]
    found = [pipeline.encode_prompt(f"a {word}")[0] for word in ("<My-Toy>", "<my-toy>", "<my-toy> <my-toy>_1")]
    assert torch.equal(found[0], found[1])
    image = AutoPipelineForImage2Image.from_pipe(pipeline)
    assert type(image).__name__ == "StableDiffusionXLImg2ImgPipeline" and image.unet is pipeline.unet


def test_a_word_is_learned_under_the_name_that_the_tokenizer_has(train, tiny, tmp_path):
    one = train("word", placeholder_token="<My-Toy>", num_vectors=2, output_dir=tmp_path / "one")
    two = train("word", placeholder_token="<my-toy>", num_vectors=2, output_dir=tmp_path / "two")
    assert (one / RESULTS["word"]).read_bytes() == (two / RESULTS["word"]).read_bytes()
    assert load_file(one / RESULTS["word"]).keys() == {"<my-toy>"}
    placeholder = prompts.Placeholder("<my-toy>", 2, 0, 0)
    assert placeholder.expand("a <My-Toy>") == "a <my-toy> <my-toy>_1" and placeholder.is_in("A <MY-TOY>")


def test_a_word_longer_than_names_of_files(train):
    """All is learned and written; the files that are named after it are named after its beginning."""
    out = train("word", placeholder_token=f"<{'ä' * 300}>")
    assert load_file(out / RESULTS["word"]).keys() == {f"<{'ä' * 300}>"}
    assert (out / f"{'ä' * 100}.safetensors").is_file()


@pytest.mark.parametrize("word", ["'<my-dog>'", "‘<my-dog>’", "“<my-dog>”", '"<my-dog>"'])
def test_quotes_that_stayed_around_a_word(train, words, capsys, word):
    assert "give '<my-dog>'." in refusal(train, "word", placeholder_token=word)
    for kind in ("scales", "lora"):
        refusal(SCRIPTS[kind].parse_args, words(kind, subject_name=word))
        assert "--subject_name" in (said := capsys.readouterr().err) and "give '<my-dog>'." in said


def profile_of(primaries):
    """An ICC profile with other colorants than sRGB: its red and green are exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data = data.replace(b"rXYZ", b"tEMP").replace(b"gXYZ", b"rXYZ").replace(b"tEMP", b"gXYZ")
    return bytes(data.replace("sRGB".encode("utf-16-be"), "Test".encode("utf-16-be")).replace(b"sRGB", b"Test"))


def test_colours_are_those_that_a_viewer_shows():
    image = Image.new("RGB", (4, 4), (60, 180, 60))
    assert images.to_rgb(image).getpixel((0, 0)) == (60, 180, 60)
    image.info["icc_profile"] = profile_of("exchanged")
    shown = np.array(images.to_rgb(image).getpixel((0, 0)))
    assert np.abs(shown - (180, 60, 60)).max() <= 3
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert images.to_rgb(image).getpixel((0, 0)) == (60, 180, 60)
    image.info["icc_profile"] = b"damaged"
    assert images.to_rgb(image).getpixel((0, 0)) == (60, 180, 60)
    translucent = Image.new("RGBA", (4, 4), (60, 180, 60, 0))
    translucent.info["icc_profile"] = profile_of("exchanged")
    assert images.to_rgb(translucent).getpixel((0, 0)) == (255, 255, 255)


def test_portraits_are_cropped_by_dreambooth_and_warned_about_by_the_flagship(tmp_path, words, caplog):
    folder = tmp_path / "portraits"
    folder.mkdir()
    y, x = np.mgrid[:600, :300]
    circle = np.where((x - 150) ** 2 + (y - 300) ** 2 < 100**2, 255, 0).astype(np.uint8)
    Image.fromarray(circle).convert("RGB").save(folder / "a.png")
    for kind in ("scales", "lora"):
        args = SCRIPTS[kind].parse_args(words(kind, instance_data_dir=folder, resolution=64))
        (picture,) = dreambooth.read_instances(args)
        lit = picture.pixels[0] > 127
        assert abs(int(lit.any(0).sum()) - int(lit.any(1).sum())) <= 1
    for crops in (True, False):
        assert "squeezed" not in caplog.text
        images.warn_about_squeezed(images.read_folder(folder, 64, crops))
    assert "squeezed" in caplog.text and "a.png; --center_crop" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_system_without_permissions_is_written_to(train, tmp_path, monkeypatch, kind):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    out = train(kind, quantized_cache_dir=tmp_path / "cache")
    assert (out / RESULTS[kind]).is_file() and list(out.glob("checkpoint-*"))


def test_the_start_renames_as_the_run_will(train, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.os, "rename", refuse)
    assert "--output_dir" in (sentence := refusal(train, "word")) and "Operation not supported" in sentence


def test_a_folder_that_is_probed_stays_empty(tmp_path):
    files.check_writable("--output_dir", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", launch.ENGINES)
def test_engines_that_shard_models_are_refused(train, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert launch.ENGINES[name] in refusal(train, "scales")


def test_processes_that_do_not_know_each_other_are_refused(train, monkeypatch):
    monkeypatch.setattr(launch, "Accelerator", lambda **_: Alone())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "the launch started 2 processes, and each of them is alone" in refusal(train, "word")


class Alone:
    num_processes, device = 1, torch.device("cpu")


def test_the_precision_of_accelerates_launch_is_taken(words, monkeypatch):
    for wanted, asked, found in (
        ("bf16", None, "bf16"),
        ("bf16", "no", "no"),
        ("no", None, None),
        ("fp16", None, None),
    ):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", wanted)
        args = zoodip.parse_args(words("word", mixed_precision=asked))
        launch.take_precision(args, torch.device("cpu"))
        assert args.mixed_precision == found


def test_what_accelerates_launch_asks_for_is_said_or_refused(train, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    launch.take_precision(SimpleNamespace(mixed_precision="no"), torch.device("cpu"))
    assert "dynamo_backend inductor is not taken" in caplog.text
    monkeypatch.setattr(launch, "Accelerator", lambda **_: {}["nothing that accelerate knows"])
    assert "accelerate cannot start as its launch" in refusal(train, "word")


def test_image_to_image_is_known_of_our_pipelines(sd, tiny, learned_scales):
    image = AutoPipelineForImage2Image.from_pipe(sd)
    assert type(image).__name__ == "StableDiffusionImg2ImgPipeline" and image.unet is sd.unet
    image = AutoPipelineForImage2Image.from_pipe(tuneqdm_pipeline_of(tiny, tuneqdm_scales=learned_scales[0]))
    assert hasattr(image.unet, "tuneqdm")


def test_a_lora_on_tuned_scales_is_one_sentence(tiny, finished, learned_scales):
    pipeline = tuneqdm_pipeline_of(tiny, tuneqdm_scales=learned_scales[0])
    with pytest.raises(ValueError, match="a UNet with tuned scales takes no LoRA"):
        pipeline.load_lora_weights(finished("lora"), weight_name=lora.WEIGHTS_FILE)
    with pytest.raises(ValueError, match="a UNet with tuned scales has no weights that could be fused"):
        pipeline.fuse_qkv_projections()
    pipeline = tuneqdm_pipeline_of(tiny)
    pipeline.load_lora_weights(finished("lora"), weight_name=lora.WEIGHTS_FILE)
    with pytest.raises(ValueError, match="into a UNet with a LoRA"):
        pipeline.load_scales(learned_scales[0])


@pytest.mark.parametrize("split", [False, True])
def test_a_data_set_that_was_saved_to_disk(tmp_path, split):
    rows = {"image": [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(3)], "text": ["a {}"] * 3}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved = datasets.DatasetDict({"train": saved}) if split else saved
    saved.save_to_disk(tmp_path / "saved")
    pictures = read_dataset(str(tmp_path / "saved"), None, "image", "text", 16, False)
    assert [picture.caption for picture in pictures] == ["a {}"] * 3


def test_length_counts_where_something_depends_on_it(train):
    train("lora", bp_view="window", low_resolution=8, checkpointing_steps=1)
    train("lora", bp_view="window", low_resolution=8, max_train_steps=4, resume_from_checkpoint="latest")


def test_length_counts_for_a_ramp(train):
    train("lora", checkpointing_steps=1)
    assert "max_train_steps" in refusal(train, "lora", max_train_steps=4, resume_from_checkpoint="latest")


def test_whole_weights_are_not_asked_for_again(tiny, tmp_path, monkeypatch):
    snapshot = shutil.copytree(tiny / "base", tmp_path / ("0" * 40))
    asked = []
    monkeypatch.setattr(base_model, "snapshot_download", lambda *_, **__: asked.append(1) or str(snapshot))
    base = base_model.open_base(base_model.ModelSource("someone/base"))
    base_model.check_weights(base)
    assert len(asked) == 1


def test_layers_that_a_model_does_not_use_are_left_alone(train, tiny, tmp_path):
    """GLIGEN's UNet has attention for boxes, which nobody gives here."""
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    shutil.rmtree(base / "unet")
    tiny_unet(cross_attention_dim=16, attention_type="gated").save_pretrained(base / "unet")
    out = train("lora", pretrained_model_name_or_path=base, bp_timestep_midpoint=100, bp_progress_midpoint=100)
    assert all(value.isfinite().all() for value in load_file(out / RESULTS["lora"]).values())


def test_another_rank_is_waited_for_as_long_as_is_said(words, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "Accelerator", lambda **options: started.append(options) or Alone())
    args = zoodip.parse_args(words("word"))
    for value, seconds in ((None, 600), ("7", 7)):
        if value:
            monkeypatch.setenv("ZOODIP_GROUP_TIMEOUT", value)
        launch.start(args)
        assert [each.timeout.total_seconds() for each in started[-1]["kwargs_handlers"]] == [seconds]
    for value in ("abc", "nan", "-1", "inf", ""):
        monkeypatch.setenv("ZOODIP_GROUP_TIMEOUT", value)
        with pytest.raises(errors.InputError, match="ZOODIP_GROUP_TIMEOUT"):
            launch.start(args)
    assert errors.is_outside(RuntimeError("[../gloo/unbound_buffer.cc:81] Timed out waiting 7000ms for recv"))
