"""Whole TuneQDM runs: outputs, resuming, class images, the pipeline and the Hub, and what a user can get wrong."""

import ast
import json
import shutil
import signal
import sys
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils._http
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import REPO, _run, as_arguments
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from hub_server import TOKEN, HubServer, Repo
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny_base import build_pictures

import train_tuneqdm_dreambooth as script
import tuneqdm_pipeline as tuneqdm
from personalization import flags
from personalization.data import examples, images
from personalization.errors import DivergedError, InputError, PushError
from personalization.files import write_json
from personalization.models import base_model


SCRIPT = REPO / "train_tuneqdm_dreambooth.py"
SCALES, CONFIG = tuneqdm.SCALES_FILE, tuneqdm.CONFIG_FILE


@pytest.fixture
def basics(tiny, tmp_path):
    """The shortest valid argument list, as a dict of flags that a test may change."""
    return {
        "--pretrained_model_name_or_path": str(tiny / "base"),
        "--instance_data_dir": str(tiny / "pictures"),
        "--subject_name": "star",
        "--output_dir": str(tmp_path / "out"),
        "--max_train_steps": "3",
        "--report_to": "none",
    }


@pytest.fixture
def train(basics):
    """Trains in this process and returns the output directory."""

    def run(**flags):
        chosen = basics | {f"--{name}": value for name, value in flags.items()}
        script.main(script.parse_args(as_arguments(chosen)))
        return Path(chosen["--output_dir"])

    return run


def read_config(folder):
    return json.loads((folder / CONFIG).read_text())


def change_scales(folder, edit=lambda changes: changes, **about):
    """Writes a folder's scales anew: the tensors changed by a function, what they belong to by keywords."""
    path = folder / SCALES
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["tuneqdm"])
    path.write_bytes(save(edit(load_file(path)), metadata={"tuneqdm": json.dumps(said | about)}))


def launch(flags, expect=0, launcher=("-m", "accelerate.commands.launch"), env=None):
    return _run([sys.executable, *launcher, str(SCRIPT), *as_arguments(flags)], expect, env, 300)


