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
"""Personalise a quantized Stable Diffusion by a LoRA with the memory of half the resolution (arXiv 2507.10029).

The shortest command that works, offline, on the demo base of this repository:

    python train_selective_dreambooth_lora.py \
        --pretrained_model_name_or_path demo/base_eps --instance_data_dir demo/subjects/striped_star \
        --subject_name star --train_batch_size 4 --learning_rate 2e-3 --zo_learning_rate 2e-3 \
        --max_train_steps 200 --output_dir star-lora

and on Stable Diffusion 1.5:

    python train_selective_dreambooth_lora.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --instance_data_dir ./my-dog \
        --instance_prompt "a photo of sks dog" --subject_name "sks dog" --output_dir my-dog-lora

Every step is one of two kinds: backpropagation on pictures of a low resolution (BP-low), or forward passes alone on
those of the full resolution (ZO-high). The result is an ordinary LoRA that `load_lora_weights` of any diffusers reads.
"""

import personalization.quick_help  # noqa: F401, before the libraries that take seconds
import personalization.quiet  # noqa: F401, before the libraries whose false alarms it silences


# isort: split
import functools
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import train_zoodip_textual_inversion as zoodip
from personalization import flags
from personalization.data import examples
from personalization.errors import DivergedError, InputError, run_script
from personalization.logs import get_logger
from personalization.methods import dreambooth, windows
from personalization.methods.dreambooth import denoising_errors, draw_validation_images, dreambooth_loss, fill_in
from personalization.models import base_model, frozen, memory
from personalization.models.base_model import StoredModel
from personalization.models.compute import Compute, choose_compute
from personalization.models.families import Family
from personalization.runs import checkpoints, embeddings, hub, launch, loop, provenance, run_folder
from personalization.runs.results import Result, write_result


logger = get_logger(__name__)

# =====================================================================================================
# The algorithm: selective optimisation, BP-low / ZO-high (arXiv 2507.10029). Only the paper's abstract was at hand:
# the probability of a kind, the estimator and its scaling, and the two optimizers are our own.
# =====================================================================================================


class Ramp(NamedTuple):
    """A logistic ramp that falls from 1 to 0."""

    midpoint: float  # where it is one half
    width: float  # from there to 0.27 or 0.73

    def __call__(self, x):
        """At x, a float64 tensor of any shape."""
        return torch.sigmoid((self.midpoint - x) / self.width)


class Selection(NamedTuple):
    """Which kind of step is taken when: p_BP(t/T, progress), the product of a ramp for each."""

    over_timesteps: Ramp
    over_progress: Ramp

    def bp_probability(self, timestep, progress):
        """The probability that an example is learned from by BP-low and not by ZO-high.

        It falls with the timestep, since high ones decide the structure, which a low resolution distorts, and as
        training goes on. The abstract asks for both; the ramps are ours.

        Args:
            timestep: t/T in [0, 1), of any shape.
            progress: share of the training that is done, in [0, 1].

        Returns:
            float64, like `timestep`.
        """
        timestep, progress = (torch.as_tensor(x, dtype=torch.float64) for x in (timestep, progress))
        return self.over_timesteps(timestep) * self.over_progress(progress)


def draw_kind(probabilities, generator):
    """Whether a step is BP-low, and how its timesteps are distributed.

    All examples of a step are learned from in the same way. So the kind is drawn by its share over all timesteps,
    mean_t p(t), and then the timesteps among those of that kind, in proportion to p(t) or 1 - p(t). Each example by
    itself has a uniform timestep and, given that, probability p(t) of BP-low.

    Args:
        probabilities: p_BP at every timestep, float64 `[T]`.
        generator: source of the kind, the same on all processes.

    Returns:
        bool, and weights of the timesteps `[T]`.
    """
    is_bp = bool(torch.rand((), generator=generator, dtype=torch.float64) < probabilities.mean())
    return is_bp, probabilities if is_bp else 1 - probabilities


def bp_gradient(loss_fn, weights, scale=lambda loss: loss):
    """The gradient by backpropagation.

    Args:
        loss_fn: returns the loss of the weights as they are.
        weights: tensors that autograd knows.
        scale: of the loss, so that half-precision gradients do not vanish.

    Returns:
        The gradient of the scaled loss in one row `[D]`, and the loss.
    """
    loss = loss_fn()
    # Zero for the weights of a layer that the model has and does not use (GLIGEN's).
    gradients = torch.autograd.grad(scale(loss), weights, materialize_grads=True)
    return parameters_to_vector(gradients), loss.detach()


