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
    sets = {"new skill": "eval", "prior": "eval/prior-eval", "add": "eval/add-eval"}
    lines = [f"### {claim}", "", f"| | lr | {' | '.join(sets)} | seconds |", "|---|---|" + "---|" * (len(sets) + 1)]
    for label, command in CLAIMS[claim].items():
        chosen = tune(command)
        runs = [run(chosen.format(seed=s), folder(chosen.format(seed=s))) for s in SEEDS]
        cells = [f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for x in ([score(m, name) for m in runs] for name in sets.values())]
        seconds = statistics.mean(sum(v for row in m for k, v in row.items() if re.match("time/(generate|teacher|student|optim)", k)) for m in runs)
        lines.append(f"| {label} | {re.search('--lr ([^ ]+)', chosen)[1]} | {' | '.join(cells)} | {seconds:.0f} |")
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
