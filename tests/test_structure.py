"""Where things live: the method in the script, plumbing in the package, and nothing that points upwards."""

import ast

import mutants
import pytest
from conftest import REPO, SCRIPT


METHOD = {
    *("sample_puts_timesteps", "estimate_gradient", "SubspaceGradient", "normalize_estimate", "train_step"),
    *("prediction_errors", "ZerothOrderAdam"),
    *("Int8Linear", "Int8Conv2d", "load_frozen", "PromptRows", "candidate_losses", "train", "main"),
}
TUNEQDM = {"new_changes", "draw_timesteps", "Integers", "train_step", "train", "main"}
SELECTIVE = {"Selection", "draw_kind", "bp_gradient", "zo_gradient", "train_step", "train", "main"}
TUNEQDM_LAYERS = {"quantize", "pack", "set_of_timestep", "ScaledProduct", "QuantizedLinear", "QuantizedConv2d"}
PACKAGE = sorted((REPO / "personalization").rglob("*.py"))
PATTERNS = "app.py", "train_*.py", "evaluate_*.py", "convert_*.py", "*_pipeline.py"
SCRIPTS = sorted(path for pattern in PATTERNS for path in REPO.glob(pattern))
# Floors of the package, the lowest first: a file imports from its own floor and those below.
GROUND = ("errors", "files", "flags", "logs", "quiet")
FLOORS = ("models", "data", "runs", "methods", "web")
UPWARDS = {("flags", "models.compute.DTYPES")}  # the choices of --mixed_precision are the dtypes that there are
# Calls of a denoiser outside models/families: file -> why it may.
CALLS_A_DENOISER = {
    "benchmarks/baselines.py": "rebuilds the official loop and the bare forward pass, which the script is measured by",
    "demo/build_demo_base.py": "trains the demo's base model from nothing",
    "demo/build_demo_base_xl.py": "distills the demo's SDXL from the demo's base",
    "demo/build_demo_base_flow.py": "distills the demo's Z-Image from the demo's base",
    "demo/distillation.py": "asks the teacher of the distilled demo bases",
}
MAY_IMPORT = {
    "train_selective_dreambooth_lora": {"train_zoodip_textual_inversion"},  # loading and estimator
    "train_tuneqdm_dreambooth": {"tuneqdm_pipeline", "train_zoodip_textual_inversion"},  # layers that travel; loading
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


def floor_of(name):
    """The number of the floor of a module of the package, by its path inside; None for the package itself."""
    first = name.split(".")[0]
    return 0 if first in GROUND else FLOORS.index(first) + 1 if first in FLOORS else None


def imported_from_the_package(path):
    """Paths inside the package of the modules, or their names, that one of its files imports."""
    inside = ("personalization", *path.relative_to(REPO / "personalization").with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level] if node.level else ()
            module = [*start, *(node.module.split(".") if node.module else ())]
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        yield from (".".join(name[1:]) for name in names if name[0] == "personalization")


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(REPO)))
def test_no_floor_of_the_package_imports_from_above(path):
    own_name = ".".join(path.relative_to(REPO / "personalization").with_suffix("").parts)
    own = floor_of(own_name)
    if own is not None:
        names = {name for name in imported_from_the_package(path) if (own_name, name) not in UPWARDS}
        above = {name for name in names if (floor_of(name) or 0) > own}
        assert not above, f"{path.relative_to(REPO)} is below {', '.join(sorted(above))}"


def test_the_floors_are_all_there_are():
    """A new folder of the package gets a floor, and files beside the folders belong to the ground."""
    beside = {path.stem for path in (REPO / "personalization").glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (REPO / "personalization").glob("*/__init__.py")}
    assert folders == set(FLOORS) and beside <= set(GROUND) | {"quick_help"}


def calls(path):
    """(name, line) of everything that a file calls: `unet(x)` and `model.unet(x)` are both "unet"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "id", getattr(node.func, "attr", None)), node.lineno


OURS = [*SCRIPTS, *PACKAGE, *(REPO / "benchmarks").rglob("*.py"), *(REPO / "demo").glob("*.py")]
FAMILIES = REPO / "personalization" / "models" / "families"
OUTSIDE = [path for path in OURS if FAMILIES not in path.parents]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(REPO)))
def test_families_alone_call_the_denoiser_and_say_what_it_predicts(path):
    if str(path.relative_to(REPO)) in CALLS_A_DENOISER:
        return
    forbidden = {"unet", "denoiser", "transformer", "dit", "add_noise", "get_velocity", "scale_noise"}
    found = [f"{name} in line {line}" for name, line in calls(path) if name in forbidden]
    assert not found, f"{path.relative_to(REPO)} calls {', '.join(found)}: that is a family's"


def test_what_may_call_the_denoiser_does():
    for name in CALLS_A_DENOISER:
        assert {"unet", "transformer"} & {called for called, _ in calls(REPO / name)}, (
            f"{name} no longer needs its exception"
        )


def test_nobody_else_asks_which_family_it_is():
    """Outside of the registry no code compares names of families: it asks for a trait, or for a verb."""
    for path in [path for path in OUTSIDE if "benchmarks" not in path.parts and "demo" not in path.parts]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = {getattr(each, "value", None) for each in (node.left, *node.comparators)}
                assert not words & {"sd1", "sd2", "sdxl", "z_image", "flux2_klein"}, (
                    f"{path.relative_to(REPO)}:{node.lineno}"
                )


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


def test_the_flagship_names_gauss_newton_in_one_import_and_one_entry():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "gauss_newton"]
    assert len(uses) == 1  # in OPTIMIZERS
    names = [n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert not [name for name in names if "gauss" in name.lower() or "newton" in name.lower()]


def test_an_optimizer_is_asked_and_never_told_apart_by_name():
    """No branch on `args.optimizer` in the script: what sets optimizers apart is in their records."""
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            compared = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            assert not {"zo_adam", "gauss_newton"} & {value for value in compared if isinstance(value, str)}, (
                ast.unparse(node)
            )


def test_no_logger_needs_an_accelerator():
    """accelerate's raises where there is none: a warning then ends the evaluation or the page."""
    for path in [*PACKAGE, *SCRIPTS]:
        assert "accelerate.logging" not in set(imported(path)), path


def test_functions_stay_short():
    functions = [n for n in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 110


def test_every_mutant_is_of_one_line_that_is_there():
    """A list of wrong lines that no longer fit would say nothing (`make mutants` tries them)."""
    for mutant in mutants.read_mutants():
        found = (REPO / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        assert found == 1 and mutant.new != mutant.old, f"{mutant.name}: its line occurs {found} times"
        assert (REPO / mutant.tests.split()[0]).is_file(), mutant.name
