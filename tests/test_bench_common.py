"""What the measuring scripts share: provenance without one machine's paths, a hash of code, files that stay whole."""

import json
import re
import subprocess
import sys

import pytest
from conftest import REPO

from benchmarks import common, random_base
from benchmarks.tables.markdown import code_note
from personalization.models import base_model, families
from personalization.models.base_model import ModelSource, open_base


RESULTS = sorted(path for folder in ("benchmarks/results", "demo", "docs") for path in (REPO / folder).glob("*.json"))
RESULTS += sorted((REPO / "demo").glob("[bs]*/**/*.json"))  # the models, which keep where they were loaded from


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.relative_to(REPO).as_posix())
def test_results_name_no_path_of_one_machine(path):
    def commands(content):
        for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
            yield from commands(value)
        if isinstance(content, dict) and isinstance(content.get("command"), str):
            yield content["command"]

    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|work|root|tmp|mnt|Users)/", text)
    for command in commands(json.loads(text)):
        assert command == common.public(command)


@pytest.mark.parametrize(
    "said, shown",
    [
        (f"--output {REPO}/benchmarks/results/a.json", "--output benchmarks/results/a.json"),
        ("--output /tmp/some/a-b.json --n 2", "--output a-b.json --n 2"),
        ("--set x=/home/me/y", "--set x=y"),
        (f'\'{{"base": "{REPO}/benchmarks/.cache/sd15"}}\'', '\'{"base": "benchmarks/.cache/sd15"}\''),
        (f"{common.CACHE}/memory-abc_1/images ~/pictures", "TEMPORARY/images pictures"),
        ("--photos ../shared/dog a/b '<my-toy>' 1e-3", "--photos ../shared/dog a/b '<my-toy>' 1e-3"),
    ],
)
def test_paths_become_those_of_any_checkout(said, shown):
    assert common.public(said) == shown


def test_provenance_says_what_measured(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench_step.py", "--output", "/tmp/x.json"])
    found = common.provenance()
    assert found["command"] == "python benchmarks/bench_step.py --output x.json"
    assert found["commit"] == common.git("rev-parse", "HEAD") and found["changed"] in (True, False)
    assert found["versions"]["torch"] and 0 <= found["busy_before"] <= 1
    monkeypatch.setattr(common, "git", lambda *words: None)  # a copy without its history
    assert common.code() == {"commit": None, "changed": None}


@pytest.mark.parametrize(
    "flags, shown",
    [("sse amx_bf16 avx512_bf16", "A CPU (AMX)"), ("sse avx512_bf16", "A CPU (AVX512_BF16)"), ("sse", "A CPU")],
)
def test_a_processors_name_has_its_units_for_bfloat16(flags, shown, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert common.cpu_name(tmp_path / "cpuinfo") == shown
    assert common.cpu_name(tmp_path / "nothing") == common.platform.machine()


def test_a_busy_machine_is_said(monkeypatch, capsys):
    for share, said in ((0.19, False), (0.5, True)):
        monkeypatch.setattr(common, "busy_before", lambda share=share: share)
        common.warn_if_busy()
        assert ("50% of it" in capsys.readouterr().out) == said


def test_the_hash_is_of_code_and_of_what_it_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / "package").mkdir()
    files = {
        "script.py": "import os\nfrom package import one\n",
        "package/one.py": '"""Says."""\nfrom .two import x\n',
        "package/two.py": "x = 1\n",
        "package/three.py": "x = 1\n",
    }

    def write(name, text):
        (tmp_path / name).write_text(text)
        return common.source_hash("script.py")

    for name, text in files.items():
        first = write(name, text)
    assert write("package/one.py", '"""Says more."""\n\n\nfrom .two import x  # a comment\n') == first
    assert write("package/three.py", "x = 2\n") == first  # nobody imports it
    assert write("package/two.py", "x = 2\n") != first
    assert common.source_hash("script.py", without=["package/two"]) != common.source_hash("script.py")


def test_entries_replace_those_of_their_key(tmp_path):
    path = tmp_path / "result.json"
    common.put(path, [{"row": "b", "x": 1}, {"row": "a", "x": 1}], ["row"], unit="MB")
    common.put(path, [{"row": "b", "x": 2}], ["row"])
    assert common.read(path) == {"unit": "MB", "entries": [{"row": "a", "x": 1}, {"row": "b", "x": 2}]}


def test_a_table_says_which_code_measured_it():
    old, new, dirty = {}, {"commit": "a" * 40, "changed": False}, {"commit": "b" * 40, "changed": True}
    assert code_note([old, old]) == "" and code_note([new, new]) == f" Code: {'a' * 7}."
    words = f" Code: {'a' * 7}, {'b' * 7} with changes (1 of 3 from before commits were recorded)."
    assert code_note([old, new, dirty]) == words


def test_a_script_of_another_checkout_does_not_measure_this_one(tmp_path):
    for name in ("benchmarks", "personalization"):
        (tmp_path / name).mkdir()
    (tmp_path / "personalization" / "quiet.py").touch()
    script = tmp_path / "benchmarks" / "bench.py"
    script.write_text("from benchmarks import common\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1 and f"set PYTHONPATH={tmp_path}" in done.stderr


def test_threads_that_wait_sleep():
    code = "import os; import personalization.quiet; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "PASSIVE"


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "z_image"])
def test_a_random_base_is_one_of_its_kind(architecture, repo, tmp_path, monkeypatch):
    """The configs of each architecture, with few and narrow layers, make a base that opens as what it is."""
    shrink = {
        "unet": {"block_out_channels": [32, 32], "layers_per_block": 1, "norm_num_groups": 8},
        "transformer": {"dim": 64, "n_heads": 1, "n_kv_heads": 1, "n_layers": 1, "axes_dims": [16, 24, 24]},
        "vae": {"block_out_channels": [32, 32], "norm_num_groups": 8},
        "text_encoder": {"num_hidden_layers": 1, "vocab_size": 50_000},
        "text_encoder_2": {"num_hidden_layers": 1},
    }
    shrink["vae"] |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    blocks = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    shrink["unet"] |= blocks | {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    if architecture == "sdxl":
        shrink["unet"] |= {"attention_head_dim": [1, 1], "transformer_layers_per_block": [1, 1]}
    (tmp_path / "demo").symlink_to(repo / "demo")
    target = tmp_path / "benchmarks" / "configs" / architecture
    target.mkdir(parents=True)
    for path in (repo / "benchmarks" / "configs" / architecture).glob("*.json"):
        (target / path.name).write_text(json.dumps(json.loads(path.read_text()) | shrink.get(path.stem, {})))
    monkeypatch.setattr(random_base, "HERE", tmp_path / "benchmarks")
    folder = random_base.build(architecture, tmp_path / "made")
    base = open_base(ModelSource(str(folder)), accepted=families.FAMILIES.values())
    assert base.family.name == {"sd15": "sd1", "sdxl": "sdxl"}.get(architecture, architecture)
    widths = (json.loads(path.read_text())["hidden_size"] for path in target.glob("text_encoder*.json"))
    assert base.word_width == sum(widths)
    base_model.compute_empty(base)
    assert random_base.build(architecture, folder) == folder, "a complete one stays"
