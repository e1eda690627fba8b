"""Comparison of two checkouts on one machine, to the last bit: what they learn, and what they say of themselves.

    python tests/compare_checkouts.py /path/to/old /path/to/new [--only NAME] [--renames JSON]

Each case is a short command, run in both checkouts: by the same interpreter, in one thread, on the tiny bases of
tests/tiny_base.py. Compared are the tensors of all result files, pictures that were drawn, figures that are no times,
and the keys of every JSON file. The new checkout resumes some runs from the old one's checkpoint, too, and has to
arrive at what the old one did. Texts are compared line by line: `--help`, `--estimate_memory`, command lines of the
web page. Exit code 1: something differs. A checkout that somebody works in shows what is half done: give worktrees, or
what `git archive` unpacked.

A command is a fork of this process, so that PyTorch and its relatives are imported once and not a hundred times; of
the project nothing is imported here.
"""

import os


os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "119"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}

import argparse
import contextlib
import difflib
import fnmatch
import hashlib
import importlib.util
import io
import json
import random
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import accelerate  # noqa: F401, for the forks
import numpy as np
import peft  # noqa: F401, for the forks
import torch
from safetensors import safe_open
from tiny_base import build_pictures, build_tiny_base, build_tiny_xl_base


# ------------------------------------------------------------------------------------------------------------- cases

SCRIPTS = {
    "word": "train_zoodip_textual_inversion.py",
    "scales": "train_tuneqdm_dreambooth.py",
    "lora": "train_selective_dreambooth_lora.py",
    "evaluate": "evaluate_personalization.py",
    "app": "app.py",
}
STEPS, HALF = 10, 5  # updates of a run, and those before its first checkpoint
RUN = f"--max_train_steps {STEPS} --checkpointing_steps {HALF} --validation_steps 4 --logging_steps 1 --report_to none"
DRAW = "--validation_prompt 'a photo of {} on the beach' --num_validation_images 1 --num_inference_steps 2"
WORD = "--train_data_dir DATA --placeholder_token <my-toy> --initializer_token star --num_validation_samples 2"
OF_SCRIPT = {
    "word": f"{WORD} --save_steps 3 {RUN}",
    "scales": f"--instance_data_dir DATA --subject_name star {RUN}",
    "lora": f"--instance_data_dir DATA --subject_name star --output_kohya_format {RUN}",
}
# A window of SG in which directions are removed, and one that a checkpoint cuts.
ZO = "--sg_window 4 --sg_threshold 0.3 --perturbation_scale 1e-2"
GN = "--optimizer gauss_newton --gn_subspace_dimension 4"
GN8 = "--optimizer gauss_newton --gn_subspace_dimension 8"  # enough for a whole pass of calibration
LEFT = "--gn_subspace_steps 6"  # then all directions
OV = "--unet_backend openvino"
CLASS = "--num_class_images 2 --num_inference_steps 2"
BATCH = "--train_batch_size 2 --gradient_accumulation_steps 2 --lr_scheduler cosine"

