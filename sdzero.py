"""SD-Zero: Self-Distillation Zero, phase 2 ("Self-Revision Turns Binary Rewards into Dense Supervision", arXiv:2604.12002v1).

    minimise   E_{y ~ student(.|x)}  sum_t  D( student(.|x, y_<t),  reviser(.|x, y, P_r, y_<t) )              Eq. 4

x question | y the student's own answer | P_r the phrase for its binary verdict r | reviser: the model after srt.py, frozen
The reviser reads the whole answer and whether it is right, then scores the same answer again, token by token.

Data   JSON lines with "prompt" and what the verifier wants, usually "answer".
Run    python srt.py && python sdzero.py                           # the laptop world: CPU, no download, minutes; both phases
       torchrun --nproc-per-node 8 sdzero.py --preset math --model runs/srt-math/last
       python sdzero.py --model toy:0/model --phrases qwen --out runs/sdzero-without-srt      # phase 2 alone
Differs from the paper: D is half forward and half reverse KL on the reviser's 64 likeliest tokens, as in the authors' code (Eq. 4
is the reverse KL: --divergence reverse_kl --support full). From the authors' code: the first copy of y stands without its EOS,
as in phase 1; an answer too long to be read twice is left out and counted, not cut; questions of phase 1 are not asked again.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common import (PHRASES, SOLVED, TRAIN_STREAM, Divergence, Head, InputError, Json, Reviser, RunArgs, Support, Teacher, again, batch_rows,
                    begin, check_divergence, competition_row, distill_loss, evaluate, evaluate_revision, explain, find, finish, grade, launch,
                    learning_rate, load_checkpoint, load_evals, load_model, load_rows, load_tokenizer, load_verifier, make_optimizer,
                    make_sampler, micro_batches, on_completions, optimizer_step, planned, question_key, save_checkpoint, start, tokenize,
                    without_eos)


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Where the other flags start from: toy, math, code. Any flag given beside it wins."""

    # The algorithm, in the paper's order and symbols.
    phrases: Literal["srt.json", "paper", "qwen", "olmo"] = "srt.json"
    """P_r: what srt.py wrote beside the weights of --model. Another name is for a model without it, which was not trained to revise."""
    questions: int = 0
    """N2: train on so many of the rows that srt.py did not use. 0 = on all of them."""
    divergence: Divergence = "mixed"
    """D per token. forward_kl = KL(teacher||student), reverse_kl = KL(student||teacher), jsd, mixed = both KLs."""
    beta: float = 0.5
    """jsd: weight of the teacher in the mixture and of its KL. mixed: weight of the forward KL. Unused by the plain KLs."""
    support: Support = "teacher_topk"
    """Tokens that D is summed over: the vocabulary, a top-k with a tail bucket, or the sampled token (policy gradient)."""
    topk: int = 64
    """K of a top-k support."""
    tail: bool = False
    """Top-k supports: one bucket holds the rest of the mass. --no-tail renormalises both sides on the K tokens."""
    average: Literal["sequence", "token"] = "token"
    """token: mean over all tokens of the step. sequence: mean over answers of the mean over tokens."""
    is_cap: float = 0.0
    """Importance ratio student/sampler per token, at most this. 0 = no ratio: every step is on-policy."""
    sync_every: int = 0
    """Self-evolution: the reviser becomes the student as it is, every so many steps. 0 = it stays frozen."""
    loss_temperature: float = 1.0
    """Divides the logits of both sides inside D. It is not the temperature of sampling."""

    # Model and data.
    model: str = ""
    """The folder that srt.py saved: the student begins there, and the reviser stays there."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank. 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others watch what is forgotten."""
    verifier: str = "exact"
    """Verdict r: exact, choice, tool_use, math, code (in a sandbox), or path.py:function(completion, row) -> reward."""
    student_chat_kwargs: Json = field(default_factory=dict)
    """Arguments of the chat template, as JSON; the same as in phase 1."""
    max_prompt_tokens: int = 2048
    """Longest prompt x. A longer one stops the run, or is left out with --drop-long; nothing is ever cut."""
    max_teacher_tokens: int = 32768
    """Longest x + y + P_r + y. A longer answer carries no loss and is counted."""
    drop_long: bool = False
    """Leave rows with too long prompts out, and say how many."""

    # Generation.
    prompts_per_step: int = 128
    """Questions of one step, over all processes."""
    rollouts: int = 1
    """Answers per question."""
    max_completion_tokens: int = 16384
    """Longest answer, in training and evaluation."""
    temperature: float = 0.7
    """Of sampling answers to learn from. 0 = greedy."""
    top_p: float = 1.0
    """Nucleus of sampling; below 1 it needs --is-cap 0."""
    top_k: int = 0
    """Sampling from the k likeliest tokens only; 0 = all. Otherwise it needs --is-cap 0."""
    cut_off: Literal["auto", "keep", "drop"] = "auto"
    """Answers cut off at the limit: keep them (authors' code), drop them, or auto = keep, but stop if step 1 has no other."""

    # Optimisation.
    epochs: float = 1.0
    """Passes over the data; steps = ceil(epochs * rows / questions per step)."""
    steps: int = 0
    """Optimiser steps; above 0 it replaces --epochs."""
    lr: float = 5e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "constant"
    """After warm-up: cosine to zero, or constant."""
    warmup: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Of AdamW."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""

    # Evaluation.
    eval_every: int = 20
    """Steps between evaluations; one before the first step and one after the last are always made."""
    eval_samples: int = 8
    """Answers per evaluation prompt: avg@n and pass@n."""
    eval_revisions: bool = True
    """At every evaluation also generate, then revise: revise/first, revised, wrong_to_right, right_to_right and lengths."""
    eval_temperature: float = 0.7
    """Of evaluation; 0 = greedy."""
    eval_top_p: float = 1.0
    """Nucleus of evaluation."""
    localise: bool = False
    """Draw localisation.png: the divergence of each token of one wrong and one right answer of the first step (figure 4)."""


