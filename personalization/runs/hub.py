"""Publishing a finished run: checks before training, the model card, the upload."""

import contextlib
import glob
import inspect
import json
import logging
import os
import re
import shlex
import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

import jinja2
from huggingface_hub import (
    ModelCard,
    ModelCardData,
    auth_check,
    create_repo,
    get_token,
    set_client_factory,
    upload_folder,
)
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id
from huggingface_hub.utils._http import default_client_factory
from safetensors import safe_open

from ..errors import InputError, PushError, Stopped, reason
from ..files import atomic_path, check_writable, read_json, sha256, write_json
from ..models.embedding_files import file_stem
from ..models.families import FAMILIES, SD1
from ..models.single_file import SUFFIXES
from . import run_folder


REFERENCE_IMAGES = "reference_images/*.png"  # published on request only

# Seconds: what a request waits for the next bytes, what all checks before training may take, and what an upload may
# take, to which its size adds at the slowest line that is worth waiting for.
REQUEST_SECONDS = float(os.environ.get("ZOODIP_HUB_TIMEOUT", 30))
CHECK_SECONDS = REQUEST_SECONDS
UPLOAD_SECONDS = 20 * REQUEST_SECONDS
SLOWEST_BYTES_PER_SECOND = 50_000


@dataclass(frozen=True)
class Publication:
    """What a trainer publishes.

    Args:
        script: path of the trainer, which messages name; its template and pipeline lie beside it.
        config_name: the file in a run's folder that says how it was made.
        result_name: the file that was learned; without it a run is not finished.
        files: patterns of what else a user of the result needs; never checkpoints, logs or the base model.
        pipeline_name: of what travels to the Hub as `pipeline.py`; None where diffusers needs no code of ours.
        tags: of the card.
        best_name: the file with the lowest validation loss, one of `files`.
        card_name: template of the model card, from the script's folder.
        load: how a pipeline of diffusers takes up what was learned, by itself; None where it needs `pipeline_name`.
        keyword: under which `pipeline_name` takes it up.
        families: name -> family, where `pipeline_name` depends on that of the base.
        named: ends of the names of files that are called after the concept.
        reference_images: pattern of the training images, which are published on request only.
    """

    script: Path
    config_name: str
    result_name: str
    files: tuple
    pipeline_name: str | None
    tags: tuple
    best_name: str = "learned_embeds-best.safetensors"
    card_name: str = "model_card_template.md"
    load: str | None = None
    keyword: str | None = None
    families: dict = field(default_factory=dict)
    named: tuple = ()
    reference_images: str = REFERENCE_IMAGES

    def of_concept(self, token):
        """The same with the files that are named after a concept, "my-dog.safetensors" of "<my-dog>"."""
        stem = file_stem(token) if isinstance(token, str) and self.named else ""
        if not stem or stem.startswith("learned_embeds"):  # which a result is called anyway
            return self
        return replace(self, files=tuple(dict.fromkeys([*self.files, *(stem + suffix for suffix in self.named)])))

    def pipeline_file(self, config):
        """What travels as `pipeline.py` with the result of a run, by its config; None where nothing does."""
        family = self.families.get(config.get("family"))
        name = self.pipeline_name if family is None else family.pipeline_file
        return name and self.script.with_name(name)

    @property
    def name(self):
        """Of the trainer, in short."""
        return self.config_name.removesuffix("_config.json")

    @property
    def card_template(self):
        return self.script.parent / self.card_name

    @property
    def all_files(self):
        return [self.result_name, self.config_name, "pipeline.py", "README.md", *self.files]


# =====================================================================================================
# Before training
# =====================================================================================================


def within(seconds, function, *args, **options):
    """Calls a function that talks to the Hub, and waits no longer than this for its result.

    Its requests give up by themselves where the Hub falls silent; one that trickles is left behind in its thread.

    Raises:
        TimeoutError: there is no result in time.
    """
    set_client_factory(_impatient_client)
    outcome = {}

    def call():
        try:
            outcome["result"] = function(*args, **options)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "result" not in outcome:
        raise TimeoutError(f"the Hub gave no answer within {seconds:.0f} s")
    return outcome["result"]


