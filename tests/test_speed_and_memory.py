"""OpenVINO, streamed weights, compilation, a lean VAE and the prediction of memory: other ways to the same."""

import copy
import os
import platform
import subprocess
import sys
import threading
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import as_arguments
from diffusers import AutoencoderKL
from diffusers.models.attention import FeedForward
from safetensors.torch import load_file

import train_zoodip_textual_inversion as zoodip
from personalization.data import examples
from personalization.errors import InputError
from personalization.models import base_model, families, frozen, lean_vae, memory, openvino_unet


CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """What is quantized or exported once; an export takes half a minute here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def model(basics, cache):
    """Loads text encoder and UNet as `main` does: `(loss_of(candidates), θ, unet)` on one fixed batch."""

    def load(**flags):
        chosen = basics | {"--quantized_cache_dir": cache} | {f"--{n}": v for n, v in flags.items()}
        args = zoodip.parse_args(as_arguments(chosen))
        base, placeholder, compute = zoodip.resolve_settings(args, CPU)
        text_encoder, unet, *_ = zoodip.load_networks(args, base, compute)
        first = placeholder.first_id
        ids = base.tokenize(["a photo of a star"]).repeat(2, 1)
        ids[ids == placeholder.initializer_id] = first
        assert (ids == first).sum() == 2
        args.max_candidates_per_forward = 8  # room for as many
        args.num_perturbations = 7
        assembled, start = zoodip.assemble_model(args, base, placeholder, ids, text_encoder, unet, compute)
        g = torch.Generator().manual_seed(0)
        size = args.resolution // base.vae_factor
        latents = torch.randn(2, unet.config.in_channels, size, size, generator=g)
        batch = examples.noise_batch(base.family, latents, ids, torch.tensor([520, 870]), g, base.scheduler)

        def loss_of(candidates):
            with torch.inference_mode():
                return assembled.losses(candidates, batch)

        return loss_of, start[None], unet

    return load


def perturbed(theta, count, scale):
    return theta + scale * torch.randn(count, *theta.shape, generator=torch.Generator().manual_seed(3))


def test_openvino_and_torch_agree_on_losses_and_on_their_differences(model, cache):
    pytest.importorskip("openvino")
    ours, theta, _ = model()
    theirs, _, unet = model(unet_backend="openvino")
    assert isinstance(unet, openvino_unet.OpenVINOUNet)
    plain, _, _ = model(quantization="none")
    quantization_error = (ours(perturbed(theta, 3, 0.1)) - plain(perturbed(theta, 3, 0.1))).abs().max()
    for count in (1, 3, 5):  # one graph serves every batch
        candidates = perturbed(theta, count, 0.1)
        assert (ours(candidates) - theirs(candidates)).abs().max() < 0.01 * quantization_error
    candidates = torch.cat([theta[None], perturbed(theta, 7, 1e-3)])
    slopes = [(loss(candidates)[1:] - loss(candidates)[0]) / 1e-3 for loss in (ours, theirs)]
    assert torch.corrcoef(torch.stack(slopes))[0, 1] > 0.999
    assert len(list(cache.glob("unet-openvino-*/unet.bin"))) == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no processor affinity")
def test_openvino_leaves_all_cores_to_its_process(model, monkeypatch):
    """Tied to the first core while it computes, as OpenVINO has it by default, two runs beside each other share it."""
    pytest.importorskip("openvino")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as for each of several runs
    loss_of, theta, _ = model(unet_backend="openvino")
    computing, stop, seen = threading.get_native_id(), threading.Event(), set()

    def watch():
        while not stop.wait(1e-3):
            seen.add(frozenset(os.sched_getaffinity(computing)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    for _ in range(20):
        loss_of(theta[None])
    stop.set()
    watcher.join()
    assert seen == {frozenset(os.sched_getaffinity(0))}


def test_the_openvino_export_is_made_once_for_its_weights_and_shape(model, monkeypatch):
    pytest.importorskip("openvino")
    first, theta, _ = model(unet_backend="openvino")
    monkeypatch.setattr(openvino_unet, "export_openvino", lambda *_: pytest.fail("exported again"))
    again, _, _ = model(unet_backend="openvino")
    assert torch.equal(first(theta[None]), again(theta[None]))
    with pytest.raises(pytest.fail.Exception, match="exported again"):
        model(unet_backend="openvino", resolution=32)


def test_openvino_that_is_not_installed_is_one_sentence(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="pip install openvino"):
        model(unet_backend="openvino")


def test_openvino_trains_the_token_that_torch_trains(train, cache):
    pytest.importorskip("openvino")
    flags = {"validation_prompt": "a photo of {}", "num_validation_images": 1, "num_inference_steps": 2}
    flags["quantized_cache_dir"] = cache
    outs = [train(output_dir=train.folder / name, unet_backend=name, **flags) for name in ("torch", "openvino")]
    torch_theta, openvino_theta = (load_file(out / "learned_embeds.safetensors")["<my-toy>"] for out in outs)
    torch.testing.assert_close(torch_theta, openvino_theta, rtol=1e-3, atol=1e-4)
    assert (outs[1] / "samples" / "image_0.png").is_file()


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_streamed_weights_give_the_same_losses_bit_for_bit(model, tmp_path, quantization):
    resident, theta, _ = model(quantization=quantization)
    streamed, _, unet = model(quantization=quantization)
    zoodip.stream_weights(unet, CPU, tmp_path / "layers")
    assert any((tmp_path / "layers").iterdir())
    candidates = perturbed(theta, 3, 0.1)
    for _ in range(2):
        assert torch.equal(resident(candidates), streamed(candidates))


def test_low_vram_trains_the_same_token_and_leaves_no_files(train):
    plain, streamed = train(output_dir=train.folder / "a"), train(output_dir=train.folder / "b", low_vram=True)
    first, second = (load_file(out / "learned_embeds.safetensors")["<my-toy>"] for out in (plain, streamed))
    assert torch.equal(first, second)
    assert not list(streamed.glob(".tmp-*"))


def test_a_compiled_unet_gives_the_same_losses(model):
    """Graph capture of the whole UNet; the code generator below it is PyTorch's own and takes minutes on a CPU."""
    eager, theta, _ = model()
    compiled, _, unet = model()
    unet.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    candidates = perturbed(theta, 3, 0.1)
    torch.testing.assert_close(compiled(candidates), eager(candidates), rtol=1e-4, atol=1e-5)


