"""The contract of a way to move θ: a `Rule` is the update itself, an `Optimizer` what a script must know around it."""

from typing import Protocol


class Rule(Protocol):
    """An update of θ, from what batches say of it. The loop averages the evidence over batches and processes.

    A rule may be a dataclass; everything that changes from step to step is in its state, so that a resumed run equals
    the uninterrupted one bit for bit.
    """

    def evidence(self, model, theta, batch, generator):
        """What a batch says of θ; it reads and changes nothing else.

        Args:
            model: `FrozenModel`: `losses(candidates, batch)` `[m]`, `errors(candidates, batch)` `[m, M]`; its parts.
            theta: θ `[k, d]`, float32.
            batch: `Batch` on θ's device.
            generator: this process's source of perturbations.

        Returns:
            A tuple of tensors, whose means over batches and processes `update` takes; and the loss at θ.
        """

    def update(self, theta, *evidence):
        """Moves θ in place."""

    def figures(self):
        """What the log and the result say of it, name -> number."""

    def state_dict(self): ...

    def load_state_dict(self, state, device): ...


class Optimizer:
    """What surrounds a `Rule`: one object for each `--optimizer`. A method that says nothing changes nothing.

    Attributes:
        method: what a result's config and card say that it was learned with.
        tag: of the model card.
        step_flag: the flag that makes steps shorter, for a run that diverges.
        recipe_name, recipe: its set of defaults, as `--recipe` names it: flag -> value.
        perturbation_scales: precision of the activations -> the step of the finite difference, the default and the
            least at which what it measures still agrees with autograd (benchmarks/bench_signal.py); empty where it
            never takes differences; see `stacks`.
        precision_of_engine: value of `--unet_backend` -> the `--mixed_precision` that it computes in by default.
        candidates_per_pass: default of `--max_candidates_per_forward`; None: all at once.
        differentiates: whether it needs a backward pass, which only PyTorch has.
    """

    method: str
    tag: str
    step_flag: str
    recipe_name: str
    recipe: dict
    perturbation_scales: dict = {}
    precision_of_engine: dict = {}
    candidates_per_pass: int | None = None
    differentiates: bool = False

    def add_flags(self, add):
        """Declares the flags that are its own, by `flags.add` in a group of their own."""

    def check(self, args):
        """Raises an `InputError` where its flags exclude each other; no file is read."""

    def complete(self, args, base):
        """Fills in the settings that depend on the base; raises an `InputError` where one does not fit it."""

    def stacks(self, args):
        """Whether a pass is a value and exact derivatives of it, see `models.stacked`."""
        return False

    def num_candidates(self, args):
        """Points of a step."""
        raise NotImplementedError

    def num_forwards(self, args):
        """Passes that an example of a step costs: one for each point; a backward pass counts as two."""
        return self.num_candidates(args)

    def kept_coordinates(self, args, entries):
        """Numbers that it keeps beside the candidates of a step, for a θ of so many entries."""
        return 0

    def num_steps(self, args, family):
        """Length of a run that is not told how long."""
        raise NotImplementedError

    def look_ahead(self, args, base, placeholder, prompt_ids):
        """Whatever `start` needs of the base's small files; an `InputError` comes before anything slow."""

    def look_at(self, model, found, args, base, placeholder, prompt_ids):
        """What `look_ahead` found, or what `start` needs of a `FrozenModel` instead."""
        return found

    def check_pictures(self, args, pictures):
        """Raises an `InputError` where its flags do not fit the `Picture`s."""

    def make_ready(self, args, model, base):
        """Prepares the networks of a `FrozenModel` of a `Base` for it."""

    def look_around(self, args, base):
        """Denoiser -> the `windows.Surroundings` that its backward pass needs; None where it sees whole pictures."""
        return None

    def start(self, args, theta, found, num_processes):
        """The `Rule` before its first step; `found` is what `look_ahead` returned."""
        raise NotImplementedError

    def tail(self, args):
        """The weight of late updates in the result, see `Learner.average_tail`; 0: the result is the last θ."""
        return 0.0
