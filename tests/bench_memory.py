"""The README's memory table: what a step needs on each process, computed from a model without weights.

python tests/bench_memory.py              # the table: Qwen3 shapes, an SDPO step on 80 GB GPUs; no network
python tests/bench_memory.py --measure    # one SDFT step of a 100M model on this CPU, one process and two
"""

import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sdft
import sdpo
import torch
from common import attention_of, blocks_of, parse_args, prepare
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from conftest import flags_of, launch, make_model, metrics_of

QWEN3 = {"0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True), "8B": (4096, 12288, 36, 32, False)}
FP32 = 4  # bytes
COPIES = ("base", "ema", "trust_region")  # teachers that keep weights of their own


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def model_without_weights(config: Any, dtype: torch.dtype, device: torch.device, lora_rank: int) -> nn.Module:
    how = dict(dtype=dtype, attn_implementation=attention_of(config, device))
    with torch.device("meta"):
        return prepare(AutoModelForCausalLM.from_config(config, **how).eval(), lora_rank)


def memory_plan(config: Any, args: Any, world: int, device: Any, teacher: str = "", theirs: Any = None) -> dict:
    """GiB on each process by what takes them.

    `teacher` is as for `Teacher`, "" for none; `theirs` is the config of one that is another model.
    "drawing" and "learning" are what the two phases need; "peak" is all that stays plus the larger of them,
    with the longest prompts and answers that the flags allow. Not in it: the libraries, and what the
    allocator leaves unused.
    """
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    gathered = 2 if bf16 else FP32
    model = model_without_weights(config, torch.bfloat16 if bf16 else torch.float32, device, args.lora_rank)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything, layers = size_of(model), blocks_of(model)
    # Qwen3 is saved in bf16, and one process keeps the weights under adapters so.
    frozen_bf16 = sum(p.numel() for name, p in model.named_parameters() if ".base_layer.weight" in name)
    frozen_bf16 *= bf16 and world == 1
    root, layer = everything - sum(map(size_of, layers)), max(map(size_of, layers))
    V, D = model.get_output_embeddings().weight.shape
    longest = args.max_completion_tokens + max(args.max_prompt_tokens, args.max_teacher_tokens)
    tokens = max(args.tokens_per_batch, longest)
    rows = min(args.sample_batch, math.ceil(args.prompts_per_step * args.rollouts / world))
    linear, square, cache = activations(model)
    if device.type == "cuda":
        square = 0.0  # its attention does not keep the L x L weights
    if args.activation_checkpointing:
        linear, square = len(layers) * D * gathered + linear / len(layers), square / len(layers)
    teacher_bytes = FP32 * trained * (teacher in COPIES)
    if theirs:
        other = size_of(model_without_weights(theirs, torch.float32, device, 0))
        teacher_bytes = other * (2 if device.type == "cuda" else FP32)
    heads = {"": 1, "trust_region": 3}.get(teacher, 2)
    full = not args.lora_rank
    working = root + 2 * layer + (root + layer) * full + root * (teacher not in ("", "live"))
    gib = {
        "weights": (FP32 * everything - 2 * frozen_bf16) / world,
        "optimiser": 2 * FP32 * trained / world,
        "teacher": teacher_bytes / world,
        "drawing: gathered weights": gathered * (everything if world > 1 else trained * bf16),
        "drawing: keys and values": cache * rows * (args.max_prompt_tokens + args.max_completion_tokens),
        "learning: gradients": FP32 * trained / world,
        "learning: gathered weights": gathered * (working if world > 1 else (everything - frozen_bf16) * bf16),
        "learning: activations": linear * tokens + square * tokens * longest,
        "learning: loss": FP32 * (heads * 512 * V + V * D * full),
    }
    gib = {name: size / 2**30 for name, size in gib.items()}
    sums = {"": 0.0, "drawing": 0.0, "learning": 0.0}
    for name, value in gib.items():
        sums[name.rpartition(":")[0]] += value
    return {**gib, "peak": sums[""] + max(sums["drawing"], sums["learning"])}


def read(model: nn.Module, length: int, use_cache: bool) -> Any:
    """A forward pass on the meta device. The attention mask is given whole, so it is not looked into."""
    width = model.get_output_embeddings().weight.shape[1]
    options = dict(dtype=model.dtype, device="meta")
    h_BLD = torch.empty(1, length, width, **options, requires_grad=True)
    mask = torch.empty(1, 1, length, length, **options)
    return model.base_model(inputs_embeds=h_BLD, attention_mask=mask, use_cache=use_cache)


def kept_bytes(model: nn.Module, length: int) -> int:
    """Bytes that a forward pass keeps for its backward, besides the weights."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        read(model, length, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def activations(model: nn.Module) -> tuple[float, float, float]:
    """a, b: a forward pass of L tokens keeps a L + b L^2 bytes; then the bytes of a token in the cache."""
    length = 64
    one, two = kept_bytes(model, length), kept_bytes(model, 2 * length)
    square = (two - 2 * one) / (2 * length**2)
    output = read(model, length, use_cache=True)
    cache = output.cache if "cache" in output else output.past_key_values  # transformers before 5.24
    return one / length - square * length, square, sum(2 * x.keys.nbytes for x in cache.layers) / length


def config_of(name: str) -> Qwen3Config:
    hidden, intermediate, layers, heads, tied = QWEN3[name]
    shape = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers)
    heads = dict(num_attention_heads=heads, num_key_value_heads=8, head_dim=128)
    return Qwen3Config(vocab_size=151936, tie_word_embeddings=tied, **shape, **heads)


def table() -> None:
    limits = dict(max_completion_tokens=4096, max_teacher_tokens=8192, tokens_per_batch=12288, sample_batch=32)
    print("| | teacher | 1 GPU | 8 GPUs |\n|---|---|---|---|")
    teachers = (("live", None), ("ema", None), ("trust_region", None), ("8B", config_of("8B")))
    for size in QWEN3:
        for rank in (0, 64):
            args = sdpo.Args(activation_checkpointing=True, lora_rank=rank, **limits)
            for teacher, theirs in teachers:
                plans = [memory_plan(config_of(size), args, n, torch.device("cuda"), teacher, theirs) for n in (1, 8)]
                peaks = " | ".join(f"{plan['peak']:.0f}" for plan in plans)
                print(f"| {size}, {f'LoRA {rank}' if rank else 'full'} | {teacher} | {peaks} |", flush=True)


def measure() -> None:
    folder = Path(tempfile.mkdtemp())
    make_model(folder / "model")
    shape = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    heads = dict(num_attention_heads=12, num_key_value_heads=12, head_dim=64)
    make_model(folder / "big", **shape, **heads, initializer_range=0.02)
    row, data = '{{"prompt": "zig:{0}", "privileged_context": "so{0}", "answer": "{0}"}}\n', folder / "data.jsonl"
    data.write_text("".join(row.format(i) for i in range(16)))
    tiny = SimpleNamespace(model=folder / "model", teacher="", data=data, eval=data)
    more = "--steps 1 --tokens-per-batch 256 --max-teacher-tokens 64 --save-every 9"
    for n in (1, 2):
        plans, taken = [], []
        for name in ("model", "big"):
            out = folder / f"{name}-{n}"
            flags = flags_of("sdft", out, tiny, f"{more} --model {folder / name}")
            done = launch(f"sdft.py {flags}", processes=n)
            if done.returncode:
                raise SystemExit(done.stderr)
            taken.append(metrics_of(out)[1]["memory/peak_gib"])
            args = parse_args(sdft.Args, sdft.PRESETS, flags.split())
            config = AutoConfig.from_pretrained(folder / name)
            plans.append(memory_plan(config, args, n, torch.device("cpu"), "ema"))
        planned, more_taken = plans[1]["peak"] - plans[0]["peak"], taken[1] - taken[0]
        parts = ", ".join(f"{name} {gib:.2f}" for name, gib in plans[1].items())
        print(
            f"{n} process{'es' * (n > 1)}: planned {planned:.2f} GiB, taken {more_taken:.2f} GiB "
            f"more than a model of nothing ({taken[0]:.2f}); the plan: {parts}",
            flush=True,
        )


if __name__ == "__main__":
    measure() if "--measure" in sys.argv[1:] else table()