FREEING = """
import os, sys
import personalization.quiet
import torch
from personalization.models import memory
memory.keep_freed_memory(*map(int, sys.argv[1:])) if sys.argv[1:] else memory.prepare_training()
before, tensors, staying = memory.process_memory().anonymous, [], []
for _ in range(40):
    tensors.append(torch.ones(5 * 2**18))  # 5 MB
    staying.append(torch.ones(2**14))  # so that no block is the last
del tensors
print((memory.process_memory().anonymous - before) >> 20, os.environ["THP_MEM_ALLOC_ENABLE"])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library cannot be told what to keep")
@pytest.mark.parametrize("settings, least, most", [((), 0, 50), (("32", "64"), 150, 250)], ids=["ours", "large heap"])
def test_what_a_step_frees_goes_back_to_the_system(settings, least, most, repo):
    command = [sys.executable, "-c", FREEING, *settings]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    megabytes, huge = map(int, done.stdout.split())
    assert least <= megabytes <= most and huge == 1


def test_live_bytes_are_those_of_a_hand_count():
    def run():
        x = torch.empty(1000, device="meta")  # 4000 bytes
        y = x + 1  # 8000 alive
        del x
        z = torch.cat([y, y, y])  # 16000 alive: the peak
        del y
        return z.view(3, 1000)[0].clone()  # a view is no memory; 16000 again

    assert memory.activation_bytes(run, torch.device("cuda")) == 16000
    conv = torch.nn.Conv2d(4, 8, 3, padding=1, device="meta")
    image = torch.empty(1, 4, 16, 16, device="meta")
    output = 8 * 16 * 16 * 4
    assert memory.activation_bytes(lambda: conv(image), torch.device("cuda")) == output
    blocked = output + 4 * 16 * 16 * 4 + conv.weight.numel() * 4
    heap = int(output * 1.8)  # glibc's share of a small block
    assert memory.activation_bytes(lambda: conv(image), CPU) == heap + blocked
    large = torch.empty(2**24, device="meta")  # 64 MB: a mapping of its own
    assert memory.activation_bytes(lambda: large + 1, CPU) == 2**26


def test_views_of_weights_are_no_activations():
    linear = torch.nn.Linear(100, 3, device="meta")  # multiplies with a transposed view of its weight
    x = torch.empty(1, 100, device="meta")
    assert memory.activation_bytes(lambda: linear(x), torch.device("cuda")) == 3 * 4


def test_attention_counts_as_fused():
    q = torch.empty(1, 8, 4096, 40, device="meta")
    assert (
        memory.activation_bytes(lambda: F.scaled_dot_product_attention(q, q, q), torch.device("cuda")) == q.numel() * 4
    )


def test_more_candidates_a_pass_need_more_memory_and_streaming_less(basics):
    def figures(**flags):
        args = zoodip.parse_args(as_arguments(basics | {f"--{name}": value for name, value in flags.items()}))
        base, _, compute = zoodip.resolve_settings(args, CPU)
        return zoodip.estimate_memory(args, base, compute)

    plain, few, many = figures(), figures(low_vram=True), figures(num_perturbations=8, low_vram=True)
    assert many.activations > 2 * few.activations  # of tensors alone: small ones count more where they lie in a heap
    assert figures(num_perturbations=8, max_candidates_per_forward=3).activations == plain.activations
    whole, streamed = figures(quantization="none"), figures(quantization="none", low_vram=True)
    assert streamed.denoiser < plain.denoiser < whole.denoiser
    assert plain.peak == plain.libraries + max(plain.phases.values())


def test_estimate_memory_prints_and_loads_nothing(train, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(base_model, "stored_tensors", refuse)
    monkeypatch.setattr(families.SD1.classes["vae"], "from_pretrained", refuse)
    out = train(estimate_memory=True)
    printed = capsys.readouterr().out
    for part in ("libraries", "text encoder", "UNet", "activations", "while training", "peak"):
        assert part in printed
    assert not (out / "learned_embeds.safetensors").exists()


@pytest.mark.parametrize(
    "case, fix",
    [
        ("plenty", None),
        ("tight", "--quantization int8 --max_candidates_per_forward 1 --low_vram would fit"),
        ("none", "smaller --resolution"),
    ],
)
def test_too_little_memory_is_said_with_the_flags_that_fit(basics, monkeypatch, caplog, case, fix):
    rss = 500 * 2**20
    monkeypatch.setattr(memory, "process_memory", lambda: memory.ProcessMemory(rss, rss))
    flags = {"--num_perturbations": 8, "--quantization": "none", "--quantized_cache_dir": "none"}
    args = zoodip.parse_args(as_arguments(basics | flags))
    base, _, compute = zoodip.resolve_settings(args, CPU)

    def predict(settings):
        return zoodip.estimate_memory(settings, base, compute)

    tight = predict(Namespace(**vars(args) | zoodip.SMALLER)).peak + 10**5
    available = {"plenty": 10**12, "tight": tight, "none": 600 * 2**20 - 10**8}[case] - rss
    monkeypatch.setattr(
        memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available, "total": 10**12})
    )
    with caplog.at_level("WARNING"):
        memory.warn_if_too_large(args, zoodip.SMALLER, predict, CPU)
    messages = [record.message for record in caplog.records if "This run needs" in record.message]
    assert (len(messages) == 1 and fix in messages[0]) if fix else not messages


@pytest.mark.cuda
def test_a_step_never_waits_for_the_device(train, monkeypatch):
    original = zoodip.estimate_gradient

    def watched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(zoodip, "estimate_gradient", watched)
    train()


def test_the_process_knows_its_memory():
    before = memory.process_memory()
    block = torch.ones(50 * 2**20 // 4)
    after = memory.process_memory()
    assert after.rss - before.rss > 45 * 2**20
    if Path("/proc/self/status").is_file():
        assert after.anonymous - before.anonymous > 45 * 2**20
    del block


def test_feed_forwards_of_some_tokens_at_a_time_are_the_same(model, monkeypatch):
    seen, forward, found = [], FeedForward.forward, []
    monkeypatch.setattr(FeedForward, "forward", lambda self, x: seen.append(x.shape[:2].numel()) or forward(self, x))
    for wide in (10**6, 40):
        monkeypatch.setattr(frozen, "WIDE", wide)
        seen.clear()
        loss_of, theta, _ = model()
        found.append(loss_of(perturbed(theta, 3, 0.1)))
        assert (max(seen) <= 40) == (wide == 40)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def small_vae():
    """Two levels of `AutoencoderKL`: a layer of every kind."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, **blocks).eval()
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, torch.nn.GroupNorm):  # which are 1 and 0 at first
                layer.weight.normal_(1, 0.3)
                layer.bias.normal_(0, 0.3)
    return vae


