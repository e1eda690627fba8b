"""The parts that the distilled demo bases share: arguments, the teacher, noisy latents, the weight of an error.

`build_demo_base_xl.py`, `build_demo_base_eps.py` and `build_demo_base_flow.py` teach another model to predict what the
UNet of a finished base predicts, of the same noisy latents and captions. All need the cached latents of
build_demo_base.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import build_demo_base as demo
import numpy as np
import torch
import world


HERE = Path(__file__).resolve().parent


def parse_args(argv, description, teacher="base", **steps):
    """The arguments of build_demo_base.py, a `--NAME` for each of the own stages' `steps`, and the teacher."""
    parser = demo.make_parser(description)
    own = parser.add_argument_group("distillation")
    own.add_argument("--teacher", type=Path, default=HERE / teacher, help="the finished base that is asked")
    for name, count in steps.items():
        own.add_argument(f"--{name}", type=int, default=count, help="training steps of this stage")
    parser.set_defaults(threads=1)
    args = parser.parse_args(argv)
    if args.smoke:
        for name in steps:
            setattr(args, name, 2)
    return demo.make_folders(args)


class Teacher:
    """A finished base: its text states, its prediction and its noise schedule."""

    def __init__(self, args):
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor
        from transformers import CLIPTextModel, CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(args.teacher / "tokenizer")
        self.encoder = CLIPTextModel.from_pretrained(args.teacher / "text_encoder", dtype=torch.float32)
        self.unet = UNet2DConditionModel.from_pretrained(args.teacher / "unet", dtype=torch.float32)
        self.unet.set_attn_processor(AttnProcessor())
        for model in (self.encoder, self.unet):
            model.to(args.device).eval().requires_grad_(False)
        schedule = DDPMScheduler.from_pretrained(args.teacher / "scheduler")
        self.alphas, self.prediction_type = schedule.alphas_cumprod.to(args.device), schedule.config.prediction_type

    @torch.no_grad()
    def text(self, ids):
        return self.encoder(ids).last_hidden_state

    @torch.no_grad()
    def predict(self, noisy, timesteps, ids):
        return self.unet(noisy, timesteps, self.text(ids)).sample.float()


@dataclass
class Batch:
    """Noisy latents `[B, C, H, W]` of pictures of `side` px, the noise in them, and what else a UNet is told."""

    side: int
    captions: list
    empty: np.ndarray  # [B] bool: captions of nothing, which guidance needs
    timesteps: torch.Tensor  # [B] int64
    alpha: torch.Tensor  # [B, 1, 1, 1], the share of the latents' variance
    noisy: torch.Tensor
    noise: torch.Tensor


class Latents:
    """The cached moments of the rendered scenes, noised by the schedule `alphas` `[T]`.

    A share of the batches, `low_share`, is at 32 px and twice as large.
    """

    def __init__(self, args, alphas, low_share=0.4, size=24):
        self.rows = np.load(args.work_dir / "scenes_world.npy").astype(np.int64)
        self.moments = {side: torch.from_numpy(np.load(args.work_dir / f"latents_{side}.npy")) for side in demo.SIDES}
        self.scaling_factor = json.loads((args.work_dir / "latents.json").read_text())["scaling_factor"]
        self.alphas, self.low_share, self.size, self.device = alphas, low_share, size, args.device
        self.smoke = args.smoke

    def draw(self, rng, generator):
        """A `Batch` at 64 px or at 32 px, its timesteps one from each of B equal parts."""
        low = rng.random() < self.low_share
        side, size = (demo.SIDES[1], 2 * self.size) if low else (demo.SIDES[0], self.size)
        size = 4 if self.smoke else size
        index = rng.integers(len(self.rows), size=size)
        empty = rng.random(size) < 0.1
        captions = [
            "" if nothing else world.caption(demo.scene_of(row), rng)
            for nothing, row in zip(empty, self.rows[index], strict=True)
        ]
        times = (rng.permutation(size) + rng.random(size)) / size
        timesteps = torch.from_numpy((times * len(self.alphas)).astype(np.int64)).to(self.device)
        mean, logvar = self.moments[side][index].to(self.device).float().chunk(2, 1)
        draw = {"generator": generator, "device": self.device}
        latents = (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, **draw)) * self.scaling_factor
        noise = torch.randn(mean.shape, **draw)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        return Batch(side, captions, empty, timesteps, alpha, noisy, noise)


LARGEST_WEIGHT = 25


def squared_errors(output, target, alpha, prediction_type):
    """Mean squared error of each example `[B]`, of a velocity.

    An error of the noise is one of the velocity times sqrt(alpha): in units of noise, nearly nothing would be left of
    the high noise levels, where the text alone says what to draw. Their weight 1 / alpha ends at 25 (it would reach
    213), so that those levels do not drown the rest.
    """
    errors = (output.float() - target).square().mean((1, 2, 3))
    if prediction_type == "epsilon":
        errors = errors * (1 / alpha.flatten()).clamp(max=LARGEST_WEIGHT)
    return errors


def noisy_and_clear(errors, alpha):
    """The mean errors at high and at low noise, for the log."""
    high = alpha.flatten() < 0.3
    return {"noisy": errors.detach()[high].mean(), "clear": errors.detach()[~high].mean()}


def export(args, pipeline, name, stages, settings):
    """Write the float16 pipeline and its record into a folder beside `NAME`, which is returned to be put there."""
    renders = len(np.load(args.work_dir / "scenes_world.npy", mmap_mode="r"))
    record = {
        "settings": {setting: getattr(args, setting) for setting in settings},
        "teacher": args.teacher.name,
        "num_renders": renders,
        "stages": demo.record_stages(args, stages),
        **demo.record_machine(args),
    }
    folder = args.out_dir / f".{name}.tmp"
    demo.save_pipeline(pipeline, folder, record)
    return folder