def zo_gradient(loss_fn, theta, num_perturbations, perturbation_scale, generator):
    """Random gradient estimate by forward differences, ĝ = (1/n) Σ [(L(θ + μ e_i) - L(θ))/μ] e_i (RGE).

    It is the flagship's (arXiv 2503.14868, Eq. 3), for weights of which one does not want n copies: L(θ) comes first,
    so each e_i is drawn, used, added up and forgotten. θ itself is never written to, so nothing drifts.

    Args:
        loss_fn: takes a point `[D]`, returns its loss; the same examples, noise and timesteps for all points.
        theta: θ, float32 `[D]`.
        num_perturbations: n.
        perturbation_scale: μ.
        generator: source of the directions.

    Returns:
        The estimate `[D]`, and L(θ).
    """
    base_loss, estimate = loss_fn(theta), torch.zeros_like(theta)
    for _ in range(num_perturbations):
        direction = examples.to_device(torch.randn(theta.shape, generator=generator), theta.device)
        slope = (loss_fn(theta + perturbation_scale * direction) - base_loss) / perturbation_scale
        estimate += direction * (slope / num_perturbations)
    return estimate, base_loss


# =====================================================================================================
# The quantized model: a frozen layer hands the gradient through, and autograd keeps nothing of its weight.
# =====================================================================================================


BACKENDS = {name: zoodip.BACKENDS[name] for name in ("int8", "nf4", "none")}


def add_adapters(unet, layers, rank, alpha, seed):
    """Puts a LoRA on layers of a frozen UNet, through peft, to which INT8 layers are announced as linear ones.

    Args:
        unet: frozen.
        layers: names of linear layers, or their ends.
        rank, alpha: of every adapter; its product counts alpha/rank times.
        seed: of the first factors; the second ones are zero, so that the UNet is what it was.

    Returns:
        The trainable weights, float32 parameters.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), init_lora_weights="gaussian")
    config._register_custom_module({zoodip.Int8Linear: LoraLinear})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # peft finds all that it needs in them
        torch.manual_seed(seed)
        unet.add_adapter(config)
    cast_training_params(unet, dtype=torch.float32)
    return [weight for weight in unet.parameters() if weight.requires_grad]


@dataclass
class Model:
    """The quantized UNet with adapters, and what it is conditioned on."""

    family: Family
    unet: UNet2DConditionModel
    weights: list  # of the adapters: parameters, whose memory is wherever `place` has put it
    scheduler: DDPMScheduler
    conditioning: torch.Tensor  # text embeddings of all prompts [P, length, d]
    compute: Compute
    surroundings: windows.Surroundings | None = None  # of the windows that BP-low sees; None: whole pictures

    def place(self, theta):
        """Makes the adapters' weights views of θ `[D]`; nothing is copied."""
        vector_to_parameters(theta, self.weights)

    def errors(self, batch):
        """`denoising_errors` of a `Batch` whose prompts are rows of `conditioning`."""
        conditioning = self.conditioning[batch.prompt_ids]
        return denoising_errors(self.family, self.unet, batch, conditioning, self.compute.memory_format)


# =====================================================================================================
# One update of the adapters
# =====================================================================================================

BP_LOW, ZO_HIGH = KINDS = ("bp_low", "zo_high")


@dataclass(frozen=True)
class Sampling:
    """What an update is computed from."""

    selection: Selection
    batch_size: int  # examples of the subject, and as many of its class, if that is preserved
    prior_weight: float  # λ
    accumulation_steps: int
    max_grad_norm: float
    num_perturbations: int  # n
    perturbation_scale: float  # μ
    num_processes: int

    def probabilities(self, progress, num_timesteps):
        """p_BP at every timestep `[T]`."""
        return self.selection.bp_probability(torch.arange(num_timesteps) / num_timesteps, progress)


@dataclass
class Learner:
    """What is learned, and all that changes with it."""

    theta: torch.Tensor  # θ [D], float32: the master copy of all adapter weights, which are views of it
    optimizers: dict  # kind -> AdamW on θ: the two kinds of gradients differ in noise by orders of magnitude
    lr_schedulers: dict  # kind -> schedule; both count all updates
    scaler: torch.amp.GradScaler  # of BP-low's loss, idle but for float16
    data: torch.Generator  # this process's examples; the global generator is never touched
    perturbations: torch.Generator  # this process's directions
    choice: torch.Generator  # which kind, the same on all processes
    updates: dict = field(default_factory=lambda: dict.fromkeys(KINDS, 0))  # of each kind, so far

    def state_dict(self):
        """What all processes have in common."""
        parts = {name: getattr(self, name) for name in ("optimizers", "lr_schedulers")}
        states = {name: {kind: part.state_dict() for kind, part in kinds.items()} for name, kinds in parts.items()}
        return {"theta": self.theta, "scaler": self.scaler.state_dict(), "updates": dict(self.updates), **states}

    def load_state_dict(self, state):
        self.theta.copy_(state["theta"])
        self.scaler.load_state_dict(state["scaler"])
        self.updates = dict(state["updates"])
        for kind in KINDS:
            self.optimizers[kind].load_state_dict(state["optimizers"][kind])
            self.lr_schedulers[kind].load_state_dict(state["lr_schedulers"][kind])

    def generators(self):
        return {"data": self.data, "perturbations": self.perturbations, "choice": self.choice}


