"""The memory benchmark: what it samples must be what the kernel and the script say, and its file must stay whole."""

import json
import sys

import pytest

from benchmarks import bench_memory as bench
from benchmarks import common, watching


def entry_of(row, seconds):
    return {
        **{"architecture": "demo", "row": row, "resolution": 64, "num_perturbations": 2, "batch_size": 1},
        "seconds": seconds,
    }


def test_two_rows_write_what_was_measured_and_predicted(tmp_path, monkeypatch):
    path = tmp_path / "memory.json"
    common.put(path, [entry_of("int8-first", -1)], bench.KEY)  # replaced by this run
    common.put(path, [entry_of("none", -2)], bench.KEY)  # kept
    rows = ["--rows", "int8-first", "load-int8-no-cache"]
    monkeypatch.setattr(
        sys, "argv", ["bench", "--architecture", "demo", *rows, "--device", "cpu", "--output", str(path)]
    )
    bench.main()
    entries = json.loads(path.read_text())["entries"]
    by_row = {entry["row"]: entry for entry in entries}
    assert len(entries) == len(by_row) == 4 and by_row["none"]["seconds"] == -2
    imports, trained = by_row["imports"]["measured"], by_row["int8-first"]["measured"]
    assert 100 < imports["peak_anonymous_mb"] < imports["peak_rss_mb"] < trained["peak_rss_mb"]
    # Sampling misses little, nothing of it is missed by the kernel's high-water mark, and no child had a part in it.
    assert 0.97 * trained["peak_rss_mb"] < trained["peak_rss_sampled_mb"] <= trained["peak_rss_mb"]
    assert trained["peak_rss_mb"] >= trained["reported"]["process_mb"] - 1
    assert sum(trained["children_mb"].values()) < 10
    assert {"start", "quantizing the UNet", "training"} <= set(trained["phases"])
    assert abs(by_row["int8-first"]["deviation_percent"]) < 10
    assert by_row["int8-first"]["predicted_mb"]["denoiser"] == pytest.approx(
        trained["components_mb"]["unet"], rel=0.05
    )
    loading = by_row["load-int8-no-cache"]["loading"]
    assert 0 < loading["peak_anonymous_above_start_mb"] <= loading["peak_rss_above_start_mb"] < 50
    assert by_row["int8-first"]["command"].startswith("python train_zoodip_textual_inversion.py --pretrained")
    assert len(by_row["imports"]["commit"]) == 40 and by_row["imports"]["changed"] in (True, False)


def test_phases_begin_with_the_lines_that_name_them():
    mb = watching.MB
    samples = [
        watching.Sample(t, rss=rss * mb, anonymous=rss * mb // 2, high_water=0) for t, rss in enumerate([10, 40, 20])
    ]
    lines = [(0.5, "phase: loading"), (1.5, "INFO - 2 images, 3 candidates a step (3 a pass)")]
    phases = watching.divide_phases(watching.Watched(samples, lines, 3.0, {}, None))
    assert list(phases) == ["start", "loading", "training"]
    assert [phase["peak_rss_mb"] for phase in phases.values()] == [10, 40, 20]
    assert phases["loading"]["anonymous_at_begin_mb"] == 20


def test_a_failing_process_is_reported_with_what_it_said():
    with pytest.raises(RuntimeError, match="exit code 3.*\n.*no luck"):
        watching.watch([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"], "cpu")
