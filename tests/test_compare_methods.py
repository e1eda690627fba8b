"""The comparison of methods: each learner does what its name says, and costs, means and files are right."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from conftest import REPO
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

import train_zoodip_textual_inversion as zoodip
from benchmarks import common, compare_methods, grids, methods
from benchmarks.tables import methods as tables
from personalization.models import base_model


SUBJECT = "striped_star"
TINY = compare_methods.Judging(
    held_out=8, pictures=2, images_per_prompt=1, num_inference_steps=2, unet_backend="torch"
)


def make_run(name, milestones=(6, 12), seed=0, method=None):
    method = method or grids.GRIDS["main"][name]
    milestones = milestones if method.learner else (0,)
    return compare_methods.Run("main", name, method, SUBJECT, seed, milestones, milestones[-1:], TINY, "a base")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, demo_base):
    PartialState(cpu=True)
    folder = tmp_path_factory.mktemp("compare")
    (folder / "weights").mkdir()
    return folder


def prepared(run, cache, *flags):
    """The `Task` of a run, the schedule as long as the run makes it."""
    return methods.prepare([*compare_methods.common_flags(run, cache), *run.method.flags.split(), *flags], run.length)


# =====================================================================================================
# Learners
# =====================================================================================================


@pytest.mark.parametrize("pull", [0.0, 0.3])
def test_directional_step_against_numpy(pull):
    rng = np.random.default_rng(0)
    v, gradient, prior = (rng.normal(size=(2, 16)) for _ in range(3))
    v, prior = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, prior))
    found = methods.directional_step(*map(torch.from_numpy, (v, gradient, prior)), 0.05, pull).numpy()
    for row in range(2):
        projector = np.eye(16) - np.outer(v[row], v[row])
        tangent = projector @ (gradient[row] - pull * prior[row])
        angle = math.atan(0.05)  # a step of η along the tangent, pulled back onto the sphere, is a rotation by that
        expected = math.cos(angle) * v[row] - math.sin(angle) * tangent / np.linalg.norm(tangent)
        np.testing.assert_allclose(found[row], expected, atol=1e-12)


def test_directional_learner_keeps_the_norm_and_follows_the_gradient(cache):
    run = make_run("dti", (9,))
    task = prepared(run, cache)
    learner = run.method.make(task)
    table = base_model.load_token_table(task.base).float()
    norm = table.norm(dim=1).sort(descending=True).values[: methods.TRAINED_WORDS].mean()
    prior = task.initial / task.initial.norm()
    torch.testing.assert_close(learner.theta, norm * prior[None])
    batch = task.draw_batch(torch.Generator().manual_seed(run.seed))  # the first that it draws
    direction = prior[None].clone().requires_grad_(True)
    task.model.losses((norm * direction)[None], batch).sum().backward()  # autograd through the parametrisation
    rate = task.args.learning_rate
    expected = norm * methods.directional_step(prior[None], direction.grad, prior, rate, learner.pull)
    learner.step()
    torch.testing.assert_close(learner.theta, expected)
    for _ in range(2):
        learner.step()
        assert learner.theta.norm().item() == pytest.approx(norm.item(), rel=1e-6)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # the cosine is over


def test_gradient_equals_autograd_of_the_plain_model(cache, demo_base):
    run = make_run("gradient_ti")
    task = prepared(run, cache, "--train_batch_size", 2)
    unet = UNet2DConditionModel.from_pretrained(demo_base, subfolder="unet").eval()
    text_encoder = CLIPTextModel.from_pretrained(demo_base, subfolder="text_encoder").eval()
    text_encoder.resize_token_embeddings(task.placeholder.first_id + 1, mean_resizing=False)
    table, generator = text_encoder.get_input_embeddings().weight, torch.Generator().manual_seed(1)
    for _ in range(2):  # twice: nothing of the first may hang on
        batch = task.draw_batch(generator)
        theta = task.initial[None] + 0.01 * torch.randn(1, len(task.initial), generator=generator)
        with torch.no_grad():
            table[task.placeholder.first_id] = theta[0]
        context = text_encoder(batch.prompt_ids)[0]
        expected_loss = F.mse_loss(unet(batch.noisy_latents, batch.timesteps, context)[0], batch.target)
        (expected,) = torch.autograd.grad(expected_loss, table)
        loss, gradient = methods.loss_and_gradient(task.model, theta, batch)
        torch.testing.assert_close(loss, expected_loss.detach())
        row = expected[task.placeholder.first_id]
        assert row.norm() > 0 and (gradient[0] - row).norm() < 1e-4 * row.norm()
    learner = run.method.make(task)
    for _ in range(2):
        assert learner.step().isfinite()
    assert not learner.theta.equal(task.initial[None]) and not learner.theta.requires_grad


def test_evolution_finds_the_minimum_in_its_subspace(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    table, target = torch.randn(50, 12, generator=generator), torch.randn(12, generator=generator)
    monkeypatch.setattr(base_model, "load_token_table", lambda base: table)
    seen = []

    def losses(candidates, batch):
        seen.append(len(candidates))
        return (candidates[:, 0] - target).square().sum(dim=1)

    words = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "x", "--placeholder_token", "<x>"]
    args = zoodip.parse_args([*words, "--initializer_token", "x", "--num_perturbations", "29"])
    model, initial = SimpleNamespace(losses=losses), torch.randn(12, generator=generator)
    task = SimpleNamespace(args=args, base=None, model=model, initial=initial, draw_batch=lambda generator: None)
    learner = methods.EvolutionLearner(task, dimension=4, sigma=1.0)
    covariance = np.cov(table.T.numpy(), bias=True)
    variances = np.linalg.eigvalsh(covariance)[::-1][:4].copy()
    torch.testing.assert_close(learner.basis.norm(dim=1), torch.from_numpy(variances).float().sqrt())
    torch.testing.assert_close(learner.theta, initial[None])
    for _ in range(60):
        learner.step()
    assert set(seen) == {30}
    best = torch.linalg.lstsq(learner.basis.T, (target - initial)[:, None]).solution[:, 0]
    torch.testing.assert_close(learner.theta[0], initial + best @ learner.basis, atol=1e-3, rtol=0)


# OpenVINO's passes cannot be watched from PyTorch; "tangents" has the same.
WATCHED = [name for name, how in grids.GRIDS["main"].items() if how.learner and "openvino" not in how.flags]


@pytest.mark.parametrize("name", WATCHED)
def test_forwards_are_counted_as_they_happen(cache, name):
    run = make_run(name)
    task = prepared(run, cache)
    learner, count = run.method.make(task), methods.ForwardCount(task.model.denoiser)
    seen = {"forward": 0, "backward": 0}

    entries = task.concept.moments[0, 0].numel() // 2  # of a picture's latents: a mean and a variance for each

    def watch(unet, inputs, outputs):
        seen["forward"] += outputs[0].numel() / entries  # the rows of derivatives among them
        if outputs[0].requires_grad:

            def backward(gradient):
                seen["backward"] += gradient.numel() / entries

            outputs[0].register_hook(backward)

    task.model.denoiser.register_forward_hook(watch)
    for _ in range(2):
        learner.step()
    per_step = run.method.forwards_per_step(task.args)
    again = seen["backward"] * task.model.denoiser.is_gradient_checkpointing  # inside of blocks, in the backward pass
    assert count.total == seen["forward"] + again + 2 * seen["backward"] == 2 * per_step
    expected = {"gradient_ti": 3, "dti": 3, "paper": 3, "naive_zo": 3, "gf_ti": 30, "fast": 34, "fast_float32": 34}
    expected |= {"tangents": 38, "tangents_float32": 38}
    expected["gradient_window"] = 2  # the whole picture once, a quarter of it four times
    assert per_step == expected.get(name, 4)
    assert (seen["backward"] > 0) == (name == "dti" or name.startswith("gradient_"))


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_every_method_parses(grid, cache):
    for name, method in grids.GRIDS[grid].items():
        run = dataclasses.replace(make_run("plain"), judging=compare_methods.Judging())
        words = [*compare_methods.common_flags(run, cache), *method.flags.split()]
        zoodip.parse_args([str(word) for word in words])
        assert method.learner is None or method.learner in methods.LEARNERS, name


# =====================================================================================================
# Judging
# =====================================================================================================


def test_the_held_out_examples_are_the_same_for_all_and_never_trained_on(cache):
    judges = [compare_methods.Judge(make_run("paper", seed=seed), cache) for seed in (0, 1)]
    first, second = ([batch for batch, _ in judge.held_out] for judge in judges)
    assert all(torch.equal(a, b) for one, other in zip(first, second) for a, b in zip(one, other))
    assert sum(count for _, count in judges[0].held_out) == TINY.held_out
    timesteps = torch.cat([batch.timesteps for batch in first])
    assert ((timesteps >= 500) & (timesteps < 900)).all()
    initial = judges[0].task.initial[None]
    theta = initial + 0.05 * torch.randn(initial.shape, generator=torch.Generator().manual_seed(0))
    assert judges[0].loss(theta) == judges[1].loss(theta) != judges[0].loss(initial)
    (batch,), model = first, judges[0].task.model
    with torch.inference_mode():
        expected = model.losses(theta[None], batch, per_example=True)[0, : TINY.held_out].mean().item()
    assert judges[0].loss(theta) == pytest.approx(expected, rel=1e-6)
    for name in ("paper", "gradient_ti", "gf_ti"):
        task = prepared(make_run(name), cache)
        learner = make_run(name).method.make(task)
        data = learner.learner.data if name == "paper" else learner.data
        drawn = torch.cat([task.draw_batch(data).target for _ in range(20)])
        assert not (drawn[:, None] == batch.target[None]).flatten(2).all(dim=2).any()


def test_the_judges_pictures_are_of_the_subject_and_nobodys_training(cache):
    judge = compare_methods.Judge(make_run("plain"), cache)
    held_out, trained = judge.task.held_out.moments[0], judge.task.concept.moments[0]
    assert len(held_out) == TINY.pictures and len(trained) == 5
    assert not any(torch.equal(one, other) for one in held_out for other in trained)
    for name in (SUBJECT, "twotone_moon"):
        pictures = [image for image, _ in compare_methods.world.held_out_pictures(name, 8)]
        again = [image for image, _ in compare_methods.world.held_out_pictures(name, 8)]
        assert all(np.array_equal(one, other) for one, other in zip(pictures, again))
        assert len({image.tobytes() for image in pictures}) == 8
        assert judge.scores([[Image.fromarray(image) for image in pictures]] * 4)["shape"] == (name == SUBJECT)


def test_a_run_on_the_other_base_is_another_run_and_trains_it(cache):
    run = make_run("paper")
    other = dataclasses.replace(run, model="base_eps")
    assert other.path(cache) != run.path(cache)
    words = list(map(str, compare_methods.common_flags(other, cache)))
    assert words[words.index("--pretrained_model_name_or_path") + 1].endswith("demo/base_eps")
    listed = compare_methods.list_runs("main", ["plain", "paper"], ["a"], [0], (3,), (3,), TINY, "x", model="base_eps")
    assert {run.model for run in listed} == {"base_eps"}
    assert compare_methods.parse_args(["--base", "base_eps"]).base == "base_eps"


# =====================================================================================================
# Runs
# =====================================================================================================


@pytest.fixture(scope="module")
def two_runs(cache):
    listed = [make_run("plain"), make_run("paper")]
    for run in listed:
        compare_methods.perform(run, cache)
    return listed


def test_a_finished_run_has_its_curve_and_is_not_run_again(cache, two_runs):
    plain, paper = (compare_methods.finished(run, cache) for run in two_runs)
    assert [point["forwards"] for point in plain["curve"]] == [0] and plain["steps"] == 0
    assert [point["forwards"] for point in paper["curve"]] == [6, 12] and paper["steps"] == 4
    assert "CLIP-I" not in paper["curve"][0] and {"CLIP-I", "CLIP-T", "identity", "shape"} <= set(paper["curve"][1])
    before = {path: path.stat().st_mtime_ns for path in (cache / "main").iterdir()}
    assert compare_methods.perform_missing(two_runs, cache, 1) == 0
    assert {path: path.stat().st_mtime_ns for path in (cache / "main").iterdir()} == before
    changed = [
        dataclasses.replace(two_runs[1], base="another"),
        dataclasses.replace(two_runs[1], milestones=(6, 15)),
        dataclasses.replace(two_runs[1], method=dataclasses.replace(two_runs[1].method, flags="--learning_rate 1")),
        dataclasses.replace(two_runs[1], judging=dataclasses.replace(TINY, held_out=9)),
    ]
    assert [compare_methods.finished(run, cache) for run in changed] == [None] * 4
    renamed = dataclasses.replace(two_runs[1].method, title="another")
    assert compare_methods.finished(dataclasses.replace(two_runs[1], method=renamed), cache) == paper
    two_runs[1].path(cache / "elsewhere").parent.mkdir(parents=True)
    two_runs[1].path(cache / "elsewhere").write_text('{"settings": ')  # cut off
    assert compare_methods.finished(two_runs[1], cache / "elsewhere") is None


def test_other_code_makes_a_run_again_or_counts_it_with_its_commit(cache, two_runs):
    run = two_runs[1]
    changed = dataclasses.replace(run, source="0123456789ab")
    assert compare_methods.finished(changed, cache) is None
    assert compare_methods.with_finished(changed, cache) == run
    other = dataclasses.replace(changed, seed=7)  # which nobody has run
    assert compare_methods.with_finished(other, cache) == other
    content = compare_methods.finished(run, cache)
    assert content["commit"] == common.CODE["commit"] and content["source"] == run.source
    (row,) = compare_methods.collect([run], cache, [SUBJECT])["runs"]
    assert row["commit"] == content["commit"] and row["source"] == run.source


def test_a_new_machine_goes_on_from_the_result(cache, two_runs, tmp_path):
    result = json.loads(json.dumps(compare_methods.collect(two_runs, cache, [SUBJECT])))
    changed = [dataclasses.replace(run, source="0123456789ab") for run in two_runs]
    otherwise = [
        dataclasses.replace(two_runs[1], base="another"),
        dataclasses.replace(two_runs[1], milestones=(6, 12, 15)),
        dataclasses.replace(two_runs[1], method=dataclasses.replace(two_runs[1].method, flags="--learning_rate 1")),
        dataclasses.replace(two_runs[1], seed=7),
    ]
    compare_methods.restore(result, [*changed, *otherwise], tmp_path)
    for run, other in zip(two_runs, changed):
        restored, original = (compare_methods.finished(run, folder) for folder in (tmp_path, cache))
        assert restored == {key: value for key, value in original.items() if key != "thetas"}
        assert compare_methods.finished(other, tmp_path) is None  # it is not of this code, which --other_code asks
    assert [compare_methods.finished(run, tmp_path) for run in otherwise] == [None] * 4
    assert compare_methods.list_strips(two_runs, tmp_path) == {}
    compare_methods.restore(result, two_runs, cache)  # what is there stays
    assert "thetas" in compare_methods.finished(two_runs[1], cache)


def test_what_is_compared_is_no_part_of_the_code(monkeypatch):
    first, read = compare_methods.hash_code(), REPO.__class__.read_text

    def changed(name):
        def read_text(path, **options):
            return read(path, **options) + ("\nx = 1\n" if path == REPO / name else "")

        monkeypatch.setattr(REPO.__class__, "read_text", read_text)
        return compare_methods.hash_code()

    assert changed("benchmarks/grids.py") == changed("benchmarks/tables/methods.py") == first
    for name in ("benchmarks/methods.py", "benchmarks/ideas.py", "demo/world.py", "train_zoodip_textual_inversion.py"):
        assert changed(name) != first
    assert changed("personalization/data/examples.py") != first


def test_the_run_trains_what_the_script_trains(cache, two_runs):
    import base64

    stored = compare_methods.finished(two_runs[1], cache)["thetas"]["12"]
    task = prepared(two_runs[1], cache)
    learner = zoodip.start_learner(task.args, task.initial)
    for _ in range(4):
        zoodip.train_step(learner, task.model, task.concept, task.sampling)
    theta = np.frombuffer(base64.b64decode(stored), dtype=np.float32)
    assert np.array_equal(theta, learner.theta.numpy().ravel())


def test_results_are_collected_and_shown(cache, two_runs, tmp_path):
    missing = make_run("naive_zo")
    result = compare_methods.collect([*two_runs, missing], cache, [SUBJECT])
    assert set(result["summary"]) == {"plain", "paper"} and set(result["methods"]) == {"plain", "paper", "naive_zo"}
    compare_methods.write_compact(tmp_path / "m.json", result)
    read = json.loads((tmp_path / "m.json").read_text())
    assert read == json.loads(json.dumps(result)) and len((tmp_path / "m.json").read_text().splitlines()) < 20
    for row in read["runs"]:
        assert len(row["forwards"]) == len(row["loss"]) == len(row["CLIP-I"])
    text = tables.methods(read)
    assert "plain word" in text and "naive" not in text
    compare_methods.plot(read, tmp_path / "m.png")
    strips = compare_methods.list_strips([*two_runs, missing], cache)
    compare_methods.contact_sheet(read, compare_methods.SUBJECTS, strips, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "m.png").width > 1000
    assert Image.open(tmp_path / "sheet.png").size == (3 * (2 * 80 + 8), 50 + 80)


def test_a_killed_comparison_leaves_no_worker_and_no_half_result(demo_base, tmp_path):
    command = [sys.executable, str(REPO / "benchmarks" / "compare_methods.py"), "--methods", "paper", "--subjects"]
    command += [SUBJECT, "--seeds", "0", "--milestones", "1000000", "--unet_backend", "torch", "--processes", "1"]
    command += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    weights = tmp_path / "cache" / "weights"
    deadline = time.monotonic() + 120
    while not (weights.is_dir() and len(list(weights.glob("unet-*"))) > 0):  # then the worker is at it
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    children = [int(pid) for pid in children_of(process.pid)]
    assert children
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not list(tmp_path.rglob("paper*")) and not (tmp_path / "out").exists()


def children_of(pid):
    found = []
    for task in (REPO.__class__("/proc") / str(pid) / "task").iterdir():
        found += (task / "children").read_text().split()
    return found


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = (REPO.__class__("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"


# =====================================================================================================
# Sums
# =====================================================================================================


def stored(name, subject, seed, losses, forwards=(10, 100)):
    curve = [{"milestone": m, "forwards": m, "loss": loss} for m, loss in zip(forwards, losses)]
    return {
        "settings": {"name": name, "subject": subject, "seed": seed},
        "curve": curve,
        "seconds": {"whole": 2.0, "training": 1.0},
    }


def test_means_and_deviations_against_numpy():
    losses = np.random.default_rng(0).random((3, 2, 2))  # seeds, subjects, milestones
    contents = [stored("paper", s, seed, losses[seed, i]) for seed in range(3) for i, s in enumerate("ab")]
    contents.append(stored("paper", "a", 3, [9.0, 9.0]))  # a seed that lacks a subject does not count
    means = compare_methods.subject_means(contents, ["a", "b"])
    assert set(means) == {0, 1, 2}
    curve = compare_methods.over_seeds(means)
    by_seed = losses.mean(axis=1)
    for i in range(2):
        assert curve[i]["loss"] == pytest.approx([by_seed[:, i].mean(), by_seed[:, i].std(ddof=1)])
        assert curve[i]["forwards"][0] == (10, 100)[i]
    single = compare_methods.over_seeds({0: means[0]})
    assert single[1]["loss"] == [pytest.approx(by_seed[0, 1]), None]
    summary = compare_methods.summarise([*contents, stored("plain", "a", 0, [1.0])], ["plain", "paper"], ["a", "b"])
    assert set(summary) == {"paper"} and summary["paper"]["seeds"] == [0, 1, 2]


def test_forwards_to_reach():
    def curve(metric, *points):
        return [{"forwards": [x, 0.0], metric: [y, 0.0]} for x, y in points]

    falling = curve("loss", (10, 0.4), (100, 0.3), (1000, 0.1))
    assert compare_methods.forwards_to_reach(falling, "loss", 0.2) == pytest.approx(math.sqrt(100 * 1000))
    assert compare_methods.forwards_to_reach(falling, "loss", 0.3) == pytest.approx(100)
    assert compare_methods.forwards_to_reach(falling, "loss", 0.5) == 10
    assert compare_methods.forwards_to_reach(falling, "loss", 0.05) is None
    rising = [{"forwards": [1, None], "loss": [1, None]}, *curve("CLIP-I", (10, 0.2), (1000, 0.4))]
    assert compare_methods.forwards_to_reach(rising, "CLIP-I", 0.3) == pytest.approx(100)
    contents = [stored("paper", "a", 0, [0.4, 0.2]), stored("dti", "a", 0, [0.3, 0.1])]
    summary = compare_methods.summarise(contents, ["paper", "dti"], ["a"])
    assert summary["dti"]["reaches"]["loss"] == pytest.approx(math.sqrt(1000)) and "reaches" not in summary["paper"]


def test_seeds_come_one_after_the_other():
    names = list(grids.GRIDS["main"])
    listed = compare_methods.list_runs("main", names, ["a", "b"], [0, 1], (3,), (3,), TINY, "x")
    assert [run.seed for run in listed] == sorted(run.seed for run in listed)
    assert len(listed) == 2 + 2 * 2 * (len(names) - 1)
    assert sum(run.name == "plain" for run in listed) == 2
    assert len({run.path("x") for run in listed}) == len(listed)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--subjects", "cat"], "cat"),
        (["--methods", "magic"], "magic"),
        (["--grid", "none"], "none"),
        (["--milestones", "0", "10"], "milestones"),
        (["--milestones", "10", "--image_milestones", "5"], "5"),
        (["--milestones", "10", "20", "--image_milestones", "10"], "20"),
        (["--processes", "0"], "processes"),
        (["--seeds", "-1"], "seeds"),
        (["--num_inference_steps", "0"], "num_inference_steps"),
    ],
)
def test_bad_input_is_one_sentence(words, named, capsys):
    with pytest.raises(SystemExit) as error:
        compare_methods.parse_args(words)
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2 and len(message.splitlines()) == 1 and named in message


def test_nothing_finished_is_said(tmp_path, demo_base):
    words = ["--collect", "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(compare_methods.RunError, match="no method is finished"):
        compare_methods.main(compare_methods.parse_args(words))
    assert not (tmp_path / "out").exists()