def draw_batch(subject, sampling, weights, scheduler, generator):
    """A `Batch` on the host: examples of the subject, then of its class, each noised to a timestep of its own."""
    latents, rows, inside = dreambooth.draw_subject(subject, sampling.batch_size, generator)
    timesteps = torch.multinomial(weights, len(latents), replacement=True, generator=generator)
    family = subject.instance.family
    return examples.noise_batch(family, latents, rows, timesteps, generator, scheduler, weights=inside)


def bp_low(learner, model, batch, sampling):
    """What a `Batch` of low resolution says: the gradient `[D]`, scaled by the scaler, and the loss."""

    def loss_fn():
        return dreambooth_loss(model.errors(batch), sampling.batch_size, sampling.prior_weight)

    return bp_gradient(loss_fn, model.weights, learner.scaler.scale)


def bp_window(learner, model, batch, sampling, drawn=None):
    """What `Windows` of a `Batch` of full resolution say, random ones if none are given; returns as `bp_low`.

    The mean over what is drawn is that of whole pictures; so is the loss.
    """
    surroundings = model.surroundings
    drawn = drawn or surroundings.draw_windows(batch.noisy_latents, learner.data)
    with torch.no_grad(), surroundings.kept(drawn):
        loss = dreambooth_loss(model.errors(batch), sampling.batch_size, sampling.prior_weight)
    with surroundings.standing_in():
        gradient, _ = bp_low(learner, model, surroundings.part(batch, drawn), sampling)
    return gradient, loss


def zo_high(learner, model, batch, sampling):
    """What a `Batch` of full resolution says: an estimate of the gradient `[D]`, and the loss."""

    def loss_fn(theta):
        model.place(theta)
        with torch.inference_mode():
            loss = dreambooth_loss(model.errors(batch), sampling.batch_size, sampling.prior_weight)
        return loss.clone()

    options = sampling.num_perturbations, sampling.perturbation_scale, learner.perturbations
    estimate, loss = zo_gradient(loss_fn, learner.theta, *options)
    model.place(learner.theta)
    directions = sampling.num_perturbations * sampling.accumulation_steps * sampling.num_processes
    return zoodip.normalize_estimate(estimate, directions, 0), loss


def train_step(learner, model, subjects, sampling, progress, average=lambda tensor: tensor):
    """One update of the adapters, by BP-low or ZO-high.

    Args:
        learner: `Learner`, changed in place; θ is where the adapters' weights are (`Model.place`).
        model: `Model`.
        subjects: kind -> `Subject` in its resolution.
        sampling: `Sampling`.
        progress: share of the training that is done.
        average: takes the mean of a tensor over processes.

    Returns:
        The kind, and the mean loss of this process, a scalar on the device. Nothing here waits for it, but for the
        scaler of float16 gradients, which asks once a step of BP-low whether they have overflown.
    """
    device, theta = model.compute.device, learner.theta
    probabilities = sampling.probabilities(progress, model.scheduler.config.num_train_timesteps)
    is_bp, weights = draw_kind(probabilities, learner.choice)
    backpropagate = bp_low if model.surroundings is None else bp_window
    kind, look = (BP_LOW, backpropagate) if is_bp else (ZO_HIGH, zo_high)
    mean_loss, gradient = torch.zeros((), device=device), torch.zeros_like(theta)
    for _ in range(sampling.accumulation_steps):
        batch = draw_batch(subjects[kind], sampling, weights, model.scheduler, learner.data).to(device)
        of_batch, loss = look(learner, model, batch, sampling)
        gradient += of_batch / sampling.accumulation_steps
        mean_loss += loss / sampling.accumulation_steps
    optimizer, theta.grad = learner.optimizers[kind], average(gradient)
    if is_bp:
        learner.scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([theta], sampling.max_grad_norm)
    if is_bp:
        learner.scaler.step(optimizer)
        learner.scaler.update()
    else:
        optimizer.step()
    for lr_scheduler in learner.lr_schedulers.values():
        lr_scheduler.step()
    theta.grad = None
    learner.updates[kind] += 1
    return kind, mean_loss


# =====================================================================================================
# Settings: completed and checked against the base's small files, before any weight is loaded; read-only afterwards
# =====================================================================================================