def from_pretrained(base, scales, **more):
    code = {"custom_pipeline": f"{REPO}/tuneqdm_pipeline.py", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(base, **code, tuneqdm_scales=scales, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ------------------------------------------------------------------------------------------------------------ runs


def test_launch_writes_everything(basics):
    basics |= {
        "--validation_prompt": "a photo of {} on the beach",
        "--validation_steps": 2,
        "--report_to": "tensorboard",
    }
    basics |= {"--num_validation_images": 2, "--num_inference_steps": 2, "--checkpointing_steps": 2, "--scale_sets": 2}
    basics |= {"--train_input_scales": True, "--save_half": True, "--gradient_checkpointing": True, "--bits": 4}
    output = launch(basics).stderr
    out = Path(basics["--output_dir"])
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and "logs" not in p.parts}
    assert written == {
        ".lock",
        SCALES,
        CONFIG,
        "README.md",
        "loss_curve.png",
        "samples/image_0.png",
        "samples/image_1.png",
        *(f"validation/step-{step:06d}.png" for step in (0, 2, 3)),
        *(f"checkpoint-2/{part}" for part in ("state.pt", "settings.json", "generators_0.pt", "manifest.json")),
    }
    assert "unet:" in output and "of parameters quantized" in output and "Traceback" not in output
    config, scales = read_config(out), load_file(out / SCALES)
    unet = UNet2DConditionModel.from_pretrained(basics["--pretrained_model_name_or_path"], subfolder="unet")
    shapes = tuneqdm.change_shapes(unet, 2, True)
    assert {name: tuple(scale.shape) for name, scale in scales.items()} == shapes
    assert all(scale.dtype == torch.float16 for scale in scales.values())
    assert config["figures"]["trained_scales"] == sum(scale.numel() for scale in scales.values())
    tuneqdm.quantize_unet(unet, 4, "minmax")
    assert config["scales"] == {
        "bits": 4,
        "calibration": "minmax",
        "scale_sets": 2,
        "scale_intervals": None,
        "train_input_scales": True,
        "num_train_timesteps": 1000,
        "base_model": "base",
        "base_sha256": tuneqdm.fingerprint(unet),
        "base_sketch": tuneqdm.sketch(unet),
    }
    card = (out / "README.md").read_text()
    assert "tuneqdm_scales" in card and "quantized to 4 bits" in card and '"a photo of star on the beach"' in card


RESUME = {"--max_train_steps": 12, "--checkpointing_steps": 4, "--scale_sets": 2, "--train_batch_size": 2}
RESUME |= {"--gradient_accumulation_steps": 2, "--lr_scheduler": "cosine", "--train_input_scales": True}


def test_resumed_run_equals_the_uninterrupted_one(basics, tmp_path):
    """By `accelerate launch`: the second run starts from checkpoint-8, the one after it is lost half-written."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        launch(basics | RESUME | {"--output_dir": folder})
    (parts / SCALES).unlink()
    (parts / "checkpoint-12").rename(parts / ".tmp-checkpoint-12")
    again = basics | RESUME | {"--output_dir": parts, "--resume_from_checkpoint": "latest"}
    assert "checkpoint-8 at step 8" in launch(again).stderr
    assert (parts / SCALES).read_bytes() == (whole / SCALES).read_bytes()
    states = [torch.load(f / "checkpoint-12" / "state.pt", weights_only=True) for f in (whole, parts)]
    assert states[0]["history"] == states[1]["history"] and states[0]["changes"].keys() == states[1]["changes"].keys()
    moments = [state["optimizer"]["state"] for state in states]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


def test_a_stopped_run_goes_on_from_its_last_step(train, basics, monkeypatch):
    step, done = script.train_step, []

    def stopped_in_the_second(*args):
        done.append(None)
        if len(done) == 2:
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)  # real ones are sent in test_faults.py
        return step(*args)

    monkeypatch.setattr(script, "train_step", stopped_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert (Path(basics["--output_dir"]) / "checkpoint-2").is_dir()
    train(resume_from_checkpoint="latest")
    assert len(done) == 3


def test_other_settings_are_not_resumed(train):
    train(checkpointing_steps=1)
    with pytest.raises(InputError, match="belongs to other settings"):
        train(resume_from_checkpoint="latest", scale_sets=2)


def change_weights(base):
    """Other weights of the same shapes under the same name."""
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights, g = load_file(path), torch.Generator().manual_seed(0)
    weights = {name: w * (1 + 0.05 * torch.randn(w.shape, generator=g)) for name, w in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})


def test_a_run_is_not_resumed_on_other_weights(train, tiny, tmp_path):
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    train(checkpointing_steps=1, pretrained_model_name_or_path=base)
    change_weights(base)
    with pytest.raises(InputError, match="belongs to other settings: weights of the model"):
        train(resume_from_checkpoint="latest", pretrained_model_name_or_path=base)


def test_two_processes_stay_identical(basics, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "import torch, train_tuneqdm_dreambooth as script\n"
        "from personalization.runs import checkpoints\n"
        "original = checkpoints.save_checkpoint\n"
        "def dump(accelerator, output_dir, state, *rest):\n"
        "    torch.save(state.shared['changes'], f'{output_dir}/rank-{accelerator.process_index}.pt')\n"
        "    original(accelerator, output_dir, state, *rest)\n"
        "checkpoints.save_checkpoint = dump\n"
        "script.main(script.parse_args(sys.argv[1:]))\n"
    )
    flags = basics | {"--checkpointing_steps": 3}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(driver)]
    _run([*command, *as_arguments(flags)], 0, {"ACCELERATE_USE_CPU": "true"}, 300)
    first, second = (torch.load(tmp_path / "out" / f"rank-{r}.pt", weights_only=True) for r in (0, 1))
    assert any(change.any() for change in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [torch.load(tmp_path / "out" / "checkpoint-3" / f"generators_{r}.pt") for r in (0, 1)]
    assert not torch.equal(states[0]["data"], states[1]["data"])  # each drew its own examples


def test_validation_does_not_disturb_training(train, tmp_path):
    drawing = {"validation_prompt": "a photo of {}", "num_inference_steps": 1, "num_validation_images": 1}
    quiet, busy = (
        train(output_dir=tmp_path / "quiet"),
        train(output_dir=tmp_path / "busy", validation_steps=1, **drawing),
    )
    assert (quiet / SCALES).read_bytes() == (busy / SCALES).read_bytes()


def test_the_cache_changes_nothing_and_is_mapped(train, tmp_path):
    results = [train(output_dir=tmp_path / "a", quantized_cache_dir="none", bits=4)]
    for name in "bc":
        results.append(train(output_dir=tmp_path / name, quantized_cache_dir=tmp_path / "cache", bits=4))
    assert len({(folder / SCALES).read_bytes() for folder in results}) == 1
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.name.startswith("unet-tuneqdm4-minmax-float32-")
    train(output_dir=tmp_path / "d", quantized_cache_dir=tmp_path / "cache", bits=4, calibration="mse")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_nan_stops_and_keeps_the_last_good_scales(train, tmp_path):
    with pytest.raises(
        DivergedError, match=r"(the loss became|the changes of the scales went beyond) .* at step \d+: .*learning_rate"
    ):
        train(learning_rate=1e30, max_train_steps=40, logging_steps=1)
    assert all(scale.isfinite().all() for scale in load_file(tmp_path / "out" / SCALES).values())


def test_what_a_diverged_run_leaves_can_be_drawn_with(train, tiny):
    """In the folder of an older run of other bits: the file of scales says itself what it belongs to."""
    out = train()
    with pytest.raises(DivergedError):
        train(learning_rate=1e30, max_train_steps=40, logging_steps=1, bits=4, calibration="mse")
    assert read_config(out)["scales"]["bits"] == 8
    assert from_pretrained(tiny / "base", out).scale_config[:2] == (4, "mse")


def test_layers_that_the_model_does_not_use_do_not_stop_it(train, tiny, tmp_path):
    """`time_cond_proj_dim`, as in models distilled for guidance; nothing is given to that layer in training."""
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text()) | {"time_cond_proj_dim": 8}
    (base / "unet" / "config.json").write_text(json.dumps(config))
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet"))
    unet.save_pretrained(base / "unet")
    scales = load_file(train(pretrained_model_name_or_path=base) / SCALES)
    assert not scales["time_embedding.cond_proj.out"].any() and scales["conv_in.out"].any()


def test_prior_preservation_draws_missing_class_images_once(train, tmp_path, monkeypatch):
    folder = tmp_path / "class"
    flags = {"with_prior_preservation": True, "class_data_dir": folder, "class_prompt": "a photo of a star"}
    flags |= {"num_inference_steps": 1, "max_train_steps": 2, "checkpointing_steps": 1}
    out = train(num_class_images=2, **flags)
    drawn = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(drawn) == ["class-000000.png", "class-000001.png"] and len(set(drawn.values())) == 2
    config = read_config(out)
    assert config["figures"]["forward_passes"] == 2 * 2
    assert config["settings"]["class_data_dir"] == "class"  # of a local path only the name is published
    assert config["settings"]["instance_data_dir"] == "pictures"
    train(num_class_images=3, output_dir=tmp_path / "more", **flags)
    assert {name: (folder / name).read_bytes() for name in drawn} == drawn and len(list(folder.iterdir())) == 3
    monkeypatch.setattr(script.dreambooth.validation, "open_pipeline", lambda *_: pytest.fail("there are enough"))
    train(num_class_images=3, output_dir=tmp_path / "more", resume_from_checkpoint="latest", **flags)


def test_class_images_are_examples_of_their_own_prompt(basics, tmp_path, monkeypatch):
    """A batch is as many of the class as of the subject, and their loss is weighed."""
    folder = tmp_path / "class"
    build_pictures(folder)
    (folder / "metadata.jsonl").unlink()
    flags = basics | {"--with_prior_preservation": True, "--class_data_dir": folder, "--class_prompt": "a star"}
    flags |= {"--num_class_images": 2, "--train_batch_size": 3, "--prior_loss_weight": 0.25, "--max_train_steps": 1}
    seen = []

    def watched(errors, num_instances, weight):
        seen.append((len(errors), num_instances, weight))
        return errors.mean()

    rows = []
    original = script.draw_batch

    def drawn(*args):
        batch = original(*args)
        rows.append(batch.prompt_ids.tolist())
        return batch

    monkeypatch.setattr(script, "dreambooth_loss", watched)
    monkeypatch.setattr(script, "draw_batch", drawn)
    script.main(script.parse_args(as_arguments(flags)))
    assert seen == [(6, 3, 0.25)]
    assert set(rows[0][:3]) <= {0, 1, 2} and rows[0][3:] == [3, 3, 3]


def test_captions_and_prompts():
    pictures = [images.Picture(name, None, text) for name, text in (("a", "my {}"), ("b", None), ("c", "a dog"))]
    assert script.instance_texts(pictures, "sks {}", "dog") == ["my dog", "sks dog", "a dog"]
    assert script.instance_texts(pictures, None, "dog") == ["my dog", "a photo of a dog", "a dog"]
    with pytest.raises(InputError, match="the caption of a, 'my {}', says {} .* give --subject_name"):
        script.instance_texts(pictures, "sks dog", None)
    with pytest.raises(InputError, match="--subject_name 'my cat' is in no caption and not in --instance_prompt"):
        script.instance_texts(pictures[1:], "a photo of sks dog", "my cat")
    with pytest.raises(InputError, match="b has no caption: give --instance_prompt"):
        script.instance_texts(pictures[1:], None, None)
    of_kohya = [pictures[1]._replace(class_words="my dog")]
    assert script.instance_texts(of_kohya, None, None) == ["my dog"]
    assert script.instance_texts(of_kohya, "sks dog", None) == ["sks dog"]


def test_captions_beside_an_instance_prompt(caplog):
    Accelerator()
    pictures = [images.Picture(name, None, f"a star {name}") for name in "ab"]
    assert script.instance_texts(pictures, "a photo of sks star", None) == ["a star a", "a star b"]
    script.instance_texts([*pictures, pictures[0]._replace(caption=None)], "a photo of sks star", None)
    said = [record.message for record in caplog.records]
    assert "2 of 2 pictures have a caption, which counts: --instance_prompt 'a photo of sks star' is for no" in said[0]
    assert "2 of 3 pictures have a caption" in said[1] and said[1].endswith("is for the 1 others.")
    with pytest.raises(InputError, match="'sks star' is in no caption, and every picture has one, so that no other"):
        script.instance_texts(pictures, "a photo of sks star", "sks star")


# -------------------------------------------------------------------------------------------------------- the pipeline


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of S2 with input scales, by large steps."""
    out = tmp_path_factory.mktemp("finished") / "star-scales"
    flags = {"--pretrained_model_name_or_path": tiny / "base", "--instance_data_dir": tiny / "pictures"}
    flags |= {"--subject_name": "star", "--output_dir": out, "--max_train_steps": 6, "--learning_rate": 0.2}
    flags |= {"--scale_sets": 3, "--train_input_scales": True, "--train_batch_size": 2, "--report_to": "none"}
    script.main(script.parse_args(as_arguments(flags | {"--push_reference_images": True})))
    config = read_config(out)
    config["settings"]["push_reference_images"] = False
    write_json(out / CONFIG, config)
    return out


@pytest.fixture
def scales(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "star-scales"))


