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
GAUSS_NEWTON = "--optimizer gauss_newton --mixed_precision"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def by_gradient(title, rate, learner="gradient", budget=None):
    """Autograd through the unquantized model in float32, the learning rate falling along a cosine."""
    words = f"{AUTOGRAD} --learning_rate {rate} --lr_scheduler cosine {PUTS}"
    return Method(title, words, learner, budget=budget)


def by_small_gradient(title, budget=None, flags=""):
    """The script's own, through the INT8 model with checkpointing; a forward computed again counts as one more."""
    words = f"--unet_backend torch --optimizer gradient --quantization int8 --mixed_precision no {PUTS} {flags}"
    return Method(title, words, budget=budget)


def by_tangents(title, precision, engine="torch"):
    """Gauss-Newton by exact derivatives; its runs are long in PyTorch, and what it has to show it shows early."""
    words = f"--unet_backend {engine} --quantization int8 --train_batch_size 1 {PUTS} {GAUSS_NEWTON} {precision}"
    return Method(f"Gauss-Newton, exact derivatives, {title} (ours)", words, budget=6000)


def by_evolution(title, dimension, sigma, budget=None):
    """CMA-ES with 30 candidates a step."""
    flags = f"--quantization int8 --mixed_precision no --num_perturbations 29 --train_batch_size 1 {PUTS}"
    return Method(title, flags, "evolution", {"dimension": dimension, "sigma": sigma}, budget)


GRIDS = {
    "main": {
        "plain": Method("plain word", learner=None),
        "gradient_ti": by_gradient("gradient Textual Inversion, fp32", 1e-2),
        "dti": by_gradient("Directional Textual Inversion, fp32", 3e-2, learner="directional"),
        "paper": Method("ZOODiP, paper's settings", f"{PAPER} {PUTS}"),
        "naive_zo": Method("naive ZO (no SG, no PUTS)", f"{PAPER} --sg_window 0 {UNIFORM}"),
        "gf_ti": by_evolution("GF-TI (CMA-ES)", 32, 3.0),
        "gradient_750": by_small_gradient("gradient, INT8, checkpointed (ours), short", 750),
        "gradient_1500": by_small_gradient("gradient, INT8, checkpointed (ours)", 1500),
        "gradient_6000": by_small_gradient("gradient, INT8, checkpointed (ours), long", 6000),
        "gradient_window": by_small_gradient("the same, through windows (ours)", 1500, "--bp_view window"),
        "gradient_bf16": by_small_gradient("the same, bf16 (ours)", 1500, "--mixed_precision bf16"),
        "fast": Method("Gauss-Newton, bf16 (ours)", f"{GAUSS_NEWTON} bf16 --perturbation_scale 5e-2"),
        "fast_float32": Method("Gauss-Newton, fp32 (ours)", f"{GAUSS_NEWTON} no --perturbation_scale 3e-4"),
        "tangents": by_tangents("bf16", "bf16"),
        "tangents_float32": by_tangents("fp32", "no"),
        "tangents_openvino": by_tangents("bf16, OpenVINO", "bf16", "openvino"),
    },
    "gradient_rates": {  # to choose `gradient.RATE_OF_SPREAD`; a word of the demo base has a spread of 0.035
        f"rate_{share}_{budget}": by_small_gradient(
            f"{share} of the spread, {budget:,} forwards", budget, f"--learning_rate {share * 0.035:.4g}"
        )
        for share in (0.1, 0.25, 0.5, 1.0, 1.5)
        for budget in (750, 1500)
    },
    "pilots": {  # of the baselines, what their papers leave open; their rates and σ in "main" are its best
        **{f"ti_{rate}": by_gradient(f"gradient Textual Inversion, η = {rate}", rate, budget=3000) for rate in RATES},
        **{
            f"dti_{rate}": by_gradient(f"Directional Textual Inversion, η = {rate}", rate, "directional", 3000)
            for rate in RATES
        },
        **{f"cma_{sigma}": by_evolution(f"GF-TI (CMA-ES), σ = {sigma}", 32, sigma, 3000) for sigma in (0.3, 1.0, 3.0)},
    },
}
