"""Where things live: the method in the script, plumbing in the package, and nothing that points upwards."""

import ast

import pytest
from conftest import REPO, SCRIPT


METHOD = {
    *("sample_puts_timesteps", "estimate_gradient", "SubspaceGradient", "normalize_estimate", "train_step"),
    *("gauss_newton_evidence", "GaussNewton", "prediction_errors"),
    *("Int8Linear", "Int8Conv2d", "load_frozen", "PromptRows", "candidate_losses", "train", "main"),
}
PACKAGE = sorted((REPO / "personalization").glob("*.py"))
SCRIPTS = sorted(path for pattern in ("train_*.py", "evaluate_*.py", "*_pipeline.py") for path in REPO.glob(pattern))
MAY_IMPORT = {"train_selective_dreambooth_lora": {"train_zoodip_textual_inversion"}}  # loading and estimator


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
    assert (
        len(source.splitlines()) <= 1800
    )  # the paper's method and Gauss-Newton, with quantized loading, flags and loop
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 110
