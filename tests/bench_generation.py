"""Drawing answers: transformers' `generate`, ours, and vLLM, in tokens per second.

python tests/bench_generation.py                                 tiny and small, minutes; vLLM where it is installed
python tests/bench_generation.py --case small --methods generate ours --rounds 1

64 prompts of 16 tokens, at most 256 tokens each, sampled at temperature 1 from random weights in fp32, one draw of all 64.
tiny     4 layers x 128, 100 tokens of vocabulary          small    6 layers x 256, 32768 tokens
natural  one token in 64 ends an answer: geometric lengths, of which each method draws its own; no weight knows what it says
equal    no token ends one: every answer has 256 tokens
All methods take turns in one process, so that a busy machine is busy for all of them; the best of `rounds` counts.
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
import toy  # noqa: E402
from common import Run, Sampler, VllmSampler, check_engine, load_model  # noqa: E402

CASES = {"tiny": dict(num_hidden_layers=4, hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, vocab_size=128),
         "small": dict(num_hidden_layers=6, hidden_size=256, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=8, vocab_size=32768)}
N, PROMPT, T = 64, 16, 256


def make(folder, case):
    import transformers
    torch.manual_seed(0)
    config = transformers.Qwen3Config(head_dim=32, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
                                      **CASES[case])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_model(str(folder), Run(SimpleNamespace(out="/nowhere", dtype="auto")))


def generate(model, prompts, eos, args):
    from transformers import GenerationConfig
    config = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=T, eos_token_id=eos or None, pad_token_id=0)
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        y_BT = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[:, PROMPT:].tolist()
    ends = set(eos)
    return [next((t + 1 for t, i in enumerate(y) if i in ends), T) for y in y_BT]


def sampled(sampler, model, prompts, eos):
    sampler.eos = torch.tensor(eos, dtype=torch.long)
    return [len(y.ids) for y in sampler.each(model, prompts, [(i, 0) for i in range(N)], (1,), temperature=1.0)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--methods", nargs="*", choices=["generate", "ours", "vllm"],
                        default=["generate", "ours", *(["vllm"] if importlib.util.find_spec("vllm") else [])])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"| tokens/s, {args.threads} thread(s) | " + " | ".join(args.methods) + " |\n|" + "---|" * (1 + len(args.methods)))
    for case in args.case:
        with tempfile.TemporaryDirectory() as folder:
            model, V = make(Path(folder) / "model", case), CASES[case]["vocab_size"]
            run_args = SimpleNamespace(out="/nowhere", seed=0, max_completion_tokens=T, sample_batch=N, dtype="auto", engine_cache_gib=0.5,
                                       engine_tensor_parallel=1, engine="vllm" if "vllm" in args.methods else "transformers")
            check_engine(run_args, 1)
            run, tokenizer = Run(run_args), toy.make_tokenizer()
            samplers = {"ours": Sampler(tokenizer, model, run_args)}
            if "vllm" in args.methods:
                samplers["vllm"] = VllmSampler(tokenizer, model, run)
            prompts = torch.randint(0, V, (N, PROMPT)).tolist()
            for lengths, eos in (("natural", list(range(0, V, 64))), ("equal", [])):
                best = dict.fromkeys(args.methods, 0.0)
                for _ in range(args.rounds):
                    for method in args.methods:
                        began = time.perf_counter()
                        drawn = generate(model, prompts, eos, args) if method == "generate" else sampled(samplers[method], model, prompts, eos)
                        best[method] = max(best[method], sum(drawn) / (time.perf_counter() - began))
                base = best[args.methods[0]]
                print(f"| {case}, {lengths} lengths | " + " | ".join(f"{v:.0f} ({v / base:.1f})" for v in best.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
