"""Counts from the collected tests what is tried against the promise of docs/hardening.md; writes docs/hardening.json.

    python tests/count_hardening.py && python benchmarks/make_tables.py      # --check: exit 1 where it is out of date

A test belongs to the first kind whose pattern matches its id; a property-based test counts as its examples.
"""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import attack
import pytest


REPO = Path(__file__).resolve().parent.parent
RESULT = REPO / "docs" / "hardening.json"

# What is tried -> (pattern of test ids, what is damaged or given).
KINDS = {
    "random damages": (
        r"test_damage\.py::test_(random|several)",
        "a file of base, pictures, cache, checkpoint or result cut, zeroed, bit-flipped, swapped or gone",
    ),
    "kills, full disks, two runs at once": (
        r"test_(training|run_folder|runs|results|checkpoints)\w*\.py::.*(kill|interrupt|stopped|disk|lock|two_runs|"
        r"damaged|read_only|left_behind|nan)",
        "processes killed and resumed, disks that are full or read-only, losses that are no numbers",
    ),
    "Hub failures": (
        r"test_hub\.py::.*(fail|dies|refused|hang|silent|timeout|never|needs|rights|damaged|token|push_only)",
        "errors, silence and missing rights, before training and at the push",
    ),
    "settings, any": (r"test_properties\.py::.*(settings|numbers)", "any numbers and words, drawn by hypothesis"),
    "metadata, any": (r"test_properties\.py::.*(good|any)", "any rows and bytes, drawn by hypothesis"),
    "numbers": (r"test_numbers\.py", "every numeric flag at, inside and beyond the ends of its range"),
    "flags": (r"test_bad_input\.py::test_bad_flag", "flags that are wrong, exclude each other or do not fit"),
    "base models": (
        r"test_base_checks\.py|test_quantization\.py::.*(missing|corrupt|poison|damaged|cache)|"
        r"test_bad_input\.py::.*(sdxl|names_must|base)",
        "configs, tokenizers and weights that are damaged, missing or do not fit each other",
    ),
    "pictures, captions, data sets": (
        r"test_data_checks\.py|test_bad_input\.py",
        "folders, pictures, metadata and data sets that cannot be used, and odd ones that can",
    ),
    "web page": (
        r"test_app\.py::.*(outside|refused|sent_paths|safe|wrong|whole|disk|mark|record|visitors|ended|nothing_else|bad_|"
        r"not_complete|sentences|made|seen|reason|clock|alone)|test_app_browser\.py::.*sentences",
        "paths outside, full disks, two visitors, killed trainers, closed tabs, process ids given anew, clocks set",
    ),
    "web page, trust": (
        r"test_app_trust\.py",
        "other names and web sites, files that are programs, the owner's login; here, on a network and on a Space",
    ),
    "web page, any": (
        r"test_attack\.py::.*(forms|record)",
        "records on the disk and forms through HTTP, drawn by hypothesis",
    ),
    "results, any": (r"test_attack\.py::.*result", "folders of results and their JSON, drawn by hypothesis"),
    "scales, any": (
        r"test_attack\.py::.*scales",
        "what files of scales say of themselves, and their tensors, drawn by hypothesis",
    ),
    "signals, any": (
        r"test_attack\.py::.*signals",
        "signals at random moments of every phase of a process, drawn by hypothesis",
    ),
    "evaluation": (
        r"test_evaluate\.py::.*(refused|is_said|bad_input|stay|cut|whole|nan|nothing)",
        "labels, results, encoders and bases that cannot be judged, and files of a user",
    ),
    "scales, caches, signals, cards": (
        r"test_faults\.py",
        "scales that lie, caches under other names, signals in every phase, names in cards, cases of other projects",
    ),
    "embeddings": (r"test_pipeline\.py::.*(not_fit|refused|cannot|another|something)", "what the pipeline loads"),
}


class Counter:
    """A pytest plugin that counts the collected tests by kind."""

    def __init__(self):
        self.counts = {kind: {"tests": 0, "cases": 0} for kind in KINDS}

    def pytest_collection_finish(self, session):
        for item in session.items:
            for kind, (pattern, _) in KINDS.items():
                if re.search(pattern, item.nodeid):
                    drawn = getattr(item.function, "_hypothesis_internal_use_settings", None)
                    if "test_attack" in item.nodeid:
                        drawn = SimpleNamespace(max_examples=attack.ROOMS[item.callspec.params["name"]].examples)
                    self.counts[kind]["tests"] += 1
                    self.counts[kind]["cases"] += drawn.max_examples if drawn else 1
                    break


def main():
    os.environ.pop("DAMAGES", None)
    os.chdir(REPO)
    counter = Counter()
    if pytest.main(["--collect-only", "-qq", "-n", "0", "-p", "no:cacheprovider", "tests"], plugins=[counter]):
        sys.exit("the tests cannot be collected")
    found = {kind: {**n, "what": KINDS[kind][1]} for kind, n in counter.counts.items() if n["tests"]}
    content = json.dumps(found, indent=2) + "\n"
    if "--check" not in sys.argv:
        RESULT.write_text(content, encoding="utf-8")
    elif not RESULT.is_file() or RESULT.read_text(encoding="utf-8") != content:
        sys.exit("docs/hardening.json is out of date: python tests/count_hardening.py, then benchmarks/make_tables.py")


if __name__ == "__main__":
    main()
