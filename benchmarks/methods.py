"""Ways to learn one token, made alike so that they can be compared: the flagship script's own, and the baselines.

A learner is made from a `Task`, has the placeholder's vectors in `theta` `[k, d]` and changes them by `step()`. All of
them see the loss through the script's `FrozenModel` and draw batches by its `draw_batch`. To compare another setting
of the script takes one line in `grids.py`.
"""

import math
from dataclasses import dataclass, field

import cma
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler

import train_zoodip_textual_inversion as zoodip
from personalization.data import prompts
from personalization.models import base_model
from personalization.models.stacked import Stacked


def prepare(words, length=None, device="cpu"):
    """The script's `Task` of a command line.

    Args:
        words: of the command line.
        length: takes the settings and returns the updates in all, where those follow from the others.
        device: where it computes.
    """
    args = zoodip.parse_args([str(word) for word in words])
    base, placeholder, compute = zoodip.resolve_settings(args, torch.device(device))
    if length is not None:
        args.max_train_steps = length(args)
    args.freeze()
    pictures = zoodip.read_pictures(args)
    captions = prompts.build_prompts(pictures, placeholder, base, args.learnable_property)
    held_out = zoodip.read_held_out(args, base, placeholder, pictures)
    found = zoodip.OPTIMIZERS[args.optimizer].look_ahead(args, base, placeholder, captions[0])
    return zoodip.prepare(args, base, placeholder, compute, pictures, captions, found, held_out=held_out)


class ForwardCount:
    """Example-forwards through a UNet. A backward pass counts as two, so one that autograd follows costs three.

    With checkpointing (`block`, not `layer`) it costs four; of windows, by their area, as a pass of whole pictures is
    always before them. A derivative that a pass computes beside its value is a row of its batch, and counts as one.
    """

    def __init__(self, unet):
        self.total = self.whole = 0
        unet.register_forward_pre_hook(self._count)

    def _count(self, unet, inputs):
        followed = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        rows = max(len(x.rows) if isinstance(x, Stacked) else 1 for x in inputs)
        self.whole = max(self.whole, inputs[0][0].numel())
        of_pictures = inputs[0].numel() / self.whole
        self.total += of_pictures * rows * (3 + unet.is_gradient_checkpointing if followed else 1)


class FlagshipLearner:
    """The script's own step, whatever its flags make of it."""

    def __init__(self, task):
        words = task.args, task.base, task.placeholder, task.concept.prompt_ids
        optimizer = zoodip.OPTIMIZERS[task.args.optimizer]
        found = optimizer.look_at(task.model, optimizer.look_ahead(*words), *words)
        self.task, self.learner = task, zoodip.start_learner(task.args, task.initial, found)

    @staticmethod
    def forwards_per_step(args):
        forwards = zoodip.OPTIMIZERS[args.optimizer].num_forwards(args)
        return forwards * args.train_batch_size * args.gradient_accumulation_steps

    @property
    def theta(self):
        return self.learner.result

    def step(self):
        return zoodip.train_step(self.learner, self.task.model, self.task.concept, self.task.sampling)


def loss_and_gradient(model, theta, batch):
    """L(θ) and dL/dθ, shaped like `theta` `[k, d]`, by autograd through text encoder and UNet."""
    rows = model.text_encoder.get_input_embeddings()
    rows.weight = rows.weight.detach()  # the last step's graph hangs on it
    with torch.enable_grad():
        point = theta.detach().clone().requires_grad_(True)
        (loss,) = model.losses(point[None], batch)
        (gradient,) = torch.autograd.grad(loss, point)
    return loss.detach(), gradient


class GradientLearner:
    """Textual Inversion (arXiv 2208.01618) as diffusers' example trains it: AdamW on the token's gradient.

    Learning rate, schedule, weight decay and ε are those of the script's flags.
    """

    def __init__(self, task):
        args = task.args
        self.task, self.theta = task, task.initial.repeat(args.num_vectors, 1)
        self.data = torch.Generator().manual_seed(args.seed)
        self.optimizer = self.make_optimizer(args)
        steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
        self.lr_scheduler = get_scheduler(args.lr_scheduler, self.optimizer, **steps)

    def make_optimizer(self, args):
        settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return torch.optim.AdamW([self.theta], args.learning_rate, weight_decay=args.adam_weight_decay, **settings)

    @staticmethod
    def forwards_per_step(args):
        return 3 * args.train_batch_size

    def step(self):
        loss, gradient = loss_and_gradient(self.task.model, self.theta, self.task.draw_batch(self.data))
        self.update(gradient)
        self.lr_scheduler.step()
        return loss

    def update(self, gradient):
        self.theta.grad = gradient
        self.optimizer.step()


