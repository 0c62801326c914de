"""SDPO: Self-Distillation Policy Optimization ("Reinforcement Learning via Self-Distillation", arXiv:2601.20802v2).

    minimise   E_{y_i ~ student(.|x)}  1/|y_i|  sum_t  D( student(.|x, y_i,<t),  teacher(.|x, s_i, f_i, y_i,<t) )     Eq. 1

x question | y_1..y_G a group of attempts | s_i another attempt of the group that succeeded | f_i feedback on y_i
The teacher (an EMA of the student) reads in hindsight what the student did not know, and scores the student's own tokens.

Data   JSON lines with "prompt" and what the verifier wants, usually "answer"; "feedback" where it does not depend on the attempt.
Run    python sdpo.py                                              # the laptop world: CPU, no download, minutes
       torchrun --nproc-per-node 4 sdpo.py --preset sciknoweval --data FILE --eval-data FILE
       python sdpo.py --policy-weight 1 --out runs/grpo-toy        # the baseline, GRPO
       torchrun --nproc-per-node 4 sdpo.py --preset ttt --data FILE --question 7      # test time: one hard question, until it is solved
Differs from the paper: an attempt is never its own solution (authors' code; Table 2 allows it), and the average is the code's:
a mean over all sequences, those without a signal counting as zero (--average token: the paper's). From the code: an over-long
teacher prompt loses the end of the solution, not of the prompt; one ratio student/sampler stands for the code's two.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import (SOLVED, TEACHER_STREAM, TRAIN_STREAM, Divergence, Head, InputError, Json, Rollout, Run, RunArgs, Sampler, Support, Teacher,
                    again, as_messages, begin, chat_ids, check_divergence, distill_loss, evaluate, explain, fill, finish, grade, launch,
                    learning_rate, livecodebench_row, load_checkpoint, load_evals, load_model, load_rows, load_tokenizer, load_verifier,
                    make_optimizer, make_sampler, micro_batches, most_uncertain, on_completions, optimizer_step, planned, save_checkpoint,
                    sciknoweval_row, start, step_rows, token_loss, token_stats, tokenize)


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Where the other flags start from: toy, sciknoweval, tooluse, lcb, ttt. Any flag given beside it wins."""

    # The algorithm, in the paper's order and symbols.
    rollouts: int = 8
    """G, attempts per question. With 1 there are no others to learn from, only feedback."""
    solution_from: Literal["first", "random", "none"] = "first"
    """s_i: the first other success of the group, a random one (seeded), or none: feedback alone."""
    feedback_when: Literal["no_solution", "always", "never"] = "no_solution"
    """f_i joins the teacher's prompt only when there is no solution (authors' code), always, or never."""
    feedback_on: Literal["wrong", "all"] = "wrong"
    """Attempts that f_i is shown for: wrong ones, or also right ones where the verifier has a text for them."""
    remove_thinking: bool = True
    """Take <think>...</think> out of solutions."""
    template: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
    """What the teacher reads in place of the user's last message."""
    solution_template: str = "\nCorrect solution:\n\n{solution}"
    """{solution} of the template; empty without a solution."""
    feedback_template: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}"
    """{feedback} of the template; empty without feedback."""
    divergence: Divergence = "jsd"
    """D per token. forward_kl = KL(teacher||student), reverse_kl = KL(student||teacher), jsd, mixed = both KLs."""
    beta: float = 0.5
    """jsd: weight of the teacher in the mixture and of its KL. mixed: weight of the forward KL. Unused by the plain KLs."""
    support: Support = "student_topk"
    """Tokens that D is summed over: the vocabulary, a top-k with a tail bucket, or the sampled token (policy gradient)."""
    topk: int = 100
    """K of a top-k support."""
    tail: bool = True
    """Top-k supports: one bucket holds the rest of the mass. --no-tail renormalises both sides on the K tokens."""
    advantage_clip: float = 0.0
    """reverse_kl: the log-ratio of student and teacher, the paper's advantage, counts up to +-this. 0 = no limit. 5 at test time."""
    entropy_quantile: float = 0.0
    """rho: only this share of the loss tokens, those where the student's entropy is highest, carries loss; costs a forward. 0 = all."""
    average: Literal["sequence", "token"] = "sequence"
    """sequence: mean over all attempts, 0 for those without a signal (authors' code). token: mean over tokens with one."""
    is_cap: float = 2.0
    """Importance ratio student/sampler, at most this. 0 = no ratio. It is 1 at the first optimiser step of a batch."""
    is_level: Literal["token", "sequence"] = "token"
    """The ratio of each token, or its mean over the attempt."""
    teacher: str = "ema"
    """Who scores y in hindsight: ema, trust_region, base (the student at the start), live, or a model's folder or hub id."""
    ema_rate: float = 0.05
    """alpha in teacher <- (1 - alpha) teacher + alpha student, once per batch of rollouts; share of live in trust_region."""
    loss_temperature: float = 1.0
    """Divides the logits of both sides inside D. It is not the temperature of sampling."""
    policy_weight: float = 0.0
    """lambda: lambda GRPO + (1 - lambda) SDPO (Eq. 3; the paper's mix is .9). 1 is GRPO alone and asks no teacher."""
    clip_low: float = 0.2
    """GRPO: the ratio student/sampler counts down to 1 - this."""
    clip_high: float = 0.28
    """GRPO: and up to 1 + this."""
    std_advantage: bool = False
    """GRPO: divide the advantage, reward minus group mean, by the group's standard deviation."""
    kl_coef: float = 0.0
    """Weight of KL(student || initial model) on the student's own prompt, token mean."""
    question: int = 0
    """Test-time training, section 5: train on this row of --data alone and stop at the first attempt that solves it. 0 = on all rows."""
    search: Literal["sdpo", "best_of_k", "multi_turn"] = "sdpo"
    """With --question: train, or a baseline without training: the initial model asked again and again, or shown the feedback on
    all attempts so far (the oldest forgotten first, to fit --max-teacher-tokens; the paper: 32768, --rollouts 1)."""

    # Model and data.
    model: str = "Qwen/Qwen3-8B"
    """Folder or hub id of the student; a chat model."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank. 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others watch what is forgotten."""
    verifier: str = "exact"
    """Grades attempts: exact, choice, tool_use, math, code (in a sandbox), or path.py:function(completion, row) -> reward or (reward, feedback)."""
    student_chat_kwargs: Json = field(default_factory=lambda: {"enable_thinking": False})
    """Arguments of the chat template for the student's prompt, as JSON."""
    teacher_chat_kwargs: Json = field(default_factory=lambda: {"enable_thinking": False})
    """The same for the teacher's prompt."""
    max_prompt_tokens: int = 2048
    """Longest student prompt. A longer one stops the run, or is left out with --drop-long; nothing is ever cut."""
    max_teacher_tokens: int = 10240
    """Longest teacher prompt: a solution is shortened to fit; what is still too long carries no loss and is counted."""
    drop_long: bool = False
    """Leave rows with too long prompts out, and say how many."""

    # Generation.
    prompts_per_step: int = 32
    """Questions of one batch of rollouts, over all processes."""
    max_completion_tokens: int = 8192
    """Longest attempt, in training and evaluation."""
    temperature: float = 1.0
    """Of sampling attempts. 0 = greedy."""
    top_p: float = 1.0
    """Nucleus of sampling; below 1 it needs --is-cap 0."""
    top_k: int = 0
    """Sampling from the k likeliest tokens only; 0 = all. Otherwise it needs --is-cap 0."""
    cut_off: Literal["auto", "keep", "drop"] = "auto"
    """Attempts cut off at the limit: keep them (authors' code), drop them, or auto = keep, but stop if step 1 has no other."""

    # Optimisation.
    epochs: float = 30.0
    """Passes over the data; steps = ceil(epochs * rows / questions per step)."""
    steps: int = 0
    """Batches of rollouts; above 0 it replaces --epochs."""
    mini_batch: int = 0
    """Questions per optimiser step; 0 = all of the batch: strictly on-policy."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "constant"
    """After warm-up: cosine to zero, or constant."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Of AdamW."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""

    # Evaluation.
    eval_every: int = 5
    """Steps between evaluations; one before the first step and one after the last are always made."""
    eval_samples: int = 16
    """Answers per evaluation prompt: avg@n and pass@n."""
    teacher_samples: int = 32
    """teacher/accuracy, at step 1 and evaluations: so many of the batch's contexts, answered by the teacher (not trust_region). 0 = none."""
    eval_temperature: float = 0.6
    """Of evaluation; 0 = greedy."""
    eval_top_p: float = 0.95
    """Nucleus of evaluation."""


