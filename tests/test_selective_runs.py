"""Whole runs of BP-low / ZO-high: outputs, resuming, processes, the Hub, evaluation, and what a user can get wrong."""

import ast
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils._http
import pytest
import torch
from conftest import REPO, _run, as_arguments
from diffusers import StableDiffusionPipeline
from hub_server import TOKEN, HubServer, Repo
from safetensors.torch import load_file

import evaluate_personalization as evaluation
import train_selective_dreambooth_lora as script
from personalization import flags
from personalization.data import examples
from personalization.errors import DivergedError, InputError
from personalization.files import write_json
from personalization.models import base_model


SCRIPT = REPO / "train_selective_dreambooth_lora.py"
WEIGHTS, KOHYA, CONFIG = script.WEIGHTS_FILE, script.KOHYA_FILE, script.PUBLICATION.config_name


@pytest.fixture
def basics(tiny, tmp_path):
    """The shortest valid argument list, as a dict of flags that a test may change."""
    return {
        "--pretrained_model_name_or_path": str(tiny / "base"),
        "--instance_data_dir": str(tiny / "pictures"),
        "--subject_name": "star",
        "--output_dir": str(tmp_path / "out"),
        "--max_train_steps": "6",
        "--report_to": "none",
    }


@pytest.fixture
def train(basics):
    """Trains in this process and returns the output directory."""

    def run(**flags):
        chosen = basics | {f"--{name}": value for name, value in flags.items()}
        script.main(script.parse_args(as_arguments(chosen)))
        return Path(chosen["--output_dir"])

    return run


def read_config(folder):
    return json.loads((folder / CONFIG).read_text())


def launch(flags, expect=0, launcher=("-m", "accelerate.commands.launch"), env=None):
    return _run([sys.executable, *launcher, str(SCRIPT), *as_arguments(flags)], expect, env, 300)