def resolve_settings(args, device):
    """Completes `args` and checks it against the base; afterwards it is read-only.

    Returns:
        `Base` and `Compute`.

    Raises:
        InputError: a setting cannot work.
    """
    compute, precision = choose_compute(device, args.mixed_precision)
    args.activations = str(compute.dtype).removeprefix("torch.")
    default, least = PERTURBATION_SCALES[precision]
    args.perturbation_scale = default if args.perturbation_scale is None else args.perturbation_scale
    if args.perturbation_scale < least:
        raise zoodip.too_small_to_measure(args.perturbation_scale, precision, default, least)
    source = base_model.ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant)
    base = base_model.open_base(source, args.tokenizer_name)
    timesteps = base.scheduler.config.num_train_timesteps
    if args.num_inference_steps > timesteps:
        raise InputError(
            f"--num_inference_steps {args.num_inference_steps} is more than this model has timesteps: give at most"
            f" {timesteps}."
        )
    args.resolution = base_model.check_resolution(base, args.resolution)
    args.center_crop = True
    for name, value in base.family.settings_of_lora.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.low_resolution = base_model.check_low_resolution(
        args.low_resolution, args.resolution, base.resolution_multiple
    )
    unet = base_model.empty_model(base, "unet")
    args.lora_layers = ",".join(check_layers(args.lora_layers, unet))
    if args.bp_view == "window":
        windows.check_layers(unet)
    return base, compute


# μ by precision, the default and the least: differences of losses must stand out from the rounding of activations. On
# the demo base they correlate by 0.97 with the true derivatives at 1e-6 in float32, and by 0.5 at 1e-7.
PERTURBATION_SCALES = {"no": (1e-3, 1e-6), "fp16": (1e-3, 1e-3), "bf16": (1e-2, 1e-2)}


def check_layers(names, unet):
    """The names of `--lora_layers`, each of which is the end of the name of some linear layer and of no other.

    Raises:
        InputError: it is not.
    """
    kinds = {name: type(module) for name, module in unet.named_modules()}
    layers = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for layer in layers:
        found = {kind for name, kind in kinds.items() if layer and f".{name}".endswith(f".{layer}")}
        fix = "give ends of the names of linear layers, such as to_k,to_q,to_v,to_out.0"
        if not found:
            raise InputError(f"--lora_layers: this UNet has no layer {layer[:80]!r}: {fix}.")
        if others := {kind.__name__ for kind in found if not issubclass(kind, torch.nn.Linear)}:
            raise InputError(f"--lora_layers: {layer[:80]!r} is no linear layer ({', '.join(sorted(others))}): {fix}.")
    return layers


# =====================================================================================================
# Flags
# =====================================================================================================

WEIGHTS_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"

PUBLICATION = hub.Publication(
    script=Path(__file__),
    config_name="selective_config.json",
    result_name=WEIGHTS_FILE,
    files=(KOHYA_FILE, "loss_curve.png", "samples/*.png"),
    pipeline_name=None,
    tags=("lora", "dreambooth", "text-to-image", "diffusers-training", "stable-diffusion", "diffusers"),
    card_name="model_cards/selective.md",
    load="load_lora_weights",
)

REFUSED_FLAGS = dreambooth.REFUSED_FLAGS | {
    "--use_8bit_adam": "the optimizer's state is some megabytes, there are only adapters to train: drop it.",
    "--lora_dropout": "all forward passes of a ZO-high step must see the same adapters: drop it.",
    "--use_dora": "the adapters are plain LoRA, which every program reads: drop it.",
    "--snr_gamma": "timesteps are weighed by which kind of step they get: drop it.",
}

# What BP-low sees -> where the ramps over timesteps and progress fall. A window distorts nothing and needs none.
MIDPOINTS = {"scaled": (0.6, 0.9), "window": (100.0, 100.0)}


def parse_args(input_args=None):
    """Parses and checks the command line (of the process, or a list of strings); bad input exits with code 2."""
    parser = make_parser()
    args = flags.parse(parser, input_args, REFUSED_FLAGS)
    for name, midpoint in zip(("bp_timestep_midpoint", "bp_progress_midpoint"), MIDPOINTS[args.bp_view]):
        if getattr(args, name) is None:
            setattr(args, name, midpoint)
    if not args.push_only:
        flags.check_shared_arguments(parser, args, "instance_data_dir")
        dreambooth.check_subject_arguments(parser, args)
    return args


def make_parser():
    """The parser, with every flag."""
    parser = flags.new_parser(
        __file__,
        "LoRA by backpropagation at a low resolution and forward passes at the full one, on a quantized UNet.",
        "%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt PROMPT [options]",
    )
    add_adapter_arguments(flags.add_model_arguments(parser, predicts_memory=False))
    concept = "{} stands for --subject_name"
    dreambooth.add_subject_arguments(flags.add_data_arguments(parser, "instance_data_dir", concept))
    add_selection_arguments(flags.group(parser, "BP-low and ZO-high"))
    dreambooth.add_backward_arguments(flags.add_training_arguments(parser))
    override_training_arguments(parser)
    flags.add_validation_arguments(parser)
    add = flags.add_saving_arguments(parser)
    kohya = f"Save {KOHYA_FILE}, too, as AUTOMATIC1111, ComfyUI and others read it: always so."
    add("--output_kohya_format", action="store_true", default=True, decides=flags.NOTHING, help=kohya)
    flags.add_hub_arguments(parser)
    return parser