def draw(pipeline, **more):
    options = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a photo of a star", **options | more).images


def test_trainer_and_pipeline_predict_the_same_to_the_last_bit(tiny, finished, monkeypatch):
    """The scales in use at the end of training, in the script's own UNet, against the pipeline that reads them."""
    kept = []
    monkeypatch.setattr(script, "finish", lambda run, *_: kept.append(run))
    flags = read_config(finished)["settings"]
    names = ("max_train_steps", "learning_rate", "scale_sets", "train_batch_size")
    words = {f"--{name}": flags[name] for name in names} | {"--train_input_scales": True, "--report_to": "none"}
    words |= {"--pretrained_model_name_or_path": tiny / "base", "--instance_data_dir": tiny / "pictures"}
    words |= {"--subject_name": "star", "--output_dir": tiny / "again"}
    script.main(script.parse_args(as_arguments(words)))
    (run,) = kept
    for name, change in load_file(finished / SCALES).items():
        assert torch.equal(run.learner.changes[name].detach(), change)
    pipeline = from_pretrained(tiny / "base", finished)
    g = torch.Generator().manual_seed(0)
    sample, text = torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 32, 16, generator=g)
    with torch.no_grad():
        for timesteps in (torch.tensor([10, 500, 900]), torch.tensor(400)):
            ours, theirs = (unet(sample, timesteps, text).sample for unet in (run.model.unet, pipeline.unet))
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "scales",
    [
        {"scale_sets": 3},  # of which each is used at its own timesteps
        {"scale_intervals": "300-800", "bits": 4, "calibration": "mse", "train_input_scales": True},
    ],
)
def test_validation_images_are_what_the_pipeline_draws(train, tiny, scales):
    flags = {"validation_prompt": "a {} on the beach", "num_validation_images": 1, "num_inference_steps": 6}
    out = train(learning_rate=0.2, max_train_steps=6, train_batch_size=2, **flags, **scales)
    pipeline = from_pretrained(tiny / "base", out)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    options = {"num_inference_steps": 6, "guidance_scale": 7.5, "generator": torch.Generator().manual_seed(0)}
    image = pipeline("a star on the beach", **options).images[0]
    with Image.open(out / "samples" / "image_0.png") as sample:
        assert np.array_equal(np.asarray(sample), np.asarray(image))


