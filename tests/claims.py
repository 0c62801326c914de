"""What the laptop world, and a small pretrained model, can say about the papers' claims: runs the commands, prints the tables that the README quotes.

    python tests/claims.py sdft-vs-sft sdpo-vs-grpo         # all of them without a name: three to four hours of one core
    python tests/claims.py verdicts                         # claim by claim: shows or does not show
    python tests/claims.py --list                           # only the commands

Every line of a table is one command on base models 0, 1 and 2, for sdpo with two seeds each: mean and standard deviation. A
learning rate written {a|b|c} is tuned first, on base 0 and seed 0 only: the smallest one within .05 of the best (sdft: of the
final accuracy, others: of its mean over the run). The tables smol-* are of the pretrained model that tests/smol.py makes, seeds 1
to 3. [[command]] stands for the folder of another run. What a finished run measured
is kept in tests/claims.jsonl, and no run that is there is repeated: delete it to measure anew.
"""

import argparse
import functools
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
sys.path.insert(0, str(ROOT))
OUT, RECORD = ROOT / "runs" / "claims", ROOT / "tests" / "claims.jsonl"
ONCE = [dict(base=base, seed=base) for base in range(3)]     # base model and seed
TWICE = [*ONCE, *(dict(base=base, seed=base + 3) for base in range(3))]
SMOL = [dict(base=0, seed=seed) for seed in (1, 2, 3)]        # seed 0 chose the settings
HARDEST = [dict(at, question=question) for at in ONCE for question in range(1, 11)]


class Claim(NamedTuple):
    columns: list[str]                                       # of `measure`
    rows: dict[str, str]                                     # label -> command
    runs: list[dict] = ONCE


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
SEQUENTIAL = "generation, then revision (--loss sequential)"
ZERO = f"sdzero.py {ADD} --eval-every 4"
GRPO = (f"sdpo.py --model toy:{{base}}/model {ADD} --policy-weight 1 --verifier toy:last --prompts-per-step 8 --steps 40 --max-completion-tokens 40 "
        "--eval-every 4")
ZERO_LR = "--lr {1e-4|2e-4|4e-4}"

LOCK = ("distill.py --model toy:lock-{base}/student --teacher toy:lock-{base}/teacher --data toy:lock-{base}/lock-train.jsonl --seed {seed} --eval-data "
        "toy:lock-{base}/lock-eval.jsonl toy:lock-{base}/lock-prior.jsonl toy:lock-{base}/lock-train.jsonl --eval-every 8 --lr {1e-4|2e-4|4e-4|8e-4}")
CLEAN = (f"distill.py --model toy:{{base}}/model --teacher toy:clean-0/teacher {ADD} --verifier exact --steps 80 --eval-every 4 --max-completion-tokens 12 "
         "--lr {1e-4|2e-4|4e-4}")
ONE = CLEAN.replace("toy:{base}/add-train.jsonl", "{one}").replace("--steps 80", "--steps 20 --prompts-per-step 1 --rollouts 256")
# Test time: ten of the hard questions, sixteen attempts a step. The baseline's template has a blank line that this base never saw.
HARD = ("sdpo.py --preset ttt --model toy:{base}/model --data toy:{base}/mul-hard.jsonl --question {question} --seed {seed} --verifier toy:feedback_first "
        "--support full --chat-kwargs {{}} --max-prompt-tokens 64 --max-completion-tokens 12 "
        "--weight-decay 0 --adam-betas 0.9 0.95 --tokens-per-batch 8192 --steps 16 "
        "--template '{{prompt}}{{solution}}{{feedback}}\n\nCorrectly solve the original question.\n{{prompt}}'")
MULTI_TURN = f"{HARD} --search multi_turn --rollouts 1 --steps 256 --max-teacher-tokens 90"

