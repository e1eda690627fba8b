"""Updates and draws by what they must come to: numpy for the paper's update, expectations for everything random."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_algorithm import algorithm_2

import train_selective_dreambooth_lora as selective
import train_zoodip_textual_inversion as zoodip
from personalization.data import examples
from personalization.data.images import Picture
from personalization.methods.gauss_newton import GaussNewton, GaussNewtonUpdate
from personalization.models.families import SD1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parsed(*flags):
    words = "--placeholder_token <t> --initializer_token x --pretrained_model_name_or_path m --train_data_dir d"
    return zoodip.parse_args([*words.split(), *map(str, flags)])


# ---------------------------------------------------------------------------------------------------- whole updates


def adam(theta, gradients, rates, epsilon, decay):
    """θ after every step of AdamW, by numpy."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, (gradient, rate) in enumerate(zip(gradients(), rates), start=1):
        g = gradient(theta)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta * (1 - rate * decay)
        theta = theta - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + epsilon)
        yield theta


def falling(rate, steps):
    return [rate * (1 - t / steps) for t in range(steps)]


def test_the_papers_update_against_numpy():
    """Alg. 1 with Alg. 2 over three windows: estimates are projected, brought to the gradient's length, and Adam's."""
    window, steps, n, estimates = 6, 18, 2, 6  # two accumulation steps of three processes
    flags = ["--sg_window", window, "--sg_threshold", 0.05, "--num_perturbations", n, "--learning_rate", 0.05]
    flags += ["--gradient_accumulation_steps", 2, "--lr_scheduler", "linear", "--max_train_steps", steps]
    args = parsed(*flags, "--adam_epsilon", 0.3, "--adam_weight_decay", 0.1)
    rng = np.random.default_rng(0)
    given, start = rng.normal(size=(steps, 1, 12)), rng.normal(size=(1, 12))
    theta = torch.from_numpy(start).clone()
    rule = zoodip.OPTIMIZERS["zo_adam"].start(args, theta, None, num_processes=3)
    state = {"removed": np.zeros((0, 12)), "buffer": []}

    def gradients():
        for estimate in given:

            def projected(theta, estimate=estimate):
                if len(state["buffer"]) == window:
                    state["removed"], state["buffer"] = algorithm_2(np.stack(state["buffer"]), 0.05), []
                removed = state["removed"]
                left = estimate.ravel() - removed.T @ (removed @ estimate.ravel())
                length = np.sqrt((12 - len(removed) + n * estimates - 1) / (n * estimates))
                return (left / length).reshape(1, 12)

            yield projected

    expected = adam(start, gradients, falling(0.05, steps), 0.3, 0.1)
    for estimate, wanted in zip(given, expected):
        rule.update(theta, torch.from_numpy(estimate))
        state["buffer"].append(wanted)
        np.testing.assert_allclose(theta.numpy(), wanted, rtol=1e-6, atol=1e-9)
    assert 0 < rule.subspace.num_removed < window


def test_the_update_by_the_exact_gradient_against_numpy():
    steps = 6
    flags = ["--optimizer", "gradient", "--learning_rate", 0.05, "--lr_scheduler", "linear"]
    args = parsed(*flags, "--max_train_steps", steps, "--adam_epsilon", 0.3, "--adam_weight_decay", 0.1)
    rng = np.random.default_rng(0)
    given, start = rng.normal(size=(steps, 1, 12)), rng.normal(size=(1, 12))
    theta = torch.from_numpy(start).clone()
    rule = zoodip.OPTIMIZERS["gradient"].start(args, theta, None, num_processes=1)
    expected = adam(start, lambda: [lambda _, g=g: g for g in given], falling(0.05, steps), 0.3, 0.1)
    for gradient, wanted in zip(given, expected):
        rule.update(theta, torch.from_numpy(gradient))
        np.testing.assert_allclose(theta.numpy(), wanted, rtol=1e-6, atol=1e-9)


class Recorder:
    """A rule whose evidence is the mean of a batch's latents, and whose update is what it is given."""

    def __init__(self):
        self.given, self.seen = [], []

    def evidence(self, model, theta, batch, generator):
        self.seen.append(batch.noisy_latents.mean())
        return (self.seen[-1][None], 2 * self.seen[-1][None]), self.seen[-1]

    def update(self, theta, *parts):
        self.given.append(parts)
        theta += parts[0]


