#!/usr/bin/env python
# Copyright 2026 The ZOODiP textual inversion authors. SPDX-License-Identifier: Apache-2.0
#
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11", "diffusers>=0.42.1", "transformers>=5.23", "accelerate>=1.15", "peft>=0.21",
#     "huggingface_hub>=2.4", "datasets>=5.2", "safetensors>=0.8", "bitsandbytes>=0.50", "psutil>=7.2", "Jinja2>=3.1",
#     "matplotlib>=3.10", "numpy>=2.0", "pillow>=12.0", "tensorboard>=2.21", "tqdm>=4.66",
# ]
# ///
"""Personalise a quantized Stable Diffusion by its quantization scales alone (TuneQDM, arXiv 2401.04339).

The shortest command that works, offline, on the demo base of this repository:

    python train_tuneqdm_dreambooth.py \
        --pretrained_model_name_or_path demo/base_eps --instance_data_dir demo/subjects/striped_star \
        --subject_name star --train_batch_size 4 --max_train_steps 200 --output_dir star-scales

and on Stable Diffusion 1.5:

    python train_tuneqdm_dreambooth.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --instance_data_dir ./my-dog \
        --instance_prompt "a photo of sks dog" --scale_sets 4 --train_input_scales --gradient_checkpointing \
        --output_dir my-dog-scales

It is DreamBooth on a UNet whose weights are integers: those stay, and of every Linear and Conv2d only the scales are
trained, one per output channel and, on request, per input channel. The result is a few megabytes, or kilobytes on a
small model, that `tuneqdm_pipeline.py` reads.
"""

import personalization.quick_help  # noqa: F401, before the libraries that take seconds
import personalization.quiet  # noqa: F401, before the libraries whose false alarms it silences


# isort: split
import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler

import train_zoodip_textual_inversion as zoodip
import tuneqdm_pipeline as tuneqdm
from personalization import flags
from personalization.data import examples
from personalization.errors import DivergedError, InputError, run_script
from personalization.logs import get_logger
from personalization.methods import dreambooth
from personalization.methods.dreambooth import (
    Subject,
    check_class_folder,
    denoising_errors,
    draw_validation_images,
    dreambooth_loss,
    fill_in,
    instance_texts,
    read_instances,
)
from personalization.models import base_model, memory
from personalization.models.base_model import StoredModel
from personalization.models.compute import Compute, choose_compute
from personalization.models.families import Family
from personalization.runs import checkpoints, embeddings, hub, launch, loop, provenance, run_folder
from personalization.runs.results import Result, write_result
from tuneqdm_pipeline import ScaleConfig


logger = get_logger(__name__)

# =====================================================================================================
# The algorithm: TuneQDM, arXiv 2401.04339. The quantizer, the layers that compute with integer weights, and which set
# of scales belongs to which timestep are in `tuneqdm_pipeline.py`, which draws with what is trained here.
# =====================================================================================================


def new_changes(unet, num_sets, input_scales):
    """The scales as they are trained: relative to their start, s = s₀ (1 + δ), with δ = 0 to begin with.

    So one learning rate serves INT4 and INT8, whose scales differ by 17 times, and scales of output channels (about
    1e-3 in INT8) and of input channels (1). An absolute rate η, such as the official 3e-6, is η / s₀ here: 3e-3 where
    s₀ is 1e-3, and 2e-4 in INT4. Weight decay pulls towards the base model's own scales, not towards zero.

    Args:
        unet: quantized.
        num_sets: N, sets for intervals of timesteps.
        input_scales: whether input channels have scales, too (v2, multi-channel-wise scale update).

    Returns:
        Name -> δ, float32 `[N, channels]`, leaves of autograd; `tuneqdm.change_shapes` has the names.
    """
    shapes, device = tuneqdm.change_shapes(unet, num_sets, input_scales), unet.device
    return {name: torch.zeros(shape, device=device, requires_grad=True) for name, shape in shapes.items()}


