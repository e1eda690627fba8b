"""Forward-only Gauss-Newton against independent computations: least squares by numpy, Jacobians by autograd."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_arguments
from safetensors.torch import load_file
from test_training import demo_loss  # noqa: F401, a fixture
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_zoodip_textual_inversion as zoodip
from personalization.errors import DivergedError, InputError
from personalization.methods import gauss_newton
from personalization.methods.gauss_newton import GaussNewton, differences, gauss_newton_evidence, vocabulary_directions
from personalization.models.families import SD1, TextEncoders


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("ridge", [1e-7, 0.3])
def test_a_linear_model_is_solved_by_least_squares(ridge):
    """All directions, nothing forgotten: after the last example θ is the (ridge) least-squares solution of all."""
    d, examples, entries = 6, 40, 50
    g = generator()
    jacobians = torch.randn(examples, entries, d, generator=g, dtype=torch.float64)
    targets = torch.randn(examples, entries, generator=g, dtype=torch.float64)
    theta = start = torch.randn(1, d, generator=g, dtype=torch.float64)
    solver = GaussNewton(torch.eye(d, dtype=torch.float64)[:, None, :], memory=1.0, ridge=ridge, max_step=1e9)
    for jacobian, target in zip(jacobians, targets):

        def error_fn(candidates, jacobian=jacobian, target=target):
            return candidates[:, 0] @ jacobian.T - target

        found = differences(error_fn, theta, solver.directions, 0.1)
        matrix, half_gradient, _ = gauss_newton_evidence(*found)
        theta = theta + solver.step(matrix, half_gradient, torch.arange(d))
    a, b = jacobians.flatten(0, 1).numpy(), targets.flatten().numpy()
    prior = ridge * np.trace(jacobians[0].numpy().T @ jacobians[0].numpy()) / d  # λ of the first example's curvature
    rows, wanted = np.vstack([a, np.sqrt(prior) * np.eye(d)]), np.concatenate([b, np.sqrt(prior) * start[0].numpy()])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(theta[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_long_steps_are_shortened():
    solver = GaussNewton(torch.eye(3)[:, None, :], 0.95, 1e-3, max_step=0.5)
    step = solver.step(torch.eye(3), torch.tensor([3.0, 0.0, -4.0]), torch.arange(3))
    torch.testing.assert_close(step, torch.tensor([[-0.3, 0.0, 0.4]]))


def test_no_curvature_is_no_step():
    """A token that the model does not see must not end in NaN."""
    solver = GaussNewton(torch.eye(3)[:, None, :], 0.95, 5.0, 1.0)
    assert torch.equal(solver.step(torch.zeros(3, 3), torch.zeros(3), torch.arange(3)), torch.zeros(1, 3))


def test_a_step_along_some_directions_leaves_the_others():
    """Their block of A, filled twice, against the formula; A stays positive semidefinite; θ moves nowhere else."""
    frame = torch.linalg.qr(torch.randn(6, 6, generator=generator(), dtype=torch.float64))[0]
    solver = GaussNewton(frame[:, None, :], memory=0.5, ridge=1.0, max_step=1e9)
    first, second = torch.tensor([4, 1, 2]), torch.tensor([0, 1, 5])
    roots = torch.randn(2, 3, 3, generator=generator(1), dtype=torch.float64)
    (one, two), gradient = roots @ roots.mT, torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    solver.step(one, gradient, first)
    step = solver.step(two, gradient, second)
    block = two.numpy() + np.diag([0, 0.5 * one[1, 1], 0])  # of the first only direction 1 is looked along again
    expected = -np.linalg.solve(block + one.trace().item() / 3 * np.eye(3), gradient.numpy()) @ frame[second].numpy()
    np.testing.assert_allclose(step[0].numpy(), expected, rtol=1e-10)
    assert torch.linalg.eigvalsh(solver.information).min() > -1e-12
    assert solver.information[4, 2] == one[0, 2] and solver.information[1, 4] == pytest.approx(0.5**0.5 * one[1, 0])


def test_the_directions_are_the_principal_components_of_the_longest_words():
    table = torch.randn(200, 8, generator=generator()) * torch.arange(1, 9)
    table[50:] *= 0.01  # never trained
    found = vocabulary_directions(table.half(), 5, 50)
    words = table.half()[:50].double().numpy()
    _, components = np.linalg.eigh(np.cov(words.T, bias=True))
    np.testing.assert_allclose(np.abs(found.numpy() @ components[:, ::-1][:, :5]), np.eye(5), atol=1e-4)


def test_fewer_words_than_directions_forbid_none():
    found = vocabulary_directions(torch.randn(4, 8, generator=generator()), 8, 4)
    torch.testing.assert_close(found @ found.T, torch.eye(8), atol=1e-5, rtol=0)


def test_the_direction_from_outside_is_outside():
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator()))[0].reshape(24, 2, 12)
    probe = gauss_newton.random_combination(basis[10:], generator(1))
    assert probe.shape == (2, 12) and probe.norm() == pytest.approx(1)
    assert (basis[:10].flatten(1) @ probe.flatten()).abs().max() < 1e-6
    assert not torch.equal(probe, gauss_newton.random_combination(basis[10:], generator(2)))


# ------------------------------------------------------------------------------------------------ on a diffusion model


def errors_of(parts, candidates):
    text_encoder, unet, batch, first = parts
    networks = SD1, TextEncoders(SD1, [text_encoder]), unet
    passes = zoodip.prediction_errors(candidates, batch, *networks, first)
    return torch.cat([errors.flatten(1) for errors in passes])


def test_matrix_and_gradient_equal_those_of_autograd(demo_loss):  # noqa: F811
    """K = J Jᵀ / M and y = J r / M with J by forward-mode autograd, at the default step of float32."""
    _, start, parts = demo_loss
    words = parts[0].get_input_embeddings().weight[: parts[3]]
    directions = vocabulary_directions(words, 8, 80)[:, None, :]
    step_size = zoodip.OPTIMIZERS["gauss_newton"].perturbation_scales["no"][0]
    with torch.inference_mode():
        found = differences(functools.partial(errors_of, parts), start, directions, step_size)
        matrix, half_gradient, loss = gauss_newton_evidence(*found)
    text_encoder, unet, batch, first = parts
    table = text_encoder.get_input_embeddings()

    def errors(theta):  # the placeholder's row replaced by a tensor that autograd follows
        def forward(ids):
            rows = torch.nn.functional.embedding(table.index[ids], table.weight.detach().clone())
            return torch.where((ids == first)[..., None], theta[0], rows)

        original, table.forward = table.forward, forward
        try:
            conditioning = text_encoder(batch.prompt_ids)[0]
        finally:
            table.forward = original
        prediction = unet(batch.noisy_latents, batch.timesteps, conditioning, return_dict=False)[0]
        return (prediction - batch.target).flatten()

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel knows no forward mode
        derivatives = [torch.func.jvp(errors, (start,), (direction,))[1] for direction in directions]
    jacobian, error = torch.stack(derivatives), errors(start)
    exact, exact_half_gradient = jacobian @ jacobian.T / len(error), jacobian @ error / len(error)
    assert (matrix - exact).norm() < 1e-2 * exact.norm()
    assert (half_gradient - exact_half_gradient).norm() < 1e-2 * exact_half_gradient.norm()
    assert loss == pytest.approx(error.square().mean().item(), rel=1e-5)


def test_a_batch_of_two_is_the_mean_of_its_examples(demo_loss):  # noqa: F811
    """What processes and accumulation average is what one process with all examples would have found."""
    _, start, (text_encoder, unet, batch, first) = demo_loss
    other = batch._replace(noisy_latents=batch.noisy_latents.flip(-1), timesteps=batch.timesteps + 90)
    both = type(batch)(*(torch.cat(pair) for pair in zip(batch, other)))
    directions = torch.eye(start.shape[1])[:6, None, :]

    def evidence(examples):
        error_fn = functools.partial(errors_of, (text_encoder, unet, examples, first))
        return gauss_newton_evidence(*differences(error_fn, start, directions, 2e-2))

    with torch.inference_mode():
        for whole, one, two in zip(evidence(both), evidence(batch), evidence(other)):
            torch.testing.assert_close(whole, (one + two) / 2, rtol=1e-4, atol=2e-6)


def test_two_processes_move_theta_as_one_with_both_examples(demo_loss, monkeypatch):  # noqa: F811
    """Of K, y and the share each process has its own example's; `average` is what accelerate's mean would do."""
    _, start, (text_encoder, unet, batch, first) = demo_loss
    other = batch._replace(noisy_latents=batch.noisy_latents.flip(-1), timesteps=batch.timesteps + 90)
    both = type(batch)(*(torch.cat(pair) for pair in zip(batch, other)))

    class Model:
        scheduler = None

        def errors(self, candidates, batch):
            return errors_of((text_encoder, unet, batch, first), candidates)

    def learner():
        solver = GaussNewton(torch.eye(start.shape[1])[:, None, :], 0.8, 3.0, 1.0)
        rule = gauss_newton.GaussNewtonUpdate(solver, 2e-2, inside=6, subspace_steps=5, seed=0)
        return zoodip.Learner(start.clone(), rule, generator(), generator(3))

    def step(one, batch, **average):
        monkeypatch.setattr(zoodip, "draw_batch", lambda *_: batch)
        zoodip.train_step(one, Model(), None, zoodip.Sampling(500, 900, len(batch.timesteps)), **average)
        return one

    alone = step(learner(), both)
    with torch.inference_mode():
        of_the_second = iter(learner().rule.evidence(Model(), start, other, generator(3))[0])
    shared = step(learner(), batch, average=lambda part: (part + next(of_the_second)) / 2)
    assert not torch.equal(alone.theta, start)
    torch.testing.assert_close(shared.theta - start, alone.theta - start, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(shared.rule.solver.information, alone.rule.solver.information, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- runs

SHORT = {"optimizer": "gauss_newton", "gn_subspace_dimension": 4, "logging_steps": 1, "num_validation_samples": 0}


def figures(out):
    return json.loads((out / "zoodip_config.json").read_text())["figures"]


@pytest.mark.parametrize(
    "flags, rows",
    [
        ({"gn_subspace": "prompt_words", "num_vectors": 2, "gradient_accumulation_steps": 2}, 9 + 2),
        ({"quantization": "none", "max_candidates_per_forward": 2, "train_batch_size": 2}, 5 + 5),
        ({"quantization": "none", "perturbation_scale": 1e-3, "max_candidates_per_forward": 2}, 6),
        ({"unet_backend": "openvino", "num_validation_samples": 4}, 6),
    ],
    ids=str,
)
def test_runs(train, flags, rows):
    """With so many rows of a batch a step: of differences the points, of derivatives every pass has θ, too."""
    out = train(max_train_steps=2, **SHORT | flags)
    examples = flags.get("train_batch_size", 1) * flags.get("gradient_accumulation_steps", 1)
    assert figures(out)["forward_passes"] == 2 * rows * examples
    settings = json.loads((out / "zoodip_config.json").read_text())["settings"]
    assert settings["activations"] == ("bfloat16" if "unet_backend" in flags else "float32")
    assert "share" in figures(out)


def test_without_a_subspace_directions_are_random_and_no_share_is_measured(train, demo_base):
    out = train(
        max_train_steps=1, checkpointing_steps=1, **SHORT | {"gn_subspace": "none", "gn_subspace_dimension": 127}
    )
    dimension = json.loads((Path(demo_base) / "text_encoder" / "config.json").read_text())["hidden_size"]
    assert (
        figures(out)["forward_passes"] == dimension + math.ceil(dimension / 8)
        and len(directions_met(out, 1)) == dimension
    )
    assert "share" not in figures(out) and "none, 127 directions |" in (out / "README.md").read_text()
    out = train(max_train_steps=1, checkpointing_steps=1, **SHORT | {"gn_subspace": "none"})
    assert len(directions_met(out, 1)) == 5


def test_how_long_a_run_is_follows_from_its_forwards(train, monkeypatch):
    monkeypatch.setattr(gauss_newton, "FORWARDS", 43)
    assert figures(train(max_train_steps=None, num_vectors=2, **SHORT))["steps"] == 43 // (2 * 4 + 2)


def directions_met(out, step):
    """Numbers of the directions that A knows of at a checkpoint."""
    state = torch.load(out / f"checkpoint-{step}" / "state.pt", weights_only=True)
    return state["information"].diagonal().nonzero().flatten().tolist()


def test_the_subspace_is_left_for_all_directions(train):
    """After its steps, with as many passes a step; and a resumed run goes on as one that was never stopped."""
    flags = SHORT | {"gn_subspace_steps": 2, "checkpointing_steps": 1}
    whole = train(max_train_steps=4, **flags)
    assert directions_met(whole, 2) == [0, 1, 2, 3] and len(directions_met(whole, 3)) > 6
    assert figures(whole)["forward_passes"] == 4 * 6 and 0 < figures(whole)["share"] < 1
    parts = train(max_train_steps=3, **flags)
    train(max_train_steps=4, output_dir=parts, resume_from_checkpoint="latest", **flags)
    first, second = (load_file(out / "learned_embeds.safetensors")["<my-toy>"] for out in (whole, parts))
    assert torch.equal(first, second)


def test_a_poor_subspace_is_left_at_once(train, monkeypatch):
    monkeypatch.setattr(gauss_newton, "SHARE_STEPS", 2)
    monkeypatch.setattr(gauss_newton, "LEAST_SHARE", 1.1)  # no subspace is good enough
    out = train(max_train_steps=3, checkpointing_steps=1, **SHORT)
    assert directions_met(out, 2) == [0, 1, 2, 3] and len(directions_met(out, 3)) > 5


def test_it_learns(train):
    """In 12 steps of 18 passes the held-out loss falls by a quarter; the paper's update takes some 200 passes, too."""
    flags = {
        "num_validation_samples": 16,
        "validation_steps": 1000,
        "flip_probability": 0,
        "gn_subspace_dimension": 16,
    }
    (_, first), (_, last) = figures(train(max_train_steps=12, **SHORT | flags))["validation_losses"]
    assert last < 0.75 * first


