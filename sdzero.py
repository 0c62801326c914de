"""SD-Zero: Self-Distillation Zero, phase 2 (arXiv:2604.12002v1).

    minimise   E_{y ~ student(.|x)}  sum_t  D( student(.|x, y_<t),  reviser(.|x, y, P_r, y_<t) )      Eq. 4

x question | y the student's answer | P_r the phrase for its verdict r | reviser: the frozen model of srt.py
The reviser reads the whole answer and whether it is right, then scores the same answer again, token by token.

Data   JSON lines with "prompt" and what the verifier reads; OpenR1-Math, DeepScaleR, codeforces-cots rows.
Run    python srt.py && python sdzero.py     # the laptop world, both phases: CPU, no download, minutes
       python srt.py --preset smol && python sdzero.py --preset smol    # a pretrained model of 135M
       torchrun --nproc-per-node 8 sdzero.py --preset math --model runs/srt-math/last
       python sdzero.py --model toy:0/model --phrases qwen --out runs/sdzero-without-srt    # phase 2 alone
Differs from the paper: D is half forward and half reverse KL on the reviser's 64 likeliest tokens, as in the
authors' code (Eq. 4 is the reverse KL: --divergence reverse_kl --support full). From the authors' code: the
first copy of y stands without its EOS, as in phase 1; an answer too long to be read twice is left out and
counted, not cut; questions of phase 1 are not asked again; the rate warms up from 1/20 of its peak, not 1/10;
both phases ask and revise in one prompt format, where theirs have three.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common import (
    PHRASES,
    SOLVED,
    TRAIN_STREAM,
    Divergence,
    InputError,
    Json,
    Objective,
    Reviser,
    RunArgs,
    Sampling,
    Support,
    Teacher,
    Totals,
    as_messages,
    completion_states,
    distill_loss,
    evaluate,
    explain,
    find_source,
    head_of,
    launch,
    learning_rate,
    load_model,
    load_rows,
    load_tokenizer,
    make_sampler,
    micro_batches,
    optimizer_step,
    question_key,
    revise,
    save_results,
    start_run,
    step_rows,
    tokenize,
)


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Named set of defaults: toy, smol, math, code. Explicit flags override it."""

    # The algorithm, in the paper's order and symbols.
    phrases: Literal["srt.json", "paper", "qwen", "olmo"] = "srt.json"
    """P_r: what srt.py wrote beside --model; another set is for a model that was not trained to revise."""
    questions: int = 0
    """N2: train on this many of the rows that srt.py did not use, drawn by --seed (paper: 9000); 0 is all."""
    divergence: Divergence = "mixed"
    """D a token: forward_kl = KL(teacher||student), reverse_kl = KL(student||teacher), jsd, mixed: both."""
    support: Support = "teacher_topk"
    """Tokens that D is summed over: the vocabulary, a renormalised top-k, or the sampled token."""
    topk: int = 64
    """K of a top-k support."""
    sync_every: int = 0
    """Steps between copies of the student into the reviser (the paper's self-evolution); 0 is none."""

    # Model and data.
    model: str = ""
    """The folder that srt.py saved; student and reviser both start from it."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank; 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others show what is forgotten."""
    verifier: str = "exact"
    """Verdict r: exact, choice, tool_use, math, code, or path.py:function(completion, row) -> reward."""
    chat_kwargs: Json = field(default_factory=dict)
    """Arguments of the chat template, as JSON; the same as in phase 1."""
    max_prompt_tokens: int = 2048
    """Longest prompt x; rows with longer ones are left out and counted."""
    max_teacher_tokens: int = 32768
    """Longest x + y + P_r + y; a longer answer carries no loss and is counted."""

    # Generation.
    prompts_per_step: int = 128
    """Questions per step, over all processes."""
    rollouts: int = 1
    """Answers per question."""
    max_completion_tokens: int = 16384
    """Longest answer."""
    eval_max_tokens: int = 0
    """Longest answer in evaluation (paper: 32K); 0 is --max-completion-tokens."""
    temperature: float = 0.7
    """Sampling temperature of the answers to learn from; 0 is greedy."""
    mask_truncated: bool = False
    """Leave out answers that were cut off at the limit; the authors' code keeps them."""

    # Optimisation.
    epochs: float = 1.0
    """Passes over the data; steps = ceil(epochs * rows / questions per step)."""
    steps: int = 0
    """Optimiser steps; above 0 it replaces --epochs."""
    lr: float = 5e-6
    """AdamW learning rate."""
    warmup: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""

    # Evaluation.
    eval_every: int = 20
    """Steps between evaluations; there is always one before the first step and one after the last."""
    eval_samples: int = 8
    """Answers per evaluation prompt, for avg@n and pass@n."""
    eval_temperature: float = 0.7
    """Sampling temperature of evaluation; 0 is greedy."""
    eval_top_p: float = 1.0
    """Nucleus of evaluation."""