def add_adapter_arguments(add):
    add(
        "--quantization",
        choices=list(BACKENDS),
        default="int8",
        page=True,
        help="Weights of the frozen UNet: int8 for every Linear and Conv2d, nf4 (bitsandbytes) for Linear beside it,"
        " or none.",
    )
    add("--rank", type=int, default=4, limits=flags.Range(1, 1024), page=True, help="Rank of the LoRA.")
    alpha = "Strength of the LoRA: the adapters count alpha/rank times."
    add("--lora_alpha", type=int, default=4, limits=flags.Range(1, 10**6), page=True, help=alpha)
    add(
        "--lora_layers",
        default="to_k,to_q,to_v,to_out.0",
        page=True,
        help="Linear layers of the UNet that get an adapter: ends of their names, separated by commas.",
    )


def add_selection_arguments(add):
    add(
        "--bp_view",
        choices=list(MIDPOINTS),
        default="scaled",
        page=True,
        help="View that is backpropagated on: the picture scaled down (the paper's), or a window of the full one"
        " (ours).",
    )
    small = "Side of those pictures or windows. Default: half of --resolution."
    add("--low_resolution", type=int, limits=flags.SIDE, page=True, help=small)
    anywhere, width = flags.Range(-1e6, 1e6), flags.Range(1e-6, 1e6)
    add(
        "--bp_timestep_midpoint",
        type=float,
        limits=anywhere,
        page=True,
        help="Timestep t/T where the ramp over timesteps is one half; p_BP is the product of both ramps. 100"
        " leaves a ramp out, and -100 all BP-low. Default: 0.6; with --bp_view window 100.",
    )
    of_timesteps = "Width of the ramp over timesteps: from one half to 0.27."
    add("--bp_timestep_width", type=float, default=0.1, limits=width, page=True, help=of_timesteps)
    add(
        "--bp_progress_midpoint",
        type=float,
        limits=anywhere,
        page=True,
        help="Share of training where the ramp over progress is one half. Default: 0.9; with --bp_view window 100.",
    )
    of_progress = "Width of the ramp over progress: from one half to 0.27."
    add("--bp_progress_width", type=float, default=0.1, limits=width, page=True, help=of_progress)
    directions = "n: directions of a ZO-high step, a forward pass each."
    add("--num_perturbations", type=int, default=4, limits=flags.Range(1, 4096), page=True, help=directions)
    step = "μ: step of the finite difference. Default: 1e-3, and 1e-2 with bf16."
    add("--perturbation_scale", type=float, limits=flags.Range(0.0, 1.0, above=True), page=True, help=step)
    rate = f"Learning rate of ZO-high's AdamW. {OF_THE_FAMILY}"
    add("--zo_learning_rate", type=float, limits=flags.RATE, page=True, help=rate)


def override_training_arguments(parser):
    """Defaults that are this method's."""
    override = functools.partial(flags.override, parser)
    override("output_dir", default="selective-lora-model")
    override("seed", help="Seed of adapters, data, noise, kinds of steps, directions and class images.")
    length = f"Updates in all. Default: {DEFAULT_STEPS}, as in diffusers' example."
    override("max_train_steps", help=length)
    override("gradient_accumulation_steps", help="Batches averaged before one update.")
    override("center_crop", decides=flags.NOTHING, help=dreambooth.CROPS)
    override("learning_rate", default=None, help=f"Learning rate of BP-low's AdamW. {OF_THE_FAMILY}")
    override("scale_lr", help="Multiply both learning rates by processes x accumulation steps x batch size.")
    override("adam_weight_decay", default=1e-4, help="Weight decay of AdamW.")
    override("adam_epsilon", default=1e-8, help="ε of AdamW.")


DEFAULT_STEPS = 500
OF_THE_FAMILY = "Default: 1e-4 (the demo model, a small one, wants 2e-3)."


# =====================================================================================================
# The chapters of a run
# =====================================================================================================


@dataclass(kw_only=True)
class Run(loop.Run):
    """A training run; its `model` is a `Model`, its `learner` a `Learner`."""

    subjects: dict  # kind -> `Subject` in its resolution
    sampling: Sampling
    average: Callable  # of a tensor, over processes
    validation_embeddings: dict  # keywords of a pipeline's call, in the place of prompt and text encoder


