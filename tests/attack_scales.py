"""Files of tuned scales under attack: what they say of themselves, and their tensors."""

import contextlib
import copy
import json
import types

import torch
from attack import WORDS, changed_file, is_sentence, room
from attack_results import ABOUT, changed_tensors
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_base import build_tiny_base

import tuneqdm_pipeline as tuneqdm


@contextlib.contextmanager
def scales(folder):
    """A small base, and scales of it that any pipeline loads."""
    build_tiny_base(folder / "base")
    pipeline = tuneqdm.TuneQDMPipeline.from_pretrained(folder / "base")
    layers, _ = tuneqdm.quantize_beside(pipeline.unet, 8, "minmax")
    shapes = tuneqdm.change_shapes(pipeline.unet, 2, True)
    about = ABOUT | {
        "scale_sets": 2,
        "train_input_scales": True,
        "base_sha256": tuneqdm.fingerprint(pipeline.unet, layers),
        "base_sketch": tuneqdm.sketch(pipeline.unet, layers),
    }
    tensors = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    yield types.SimpleNamespace(
        path=folder / tuneqdm.SCALES_FILE, pipeline=pipeline, unet=pipeline.unet, about=about, tensors=tensors
    )


@room("scales", scales, examples=60)
def attack_scales(world, data):
    """Scales are refused in one sentence and the model is as it was, or they fit and the model predicts numbers."""
    draw, pipeline = data.draw, world.pipeline
    hit = draw(st.sampled_from(["about", "about", "tensors", "tensors", "file"]))
    about = changed_file(draw, world.about) if hit == "about" else json.dumps(world.about).encode()
    tensors = changed_tensors(draw, world.tensors) if hit == "tensors" else world.tensors
    key = draw(st.sampled_from([tuneqdm.ABOUT] * 5 + ["format", ""])) if hit == "about" else tuneqdm.ABOUT
    try:
        content = save(tensors, metadata={key: about.decode(errors="replace")})
    except Exception:  # what safetensors itself does not write
        return
    if hit == "file":
        content = content[: draw(st.integers(0, len(content)))] + draw(st.binary(max_size=30))
    world.path.write_bytes(content)
    pipeline.register_modules(unet=copy.deepcopy(world.unet))
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    names = WORDS.filter(lambda text: len(text) < 1000)
    source = draw(st.sampled_from([world.path, world.path.parent, str(world.path)] * 3) | names)
    try:
        pipeline.load_scales(source)
    except (ValueError, OSError) as error:
        assert is_sentence(error), error
        after = pipeline.unet.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert pipeline._quantized is None and pipeline.scale_config is None
    else:
        with torch.no_grad():
            found = pipeline.unet(torch.ones(1, 4, 8, 8), 500, torch.ones(1, 32, 16)).sample
        assert found.isfinite().all() and pipeline.scale_config.bits in tuneqdm.SAME_BASE
        pipeline.scale_config = None