def draw_timesteps(count, trained, generator):
    """t ~ U over the timesteps that have a set to train.

    Args:
        count: how many.
        trained: those timesteps, LongTensor `[n]`: all, or for S1 those inside the intervals.
        generator: source of randomness.

    Returns:
        LongTensor `[count]`.
    """
    return trained[torch.randint(len(trained), (count,), generator=generator)]


# =====================================================================================================
# The quantized model
# =====================================================================================================


class Integers(zoodip.Unquantized):
    """`--bits` and `--calibration`: integer weights with scales and zero points, which `tuneqdm_pipeline.py` defines.

    Args:
        bits: 8 or 4.
        calibration: "minmax" or "mse".
    """

    cached = True
    settings = (tuneqdm.SHARES,)

    def __init__(self, bits, calibration):
        self.bits, self.calibration, self.name = bits, calibration, f"tuneqdm{bits}-{calibration}"

    def quantizes(self, layer):
        return isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))

    def replace_layers(self, model, dtype):
        tuneqdm.replace_layers(model, self.bits)

    def tensors(self, model, stored, dtype):
        layers = tuneqdm.quantized_layers(model)
        for name, value in stored:
            layer, _, leaf = name.rpartition(".")
            if leaf == "weight" and layer in layers:
                encoded = tuneqdm.encode(value, self.bits, self.calibration)
                yield from zip((f"{layer}.integers", f"{layer}.scale", f"{layer}.zero"), encoded)
            else:
                yield name, value.to(dtype)


def load_unet(args, base, compute):
    """The frozen UNet with integer weights, and its `StoredModel`."""
    backend = Integers(args.bits, args.calibration)
    unet, share = zoodip.load_frozen(base, "unet", backend, compute, args.quantized_cache_dir)
    return unet, StoredModel(memory.tensor_bytes(unet), share)


@dataclass
class Model:
    """The quantized UNet, and what it is conditioned on."""

    family: Family
    unet: UNet2DConditionModel
    selection: tuneqdm.Selection
    scheduler: DDPMScheduler
    conditioning: torch.Tensor  # text embeddings of all prompts [P, length, d]
    compute: Compute

    def errors(self, batch):
        """`denoising_errors` of a `Batch` whose prompts are rows of `conditioning`."""
        conditioning = self.conditioning[batch.prompt_ids]
        return denoising_errors(self.family, self.unet, batch, conditioning, self.compute.memory_format)


# =====================================================================================================
# One update of the scales
# =====================================================================================================


@dataclass(frozen=True)
class Sampling:
    """What an update is computed from."""

    trained: torch.Tensor  # timesteps that have a set to train, LongTensor [n] on the host
    batch_size: int  # examples of the subject, and as many of its class, if that is preserved
    prior_weight: float  # λ
    accumulation_steps: int
    max_grad_norm: float


