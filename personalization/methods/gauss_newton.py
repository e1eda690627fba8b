"""Forward-only Gauss-Newton (ours): a forward pass returns a whole predicted noise, of which ZOODiP keeps one number.

n + 1 passes on one batch give n directional derivatives of the *prediction*: exact ones (`tangents`), or finite
differences where the engine has none. They make a Gauss-Newton matrix, and a recursive least-squares filter of a few
numbers takes steps from it: no learning rate, no Adam. Prior art: multi-tangent forward gradients (arXiv 2410.17764)
and FoMoH (arXiv 2408.10419) take such derivatives in forward mode; BSZO (arXiv 2601.01452) filters finite differences
of losses by Kalman's formulas. docs/methods/gauss_newton.md has what was measured.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError
from ..flags import COUNT, RUN, SHARE, Range
from ..logs import get_logger
from ..models import base_model
from ..models.openvino_unet import OpenVINOUNet, without_rule
from ..models.stacked import NoRule
from . import tangents
from .rule import Optimizer


logger = get_logger(__name__)

# =====================================================================================================
# The algorithm: pure functions on tensors
# =====================================================================================================


def vocabulary_directions(table, num_directions, num_words):
    """The directions in which words differ most: principal components of the longest rows of the token table.

    Training lengthens the rows that it uses, so the longest are those that the model knows.

    Args:
        table: `[vocabulary, d]`.
        num_directions: r, at most d.
        num_words: how many rows, the longest first.

    Returns:
        float32 `[r, d]`, orthonormal, by falling variance of the words along them.
    """
    lengths = torch.linalg.vector_norm(table, dim=1, dtype=torch.float32)
    words = table[lengths.topk(min(num_words, len(table))).indices].double()
    _, _, directions = torch.linalg.svd(words - words.mean(dim=0))
    return directions[:num_directions].float()


def gauss_newton_evidence(error, derivatives):
    """What n + 1 forward passes say about θ along n directions: the Gauss-Newton matrix K and half the gradient, y.

    The loss is the mean square of the prediction errors r(θ) = ε_φ(θ) - target. With the derivatives D_i of all M
    errors along directions e_i they are K = D Dᵀ / M and y = D r / M. Both average over M errors: so they survive
    rounding that differences of two losses do not.

    Args:
        error: r `[M]`.
        derivatives: D `[n, M]`.

    Returns:
        K `[n, n]`, y `[n]` and the loss, float32.
    """
    return derivatives @ derivatives.T / len(error), derivatives @ error / len(error), error.square().mean()


def differences(error_fn, theta, directions, step_size):
    """Errors, and their derivatives along directions by finite differences, D_i = (r(θ + h e_i) - r(θ)) / h.

    Args:
        error_fn: takes candidates `[m, *theta.shape]`, returns their errors `[m, M]`, all on the same examples.
        theta: the point θ, any shape.
        directions: e `[n, *theta.shape]`, of length one.
        step_size: h, the length of the finite difference, in units of θ; or one for each direction `[n]`, of any sign.

    Returns:
        r `[M]` and D `[n, M]`.
    """
    step_size = torch.as_tensor(step_size).to(theta).expand(len(directions))
    steps = directions * step_size.view(-1, *[1] * theta.dim())
    errors = error_fn(torch.cat([theta[None], theta + steps]))
    return errors[0], (errors[1:] - errors[0]) / step_size[:, None]


class GaussNewton:
    """Recursive least squares for θ from Gauss-Newton evidence: what is known of θ accumulates in a small matrix.

    A ← ρ A + K, then θ moves by -(A + λ tr(K₁)/n I)⁻¹ y along the directions. With ρ = 1 and errors linear in θ that
    is the posterior mean of a Gaussian prior at the start; errors are linear only nearby, so older evidence is
    forgotten. There is no learning rate. A step may look along some of the directions: it moves θ along those only,
    and of A their block alone is forgotten and filled. All of it is on the host: small, and the same on every device.

    Args:
        directions: `[n, *θ.shape]`, orthonormal; see `vocabulary_directions`.
        memory: ρ, the share of older evidence that is kept.
        ridge: λ, how much the prior weighs, in units of the mean curvature of the first evidence K₁.
        max_step: the longest step of θ; longer ones are shortened to it.

    Attributes:
        information: A, float64 `[n, n]`.
        prior: λ tr(K₁)/n; None before the first evidence.
    """

    def __init__(self, directions, memory, ridge, max_step):
        self.directions, self.memory, self.ridge, self.max_step = directions, memory, ridge, max_step
        self.information = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        self.prior = None

    def step(self, matrix, gradient, looked):
        """The step of θ that new evidence K `[m, m]`, y `[m]` calls for, of directions with the numbers `looked`."""
        matrix, gradient = matrix.cpu().double(), gradient.cpu().double()
        if self.prior is None:
            self.prior = max(self.ridge * matrix.trace().item() / len(matrix), sys.float_info.min)
        # √ρ on both sides: ρ within the block, √ρ between it and the rest. So A stays positive definite.
        kept = torch.ones(len(self.information), dtype=torch.float64)
        kept[looked] = math.sqrt(self.memory)
        block = looked[:, None], looked
        self.information.mul_(kept[:, None]).mul_(kept)
        self.information[block] += matrix
        damped = self.information[block] + self.prior * torch.eye(len(matrix), dtype=torch.float64)
        along = -torch.linalg.solve_ex(damped, gradient)[0].to(self.directions)  # numbers that are none do not raise
        step = torch.tensordot(along, self.directions[looked], dims=1)
        return step * (self.max_step / step.norm().clamp(min=self.max_step))


# =====================================================================================================
# One update of θ
# =====================================================================================================

SHARE_STEPS, LEAST_SHARE = 16, 0.5  # after so many steps a subspace that holds less of the gradient is left


def random_combination(directions, generator):
    """A random direction of length one `[k, d]`, a combination of orthonormal ones `[n, k, d]`."""
    flat = directions.flatten(1)
    along = F.normalize(flat @ torch.randn(flat.shape[1], generator=generator), dim=0)
    return (along @ flat).view_as(directions[0])


@dataclass
class GaussNewtonUpdate:
    """`gauss_newton`: evidence from whole predictions along some directions, then `GaussNewton`'s step.

    A run begins in a subspace, which learns fast; then every step looks along as many directions drawn from all, which
    learn further. In the subspace one random direction from outside goes along, which tells how much of the gradient
    it holds: where that is too little, it is left at once. Rounding adds to every difference alike and would be
    multiplied with the one that stands for all outside, so differences in bfloat16 and INT8 do not tell.
    """

    solver: GaussNewton  # with all directions, those of the subspace first
    step_size: float | None  # h of finite differences; None: derivatives are exact
    inside: int  # directions of the subspace
    subspace_steps: int  # in it, before it is left
    seed: int  # of the draws of directions, which are the same in all processes
    exact: bool = True  # whether derivatives are precise enough to tell the share
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(2))  # sums of |gradient|² inside, outside
    steps: int = 0
    differentiate: Callable = tangents.stacked  # the way to exact derivatives

    @property
    def share(self):
        """The share of the gradient's second moment that the subspace holds; None where it was not measured."""
        inside, outside = self.squares.tolist()
        return inside / (inside + outside) if inside + outside > 0 else None

    @property
    def in_subspace(self):
        """Whether the step at hand is one in the subspace."""
        return self.steps < self.subspace_steps

    def looked(self):
        """Numbers of the directions that the step at hand moves θ along, the same for all its batches."""
        if self.in_subspace:
            return torch.arange(self.inside)
        shuffled = np.random.default_rng([self.seed, self.steps]).permutation(len(self.solver.directions))
        return torch.from_numpy(shuffled[: self.inside + 1])

    def evidence(self, model, theta, batch, generator):
        """What a batch says: K, y and |gradient|² inside and outside of the subspace; and the loss."""
        directions = self.solver.directions[self.looked()]
        n, outside = len(directions), theta.numel() - self.inside
        if self.in_subspace:
            probe = random_combination(self.solver.directions[self.inside :], generator)
            directions = torch.cat([directions, probe[None]])
        error, derivatives = self.derivatives(model, theta, directions.to(theta), batch, generator)
        matrix, gradient, loss = gauss_newton_evidence(error, derivatives)
        squares = torch.stack([gradient[:n].square().sum(), gradient[n:].square().sum() * outside])
        return (matrix[:n, :n], gradient[:n], squares), loss

    def derivatives(self, model, theta, directions, batch, generator):
        """Errors of the prediction `[M]` and their derivatives along directions `[n, M]`, exact or by differences."""
        if self.step_size is not None:
            # A random sign for each: what curvature adds to a difference over h has either sign, and averages out.
            signs = torch.randint(2, (len(directions),), generator=generator) * 2 - 1
            return differences(lambda points: model.errors(points, batch), theta, directions, self.step_size * signs)
        try:
            return self.differentiate(model, theta, directions, batch)
        except NoRule as reason:
            if isinstance(model.denoiser, OpenVINOUNet):  # of which PyTorch knows nothing
                raise without_rule(reason) from None
            logger.info(f"Derivatives by PyTorch's forward mode, about half as fast: {reason}")
            self.differentiate = tangents.by_autograd
            return self.differentiate(model, theta, directions, batch)

    def update(self, theta, matrix, gradient, squares):
        """Moves θ."""
        theta += self.solver.step(matrix, gradient, self.looked()).to(theta)
        was_inside, self.steps = self.in_subspace, self.steps + 1
        if was_inside:
            self.squares += squares.cpu() * self.exact
            share = self.share
            if self.steps == SHARE_STEPS and share is not None and share < LEAST_SHARE:
                self.subspace_steps = SHARE_STEPS
            if not self.in_subspace:
                held = "" if share is None else f", the subspace held {share:.0%} of the gradient"
                logger.info(f"All directions from here on{held}")

    def probes(self, count, generator):
        """Random steps as it takes them, `[count, *θ.shape]`: what INT8 activations are calibrated on."""
        picks = torch.randint(len(self.solver.directions), (count,), generator=generator)
        signs = torch.randint(2, (count, 1, 1), generator=generator) * 2 - 1
        return self.step_size * signs * self.solver.directions[picks]

    def figures(self):
        """What the log and the result say of it."""
        return {} if self.share is None else {"share": self.share}

    def state_dict(self):
        state = {"information": self.solver.information, "prior": self.solver.prior, "squares": self.squares}
        return state | {"steps": self.steps, "subspace_steps": self.subspace_steps}

    def load_state_dict(self, state, device):
        self.solver.information, self.solver.prior = state["information"], state["prior"]
        self.squares, self.steps, self.subspace_steps = state["squares"], state["steps"], state["subspace_steps"]


