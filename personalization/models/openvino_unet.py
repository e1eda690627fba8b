"""The UNet in OpenVINO: nothing here needs autograd, so any engine that computes a forward pass will do."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from ..errors import InputError
from . import weight_cache


# torch.export finds that diffusers' upsampling branches at 64 examples; one graph serves every batch below.
OPENVINO_MAX_BATCH = 63
ADDED_CONDITIONS = "text_embeds", "time_ids"  # of SDXL's UNet, in the order of the graph's inputs
# Scales of activations move into the weights before them (SmoothQuant), which leaves much less error.
NNCF_MODEL_TYPE = "transformer"


def export_openvino(unet, latent_size, prompt_length):
    """The UNet as an OpenVINO model with a free batch size, its INT8 weights as they are.

    `torch.export` runs on fake tensors: beside the weights this takes some 100 MB, where tracing takes gigabytes.
    """
    import openvino

    class Positional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, encoder_hidden_states, *added):
            added = {"added_cond_kwargs": dict(zip(ADDED_CONDITIONS, added))} if added else {}
            return self.unet(sample, timestep, encoder_hidden_states, **added, return_dict=False)[0]

    config = unet.config
    sample = torch.zeros(2, config.in_channels, latent_size, latent_size)
    context = torch.zeros(2, prompt_length, config.cross_attention_dim)
    batch = torch.export.Dim("batch", min=1, max=OPENVINO_MAX_BATCH)
    example = (sample, torch.zeros(2), context)
    if config.addition_embed_type == "text_time":  # SDXL
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        example += (torch.zeros(2, pooled), torch.zeros(2, 6))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's, about itself
        open_batch = ({0: batch},) * 3
        if len(example) > 3:  # what *added takes is one argument
            open_batch += (({0: batch},) * (len(example) - 3),)
        program = torch.export.export(Positional().eval(), example, dynamic_shapes=open_batch)
        model = openvino.convert_model(program)
    for node, tensor in zip(model.inputs, example):  # the graph keeps only the batch open, its inputs should say so
        node.get_node().set_partial_shape(openvino.PartialShape([-1, *tensor.shape[1:]]))
    model.validate_nodes_and_infer_types()
    return model


class OpenVINOUNet(torch.nn.Module):
    """A UNet that OpenVINO computes, called like the torch one by training and by diffusers' pipelines.

    Args:
        model: an `openvino.Model`, or the path of its `.xml`.
        config: the torch UNet's.
        engine: OpenVINO's device: CPU, GPU, NPU.
        dtype: torch.float32, or torch.bfloat16 to let OpenVINO compute in it.
        device: torch device of what is returned.
    """

    def __init__(self, model, config, engine, dtype, device):
        super().__init__()
        import openvino

        self.config, self.dtype, self.device = config, dtype, device
        if config.addition_embed_type == "text_time":  # `StableDiffusionXLPipeline` reads the width of this layer
            layer = SimpleNamespace(in_features=config.projection_class_embeddings_input_dim)
            self.add_embedding = SimpleNamespace(linear_1=layer)
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32"}
        optional = {
            # By default products are computed in INT8, which drowns the differences between candidates.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # it ties every process to the same first cores, however many others idle
        }
        supported = core.get_property(engine, "SUPPORTED_PROPERTIES")
        settings |= {name: value for name, value in optional.items() if name in supported}
        self.compiled = core.compile_model(model, engine, settings)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, added_cond_kwargs=None, **unused):
        timesteps = torch.as_tensor(timestep).float().expand(len(sample))
        added = [added_cond_kwargs[name] for name in ADDED_CONDITIONS] if added_cond_kwargs else []
        inputs = [x.float().cpu().numpy() for x in (sample, timesteps, encoder_hidden_states, *added)]
        prediction = torch.from_numpy(self.compiled(inputs)[0]).to(sample)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


class Calibration(NamedTuple):
    """What the ranges of a UNet's activations are measured on, to compute in INT8."""

    source: tuple  # what it is drawn from, with a faithful `repr`
    files: list  # the weight files that had a part in it
    draw: Callable  # returns inputs of the UNet (sample, timesteps, encoder_hidden_states, ...), pass by pass


