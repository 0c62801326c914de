"""The README's memory table, from `common.memory_plan`; and the plan of one run against what that run took.

    python tests/bench_memory.py              # the table: Qwen3 shapes, an SDPO step on 80 GB GPUs; no weights, no network
    python tests/bench_memory.py --measure    # one SDFT step of a 100M model on this machine's CPU, one process and two
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from conftest import flags_of, launch, make_model, metrics_of

import torch
from transformers import AutoConfig, Qwen3Config

import sdft
import sdpo
from common import memory_plan, parse

QWEN3 = {"0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True), "8B": (4096, 12288, 36, 32, False)}


def config(name: str) -> Qwen3Config:
    hidden, intermediate, layers, heads, tied = QWEN3[name]
    return Qwen3Config(vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied)


def table() -> None:
    flags = sdpo.Args(activation_checkpointing=True, max_completion_tokens=4096, max_teacher_tokens=8192, tokens_per_batch=12288, sample_batch=32)
    columns = [(1, 1), (8, 1), (16, 2)]
    print("| | teacher | " + " | ".join(f"{n} GPU{'s' * (n > 1)}{f', {r} copies' * (r > 1)}" for n, r in columns) + " |\n" + "|---" * 5 + "|")
    for size in QWEN3:
        for rank in (0, 64):
            for teacher, theirs in (("live", None), ("ema", None), ("trust_region", None), ("8B", config("8B"))):
                plans = [memory_plan(config(size), dataclasses.replace(flags, lora_rank=rank, replicas=r), n, torch.device("cuda"), teacher, theirs)
                         for n, r in columns]
                print(f"| {size}, {f'LoRA {rank}' if rank else 'full'} | {teacher} | " + " | ".join(f"{plan['peak']:.0f}" for plan in plans) + " |", flush=True)


def measure() -> None:
    folder = Path(tempfile.mkdtemp())
    make_model(folder / "model")
    make_model(folder / "big", hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
               head_dim=64, initializer_range=0.02)
    rows = "".join(f'{{"prompt": "zig:{i}", "privileged_context": "so{i}", "answer": "{i}"}}\n' for i in range(16))
    (folder / "data.jsonl").write_text(rows)
    tiny = SimpleNamespace(model=folder / "model", teacher="", data=folder / "data.jsonl", eval=folder / "data.jsonl")
    more = "--steps 1 --tokens-per-batch 256 --max-teacher-tokens 64 --save-every 9"
    for n in (1, 2):
        planned, taken = [], []
        for name in ("model", "big"):
            flags = flags_of("sdft", folder / f"{name}-{n}", tiny, f"{more} --model {folder / name}")
            done = launch(f"sdft.py {flags}", processes=n)
            assert done.returncode == 0, done.stderr
            taken.append(metrics_of(folder / f"{name}-{n}")[1]["memory/peak_gib"])
            args = parse(sdft.Args, sdft.PRESETS, flags.split())
            planned.append(memory_plan(AutoConfig.from_pretrained(folder / name), args, n, torch.device("cpu"), "ema"))
        print(f"{n} process{'es' * (n > 1)}: planned {planned[1]['peak'] - planned[0]['peak']:.2f} GiB, taken {taken[1] - taken[0]:.2f} GiB more than a "
              f"model of nothing ({taken[0]:.2f}); the plan: " + ", ".join(f"{name} {gib:.2f}" for name, gib in planned[1].items()), flush=True)


if __name__ == "__main__":
    measure() if "--measure" in sys.argv[1:] else table()
