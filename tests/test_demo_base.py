"""The demo base: the procedural world, the recipe (a smoke run of it) and the committed weights and figures."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import world


DEMO = Path(__file__).resolve().parent.parent / "demo"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
committed = pytest.mark.skipif(not (DEMO / "base" / "model_index.json").exists(), reason="demo/base is not built here")
committed_eps = pytest.mark.skipif(not (DEMO / "base_eps").exists(), reason="demo/base_eps is not in this checkout")


# -- the world -----------------------------------------------------------------------------------------------------


def test_world_is_large_enough():
    assert len(world.SHAPES) >= 8 and len(world.COLOURS) >= 12
    assert len(world.PATTERNS) >= 5 and len(world.BACKGROUNDS) >= 8
    assert len(world.HELD_OUT) >= 8


@pytest.mark.parametrize("background", world.BACKGROUND_NAMES)
def test_render_is_deterministic_and_varies_with_the_seed(background):
    scene = world.Scene("star", "red", "white", "dotted", background)
    first, again, other = (world.render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("pattern", world.PATTERNS)
def test_every_shape_shows_the_colours_of_every_pattern(shape, pattern):
    second = "red" if pattern == "plain" else "cyan"
    image = world.render(world.Scene(shape, "red", second, pattern, "snow"), np.random.default_rng(0)).astype(int)
    for colour in {"red", second}:
        near = np.abs(image - np.array(world.COLOURS[colour])).max(-1) < 60
        assert near.sum() > 40, f"{colour} hardly shows in a {pattern} {shape}"


def test_held_out_subjects_are_never_drawn_for_training():
    rng = np.random.default_rng(0)
    drawn = {world.sample_scene(rng).subject for _ in range(40_000)}
    assert not drawn & world.HELD_OUT
    assert len(drawn) > 2_000  # nearly all of the other 2208, so that their absence is no accident


def test_held_out_scenes_are_drawn_on_request():
    rng = np.random.default_rng(0)
    assert {world.sample_scene(rng, held_out=True).subject for _ in range(500)} == world.HELD_OUT


def test_captions_tell_what_they_say_they_tell():
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = world.sample_scene(rng)
        text, (colour, pattern, shape, background) = world.caption(scene, rng, return_told=True)
        assert (scene.shape in text.split()) == shape
        assert (world.BACKGROUNDS[scene.background] in text) == background
        assert (scene.pattern in text) == pattern
        if colour:
            assert scene.colour in text and scene.colour2 in text
        assert not re.search(r"\ba orange", text)


def test_a_full_caption_reads_as_in_the_issue():
    scene = world.Scene("star", "red", "white", "striped", "beach")
    assert world.describe(scene) == "red and white striped star on the beach"


# -- the recipe ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder of a smoke run of the whole recipe: the output folder, and the work folder beside it."""
    folder = tmp_path_factory.mktemp("demo_smoke")
    command = [sys.executable, str(DEMO / "build_demo_base.py"), "--smoke", "--device", "cpu", "--threads", "1"]
    command += ["--out_dir", str(folder / "out"), "--work_dir", str(folder / "work")]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    return folder