@dataclass
class Args(RunArgs, PaperArgs):
    """The paper's flags, then those of every script."""


# Appendix C, tables 3-6: lr, K, one answer, one epoch, temperature, 16K tokens. It prints no batch size,
# warm-up, schedule, weight decay or evaluation temperature: 128, 20 steps, constant and 0.01 are those of the
# authors' code; evaluation samples as training does.
PRESETS: dict[str, dict] = {
    # Chosen on seed 0 of the laptop world.
    "toy": dict(
        model="runs/srt-toy/last",
        data="toy:0/add-train.jsonl",
        eval_data=("toy:0/add-eval.jsonl", "toy:0/prior-eval.jsonl"),
        verifier="toy:last",
        support="full",
        max_prompt_tokens=64,
        max_teacher_tokens=256,
        max_completion_tokens=40,
        temperature=1.0,
        engine_cache_gib=0.25,
        prompts_per_step=64,
        steps=40,
        lr=2e-4,
        warmup=5,
        weight_decay=0.0,
        adam_betas=(0.9, 0.95),
        tokens_per_batch=8192,
        eval_every=5,
        eval_samples=1,
        eval_temperature=1.0,
        seed=0,
    ),
    # Chosen on seed 0 of tests/smol.py.
    "smol": dict(
        model="runs/srt-smol/last",
        data="smol:quick-train.jsonl",
        eval_data=("smol:quick-eval.jsonl", "smol:prior-eval.jsonl"),
        verifier="smol:grade",
        max_prompt_tokens=128,
        max_teacher_tokens=256,
        max_completion_tokens=14,
        temperature=1.0,
        engine_cache_gib=0.5,
        prompts_per_step=32,
        steps=14,
        lr=3e-5,
        warmup=2,
        weight_decay=0.0,
        adam_betas=(0.9, 0.95),
        dtype="bfloat16",
        tokens_per_batch=1024,
        eval_every=7,
        eval_samples=1,
        eval_temperature=1.0,
        save_every=1000,
        seed=0,
    ),
    # The 15K problems of phase 1 without those that it used; the authors' code takes DeepScaleR
    # (--data agentica-org/DeepScaleR-Preview-Dataset). AIME 2024 chooses best/, as there; srt.py names the
    # paper's other evaluation sets.
    "math": dict(
        model="runs/srt-math/last",
        data="open-r1/OpenR1-Math-220k:default@train",
        eval_data=("HuggingFaceH4/aime_2024@train",),
        verifier="math",
        questions=9000,
        eval_max_tokens=32768,
    ),
    # As in srt.py, evaluation needs --eval-data with rows of "prompt" and "tests".
    "code": dict(
        model="runs/srt-code/last",
        data="open-r1/codeforces-cots:solutions_py@train",
        verifier="code",
        questions=9000,
        eval_max_tokens=32768,
    ),
}


class Sample(NamedTuple):
    prompt: list  # x: what the student reads
    context: list  # x, y, P_r: what the reviser reads
    y: list  # what both score: the reviser's second copy, the student's only one
    logps: list  # of y under the sampler
    solved: bool  # the verdict r


def competition_row(raw: dict) -> dict:
    """OpenR1-Math, DeepScaleR and codeforces-cots as the authors ask and judge them."""
    row = {**raw, "answer_from": "text", "block": "last"}
    system = "You are a helpful assistant that solves {} problems step by step."
    if "input_format" in raw:  # codeforces-cots
        row["system"] = system.format("coding")
        inputs, outputs = ([case[name] for case in raw["examples"]] for name in ("input", "output"))
        row["tests"] = {"inputs": inputs, "outputs": outputs, "testtype": "stdin"}
    elif "problem" in raw and "prompt" not in raw:
        task = "Please reason step by step, and put your final answer within \\boxed{}."
        row |= {"system": system.format("math"), "prompt": f"{raw['problem']}\n\n{task}"}
    row["prompt"] = as_messages(row["prompt"], row.get("system", ""))
    return row


