"""The distillation loss (JSD 1/2, gradients for states and head) beside its peers: time, memory, error.

python tests/bench_loss.py                                             laptop case, three to four minutes
python tests/bench_loss.py --case large --methods floor ours naive     the vocabulary of Qwen3
python tests/bench_loss.py --case qwen3_8b --device cuda --dtype bfloat16 --chunk 2048 --methods floor ours

time     best of `rounds`; all methods take turns in one process, so a busy machine is busy for all of them.
         x floor: over the four matrix products of any exact method (logits twice, dX, dW), same chunks
memory   peak growth of a fresh process per method, once for T and for ours also for 2 T; includes dX and dW
error    relative error of (dX, dW) against float64 autograd on the same inputs, the worse of the two, at a
         mean divergence of 1e-2 and 1e-4, on the first 128 tokens. "inexact": another question (top 100).
TRL (1.16) and Liger are optional: pip install --no-deps trl accelerate liger-kernel
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from bench_trl import fresh, jsd, resident  # noqa: E402

from common import Head, Objective, distill_loss  # noqa: E402

# T tokens, D hidden, V vocabulary
CASES = {"laptop": (1024, 512, 32768), "small": (4096, 512, 32768)}
CASES |= {"large": (2048, 1024, 151936), "qwen3_8b": (16384, 4096, 151936)}


@torch.no_grad()
def floor(h, W, h_t, W_t, args):
    h, W, d_w = h.detach(), W.detach(), torch.zeros_like(W)
    z, d_h = h.new_empty(args.chunk, len(W)), torch.empty_like(h)
    for first in range(0, len(h), args.chunk):
        at = slice(first, min(first + args.chunk, len(h)))
        rows = z[: at.stop - at.start]
        torch.mm(h_t[at], W_t.t(), out=rows)
        torch.mm(h[at], W.t(), out=rows)
        torch.mm(rows, W, out=d_h[at])
        d_w.addmm_(rows.t(), h[at])


def ours(h, W, h_t, W_t, args, support="full"):
    zeros, ones = torch.zeros(len(h), dtype=torch.long, device=h.device), torch.ones(len(h), device=h.device)
    objective = Objective("jsd", support, topk=100, chunk=args.chunk)
    return distill_loss(h, Head(W), [(1.0, h_t, Head(W_t))], zeros, ones, objective)[0]


def ours_top100(*inputs):
    return ours(*inputs, support="student_topk")


def naive(h, W, h_t, W_t, args):
    with torch.no_grad():
        log_q = (h_t @ W_t.t()).float().log_softmax(-1)
    return jsd((h @ W.t()).float().log_softmax(-1), log_q).sum()


def checkpointed(h, W, h_t, W_t, args):
    parts = zip(h.split(args.chunk), h_t.split(args.chunk), strict=True)
    return sum(checkpoint(naive, x, W, x_t, W_t, args, use_reentrant=False) for x, x_t in parts)


def trl_full(h, W, h_t, W_t, args):
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    with torch.no_grad():
        t = h_t @ W_t.t()
    return compute_full_logit_self_distillation_loss(h @ W.t(), t, distillation_alpha=0.5).sum()


def trl_top100(h, W, h_t, W_t, args):
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    with torch.no_grad():
        t = h_t @ W_t.t()
    how = dict(distillation_topk=100, distillation_alpha=0.5, distillation_add_tail=True)
    return compute_topk_self_distillation_loss(h @ W.t(), t, **how).sum()


def trl_chunked(h, W, h_t, W_t, args):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    ones = torch.ones(1, len(h), device=h.device)
    return _chunked_divergence_loss(h[None], h_t[None], W, W_t, ones, beta=0.5, num_items_in_batch=1)[0]


def liger(h, W, h_t, W_t, args):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    how = dict(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False, chunk_size=args.chunk)
    labels = torch.zeros(len(h), dtype=torch.long, device=h.device)
    return LigerFusedLinearJSDLoss(**how)(h, W, h_t, W_t, labels) * len(h)  # it divides by the tokens


METHODS = (floor, ours, ours_top100, naive, checkpointed, trl_full, trl_top100, trl_chunked, liger)
METHODS = {method.__name__: method for method in METHODS}
INEXACT = {"ours_top100", "trl_top100"}


def tensors(args, T, divergence=1e-2):
    """Student and teacher with one head and states so far apart that JSD is about `divergence`."""
    _, D, V = CASES[args.case]
    g = torch.Generator(args.device).manual_seed(0)
    h, W, noise = (torch.randn(n, D, generator=g, device=args.device) for n in (T, V, T))
    W *= 2 / D**0.5
    near = (h[:32], h[:32] + 0.05 * noise[:32])
    mean = jsd(*((x @ W.t()).log_softmax(-1) for x in near)).mean().item()
    h_t = h + 0.05 * (divergence / mean) ** 0.5 * noise
    dtype = getattr(torch, args.dtype)
    return h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), h_t.to(dtype), W.to(dtype)


def run(method, inputs, args):
    h, W, *_ = inputs
    h.grad = W.grad = None
    loss = METHODS[method](*inputs, args)
    if loss is not None:
        loss.backward()
    if args.device == "cuda":
        torch.cuda.synchronize()


def measure_time(args, methods):
    inputs, best = tensors(args, CASES[args.case][0]), dict.fromkeys(methods, float("inf"))
    for method in methods * args.rounds:
        start = time.perf_counter()
        run(method, inputs, args)
        best[method] = min(best[method], time.perf_counter() - start)
    return best


def measure_memory(args, method, T):
    inputs = tensors(args, T)
    first = [x[:128].detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    run(method, first, args)  # imports, buffers of a first call
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(method, inputs, args)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now
    before = resident("VmRSS")
    run(method, inputs, args)
    return (resident("VmHWM") - before) / 2**10


def measure_error(args, methods, divergence):
    inputs, errors = tensors(args, 128, divergence), {}
    h, W, h_t, W_t = (x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    jsd((h @ W.t()).log_softmax(-1), (h_t @ W_t.t()).log_softmax(-1)).sum().backward()
    for method in methods:
        run(method, inputs, args)
        if inputs[0].grad is not None:
            pairs = ((inputs[0].grad, h.grad), (inputs[1].grad, W.grad))
            errors[method] = max(((x.double() - exact).norm() / exact.norm()).item() for x, exact in pairs)
    return errors


def available(method):
    try:
        if method.startswith("trl"):
            import trl.experimental.sdpo.loss_utils  # noqa: E401, F401
        if method == "liger":
            import liger_kernel.chunked_loss  # noqa: F401
    except Exception as error:
        print(f"{method}: left out, not importable here ({type(error).__name__}: {str(error)[:80]})")
        return False
    return True


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    shapes = f"T tokens, D hidden, V vocabulary: {CASES}"
    parser.add_argument("--case", choices=CASES, default="laptop", help=shapes)
    usual = [method for method in METHODS if method != "checkpointed"]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=usual)
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of hidden states and heads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--chunk", type=int, default=512, help="tokens at a time, where a method has chunks")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        settings, name, *rest = json.loads(args.task)
        measure = {"time": measure_time, "memory": measure_memory, "error": measure_error}[name]
        print(json.dumps(measure(argparse.Namespace(**settings), *rest)))
        return

    def ask(*task):
        return fresh(__file__, [vars(args), *task], args.threads)

    T, D, V = CASES[args.case]
    methods = list(dict.fromkeys(["floor"] + [m for m in args.methods if available(m)]))
    seconds = ask("time", methods)
    memory = {m: ask("memory", m, T) for m in methods}
    errors = {d: ask("error", methods, d) for d in (1e-2, 1e-4)} if args.case != "qwen3_8b" else {}
    bytes_each = getattr(torch, args.dtype).itemsize
    gradients = (T * D + V * D) * bytes_each / 2**20
    print(f"\n{args.case}: T={T} D={D} V={V} {args.dtype} on {args.device}, dX + dW = {gradients:.0f} MiB")
    heads = "".join(f"{f'err {d:.0e}':>12}" for d in errors)
    print(f"{'':14}{'s':>8}{'x floor':>9}{'MiB':>8}{'beyond':>8}{heads}")
    rows = []
    for m in methods:
        row = {"method": m, "s": round(seconds[m], 3), "x_floor": round(seconds[m] / seconds["floor"], 3)}
        row |= {"mib": round(memory[m]), "mib_beyond_gradients": round(memory[m] - gradients)}
        rows.append(row | {f"err_{d:.0e}": e.get(m) for d, e in errors.items()})
        text = ["" if m == "floor" else "inexact" if m in INEXACT else f"{e[m]:.1e}" for e in errors.values()]
        cells = f"{row['s']:8.2f}{row['x_floor']:9.2f}{row['mib']:8}{row['mib_beyond_gradients']:8}"
        print(f"{m:14}{cells}" + "".join(f"{x:>12}" for x in text))
    result = {"case": args.case, "T": T, "D": D, "V": V}
    result |= {"dtype": args.dtype, "device": args.device, "rows": rows}
    if "ours" in methods:
        result["ours_mib_at_2T"] = round(ask("memory", "ours", 2 * T))
        d_x = 2 * T * D * bytes_each / 2**20
        print(f"ours at T = {2 * T}: {result['ours_mib_at_2T']} MiB, of which dX {d_x:.0f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
