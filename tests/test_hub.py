"""The Hub round trip with the real clients, against the stand-in Hub of `hub_server.py`."""

import hashlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils._http
import pytest
import torch
import yaml
from conftest import _run, as_arguments
from hub_server import READ_TOKEN, TOKEN, HubServer, Repo
from PIL import Image

import train_zoodip_textual_inversion as zoodip
from personalization.data import examples
from personalization.errors import InputError, PushError
from personalization.files import write_json
from personalization.models.base_model import ModelSource
from personalization.runs import hub as hub_module
from personalization.runs import launch
from personalization.runs.embeddings import save_full_pipeline
from personalization.runs.hub import Publication, write_model_card
from personalization.runs.run_folder import ResultFolder


PUSHED = {
    ".gitattributes",
    "README.md",
    "learned_embeds-best.safetensors",
    "learned_embeds.safetensors",
    "loss_curve.png",
    "my-toy.pt",
    "my-toy.safetensors",
    "pipeline.py",
    "samples/image_0.png",
    "zoodip_config.json",
}


@pytest.fixture(scope="module")
def hub(demo_base):
    """The stand-in Hub, with the demo base on it (and a card that names a licence)."""
    with HubServer() as server:
        base = Repo()
        for path in (p for p in Path(demo_base).rglob("*") if p.is_file()):
            base.files[path.relative_to(demo_base).as_posix()] = path.read_bytes()
        base.files["README.md"] = b"---\nlicense: creativeml-openrail-m\n---\n# A base model\n"
        server.repos["alice/demo-base"] = base
        yield server


@pytest.fixture(scope="module")
def launched(hub, launch, subject, tmp_path_factory):
    """Three steps on a base from the Hub by `accelerate launch`, pushed; the token is given in the riskiest way."""
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("runs") / "my-toy"
    flags = {
        "--pretrained_model_name_or_path": "alice/demo-base",
        "--train_data_dir": subject,
        "--placeholder_token": "<my-toy>",
        "--initializer_token": "star",
        "--num_vectors": 2,
        "--output_dir": out,
        "--max_train_steps": 3,
        "--checkpointing_steps": 1,
        "--validation_prompt": 'a "photo" of {}',
        "--num_validation_images": 1,
        "--num_inference_steps": 1,
        "--num_validation_samples": 2,
        "--save_a1111": True,
        "--push_to_hub": True,
        "--hub_token": TOKEN,
    }
    environment = hub.environment(home, token="")
    return out, launch(*as_arguments(flags), env=environment)