def read_reviser(args: Args) -> Reviser:
    """What srt.py wrote beside the model; InputError if it is missing or contradicts the flags."""
    file, given = Path(find_source(args.model)) / "srt.json", PHRASES.get(args.phrases)
    if not file.is_file():
        if given:
            return Reviser(*given, args.chat_kwargs, [])
        raise InputError(
            f"--model {args.model}: no srt.json there, so it was not trained to revise itself; run srt.py "
            "first and use its last/ or best/ folder, or skip phase 1 with --phrases paper"
        )
    saved = json.loads(file.read_text(encoding="utf-8"))
    reviser = Reviser(**{name: saved[name] for name in Reviser._fields})
    if given and given != (reviser.right, reviser.wrong):
        trained = f"{reviser.right!r} and {reviser.wrong!r}"
        raise InputError(f"--phrases {args.phrases}: {file} was trained with {trained}; leave --phrases out")
    if reviser.chat_kwargs != args.chat_kwargs:
        ours, theirs = json.dumps(args.chat_kwargs), json.dumps(reviser.chat_kwargs)
        raise InputError(f"--chat-kwargs {ours}: {file} was trained with {theirs}; use the same")
    return reviser


def fresh_questions(rows: list, reviser: Reviser, args: Args) -> list:
    """The rows that phase 1 did not use."""
    used = set(reviser.questions)
    fresh = [row for row in rows if question_key(row["prompt"]) not in used]
    if not fresh:
        raise InputError(
            f"--data {args.data}: phase 1 used all {len(rows)} questions; use more data, or collect with "
            "fewer --questions in srt.py"
        )
    return fresh


def objective_of(args: Args) -> Objective:
    """D of the authors' code: a top-k support is renormalised, and both KLs weigh the same."""
    return Objective(args.divergence, args.support, args.topk, tail=False, beta=0.5)


def sdzero_loss(h_ND: Tensor, head: Any, targets: list, micro: list, n: dict, args: Args) -> tuple:
    """Eq. 4 on a micro-batch, as a mean over all tokens of the step: (loss, statistics, weights)."""
    y_N = torch.tensor([token for s in micro for token in s.y], dtype=torch.long, device=h_ND.device)
    weight_N = torch.full((len(y_N),), 1 / max(n["tokens"], 1), device=h_ND.device)
    loss, stats = distill_loss(h_ND, head, targets, y_N, weight_N, objective_of(args))
    return loss, stats, weight_N