# Name -> (script, base, flags). "+" in front of a name: the run is resumed, too.
RUNS = {
    "+zo rge": ("word", "sd", f"{ZO} {DRAW} --save_a1111"),
    "+zo spsa, accumulation": ("word", "sd", f"{ZO} --gradient_estimator spsa {BATCH}"),
    "zo one candidate a pass": ("word", "sd", f"{ZO} --max_candidates_per_forward 1"),
    "zo low_vram": ("word", "sd", f"{ZO} --low_vram"),
    "zo unquantized": ("word", "sd", f"{ZO} --quantization none"),
    "zo nf4": ("word", "sd", f"{ZO} --quantization nf4"),
    "zo bf16": ("word", "sd", f"{ZO} --mixed_precision bf16"),
    "+zo two vectors": ("word", "sd", f"{ZO} --num_vectors 2 --learnable_property style"),
    "+zo sdxl": ("word", "xl", f"{ZO} {DRAW}"),
    "zo sdxl, pool_at_eos": ("word", "xl", f"{ZO} --pool_at_eos --num_vectors 2"),
    "+gn": ("word", "sd", f"{GN} {LEFT} {DRAW}"),
    "+gn bf16": ("word", "sd", f"{GN} {LEFT} --mixed_precision bf16"),
    "gn no subspace": ("word", "sd", f"{GN} --gn_subspace none"),
    "gn prompt_words, two vectors": ("word", "sd", f"{GN} --gn_subspace prompt_words --num_vectors 2"),
    "gn recipe, accumulation": ("word", "sd", "--recipe fast --train_batch_size 2 --gradient_accumulation_steps 2"),
    "+gn sdxl": ("word", "xl", f"{GN} {LEFT}"),
    "+openvino zo": ("word", "sd", f"{ZO} {OV}"),
    "openvino gn bf16": ("word", "sd", f"{GN} {LEFT} {OV} --mixed_precision bf16"),
    "openvino gn sdxl": ("word", "xl", f"{GN} {OV}"),
    "openvino gn int8": ("word", "sd", f"{GN8} {OV} --openvino_precision int8"),
    "+scales peqa": ("scales", "sd", DRAW),
    "+scales s2, input scales": ("scales", "sd", f"--scale_sets 2 --train_input_scales {BATCH}"),
    "scales s1": ("scales", "sd", "--scale_intervals 0-100,500-900"),
    "scales int4": ("scales", "sd", "--bits 4 --calibration mse --gradient_checkpointing --save_half"),
    "+lora scaled": ("lora", "sd", f"--bp_progress_midpoint 0.6 {DRAW} {BATCH}"),
    "+lora window": ("lora", "sd", "--bp_view window --bp_timestep_midpoint 0.6"),
    "lora nf4": ("lora", "sd", "--quantization nf4 --rank 2 --gradient_checkpointing"),
    "lora prior": ("lora", "sd", f"--with_prior_preservation --class_data_dir CLASS --class_prompt star {CLASS}"),
}
ESTIMATES = {
    "sd": "",
    "sd low_vram": "--low_vram --max_candidates_per_forward 1",
    "sd unquantized, gn": f"--quantization none {GN} {DRAW}",
    "sd openvino": f"{OV} {GN}",
    "xl nf4": "--quantization nf4",
}
PAGE = """
try:
    from personalization.web import command_lines as page
except ModuleNotFoundError:
    from personalization import command_lines as page
for method in page.METHODS:
    for base in page.DEMO_BASE, "stable-diffusion-v1-5/stable-diffusion-v1-5":
        subject = "<my-dog>" if method == "word" else "sks dog"
        flags = page.default_flags(method, base)
        form = page.Form("dog", str(base), method, "dog", subject, "a {} on the beach", flags, "--seed 5")
        print(page.shown(page.training_command(form, "/pictures", "/out", "/cache")))
    print("others:", *sorted(page.METHODS[method].others), sep="\\n  ")
"""


# ---------------------------------------------------------------------------------------------------------- commands


