"""The folder of a run: one run at a time, nothing of another run lost or taken over, damaged and full disks."""

import errno
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from conftest import SCRIPT, as_arguments
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import train_zoodip_textual_inversion as zoodip
from personalization import errors
from personalization.data import examples
from personalization.errors import DivergedError, InputError, RunError
from personalization.files import sha256, write_json
from personalization.runs import checkpoints, launch, run_folder


QUIET = {"num_validation_samples": 0, "quantization": "none"}
PICTURES = {"validation_prompt": "a {}", "num_validation_images": 1, "num_inference_steps": 1}


@pytest.fixture
def warnings(caplog):
    """The warnings so far, as one text."""
    caplog.set_level(logging.WARNING)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def config_of(folder):
    return json.loads((folder / "zoodip_config.json").read_text())


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# =====================================================================================================
# Whose files
# =====================================================================================================


FIRST = {"max_train_steps": 2, "checkpointing_steps": 100, "save_a1111": True, "push_reference_images": True}
FIRST |= {"quantization": "none", "num_validation_samples": 2, **PICTURES}


def test_a_second_concept_takes_nothing_over_and_loses_nothing(train):
    out = train(**FIRST, num_vectors=2)
    first = contents(out)
    (out / "samples" / "mine.png").write_bytes(b"the user's own")
    train(**QUIET, max_train_steps=1, checkpointing_steps=100, placeholder_token="<other>")
    second = config_of(out)
    assert set(second["files"]) == {"learned_embeds.safetensors", "other.safetensors", "loss_curve.png"}
    assert "samples" not in (out / "README.md").read_text() and "-best" not in (out / "README.md").read_text()
    kept = contents(out / "earlier-1")
    assert kept.pop("samples/mine.png") == b"the user's own"
    assert {name: first[name] for name in kept} == kept
    assert set(kept) == {"zoodip_config.json", "README.md", *config_of(out / "earlier-1")["files"]} | {
        name for name in first if name.startswith("validation/")
    }
    names = run_folder.own_files(out / "earlier-1", zoodip.PUBLICATION.files, config_of(out / "earlier-1")["files"])
    assert "learned_embeds-best.safetensors" in names and "samples/image_0.png" in names


