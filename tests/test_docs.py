"""README and docs say what the stored results say, what the parsers say, and what is there."""

import json
import re
import statistics
import subprocess
import sys

import pytest
from conftest import REPO

from benchmarks import make_tables


PAGES = {path.relative_to(REPO).as_posix(): path for path in [REPO / "README.md", *sorted(REPO.glob("docs/**/*.md"))]}
BY_HAND = sorted(set(PAGES) - {"docs/usage.md"})
ELSEWHERE = {"pipeline.py", "train_dreambooth.py", "train_dreambooth_lora.py"}  # what a run writes; diffusers' own
BENCHMARKS = REPO / "benchmarks" / "results"


def text_of(page):
    return PAGES[page].read_text(encoding="utf-8")


def prose(page):
    """A page without its generated tables and its blocks of code."""
    text = re.sub(r"<!-- BEGIN (\w+) -->.*?<!-- END \1 -->", "", text_of(page), flags=re.S)
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchors(text):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tables_are_generated_from_the_results():
    assert set(make_tables.PAGES) == set(PAGES)
    pages = [text_of(page) for page in PAGES]
    for text in pages:
        assert make_tables.fill(text) == text, "run python benchmarks/make_tables.py"
    assert all(any(f"<!-- BEGIN {name} -->" in text for text in pages) for name in make_tables.TABLES)