def test_smoke_run_gives_a_pipeline_that_generates(smoke):
    import torch
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

    base = smoke / "out" / "base"
    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler) and pipeline.safety_checker is None
    image = pipeline("a photo of a red star", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    noise = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    assert noise.config.prediction_type == pipeline.scheduler.config.prediction_type == "v_prediction"
    close = torch.isclose(noise.alphas_cumprod[:-1], pipeline.scheduler.alphas_cumprod[:-1])
    assert close.all()  # the last is 0, which DPM-Solver replaces by a tiny number
    record = json.loads((base / "demo_base.json").read_text())
    assert record["stages"]["unet"]["steps"] == record["stages"]["unet"]["planned"] == 2
    assert {"low_steps", "low_share", "batch", "lr", "decay_from"} <= set(record["stages"]["unet"])


def test_smoke_run_writes_the_scorer_and_its_identity_encoder(smoke):
    from scoring import Scorer

    scorer = Scorer(smoke / "out" / "scorer")
    rng = np.random.default_rng(0)
    images = [world.render(world.sample_scene(rng), rng) for _ in range(3)]
    assert scorer.image_features(images).shape[0] == 3
    assert set(scorer.read(images)) == {"shape", "colour", "colour2", "pattern", "background"}
    assert -1 <= scorer.clip_i(images[:2], images[2:]) <= 1
    assert -1 <= scorer.identity(images[:2], images[2:]) <= 1
    assert scorer.clip_t(["a photo of a star"] * 3, images) == pytest.approx(
        float((scorer.text_features(["a photo of a star"]) @ scorer.image_features(images).T).mean()), abs=1e-5
    )


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    """Two steps, then two more, give what four steps at once give (the schedule being that of four throughout)."""
    import build_demo_base as build
    import torch

    def run(folder, stops):
        args = build.parse_args(["--smoke", "--device", "cpu", "--precision", "fp32", "--work_dir", str(folder)])
        args.out_dir = folder
        for stop in stops:
            torch.manual_seed(0)
            model = torch.nn.Linear(4, 4)

            def loss_of(step, rng, generator, model=model, stop=stop):
                if step == stop:
                    raise KeyboardInterrupt
                inputs = torch.from_numpy(rng.standard_normal((3, 4))).float()
                noise = torch.randn(3, 4, generator=generator)
                return (model(inputs) - noise).square().mean(), {}

            args.checkpoint_every = 0
            try:
                build.train(args, "unet", model, loss_of, 4, 1e-2, ema_decay=0.9)
            except KeyboardInterrupt:
                continue
        return model.state_dict()

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    once, twice = run(tmp_path / "a", [None]), run(tmp_path / "b", [2, None])
    for name, value in once.items():
        assert torch.equal(value, twice[name])


def test_a_run_is_replanned_only_where_that_changes_nothing(tmp_path):
    """Before the learning rate falls, more steps give what they would have from the start; later it is an error."""
    import build_demo_base as build
    import torch

    def run(folder, steps, lr=1e-2):
        args = build.parse_args(["--smoke", "--device", "cpu", "--precision", "fp32", "--work_dir", str(folder)])
        args.out_dir = folder
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)

        def loss_of(step, rng, generator):
            if step == stop:
                raise KeyboardInterrupt
            return (model(torch.from_numpy(rng.standard_normal((3, 4))).float()) - 1).square().mean(), {}

        args.checkpoint_every = 0
        try:
            build.train(args, "unet", model, loss_of, steps, lr, lr_decay=0.5, ema_decay=0.9)
        except KeyboardInterrupt:
            pass
        return model.state_dict()

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    stop = 2
    run(tmp_path / "a", 4)
    with pytest.raises(ValueError, match="delete it"):
        run(tmp_path / "a", 4, lr=2e-2)
    stop = None
    replanned, planned = run(tmp_path / "a", 6), run(tmp_path / "b", 6)
    for name, value in planned.items():
        assert torch.equal(value, replanned[name])
    with pytest.raises(ValueError, match="delete it"):
        run(tmp_path / "a", 8)


def test_the_processes_share_a_batch_between_them(monkeypatch):
    import build_demo_base as build

    parts = []
    for rank in range(2):
        monkeypatch.setattr(build, "rank_and_count", lambda rank=rank: (rank, 2))
        parts.append(build.own_share(np.arange(6), ["a", "b", "c", "d", "e", "f"]))
    assert sorted(np.concatenate([part[0] for part in parts])) == list(range(6))
    assert sorted(parts[0][1] + parts[1][1]) == ["a", "b", "c", "d", "e", "f"]
    assert [len(part[0]) for part in parts] == [3, 3]


# -- what is committed ---------------------------------------------------------------------------------------------


