"""The paper's ablations: every cell's flags are valid, i* is counted right, tables and figures say what was run."""

import base64
import json
import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import REPO
from PIL import Image

import train_zoodip_textual_inversion as zoodip
from benchmarks import ablations, compare_methods, grids, ideas, make_tables, methods, plot_methods
from benchmarks.tables import methods as tables
from evaluate_personalization import bootstrap_interval


SUBJECT, SUBJECTS = "striped_star", ["a", "b"]
TINY = compare_methods.Judging(held_out=8, images_per_prompt=1, num_inference_steps=2, unet_backend="torch")


def run_of(name, milestones=(6,), judging=TINY):
    cell = next(cells[name] for cells in ablations.GRIDS.values() if name in cells)
    return compare_methods.Run(ablations.FOLDER, name, cell, SUBJECT, 0, milestones, milestones, judging, "a base")


# =====================================================================================================
# Grids
# =====================================================================================================


@pytest.mark.parametrize("grid", ablations.GRIDS)
def test_every_cell_is_a_valid_command_line_that_differs_from_the_others(grid):
    parsed, cells = {}, ablations.GRIDS[grid]
    for name, method in cells.items():
        run = run_of(name, judging=compare_methods.Judging())
        words = [*compare_methods.common_flags(run, "cache"), *method.flags.split()]
        args = zoodip.parse_args([str(word) for word in words])
        precision = args.mixed_precision or "no"
        zoodip.complete_for_precision(args, precision)  # raises where μ drowns in the activations' rounding
        parsed[name] = vars(args)
        assert grid == "ideas" or method.learner == "flagship" and not method.options
    told_apart = {(str(parsed[name]), method.learner, str(method.options)) for name, method in cells.items()}
    assert "paper" in cells and len(told_apart) == len(cells)
    assert ablations.ABLATIONS[grid].published.keys() <= cells.keys()


def test_cells_of_one_name_are_the_same_and_paper_is_the_papers():
    flags = {}
    for cells in ablations.GRIDS.values():
        for name, method in cells.items():
            what = method.flags, method.learner, str(method.options)
            assert flags.setdefault(name, what) == what
            assert re.fullmatch(r"[a-z0-9_-]+", name)
    assert flags["paper"][0].split() == grids.GRIDS["main"]["paper"].flags.split()
    assert len(set(flags.values())) == len(flags)


@pytest.mark.parametrize("name", [name for name, m in ablations.GRIDS["ideas"].items() if m.learner != "flagship"])
def test_ideas_move_theta_at_the_cost_that_they_state(tmp_path, name):
    PartialState(cpu=True)
    (tmp_path / "weights").mkdir()
    run = run_of(name)
    task = methods.prepare([*compare_methods.common_flags(run, tmp_path), *run.method.flags.split()])
    learner, count = run.method.make(task), methods.ForwardCount(task.model.denoiser)
    start = learner.theta.clone()
    for _ in range(2):
        assert np.isfinite(learner.step().item())
    assert count.total == 2 * run.method.forwards_per_step(task.args)
    assert learner.theta.isfinite().all() and not torch.equal(learner.theta, start)


def test_r_adazo_against_its_formula():
    theta, gradients = torch.zeros(3), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    optimizer = ideas.RAdaZO([theta], 0.1, (0.9, 0.99), 1e-3)
    m, v, expected = np.zeros(3), np.zeros(3), np.zeros(3)
    for t, gradient in enumerate(gradients, start=1):
        theta.grad = gradient
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient.double().numpy()
        v = 0.99 * v + 0.01 * (m / (1 - 0.9**t)) ** 2
        expected -= 0.1 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
    np.testing.assert_allclose(theta.numpy(), expected, rtol=1e-5)


def test_a_grid_without_further_flags_is_the_whole_table():
    args = compare_methods.parse_args(["--grid", "n"])
    assert args.subjects == ablations.SUBJECTS and args.seeds == ablations.SEEDS
    listed = compare_methods.list_runs("n", args.methods, args.subjects, args.seeds, None, None, TINY, "x")
    assert len(listed) == 4 * 3 * 2
    budgets = {run.name: run.milestones for run in listed}
    assert budgets == {"n_1": (3000, 4500), "paper": (4500,), "n_4": (4500, 7500), "n_8": (4500, 13500)}
    assert all(run.image_milestones == run.milestones for run in listed)
    other = compare_methods.list_runs("mu", ["paper"], args.subjects, args.seeds, None, None, TINY, "x")
    paths = {run.path("x") for run in listed}
    assert {run.path("x") for run in other} <= paths  # one run serves all tables
    main = compare_methods.parse_args([])
    assert main.seeds == [0, 1, 2] and len(main.subjects) > 3 and main.milestones[-1] == 15000
    assert main.image_milestones == [1500, 3000, 6000, 15000]


