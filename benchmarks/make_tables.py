"""Fills the tables of the README from the stored results, so that no figure is typed by hand.

    python benchmarks/make_tables.py            # or --check: exit 1 where the README is out of date

Between `<!-- BEGIN name -->` and `<!-- END name -->` stands what `name` makes of its JSON file; a missing file leaves
the sentence that it has not been measured.
"""

import argparse
import json
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def table(header, rows):
    """A markdown table of strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def demo_scores(result):
    """docs/demo_scores.json, as `demo/run_demo.py` writes it."""
    names = ("CLIP-I", "identity", "CLIP-T")
    rows = []
    for subject, scores in result["scores"].items():
        pairs = [f"{scores['before'][n]:.3f} → {scores['after'][n]:.3f}" for n in names]
        rows.append([subject.replace("_", " "), *pairs, f"{scores['training']['seconds']:.0f} s"])
    means = {
        when: {n: sum(s[when][n] for s in result["scores"].values()) / len(rows) for n in names}
        for when in ("before", "after")
    }
    rows.append(["**mean**", *(f"**{means['before'][n]:.3f} → {means['after'][n]:.3f}**" for n in names), ""])
    settings = ", ".join(f"`{flag} {value}`" for flag, value in result["settings"].items())
    note = (
        f"`make demo` on {result['hardware']['cpus']} CPU cores: {result['training_seconds']:.0f} s of training for"
        f" all subjects ({result['hardware']['jobs']} at a time, one thread each), {result['total_seconds']:.0f} s"
        f" in all; torch {result['versions']['torch']}. INT8 UNet and text encoder. Flags: {settings}. CLIP-I and"
        " identity: mean cosine of (reference, generated) pairs; CLIP-T: prompt against image; all by `demo/scorer`."
    )
    return table(["subject", *(f"{n}, before → after" for n in names), "training"], rows) + "\n\n" + note


def demo_quality(result):
    """demo/quality.json, as `demo/check_demo_base.py` writes it."""
    names = {
        "vae.psnr_db": "VAE: PSNR on 512 fresh renders, dB",
        "scorer.shape": "scorer: shape read right on fresh renders",
        "scorer.colour": "scorer: whole set of colours read right",
        "scorer.background": "scorer: background read right",
        "generated.background": "generated from fresh captions: background read back",
        "generated.shape": "generated: shape read back",
        "generated.colour": "generated: whole set of colours read back",
    }
    rows = []
    for key, target in result["targets"].items():
        shown = (f"{target[k]:.1f}" if "psnr" in key else f"{target[k]:.1%}" for k in ("at_least", "measured"))
        rows.append([names.get(key, key), *shown, "met" if target["met"] else "**missed**"])
    note = f"By `{result['command']}` on {result['hardware']}, {result['seconds']:.0f} s."
    return table(["figure", "to reach", "measured", ""], rows) + "\n\n" + note


def real_photos(result):
    """benchmarks/results/real_photos.json, as `benchmarks/bench_real_photos.py` writes it."""
    rows = []
    for quantization, run in result["runs"].items():
        figures, unet = run["figures"], run["components"]["unet"]
        rows.append(
            [
                f"`{quantization}`",
                f"{unet['bytes'] / 1e6:.0f} MB ({unet['quantized_share']:.1%} quantized)",
                f"{run['components']['text_encoder']['bytes'] / 1e6:.0f} MB",
                f"{figures['seconds'] / figures['steps']:.1f} s",
                f"{figures['peak_memory']['process_mb']} MB",
            ]
        )
    header = ["quantization", "UNet", "text encoder", "time per step", "peak memory of the process"]
    versions = next(iter(result["runs"].values()))["versions"]
    note = (
        f"{result['architecture']}, {result['resolution']} px, photos of `{result['photos']}`, float32 activations;"
        f" {result['cpu_count']} cores of {result['cpu']}, torch {versions['torch']}, diffusers"
        f" {versions['diffusers']}. A process that only imports the libraries peaks at {result['bare_import_mb']} MB;"
        " the peak counts memory-mapped weight files, too. Reproduce with `make bench-real-photos`."
    )
    return table(header, rows) + "\n\n" + note


TABLES = {
    "demo_scores": ("docs/demo_scores.json", demo_scores),
    "demo_quality": ("demo/quality.json", demo_quality),
    "real_photos": ("benchmarks/results/real_photos.json", real_photos),
}


def fill(text):
    """The README's text with every marked block made anew."""
    for name, (path, make) in TABLES.items():
        file = ROOT / path
        content = make(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else "Not measured yet."
        block = f"<!-- BEGIN {name} -->\n{content}\n<!-- END {name} -->"
        text, count = re.subn(rf"<!-- BEGIN {name} -->.*?<!-- END {name} -->", lambda _, b=block: b, text, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md has {count} blocks named {name}, and needs one")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Change nothing; exit 1 where the README is out of date.")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = fill(before)
    if args.check:
        sys.exit(before != after)
    readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
