"""SDFT: Self-Distillation Fine-Tuning ("Self-Distillation Enables Continual Learning", arXiv:2601.19897v1).

    minimise   E_{y ~ student(.|x)}  1/|y|  sum_t  D( teacher(.|x, c, y_<t),  student(.|x, y_<t) )            Eq. 1

x prompt | c expert demonstration | y the student's own answer | teacher: EMA of the student, reading c in a template
The student learns, on its own answers, to speak as it would had it seen the demonstration. It never sees c.

Data   JSON lines with "prompt" (text or chat messages) and "privileged_context" (the demonstration), or a whole
       "teacher_prompt"; evaluation rows have "prompt" and "answer". ToolAlpaca, SciKnowEval and medical-o1 rows are mapped.
Run    python sdft.py                                              # the laptop world: CPU, no download, minutes
       torchrun --nproc-per-node 8 sdft.py --preset tooluse --data FOLDER
       python sdft.py --method sft --lr 3e-4 --verifier toy:lenient --out runs/sft-toy    # the baseline; it takes over the foreign style
Differs from the paper: D is the forward KL, which the authors say all published results used (Eq. 1 is written with the
reverse; --divergence reverse_kl). From the authors' code: weights and the EMA teacher are fp32 (in bf16 an EMA of rate .01
hardly moves); an over-long prompt is an error, not cut; answers without a loss token leave the denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common import (TRAIN_STREAM, Divergence, Head, InputError, Json, Rollout, RunArgs, Support, Teacher, again, as_messages, batch_rows, begin,
                    chat_ids, check_divergence, distill_loss, evaluate, explain, fill, finish, fit, launch, learning_rate, load_checkpoint,
                    load_evals, load_model, load_rows, load_tokenizer, load_verifier, make_optimizer, make_sampler, micro_batches, most_uncertain,
                    on_completions, optimizer_step, planned, save_checkpoint, sciknoweval_row, start, token_loss, token_stats)


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Where the other flags start from: toy, tooluse, science, medical, knowledge. Any flag given beside it wins."""

    # The algorithm, in the paper's order and symbols.
    method: Literal["sdft", "sft", "dft"] = "sdft"
    """sdft; or the baselines on the demonstrations themselves: sft = -log p(c), dft = -sg[p(c)] log p(c) (Wu et al. 2025)."""
    template: str = ("\n{prompt}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
                     "Now answer with a response of your own, including the thinking process.\n")
    """What the teacher reads in place of the user's last message. Section 3; wording of the authors' code."""
    generate_from: Literal["student", "teacher"] = "student"
    """Who answers. teacher = the off-policy ablation: y ~ teacher(.|x, c), no importance ratio."""
    divergence: Divergence = "forward_kl"
    """D per token. forward_kl = KL(teacher||student), reverse_kl = KL(student||teacher), jsd, mixed = both KLs."""
    beta: float = 0.5
    """jsd: weight of the teacher in the mixture and of its KL. mixed: weight of the forward KL. Unused by the plain KLs."""
    support: Support = "full"
    """Tokens that D is summed over: the vocabulary, a top-k with a tail bucket, or the sampled token (policy gradient)."""
    topk: int = 100
    """K of a top-k support."""
    tail: bool = True
    """Top-k supports: one bucket holds the rest of the mass. --no-tail renormalises both sides on the K tokens."""
    skip_tokens: int = 3
    """Leading tokens of y without loss, or the student learns to open with "Based on the example" (section 5)."""
    entropy_quantile: float = 0.0
    """rho: only this share of the loss tokens, those where the student's entropy is highest, carries loss; costs a forward. 0 = all."""
    average: Literal["sequence", "token"] = "sequence"
    """sequence: every answer weighs the same, whatever its length (authors' code). token: every token does."""
    is_cap: float = 2.0
    """Importance ratio student/sampler per token, at most this, averaged over y into one weight. 0 = no ratio."""
    teacher: str = "ema"
    """Who scores y given c: ema, base (the student at the start), live (the student now), or a model's folder or hub id."""
    ema_rate: float = 0.01
    """alpha in teacher <- (1 - alpha) teacher + alpha student after every step. 0 freezes the teacher, 1 makes it live."""
    loss_temperature: float = 1.0
    """Divides the logits of both sides inside D. It is not the temperature of sampling."""

    # Model and data.
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """Folder or hub id of the student; a chat model."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank. 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others watch what is forgotten."""
    verifier: str = "exact"
    """Grades evaluation: exact, choice, tool_use, math, code (in a sandbox), or path.py:function(completion, row) -> reward."""
    student_chat_kwargs: Json = field(default_factory=dict)
    """Arguments of the chat template for the student's prompt, as JSON: '{"enable_thinking": false}'."""
    teacher_chat_kwargs: Json = field(default_factory=dict)
    """The same for the teacher's prompt."""
    max_prompt_tokens: int = 1024
    """Longest student prompt. A longer one stops the run, or is left out with --drop-long; nothing is ever cut."""
    max_teacher_tokens: int = 4096
    """Longest teacher prompt, demonstration included; the same rule."""
    drop_long: bool = False
    """Leave rows with too long prompts out, and say how many."""

    # Generation.
    prompts_per_step: int = 32
    """Prompts of one step, over all processes."""
    rollouts: int = 1
    """Answers per prompt. The paper saw negligible gain from more."""
    max_completion_tokens: int = 2048
    """Longest answer, in training and evaluation."""
    temperature: float = 1.0
    """Of sampling answers to learn from. 0 = greedy."""
    top_p: float = 1.0
    """Nucleus of sampling; below 1 it needs --is-cap 0."""
    top_k: int = 0
    """Sampling from the k likeliest tokens only; 0 = all. Otherwise it needs --is-cap 0."""
    cut_off: Literal["auto", "keep", "drop"] = "auto"
    """Answers cut off at the limit: keep them (authors' code), drop them, or auto = keep, but stop if step 1 has no other."""

    # Optimisation.
    epochs: float = 2.0
    """Passes over the data; steps = ceil(epochs * rows / prompts per step)."""
    steps: int = 0
    """Optimiser steps; above 0 it replaces --epochs."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: cosine to zero, or constant."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Of AdamW."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""

    # Evaluation.
    eval_every: int = 25
    """Steps between evaluations; one before the first step and one after the last are always made."""
    eval_samples: int = 1
    """Answers per evaluation prompt: avg@n and pass@n."""
    eval_temperature: float = 0.0
    """Of evaluation; 0 = greedy (paper)."""
    eval_top_p: float = 1.0
    """Nucleus of evaluation."""


@dataclass
class Args(RunArgs, PaperArgs):
    """The paper's flags, then those of every script: the machine and the run."""