# The pretrained model of tests/smol.py.
SMOL_SDFT, SMOL_SDPO, SMOL_SRT = (f"{script}.py --preset smol --seed {{seed}}" for script in ("sdft", "sdpo", "srt"))
SMOL_GRPO = f"{SMOL_SDPO} --policy-weight 1"
SMOL_DISTILL = "distill.py --preset smol --seed {seed} --eval-every 2"
SMOL_COLUMNS, SMOL_RL = ["start", "new skill", "prior"], "--lr {1e-5|3e-5|6e-5}"
SMOL_TEACHER = f"{SMOL_GRPO} --eval-every 2 --lr 3e-5"
TEXT = "{{prompt}}{{solution}}{{feedback}}\n\nCorrectly solve the original question."

CLAIMS: dict[str, Claim] = {
    "sdft-vs-sft": Claim(SDFT, {
        "SDFT": f"sdft.py {ZIG} {LR}",
        "SFT on the demonstrations": f"sdft.py {ZIG} {SFT_LR} --method sft",
        "DFT on the demonstrations": f"sdft.py {ZIG} {SFT_LR} --method dft",
        "SFT on own-style rewrites (control)": f"sdft.py {OWN} {LR} --method sft"}),
    "sdft-teachers": Claim(SDFT, {
        **{f"{teacher} teacher": f"sdft.py {ZIG} {LR} --teacher {teacher}" for teacher in TEACHERS[:3]},
        **{f"{teacher} teacher, faster": f"sdft.py {ZIG} --lr 5e-5 --teacher {teacher}" for teacher in ("ema", "live")}}),
    "sdft-divergences": Claim(SDFT, {d: f"sdft.py {ZIG} {LR} --divergence {d}" for d in ("forward_kl", "reverse_kl", "jsd")}),
    "sdft-data": Claim(SDFT, {
        "on-policy": f"sdft.py {ZIG} {LR}",
        "off-policy: the teacher answers": f"sdft.py {ZIG} {LR} --generate-from teacher --is-cap 0"}),
    "sdpo-vs-grpo": Claim(SDPO, {
        "SDPO, solution or feedback": f"sdpo.py {MUL} {RL}",
        "SDPO, solution only": f"sdpo.py {MUL} {RL} --hindsight solution",
        "SDPO, feedback on wrong attempts only": f"sdpo.py {MUL} {RL} --hindsight feedback",
        "SDPO, feedback on every attempt": f"sdpo.py {MUL} {RL} --hindsight feedback --verifier toy:feedback_all",
        "GRPO": f"sdpo.py {MUL} {RL} --policy-weight 1"}, TWICE),
    "sdpo-faster": Claim(SDPO, {
        "SDPO, solution or feedback": f"sdpo.py {MUL} --lr 6e-4",
        "SDPO, feedback on every attempt": f"sdpo.py {MUL} --lr 6e-4 --hindsight feedback --verifier toy:feedback_all",
        "GRPO": f"sdpo.py {MUL} --lr 6e-4 --policy-weight 1"}, TWICE),
    "sdpo-logits": Claim(SDPO, {
        "JSD, all logits": f"sdpo.py {MUL} {RL}",
        "JSD, student's top 10 and tail": f"sdpo.py {MUL} {RL} --support student_topk --topk 10",
        "reverse KL, all logits": f"sdpo.py {MUL} {RL} --divergence reverse_kl",
        "reverse KL, sampled token": f"sdpo.py {MUL} {RL} --divergence reverse_kl --support sampled"}, TWICE),
    "self-teacher": Claim(["teacher at first", "teacher at last", "start", "new skill"], {
        "SDPO, feedback up to the first wrong digit": f"sdpo.py {MUL.replace('--teacher-samples 0', '')} --verifier toy:feedback_first --hindsight feedback"}),
    "sdpo-teachers": Claim(SDPO, {
        **{f"{teacher} teacher": f"sdpo.py {MUL} {RL} --teacher {teacher}" for teacher in TEACHERS},
        **{f"{teacher} teacher, too fast": f"sdpo.py {MUL} --lr 1e-3 --teacher {teacher}" for teacher in TEACHERS}}, TWICE),
    "srt-losses": Claim(["new skill", "prior", "wrong to right, before", "wrong to right", "right to right", "seconds"], {
        SEQUENTIAL: SRT,
        "revision": f"{SRT} --loss revision",
        "generation": f"{SRT} --loss generation",
        "joint": f"{SRT} --loss joint",
        "joint, unfiltered": f"{SRT} --loss joint --keep all",
        "sequential, unfiltered": f"{SRT} --keep all",
        **{f"RFT, {n} attempts": f"{SRT} --method rft --questions {n}" for n in (512, 1024, 2048, 4096)}}),
    "sdzero-vs-grpo": Claim(["start", "new skill", "prior", *ATTEMPTS, "with phase 1 to .9", "with phase 1 to .95", "divergence, wrong",
                             "divergence, right", "seconds"], {
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
        "sampled-token policy gradient": f"{CLEAN} --objective policy_gradient",
        "one prompt, 20 x 256 answers": ONE}),
    "sdpo-test-time": Claim([*(f"discovery@{k}" for k in (8, 16, 32, 64, 128, 256)), "attempts"], {
        "SDPO": f"{HARD} --max-teacher-tokens 128 --lr 1e-4",
        "best of k": f"{HARD} --search best_of_k",
        "multi-turn": MULTI_TURN}, HARDEST),
    "smol-sdft-vs-sft": Claim([*SMOL_COLUMNS, "prior at .8", "own answers", "attempts to .8", "seconds"], {
        "SDFT": f"{SMOL_SDFT} --eval-every 4",
        "SFT on the demonstrations": f"{SMOL_SDFT} --eval-every 4 --method sft --lr {{3e-5|5e-5|1e-4}}"}, SMOL),
    "smol-sdft-teachers": Claim([*SMOL_COLUMNS, "attempts to .8", "own answers"], {
        "ema teacher": f"{SMOL_SDFT} --eval-every 4",
        **{f"{teacher} teacher": f"{SMOL_SDFT} --eval-every 4 --teacher {teacher}" for teacher in ("base", "live")}}, SMOL),
    "smol-sdpo-vs-grpo": Claim([*SMOL_COLUMNS, "attempts to .5", "teacher at first", "teacher at last", "seconds"], {
        "SDPO": f"{SMOL_SDPO} --eval-every 2 {SMOL_RL}",
        "SDPO, the paper's text template": f"{SMOL_SDPO} --eval-every 2 --lr 3e-5 --template '{TEXT}'",
        "SDPO, faster": f"{SMOL_SDPO} --eval-every 2 --lr 6e-5",
        "0.9 GRPO + 0.1 SDPO": f"{SMOL_SDPO} --eval-every 2 --policy-weight 0.9 {SMOL_RL}",
        "GRPO": SMOL_TEACHER,
        "GRPO, faster": f"{SMOL_GRPO} --eval-every 2 {SMOL_RL}"}, SMOL),
    "smol-srt-sdzero": Claim([*SMOL_COLUMNS, "wrong to right, before", "wrong to right", "divergence, wrong", "divergence, right", "rollouts", "seconds"], {
        "SRT": SMOL_SRT,
        "SRT, then SD-Zero": f"sdzero.py --preset smol --seed {{seed}} --model [[{SMOL_SRT}]]/last",
        "SD-Zero without SRT": "sdzero.py --preset smol --seed {seed} --model smol:model --phrases qwen",
        "RFT": f"{SMOL_SRT} --method rft --attempts 12"}, SMOL),
    "smol-distill-vs-grpo": Claim([*SMOL_COLUMNS, "attempts to .5", "attempts to .6", "seconds"], {
        "GRPO": SMOL_TEACHER,
        "GRPO, faster": f"{SMOL_GRPO} --eval-every 2 --lr 6e-5",
        "distilled from that model": f"{SMOL_DISTILL} --teacher [[{SMOL_TEACHER}]]/last",
        "distilled from its outputs": f"{SMOL_DISTILL} --lmbda 0 --outputs teacher --teacher [[{SMOL_TEACHER}]]/last"}, SMOL),
}


