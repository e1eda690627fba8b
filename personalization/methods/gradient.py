"""The exact gradient of a word, by backpropagation through the frozen, quantized model: Textual Inversion, small.

Textual Inversion (arXiv 2208.01618) as it is usually run keeps a whole model in full precision and all activations of
a pass. Neither is needed: frozen INT8 layers hand the gradient through and nothing of their weight is kept
(`models.frozen`), and with gradient checkpointing only the inputs of blocks are, the rest is computed once more. The
step then takes the memory of a zeroth-order step and a small part of its steps; what zeroth order keeps is what has no
backward pass at all (OpenVINO, NPUs, INT8 activations). That checkpointed backpropagation beats zeroth order at equal
memory is known of language models (arXiv 2506.21833); docs/results/frontier.md has the figures for a word.
"""

import functools
import math
from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler

from ..errors import InputError
from ..flags import RUN, SIDE
from ..models import base_model, frozen
from . import windows
from .rule import Optimizer


# Adam's steps are of one size, and the entries of a word are not: about 0.014 in Stable Diffusion 1.5, 0.035 in the
# demo's base.
RATE_OF_SPREAD = 0.5


# =====================================================================================================
# The algorithm
# =====================================================================================================


def loss_gradient(model, theta, batch):
    """L(θ) and ∂L/∂θ by autograd, through text encoder and denoiser.

    The sum of the squared errors is what is differentiated, and the mean is taken of the result: so the errors of
    float16 activations, some 1e-4 each in the gradient of a mean, do not vanish on their way.

    Args:
        model: `FrozenModel` that hands gradients through.
        theta: θ `[k, d]`, float32; it is read, never changed.
        batch: `Batch`.

    Returns:
        The gradient, like θ, and the loss, a scalar.
    """
    with torch.enable_grad():
        point = theta.detach().clone().requires_grad_(True)
        loss = model.losses(point[None], batch).mean()
        entries = batch.target[0].numel()
        (gradient,) = torch.autograd.grad(loss * entries, point)
    return gradient / entries, loss.detach()


def window_gradient(model, theta, batch, drawn):
    """As `loss_gradient`, of the part of the loss in `Windows` of the pictures; the loss is that of all.

    A forward pass without a graph keeps what the windows need of their surroundings, see `methods.windows`.
    """
    surroundings = model.surroundings
    with torch.no_grad(), surroundings.kept(drawn):
        loss = model.losses(theta[None], batch).mean()
    with surroundings.standing_in():
        gradient, _ = loss_gradient(model, theta, surroundings.part(batch, drawn))
    return gradient, loss


@dataclass
class GradientDescent:
    """`gradient`: AdamW on the exact gradient, as diffusers' Textual Inversion."""

    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler

    def evidence(self, model, theta, batch, generator):
        """What a batch says: the gradient; and the loss."""
        if model.surroundings is None:
            gradient, loss = loss_gradient(model, theta, batch)
        else:
            drawn = model.surroundings.draw_windows(batch.noisy_latents, generator)
            gradient, loss = window_gradient(model, theta, batch, drawn)
        return (gradient,), loss

    def update(self, theta, gradient):
        """Moves θ."""
        theta.grad = gradient
        self.optimizer.step()
        self.lr_scheduler.step()

    def figures(self):
        """What the log and the result say of it."""
        return {"lr": self.lr_scheduler.get_last_lr()[0]}

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "lr_scheduler": self.lr_scheduler.state_dict()}

    def load_state_dict(self, state, device):
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])


# =====================================================================================================
# What surrounds it
# =====================================================================================================


