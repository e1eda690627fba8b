"""What a visitor of the web page chose, as the command line of one of the scripts: their methods, flags and limits."""

import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ..errors import InputError, quoted
from ..flags import described_flags, did_you_mean


REPO = Path(__file__).resolve().parents[2]
DEMO_BASE = REPO / "demo" / "base_eps"


# =====================================================================================================
# Methods
# =====================================================================================================


@dataclass(frozen=True)
class Method:
    """A way to learn a concept: one of the scripts.

    Args:
        title, about: for the page.
        script: its file; a method is offered where it is there.
        pictures_flag: which flag takes the folder of pictures.
        makes_a_word: whether the concept is a new word; otherwise a few plain words stand for it.
        result_name, config_name: files in the folder of a run that is done.
        defaults: flags for real models.
        demo: flags for the demo base, whose runs take a minute.
    """

    title: str
    about: str
    script: str
    pictures_flag: str
    makes_a_word: bool
    result_name: str
    config_name: str
    defaults: dict
    demo: dict

    @property
    def path(self):
        return REPO / self.script

    @property
    def flags(self):
        """What the script's flags say of themselves, by name: see `flags.describe_flag`."""
        return described_flags(self.script)

    @property
    def fields(self):
        """Names of the flags that fields of the page stand for, and no visitor may give beside them."""
        subject = {"placeholder_token", "initializer_token"} if self.makes_a_word else {"subject_name"}
        return {"pretrained_model_name_or_path", self.pictures_flag, "validation_prompt", *subject}

    def refusal(self, name):
        """Why a visitor may not give a flag, as the end of a sentence; None where it is offered."""
        flag = self.flags.get(name)
        if flag is None:
            offered = [f"--{known}" for known, flag in self.flags.items() if flag["page"]]
            return f"is no flag of {self.script}{did_you_mean(f'--{name}', offered)}"
        if flag["page"]:
            return None
        if name in self.fields:
            return "has a field of its own on this page."
        return "names a file on the server." if flag["path"] else "is not offered to visitors of this page."


METHODS = {
    "word": Method(
        title="A new word",
        about="Learns one word on the quantized model, with little more memory than generating takes; the result is a"
        " few kilobytes. --recipe fast follows the exact gradient, paper is ZOODiP: forward passes alone.",
        script="train_zoodip_textual_inversion.py",
        pictures_flag="train_data_dir",
        makes_a_word=True,
        result_name="learned_embeds.safetensors",
        config_name="zoodip_config.json",
        defaults={
            "recipe": "fast",
            "center_crop": True,
            "max_train_steps": 500,
            "validation_steps": 50,
            "checkpointing_steps": 50,
        },
        demo={
            "recipe": "fast",
            "center_crop": True,
            "learning_rate": 0.05,  # as in demo/run_demo.py, for few steps
            "gradient_checkpointing": "none",  # a small model has room for its activations
            "max_train_steps": 150,
            "flip_probability": 0,
            "validation_steps": 50,
            "checkpointing_steps": 50,
            "guidance_scale": 4,
        },
    ),
    "scales": Method(
        title="Tuned scales (TuneQDM)",
        about="Tunes the scales of the quantized model itself, with a backward pass: more memory than a word takes.",
        script="train_tuneqdm_dreambooth.py",
        pictures_flag="instance_data_dir",
        makes_a_word=False,
        result_name="tuneqdm_scales.safetensors",
        config_name="tuneqdm_config.json",
        defaults={
            "max_train_steps": 400,
            "gradient_checkpointing": True,
            "validation_steps": 100,
            "checkpointing_steps": 50,
        },
        demo={
            "max_train_steps": 200,
            "train_batch_size": 4,
            "validation_steps": 50,
            "checkpointing_steps": 50,
            "guidance_scale": 4,
        },
    ),
    "lora": Method(
        title="A LoRA (selective)",
        about="Trains small adapters by backpropagation through windows of the pictures, with the memory of half the"
        " resolution; any program that reads a LoRA can use it.",
        script="train_selective_dreambooth_lora.py",
        pictures_flag="instance_data_dir",
        makes_a_word=False,
        result_name="pytorch_lora_weights.safetensors",
        config_name="selective_config.json",
        defaults={
            "bp_view": "window",
            "max_train_steps": 500,
            "gradient_checkpointing": True,
            "validation_steps": 100,
            "checkpointing_steps": 50,
        },
        demo={
            "bp_view": "window",
            "max_train_steps": 200,
            "learning_rate": 2e-3,
            "zo_learning_rate": 2e-3,
            "train_batch_size": 4,
            "validation_steps": 50,
            "checkpointing_steps": 50,
            "guidance_scale": 4,
        },
    ),
}


def offered_methods():
    """The `METHODS` whose script is here, by key."""
    return {key: method for key, method in METHODS.items() if method.path.is_file()}


def is_demo(base):
    return Path(str(base)).resolve() == DEMO_BASE if str(base or "").strip() else False


FITS = "cropped", "squeezed", "whole"  # to the model's square, or in buckets of about their own shape


def fit_of(method, others):
    """How pictures get the model's size, one of `FITS`, by a method and the other flags as they are typed."""
    words = str(others or "").split()
    if "--use_aspect_ratio_buckets" in words:
        return "whole"
    makes_a_word = method in METHODS and METHODS[method].makes_a_word
    return "squeezed" if makes_a_word and "--center_crop" not in words else "cropped"