class Check(NamedTuple):
    """One claim of a paper: the mean of `more` is above that of `less`; each is a (table, row, column)."""

    claim: str
    source: str
    more: tuple[str, str, str]
    less: tuple[str, str, str]


def rows(claim: str, source: str, table: str, column: str, more: str, less: str) -> Check:
    return Check(claim, source, (table, more, column), (table, less, column))


def columns(claim: str, source: str, table: str, row: str, more: str, less: str) -> Check:
    return Check(claim, source, (table, row, more), (table, row, less))


FEWER = "attempts to .9"                                     # fewer are better: the loser has more
TOLD = "SDPO, feedback up to the first wrong digit"
CHECKS = [
    rows("SDFT learns the new skill better than SFT", "SDFT, tables 1 and 5", "sdft-vs-sft", "new skill", "SDFT", "SFT on the demonstrations"),
    rows("SDFT forgets less than SFT", "SDFT, tables 1 and 5", "sdft-vs-sft", "prior", "SDFT", "SFT on the demonstrations"),
    rows("learning on one's own answers beats learning on the teacher's", "SDFT", "sdft-data", "new skill", "on-policy", "off-policy: the teacher answers"),
    rows("an EMA teacher beats the live one", "SDFT, appendix A.3", "sdft-teachers", "new skill", "ema teacher", "live teacher"),
    rows("an EMA teacher beats the live one, faster", "SDFT, appendix A.3", "sdft-teachers", "new skill", "ema teacher, faster", "live teacher, faster"),
    rows("the forward KL beats the reverse", "SDFT, by tinker-cookbook", "sdft-divergences", "new skill", "forward_kl", "reverse_kl"),
    rows("GRPO needs more attempts than SDPO", "SDPO, table 3", "sdpo-vs-grpo", FEWER, "GRPO", "SDPO, solution or feedback"),
    rows("SDPO ends higher than GRPO", "SDPO, table 3", "sdpo-vs-grpo", "new skill", "SDPO, solution or feedback", "GRPO"),
    rows("solutions alone need more attempts than with feedback", "SDPO, table 6", "sdpo-vs-grpo", FEWER, "SDPO, solution only", "SDPO, solution or feedback"),
    rows("feedback alone needs more attempts than with solutions", "SDPO, table 6", "sdpo-vs-grpo", FEWER, "SDPO, feedback on wrong attempts only",
         "SDPO, solution or feedback"),
    rows("the sampled token needs more attempts than all logits", "SDPO, section 4", "sdpo-logits", FEWER, "reverse KL, sampled token", "reverse KL, all logits"),
    Check("GRPO needs more attempts than the sampled token", "SDPO, section 4",
          ("sdpo-vs-grpo", "GRPO", FEWER), ("sdpo-logits", "reverse KL, sampled token", FEWER)),
    columns("the self-teacher improves", "SDPO, section 4", "self-teacher", TOLD, "teacher at last", "teacher at first"),
    columns("the student overtakes the first teacher", "SDPO, section 4", "self-teacher", TOLD, "new skill", "teacher at first"),
    rows("an EMA teacher beats the live one, at a high rate", "SDPO, table 4", "sdpo-teachers", "new skill", "ema teacher, too fast", "live teacher, too fast"),
    rows("a trust region beats the EMA, at a high rate", "SDPO, table 4", "sdpo-teachers", "new skill", "trust_region teacher, too fast", "ema teacher, too fast"),
    rows("best-of-k needs more attempts than SDPO at test time", "SDPO, section 5", "sdpo-test-time", "attempts", "best of k", "SDPO"),
    rows("multi-turn needs more attempts than SDPO at test time", "SDPO, section 5", "sdpo-test-time", "attempts", "multi-turn", "SDPO"),
    rows("both losses revise better than the generation loss", "SD-Zero, ablation", "srt-losses", "wrong to right", "joint", "generation"),
    rows("both losses revise better than the revision loss", "SD-Zero, ablation", "srt-losses", "wrong to right", "joint", "revision"),
    rows("filtered revisions beat unfiltered ones", "SD-Zero, Countdown", "srt-losses", "wrong to right", SEQUENTIAL, "sequential, unfiltered"),
    columns("phase 2 improves on phase 1", "SD-Zero, table 1", "sdzero-vs-grpo", "SD-Zero", "new skill", "start"),
    rows("phase 2 needs phase 1", "SD-Zero, ablation", "sdzero-vs-grpo", "new skill", "SD-Zero", "phase 2 without SRT"),
    rows("a renewed reviser gains more", "SD-Zero, self-evolution", "sdzero-vs-grpo", "new skill", "re-synchronised every 20 steps", "SD-Zero"),
    rows("SD-Zero ends higher than GRPO", "SD-Zero, table 1", "sdzero-vs-grpo", "new skill", "SD-Zero", "GRPO"),
    Check("SD-Zero ends higher than RFT", "SD-Zero, table 1", ("sdzero-vs-grpo", "SD-Zero", "new skill"), ("srt-losses", "RFT, 4096 attempts", "new skill")),
    columns("the divergence sits on wrong answers", "SD-Zero, figure 4", "sdzero-vs-grpo", "SD-Zero", "divergence, wrong", "divergence, right"),
    *(rows(f"on-policy beats fixed outputs, {d}", "GKD, GSM8K", "distill-lock", "new skill", f"on-policy, {d}", f"off-policy, {d}")
      for d in ("jsd", "reverse_kl", "forward_kl")),
    rows("λ = 1 beats ½", "GKD, GSM8K", "distill-lock", "new skill", "on-policy, jsd", "half on-policy, jsd"),
    rows("λ = ½ beats 0", "GKD, GSM8K", "distill-lock", "new skill", "half on-policy, jsd", "off-policy, jsd"),
    rows("the sampled token needs more answers than all logits", "Thinking Machines", "distill-add", FEWER, "sampled-token policy gradient",
         "on-policy, reverse_kl"),
    rows("one prompt teaches as much as many", "Thinking Machines", "distill-add", "new skill", "one prompt, 20 x 256 answers", "on-policy, forward_kl"),
    # On the pretrained model of 135M; the source says how large the paper's was.
    rows("135M: SDFT learns the new skill better than SFT", "SDFT, 7B (at 3B SFT is better)", "smol-sdft-vs-sft", "new skill", "SDFT", "SFT on the demonstrations"),
    rows("135M: SDFT forgets less than SFT, where both reach .8", "SDFT, 7B", "smol-sdft-vs-sft", "prior at .8", "SDFT", "SFT on the demonstrations"),
    rows("135M: the base's own answers stay likelier with SDFT than with SFT", "SDFT, 7B", "smol-sdft-vs-sft", "own answers", "SDFT", "SFT on the demonstrations"),
    rows("135M: an EMA teacher beats the live one", "SDFT, appendix A.3, 7B", "smol-sdft-teachers", "new skill", "ema teacher", "live teacher"),
    rows("135M: SDPO ends higher than GRPO", "SDPO, table 3, 8B (at 1.5B GRPO is better)", "smol-sdpo-vs-grpo", "new skill", "SDPO", "GRPO"),
    rows("135M: GRPO needs more attempts than SDPO", "SDPO, table 3, 8B", "smol-sdpo-vs-grpo", "attempts to .5", "GRPO", "SDPO"),
    rows("135M: the mix with GRPO ends higher than SDPO", "SDPO, Eq. 3: helps weak models", "smol-sdpo-vs-grpo", "new skill", "0.9 GRPO + 0.1 SDPO", "SDPO"),
    rows("135M: the mix ends higher than GRPO", "SDPO, Eq. 3: helps weak models", "smol-sdpo-vs-grpo", "new skill", "0.9 GRPO + 0.1 SDPO", "GRPO"),
    columns("135M: the self-teacher improves", "SDPO, section 4, 8B", "smol-sdpo-vs-grpo", "SDPO", "teacher at last", "teacher at first"),
    rows("135M: phase 2 needs phase 1", "SD-Zero, ablation, 4B", "smol-srt-sdzero", "new skill", "SRT, then SD-Zero", "SD-Zero without SRT"),
    rows("135M: phase 2 improves on phase 1", "SD-Zero, 4B", "smol-srt-sdzero", "new skill", "SRT, then SD-Zero", "SRT"),
    rows("135M: SD-Zero ends higher than RFT", "SD-Zero, 4B", "smol-srt-sdzero", "new skill", "SRT, then SD-Zero", "RFT"),
    Check("135M: SD-Zero ends higher than GRPO", "SD-Zero, 4B", ("smol-srt-sdzero", "SRT, then SD-Zero", "new skill"), ("smol-sdpo-vs-grpo", "GRPO", "new skill")),
    columns("135M: the divergence sits on wrong answers", "SD-Zero, figure 4, 4B", "smol-srt-sdzero", "SRT, then SD-Zero", "divergence, wrong", "divergence, right"),
    rows("135M: GRPO needs more attempts than distillation from its model", "Thinking Machines, 8B", "smol-distill-vs-grpo", "attempts to .5", "GRPO",
         "distilled from that model"),
    rows("135M: on-policy beats the teacher's outputs", "GKD, 0.08B to 0.8B", "smol-distill-vs-grpo", "new skill", "distilled from that model",
         "distilled from its outputs"),
]
UNTESTED = {
    "text and answer beat text, which beats the answer alone (SDFT)": "there are no documents",
    "SDPO's answers are three times shorter; SRT lengthens, phase 2 shortens them": "a right answer has one length",
    "the gain grows with the model (SDPO)": "there is one model",
}


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
        shutil.rmtree(out, ignore_errors=True)               # of a run that was stopped
        done = subprocess.run([sys.executable, ROOT / script, *flags, "--out", str(out), "--save-every", "1000000"], cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        needed = script == "srt.py" or command.startswith("sdft.py --preset smol") or command in (SMOL_TEACHER.format(**place) for place in SMOL)
        for name in ["checkpoints", "best"] + ["last"] * (not needed):   # last/ is the model of sdzero, or the teacher of distill
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "done").write_text(command)
    return out


