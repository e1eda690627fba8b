"""The step benchmark: what it times must be the script's step, and a rerun must not lose older results."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train_zoodip_textual_inversion as zoodip
from benchmarks import bench_step
from personalization.data import examples
from personalization.files import write_json


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(autouse=True)
def no_matrix_products(monkeypatch):
    """The speed of the machine is of no interest here, and takes seconds to find out."""
    monkeypatch.setattr(bench_step, "matmul_peak", lambda device, dtype: 1e11)


def test_steps_leave_the_token_that_the_script_leaves(demo_base, cache, basics, train, monkeypatch):
    """The same random moments in both: θ must be the same to the last bit, so no step may differ in anything."""
    settings = {"sg_window": 2, "seed": 5, "quantized_cache_dir": cache}  # so short a window that SG is at work
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    step = bench_step.OurStep(demo_base, flags, 64, 2, 3, cache_dir=cache)
    monkeypatch.setattr(examples, "encode_images", lambda *_: step.concept.moments)
    basics["--train_data_dir"] = str(bench_step.SUBJECT)
    settings |= {"resolution": 64, "train_batch_size": 2, "num_perturbations": 3}
    output = train(max_train_steps=4, num_validation_samples=0, **settings)
    for _ in range(4):
        assert step.step().isfinite()
    (theirs,) = load_file(output / "learned_embeds.safetensors").values()
    assert torch.equal(step.learner.theta, theirs) and not torch.equal(theirs, step.initial)
    unet = step.model.denoiser
    step.configure(64, 2, 3)  # starts anew, with the same networks
    assert torch.equal(step.learner.theta, step.initial) and step.model.denoiser is unet


def test_rows_take_turns_and_a_rerun_replaces_only_its_own(demo_base, cache, tmp_path, monkeypatch):
    output = tmp_path / "step.json"
    words = ["--architecture", "demo", "--device", "cpu", "--rounds", "2", "--output", str(output)]
    words += ["--cache_dir", str(cache), "--rows"]
    older = {**dict.fromkeys(bench_step.KEY, "other"), "resolution": 1, "num_perturbations": 1, "batch_size": 1}
    missing = {**older, "architecture": "demo", "row": "ti-fp32", "resolution": 64, "device": "cpu", "reason": "none"}
    write_json(output, {"rows": [older], "left_out": [missing], "processes": []})
    order = []
    timed = bench_step.Bench.timed

    def watched(self, step, steps):
        order.append(step.dtype if isinstance(step, bench_step.OurStep) else step.kind)
        return timed(self, step, steps)

    monkeypatch.setattr(bench_step.Bench, "timed", watched)
    bench_step.main([*words, "ours-int8", "official", "ti-fp32", "floor-fp32", "--num_perturbations", "1", "2"])
    ours = torch.float32
    rounds = [ours, "official", "ti", "floor", "official", "ti", "floor", ours]
    assert order == 2 * [ours, "official", "ti", "floor", *rounds]
    content = json.loads(output.read_text())
    rows = {bench_step.key_of(row, bench_step.KEY): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 9 and older in content["rows"] and content["left_out"] == []
    measured = [row for row in rows.values() if row is not older and row["architecture"] == "demo"]
    for row in measured:
        times = row["seconds_per_step"]
        assert 0 < times["min"] <= times["median"] <= times["max"] and len(times["rounds"]) == 2
        assert row["activations"] == "float32" and row["hardware"]["threads"] == 1 and row["command"]
        assert set(row["ratio_to"]) == {"ours-int8", "official", "floor-fp32"} - {row["row"]}
        assert (row["seconds_per_direction"] is None) == (row["row"] == "ti-fp32") == (row["arithmetic_floor"] is None)
    key = ("demo", "ours-int8", 64, 2, 1, "cpu")
    ours, theirs = (rows[("demo", name, *key[2:])]["seconds_per_step"]["median"] for name in ("ours-int8", "official"))
    assert rows[key]["ratio_to"]["official"] == pytest.approx(ours / theirs, rel=1e-2)
    before = {k: row for k, row in rows.items() if k != key}
    bench_step.main([*words, "ours-int8", "--steps", "2"])
    rows = {bench_step.key_of(row, bench_step.KEY): row for row in json.loads(output.read_text())["rows"]}
    assert rows[key]["steps_per_round"] == 2 and rows[key]["ratio_to"] == {}
    assert {k: row for k, row in rows.items() if k != key} == before


def test_a_row_that_fails_is_named_and_groups_repeat_the_references(demo_base, cache, tmp_path, monkeypatch, capsys):
    output = tmp_path / "step.json"
    words = ["--architecture", "demo", "--device", "cpu", "--rounds", "1", "--output", str(output)]
    words += ["--cache_dir", str(cache), "--memory_gb", "0.001", "--rows"]
    words += ["ours-int8", "ours-int8-bf16", "ours-none", "floor-fp32", "ours-low-vram"]
    args = bench_step.parse_args(words)
    groups = bench_step.Bench(args).groups()
    assert groups == [["ours-int8", name] for name in args.rows[1:]]
    monkeypatch.setitem(
        bench_step.ROWS, "ours-none", bench_step.Row(flags="--quantization none --mixed_precision fp16")
    )
    bench_step.main(words)
    content = json.loads(output.read_text())
    (failed,) = content["left_out"]
    assert failed["row"] == "ours-none" and "fp16" in failed["reason"]
    rows = {row["row"]: row for row in content["rows"]}
    assert set(rows) == {*args.rows} - {"ours-none"}
    assert all("ours-int8" in row["ratio_to"] for name, row in rows.items() if name != "ours-int8")
    assert rows["ours-low-vram"]["loss_deviation_from_ours_int8"] < 1e-6
    assert rows["ours-int8"]["interleaved_with"] == ["ours-int8-bf16"]  # its first group


def test_openvino_is_remade_for_a_resolution_only(demo_base, cache, monkeypatch):
    pytest.importorskip("openvino")
    made = []

    def load(args, base, compute, layers_dir):
        made.append(args.resolution)
        return torch.nn.Identity(), None

    monkeypatch.setattr(zoodip, "load_denoiser", load)
    step = bench_step.OurStep(demo_base, ["--unet_backend", "openvino"], 64, cache_dir=cache)
    for resolution, n in (64, 1), (64, 4), (128, 4):
        step.configure(resolution, 1, n)
    assert made == [64, 128]