@dataclass
class Args(RunArgs, PaperArgs):
    """The paper's flags, then those of every script: the machine and the run."""


# Appendix C, tables 3-6: lr, K, one answer, one epoch, temperature, 16K tokens. It prints no batch size, warm-up, schedule, weight decay
# or evaluation temperature: 128, 20 steps, constant, .01 are the authors' code's; evaluation samples as training does.
PRESETS: dict[str, dict] = {
    # Chosen on seed 0 of the laptop world.
    "toy": dict(model="runs/srt-toy/last", data="toy:0/add-train.jsonl", eval_data=("toy:0/add-eval.jsonl", "toy:0/prior-eval.jsonl"),
                verifier="toy:last", support="full", max_prompt_tokens=64, max_teacher_tokens=256, max_completion_tokens=40, temperature=1.0,
                engine_cache_gib=0.25, prompts_per_step=64, steps=40, lr=2e-4, warmup=5, weight_decay=0.0, adam_betas=(0.9, 0.95),
                tokens_per_batch=8192, eval_every=5, eval_samples=1, eval_temperature=1.0, seed=0),
    # The 15K problems of phase 1 without those that it used; in the code DeepScaleR (--data agentica-org/DeepScaleR-Preview-Dataset).
    "math": dict(model="runs/srt-math/last", data="open-r1/OpenR1-Math-220k:default@train", verifier="math", questions=9000),
    "code": dict(model="runs/srt-code/last", data="open-r1/codeforces-cots:solutions_py@train", verifier="code", questions=9000),
}


class Sample(NamedTuple):
    prompt: list[int]                                        # x: what the student reads
    context: list[int]                                       # x, y, P_r: what the reviser reads
    y: list[int]                                             # what both score; the reviser's second copy
    logps: list[float]                                       # of y under the sampler
    solved: bool                                             # the verdict r


def read_reviser(args: Args) -> Reviser:
    """What srt.py wrote beside the model; refused when it is not there, for then nobody has learnt to revise."""
    file = Path(find(args.model)) / "srt.json"
    if args.phrases != "srt.json":
        return Reviser(*PHRASES[args.phrases], "\n\n", args.student_chat_kwargs, [])
    if not file.is_file():
        raise InputError(f"--model {args.model}: no srt.json there, so it was not trained to revise itself; run srt.py first and give its last/ or "
                         "best/ folder, or skip phase 1 with --phrases paper")
    saved = json.loads(file.read_text())
    reviser = Reviser(**{name: saved[name] for name in Reviser._fields})
    if reviser.chat_kwargs != args.student_chat_kwargs:
        raise InputError(f"--student-chat-kwargs {json.dumps(args.student_chat_kwargs)}: {file} was trained with {json.dumps(reviser.chat_kwargs)}; "
                         "give the same")
    return reviser


def fresh_questions(rows: list[dict], reviser: Reviser, args: Args) -> list[dict]:
    """The questions that phase 1 did not use."""
    used = set(reviser.questions)
    left = [row for row in rows if question_key(row["prompt"]) not in used]
    if not left:
        raise InputError(f"{args.data}: all {len(rows)} questions belong to phase 1; give more data, or collect with fewer --questions in srt.py")
    return left