@functools.cache
def record() -> dict[str, dict]:
    return {row["command"]: row for row in map(json.loads, RECORD.read_text().splitlines())} if RECORD.exists() else {}


def at(command: str, **place: int) -> dict[str, float]:
    """What one command measured with its base and seed filled in: from the record, or from a run that is then recorded."""
    one = OUT / f"one-{place['base']}.jsonl"                 # a data set of one prompt
    command = command.format(**place, one=os.path.relpath(one, ROOT))
    if command not in record():
        OUT.mkdir(parents=True, exist_ok=True)
        one.write_text(json.dumps({"prompt": "add:4721+3855", "answer": "7576"}) + "\n")
        inner = re.findall(r"\[\[(.*?)\]\]", command)
        out, before = run(re.sub(r"\[\[(.*?)\]\]", lambda match: os.path.relpath(run(match[1]), ROOT), command)), [run(c) for c in inner]
        read = lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((out / "config.json").read_text())
        found = measure(Result(read(out), config["args"], read(before[0]) if before else []))
        if command.startswith("sdft.py --preset smol"):
            found["own answers"] = likelihood(out / "last")
        record()[command] = {"command": command, "commit": config["commit"], **{k: float(f"{v:.4g}") for k, v in found.items()}}
        with open(RECORD, "a") as file:
            file.write(json.dumps(record()[command]) + "\n")
    return record()[command]