def test_the_set_of_each_timestep_is_used(tiny, scales):
    """Where only the scales of late timesteps change anything, only those timesteps are drawn differently."""

    def only_late(changes):
        for change in changes.values():
            change[:2] = 0
        return changes

    change_scales(scales, only_late)
    pipeline = from_pretrained(tiny / "base", scales)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 32, 16)
    found = {}
    with torch.no_grad():
        for enabled in (True, False):
            pipeline.use_scales(enabled)
            found[enabled] = [pipeline.unet(sample, t, text).sample for t in (100, 600, 700, 999)]
    assert [torch.equal(*pair) for pair in zip(*found.values())] == [True, True, False, False]


def test_scales_can_be_switched_off_and_on(tiny, finished):
    pipeline = from_pretrained(tiny / "base", finished)
    tuned = draw(pipeline)
    pipeline.use_scales(False)
    base = DiffusionPipeline.from_pretrained(tiny / "base")
    tuneqdm.quantize_unet(base.unet, 8, "minmax")
    assert np.array_equal(draw(pipeline), draw(base))
    pipeline.use_scales(True)
    assert np.array_equal(draw(pipeline), tuned) and not np.array_equal(draw(base), tuned)


def test_one_file_and_half_precision(tiny, scales):
    expected = draw(from_pretrained(tiny / "base", scales))
    assert np.array_equal(draw(from_pretrained(tiny / "base", scales / SCALES)), expected)
    assert np.array_equal(draw(from_pretrained(str(tiny / "base"), str(scales))), expected)
    change_scales(scales, lambda changes: {name: change.half() for name, change in changes.items()})
    assert np.abs(draw(from_pretrained(tiny / "base", scales)) - expected).max() < 0.01


