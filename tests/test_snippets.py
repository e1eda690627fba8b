"""What is shown to be pasted can be pasted: Python of README, docs, cards and runs; the flags of every command.

Blocks run as they stand, from a folder that looks like a user's: the names of Stable Diffusion 1.5 and SDXL lead to
the demo models, "user/my-dog" to a concept of one step. Only the number of denoising steps is another.
"""

import contextlib
import functools
import importlib
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPO, as_arguments
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, ZImagePipeline
from PIL import Image

import train_selective_dreambooth_lora as selective
import train_tuneqdm_dreambooth as tuneqdm
import train_zoodip_textual_inversion as zoodip
from personalization.runs.hub import write_model_card


PAGES = {path.relative_to(REPO).as_posix(): path for path in [REPO / "README.md", *sorted(REPO.glob("docs/**/*.md"))]}
NOT_INSTALLED = "torchao", "sdnq"  # named as a user's own choice; their blocks run where they are
BASES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "base_eps",
    "stabilityai/stable-diffusion-xl-base-1.0": "base_xl",
    "Tongyi-MAI/Z-Image": "base_flow",
    "path/to/base_eps": "base_eps",
    "path/to/base_xl": "base_xl",
    "path/to/base_flow": "base_flow",
}
WORD = {"--max_train_steps": 1, "--num_validation_samples": 1, "--report_to": "none"}
TUNED = {"--max_train_steps": 1, "--report_to": "none"}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


PYTHON = [
    pytest.param(code, id=f"{page}-{number}")
    for page, path in PAGES.items()
    for number, code in enumerate(blocks(path.read_text(encoding="utf-8"), "python"))
]


class World:
    """A user's folder, in which runs of one step lie under the names that the pages use."""

    def __init__(self, folder):
        self.folder, self.said, self.published = folder, {}, {}
        for name, base in BASES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(REPO / "demo" / base)
        for path in (*REPO.glob("*_pipeline.py"), REPO / "demo"):
            (folder / path.name).symlink_to(path)
        self.pictures = REPO / "demo" / "subjects" / "striped_star"

    def train(self, script, name, flags):
        """A run in this folder; keeps what it prints."""
        data = "--train_data_dir" if script is zoodip else "--instance_data_dir"
        flags = {data: self.pictures, "--output_dir": self.folder / name, **flags}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            script.main(script.parse_args(as_arguments(flags)))
        self.said[name], self.published[name] = printed.getvalue(), script.PUBLICATION

    def learn(self, name, word, base="demo/base_eps", **flags):
        words = {"--placeholder_token": word, "--initializer_token": "star"}
        bases = {"--pretrained_model_name_or_path": self.folder / base}
        self.train(zoodip, name, bases | words | WORD | {f"--{flag}": value for flag, value in flags.items()})

    def run(self, code):
        for name in [name for name in sys.modules if name.startswith("diffusers_modules.local")]:
            del sys.modules[name]  # a fresh process has none; diffusers would add one pipeline.py to the last
        compiled = compile(code, "snippet", "exec")
        with contextlib.chdir(self.folder):
            exec(compiled, {"__name__": "__main__"})


@pytest.fixture(scope="module")
def world(demo_base, tmp_path_factory):
    """All runs that the pages speak of, and pipelines that draw in one step."""
    made = World(tmp_path_factory.mktemp("user"))
    tuned = {"--pretrained_model_name_or_path": made.folder / "demo" / "base_eps", "--subject_name": "star"} | TUNED
    with pytest.MonkeyPatch.context() as patch:
        for pipeline in (StableDiffusionPipeline, StableDiffusionXLPipeline, ZImagePipeline):
            patch.setattr(pipeline, "__call__", in_one_step(pipeline.__call__))
        made.learn("my-dog-concept", "<my-dog>")
        made.learn("bad-hands", "<bad-hands>")
        made.learn("my-dog-xl", "<my-dog>", base="demo/base_xl")
        made.learn("for-others", "<my-dog>", base="demo/base_xl", pool_at_eos=True)
        made.learn("my-dog-flow", "<my-dog>", base="demo/base_flow", optimizer="gradient")
        made.learn("fast", "<my-dog>", optimizer="gauss_newton", num_vectors=2)
        made.train(tuneqdm, "star-scales", tuned)
        made.train(selective, "star-lora", tuned | {"--train_batch_size": 1, "--output_kohya_format": True})
        publish(made, "my-dog-concept", "user/my-dog", {})
        yield made


def in_one_step(call):
    @functools.wraps(call)
    def drawn(self, *args, **options):
        self.set_progress_bar_config(disable=True)
        options |= {"num_inference_steps": 1, "height": 64, "width": 64}  # where Z-Image would draw 1024 px
        return call(self, *args, **options)

    return drawn


def publish(world, name, repo_id, changes, **settings):
    """What a push makes of a run, in a folder that is called as the repository; returns its card."""
    publication, folder = world.published[name], world.folder / repo_id
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.folder / name, folder, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    config = json.loads((folder / publication.config_name).read_text(encoding="utf-8"))
    config |= changes | {"settings": config["settings"] | settings}
    write_model_card(folder, config, publication, repo_id)
    if pipeline := publication.pipeline_file(config):
        shutil.copyfile(pipeline, folder / "pipeline.py")
    local = world.folder / repo_id.split("/")[-1]  # `hf download user/name --local-dir name`
    if not local.exists():
        local.symlink_to(folder)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", PYTHON)