def curve(result: Result, name: str = "eval") -> list[tuple[int, float]]:
    """(step, average) of every evaluation."""
    return [(row["step"], v) for row in result.metrics for k, v in row.items() if k.startswith(f"{name}/avg@")]


def attempts_to(points: list[tuple[int, float]], level: float, per_step: int) -> float:
    """Attempts until the evaluation first reaches `level`, on straight lines between evaluations; all of them when it never does."""
    for (step, low), (next_step, high) in zip(points, points[1:]):
        if low < level <= high:
            return per_step * (step + (level - low) / (high - low) * (next_step - step))
    return 0 if points[0][1] >= level else per_step * points[-1][0]


def at_level(points: list[tuple[int, float]], others: list[tuple[int, float]], level: float) -> list[float]:
    """What another curve is where this one first reaches `level`, on straight lines between evaluations; empty when it never does."""
    for (_, low), (_, high), (_, before), (_, after) in zip(points, points[1:], others, others[1:]):
        if low < level <= high:
            return [before + (level - low) / (high - low) * (after - before)]
    return []


def measure(result: Result) -> dict[str, float]:
    """Everything that a column of any table may show of a run."""
    first, last, per_step = result.metrics[0], result.metrics[-1], result.args["prompts_per_step"] * result.args.get("rollouts", 1)
    if "search/solved" in last:
        needed = last["search/attempts"] if last["search/solved"] else 257
        return {"lr": result.args["lr"], "attempts": min(needed, 256), **{f"discovery@{k}": needed <= k for k in (8, 16, 32, 64, 128, 256)}}
    points, phase_one = curve(result), sum(row.get("collect/rollouts", 0) for row in result.phase_one)
    values = [value for _, value in points]
    found = {"lr": result.args["lr"], "GiB": last["memory/peak_gib"], "start": values[0], "new skill": values[-1], "mean": statistics.mean(values),
             "tokens": sum(row.get("train/tokens", 0) for row in result.metrics),
             "seconds": sum(v for row in result.metrics + result.phase_one for k, v in row.items() if re.match("time/(generate|teacher|student|optim)$", k))}
    own = sum(row.get("collect/rollouts", 0) for row in result.metrics)
    found["rollouts"] = phase_one + (own or per_step * last["step"])
    found |= {"prior at .8": value for value in at_level(points, curve(result, "eval/prior-eval"), 0.8)}
    for level in (0.5, 0.6, 0.8, 0.9, 0.95):
        found[f"attempts to {level:g}".replace("0.", ".")] = attempts_to(points, level, per_step)
        found[f"with phase 1 to {level:g}".replace("0.", ".")] = phase_one + attempts_to(points, level, per_step)
    found |= {f"at {step * per_step}": value for step, value in points if step * per_step in (256, 512, 1024)}
    for column, name in (("prior", "prior-eval"), ("add", "add-eval"), ("training prompts", "lock-train"), ("lock's prior", "lock-prior")):
        found |= {column: value for _, value in curve(result, f"eval/{name}")[-1:]}
    for column, row, key in (("wrong to right, before", first, "revise/wrong_to_right"), ("wrong to right", last, "revise/wrong_to_right"),
                             ("right to right", last, "revise/right_to_right")):
        found |= {column: row[key]} if key in row else {}
    for column, key in (("divergence, wrong", "distill/divergence_wrong"), ("divergence, right", "distill/divergence_right")):
        found |= {column: statistics.mean(row[key] for row in result.metrics[1:])} if key in last else {}
    seen = [row["teacher/accuracy"] for row in result.metrics if "teacher/accuracy" in row]
    return found | ({"teacher at first": seen[0], "teacher at last": seen[-1]} if seen else {})