# =====================================================================================================
# What surrounds it
# =====================================================================================================

FORWARDS = 17_000  # of a run that is not told how long: 500 steps of 34


def choose_directions(args, base, placeholder, prompt_ids):
    """All directions of a vector, `[d, d]`, orthonormal: those of `--gn_subspace` first.

    With `--learn output` those of the prompts' words are known when they are encoded (None here).

    Args:
        args: resolved settings.
        base, placeholder: `Base`, `Placeholder`.
        prompt_ids: of the concept's prompts, any shape.

    Raises:
        InputError: the prompts have too few words to tell directions.
    """
    dimension = base.word_width
    if args.gn_subspace == "none":
        return torch.eye(dimension)
    tables = base_model.load_token_tables(base)
    table = tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)  # of two, a word is a row of both
    if args.gn_subspace == "vocabulary":
        return vocabulary_directions(table, dimension, args.gn_subspace_words)
    ids = prompt_ids[are_words(prompt_ids, base, placeholder)].unique()
    if len(ids) < 2:
        raise InputError(
            f"--gn_subspace prompt_words needs two different words beside {placeholder.token} in the captions: write"
            " longer ones, or give --gn_subspace vocabulary."
        )
    return None if base.of_output else vocabulary_directions(table[ids], dimension, len(ids))


