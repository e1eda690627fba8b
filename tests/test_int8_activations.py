"""`--openvino_precision int8`: activations in INT8, calibrated on the pictures, and what is learned with them."""

import re
import shutil
import sys

import pytest
import torch
from conftest import as_arguments
from safetensors.torch import load_file

import train_zoodip_textual_inversion as zoodip
from personalization.data import examples, prompts
from personalization.errors import InputError
from personalization.methods import gauss_newton
from personalization.models import openvino_unet


INT8 = {"optimizer": "gauss_newton", "unet_backend": "openvino", "openvino_precision": "int8"}
SHORT = {"gn_subspace_dimension": 8, "num_validation_samples": 0, "flip_probability": 0, **INT8}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What is exported and quantized once; that takes a minute here."""
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def few_passes(monkeypatch):
    """Calibration that takes seconds."""
    monkeypatch.setattr(zoodip, "CALIBRATION_PASSES", 3)


def learned(out):
    return load_file(out / "learned_embeds.safetensors")["<my-toy>"]


def judge(basics, theta, count=18):
    """Held-out loss of θ `[k, d]` (None: its start) in the unquantized float32 model."""
    flags = basics | {"--quantization": "none", "--num_validation_samples": count, "--flip_probability": 0}
    args = zoodip.parse_args(as_arguments(flags))
    base, placeholder, compute = zoodip.resolve_settings(args, torch.device("cpu"))
    pictures = zoodip.read_pictures(args)
    task = zoodip.prepare(
        args, base, placeholder, compute, pictures, prompts.build_prompts(pictures, placeholder, base)
    )
    with torch.inference_mode():
        point = task.initial[None] if theta is None else theta
        return zoodip.held_out_loss(task.model, point, zoodip.draw_held_out(task))


def test_it_learns_and_resumes_to_the_last_bit(train, basics, cache, few_passes, monkeypatch):
    """The loss in the float32 model falls; the second and third run find graph and activations in the cache."""
    flags = {**SHORT, "quantized_cache_dir": cache, "max_train_steps": 14}
    whole = train(output_dir=train.folder / "whole", **flags)
    assert judge(basics, learned(whole)) < 0.85 * judge(basics, None)
    assert len(list(cache.glob("unet-openvino-int8-*/unet.bin"))) == 1
    for name in ("quantize_activations", "export_openvino"):
        monkeypatch.setattr(openvino_unet, name, lambda *_: pytest.fail("made again"))
    resumed = {**flags, "output_dir": train.folder / "resumed", "checkpointing_steps": 5}
    train(**resumed | {"max_train_steps": 5})
    out = train(**resumed, resume_from_checkpoint="latest")
    assert torch.equal(learned(whole), learned(out))


@pytest.mark.parametrize("change", ["picture", "caption", "timesteps", "seed"])
def test_another_source_is_another_calibration(train, subject, cache, few_passes, monkeypatch, tmp_path, change):
    """Only the name in the cache is looked at: nothing is quantized."""
    kept = []

    def note(path, *_):
        kept.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(openvino_unet, "kept_graph", note)
    folder = shutil.copytree(subject, tmp_path / "pictures")
    flags = {**SHORT, "quantized_cache_dir": cache, "train_data_dir": folder}
    for more in ({}, {"gn_ridge": 3, "max_train_steps": 7}):  # these do not count
        with pytest.raises(KeyboardInterrupt):
            train(**flags, **more)
    if change == "picture":
        names = sorted(folder.glob("*.png"))
        shutil.copy(names[1], names[0])
    elif change == "caption":
        metadata = folder / "metadata.jsonl"
        metadata.write_text(re.sub(r"\ba photo\b", "a picture", metadata.read_text()))
    more = {"timesteps": {"puts_max_timestep": 800}, "seed": {"seed": 1}}.get(change, {})
    with pytest.raises(KeyboardInterrupt):
        train(**flags, **more)
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("directions", [8, 3, 1])
def test_the_calibration_is_what_training_asks(basics, few_passes, directions):
    """Every pass is θ and candidates a step h away, on an example and a timestep of its own; never more than fit."""
    flags = SHORT | {"gn_subspace_dimension": directions}
    args = zoodip.parse_args(as_arguments(basics | {f"--{name}": value for name, value in flags.items()}))
    base, placeholder, compute = zoodip.resolve_settings(args, torch.device("cpu"))
    pictures = zoodip.read_pictures(args)
    captions = prompts.build_prompts(pictures, placeholder, base)
    concept, _ = examples.load_concept(pictures, captions, base, 0.0, compute)
    text_encoder, unet, *_ = zoodip.load_networks(args, base, compute)
    assert unet is None
    ids = concept.prompt_ids
    model, start = zoodip.assemble_model(args, base, placeholder, ids, text_encoder, None, compute)
    task = zoodip.Task(args, base, placeholder, concept, model, start, zoodip.choose_sampling(args), {})
    found = gauss_newton.choose_directions(args, base, placeholder, ids)
    calibration = zoodip.calibrate(task, zoodip.start_learner(args, start, found).rule, pictures)
    candidates = []
    write = zoodip.PromptRows.write
    text_encoder.get_input_embeddings().write = lambda rows: (
        candidates.append(rows.clone()),
        write(text_encoder.get_input_embeddings(), rows),
    )
    inputs = calibration.draw()
    assert len(inputs) == len(candidates) == 3 and len({int(timesteps[0]) for _, timesteps, _ in inputs}) == 3
    for (sample, timesteps, conditioning), rows in zip(inputs, candidates):
        assert len(sample) == len(timesteps) == len(conditioning) == zoodip.candidates_per_pass(args) <= 9
        assert sample.dtype == conditioning.dtype == torch.float32
        assert timesteps.unique().numel() == 1 and 500 <= timesteps[0] < 900
        assert torch.equal(rows[0, 0], start)
        lengths = (rows[1:] - rows[0]).flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, args.perturbation_scale), rtol=1e-3, atol=0)
    again = calibration.draw()
    assert all(torch.equal(x, y) for one, two in zip(inputs, again) for x, y in zip(one, two))


def test_all_lines_of_a_run_are_its_own(launch, basics, cache):
    """Neither NNCF's log nor its progress bars stand between the lines of the script."""
    flags = basics | {f"--{name}": value for name, value in SHORT.items()} | {"--max_train_steps": 1, "--seed": 5}
    done = launch(
        *as_arguments(flags | {"--quantized_cache_dir": cache, "--validation_prompt": "a {}"}),
        *("--num_inference_steps", "1", "--num_validation_images", "1"),
        launcher=("--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
    )
    lines = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]
    assert len(done.stdout.splitlines()) == 3  # how to draw with the word
    assert [line for line in lines if "Quantizing the UNet's activations once" in line]
    assert not [line for line in lines if not re.match(r"\d\d:\d\d:\d\d - (INFO|WARNING) - ", line)]


@pytest.mark.parametrize("without", ["optimizer", "unet_backend"])
def test_it_belongs_to_gauss_newton_and_openvino(basics, capsys, without):
    flags = {f"--{name}": value for name, value in INT8.items() if name != without}
    with pytest.raises(SystemExit) as stopped:
        zoodip.parse_args(as_arguments(basics | flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "--openvino_precision int8 belongs to --unet_backend openvino --optimizer gauss_newton" in error


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({}, "pip install nncf"),
        ({"perturbation_scale": 1e-3}, "too small for int8 activations.* or --openvino_precision float"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(basics, monkeypatch, flags, sentence):
    pytest.importorskip("openvino")
    if not flags:
        monkeypatch.setitem(sys.modules, "nncf", None)
    args = zoodip.parse_args(as_arguments(basics | {f"--{name}": value for name, value in {**INT8, **flags}.items()}))
    with pytest.raises(InputError, match=sentence):
        zoodip.resolve_settings(args, torch.device("cpu"))