def a_concept(**more):
    """A `Concept` of three pictures whose latents are 0, 1 and 2 everywhere, of flips 10, 11 and 12."""
    means = torch.arange(3.0) + torch.tensor([[0.0], [10.0]])
    moments = torch.cat([means[:, :, None, None, None].expand(2, 3, 4, 2, 2), torch.full((2, 3, 4, 2, 2), -30.0)], 2)
    facts = {"flip_probability": 0.0, "family": SD1, "vae_config": {"scaling_factor": 1.0}}
    facts |= {"prompt_ids": torch.arange(4)[:, None].expand(4, 5), "prompts_of_image": [[0], [1], [2, 3]]}
    return examples.Concept(moments, **(facts | more))


@pytest.mark.parametrize("tail", [0.0, 3.0])
def test_a_step_averages_its_batches_and_the_result_its_steps(tail):
    """Weights of the average, by the closed form of its recursion with a = 3: in proportion to t(t + 1)(t + 2)."""
    rule, scheduler = Recorder(), SD1.open_scheduler({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})
    learner = zoodip.Learner(torch.zeros(1), rule, generator(), generator(1), tail)
    sampling, model, steps = zoodip.Sampling(0, 1000, 1, accumulation_steps=3), SimpleNamespace(scheduler=scheduler), 8
    walk = []
    for _ in range(steps):
        loss = zoodip.train_step(learner, model, a_concept(), sampling, average=lambda tensor: tensor / 2)
        mean = torch.stack(rule.seen[-3:]).mean()
        torch.testing.assert_close(torch.cat(rule.given[-1]), torch.stack([mean, 2 * mean]) / 2)
        torch.testing.assert_close(loss, mean)
        walk.append(learner.theta.item())
    t = np.arange(1, steps + 1)
    weights = t * (t + 1) * (t + 2) if tail else t == steps
    assert learner.result.item() == pytest.approx(np.average(walk, weights=weights), rel=1e-5)
    assert len(rule.seen) == 3 * steps and learner.updates == steps


# ----------------------------------------------------------------------------------------------- what a step draws


