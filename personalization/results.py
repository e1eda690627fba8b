"""Writes the result of a finished run: the embedding before all else, then whatever of the rest can be written."""

import functools
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from PIL import Image

from . import embeddings, hub, runs, validation
from .checkpoints import noted
from .errors import RunError


logger = get_logger(__name__)


@dataclass
class Result:
    """What a run has learned, and what shows it."""

    placeholder_token: str
    theta: torch.Tensor | None  # [k, d]; None where something else than an embedding was learned
    best: torch.Tensor | None  # the embedding with the least held-out loss
    history: runs.History
    samples: list  # PIL images
    pictures: list  # `images.Picture`s it learned from
    config: dict  # `runs.describe_result`
    widths: tuple = ()  # of the halves of the embedding, see `embeddings.save_embeds`


def write_result(result, results, publication, repo_id, save_a1111=False, full_pipeline=None):
    """Writes everything but what was learned itself, which `embeddings.save_result` or `save_content` has saved.

    Args:
        result: `Result`.
        results: `run_folder.ResultFolder`; what another run left there moves aside first.
        publication: `hub.Publication`.
        repo_id: where it will be pushed, or None.
        save_a1111: whether to save a `.pt` too.
        full_pipeline: (`ModelSource`, dtype, token, family) of a full pipeline to save, or None.

    Raises:
        RunError: something could not be written; all that could is there.
    """
    token, problems, config = result.placeholder_token, [], result.config
    attempt = functools.partial(noted, problems)
    with attempt():
        results.set_aside()
    if result.theta is not None:
        with attempt():
            embeddings.save_halves(results, token, result.theta, result.widths)
    if result.best is not None:
        with attempt(), results.file(publication.best_name) as path:
            embeddings.save_embeds(path, token, result.best, result.widths)
    if save_a1111:
        with attempt(), results.file("learned_embeds.pt") as path:
            embeddings.save_a1111(path, token, result.theta, config["figures"]["steps"])
    with attempt(), results.file("loss_curve.png") as path:
        runs.save_loss_curve(path, result.history)
    with attempt():
        validation.save_images(results, "samples", result.samples)
    if config["settings"]["push_reference_images"]:
        arrays = [picture.pixels.permute(1, 2, 0).numpy() for picture in result.pictures]
        with attempt():
            validation.save_images(results, "reference_images", map(Image.fromarray, arrays))
    with attempt():
        hub.write_config(results, config, publication, repo_id)
    if full_pipeline is not None:
        with attempt():
            embeddings.save_full_pipeline(results, publication.result_name, *full_pipeline)
            hub.write_config(results, config, publication, repo_id)
    if problems:
        raise RunError(
            f"training is finished and {results.folder / publication.result_name} is safe, but not everything else"
            f" could be written: {'; '.join(problems)}; set it right and repeat the command with"
            " --resume_from_checkpoint latest."
        )
    figures = config["figures"]
    logger.info(
        f"Done: {figures['steps']} steps, {figures['forward_passes']} forward passes of one candidate,"
        f" {figures['seconds']} s ({figures['steps_per_second']} it/s), peak memory {figures['peak_memory']}; results"
        f" in {results.folder}"
    )