def main(args: Args) -> None:
    # Find every error that needs no weights before loading any.
    if not args.model:
        raise InputError("--model is missing: the folder that srt.py saved, such as runs/srt-math/last")
    reviser = read_reviser(args)
    tokenizer = load_tokenizer(args.model)
    objective_of(args).check(len(tokenizer))
    rows = load_rows(args.data, competition_row)
    fresh = fresh_questions(rows, reviser, args)
    fitting = tokenize(fresh, tokenizer, args)
    train = fitting
    if 0 < args.questions < len(fitting):
        train = random.Random(args.seed).sample(fitting, args.questions)
    run = start_run(args, tokenizer, train, competition_row, graded=True)
    run.files["srt.json"] = json.dumps(reviser._asdict(), indent=1)
    steps = args.steps or math.ceil(args.epochs * len(train) / args.prompts_per_step)
    run.say(
        f"sdzero: {len(train)} of {len(rows)} rows ({len(rows) - len(fresh)} used in phase 1, "
        f"{len(fresh) - len(fitting)} too long, left out), {steps} steps of {args.prompts_per_step} "
        f"questions x {args.rollouts} on {run.world} x {run.device.type}"
    )
    if args.dry_run:
        prompt = train[0]["prompt_ids"]
        run.say(f"student reads: {tokenizer.decode(prompt)}")
        told = tokenizer.decode(prompt + reviser.phrase_ids(tokenizer, False))
        return run.say(f"teacher reads, after an empty wrong answer: {told}")

    student = load_model(args.model, run, args.lora_rank)
    teacher = Teacher("base", 0.0, student, run)
    sampler, sampling = make_sampler(run, student), Sampling(args.max_completion_tokens, args.temperature)
    eval_tokens = args.eval_max_tokens or args.max_completion_tokens
    eval_sampling = Sampling(eval_tokens, args.eval_temperature, args.eval_top_p)
    done = run.start_training(steps, student, teacher)
    if not done:
        measured = evaluate(run, sampler, student, 0, eval_sampling)
        run.log(0, measured | revise(run, sampler, student, eval_sampling, reviser))

    for step in range(done + 1, steps + 1):
        rows = run.share(step_rows(train, step, args.prompts_per_step, args.rollouts, args.seed))

        # 1. Answer: y ~ student(.|x), from the weights about to be updated.
        with run.timer("generate"):
            prompts, keys = [row["prompt_ids"] for row in rows], [row["rollout_key"] for row in rows]
            answers = sampler(student, prompts, keys, (TRAIN_STREAM, step), sampling)

        # 2. Verdict: r, right or wrong, and with it the phrase P_r.
        with run.timer("verify"):
            rewards = [reward for reward, _ in run.grade(rows, answers)]

        # 3. Show the reviser x, y without its EOS, and P_r. Right and wrong answers teach alike.
        solved = [reward >= SOLVED for reward in rewards]
        samples, too_long = [], 0
        for row, y, r in zip(rows, answers, solved, strict=True):
            context = row["prompt_ids"] + y.without_eos() + reviser.phrase_ids(tokenizer, r)
            if len(context) + len(y.ids) > args.max_teacher_tokens:
                too_long += 1
            elif y.finished or not args.mask_truncated:
                samples.append(Sample(row["prompt_ids"], context, y.ids, y.logps, r))

        # 4. Count the tokens of all ranks before any backward: the only denominator of this step.
        n = run.sum(
            answers=len(answers),
            sequences=len(samples),
            tokens=sum(len(s.y) for s in samples),
            too_long=too_long,
            reward=sum(rewards),
        )
        lr, totals = learning_rate(step, args), Totals()
        by_verdict = dict.fromkeys(("right", "right_tokens", "wrong", "wrong_tokens"), 0.0)

        # 5. Distil: the reviser scores its second copy of y; only the student has a gradient.
        for m, micro in enumerate(micro_batches(run, samples)):
            with run.timer("teacher"):
                targets = teacher.targets([(s.context, s.y) for s in micro])
            with run.timer("student"):
                h_ND = completion_states(student, [(s.prompt, s.y) for s in micro])
                loss, stats, weight_N = sdzero_loss(h_ND, head_of(student), targets, micro, n, args)
                loss.backward()
            drawn = [p for s in micro for p in s.logps]
            totals.add(loss, stats, weight_N, drawn if args.temperature == 1 else None)
            right = [s.solved for s in micro for _ in s.y]
            right_N = torch.tensor(right, dtype=torch.bool, device=run.device)
            for verdict, part_N in (("right", right_N), ("wrong", ~right_N)):
                by_verdict[verdict] += stats["divergence"][part_N].sum().item()
                by_verdict[f"{verdict}_tokens"] += part_N.sum().item()
            if step == 1 and m == 0 and micro:
                prompts = {"student reads": micro[0].prompt, "teacher reads": micro[0].context}
                explain(run, prompts, micro[0].y, stats)

        # 6. Step. Gradients are summed over ranks. Every --sync-every steps the reviser becomes the student.
        with run.timer("optim"):
            if n["tokens"]:
                totals.grad_norms.append(optimizer_step(run, lr))
            if args.sync_every and step % args.sync_every == 0:
                teacher.sync()

        # 7. Evaluate, report, save.
        metrics = {**totals.metrics(run, answers), "train/lr": lr}
        n |= run.sum(**by_verdict)
        for verdict in ("right", "wrong"):
            metrics[f"distill/divergence_{verdict}"] = n[verdict] / max(n[f"{verdict}_tokens"], 1)
        metrics["distill/active_frac"] = n["sequences"] / n["answers"]
        metrics["rollout/reward"] = n["reward"] / n["answers"]
        metrics["teacher/dropped_prompts"] = n["too_long"]
        metrics["teacher/distance"] = teacher.distance()
        if step % args.eval_every == 0 or step == steps:
            metrics |= evaluate(run, sampler, student, step, eval_sampling)
            metrics |= revise(run, sampler, student, eval_sampling, reviser)
        if run.end_step(step, metrics):
            return

    save_results(run, student)


if __name__ == "__main__":
    launch(main, Args, PRESETS)