def _impatient_client():
    """The Hub's HTTP client, which by itself would wait for ever."""
    client = default_client_factory()
    client.timeout = REQUEST_SECONDS
    return client


def hub_reason(error, token):
    """What the Hub or the way to it said, on one line and without the token, which HTTP clients sometimes quote."""
    if isinstance(error, RuntimeError) and error.__cause__:  # "Error while uploading ...": the reason is behind it
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return (text.replace(token, "[token]") if token else text)[:500]


def prepare_hub(wanted, private, token):
    """Checks that a push can work (name, token, right to write), before any training, and makes the repository.

    Args:
        wanted: "name" or "namespace/name".
        private: whether a new repository is.
        token: to push with; None takes the one of the login.

    Returns:
        Its id, "namespace/name".

    Raises:
        InputError: it cannot work.
    """
    token = token or get_token()
    try:
        validate_repo_id(wanted)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {wanted!r} is no name for a repository ({error}): give another.") from None
    if not token:
        raise InputError("--push_to_hub needs a token with the right to write: run hf auth login or set HF_TOKEN.")
    try:
        repo_id = within(CHECK_SECONDS, _make_repository, wanted, private, token)
    except Exception as error:  # HTTP, connection and offline errors alike
        status = getattr(getattr(error, "response", None), "status_code", None)
        fixes = {
            401: "log in again with hf auth login",
            403: "use a token with the right to write there, or another --hub_model_id",
        }
        fix = fixes.get(status, "try again later, or train without --push_to_hub and push with --push_only")
        raise InputError(f"the Hub refused {wanted!r} ({hub_reason(error, token)}): {fix}.") from None
    return repo_id


def _make_repository(wanted, private, token):
    """Makes the repository where there is none, and asks for the right to write there; returns its id."""
    repo_id = create_repo(wanted, token=token, private=private or None, exist_ok=True).repo_id
    try:  # a repository of someone else "exists" too
        auth_check(repo_id, token=token, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):  # others: a Hub that does not know this question
            raise
    return repo_id


# =====================================================================================================
# The model card
# =====================================================================================================


def base_license(base):
    """The licence fields of a base model's card, carried over to what was learned from it; {} where it has none."""
    card = Path(base) / "README.md" if os.path.exists(base) else base
    if isinstance(card, Path) and not card.is_file():
        return {}
    with contextlib.suppress(Exception):  # no card, no network, no licence: then the card says nothing of it
        data = within(CHECK_SECONDS, ModelCard.load, card, ignore_metadata_errors=True).data.to_dict()
        return {name: data[name] for name in ("license", "license_name", "license_link") if name in data}
    return {}


def opener(base):
    """The method of a pipeline of diffusers that opens a base, by its name."""
    return "from_single_file" if base.lower().endswith(SUFFIXES) else "from_pretrained"


def example_prompt(config):
    """A prompt with what was learned, by a run's config."""
    settings = config["settings"]
    prompt = settings["validation_prompt"] or settings.get("instance_prompt") or "a photo of {}"
    return prompt.replace("{}", config["placeholder_token"])


def prompt_keyword(family):
    """What must be written before a prompt where a family's pipeline is called: "" where it comes first."""
    first = list(inspect.signature(family.pipeline.__call__).parameters)[1]
    return "" if first == "prompt" else "prompt="


def write_config(results, config, publication, repo_id=None):
    """Writes a run's config and model card, from what it has recorded as its own.

    Args:
        results: `run_folder.ResultFolder`.
        config: its content; "files" is filled in.
        publication, repo_id: as for `write_model_card`.
    """
    publication = publication.of_concept(config["placeholder_token"])
    what_may_travel = [publication.result_name, *publication.files, REFERENCE_IMAGES, f"{run_folder.PIPELINE}/**/*"]
    config["files"] = results.hashes(what_may_travel)
    write_json(results.folder / publication.config_name, config)
    write_model_card(results.folder, config, publication, repo_id)


