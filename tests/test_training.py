"""Whole runs on the demo base: outputs, resuming, processes, and that nothing ever runs backwards."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPT, as_arguments
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

import train_zoodip_textual_inversion as zoodip
from demo import world
from personalization import flags
from personalization.data import examples, prompts
from personalization.errors import DivergedError, InputError
from personalization.models.families import SD1, TextEncoders
from personalization.runs import checkpoints, launch


def embeds(folder, name="learned_embeds.safetensors"):
    return load_file(folder / name)["<my-toy>"]


def test_launch_writes_everything_and_diffusers_reads_it(launch, basics, demo_base):
    basics |= {"--validation_prompt": "a photo of {} on the beach", "--validation_steps": 2, "--num_vectors": 2}
    basics |= {
        "--num_validation_images": 2,
        "--num_inference_steps": 2,
        "--save_steps": 2,
        "--report_to": "tensorboard",
    }
    basics |= {"--checkpointing_steps": 1, "--checkpoints_total_limit": 2, "--logging_steps": 1, "--save_a1111": True}
    output = launch(*as_arguments(basics)).stderr
    out = Path(basics["--output_dir"])
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and "logs" not in p.parts}
    parts = {"state.pt", "settings.json", "generators_0.pt", "manifest.json"}
    assert written == {
        ".lock",
        "learned_embeds.safetensors",
        "learned_embeds-best.safetensors",
        "learned_embeds-steps-2.safetensors",
        "my-toy.pt",
        "my-toy.safetensors",
        "loss_curve.png",
        "zoodip_config.json",
        "README.md",
        "samples/image_0.png",
        "samples/image_1.png",
        "validation/step-000000.png",
        "validation/step-000002.png",
        "validation/step-000003.png",
        *(f"checkpoint-{step}/{part}" for step in (2, 3) for part in parts),
    }
    assert list((out / "logs").rglob("events.out.tfevents*"))
    assert "unet:" in output and "of parameters quantized" in output and "Traceback" not in output
    config = json.loads((out / "zoodip_config.json").read_text())
    assert config["figures"]["steps"] == 3 and config["figures"]["forward_passes"] == 9
    assert config["components"]["unet"]["quantized_share"] > 0.9

    pipeline = StableDiffusionPipeline.from_pretrained(demo_base, dtype=torch.float32)
    pipeline.load_textual_inversion(str(out))
    learned = embeds(out)
    assert learned.shape[0] == 2 and learned.dtype == torch.float32
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<my-toy>", "<my-toy>_1"])
    torch.testing.assert_close(pipeline.text_encoder.get_input_embeddings().weight[ids].float(), learned)
    a1111 = torch.load(out / "my-toy.pt", weights_only=True)
    assert (out / "my-toy.safetensors").read_bytes() == (out / "learned_embeds.safetensors").read_bytes()
    assert torch.equal(a1111["string_to_param"]["*"], learned)


def test_every_vector_is_trained_and_all_else_is_frozen(train, demo_base, monkeypatch):
    seen = []
    original = zoodip.candidate_losses

    def watched(candidates, batch, family, text_encoder, unet, *rest, **more):
        assert not torch.is_grad_enabled()
        tensors = [candidates, *batch, *text_encoder.parameters(), *unet.parameters()]
        assert not any(tensor.requires_grad for tensor in tensors)
        losses = original(candidates, batch, family, text_encoder, unet, *rest, **more)
        assert losses.dtype == torch.float32 and not losses.requires_grad
        seen.append((text_encoder, unet))
        return losses

    monkeypatch.setattr(zoodip, "candidate_losses", watched)
    learned = embeds(train(num_vectors=3, quantization="none"))
    assert len(seen) >= 3
    _, unet = seen[0]
    start = initial_table(demo_base)[zoodip_ids(demo_base, "star")]
    moved = (learned - start).abs().amax(dim=1)
    assert (moved > 1e-6).all() and len(set(moved.tolist())) == 3
    fresh = UNet2DConditionModel.from_pretrained(demo_base, subfolder="unet")
    state = unet.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in fresh.state_dict().items())


def initial_table(demo_base):
    return load_file(Path(demo_base) / "text_encoder" / "model.safetensors")[
        "embeddings.token_embedding.weight"
    ].float()


def zoodip_ids(demo_base, word):
    return CLIPTokenizer.from_pretrained(demo_base, subfolder="tokenizer").convert_tokens_to_ids(word + "</w>")


@pytest.fixture(scope="module")
def demo_loss(demo_base):
    """The demo base in float32 with a fixed batch: `(loss_of(candidates, **), embedding start, placeholder id)`."""
    text_encoder = CLIPTextModel.from_pretrained(demo_base, subfolder="text_encoder", dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(demo_base, subfolder="unet", dtype=torch.float32).eval()
    scheduler = DDPMScheduler.from_pretrained(demo_base, subfolder="scheduler")
    table = text_encoder.get_input_embeddings().weight.detach()
    first = len(table)
    rows = zoodip.PromptRows(table, torch.arange(first), first, 600, "cpu", torch.float32)
    text_encoder.set_input_embeddings(rows)
    text_encoder.requires_grad_(False), unet.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    vocabulary = CLIPTokenizer.from_pretrained(demo_base, subfolder="tokenizer")
    prompt = vocabulary("a photo of a star on the beach", padding="max_length", return_tensors="pt").input_ids
    prompt = torch.where(prompt == zoodip_ids(demo_base, "star"), first, prompt)
    assert (prompt == first).sum() == 1
    latents = torch.randn(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size, generator=g)
    batch = examples.noise_batch(SD1, latents, prompt, torch.tensor([600]), g, scheduler)
    start = table[zoodip_ids(demo_base, "star")][None].clone()

    def loss_of(candidates, **rest):
        networks = SD1, TextEncoders(SD1, [text_encoder]), unet
        return zoodip.candidate_losses(candidates, batch, *networks, first, **rest)

    return loss_of, start, (text_encoder, unet, batch, first)


def test_split_and_batched_candidates_agree(demo_loss):
    loss_of, start, _ = demo_loss
    candidates = start + 0.05 * torch.randn(7, *start.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = loss_of(candidates)
        for size in (1, 2, 3, 7, 10):
            torch.testing.assert_close(loss_of(candidates, max_candidates=size), whole, rtol=1e-5, atol=1e-6)
    assert len(whole.unique()) == 7


def test_candidates_of_several_vectors_keep_to_their_own_rows(demo_loss):
    _, start, (text_encoder, unet, batch, first) = demo_loss
    ids = batch.prompt_ids.clone()
    ids[0, (ids[0] == first).nonzero()[0, 0] + 1] = first + 1  # the second vector, in the place of a word
    candidates = start + 0.05 * torch.randn(4, 2, start.shape[-1], generator=torch.Generator().manual_seed(1))
    model = batch._replace(prompt_ids=ids), SD1, TextEncoders(SD1, [text_encoder]), unet, first
    with torch.inference_mode():
        together = zoodip.candidate_losses(candidates, *model)
        one_by_one = zoodip.candidate_losses(candidates, *model, max_candidates=1)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
    assert len(together.unique()) == 4


def test_a_compiled_model_meets_passes_of_one_size(demo_loss):
    """Seven candidates in passes of three: the last is filled up, and what fills it up is left out of the losses."""
    loss_of, start, (_, unet, *_) = demo_loss
    candidates = start + 0.05 * torch.randn(7, *start.shape, generator=torch.Generator().manual_seed(1))
    sizes = []
    hook = unet.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with torch.inference_mode():
        expected = loss_of(candidates, max_candidates=3)
        found = loss_of(candidates, max_candidates=3, whole_passes=True)
        loss_of(candidates[:1], max_candidates=3, whole_passes=True)  # a pass alone stays as it is
    hook.remove()
    assert sizes == [3, 3, 1, 3, 3, 3, 1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_mean_estimate_points_along_autograds_gradient(demo_loss):
    """2,400 directions on the demo base: cosine above 0.95 with backpropagation through text encoder and UNet."""
    loss_of, start, (text_encoder, unet, batch, first) = demo_loss
    theta = start.clone().requires_grad_(True)
    table = text_encoder.get_input_embeddings().weight
    rows = torch.cat([table[:first].detach(), theta, table[first + 1 :].detach()])
    name = next(n for n, p in text_encoder.named_buffers() if p is table)
    hidden = torch.func.functional_call(text_encoder, {name: rows}, (batch.prompt_ids,))[0]
    prediction = unet(batch.noisy_latents, batch.timesteps, hidden).sample
    loss = torch.nn.functional.mse_loss(prediction, batch.target)
    (gradient,) = torch.autograd.grad(loss, theta)

    g, total = torch.Generator().manual_seed(2), torch.zeros_like(start)
    with torch.inference_mode():
        assert loss_of(start).item() == pytest.approx(loss.item(), rel=1e-4)
        for _ in range(6):
            total += zoodip.estimate_gradient(lambda c: loss_of(c, max_candidates=101), start, 400, 1e-2, g)[0]
    cosine = torch.cosine_similarity(total.flatten(), gradient.flatten(), dim=0)
    assert cosine > 0.95, float(cosine)


RESUME = {
    "--max_train_steps": 14,
    "--checkpointing_steps": 4,
    "--sg_window": 3,
    "--sg_threshold": 0.6,
    "--validation_steps": 5,
}
RESUME |= {"--num_vectors": 2, "--gradient_accumulation_steps": 2, "--lr_scheduler": "cosine", "--train_batch_size": 2}


# What both optimizers take of it.
RESUME_GAUSS_NEWTON = {k: v for k, v in RESUME.items() if not k.startswith("--sg_") and k != "--lr_scheduler"}
RESUME_GAUSS_NEWTON |= {"--optimizer": "gauss_newton", "--gn_subspace_dimension": 2}


@pytest.mark.parametrize("flags", [RESUME, RESUME_GAUSS_NEWTON], ids=["zo_adam", "gauss_newton"])
def test_resumed_run_equals_the_uninterrupted_one(train, tmp_path, flags):
    flags = {name.lstrip("-"): value for name, value in flags.items()}
    whole = train(**flags, output_dir=tmp_path / "whole")
    parts = tmp_path / "parts"
    train(**flags | {"output_dir": parts})
    for leftover in ("learned_embeds.safetensors", "learned_embeds-best.safetensors"):
        (parts / leftover).unlink()
    (parts / "checkpoint-12").rename(parts / ".tmp-checkpoint-12")  # as if killed while writing it
    train(**flags | {"output_dir": parts, "resume_from_checkpoint": "latest"})
    for name in ("learned_embeds.safetensors", "learned_embeds-best.safetensors"):
        if (parts / name).is_file():
            assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert (parts / "learned_embeds.safetensors").is_file()
    first, second = (json.loads((d / "zoodip_config.json").read_text())["figures"] for d in (whole, parts))
    same = ("steps", "forward_passes", "best_validation_loss", "best_step", "final_loss")
    assert {k: first[k] for k in same} == {k: second[k] for k in same}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_has_a_checkpoint_and_resumes_bit_identical(train, tmp_path, monkeypatch, number):
    flags = {"quantization": "none", "num_validation_samples": 0, "logging_steps": 2, "checkpointing_steps": 100}
    whole = embeds(train(**flags, max_train_steps=5, output_dir=tmp_path / "whole"))
    step, done = zoodip.train_step, []

    def stopped_in_the_third(*args):
        done.append(None)
        if len(done) == 3:
            signal.getsignal(number)(number, None)  # real ones are sent in test_faults.py
        return step(*args)

    monkeypatch.setattr(zoodip, "train_step", stopped_in_the_third)
    before = signal.signal(number, signal.default_int_handler)  # a suite in the background ignores Ctrl+C
    try:
        with pytest.raises(KeyboardInterrupt):
            train(**flags, max_train_steps=5)
        assert len(done) == 3 and signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    out = train(**flags, max_train_steps=5, resume_from_checkpoint="latest")
    assert len(done) == 5 and torch.equal(embeds(out), whole)


def test_killed_run_resumes_bit_identical(run_script, basics, tmp_path):
    flags = basics | RESUME | {"--max_train_steps": 24, "--checkpointing_steps": 5, "--validation_steps": 12}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(SCRIPT), *as_arguments(flags | {"--output_dir": killed})]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while not (killed / "checkpoint-5").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "learned_embeds.safetensors").exists(), "the run ended before it could be killed"
    resumed = run_script(
        *as_arguments(flags | {"--output_dir": killed, "--resume_from_checkpoint": "latest", "--report_to": "none"})
    )
    assert "Resumed from" in resumed.stderr
    run_script(*as_arguments(flags | {"--output_dir": whole}))
    name = "learned_embeds.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


RANK_DUMP = """
import sys, torch
import train_zoodip_textual_inversion as zoodip
from personalization.runs import checkpoints
original = checkpoints.save_checkpoint
def dump(accelerator, output_dir, state, *rest):
    torch.save({"theta": state.shared["theta"], "processes": accelerator.num_processes},
               f"{output_dir}/rank-{accelerator.process_index}-step-{state.step}.pt")
    original(accelerator, output_dir, state, *rest)