def draws(concept, count=4000, seed=0):
    """Latents `[count]` and prompts `[count]` of draws."""
    latents, prompts, *_ = examples.draw_examples(concept, count, generator(seed))
    return latents.mean(dim=(1, 2, 3)), prompts[:, 0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_pictures_are_mirrored_as_often_as_asked_for(share):
    latents, _ = draws(a_concept(flip_probability=share))
    assert (latents > 5).float().mean().item() == pytest.approx(share, abs=0.03)
    for picture in range(3):  # all of them, and their flips, alike
        shown = ((latents - picture).abs() < 0.1).float().mean() + (
            (latents - 10 - picture).abs() < 0.1
        ).float().mean()
        assert shown.item() == pytest.approx(1 / 3, abs=0.03)


def test_captions_of_a_picture_are_drawn_alike_and_repeats_as_often_as_they_say():
    latents, prompts = draws(a_concept(order=torch.tensor([0, 2, 2, 2])))
    shares = torch.bincount(prompts, minlength=4) / len(prompts)
    torch.testing.assert_close(shares, torch.tensor([1 / 4, 0, 3 / 8, 3 / 8]), atol=0.03, rtol=0)
    assert ((latents > 1.5) == (prompts >= 2)).all()


def test_a_flip_is_left_to_right():
    vae = SimpleNamespace(
        dtype=torch.float32, encode=lambda x: SimpleNamespace(latent_dist=SimpleNamespace(parameters=x))
    )
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 4).expand(3, 3, 4)
    moments = examples.encode_images(vae, [Picture("a.png", pixels, None, None)], 2, "cpu")
    assert moments.shape == (2, 1, 3, 3, 4)
    expected = pixels[0].numpy() / 127.5 - 1
    np.testing.assert_allclose(moments[0, 0, 0].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(moments[1, 0, 0].numpy(), expected[:, ::-1], atol=1e-6)


def test_latents_spread_as_the_vae_says_and_noise_as_the_timestep_says():
    """The noise level by an expectation: at t, a share ᾱ of the latents' variance is left and 1 - ᾱ is noise."""
    moments = torch.cat([torch.full((1, 3, 4, 2, 2), value) for value in (5.0, np.log(9.0))], dim=2)
    concept = replace(a_concept(), moments=moments, vae_config={"scaling_factor": 0.5})
    latents, *_ = examples.draw_examples(concept, 4000, generator())
    assert latents.mean().item() == pytest.approx(2.5, abs=0.05)
    assert latents.std().item() == pytest.approx(1.5, abs=0.03)
    scheduler = SD1.open_scheduler({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})
    betas = np.linspace(1e-4, 0.02, 1000)
    ids = torch.zeros(4000, 1, dtype=torch.long)
    for t in (10, 500, 900):
        batch = examples.noise_batch(SD1, latents, ids, torch.full((4000,), t), generator(t), scheduler)
        kept = np.prod(1 - betas[: t + 1])
        assert batch.noisy_latents.mean().item() == pytest.approx(2.5 * np.sqrt(kept), abs=0.05)
        assert batch.noisy_latents.var().item() == pytest.approx(2.25 * kept + 1 - kept, rel=0.05)
        assert batch.target.std().item() == pytest.approx(1.0, abs=0.02)


# ---------------------------------------------------------------------------------------------- Gauss-Newton's looks


def a_look(inside=2, dimension=6, steps=10**6, step_size=0.5):
    """A `GaussNewtonUpdate` whose directions are the axes."""
    solver = GaussNewton(torch.eye(dimension)[:, None, :], 0.8, 1.0, 1.0)
    return GaussNewtonUpdate(solver, step_size, inside, steps, seed=3)


def test_curvature_averages_out_of_the_evidence_and_the_share_of_the_subspace_is_right():
    """Errors with a large second derivative: a difference over h has h/2 of it in it, of either sign by the coin."""
    linear, curved = torch.randn(20, 6, generator=generator()), torch.randn(20, 6, generator=generator(1)).abs()
    rule, theta = a_look(), torch.zeros(1, 6)

    def errors(candidates, batch):
        x = candidates[:, 0]
        return x @ linear.T + x.square() @ curved.T + 1.0

    exact = linear.mean(dim=0)  # half the gradient of the mean square at θ = 0, where all errors are 1
    draws = generator(2)
    found = [rule.evidence(SimpleNamespace(errors=errors), theta, None, draws)[0] for _ in range(3000)]
    gradient = torch.stack([part[1] for part in found]).mean(dim=0)
    torch.testing.assert_close(gradient, exact[:2], atol=0.05, rtol=0)
    flat = SimpleNamespace(errors=lambda candidates, batch: candidates[:, 0] @ linear.T + 1.0)
    squares = torch.stack([rule.evidence(flat, theta, None, draws)[0][2] for _ in range(3000)]).mean(dim=0)
    expected = torch.stack([exact[:2].square().sum(), exact[2:].square().sum()])
    torch.testing.assert_close(squares, expected, rtol=0.1, atol=1e-4)


def test_after_the_subspace_all_directions_are_looked_along_alike():
    rule, seen = a_look(steps=0), torch.zeros(6)
    for rule.steps in range(3000):
        looked = rule.looked()
        assert len(looked) == len(looked.unique()) == 3
        seen[looked] += 1
    torch.testing.assert_close(seen / 3000, torch.full((6,), 0.5), atol=0.04, rtol=0)


# -------------------------------------------------------------------------------------------------------- ZO-high


def test_zo_highs_estimate_has_the_gradients_length_over_all_that_is_averaged(monkeypatch):
    """n directions, of as many batches and processes as are averaged afterwards: by expectation the gradient's own."""
    gradient = torch.randn(40, generator=generator())
    placed = []
    model = SimpleNamespace(place=placed.append, errors=lambda batch: (placed[-1] @ gradient)[None])
    selection = selective.Selection(selective.Ramp(0.6, 0.1), selective.Ramp(0.9, 0.1))
    sampling = selective.Sampling(selection, 1, 1.0, 3, 1.0, 2, 1e-3, 4)
    learner = SimpleNamespace(theta=torch.zeros(40), perturbations=generator(1))
    lengths = []
    for _ in range(200):
        parts = [selective.zo_high(learner, model, None, sampling)[0] for _ in range(3 * 4)]
        lengths.append(torch.stack(parts).mean(dim=0).square().sum())
    assert torch.stack(lengths).mean().item() == pytest.approx(gradient.square().sum().item(), rel=0.1)
