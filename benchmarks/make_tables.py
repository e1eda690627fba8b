"""Fills the tables of the pages (`PAGES`) from the stored results, so that no figure is typed by hand.

    python benchmarks/make_tables.py            # or --check: exit 1 where a page is out of date

Between `<!-- BEGIN name -->` and `<!-- END name -->` stands what `name` makes of its JSON file; a missing file leaves
the sentence that it has not been measured.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.tables import (
    demo,
    field,
    frontier,
    hardening,
    memory,
    methods,
    selective,
    signal,
    speed,
    targets,
    tuneqdm,
)


ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
ABLATIONS = "sg_puts tau_nu sampling rge_spsa mu n precision timesteps gauss_newton ideas".split()
METHODS = ("methods", "methods_eps", "methods_gradient_rates_eps", "methods_pilots_eps")
OF_ABLATIONS = [f"ablation_{name}{ending}" for name in ABLATIONS for ending in ("", "_eps")]
TABLES = {
    "evidence": (signal.evidence, f"{RESULTS}/signal.json"),
    "tangents": (signal.tangents, f"{RESULTS}/signal_tangents.json"),
    "demo_scores": (demo.demo_scores, "docs/demo_scores.json"),
    "demo_scores_xl": (demo.demo_scores, "docs/demo_scores_xl.json"),
    "demo_quality": (demo.demo_quality, "demo/quality.json"),
    "demo_quality_eps": (demo.demo_quality, "demo/quality_eps.json"),
    "demo_quality_xl": (demo.demo_quality, "demo/quality_xl.json"),
    "demo_quality_flow": (demo.demo_quality, "demo/quality_flow.json"),
    "demo_scores_flow": (demo.demo_scores, "docs/demo_scores_flow.json"),
    "signal": (signal.signal, f"{RESULTS}/signal.json"),
    "hardening": (hardening.hardening, "docs/hardening.json"),
    "signal_float32": (signal.signal, f"{RESULTS}/signal_float32.json"),
    "signal_eps": (signal.signal, f"{RESULTS}/signal_eps.json"),
    "evidence_eps": (signal.evidence, f"{RESULTS}/signal_eps.json"),
    "tangents_eps": (signal.tangents, f"{RESULTS}/signal_eps.json"),
    **{name: (methods.methods, f"{RESULTS}/{name}.json") for name in METHODS},
    **{name: (methods.ablation, f"{RESULTS}/{name}.json") for name in OF_ABLATIONS},
    "quality": (demo.quality, f"{RESULTS}/quality.json"),
    "step": (speed.step, f"{RESULTS}/step_cpu.json"),
    "step_compiled": (speed.step, f"{RESULTS}/step_compiled.json"),
    "step_gauss_newton": (speed.step_gauss_newton, f"{RESULTS}/step_gauss_newton.json"),
    "scaling": (speed.scaling, f"{RESULTS}/step_cpu.json", f"{RESULTS}/memory_cpu.json"),
    "processes": (speed.processes, f"{RESULTS}/step_cpu.json"),
    "heap": (frontier.heap, f"{RESULTS}/frontier_amx_heap.json", f"{RESULTS}/frontier_amx.json"),
    "memory": (memory.memory, f"{RESULTS}/memory_cpu.json"),
    "families_memory": (memory.families_memory, f"{RESULTS}/memory_cpu.json"),
    "families_step": (speed.families_step, f"{RESULTS}/step_cpu.json"),
    "tuneqdm_memory": (tuneqdm.tuneqdm_memory, f"{RESULTS}/tuneqdm_memory.json"),
    "tuneqdm_rates": (tuneqdm.tuneqdm_quality, f"{RESULTS}/tuneqdm_learning_rate.json"),
    "tuneqdm_quality": (tuneqdm.tuneqdm_quality, f"{RESULTS}/tuneqdm_quality.json"),
    "selective_memory": (selective.selective_memory, f"{RESULTS}/selective_memory.json"),
    "selective_quality": (selective.selective_quality, f"{RESULTS}/selective_quality.json"),
    "selective_pilots": (selective.selective_pilots, f"{RESULTS}/selective_pilots.json"),
    "selective_gradients": (selective.selective_gradients, f"{RESULTS}/selective_gradients.json"),
    "selective_windows": (selective.selective_windows, f"{RESULTS}/selective_gradients.json"),
    "field": (
        field.field,
        *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(f"{RESULTS}/field/*.json"))),
    ),
    **{
        block: (frontier.frontier, f"{RESULTS}/{name}.json", f"{RESULTS}/methods_eps.json")
        for block, name in {"frontier": "frontier_cpu", "frontier_amx": "frontier_amx"}.items()
    },
    "loading": (memory.loading, f"{RESULTS}/memory_cpu.json"),
    "method_targets": (
        targets.method_targets,
        f"{RESULTS}/methods.json",
        f"{RESULTS}/tuneqdm_memory.json",
        f"{RESULTS}/selective_memory.json",
        f"{RESULTS}/selective_quality.json",
        f"{RESULTS}/step_projection.json",
        f"{RESULTS}/methods_eps.json",
    ),
    "targets": (
        targets.targets,
        f"{RESULTS}/step_cpu.json",
        f"{RESULTS}/memory_cpu.json",
        f"{RESULTS}/signal.json",
        f"{RESULTS}/quality.json",
    ),
}
PAGES = ["README.md", *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))]


def fill(text):
    """A page's text with every marked block made anew."""

    def block(match):
        name = match[1]
        make, *paths = TABLES[name]
        files = [ROOT / path for path in paths]
        if all(file.is_file() for file in files):
            content = make(*(json.loads(file.read_text(encoding="utf-8")) for file in files))
        else:
            content = "Not measured yet."
        return f"<!-- BEGIN {name} -->\n{content}\n<!-- END {name} -->"

    return re.sub(r"<!-- BEGIN (\w+) -->.*?<!-- END \1 -->", block, text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Change nothing; exit 1 where a page is out of date.")
    args = parser.parse_args()
    pages = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    unused = [name for name in TABLES if not any(f"<!-- BEGIN {name} -->" in text for text in pages.values())]
    if unused:
        raise SystemExit(f"no page has a block named {', '.join(unused)}")
    for page, text in pages.items():
        if args.check and fill(text) != text:
            sys.exit(f"{page} is out of date: run python benchmarks/make_tables.py")
        if not args.check:
            (ROOT / page).write_text(fill(text), encoding="utf-8")


if __name__ == "__main__":
    main()
