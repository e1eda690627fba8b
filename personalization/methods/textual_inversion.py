"""Flags of learning a word (Textual Inversion), whatever method moves it: engine, concept, judgement and result."""

from pathlib import Path

from .. import flags


def add_engine_arguments(add, backends):
    """Adds to the group "model" how its weights are stored and what computes; `backends`: names of the former."""
    add(
        "--quantization",
        choices=backends,
        default="int8",
        decides=flags.RUN,  # the calibration's key has the file that it is kept in, and that has these two
        page=True,
        help="Weights of UNet and text encoder: int8 (Linear and Conv2d, per output channel), nf4 (bitsandbytes 4-bit"
        " Linear, int8 Conv2d), quanto-int8 (as the official code) or none.",
    )
    add(
        "--unet_backend",
        choices=["torch", "openvino"],
        default="torch",
        decides=flags.RUN,
        page=True,
        help="Engine that computes the UNet. openvino (pip install openvino) is faster on CPUs and takes more memory;"
        " it is exported once into --quantized_cache_dir.",
    )
    device = "OpenVINO's device: CPU, GPU or NPU."
    add("--openvino_device", default="CPU", decides=flags.NOTHING, page=True, help=device)
    add(
        "--openvino_precision",
        choices=["float", "int8"],
        default="float",
        decides=flags.RUN,
        page=True,
        help="Precision of the UNet's activations in OpenVINO. float: as --mixed_precision says; int8 (pip install"
        " nncf; with --optimizer gauss_newton): in INT8, calibrated once on the pictures. Validation loss and images"
        " are then of that UNet; the learned word is for the ordinary one.",
    )
    add(
        "--low_vram",
        action="store_true",
        decides=flags.NOTHING,
        page=True,
        help="Stream the UNet's weights layer by layer, from pinned host memory (CUDA) or from disk (CPU).",
    )
    add(
        "--torch_compile",
        action="store_true",
        decides=flags.NOTHING,
        page=True,
        help="Compile the UNet (static shapes, CUDA graphs); the first step takes minutes. Worth it on CUDA only.",
    )


def add_concept_arguments(add):
    """Adds to the group "data" the new word, and how its pictures and captions are used."""
    add(
        "--placeholder_token",
        required=True,
        decides=flags.RUN,  # its prompts are in the calibration's key, by their ids
        help='The new word, such as "<my-dog>".',
    )
    add("--initializer_token", help="Existing one-token word to start from: dog.")
    add(
        "--initializer_embedding",
        path=True,
        help="Embedding file to start from instead and train on, of whatever program (docs/share.md), or the folder of"
        " a run.",
    )
    vectors = "k: embedding vectors of the new word. --initializer_embedding has its own number."
    add(
        "--num_vectors",
        type=int,
        default=1,
        limits=flags.Range(1, 75),  # a prompt of CLIP has 77 tokens, two of which mark its ends
        page=True,
        help=vectors,
    )
    add(
        "--learn",
        choices=["input", "output"],
        decides=flags.RUN,
        help="Place of the word's vectors. input (the default): among the words of a prompt; output (Z-Image, FLUX.2"
        " klein): in what the text encoder puts out, so that it leaves before training; only this repository's"
        " pipelines read such a file.",
    )
    add(
        "--learnable_property",
        choices=["object", "style"],
        default="object",
        decides=flags.RUN,
        page=True,
        help="Kind of the Textual Inversion templates that caption the images that have no caption.",
    )
    repeats = "Times an epoch shows every image."
    add("--repeats", type=int, default=100, limits=flags.COUNT, decides=flags.NOTHING, page=True, help=repeats)
    add(
        "--pool_at_eos",
        action="store_true",
        page=True,
        help="SDXL: pool the second text encoder at the end of the prompt, as ComfyUI and kohya do, and not at the new"
        " word, as diffusers does. The same word draws differently there and here.",
    )
    mirrored = "Share of the draws that mirror an image; 0 if sides matter."
    add("--flip_probability", type=float, default=0.5, limits=flags.SHARE, page=True, help=mirrored)


def add_held_out_arguments(add):
    """Adds to the group "validation and logging" the validation loss and what follows from it."""
    add(
        "--validation_data_dir",
        type=Path,
        decides=flags.NOTHING,
        help="Folder of pictures to judge by that are not trained on, captioned as those of --train_data_dir. Default:"
        " the training pictures, with noise and timesteps that training does not draw.",
    )
    add(
        "--num_validation_samples",
        type=int,
        default=16,
        limits=flags.Range(0, 4096),
        decides=flags.NOTHING,
        page=True,
        help="Fixed (image, noise, timestep) triples of the validation loss, which picks the best embedding; 0: none.",
    )
    patience = "Validations without gain after which training stops; 0: it never does."
    add(
        "--early_stopping_patience",
        type=int,
        default=0,
        limits=flags.Range(0, 10**9),
        decides=flags.NOTHING,
        page=True,
        help=patience,
    )


def add_result_arguments(add):
    """Adds to the group "saving and resuming" the forms in which a word is saved."""
    often = "Updates between learned_embeds-steps-N.safetensors."
    add("--save_steps", type=int, default=500, limits=flags.EVERY, page=True, decides=flags.NOTHING, help=often)
    add(
        "--save_a1111",
        action="store_true",
        page=True,
        decides=flags.NOTHING,
        help="Also save a .pt, named after the concept as well, for older versions of the Automatic1111 web UI.",
    )
    add(
        "--save_as_full_pipeline",
        action="store_true",
        decides=flags.NOTHING,
        help="Also save a pipeline to --output_dir/pipeline.",
    )
