"""Drawing answers: transformers' `generate`, ours, and vLLM, in tokens per second.

python tests/bench_generation.py                   tiny and small, minutes; vLLM where it is installed
python tests/bench_generation.py --case small --methods generate ours --rounds 1

64 prompts of 16 tokens, at most 256 tokens each, temperature 1, random weights in fp32, one draw of all 64.
tiny     4 layers x 128, a vocabulary of 128          small    6 layers x 256, 32768 tokens
natural  one token in 64 ends an answer: geometric lengths, of which each method draws its own
equal    no token ends one: every answer has 256 tokens
All methods take turns in one process, so a busy machine is busy for all of them; the best of `rounds` counts.
The table has tokens per second, and in brackets how many times those of `generate`.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from conftest import make_model, toy  # noqa: E402

from common import TRAIN_STREAM, Run, Sampler, Sampling, VllmSampler, check_engine, load_model  # noqa: E402

CASES = {"tiny": (4, 128, 128), "small": (6, 256, 32768)}  # layers, width, vocabulary
N, PROMPT, T = 64, 16, 256


def make(folder, case, run):
    layers, width, vocabulary = CASES[case]
    heads = dict(num_attention_heads=width // 32, num_key_value_heads=width // 32, head_dim=32)
    shape = dict(num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, vocab_size=vocabulary)
    make_model(folder, **shape, **heads, eos_token_id=None, pad_token_id=None, initializer_range=0.02)
    return load_model(str(folder), run)


def generate(model, prompts, eos):
    from transformers import GenerationConfig

    how = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=T)
    config = GenerationConfig(**how, eos_token_id=eos or None, pad_token_id=0)
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        y_BT = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    ends = set(eos)
    return [next((t + 1 for t, i in enumerate(y) if i in ends), T) for y in y_BT[:, PROMPT:].tolist()]


def sampled(sampler, model, prompts, eos):
    sampler.eos = torch.tensor(eos, dtype=torch.long)
    keys = [(i, 0) for i in range(N)]
    return [len(y.ids) for y in sampler(model, prompts, keys, (TRAIN_STREAM, 1), Sampling(T))]


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    known = ["generate", "ours", "vllm"]
    installed = known if importlib.util.find_spec("vllm") else known[:2]
    parser.add_argument("--methods", nargs="*", choices=known, default=installed)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    flags = dict(out="/nowhere", seed=0, dtype="auto", sample_batch=N, activation_checkpointing=False)
    flags |= dict(engine_cache_gib=0.5, engine_tensor_parallel=1)
    flags["engine"] = "vllm" if "vllm" in args.methods else "transformers"
    run = Run(SimpleNamespace(**flags), toy.make_tokenizer())
    check_engine(run.args, 1)
    print(f"| tokens/s, {args.threads} thread(s) | " + " | ".join(args.methods) + " |")
    print("|" + "---|" * (1 + len(args.methods)))
    for case in args.case:
        with tempfile.TemporaryDirectory() as folder:
            model, V = make(Path(folder) / "model", case, run), CASES[case][-1]
            samplers = {"ours": Sampler(run, model)}
            if "vllm" in args.methods:
                samplers["vllm"] = VllmSampler(run, model)
            prompts = torch.randint(0, V, (N, PROMPT)).tolist()
            for lengths, eos in (("natural", list(range(0, V, 64))), ("equal", [])):
                best = dict.fromkeys(args.methods, 0.0)
                for method in args.methods * args.rounds:
                    began = time.perf_counter()
                    if method == "generate":
                        drawn = generate(model, prompts, eos)
                    else:
                        drawn = sampled(samplers[method], model, prompts, eos)
                    best[method] = max(best[method], sum(drawn) / (time.perf_counter() - began))
                base = best[args.methods[0]]
                cells = " | ".join(f"{v:.0f} ({v / base:.1f})" for v in best.values())
                print(f"| {case}, {lengths} lengths | {cells} |", flush=True)


if __name__ == "__main__":
    main()