@dataclass
class Args(RunArgs, PaperArgs):
    """The paper's flags, then those of every script: the machine and the run."""


# Tables 12 and 13 and appendix E; Args holds the column of section 3 (no feedback).
PRESETS: dict[str, dict] = {
    # Chosen on seed 0 of the laptop world. Its vocabulary is smaller than K = 100; its teacher reads the question once more.
    "toy": dict(model="toy:0/model", data="toy:0/mul-train.jsonl", eval_data=("toy:0/mul-eval.jsonl", "toy:0/prior-eval.jsonl"),
                verifier="toy:feedback_all", template="{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n{prompt}",
                support="full", student_chat_kwargs={}, teacher_chat_kwargs={}, max_prompt_tokens=64, max_teacher_tokens=128,
                max_completion_tokens=12, engine_cache_gib=0.25, prompts_per_step=4, steps=100, lr=3e-4, warmup=5, weight_decay=0.0,
                adam_betas=(0.9, 0.95), tokens_per_batch=8192, eval_every=10, eval_samples=1, eval_temperature=1.0, eval_top_p=1.0, seed=0),
    # One domain a run; this one is chemistry. The authors' JSON lines do as well: --data train.jsonl --eval-data test.jsonl.
    "sciknoweval": dict(data="hicai-zju/SciKnowEval:Chemistry@test#train", eval_data=("hicai-zju/SciKnowEval:Chemistry@test#test",),
                        verifier="choice", feedback_when="never"),
    "tooluse": dict(verifier="tool_use", feedback_when="never"),               # its feedback would leak the gold answer
    # Section 4, rich feedback. The authors' JSON lines: train with half of the private tests, evaluation with all.
    "lcb": dict(verifier="code", divergence="reverse_kl", topk=20, ema_rate=0.01, lr=1e-6, warmup=0, mini_batch=1, eval_samples=4),
    # Section 5: 16 attempts a step, at most 2750.
    "ttt": dict(verifier="code", divergence="reverse_kl", topk=20, ema_rate=0.01, lr=1e-6, warmup=0, question=1, prompts_per_step=1, rollouts=16,
                mini_batch=1, advantage_clip=5.0, steps=172, teacher_samples=0),
}