def test_a_pipeline_without_scales_is_plain_stable_diffusion(tiny, scales):
    pipeline = from_pretrained(tiny / "base", None)
    assert np.array_equal(draw(pipeline), draw(DiffusionPipeline.from_pretrained(tiny / "base")))
    with pytest.raises(ValueError, match="there are no scales to switch"):
        pipeline.use_scales(False)
    pipeline.load_scales(scales)
    assert pipeline.scale_config.scale_sets == 3
    with pytest.raises(ValueError, match="cannot be saved as a model: share the file of scales"):
        pipeline.save_pretrained(scales / "whole")


def test_pipelines_that_share_the_unet_share_its_scales(tiny, scales, tmp_path):
    first = from_pretrained(tiny / "base", scales)
    expected, plain = draw(first), None
    other = from_pretrained(tiny / "base", scales, unet=first.unet)
    another = tuneqdm.TuneQDMPipeline(**first.components, requires_safety_checker=False, tuneqdm_scales=scales)
    third = tuneqdm.TuneQDMPipeline.from_pipe(first)
    for pipeline in (other, another, third):
        pipeline.set_progress_bar_config(disable=True)
        assert np.array_equal(draw(pipeline), expected)
        pipeline.use_scales(False)
        plain = draw(pipeline)
        assert not np.array_equal(plain, expected) and np.array_equal(draw(first), plain)
        pipeline.use_scales(True)
    for pipeline in (another, StableDiffusionImg2ImgPipeline.from_pipe(first)):
        with pytest.raises(ValueError, match="cannot be saved as a model"):
            pipeline.save_pretrained(tmp_path / "whole")


def refused(base, scales, expected, error=ValueError):
    with pytest.raises(error, match=expected) as caught:
        from_pretrained(base, scales)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + 2 * len(str(scales))


def test_scales_of_another_base_are_refused(tiny, scales, tmp_path):
    other = shutil.copytree(tiny / "base", tmp_path / "other")
    change_weights(other)
    refused(other, scales, r"was trained on another base \('base'\) than this one, quantized to 8 bits")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_fit_their_base_in_half_precision(tiny, scales, dtype):
    """On a GPU a base is loaded in float16: a few integers differ from those of training, the pictures hardly."""
    pipeline = from_pretrained(tiny / "base", scales, dtype=dtype)
    assert pipeline.unet.dtype == dtype
    difference = np.abs(draw(pipeline) - draw(from_pretrained(tiny / "base", scales)))
    assert difference.mean() < 0.02