def test_python_of_the_pages_runs(code, world):
    for package in NOT_INSTALLED:
        if re.search(rf"^(?:from|import) {package}\b", code, flags=re.M):
            pytest.importorskip(package)
    assert "import" in code
    pictures = set(re.findall(r'\.save\("([^"]+)"\)', code))
    for picture in pictures:
        (world.folder / picture).unlink(missing_ok=True)
    world.run(code)
    assert all(Image.open(world.folder / picture).size == (64, 64) for picture in pictures)


RUNS = "my-dog-concept", "my-dog-xl", "my-dog-flow", "for-others", "fast", "star-scales", "star-lora"


@pytest.mark.parametrize("name", RUNS)
def test_python_of_the_cards_runs(name, world):
    """The card of a run on a local base, and of the same run on one of the Hub."""
    local = (world.folder / name / "README.md").read_text(encoding="utf-8")
    base = next((hub for hub, folder in BASES.items() if "_" in folder and folder in local), next(iter(BASES)))
    pushed = publish(world, name, f"user/{name}-pushed", {"base_model": base, "base_model_is_local": False})
    assert f'"{base}"' in pushed and f'"user/{name}-pushed"' in pushed and "path/to" in local
    for card in (local, pushed):
        found = blocks(card, "python")
        assert found and all("import" in code for code in found)
        for code in found:
            world.run(code)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_three_lines_that_draw(name, world):
    lines = world.said[name].splitlines()
    assert len(lines) == 3 and lines[0].startswith("from diffusers") and str(world.folder / name) in lines[1]
    (world.folder / "image.png").unlink(missing_ok=True)
    world.run(world.said[name])
    assert Image.open(world.folder / "image.png").size == (64, 64)


@pytest.mark.parametrize(
    "run, title, tag", [("my-dog-concept", "ZOODiP", "zoodip"), ("fast", "forward-only Gauss-Newton", "gauss-newton")]
)
def test_a_card_names_the_method_that_ran(run, title, tag, world):
    config = json.loads((world.folder / run / "zoodip_config.json").read_text(encoding="utf-8"))
    for card in (
        (world.folder / run / "README.md").read_text(encoding="utf-8"),
        publish(world, run, "user/named", {}),
    ):
        assert f"# `<my-dog>`, learned with {title}\n" in card and f"Method: {config['method']}." in card
        assert f"- {tag}\n" in card and ("- zoodip\n" in card) == (run != "fast") == ("is of the project" not in card)
        assert "validation loss (of the training pictures" in card


# =====================================================================================================
# Commands
# =====================================================================================================


def commands(text):
    """The commands of bash blocks as lists of words."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


COMMANDS = [
    pytest.param(words, id=f"{page}-{number}-{words[0]}")
    for page, path in PAGES.items()
    for number, words in enumerate(commands(path.read_text(encoding="utf-8")))
]


@functools.cache
def flags_of(script):
    """The flags in a script's own help; those of other scripts as they stand in its source."""
    if "/" in script:
        return set(re.findall(r"--\w+", (REPO / script).read_text(encoding="utf-8")))
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        importlib.import_module(Path(script).stem).parse_args(["--help"])
    return set(re.findall(r"--\w+", printed.getvalue()))


@functools.cache
def flags_of_accelerate():
    from accelerate.commands.launch import launch_command_parser

    return {flag for action in launch_command_parser()._actions for flag in action.option_strings}


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_have_files_and_flags_that_exist(words):
    script = next((word for word in words if word.endswith(".py")), None)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        assert words[1] in targets
    elif words[:2] == ["accelerate", "launch"]:
        before = words[2 : words.index(script)]
        assert {word for word in before if word.startswith("--")} <= flags_of_accelerate()
    elif script is None:
        assert words[0] in (".", "hf", "uv")
        return
    if script is not None:
        assert (REPO / script).is_file()
        given = {word for word in words[words.index(script) :] if word.startswith("--")}
        assert given and given <= flags_of(script), given - flags_of(script)


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"docs/usage.md"}))
def test_flags_that_are_named_exist(page):
    """In the prose and the tables of a page: flags of any script here, or of `accelerate launch`."""
    scripts = [path.name for path in REPO.glob("*.py") if not path.stem.endswith("_pipeline")]
    scripts += [path.relative_to(REPO).as_posix() for path in (*REPO.glob("benchmarks/*.py"), *REPO.glob("demo/*.py"))]
    known = flags_of_accelerate().union(*map(flags_of, scripts)) | {"--help", "--memory_gb"}
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(encoding="utf-8"), flags=re.S | re.M)
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", " ".join(re.findall(r"`([^`]*)`", text))))
    assert named <= known, named - known
    assert page != "README.md" or len(named) >= 10


def test_the_readmes_flags_are_those_of_the_flagship():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    table = text.split("## Eight flags")[1].split("\n## ")[0]
    first = re.findall(r"^\| `(--\w+)` \|", table, flags=re.M)
    assert len(first) == 8 and set(first) <= flags_of("train_zoodip_textual_inversion.py")


@pytest.mark.parametrize("page, script", [("tuneqdm", tuneqdm), ("selective", selective), ("gauss_newton", zoodip)])
def test_flags_of_a_method_are_those_of_its_script(page, script):
    text = PAGES[f"docs/methods/{page}.md"].read_text(encoding="utf-8")
    table = text.split("## Flags of its own")[1].split("\n## ")[0]
    named = set(re.findall(r"`(--\w+)", table))
    assert len(named) >= 8 and named <= flags_of(Path(script.__file__).name)