def load_subjects(args, pictures, texts, class_pictures, base, compute):
    """The pictures in the resolution of each kind, encoded once each.

    Args:
        args: resolved settings.
        pictures: of the subject, in full resolution.
        texts: the prompt of each.
        class_pictures: of its class, likewise; None without prior preservation.
        base: `Base`.
        compute: `Compute`.

    Returns:
        Kind -> `Subject`, and the VAE's `StoredModel`.
    """
    model = base, args.flip_probability, compute
    high, vae = dreambooth.encode_pictures(pictures, texts, class_pictures, *model)
    if args.bp_view == "window":
        return dict.fromkeys(KINDS, high), vae
    small, small_class = dreambooth.read_instances(args, args.low_resolution, base), None
    if class_pictures is not None:
        small_class = dreambooth.read_class_folder(args, args.low_resolution)
    low, _ = dreambooth.encode_pictures(small, texts, small_class, *model)
    return {BP_LOW: low, ZO_HIGH: high}, vae


def load_model(args, base, compute, conditioning):
    """The frozen UNet with fresh adapters.

    Returns:
        `Model`, and the UNet's `StoredModel`.
    """
    unet, share = zoodip.load_frozen(base, "unet", BACKENDS[args.quantization], compute, args.quantized_cache_dir)
    stored = StoredModel(memory.tensor_bytes(unet), share)
    frozen.hand_gradients_through(unet)
    weights = add_adapters(unet, args.lora_layers.split(","), args.rank, args.lora_alpha, args.seed)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    by_window = args.bp_view == "window"
    surroundings = windows.Surroundings(unet, args.low_resolution // base.vae_factor) if by_window else None
    return Model(base.family, unet, weights, base.scheduler, conditioning, compute, surroundings), stored


def start_learner(args, model, num_processes=1, process_index=0):
    """A `Learner` at its first step, whose θ the model's adapters are views of from now on."""
    theta = parameters_to_vector(model.weights).detach().clone()
    model.place(theta)
    per_update = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    optimizers, lr_schedulers = {}, {}
    for kind, rate in zip(KINDS, (args.learning_rate, args.zo_learning_rate)):
        optimizers[kind] = torch.optim.AdamW(
            [theta],
            lr=rate * (per_update if args.scale_lr else 1),
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.adam_weight_decay,
        )
        lr_schedulers[kind] = get_scheduler(
            args.lr_scheduler,
            optimizers[kind],
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=args.lr_num_cycles,
        )
    # PyTorch wants an optimizer's step before its schedule's; here the other optimizer may have done the first one.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    compute = model.compute
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype == torch.float16)
    seeds = [*np.random.SeedSequence([args.seed, process_index]).generate_state(2)]
    seeds += [*np.random.SeedSequence([args.seed]).generate_state(1)]  # the kind of a step is that of all processes
    generators = (torch.Generator().manual_seed(int(seed)) for seed in seeds)
    return Learner(theta, optimizers, lr_schedulers, scaler, *generators)


def choose_sampling(args, num_processes=1):
    """The `Sampling` that the settings ask for."""
    over_timesteps = Ramp(args.bp_timestep_midpoint, args.bp_timestep_width)
    over_progress = Ramp(args.bp_progress_midpoint, args.bp_progress_width)
    return Sampling(
        Selection(over_timesteps, over_progress),
        args.train_batch_size,
        args.prior_loss_weight,
        args.gradient_accumulation_steps,
        args.max_grad_norm,
        args.num_perturbations,
        args.perturbation_scale,
        num_processes,
    )


@dataclass
class Interval:
    """Sums since the last read-out."""

    loss: dict  # kind -> scalar on the device
    updates: dict = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def bp_share(self):
        return self.updates[BP_LOW] / sum(self.updates.values())

    def mean_losses(self, average):
        """Kind -> mean loss over its updates and all processes; of kinds that there were."""
        return {kind: average(self.loss[kind] / count).item() for kind, count in self.updates.items() if count}


def new_interval(device):
    return Interval({kind: torch.zeros((), device=device) for kind in KINDS})


