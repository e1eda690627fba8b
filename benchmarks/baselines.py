"""What the script's training step is compared with: other ways to train the same token, and the floor below all.

Each class builds everything once; `step()` then performs one training step and returns its loss as a tensor on the
device: whoever takes times must wait for the device (`torch.cuda.synchronize()`). Models are either a folder in
diffusers format (`random_base.build` makes one with random weights) or ready `Models`, which are used as they are.
"""

import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from personalization.data.examples import Batch
from personalization.models import families
from personalization.models.memory import prepare_loading, prepare_training, release_freed_memory
from train_zoodip_textual_inversion import SubspaceGradient, normalize_estimate, sample_puts_timesteps


HERE = Path(__file__).resolve().parent


class Models(NamedTuple):
    unet: torch.nn.Module
    vae: torch.nn.Module
    text_encoder: torch.nn.Module
    scheduler: DDPMScheduler


def quantize_with_quanto(model):
    """INT8 weights of every Linear and Conv2d, in place, by optimum-quanto (as the official script does)."""
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)
    return model


def quantize_layer_by_layer(model, dtype):
    """The same of a model in another dtype, which becomes `dtype` layer by layer: it is never whole in it."""
    from optimum.quanto import qint8, quantize

    for name in [name for name, _ in model.named_modules()]:  # names only, so that the layers themselves can leave
        layer = model.get_submodule(name)
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.to(dtype)
            quantize(model, weights=qint8, include=[name])
            model.get_submodule(name).freeze()
        elif not list(layer.children()):
            layer.to(dtype)
    return model


def load_models(base, device="cpu", dtype=torch.float32, text_dtype=None, quanto=False):
    """Loads the frozen models of `base` in `dtype` (text encoder: `text_dtype`), quantized with quanto on request.

    SDXL's two text encoders come joined, as `families.TextEncoders`.
    """
    paired = (Path(base) / "text_encoder_2").is_dir()
    # SDXL's UNet alone has 10 GB in float32.
    by_layer = quanto and paired and dtype == torch.float32
    stored, text_dtype = (torch.float16,) * 2 if by_layer else (dtype, text_dtype or dtype)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=stored)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=stored)
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=text_dtype)
    if paired:
        second = CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2", dtype=text_dtype)
        text_encoder = families.TextEncoders(families.SDXL, [text_encoder, second])
    # Quantized on the host, so that the device never sees the large weights and its peak memory is the step's.
    if by_layer:
        prepare_loading()  # or glibc's heap would grow to three times what is left
        models = [quantize_layer_by_layer(model, dtype) for model in (unet, vae, text_encoder)]
        prepare_training()  # as the script trains
    else:
        models = [quantize_with_quanto(m) if quanto else m for m in (unet, vae, text_encoder)]
    models = [model.to(device).requires_grad_(False).eval() for model in models]
    release_freed_memory()
    return Models(*models, DDPMScheduler.from_pretrained(base, subfolder="scheduler"))


def text_encoders(models):
    """Its text encoders: one, or SDXL's two."""
    text_encoder = models.text_encoder
    return tuple(text_encoder.encoders) if isinstance(text_encoder, families.TextEncoders) else (text_encoder,)


def add_row(models):
    """Adds one row, a new word, to the token table of each text encoder; returns its id."""
    encoders = text_encoders(models)
    placeholder_id = encoders[0].get_input_embeddings().num_embeddings
    for encoder in encoders:
        encoder.resize_token_embeddings(placeholder_id + 1, mean_resizing=False)
    return placeholder_id


