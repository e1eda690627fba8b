"""Runs that are asked to stop at random moments of every phase, as processes: loading, training, drawing, writing."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

from attack import room
from hypothesis import strategies as st
from tiny_base import build_pictures, build_tiny_base


SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"]
STEPS = 3
RESULTS = {
    "train_zoodip_textual_inversion": "learned_embeds.safetensors",
    "train_tuneqdm_dreambooth": "tuneqdm_scales.safetensors",
    "train_selective_dreambooth_lora": "pytorch_lora_weights.safetensors",
    "evaluate_personalization": "images/plain-word/000-01.png",
}
TRUTHS = (
    r"Stopped\.",
    r"Stopped before a step was done: nothing is lost, the same command starts again\.",
    r"Stopped at step \d+; --resume_from_checkpoint latest goes on from (checkpoint-\d+)\.",
    r"Stopped at step \d+; there is no checkpoint yet\.",
)


# =====================================================================================================
# The process that runs are forked from, which has imported everything once
# =====================================================================================================


def serve():
    """Runs each line of standard input, [script, words, log, [moment, signal] pairs]; prints code and moments."""
    import importlib

    scripts = {name: importlib.import_module(name) for name in RESULTS}
    print("ready", flush=True)
    for line in sys.stdin:
        name, words, log, signals = json.loads(line)
        reader, writer = os.pipe()
        if pid := os.fork():
            os.close(writer)
            moments = os.read(reader, 100).decode()  # nothing where it was ended by a signal
            os.close(reader)
            print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(moments or 0)]), flush=True)
        else:
            code = run(scripts[name], words, log, signals, writer)
            os._exit(code)


def run(script, words, log, signals, writer):
    """A run in this process, which sends itself signals at moments: the numbers of what Python audits (files, ...)."""
    from personalization.errors import run_script

    def audit(event, _):
        state.count += 1
        if waiting and state.count >= waiting[0][0]:
            os.kill(os.getpid(), getattr(signal, waiting.pop(0)[1]))

    state, waiting, code = types.SimpleNamespace(count=0), list(signals), 0
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv = [script.__file__, *words]
    for number in SIGNALS:  # as a shell starts a process
        signal.signal(getattr(signal, number), signal.default_int_handler if number == "SIGINT" else signal.SIG_DFL)
    sys.addaudithook(audit)
    try:
        run_script(lambda: script.main(script.parse_args(words)), script.__file__)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    os.write(writer, str(state.count).encode())
    return code


# =====================================================================================================
# The room
# =====================================================================================================


@contextlib.contextmanager
def runs(folder):
    """A world in which every script has run undisturbed: its result, and how many moments that had."""
    build_tiny_base(folder / "base")
    build_pictures(folder / "pictures")
    (folder / "prompts.txt").write_text("a {}\na {} on the beach\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*Path(__file__).parents[:2]]))}
    command = [sys.executable, "-c", "import attack_signals; attack_signals.serve()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1], **pipes) as server:
        while server.stdout.readline() not in ("ready\n", ""):
            pass
        world = types.SimpleNamespace(folder=folder, server=server, whole={})
        try:
            yield world
        finally:
            server.stdin.close()


def words_of(world, name):
    """The command line of a script in a folder that is anew for every example."""
    made = world.folder / "made"
    words = ["--pretrained_model_name_or_path", world.folder / "base", "--output_dir", made / "out"]
    if name == "evaluate_personalization":
        words += ["--class_word", "star", "--prompts", world.folder / "prompts.txt", "--draw_only"]
        words += ["--num_images_per_prompt", 2, "--batch_size", 1, "--num_inference_steps", 1]
        return [*map(str, words)]
    words += ["--max_train_steps", STEPS, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    words += ["--quantized_cache_dir", made / "cache", "--num_inference_steps", 1, "--num_validation_images", 1]
    words += ["--validation_prompt", "a {}"]
    if name == "train_zoodip_textual_inversion":
        words += ["--train_data_dir", world.folder / "pictures", "--placeholder_token", "<my-toy>"]
        return [*map(str, [*words, "--initializer_token", "star", "--num_validation_samples", 1])]
    words += ["--instance_data_dir", world.folder / "pictures", "--subject_name", "star"]
    words += ["--with_prior_preservation", "--class_prompt", "a star", "--num_class_images", 2]
    words += ["--class_data_dir", made / "class"]
    return [*map(str, words + ["--output_kohya_format"] * (name == "train_selective_dreambooth_lora"))]


def go(world, name, signals):
    """A run; returns its exit code, its moments and what it printed."""
    log = world.folder / "log.txt"
    log.unlink(missing_ok=True)
    world.server.stdin.write(json.dumps([name, words_of(world, name), str(log), signals]) + "\n")
    world.server.stdin.flush()
    code, moments = json.loads(world.server.stdout.readline())
    return code, moments, log.read_text(errors="replace")


@room("signals", runs, examples=2)
def attack_signals(world, data):
    """A run that is asked to stop says one true sentence, and goes on to the very result of an undisturbed one."""
    draw, made = data.draw, world.folder / "made"
    name = draw(st.sampled_from([*RESULTS]))
    result = made / "out" / RESULTS[name]
    if name not in world.whole:
        shutil.rmtree(made, ignore_errors=True)
        code, moments, said = go(world, name, [])
        assert code == 0, said
        world.whole[name] = moments, result.read_bytes()
    moments, whole = world.whole[name]
    shutil.rmtree(made, ignore_errors=True)
    times = sorted(draw(st.lists(st.integers(0, moments), min_size=1, max_size=2)))
    judge(world, *go(world, name, [(moment, draw(st.sampled_from(SIGNALS))) for moment in times])[::2])
    if draw(st.booleans()):  # once more, while it goes on
        judge(world, *go(world, name, [(draw(st.integers(0, moments)), "SIGTERM")])[::2])
    code, _, said = go(world, name, [])
    assert code == 0 and result.read_bytes() == whole, said
    left = [path for path in made.rglob(".tmp-*") if path.parent != made / "cache"]
    assert not left, left


def judge(world, code, said):
    """What a run that was asked to stop says is true."""
    assert code in (0, 130), (code, said)
    ignored = r"Exception ignored.*?\n\w*KeyboardInterrupt:?[^\n]*"  # within what Python lets nobody raise
    assert "Traceback" not in re.sub(ignored, "", said, flags=re.DOTALL), said
    if code == 0:
        return
    sentence = said.strip().splitlines()[-1]
    matches = [match for pattern in TRUTHS if (match := re.fullmatch(f"(?:.*[\\]\\r])?{pattern}", sentence))]
    assert matches, said
    there = {path.name for path in (world.folder / "made" / "out").glob("checkpoint-*")}
    if matches[0].groups():
        assert matches[0][1] in there, said
    if "there is no checkpoint yet" in sentence:
        assert not there, said