class GradientOptimizer(Optimizer):
    """`--optimizer gradient`."""

    method = "Textual Inversion by the exact gradient (arXiv 2208.01618), on a quantized model"
    tag = "quantized-textual-inversion"
    step_flag = "learning_rate"
    recipe_name = "fast"
    recipe = {
        "train_batch_size": 1,
        "learning_rate": None,
        "lr_scheduler": "cosine",
        "adam_epsilon": 1e-8,
        "logging_steps": 10,
        "validation_steps": 50,
        "save_steps": 100,
        "checkpointing_steps": 50,
    }
    differentiates = True

    def add_flags(self, add):
        add(
            "--gradient_checkpointing",
            nargs="?",
            const="block",
            choices=list(frozen.CHECKPOINTING),
            default="block",
            page=True,
            decides=RUN,
            help="Activations that are computed once more in the backward pass instead of kept. block: inside each"
            " block, for two fifths more time; layer: of these, once more, inside attentions and feed-forwards, for"
            " large pictures; none: nothing.",
        )

        add(
            "--bp_view",
            choices=["whole", "window"],
            default="whole",
            page=True,
            decides=RUN,
            help="View that is backpropagated on: the whole picture, or a window of it in less memory, with the rest"
            " as it is in a forward pass.",
        )
        small = "Side of the windows. Default: half of --resolution."
        add("--low_resolution", type=int, limits=SIDE, page=True, decides=RUN, help=small)

    def check(self, args):
        if args.low_resolution is not None and args.bp_view == "whole":
            raise InputError("--low_resolution is the side of windows: add --bp_view window, or drop it.")
        if args.low_vram and args.bp_view == "window":
            raise InputError("--low_vram streams weights that --bp_view window looks at in between: drop one.")
        if args.quantization == "quanto-int8":
            raise InputError(
                "--optimizer gradient hands gradients through --quantization int8, nf4 or none, not quanto-int8:"
                " choose one of them."
            )
        if args.torch_compile:
            raise InputError("--torch_compile compiles forward passes, and --optimizer gradient has others: drop one.")

    def complete(self, args, base):
        if args.bp_view == "window":
            if base.family.denoiser != "unet":
                raise InputError(f"--bp_view window looks through UNets and {base.source.label} has none: drop it.")
            multiple = base.resolution_multiple
            args.low_resolution = base_model.check_low_resolution(args.low_resolution, args.resolution, multiple)
            windows.check_layers(base_model.empty_model(base, "unet"), "whole")

    def check_pictures(self, args, pictures):
        if args.bp_view == "window":
            windows.check_pictures(args.low_resolution, pictures)

    def make_ready(self, args, model, base):
        for network in (*model.text_encoder.encoders, model.denoiser):
            frozen.make_differentiable(network, args.gradient_checkpointing)
        if args.bp_view == "window":
            model.surroundings = self.look_around(args, base)(model.denoiser)

    def look_around(self, args, base):
        if args.bp_view == "whole":
            return None
        return functools.partial(windows.Surroundings, side=args.low_resolution // base.vae_factor)

    def num_candidates(self, args):
        return 1

    def num_forwards(self, args):
        """One, two for the backward pass, and one more for each time that checkpointing computes them again.

        Of windows all that comes after a pass of whole pictures, in proportion to their area, rounded up.
        """
        passes = 3 + frozen.CHECKPOINTING.index(args.gradient_checkpointing)
        if args.bp_view == "whole":
            return passes
        return 1 + math.ceil(passes * (args.low_resolution / args.resolution) ** 2)

    def num_steps(self, args, family):
        return 500

    def start(self, args, theta, found, num_processes):
        """A `GradientDescent`; where no rate is given, a step is `RATE_OF_SPREAD` of the starting word's entries."""
        rate = args.learning_rate or RATE_OF_SPREAD * theta.detach().float().square().mean().sqrt().item()
        per_update = args.train_batch_size * args.gradient_accumulation_steps * num_processes
        optimizer = torch.optim.AdamW(
            [theta],
            lr=rate * (per_update if args.scale_lr else 1),
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.adam_weight_decay,
        )
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=args.lr_num_cycles,
        )
        return GradientDescent(optimizer, lr_scheduler)


OPTIMIZER = GradientOptimizer()