class _TextualInversion:
    """The parts both loops share: the placeholder's row in the token table, images, prompts, and drawing a batch."""

    def __init__(self, models, resolution, batch_size, device, dtype, seed, placeholder_id, initializer_id):
        self.unet, self.vae, self.text_encoder, self.scheduler = models
        self.device, self.dtype = torch.device(device), dtype
        if placeholder_id is None:
            placeholder_id = add_row(models)
        self.placeholder_id = placeholder_id
        encoders = text_encoders(models)
        self.tables = [encoder.get_input_embeddings().weight for encoder in encoders]
        self.table = self.tables[0]
        with torch.no_grad():
            for table in self.tables:
                table[placeholder_id] = table[initializer_id]
        self.generator = torch.Generator(self.device).manual_seed(seed)
        random = {"generator": self.generator, "device": self.device}
        self.pixels = (torch.rand(batch_size, 3, resolution, resolution, **random) * 2 - 1).to(dtype)
        length = encoders[0].config.max_position_embeddings
        self.prompt_ids = torch.randint(placeholder_id, (batch_size, len(encoders) * length), **random)
        self.prompt_ids[:, min(5, length - 1) :: length] = placeholder_id
        self.size_ids = torch.empty(batch_size, 0, device=self.device)
        if len(encoders) == 2:
            sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], device=self.device)
            self.size_ids = sizes.float().repeat(batch_size, 1)

    @torch.no_grad()
    def draw_batch(self, min_timestep, max_timestep):
        """A `Batch` of the images, encoded anew as both original loops do at every step."""
        posterior = self.vae.encode(self.pixels).latent_dist
        latents = posterior.sample(self.generator) * self.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=self.generator, device=self.device, dtype=latents.dtype)
        timesteps = sample_puts_timesteps(len(latents), min_timestep, max_timestep, self.generator, self.device)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        return Batch(noisy, target, timesteps, self.prompt_ids, self.size_ids)

    @property
    def word(self):
        """The placeholder's row, of two text encoders both side by side, `[1, d]`."""
        return torch.cat([table[self.placeholder_id] for table in self.tables]).detach()[None]

    def write(self, theta):
        """Puts θ `[1, d]` into the placeholder's rows."""
        for table, part in zip(self.tables, theta[0].split([table.shape[1] for table in self.tables])):
            table[self.placeholder_id] = part.to(table)

    def loss(self, batch):
        """The denoising loss (float32 scalar) of one forward pass of text encoder and UNet with the table as it is."""
        # Only where the text encoder is kept more precise than the UNet does autocast change anything.
        mixed = self.dtype != torch.float32 and self.table.dtype == torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            encoded = self.text_encoder(batch.prompt_ids)
        conditioning, added = encoded[0].to(self.dtype), {}
        if batch.size_ids.numel():
            added["added_cond_kwargs"] = {"text_embeds": encoded[1], "time_ids": batch.size_ids}
        noisy = batch.noisy_latents.to(self.dtype)
        prediction = self.unet(noisy, batch.timesteps, conditioning, **added, return_dict=False)[0]
        return F.mse_loss(prediction.float(), batch.target.float())


class OfficialLoop(_TextualInversion):
    """ZOODiP's published loop: INT8 by quanto, VAE at every step, and n + 1 separate forward passes of b examples.

    Rebuilt from its description (arXiv 2503.14868); it costs what the official script costs, which compiles the UNet
    (here: `torch_compile`). To be fair to it, losses stay on the device (no wait for it inside a step) and θ is a
    float32 master copy.
    """

    def __init__(
        self,
        models,
        resolution=512,
        batch_size=1,
        num_perturbations=2,
        device="cpu",
        dtype=torch.float32,
        perturbation_scale=1e-3,
        learning_rate=1e-2,
        sg_window=128,
        sg_threshold=1e-3,
        timesteps=(500, 900),
        seed=0,
        placeholder_id=None,
        initializer_id=1,
        torch_compile=False,
    ):
        models = models if isinstance(models, Models) else load_models(models, device, dtype, quanto=True)
        super().__init__(models, resolution, batch_size, device, dtype, seed, placeholder_id, initializer_id)
        if torch_compile:
            self.unet = torch.compile(self.unet, dynamic=False)  # the same weights; other rows call it as it was
        self.n, self.mu, self.timesteps = num_perturbations, perturbation_scale, timesteps
        self.theta = self.word.float().clone()  # [1, d]
        self.optimizer = torch.optim.Adam([self.theta], lr=learning_rate, eps=1e-3)
        self.subspace = SubspaceGradient(sg_window, sg_threshold)

    @torch.no_grad()
    def estimate(self, batch, directions=None):
        """Forward-difference estimate `[1, d]` (Eq. 3) and L(θ); `directions` `[n, 1, d]` are drawn unless given."""
        base_loss = self.loss(batch)
        gradient = torch.zeros_like(self.theta)
        for i in range(self.n):
            if directions is None:
                direction = torch.randn(self.theta.shape, generator=self.generator, device=self.device)
            else:
                direction = directions[i]
            self.write(self.theta + self.mu * direction)
            gradient += (self.loss(batch) - base_loss) / self.mu * direction
            self.write(self.theta)
        return gradient / self.n, base_loss

    @torch.no_grad()
    def step(self):
        estimate, loss = self.estimate(self.draw_batch(*self.timesteps))
        projected = self.subspace.project(estimate)
        self.theta.grad = normalize_estimate(projected, self.n, self.subspace.num_removed)
        self.optimizer.step()
        self.subspace.update(self.theta)
        self.write(self.theta)
        return loss


