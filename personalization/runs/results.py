"""Writes the result of a finished run: the embedding before all else, then whatever of the rest can be written."""

import functools
import json
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ..errors import RunError
from ..files import atomic_path
from ..logs import get_logger
from ..models.embedding_files import is_of_output
from ..models.families import FAMILIES, SD1
from . import embeddings, hub, loop, validation
from .checkpoints import noted


logger = get_logger(__name__)


@dataclass
class Result:
    """What a run has learned, and what shows it."""

    placeholder_token: str
    theta: torch.Tensor | None  # [k, d]; None where something else than an embedding was learned
    best: torch.Tensor | None  # the embedding with the least validation loss
    history: loop.History
    samples: list  # PIL images
    pictures: list  # `images.Picture`s it learned from
    config: dict  # `provenance.describe_result`
    base: str  # the model it was learned on, as it was given
    parts: dict = field(default_factory=dict)  # of the embedding, see `embeddings.save_embeds`


def write_result(result, results, publication, repo_id, save_a1111=False, full_pipeline=None):
    """Writes everything but what was learned itself, which `embeddings.save_result` or `save_content` has saved.

    Args:
        result: `Result`.
        results: `run_folder.ResultFolder`; what another run left there moves aside first.
        publication: `hub.Publication`.
        repo_id: where it will be pushed, or None.
        save_a1111: whether to save a `.pt` too; its name, like that of a second safetensors file, is the concept's.
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
            embeddings.save_halves(results, token, result.theta, result.parts)
    if result.best is not None:
        with attempt(), results.file(publication.best_name) as path:
            embeddings.save_embeds(path, token, result.best, result.parts)
    of_concept = [name for name in publication.of_concept(token).files if name not in publication.files]
    if is_of_output(result.parts):  # which the programs that go by such a name cannot draw
        of_concept = []
    for name in of_concept:
        pickle = name.endswith(".pt")
        if result.theta is not None and (save_a1111 or not pickle):
            with attempt(), results.file(name) as path:
                if pickle:
                    embeddings.save_a1111(path, token, result.theta, config["figures"]["steps"])
                else:
                    embeddings.save_embeds(path, token, result.theta, result.parts)
    with attempt(), results.file("loss_curve.png") as path:
        save_loss_curve(path, result.history)
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
        f" {figures['seconds']} s ({figures['steps_per_second']} it/s), peak memory {figures['peak_memory']}"
    )
    learned = f"Learned {token} with {config['method']}"
    logger.info(f"{learned}: {results.folder / publication.result_name}; to draw with it, in Python:")
    print(usage(result, results.folder, publication), flush=True)


def usage(result, folder, publication):
    """Three lines of Python that draw with what was learned, by the shortest way that its base has.

    Args:
        result: `Result`.
        folder: of the run.
        publication: `hub.Publication`.
    """
    quoted = functools.partial(json.dumps, ensure_ascii=False)
    family = FAMILIES.get(result.config.get("family"), SD1)
    opener, kind, base = hub.opener(result.base), "DiffusionPipeline", quoted(result.base)
    if opener == "from_single_file":  # which the class of all has not
        kind = family.pipeline.__name__
    load, kinds = f"{kind}.{opener}({base}", [kind]
    if publication.load and len(result.parts) < 2 and hasattr(family.pipeline, publication.load):  # without our code
        load += f"); pipeline.{publication.load}({quoted(str(folder))})"
    else:
        if opener == "from_single_file":
            load, kinds = f"DiffusionPipeline.from_pipe({load})", ["DiffusionPipeline", kind]
        pipeline = quoted(str(publication.pipeline_file(result.config)))
        load += f", custom_pipeline={pipeline}, trust_remote_code=True, {publication.keyword}={quoted(str(folder))})"
    return (
        f"from diffusers import {', '.join(kinds)}\n"
        f"pipeline = {load}\n"
        f'pipeline({hub.prompt_keyword(family)}{quoted(hub.example_prompt(result.config))}).images[0].save("image.png")'
    )


def save_loss_curve(path, history):
    """Training loss (points and running mean) and validation loss against the step, as a PNG.

    Where some updates are by backpropagation and others are not, their shares are beside it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 2 if history.bp_share else 1
    figure, axes = plt.subplots(1, panels, figsize=(7 * panels, 4), constrained_layout=True, squeeze=False)
    axes, of_shares = axes[0, 0], axes[0, -1]
    if history.bp_share:
        steps, shares = zip((0, history.bp_share[0][1]), *history.bp_share)
        of_shares.stackplot(steps, shares, [1 - share for share in shares], step="pre", labels=["BP-low", "ZO-high"])
        of_shares.set(xlabel="step", ylabel="share of updates since the last read-out", ylim=(0, 1))
        of_shares.legend(loc="lower left")
    if history.loss:
        steps, losses = zip(*history.loss)
        width = max(1, len(losses) // 20)
        smooth = np.convolve(np.pad(losses, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
        axes.plot(steps, losses, ".", alpha=0.3, label="training loss")
        axes.plot(steps, smooth, label=f"mean over {width} read-outs")
    if history.validation_loss:
        axes.plot(*zip(*history.validation_loss), "o-", label="validation loss")
    axes.set(xlabel="step", ylabel="denoising loss")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
