"""The algorithm section against independent computations: autograd, numpy, scipy."""

import inspect
import re

import numpy as np
import pytest
import torch
from scipy import stats

import train_zoodip_textual_inversion as zoodip
from train_zoodip_textual_inversion import (
    SubspaceGradient,
    estimate_gradient,
    normalize_estimate,
    sample_puts_timesteps,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------- PUTS


def test_puts_is_uniform_on_its_interval():
    draws = sample_puts_timesteps(40_000, 500, 900, generator())
    assert draws.dtype == torch.long and draws.shape == (40_000,)
    assert draws.min() == 500 and draws.max() == 899
    assert stats.chisquare(np.bincount(draws.numpy() - 500, minlength=400)).pvalue > 1e-3


def test_puts_follows_its_generator_alone():
    first = sample_puts_timesteps(8, 0, 1000, generator(3))
    torch.manual_seed(123)
    assert torch.equal(first, sample_puts_timesteps(8, 0, 1000, generator(3), device="cpu"))


# ------------------------------------------------------------------------------------------------- gradient estimators


def smooth_loss(candidates):
    """A loss with curvature, `[m, 2, 5] -> [m]`."""
    weights = torch.linspace(-1, 1, 10, dtype=candidates.dtype).view(2, 5)
    return torch.sin(candidates * weights).sum(dim=(1, 2)) + 0.1 * (candidates**2).sum(dim=(1, 2))


@pytest.mark.parametrize("estimator, losses_per_step", [("rge", 9), ("spsa", 16)])
def test_estimator_matches_its_equation(estimator, losses_per_step):
    theta, mu, n = torch.randn(2, 5, generator=generator(1), dtype=torch.float64), 1e-3, 8
    calls = []

    def counted(candidates):
        calls.append(len(candidates))
        return smooth_loss(candidates)

    before = theta.clone()
    estimate, base = estimate_gradient(counted, theta, n, mu, generator(2), estimator)
    assert sum(calls) == losses_per_step and torch.equal(theta, before)

    e = torch.randn((n, 2, 5), generator=generator(2)).double().numpy()  # Eq. 3 and Eq. S11, in numpy, one by one
    loss = lambda point: float(smooth_loss(torch.from_numpy(point)[None])[0])  # noqa: E731
    point = theta.numpy()
    if estimator == "rge":
        slopes = [(loss(point + mu * d) - loss(point)) / mu for d in e]
    else:
        slopes = [(loss(point + mu * d) - loss(point - mu * d)) / (2 * mu) for d in e]
    expected = sum(s * d for s, d in zip(slopes, e)) / n
    np.testing.assert_allclose(estimate.numpy(), expected, rtol=1e-9)
    assert float(base) == pytest.approx(loss(point), abs=1e-4)


@pytest.mark.parametrize("estimator", ["rge", "spsa"])
def test_mean_of_many_estimates_is_the_gradient(estimator):
    theta = torch.randn(2, 5, generator=generator(1), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(smooth_loss(theta[None])[0], theta)
    mean, _ = estimate_gradient(smooth_loss, theta.detach(), 20_000, 1e-4, generator(5), estimator)
    torch.testing.assert_close(mean, gradient, rtol=0.05, atol=0.02)


def test_unknown_estimator_is_named():
    with pytest.raises(KeyError, match="one-point"):
        estimate_gradient(smooth_loss, torch.zeros(2, 5), 1, 1e-3, generator(), "one-point")


def test_directions_leave_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    estimate_gradient(smooth_loss, torch.zeros(2, 5), 4, 1e-3, generator())
    assert torch.equal(torch.rand(3), expected)


def test_normalization_gives_the_gradients_length():
    gradient = torch.randn(1, 200, generator=generator(), dtype=torch.float64)
    linear = lambda candidates: (candidates * gradient).sum(dim=(1, 2))  # noqa: E731
    for n in (1, 4):
        lengths = [
            normalize_estimate(estimate_gradient(linear, gradient * 0, n, 1e-3, generator(seed))[0], n, 0).norm() ** 2
            for seed in range(400)
        ]
        assert float(sum(lengths) / 400) == pytest.approx(float(gradient.norm() ** 2), rel=0.1)


# --------------------------------------------------------------------------------------------------- Subspace Gradient


def trajectory(steps, shape, seed=0, rank=3):
    """A walk that mostly stays in a few directions, like a token's."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    walk = rng.normal(size=(steps, rank)).cumsum(axis=0) @ rng.normal(size=(rank, size))
    return (walk + 0.05 * rng.normal(size=(steps, size))).reshape(steps, *shape)


def algorithm_2(buffer, threshold):
    """P_ν by numpy's eigendecomposition of B̄ᵀB̄ (not by an SVD of B̄): Eqs. 5-7, rank-deficient directions left out."""
    b = buffer.reshape(len(buffer), -1)
    spread = b.std(axis=0)
    b = (b - b.mean(axis=0)) / np.where(spread > 0, spread, 1)
    eigenvalues, vectors = np.linalg.eigh(b.T @ b)
    eigenvalues, vectors = eigenvalues[::-1][: len(b) - 1], vectors.T[::-1][: len(b) - 1]  # rank τ - 1
    share = np.cumsum(eigenvalues) / eigenvalues.sum()
    i_star = next(i for i, s in enumerate(share, 1) if s > 1 - threshold)
    return vectors[i_star:]


@pytest.mark.parametrize("shape", [(1, 48), (2, 24)])
@pytest.mark.parametrize("threshold", [1e-3, 1e-2, 0.3])
def test_subspace_gradient_is_algorithm_2(shape, threshold):
    window, walk = 12, trajectory(24, shape)
    subspace = SubspaceGradient(window, threshold)
    gradient = torch.randn(*shape, generator=generator())
    for step, theta in enumerate(walk):
        if step < window:
            assert subspace.removed is None and torch.equal(subspace.project(gradient), gradient)
        subspace.update(torch.from_numpy(theta))
    removed = algorithm_2(walk[window:], threshold)
    assert subspace.removed.shape == removed.shape and len(removed) > 0
    flat = gradient.double().numpy().ravel()
    expected = (flat - removed.T @ (removed @ flat)).reshape(shape)
    np.testing.assert_allclose(subspace.project(gradient.double()).numpy(), expected, atol=1e-5)


def test_projection_removes_exactly_its_rows():
    subspace = SubspaceGradient(10, 1e-2)
    for theta in trajectory(10, (1, 30)):
        subspace.update(torch.from_numpy(theta).float())
    rows = subspace.removed
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    gradient = torch.randn(1, 30, generator=generator())
    projected = subspace.project(gradient)
    assert (projected @ rows.T).abs().max() < 1e-5
    torch.testing.assert_close(subspace.project(projected), projected, atol=1e-5, rtol=0)


def test_a_column_that_never_moves_gives_no_nan():
    walk = trajectory(10, (1, 30))
    walk[:, 0, 4] = 0.25
    subspace = SubspaceGradient(10, 1e-2)
    for theta in walk:
        subspace.update(torch.from_numpy(theta).float())
    gradient = torch.ones(1, 30)
    assert subspace.project(gradient).isfinite().all()
    assert subspace.removed[:, 4].abs().max() < 1e-6  # nothing is known of a feature that did not move


def test_a_token_that_never_moves_removes_nothing():
    subspace = SubspaceGradient(4, 1e-3)
    for _ in range(4):
        subspace.update(torch.ones(1, 8))
    assert subspace.removed is None and subspace.buffer == []


def test_rounding_noise_is_not_a_direction():
    """τ points span τ - 1 directions: even at ν close to 1 at most τ - 2 are removed."""
    subspace = SubspaceGradient(6, 0.999999)
    for theta in np.random.default_rng(0).normal(size=(6, 1, 40)):
        subspace.update(torch.from_numpy(theta))
    assert len(subspace.removed) == 6 - 2


def test_a_large_token_that_hardly_moves_has_no_more_directions():
    """Centring numbers of 1e6 that differ by 1e-3 leaves more than rounding of the standardised trajectory."""
    subspace = SubspaceGradient(6, 0.999999)
    for theta in np.random.default_rng(0).normal(size=(6, 1, 40)):
        subspace.update(torch.from_numpy(1e6 + 1e-3 * theta))
    assert len(subspace.removed) == 6 - 2


def test_window_zero_switches_it_off():
    subspace = SubspaceGradient(0, 1e-3)
    for theta in trajectory(5, (1, 8)):
        subspace.update(torch.from_numpy(theta))
    assert subspace.removed is None and subspace.buffer == []


def test_subspace_state_survives_a_file(tmp_path):
    walk = [torch.from_numpy(t).float() for t in trajectory(25, (1, 30))]
    whole, half = SubspaceGradient(10, 1e-2), SubspaceGradient(10, 1e-2)
    for theta in walk:
        whole.update(theta)
    for theta in walk[:13]:
        half.update(theta)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = SubspaceGradient(10, 1e-2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    elsewhere = SubspaceGradient(10, 1e-2)
    elsewhere.load_state_dict(half.state_dict(), "meta")  # any other device: everything must follow θ there
    assert elsewhere.removed.is_meta and all(theta.is_meta for theta in elsewhere.buffer)
    for theta in walk[13:]:
        resumed.update(theta)
    assert torch.equal(resumed.removed, whole.removed) and len(resumed.buffer) == len(whole.buffer) == 5


# ------------------------------------------------------------------------------------------------ no backpropagation


def test_the_script_never_runs_a_backward_pass():
    source = inspect.getsource(zoodip)
    assert not re.search(r"\.backward\(|autograd\.grad|requires_grad_?\(True\)|requires_grad=True", source)


# ------------------------------------------------------------------------------------------------------------- ZO-Adam


def test_weight_decay_acts_on_theta_itself_as_adamw_has_it():
    """Without a gradient θ shrinks by η times the decay; inside Adam it would move by η, whatever the decay is."""
    flags = "--placeholder_token <t> --initializer_token x --pretrained_model_name_or_path m --train_data_dir d"
    args = zoodip.parse_args(
        [*flags.split(), "--adam_weight_decay", "0.5", "--learning_rate", "0.1", "--sg_window", "0"]
    )
    theta = torch.ones(1, 4)
    rule = zoodip.OPTIMIZERS["zo_adam"].start(args, theta, None, num_processes=1)
    rule.update(theta, torch.zeros(1, 4))
    torch.testing.assert_close(theta, torch.full((1, 4), 1 - 0.1 * 0.5))
