"""SDFT: Self-Distillation Fine-Tuning ("Self-Distillation Enables Continual Learning", arXiv:2601.19897v1).

    minimise   E_{y ~ student(.|x)}  1/|y|  sum_t  D( teacher(.|x, c, y_<t),  student(.|x, y_<t) )      Eq. 1

x prompt | c expert demonstration | y the student's own answer | teacher: EMA of the student, reads c too
The student learns, on its own answers, to speak as it would had it seen the demonstration. It never sees c.

Data   JSON lines with "prompt" (text or chat messages) and "privileged_context" (the demonstration), or a
       whole "teacher_prompt"; evaluation rows have "prompt" and "answer". ToolAlpaca, SciKnowEval and
       medical-o1 rows are mapped.
Run    python sdft.py                                  # the laptop world: CPU, no download, minutes
       python sdft.py --preset smol                    # a pretrained model of 135M, on the same CPU
       torchrun --nproc-per-node 8 sdft.py --preset tooluse --data FOLDER
       python sdft.py --method sft --lr 3e-4 --verifier toy:lenient --out runs/sft-toy    # the baseline
Template  Large models can use a demonstration quoted in the question (the paper's). Small ones need it as an
       earlier chat turn (TURNS): --template also takes a JSON list of chat messages.
Differs from the paper: D is the forward KL, which the authors say all published results used (Eq. 1 is
written with the reverse; --divergence reverse_kl). From the authors' code: weights and the EMA teacher are
fp32 (in bf16 an EMA of rate 0.01 hardly moves); an over-long prompt is left out, not cut; answers without a
loss token leave the denominator. As in the paper best/ is chosen by validation, on a tenth of the training
rows; medical holds out that tenth, not 1,000 questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common import (
    TRAIN_STREAM,
    Divergence,
    InputError,
    Json,
    Objective,
    Rollout,
    RunArgs,
    Sampling,
    Support,
    Teacher,
    Totals,
    as_messages,
    check_template,
    completion_states,
    distill_loss,
    evaluate,
    explain,
    head_of,
    launch,
    learning_rate,
    load_model,
    load_rows,
    load_tokenizer,
    make_sampler,
    micro_batches,
    most_uncertain,
    optimizer_step,
    save_results,
    start_run,
    step_rows,
    token_logps,
    tokenize,
    with_template,
)

# For models too small to use a demonstration quoted in the question: here it is an earlier assistant turn.
TURNS = """[
 {"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{demonstration}"},
 {"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{demonstration}"},
 {"role": "user", "content": "{prompt}"}]"""


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Named set of defaults: toy, smol, tooluse, science, medical, knowledge. Explicit flags override it."""

    # The algorithm, in the paper's order and symbols.
    method: Literal["sdft", "sft", "dft"] = "sdft"
    """sdft, or a baseline on demonstrations: sft = -log p(c), dft = -sg[p(c)] log p(c) (Wu et al. 2025)."""
    template: str = (
        "\n{prompt}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
        "Now answer with a response of your own, including the thinking process.\n"
    )
    """What the teacher reads in place of the last user message: text (section 3; wording of the authors'
    code), or chat messages as a JSON list."""
    generate_from: Literal["student", "teacher"] = "student"
    """What draws y. teacher is the off-policy ablation: y ~ teacher(.|x, c); needs --is-cap 0."""
    divergence: Divergence = "forward_kl"
    """D per token: forward_kl = KL(teacher||student), reverse_kl the other way, jsd, mixed = both KLs."""
    support: Support = "full"
    """Tokens that D is summed over: the vocabulary, a top-k with a tail bucket, or the sampled token."""
    topk: int = 100
    """K of a top-k support."""
    skip_tokens: int = 3
    """Leading tokens of y without loss, so that no "Based on the example" is learnt (section 5)."""
    entropy_quantile: float = 0.0
    """Train only on the share of tokens with the highest student entropy; 0 is all. Costs a forward pass."""
    is_cap: float = 2.0
    """Cap of the importance ratio student/sampler per token, averaged over y to one weight; 0: no ratio."""
    teacher: str = "ema"
    """What scores y given c: ema, base (the student at the start), live, or another model."""
    ema_rate: float = 0.01
    """alpha in teacher <- (1 - alpha) teacher + alpha student after every step (table 3: .01, .02, .05)."""

    # Model and data.
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """Folder or hub id of the student, a chat model."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank; 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others show what is forgotten."""
    verifier: str = "exact"
    """Grades evaluation: exact, choice, tool_use, math, code, or path.py:function(completion, row)."""
    chat_kwargs: Json = field(default_factory=dict)
    """Arguments of the chat template for both sides, as JSON: '{"enable_thinking": false}'."""
    max_prompt_tokens: int = 1024
    """Longest student prompt; rows with longer ones are left out and counted."""
    max_teacher_tokens: int = 4096
    """Longest teacher prompt, demonstration included; the same rule."""

    # Generation.
    prompts_per_step: int = 32
    """Prompts per step, over all processes (table 3: 16, 32 or 64)."""
    rollouts: int = 1
    """Answers per prompt. The paper saw negligible gain from more."""
    max_completion_tokens: int = 2048
    """Longest answer (table 3)."""
    eval_max_tokens: int = 0
    """Longest answer in evaluation (authors' code: 1024 for tool use); 0 is --max-completion-tokens."""
    mask_truncated: bool = False
    """Leave out answers that were cut off at the limit; the authors' code keeps them."""

    # Optimisation.
    epochs: float = 2.0
    """Passes over the data; steps = ceil(epochs * rows / prompts per step)."""
    steps: int = 0
    """Optimiser steps; above 0 it replaces --epochs."""
    lr: float = 1e-5
    """Peak AdamW learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: cosine to zero, or constant."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""

    # Evaluation.
    eval_every: int = 25
    """Steps between evaluations; there is always one before the first step and one after the last."""
    eval_samples: int = 1
    """Answers per evaluation prompt, for avg@n and pass@n."""
    eval_temperature: float = 0.0
    """Sampling temperature of evaluation; 0 is greedy (paper)."""
    eval_top_p: float = 1.0
    """Nucleus of evaluation (pass@k in the paper: 0.95 at temperature 1)."""


@dataclass
class Args(RunArgs, PaperArgs):
    """The paper's flags, then those of every script."""