Mark = tuple[str, float, str]                                # text, reward r_i and feedback f_i of one attempt


class Sample(NamedTuple):
    q: int                                                   # which question of the batch
    prompt: list[int]                                        # what the student reads
    context: list[int]                                       # what the teacher reads; empty without a solution or feedback
    y: list[int]                                             # what both score
    logps: list[float]                                       # of y under the sampler
    mask: list[bool]                                         # which tokens of y are distilled
    advantage: float                                         # of y in its group, for GRPO


def to_row(raw: dict, train: bool = False) -> dict | None:
    """One data set's columns as ours: prompt, and what the verifier wants. None: the paper leaves this row out."""
    row = dict(raw)
    if "answerKey" in raw or "private_test_cases" in raw:
        ours = sciknoweval_row(raw, suffix="\nPlease reason step by step.") if "answerKey" in raw else livecodebench_row(raw, half=train)
        if ours is None:
            return None
        row |= ours
    elif raw.get("system"):                                  # the authors' JSON lines
        row["prompt"] = [{"role": "system", "content": raw["system"]}, {"role": "user", "content": raw["prompt"]}]
    row["prompt"] = as_messages(row["prompt"])
    return row


def attempt(run: Run, student: torch.nn.Module, sampler: Sampler, rows: list[dict], step: int, args: Args) -> tuple[list[tuple[int, int]], list[Rollout]]:
    """y_1..y_G ~ student(.|x) for each question, shared out over the processes: this one's (question, attempt) pairs, and their y."""
    mine = [(q, i) for q in range(len(rows)) for i in range(args.rollouts)][run.rank::run.world]
    return mine, sampler.each(student, [rows[q]["prompt_ids"] for q, _ in mine], [(rows[q]["id"], i) for q, i in mine], (TRAIN_STREAM, step),
                              temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)


