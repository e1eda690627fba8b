"""Numbers on the command line: every flag has a range, and nothing outside it gets past the parser."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import as_arguments

import train_zoodip_textual_inversion as zoodip
from personalization import flags
from personalization.errors import InputError


ACTIONS = flags.actions(zoodip.make_parser())
REAL = sorted(name for name, action in ACTIONS.items() if action.type is float)
WHOLE = sorted(name for name, action in ACTIONS.items() if action.type is int)


@pytest.fixture
def parse(capsys):
    """Parses a number for a flag; returns it, or the sentence that refuses it."""

    def run(name, value):
        required = "pretrained_model_name_or_path train_data_dir placeholder_token initializer_token".split()
        flags = {f"--{other}": "x" for other in required} | {f"--{name}": value}
        try:
            return getattr(zoodip.parse_args(as_arguments(flags)), name)
        except SystemExit as end:
            assert end.code == 2
            sentence = capsys.readouterr().err
            assert sentence.count("\n") == 1 and len(sentence) < 500, sentence
            return sentence

    return run


def test_every_number_has_a_range():
    assert len(REAL) > 8 and len(WHOLE) > 20
    for name in REAL + WHOLE:
        limits = ACTIONS[name].facts.limits
        assert isinstance(limits.most, ACTIONS[name].type) and math.isfinite(limits.least), name


@pytest.mark.parametrize("name", REAL)
def test_no_real_number_is_infinite_or_nan(parse, name):
    for value in ("nan", "inf", "1e400", "-0.5"):
        assert f"--{name} {float(value)} must be a finite number" in parse(name, value)


@pytest.mark.parametrize("name", WHOLE)
def test_no_whole_number_is_endless(parse, name):
    assert f"--{name} {10**30} must be at least" in parse(name, 10**30)
    assert f"--{name} -1 must be at least" in parse(name, -1)
    assert f"argument --{name}: invalid int value: '111" in parse(name, "1" * 5000)  # longer than Python reads
    assert f"argument --{name}: invalid int value" in parse(name, "1e3")


@pytest.mark.parametrize("name", REAL + WHOLE)
def test_the_ends_of_a_range(parse, name):
    limits, after = ACTIONS[name].facts.limits, dict.fromkeys(WHOLE, lambda x, sign: x + sign)
    step = after.get(name, lambda x, sign: float(np.nextafter(x, sign * math.inf)))
    least = step(limits.least, 1) if limits.above else limits.least
    most = step(limits.most, -1) if limits.below else limits.most
    assert least in limits and most in limits
    assert step(least, -1) not in limits and step(most, 1) not in limits
    assert str(limits) in parse(name, step(most, 1))


@pytest.mark.parametrize("scale, refused", [("1e-40", True), ("1e-8", True), ("3e-7", True), ("1e-6", False)])
def test_a_step_that_drowns_in_float32_is_refused_too(basics, scale, refused):
    args = zoodip.parse_args(as_arguments(basics | {"--perturbation_scale": scale}))
    if refused:
        with pytest.raises(InputError, match="too small for float32 activations.* give at least 1e-06, best 0.001;"):
            zoodip.resolve_settings(args, torch.device("cpu"))
    else:
        zoodip.resolve_settings(args, torch.device("cpu"))


def test_the_least_steps_are_those_that_were_measured(repo):
    """Of the steps in the signal tables, the least at which INT8 weights correlate by 0.9 or more."""
    results = repo / "benchmarks" / "results"
    files = [json.loads((results / name).read_text()) for name in ("signal.json", "signal_float32.json")]
    names = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
    for precision, (_, least) in zoodip.OPTIMIZERS["zo_adam"].perturbation_scales.items():
        seen = [
            (row["mu"], row["exact"]["correlation_median"])
            for result in files
            for row in result["rows"]
            if row["backend"] == "int8" and row["activations"] == names[precision]
        ]
        assert least == min(mu for mu, correlation in seen if correlation >= 0.9)
        assert any(mu < least for mu, _ in seen)


def test_the_least_steps_of_gauss_newton_are_those_that_were_measured(repo):
    """The least at which y, as the mean over both signs, is right within a third."""
    measured = json.loads((repo / "benchmarks" / "results" / "signal.json").read_text())["evidence"]
    rows = {"no": ("int8", "float32"), "fp16": ("int8", "float16"), "bf16": ("int8", "bfloat16")}
    rows |= {"int8": ("openvino int8", "int8")}
    for precision, (_, least) in zoodip.OPTIMIZERS["gauss_newton"].perturbation_scales.items():
        of_row = [row for row in measured if (row["backend"], row["activations"]) == rows[precision]]
        assert least == min(row["step"] for row in of_row if row["gradient_both_signs"] <= 1 / 3)


def test_more_denoising_steps_than_the_model_has_timesteps(basics, demo_base, tmp_path):
    base = shutil.copytree(demo_base, tmp_path / "base")
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": 950}))
    flags = basics | {"--pretrained_model_name_or_path": base, "--num_inference_steps": 951}
    with pytest.raises(InputError, match=r"--num_inference_steps 951 is outside \[0, 950\)"):
        zoodip.resolve_settings(zoodip.parse_args(as_arguments(flags)), torch.device("cpu"))


def test_the_largest_seed_trains(train):
    out = train(max_train_steps=1, seed=2**63 - 1, num_validation_samples=1)
    assert (out / "learned_embeds.safetensors").is_file()


def test_a_run_that_moves_nothing_says_so(train, caplog):
    train(max_train_steps=1, perturbation_scale=1e-40, allow_noisy_estimates=True, num_validation_samples=0)
    assert "Nothing was learned: <my-toy> is 'star' to the last bit." in caplog.text
    caplog.clear()
    train(max_train_steps=1, num_validation_samples=0)
    assert "Nothing was learned" not in caplog.text


def test_an_error_of_any_length_is_one_short_line(capsys):
    with pytest.raises(SystemExit):
        zoodip.parse_args(["--placeholder_token", "x", "--seed", "a\nb", "--no_such_flag", "y\n" * 9999])
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and len(message) < 500