# Appendix B, tables 3 and 4, print grids and not the values selected: lr {5e-6, 1e-5, 5e-5}, batch {16, 32,
# 64}, epochs {1, 2} (knowledge {1, 2, 4}), EMA {.01, .02, .05}. Args has 1e-5, because the 5e-5 of the
# authors' README makes up for updates that bf16 weights round away; 32, 2 epochs and .01 as in the authors'
# code; 10 warm-up steps and 2048 tokens as in table 3.
PRESETS: dict[str, dict] = {
    # Chosen on seed 0 of the laptop world. Its answers have five tokens, so none is skipped.
    "toy": dict(
        model="toy:0/model",
        data="toy:0/zig-train.jsonl",
        eval_data=("toy:0/zig-eval.jsonl", "toy:0/prior-eval.jsonl"),
        skip_tokens=0,
        max_prompt_tokens=64,
        max_teacher_tokens=128,
        max_completion_tokens=20,
        engine_cache_gib=0.25,
        steps=240,
        lr=5e-5,
        schedule="constant",
        warmup=5,
        adam_betas=(0.9, 0.95),
        tokens_per_batch=8192,
        eval_every=20,
        eval_temperature=1.0,
        seed=0,
    ),
    # Chosen on seed 0 of tests/smol.py.
    "smol": dict(
        model="smol:model",
        data="smol:house-train.jsonl",
        eval_data=("smol:house-eval.jsonl", "smol:prior-eval.jsonl"),
        verifier="smol:grade",
        template=TURNS,
        skip_tokens=0,
        max_prompt_tokens=128,
        max_teacher_tokens=256,
        max_completion_tokens=16,
        engine_cache_gib=0.5,
        prompts_per_step=16,
        steps=24,
        lr=5e-5,
        schedule="constant",
        warmup=2,
        adam_betas=(0.9, 0.95),
        dtype="bfloat16",
        tokens_per_batch=1024,
        eval_every=8,
        eval_temperature=1.0,
        save_every=1000,
        seed=0,
    ),
    # The folders are those of the authors' repository (save_to_disk). A tenth of the training rows validates.
    "tooluse": dict(
        data="data/tooluse_train#train",
        eval_data=("data/tooluse_train#test", "data/tooluse_eval"),
        verifier="tool_use",
        eval_max_tokens=1024,
    ),
    "science": dict(
        data="data/science_train#train",
        eval_data=("data/science_train#test", "data/science_eval"),
        verifier="choice",
    ),
    # Graded by a judge model in the paper: give --verifier your_judge.py:function and --eval-data, the same
    # set with #test for #train.
    "medical": dict(data="FreedomIntelligence/medical-o1-reasoning-SFT:en@train#train"),
    # Rows whose privileged_context is the article followed by the answer (best in appendix A.2); table 4:
    # 1024 tokens. 4 epochs is the top of the grid: facts need more passes than skills.
    "knowledge": dict(
        data="data/knowledge_train.jsonl", max_completion_tokens=1024, epochs=4.0, max_teacher_tokens=16384
    ),
}