def one_line(value):
    """A value as a card shows it, and what is in it: text on one line, without what cannot be seen."""
    if isinstance(value, dict):
        return {one_line(key): one_line(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [one_line(each) for each in value]
    if not isinstance(value, str):
        return value
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def as_text(value):
    """Anything as Markdown that shows it and means nothing else, in a table, too."""
    return re.sub(r"([\\`*_\[\]<>#|~!&])", r"\\\1", one_line(str(value)))


def as_code(value):
    """Anything as a code span of Markdown."""
    text = one_line(str(value)) or " "
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def as_cell(value):
    """`as_code` in a table."""
    return as_code(value).replace("|", "\\|")


def as_python(value):
    """Text as a literal of Python, which ends no block of code."""
    return json.dumps(value, ensure_ascii=False).replace("`", "\\u0060")


def write_model_card(output_dir, config, publication, repo_id=None):
    """Fills the template into `README.md`, from the config and the files that the run recorded there as its own.

    Args:
        output_dir: folder of the run.
        config: its config file; what an evaluation adds there as "scores" (name: value) is shown too.
        publication: `Publication`.
        repo_id: "namespace/name" on the Hub; None writes the card for local use.

    Raises:
        ValueError: the template uses a variable that is not given (`from_template` would leave a blank).
    """
    template = publication.card_template
    if not template.is_file():
        logging.warning(f"{template.name} is not beside the script: no model card was written.")
        return
    output_dir, settings, recorded = Path(output_dir), config["settings"], config.get("files")
    local, base, token = config["base_model_is_local"], config["base_model"], config["placeholder_token"]
    prompt, publication = example_prompt(config), publication.of_concept(token)
    own = run_folder.own_files(output_dir, publication.files, recorded)
    samples = [name for name in own if name.startswith("samples/")]
    references = run_folder.own_files(output_dir, [REFERENCE_IMAGES] * settings["push_reference_images"], recorded)
    family = FAMILIES.get(config.get("family"), SD1)
    data = ModelCardData(
        base_model=None if local else base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(dict.fromkeys([*config.get("tags", ()), *publication.tags, family.tag])),
        instance_prompt=one_line(token),
        widget=[{"text": one_line(prompt), "output": {"url": url}} for url in samples] or None,
        **config["base_license"],
    )
    name = repo_id.split("/")[-1] if repo_id else output_dir.resolve().name
    linked = not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
    pipeline = publication.pipeline_file(config)
    values = {
        **{"text": as_text, "code": as_code, "cell": as_cell, "python": as_python},  # how cards show what users wrote
        **one_line({key: config[key] for key in "method settings components figures hardware".split()}),
        "placeholder_token": token,
        "scales": one_line(config.get("scales")),
        "paired": len(family.text_encoders) > 1,
        "of_output": settings.get("learn") == "output",
        "loads_words": publication.load is not None and hasattr(family.pipeline, publication.load),
        "pipeline_class": family.pipeline.__name__,
        "denoiser": family.denoiser,
        "denoiser_label": family.denoiser_label,
        "repo_id": repo_id,
        "name": name,
        "concept": repo_id or f"./{name}",
        "pipeline_source": repo_id or (pipeline and f"./{pipeline.name}"),
        "base_model": f"path/to/{base}" if local else base,
        "base_link": f"[{base}](https://huggingface.co/{base})" if linked else f"the local model {as_cell(base)}",
        "base_is_local": local,
        "opens_base": opener(base),
        "prompt": prompt_keyword(family) + as_python(prompt),
        "samples": samples,
        "reference_images": list(map(quote, references)),
        "word_file": next((name for name in own if name == f"{file_stem(token)}.safetensors"), None),
        "has_best": publication.best_name in own,
        "has_loss_curve": "loss_curve.png" in own,
        "scores": config.get("scores", {}),
        "license": config["base_license"].get("license_name") or config["base_license"].get("license"),
    }
    strict = jinja2.Environment(undefined=jinja2.StrictUndefined)
    try:
        strict.from_string(template.read_text(encoding="utf-8")).render(card_data="", **values)
    except jinja2.UndefinedError as error:
        raise ValueError(f"{template.name} uses a variable that nobody fills: {error}") from None
    card = ModelCard.from_template(data, template_path=str(template), **values)
    with atomic_path(output_dir / "README.md") as temporary:
        temporary.write_text(str(card), encoding="utf-8")


# =====================================================================================================
# The upload
# =====================================================================================================


def push_to_hub(output_dir, config, publication, repo_id, token):
    """Uploads a finished run in one commit (a full pipeline, if asked for, in a second); returns the commit's URL.

    Args:
        output_dir: folder of the run.
        config: its config file.
        publication: `Publication`.
        repo_id: "namespace/name", which exists.
        token: to push with; None takes the one of the login.

    Raises:
        PushError: the upload failed; the results stay in `output_dir`.
    """
    output_dir, settings = Path(output_dir), config["settings"]
    publication = publication.of_concept(config["placeholder_token"])
    stale = publication.all_files + [REFERENCE_IMAGES]  # what an earlier push left there and this one does not renew
    to = {"repo_id": repo_id, "token": token, "commit_message": f"Learn {config['placeholder_token']}"}
    try:
        commit = _upload(output_dir, _names_to_push(output_dir, config, publication), delete_patterns=stale, **to)
        names = run_folder.own_files(output_dir, [f"{run_folder.PIPELINE}/**/*"], config.get("files"))
        if settings.get("save_as_full_pipeline") and names:
            names = [name.removeprefix(f"{run_folder.PIPELINE}/") for name in names]
            commit = _upload(output_dir / run_folder.PIPELINE, names, **to)
    except (Exception, KeyboardInterrupt) as error:  # huggingface_hub, httpx and OS errors alike: nothing is lost
        stopped = isinstance(error, KeyboardInterrupt)
        why = "it was stopped" if stopped else hub_reason(error, token or get_token())
        raise (Stopped if stopped else PushError)(
            f"the run in {output_dir} is finished and safe, but not on the Hub ({why}); push it later with: python"
            f" {publication.script.name} --push_only --output_dir {shlex.quote(str(output_dir))} --hub_model_id"
            f" {repo_id}"
        ) from None
    return commit.commit_url


def _names_to_push(output_dir, config, publication):
    """Relative names of what belongs to a run and may be published; `pipeline.py` is put among them."""
    patterns = [publication.result_name, *publication.files]
    patterns += [REFERENCE_IMAGES] * config["settings"]["push_reference_images"]
    names = run_folder.own_files(output_dir, patterns, config.get("files"))
    for name in sorted(set(config.get("files", ())) - set(names)):
        if not name.startswith(("reference_images/", f"{run_folder.PIPELINE}/")):
            logging.warning(f"{output_dir / name} is not what the run wrote there: it is not pushed.")
    renewed = [publication.config_name]
    if publication.card_template.is_file():
        renewed.append("README.md")
    pipeline_file = publication.pipeline_file(config)
    if pipeline_file and pipeline_file.is_file():  # on the Hub, diffusers looks for custom code under this name only
        with atomic_path(output_dir / "pipeline.py") as temporary:
            shutil.copyfile(pipeline_file, temporary)
        renewed.append("pipeline.py")
    return names + run_folder.own_files(output_dir, renewed, None)


def _upload(folder, names, **options):
    """One commit of exactly these files."""
    patience = UPLOAD_SECONDS + sum((folder / name).stat().st_size for name in names) / SLOWEST_BYTES_PER_SECOND
    exact = [glob.escape(name) for name in names]
    return within(patience, upload_folder, folder_path=folder, allow_patterns=exact, **options)


# =====================================================================================================
# A push without training
# =====================================================================================================

# What the model card and the upload read of a run's config, and of what type it is.
CONFIG_TYPES = {
    "method": str,
    "placeholder_token": str,
    "base_model": str,
    "base_model_is_local": bool,
    "base_license": dict,
    "settings": {
        "push_reference_images": bool,
        "hub_private_repo": bool,
        "hub_model_id": (str, type(None)),
        "validation_prompt": (str, type(None)),
    },
    "hardware": {"device": str, "name": str},
    "components": dict,
    "figures": {"steps": int, "seconds": (int, float)},
}


def check_types(content, types, name):
    """Raises a `ValueError`, half a sentence, unless a dict has the keys of `types` with values of these types."""
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no object")
    for key, wanted in types.items():
        if key not in content:
            raise ValueError(f"{name} has no {key!r}")
        if isinstance(wanted, dict):
            check_types(content[key], wanted, key)
        elif not isinstance(content[key], wanted):
            raise ValueError(f"{key!r} is {str(content[key])[:50]!r}")


def read_finished_run(output_dir, publication):
    """The config of a finished run, checked, like the embedding beside it.

    Raises:
        InputError: there is no finished run, or a file of it is damaged.
    """
    for name in (publication.config_name, publication.result_name):
        if not (output_dir / name).is_file():
            raise InputError(f"--push_only finds no {name} in {str(output_dir)!r}: give the folder of a finished run.")
    try:
        config = read_json(output_dir / publication.config_name)
        check_types(config, CONFIG_TYPES, "the file")
        if not isinstance(config.get("files", {}), dict):
            raise ValueError("'files' is no object")
    except (OSError, ValueError) as error:
        raise damaged_run(output_dir / publication.config_name, reason(error)) from None
    result = output_dir / publication.result_name
    if not run_folder.own_files(output_dir, [publication.result_name], config.get("files")):
        raise damaged_run(result, f"it is not the one that {publication.config_name} describes")
    try:
        with safe_open(result, framework="pt") as file:
            file.keys()
    except Exception as error:
        raise damaged_run(result, reason(error)) from None
    return config


def damaged_run(path, why):
    return InputError(
        f"--push_only cannot push {str(path)!r} ({why}): bring back the file that the run wrote, or repeat the run's"
        " command with --resume_from_checkpoint latest, which writes its results again."
    )


def prepare(args, accelerator):
    """Makes sure of the Hub, where the result of a run is to be pushed there; returns the repository's id, or None."""
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    wanted = args.hub_model_id or Path(args.output_dir).resolve().name
    return prepare_hub(wanted, args.hub_private_repo, args.hub_token)


def push_only(args, publication):
    """`--push_only`: uploads the finished run in `--output_dir` as it was set up, with its model card renewed.

    Args:
        args: the flags of the Hub group (`flags.add_hub_arguments`) and output_dir.
        publication: `Publication`.

    Returns:
        The commit's URL.

    Raises:
        InputError: there is no finished run, or another run is writing there.
        PushError: the Hub refused it or the upload failed.
    """
    output_dir = Path(args.output_dir)
    config = read_finished_run(output_dir, publication)
    check_writable("--output_dir", args.output_dir)
    with run_folder.occupied(output_dir):
        settings = config["settings"]
        if args.push_reference_images:  # those that lie there, whoever put them there: that is what is asked for
            pictures = run_folder.regular_files(output_dir, [REFERENCE_IMAGES])
            if not pictures:
                raise InputError(
                    f"--push_reference_images: put the pictures as PNG into {output_dir / 'reference_images'}."
                )
            settings["push_reference_images"] = True
            if "files" in config:
                config["files"] |= {name: sha256(output_dir / name) for name in pictures}
        wanted = args.hub_model_id or settings["hub_model_id"] or output_dir.resolve().name
        try:
            repo_id = prepare_hub(wanted, args.hub_private_repo or settings["hub_private_repo"], args.hub_token)
        except InputError as error:
            raise PushError(error) from None
        try:
            write_model_card(output_dir, config, publication, repo_id)
        except (KeyError, TypeError, ValueError, AttributeError, jinja2.TemplateError) as error:
            why = f"{type(error).__name__}: {reason(error)}"
            raise damaged_run(output_dir / publication.config_name, why) from None
        return push_to_hub(output_dir, config, publication, repo_id, args.hub_token)
