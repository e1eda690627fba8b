"""The UNet in OpenVINO: nothing here needs autograd, so any engine that computes a forward pass will do."""

import contextlib
import logging
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from . import weight_cache
from .errors import InputError


# torch.export finds that diffusers' upsampling branches at 64 examples; one graph serves every batch below.
OPENVINO_MAX_BATCH = 63


def export_openvino(unet, latent_size, prompt_length):
    """The UNet as an OpenVINO model with a free batch size, its INT8 weights as they are.

    `torch.export` runs on fake tensors: beside the weights this takes some 100 MB, where tracing takes gigabytes.
    """
    import openvino

    class Positional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, sample, timestep, encoder_hidden_states):
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    sample = torch.zeros(2, unet.config.in_channels, latent_size, latent_size)
    context = torch.zeros(2, prompt_length, unet.config.cross_attention_dim)
    batch = torch.export.Dim("batch", min=1, max=OPENVINO_MAX_BATCH)
    example = (sample, torch.zeros(2), context)
    with torch.no_grad():
        program = torch.export.export(Positional().eval(), example, dynamic_shapes=({0: batch},) * 3)
    model = openvino.convert_model(program)
    for node, tensor in zip(model.inputs, example):  # the graph keeps only the batch open, its inputs should say so
        node.get_node().set_partial_shape(openvino.PartialShape([-1, *tensor.shape[1:]]))
    model.validate_nodes_and_infer_types()
    return model


class OpenVINOUNet(torch.nn.Module):
    """A UNet that OpenVINO computes, called like the torch one by training and by `StableDiffusionPipeline`.

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
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32"}
        optional = {
            # By default products are computed in INT8, which drowns the differences between candidates.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        supported = core.get_property(engine, "SUPPORTED_PROPERTIES")
        settings |= {name: value for name, value in optional.items() if name in supported}
        self.compiled = core.compile_model(model, engine, settings)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **unused):
        timesteps = torch.as_tensor(timestep).float().expand(len(sample))
        inputs = [x.float().cpu().numpy() for x in (sample, timesteps, encoder_hidden_states)]
        prediction = torch.from_numpy(self.compiled(inputs)[0]).to(sample)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def export_path(cache_dir, files, config, *shape):
    """The folder of the exported graph of a UNet, named by its weight files, config and shape."""
    key = weight_cache.source_key(files, weight_cache.config_key(config), version("openvino"), *shape)
    return Path(cache_dir) / f"unet-openvino-{key}"


def compile_openvino_unet(path, load_unet, config, latent_size, prompt_length, engine, dtype, device):
    """Compiles a UNet for an OpenVINO device; the exported graph is kept in the cache, and verified there.

    Args:
        path: folder of the graph, whose name says what it was made of; None keeps nothing.
        load_unet: returns the torch UNet; called only where there is no such graph yet.
        config, latent_size, prompt_length: of the UNet and of its inputs.
        engine, dtype, device: see `OpenVINOUNet`.

    Returns:
        The `OpenVINOUNet`, and the bytes of its weights as stored.
    """
    import openvino

    def write(folder):
        logging.info(f"Exporting the UNet to OpenVINO once, into {path}")
        graph = export_openvino(load_unet(), latent_size, prompt_length)
        openvino.save_model(graph, folder / "unet.xml", compress_to_fp16=False)

    if path is not None:
        for suffix in (".xml", ".bin"):  # where earlier versions kept it, without a manifest
            with contextlib.suppress(OSError):
                path.with_suffix(suffix).unlink()
        if weight_cache.provide(path, write):
            size = (path / "unet.bin").stat().st_size
            return OpenVINOUNet(path / "unet.xml", config, engine, dtype, device), size
    logging.info("Exporting the UNet to OpenVINO")
    unet = load_unet()
    size = sum(t.numel() * t.element_size() for t in (*unet.parameters(), *unet.buffers()))
    graph = export_openvino(unet, latent_size, prompt_length)
    return OpenVINOUNet(graph, config, engine, dtype, device), size


def check_openvino(engine, examples_per_pass):
    """Makes sure that OpenVINO is installed, has the device and can take the batch.

    Raises:
        InputError: it cannot.
    """
    try:
        import openvino
    except ImportError:
        raise InputError("--unet_backend openvino is not installed: pip install openvino.") from None
    devices = openvino.Core().available_devices
    if engine not in devices:
        raise InputError(f"--openvino_device {engine!r} is not there: choose from {', '.join(devices)}.")
    if examples_per_pass > OPENVINO_MAX_BATCH:
        raise InputError(
            f"--unet_backend openvino takes at most {OPENVINO_MAX_BATCH} examples a pass and gets"
            f" {examples_per_pass}: split them with --max_candidates_per_forward."
        )
