"""A denoiser in OpenVINO: nothing here needs autograd, so any engine that computes a forward pass will do."""

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
from . import base_model, weight_cache
from .families import Call, Replay
from .paired import Paired
from .stacked import Dual, NoRule, Stacked, lifted, value_of


# torch.export finds that diffusers' upsampling branches at 64 examples; one graph serves every batch below.
OPENVINO_MAX_BATCH = 63
# Scales of activations move into the weights before them (SmoothQuant), which leaves much less error.
NNCF_MODEL_TYPE = "transformer"


class Differentiated(torch.nn.Module):
    """A denoiser and its derivatives as a function of tensors: those of a `Call`, then derivatives of some of them.

    Args:
        denoiser: torch module.
        call: `Call` of it with one example.
        followed: names of the tensors that have derivatives.
    """

    def __init__(self, denoiser, call, followed):
        super().__init__()
        self.replay, self.names, self.followed = Replay(denoiser, call), list(call.tensors()), followed

    def forward(self, *tensors):
        inputs = dict(zip(self.names, tensors))
        for name, derivatives in zip(self.followed, tensors[len(inputs) :]):
            inputs[name] = Paired(inputs[name], derivatives)
        prediction = self.replay(*inputs.values())
        return prediction.value, prediction.derivatives


def export_openvino(denoiser, call, followed=()):
    """A denoiser as an OpenVINO model with a free batch size, its INT8 weights as they are.

    `torch.export` runs on fake tensors: beside the weights this takes some 100 MB, where tracing takes gigabytes.

    Args:
        denoiser: torch module.
        call: `Call` of it with two examples; the graph's inputs are its tensors, in their order.
        followed: names of tensors whose derivatives are further inputs, as many as one likes. The call is then of one
            example, and the results are the prediction and its derivatives.

    Raises:
        InputError: it has an operation whose derivative is not known.
    """
    import openvino

    tensors = call.tensors()
    batch = torch.export.Dim("batch", min=1, max=None if followed else OPENVINO_MAX_BATCH)
    more = [tensors[name].expand(2, *tensors[name].shape[1:]).clone() for name in followed]
    example, module = (*tensors.values(), *more), Replay(denoiser, call)
    if followed:
        module = Differentiated(denoiser, call, followed)
    free = [bool(more) == (number >= len(tensors)) for number in range(len(example))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's, about itself
        shapes = (tuple({0: batch} if each else {} for each in free),)  # the modules take them as one argument
        try:
            program = torch.export.export(module.eval(), example, dynamic_shapes=shapes)
        except NoRule as reason:
            raise without_rule(reason) from None
        model = openvino.convert_model(program)
    # The graph keeps only the batch open, its inputs should say so.
    for node, tensor, is_free in zip(model.inputs, example, free):
        shape = [-1 if is_free else len(tensor), *tensor.shape[1:]]
        node.get_node().set_partial_shape(openvino.PartialShape(shape))
    model.validate_nodes_and_infer_types()
    return model


class OpenVINOUNet(torch.nn.Module):
    """A denoiser that OpenVINO computes, called like the torch one by training and by diffusers' pipelines.

    Args:
        model: an `openvino.Model`, or the path of its `.xml`.
        config: the torch denoiser's.
        call: the `Call` that it was exported with.
        engine: OpenVINO's device: CPU, GPU, NPU.
        dtype: torch.float32, or torch.bfloat16 to let OpenVINO compute in it.
        device: torch device of what is returned.
        followed: see `export_openvino`; it then takes `Stacked` tensors, too.
    """

    def __init__(self, model, config, call, engine, dtype, device, followed=()):
        super().__init__()
        import openvino

        self.config, self.dtype, self.device = config, dtype, device
        self.kind, self.names, self.followed = call.kind, list(call.tensors()), followed
        if config.get("addition_embed_type") == "text_time":  # `StableDiffusionXLPipeline` reads this layer's width
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
        if followed and engine == "CPU":
            settings["SNIPPETS_MODE"] = "DISABLE"  # OpenVINO 2026.4 crashes where it fuses this graph's operations
        supported = core.get_property(engine, "SUPPORTED_PROPERTIES")
        settings |= {name: value for name, value in optional.items() if name in supported}
        self.compiled = core.compile_model(model, engine, settings)

    def forward(self, *given, return_dict=True, **named):
        tensors = Call(self.kind, given, named).tensors()
        inputs = [tensors[name] for name in self.names]
        latents = next(x for x in inputs if x.dim() == 4)
        inputs = [x if x.dim() else x.expand(len(latents)) for x in inputs]  # pipelines give one timestep for all
        prediction = self.one_by_one(inputs) if self.followed else self.compute(inputs)[0].to(latents)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def compute(self, inputs):
        """The results of the graph, float32 on the host."""
        return list(map(torch.from_numpy, self.compiled([x.float().cpu().numpy() for x in inputs]).values()))

    def one_by_one(self, inputs):
        """The prediction of a batch by a graph of one example and its derivatives; `Stacked` where an input is."""
        rows = max(len(x.rows) if isinstance(x, Dual) else 1 for x in inputs)
        stacked = [lifted(x, rows).rows for name, x in zip(self.names, inputs) if name in self.followed]
        found = []
        for example in range(len(inputs[0])):
            values = [value_of(x)[example, None] for x in inputs]
            found.append(torch.cat(self.compute([*values, *(x[1:, example] for x in stacked)])))
        prediction = torch.stack(found, dim=1).to(inputs[0].device)
        return Stacked(prediction) if rows > 1 else prediction[0].to(inputs[0])


class Calibration(NamedTuple):
    """What the ranges of a denoiser's activations are measured on, to compute in INT8."""

    source: tuple  # what it is drawn from, with a faithful `repr`
    files: list  # the weight files that had a part in it
    draw: Callable  # returns the tensors of calls of the denoiser, see `Call.tensors`, pass by pass


def quantize_activations(graph, calibration):
    """A graph whose products are of INT8 weights and INT8 activations, by NNCF's post-training quantization."""
    os.environ.setdefault("NNCF_CI", "1")  # or it reports its use to its makers
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars and log
        import nncf

        passes = [tuple(x.float().cpu().numpy() for x in inputs) for inputs in calibration.draw()]
        kind = nncf.ModelType(NNCF_MODEL_TYPE)
        return nncf.quantize(graph, nncf.Dataset(passes), subset_size=len(passes), model_type=kind)


def export_path(cache_dir, files, config, *shape):
    """The folder of the exported graph of a denoiser, named by its weight files, config and shape."""
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


def compile_openvino_unet(path, load_denoiser, config, call, engine, dtype, device, calibration=None, followed=()):
    """Compiles a denoiser for an OpenVINO device; its graph is kept in the cache, and verified there.

    Args:
        path: folder of the exported graph, whose name says what it was made of; None keeps nothing.
        load_denoiser: returns the torch module; called only where there is no such graph yet.
        config: of the denoiser.
        call: `Call` of it with two examples of the right shapes.
        engine, dtype, device: see `OpenVINOUNet`.
        calibration: `Calibration`, to compute in INT8; None computes in `dtype`.
        followed: see `export_openvino`.

    Returns:
        The `OpenVINOUNet`, and the bytes of its weights as stored.
    """

    def exported():
        what = "Exporting the UNet to OpenVINO"
        return kept_graph(path, what, lambda: export_openvino(load_denoiser(), call, followed))

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
    return OpenVINOUNet(graph, config, call, engine, dtype, device, followed), size


def open_denoiser(
    base, resolution, quantization, load, engine, compute, cache_dir, calibration=None, differentiated=False
):
    """The denoiser of a base in OpenVINO, its graph kept in the cache under a name of what it is made of.

    Args:
        base: `Base`.
        resolution: side of the pictures.
        quantization: name of how its weights are stored.
        load: loads it in float32 on the CPU; returns the module and more.
        engine: an OpenVINO device.
        compute: `Compute`.
        cache_dir: folder; None keeps nothing.
        calibration: `Calibration`, to compute in INT8.
        differentiated: whether derivatives along the text are computed beside a prediction.

    Returns:
        The `OpenVINOUNet`, and the bytes of its weights as stored.

    Raises:
        InputError: the denoiser has an operation whose derivative is not known.
    """
    family, path = base.family, None
    inputs = family.example(base, 1 if differentiated else 2, resolution)
    call, followed = family.call(inputs), ()
    if differentiated:
        followed = [name for name, x in call.tensors().items() if any(x is part for part in inputs.text)]
    config = base_model.empty_model(base, family.denoiser).config
    if cache_dir is not None:
        files, latent_size = base_model.find_weight_files(base, family.denoiser), resolution // base.vae_factor
        shape = latent_size, base.prompt_length, *followed
        path = export_path(cache_dir, files, config, quantization, *shape)
    where = engine, compute.dtype, compute.device
    return compile_openvino_unet(path, lambda: load()[0], config, call, *where, calibration, followed)


def without_rule(reason):
    """The `InputError` for a model whose derivatives OpenVINO cannot compute."""
    return InputError(
        f"--unet_backend openvino has no exact derivatives of this model ({reason}): give --perturbation_scale,"
        " such as 3e-4, for finite differences."
    )


def recorder(family, calls):
    """Stands in for the denoiser of a family, puts the tensors of each call into a list and predicts zeros."""
    kind = family.classes[family.denoiser]

    def record(*given, **named):
        calls.append(tuple(Call(kind, given, named).tensors().values()))
        return (torch.zeros_like(given[0]),)

    return record


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