# Appendix B, tables 3 and 4, print grids and not the values selected: lr {5e-6, 1e-5, 5e-5}, batch {16, 32, 64}, epochs {1, 2}
# (knowledge {1, 2, 4}), EMA {.01, .02, .05}. Args takes 1e-5, because the 5e-5 of the authors' README compensates for updates
# that bf16 weights round away; 32, 2 epochs and .01 as in the authors' code; 10 warm-up steps and 2048 tokens as in table 3.
PRESETS: dict[str, dict] = {
    # Chosen on seed 0 of the laptop world. Its answers have five tokens, so none is skipped.
    "toy": dict(model="toy:0/model", data="toy:0/zig-train.jsonl", eval_data=("toy:0/zig-eval.jsonl", "toy:0/prior-eval.jsonl"),
                skip_tokens=0, max_prompt_tokens=64, max_teacher_tokens=128, max_completion_tokens=20, engine_cache_gib=0.25, steps=240, lr=5e-5,
                schedule="constant", warmup=5, adam_betas=(0.9, 0.95), tokens_per_batch=8192, eval_every=20, eval_temperature=1.0, seed=0),
    # The folders are those of the authors' repository (save_to_disk).
    "tooluse": dict(data="data/tooluse_train", eval_data=("data/tooluse_eval",), verifier="tool_use"),
    "science": dict(data="data/science_train", eval_data=("data/science_eval",), verifier="choice"),
    # Graded by a judge model in the paper; give --eval-data and --verifier your_judge.py:function.
    "medical": dict(data="FreedomIntelligence/medical-o1-reasoning-SFT:en@train"),
    # Rows whose privileged_context is the article followed by the answer (best in appendix A.2); table 4: 1024 tokens.
    # 4 epochs is the top of the grid: facts need more passes than skills.
    "knowledge": dict(data="data/knowledge_train.jsonl", max_completion_tokens=1024, epochs=4.0, max_teacher_tokens=16384),
}