class Sample(NamedTuple):
    prompt: list  # what the student reads
    context: list  # what the teacher reads
    y: list  # what both score
    logps: list  # of y under the sampler
    mask: list  # which tokens of y carry loss


SCIENCE_SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), \
and nothing else. Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""


def to_row(raw: dict) -> dict | None:
    """A data set's columns as ours: prompt, and what it has of privileged_context, teacher_prompt and answer.

    None: the paper leaves this row out.
    """
    row = dict(raw)
    if "golden_response" in raw:  # ToolAlpaca
        row |= {"privileged_context": "\n".join(raw["golden_response"]), "answer": raw["golden_answer"]}
    elif "output_text" in raw:  # the authors' science folder, where demonstrations are right
        letter = raw["output_text"].split("<answer>")[-1].split("</answer>")[0].strip()
        row |= {"prompt": raw["messages"], "privileged_context": raw["output_text"], "answer": letter}
    elif "Complex_CoT" in raw:  # medical-o1; both parts, because the template asks for the thinking
        row |= {"prompt": raw["Question"], "privileged_context": f"{raw['Complex_CoT']}\n\n{raw['Response']}"}
    elif "answerKey" in raw:  # SciKnowEval
        if raw["details"]["level"] != "L3" or raw["type"] not in ("mcq-4-choices", "mcq-2-choices"):
            return None
        options = zip(raw["choices"]["label"], raw["choices"]["text"], strict=True)
        question = raw["question"] + "\n\n" + "\n".join(f"{label}: {text}" for label, text in options)
        row |= {"system": SCIENCE_SYSTEM, "prompt": question, "answer": raw["answerKey"]}
    row["prompt"] = as_messages(row["prompt"], row.get("system", ""))
    return row


def to_training_row(raw: dict, args: Args) -> dict | None:
    """Ctx(x, c), section 3: the teacher reads the template in place of the last user message."""
    row = to_row(raw)
    if row and "teacher_prompt" in row:
        row["teacher_messages"] = as_messages(row["teacher_prompt"])
    elif row:
        demonstration = row["privileged_context"]
        if not isinstance(demonstration, str) or not demonstration.strip():
            raise ValueError("the privileged_context is empty or no text; the teacher needs a demonstration")
        row["teacher_messages"] = with_template(row["prompt"], args.template, demonstration=demonstration)
    if row and args.method != "sdft":
        row["expert_text"] = row["privileged_context"]
    return row


