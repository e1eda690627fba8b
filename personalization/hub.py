"""Publishing a finished run: checks before training, the model card, the upload."""

import contextlib
import json
import logging
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard, ModelCardData, auth_check, create_repo, get_token, upload_folder
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

from .errors import InputError, PushError
from .runs import atomic_path


REFERENCE_IMAGES = "reference_images/*.png"  # published on request only


@dataclass(frozen=True)
class Publication:
    """What a trainer publishes.

    Args:
        script: path of the trainer, which messages name; its template and pipeline lie beside it.
        config_name: the file in a run's folder that says how it was made.
        result_name: the file that was learned; without it a run is not finished.
        files: patterns of what else a user of the result needs; never checkpoints, logs or the base model.
        pipeline_name: of what travels to the Hub as `pipeline.py`.
        tags: of the card.
    """

    script: Path
    config_name: str
    result_name: str
    files: tuple
    pipeline_name: str
    tags: tuple

    @property
    def card_template(self):
        return self.script.with_name("model_card_template.md")

    @property
    def all_files(self):
        return [self.result_name, self.config_name, "pipeline.py", "README.md", *self.files]


# =====================================================================================================
# Before training
# =====================================================================================================


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
        repo_id = create_repo(wanted, token=token, private=private or None, exist_ok=True).repo_id
        try:  # a repository of someone else "exists" too
            auth_check(repo_id, token=token, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):  # others: a Hub that does not know this question
                raise
    except Exception as error:  # HTTP, connection and offline errors alike
        status = getattr(getattr(error, "response", None), "status_code", None)
        fixes = {
            401: "log in again with hf auth login",
            403: "use a token with the right to write there, or another --hub_model_id",
        }
        fix = fixes.get(status, "try again later, or train without --push_to_hub and push with --push_only")
        raise InputError(f"the Hub refused {wanted!r} ({hub_reason(error, token)}): {fix}.") from None
    return repo_id


# =====================================================================================================
# The model card
# =====================================================================================================


def base_license(base):
    """The licence fields of a base model's card, carried over to what was learned from it; {} where it has none."""
    card = Path(base) / "README.md" if os.path.isdir(base) else base
    if isinstance(card, Path) and not card.is_file():
        return {}
    with contextlib.suppress(Exception):  # no card, no network, no licence: then the card says nothing of it
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        return {name: data[name] for name in ("license", "license_name", "license_link") if name in data}
    return {}


def write_model_card(output_dir, config, publication, repo_id=None):
    """Fills the template into `README.md`, from the config and the files of a finished run.

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
    output_dir, settings = Path(output_dir), config["settings"]
    local, base, token = config["base_model_is_local"], config["base_model"], config["placeholder_token"]
    prompt = (settings["validation_prompt"] or "a photo of {}").replace("{}", token)
    samples = [f"samples/{path.name}" for path in sorted((output_dir / "samples").glob("*.png"))]
    references = sorted(output_dir.glob(REFERENCE_IMAGES)) if settings["push_reference_images"] else []
    data = ModelCardData(
        base_model=None if local else base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(publication.tags),
        instance_prompt=token,
        widget=[{"text": prompt, "output": {"url": url}} for url in samples] or None,
        **config["base_license"],
    )
    name = repo_id.split("/")[-1] if repo_id else output_dir.resolve().name
    values = {
        **{key: config[key] for key in ("placeholder_token", "settings", "components", "figures", "hardware")},
        "repo_id": repo_id,
        "name": name,
        "concept": repo_id or f"./{name}",
        "pipeline_source": repo_id or f"./{publication.pipeline_name}",
        "base_model": f"path/to/{base}" if local else base,
        "base_link": f"the local model `{base}`" if local else f"[{base}](https://huggingface.co/{base})",
        "base_is_local": local,
        "prompt": json.dumps(prompt, ensure_ascii=False),
        "samples": samples,
        "reference_images": [f"reference_images/{path.name}" for path in references],
        "has_best": (output_dir / "learned_embeds-best.safetensors").is_file(),
        "has_loss_curve": (output_dir / "loss_curve.png").is_file(),
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
    pipeline_file = publication.script.with_name(publication.pipeline_name)
    if pipeline_file.is_file():  # on the Hub, diffusers looks for custom code under this name only
        shutil.copyfile(pipeline_file, output_dir / "pipeline.py")
    allowed = publication.all_files + [REFERENCE_IMAGES] * settings["push_reference_images"]
    stale = publication.all_files + [REFERENCE_IMAGES]  # what an earlier push left there and this one does not renew
    to = {"repo_id": repo_id, "token": token, "commit_message": f"Learn {config['placeholder_token']}"}
    try:
        commit = upload_folder(folder_path=output_dir, allow_patterns=allowed, delete_patterns=stale, **to)
        if settings["save_as_full_pipeline"]:
            commit = upload_folder(folder_path=output_dir / "pipeline", **to)
    except Exception as error:  # huggingface_hub, httpx and OS errors alike: nothing is lost, and the user is told how
        raise PushError(
            f"the run in {output_dir} is finished and safe, but not on the Hub"
            f" ({hub_reason(error, token or get_token())}); push it later with: python {publication.script.name}"
            f" --push_only --output_dir {shlex.quote(str(output_dir))} --hub_model_id {repo_id}"
        ) from None
    return commit.commit_url


def push_only(args, publication):
    """`--push_only`: uploads the finished run in `--output_dir` as it was set up, with its model card renewed.

    Args:
        args: the flags of the Hub group (`arguments.add_hub_arguments`) and output_dir.
        publication: `Publication`.

    Returns:
        The commit's URL.

    Raises:
        InputError: there is no finished run.
        PushError: the Hub refused it or the upload failed.
    """
    output_dir = Path(args.output_dir)
    for name in (publication.config_name, publication.result_name):
        if not (output_dir / name).is_file():
            raise InputError(f"--push_only finds no {name} in {args.output_dir!r}: give the folder of a finished run.")
    config = json.loads((output_dir / publication.config_name).read_text(encoding="utf-8"))
    settings = config["settings"]
    settings["push_reference_images"] |= args.push_reference_images
    if settings["push_reference_images"] and not any(output_dir.glob(REFERENCE_IMAGES)):
        raise InputError(f"--push_reference_images: put the pictures as PNG into {output_dir / 'reference_images'}.")
    wanted = args.hub_model_id or settings["hub_model_id"] or output_dir.resolve().name
    try:
        repo_id = prepare_hub(wanted, args.hub_private_repo or settings["hub_private_repo"], args.hub_token)
    except InputError as error:
        raise PushError(error) from None
    write_model_card(output_dir, config, publication, repo_id)
    return push_to_hub(output_dir, config, publication, repo_id, args.hub_token)