def train(run):
    """The training loop.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    args, accelerator, learner, progress = run.args, run.accelerator, run.learner, run.progress
    memory.prepare_training()
    last_good, interval = learner.theta.clone(), new_interval(learner.theta.device)
    clock = loop.Clock(progress)
    if progress.step == 0:
        draw_validation_images(run)
    has_prior = run.subjects[ZO_HIGH].prior is not None
    examples_per_step = args.train_batch_size * (1 + has_prior) * args.gradient_accumulation_steps
    passes = {BP_LOW: 2 if args.bp_view == "window" else 1, ZO_HIGH: args.num_perturbations + 1}
    bar = loop.progress_bar(accelerator, progress.step, args.max_train_steps)
    with loop.stop_requests(run) as stop_requested, bar:
        while not run.is_over:
            done = progress.step / args.max_train_steps
            kind, loss = train_step(learner, run.model, run.subjects, run.sampling, done, run.average)
            progress.forward_passes += passes[kind] * examples_per_step * accelerator.num_processes
            progress.step = step = progress.step + 1
            interval.loss[kind] += loss
            interval.updates[kind] += 1
            bar.update()
            last = step == args.max_train_steps

            # The one read-out of the device, before anything is saved: no NaN ever replaces a good checkpoint.
            due = last or any(step % every == 0 for every in (args.logging_steps, args.checkpointing_steps))
            stop = stop_requested(due)
            if due or stop:
                losses = interval.mean_losses(run.average)
                check_finite(run, losses, last_good)
                last_good.copy_(learner.theta)
                read_out(run, interval, losses, clock.steps_per_second, bar)
                interval = new_interval(learner.theta.device)
            clock.read()
            if stop or step % args.checkpointing_steps == 0:
                run.save_checkpoint()
            if stop:
                raise KeyboardInterrupt
            if step % args.validation_steps == 0 and not last:  # the last ones follow the adapters
                draw_validation_images(run)
    clock.read()


def read_out(run, interval, losses, speed, bar):
    """Tells history, trackers and progress bar what an `Interval` was like."""
    step, share = run.progress.step, interval.bp_share
    mean_loss = sum(losses[kind] * interval.updates[kind] for kind in losses) / sum(interval.updates.values())
    run.history.loss.append((step, mean_loss))
    run.history.bp_share.append((step, share))
    rates = {f"lr_{kind}": schedule.get_last_lr()[0] for kind, schedule in run.learner.lr_schedulers.items()}
    of_kinds = {f"loss_{kind}": loss for kind, loss in losses.items()}
    bar.set_postfix(loss=f"{mean_loss:.4f}", bp_low=f"{share:.0%}", zo_high=f"{1 - share:.0%}")
    figures = {"loss": mean_loss, **of_kinds, "share_bp_low": share, "share_zo_high": 1 - share, **rates}
    loop.log(run.accelerator, figures | {"steps_per_second": speed}, step)


def check_finite(run, losses, last_good):
    """Ends the run with the last good adapters saved once a loss (by kind) or they are no longer finite."""
    bad = {kind: loss for kind, loss in losses.items() if not math.isfinite(loss)}
    if not bad and bool(run.learner.theta.isfinite().all()):
        return
    run.model.place(last_good)
    if run.accelerator.is_main_process:
        embeddings.save_content(run.results, WEIGHTS_FILE, adapter_content(run.model.unet))
    kind, loss = next(iter(bad.items()), next(iter(losses.items())))
    flags = {BP_LOW: "learning_rate", ZO_HIGH: "zo_learning_rate"}
    smaller = " or ".join(f"--{flags[name]} than {getattr(run.args, flags[name])}" for name in (bad or losses))
    raise DivergedError(
        f"the loss of {kind} became {loss} at step {run.progress.step}: training stopped and the last good adapters"
        f" are in {run.args.output_dir}/{WEIGHTS_FILE}; try a smaller {smaller}."
    )


def adapter_tensors(unet):
    """The adapters as diffusers names them (`unet.….lora_A.weight`), float32 on the host.

    What alpha/rank says they count is in their second factors, for programs that read tensors alone.
    """
    config, tensors = unet.peft_config["default"], get_peft_model_state_dict(unet)
    strength = {"lora_B": config.lora_alpha / config.r}
    return {
        f"unet.{name}": tensor.detach().cpu() * strength.get(name.split(".")[-2], 1.0)
        for name, tensor in tensors.items()
    }


def adapter_content(unet):
    """The content of a file as `save_lora_weights` of diffusers writes it, where alpha is the rank."""
    config = unet.peft_config["default"].to_dict()
    config["lora_alpha"] = config["r"]
    described = {f"unet.{name}": sorted(v) if isinstance(v, set) else v for name, v in config.items()}
    # One entry only: safetensors writes several in an order that changes from process to process.
    return save(adapter_tensors(unet), metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(described, sort_keys=True)})


def kohya_tensors(unet):
    """The adapters as kohya names them, with an alpha that is the rank."""
    return convert_state_dict_to_kohya(adapter_tensors(unet))


def finish(run, pictures, components, repo_id):
    """Writes the results, the adapters before all else; returns the content of `selective_config.json`.

    Args:
        run: the trained `Run`.
        pictures: `Picture`s of the subject.
        components: name -> `StoredModel`.
        repo_id: where it will be pushed, or None.

    Raises:
        RunError: something could not be written; what could is there.
    """
    args, compute, unet = run.args, run.model.compute, run.model.unet
    embeddings.save_content(run.results, WEIGHTS_FILE, adapter_content(unet))
    if args.output_kohya_format:
        embeddings.save_content(run.results, KOHYA_FILE, save(kohya_tensors(unet), metadata={"format": "pt"}))
    samples = draw_validation_images(run) or []
    figures = provenance.describe_figures(run.progress, run.history, compute.device)
    figures |= {"trained_weights": run.learner.theta.numel(), "updates": run.learner.updates}
    base_license = hub.base_license(run.base.root)
    method = "BP-low / ZO-high (arXiv 2507.10029)"
    name = args.subject_name or args.instance_prompt or "the subject"
    config = provenance.describe_result(args, method, base_license, compute, components, figures, subject=name)
    config["run"] = run.id
    result = Result(name, None, None, run.history, samples, pictures, config, args.pretrained_model_name_or_path)
    write_result(result, run.results, PUBLICATION, repo_id)
    return config


# =====================================================================================================
# Main
# =====================================================================================================


def main(args):
    if args.push_only:
        if os.environ.get("RANK", "0") == "0":
            print(f"Pushed to {hub.push_only(args, PUBLICATION)}")
        return
    accelerator = launch.start(args)
    base, compute = resolve_settings(args, accelerator.device)
    launch.open_folders(args)
    with run_folder.occupied(args.output_dir, accelerator), run_folder.saying_what_is_safe(args.output_dir):
        personalize(args, accelerator, base, compute)


def personalize(args, accelerator, base, compute):
    """A run in `--output_dir`, which is its own, from the pictures to the push."""
    # 1. Everything that can be wrong is checked before anything slow starts.
    pictures = dreambooth.read_instances(args, base=base)
    if args.bp_view == "window":
        windows.check_pictures(args.low_resolution, pictures)
    texts = dreambooth.instance_texts(pictures, args.instance_prompt, args.subject_name)
    fill_in(args.validation_prompt or "", args.subject_name, "--validation_prompt")
    launch.settle(args, len(pictures), accelerator.num_processes, DEFAULT_STEPS)
    if args.with_prior_preservation:
        dreambooth.check_class_folder(args)
    base_model.check_weights(base)  # of a model on the Hub it downloads the weights
    repo_id = hub.prepare(args, accelerator)

    # 2. Class images, if there are too few: they are part of the data, which a checkpoint must fit.
    class_pictures = None
    if args.with_prior_preservation:
        what = base, "unet", BACKENDS[args.quantization], compute, args.quantized_cache_dir
        class_pictures = dreambooth.read_class(args, base, compute, lambda: zoodip.load_frozen(*what)[0])
    captioned = [p._replace(caption=text) for p, text in zip(pictures, texts)]
    data = base_model.weights_digest(base), accelerator.num_processes, [*captioned, *(class_pictures or [])]
    ends = choose_sampling(args).selection.over_progress(torch.tensor([0.0, 1.0], dtype=torch.float64))
    settings = checkpoints.trajectory_settings(args, *data, uses_length=bool(ends[0] != ends[1]))
    checkpoint = checkpoints.find_checkpoint(args.resume_from_checkpoint, args.output_dir, settings)

    # 3. VAE and text encoder come and go; then the UNet arrives, quantized.
    subjects, vae = load_subjects(args, pictures, texts, class_pictures, base, compute)
    conditioning, of_images, text_encoder = dreambooth.encode_texts(args, texts, base, compute)
    with accelerator.local_main_process_first():  # the first process fills the cache, the others read it
        model, unet = load_model(args, base, compute, conditioning)
    components = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    memory.release_freed_memory()
    loop.log_components(components)

    # 4. What is learned: the adapters, from their start or from a checkpoint.
    learner = start_learner(args, model, accelerator.num_processes, accelerator.process_index)
    run = Run(
        args=args,
        accelerator=accelerator,
        base=base,
        subjects=subjects,
        model=model,
        learner=learner,
        sampling=choose_sampling(args, accelerator.num_processes),
        average=functools.partial(accelerator.reduce, reduction="mean"),
        validation_embeddings=of_images,
        settings=settings,
    )
    run.begin(PUBLICATION, checkpoint)
    view = "in windows of" if args.bp_view == "window" else "at"
    sizes = f"BP-low {view} {args.low_resolution} px, ZO-high at {args.resolution} px"
    count = f"{learner.theta.numel()} adapter weights in {len(model.weights)} tensors"
    logger.info(f"{len(pictures)} images, {len(conditioning)} prompts, {count}; {sizes}")

    # 5. The loop, and its results.
    with loop.stoppable(run):
        train(run)
        if accelerator.is_main_process:
            config = finish(run, pictures, components, repo_id)
        loop.end(accelerator)
        if repo_id is not None:
            logger.info(f"Pushed to {hub.push_to_hub(args.output_dir, config, PUBLICATION, repo_id, args.hub_token)}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), __file__)