class Checkout:
    """A checkout, and a folder for what its commands write.

    Args:
        name: "old" or "new".
        path: of the checkout.
        work: folder of the comparison.
        renames: pattern of case names -> {flag of the old checkout: its name in this one}.
    """

    def __init__(self, name, path, work, renames):
        self.name, self.path, self.work, self.folder, self.renames = name, path, work, work / name, renames

    def renamed(self, case, flag):
        for pattern, names in self.renames.items():
            if fnmatch.fnmatch(case, pattern) and flag in names:
                return names[flag]
        return flag

    def words(self, case, text):
        """A command line as words: folders in place, flags as this checkout calls them."""
        places = {"DATA": self.work / "pictures", "CLASS": self.folder / "class"}
        words = [str(places.get(word, word)) for word in shlex.split(text)]
        return [f"--{self.renamed(case, word[2:])}" if word.startswith("--") else word for word in words]

    def run(self, what, words=()):
        """Runs one of `SCRIPTS`, or other code, in a fork; returns (exit code, standard output, standard error)."""
        self.folder.mkdir(exist_ok=True)
        files = self.folder / "stdout", self.folder / "stderr"
        child = os.fork()
        if child == 0:
            code = 70
            try:
                for number, file in enumerate(files, start=1):
                    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
                os.chdir(self.path)
                sys.path[0] = str(self.path)
                random.seed()
                np.random.seed()
                sys.argv = [str(self.path / SCRIPTS.get(what, "code")), *words]
                if what in SCRIPTS:
                    runpy.run_path(sys.argv[0], run_name="__main__")
                else:
                    exec(what, {"__name__": "__main__"})
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, *(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def train(self, case, script, base, flags, out, resume=False):
        """Runs a trainer into a folder.

        Raises:
            Failed: it ended with another exit code than 0.
        """
        text = f"--pretrained_model_name_or_path {self.work / base} {OF_SCRIPT[script]} {flags}"
        text += f" --quantized_cache_dir {self.folder / 'cache'} --output_dir {out}"
        text += " --resume_from_checkpoint latest" if resume else ""
        code, _, said = self.run(script, self.words(case, text))
        if code:
            raise Failed(f"{self.name} ended with {code}: {(said.strip() or '?').splitlines()[-1]}")
        if resume and f"at step {HALF}" not in said:
            raise Failed(f"{self.name} did not resume from step {HALF}")
        return out

    def says(self, what, words=()):
        """Lines of standard output, without what only this checkout's place decides."""
        code, said, error = self.run(what, words)
        text = said if code == 0 else f"exit code {code}: {error.strip()}"
        for place, name in ((self.folder, "FOLDER"), (self.path, "CHECKOUT")):
            text = text.replace(str(place), name)
        return text.splitlines()


class Failed(Exception):
    """A command did not do what it should."""


# -------------------------------------------------------------------------------------------------------- differences


def tensors_of(path):
    """Name -> tensor or text of a result file."""
    if path.suffix == ".pt":  # of the Automatic1111 web UI
        return dict(torch.load(path, weights_only=True)["string_to_param"])
    with safe_open(path, framework="pt") as file:
        about = {f"metadata {name}": text for name, text in (file.metadata() or {}).items()}
        return about | {name: file.get_tensor(name) for name in file.keys()}


def difference(one, other):
    """What is different between two tensors, texts or numbers; "" if nothing is, to the last bit."""
    if not torch.is_tensor(one) or not torch.is_tensor(other):
        return "" if one == other else f"{str(one)[:80]} / {str(other)[:80]}"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {list(one.shape)} / {other.dtype} {list(other.shape)}"
    if torch.equal(*(tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (one, other))):
        return ""
    apart = (one.double() - other.double()).abs()
    return f"{int((one != other).sum())} of {one.numel()} numbers differ, by at most {apart.max():.2g}"


def of_both(one, other, compare=difference):
    """Lines about two dicts: keys that only one has, values that differ."""
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            yield f"{name}: only {'old' if name in one else 'new'} has it"
        elif found := compare(one[name], other[name]):
            yield f"{name}: {found}"


def files_of(out):
    """Result files of a run, by name: tensors and pictures; not the curve, whose fonts are matplotlib's affair."""
    paths = [path for pattern in ("*.safetensors", "*.pt", "samples/*", "validation/*") for path in out.glob(pattern)]
    return {path.relative_to(out).as_posix(): path for path in paths}


def compare_files(one, other):
    if one.suffix == ".png":
        return "" if one.read_bytes() == other.read_bytes() else "another picture"
    lines = list(of_both(tensors_of(one), tensors_of(other)))
    return "; ".join(lines[:2] + [f"and {len(lines) - 2} more"] * (len(lines) > 2))


def figures_of(out):
    """Figures of a run that are the same each time, and the sizes of what it loaded."""
    (path,) = out.glob("*_config.json")
    config = json.loads(path.read_text())
    figures = {name: value for name, value in config["figures"].items() if "second" not in name and "peak" not in name}
    return {f"figures.{name}": value for name, value in figures.items()} | {"components": config["components"]}


KEYS = set()  # lines of the diffs of all runs: the same keys differ in many


def keys_of(out):
    """File and path of every key in the JSON files of a run, sorted."""

    def walk(value, path):
        if isinstance(value, dict):
            for name, inner in value.items():
                yield f"{path}.{name}"
                yield from walk(inner, f"{path}.{name}")

    paths = [path for pattern in ("*.json", "checkpoint-*/*.json") for path in out.glob(pattern)]
    keys = {key for path in paths for key in walk(json.loads(path.read_text()), path.relative_to(out).as_posix())}
    return sorted({re.sub(r"^checkpoint-\d+", "checkpoint-N", key) for key in keys})


def compare_results(old, new, whole=True):
    """Lines about what differs between two runs' folders, keys apart; `whole=False`: new has later files only."""
    files, others = files_of(old), files_of(new)
    if not whole:
        files = {name: path for name, path in files.items() if name in others}
    yield from of_both(files, others, compare_files)
    yield from of_both(figures_of(old), figures_of(new))


def compare_lines(old, new):
    """The lines that differ, as a diff without context."""
    return [line for line in difflib.unified_diff(old, new, "old", "new", lineterm="", n=0) if line[:2] != "@@"][2:]


# -------------------------------------------------------------------------------------------------------------- cases


def hand_over(checkpointed, out, case, new):
    """Copies a run's folder as it was at its first checkpoint, whose settings get the names of the new checkout."""
    shutil.copytree(checkpointed, out)
    for path in files_of(out).values():
        path.unlink()
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    folder = out / f"checkpoint-{HALF}"
    settings, manifest = (json.loads((folder / name).read_text()) for name in ("settings.json", "manifest.json"))
    content = json.dumps({new.renamed(case, name): value for name, value in settings.items()}).encode()
    (folder / "settings.json").write_bytes(content)
    manifest["files"]["settings.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def compare_runs(case, old, new):
    """Lines about what differs in one of `RUNS`, and in going on from the old checkout's checkpoint."""
    what, name = RUNS[case], re.sub(r"\W+", "-", case)
    outs = [checkout.train(case, *what, checkout.folder / name) for checkout in (old, new)]
    yield from compare_results(*outs)
    if keys := compare_lines(*map(keys_of, outs)):
        KEYS.update(keys)
        yield f"{len(keys)} keys of JSON files differ: see the end"
    if case.startswith("+"):
        resumed = new.folder / f"{name}-resumed"
        hand_over(outs[0], resumed, case, new)
        new.train(case, *what, resumed, resume=True)
        yield from (f"resumed: {line}" for line in compare_results(outs[0], resumed, whole=False))


def compare_estimates(case, old, new):
    """Lines about `--estimate_memory` on the old checkout's demo bases, the size of the process itself left out."""
    base = old.path / "demo" / ("base_xl" if case.startswith("xl") else "base")
    text = f"--pretrained_model_name_or_path {base} {WORD} {ESTIMATES[case]} --estimate_memory"
    said = [checkout.says("word", checkout.words(case, text)) for checkout in (old, new)]
    tables = [[(line, int(line.split()[-2])) if line.endswith(" MB") else (line, 0) for line in part] for part in said]
    libraries = [next((size for line, size in table if "libraries" in line), 0) for table in tables]
    for i, ((one, size), (other, other_size)) in enumerate(zip(*tables)):
        with_libraries = re.match(" *(libraries|while|peak)", one) is not None
        growth = (libraries[1] - libraries[0]) * with_libraries
        if (
            re.sub(r"\d+", "#", one) == re.sub(r"\d+", "#", other)
            and abs(size + growth - other_size) <= with_libraries
        ):
            said[1][i] = one  # the same but for rounding
    return compare_lines(*said)


def all_cases():
    """Name -> function of (old, new) that yields lines about differences."""
    for script in SCRIPTS:
        yield f"help {script}", lambda *two, s=script: compare_lines(*(c.says(s, ["--help"]) for c in two))
    yield "page", lambda *two: compare_lines(*(c.says(PAGE) for c in two))
    for case in ESTIMATES:
        yield f"memory {case}", lambda *two, c=case: compare_estimates(c, *two)
    for case in RUNS:
        yield case.removeprefix("+"), lambda *two, c=case: compare_runs(c, *two)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", action="append", help="Part of the names of the cases to run; may be repeated.")
    parser.add_argument(
        "--renames",
        type=json.loads,
        default={},
        help='Flags that are called otherwise in the new checkout, by pattern of case names: \'{"*": {"subspace":'
        ' "gn_subspace"}}\'. Texts and keys are compared as they are, so that they show.',
    )
    parser.add_argument("--keep", action="store_true", help="Keep the folder of results.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work, differ, started = Path(tempfile.mkdtemp(prefix="compare-")), [], time.perf_counter()
    os.environ["HF_HOME"] = str(work / "home")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        build_tiny_base(work / "sd")
        build_tiny_xl_base(work / "xl")
    build_pictures(work / "pictures")
    old = Checkout("old", args.old.resolve(), work, {})
    new = Checkout("new", args.new.resolve(), work, args.renames)
    for name, compare in all_cases():
        if args.only and not any(part in name for part in args.only):
            continue
        if name.startswith("openvino") and not importlib.util.find_spec("openvino"):
            print(f"SKIP {name}: openvino is not installed", flush=True)
            continue
        begun, lines = time.perf_counter(), []
        try:
            for line in compare(old, new):
                lines.append(line)
        except Failed as failure:
            lines.append(str(failure))
        differ += [name] * bool(lines)
        print(f"{'DIFF' if lines else 'OK  '} {name} ({time.perf_counter() - begun:.0f} s)", flush=True)
        print("".join(f"       {line}\n" for line in lines), end="", flush=True)
    if args.keep:
        print(f"Results are in {work}")
    else:
        shutil.rmtree(work)
    print("".join(f"key {line}\n" for line in sorted(KEYS)), end="")
    print(f"{len(differ)} cases differ ({time.perf_counter() - started:.0f} s)")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
