"""TuneQDM's benchmarks: the official way computes the same, and a comparison that was stopped goes on."""

import copy
import json
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_base import build_tiny_base

import train_tuneqdm_dreambooth as script
import tuneqdm_pipeline as tuneqdm
from benchmarks import bench_tuneqdm as bench
from benchmarks import compare_tuneqdm as compare


@pytest.mark.parametrize("bits", [8, 4])
def test_the_official_way_computes_the_same(tmp_path, monkeypatch, bits):
    build_tiny_base(tmp_path / "base")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "base", subfolder="unet").requires_grad_(False)
    selection = tuneqdm.quantize_unet(unet, bits, "minmax")
    changes = script.new_changes(unet, 4, True)
    with torch.no_grad():
        for change in changes.values():
            change += 0.1 * torch.randn(change.shape, generator=torch.Generator().manual_seed(0))
    tuneqdm.attach(unet, changes)
    selection.use(tuneqdm.set_of_timestep(1000, 4))
    g, found = torch.Generator().manual_seed(1), []
    sample, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 32, 16, generator=g)
    for _ in range(2):
        prediction = unet(sample, torch.tensor(600), text).sample
        found.append([prediction, *torch.autograd.grad(prediction.square().sum(), changes.values())])
        monkeypatch.setattr(tuneqdm.QuantizedLayer, "forward", bench.official_forward)
    for ours, official in zip(*found):
        torch.testing.assert_close(ours, official, rtol=1e-3, atol=1e-4)


def test_a_row_of_the_memory_benchmark(demo_base, tmp_path, monkeypatch):
    path = tmp_path / "memory.json"
    flags = ["--base", demo_base, "--resolution", "64", "--rows", "official-peqa", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench", *flags, "--output", str(path)])
    bench.main()
    imports, row = json.loads(path.read_text())["entries"]
    assert row["row"] == "official-peqa" and row["trained_scales"] > 10_000 and row["seconds_per_step"] > 0
    assert row["measured"]["peak_rss_mb"] > imports["measured"]["peak_rss_mb"]
    assert "training" in row["measured"]["phases"] and str(tmp_path) not in row["command"]


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch):
    path, done = tmp_path / "quality.json", []

    def train(settings, bits, subject, judge, lengths):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((subject, bits, settings.scale_sets, settings.seed))
        return {str(step): {"CLIP-I": 0.5, "identity": 0.5, "CLIP-T": 0.5} for step in lengths}, 1.0

    monkeypatch.setattr(compare, "train_and_judge", train)
    monkeypatch.setattr(
        compare, "Judge", lambda: lambda unet, subject: {"CLIP-I": 0.1, "identity": 0.1, "CLIP-T": 0.1}
    )
    flags = ["--subjects", "striped_star", "--seeds", "0", "--variants", "full", "peqa", "s2-2", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["compare", *flags])
    with pytest.raises(KeyboardInterrupt):
        compare.main()
    first = copy.copy(done)
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        compare.main()
    assert first == [("striped_star", 0, 1, 0), ("striped_star", 8, 1, 0)]
    assert done == [("striped_star", 4, 1, 0), ("striped_star", 8, 2, 0)]
    result = json.loads(path.read_text())
    assert len(result["entries"]) == 4 and set(result["bases"]["striped_star"]) == {"0", "8", "4"}
    compare.plot(result, tmp_path / "picture.png", [50, 100, 200, 400])
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("variant, bits", [("full", 0), ("s2-2-inputs", 4)])
def test_a_variant_is_trained_and_judged(monkeypatch, variant, bits):
    monkeypatch.setattr(compare, "INFERENCE_STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["compare", "--steps", "1", "2"])
    args = compare.parse_args()
    settings = compare.script_args("striped_star", 0, bits, variant, 1e-2, args)
    scores, seconds = compare.train_and_judge(settings, bits, "striped_star", compare.Judge(), args.steps)
    assert set(scores) == {"1", "2"} and seconds > 0
    assert set(scores["2"]) == {"CLIP-I", "identity", "CLIP-T", "loss"}