class Sample(NamedTuple):
    prompt: list[int]                                        # what the student reads
    context: list[int]                                       # what the teacher reads
    y: list[int]                                             # what both score
    logps: list[float]                                       # of y under the sampler
    mask: list[bool]                                         # which tokens of y carry loss


def to_row(raw: dict) -> dict | None:
    """One data set's columns as ours: prompt, and whichever of privileged_context, teacher_prompt and answer it has.

    None: the paper leaves this row out.
    """
    row = dict(raw)
    if "golden_response" in raw:                             # ToolAlpaca
        row |= {"privileged_context": "\n".join(raw["golden_response"]), "answer": raw["golden_answer"]}
    elif "output_text" in raw:                               # the authors' science folder
        row |= {"prompt": raw["messages"], "privileged_context": raw["output_text"]}
    elif "Complex_CoT" in raw:                               # medical-o1; both parts, because the template asks for the thinking
        row |= {"prompt": raw["Question"], "privileged_context": f"{raw['Complex_CoT']}\n\n{raw['Response']}"}
    elif "answerKey" in raw:
        if (ours := sciknoweval_row(raw)) is None:
            return None
        row |= ours
    row["prompt"] = as_messages(row["prompt"])
    return row


def to_training_row(raw: dict) -> dict | None:
    row = to_row(raw)
    if row and "teacher_prompt" not in row and not str(row["privileged_context"] or "").strip():
        raise ValueError("the privileged_context is empty; the teacher needs a demonstration")
    return row


def teacher_messages(row: dict, template: str) -> list[dict]:
    """Ctx(x, c), section 3: the template replaces the user's last message; a system message stays."""
    if "teacher_prompt" in row:
        return as_messages(row["teacher_prompt"])
    *before, last = row["prompt"]
    return [*before, {"role": "user", "content": fill(template, prompt=last["content"], demonstration=row["privileged_context"])}]


def tokenize(rows: list[dict], tokenizer: Any, args: Args) -> list[dict]:
    """Both sides' prompts as token ids, once; rows over a limit stop the run or, with --drop-long, are left out."""
    kept = []
    for row in rows:
        if args.method != "sdft" and "privileged_context" not in row:
            raise InputError(f"{row['where']}: no 'privileged_context' in this row; --method {args.method} learns its words")
        row["prompt_ids"] = chat_ids(tokenizer, row["prompt"], args.student_chat_kwargs)
        row["teacher_ids"] = chat_ids(tokenizer, teacher_messages(row, args.template), args.teacher_chat_kwargs)
        if (fit(row["prompt_ids"], args.max_prompt_tokens, "--max-prompt-tokens", row["where"], args.drop_long)
                and fit(row["teacher_ids"], args.max_teacher_tokens, "--max-teacher-tokens", row["where"], args.drop_long)):
            kept.append(row)
    if not kept:
        raise InputError(f"{args.data}: --drop-long left no row; raise --max-prompt-tokens or --max-teacher-tokens")
    return kept