def test_a_run_that_diverges_names_a_flag_of_its_own(train, monkeypatch):
    monkeypatch.setattr(GaussNewton, "step", lambda self, *evidence: torch.full((1, 1), float("nan")))
    with pytest.raises(DivergedError, match="try a smaller --gn_max_step than 1.0"):
        train(optimizer="gauss_newton", gn_subspace_dimension=4, max_train_steps=3, num_validation_samples=0)


def test_two_processes_stay_identical(basics, repo, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(repo)!r})\n"
        "import torch\nimport train_zoodip_textual_inversion as zoodip\n"
        "train = zoodip.train\n"
        "def dump(run):\n"
        "    train(run)\n"
        "    torch.save(run.learner.state_dict(), f'{run.output_dir}/rank-{run.accelerator.process_index}.pt')\n"
        "zoodip.train = dump\n"
        "zoodip.main(zoodip.parse_args(sys.argv[1:]))\n"
    )
    flags = SHORT | {"max_train_steps": 3, "gn_subspace_steps": 2}
    flags = basics | {f"--{name}": value for name, value in flags.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(driver), *as_arguments(flags)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    out = Path(flags["--output_dir"])
    first, second = (torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first["theta"], second["theta"]) and torch.equal(first["information"], second["information"])
    assert figures(out)["forward_passes"] == 3 * 6 * 2


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"--optimizer": "gauss_newton", "--learning_rate": 1e-3}, "--learning_rate belongs to --optimizer zo_adam"),
        ({"--gn_ridge": 3}, "--gn_ridge belongs to --optimizer gauss_newton, this is zo_adam: drop one."),
        ({"--optimizer": "gauss_newton", "--gn_memory": 1.5}, "--gn_memory 1.5 must be"),
        (
            {"--optimizer": "gauss_newton", "--gn_subspace": "none", "--gn_subspace_steps": 9},
            "--gn_subspace_steps does nothing with --gn_subspace none: drop one.",
        ),
        (
            {"--optimizer": "gauss_newton", "--gn_subspace": "prompt_words", "--gn_subspace_words": 9},
            "--gn_subspace_words does nothing with --gn_subspace prompt_words: drop one.",
        ),
        ({"--optimizer": "sgd"}, "invalid choice: 'sgd'"),
        (
            {"--optimizer": "zo_adam", "--recipe": "fast"},
            "--recipe fast is one of --optimizer gradient or gauss_newton: drop",
        ),
        ({"--optimizer": "gauss_newton", "--recipe": "paper"}, "--recipe paper is one of --optimizer zo_adam: drop"),
    ],
    ids=str,
)
def test_flags_that_cannot_work(basics, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stopped:
        zoodip.parse_args(as_arguments(basics | flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and error.count("\n") == 1


def test_captions_without_words_make_no_subspace(train, subject, tmp_path):
    pictures = shutil.copytree(subject, tmp_path / "pictures")
    names = [path.name for path in Path(pictures).glob("*.png")]
    lines = "".join(json.dumps({"file_name": name, "text": "{}"}) + "\n" for name in names)
    (Path(pictures) / "metadata.jsonl").write_text(lines)
    with pytest.raises(InputError, match="--gn_subspace prompt_words needs two different words beside <my-toy>"):
        train(train_data_dir=pictures, **SHORT | {"gn_subspace": "prompt_words"})


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"--gn_subspace_dimension": 128}, "--gn_subspace_dimension 128 is too many for a token of this model"),
        ({"--perturbation_scale": 1e-9}, "--perturbation_scale 1e-09 is too small for float32 activations"),
    ],
    ids=str,
)
def test_settings_that_the_base_forbids(basics, flags, sentence):
    args = zoodip.parse_args(as_arguments(basics | {"--optimizer": "gauss_newton"} | flags))
    with pytest.raises(InputError, match=sentence):
        zoodip.resolve_settings(args, torch.device("cpu"))