def test_own_milestones_are_for_all_cells(capsys):
    args = compare_methods.parse_args(["--grid", "n", "--milestones", "6", "12"])
    assert args.milestones == [6, 12] == args.image_milestones
    with pytest.raises(SystemExit):
        compare_methods.parse_args(["--grid", "n", "--image_milestones", "6"])
    assert "--milestones" in capsys.readouterr().err


def test_make_ablations_and_the_tables_know_all_grids():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^ABLATIONS := (.*)$", makefile, flags=re.M)[1].split()
    assert sorted(listed) == sorted(ablations.GRIDS)
    assert {name for name in make_tables.TABLES if name.startswith("ablation_")} == {
        f"ablation_{grid}{ending}" for grid in ablations.GRIDS for ending in ("", "_eps")
    }


# =====================================================================================================
# i*
# =====================================================================================================


def watched(window, threshold):
    subspace = zoodip.SubspaceGradient(window, threshold)
    learner = methods.FlagshipLearner.__new__(methods.FlagshipLearner)
    learner.learner = SimpleNamespace(rule=SimpleNamespace(subspace=subspace))
    return subspace, ablations.watch_subspace(learner)


@pytest.mark.parametrize("threshold, kept_directions", [(0.5, 1), (0.1, 2), (0.05, 3), (1e-3, 3)])
def test_kept_directions_of_a_known_trajectory_are_counted(threshold, kept_directions):
    """10, 5 and 1 columns follow one pattern each, all standardised alike: 62.5, 31.25 and 6.25 % of the variance."""
    patterns = torch.linalg.qr(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double())[0]
    patterns = torch.linalg.qr(torch.cat([torch.ones(8, 1).double(), patterns], dim=1))[0][:, 1:4]  # of mean 0
    columns = torch.tensor([0] * 10 + [1] * 5 + [2])
    trajectory = 0.3 + patterns[:, columns] * torch.linspace(0.1, 2, 16)
    trajectory = torch.cat([trajectory, torch.full((8, 4), 0.7)], dim=1)  # and some never move
    subspace, kept = watched(len(trajectory), threshold)
    for theta in trajectory.view(8, 1, 20):
        subspace.update(theta)
    assert kept == {"window": 8, "counts": [kept_directions]}


def test_kept_directions_of_random_walks_fill_the_window():
    generator = torch.Generator().manual_seed(0)
    subspace, kept = watched(12, 1e-2)
    theta = torch.zeros(1, 64)
    for _ in range(3 * 12):
        theta = theta + torch.randn(1, 64, generator=generator)
        subspace.update(theta)
        if not subspace.buffer:
            assert kept["counts"][-1] == 11 - subspace.num_removed
    assert len(kept["counts"]) == 3 and all(1 <= count <= 11 for count in kept["counts"])


def test_only_subspace_gradient_is_watched():
    assert watched(0, 1e-3)[1] is None
    assert ablations.watch_subspace(None) is None
    learner = methods.FlagshipLearner.__new__(methods.FlagshipLearner)
    learner.learner = SimpleNamespace(rule=SimpleNamespace(solver=None))  # Gauss-Newton
    assert ablations.watch_subspace(learner) is None


def test_watching_changes_nothing_and_is_stored(tmp_path, demo_base):
    PartialState(cpu=True)
    (tmp_path / "weights").mkdir()
    run = run_of("sg_11_1e-1", milestones=(70,))
    compare_methods.perform(run, tmp_path)
    content = compare_methods.finished(run, tmp_path)
    assert content["steps"] == 23 and content["kept"]["window"] == 11 and len(content["kept"]["counts"]) == 2
    words = [*compare_methods.common_flags(run, tmp_path), *run.method.flags.split()]
    task = methods.prepare(words, lambda args: content["steps"])
    learner = zoodip.start_learner(task.args, task.initial)
    for _ in range(content["steps"]):
        zoodip.train_step(learner, task.model, task.concept, task.sampling)
    theta = np.frombuffer(base64.b64decode(content["thetas"]["70"]), dtype=np.float32)
    assert np.array_equal(theta, learner.theta.numpy().ravel())


# =====================================================================================================
# Tables and figures
# =====================================================================================================


