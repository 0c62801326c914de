"""What the laptop world can say about the papers' claims: runs the commands, prints the tables that the README quotes.

    python tests/claims.py sdft-vs-sft sdpo-vs-grpo         # all of them without a name
    python tests/claims.py --list                           # only the commands

Every line of a table is one command on base models 0, 1 and 2, for sdpo with two seeds each: mean and standard deviation. A
learning rate written {a|b|c} is tuned first, on base 0 and seed 0 only: the smallest one within .05 of the best (sdft: of the
final accuracy, others: of its mean over the run). [[command]] stands for the folder of another run. Finished runs under
runs/claims are not repeated.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).parent.parent
OUT = ROOT / "runs" / "claims"
ONCE, TWICE = [(0, 0), (1, 1), (2, 2)], [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4), (2, 5)]        # (base model, seed)


class Claim(NamedTuple):
    columns: list[str]                                       # of MEASURES
    rows: dict[str, str]                                     # label -> command
    pairs: list[tuple[int, int]] = ONCE


# `lenient` also reads the digits out of the demonstrations' style: a right answer in a foreign style counts.
ZIG = ("--model toy:{base}/model --eval-data toy:{base}/zig-eval.jsonl toy:{base}/prior-eval.jsonl toy:{base}/add-eval.jsonl --seed {seed} "
       "--data toy:{base}/zig-train.jsonl --eval-every 40 --verifier toy:lenient")
OWN = ZIG.replace("zig-train", "zig-own-train")
LR, SFT_LR = "--lr {3e-5|5e-5|1e-4}", "--lr {3e-5|1e-4|3e-4|1e-3}"
SDFT = ["new skill", "prior", "add", "seconds"]

MUL = ("--model toy:{base}/model --data toy:{base}/mul-train.jsonl --eval-data toy:{base}/mul-eval.jsonl toy:{base}/prior-eval.jsonl --seed {seed} "
       "--eval-every 5 --teacher-samples 0")
RL = "--lr {1.5e-4|3e-4|6e-4}"
ATTEMPTS = ["attempts to .8", "attempts to .9", "attempts to .95"]
SDPO = ["new skill", "prior", *ATTEMPTS, "seconds"]
TEACHERS = ("ema", "base", "live", "trust_region")

ADD = "--data toy:{base}/add-train.jsonl --eval-data toy:{base}/add-eval.jsonl toy:{base}/prior-eval.jsonl --seed {seed}"
SRT = f"srt.py --model toy:{{base}}/model {ADD} --eval-every 1000"
ZERO = f"sdzero.py {ADD} --eval-every 4 --no-eval-revisions"
GRPO = (f"sdpo.py --model toy:{{base}}/model {ADD} --policy-weight 1 --verifier toy:last --prompts-per-step 8 --steps 40 --max-completion-tokens 40 "
        "--eval-every 4")
ZERO_LR = "--lr {1e-4|2e-4|4e-4}"

LOCK = ("distill.py --model toy:lock-{base}/student --teacher toy:lock-{base}/teacher --data toy:lock-{base}/lock-train.jsonl --seed {seed} --eval-data "
        "toy:lock-{base}/lock-eval.jsonl toy:lock-{base}/lock-prior.jsonl toy:lock-{base}/lock-train.jsonl --eval-every 8 --lr {1e-4|2e-4|4e-4|8e-4}")
CLEAN = (f"distill.py --model toy:{{base}}/model --teacher toy:clean-0/teacher {ADD} --verifier exact --steps 80 --eval-every 4 --max-completion-tokens 12 "
         "--lr {1e-4|2e-4|4e-4}")
ONE = CLEAN.replace("toy:{base}/add-train.jsonl", "{one}").replace("--steps 80", "--steps 20 --prompts-per-step 1 --rollouts 256")
CLAIMS: dict[str, Claim] = {
    "sdft-vs-sft": Claim(SDFT, {
        "SDFT": f"sdft.py {ZIG} {LR}",
        "SFT on the demonstrations": f"sdft.py {ZIG} {SFT_LR} --method sft",
        "DFT on the demonstrations": f"sdft.py {ZIG} {SFT_LR} --method dft",
        "SFT on own-style rewrites (control)": f"sdft.py {OWN} {LR} --method sft"}),
    "sdft-teachers": Claim(SDFT, {
        **{f"{teacher} teacher": f"sdft.py {ZIG} {LR} --teacher {teacher}" for teacher in TEACHERS[:3]},
        "live teacher at the others' rate": f"sdft.py {ZIG} --lr 5e-5 --teacher live"}),
    "sdft-divergences": Claim(SDFT, {d: f"sdft.py {ZIG} {LR} --divergence {d}" for d in ("forward_kl", "reverse_kl", "jsd")}),
    "sdft-data": Claim(SDFT, {
        "on-policy": f"sdft.py {ZIG} {LR}",
        "off-policy: the teacher answers": f"sdft.py {ZIG} {LR} --generate-from teacher --is-cap 0"}),
    "sdpo-vs-grpo": Claim(SDPO, {
        "SDPO, solution or feedback": f"sdpo.py {MUL} {RL}",
        "SDPO, solution only": f"sdpo.py {MUL} {RL} --feedback-when never",
        "SDPO, feedback on wrong attempts only": f"sdpo.py {MUL} {RL} --solution-from none",
        "SDPO, feedback on every attempt": f"sdpo.py {MUL} {RL} --solution-from none --feedback-on all",
        "GRPO": f"sdpo.py {MUL} {RL} --policy-weight 1"}, TWICE),
    "sdpo-faster": Claim(SDPO, {
        "SDPO, solution or feedback": f"sdpo.py {MUL} --lr 6e-4",
        "SDPO, feedback on every attempt": f"sdpo.py {MUL} --lr 6e-4 --solution-from none --feedback-on all",
        "GRPO": f"sdpo.py {MUL} --lr 6e-4 --policy-weight 1"}, TWICE),
    "sdpo-logits": Claim(SDPO, {
        "JSD, all logits": f"sdpo.py {MUL} {RL}",
        "JSD, student's top 10 and tail": f"sdpo.py {MUL} {RL} --support student_topk --topk 10",
        "reverse KL, all logits": f"sdpo.py {MUL} {RL} --divergence reverse_kl",
        "reverse KL, sampled token": f"sdpo.py {MUL} {RL} --divergence reverse_kl --support sampled"}, TWICE),
    "sdpo-teachers": Claim(SDPO, {
        **{f"{teacher} teacher": f"sdpo.py {MUL} {RL} --teacher {teacher}" for teacher in TEACHERS},
        **{f"{teacher} teacher, too fast": f"sdpo.py {MUL} --lr 1e-3 --teacher {teacher}" for teacher in TEACHERS}}, TWICE),
    "srt-losses": Claim(["new skill", "prior", "wrong to right, before", "wrong to right", "right to right", "length", "seconds"], {
        "generation, then revision (--loss sequential)": SRT,
        "revision": f"{SRT} --loss revision",
        "generation": f"{SRT} --loss generation",
        "joint": f"{SRT} --loss joint",
        "joint, unfiltered": f"{SRT} --loss joint --keep all",
        "sequential, unfiltered": f"{SRT} --keep all",
        **{f"RFT, {n} attempts": f"{SRT} --method rft --questions {n}" for n in (512, 1024, 2048, 4096)}}),
    "sdzero-vs-grpo": Claim(["start", "new skill", "prior", *ATTEMPTS, "with phase 1 to .9", "with phase 1 to .95", "seconds"], {
        "SD-Zero": f"{ZERO} {ZERO_LR} --model [[{SRT}]]/last",
        "reverse KL, all tokens (Eq. 4)": f"{ZERO} {ZERO_LR} --model [[{SRT}]]/last --divergence reverse_kl --support full",
        "phase 2 without SRT": f"{ZERO} {ZERO_LR} --model toy:{{base}}/model --phrases qwen",
        "after the revision loss alone": f"{ZERO} {ZERO_LR} --model [[{SRT} --loss revision]]/last",
        "after the joint loss": f"{ZERO} {ZERO_LR} --model [[{SRT} --loss joint]]/last",
        "after unfiltered revisions": f"{ZERO} {ZERO_LR} --model [[{SRT} --keep all]]/last",
        "re-synchronised every 10 steps": f"{ZERO} --lr 2e-4 --model [[{SRT}]]/last --sync-every 10",
        "re-synchronised every 20 steps": f"{ZERO} --lr 2e-4 --model [[{SRT}]]/last --sync-every 20",
        "GRPO": f"{GRPO} {ZERO_LR}"}),
    "distill-lock": Claim(["new skill", "at 256", "at 512", "at 1024", "tokens", "training prompts", "lock's prior"], {
        **{f"on-policy, {d}": f"{LOCK} --divergence {d}" for d in ("jsd", "reverse_kl", "forward_kl")},
        "half on-policy, jsd": f"{LOCK} --lmbda 0.5",
        **{f"off-policy, {d}": f"{LOCK} --lmbda 0 --divergence {d}" for d in ("jsd", "reverse_kl", "forward_kl")},
        "SFT": f"{LOCK} --lmbda 0 --objective sft"}),
    "distill-add": Claim(["start", "new skill", "prior", *ATTEMPTS], {
        **{f"on-policy, {d}": f"{CLEAN} --divergence {d}" for d in ("forward_kl", "reverse_kl", "jsd")},
        "off-policy (the teacher's outputs), forward_kl": f"{CLEAN} --divergence forward_kl --lmbda 0 --outputs teacher",
        "SFT on the teacher's outputs": f"{CLEAN} --objective sft --lmbda 0 --outputs teacher",
        "sampled-token policy gradient": f"{CLEAN} --objective policy_gradient --is-cap inf",
        "one prompt, 20 x 256 answers": ONE}),
}

# Test time: ten of the hard questions, sixteen attempts a step. The baseline's template has a blank line that this base never saw.
HARD = ("sdpo.py --preset ttt --model toy:{base}/model --data toy:{base}/mul-hard.jsonl --question {question} --seed {seed} --verifier toy:feedback_first "
        "--feedback-on all --support full --student-chat-kwargs {{}} --teacher-chat-kwargs {{}} --max-prompt-tokens 64 --max-completion-tokens 12 "
        "--weight-decay 0 --adam-betas 0.9 0.95 --tokens-per-batch 8192 --steps 16 "
        "--template '{{prompt}}{{solution}}{{feedback}}\n\nCorrectly solve the original question.\n{{prompt}}'")
SEARCHES = {"SDPO": f"{HARD} --max-teacher-tokens 128 --lr 1e-4", "best of k": f"{HARD} --search best_of_k",
            "multi-turn": f"{HARD} --search multi_turn --rollouts 1 --steps 256 --max-teacher-tokens 90 "
                          "--feedback-template 'The following is feedback from your unsuccessful earlier attempt:\n\n{{feedback}}'"}


class Result(NamedTuple):
    metrics: list[dict]
    args: dict
    phase_one: list[dict]                                    # metrics of the run that its model comes from


def run(command: str) -> Path:
    """The folder of a command's run, which is made when it is not there."""
    out = OUT / f"{command.split('.')[0]}-{hashlib.sha256(command.encode()).hexdigest()[:16]}"
    if not (out / "done").exists():
        script, *flags = shlex.split(command)
        print(f"  python {command}", flush=True)
        done = subprocess.run([sys.executable, ROOT / script, *flags, "--out", str(out), "--overwrite", "--save-every", "1000000"], cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        for name in ("checkpoints", "best", "last"):         # srt's last/ is the model of sdzero
            shutil.rmtree(out / name, ignore_errors=True) if script != "srt.py" or name != "last" else None
        (out / "done").write_text(command)
    return out


def at(command: str, base: int, seed: int, **more: int) -> Result:
    one = OUT / f"one-{base}.jsonl"                          # a data set of one prompt
    if "{one}" in command and not one.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        one.write_text(json.dumps({"prompt": "add:4721+3855", "answer": "7576"}) + "\n")
    command = command.format(base=base, seed=seed, one=os.path.relpath(one, ROOT), **more)
    earlier = [run(inner) for inner in re.findall(r"\[\[(.*?)\]\]", command)]
    out = run(re.sub(r"\[\[(.*?)\]\]", lambda match: os.path.relpath(run(match[1]), ROOT), command))
    read = lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Result(read(out), json.loads((out / "config.json").read_text())["args"], read(earlier[0]) if earlier else [])


def curve(result: Result, name: str = "eval") -> list[tuple[int, float]]:
    """(step, average) of every evaluation."""
    return [(row["step"], v) for row in result.metrics for k, v in row.items() if k.startswith(f"{name}/avg@")]


def final(result: Result, name: str = "eval") -> float:
    return curve(result, name)[-1][1]


def attempts_to(result: Result, level: float) -> float:
    """Attempts until the evaluation first reaches `level`, on straight lines between evaluations; all of them when it never does."""
    points, per_step = curve(result), result.args["prompts_per_step"] * result.args["rollouts"]
    for (step, low), (next_step, high) in zip(points, points[1:]):
        if low < level <= high:
            return per_step * (step + (level - low) / (high - low) * (next_step - step))
    return 0 if points[0][1] >= level else per_step * points[-1][0]


def before(result: Result) -> float:
    """Attempts that phase 1 took."""
    return sum(row.get("collect/rollouts", 0) for row in result.phase_one)


def sequences(result: Result, n: int) -> float:
    """Accuracy after n answers."""
    return dict(curve(result))[n // (result.args["prompts_per_step"] * result.args["rollouts"])]


MEASURES: dict[str, Callable[[Result], float]] = {
    "at 256": lambda r: sequences(r, 256), "at 512": lambda r: sequences(r, 512), "at 1024": lambda r: sequences(r, 1024),
    "tokens": lambda r: sum(row.get("train/tokens", 0) for row in r.metrics), "training prompts": lambda r: final(r, "eval/lock-train"),
    "lock's prior": lambda r: final(r, "eval/lock-prior"),
    "new skill": final, "prior": lambda r: final(r, "eval/prior-eval"), "add": lambda r: final(r, "eval/add-eval"), "start": lambda r: curve(r)[0][1],
    "attempts to .8": lambda r: attempts_to(r, 0.8), "attempts to .9": lambda r: attempts_to(r, 0.9), "attempts to .95": lambda r: attempts_to(r, 0.95),
    "with phase 1 to .9": lambda r: before(r) + attempts_to(r, 0.9), "with phase 1 to .95": lambda r: before(r) + attempts_to(r, 0.95),
    "wrong to right, before": lambda r: r.metrics[0].get("revise/wrong_to_right", float("nan")),
    "wrong to right": lambda r: r.metrics[-1].get("revise/wrong_to_right", float("nan")),
    "right to right": lambda r: r.metrics[-1].get("revise/right_to_right", float("nan")),
    "length": lambda r: r.metrics[-1]["eval/length"],
    "seconds": lambda r: sum(v for row in r.metrics + r.phase_one for k, v in row.items() if re.match("time/(generate|teacher|student|optim)$", k))}


def tune(command: str) -> str:
    """The command with its learning rate chosen on base 0, seed 0."""
    grid = re.search(r"{([^{}]*\|[^{}]*)}", command)
    if not grid:
        return command
    tried = {lr: command.replace(grid[0], lr) for lr in grid[1].split("|")}
    worth = final if command.startswith("sdft") else lambda result: statistics.mean(v for _, v in curve(result))
    scores = {lr: worth(at(c, 0, 0)) for lr, c in tried.items()}
    print("  tuned on base 0: " + ", ".join(f"{lr} {s:.2f}" for lr, s in scores.items()))
    return tried[min((lr for lr in scores if scores[lr] >= max(scores.values()) - 0.05), key=float)]


def cell(values: list[float]) -> str:
    digits = lambda x: f"{x:.2f}" if abs(x) < 2 else f"{x:.0f}"
    if any(map(math.isnan, values)):
        return ""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{digits(mean)} ± {digits(deviation) if abs(mean) < 2 else round(deviation)}"


def table(name: str) -> str:
    claim = CLAIMS[name]
    lines = [f"### {name}", "", f"| | lr | {' | '.join(claim.columns)} |", "|---|---|" + "---|" * len(claim.columns)]
    for label, command in claim.rows.items():
        chosen = tune(command)
        results = [at(chosen, *pair) for pair in claim.pairs]
        cells = [cell([MEASURES[column](result) for result in results]) for column in claim.columns]
        lines.append(f"| {label} | {results[0].args['lr']:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def search_table() -> str:
    """discovery@k: the share of (question, base) pairs that an attempt up to the k-th has solved."""
    ks = (8, 16, 32, 64, 128, 256)
    lines = ["### sdpo-test-time", "", f"| | {' | '.join(f'discovery@{k}' for k in ks)} | mean attempts, at most 256 |", "|---|" + "---|" * (len(ks) + 1)]
    for label, command in SEARCHES.items():
        last = [at(command, base, seed, question=question).metrics[-1] for base, seed in ONCE for question in range(1, 11)]
        needed = [row["search/attempts"] if row["search/solved"] else float("inf") for row in last]
        lines.append(f"| {label} | {' | '.join(f'{sum(n <= k for n in needed) / len(needed):.2f}' for k in ks)} | {statistics.mean(min(n, 256) for n in needed):.0f} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {**{name: (lambda name=name: table(name)) for name in CLAIMS}, "sdpo-test-time": search_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=f"some of {', '.join(TABLES)}; all when none is named")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    for name in args.claims or TABLES:
        print("\n".join((CLAIMS[name].rows if name in CLAIMS else SEARCHES).values()) if args.list else TABLES[name](), flush=True)


if __name__ == "__main__":
    main()