# recipes


def test_recipes_are_defaults_that_flags_overrule(basics):
    def parsed(*words):
        plain = {name: value for name, value in basics.items() if name != "--max_train_steps"}
        return zoodip.parse_args(as_arguments(plain) + list(words))

    fast = parsed("--recipe", "fast", "--optimizer", "gauss_newton", "--train_batch_size", "2")
    assert (fast.optimizer, fast.checkpointing_steps, fast.train_batch_size) == ("gauss_newton", 50, 2)
    without = parsed("--optimizer", "gauss_newton", "--train_batch_size", "2")
    assert vars(without) | {"recipe": "fast"} == vars(fast)
    paper, default = parsed("--recipe", "paper"), parsed()
    differ = {name for name, value in vars(paper).items() if getattr(default, name) != value}
    assert differ == {"recipe"}  # the paper's settings are the defaults, the rest of both follows from the model


def test_the_card_of_a_fast_run_tells_its_own_settings(train):
    out = train(optimizer="gauss_newton", max_train_steps=1, gn_subspace_dimension=4, num_validation_samples=0)
    card = (out / "README.md").read_text()
    assert (
        "forward-only Gauss-Newton, exact derivatives, ridge" in card
        and "vocabulary, 4 directions, which held" in card
    )
    assert (
        "Subspace Gradient" not in card
        and "\n\n|" not in card.split("## Settings")[1].split("Everything else")[0][10:]
    )