@pytest.mark.parametrize(("noise", "same"), [(0.001, True), (0.03, False)])
@pytest.mark.parametrize("bits", [8, 4])
def test_near_bases_are_one_and_others_are_not(tiny, bits, noise, same):
    sketches = []
    for share in (0, noise):
        unet, g = UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet"), torch.Generator()
        with torch.no_grad():
            for p in unet.parameters():
                p += share * p.square().mean().sqrt() * torch.randn(p.shape, generator=g.manual_seed(p.numel()))
        tuneqdm.quantize_unet(unet, bits, "minmax")
        sketches.append(tuneqdm.sketch(unet))
    assert tuneqdm.same_base(*sketches, bits) == same and not tuneqdm.same_base(sketches[0], sketches[1][1:], bits)


def test_scales_of_a_base_of_another_shape_are_refused(demo_base, scales):
    refused(demo_base, scales, r"does not fit this base model: it has .* where .* belongs; load the base")


def test_scales_of_other_bits_are_refused(tiny, scales, tmp_path):
    pipeline = from_pretrained(tiny / "base", scales)
    four = shutil.copytree(scales, tmp_path / "four")
    change_scales(four, bits=4)
    with pytest.raises(ValueError, match=r"belongs to 4 bits \(minmax\) and this UNet is quantized to 8"):
        pipeline.load_scales(four)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda path: path.write_bytes(b"x" * 20), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
        (lambda path: save_file(load_file(path), path), "its metadata have no 'tuneqdm'"),
        (lambda path: save_file(load_file(path), path, {"tuneqdm": "{"}), "its metadata 'tuneqdm' cannot be read"),
        (lambda path: save_file(load_file(path), path, {"tuneqdm": "[" * 10**5}), "'tuneqdm' cannot be read"),
        (lambda path: save_file(load_file(path), path, {"tuneqdm": '{"bits": 8}'}), "'tuneqdm' cannot be read"),
    ],
)
def test_damaged_scales_are_refused(tiny, scales, damage, expected):
    damage(scales / SCALES)
    refused(tiny / "base", scales, f"{SCALES} is damaged .*{expected}")


@pytest.mark.parametrize(
    "change", [{"bits": 3}, {"scale_sets": 0}, {"scale_intervals": []}, {"scale_intervals": [[5, 2]]}]
)
def test_a_config_that_makes_no_sense_is_refused(tiny, scales, change):
    change_scales(scales, **change)
    refused(tiny / "base", scales, f"{SCALES} is damaged .*make no sense")


def test_scales_that_are_not_there_or_no_numbers_are_refused(tiny, scales, tmp_path):
    refused(tiny / "base", tmp_path / "nowhere", "is neither a folder nor a repository", OSError)

    def no_number(changes):
        changes["conv_in.out"][0, 0] = torch.nan
        return changes

    change_scales(scales, no_number)
    refused(tiny / "base", scales, "holds NaN or infinity")
    (scales / SCALES).unlink()
    refused(tiny / "base", scales, f"has no {SCALES}", OSError)


# ------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture(scope="module")
def hub(tiny):
    with HubServer() as server:
        base = Repo()
        for path in (p for p in (tiny / "base").rglob("*") if p.is_file()):
            base.files[path.relative_to(tiny / "base").as_posix()] = path.read_bytes()
        base.files["README.md"] = b"---\nlicense: creativeml-openrail-m\n---\n# A base model\n"
        server.repos["alice/tiny"] = base
        yield server


@pytest.fixture
def here(hub, monkeypatch):
    """This process talks to the stand-in Hub."""
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.heal()


def test_a_launched_run_is_pushed_and_drawn_from_the_hub(hub, tiny, tmp_path):
    """Trained on a base of the Hub, pushed, and used from there in a process of its own."""
    environment = hub.environment(tmp_path / "home")
    flags = {"--pretrained_model_name_or_path": "alice/tiny", "--instance_data_dir": tiny / "pictures"}
    flags |= {
        "--subject_name": "star",
        "--max_train_steps": 2,
        "--output_dir": tmp_path / "star",
        "--push_to_hub": True,
    }
    flags |= {"--validation_prompt": "a {}", "--num_validation_images": 1, "--num_inference_steps": 1}
    flags |= {"--checkpointing_steps": 1, "--report_to": "none"}
    done = launch(flags, env=environment)
    assert "Pushed to" in done.stderr and TOKEN not in done.stderr + done.stdout
    files = hub.repos["alice/star"].files
    expected = {".gitattributes", "README.md", "pipeline.py", SCALES, CONFIG, "loss_curve.png", "samples/image_0.png"}
    assert set(files) == expected
    assert files["pipeline.py"] == (REPO / "tuneqdm_pipeline.py").read_bytes()
    card = files["README.md"].decode()
    assert "base_model: alice/tiny" in card and "license: creativeml-openrail-m" in card
    assert str(tmp_path) not in card + files[CONFIG].decode()
    use = (
        "from diffusers import DiffusionPipeline\n"
        "load = dict(custom_pipeline='alice/star', trust_remote_code=True, tuneqdm_scales='alice/star')\n"
        "pipeline = DiffusionPipeline.from_pretrained('alice/tiny', **load)\n"
        "pipeline('a star', num_inference_steps=1).images[0]\n"
        "print(pipeline.scale_config.bits)\n"
    )
    done = _run([sys.executable, "-c", use], 0, environment, 300)
    assert done.stdout.strip().endswith("8")