@functools.cache
def own_answers() -> tuple:
    """The run, and (prompt, answer) token ids: what the pretrained model itself answers the prior questions, greedily."""
    import common
    import sdft
    args = common.parse_args(sdft.Args, sdft.PRESETS, ["--preset", "smol"])
    run = common.Run(args, common.load_tokenizer(args.model))
    prompts = [row["prompt_ids"] for row in common.load_evals(args, sdft.to_row, run.tokenizer)["prior-eval"]]
    model = common.load_model(args.model, run)
    greedy = common.Sampling(args.max_completion_tokens, temperature=0)
    answers = common.Sampler(run, model)(model, prompts, [(i, 0) for i in range(len(prompts))], (0,), greedy)
    return run, [(prompt, y.ids) for prompt, y in zip(prompts, answers)]


def likelihood(folder: Path | str) -> float:
    """Mean log-prob of a token of those answers under the model of a folder: what it forgets, in nats."""
    import common
    import torch
    run, pairs = own_answers()
    model = common.load_model(str(folder), run)
    with torch.no_grad():
        logps, _ = common.token_logps(common.completion_states(model, pairs), common.head_of(model), torch.tensor([i for _, y in pairs for i in y]))
    return logps.mean().item()


def tune(command: str) -> str:
    """The command with its learning rate chosen on base 0, seed 0."""
    grid = re.search(r"{([^{}]*\|[^{}]*)}", command)
    if not grid:
        return command
    tried = {lr: command.replace(grid[0], lr) for lr in grid[1].split("|")}
    scores = {lr: at(c, **ONCE[0])["new skill" if command.startswith("sdft") else "mean"] for lr, c in tried.items()}
    print("  tuned on base 0: " + ", ".join(f"{lr} {s:.2f}" for lr, s in scores.items()), file=sys.stderr)
    return tried[min((lr for lr in scores if scores[lr] >= max(scores.values()) - 0.05), key=float)]


