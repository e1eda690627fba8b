"""The report from the field: complete, without a path of the machine, and it goes on where it was."""

import contextlib
import io
import json

import pytest
from conftest import REPO
from PIL import Image

import evaluate_personalization as evaluation
import train_zoodip_textual_inversion as zoodip
from benchmarks import field_report
from benchmarks.tables import field


DEMO = REPO / "demo"


@pytest.fixture
def calls(monkeypatch):
    """Scripts run in this process, where imports are paid once; their names."""
    made = []

    def in_process(script, words):
        made.append(script.stem)
        module, said = zoodip if script == field_report.TRAINER else evaluation, io.StringIO()
        with contextlib.redirect_stdout(said):
            module.main(module.parse_args(list(map(str, words))))
        return said.getvalue()

    monkeypatch.setattr(field_report, "run_words", in_process)
    return made


def arguments(folder, **more):
    words = [
        "--pretrained_model_name_or_path",
        DEMO / "base_eps",
        "--train_data_dir",
        DEMO / "subjects" / "striped_star",
    ]
    words += ["--initializer_token", "star", "--rows", "int8", "--optimizers", "zo_adam"]
    words += [
        "--forwards",
        12,
        "--steps",
        2,
        "--examples",
        1,
        "--directions",
        8,
        "--num_inference_steps",
        1,
        "--examples_judged",
        3,
    ]
    words += ["--prompts", DEMO / "prompts.txt", "--output_dir", folder, "--trust_remote_code"]
    words += ["--clip_model", DEMO / "scorer", "--dino_model", DEMO / "scorer" / "identity"]
    return field_report.parse_args(list(map(str, words)))


def test_a_whole_report(tmp_path, calls, monkeypatch):
    args = arguments(tmp_path / "report")
    monkeypatch.setitem(field_report.ROWS, "int8", {"perturbation_scale": 1e-9})  # which is refused
    field_report.main(args)
    report = json.loads((args.output_dir / "report.json").read_text())
    assert "perturbation_scale 1e-09 is too small" in report["parts"]["row: int8"]["failed"]
    monkeypatch.setitem(field_report.ROWS, "int8", {})
    done = len(calls)
    field_report.main(args)
    assert len(calls) == done + 2  # what had failed is tried again, nothing else
    field_report.main(args)
    assert len(calls) == done + 2
    written = (args.output_dir / "report.json").read_text()
    assert str(tmp_path) not in written and str(REPO) not in written
    report, text = json.loads(written), (args.output_dir / "report.md").read_text()
    parts = report["parts"]
    row = parts["row: int8"]
    assert row["predicted_mb"] > 100 and row["peak_memory"]["process_mb"] > 100 and row["forwards_per_step"] == 3
    (median, least) = parts["signal"]["correlation_median_and_least"]["0.001"]
    assert parts["signal"]["default_mu"] == 1e-3 and median == least > 0.9
    assert parts["run: zo_adam"]["steps"] == 4 == parts["run: zo_adam"]["validation_losses"][-1][0]
    assert set(parts["scores"]["zo_adam"]) >= {"CLIP-T", "CLIP-I", "DINO"} and "| zo_adam |" in text
    assert "| int8 | 64 |" in text and "validation loss (training pictures)" in text and "failed" not in text
    assert json.loads(text.split("```json")[1].split("```")[0]) == report
    assert Image.open(args.output_dir / "sheet.png").height == 2 * 212  # with the plain word
    assert field.field(report, report).count("** on ") == 2


def test_other_settings_make_another_report(tmp_path, monkeypatch):
    monkeypatch.setattr(field_report, "list_parts", lambda args: {"only": lambda: {"forwards": args.forwards}})
    args = arguments(tmp_path)
    field_report.measure(args, tmp_path / "report.json")
    args.forwards = 7
    report = field_report.measure(args, tmp_path / "report.json")
    assert report["parts"]["only"]["forwards"] == 7
    assert field.field() == "No report yet."
