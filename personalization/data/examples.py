"""What a training step draws: latents and prompts of the concept, noised to a timestep."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..models.base_model import StoredModel, load_vae_encoder
from ..models.families import Family
from ..models.memory import release_freed_memory, tensor_bytes
from .images import Framing


@dataclass(frozen=True)
class Concept:
    """Everything that is known of the concept, on the host.

    Args:
        moments: mean and log-variance of the latents, float32 `[1 or 2, N, 2C, h, w]`: of N pictures, and of their
            flips where the first dimension is 2.
        flip_probability: how often the flip is drawn.
        family: of the model that they were encoded for.
        vae_config: of the VAE that encoded them.
        prompt_ids: `[P, length]`, or `[P]`, rows of a table of prompts that are encoded already.
        prompts_of_image: for each picture, the rows of `prompt_ids` that fit it.
        size_ids: `[1 or 2, N, 6]`, see `describe_sizes`; None for models that are not told.
        weights: `[1 or 2, N, 1, h, w]`, see `weigh`; None where the loss counts everywhere.
        parts: a `Concept` for each shape of latents, where there are several; this one then has no moments.
        order: pictures to draw from, some of them repeatedly; None: each of the N once.
    """

    moments: torch.Tensor | None
    flip_probability: float
    family: Family
    vae_config: dict
    prompt_ids: torch.Tensor
    prompts_of_image: list
    size_ids: torch.Tensor | None = None
    order: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    parts: tuple = ()


class Batch(NamedTuple):
    """b examples of a denoising task."""

    noisy_latents: torch.Tensor  # [b, C, h, w]
    target: torch.Tensor  # [b, C, h, w], what the denoiser is to predict: noise, or velocity
    timesteps: torch.Tensor  # [b]
    prompt_ids: torch.Tensor  # [b, length] or [b], see `Concept`
    size_ids: torch.Tensor = torch.empty(0)  # [b, 6], see `Concept`; [b, 0] where there are none
    weights: torch.Tensor = torch.empty(0)  # [b, 1, h, w], what errors are multiplied by; [b, 0]: nothing

    def weighed(self, errors):
        """Errors `[..., b, C, h, w]` of predictions, those outside of masks left out."""
        return errors * self.weights if self.weights.numel() else errors

    def to(self, device):
        return Batch(*(to_device(tensor, device) for tensor in self))


def describe_sizes(framing: Framing, flipped=False):
    """SDXL's `time_ids` of a picture: original height and width, top and left of the crop, height and width.

    The crop of a flipped picture is where it lies in the flipped original.
    """
    top, left = framing.crop
    if flipped:
        left = framing.scaled[1] - framing.kept[1] - left
    return [*framing.original, top, left, *framing.kept]


def encode_images(vae, pictures, sides, device):
    """Latent moments of pictures and, with two `sides`, of their flips: float32 `[sides, N, 2C, h, w]` on the host."""
    rows = []
    for picture in pictures:
        views = torch.stack([picture.pixels, picture.pixels.flip(-1)][:sides]).to(device, vae.dtype) / 127.5 - 1
        rows.append(torch.cat([vae.encode(view[None]).latent_dist.parameters for view in views]).float().cpu())
    return torch.stack(rows, dim=1)


def weigh(pictures, sides, shape):
    """What errors are multiplied by, float32 `[sides, N, 1, h, w]` for latents of `shape`; None without masks.

    It is the root of the mask over its mean, so that the mean of a picture's squared errors is that inside the mask,
    whatever is squared: losses, their differences, or the errors that Gauss-Newton solves for.
    """
    if all(picture.mask is None for picture in pictures):
        return None
    rows = []
    for picture in pictures:
        mask = torch.ones(1, *shape) if picture.mask is None else picture.mask / 255
        mask = F.interpolate(mask[None], shape, mode="area")[0]
        mask = (mask / mask.mean()).sqrt()
        rows.append(torch.stack([mask, mask.flip(-1)][:sides]))
    return torch.stack(rows, dim=1)


def load_concept(pictures, prompts, base, flip_probability, compute):
    """The VAE's encoder sees every picture (and its flip, if any is drawn) once, then makes room for the denoiser.

    Args:
        pictures: `Picture`s.
        prompts: what `build_prompts` returned.
        base: `Base`.
        flip_probability: how often a flip will be drawn.
        compute: `Compute`.

    Returns:
        `Concept`, and the `StoredModel` of the VAE's encoder.
    """
    vae = load_vae_encoder(base, torch.float32 if base.family.vae_in_float32 else compute.dtype)
    stored = StoredModel(tensor_bytes(vae), 0.0)
    vae.to(compute.device)
    sides, (ids, rows) = (2 if flip_probability > 0 else 1), prompts
    facts = base.family, base.family.vae_facts(vae, base.vae_config)
    of_shape = {}
    for number, picture in enumerate(pictures):
        of_shape.setdefault(picture.pixels.shape, []).append(number)
    parts = []
    for numbers in of_shape.values():
        alike, size_ids = [pictures[i] for i in numbers], None
        with torch.inference_mode():
            moments = encode_images(vae, alike, sides, compute.device)
        if base.family.crops:
            sizes = [[describe_sizes(picture.framing, flipped) for picture in alike] for flipped in (False, True)]
            size_ids = torch.tensor(sizes[:sides], dtype=torch.float32)
        of_part = ids, [rows[i] for i in numbers], size_ids, order_of(alike), weigh(alike, sides, moments.shape[-2:])
        parts.append(Concept(moments, flip_probability, *facts, *of_part))
    concept = parts[0]
    if len(parts) > 1:
        shares = torch.tensor([sum(pictures[i].repeats for i in numbers) for numbers in of_shape.values()])
        order = torch.arange(len(parts)).repeat_interleave(shares // math.gcd(*shares.tolist()))
        concept = Concept(None, flip_probability, *facts, ids, rows, None, order, None, tuple(parts))
    del vae
    release_freed_memory()
    return concept, stored


def order_of(pictures):
    """Numbers of pictures, each as often as its repeats ask for; None where all have the same."""
    repeats = [picture.repeats for picture in pictures]
    if len(set(repeats)) == 1:
        return None
    least = math.gcd(*repeats)
    return torch.tensor([i for i, count in enumerate(repeats) for _ in range(count // least)])


def draw_examples(concept, batch_size, generator):
    """Draws b (latent, prompt) pairs with replacement: an image, maybe its flip, a sample of its latent, a caption.

    Where pictures differ in shape, those of a batch have one that is drawn first.

    Returns:
        Latents `[b, C, h, w]`; prompt ids, a row of `Concept.prompt_ids` for each; their sizes, `[b, 6]` or None; and
        their weights, `[b, 1, h, w]` or None.
    """
    if concept.parts:
        concept = concept.parts[concept.order[int(torch.randint(len(concept.order), (1,), generator=generator))]]
    flips, images = concept.moments.shape[:2]
    chosen = torch.randint(images if concept.order is None else len(concept.order), (batch_size,), generator=generator)
    chosen = chosen if concept.order is None else concept.order[chosen]
    flipped = torch.rand(batch_size, generator=generator) < concept.flip_probability
    side = flipped.long().clamp(max=flips - 1)
    mean, logvar = concept.moments[side, chosen].chunk(2, dim=1)
    latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn(mean.shape, generator=generator)
    prompts = [concept.prompts_of_image[i] for i in chosen.tolist()]
    picks = [p[int(torch.randint(len(p), (1,), generator=generator))] for p in prompts]
    size_ids = None if concept.size_ids is None else concept.size_ids[side, chosen]
    weights = None if concept.weights is None else concept.weights[side, chosen]
    return concept.family.to_latents(latents, concept.vae_config), concept.prompt_ids[picks], size_ids, weights


def noise_batch(family, latents, prompt_ids, timesteps, generator, scheduler, size_ids=None, weights=None):
    """A `Batch` of latents noised to timesteps, and of what a model of the family is to predict of them."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = family.tell_timesteps(timesteps, latents, scheduler)
    noisy, target = family.noise(latents, noise, timesteps, scheduler)
    size_ids = torch.empty(len(latents), 0) if size_ids is None else size_ids
    weights = torch.empty(len(latents), 0) if weights is None else weights
    return Batch(noisy, target, timesteps, prompt_ids, size_ids, weights)


def to_device(tensor, device):
    """Moves a tensor of the host without making the host wait (only pinned memory travels by itself)."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