def test_a_second_run_that_breaks_off_leaves_the_first_as_it_was(train, monkeypatch):
    out = train(**FIRST)
    first = contents(out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zoodip, "check_finite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(**FIRST | {"placeholder_token": "<other>"})
    best = "learned_embeds-best.safetensors"
    assert "<other>" in load_file(out / best) and "<my-toy>" in load_file(out / "earlier-1" / best)
    after = contents(out)
    moved = {name.removeprefix("earlier-1/") for name in after if name.startswith("earlier-1/")}
    assert all(after[name] == content for name, content in first.items() if name not in moved)
    recorded = config_of(out)["files"]
    assert best not in run_folder.own_files(out, zoodip.PUBLICATION.files, recorded)  # the other run's
    train(**QUIET, max_train_steps=1, placeholder_token="<third>")
    assert (out / "earlier-2").is_dir() and "<my-toy>" in load_file(out / "earlier-2" / "learned_embeds.safetensors")


def test_a_resumed_run_owns_what_it_wrote_before(train):
    flags = FIRST | {"checkpointing_steps": 1}
    out = train(**flags)
    first = config_of(out)
    (out / "learned_embeds-best.safetensors").unlink()
    train(**flags | {"max_train_steps": 3}, resume_from_checkpoint="latest")
    second = config_of(out)
    assert second["run"] == first["run"] and set(first["files"]) == set(second["files"])
    assert not (out / "earlier-1").exists()
    for name, digest in second["files"].items():
        assert sha256(out / name) == digest


def test_a_linked_folder_is_not_written_into(train, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir(), out.mkdir()
    (outside / "image_0.png").write_bytes(b"private")
    (out / "samples").symlink_to(outside)
    (out / "learned_embeds.safetensors").symlink_to(outside / "image_0.png")
    train(**QUIET, **PICTURES, max_train_steps=1)
    assert contents(outside) == {"image_0.png": b"private"}
    assert (out / "samples" / "image_0.png").is_file() and not (out / "samples").is_symlink()


def test_files_have_the_usual_mode(train):
    out = train(**FIRST | {"max_train_steps": 1})
    (out / "plain").write_text("")
    usual = stat.S_IMODE((out / "plain").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.rglob("*") if p.is_file() and p.name != ".lock"} == {usual}


# =====================================================================================================
# One run at a time
# =====================================================================================================


def test_a_second_run_in_the_folder_is_refused_before_it_writes(train, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with run_folder.occupied(out):
        before = contents(out)
        with pytest.raises(InputError, match="is in use by another run: wait"):
            train(**QUIET)
        with pytest.raises(InputError, match="finds no zoodip_config"):
            zoodip.main(zoodip.parse_args(["--push_only", "--output_dir", str(out)]))
        assert contents(out) == before
    train(**QUIET, max_train_steps=1)


def test_a_killed_run_frees_the_folder_and_its_leftovers_go(basics, tmp_path, train):
    out = tmp_path / "out"
    code = "import sys, time; from personalization.runs.run_folder import occupied\n"
    code += f"with occupied({str(out)!r}): print('in', flush=True); time.sleep(60)"
    out.mkdir()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parent)
    assert process.stdout.readline() == "in\n"
    with pytest.raises(InputError, match="in use by another run"), run_folder.occupied(out):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in (".tmp-layers-abc", ".tmp-checkpoint-4", ".tmp-77-pipeline"):
        (out / folder).mkdir()
        (out / folder / "weights").write_bytes(b"x")
    (out / "samples").mkdir()
    for file in (".tmp-77-learned_embeds.safetensors", "samples/.tmp-77-image_0.png"):
        (out / file).write_bytes(b"half")
    # A cache that another run may be filling, a user's folder, a probe that may be another process's.
    kept = {".tmp-77-unet-int8-float32-abc", ".tmp-mine", ".tmp-77-probe_ab"}
    for name in (*kept, ".tmp-77-probe_cd"):
        (out / name).mkdir()
    os.utime(out / ".tmp-77-probe_cd", (1e9, 1e9))
    train(**QUIET, max_train_steps=1)
    assert {path.relative_to(out).as_posix() for path in out.rglob(".tmp-*")} == kept


def test_two_runs_at_once_one_is_refused(basics, tmp_path):
    flags = {**basics, "--quantization": "none", "--num_validation_samples": 0, "--max_train_steps": 150}
    command = [sys.executable, str(SCRIPT), *as_arguments(flags)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen(command, **streams) for _ in range(2)]
    texts = [process.communicate(timeout=300)[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2]
    refused = texts[[process.returncode for process in pair].index(2)]
    assert "is in use by another run" in refused and "Traceback" not in "".join(texts)


def test_estimate_memory_writes_nothing(train, tmp_path, capsys):
    train(estimate_memory=True)
    assert "Predicted peak" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_folders_that_cannot_be_meant(train, tmp_path):
    for name in ("", " "):
        with pytest.raises(InputError, match="--output_dir '.*' names no folder"):
            train(output_dir=name)
    for name in ("../logs", str(tmp_path / "logs")):
        with pytest.raises(InputError, match="--logging_dir .* is outside --output_dir"):
            train(logging_dir=name)


# =====================================================================================================
# Checkpoints
# =====================================================================================================


STEPS = {**QUIET, "max_train_steps": 3, "checkpointing_steps": 1}


@pytest.fixture(scope="module")
def trained(demo_base, subject, tmp_path_factory):
    """A folder with checkpoints 1 to 3, to be copied."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = {"--pretrained_model_name_or_path": demo_base, "--train_data_dir": subject, "--report_to": "none"}
    flags |= {"--placeholder_token": "<my-toy>", "--initializer_token": "star", "--output_dir": out}
    flags |= {f"--{name}": value for name, value in STEPS.items()}
    zoodip.main(zoodip.parse_args(as_arguments(flags)))
    return out


@pytest.fixture
def out(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "out"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


PARTS = ("state.pt", "generators_0.pt", "settings.json", "manifest.json")
DAMAGES = {
    **{f"empty {n}": (lambda c, n=n: (c / n).write_bytes(b"")) for n in PARTS},
    **{f"cut {n}": (lambda c, n=n: cut(c / n)) for n in PARTS},
    **{f"flip in {n}": (lambda c, n=n: flip(c / n)) for n in PARTS[:3]},
    **{f"no {n}": (lambda c, n=n: (c / n).unlink()) for n in PARTS},
    "empty folder": lambda c: [path.unlink() for path in c.iterdir()],
    "manifest a list": lambda c: (c / "manifest.json").write_text("[]"),
    "files a number": lambda c: (c / "manifest.json").write_text('{"files": 3}'),
    "settings a list": lambda c: (c / "settings.json").write_text("[]"),
    "settings other JSON": lambda c: (c / "settings.json").write_text('{"number of processes": "two"}'),
    "swapped with another": lambda c: shutil.copy(c.parent / "checkpoint-1" / "state.pt", c / "state.pt"),
    "a folder for a file": lambda c: ((c / "state.pt").unlink(), (c / "state.pt").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(out, warnings, damage):
    settings = checkpoints.check(out / "checkpoint-3").settings
    DAMAGES[damage](out / "checkpoint-3")
    found = checkpoints.find_checkpoint("latest", out, settings)
    assert found.path.name == "checkpoint-2" and "checkpoint-3 is damaged (" in warnings()
    with pytest.raises(InputError, match="checkpoint-3' is damaged .*: give another checkpoint, or latest") as caught:
        checkpoints.find_checkpoint(str(out / "checkpoint-3"), out, settings)
    assert "\n" not in str(caught.value)


def test_a_part_of_another_process_counts(out):
    path = out / "checkpoint-3"
    write_json(path / "settings.json", checkpoints.check(path).settings | {"number of processes": 2})
    manifest = json.loads((path / "manifest.json").read_text())
    facts = {"size": (path / "settings.json").stat().st_size, "sha256": sha256(path / "settings.json")}
    manifest["files"]["settings.json"] = facts
    write_json(path / "manifest.json", manifest)
    with pytest.raises(checkpoints.DamagedError, match="manifest.json does not know generators_1.pt"):
        checkpoints.check(path)


def test_resume_after_damage_gives_the_same_embedding(out, train):
    whole = (out / "learned_embeds.safetensors").read_bytes()
    cut(out / "checkpoint-3" / "state.pt")
    (out / "learned_embeds.safetensors").unlink()
    train(**STEPS, resume_from_checkpoint="latest")
    assert (out / "learned_embeds.safetensors").read_bytes() == whole
    checkpoints.check(out / "checkpoint-3")


def test_nothing_but_damaged_checkpoints_starts_from_step_0(out, warnings, train):
    for path in checkpoints.list_checkpoints(out):
        (path / "state.pt").write_bytes(b"")
    train(**STEPS, resume_from_checkpoint="latest")
    assert "starting from step 0" in warnings() and config_of(out)["figures"]["steps"] == 3


def test_rotation_deletes_only_this_runs(out, train):
    first = {path.name: checkpoints.owner_of(path) for path in checkpoints.list_checkpoints(out)}
    train(**STEPS | {"max_train_steps": 2}, learning_rate=1e-3, checkpoints_total_limit=1)
    owners = {}
    for path in checkpoints.list_checkpoints(out):
        checkpoints.check(path)
        owners.setdefault(checkpoints.owner_of(path), []).append(checkpoints.step_of(path))
    run = config_of(out)["run"]
    assert owners == {first["checkpoint-1"]: [1, 2, 3], run: [2]}


def test_latest_takes_the_newest_that_fits(out, train, warnings):
    train(**STEPS | {"max_train_steps": 2}, learning_rate=1e-3)
    train(**STEPS | {"max_train_steps": 3}, learning_rate=1e-3, resume_from_checkpoint="latest")
    assert "belongs to other settings, learning_rate (0.005, now 0.001)" in warnings()
    assert config_of(out)["figures"]["steps"] == 3 and config_of(out)["settings"]["learning_rate"] == 1e-3
    with pytest.raises(InputError, match=r"other settings: learning_rate \(0.001, now 0.5\)"):
        train(**STEPS, learning_rate=0.5, resume_from_checkpoint="latest")


def test_going_back_to_an_older_checkpoint_does_not_delete_what_it_writes(out, train):
    train(**STEPS | {"max_train_steps": 2}, resume_from_checkpoint="checkpoint-1", checkpoints_total_limit=1)
    assert [path.name for path in checkpoints.list_checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("schedule, refused", [("cosine", True), ("linear", True), ("constant_with_warmup", False)])
def test_another_length_is_another_run_where_the_schedule_depends_on_it(train, schedule, refused):
    train(**STEPS | {"max_train_steps": 2}, lr_scheduler=schedule)
    if refused:
        with pytest.raises(InputError, match=r"other settings: max_train_steps \(2, now 3\)"):
            train(**STEPS, lr_scheduler=schedule, resume_from_checkpoint="latest")
    else:
        train(**STEPS, lr_scheduler=schedule, resume_from_checkpoint="latest")


@pytest.mark.parametrize("steps", [3, 2])
def test_nothing_left_to_train_is_said_and_results_are_written(out, train, warnings, steps):
    whole = (out / "learned_embeds.safetensors").read_bytes()
    for name in ("learned_embeds.safetensors", "zoodip_config.json", "README.md", "loss_curve.png"):
        (out / name).unlink()
    train(**STEPS | {"max_train_steps": steps}, **PICTURES, resume_from_checkpoint="latest")
    assert f"is at step 3 of --max_train_steps {steps}: nothing is left to train" in warnings()
    assert (out / "learned_embeds.safetensors").read_bytes() == whole
    assert "samples/image_0.png" in config_of(out)["files"] and (out / "loss_curve.png").is_file()


# =====================================================================================================
# Disk full, and other failures of the world outside
# =====================================================================================================


def test_a_full_disk_costs_no_training(train, monkeypatch, warnings):
    """Checkpoints, pictures, embeddings on the way and the tracker fail; the result is as without them."""
    flags = {**PICTURES, "max_train_steps": 4, "checkpointing_steps": 2, "save_steps": 2, "validation_steps": 1}
    flags |= {"quantization": "none", "num_validation_samples": 2, "report_to": "tensorboard", "logging_steps": 1}
    whole = load_file(train(**flags, output_dir=train.folder / "whole") / "learned_embeds.safetensors")
    replace = os.replace

    def only_the_result(source, target):
        return replace(source, target) if Path(target).name == "learned_embeds.safetensors" else full()

    with monkeypatch.context() as patch, pytest.raises(RunError, match="learned_embeds.safetensors is safe, but") as e:
        patch.setattr(os, "replace", only_the_result)
        patch.setattr(TensorBoardTracker, "log", full)
        train(**flags)
    out = train.folder / "out"
    assert "No space left on device" in str(e.value) and "\n" not in str(e.value) and e.value.exit_code == 1
    assert torch.equal(load_file(out / "learned_embeds.safetensors")["<my-toy>"], whole["<my-toy>"])
    for what in ("checkpoint-2 is not complete", "validation images failed", "steps-2.safetensors failed", "tracker"):
        assert what in warnings(), what
    assert warnings().count("The tracker failed") == 1
    train(**flags)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_really_full_disk(basics, run_script, tmp_path):
    """A file system of 200 kB, with every kind of file: one sentence, what was learned is in the temporary folder."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir(), elsewhere.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        (out / "filler").write_bytes(b"x" * 150_000)
        flags = basics | {"--max_train_steps": 8, "--checkpointing_steps": 1, "--logging_steps": 1, "--save_steps": 1}
        flags |= {"--report_to": "tensorboard", "--quantization": "none", "--num_validation_samples": 0}
        flags |= {"--validation_prompt": "a {}", "--validation_steps": 1, "--num_inference_steps": 1}
        done = run_script(*as_arguments(flags), expect=1, env={"TMPDIR": str(elsewhere)})
        said = done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr and "No space left on device" in said, done.stderr
        assert list(elsewhere.glob("learned-*/learned_embeds.safetensors")) or "is safe, but" in said
    finally:
        subprocess.run(["umount", out], check=True)


def test_an_embedding_that_cannot_be_written_goes_elsewhere(train, monkeypatch, tmp_path):
    first = load_file(train(**QUIET, max_train_steps=1) / "learned_embeds.safetensors")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="could not be written .No space left on device.: what was learned is in") as e:
        train(**QUIET, max_train_steps=1, learning_rate=0.1)
    (saved,) = tmp_path.glob("learned-*/learned_embeds.safetensors")
    assert str(saved) in str(e.value) and not torch.equal(load_file(saved)["<my-toy>"], first["<my-toy>"])
    assert torch.equal(load_file(tmp_path / "out" / "learned_embeds.safetensors")["<my-toy>"], first["<my-toy>"])


def test_the_embedding_is_there_before_everything_else(train, monkeypatch):
    """A fault of the program itself in the last picture, or in the card, no longer costs the run."""
    draw, out = zoodip.draw_samples, train.folder / "out"

    def at_the_end(run):
        return draw(run) if run.progress.step < 2 else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(zoodip, "draw_samples", at_the_end)
        train(**QUIET, **PICTURES, max_train_steps=2)
    assert (out / "learned_embeds.safetensors").is_file()


def test_a_full_pipeline_of_a_base_with_a_missing_part(train, monkeypatch):
    def missing(*_, **__):
        raise ValueError("Could not find scheduler in .")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", missing)
    with pytest.raises(RunError, match="is safe, but .*: no full pipeline can be made of .*Could not find") as caught:
        train(**QUIET, max_train_steps=1, save_as_full_pipeline=True)
    out = train.folder / "out"
    assert caught.value.exit_code == 1 and "README.md" in contents(out) and "zoodip_config.json" in contents(out)


def test_what_breaks_off_says_what_is_safe(out, train, monkeypatch):
    monkeypatch.setattr(examples, "load_vae_encoder", full)
    with pytest.raises(RunError, match="broke off: No space left.*checkpoint-3 is safe, and --resume_from_checkpoint"):
        train(**STEPS, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "error, code",
    [
        (OSError(errno.EACCES, "Permission denied", "x"), 1),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 1),
        (errors.SafetensorError("header"), 1),
        (RunError("broke off"), 1),
        (InputError("bad"), 2),
    ],
)
def test_the_boundary(capsys, error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        errors.run_script(main, "script.py")
    said = capsys.readouterr().err
    assert caught.value.code == code and said.startswith("script.py: error: ") and said.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("a fault"), KeyError("a"), RuntimeError("shapes"), IndexError()])
def test_faults_of_the_program_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        errors.run_script(main, "script.py")


def test_a_diverged_run_ends_with_its_own_line_and_code(run_script, basics):
    flags = basics | {"--learning_rate": 1e30, "--max_train_steps": 40, "--logging_steps": 1}
    done = run_script(*as_arguments(flags | {"--num_validation_samples": 0}), expect=DivergedError.exit_code)
    last = done.stderr.strip().replace("\r", "\n").splitlines()[-1]
    assert last.startswith("train_zoodip_textual_inversion.py: error: the loss became")


def test_a_diverged_run_does_not_cost_another_runs_result(train):
    out = train(**QUIET, max_train_steps=1)
    before = (out / "learned_embeds.safetensors").read_bytes()
    with pytest.raises(DivergedError):
        train(**QUIET, learning_rate=1e30, max_train_steps=40, logging_steps=1)
    assert (out / "earlier-1" / "learned_embeds.safetensors").read_bytes() == before


def test_a_tracker_that_does_not_start_is_bad_input(train, monkeypatch):
    monkeypatch.setattr(launch.Accelerator, "init_trackers", full)
    with pytest.raises(InputError, match="--report_to tensorboard does not start .*--report_to none"):
        train(**QUIET, report_to="tensorboard")