def same_weights(one, other):
    """To the bit; the order of metadata in a safetensors file is another each time."""
    one, other = (load_file(folder / WEIGHTS) for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------ runs


def test_launch_writes_everything(basics):
    basics |= {"--validation_prompt": "a photo of {} on the beach", "--validation_steps": 4, "--rank": 2}
    basics |= {"--num_validation_images": 2, "--num_inference_steps": 2, "--checkpointing_steps": 4}
    basics |= {"--report_to": "tensorboard", "--logging_steps": 2, "--output_kohya_format": True}
    basics |= {"--gradient_checkpointing": True, "--max_train_steps": 8, "--lr_scheduler": "cosine"}
    basics |= {"--bp_progress_midpoint": 0.7}
    output = launch(basics).stderr
    out = Path(basics["--output_dir"])
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and "logs" not in p.parts}
    assert written == {
        *(".lock", WEIGHTS, KOHYA, CONFIG, "README.md", "loss_curve.png"),
        *("samples/image_0.png", "samples/image_1.png"),
        *(f"validation/step-{step:06d}.png" for step in (0, 4, 8)),
        *(f"checkpoint-{n}/{part}" for n in (4, 8) for part in ("state.pt", "settings.json", "manifest.json")),
        *(f"checkpoint-{n}/generators_0.pt" for n in (4, 8)),
    }
    assert "BP-low at 8 px, ZO-high at 16 px" in output and "zo_high=" in output
    assert not any(words in output for words in ("Traceback", "Unsupported layer", "lr_scheduler.step"))
    config, weights, kohya = read_config(out), load_file(out / WEIGHTS), load_file(out / KOHYA)
    updates = config["figures"]["updates"]
    assert sum(updates.values()) == 8 and min(updates.values()) > 0
    assert config["figures"]["forward_passes"] == updates["bp_low"] + 5 * updates["zo_high"]
    assert sum(tensor.numel() for tensor in weights.values()) == config["figures"]["trained_weights"]
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert set(kohya) == {
        f"lora_unet_{name.removeprefix('unet.').rsplit('.lora_', 1)[0].replace('.', '_')}.{part}"
        for name in weights
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert {tensor.item() for name, tensor in kohya.items() if name.endswith("alpha")} == {
        2
    }  # the rank: 4 is in the matrices
    card = (out / "README.md").read_text()
    assert "load_lora_weights" in card and "on pictures of 8 px" in card and '"a photo of star on the beach"' in card
    events = b"".join(path.read_bytes() for path in (out / "logs").rglob("*tfevents*"))
    for name in (b"share_bp_low", b"share_zo_high", b"loss_bp_low", b"lr_zo_high"):
        assert name in events


RESUME = {"--max_train_steps": 12, "--checkpointing_steps": 4, "--train_batch_size": 2, "--lr_scheduler": "cosine"}
RESUME |= {"--gradient_accumulation_steps": 2, "--num_perturbations": 2, "--bp_progress_midpoint": 0.6}


WINDOWS = {"--bp_view": "window", "--bp_timestep_midpoint": 0.6}


@pytest.mark.parametrize("launched, view", [(True, {}), (False, WINDOWS)], ids=["scaled", "window"])
def test_resumed_run_equals_the_uninterrupted_one(basics, tmp_path, caplog, launched, view):
    """By `accelerate launch`: the second run starts from checkpoint-8, the one after it is lost half-written."""
    whole, parts, basics = tmp_path / "whole", tmp_path / "parts", basics | view
    caplog.set_level("INFO")

    def run(words):
        """What the run says."""
        if launched:
            return launch(words).stderr
        script.main(script.parse_args(as_arguments(words)))
        return caplog.text

    run(basics | RESUME | {"--output_dir": whole})
    shutil.copytree(whole, parts)
    (parts / WEIGHTS).unlink()
    (parts / "checkpoint-12").rename(parts / ".tmp-checkpoint-12")
    again = basics | RESUME | {"--output_dir": parts, "--resume_from_checkpoint": "latest"}
    assert "checkpoint-8 at step 8" in run(again)
    assert same_weights(parts, whole)
    states = [torch.load(f / "checkpoint-12" / "state.pt", weights_only=True) for f in (whole, parts)]
    assert states[0]["history"] == states[1]["history"] and states[0]["updates"] == states[1]["updates"]
    assert len(states[0]["history"]["bp_share"]) == len(states[0]["history"]["loss"]) > 0
    for kind in script.KINDS:
        assert states[0]["updates"][kind] > 0
        moments = [state["optimizers"][kind]["state"][0] for state in states]
        assert all(torch.equal(moments[0][name], moments[1][name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_a_stopped_run_is_finished_as_it_is(train, basics):
    """--finish_now writes the result of the newest checkpoint; without one it says so, and no untrained result."""
    with pytest.raises(InputError, match="--finish_now has no checkpoint to write the result of"):
        train(finish_now=True, resume_from_checkpoint="latest")
    out = Path(basics["--output_dir"])
    assert not (out / script.WEIGHTS_FILE).exists()
    train(checkpointing_steps=2)
    (out / script.WEIGHTS_FILE).unlink()
    train(finish_now=True, resume_from_checkpoint="checkpoint-2")
    assert (out / script.WEIGHTS_FILE).is_file()
    assert json.loads((out / script.PUBLICATION.config_name).read_text())["figures"]["steps"] == 2


def test_other_settings_are_not_resumed(train):
    train(checkpointing_steps=3)
    for change in (
        {"rank": 2},
        {"bp_timestep_midpoint": 0.5},
        {"max_train_steps": 7},
        {"low_resolution": 16},
        {"bp_view": "window"},
    ):
        with pytest.raises(InputError, match="belongs to other settings"):
            train(resume_from_checkpoint="latest", **change)


def test_a_run_through_windows_says_so(train):
    out = train(bp_view="window", max_train_steps=2)
    config, card = read_config(out), (out / "README.md").read_text()
    assert "backpropagation on windows of 8 px" in card and config["settings"]["bp_progress_midpoint"] == 100
    assert config["figures"]["updates"] == {"bp_low": 2, "zo_high": 0} and config["figures"]["forward_passes"] == 4


def test_two_processes_stay_identical(basics, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "import torch, train_selective_dreambooth_lora as script\n"
        "from personalization.runs import checkpoints\n"
        "original = checkpoints.save_checkpoint\n"
        "def dump(accelerator, output_dir, state, *rest):\n"
        "    kept = {name: state.shared[name] for name in ('theta', 'updates')}\n"
        "    torch.save(kept, f'{output_dir}/rank-{accelerator.process_index}.pt')\n"
        "    original(accelerator, output_dir, state, *rest)\n"
        "checkpoints.save_checkpoint = dump\n"
        "script.main(script.parse_args(sys.argv[1:]))\n"
    )
    flags = basics | {"--checkpointing_steps": 6, "--bp_progress_midpoint": 0.4}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(driver)]
    _run([*command, *as_arguments(flags)], 0, {"ACCELERATE_USE_CPU": "true"}, 300)
    first, second = (torch.load(tmp_path / "out" / f"rank-{r}.pt", weights_only=True) for r in (0, 1))
    assert torch.equal(first["theta"], second["theta"]) and min(first["updates"].values()) > 0
    assert first["updates"] == second["updates"]
    states = [torch.load(tmp_path / "out" / "checkpoint-6" / f"generators_{r}.pt") for r in (0, 1)]
    assert not torch.equal(states[0]["data"], states[1]["data"])  # each drew its own examples and directions
    assert not torch.equal(states[0]["perturbations"], states[1]["perturbations"])
    assert torch.equal(states[0]["choice"], states[1]["choice"])


def test_validation_and_cache_do_not_disturb_training(train, tmp_path):
    drawing = {"validation_prompt": "a photo of {}", "num_inference_steps": 1, "num_validation_images": 1}
    folders = [train(output_dir=tmp_path / "quiet", quantized_cache_dir="none")]
    for name in ("filled", "mapped"):
        cache = {"quantized_cache_dir": tmp_path / "cache", "output_dir": tmp_path / name}
        folders.append(train(validation_steps=1, **drawing, **cache))
    assert same_weights(folders[0], folders[1]) and same_weights(folders[0], folders[2])


@pytest.mark.parametrize("kind", ["", "zo_"])
def test_nan_stops_and_keeps_the_last_good_adapters(train, tmp_path, kind):
    midpoint = {"bp_timestep_midpoint": -100 if kind else 100, "bp_progress_midpoint": 100}
    with pytest.raises(DivergedError, match=rf"the loss of .* became .* at step \d+: .*--{kind}learning_rate than"):
        train(**{f"{kind}learning_rate": 1e30}, **midpoint, max_train_steps=40, logging_steps=1)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())


def test_prior_preservation_at_both_resolutions(train, tmp_path, monkeypatch):
    folder = tmp_path / "class"
    flags = {"with_prior_preservation": True, "class_data_dir": folder, "class_prompt": "a photo of a star"}
    flags |= {"num_inference_steps": 1, "num_class_images": 2, "num_perturbations": 1, "train_batch_size": 3}
    seen, original = [], script.dreambooth_loss

    def watched(errors, num_instances, weight):
        seen.append((len(errors), num_instances, weight))
        return original(errors, num_instances, weight)

    monkeypatch.setattr(script, "dreambooth_loss", watched)
    out = train(prior_loss_weight=0.25, bp_progress_midpoint=0.5, **flags)
    updates = read_config(out)["figures"]["updates"]
    assert min(updates.values()) > 0 and seen == [(6, 3, 0.25)] * (updates["bp_low"] + 2 * updates["zo_high"])
    assert sorted(path.name for path in folder.iterdir()) == ["class-000000.png", "class-000001.png"]


# ------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture(scope="module")
def hub(tiny):
    with HubServer() as server:
        base = Repo()
        for path in (p for p in (tiny / "base").rglob("*") if p.is_file()):
            base.files[path.relative_to(tiny / "base").as_posix()] = path.read_bytes()
        base.files["README.md"] = b"---\nlicense: creativeml-openrail-m\n---\n# A base model\n"
        server.repos["alice/tiny"] = base
        yield server


def test_a_launched_run_is_pushed_and_drawn_from_the_hub_by_plain_diffusers(hub, tiny, tmp_path):
    """Trained on a base of the Hub, pushed, and loaded by the card's own code, without a file of ours at hand."""
    environment = hub.environment(tmp_path / "home")
    flags = {"--pretrained_model_name_or_path": "alice/tiny", "--instance_data_dir": tiny / "pictures"}
    flags |= {"--subject_name": "star", "--max_train_steps": 3, "--output_dir": tmp_path / "star-lora"}
    flags |= {"--push_to_hub": True, "--validation_prompt": "a {}", "--num_validation_images": 1, "--rank": 2}
    flags |= {"--num_inference_steps": 1, "--report_to": "none", "--output_kohya_format": True}
    done = launch(flags, env=environment)
    assert "Pushed to" in done.stderr and TOKEN not in done.stderr + done.stdout
    files = hub.repos["alice/star-lora"].files
    expected = {".gitattributes", "README.md", WEIGHTS, KOHYA, CONFIG, "loss_curve.png", "samples/image_0.png"}
    assert set(files) == expected
    card = files["README.md"].decode()
    assert "base_model: alice/tiny" in card and "license: creativeml-openrail-m" in card and "- lora" in card
    assert str(tmp_path) not in card + files[CONFIG].decode()
    code = card.split("```python\n")[1].split("```")[0].replace('("a star")', '("a star", num_inference_steps=1)')
    assert "num_inference_steps" in code
    code += "\nlayer = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q"
    code += "\nprint(layer.scaling, pipeline.get_active_adapters())"
    done = _run([sys.executable, "-c", code], 0, environment | {"PYTHONPATH": ""}, 300)
    assert done.stdout.strip().endswith("{'default_0': 1.0} ['default_0']")  # alpha / rank is in the matrices


def test_push_only(hub, train, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = train(output_dir=tmp_path / "later")
    push = ["--push_only", "--output_dir", str(out)]
    script.main(script.parse_args(push))
    repo = hub.repos["alice/later"]
    assert set(repo.files) == {".gitattributes", "README.md", WEIGHTS, KOHYA, CONFIG, "loss_curve.png"}
    (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{WEIGHTS}' .*bring back"):
        script.main(script.parse_args(push))


# ---------------------------------------------------------------------------------------------------------- evaluation


def column(folder, base):
    source = base_model.ModelSource(str(base))
    return evaluation.read_column(f"lora={folder}", base_model.open_base(source))


def test_a_lora_is_a_column_that_leaves_the_pipeline_as_it_was(train, tiny):
    out = train(max_train_steps=8, learning_rate=0.05)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny / "base")
    pipeline.set_progress_bar_config(disable=True)

    def draw(drawing):
        options = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
        return drawing("a star", **options).images

    before = draw(pipeline)
    result = column(out, tiny / "base")
    assert result.word == "star" and result.trainer == SCRIPT and result.config_path == out / CONFIG
    with evaluation.showing(result, pipeline) as showing:
        shown = draw(showing)
    assert not torch.equal(shown, before) and torch.equal(draw(pipeline), before)
    again = StableDiffusionPipeline.from_pretrained(tiny / "base")
    again.load_lora_weights(out)
    assert torch.equal(draw(again), shown)


def test_results_that_cannot_be_a_column(train, tiny):
    out = train()
    config = read_config(out)
    for change, expected in [
        ({"settings": config["settings"] | {"subject_name": None}}, "does not say what its subject is called"),
        ({"base_model": "another"}, "was learned on 'another' and not on"),
        ({"settings": None}, "holds no config that can be read"),
    ]:
        write_json(out / CONFIG, config | change)
        with pytest.raises(InputError, match=expected):
            column(out, tiny / "base")
    (out / CONFIG).unlink()
    with pytest.raises(InputError, match="has no selective_config.json, which says what its subject is called"):
        column(out, tiny / "base")


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def fault(basics, monkeypatch, capsys):
    """The sentence a changed command line is refused with, before any weight is loaded."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded before the input was judged")

    monkeypatch.setattr(base_model, "stored_tensors", refuse)
    monkeypatch.setattr(examples, "load_vae_encoder", refuse)

    def run(**flags):
        words = as_arguments(basics | {f"--{name}": value for name, value in flags.items()})
        try:
            script.main(script.parse_args(words))
        except SystemExit as exit:
            assert exit.code == 2
            message = capsys.readouterr().err
            assert message.count("\n") == 1 and "usage:" not in message
            return message
        except InputError as error:
            assert "\n" not in str(error) and error.exit_code == 2
            return str(error)
        raise AssertionError("accepted")

    return run


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"low_resolution": 24}, "--low_resolution 24 is above --resolution 16"),
        ({"low_resolution": 12, "resolution": 32}, "--low_resolution 12 must be divisible by"),
        ({"low_resolution": 0}, "--low_resolution 0 must be at least 8"),
        ({"resolution": 20}, "--resolution 20 must be divisible by 8"),
        ({"rank": 0}, "--rank 0 must be at least 1"),
        ({"lora_alpha": 0}, "--lora_alpha 0 must be at least 1"),
        ({"lora_layers": "to_k,to_z"}, "--lora_layers: this UNet has no layer 'to_z': give ends of the names"),
        ({"lora_layers": "to_k,"}, "--lora_layers: this UNet has no layer ''"),
        ({"lora_layers": "conv1"}, "--lora_layers: 'conv1' is no linear layer (Conv2d)"),
        ({"lora_layers": "o_k"}, "--lora_layers: this UNet has no layer 'o_k'"),
        ({"quantization": "quanto-int8"}, "argument --quantization: invalid choice"),
        ({"bp_timestep_width": 0}, "--bp_timestep_width 0.0 must be a finite number of at least 1e-06"),
        ({"bp_progress_midpoint": "nan"}, "--bp_progress_midpoint nan must be a finite number"),
        ({"num_perturbations": 0}, "--num_perturbations 0 must be at least 1"),
        ({"zo_learning_rate": -1}, "--zo_learning_rate -1.0 must be a finite number above"),
        ({"lora_dropout": 0.1}, "--lora_dropout means nothing here: all forward passes of a ZO-high step"),
        ({"class_prompt": "a star"}, "--class_prompt is for --with_prior_preservation"),
        ({"with_prior_preservation": True, "class_data_dir": "x"}, "--with_prior_preservation needs --class_prompt"),
        ({"train_text_encoder": True}, "--train_text_encoder means nothing here: the text encoder is frozen"),
        ({"subject_name": None}, "the caption of a.png, 'a {} on the beach', says {} where the subject goes"),
        ({"instance_data_dir": "/nowhere"}, "--instance_data_dir '/nowhere' is not a folder"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 is unusably slow on a CPU"),
        ({"num_inference_steps": 1001}, "--num_inference_steps 1001 must be at least 1 and at most 1000"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint 'checkpoint-7' is not a checkpoint"),
    ],
)
def test_bad_flag(fault, flags, expected):
    assert expected in fault(**flags)


def test_more_inference_steps_than_timesteps(fault, tiny, tmp_path):
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 100}))
    flags = {"pretrained_model_name_or_path": base, "num_inference_steps": 101}
    assert "--num_inference_steps 101 is more than this model has timesteps: give at most 100" in fault(**flags)


def test_a_process_ends_with_exit_code_2(basics):
    done = launch(basics | {"--low_resolution": "24"}, expect=2, launcher=())
    assert done.stderr.strip().count("\n") == 0 and "above --resolution 16" in done.stderr


ACTIONS = flags.actions(script.make_parser())


def test_every_number_has_a_range(basics, capsys):
    numbers = {name: action for name, action in ACTIONS.items() if action.type in (int, float)}
    assert len(numbers) > 30
    for name, action in numbers.items():
        for value in ["nan", "inf"] if action.type is float else [-1, 10**30]:
            with pytest.raises(SystemExit) as end:
                script.parse_args(as_arguments(basics | {f"--{name}": value}))
            assert end.value.code == 2 and str(action.facts.limits) in capsys.readouterr().err


def test_every_flag_is_read():
    """Each is read as `args.name` in script or package, outside parser and checks."""
    read = set()
    for path in (SCRIPT, *(p for p in (REPO / "personalization").rglob("*.py") if p.stem != "flags")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        readers = [n for n in body if getattr(n, "name", "") not in ("parse_args", "check_subject_arguments")]
        read |= {
            node.attr
            for reader in readers
            for node in ast.walk(reader)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
        }
    of_folders = {"instance_data_dir", "class_data_dir"}  # read in a loop over both
    assert len(ACTIONS) > 50 and ACTIONS.keys() - read - of_folders == set()
