"""Ideas that are not in the script, as learners for `compare_methods.py --grid ideas`, which measures their worth.

Each is the script's own learner with one thing changed, so that what it is worth is a difference between two rows.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler

from benchmarks import methods
from benchmarks.methods import FlagshipLearner, zoodip
from demo import world
from personalization.models import base_model


BUDGET = 4500  # example-forwards of a run, which schedules need to know


class RAdaZO(torch.optim.Optimizer):
    """R-AdaZO (arXiv 2502.01014): Adam whose second moment is that of the first, v ← β₂ v + (1 - β₂) m²."""

    def __init__(self, parameters, lr, betas, eps):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for theta in group["params"]:
                state = self.state[theta]
                t = state["step"] = state.get("step", 0) + 1
                m = state["m"] = torch.lerp(theta.grad, state.get("m", torch.zeros_like(theta)), beta1)
                corrected = m / (1 - beta1**t)
                v = state["v"] = torch.lerp(corrected.square(), state.get("v", torch.zeros_like(theta)), beta2)
                theta -= group["lr"] * corrected / ((v / (1 - beta2**t)).sqrt() + group["eps"])


class RAdaZOLearner(FlagshipLearner):
    """ZOODiP with R-AdaZO in the place of Adam."""

    def __init__(self, task):
        super().__init__(task)
        args, rule = task.args, self.learner.rule
        betas = args.adam_beta1, args.adam_beta2
        rule.optimizer = RAdaZO([self.learner.theta], args.learning_rate, betas, args.adam_epsilon)
        rule.lr_scheduler = get_scheduler("constant", rule.optimizer)


class FZOOLearner:
    """FZOO (arXiv 2506.09034): directions of ±1, forward differences, a step divided by the losses' deviation.

    θ ← θ - η (1/n) Σ [(L(θ + μu_i) - L(θ)) / σ] u_i, σ the standard deviation of the L(θ + μu_i): a normalised step.
    """

    def __init__(self, task, learning_rate):
        self.task, self.learning_rate = task, learning_rate
        self.theta = task.initial.repeat(task.args.num_vectors, 1)
        self.data, self.directions = (torch.Generator().manual_seed(task.args.seed + i) for i in range(2))

    forwards_per_step = staticmethod(FlagshipLearner.forwards_per_step)

    @torch.inference_mode()
    def step(self):
        args, batch = self.task.args, self.task.draw_batch(self.data)
        shape = (args.num_perturbations, *self.theta.shape)
        signs = 2.0 * torch.randint(2, shape, generator=self.directions) - 1
        points = torch.cat([self.theta[None], self.theta + args.perturbation_scale * signs])
        losses = self.task.model.losses(points, batch)
        differences = (losses[1:] - losses[0]) / losses[1:].std().clamp(min=1e-12)
        self.theta = self.theta - self.learning_rate * torch.tensordot(differences, signs, 1) / len(signs)
        return losses[0]


class FixedNormLearner(FlagshipLearner):
    """Directional Textual Inversion's parametrisation (arXiv 2512.13672): only the direction of θ is learned.

    The norm is that which the longest rows of the token table, the trained words, have in the mean.
    """

    def __init__(self, task):
        super().__init__(task)
        norms = torch.linalg.vector_norm(base_model.load_token_table(task.base).float(), dim=1)
        self.norm = norms.topk(task.args.gn_subspace_words).values.mean()
        rule, update = self.learner.rule, self.learner.rule.update

        def onto_the_sphere(theta, *evidence):
            update(theta, *evidence)
            theta.copy_(self.norm * F.normalize(theta, dim=-1))

        rule.update = onto_the_sphere

    @property
    def theta(self):
        return self.norm * F.normalize(self.learner.result, dim=-1)


class SummedWordsLearner(FlagshipLearner):
    """Starts from the sum of words for the subject, unless its shape alone has less loss on one batch of 16.

    Those 32 example-forwards are not counted.
    """

    def __init__(self, task):
        scene = world.SUBJECTS[Path(task.args.train_data_dir).name]
        words = " ".join(dict.fromkeys((scene.colour, scene.colour2, scene.pattern, scene.shape)))
        ids = task.base.tokenizer.encode(words, add_special_tokens=False)
        total = base_model.load_token_table(task.base)[ids].float().sum(dim=0)
        sampling = replace(task.sampling, batch_size=16)
        generator = torch.Generator().manual_seed(task.args.seed + 2)
        batch = zoodip.draw_batch(task.concept, sampling, task.model.scheduler, generator)
        starts = torch.stack([total, task.initial])
        with torch.inference_mode():
            losses = task.model.losses(starts[:, None], batch)
        super().__init__(replace(task, initial=starts[losses.argmin()]))


class FallingStepsLearner(FlagshipLearner):
    """Gauss-Newton's steps shortened along a cosine, from whole ones to none at the end of the budget."""

    def __init__(self, task):
        super().__init__(task)
        rule, step = self.learner.rule, self.learner.rule.solver.step
        steps = BUDGET // self.forwards_per_step(task.args)
        rule.solver.step = lambda *evidence: 0.5 * (1 + math.cos(math.pi * rule.steps / steps)) * step(*evidence)


class InformedTimestepsLearner(FlagshipLearner):
    """Timesteps drawn by information: eighths of PUTS's range, by their tr K over their mean loss so far.

    The first steps take the eighths in turn; afterwards one in five is still drawn uniformly.
    """

    PARTS, FIRST = 8, 24

    def __init__(self, task):
        super().__init__(task)
        self.whole, self.choice = task.sampling, torch.Generator().manual_seed(task.args.seed + 3)
        self.information, self.losses, self.counts = (torch.zeros(self.PARTS, dtype=torch.float64) for _ in range(3))
        rule, update = self.learner.rule, self.learner.rule.update

        def watched(theta, matrix, *evidence):
            self.information[self.part] += matrix.trace().item()
            update(theta, matrix, *evidence)

        rule.update = watched

    def step(self):
        taken = int(self.counts.sum())
        weights = torch.ones(self.PARTS, dtype=torch.float64)
        if taken >= self.FIRST and torch.rand((), generator=self.choice) > 0.2:
            weights = self.information / self.losses  # the counts in both means cancel
        drawn = torch.multinomial(weights, 1, generator=self.choice).item()
        self.part = taken % self.PARTS if taken < self.FIRST else drawn
        low, width = self.whole.min_timestep, (self.whole.max_timestep - self.whole.min_timestep) // self.PARTS
        first = low + self.part * width
        self.task.sampling = replace(self.whole, min_timestep=first, max_timestep=first + width)
        loss = super().step()
        self.losses[self.part] += loss.item()
        self.counts[self.part] += 1
        return loss


methods.LEARNERS |= {
    "radazo": RAdaZOLearner,
    "fzoo": FZOOLearner,
    "fixed_norm": FixedNormLearner,
    "summed_words": SummedWordsLearner,
    "falling_steps": FallingStepsLearner,
    "informed_timesteps": InformedTimestepsLearner,
}