def quantize_activations(graph, calibration):
    """A graph whose products are of INT8 weights and INT8 activations, by NNCF's post-training quantization."""
    os.environ.setdefault("NNCF_CI", "1")  # or it reports its use to its makers
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars and log
        import nncf

        passes = [tuple(x.float().cpu().numpy() for x in inputs) for inputs in calibration.draw()]
        kind = nncf.ModelType(NNCF_MODEL_TYPE)
        return nncf.quantize(graph, nncf.Dataset(passes), subset_size=len(passes), model_type=kind)


def export_path(cache_dir, files, config, *shape):
    """The folder of the exported graph of a UNet, named by its weight files, config and shape."""
    key = weight_cache.source_key(files, weight_cache.config_key(config), version("openvino"), *shape)
    return Path(cache_dir) / f"unet-openvino-{key}"


def calibrated_path(exported, calibration):
    """The folder of that graph quantized, named by what its calibration was drawn from, too."""
    key = weight_cache.source_key(
        calibration.files, exported.name, version("nncf"), NNCF_MODEL_TYPE, calibration.source
    )
    return exported.with_name(f"unet-openvino-int8-{key}")


def kept_graph(path, what, make):
    """What `make()` returns, kept in the cache and verified there.

    Args:
        path: folder of the graph, whose name says what it was made of; None keeps nothing.
        what: is going on while it is made.
        make: returns an `openvino.Model`; called only where there is no such graph yet.

    Returns:
        The path of its `.xml`, or the `openvino.Model`; and the bytes of its weights.
    """
    import openvino

    def write(folder):
        logging.info(f"{what} once, into {path}")
        openvino.save_model(make(), folder / "unet.xml", compress_to_fp16=False)

    if path is not None and weight_cache.provide(path, write):
        return path / "unet.xml", (path / "unet.bin").stat().st_size
    logging.info(what)
    graph = make()
    return graph, sum(node.data.nbytes for node in graph.get_ops() if node.get_type_name() == "Constant")


def compile_openvino_unet(
    path, load_unet, config, latent_size, prompt_length, engine, dtype, device, calibration=None
):
    """Compiles a UNet for an OpenVINO device; its graph is kept in the cache, and verified there.

    Args:
        path: folder of the exported graph, whose name says what it was made of; None keeps nothing.
        load_unet: returns the torch UNet; called only where there is no such graph yet.
        config, latent_size, prompt_length: of the UNet and of its inputs.
        engine, dtype, device: see `OpenVINOUNet`.
        calibration: `Calibration`, to compute in INT8; None computes in `dtype`.

    Returns:
        The `OpenVINOUNet`, and the bytes of its weights as stored.
    """

    def exported():
        what = "Exporting the UNet to OpenVINO"
        return kept_graph(path, what, lambda: export_openvino(load_unet(), latent_size, prompt_length))

    def quantized():
        import openvino

        graph, _ = exported()
        graph = openvino.Core().read_model(graph) if isinstance(graph, Path) else graph
        return quantize_activations(graph, calibration)

    if calibration is None:
        graph, size = exported()
    else:
        kept = path and calibrated_path(path, calibration)
        graph, size = kept_graph(kept, "Quantizing the UNet's activations", quantized)
    return OpenVINOUNet(graph, config, engine, dtype, device), size


def check_openvino(engine, examples_per_pass, quantizes=False):
    """Makes sure that OpenVINO is installed (and, if it `quantizes`, NNCF), has the device and can take the batch.

    Raises:
        InputError: it cannot.
    """
    try:
        import openvino
    except ImportError:
        raise InputError("--unet_backend openvino is not installed: pip install openvino.") from None
    if quantizes and find_spec("nncf") is None:
        raise InputError("--openvino_precision int8 needs NNCF, which is not installed: pip install nncf.")
    devices = openvino.Core().available_devices
    if engine not in devices:
        raise InputError(f"--openvino_device {engine!r} is not there: choose from {', '.join(devices)}.")
    if examples_per_pass > OPENVINO_MAX_BATCH:
        raise InputError(
            f"--unet_backend openvino takes at most {OPENVINO_MAX_BATCH} examples a pass and gets"
            f" {examples_per_pass}: split them with --max_candidates_per_forward."
        )
