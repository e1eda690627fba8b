"""The README says what the stored results say, and what the parser says."""

import importlib
import json
import re
import subprocess
import sys

import train_selective_dreambooth_lora as selective
import train_tuneqdm_dreambooth as tuneqdm
import train_zoodip_textual_inversion as zoodip
from benchmarks import make_tables
from personalization import flags


def test_tables_are_generated_from_the_results(repo):
    pages = [(repo / page).read_text(encoding="utf-8") for page in make_tables.PAGES]
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


def test_flags_of_the_readme_exist(repo):
    text = (repo / "README.md").read_text(encoding="utf-8")
    known = flags.actions(zoodip.make_parser())
    table = text[text.index("## Flags worth knowing") : text.index("## How it works")]
    named = set(re.findall(r"`(--[a-z_0-9]+)", table))
    assert len(named) > 10
    for flag in named - {"--help"}:
        assert flag.removeprefix("--") in known, flag


def test_tuneqdms_flags_of_the_readme_exist(repo):
    text = (repo / "README.md").read_text(encoding="utf-8")
    known = flags.actions(tuneqdm.make_parser())
    section = text[text.index("## TuneQDM") : text.index("## BP-low and ZO-high")]
    named = set(re.findall(r"`(--[a-z_0-9]+)", section)) | set(re.findall(r" (--[a-z_]+) (?!PROMPT)", section))
    assert len(named) > 10
    for flag in named - {"--results"}:
        assert flag.removeprefix("--") in known, flag


def test_flags_of_the_lora_trainer_in_the_readme_exist(repo):
    text = (repo / "README.md").read_text(encoding="utf-8")
    known = flags.actions(selective.make_parser())
    section = text[text.index("## BP-low and ZO-high") : text.index("## What is measured")]
    named = set(re.findall(r"`(--[a-z_0-9]+)", section)) | set(re.findall(r" (--[a-z_]+) (?!PROMPT)", section))
    assert len(named) > 10
    for flag in named - {"--results"}:
        assert flag.removeprefix("--") in known, flag


def test_files_the_readme_shows_are_there(repo):
    text = (repo / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (repo / path).is_file(), path


def test_functions_the_readme_names_are_there(repo):
    text = (repo / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## How it works") : text.index("Nothing in the loop requires")]
    names = [n for cell in re.findall(r"\| ([^|]*) \|\n", table) for n in re.findall(r"`([A-Za-z_0-9]+)`", cell)]
    assert len(names) > 6
    package = sorted((repo / "personalization").rglob("[a-z]*.py"))
    dotted = (".".join(path.relative_to(repo).with_suffix("").parts) for path in package)
    modules = [zoodip, *map(importlib.import_module, dotted)]
    for name in names:
        assert any(hasattr(module, name) for module in modules), name