def stored(name, subject, seed, losses, kept=None, steps=1500):
    curve = [
        {"milestone": m, "forwards": m, "loss": loss, "CLIP-I": 1 - loss, "identity": loss / 2, "CLIP-T": 0.5}
        | {"shape": 0.75}
        for m, loss in losses.items()
    ]
    content = {"settings": {"name": name, "subject": subject, "seed": seed}, "curve": curve, "steps": steps}
    content |= {"commit": "c" * 40, "changed": False, "source": "s"}
    return content | ({"kept": {"window": 10, "counts": kept}} if kept else {})


def synthetic():
    """Contents of the grid n: n = 1 with two budgets, n = 4 in part, n = 8 not at all; and their losses."""
    losses = np.random.default_rng(0).random((2, 2, 2, 2))  # cell, subject, seed, budget
    contents = []
    for i, subject in enumerate(SUBJECTS):
        for seed in range(2):
            contents.append(stored("paper", subject, seed, {4500: losses[0, i, seed, 0]}, kept=[5, 7]))
            both = dict(zip((3000, 4500), losses[1, i, seed]))
            contents.append(stored("n_1", subject, seed, both, steps=2250))
    contents.append(stored("n_4", "a", 1, {4500: 0.5, 7500: 0.4}))
    return contents, losses


def rows_of(contents, grid="n"):
    return ablations.ablation_rows(grid, contents, SUBJECTS, [0, 1], compare_methods.METRICS)


def test_rows_against_numpy():
    contents, losses = synthetic()
    rows = {(row["name"], row["forwards"]): row for row in rows_of(contents)}
    assert list(rows) == [("n_1", 3000), ("n_1", 4500), ("paper", 4500), ("n_4", 4500), ("n_4", 7500)]
    paper, early, late = rows["paper", 4500], rows["n_1", 3000], rows["n_1", 4500]
    for row, values in ((paper, losses[0, :, :, 0]), (early, losses[1, :, :, 0]), (late, losses[1, :, :, 1])):
        assert row["loss"] == pytest.approx([values.mean(), values.mean(axis=0).std(ddof=1)])
        assert (row["runs"], row["of"]) == (4, 4)
    assert early["steps"] == 1500 and late["steps"] == 2250
    for i, row in enumerate((early, late)):  # both against the paper's setting at its only budget
        pairs = (losses[1, :, :, i] - losses[0, :, :, 0]).ravel()
        low, high = bootstrap_interval(pairs)
        assert row["loss difference"] == pytest.approx([pairs.mean(), low, high]) and row["pairs"] == 4
        assert row["CLIP-I difference"][0] == pytest.approx(-pairs.mean())
    assert "loss difference" not in paper and paper["kept"] == [pytest.approx(0.6), 8]
    partial = rows["n_4", 7500]
    assert partial["runs"] == partial["pairs"] == 1 and partial["loss"] == [0.4, None]
    assert partial["loss difference"] == [pytest.approx(0.4 - losses[0, 0, 1, 0]), None, None]
    published = ablations.ABLATIONS["n"].published
    shown = {key: row.get("published") for key, row in rows.items()}
    assert shown == {
        ("n_1", 3000): published["n_1"],
        ("n_1", 4500): None,
        ("paper", 4500): published["paper"],
        ("n_4", 4500): None,
        ("n_4", 7500): published["n_4"],
    }


def test_without_the_papers_cell_nothing_is_compared():
    contents = [content for content in synthetic()[0] if content["settings"]["name"] != "paper"]
    assert all(row["loss difference"] == [None] * 3 and row["pairs"] == 0 for row in rows_of(contents))


def result_of(grid, contents):
    rows, cells = rows_of(contents, grid), ablations.GRIDS[grid]
    result = {"grid": grid, "rows": rows, "subjects": SUBJECTS, "seeds": [0, 1], "command": "a command"}
    result |= {"hardware": {"name": "a CPU"}, "versions": {"torch": "2"}, "configuration": {"judging": {}}}
    result["methods"] = {name: {"title": method.title} for name, method in cells.items()}
    result["runs"] = [{"name": c["settings"]["name"], "kept": c.get("kept")} for c in contents]
    return json.loads(json.dumps(result))