def are_words(ids, base, placeholder):
    """Which ids are of words: neither the placeholder's nor special, like ids."""
    special = torch.tensor([i for tokenizer in base.tokenizers for i in tokenizer.all_special_ids])
    return (ids < placeholder.first_id) & ~torch.isin(ids, special)


class GaussNewtonOptimizer(Optimizer):
    """`--optimizer gauss_newton`."""

    method = "forward-only Gauss-Newton (ours), with ZOODiP's quantization and PUTS (arXiv 2503.14868)"
    tag = "gauss-newton"
    step_flag = "gn_max_step"
    recipe_name = "fast"
    recipe = {
        "train_batch_size": 1,
        "logging_steps": 10,
        "validation_steps": 50,
        "save_steps": 100,
        "checkpointing_steps": 50,
    }
    # Of differences: y, as the mean over both signs of the steps, is right within a third at the least ones.
    perturbation_scales = {"no": (3e-4, 1e-5), "fp16": (1e-2, 3e-3), "bf16": (5e-2, 5e-2), "int8": (0.15, 0.15)}
    precision_of_engine = {"openvino": "bf16"}  # which its evidence survives, in half the time
    candidates_per_pass = 9  # a few, so that memory stays small

    def add_flags(self, add):
        add(
            "--gn_subspace",
            choices=["vocabulary", "prompt_words", "none"],
            default="vocabulary",
            page=True,
            help="Subspace that Gauss-Newton looks along first: the main differences between the model's words (those"
            " with the longest embeddings), between the words of the prompts, or none: everywhere. With --learn output"
            " prompt_words, as the encoder puts them out.",
        )
        add(
            "--gn_subspace_dimension",
            type=int,
            limits=Range(1, 10**5),
            page=True,
            help="Directions of it per vector of the token; each later step takes as many and one more. Default: 32.",
        )
        words = "Number of words that make the vocabulary's subspace."
        add("--gn_subspace_words", type=int, default=80, limits=Range(2, 10**6), page=True, help=words)
        # What follows comes after the calibration, which is of the beginning of training.
        add(
            "--gn_subspace_steps",
            type=int,
            default=30,
            limits=COUNT,
            decides=RUN,
            page=True,
            help="Steps in it (16 where it holds less than half of the gradient); later ones take random directions.",
        )
        ridge = "λ: weight of the start against what the pictures say."
        add("--gn_ridge", type=float, default=3.0, limits=Range(1e-9, 1e9), decides=RUN, page=True, help=ridge)
        kept = "ρ: share of older evidence that is kept from step to step."
        add("--gn_memory", type=float, default=0.8, limits=SHARE, decides=RUN, page=True, help=kept)
        add(
            "--gn_averaging",
            type=float,
            default=3.0,
            limits=Range(0.0, 1000.0),
            decides=RUN,
            page=True,
            help="Weight of later embeddings in the result, which is their average over the last share of the run; 0:"
            " the last one alone.",
        )
        longest = "Longest step of the embedding, in its own units."
        add(
            "--gn_max_step",
            type=float,
            default=1.0,
            limits=Range(0.0, 1e9, above=True),
            decides=RUN,
            page=True,
            help=longest,
        )

    def check(self, args):
        if args.learn == "output" and "gn_subspace" not in args.given:
            args.gn_subspace = "prompt_words"
        if args.learn == "output" and args.gn_subspace == "vocabulary":
            raise InputError(
                "--gn_subspace vocabulary is of the words of a prompt, and --learn output learns none: choose"
                " prompt_words or none."
            )
        for name, without in (("gn_subspace_steps", ("none",)), ("gn_subspace_words", ("none", "prompt_words"))):
            if name in args.given and args.gn_subspace in without:
                raise InputError(f"--{name} does nothing with --gn_subspace {args.gn_subspace}: drop one.")

    def complete(self, args, base):
        dimension = base.word_width
        args.gn_subspace_dimension = args.gn_subspace_dimension or min(32, dimension - 1)
        if args.gn_subspace_dimension >= dimension:  # every step takes one more
            raise InputError(
                f"--gn_subspace_dimension {args.gn_subspace_dimension} is too many for a token of this model, which"
                f" has {dimension} entries: give at most {dimension - 1}."
            )

    def stacks(self, args):
        """Unless a step of differences is given. What PyTorch compiles are passes of tensors alone, and what NNCF
        quantizes are single values."""
        quantized = args.openvino_precision == "int8"
        return args.perturbation_scale is None and not args.torch_compile and not quantized

    def num_candidates(self, args):
        """θ, the subspace's directions for each vector, and one more."""
        return args.num_vectors * args.gn_subspace_dimension + 2

    def num_forwards(self, args):
        """One for each point; of exact derivatives every pass has θ in it, too."""
        points = self.num_candidates(args)
        if not self.stacks(args):
            return points
        rows = tangents.rows_per_pass(args.max_candidates_per_forward, points - 1)
        return points - 1 + math.ceil((points - 1) / (rows - 1))

    def kept_coordinates(self, args, entries):
        """As many directions as θ has entries, and A."""
        return entries * entries

    def num_steps(self, args, family):
        return max(1, FORWARDS // self.num_candidates(args))

    def look_ahead(self, args, base, placeholder, prompt_ids):
        """`choose_directions`."""
        return choose_directions(args, base, placeholder, prompt_ids)

    def look_at(self, model, found, args, base, placeholder, prompt_ids):
        """`choose_directions`; of an output the main differences between what the prompts' words became."""
        if found is not None:
            return found
        rows = model.text_encoder.rows
        said = rows.said(prompt_ids.to(rows.ids.device)).cpu()[are_words(prompt_ids, base, placeholder)].unique(dim=0)
        return vocabulary_directions(said, base.word_width, len(said))

    def start(self, args, theta, found, num_processes):
        """A `GaussNewtonUpdate`; the directions `found` `[d, d]` serve each of θ's vectors `[k, d]`."""
        k, d = theta.shape
        of_vectors = torch.eye(k)[None, :, :, None] * found[:, None, None, :]  # [d, k, k, d]: vector by vector
        solver = GaussNewton(of_vectors.reshape(-1, k, d), args.gn_memory, args.gn_ridge, args.gn_max_step)
        inside, steps = k * args.gn_subspace_dimension, 0 if args.gn_subspace == "none" else args.gn_subspace_steps
        exact = self.stacks(args) or args.activations not in ("bfloat16", "int8")
        return GaussNewtonUpdate(solver, args.perturbation_scale, inside, steps, args.seed, exact)

    def tail(self, args):
        return args.gn_averaging


OPTIMIZER = GaussNewtonOptimizer()
