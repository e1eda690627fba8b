"""Where things live: the method in the script, plumbing in the package, and nothing that points upwards."""

import ast

import pytest
from conftest import REPO, SCRIPT


METHOD = {
    *("sample_puts_timesteps", "estimate_gradient", "SubspaceGradient", "normalize_estimate", "train_step"),
    *("gauss_newton_evidence", "GaussNewton", "prediction_errors"),
    *("Int8Linear", "Int8Conv2d", "load_frozen", "PromptRows", "candidate_losses", "train", "main"),
}
TUNEQDM = {"new_changes", "draw_timesteps", "load_quantized_unet", "train_step", "train", "main"}
SELECTIVE = {"Selection", "draw_kind", "bp_gradient", "zo_gradient", "FrozenProduct", "train_step", "train", "main"}
TUNEQDM_LAYERS = {"quantize", "pack", "set_of_timestep", "ScaledProduct", "QuantizedLinear", "QuantizedConv2d"}
PACKAGE = sorted((REPO / "personalization").rglob("*.py"))
SCRIPTS = sorted(
    path for pattern in ("app.py", "train_*.py", "evaluate_*.py", "*_pipeline.py") for path in REPO.glob(pattern)
)
MAY_IMPORT = {
    "train_selective_dreambooth_lora": {"train_zoodip_textual_inversion"},  # loading and estimator
    "train_tuneqdm_dreambooth": {"tuneqdm_pipeline"},  # quantizer and layers, which travel
    "evaluate_personalization": {"tuneqdm_pipeline"},
}


def imported(path):
    """Names of all modules that a file imports, relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_the_method_is_defined_in_the_script():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    assert {node.name for node in tree.body if hasattr(node, "name")} >= METHOD


def test_tuneqdm_is_defined_in_its_script_and_pipeline():
    for name, method in (("train_tuneqdm_dreambooth.py", TUNEQDM), ("tuneqdm_pipeline.py", TUNEQDM_LAYERS)):
        source = (REPO / name).read_text(encoding="utf-8")
        assert {node.name for node in ast.parse(source).body if hasattr(node, "name")} >= method
        assert len(source.splitlines()) <= 1000


def test_bp_low_and_zo_high_are_defined_in_their_script():
    source = (REPO / "train_selective_dreambooth_lora.py").read_text(encoding="utf-8")
    assert {node.name for node in ast.parse(source).body if hasattr(node, "name")} >= SELECTIVE
    assert len(source.splitlines()) <= 1000


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_the_package_imports_no_script(path):
    assert not {name.split(".")[0] for name in imported(path)} & {script.stem for script in SCRIPTS}
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_nobody_imports_a_sibling(path):
    siblings = {script.stem for script in SCRIPTS} - MAY_IMPORT.get(path.stem, set())
    names = {name.split(".")[0] for name in imported(path)}
    assert not names & siblings
    if path.stem.endswith("_pipeline"):  # it travels to the Hub alone
        assert "personalization" not in names


def test_the_script_stays_a_story():
    source = SCRIPT.read_text(encoding="utf-8")
    # The paper's method and Gauss-Newton, with quantized loading, flags and loop; Gauss-Newton is about to leave.
    assert len(source.splitlines()) <= 2000
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 110
