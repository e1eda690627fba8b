"""The demo as `make demo` runs it: the picture's layout, what a failure says, and a whole run of two steps a word."""

import json
import os
import re
import subprocess
import sys

import pytest
import run_demo
from PIL import Image


COLUMNS = {
    "plain-word": {"title": "the plain word", "optimizer": "nothing is learned"},
    "zoodip": {"title": "the paper's", "optimizer": "", "steps": 2000, "forward_passes": 6000, "cpu_seconds": 1.2},
    "gradient": {"title": "ours", "optimizer": "", "steps": 200, "forward_passes": 600, "cpu_seconds": 0.7},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, demo_base, subject):
    """The folder and the output of a demo with two steps for each word."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, run_demo.__file__, "--subjects", "striped_star", "--output_dir", str(folder)]
    command += ["--max_train_steps", "2", "--num_inference_steps", "1", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return folder, done.stdout


def test_the_demo_shows_the_paper_and_ours(finished):
    folder, said = finished
    result = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert list(result["columns"]) == ["plain-word", "zoodip", "gradient"] == list(result["scores"]["striped_star"])
    assert result["columns"]["zoodip"]["flags"]["--recipe"] == "paper"
    assert result["columns"]["gradient"]["flags"]["--optimizer"] == "gradient"
    for key, column in result["columns"].items():
        scores = result["scores"]["striped_star"][key]
        assert all(-1 <= scores[name] <= 1 for name in ("CLIP-I", "identity", "CLIP-T"))
        assert (16 * scores["shape"]).is_integer() and 0 <= scores["shape"] <= 1  # of 16 pictures
        assert column["title"] in said and column["optimizer"] in said
        assert re.search(rf"striped_star +{key} +{scores['CLIP-I']:.3f} +{scores['identity']:.3f}", said)
        assert re.search(rf"striped_star +{key} .* {scores['shape']:.3f}\n", said)
        if key != "plain-word":
            assert scores["training"]["steps"] == column["steps"] == 2
            assert f"2 steps, {column['forward_passes']} forwards, {column['cpu_seconds']:.0f} s of one thread" in said
    assert result["columns"]["zoodip"]["forward_passes"] == result["columns"]["gradient"]["forward_passes"] == 6
    learned = {
        way: json.loads((folder / "striped_star" / way / "zoodip_config.json").read_text(encoding="utf-8"))
        for way in COLUMNS
        if way != "plain-word"
    }
    assert {way: config["settings"]["optimizer"] for way, config in learned.items()} == {
        "zoodip": "zo_adam",
        "gradient": "gradient",
    }
    assert all(config["settings"]["quantization"] == "int8" for config in learned.values())


def test_the_picture_has_four_columns(finished):
    width, height = Image.open(finished[0] / "before_after.png").size
    assert width == 4 * 256 + 3 * 12 and height == 40 + 256


def test_each_picture_is_in_the_column_that_its_title_names(tmp_path):
    colours = {"references": "red", "plain-word": "green", "zoodip": "blue", "gradient": "black"}
    row = {key: [Image.new("RGB", (64, 64), colour)] * 5 for key, colour in colours.items()}
    run_demo.before_after_picture([row, row, row], COLUMNS, tmp_path / "picture.png")
    picture = Image.open(tmp_path / "picture.png")
    assert picture.size == (4 * 256 + 3 * 12, 40 + 3 * 256 + 2 * 12)
    for i, colour in enumerate(colours.values()):
        found = picture.crop((i * 268, 40, i * 268 + 256, 40 + 256)).getcolors()
        assert found == Image.new("RGB", (256, 256), colour).getcolors(), "all of a column is one thing's"
        title = picture.crop((i * 268, 0, i * 268 + 256, 40)).convert("L")
        assert min(title.tobytes()) < 128, "a title"
    for i in (1, 2, 3):
        gap = picture.crop((i * 268 - 12, 0, i * 268, 40)).convert("L")
        assert gap.getextrema()[0] == 255, "no title runs into the next column"


@pytest.mark.parametrize("way", list(run_demo.WAYS))
def test_titles_and_costs_are_as_wide_as_their_column(way):
    from PIL import ImageDraw

    ink = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    column = {"title": run_demo.WAYS[way].title, "steps": 30_000, "forward_passes": 90_000, "cpu_seconds": 9_999}
    assert ink.textlength(column["title"], font_size=15) < 254
    assert ink.textlength(run_demo.cost(column), font_size=12) < 254


def test_the_bases_are_those_of_the_checkout(repo):
    assert "base" in run_demo.BASES
    assert set(run_demo.BASES) == {path.name for path in (repo / "demo").glob("base*") if path.is_dir()}


def test_every_process_has_one_thread_and_a_failure_names_its_log(tmp_path):
    script = tmp_path / "shout.py"
    script.write_text(
        "import os, sys\nprint(os.environ['OMP_NUM_THREADS'], sys.argv[1:])\nsys.exit(len(sys.argv) > 5)\n"
    )
    flags = {"--one": 1, "--bare": True, "--several": ["a", "b"]}
    with pytest.raises(SystemExit, match=r"shout.py failed \(exit 1\): see .*log"):
        run_demo.run(script, flags, tmp_path / "log")
    assert (tmp_path / "log").read_text().splitlines()[1] == "1 ['--one', '1', '--bare', '--several', 'a', 'b']"
    run_demo.run(script, {"--one": 1}, tmp_path / "log")
    assert os.environ["OMP_NUM_THREADS"] == "1"
