"""Teach the demo base to predict noise, as Stable Diffusion 1.5 and XL do, on their schedule.

::

    python demo/build_demo_base.py --stages data,clip,vae,latents --keep demo/base --num_renders 30000
    python demo/build_demo_base_eps.py                  # an hour on an idle core; resumable (run it again)

`demo/base`, the teacher, predicts velocities, and nothing of the picture is left at its last noise level; here a rest
of it is. Text encoder, tokenizer, VAE and the architecture of the UNet stay, and the UNet's weights start as the
teacher's. For every noise level of Stable Diffusion's schedule the teacher is asked at the timestep (a fraction) at
which its own noise is as strong. The noise that its answer implies is the target for the same noisy latents at the
student's timestep.
"""

import os
import shutil

import build_demo_base as demo
import distillation
import numpy as np
import torch


SETTINGS = ("seed", "eps_steps", "precision")  # in the record


# As in Stable Diffusion 1.5's scheduler_config.json. The last three are for samplers of other classes made from it:
# DDIM by default clips latents as if they were pixels.
SCHEDULE = {
    **demo.BETAS,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def alphas_cumprod(device):
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(SCHEDULE).alphas_cumprod.to(device)


def equal_noise(alphas, others):
    """For each of `alphas` `[T]` the (fractional) timestep `[T]` at which `others` falls to it.

    Interpolated in the angle between picture and noise, which is finite at both ends, unlike their log ratio.
    """
    own, other = (np.arccos(np.sqrt(values.double().cpu().numpy())) for values in (alphas, others))
    return torch.from_numpy(np.interp(own, other, np.arange(len(other)))).float().to(alphas.device)


def noise_from_velocity(velocity, noisy, alpha):
    return alpha.sqrt() * velocity + (1 - alpha).sqrt() * noisy


def make_student(teacher):
    """The teacher's UNet, to be trained further."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel.from_config(teacher.unet.config)
    unet.load_state_dict(teacher.unet.state_dict())
    unet.set_attn_processor(AttnProcessor())
    return unet


def stage_unet(args, teacher, student):
    """The UNet predicts the noise that the teacher's prediction implies."""
    alphas = alphas_cumprod(args.device)
    latents, equal = distillation.Latents(args, alphas), equal_noise(alphas, teacher.alphas)

    def loss_of(step, rng, generator):
        batch = latents.draw(rng, generator)
        ids = demo.tokenize(teacher.tokenizer, batch.captions, args.device)
        with demo.autocast(args):
            velocity = teacher.predict(batch.noisy, equal[batch.timesteps], ids)
            output = student(batch.noisy, batch.timesteps, teacher.text(ids)).sample
        target = noise_from_velocity(velocity, batch.noisy, batch.alpha)
        errors = distillation.squared_errors(output, target, batch.alpha, "epsilon")
        return errors.mean(), distillation.noisy_and_clear(errors, batch.alpha)

    options = {"weight_decay": 0.0, "lr_decay": 0.7, "ema_decay": 0.995}
    demo.train(args, "unet_eps", student, loss_of, args.eps_steps, 1e-3, **options)


def export(args, teacher, student):
    """Write `base_eps/`, the float16 pipeline."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(args.teacher / "vae"),
        text_encoder=teacher.encoder,
        tokenizer=teacher.tokenizer,
        unet=student,
        scheduler=DPMSolverMultistepScheduler.from_config(SCHEDULE, algorithm_type="dpmsolver++", solver_order=2),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = distillation.export(args, pipeline, "base_eps", ("unet_eps",), SETTINGS)
    for part in ("text_encoder", "tokenizer"):  # byte for byte: saved anew, a tokenizer keeps its last padding
        shutil.rmtree(folder / part)
        shutil.copytree(args.teacher / part, folder / part)
    if args.out_dir.resolve() == args.teacher.resolve().parent:
        shutil.rmtree(folder / "vae")
        os.symlink(f"../{args.teacher.name}/vae", folder / "vae")
    demo.replace_folder(folder, args.out_dir / "base_eps")
    print(f"export: {args.out_dir / 'base_eps'}", flush=True)


def main(argv=None):
    args = distillation.parse_args(argv, __doc__, eps_steps=1800)
    torch.set_num_threads(args.threads)
    teacher = distillation.Teacher(args)
    if teacher.prediction_type != "v_prediction":
        raise SystemExit(f"{args.teacher} predicts {teacher.prediction_type}: the teacher is one of velocities.")
    student = make_student(teacher).to(args.device)
    stage_unet(args, teacher, student)
    export(args, teacher, student)


if __name__ == "__main__":
    main()