def default_flags(method, base):
    """The flags of a method that fit a base, by name."""
    return dict(METHODS[method].demo if is_demo(base) else METHODS[method].defaults)


# =====================================================================================================
# Command lines
# =====================================================================================================


@dataclass(frozen=True)
class Form:
    """What a visitor has chosen.

    Args:
        concept: its name, the folder of pictures.
        base: folder or id on the Hub.
        method: key of `METHODS`.
        class_word: the plain word for the subject, which is what it starts from: dog.
        subject: what stands for it in prompts: the new word <my-dog>, or plain words, sks dog.
        prompt: of the validation images, {} where the subject stands.
        flags: name -> value of the other settings; None and "" leave a flag out, True is a bare one.
        others: more flags, as they are typed.
    """

    concept: str
    base: str
    method: str
    class_word: str
    subject: str
    prompt: str
    flags: dict = field(default_factory=dict)
    others: str = ""


def launcher():
    """The words before a script: accelerate, told everything that it would ask or warn about."""
    wanted = re.match(r"\s*(\d{1,4})", os.environ.get("OMP_NUM_THREADS", ""))  # "4,2" is of nested loops
    threads = int(wanted[1] if wanted else 0) or psutil.cpu_count(logical=False) or 1
    words = "accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    return [*words.split(), "--num_cpu_threads_per_process", str(threads)]


def read_others(text, method):
    """More flags, as they are typed, as a dict.

    Raises:
        InputError: they cannot be read, or one of them is none that a visitor may give.
    """
    try:
        words = shlex.split(str(text or ""))
    except ValueError as error:
        raise InputError(f"The other flags cannot be read ({error}): write them as on a command line.") from None
    flags, last = {}, None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if why := METHODS[method].refusal(name):
                raise InputError(f"--{plain_flag(name)} cannot be set here: it {why}")
            flags[name], last = value if equals else True, name
        elif last is not None and flags[last] is True:
            flags[last] = word
        else:
            raise InputError(f"{quoted(word)} among the other flags belongs to no flag: write --name value.")
    return flags


def plain_flag(name):
    return re.sub(r"[^\w-]", "?", name[:40])


def training_command(form, pictures, output_dir, cache):
    """The words of the command line that a form stands for.

    Args:
        form: `Form`, its base checked by the workspace.
        pictures: folder.
        output_dir: folder of the run.
        cache: folder of quantized weights.

    Raises:
        InputError: something is missing; the sentence says what.
    """
    method = METHODS[form.method]
    if not form.class_word.strip():
        raise InputError("Say in one plain word what the pictures show, such as dog.")
    if not form.subject.strip():
        raise InputError("Give the concept a name in prompts, such as <my-dog>.")
    prompt = (form.prompt or "").strip()
    if prompt and "{}" not in prompt and form.subject not in prompt:
        raise InputError(
            f"The prompt of previews {quoted(prompt)} does not say where the concept goes: put {{}} there."
        )
    flags = {"pretrained_model_name_or_path": form.base, method.pictures_flag: pictures}
    if method.makes_a_word:
        flags |= {"placeholder_token": form.subject.strip(), "initializer_token": form.class_word.strip()}
    else:
        flags |= {"subject_name": form.subject.strip(), "instance_prompt": "a photo of {}"}
    flags |= {"validation_prompt": prompt or None, **form.flags, **read_others(form.others, form.method)}
    flags |= {"checkpoints_total_limit": flags.get("checkpoints_total_limit", 2), "report_to": "tensorboard"}
    flags |= {"quantized_cache_dir": cache, "output_dir": output_dir, "resume_from_checkpoint": "latest"}  # if any
    return [*launcher(), method.script, *flag_words(flags)]


def flag_words(flags):
    """Flags by name as words; None, "" and False leave one out, True is a bare one."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False and value != "":
            value = f"{value:g}" if isinstance(value, float) else str(value)
            words += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    return words


def shown(command, start=REPO):
    """A command line to copy: a flag a line, paths below the repository, from where it is run, relative."""
    words = [os.path.relpath(w, start) if Path(w).is_relative_to(start) and Path(w) != start else w for w in command]
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    lines = [words[:script], [words[script]]] if script > 1 else [words[: script + 1]]
    for word in words[script + 1 :]:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(map(shlex.join, lines))


def to_copy(command):
    """The same for a shell anywhere: it goes to the repository first, and uses the Python that this server runs in."""
    python = Path(sys.executable)
    launcher = python.with_name("accelerate")
    own = [launcher] if launcher.is_file() else [python, "-m", "accelerate.commands.accelerate_cli"]
    words = [*map(str, own if command[0] == "accelerate" else [python]), *command[1:]]
    return f"cd {shlex.quote(str(REPO))} && \\\n  {shown(words)}"


def with_flags(command, **changed):
    """A command line with some of its flags changed or added; None takes one out."""
    words, result, i = list(command), [], 0
    while i < len(words):
        j = i + 1
        if words[i].startswith("--") and words[i][2:] in changed:
            while j < len(words) and not words[j].startswith("--"):
                j += 1
            i = j
            continue
        result.append(words[i])
        i = j
    return [*result, *flag_words(changed)]


def flag_of(command, name, otherwise=None):
    """The value of a flag in a command line."""
    return command[command.index(f"--{name}") + 1] if f"--{name}" in command[:-1] else otherwise
