"""Pictures that show what a run has learned: drawn with fixed seeds, saved, and given to trackers."""

import numpy as np
import torch
from diffusers.utils import make_image_grid

from ..files import atomic_path, tolerated
from ..models.base_model import load_vae
from .loop import tracking


def open_pipeline(base, text_encoder, denoiser, compute):
    """The family's pipeline around models in training, with a VAE that leaves with it.

    Args:
        base: `Base`.
        text_encoder: `TextEncoders` as trained, in place; None where prompts come encoded.
        denoiser: as trained, in place.
        compute: `Compute`.
    """
    family = base.family
    encoders = [None] * len(family.text_encoders) if text_encoder is None else text_encoder.encoders
    pipeline = family.pipeline(
        vae=load_vae(base, compute.dtype).to(compute.device),
        scheduler=family.sampler(base.scheduler),
        **{family.denoiser: denoiser},
        **dict(zip(family.text_encoders, encoders)),
        **dict(zip(family.tokenizers, base.tokenizers)),
        **family.pipeline_options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_image(pipeline, prompt, seed, **options):
    """A PIL image of a prompt from the noise of a seed; `options` are of the pipeline's call."""
    return pipeline(prompt=prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]


def draw_images(base, text_encoder, denoiser, compute, prompt, count, seed, **options):
    """`count` images of a prompt, with the seeds from `seed` on; see `open_pipeline` and `draw_image`."""
    pipeline = open_pipeline(base, text_encoder, denoiser, compute)
    return [draw_image(pipeline, prompt, seed + i, **options) for i in range(count)]


def show(accelerator, results, step, draw):
    """Draws the images of a step, saves them side by side and logs them; what fails costs a warning.

    Args:
        accelerator: `Accelerator` with the trackers.
        results: `ResultFolder` of the run.
        step: for the names.
        draw: function without arguments, returns PIL images.

    Returns:
        The images, or None.
    """
    images = None
    with tolerated("Drawing the validation images"):
        images = draw()
        with results.file(f"validation/step-{step:06d}.png") as path, atomic_path(path) as temporary:
            make_image_grid(images, 1, len(images)).save(temporary)
    with tracking(accelerator):
        log_images(accelerator.trackers, images or [], step)
    return images


def log_images(trackers, images, step):
    """Gives images to those of accelerate's trackers that take images."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(image) for image in images])
            tracker.log_images({"validation": stacked}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": images}, step=step)


def save_images(results, folder, images):
    """Images as `image_0.png`, ... in a folder of a run's `ResultFolder`."""
    for i, image in enumerate(images):
        with results.file(f"{folder}/image_{i}.png") as path, atomic_path(path) as temporary:
            image.save(temporary)