def grade_groups(run: Run, mine: list[tuple[int, int]], attempts: list[Rollout], rows: list[dict], tokenizer: Any, verify: Callable,
                 args: Args) -> list[list[Mark]]:
    """The marks of every group, known to all processes; the row's own "feedback" where the verifier has none."""
    texts = [tokenizer.decode(y.ids, skip_special_tokens=True) for y in attempts]
    graded = grade(run, verify, [(text, {**rows[q], "truncated": not y.finished}) for (q, _), y, text in zip(mine, attempts, texts)])
    marks = [(text, reward, feedback or str(rows[q].get("feedback") or "")) for (q, _), text, (reward, feedback) in zip(mine, texts, graded)]
    everyone = [mark for _, mark in sorted(run.gather(list(zip(mine, marks))))]
    return [everyone[first:first + args.rollouts] for first in range(0, len(everyone), args.rollouts)]


def hindsight(graded: list[Mark], i: int, key: tuple[int, ...], args: Args) -> tuple[str, str]:
    """(s_i, f_i) of attempt i: a success of the group other than i, and feedback by the rules of the flags; "" for none."""
    others = [text for j, (text, reward, _) in enumerate(graded) if j != i and reward >= SOLVED]
    pick = int(np.random.default_rng(key).integers(len(others))) if others and args.solution_from == "random" else 0
    solution = others[pick] if others and args.solution_from != "none" else ""
    if args.remove_thinking:
        solution = re.sub(r"<think>.*?</think>\s*", "", solution, flags=re.DOTALL)
    _, reward, feedback = graded[i]
    shown = (feedback if args.feedback_when == "always" or (args.feedback_when == "no_solution" and not solution) else "")
    return solution, shown if args.feedback_on == "all" or reward < SOLVED else ""


def teacher_ids(row: dict, solution: str, feedback: str, tokenizer: Any, args: Args) -> list[int]:
    """The reprompt of section 2 in place of the user's last message; [] when there is nothing to tell or no way to fit it.

    A solution that makes it too long loses its own end, never the question's or the prompt's.
    """
    *before, last = row["prompt"]
    while solution or feedback:
        content = fill(args.template, prompt=last["content"], solution=solution and fill(args.solution_template, solution=solution),
                       feedback=feedback and fill(args.feedback_template, feedback=feedback))
        ids = chat_ids(tokenizer, [*before, {"role": "user", "content": content}], args.teacher_chat_kwargs)
        over = len(ids) - args.max_teacher_tokens
        if over <= 0:
            return ids
        kept = tokenizer(solution, add_special_tokens=False)["input_ids"][:-over]
        if not kept:
            return []
        solution = tokenizer.decode(kept)
    return []


def advantages(rewards: list[float], std: bool) -> list[float]:
    """GRPO, Eq. 12: r_i minus the group's mean, over its standard deviation when asked."""
    mean = sum(rewards) / len(rewards)
    scale = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards)) + 1e-6 if std else 1.0
    return [(r - mean) / scale for r in rewards]


def distill_weights(sample: Sample, sequences: float, tokens: float, average: str) -> list[float]:
    """Each token's share of the distillation loss: 1/(n_i N) with N all attempts, or 1/(all distilled tokens)."""
    share = 1 / (max(sum(sample.mask), 1) * sequences) if average == "sequence" else 1 / max(tokens, 1)
    return [share * m for m in sample.mask]


def grpo_loss(logp: Tensor, behaviour: Tensor, advantage: Tensor, args: Args) -> Tensor:
    """Eq. 13 per token: -min(ratio A, clip(ratio) A), ratio = student / sampler."""
    ratio = (logp - behaviour).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - args.clip_low, 1 + args.clip_high) * advantage)