def sequence_ratio(logp_N: Tensor, logps_N: Tensor, mask_N: Tensor, lengths: list, cap: float) -> Tensor:
    """w_i = mean over loss tokens of min(student / sampler, cap): one weight per answer (authors' code)."""
    ratio_N = (logp_N - logps_N).exp().clamp(max=cap) * mask_N
    parts = zip(ratio_N.split(lengths), mask_N.split(lengths), strict=True)
    means = [(ratio.sum() / mask.sum().clamp(min=1)).expand(len(mask)) for ratio, mask in parts]
    return torch.cat(means) if means else ratio_N


def sdft_loss(h_ND: Tensor, head: Any, targets: list, micro: list, n: dict, args: Args) -> tuple:
    """Eq. 1 on a micro-batch: (loss, statistics, weights), each answer's tokens weighing 1 / (n_i B).

    The baselines learn the demonstration's own tokens instead.
    """
    y_N = torch.tensor([token for s in micro for token in s.y], dtype=torch.long, device=h_ND.device)
    each = [1 / (sum(s.mask) * n["sequences"]) for s in micro]
    weights = [m * share for s, share in zip(micro, each, strict=True) for m in s.mask]
    weight_N = torch.tensor(weights, device=h_ND.device)
    if args.method != "sdft":
        logp_N, entropy_N = token_logps(h_ND, head, y_N)
        scale_N = logp_N.detach().exp() if args.method == "dft" else torch.ones_like(weight_N)
        return -(weight_N * scale_N * logp_N).sum(), {"logp": logp_N.detach(), "entropy": entropy_N}, weight_N
    ratio_N = torch.ones_like(weight_N)
    if args.is_cap:
        logps_N = torch.tensor([p for s in micro for p in s.logps], device=h_ND.device)
        with torch.no_grad():
            logp_N, _ = token_logps(h_ND, head, y_N)
        mask_N, lengths = (weight_N > 0).float(), [len(s.y) for s in micro]
        ratio_N = sequence_ratio(logp_N, logps_N, mask_N, lengths, args.is_cap)
    objective = Objective(args.divergence, args.support, args.topk)
    loss, stats = distill_loss(h_ND, head, targets, y_N, weight_N * ratio_N, objective)
    return loss, {**stats, "ratio": ratio_N}, weight_N


def check(args: Args, vocabulary: int) -> None:
    """InputError for combinations of flags that cannot mean what they say."""
    Objective(args.divergence, args.support, args.topk).check(vocabulary)
    if args.is_cap and args.generate_from == "teacher":
        raise InputError(
            "--generate-from teacher: no ratio student/sampler has a meaning there; add --is-cap 0"
        )
    if args.support == "sampled" and args.generate_from == "teacher":
        raise InputError("--support sampled needs tokens that the student drew, not --generate-from teacher")
    check_template(args.template, "{prompt}", "{demonstration}")