def sdzero_loss(h_ND: Tensor, head: Head, targets: list, micro: list[Sample], weight_N: Tensor, args: Args) -> tuple[Tensor, dict]:
    """Eq. 4 on a micro-batch: the weighted sum of D(student, reviser) over the tokens of y."""
    y_N = torch.tensor([token for s in micro for token in s.y], device=h_ND.device)
    behaviour_N = torch.tensor([p for s in micro for p in s.logps], device=h_ND.device) if args.is_cap else None
    return distill_loss(h_ND, head, targets, y_N, weight_N, divergence=args.divergence, beta=args.beta, support=args.support, topk=args.topk,
                        tail=args.tail, temperature=args.loss_temperature, behaviour_logp_N=behaviour_N, is_cap=args.is_cap)


def main(args: Args) -> None:
    # Whatever can be wrong without weights is found first.
    if not args.model:
        raise InputError("no --model given; it takes the folder that srt.py saved, such as runs/srt-math/last")
    reviser = read_reviser(args)
    tokenizer = load_tokenizer(args.model)
    check_divergence(args, len(tokenizer))
    rows = load_rows(args.data, competition_row)
    train = tokenize(fresh_questions(rows, reviser, args), tokenizer, args)[:args.questions or None]
    evals = load_evals(args.eval_data, competition_row, tokenizer, args)
    verify = load_verifier(args.verifier)
    steps = args.steps or math.ceil(args.epochs * len(train) / args.prompts_per_step)
    run = start(args)
    run.say(f"sdzero: {len(train)} of {len(rows)} rows ({len(reviser.questions)} questions belong to phase 1), {steps} steps of "
            f"{args.prompts_per_step} questions x {args.rollouts} on {run.world} x {run.device.type}")
    if args.dry_run:
        prompt = train[0]["prompt_ids"]
        return run.say(f"student reads: {tokenizer.decode(prompt)}\nteacher reads, after an empty wrong answer: "
                       f"{tokenizer.decode(prompt + reviser.phrase_ids(tokenizer, False))}\n{planned(run, 'base')}")

    student = load_model(args.model, run, args.lora_rank, args.activation_checkpointing)
    teacher = Teacher("ema", 1.0, student, run)              # a copy of the student; each update makes it the student again
    run.files["srt.json"] = json.dumps(reviser._asdict(), indent=1)
    sampler = make_sampler(tokenizer, student, run)
    optimizer = make_optimizer(student, args)
    done, score = load_checkpoint(run, student, teacher, optimizer)
    run.rescue = lambda: save_checkpoint(run, run.done, student, teacher, optimizer, score)
    begin(run, steps, done)
    measure = lambda step: {**evaluate(run, student, tokenizer, sampler, evals, verify, step, score), **(evaluate_revision(
        run, student, tokenizer, sampler, next(iter(evals.values())), verify, reviser) if evals and args.eval_revisions else {})}
    if not done:
        run.log(0, measure(0))

    for step in range(done + 1, steps + 1):
        rows = batch_rows(train, step, args.prompts_per_step, run, args.seed)

        # 1. Answer: y ~ student(.|x), from the weights about to be updated.
        with run.timer("generate"):
            groups = sampler(student, [row["prompt_ids"] for row in rows], [row["id"] for row in rows], args.rollouts, (TRAIN_STREAM, step),
                             temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
        answers = [(row, y) for row, group in zip(rows, groups, strict=True) for y in group]

        # 2. Verdict: r, right or wrong, and with it the phrase P_r.
        with run.timer("verify"):
            graded = grade(run, verify, [(tokenizer.decode(y.ids, skip_special_tokens=True), row) for row, y in answers])
            solved = [reward >= SOLVED for reward, _ in graded]

        # 3. Show the reviser the answer and its verdict: x, y without its EOS, P_r. Right and wrong answers teach alike.
        samples, long = [], 0
        for (row, y), r in zip(answers, solved, strict=True):
            context = row["prompt_ids"] + without_eos(y) + reviser.phrase_ids(tokenizer, r)
            if len(context) + len(y.ids) > args.max_teacher_tokens:
                long += 1
            elif y.finished or args.cut_off != "drop":
                samples.append(Sample(row["prompt_ids"], context, y.ids, y.logps, r))

        # 4. Count the answers and tokens of all ranks before any backward: the only denominators of this step.
        n = run.sum(answers=len(answers), length=sum(len(y.ids) for _, y in answers), cut=sum(not y.finished for _, y in answers), long=long,
                    reward=sum(reward for reward, _ in graded), sequences=len(samples), tokens=sum(len(s.y) for s in samples))
        if step == 1 and n["cut"] == n["answers"] and args.cut_off != "keep":
            raise InputError(f"all {n['answers']:.0f} answers of step 1 were cut off at --max-completion-tokens {args.max_completion_tokens}; "
                             "raise it, or accept them with --cut-off keep")

        # 5. Distil: the reviser scores its second copy of y, the student its only one; only the student has a gradient.
        sums = dict.fromkeys(("loss", "divergence", "teacher_logp", "logp", "entropy", "mass_student", "mass_teacher", "ratio", "right", "right_n"), 0.0)
        scored = []
        for micro in micro_batches(samples, lambda s: len(s.context) + len(s.y), args.tokens_per_batch):
            with run.timer("teacher"):
                targets = teacher.targets([(s.context, s.y) for s in micro])
            with run.timer("student"):
                weight_N = torch.tensor([1 / (len(s.y) * n["sequences"]) if args.average == "sequence" else 1 / n["tokens"] for s in micro for _ in s.y],
                                        device=run.device)
                loss, stats = on_completions(student, [(s.prompt, s.y) for s in micro], args,
                                             lambda h_ND, head: sdzero_loss(h_ND, head, targets, micro, weight_N, args))
                loss.backward()
            sums["loss"] += loss.item()
            for name, values in stats.items():
                sums[name] += values.sum().item()
            run.compare(stats["logp"], weight_N, micro)
            right_N = torch.tensor([s.solved for s in micro for _ in s.y], device=run.device).bool()
            sums["right"] += stats["divergence"][right_N].sum().item()
            sums["right_n"] += right_N.sum().item()
            if step == 1:
                scored += zip(micro, stats["divergence"].split([len(s.y) for s in micro]))
                if 0 < len(scored) == len(micro):
                    explain(run, tokenizer, {"student reads": micro[0].prompt, "teacher reads": micro[0].context}, micro[0].y, stats)
        if step == 1 and args.localise and run.main:
            draw_localisation(run.out / "localisation.png", scored, tokenizer)

        # 6. Step. Gradients add up over ranks (4 has divided); the reviser stays, or now and then becomes the student.
        with run.timer("optim"):
            lr = learning_rate(step, steps, args)
            grad_norm = optimizer_step(optimizer, lr, run) if n["tokens"] else 0.0
            if args.sync_every and step % args.sync_every == 0:
                teacher.update()
        run.done = step                                      # the step that the weights have behind them

        # 7. Report what was optimised; evaluate; save.
        total, tokens = run.sum(**sums), max(n["tokens"], 1)
        metrics = {"train/loss": total["loss"], "train/grad_norm": grad_norm, "train/lr": lr, "train/tokens": n["length"],
                   "distill/tokens": n["tokens"], "distill/active_frac": n["sequences"] / n["answers"],
                   "distill/divergence": total["divergence"] / tokens, "distill/divergence_right": total["right"] / max(total["right_n"], 1),
                   "distill/divergence_wrong": (total["divergence"] - total["right"]) / max(tokens - total["right_n"], 1),
                   "distill/topk_mass_student": total["mass_student"] / tokens, "distill/topk_mass_teacher": total["mass_teacher"] / tokens,
                   "distill/is_ratio_mean": total["ratio"] / tokens, "rollout/reward": n["reward"] / n["answers"],
                   "rollout/entropy": total["entropy"] / tokens, "rollout/length": n["length"] / n["answers"], "rollout/cut_frac": n["cut"] / n["answers"],
                   "teacher/dropped_prompts": n["long"], "teacher/distance": teacher.distance()}
        if step % args.eval_every == 0 or step == steps:
            metrics |= measure(step)
        run.log(step, metrics)
        stop = run.stop_requested()
        if step % args.save_every == 0 or step == steps or stop:
            save_checkpoint(run, step, student, teacher, optimizer, score)
        if stop:
            return run.say(f"stopped after step {step}; go on with: {again()}")

    finish(run, student, tokenizer, score)


def draw_localisation(file: Path, scored: list[tuple[Sample, Tensor]], tokenizer: Any) -> None:
    """Figure 4: where the divergence sits in a wrong and in a right answer, and the mean share of it in the heaviest tenth of the tokens."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.5), squeeze=False, sharey=True)
    for axis, name, solved in zip(axes[:, 0], ("wrong", "right"), (False, True)):
        group = [(s, d) for s, d in scored if s.solved == solved and d.sum() > 0]
        shares = [(d.sort(descending=True).values[:math.ceil(len(d) / 10)].sum() / d.sum()).item() for _, d in group]
        if group:
            sample, divergence = group[0]
            axis.bar(range(len(divergence)), divergence.tolist())
            if len(divergence) <= 60:
                axis.set_xticks(range(len(divergence)), [repr(tokenizer.decode([token]))[1:-1] for token in sample.y], rotation=60, fontsize=7)
            axis.set_title(f"a {name} answer; over {len(group)} of them the heaviest tenth of the tokens has {sum(shares) / len(shares):.0%}", fontsize=9)
        axis.set_ylabel("divergence")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    launch(main, Args, PRESETS)