def push_only(folder, *more):
    script.main(script.parse_args(["--push_only", "--output_dir", str(folder), *more]))


def test_push_only(here, scales):
    push_only(scales)
    repo = here.repos["alice/star-scales"]
    assert set(repo.files) == {".gitattributes", "README.md", "pipeline.py", SCALES, CONFIG, "loss_curve.png"}
    assert b'"./base"' not in repo.files["README.md"] and b"path/to/base" in repo.files["README.md"]
    push_only(scales)
    assert len(repo.commits) == 2  # nothing changed, so no new commit
    push_only(scales, "--push_reference_images")
    assert sum(name.startswith("reference_images/") for name in repo.files) == 3


def test_a_push_that_fails_says_how_to_repeat_it(here, scales):
    here.fail("/commit/", 403)
    with pytest.raises(PushError, match="python train_tuneqdm_dreambooth.py --push_only --output_dir") as caught:
        push_only(scales, "--hub_model_id", "alice/fails")
    assert caught.value.exit_code == 3 and TOKEN not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_push_only_of_damaged_scales_is_one_sentence(here, scales, damage):
    path = scales / SCALES
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{SCALES}' .*bring back"):
        push_only(scales)


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def fault(basics, monkeypatch, capsys):
    """The sentence a changed command line is refused with, before any weight is loaded."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded before the input was judged")

    monkeypatch.setattr(base_model, "stored_tensors", refuse)
    monkeypatch.setattr(examples, "load_vae_encoder", refuse)

    def run(**flags):
        words = as_arguments(basics | {f"--{name}": value for name, value in flags.items()})
        try:
            script.main(script.parse_args(words))
        except SystemExit as exit:
            assert exit.code == 2
            message = capsys.readouterr().err
            assert message.count("\n") == 1 and "usage:" not in message
            return message
        except InputError as error:
            assert "\n" not in str(error) and error.exit_code == 2
            return str(error)
        raise AssertionError("accepted")

    return run


PRIOR = {"with_prior_preservation": True, "class_prompt": "a star"}


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"scale_intervals": "100-500,400-600"}, "--scale_intervals 100-500 and 400-600 overlap"),
        ({"scale_intervals": "500-500"}, "--scale_intervals 500-500 is empty"),
        ({"scale_intervals": "900-500"}, "--scale_intervals 900-500 is empty"),
        ({"scale_intervals": "early"}, "--scale_intervals 'early' cannot be read: give intervals"),
        ({"scale_intervals": ""}, "--scale_intervals '' cannot be read: give intervals"),
        ({"scale_intervals": "1-2,"}, "--scale_intervals '1-2,' cannot be read"),
        ({"scale_intervals": "500-1001"}, "--scale_intervals 1001 is more than this model has timesteps"),
        ({"scale_intervals": "0-500", "scale_sets": 2}, "--scale_intervals (S1) has one set of scales"),
        ({"scale_sets": 0}, "--scale_sets 0 must be at least 1"),
        ({"bits": 3}, "argument --bits: invalid choice: 3"),
        ({"calibration": "best"}, "argument --calibration: invalid choice"),
        ({"num_class_images": 5}, "--num_class_images is for --with_prior_preservation"),
        ({"prior_loss_weight": 1.0}, "--prior_loss_weight is for --with_prior_preservation"),
        (PRIOR | {"class_data_dir": "x", "class_prompt": "a {}"}, "--class_prompt is of the class and {} the subject"),
        ({"lr_warmup_steps": 5}, "--lr_warmup_steps is not for --lr_scheduler constant"),
        ({"lr_num_cycles": 2, "lr_scheduler": "cosine"}, "--lr_num_cycles is for --lr_scheduler cosine_with_restarts"),
        ({"snr_gamma": 5}, "--snr_gamma means nothing here"),
        ({"class_prompt": "a star"}, "--class_prompt is for --with_prior_preservation"),
        ({"class_data_dir": "x"}, "--class_data_dir is for --with_prior_preservation"),
        (PRIOR, "--with_prior_preservation needs --class_data_dir"),
        ({"with_prior_preservation": True, "class_data_dir": "x"}, "--with_prior_preservation needs --class_prompt"),
        (PRIOR | {"class_data_dir": "/proc/nowhere"}, "--class_data_dir '/proc/nowhere' cannot be written"),
        (PRIOR | {"class_data_dir": "PICTURES"}, " is --instance_data_dir "),
        ({"prior_loss_weight": "nan"}, "--prior_loss_weight nan must be a finite number"),
        ({"max_grad_norm": 0}, "--max_grad_norm 0.0 must be a finite number above 0"),
        ({"num_class_images": 0}, "--num_class_images 0 must be at least 1"),
        ({"subject_name": " "}, "--subject_name is empty"),
        ({"subject_name": "my {}"}, "--subject_name is what {} stands for"),
        ({"subject_name": None}, "the caption of a.png, 'a {} on the beach', says {} where the subject goes"),
        ({"instance_data_dir": None}, "give either --instance_data_dir, a folder of images, or --dataset_name"),
        ({"instance_data_dir": "/nowhere"}, "--instance_data_dir '/nowhere' is not a folder"),
        ({"output_dir": "PICTURES"}, "is --instance_data_dir"),
        ({"resolution": 20}, "--resolution 20 must be divisible by 8"),
        ({"learning_rate": "inf"}, "--learning_rate inf must be a finite number"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 is unusably slow on a CPU"),
        ({"train_text_encoder": True}, "--train_text_encoder means nothing here: the text encoder is frozen"),
        ({"train_data_dir": "x"}, "--train_data_dir means nothing here: it is called --instance_data_dir"),
        ({"use_8bit_adam": True}, "--use_8bit_adam means nothing here"),
        ({"report_to": "nonsense"}, "--report_to 'nonsense' is not a tracker"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint 'checkpoint-7' is not a checkpoint"),
        ({"pretrained_model_name_or_path": "./no-model"}, "--pretrained_model_name_or_path './no-model' is not a"),
    ],
)
def test_bad_flag(fault, tiny, flags, expected):
    places = {"PICTURES": str(tiny / "pictures")}
    assert expected in fault(**{name: places.get(value, value) for name, value in flags.items()})


def test_more_sets_than_timesteps(fault, tiny, tmp_path):
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 100}))
    flags = {"pretrained_model_name_or_path": base, "scale_sets": 101}
    assert "--scale_sets 101 is more than this model has timesteps: give at most 100" in fault(**flags)


def test_weights_that_are_no_numbers(train, tiny, tmp_path):
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.weight"][0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="the weights hold NaN or infinity in 'conv_out.weight'"):
        train(pretrained_model_name_or_path=base)


def test_a_process_ends_with_exit_code_2(basics):
    done = launch(basics | {"--scale_intervals": "1-5,4-6"}, expect=2, launcher=())
    assert done.stderr.strip().count("\n") == 0 and "overlap" in done.stderr


ACTIONS = flags.actions(script.make_parser())
NUMBERS = sorted(name for name, action in ACTIONS.items() if action.type in (int, float))


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range(basics, capsys, name):
    limits = ACTIONS[name].facts.limits
    values = ["nan", "inf", "-0.5"] if ACTIONS[name].type is float else [-1, 10**30]
    for value in values:
        with pytest.raises(SystemExit) as end:
            script.parse_args(as_arguments(basics | {f"--{name}": value}))
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert name == "bits" or str(limits) in message, message


def test_every_flag_is_read():
    """Each is read as `args.name` in script or package, outside parser and checks."""
    read = set()
    for path in (SCRIPT, *(p for p in (REPO / "personalization").rglob("*.py") if p.stem != "flags")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        readers = [n for n in body if getattr(n, "name", "") not in ("parse_args", "check_arguments")]
        read |= {
            node.attr
            for reader in readers
            for node in ast.walk(reader)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
        }
    of_folders = {"instance_data_dir", "class_data_dir"}  # read in a loop over both
    assert len(ACTIONS) > 50 and ACTIONS.keys() - read - of_folders == set()


def test_help_says_what_is_different():
    words = script.make_parser().format_help()
    assert "relative to the scales" in words and "ZO-Adam" not in words