@pytest.mark.parametrize("strip_bytes", [1, 3000, 2**30])
def test_a_lean_vae_makes_the_same_in_less(monkeypatch, strip_bytes):
    """Layers of every kind in strips, sums in place: against diffusers' own, whose input stays as it was."""
    monkeypatch.setattr(lean_vae, "STRIP_BYTES", strip_bytes)
    plain = small_vae()
    lean = lean_vae.spare_memory(copy.deepcopy(plain))
    kinds = {type(layer) for layer in lean.modules()}
    assert {lean_vae.InPlaceResnet, lean_vae.StripConv2d, lean_vae.StripUpsample2D} <= kinds
    pixels, latents = torch.rand(2, 3, 34, 22) * 2 - 1, torch.randn(2, 4, 9, 7)
    given = pixels.clone(), latents.clone()
    with torch.inference_mode():
        for found, expected in (
            (lean.encode(pixels).latent_dist.parameters, plain.encode(pixels).latent_dist.parameters),
            (lean.decode(latents).sample, plain.decode(latents).sample),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pixels, given[0]) and torch.equal(latents, given[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lean_vae_rounds_no_more_than_diffusers(monkeypatch, dtype):
    """Statistics of the norms are taken in float32, whatever the pictures are kept in."""
    monkeypatch.setattr(lean_vae, "STRIP_BYTES", 3000)
    exact, pixels, latents = small_vae(), torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 32, 32)
    plain = copy.deepcopy(exact).to(dtype)
    lean = lean_vae.spare_memory(copy.deepcopy(plain))
    with torch.inference_mode():
        encoded, decoded = exact.encode(pixels).latent_dist.parameters, exact.decode(latents).sample
        errors = [
            torch.stack(
                [
                    (vae.encode(pixels.to(dtype)).latent_dist.parameters.float() - encoded).norm() / encoded.norm(),
                    (vae.decode(latents.to(dtype)).sample.float() - decoded).norm() / decoded.norm(),
                ]
            )
            for vae in (lean, plain)
        ]
    assert (errors[0] < 1.2 * errors[1]).all()


def test_a_lean_vae_needs_one_tensor_of_the_picture():
    """And to decode it three and a half, of which two are the input of the last block that halves the channels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks).eval()
        pixels, latents = torch.empty(1, 3, 1024, 1024), torch.empty(1, 4, 128, 128)

    def of_pictures(function):
        return memory.activation_bytes(function, CPU, heap_slack=0.0) / (4 * 128 * 1024**2)

    with torch.inference_mode():
        plain = of_pictures(lambda: vae.encode(pixels)), of_pictures(lambda: vae.decode(latents))
        lean_vae.spare_memory(vae)
        lean = of_pictures(lambda: vae.encode(pixels)), of_pictures(lambda: vae.decode(latents))
    decoder = weakref.ref(vae.decoder)
    vae.decoder = None
    assert decoder() is None, "it would stay until the next garbage collection"
    assert lean[0] < 1.4 and plain[0] > 4.9
    assert lean[1] < 3.8 and plain[1] > 5.9