@dataclass
class Learner:
    """What is learned, and all that changes with it."""

    changes: dict  # name -> δ float32 [N, channels]: the very tensors that the layers compute with
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler  # of the loss, so that float16 gradients do not vanish; idle in other precisions
    data: torch.Generator  # this process's source of randomness; the global one is never touched

    def state_dict(self):
        """What all processes have in common."""
        return {
            "changes": {name: change.detach() for name, change in self.changes.items()},
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state):
        self.copy_changes(state["changes"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.scaler.load_state_dict(state["scaler"])

    @torch.no_grad()
    def copy_changes(self, changes):
        for name, change in self.changes.items():
            change.copy_(changes[name])

    def generators(self):
        return {"data": self.data}


def draw_batch(subject, sampling, scheduler, generator):
    """A `Batch` on the host: examples of the subject, then of its class, each noised to a timestep of its own."""
    latents, rows, inside = dreambooth.draw_subject(subject, sampling.batch_size, generator)
    timesteps = draw_timesteps(len(latents), sampling.trained, generator)
    family = subject.instance.family
    return examples.noise_batch(family, latents, rows, timesteps, generator, scheduler, weights=inside)


def train_step(learner, model, subject, sampling, average=lambda tensor: tensor):
    """One update of the scales: DreamBooth's loss, backwards through integer weights, AdamW on the changes δ.

    Args:
        learner: `Learner`, changed in place.
        model: `Model`.
        subject: `Subject`.
        sampling: `Sampling`.
        average: takes the mean of a tensor over processes.

    Returns:
        The mean loss of this process, a scalar on the device. Nothing here waits for it, but for the scaler of float16
        gradients, which asks once a step whether they have overflown.
    """
    device, scaler = model.compute.device, learner.scaler
    mean_loss = torch.zeros((), device=device)
    for _ in range(sampling.accumulation_steps):
        batch = draw_batch(subject, sampling, model.scheduler, learner.data).to(device)
        loss = dreambooth_loss(model.errors(batch), sampling.batch_size, sampling.prior_weight)
        scaler.scale(loss / sampling.accumulation_steps).backward()
        mean_loss += loss.detach() / sampling.accumulation_steps
    changes = list(learner.changes.values())
    # A layer that the model has and does not use gets no gradient. One message, not one for every layer.
    gradients = [torch.zeros_like(change) if change.grad is None else change.grad for change in changes]
    flat = average(torch.cat([gradient.flatten() for gradient in gradients]))
    for change, gradient in zip(changes, flat.split([change.numel() for change in changes])):
        change.grad = gradient.view_as(change)
    scaler.unscale_(learner.optimizer)
    torch.nn.utils.clip_grad_norm_(changes, sampling.max_grad_norm)
    scaler.step(learner.optimizer)
    scaler.update()
    learner.lr_scheduler.step()
    learner.optimizer.zero_grad()
    return mean_loss


# =====================================================================================================
# Settings: completed and checked against the base's small files, before any weight is loaded
# =====================================================================================================


def read_intervals(text):
    """`--scale_intervals` as pairs [first, end) in rising order; None stays None.

    Raises:
        InputError: one is empty, two overlap, or it says something else.
    """
    if text is None:
        return None
    fix = "give intervals of timesteps such as 500-900 or 0-100,500-900"
    pairs = [re.fullmatch(r"(\d{1,7})-(\d{1,7})", part.strip()) for part in text.split(",")]
    if not all(pairs):
        raise InputError(f"--scale_intervals {text[:80]!r} cannot be read: {fix}.")
    pairs = sorted((int(pair[1]), int(pair[2])) for pair in pairs)
    for first, end in pairs:
        if first >= end:
            raise InputError(f"--scale_intervals {first}-{end} is empty (its end does not belong to it): {fix}.")
    for before, after in zip(pairs, pairs[1:]):
        if after[0] < before[1]:
            both = " and ".join(f"{first}-{end}" for first, end in (before, after))
            raise InputError(f"--scale_intervals {both} overlap, and there is one set of scales for both: {fix}.")
    return pairs


def resolve_settings(args, device):
    """Completes `args` with what the base decides and checks them against it; see `launch.settle` for the last ones.

    Returns:
        `Base`, `Compute`, and the set of each timestep (`tuneqdm.set_of_timestep`).

    Raises:
        InputError: a setting cannot work.
    """
    compute, _ = choose_compute(device, args.mixed_precision)
    args.activations = str(compute.dtype).removeprefix("torch.")
    source = base_model.ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant)
    base = base_model.open_base(source, args.tokenizer_name)
    timesteps = base.scheduler.config.num_train_timesteps
    intervals = read_intervals(args.scale_intervals)
    outside = {name: getattr(args, name) for name in ("scale_sets", "num_inference_steps")}
    outside["scale_intervals"] = intervals[-1][1] if intervals else 1
    for name, value in outside.items():
        if value > timesteps:
            raise InputError(f"--{name} {value} is more than this model has timesteps: give at most {timesteps}.")
    args.resolution = base_model.check_resolution(base, args.resolution)
    args.center_crop = True
    return base, compute, tuneqdm.set_of_timestep(timesteps, args.scale_sets, intervals)


# =====================================================================================================
# Flags
# =====================================================================================================

PUBLICATION = hub.Publication(
    script=Path(__file__),
    config_name=tuneqdm.CONFIG_FILE,
    result_name=tuneqdm.SCALES_FILE,
    files=("loss_curve.png", "samples/*.png"),
    pipeline_name="tuneqdm_pipeline.py",
    tags=("tuneqdm", "dreambooth", "diffusers-training", "stable-diffusion", "diffusers"),
    card_name="model_cards/tuneqdm.md",
    keyword="tuneqdm_scales",
)

REFUSED_FLAGS = dreambooth.REFUSED_FLAGS | {
    "--use_8bit_adam": "the optimizer's state is some megabytes, there are only scales to train: drop it.",
    "--quantization": "weights are always integers: give --bits 8 or 4.",
}


def parse_args(input_args=None):
    """Parses and checks the command line (of the process, or a list of strings); bad input exits with code 2."""
    parser = make_parser()
    args = flags.parse(parser, input_args, REFUSED_FLAGS)
    if not args.push_only:
        check_arguments(parser, args)
    return args


def make_parser():
    """The parser, with every flag."""
    parser = flags.new_parser(
        __file__,
        "TuneQDM: DreamBooth on a quantized Stable Diffusion, of which only the scales are trained.",
        "%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt PROMPT [options]",
    )
    flags.add_model_arguments(parser, predicts_memory=False)
    add_scale_arguments(flags.group(parser, "quantization and scales"))
    concept = "{} stands for --subject_name"
    dreambooth.add_subject_arguments(flags.add_data_arguments(parser, "instance_data_dir", concept))
    dreambooth.add_backward_arguments(flags.add_training_arguments(parser))
    override_training_arguments(parser)
    flags.add_validation_arguments(parser)
    add = flags.add_saving_arguments(parser)
    half = "Save the scales in float16: half the size."
    add("--save_half", action="store_true", decides=flags.NOTHING, page=True, help=half)
    flags.add_hub_arguments(parser)
    return parser


def add_scale_arguments(add):
    bits = "Bits of the UNet's weights; 4: two weights to a byte."
    add("--bits", type=int, choices=[8, 4], default=8, page=True, help=bits)
    add(
        "--calibration",
        choices=["minmax", "mse"],
        default="minmax",
        page=True,
        help="Range of a channel's integers: all of it, or that with the least squared error, for 4 bits (slower: once"
        " in training, and whenever the pipeline is loaded).",
    )
    add(
        "--scale_sets",
        type=int,
        default=1,
        limits=flags.Range(1, 1000),
        page=True,
        help="N: sets of scales, each trained and used for its own part of the timesteps (S2); 1 is PEQA.",
    )
    add(
        "--scale_intervals",
        page=True,
        help="Timesteps in which one set is trained and used, the original scales elsewhere (S1): 500-900, or several,"
        " 0-100,500-900; the end does not belong to an interval.",
    )
    inputs = "Train a scale per input channel, too (v2's MCSU)."
    add("--train_input_scales", action="store_true", page=True, help=inputs)


def override_training_arguments(parser):
    """Defaults that are TuneQDM's: those of the official code, the learning rate relative to the scales."""
    override = functools.partial(flags.override, parser)
    override("output_dir", default="tuneqdm-model")
    override("seed", help="Seed of data, noise and class images.")
    override("max_train_steps", help=f"Updates in all. Default: {OFFICIAL_STEPS}, as in the official code.")
    override("gradient_accumulation_steps", help="Batches averaged before one update.")
    override("center_crop", decides=flags.NOTHING, help=dreambooth.CROPS)
    rate = "Learning rate of AdamW, relative to the scales (an absolute η is η / scale)."
    override("learning_rate", default=1e-2, help=rate)
    decay = "Weight decay of AdamW, towards the base model's own scales."
    override("adam_weight_decay", default=1e-2, help=decay)
    override("adam_epsilon", default=1e-8, help="ε of AdamW.")


OFFICIAL_STEPS = 400


def check_arguments(parser, args):
    """Everything that can be judged without looking at a file; each fault is one sentence and exit code 2."""
    flags.check_shared_arguments(parser, args, "instance_data_dir")
    if args.scale_intervals is not None and args.scale_sets > 1:
        parser.error("--scale_intervals (S1) has one set of scales: drop it or --scale_sets (S2).")
    try:
        read_intervals(args.scale_intervals)
    except InputError as error:
        parser.error(str(error))
    dreambooth.check_subject_arguments(parser, args)


# =====================================================================================================
# The chapters of a run
# =====================================================================================================


@dataclass(kw_only=True)
class Run(loop.Run):
    """A training run; its `model` is a `Model`, its `learner` a `Learner`."""

    subject: Subject
    sampling: Sampling
    average: Callable  # of a tensor, over processes
    validation_embeddings: dict  # keywords of a pipeline's call, in the place of prompt and text encoder


def start_learner(args, changes, compute, num_processes=1, process_index=0):
    """A `Learner` at its first step, from the changes that the layers compute with."""
    per_update = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    optimizer = torch.optim.AdamW(
        list(changes.values()),
        lr=args.learning_rate * (per_update if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        foreach=True,  # hundreds of small tensors at a time, on CPUs too
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
    )
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype == torch.float16)
    seed = int(np.random.SeedSequence([args.seed, process_index]).generate_state(1)[0])
    return Learner(changes, optimizer, lr_scheduler, scaler, torch.Generator().manual_seed(seed))


def choose_sampling(args, table):
    """The `Sampling` that the settings ask for; `table`: the set of each timestep."""
    trained = (table >= 0).nonzero().flatten()
    steps = args.gradient_accumulation_steps
    return Sampling(trained, args.train_batch_size, args.prior_loss_weight, steps, args.max_grad_norm)


def load_model(args, base, compute, table, conditioning):
    """The quantized UNet with changes of its scales in place, at zero.

    Returns:
        `Model`, the changes (`new_changes`), and the UNet's `StoredModel`.
    """
    unet, stored = load_unet(args, base, compute)
    selection = next(iter(tuneqdm.quantized_layers(unet).values())).selection
    changes = new_changes(unet, args.scale_sets, args.train_input_scales)
    tuneqdm.attach(unet, changes)
    selection.use(table)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return Model(base.family, unet, selection, base.scheduler, conditioning, compute), changes, stored


def train(run):
    """The training loop.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    args, accelerator, learner, progress = run.args, run.accelerator, run.learner, run.progress
    memory.prepare_training(small_heap=args.gradient_checkpointing)
    last_good = {name: change.detach().clone() for name, change in learner.changes.items()}
    clock = loop.Clock(progress)
    interval_loss, interval = torch.zeros((), device=run.model.compute.device), 0
    if progress.step == 0:
        draw_validation_images(run)
    per_batch = args.train_batch_size * (2 if run.subject.prior else 1)
    passes = per_batch * args.gradient_accumulation_steps * accelerator.num_processes
    bar = loop.progress_bar(accelerator, progress.step, args.max_train_steps)
    with loop.stop_requests(run) as stop_requested, bar:
        while not run.is_over:
            progress.forward_passes += passes
            interval_loss += train_step(learner, run.model, run.subject, run.sampling, run.average)
            progress.step = step = progress.step + 1
            interval += 1
            bar.update()
            last = step == args.max_train_steps

            # The one read-out of the device, before anything is saved: no NaN ever replaces a good checkpoint.
            due = last or any(step % every == 0 for every in (args.logging_steps, args.checkpointing_steps))
            stop = stop_requested(due)
            if due or stop:
                mean_loss = run.average(interval_loss / interval).item()
                check_finite(run, mean_loss, last_good)
                last_good = {name: change.detach().clone() for name, change in learner.changes.items()}
                run.history.loss.append((step, mean_loss))
                rate = learner.lr_scheduler.get_last_lr()[0]
                bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{rate:.1e}")
                loop.log(
                    accelerator, {"loss": mean_loss, "lr": rate, "steps_per_second": clock.steps_per_second}, step
                )
                interval_loss.zero_()
                interval = 0
            clock.read()
            if stop or step % args.checkpointing_steps == 0:
                run.save_checkpoint()
            if stop:
                raise KeyboardInterrupt
            if step % args.validation_steps == 0 and not last:  # the last ones follow the scales
                draw_validation_images(run)
    clock.read()


def check_finite(run, loss, last_good):
    """Ends the run with the last good scales saved once its loss is no longer finite, or they are out of bounds."""
    good = math.isfinite(loss)
    if good and all((change.abs() <= tuneqdm.LARGEST_CHANGE).all() for change in run.learner.changes.values()):
        return
    what = f"the changes of the scales went beyond {tuneqdm.LARGEST_CHANGE:g}" if good else f"the loss became {loss}"
    if run.accelerator.is_main_process:
        save_scales(run.results, last_good, describe_scales(run), run.args.save_half)
    raise DivergedError(
        f"{what} at step {run.progress.step}: training stopped and the last good scales are in"
        f" {run.args.output_dir}/{PUBLICATION.result_name}; try a smaller --learning_rate than"
        f" {run.args.learning_rate}."
    )


def save_scales(results, changes, config, half=False):
    """Writes what was learned: `tuneqdm.change_shapes` names the tensors, changes relative to the base's scales.

    Args:
        results: `run_folder.ResultFolder`.
        changes: name -> δ.
        config: their `ScaleConfig`.
        half: whether in float16.

    Raises:
        RunError: it is not in the run's folder; the message says where it is instead.
    """
    dtype = torch.float16 if half else torch.float32
    tensors = {name: change.detach().to("cpu", dtype).contiguous() for name, change in changes.items()}
    embeddings.save_content(results, PUBLICATION.result_name, tuneqdm.write_scales(tensors, config))


def finish(run, pictures, components, repo_id):
    """Writes the results, the scales before all else; returns `tuneqdm_config.json`'s content.

    Args:
        run: the trained `Run`.
        pictures: `Picture`s of the subject.
        components: name -> `StoredModel`.
        repo_id: where it will be pushed, or None.

    Raises:
        RunError: something could not be written; what could is there.
    """
    args, compute = run.args, run.model.compute
    scales = describe_scales(run)
    save_scales(run.results, run.learner.changes, scales, args.save_half)
    samples = draw_validation_images(run) or []
    figures = provenance.describe_figures(run.progress, run.history, compute.device)
    figures["trained_scales"] = sum(change.numel() for change in run.learner.changes.values())
    base_license = hub.base_license(run.base.root)
    method, name = "TuneQDM (arXiv 2401.04339)", args.subject_name or args.instance_prompt or "the subject"
    config = provenance.describe_result(args, method, base_license, compute, components, figures, subject=name)
    config |= {"run": run.id, "scales": scales._asdict()}
    result = Result(name, None, None, run.history, samples, pictures, config, args.pretrained_model_name_or_path)
    write_result(result, run.results, PUBLICATION, repo_id)
    return config


def describe_scales(run):
    """The `ScaleConfig` of a run."""
    args, unet = run.args, run.model.unet
    return ScaleConfig(
        bits=args.bits,
        calibration=args.calibration,
        scale_sets=args.scale_sets,
        scale_intervals=read_intervals(args.scale_intervals),
        train_input_scales=args.train_input_scales,
        num_train_timesteps=run.base.scheduler.config.num_train_timesteps,
        base_model=args.public()["pretrained_model_name_or_path"],
        base_sha256=tuneqdm.fingerprint(unet),
        base_sketch=tuneqdm.sketch(unet),
    )


# =====================================================================================================
# Main
# =====================================================================================================


def main(args):
    if args.push_only:
        if os.environ.get("RANK", "0") == "0":
            print(f"Pushed to {hub.push_only(args, PUBLICATION)}")
        return
    accelerator = launch.start(args)
    base, compute, table = resolve_settings(args, accelerator.device)
    launch.open_folders(args)
    with run_folder.occupied(args.output_dir, accelerator), run_folder.saying_what_is_safe(args.output_dir):
        personalize(args, accelerator, base, compute, table)


def personalize(args, accelerator, base, compute, table):
    """A run in `--output_dir`, which is its own, from the pictures to the push."""
    # 1. Everything that can be wrong is checked before anything slow starts.
    pictures = read_instances(args, base=base)
    texts = instance_texts(pictures, args.instance_prompt, args.subject_name)
    fill_in(args.validation_prompt or "", args.subject_name, "--validation_prompt")
    launch.settle(args, len(pictures), accelerator.num_processes, OFFICIAL_STEPS)
    if args.with_prior_preservation:
        check_class_folder(args)
    base_model.check_weights(base)  # of a model on the Hub it downloads the weights
    repo_id = hub.prepare(args, accelerator)

    # 2. Class images, if there are too few: they are part of the data, which a checkpoint must fit.
    class_pictures = None
    if args.with_prior_preservation:
        class_pictures = dreambooth.read_class(args, base, compute, lambda: load_unet(args, base, compute)[0])
    captioned = [p._replace(caption=text) for p, text in zip(pictures, texts)]
    data = base_model.weights_digest(base), accelerator.num_processes, [*captioned, *(class_pictures or [])]
    settings = checkpoints.trajectory_settings(args, *data)
    checkpoint = checkpoints.find_checkpoint(args.resume_from_checkpoint, args.output_dir, settings)

    # 3. VAE and text encoder come and go; then the UNet arrives, quantized.
    what = pictures, texts, class_pictures, base, args.flip_probability, compute
    subject, vae = dreambooth.encode_pictures(*what)
    conditioning, of_images, text_encoder = dreambooth.encode_texts(args, texts, base, compute)
    components = {"vae": vae, "text_encoder": text_encoder}
    with accelerator.local_main_process_first():  # the first process fills the cache, the others read it
        model, changes, components["unet"] = load_model(args, base, compute, table, conditioning)
    memory.release_freed_memory()
    loop.log_components(components)

    # 4. What is learned: the changes of the scales, from zero or from a checkpoint.
    learner = start_learner(args, changes, compute, accelerator.num_processes, accelerator.process_index)
    run = Run(
        args=args,
        accelerator=accelerator,
        base=base,
        subject=subject,
        model=model,
        learner=learner,
        sampling=choose_sampling(args, table),
        average=functools.partial(accelerator.reduce, reduction="mean"),
        validation_embeddings=of_images,
        settings=settings,
    )
    run.begin(PUBLICATION, checkpoint)
    count = sum(change.numel() for change in changes.values())
    logger.info(f"{len(pictures)} images, {len(conditioning)} prompts, {count} scales in {len(changes)} tensors")

    # 5. The loop, and its results.
    with loop.stoppable(run):
        train(run)
        if not any(bool(change.any()) for change in changes.values()):
            logger.warning("Nothing was learned: the scales are those of the base to the last bit.")
        if accelerator.is_main_process:
            config = finish(run, pictures, components, repo_id)
        loop.end(accelerator)
        if repo_id is not None:
            logger.info(f"Pushed to {hub.push_to_hub(args.output_dir, config, PUBLICATION, repo_id, args.hub_token)}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), __file__)
