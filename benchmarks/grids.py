"""What `compare_methods.py` compares at equal cost: every way to learn a token, by the flags that make it.

The paper's ablations are in `ablations.py`.
"""

from benchmarks.methods import Method


AUTOGRAD = "--unet_backend torch --quantization none --mixed_precision no --adam_epsilon 1e-8 --train_batch_size 1"
PAPER = (
    "--quantization int8 --mixed_precision no --gradient_estimator rge --num_perturbations 2 --perturbation_scale 1e-3"
    " --learning_rate 5e-3 --lr_scheduler constant --adam_epsilon 1e-3 --sg_threshold 1e-3 --train_batch_size 1"
)
PUTS = "--puts_min_timestep 500 --puts_max_timestep 900"
UNIFORM = "--puts_min_timestep 0 --puts_max_timestep 1000"


def by_gradient(title, rate, learner="gradient"):
    """Autograd through the unquantized model in float32, the learning rate falling along a cosine."""
    return Method(title, f"{AUTOGRAD} --learning_rate {rate} --lr_scheduler cosine {PUTS}", learner)


def by_evolution(title, dimension, sigma):
    """CMA-ES with 30 candidates a step."""
    flags = f"--quantization int8 --mixed_precision no --num_perturbations 29 --train_batch_size 1 {PUTS}"
    return Method(title, flags, "evolution", {"dimension": dimension, "sigma": sigma})


GRIDS = {
    "main": {
        "plain": Method("plain word", learner=None),
        "gradient_ti": by_gradient("gradient Textual Inversion, fp32", 3e-3),
        "dti": by_gradient("Directional Textual Inversion, fp32", 1e-2, learner="directional"),
        "paper": Method("ZOODiP, paper's settings", f"{PAPER} {PUTS}"),
        "naive_zo": Method("naive ZO (no SG, no PUTS)", f"{PAPER} --sg_window 0 {UNIFORM}"),
        "gf_ti": by_evolution("GF-TI (CMA-ES)", 32, 1.0),
        "fast": Method("Gauss-Newton, bf16 (ours)", "--optimizer gauss_newton --mixed_precision bf16"),
        "fast_float32": Method("Gauss-Newton, fp32 (ours)", "--optimizer gauss_newton --mixed_precision no"),
    }
}
