"""What the laptop world can say about the papers' claims: runs the commands, prints the tables that the README quotes.

    python tests/claims.py sdft-vs-sft sdft-teachers        # all of them without a name
    python tests/claims.py --list                           # only the commands

Every line of a table is one command on base models 0, 1 and 2. A learning rate written {a|b|c} is tuned first, on seed 0
only: the smallest one whose new-skill accuracy is within .05 of the best. Finished runs under runs/claims are not repeated.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "runs" / "claims"
SEEDS = (0, 1, 2)

# `lenient` also reads the digits out of the demonstrations' style: a right answer in a foreign style counts.
BASE = ("--model toy:{seed}/model --eval-data toy:{seed}/zig-eval.jsonl toy:{seed}/prior-eval.jsonl toy:{seed}/add-eval.jsonl --seed {seed} "
        "--data toy:{seed}/zig-train.jsonl --eval-every 40 --verifier toy:lenient")
OWN = BASE.replace("zig-train", "zig-own-train")
LR, SFT_LR = "--lr {3e-5|5e-5|1e-4}", "--lr {3e-5|1e-4|3e-4|1e-3}"
MUL = ("--model toy:{seed}/model --data toy:{seed}/mul-train.jsonl --eval-data toy:{seed}/mul-eval.jsonl toy:{seed}/prior-eval.jsonl --seed {seed} "
       "--eval-every 5 --lr 3e-4")
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
        "SDPO, solution or feedback": f"sdpo.py {MUL}",
        "SDPO, solution only": f"sdpo.py {MUL} --feedback-when never",
        "SDPO, feedback on wrong attempts only": f"sdpo.py {MUL} --solution-from none",
        "SDPO, feedback on every attempt": f"sdpo.py {MUL} --solution-from none --feedback-on all",
        "GRPO": f"sdpo.py {MUL} --policy-weight 1",
    },
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


def score(metrics: list[dict], name: str = "eval") -> float:
    """The last evaluation's average."""
    return next(v for row in reversed(metrics) for k, v in row.items() if k.startswith(f"{name}/avg@"))


def rollouts_to(metrics: list[dict], level: float) -> float:
    """Attempts until the evaluation first reaches `level`; all of them when it never does."""
    first = next((row for row in metrics if row.get("eval/avg@1", 0) >= level), metrics[-1])
    return first["step"] * 32


def tune(command: str) -> str:
    """The command with its learning rate chosen on seed 0."""
    grid = re.search(r"{([^{}]*\|[^{}]*)}", command)
    if not grid:
        return command
    tried = {lr: command.replace(grid[0], lr) for lr in grid[1].split("|")}
    scores = {lr: score(run(c.format(seed=0), folder(c.format(seed=0)))) for lr, c in tried.items()}
    print("  tuned on seed 0: " + ", ".join(f"{lr} {s:.2f}" for lr, s in scores.items()))
    return tried[min((lr for lr in scores if scores[lr] >= max(scores.values()) - 0.05), key=float)]


def table(claim: str) -> str:
    columns = {"new skill": score, "prior": lambda m: score(m, "eval/prior-eval")}
    if claim.startswith("sdft"):
        columns["add"] = lambda m: score(m, "eval/add-eval")
    else:
        columns |= {f"attempts to {level}": lambda m, level=level: rollouts_to(m, level) for level in (0.8, 0.9, 0.95)}
    columns["seconds"] = lambda m: sum(v for row in m for k, v in row.items() if re.match("time/(generate|teacher|student|optim)", k))
    lines = [f"### {claim}", "", f"| | lr | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for label, command in CLAIMS[claim].items():
        chosen = tune(command)
        runs = [run(chosen.format(seed=s), folder(chosen.format(seed=s))) for s in SEEDS]
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
