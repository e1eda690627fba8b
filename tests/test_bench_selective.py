"""Benchmarks of BP-low / ZO-high: what they train is what they say, and a comparison that was stopped goes on."""

import json
import sys

import pytest
import torch

from benchmarks import bench_selective as bench
from benchmarks import compare_selective as compare


def test_a_row_of_the_memory_benchmark(demo_base, tmp_path, monkeypatch):
    path = tmp_path / "memory.json"
    flags = ["--base", demo_base, "--resolution", "64", "--rows", "selective", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench", *flags, "--cache_dir", "none", "--output", str(path)])
    bench.main()
    imports, row = json.loads(path.read_text())["entries"]
    assert [kind for kind, seconds in row["seconds_of_steps"]] == ["bp_low", "zo_high"]
    assert row["trained_weights"] > 10_000 and row["low_resolution"] == 32
    assert row["measured"]["peak_rss_mb"] > imports["measured"]["peak_rss_mb"]
    assert "training" in row["measured"]["phases"] and str(tmp_path) not in row["command"]


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch):
    path, done = tmp_path / "quality.json", []

    class Judge:
        def __init__(self):
            self.pipeline = type("Pipeline", (), {"unet": None})

        def draw(self, unet, subject):
            return [[compare.Image.new("RGB", (64, 64))]] * 4

        def score(self, pictures, subject):
            return {"CLIP-I": 0.5, "identity": 0.5, "CLIP-T": 0.5}

    def train(settings, variant):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((variant, settings.seed))
        return type("Model", (), {"unet": None}), {"updates": {"bp_low": 1, "zo_high": 1}, "cpu_seconds": 1.0}

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "Judge", Judge)
    monkeypatch.setattr(compare, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(compare.script, "adapter_tensors", lambda unet: {})
    monkeypatch.setattr(compare, "draw_with_adapters", lambda judge, tensors, subject: judge.draw(None, subject))
    flags = ["--subjects", "striped_star", "--seeds", "0", "--variants", "bp-high", "bp-low", "selective"]
    monkeypatch.setattr(sys, "argv", ["compare", *flags, "--output", str(path)])
    with pytest.raises(KeyboardInterrupt):
        compare.main()
    assert done == [("bp-high", 0), ("bp-low", 0)]
    done.clear()
    compare.main()
    assert done == [("selective", 0)]
    result = json.loads(path.read_text())
    assert len(result["entries"]) == 3 and set(result["plain_word"]) == {"striped_star"}
    compare.draw_sheet(tmp_path / "pictures", ["striped_star"], tmp_path / "sheet.png")
    compare.plot_probability(tmp_path / "probability.png")
    assert compare.Image.open(tmp_path / "sheet.png").width == 5 * 132
    assert (tmp_path / "probability.png").stat().st_size > 10_000


def test_variants_train_what_they_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare"])
    shares, timesteps = {}, torch.arange(0, 1, 0.01)
    for variant in compare.VARIANTS:
        settings = compare.script_args("striped_star", 0, variant, 200)
        selection = compare.script.choose_sampling(settings).selection
        shares[variant] = torch.stack([selection.bp_probability(timesteps, p) for p in (0.0, 0.5, 0.99)])
    assert (shares["bp-high"] == 1).all() and (shares["bp-low"] == 1).all() and (shares["zo-high"] == 0).all()
    assert torch.equal(shares["selective"], shares["one-adam"])
    assert shares["no-timestep"].std(dim=1).max() == 0 and shares["no-progress"].std(dim=0).max() == 0
    assert shares["selective"].std(dim=0).max() > 0 and shares["selective"].std(dim=1).max() > 0


def test_one_adam_shares_its_moments():
    settings = compare.script_args("striped_star", 0, "one-adam", 4, num_perturbations=1, bp_progress_midpoint=0.3)
    learner, model, subjects, sampling = compare.prepare(settings)
    compare.share_moments(learner)
    kinds = [compare.script.train_step(learner, model, subjects, sampling, step / 4)[0] for step in range(4)]
    states = [learner.optimizers[kind].state[learner.theta] for kind in compare.script.KINDS]
    assert len(set(kinds)) == 2 and states[0] is states[1] and states[0]["step"] == 4