checkpoints.save_checkpoint = dump
validations = []
def rising(*_):
    # a held-out loss that only the first process computes, and that only ever rises
    assert zoodip.os.environ["RANK"] == "0"
    validations.append(1)
    return float(len(validations))
zoodip.held_out_loss = rising
zoodip.main(zoodip.parse_args(sys.argv[1:]))
"""


def test_two_processes_stay_identical(basics, repo, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys; sys.path.insert(0, {str(repo)!r})\n" + RANK_DUMP)
    flags = basics | {"--max_train_steps": 50, "--checkpointing_steps": 4, "--sg_window": 3}
    flags |= {"--validation_steps": 2, "--early_stopping_patience": 4}  # of 0, 2, ... 8 the first is the best
    # On CPUs `accelerate launch` starts one process only; torchrun starts two, and accelerate picks up its variables.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(driver), *as_arguments(flags)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    for step in (4, 8):
        first, second = (torch.load(out / f"rank-{r}-step-{step}.pt", weights_only=True) for r in (0, 1))
        assert first["processes"] == 2
        assert torch.equal(first["theta"], second["theta"])
    states = [torch.load(out / "checkpoint-8" / f"generators_{r}.pt", weights_only=True) for r in (0, 1)]
    assert not torch.equal(states[0]["perturbations"], states[1]["perturbations"])  # each drew its own directions
    assert json.loads((out / "zoodip_config.json").read_text())["figures"]["forward_passes"] == 8 * 3 * 2


def test_early_stopping_of_two_processes_is_one_verdict(train, monkeypatch):
    """What the first process says is what counts: here another process, whose own loss would never stop it."""
    monkeypatch.setattr(zoodip, "broadcast_object_list", lambda values: [1.0])
    monkeypatch.setattr(zoodip, "held_out_loss", lambda *_: pytest.fail("only the first process computes it"))
    monkeypatch.setattr(launch.Accelerator, "is_main_process", property(lambda self: False))
    out = train(max_train_steps=20, validation_steps=1, early_stopping_patience=2, checkpointing_steps=100)
    assert not (out / "learned_embeds.safetensors").exists()


def test_validation_does_not_disturb_training(train, tmp_path):
    quiet = train(output_dir=tmp_path / "quiet", num_validation_samples=0, validation_steps=100)
    busy = train(
        output_dir=tmp_path / "busy",
        validation_steps=1,
        validation_prompt="a photo of <my-toy>",
        num_inference_steps=1,
        num_validation_images=1,
    )
    assert torch.equal(embeds(quiet), embeds(busy))


def test_pictures_held_out_are_judged_and_not_trained_on(train, basics, subject, tmp_path):
    (tmp_path / "more").mkdir()
    world.save_pictures(tmp_path / "more", world.held_out_pictures(subject.name, 3))
    out = train(validation_data_dir=tmp_path / "more", num_validation_samples=5)
    config = json.loads((out / "zoodip_config.json").read_text())
    assert config["settings"]["validation_data_dir"] == "more"  # no folder of this machine is published
    assert "of pictures held out" in (out / "README.md").read_text()
    args = zoodip.parse_args(as_arguments(basics | {"--validation_data_dir": tmp_path / "more"}))
    base, placeholder, compute = zoodip.resolve_settings(args, torch.device("cpu"))
    pictures = zoodip.read_pictures(args)
    captions = prompts.build_prompts(pictures, placeholder, base)
    held_out = zoodip.read_held_out(args, base, placeholder, pictures)
    task = zoodip.prepare(args, base, placeholder, compute, pictures, captions, held_out=held_out)
    assert task.held_out.moments.shape[:2] == (1, 3)  # as they are, not mirrored
    rows = {tuple(row) for row in task.held_out.prompt_ids.tolist()}
    judged = zoodip.draw_held_out(task)
    assert all(tuple(row) in rows for batch, count in judged for row in batch.prompt_ids[:count].tolist())
    assert zoodip.held_out_loss(task.model, task.initial[None], judged) > 0  # their words have rows
    others = zoodip.draw_held_out(replace(task, held_out=None))
    assert not any(torch.equal(one.target, other.target) for (one, _), (other, _) in zip(judged, others))


def test_a_picture_that_is_trained_on_is_not_held_out(train, subject, capsys):
    with pytest.raises(InputError, match=r"--validation_data_dir: 0\.png is trained on, as 0\.png"):
        train(validation_data_dir=subject)
    with pytest.raises(SystemExit):
        train(validation_data_dir=subject, num_validation_samples=0)
    assert "--validation_data_dir is for the validation loss" in capsys.readouterr().err


def test_early_stopping_and_the_best_embedding(train, monkeypatch):
    """A validation loss that only ever rises: the start stays the best, and patience ends the run."""
    out = train(
        learning_rate=5.0,
        max_train_steps=50,
        validation_steps=1,
        early_stopping_patience=2,
        num_validation_samples=4,
        adam_epsilon=1e-8,
    )
    figures = json.loads((out / "zoodip_config.json").read_text())["figures"]
    assert figures["steps"] < 50
    assert figures["steps"] == figures["best_step"] + 2
    assert not torch.equal(embeds(out), embeds(out, "learned_embeds-best.safetensors"))


def test_nan_stops_and_keeps_the_last_good_embedding(train, tmp_path):
    with pytest.raises(DivergedError, match=r"the loss became .* at step \d+: .*learning_rate"):
        train(learning_rate=1e30, max_train_steps=40, logging_steps=1, num_validation_samples=0)
    assert embeds(tmp_path / "out").isfinite().all()


def test_a_nan_is_never_saved_or_taken_for_the_result(train, tmp_path):
    """Between two read-outs of the loss the token may break: no checkpoint and no early stop may pass it on."""
    flags = {"learning_rate": 1e30, "logging_steps": 100, "max_train_steps": 40, "num_validation_samples": 2}
    with pytest.raises(DivergedError, match="the loss became"):
        train(**flags, validation_steps=3, early_stopping_patience=1, checkpointing_steps=3, save_steps=3)
    out = tmp_path / "out"
    assert embeds(out).isfinite().all() and embeds(out, "learned_embeds-best.safetensors").isfinite().all()
    for checkpoint in checkpoints.list_checkpoints(out):
        assert torch.load(checkpoint / "state.pt", weights_only=True)["theta"].isfinite().all()


def test_resume_under_other_settings_is_refused(train, tmp_path):
    train(max_train_steps=2, checkpointing_steps=1)
    with pytest.raises(InputError, match=r"other settings: learning_rate \(0.005, now 0.001\)"):
        train(resume_from_checkpoint="latest", learning_rate=1e-3)
    with pytest.raises(InputError, match="is not a checkpoint"):
        train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    train(resume_from_checkpoint="checkpoint-1", max_train_steps=3)  # a longer run is not another run


def test_a_checkpoint_knows_the_weights_it_was_trained_on(train, demo_base, tmp_path):
    base = Path(shutil.copytree(demo_base, tmp_path / "base"))
    train(max_train_steps=1, checkpointing_steps=1, pretrained_model_name_or_path=base)
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="other settings: weights of the model"):
        train(max_train_steps=2, pretrained_model_name_or_path=base, resume_from_checkpoint="latest")


def test_checkpoints_are_rotated(train):
    out = train(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert [p.name for p in checkpoints.list_checkpoints(out)] == ["checkpoint-4", "checkpoint-5"]


def test_full_pipeline_knows_the_word(train):
    out = train(save_as_full_pipeline=True)
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline")
    assert "<my-toy>" in pipeline.tokenizer.get_vocab()
    image = pipeline("a photo of <my-toy>", num_inference_steps=2, output_type="np").images
    assert np.isfinite(image).all()


@pytest.mark.parametrize("quantization", ["nf4", "quanto-int8", "none"])
def test_other_backends_train(train, quantization):
    assert embeds(train(quantization=quantization)).isfinite().all()


def test_spsa_and_bf16_train(train):
    out = train(gradient_estimator="spsa", mixed_precision="bf16", perturbation_scale=1e-2)
    assert json.loads((out / "zoodip_config.json").read_text())["figures"]["forward_passes"] == 3 * 4


def test_epochs_count_repeats_and_accumulation(train, subject):
    out = train(max_train_steps=None, num_train_epochs=1, repeats=4, train_batch_size=2, gradient_accumulation_steps=2)
    images = len(list(subject.glob("*.png")))
    steps = json.loads((out / "zoodip_config.json").read_text())["figures"]["steps"]
    assert steps == -(-images * 4 // 4)


def test_every_flag_is_read(repo):
    """Each destination of the parser is used as `args.name` in script or package, outside parser and checks."""
    read = set()
    for path in (SCRIPT, *(p for p in (repo / "personalization").rglob("*.py") if p.stem != "flags")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        readers = [n for n in body if getattr(n, "name", "") not in ("parse_args", "check_arguments")]
        read |= {
            node.attr
            for reader in readers
            for node in ast.walk(reader)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args")
        }
    declared = set(flags.actions(zoodip.make_parser()))
    assert len(declared) > 50 and declared - read == set()


def test_held_out_passes_are_as_large_as_training_passes(train, monkeypatch):
    """16 examples in passes of 3: the last pass is padded, so that a compiled UNet never meets another shape."""
    sizes, losses, original = set(), [], zoodip.example_losses

    def watched(candidates, batch, *rest, **more):
        result = original(candidates, batch, *rest, **more)
        sizes.add(len(candidates) * len(batch.timesteps))
        losses.append(result)
        return result

    monkeypatch.setattr(zoodip, "example_losses", watched)
    out = train(max_train_steps=1)
    assert sizes == {3}
    first_loss = torch.cat([x.flatten() for x in losses[:6]])[:16].mean()  # at step 0: 6 passes, the last two padding
    figures = json.loads((out / "zoodip_config.json").read_text())["figures"]
    assert figures["validation_losses"][0][1] == pytest.approx(first_loss.item())


def test_validation_grid_shows_every_image(train):
    out = train(validation_prompt="a photo of {}", num_validation_images=3, num_inference_steps=1)
    with Image.open(out / "validation" / "step-000000.png") as grid:
        assert grid.size == (3 * 64, 64)


def test_all_lines_of_a_run_are_its_own(launch, basics):
    """No library's alarm stands before, between or after the lines of the script."""
    flags = {"--max_train_steps": 1, "--num_inference_steps": 1, "--num_validation_images": 1}
    flags |= {"--save_as_full_pipeline": True, "--validation_prompt": "a {}"}
    done = launch(
        *as_arguments(basics | flags),
        launcher=("--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
    )
    lines = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]
    assert len(done.stdout.splitlines()) == 3  # how to draw with the word
    assert lines and not [line for line in lines if not re.match(r"\d\d:\d\d:\d\d - (INFO|WARNING) - ", line)]