def sdpo_loss(h_ND: Tensor, head: Head, targets: list, initial: list, micro: list[Sample], weight_N: Tensor, all_tokens: float,
              args: Args) -> tuple[Tensor, dict]:
    """Eq. 3 on a micro-batch: lambda GRPO + (1 - lambda) Eq. 1, and the KL to the initial model."""
    flat = lambda lists: torch.tensor([x for values in lists for x in values], device=h_ND.device)
    y_N, behaviour_N = flat(s.y for s in micro), flat(s.logps for s in micro)
    loss, stats = h_ND.sum() * 0, {}
    if args.policy_weight < 1:
        behaviour = behaviour_N if args.is_cap else None
        if args.is_cap and args.is_level == "sequence":
            weight_N, behaviour = weight_N * sequence_ratio(h_ND, head, y_N, behaviour_N, micro, args), None
        loss, stats = distill_loss(h_ND, head, targets, y_N, weight_N * (1 - args.policy_weight), divergence=args.divergence, beta=args.beta,
                                   support=args.support, topk=args.topk, tail=args.tail, temperature=args.loss_temperature,
                                   behaviour_logp_N=behaviour, is_cap=args.is_cap, clip=args.advantage_clip)
    if args.policy_weight:
        advantage_N = flat([s.advantage] * len(s.y) for s in micro)
        policy, more = token_loss(h_ND, head, y_N, lambda logp, n: grpo_loss(logp, behaviour_N[n], advantage_N[n], args) / all_tokens)
        loss, stats = loss + args.policy_weight * policy, {**more, **stats}
    if args.kl_coef:
        ones_N = torch.full((len(y_N),), args.kl_coef / all_tokens, device=h_ND.device)
        loss = loss + distill_loss(h_ND, head, initial, y_N, ones_N, divergence="reverse_kl")[0]
    return loss, stats


def sequence_ratio(h_ND: Tensor, head: Head, y_N: Tensor, behaviour_N: Tensor, micro: list[Sample], args: Args) -> Tensor:
    """Mean over each attempt of min(student / sampler, cap), for every token of it."""
    logp_N, _ = token_stats(h_ND.detach(), head, y_N, temperature=args.loss_temperature)
    parts = (logp_N - behaviour_N).exp().clamp(max=args.is_cap).split([len(s.y) for s in micro])
    return torch.cat([logp_N[:0], *(part.mean().expand(len(part)) for part in parts)])