@functools.cache
def measured(table: str, row: str) -> list[dict[str, float]]:
    chosen = tune(CLAIMS[table].rows[row])
    return [at(chosen, **place) for place in CLAIMS[table].runs]


def cell(values: list[float]) -> str:
    """Mean and standard deviation; of yes and no the share of yes."""
    digits = lambda x: f"{x:.2f}" if abs(statistics.mean(values)) < 2 else f"{x:.0f}"
    spread = len({*values}) > 1 and not {*values} <= {0, 1}
    return digits(statistics.mean(values)) + (f" ± {digits(statistics.stdev(values))}" if spread else "")


def table(name: str) -> str:
    claim = CLAIMS[name]
    lines = [f"| | lr | {' | '.join(claim.columns)} |", "|---|---|" + "---|" * len(claim.columns)]
    for row in claim.rows:
        results = measured(name, row)
        cells = [cell([r[column] for r in results]) if column in results[0] else "" for column in claim.columns]
        lr = f"{results[0]['lr']:.1e}".replace(".0e", "e").replace("e-0", "e-")
        lines.append(f"| {row} | {lr} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdicts() -> str:
    """Runs with the same base and seed are paired; a claim shows when their mean difference is over two of its standard errors."""
    lines = ["| claim | source | measured | more | less | |", "|---|---|---|---|---|---|"]
    for check in CHECKS:
        more, less = ([r[column] for r in measured(name, row)] for name, row, column in (check.more, check.less))
        gaps = [a - b for a, b in zip(more, less)]
        mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
        word = "shows" if mean > 2 * error else "**the opposite shows**" if mean < -2 * error else "**does not show**"
        lines.append(f"| {check.claim} | {check.source} | {check.more[2]}, `{check.more[0]}` | {cell(more)} | {cell(less)} | {word} |")
    lines += [f"| {claim} | | | | | cannot be tested here: {why} |" for claim, why in UNTESTED.items()]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {**{name: functools.partial(table, name) for name in CLAIMS}, "verdicts": verdicts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=f"some of {', '.join(TABLES)}; all when none is named")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    for name in args.claims or TABLES:
        if not args.list:
            print(f"### {name}\n\n{TABLES[name]()}", flush=True)
        elif name in CLAIMS:
            print("\n".join(CLAIMS[name].rows.values()))


if __name__ == "__main__":
    main()