class GradientTextualInversion(_TextualInversion):
    """Ordinary Textual Inversion by backpropagation, as diffusers' example trains it.

    UNet and VAE are frozen in `dtype` (float32 or bfloat16); the text encoder stays in float32, under autocast. As in
    the example, gradient and AdamW's moments cover the whole token table, a copy of which restores all other rows.
    """

    def __init__(
        self,
        models,
        resolution=512,
        batch_size=1,
        device="cpu",
        dtype=torch.float32,
        gradient_checkpointing=False,
        learning_rate=5e-4,
        seed=0,
        placeholder_id=None,
        initializer_id=1,
    ):
        models = models if isinstance(models, Models) else load_models(models, device, dtype, text_dtype=torch.float32)
        super().__init__(models, resolution, batch_size, device, dtype, seed, placeholder_id, initializer_id)
        self.table.requires_grad_(True)
        self.text_encoder.train()
        if gradient_checkpointing:
            self.unet.train()  # checkpointing is off in eval mode; these models have no dropout to switch on
            self.unet.enable_gradient_checkpointing()
            self.text_encoder.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW([self.table], lr=learning_rate, weight_decay=1e-2, eps=1e-8)
        self.original = self.table.detach().clone()
        self.others = torch.ones(len(self.table), dtype=torch.bool, device=self.device)
        self.others[self.placeholder_id] = False

    def step(self, batch=None):
        """One step on a new batch, or on the given one."""
        if batch is None:
            batch = self.draw_batch(0, self.scheduler.config.num_train_timesteps)
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[self.others] = self.original[self.others]
        return loss.detach()


def unet_inputs(config, batch, latent, device="cpu", dtype=torch.float32):
    """Keyword arguments of a UNet's forward: random latents `[batch, c, latent, latent]`, 77 text vectors, t = 700."""
    make = {"device": device, "dtype": dtype}
    inputs = {
        "sample": torch.randn(batch, config["in_channels"], latent, latent, **make),
        "timestep": torch.full((batch,), 700, device=device),
        "encoder_hidden_states": torch.randn(batch, 77, config["cross_attention_dim"], **make),
    }
    if config.get("addition_embed_type") == "text_time":  # SDXL: a pooled text vector and six embedded sizes
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {"text_embeds": torch.randn(batch, pooled, **make), "time_ids": torch.randn(batch, 6, **make)}
        inputs["added_cond_kwargs"] = added
    return inputs


class BareForwards:
    """The floor: one UNet pass over the n + 1 candidates of b examples, and nothing else.

    `unet` is a folder (its unquantized UNet, in `dtype`) or any ready UNet on `device`, quantized or not.
    """

    def __init__(self, unet, latent=64, batch_size=1, num_perturbations=2, device="cpu", dtype=torch.float32):
        if not isinstance(unet, torch.nn.Module):
            unet = UNet2DConditionModel.from_pretrained(unet, subfolder="unet", dtype=dtype)
            unet = unet.requires_grad_(False).eval().to(device)
            release_freed_memory()
        self.unet = unet
        self.inputs = unet_inputs(unet.config, (num_perturbations + 1) * batch_size, latent, device, dtype)

    @torch.inference_mode()
    def step(self):
        """Returns the prediction's mean square, a float32 scalar."""
        return self.unet(**self.inputs, return_dict=False)[0].float().square().mean()


def count_flops(function):
    """FLOP of calling `function` (a product with its sum counts two): matrix products, convolutions, attention.

    On the meta device attention is counted as the two matrix products that it is; on the CPU it would be missed, as
    the counter does not know the fused kernel.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def unet_flops(config, batch, latent):
    """FLOP of one UNet forward pass; `config` is an architecture of `configs/`, a JSON file or a dict. No weights."""
    if not isinstance(config, dict):
        named = HERE / "configs" / str(config) / "unet.json"
        config = json.loads((named if named.is_file() else Path(config)).read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).eval()
        inputs = unet_inputs(unet.config, batch, latent, "meta")
    return count_flops(lambda: unet(**inputs))


def matmul_peak(device="cpu", dtype=torch.float32, size=None, repeats=9):
    """Achieved FLOP/s of a square matrix product (median of `repeats`): what the machine gives in practice.

    On CUDA, float32 uses TF32 only where `torch.backends.cuda.matmul.allow_tf32` says so.
    """
    device = torch.device(device)
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, seconds = torch.empty_like(a), []
    products = 10 if device.type == "cuda" else 1  # enough for the clock, and for the start of a kernel not to count
    for _ in range(repeats + 2):  # the first two warm up
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - started) / products)
    return 2 * size**3 / statistics.median(seconds[2:])