@pytest.fixture(scope="module")
def finished(demo_base, subject, tmp_path_factory):
    """A run that was trained in this process and not pushed."""
    out = tmp_path_factory.mktemp("finished") / "toy"
    flags = {
        "--pretrained_model_name_or_path": demo_base,
        "--train_data_dir": subject,
        "--placeholder_token": "<toy>",
        "--initializer_token": "star",
        "--output_dir": out,
        "--max_train_steps": 1,
        "--num_validation_samples": 0,
        "--report_to": "none",
        "--push_reference_images": True,
    }
    zoodip.main(zoodip.parse_args(as_arguments(flags)))
    config = json.loads((out / "zoodip_config.json").read_text())
    config["settings"]["push_reference_images"] = False  # tests that want them ask again
    write_json(out / "zoodip_config.json", config)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, under a name that no other test has pushed."""
    return Path(shutil.copytree(finished, tmp_path / f"toy-{hashlib.sha1(str(tmp_path).encode()).hexdigest()[:8]}"))


@pytest.fixture
def here(hub, monkeypatch):
    """Points the client inside this process at the stand-in Hub, and takes the waiting out of its retries."""
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.heal()


def push_only(run, *more):
    zoodip.main(zoodip.parse_args(["--push_only", "--output_dir", str(run), *more]))


def files_under(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def test_a_push_is_a_few_files_in_one_commit(hub, launched):
    repo = hub.repos["alice/my-toy"]
    assert set(repo.files) == PUSHED
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert sum(map(len, repo.files.values())) < 500_000
    assert repo.files["pipeline.py"] == Path("zoodip_pipeline.py").read_bytes()


def test_the_token_and_local_paths_are_nowhere(hub, launched):
    out, done = launched
    written = {str(path): path.read_bytes() for path in files_under(out)}
    assert any("checkpoint-3" in name for name in written) and any("events.out" in name for name in written)
    for name, content in {**written, "output": (done.stdout + done.stderr).encode()}.items():
        assert TOKEN.encode() not in content, name
    for name, content in hub.repos["alice/my-toy"].files.items():
        assert TOKEN.encode() not in content
        assert str(out.parent).encode() not in content and str(Path.cwd()).encode() not in content, name


def test_requests_to_the_hub_are_not_told_one_by_one(hub, launched):
    out, done = launched
    asked = [path for method, path, _ in hub.requests if path.startswith("/alice/demo-base/resolve/")]
    assert len(asked) > 10 and "HTTP Request" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]
    assert len([line for line in lines if re.match(r"\d\d:\d\d:\d\d - ", line)]) < 20
    assert f"Learned <my-toy> with ZOODiP (arXiv 2503.14868): {out / 'learned_embeds.safetensors'}; to" in done.stderr
    assert done.stdout.splitlines()[-3:][0] == "from diffusers import DiffusionPipeline"


def test_card(hub, launched):
    text = hub.repos["alice/my-toy"].files["README.md"].decode()
    _, metadata, body = text.split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["base_model"] == "alice/demo-base" and metadata["license"] == "creativeml-openrail-m"
    assert metadata["library_name"] == "diffusers" and metadata["pipeline_tag"] == "text-to-image"
    assert metadata["instance_prompt"] == "<my-toy>" and {"zoodip", "textual_inversion"} <= set(metadata["tags"])
    prompt = 'a "photo" of <my-toy>'
    assert metadata["widget"] == [{"text": prompt, "output": {"url": "samples/image_0.png"}}]
    assert "<Gallery />" in body and "are not published" in body and "2503.14868" in body
    for block in body.split("```python\n")[1:]:
        code = block.split("```")[0]
        assert code.startswith("from diffusers import ")  # `test_snippets.py` runs them
        compile(code, "README.md", "exec")
    assert body.count('"alice/my-toy"') == 3 and "{{" not in body and "None" not in body


LOAD = """
import hashlib, shutil, sys, torch
from pathlib import Path
from diffusers import DiffusionPipeline, StableDiffusionPipeline
home, out = Path(sys.argv[1]), sys.argv[2]
base, hub, full = "alice/demo-base", "alice/my-toy", {"dtype": torch.float32}

def custom():
    code = {"custom_pipeline": hub, "trust_remote_code": True}
    return DiffusionPipeline.from_pretrained(base, **code, **full, learned_embeds=hub)

def plain():
    pipeline = StableDiffusionPipeline.from_pretrained(base, **full)
    pipeline.load_textual_inversion(hub)
    return pipeline

def local():
    code = {"custom_pipeline": "./zoodip_pipeline.py", "trust_remote_code": True}
    return DiffusionPipeline.from_pretrained(base, **code, **full, learned_embeds=out)

for load in (custom, plain, local):
    shutil.rmtree(home, ignore_errors=True)  # each way starts from an empty cache
    pipeline = load()
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a photo of <my-toy>", num_inference_steps=2, height=64, width=64, generator=generator).images[0]
    print("RESULT", load.__name__, type(pipeline).__name__, hashlib.sha256(image.tobytes()).hexdigest())