@committed
def test_every_caption_word_is_one_token_and_added_tokens_behave():
    from build_demo_base import known_words
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "base", subfolder="tokenizer")
    for word in known_words():
        assert len(tokenizer.tokenize(word)) == 1, word
    assert tokenizer.model_max_length == 32
    assert tokenizer.bos_token == "<|startoftext|>" and tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer("a xylophone, naïvely")["input_ids"]
    assert tokenizer.eos_token_id not in ids[1:-1]  # unknown text falls back to pieces, never to the unknown token
    count = len(tokenizer)
    assert tokenizer.add_tokens(["<my-toy>"]) == 1 and len(tokenizer) == count + 1
    assert tokenizer.convert_tokens_to_ids("<my-toy>") == count
    assert "<my-toy>" in tokenizer.tokenize("a photo of a <my-toy> on the beach")


@committed
def test_committed_base_is_small_fp16_and_complete():
    from safetensors import safe_open

    weights = [*DEMO.glob("base/**/*.safetensors"), *DEMO.glob("scorer/**/*.safetensors")]
    assert sum(path.stat().st_size for path in weights) <= 30e6
    for path in weights:
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}
        assert "F32" not in kinds, path
    index = json.loads((DEMO / "base" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["requires_safety_checker"] is False
    assert (DEMO / "base" / "demo_base.json").exists()


@committed
def test_committed_base_generates():
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "base", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a photo of a red star in the snow"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all() and images.std() > 0.02


def test_the_same_noise_is_found_in_another_schedule():
    import torch
    from build_demo_base_eps import equal_noise

    alphas, others = torch.linspace(0.99, 0.01, 50), torch.linspace(1.0, 0.0, 801)
    found = equal_noise(alphas, others)
    assert torch.equal(found, equal_noise(alphas, others).sort().values) and found.min() > 0 and found.max() < 800
    assert torch.allclose(1 - found / 800, alphas, atol=1e-5)  # a line can be read between its points
    assert torch.equal(equal_noise(others, others), torch.arange(801.0))


def test_the_teacher_is_asked_where_its_noise_is_as_strong():
    import build_demo_base as build
    from build_demo_base_eps import alphas_cumprod, equal_noise

    own, teacher = alphas_cumprod("cpu").numpy(), build.alphas_cumprod("cpu").numpy()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Stable Diffusion's
    assert np.allclose(own, np.cumprod(1 - betas), rtol=1e-4)
    assert own[-1] > 0.004 and teacher[-1] == 0
    found = equal_noise(alphas_cumprod("cpu"), build.alphas_cumprod("cpu")).numpy()
    assert np.allclose(np.interp(found, np.arange(1000), teacher), own, atol=1e-4)
    assert found[0] < 0.01 and 870 < found[-1] < 890


def test_noise_implied_by_a_velocity_is_the_noise_and_its_error_counts_as_one_of_velocities():
    import torch
    from build_demo_base_eps import noise_from_velocity
    from distillation import squared_errors

    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor([0.9, 0.3, 0.001]).view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    assert torch.allclose(noise_from_velocity(velocity, noisy, alpha), noise, atol=1e-5)

    other = velocity + torch.randn(velocity.shape, generator=torch.Generator().manual_seed(1))
    of_velocity = squared_errors(other, velocity, alpha, "v_prediction")
    of_noise = squared_errors(noise_from_velocity(other, noisy, alpha), noise, alpha, "epsilon")
    assert torch.allclose(of_noise[:2], of_velocity[:2], rtol=1e-4)
    assert of_noise[2] < of_velocity[2] / 30  # its weight ends at 25, not 1,000


def test_smoke_run_of_the_epsilon_recipe(smoke):
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    command = [sys.executable, str(DEMO / "build_demo_base_eps.py"), "--smoke", "--device", "cpu"]
    command += ["--out_dir", str(smoke / "out"), "--work_dir", str(smoke / "work")]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    folder = smoke / "out" / "base_eps"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "epsilon" and pipeline.scheduler.alphas_cumprod[-1] > 0.004
    assert pipeline("a photo of a red star", num_inference_steps=2).images[0].size == (64, 64)
    assert not DDIMScheduler.from_pretrained(folder, subfolder="scheduler").config.clip_sample
    record = json.loads((folder / "demo_base.json").read_text())
    assert record["stages"]["unet_eps"]["steps"] == record["settings"]["eps_steps"] == 2


def test_the_epsilon_recipe_wants_a_teacher_of_velocities(smoke, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(DEMO / "base", base)
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    command = [sys.executable, str(DEMO / "build_demo_base_eps.py"), "--smoke", "--device", "cpu"]
    command += ["--out_dir", str(tmp_path / "out"), "--work_dir", str(smoke / "work"), "--teacher", str(base)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "predicts epsilon" in done.stderr and "Traceback" not in done.stderr


@committed_eps
def test_committed_epsilon_base_shares_text_and_vae():
    for part in ("text_encoder", "tokenizer", "vae"):
        for file in (DEMO / "base" / part).iterdir():
            assert file.read_bytes() == (DEMO / "base_eps" / part / file.name).read_bytes(), file
    ours, others = ((DEMO / base / "unet").rglob("*.safetensors") for base in ("base_eps", "base"))
    assert next(ours).stat().st_size == next(others).stat().st_size


@committed_eps
@pytest.mark.parametrize("sampler", ["DPMSolverMultistepScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_committed_epsilon_base_draws_what_it_is_told(sampler):
    import diffusers
    import torch
    from scoring import Scorer, accuracy

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(DEMO / "base_eps", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, sampler).from_pretrained(DEMO / "base_eps", subfolder="scheduler")
    scenes = [world.Scene(*"heart red red plain snow".split()), world.Scene(*"ring blue blue plain grass".split())]
    prompts = [f"a photo of a {world.describe(scene)}" for scene in scenes]
    generator = torch.Generator().manual_seed(0)
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generator).images
    read = accuracy(Scorer(DEMO / "scorer").read(images), scenes)
    assert read["shape"] == read["colour"] == read["background"] == 1


@committed_eps
@pytest.mark.parametrize(("timestep", "most"), [(50, 0.3), (300, 0.09), (700, 0.02), (999, 0.003)])
def test_committed_epsilon_base_predicts_the_noise(timestep, most):
    """Of renders it finds the noise, not the velocity: an independent look at what `prediction_type` says."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "base_eps", torch_dtype=torch.float32)
    rng, generator = np.random.default_rng(77), torch.Generator().manual_seed(77)
    scenes = [world.sample_scene(rng) for _ in range(8)]
    pixels = torch.from_numpy(np.stack([world.render(scene, rng) for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = float(np.prod(1 - betas[: timestep + 1]))
    prompts = [f"a photo of a {world.describe(scene)}" for scene in scenes]
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
        text, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        found = pipeline.unet(noisy, timestep, text).sample
    velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * latents
    error, of_velocity = (float((found - truth).square().mean()) for truth in (noise, velocity))
    assert error < most and error < 0.9 * of_velocity


def test_smoke_run_of_the_sdxl_recipe(smoke):
    import torch
    from diffusers import StableDiffusionXLPipeline

    command = [sys.executable, str(DEMO / "build_demo_base_xl.py"), "--smoke", "--device", "cpu", "--threads", "1"]
    command += ["--out_dir", str(smoke / "out"), "--work_dir", str(smoke / "work")]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(smoke / "out" / "base_xl", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder_2.config.eos_token_id == 2 and pipeline.tokenizer_2.pad_token == "!"
    assert pipeline.scheduler.config.prediction_type == "epsilon"  # as its teacher, and as SDXL
    assert pipeline("a photo of a red star", num_inference_steps=2).images[0].size == (64, 64)


def test_smoke_run_of_the_flow_recipe(smoke):
    import torch
    from diffusers import ZImagePipeline

    command = [sys.executable, str(DEMO / "build_demo_base_flow.py"), "--smoke", "--device", "cpu", "--threads", "1"]
    command += ["--out_dir", str(smoke / "out"), "--work_dir", str(smoke / "work")]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    pipeline = ZImagePipeline.from_pretrained(smoke / "out" / "base_flow", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.tokenizer.tokenize("a two-tone ring in front of a brick wall")[:4] == [
        "a",
        "Ġtwo",
        "-tone",
        "Ġring",
    ]
    options = {"num_inference_steps": 2, "height": 64, "width": 64}
    assert pipeline("a photo of a red star", **options).images[0].size == (64, 64)


@pytest.mark.skipif(not (DEMO / "base_flow" / "vae").exists(), reason="demo/base_flow is not in this checkout")
def test_committed_flow_base_is_small_and_generates():
    import torch
    from diffusers import ZImagePipeline

    files = [path for path in (DEMO / "base_flow").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= 16e6  # the VAE's weights are a link to those of demo/base
    pipeline = ZImagePipeline.from_pretrained(DEMO / "base_flow", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    images = pipeline(["a photo of a red star in the snow"], **options).images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all() and images.std() > 0.02


@pytest.mark.skipif(not (DEMO / "base_xl").exists(), reason="demo/base_xl is not in this checkout")
def test_committed_sdxl_base_is_small_and_generates():
    import torch
    from diffusers import StableDiffusionXLPipeline

    files = [path for path in (DEMO / "base_xl").rglob("*") if path.is_file() and "vae" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 12e6  # the VAE is a link to that of demo/base
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO / "base_xl", dtype=torch.float32)
    assert pipeline.scheduler.config.prediction_type == "epsilon" and pipeline.scheduler.alphas_cumprod[-1] > 0.004
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a photo of a red star in the snow"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all() and images.std() > 0.02


@pytest.mark.parametrize("ending", ["", "_eps", "_xl", "_flow"])
def test_stored_quality_is_consistent(ending):
    from check_demo_base import TARGETS

    if not (DEMO / f"quality{ending}.json").exists():
        pytest.skip("check_demo_base.py has not been run here")
    quality = json.loads((DEMO / f"quality{ending}.json").read_text())
    assert set(quality) >= {"command", "config", "targets", "figures", "hardware", "versions", "definitions"}
    assert set(quality["targets"]) == {".".join(key) for key in TARGETS}
    for (section, name), least in TARGETS.items():
        target = quality["targets"][f"{section}.{name}"]
        assert target["at_least"] == least
        assert target["measured"] == quality["figures"][section][name]
        assert target["met"] == (target["measured"] >= least)
    assert quality["figures"]["vae"]["renders"] >= 512 and quality["figures"]["generated"]["captions"] >= 256
    assert (DEMO / f"samples{ending}.png").exists()


@pytest.mark.skipif(not (DEMO / "subjects").exists(), reason="demo/subjects is not built here")
def test_subjects_are_held_out_and_load_with_datasets(tmp_path):
    from datasets import load_dataset

    folders = sorted(path for path in (DEMO / "subjects").iterdir() if path.is_dir())
    assert len(folders) >= 4
    for folder in folders:
        assert world.SUBJECTS[folder.name].subject in world.HELD_OUT
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert len(lines) == 5 == len({line["text"] for line in lines})
        for line in lines:
            assert (folder / line["file_name"]).exists()
            assert line["text"].count("{}") == 1
            assert any(phrase in line["text"] for phrase in world.BACKGROUNDS.values())
    data = load_dataset("imagefolder", data_dir=str(folders[0]), split="train", cache_dir=str(tmp_path))
    assert len(data) == 5 and data[0]["image"].size == (64, 64) and "{}" in data[0]["text"]