def main(args: Args) -> None:
    # Find every error that needs no weights before loading any.
    tokenizer = load_tokenizer(args.model)
    check(args, len(tokenizer))
    rows = load_rows(args.data, partial(to_training_row, args=args))
    train = tokenize(rows, tokenizer, args)
    run = start_run(args, tokenizer, train, to_row)
    steps = args.steps or math.ceil(args.epochs * len(train) / args.prompts_per_step)
    run.say(
        f"{args.method}: {len(train)} rows ({len(rows) - len(train)} too long, left out), {steps} steps of "
        f"{args.prompts_per_step} prompts x {args.rollouts} on {run.world} x {run.device.type}"
    )
    if args.dry_run:
        run.say(f"student reads: {tokenizer.decode(train[0]['prompt_ids'])}")
        return run.say(f"teacher reads: {tokenizer.decode(train[0]['teacher_ids'])}")

    student = load_model(args.model, run, args.lora_rank)
    teacher = Teacher(args.teacher, args.ema_rate, student, run) if args.method == "sdft" else None
    sampler, sampling = make_sampler(run, student), Sampling(args.max_completion_tokens)
    eval_tokens = args.eval_max_tokens or args.max_completion_tokens
    eval_sampling = Sampling(eval_tokens, args.eval_temperature, args.eval_top_p)
    done = run.start_training(steps, student, teacher)
    if not done:
        run.log(0, evaluate(run, sampler, student, 0, eval_sampling))

    for step in range(done + 1, steps + 1):
        rows = run.share(step_rows(train, step, args.prompts_per_step, args.rollouts, args.seed))

        # 1. Answer: y ~ student(.|x), from the weights about to be updated. The baselines take c instead.
        with run.timer("generate"):
            if teacher:
                off_policy = args.generate_from == "teacher"
                model, column = (teacher.model, "teacher_ids") if off_policy else (student, "prompt_ids")
                prompts, keys = [row[column] for row in rows], [row["rollout_key"] for row in rows]
                answers = sampler(model, prompts, keys, (TRAIN_STREAM, step), sampling)
            else:
                words = [row["completion_ids"] for row in rows]
                answers = [Rollout(ids, [0.0] * len(ids), True) for ids in words]

        # 2. Show the teacher the demonstration: c is in its prompt. The first tokens of y carry no loss.
        skip = args.skip_tokens if teacher else 0
        samples = []
        for row, y in zip(rows, answers, strict=True):
            if len(y.ids) > skip and (y.finished or not args.mask_truncated):
                mask = [t >= skip for t in range(len(y.ids))]
                samples.append(Sample(row["prompt_ids"], row["teacher_ids"], y.ids, y.logps, mask))
        if args.entropy_quantile:
            samples = [s for s in most_uncertain(run, student, samples, args.entropy_quantile) if any(s.mask)]

        # 3. Count the answers of all ranks before any backward: the only denominator of this step.
        n = run.sum(answers=len(answers), sequences=len(samples))
        lr = learning_rate(step, args, steps if args.schedule == "cosine" else 0)
        totals = Totals()

        # 4. Distil: the teacher scores y with c, the student without c; only the student has a gradient.
        for m, micro in enumerate(micro_batches(run, samples)):
            with run.timer("teacher"):
                targets = teacher.targets([(s.context, s.y) for s in micro]) if teacher else []
            with run.timer("student"):
                h_ND = completion_states(student, [(s.prompt, s.y) for s in micro])
                loss, stats, weight_N = sdft_loss(h_ND, head_of(student), targets, micro, n, args)
                loss.backward()
            own = teacher and args.generate_from == "student"
            totals.add(loss, stats, weight_N, [p for s in micro for p in s.logps] if own else None)
            if step == 1 and m == 0 and micro:
                prompts = {"student reads": micro[0].prompt, "teacher reads": micro[0].context}
                explain(run, prompts, micro[0].y, stats)

        # 5. Step. Gradients are summed over ranks. teacher <- (1 - rate) teacher + rate student.
        with run.timer("optim"):
            if n["sequences"]:
                totals.grad_norms.append(optimizer_step(run, lr))
                if teacher and math.isfinite(totals.grad_norms[-1]):  # else no weight moved
                    teacher.update()

        # 6. Evaluate, report, save.
        metrics = {**totals.metrics(run, answers), "train/lr": lr}
        metrics["distill/active_frac"] = n["sequences"] / n["answers"]
        metrics["teacher/distance"] = teacher.distance() if teacher else 0.0
        if step % args.eval_every == 0 or step == steps:
            metrics |= evaluate(run, sampler, student, step, eval_sampling)
        if run.end_step(step, metrics):
            return

    save_results(run, student)


if __name__ == "__main__":
    launch(main, Args, PRESETS)
