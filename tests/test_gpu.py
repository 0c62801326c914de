"""What only a GPU can show: `pytest -m gpu` on a machine with CUDA. These tests have not been run on one yet."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from bench_memory import QWEN3, memory_plan
from common import Head, Objective, Run, completion_states, distill_loss, head_of, load_model, parse_args
from conftest import ROOT, flags_of, launch, make_model, metrics_of, run_here

DEVICE = "cuda"
MISSING = f"needs {DEVICE}; run pytest -m gpu on a machine that has it"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=MISSING)]
PAIRS = [([3, 20, 21, 5, 4], [30, 31, 5]), ([3, 22, 5, 4], [32, 33, 34, 35, 5])]


def make_run(tmp_path, dtype: str) -> Run:
    args = dict(out=str(tmp_path / "run"), seed=0, dtype=dtype, activation_checkpointing=False)
    return Run(SimpleNamespace(**args))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_loss_and_gradients_in_bf16_are_near_those_in_fp32(divergence):
    g = torch.Generator(DEVICE).manual_seed(0)
    h, h_t, W = (torch.randn(n, 256, generator=g, device=DEVICE) for n in (512, 512, 8192))
    W /= 16
    y, ones = torch.zeros(512, dtype=torch.long, device=DEVICE), torch.ones(512, device=DEVICE)
    found = []
    for bf16 in (False, True):
        states, weight = h.clone().requires_grad_(), W.clone().requires_grad_()
        teacher = [(1.0, h_t, Head(W, bf16=bf16))]
        objective = Objective(divergence)
        loss, _ = distill_loss(states, Head(weight, bf16=bf16), teacher, y, ones, objective)
        loss.backward()
        found.append((loss.detach(), states.grad, weight.grad))
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_the_attention_that_is_used_equals_eager(family, tmp_path):
    """Gemma 2 has soft-capped attention logits, which SDPA leaves out."""
    changes = dict(attn_logit_softcapping=0.5) if family == "gemma2" else {}
    folder = make_model(tmp_path / "model", family, **changes)
    model = load_model(str(folder), make_run(tmp_path, "float32"))
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").to(DEVICE)
    ids = torch.tensor([[3, 20, 21, 22, 5, 4, 30, 31]], device=DEVICE)
    with torch.no_grad():
        gap = model(input_ids=ids).logits - eager(input_ids=ids).logits
    assert gap.abs().max() < 1e-3


def test_one_process_of_fsdp_computes_the_gradients_of_the_plain_model(tmp_path):
    folder, gradients = str(make_model(tmp_path / "model")), []
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for mesh in (None, init_device_mesh(DEVICE, (1,))):
            run = make_run(tmp_path, "float32")
            run.mesh = mesh
            model = load_model(folder, run)
            y_N = torch.tensor([token for _, y in PAIRS for token in y], device=DEVICE)
            h_ND = completion_states(model, PAIRS)
            teacher = [(1.0, torch.zeros_like(h_ND), head_of(model))]
            weights = torch.ones(len(y_N), device=DEVICE)
            distill_loss(h_ND, head_of(model), teacher, y_N, weights, Objective())[0].backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            gradients.append({name: g.full_tensor() if mesh else g for name, g in grads.items()})
    finally:
        dist.destroy_process_group()
    for name, plain in gradients[0].items():
        assert (gradients[1][name] - plain).norm() <= 1e-5 * plain.norm(), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_over_nccl_compute_the_numbers_of_one(tiny, tmp_path):
    flags = "--dtype float32 --eval-temperature 1"
    one = run_here("sdft", tmp_path / "1", tiny, flags)
    done = launch(f"sdft.py {flags_of('sdft', tmp_path / '2', tiny, flags)}", processes=2, gpu=True)
    assert done.returncode == 0, done.stderr
    for a, b in zip(one, metrics_of(tmp_path / "2"), strict=True):
        for name in (name for name in a if not name.startswith(("time/", "memory/"))):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


def test_the_loss_at_the_head_of_qwen3_8b_takes_memory_that_does_not_depend_on_tokens():
    flags = "--case qwen3_8b --device cuda --dtype bfloat16 --chunk 2048 --methods floor ours"
    command = [sys.executable, ROOT / "tests" / "bench_loss.py", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    more = found["ours_mib_at_2T"] - found["rows"][1]["mib"]
    states = found["T"] * found["D"] * 2 / 2**20
    assert more < 1.1 * states + 64


def test_an_sdpo_step_of_a_model_of_600m_takes_the_memory_that_was_planned(tiny, tmp_path):
    import sdpo

    hidden, intermediate, layers, heads, tied = QWEN3["0.6B"]
    shape = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers)
    shape |= dict(num_attention_heads=heads, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    more = dict(max_position_embeddings=1024, tie_word_embeddings=tied, initializer_range=0.02)
    folder = make_model(tmp_path / "model", **shape, **more)
    flags = f"--model {folder} --steps 1 --max-completion-tokens 256 --hindsight feedback --verifier toy:feedback_all"
    [*_, last] = run_here("sdpo", tmp_path / "run", tiny, flags)
    args = parse_args(sdpo.Args, sdpo.PRESETS, flags_of("sdpo", tmp_path / "run", tiny, flags).split())
    config = AutoConfig.from_pretrained(folder)
    planned = memory_plan(config, args, 1, torch.device(DEVICE), "ema")["peak"]
    print(f"planned {planned:.1f} GiB, taken {last['memory/peak_gib']:.1f} GiB")
    assert 0.6 * planned < last["memory/peak_gib"] < 1.2 * planned


def test_vllm_on_a_gpu_draws_from_our_distribution(tiny, tmp_path):
    pytest.importorskip("vllm")
    for row in run_here("sdft", tmp_path, tiny, "--engine vllm --engine-cache-gib 1")[1:]:
        assert row["rollout/logp_gap_mean"] < 0.05
