"""What the laptop world can say about the papers' claims: runs the commands, prints the tables that the README quotes.

    python tests/claims.py sdft-vs-sft sdpo-vs-grpo         # all of them without a name
    python tests/claims.py --list                           # only the commands

Every line of a table is one command, repeated on base models 0, 1 and 2 (sdft: once each, sdpo and sdzero: with two seeds
each). A learning rate written {a|b|c} is tuned first, on base 0 and seed 0 only: sdft takes the smallest one whose final accuracy
is within .05 of the best, the others the one with the highest accuracy over the whole run. Finished runs under runs/claims are
not repeated.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).parent.parent
OUT = ROOT / "runs" / "claims"
ONCE, TWICE = [(0, 0), (1, 1), (2, 2)], [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4), (2, 5)]        # (base model, seed)

# `lenient` also reads the digits out of the demonstrations' style: a right answer in a foreign style counts.
BASE = ("--model toy:{base}/model --eval-data toy:{base}/zig-eval.jsonl toy:{base}/prior-eval.jsonl toy:{base}/add-eval.jsonl --seed {seed} "
        "--data toy:{base}/zig-train.jsonl --eval-every 40 --verifier toy:lenient")
OWN = BASE.replace("zig-train", "zig-own-train")
LR, SFT_LR = "--lr {3e-5|5e-5|1e-4}", "--lr {3e-5|1e-4|3e-4|1e-3}"
MUL = ("--model toy:{base}/model --data toy:{base}/mul-train.jsonl --eval-data toy:{base}/mul-eval.jsonl toy:{base}/prior-eval.jsonl --seed {seed} "
       "--eval-every 5 --teacher-samples 0")
RL = "--lr {1.5e-4|3e-4|6e-4}"
CLAIMS: dict[str, dict[str, str]] = {
    "sdft-vs-sft": {
        "SDFT": f"sdft.py {BASE} {LR}",
        "SFT on the demonstrations": f"sdft.py {BASE} {SFT_LR} --method sft",
        "DFT on the demonstrations": f"sdft.py {BASE} {SFT_LR} --method dft",
        "SFT on own-style rewrites (control)": f"sdft.py {OWN} {LR} --method sft",
    },
    "sdft-teachers": {f"{teacher} teacher": f"sdft.py {BASE} {LR} --teacher {teacher}" for teacher in ("ema", "base", "live")}
                     | {"live teacher at the others' rate": f"sdft.py {BASE} --lr 5e-5 --teacher live"},
    "sdft-divergences": {d: f"sdft.py {BASE} {LR} --divergence {d}" for d in ("forward_kl", "reverse_kl", "jsd")},
    "sdft-data": {
        "on-policy": f"sdft.py {BASE} {LR}",
        "off-policy: the teacher answers": f"sdft.py {BASE} {LR} --generate-from teacher --is-cap 0",
    },
    "sdpo-vs-grpo": {
        "SDPO, solution or feedback": f"sdpo.py {MUL} {RL}",
        "SDPO, solution only": f"sdpo.py {MUL} {RL} --feedback-when never",
        "SDPO, feedback on wrong attempts only": f"sdpo.py {MUL} {RL} --solution-from none",
        "SDPO, feedback on every attempt": f"sdpo.py {MUL} {RL} --solution-from none --feedback-on all",
        "GRPO": f"sdpo.py {MUL} {RL} --policy-weight 1",
    },
    "sdpo-logits": {
        "JSD, all logits": f"sdpo.py {MUL} {RL}",
        "JSD, student's top 10 and tail": f"sdpo.py {MUL} {RL} --support student_topk --topk 10",
        "reverse KL, all logits": f"sdpo.py {MUL} {RL} --divergence reverse_kl",
        "reverse KL, sampled token": f"sdpo.py {MUL} {RL} --divergence reverse_kl --support sampled",
    },
    "sdpo-teachers": {f"{teacher} teacher": f"sdpo.py {MUL} {RL} --teacher {teacher}" for teacher in ("ema", "base", "live", "trust_region")}
                     | {f"{teacher} teacher at 1e-3": f"sdpo.py {MUL} --lr 1e-3 --teacher {teacher}" for teacher in ("ema", "base", "live", "trust_region")},
}


def run(command: str, out: Path) -> list[dict]:
    """The metrics of one run, from disk when it is finished."""
    if not (out / "run_card.md").exists():
        script, *flags = command.split()
        print(f"  python {command}", flush=True)
        done = subprocess.run([sys.executable, ROOT / script, *flags, "--out", str(out), "--overwrite", "--save-every", "1000000"], cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def folder(command: str) -> Path:
    """One folder per command, so that claims share their runs."""
    return OUT / re.sub(r"[^\w.=-]+", "_", command.replace("--", "").replace("toy:", ""))[-200:]


def at(command: str, base: int, seed: int) -> list[dict]:
    command = command.format(base=base, seed=seed)
    return run(command, folder(command))


def curve(metrics: list[dict], name: str = "eval") -> list[tuple[int, float]]:
    """(step, average) of every evaluation."""
    return [(row["step"], v) for row in metrics for k, v in row.items() if k.startswith(f"{name}/avg@")]


def final(metrics: list[dict], name: str = "eval") -> float:
    return curve(metrics, name)[-1][1]


def attempts_to(metrics: list[dict], level: float) -> float:
    """Attempts, 32 a step, until the evaluation first reaches `level`, between two evaluations on a straight line; all of them when never."""
    points = curve(metrics)
    for (step, low), (next_step, high) in zip(points, points[1:]):
        if low < level <= high:
            return 32 * (step + (level - low) / (high - low) * (next_step - step))
    return 32 * points[-1][0]


def seconds(metrics: list[dict]) -> float:
    """Of generation, teacher, student and optimiser."""
    return sum(v for row in metrics for k, v in row.items() if re.match("time/(generate|teacher|student|optim)$", k))


def tune(command: str) -> str:
    """The command with its learning rate chosen on base 0, seed 0."""
    grid = re.search(r"{([^{}]*\|[^{}]*)}", command)
    if not grid:
        return command
    tried = {lr: command.replace(grid[0], lr) for lr in grid[1].split("|")}
    area = lambda metrics: statistics.mean(v for _, v in curve(metrics))
    scores = {lr: (final if command.startswith("sdft") else area)(at(c, 0, 0)) for lr, c in tried.items()}
    print("  tuned on base 0: " + ", ".join(f"{lr} {s:.2f}" for lr, s in scores.items()))
    slack = 0.05 if command.startswith("sdft") else 0.0
    return tried[min((lr for lr in scores if scores[lr] >= max(scores.values()) - slack), key=float)]


def table(claim: str) -> str:
    columns: dict[str, Callable] = {"new skill": final, "prior": lambda m: final(m, "eval/prior-eval")}
    if claim.startswith("sdft"):
        columns["add"] = lambda m: final(m, "eval/add-eval")
    else:
        columns |= {f"attempts to {level}": lambda m, level=level: attempts_to(m, level) for level in (0.8, 0.9, 0.95)}
    columns["seconds"] = seconds
    lines = [f"### {claim}", "", f"| | lr | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for label, command in CLAIMS[claim].items():
        chosen = tune(command)
        runs = [at(chosen, *pair) for pair in (ONCE if claim.startswith("sdft") else TWICE)]
        values = [[measure(m) for m in runs] for measure in columns.values()]
        digits = lambda x: f"{x:.2f}" if abs(x) < 2 else f"{x:.0f}"
        cells = [f"{digits(statistics.mean(v))} ± {digits(statistics.stdev(v))}" for v in values]
        lines.append(f"| {label} | {re.search('--lr ([^ ]+)', chosen)[1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=f"some of {', '.join(CLAIMS)}; all when none is named")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    for claim in args.claims or CLAIMS:
        print("\n".join(CLAIMS[claim].values()) if args.list else table(claim), flush=True)


if __name__ == "__main__":
    main()