"""


def test_three_ways_to_load_in_a_fresh_process_give_the_same_image(hub, launched, tmp_path):
    command = [sys.executable, "-c", LOAD, str(tmp_path / "home"), str(launched[0])]
    done = _run(command, 0, hub.environment(tmp_path / "home", token=""), 300)
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert [row[:2] for row in rows] == [
        ["custom", "ZOODiPPipeline"],
        ["plain", "StableDiffusionPipeline"],
        ["local", "ZOODiPPipeline"],
    ]
    assert len({row[2] for row in rows}) == 1
    assert "was learned on" not in done.stderr


def test_a_server_that_dies_after_the_lfs_upload(here, run, run_script, tmp_path):
    before = (run / "learned_embeds.safetensors").read_bytes()
    here.dies_after_lfs = True
    done = run_script("--push_only", "--output_dir", run, expect=3, env=here.environment(tmp_path / "home"))
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr + done.stdout
    command = f"--push_only --output_dir {run} --hub_model_id alice/{run.name}"
    assert command in done.stderr
    repo = here.repos[f"alice/{run.name}"]
    assert here.lfs and set(repo.files) == {".gitattributes"}
    assert (run / "learned_embeds.safetensors").read_bytes() == before

    here.heal()
    zoodip.main(zoodip.parse_args(command.split()))
    assert repo.files["learned_embeds.safetensors"] == before and len(repo.commits) == 2
    push_only(run)
    assert len(repo.commits) == 2  # nothing changed, so no new commit


@pytest.mark.parametrize(
    "path, how",
    [
        ("/preupload/", 401),
        ("/commit/", 403),
        ("/commit/", 409),
        ("/preupload/", 429),
        ("/lfs/", 500),
        ("/commit/", "cut"),
    ],
)
def test_a_push_that_fails_after_training_leaves_the_run_and_says_how_to_repeat_it(here, run, path, how):
    before = {p: p.read_bytes() for p in files_under(run) if p.suffix == ".safetensors"}
    here.lfs.clear()
    here.fail(path, how)
    with pytest.raises(PushError, match=f"--push_only --output_dir {run} --hub_model_id alice/") as caught:
        push_only(run)
    assert caught.value.exit_code == 3 and TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    assert str(how) in str(caught.value) or how == "cut"
    assert {p: p.read_bytes() for p in before} == before
    here.heal()
    push_only(run)
    assert len(here.repos[f"alice/{run.name}"].commits) == 2


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"--hub_token": "hf_wrong"}, "Invalid user access token.*hf auth login"),
        ({"--hub_token": READ_TOKEN}, "403.*right to write"),
        ({"--hub_model_id": "bob/toy"}, "403.*another --hub_model_id"),
        ({"--hub_model_id": "bob/existing"}, "403.*another --hub_model_id"),
        ({"--hub_model_id": "no spaces"}, "'no spaces' is no name for a repository"),
        ({"create": 409}, "409|url"),
        ({"create": 429}, "429.*later"),
        ({"create": 500}, "500.*later"),
        ({"create": "cut"}, "later"),
        ({"token": None}, "needs a token.*hf auth login"),
        ({"endpoint": "http://127.0.0.1:9"}, "refused"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_training(here, basics, monkeypatch, flags, expected):
    here.repos["bob/existing"] = Repo()
    monkeypatch.setattr(examples, "load_vae_encoder", lambda *_: pytest.fail("training began"))
    if "create" in flags:
        here.fail("/api/repos/create", flags["create"])
    if "token" in flags:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    if "endpoint" in flags:
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", flags["endpoint"])
    given = {name: value for name, value in flags.items() if name.startswith("--")}
    with pytest.raises(InputError, match=expected) as caught:
        zoodip.main(zoodip.parse_args(as_arguments({**basics, "--push_to_hub": True, **given})))
    assert caught.value.exit_code == 2 and "hf_" not in str(caught.value)


def test_training_ends_before_a_failing_push(here, basics, tmp_path):
    here.dies_after_lfs = True
    basics |= {"--push_to_hub": True, "--output_dir": str(tmp_path / "cut-off"), "--num_validation_samples": "0"}
    with pytest.raises(PushError):
        zoodip.main(zoodip.parse_args(as_arguments(basics)))
    written = {path.name for path in files_under(tmp_path / "cut-off")}
    assert {"learned_embeds.safetensors", "zoodip_config.json", "README.md", "loss_curve.png"} <= written


@pytest.fixture
def impatient(monkeypatch):
    """A Hub has a second to answer."""
    for name, seconds in {"REQUEST_SECONDS": 0.3, "CHECK_SECONDS": 1, "UPLOAD_SECONDS": 4}.items():
        monkeypatch.setattr(hub_module, name, seconds)


@pytest.mark.parametrize("how", ["silent", "trickle"])
@pytest.mark.parametrize("path", ["/api/repos/create", "/auth-check/"])
def test_a_hub_that_never_answers_is_given_up_before_training(here, impatient, basics, monkeypatch, path, how):
    monkeypatch.setattr(examples, "load_vae_encoder", lambda *_: pytest.fail("training began"))
    here.fail(path, how)
    started = time.monotonic()
    with pytest.raises(InputError, match="refused .*(timed out|no answer within).*later") as caught:
        zoodip.main(zoodip.parse_args(as_arguments({**basics, "--push_to_hub": True})))
    assert caught.value.exit_code == 2 and time.monotonic() - started < 10


@pytest.mark.parametrize("how", ["silent", "trickle"])
@pytest.mark.parametrize("path", ["/preupload/", "/lfs/", "/commit/"])
def test_a_hub_that_falls_silent_at_the_upload_is_given_up(here, impatient, run, path, how):
    here.lfs.clear()
    here.fail(path, how)
    with pytest.raises(PushError, match="(timed out|no answer within).*--push_only --output_dir") as caught:
        push_only(run)
    assert caught.value.exit_code == 3
    here.heal()
    push_only(run)
    assert "learned_embeds.safetensors" in here.repos[f"alice/{run.name}"].files


def test_a_process_ends_when_the_hub_is_silent(here, run, run_script, tmp_path):
    here.lfs.clear()
    here.fail("/lfs/", "silent")
    environment = here.environment(tmp_path / "home") | {"ZOODIP_HUB_TIMEOUT": "0.2"}
    done = run_script("--push_only", "--output_dir", run, expect=3, env=environment, timeout=100)
    assert "Traceback" not in done.stderr and "--push_only" in done.stderr


@pytest.mark.parametrize("length", range(1, len(TOKEN), 4))
def test_no_part_of_a_token_is_printed(length):
    """The reason is cut to 500 characters after the token is masked, not before."""
    said = hub_module.hub_reason(OSError("x" * (500 - length) + TOKEN), TOKEN)
    assert len(said) <= 500 and TOKEN[:length] not in said


def write_png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_what_the_run_did_not_write_is_not_published(here, run, tmp_path):
    """Files that match the names of a result, nested, linked or changed: neither shown in the card nor pushed."""
    outside = tmp_path / "outside"
    for path in (run / "samples" / "mine.png", run / "samples" / "deep" / "image_0.png", outside / "private.png"):
        write_png(path)
    (run / "learned_embeds.pt").write_bytes(b"of another run")
    (run / "samples" / "link.png").symlink_to(outside / "private.png")
    (run / "loss_curve.png").unlink()
    (run / "loss_curve.png").symlink_to(outside / "private.png")
    (run / "learned_embeds-best.safetensors").write_bytes((run / "learned_embeds.safetensors").read_bytes())
    push_only(run)
    files = here.repos[f"alice/{run.name}"].files
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "learned_embeds.safetensors",
        "pipeline.py",
        "toy.safetensors",
        "zoodip_config.json",
    }
    card = files["README.md"].decode()
    assert "Gallery" not in card and "-best" not in card and "loss_curve" not in card


def test_an_older_run_without_a_list_is_pushed_by_names_but_never_through_links(here, run, tmp_path):
    config = json.loads((run / "zoodip_config.json").read_text())
    del config["files"], config["run"]
    write_json(run / "zoodip_config.json", config)
    write_png(run / "samples" / "image_0.png")
    write_png(tmp_path / "outside" / "private.png")
    (run / "samples" / "image_1.png").symlink_to(tmp_path / "outside" / "private.png")
    push_only(run)
    files = here.repos[f"alice/{run.name}"].files
    assert {"samples/image_0.png", "loss_curve.png"} <= set(files) and "samples/image_1.png" not in files
    shutil.rmtree(run / "samples")
    (run / "samples").symlink_to(tmp_path / "outside")
    push_only(run)
    assert not any("samples" in name for name in files)


def test_a_list_cannot_name_what_is_never_published(here, run):
    (run / "checkpoint-1").mkdir(exist_ok=True)
    (run / "checkpoint-1" / "state.pt").write_bytes(b"private")
    config = json.loads((run / "zoodip_config.json").read_text())
    config["files"]["checkpoint-1/state.pt"] = hashlib.sha256(b"private").hexdigest()
    config["files"]["../finished"] = config["files"]["*"] = "x"
    write_json(run / "zoodip_config.json", config)
    push_only(run)
    assert not any("state.pt" in name for name in here.repos[f"alice/{run.name}"].files)


def damage_config(**changes):
    def damage(content):
        return json.dumps(json.loads(content) | changes)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: "",
        lambda content: "[1, 2]",
        lambda content: "null",
        lambda content: "[" * 100_000,
        lambda content: "\x00" * len(content),
        lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != "settings"}),
        lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != "figures"}),
        damage_config(settings=[]),
        damage_config(settings={}),
        damage_config(figures={}),
        damage_config(figures={"steps": "many", "seconds": 1}),
        damage_config(components={}),
        damage_config(components={"unet": 3}),
        damage_config(base_license="mit"),
        damage_config(hardware=None),
        damage_config(placeholder_token=7),
        damage_config(files=["learned_embeds.safetensors"]),
        damage_config(files=7),
        damage_config(scores=5),
    ],
)
def test_push_only_with_a_damaged_config_is_one_sentence(here, run, damage):
    config = run / "zoodip_config.json"
    config.write_text(damage(config.read_text()))
    with pytest.raises(InputError, match="zoodip_config.json") as caught:
        push_only(run)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not any(method == "POST" and "/commit/" in path and run.name in path for method, path, _ in here.requests)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:20], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
@pytest.mark.parametrize("listed", [True, False])
def test_push_only_with_a_damaged_embedding_is_one_sentence(here, run, damage, listed):
    config = json.loads((run / "zoodip_config.json").read_text())
    path = run / "learned_embeds.safetensors"
    changed = damage(path.read_bytes())
    if not listed:
        del config["files"]
        write_json(run / "zoodip_config.json", config)
        changed = changed[:-1]  # without hashes a flipped bit cannot be seen
    path.write_bytes(changed)
    with pytest.raises(InputError, match="learned_embeds.safetensors' .*bring back"):
        push_only(run)


def test_only_the_main_process_talks_to_the_hub(here, basics, monkeypatch):
    monkeypatch.setattr(launch.Accelerator, "is_main_process", property(lambda self: False))
    before = len(here.requests)
    flags = {**basics, "--push_to_hub": True, "--num_validation_samples": 0}
    zoodip.main(zoodip.parse_args(as_arguments(flags)))
    assert len(here.requests) == before and not files_under(basics["--output_dir"])


def test_push_only_by_several_processes_pushes_once(here, run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    push_only(run)
    assert f"alice/{run.name}" not in here.repos


def test_a_hub_that_cannot_tell_of_rights_is_trusted(here, run):
    here.fail("/auth-check/", 404)
    push_only(run)
    assert "README.md" in here.repos[f"alice/{run.name}"].files


def test_push_only_needs_a_finished_run(tmp_path):
    with pytest.raises(InputError, match="finds no zoodip_config.json in .*a finished run") as caught:
        push_only(tmp_path)
    assert caught.value.exit_code == 2


def test_reference_images_are_published_only_on_request(here, run):
    """Asked for, they come without the file names and metadata of the originals; not asked for, they go again."""
    repo_of_run = f"alice/{run.name}"
    push_only(run)
    repo = here.repos[repo_of_run]
    assert not any("reference" in path for path in repo.files) and b"are not published" in repo.files["README.md"]
    push_only(run, "--push_reference_images")
    pushed = sorted(path for path in repo.files if "reference" in path)
    assert pushed == [f"reference_images/image_{i}.png" for i in range(5)]
    assert b"![Reference](reference_images/image_4.png)" in repo.files["README.md"]
    assert Image.open(run / pushed[0]).size == (64, 64)
    push_only(run)
    assert not any("reference" in path for path in repo.files) and b"are not published" in repo.files["README.md"]
    shutil.rmtree(run / "reference_images")
    with pytest.raises(InputError, match="put the pictures"):
        push_only(run, "--push_reference_images")


def test_private_repository_and_full_pipeline(here, run, demo_base):
    config = json.loads((run / "zoodip_config.json").read_text())
    config["settings"]["save_as_full_pipeline"] = True
    results = ResultFolder(run)
    save_full_pipeline(results, "learned_embeds.safetensors", ModelSource(demo_base), torch.float32)
    config["files"] |= results.hashes(["pipeline/**/*"])
    write_json(run / "zoodip_config.json", config)
    (run / "pipeline" / "private.txt").write_text("not of the run")
    push_only(run, "--hub_private_repo")
    repo = here.repos[f"alice/{run.name}"]
    assert repo.private and json.loads(repo.files["model_index.json"])["_class_name"] == "StableDiffusionPipeline"
    assert {"unet/diffusion_pytorch_model.safetensors", "pipeline.py", "learned_embeds.safetensors"} <= set(repo.files)
    assert "private.txt" not in repo.files


def test_card_of_a_local_base(finished):
    text = (finished / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n", 2)[1])
    assert "base_model" not in metadata and "license" not in metadata and "widget" not in metadata
    assert '"path/to/base"' in text and '"./toy"' in text and str(finished.parent) not in text


def test_card_shows_scores_and_replaces_an_older_one(run):
    config = json.loads((run / "zoodip_config.json").read_text())
    (run / "README.md").write_text("old")
    write_model_card(run, {**config, "scores": {"CLIP-I": 0.75}}, zoodip.PUBLICATION)
    assert "| CLIP-I | 0.75 |" in (run / "README.md").read_text()


@pytest.mark.parametrize("variable", ["nobody", "settings.nobody"])
def test_a_template_with_an_unknown_variable_is_an_error(run, monkeypatch, tmp_path, variable):
    template = tmp_path / "model_card_template.md"
    template.write_text("---\n{{ card_data }}\n---\n{{ " + variable + " }}\n")
    monkeypatch.setattr(Publication, "card_template", template)
    with pytest.raises(ValueError, match="nobody"):
        write_model_card(run, json.loads((run / "zoodip_config.json").read_text()), zoodip.PUBLICATION)