def directional_step(direction, gradient, prior, learning_rate, pull):
    """One step of Riemannian SGD on the unit sphere (arXiv 2512.13672): a rotation towards less loss.

    Args:
        direction: unit rows v `[k, d]`.
        gradient: dL/dv, like `direction`.
        prior: unit rows μ `[k, d]` or `[d]`, the class word's direction.
        learning_rate: the length η of the step before it is pulled back onto the sphere.
        pull: κ of the von Mises-Fisher prior, whose constant gradient -κμ is added.

    Returns:
        Unit rows `[k, d]`.
    """
    gradient = gradient - pull * prior
    tangent = gradient - (gradient * direction).sum(dim=-1, keepdim=True) * direction
    return F.normalize(direction - learning_rate * F.normalize(tangent, dim=-1), dim=-1)


# Of the demo base's 878 rows only some 80 belong to words that its captions use; the others are as they were drawn.
# Stable Diffusion's are all trained, and there the mean is that of the whole table.
TRAINED_WORDS = 80


class DirectionalLearner(GradientLearner):
    """Directional Textual Inversion: the norm stays at the mean of the vocabulary's trained words."""

    def __init__(self, task, pull=1e-4):
        super().__init__(task)
        norms = base_model.load_token_table(task.base).float().norm(dim=1)
        self.norm, self.pull = norms.topk(min(TRAINED_WORDS, len(norms))).values.mean(), pull
        self.prior = F.normalize(task.initial, dim=0)
        self.theta = self.norm * F.normalize(self.theta, dim=-1)

    def make_optimizer(self, args):
        return torch.optim.SGD([self.theta], args.learning_rate)  # only the schedule uses it

    def update(self, gradient):
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()  # of nothing: it moves no parameter without a gradient, and the schedule wants it first
        direction, slope = self.theta / self.norm, self.norm * gradient  # dL/dv, as θ = norm · v
        self.theta = self.norm * directional_step(direction, slope, self.prior, rate, self.pull)


def principal_components(table, count):
    """The `count` leading principal components of rows `[N, d]`, as long as their deviations: `[count, d]`."""
    centred = table - table.mean(dim=0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    return directions[:count] * (singular[:count, None] / math.sqrt(len(table)))


class EvolutionLearner:
    """Gradient-free Textual Inversion: CMA-ES in a principal subspace of the vocabulary (GF-TI, Fei et al. 2023).

    All candidates of a step see the same batch. θ is the mean of the search distribution, as single candidates are
    judged by one noisy loss.

    Args:
        task: `Task`, whose settings give the candidates of a step.
        dimension: r, principal components of the token table.
        sigma: the first standard deviation, in those of the vocabulary along each component.
    """

    def __init__(self, task, dimension, sigma):
        args = task.args
        self.task, self.data = task, torch.Generator().manual_seed(args.seed)
        self.initial = task.initial.repeat(args.num_vectors, 1)
        self.basis = principal_components(base_model.load_token_table(task.base).float(), dimension)
        settings = {"popsize": zoodip.candidates_per_step(args), "seed": args.seed + 1, "verbose": -9}
        self.search = cma.CMAEvolutionStrategy(np.zeros(args.num_vectors * dimension), sigma, settings)
        self.theta = self.initial

    @staticmethod
    def forwards_per_step(args):
        return zoodip.candidates_per_step(args) * args.train_batch_size

    def points(self, coordinates):
        """Coordinates `[m, k·r]` as candidates `[m, k, d]`."""
        coordinates = torch.as_tensor(np.asarray(coordinates), dtype=self.basis.dtype)
        return self.initial + coordinates.view(len(coordinates), len(self.initial), -1) @ self.basis

    @torch.inference_mode()
    def step(self):
        batch, candidates = self.task.draw_batch(self.data), self.search.ask()
        losses = self.task.model.losses(self.points(candidates), batch)
        self.search.tell(candidates, losses.double().tolist())
        (self.theta,) = self.points(self.search.mean[None])
        return losses.mean()


LEARNERS = {
    "flagship": FlagshipLearner,
    "gradient": GradientLearner,
    "directional": DirectionalLearner,
    "evolution": EvolutionLearner,
}


@dataclass(frozen=True)
class Method:
    """Something to compare.

    Args:
        title: what a reader calls it.
        flags: of the script.
        learner: key of `LEARNERS`; None is the plain word, which learns nothing.
        options: of the learner.
        budget: example-forwards, where they are fewer than what the others get; its schedule is as short.
    """

    title: str
    flags: str = ""
    learner: str | None = "flagship"
    options: dict = field(default_factory=dict)
    budget: int | None = None

    def make(self, task):
        return LEARNERS[self.learner](task, **self.options)

    def forwards_per_step(self, args):
        return LEARNERS[self.learner].forwards_per_step(args)