def teacher_accuracy(run: Run, teacher: Teacher, sampler: Sampler, samples: list[tuple[int, int, list[int]]], rows: list[dict], tokenizer: Any,
                     verify: Callable, step: int, args: Args) -> dict[str, float]:
    """The self-teacher answers contexts of this batch, an even choice of them: how much hindsight knows."""
    every = max(1, len(rows) * args.rollouts // max(args.teacher_samples, 1))
    asked = [(q, i, context) for q, i, context in samples if context and (q * args.rollouts + i) % every == 0]
    answers = sampler.each(teacher.model, [context for *_, context in asked], [(rows[q]["id"], i) for q, i, _ in asked], (TEACHER_STREAM, step),
                           temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    graded = grade(run, verify, [(tokenizer.decode(y.ids, skip_special_tokens=True), rows[q]) for (q, *_), y in zip(asked, answers)])
    n = run.sum(reward=sum(reward for reward, _ in graded), asked=len(asked))
    return {"teacher/accuracy": n["reward"] / n["asked"]} if n["asked"] else {}


def first_success(run: Run, group: list[Mark], step: int, args: Args) -> dict[str, float]:
    """Test time: attempts so far and whether one of this group solves the question; the solution goes to solution.json."""
    place = next((i for i, (_, reward, _) in enumerate(group) if reward >= SOLVED), None)
    before = (step - 1) * args.rollouts
    if place is None:
        return {"search/attempts": before + args.rollouts, "search/solved": 0}
    if run.main:
        (run.out / "solution.json").write_text(json.dumps({"attempt": before + place + 1, "text": group[place][0]}, indent=1))
    run.say(f"solved by attempt {before + place + 1}, see {run.out}/solution.json")
    return {"search/attempts": before + place + 1, "search/solved": 1}


def search(run: Run, student: torch.nn.Module, sampler: Sampler, row: dict, steps: int, tokenizer: Any, verify: Callable, args: Args) -> None:
    """Section 5's baselines: best_of_k asks the initial model again; multi_turn shows it the feedback on all attempts so far."""
    history: list[str] = []
    for step in range(1, steps + 1):
        asked = {**row, "prompt_ids": multi_turn_ids(row, history, tokenizer, args) if history else row["prompt_ids"]}
        with run.timer("generate"):
            mine, attempts = attempt(run, student, sampler, [asked], step, args)
        with run.timer("verify"):
            [group] = grade_groups(run, mine, attempts, [asked], tokenizer, verify, args)
        found = first_success(run, group, step, args)
        run.log(step, found)
        if found["search/solved"] or run.stop_requested():
            return
        history += [feedback for *_, feedback in group if feedback and args.search == "multi_turn"]


def multi_turn_ids(row: dict, history: list[str], tokenizer: Any, args: Args) -> list[int]:
    """The question, a blank line, and all feedback in the teacher's template; the oldest goes first when it does not fit."""
    args = replace(args, feedback_template="\n" + args.feedback_template)
    for first in range(len(history)):
        if ids := teacher_ids(row, "", "\n\n".join(history[first:]), tokenizer, args):
            return ids
    return row["prompt_ids"]


def check(args: Args, vocabulary: int) -> None:
    """Combinations of flags that cannot mean what they say."""
    check_divergence(args, vocabulary)
    if args.policy_weight and (args.temperature != 1 or args.top_p < 1 or args.top_k):
        raise InputError("--policy-weight: GRPO compares the sampling distribution with the student's own, so it needs --temperature 1, --top-p 1 "
                         "and --top-k 0; or give --policy-weight 0")
    if args.rollouts < 2 and (args.feedback_when == "never" or args.policy_weight):
        raise InputError(f"--rollouts {args.rollouts}: a group of one has no other attempt to learn from and no mean to beat; "
                         "take 2 or more, or feedback alone (--feedback-when no_solution --policy-weight 0)")
    if args.solution_from == "none" and args.feedback_when == "never" and args.policy_weight < 1:
        raise InputError("--solution-from none with --feedback-when never leaves the teacher nothing to read; drop one of them")
    for name in ("ema_rate", "policy_weight", "entropy_quantile"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: a share in [0, 1]")
    if args.mini_batch and args.prompts_per_step % args.mini_batch:
        raise InputError(f"--mini-batch {args.mini_batch}: it must divide --prompts-per-step {args.prompts_per_step}")
    if args.advantage_clip and args.divergence != "reverse_kl":
        raise InputError(f"--advantage-clip limits the log-ratio of the reverse KL; add --divergence reverse_kl (it is {args.divergence})")
    if args.question and args.prompts_per_step != 1:
        raise InputError(f"--question {args.question} trains on one row; add --prompts-per-step 1 (it is {args.prompts_per_step})")
    if args.search != "sdpo" and not args.question:
        raise InputError(f"--search {args.search} looks for the solution of one row; name it with --question")


def main(args: Args) -> None:
    # Whatever can be wrong without weights is found first.
    tokenizer = load_tokenizer(args.model)
    check(args, len(tokenizer))
    rows = load_rows(args.data, lambda raw: to_row(raw, train=True))
    if args.question:
        if args.question not in {row["id"] for row in rows}:
            raise InputError(f"--question {args.question}: {args.data} has no such row; its rows are {rows[0]['id']} to {rows[-1]['id']}")
        rows = [row for row in rows if row["id"] == args.question]
    train = tokenize(rows, tokenizer, args)
    evals = load_evals(args.eval_data, to_row, tokenizer, args)
    verify = load_verifier(args.verifier)
    steps = args.steps or math.ceil(args.epochs * len(train) / args.prompts_per_step)
    run = start(args, even=False)
    run.say(f"sdpo: {len(train)} rows ({len(rows) - len(train)} too long, left out), {steps} steps of {args.prompts_per_step} questions x "
            f"{args.rollouts} on {run.world} x {run.device.type}")
    if args.dry_run:
        row, graded = train[0], [("", 0.0, "<feedback>"), ("<another attempt>", 1.0, "")]
        shown = teacher_ids(row, *hindsight(graded, 0, (0,), args), tokenizer, args)
        return run.say(f"student reads: {tokenizer.decode(row['prompt_ids'])}\nteacher reads: {tokenizer.decode(shown)}\n"
                       f"{planned(run, args.teacher if args.policy_weight < 1 else '')}")

    student = load_model(args.model, run, args.lora_rank, args.activation_checkpointing)
    teacher = Teacher(args.teacher if args.policy_weight < 1 else "live", args.ema_rate, student, run)      # GRPO alone keeps no second model
    initial = Teacher("base", 0.0, student, run) if args.kl_coef else None
    sampler = make_sampler(tokenizer, student, run)
    optimizer = make_optimizer(student, args)
    done, score = load_checkpoint(run, student, teacher, optimizer)
    run.rescue = lambda: save_checkpoint(run, run.done, student, teacher, optimizer, score)
    begin(run, steps, done)
    if not done:
        run.log(0, evaluate(run, student, tokenizer, sampler, evals, verify, 0, score))
    silent, shown = 0, done > 0                              # steps in a row without any signal; whether one sample was printed
    if args.search != "sdpo":
        return search(run, student, sampler, train[0], steps, tokenizer, verify, args)

    for step in range(done + 1, steps + 1):
        rows = step_rows(train, step, args.prompts_per_step, args.seed)

        # 1. Attempt: y_1..y_G ~ student(.|x) for each question, from the weights about to be updated.
        with run.timer("generate"):
            mine, attempts = attempt(run, student, sampler, rows, step, args)

        # 2. Grade: reward r_i and feedback f_i of each attempt. At test time the first success ends the run.
        with run.timer("verify"):
            groups = grade_groups(run, mine, attempts, rows, tokenizer, verify, args)
        found = first_success(run, groups[0], step, args) if args.question else {}
        if found.get("search/solved"):
            run.log(step, found)
            break

        # 3. Look back: the teacher of y_i reads another success s_i of the group and/or f_i; without either y_i has no signal.
        samples, dropped = [], 0
        for (q, i), y in zip(mine, attempts, strict=True):
            told = hindsight(groups[q], i, (args.seed, step, rows[q]["id"], i), args)
            context = teacher_ids(rows[q], *told, tokenizer, args)
            dropped += any(told) and not context
            kept = bool(context) and (y.finished or args.cut_off != "drop")
            prompt, A = rows[q]["prompt_ids"], advantages([reward for _, reward, _ in groups[q]], args.std_advantage)[i]
            samples.append(Sample(q, prompt, context or prompt, y.ids, y.logps, [kept] * len(y.ids), A))
        contexts = [(q, i, s.context) for (q, i), s in zip(mine, samples) if s.mask[0]]
        drawn = run.sum(attempts=len(attempts), length=sum(len(y.ids) for y in attempts), cut=sum(not y.finished for y in attempts),
                        reward=sum(groups[q][i][1] for q, i in mine), active=len(contexts), dropped=dropped)
        if step == 1 and drawn["cut"] == drawn["attempts"] and args.cut_off != "keep":
            raise InputError(f"all {drawn['attempts']:.0f} attempts of step 1 were cut off at --max-completion-tokens "
                             f"{args.max_completion_tokens}; raise it, or accept them with --cut-off keep")

        # 4. Learn, one optimiser step per mini-batch of questions.
        sums = dict.fromkeys(("loss", "divergence", "teacher_logp", "logp", "entropy", "mass_student", "mass_teacher", "ratio", "tokens"), 0.0)
        grad_norm, lr, questions = 0.0, learning_rate(step, steps, args), args.mini_batch or args.prompts_per_step
        for first in range(0, args.prompts_per_step, questions):
            batch = [s for s in samples if first <= s.q < first + questions]
            taught = [s for s in batch if (s.mask[0] and args.policy_weight < 1) or (s.advantage and args.policy_weight)]
            if args.entropy_quantile:
                with run.timer("student"):
                    masks = most_uncertain(run, student, [(s.prompt, s.y) for s in taught], [s.mask for s in taught], args.entropy_quantile)
                taught = [s._replace(mask=mask) for s, mask in zip(taught, masks)]

            # 4a. Count the sequences and tokens of all ranks before any backward: the only denominators of this optimiser step.
            n = run.sum(samples=len(taught), sequences=len(batch), all_tokens=sum(len(s.y) for s in batch), tokens=sum(sum(s.mask) for s in taught))
            if n["samples"] == 0:                            # true on every rank at once, so none is left waiting
                continue

            # 4b. Distil: the same y_i scored in hindsight by the teacher and without it by the student; only the student has a gradient.
            for micro in micro_batches(taught, lambda s: max(len(s.prompt), len(s.context)) + len(s.y), args.tokens_per_batch):
                with run.timer("teacher"):
                    targets = teacher.targets([(s.context, s.y) for s in micro]) if args.policy_weight < 1 else []
                    anchors = initial.targets([(s.prompt, s.y) for s in micro]) if initial else []
                with run.timer("student"):
                    weight_N = torch.tensor([w for s in micro for w in distill_weights(s, n["sequences"], n["tokens"], args.average)],
                                            device=run.device)
                    loss, stats = on_completions(student, [(s.prompt, s.y) for s in micro], args, lambda h_ND, head: sdpo_loss(
                        h_ND, head, targets, anchors, micro, weight_N, n["all_tokens"], args))
                    loss.backward()
                sums["loss"] += loss.item()
                sums["tokens"] += (weight_N > 0).sum().item()
                for name, values in stats.items():
                    sums[name] += values[weight_N > 0].sum().item()
                if first == 0:                               # before any of this batch's optimiser steps
                    run.compare(stats["logp"], weight_N, micro)
                if micro and not shown:
                    shown = True
                    explain(run, tokenizer, {"student reads": micro[0].prompt, "teacher reads": micro[0].context}, micro[0].y, stats)

            # 4c. Step. Gradients add up over ranks; 4a has divided.
            with run.timer("optim"):
                grad_norm = optimizer_step(optimizer, lr, run)

        # 5. The teacher follows, once per batch of rollouts: teacher <- (1 - rate) teacher + rate student.
        teacher.update()
        run.done = step                                      # the step that the weights have behind them

        # 6. Report what was optimised; evaluate; save.
        total = run.sum(**sums)
        tokens = max(total["tokens"], 1)
        silent = 0 if drawn["active"] or args.policy_weight else silent + 1
        if silent == 10:
            run.say("ten steps in a row without any signal: no attempt succeeded and none had feedback; take easier questions, more --rollouts, "
                    "or a verifier that gives feedback")
        metrics = {"train/loss": total["loss"], "train/grad_norm": grad_norm, "train/lr": lr, "train/tokens": drawn["length"],
                   "distill/tokens": total["tokens"], "distill/active_frac": drawn["active"] / drawn["attempts"],
                   "distill/divergence": total["divergence"] / tokens, "distill/topk_mass_student": total["mass_student"] / tokens,
                   "distill/topk_mass_teacher": total["mass_teacher"] / tokens, "distill/is_ratio_mean": total["ratio"] / tokens,
                   "rollout/reward": drawn["reward"] / drawn["attempts"], "rollout/length": drawn["length"] / drawn["attempts"],
                   "rollout/cut_frac": drawn["cut"] / drawn["attempts"], "rollout/entropy": total["entropy"] / tokens,
                   "teacher/dropped_prompts": drawn["dropped"], "teacher/distance": teacher.distance()}
        metrics |= found
        if args.teacher_samples and args.policy_weight < 1 and args.teacher != "trust_region" and (step == 1 or step % args.eval_every == 0):
            with run.timer("eval"):
                metrics |= teacher_accuracy(run, teacher, sampler, contexts, rows, tokenizer, verify, step, args)
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