def test_what_is_tried_is_counted_from_the_tests(repo):
    command = [sys.executable, str(repo / "tests" / "count_hardening.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]
    counted = json.loads((repo / "docs" / "hardening.json").read_text(encoding="utf-8"))
    assert counted["random damages"]["cases"] >= 200
    assert {"kills, full disks, two runs at once", "Hub failures", "flags", "numbers"} <= set(counted)


# =====================================================================================================
# Figures outside of the generated tables
# =====================================================================================================


def measured_steps():
    """(architecture, row, px, n) -> seconds of a step at batch 1."""
    rows = json.loads((BENCHMARKS / "step_cpu.json").read_text(encoding="utf-8"))["rows"]
    names = "architecture", "row", "resolution", "num_perturbations"
    return {tuple(r[n] for n in names): r["seconds_per_step"]["median"] for r in rows if r["batch_size"] == 1}


def measured_peaks():
    """(architecture, row, px, n) -> MiB of the process at batch 1."""
    entries = json.loads((BENCHMARKS / "memory_cpu.json").read_text(encoding="utf-8"))["entries"]
    names = "architecture", "row", "resolution", "num_perturbations"
    return {tuple(e[n] for n in names): e["measured"]["peak_rss_mb"] for e in entries if e["batch_size"] == 1}


def test_times_and_memory_of_the_hardware_table():
    table = text_of("README.md").split("## Your hardware")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    step, peak, day = measured_steps(), measured_peaks(), 24 * 3600

    def gib(key):
        return f"{peak[key] / 1024:.1f} GiB"

    def days(key, steps=30_000):
        return step[key], f"{steps * step[key] / day:.1f} days"

    def row(hardware, add, time, memory, nth=0):
        found = [r for r in rows if hardware in r[0] and r[1].startswith(add)][nth]
        assert all(word in found[2] for word in time), (found, time)
        assert memory in found[3], (found, memory)

    seconds, length = days(("sd15", "ours-int8", 512, 2))
    row("2 CPU cores, SD 1.5", "nothing", (f"{seconds:.1f} s", length), gib(("sd15", "int8", 512, 2)))
    seconds, length = days(("sd15", "ours-openvino", 512, 2))
    row("the same", "`--unet_backend openvino`", (f"{seconds:.1f} s", length), "not measured")
    seconds, length = days(("sd15", "ours-int8", 256, 2))
    row("256 px", "`--resolution 256`", (f"{seconds:.1f} s", length), gib(("sd15", "int8", 256, 2)))
    seconds, length = days(("sd15", "ours-openvino", 256, 2))
    row("256 px", "`--resolution 256 --unet", (f"{seconds:.1f} s", length), gib(("sd15", "openvino", 256, 2)))
    exact = json.loads((BENCHMARKS / "step_gauss_newton.json").read_text(encoding="utf-8"))["rows"]
    (seconds,) = (r["seconds_per_example"] for r in exact if (r["row"], r["resolution"]) == ("gauss-newton", 256))
    time = f"38 rows of {seconds:.1f} s", f"projected: {500 * 38 * seconds / 3600:.1f} hours"
    row("256 px", "`--optimizer gauss_newton --res", time, gib(("sd15", "int8-gauss-newton-exact", 256, 2)))
    seconds, length = days(("sdxl", "ours-int8", 256, 2), 20_000)
    row("SDXL at 256", "`--resolution 256`", (f"{seconds:.0f} s", length), "not measured")
    row("512 px", "`--resolution 512`", ("not measured",), gib(("sdxl", "int8", 512, 2)))
    frontiers = {
        name: json.loads((BENCHMARKS / f"frontier_{name}.json").read_text(encoding="utf-8"))["entries"]
        for name in ("cpu", "amx")
    }
    for machine, resolution, add, name, digits in (
        ("cpu", 512, "`--optimizer gradient`", "gradient", 1),
        ("cpu", 256, "`--optimizer gradient --res", "gradient", 1),
        ("amx", 512, "`--optimizer gauss_newton --mixed", "gauss-newton-bf16", 0),
        ("amx", 512, "`--optimizer gradient --mixed_precision bf16`", "gradient-bf16", 1),
        ("amx", 256, "`--optimizer gauss_newton --resolution 256 --mixed", "gauss-newton-bf16", 0),
    ):
        wanted = ("sd15", name, resolution)
        (entry,) = [e for e in frontiers[machine] if (e["architecture"], e["row"], e["resolution"]) == wanted]
        seconds = statistics.fmean(entry["cpu_seconds_of_steps"][1:])
        length = f"projected: {500 * seconds / 3600:.1f} hours"
        memory = f"{entry['measured']['peak_rss_mb'] / 1024:.1f} GiB"
        row(f"{resolution} px", add, (f"{seconds:.{digits}f} s", length), memory)


def test_figures_of_the_subjects_that_gauss_newton_was_not_tuned_on():
    runs = json.loads((BENCHMARKS / "methods.json").read_text(encoding="utf-8"))["runs"]

    def mean(subject, method, metric):
        return statistics.mean(run[metric][-1] for run in runs if (run["subject"], run["name"]) == (subject, method))

    page = text_of("docs/results/methods.md")
    compared = "paper", "naive_zo", "fast", "fast_float32"
    for subject in ("dotted_circle", "checkered_ring"):
        loss = " | ".join(f"{mean(subject, method, 'loss'):.4f}" for method in compared)
        identity = " | ".join(f"{mean(subject, method, 'identity'):.3f}" for method in compared)
        assert f"| {subject.replace('_', ' ')} | validation loss | {loss} |\n| | identity | {identity} |" in page
    ours, paper, naive = (f"{mean('dotted_circle', m, 'identity'):.3f}"[1:] for m in ("fast_float32", *compared[:2]))
    for name in ("docs/results/methods.md", "docs/methods/gauss_newton.md"):
        words = " ".join(text_of(name).split())
        assert f"{ours} against {paper}" in words and f"{naive} " in words


@pytest.mark.parametrize("page", ["README.md", "docs/results/demo.md"])
def test_figures_beside_the_first_picture(page):
    """What its columns cost, and their mean identity."""
    result = json.loads((REPO / "docs" / "demo_scores.json").read_text(encoding="utf-8"))
    words = " ".join(text_of(page).replace("*", "").split())
    identity = {
        key: statistics.mean(row[key]["identity"] for row in result["scores"].values()) for key in result["columns"]
    }
    plain, paper, ours = (f"{identity[key]:.2f}"[1:] for key in ("plain-word", "zoodip", "gradient"))
    assert f"{plain} for the plain word, {paper} for ZOODiP and {ours} for ours" in words
    for key in ("zoodip", "gradient"):
        column = result["columns"][key]
        assert f"{column['steps']:,} steps" in words and f"{column['forward_passes']:,} forward passes" in words
        assert f"{column['cpu_seconds']:.0f} s" in words
    if page != "README.md":
        circle = result["scores"]["dotted_circle"]["gradient"]["identity"]
        assert f"{circle:.3f}"[1:] in words


@pytest.mark.parametrize("page", [page for page in BY_HAND if page.startswith("docs/results/")] + ["README.md"])
def test_pages_of_the_demo_model_say_which_kind_of_model_it_is(page):
    text = " ".join(text_of(page).replace("**", "").replace("> ", "").split())
    if "demo" in text and page != "docs/results/speed.md":  # whose figures of it are speed only
        assert re.search("predicts? v with zero terminal SNR", text) and re.search("predicts? ε", text)


# =====================================================================================================
# Names
# =====================================================================================================


@pytest.mark.parametrize("page", BY_HAND)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", BY_HAND)
def test_files_that_are_named_exist(page):
    starts = "personalization|benchmarks|demo|docs|tests|model_cards"
    for path in re.findall(rf"`((?:{starts})/[\w./]+|[a-z_]+\.py)`", prose(page)):
        if path.startswith("demo/output") or path in ELSEWHERE:
            continue
        anywhere = [REPO / path, *(REPO.rglob(path) if "/" not in path else [])]
        assert any(found.exists() for found in anywhere), path


@pytest.mark.parametrize("page", BY_HAND)
def test_code_that_is_linked_is_in_that_file(page):
    for name, path in re.findall(r"\[`(\w+)`\]\(([\w./]+\.py)\)", prose(page)):
        source = (PAGES[page].parent / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {name}\b|^{name}\b.* = ", source, flags=re.M), f"{name} in {path}"


def test_the_readme_links_the_seven_steps_to_the_code():
    section = text_of("README.md").split("## How it works")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| \d \|", section, flags=re.M)) == 7
    assert len(re.findall(r"\[`\w+`\]\([\w./]+\.py\)", section)) > 10


def test_functions_that_gauss_newtons_page_names_are_there(repo):
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (*repo.glob("train_*.py"), *repo.glob("personalization/**/*.py"))
    )
    for name in ("gauss_newton_evidence", "GaussNewton"):
        assert f"`{name}`" in text_of("docs/methods/gauss_newton.md")
        assert re.search(rf"^(?:def|class) {name}\b", sources, flags=re.M), name


def test_the_readme_is_one_sitting():
    assert len(text_of("README.md").splitlines()) <= 220


# =====================================================================================================
# What a script needs, said in its head (PEP 723), too
# =====================================================================================================


def requirements(name):
    """The lines of a requirements file and of those that it takes in."""
    found = []
    for line in (REPO / name).read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        found += requirements(line.removeprefix("-r ")) if line.startswith("-r ") else [line] if line else []
    return found


@pytest.mark.parametrize("script", sorted(REPO.glob("*.py")), ids=lambda path: path.name)
def test_scripts_name_what_they_need(script):
    tomllib = pytest.importorskip("tomllib")
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", script.read_text(encoding="utf-8"), flags=re.M)
    if script.stem.endswith("_pipeline"):  # travels into other environments
        assert block is None
        return
    head = tomllib.loads("".join(line[2:] for line in block[1].splitlines(keepends=True)))
    file = "requirements-app.txt" if script.name == "app.py" else "requirements.txt"
    assert head["dependencies"] == requirements(file)
    assert head["requires-python"] == ">=3.11"  # diffusers' own