def test_the_table_says_how_sure_and_how_complete_it_is():
    text = tables.ablation(result_of("n", synthetic()[0]))
    lines = text.splitlines()
    assert "published" in lines[0] and "i*" not in lines[0] and len({line.count("|") for line in lines[:-2]}) == 1
    assert len(lines) == 2 + 5 + 2 and "0.736" in lines[2] and "0.736" not in lines[3]
    assert "4 of 4" in lines[2] and "1 of 4" in lines[5] and "[" in lines[2] and "[" not in lines[5]
    assert "bootstrap" in lines[-1] and "--grid n" in lines[-1]
    sure = [stored("paper", s, k, {4500: 0.5}) for s in SUBJECTS for k in range(2)]
    sure += [stored("n_1", s, k, {4500: 0.6 + 0.01 * k}) for s in SUBJECTS for k in range(2)]
    assert "**+0.1050 [+0.1000, +0.1100]**" in tables.ablation(result_of("n", sure))
    with_kept = tables.ablation(result_of("sg_puts", [stored("paper", "a", 0, {4500: 0.5}, [5, 6])]))
    assert "i*/τ" in with_kept and "| 0.55 |" in with_kept and with_kept.endswith("(../ablation_sg.png)")


def test_a_table_says_of_which_base_and_which_pictures_it_is():
    result = result_of("sg_puts", [stored("paper", "a", 0, {4500: 0.5})])
    shape = result["rows"][0].pop("shape")  # which older results have not
    text = tables.ablation(result)
    assert "demo/base`, which predicts v" in text and "| validation loss |" in text
    assert "training pictures" in text and "shape" not in text
    result["configuration"] = {"judging": {"pictures": 16}, "model": "base_eps"}
    result["rows"][0]["shape"] = shape
    text = tables.ablation(result)
    assert "demo/base_eps`, which predicts ε" in text and "| held-out loss |" in text and "| 0.750 |" in text
    assert "nothing is trained on" in text and text.endswith("(../ablation_sg_eps.png)")


def test_figures_are_drawn_from_what_is_there(tmp_path):
    contents = [stored("paper", s, 0, {4500: 0.5}, kept=[9, 9, 8]) for s in SUBJECTS]
    contents += [stored("t_0_1000", "a", 0, {4500: 0.6}, kept=[7]), stored("no_sg", "a", 0, {4500: 0.6})]
    result = result_of("sg_puts", contents)
    assert plot_methods.shares_kept(result, "paper") == ([0.9, 0.9, 0.8] * 2, 2)
    assert plot_methods.shares_kept(result, "no_sg") == ([], 0)
    plot_methods.plot_kept(result, tmp_path / "kept.png")
    heat = [stored("paper", "a", 0, {4500: 0.5}), stored("t_0_1000", "a", 0, {4500: 0.6})]
    heat.append(stored("t_300_700", "b", 0, {4500: 0.6}))  # without a pair
    plot_methods.plot_timesteps(result_of("timesteps", heat), tmp_path / "heat.png")
    for name in ("kept.png", "heat.png"):
        assert Image.open(tmp_path / name).width > 400


def test_results_are_collected_from_what_is_finished(tmp_path, demo_base, capsys):
    words = ["--grid", "sg_puts", "--base", "base", "--collect", "--cache_dir", str(tmp_path / "cache")]
    args = compare_methods.parse_args([*words, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(compare_methods.RunError, match="nothing to show"):
        compare_methods.main(args)
    assert not (tmp_path / "out").exists()
    base = compare_methods.fingerprint(compare_methods.DEMO / "base", compare_methods.SCORER)
    judging = compare_methods.Judging()
    plan = "sg_puts", args.methods, args.subjects, args.seeds, None, None
    code = judging, base, compare_methods.hash_code()
    for run in compare_methods.list_runs(*plan, *code)[:9]:  # as if they were done
        content = stored(run.name, run.subject, run.seed, {4500: 0.5}, kept=[18] if "no_sg" not in run.name else None)
        content |= {"settings": run.settings(), "thetas": {}, "seconds": {"whole": 60.0, "training": 50.0}}
        run.path(args.cache_dir).parent.mkdir(parents=True, exist_ok=True)
        run.path(args.cache_dir).write_text(json.dumps(content))
    compare_methods.main(args)
    read = json.loads((tmp_path / "out" / "ablation_sg_puts.json").read_text())
    assert [row["runs"] for row in read["rows"]] == [3, 3, 3] and len(read["runs"]) == 9
    assert "3 of 6" in capsys.readouterr().out and (tmp_path / "out" / "ablation_sg.png").is_file()
    listed = compare_methods.list_runs(*plan, *code)
    compare_methods.say_how_long(listed, args.cache_dir, 2)
    assert capsys.readouterr().out.startswith("15 of 24 runs are missing: 0.1 h on 2 free cores, as long as")
    compare_methods.say_how_long(listed, tmp_path, 2)
    assert "24 of 24 runs are missing: 0.2 h on 2 free cores, a projection" in capsys.readouterr().out
    assert statistics.fmean(run["seconds"]["whole"] for run in read["runs"]) == 60