def demonstrations(rows: list[dict], tokenizer: Any) -> list[list[Rollout]]:
    """The baselines' y: the expert's words and the EOS."""
    ids = [tokenizer(row["privileged_context"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    return [[Rollout(y, [0.0] * len(y), True)] for y in ids]


def token_weights(mask: list[bool], sequences: float, tokens: float, average: str) -> list[float]:
    """Each token's share of the step's loss: 1/(n_i B) or 1/(all tokens), n_i and all counted on the mask."""
    share = 1 / (sum(mask) * sequences) if average == "sequence" else 1 / tokens
    return [share * m for m in mask]


def sequence_ratio(h_ND: Tensor, head: Head, y_N: Tensor, micro: list[Sample], mask_N: Tensor, args: Args) -> Tensor:
    """w_i = mean over the loss tokens of min(student / sampler, cap): one weight per answer, as in the authors' code."""
    logp_N, _ = token_stats(h_ND.detach(), head, y_N, temperature=args.loss_temperature)
    behaviour_N = torch.tensor([p for s in micro for p in s.logps], device=y_N.device)
    ratio_N = (logp_N - behaviour_N).exp().clamp(max=args.is_cap) * mask_N
    lengths = [len(s.y) for s in micro]
    means = [r.sum() / m.sum().clamp(min=1) for r, m in zip(ratio_N.split(lengths), mask_N.split(lengths))]
    return torch.cat([ratio_N[:0], *(w.expand(n) for w, n in zip(means, lengths))])


def sdft_loss(h_ND: Tensor, head: Head, targets: list, micro: list[Sample], weight_N: Tensor, args: Args) -> tuple[Tensor, dict]:
    """Eq. 1 on a micro-batch: the weighted sum of D(teacher, student) over the tokens of y. Baselines: of -log p(c)."""
    y_N = torch.tensor([token for s in micro for token in s.y], device=h_ND.device)
    if args.method == "sft":
        return token_loss(h_ND, head, y_N, lambda logp, n: -weight_N[n] * logp)
    if args.method == "dft":
        return token_loss(h_ND, head, y_N, lambda logp, n: -weight_N[n] * logp.detach().exp() * logp)
    ratio_N = sequence_ratio(h_ND, head, y_N, micro, (weight_N > 0).float(), args) if args.is_cap else torch.ones_like(weight_N)
    loss, stats = distill_loss(h_ND, head, targets, y_N, weight_N * ratio_N, divergence=args.divergence, beta=args.beta, support=args.support,
                               topk=args.topk, tail=args.tail, temperature=args.loss_temperature)
    return loss, {**stats, "ratio": ratio_N}


def check(args: Args, vocabulary: int) -> None:
    """Combinations of flags that cannot mean what they say."""
    if args.method == "sdft":
        check_divergence(args, vocabulary)
    if args.is_cap and args.generate_from == "teacher":
        raise InputError("--generate-from teacher learns from the teacher's answers, where the ratio has no meaning; add --is-cap 0")
    if not 0 <= args.entropy_quantile <= 1:
        raise InputError(f"--entropy-quantile {args.entropy_quantile}: a share of the tokens in (0, 1], or 0 for all of them")
    if not 0 <= args.ema_rate <= 1:
        raise InputError(f"--ema-rate {args.ema_rate}: a rate in [0, 1], the student's share (not the decay)")


def main(args: Args) -> None:
    # Whatever can be wrong without weights is found first.
    tokenizer = load_tokenizer(args.model)
    check(args, len(tokenizer))
    rows = load_rows(args.data, to_training_row)
    train = tokenize(rows, tokenizer, args)
    evals = load_evals(args.eval_data, to_row, tokenizer, args)
    verify = load_verifier(args.verifier)
    skip = args.skip_tokens if args.method == "sdft" else 0
    steps = args.steps or math.ceil(args.epochs * len(train) / args.prompts_per_step)
    run = start(args)
    run.say(f"{args.method}: {len(train)} rows ({len(rows) - len(train)} too long, left out), {steps} steps of {args.prompts_per_step} prompts x "
            f"{args.rollouts} on {run.world} x {run.device.type}")
    if args.dry_run:
        row = train[0]
        return run.say(f"student reads: {tokenizer.decode(row['prompt_ids'])}\nteacher reads: {tokenizer.decode(row['teacher_ids'])}\n"
                       f"{planned(run, args.teacher if args.method == 'sdft' else '')}")

    student = load_model(args.model, run, args.lora_rank, args.activation_checkpointing)
    teacher = Teacher(args.teacher, args.ema_rate, student, run) if args.method == "sdft" else None
    sampler = make_sampler(tokenizer, student, run)
    optimizer = make_optimizer(student, args)
    done, score = load_checkpoint(run, student, teacher, optimizer)
    run.rescue = lambda: save_checkpoint(run, run.done, student, teacher, optimizer, score)
    begin(run, steps, done)
    if not done:
        run.log(0, evaluate(run, student, tokenizer, sampler, evals, verify, 0, score))

    for step in range(done + 1, steps + 1):
        rows = batch_rows(train, step, args.prompts_per_step, run, args.seed)

        # 1. Answer: y ~ student(.|x), from the weights about to be updated. The baselines take the demonstration instead.
        with run.timer("generate"):
            if args.method != "sdft":
                groups = demonstrations(rows, tokenizer)
            else:
                who, prompts = (student, "prompt_ids") if args.generate_from == "student" else (teacher.model, "teacher_ids")
                groups = sampler(who, [row[prompts] for row in rows], [row["id"] for row in rows], args.rollouts, (TRAIN_STREAM, step),
                                 temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
        answers = [(row, y) for row, group in zip(rows, groups, strict=True) for y in group]

        # 2. Show the teacher the demonstration: its context c stands where the student's prompt stood.
        samples = [Sample(row["prompt_ids"], row["teacher_ids"] if teacher else [], y.ids, y.logps, [t >= skip for t in range(len(y.ids))])
                   for row, y in answers if len(y.ids) > skip and (y.finished or args.cut_off != "drop")]

        if args.entropy_quantile:
            with run.timer("student"):
                masks = most_uncertain(run, student, [(s.prompt, s.y) for s in samples], [s.mask for s in samples], args.entropy_quantile)
            samples = [s._replace(mask=mask) for s, mask in zip(samples, masks) if any(mask)]

        # 3. Count the answers and loss tokens of all ranks before any backward: the only denominators of this step.
        n = run.sum(answers=len(answers), length=sum(len(y.ids) for _, y in answers), cut=sum(not y.finished for _, y in answers),
                    sequences=len(samples), tokens=sum(sum(s.mask) for s in samples))
        if step == 1 and n["cut"] == n["answers"] and args.cut_off != "keep":
            raise InputError(f"all {n['answers']:.0f} answers of step 1 were cut off at --max-completion-tokens {args.max_completion_tokens}; "
                             "raise it, or accept them with --cut-off keep")

        # 4. Distil: the same y scored with c by the teacher and without c by the student; only the student has a gradient.
        sums = dict.fromkeys(("loss", "divergence", "teacher_logp", "logp", "entropy", "mass_student", "mass_teacher", "ratio"), 0.0)
        for m, micro in enumerate(micro_batches(samples, lambda s: max(len(s.prompt), len(s.context)) + len(s.y), args.tokens_per_batch)):
            with run.timer("teacher"):
                targets = teacher.targets([(s.context, s.y) for s in micro]) if teacher else []
            with run.timer("student"):
                weight_N = torch.tensor([w for s in micro for w in token_weights(s.mask, n["sequences"], n["tokens"], args.average)],
                                        device=run.device)
                loss, stats = on_completions(student, [(s.prompt, s.y) for s in micro], args,
                                             lambda h_ND, head: sdft_loss(h_ND, head, targets, micro, weight_N, args))
                loss.backward()
            sums["loss"] += loss.item()
            for name, values in stats.items():
                sums[name] += values[weight_N > 0].sum().item()
            if teacher and args.generate_from == "student":
                run.compare(stats["logp"], weight_N, micro)
            if step == 1 and m == 0 and micro:
                explain(run, tokenizer, {"student reads": micro[0].prompt, "teacher reads": micro[0].context}, micro[0].y, stats)

        # 5. Step. Gradients add up over ranks (3 has divided); then teacher <- (1 - rate) teacher + rate student.
        with run.timer("optim"):
            lr = learning_rate(step, steps, args)
            grad_norm = optimizer_step(optimizer, lr, run) if n["tokens"] else 0.0
            if teacher:
                teacher.update()
        run.done = step                                      # the step that the weights have behind them

        # 6. Report what was optimised; evaluate; save.
        total, tokens = run.sum(**sums), max(n["tokens"], 1)
        metrics = {"train/loss": total["loss"], "train/grad_norm": grad_norm, "train/lr": lr, "train/tokens": n["length"],
                   "distill/tokens": n["tokens"], "distill/active_frac": n["sequences"] / n["answers"], "rollout/entropy": total["entropy"] / tokens,
                   "rollout/length": n["length"] / n["answers"], "rollout/cut_frac": n["cut"] / n["answers"]}
        if teacher:
            metrics |= {"distill/divergence": total["divergence"] / tokens, "distill/topk_mass_student": total["mass_student"] / tokens,
                        "distill/topk_mass_teacher": total["mass_teacher"] / tokens, "distill/is_ratio_mean": total["ratio"] / tokens,
                        "teacher/distance": teacher.distance()}
        if step % args.eval_every == 0 or step == steps:
            metrics |= evaluate(run, student, tokenizer, sampler, evals, verify, step, score)
        run.log(step, metrics)
        stop = run.stop_requested()
        if step % args.save_every == 0 or step == steps or stop:
            save_checkpoint(run, step, student, teacher, optimizer, score)
        if stop:
            return run.say(f"stopped after step {step}; go on with: {again()}")

    finish(run, student, tokenizer, score)


if __name__ == "__main__":
    launch(main, Args, PRESETS)
