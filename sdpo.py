"""SDPO: Self-Distillation Policy Optimization ("Reinforcement Learning via Self-Distillation", 2601.20802v2).

    minimise   E_{y ~ student(.|x)}  1/|y|  sum_t  D( student(.|x, y_<t),  teacher(.|x, s, f, y_<t) )    Eq. 1

x question | y_1..y_G a group of attempts | s_i another attempt of the group that succeeded | f_i feedback on
y_i. The teacher, an EMA of the student, also reads a solution or feedback that the student did not have, and
scores the student's tokens. No gradient flows through the teacher or the sampling of y.

Data   JSON lines with "prompt" and what the verifier reads, usually "answer"; "feedback" where it does not
       depend on the attempt. The authors' JSON lines, SciKnowEval and LiveCodeBench rows are mapped.
Run    python sdpo.py                                        # the laptop world: CPU, no download, minutes
       python sdpo.py --preset smol                          # a pretrained model of 135M, on the same CPU
       torchrun --nproc-per-node 4 sdpo.py --preset sciknoweval --data FILE --eval-data FILE
       python sdpo.py --policy-weight 1 --out runs/grpo-toy  # the baseline, GRPO
       torchrun --nproc-per-node 4 sdpo.py --preset ttt --data FILE --question 7  # one question, to solve
Template  Large models can use a solution quoted in the question (REPROMPT, the paper's). Small ones need it
       as an earlier chat turn (TURNS): --template also takes a JSON list of chat messages.
Differs from the paper: an attempt is never its own solution (authors' code; Table 2 allows it). The average
is the code's, a mean over all attempts in which those without hindsight count as zero (--average token: over
all tokens, the paper's). Eq. 3 mixes advantages, we mix the losses. An attempt counts as solved at a reward
of 0.5 (code; paper: --success 1). best/ is chosen on the test set, of which the paper reports the best value.
From the code: an over-long teacher prompt loses the end of the solution, not of the prompt; one ratio
student/sampler stands for the code's two; `math` takes a box anywhere, not in the last 100 characters alone;
`code` stops at the first test that raises or times out, where theirs looks for an exception first.
"""

from __future__ import annotations

import base64
import json
import math
import pickletools
import re
import statistics
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import (
    TRAIN_STREAM,
    Divergence,
    InputError,
    Json,
    Objective,
    RunArgs,
    Sampling,
    Support,
    Teacher,
    Totals,
    answer_of,
    as_messages,
    chat_ids,
    check_template,
    completion_states,
    distill_loss,
    evaluate,
    explain,
    head_of,
    is_turns,
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

# Prompts of the authors' code; the teacher reads REPROMPT in place of the last user message.
REPROMPT = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
SOLUTION = "\nCorrect solution:\n\n"  # before s_i
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"  # before f_i
# For models too small to use a solution quoted in the question: here it is an earlier assistant turn.
TURNS = """[
 {"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{solution}"},
 {"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{solution}"},
 {"role": "user", "content": "{feedback}"}, {"role": "user", "content": "{prompt}"}]"""
MULTI_TURN = REPROMPT.replace("{feedback}", "\n{feedback}")  # of the baseline, with a blank line
CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # GRPO's clipping of the ratio student/sampler (section 3)
TEACHER_STREAM = 2  # random numbers that are neither evaluation's nor the rollouts'


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Named set of defaults: toy, smol, sciknoweval, grpo, tooluse, lcb, ttt. Explicit flags override it."""

    # The algorithm, in the paper's order and symbols.
    rollouts: int = 8
    """G, attempts per question. With 1 there are no others to learn from, only feedback."""
    success: float = 0.5
    """Least reward of a solved attempt, for s_i, pass@n and --question (paper: 1; authors' code: 0.5)."""
    hindsight: Literal["solution_or_feedback", "solution", "feedback", "both"] = "solution_or_feedback"
    """What the teacher reads: s_i, else f_i (authors' code); or one of them alone; or both (table 6)."""
    template: str = REPROMPT
    """What the teacher reads in place of the last user message: text, or chat messages as a JSON list; there
    {solution} and {feedback} are the bare texts, and a message with an empty one is dropped."""
    divergence: Divergence = "jsd"
    """D per token: forward_kl = KL(teacher||student), reverse_kl the other way, jsd, mixed = both KLs."""
    support: Support = "student_topk"
    """Tokens that D is summed over: the vocabulary, a top-k with a tail bucket, or the sampled token."""
    topk: int = 100
    """K of a top-k support (tables 12 and 13: 100 or 20)."""
    advantage_clip: float = 0.0
    """reverse_kl: clamp of the log-ratio student/teacher, the paper's advantage; 0 is none (table 12: 5)."""
    entropy_quantile: float = 0.0
    """Train only on the share of tokens with the highest student entropy; 0 is all. Costs a forward pass."""
    average: Literal["sequence", "token"] = "sequence"
    """Both losses: sequence = mean over attempts of token means (code), token = mean over tokens (paper)."""
    is_cap: float = 2.0
    """Cap of the importance ratio student/sampler per token (1 at a batch's first step); 0 is no ratio."""
    teacher: str = "ema"
    """What scores y in hindsight: ema, trust_region, base (the student at the start), live, or a model."""
    ema_rate: float = 0.05
    """alpha in teacher <- (1 - alpha) teacher + alpha student, once a batch; trust_region: share of live."""
    policy_weight: float = 0.0
    """lambda in lambda GRPO + (1 - lambda) SDPO (Eq. 3; paper: 0.9). 1 is GRPO alone, without a teacher."""
    question: int = 0
    """Test time (section 5): train on this row of --data alone until an attempt solves it. 0 is all rows."""
    search: Literal["sdpo", "best_of_k", "multi_turn"] = "sdpo"
    """With --question: train, or a baseline of section 5 that samples the initial model, alone or shown the
    feedback on all earlier attempts (the oldest is dropped to fit --max-teacher-tokens)."""

    # Model and data.
    model: str = "Qwen/Qwen3-8B"
    """Folder or hub id of the student, a chat model."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank; 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others show what is forgotten."""
    verifier: str = "exact"
    """Grades attempts: exact, choice, tool_use, math, code, or path.py:function(completion, row) -> reward or
    (reward, feedback)."""
    chat_kwargs: Json = field(default_factory=lambda: {"enable_thinking": False})
    """Arguments of the chat template for both sides, as JSON."""
    max_prompt_tokens: int = 2048
    """Longest student prompt; rows with longer ones are left out and counted."""
    max_teacher_tokens: int = 10240
    """Longest teacher prompt: a solution is shortened to fit; prompts still too long are dropped, counted."""

    # Generation, at temperature 1 (tables 12 and 13).
    prompts_per_step: int = 32
    """Questions per batch of rollouts, over all processes."""
    max_completion_tokens: int = 8192
    """Longest attempt, in training and evaluation."""
    mask_truncated: bool = False
    """No loss on attempts cut off at the limit; they count in every mean. The authors' code keeps them."""

    # Optimisation: a constant learning rate after warm-up.
    epochs: float = 30.0
    """Passes over the data; steps = ceil(epochs * rows / questions per step)."""
    steps: int = 0
    """Batches of rollouts; above 0 it replaces --epochs."""
    mini_batch: int = 0
    """Questions per optimiser step; 0 is all of the batch, strictly on-policy."""
    lr: float = 1e-5
    """AdamW learning rate."""
    warmup: int = 10
    """Steps (batches of rollouts) of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""

    # Evaluation.
    eval_every: int = 5
    """Steps between evaluations; there is always one before the first step and one after the last."""
    eval_samples: int = 16
    """Answers per evaluation prompt, for avg@n and pass@n."""
    teacher_samples: int = 32
    """Hindsight prompts that the teacher answers at step 1 and evaluations (teacher/accuracy); 0 is none."""
    eval_temperature: float = 0.6
    """Sampling temperature of evaluation; 0 is greedy."""
    eval_top_p: float = 0.95
    """Nucleus of evaluation."""


@dataclass
class Args(RunArgs, PaperArgs):
    """The paper's flags, then those of every script."""


# Tables 12 and 13 and appendix E; Args holds the column of section 3 (no feedback).
PRESETS: dict[str, dict] = {
    # Chosen on seed 0 of the laptop world: its vocabulary is smaller than K = 100; the teacher reads the
    # question twice.
    "toy": dict(
        model="toy:0/model",
        data="toy:0/mul-train.jsonl",
        eval_data=("toy:0/mul-eval.jsonl", "toy:0/prior-eval.jsonl"),
        verifier="toy:feedback_wrong",
        template=REPROMPT + "\n{prompt}",
        support="full",
        chat_kwargs={},
        max_prompt_tokens=64,
        max_teacher_tokens=128,
        max_completion_tokens=12,
        engine_cache_gib=0.25,
        prompts_per_step=4,
        steps=100,
        lr=3e-4,
        warmup=5,
        weight_decay=0.0,
        adam_betas=(0.9, 0.95),
        tokens_per_batch=8192,
        eval_every=10,
        eval_samples=1,
        eval_temperature=1.0,
        eval_top_p=1.0,
        seed=0,
    ),
    # Chosen on seed 0 of tests/smol.py.
    "smol": dict(
        model="smol:model",
        data="smol:quick-train.jsonl",
        eval_data=("smol:quick-eval.jsonl", "smol:prior-eval.jsonl"),
        verifier="smol:grade",
        hindsight="solution",
        template=TURNS,
        chat_kwargs={},
        max_prompt_tokens=128,
        max_teacher_tokens=256,
        max_completion_tokens=14,
        engine_cache_gib=0.5,
        prompts_per_step=8,
        steps=8,
        lr=3e-5,
        warmup=1,
        weight_decay=0.0,
        adam_betas=(0.9, 0.95),
        dtype="bfloat16",
        tokens_per_batch=1024,
        eval_every=4,
        eval_samples=1,
        eval_temperature=1.0,
        eval_top_p=1.0,
        save_every=1000,
        seed=0,
    ),
    # One domain a run; this one is chemistry. The authors' JSON lines: --data FILE --eval-data FILE.
    "sciknoweval": dict(
        data="hicai-zju/SciKnowEval:Chemistry@test#train",
        eval_data=("hicai-zju/SciKnowEval:Chemistry@test#test",),
        verifier="choice",
        hindsight="solution",
    ),
    # The paper's main GRPO: four optimiser steps a batch; 1e-5 with --mini-batch 0 is its on-policy form.
    "grpo": dict(
        data="hicai-zju/SciKnowEval:Chemistry@test#train",
        eval_data=("hicai-zju/SciKnowEval:Chemistry@test#test",),
        verifier="choice",
        policy_weight=1.0,
        lr=1e-6,
        mini_batch=8,
    ),
    # The authors' JSON lines, 4,046 to train and 68 to test; feedback would leak the gold answer.
    "tooluse": dict(verifier="tool_use", hindsight="solution"),
    # Section 4, rich feedback. --data and --eval-data are both LiveCodeBench v6, as downloaded or as the
    # authors' JSON lines: half of the private tests train, all evaluate.
    "lcb": dict(
        verifier="code",
        divergence="reverse_kl",
        topk=20,
        ema_rate=0.01,
        lr=1e-6,
        warmup=0,
        mini_batch=1,
        eval_samples=4,
    ),
    # Section 5: 16 attempts a step, at most 2750, on one hard question of LiveCodeBench v6.
    "ttt": dict(
        verifier="code",
        divergence="reverse_kl",
        topk=20,
        ema_rate=0.01,
        lr=1e-6,
        warmup=0,
        question=1,
        prompts_per_step=1,
        rollouts=16,
        mini_batch=1,
        advantage_clip=5.0,
        steps=172,
        teacher_samples=0,
    ),
}


class Mark(NamedTuple):
    """The verdict on one attempt, known to all processes."""

    text: str
    reward: float  # r_i
    solution: str  # what others are shown: the answer in the text if it is right
    feedback: str  # f_i
    hidden: bool = False  # a special token is spelled in one of these two, which is then left empty


class Sample(NamedTuple):
    place: int  # of y in the batch
    prompt: list  # what the student reads
    context: list | None  # what the teacher reads; None without hindsight
    y: list  # what both score
    logps: list  # of y under the sampler
    mask: list  # which tokens of y carry loss
    advantage: float  # of y in its group, for GRPO


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


CODE_PROMPT = (
    "You are a coding expert. You will be given a coding problem, and you need to write a correct Python "
    "program that matches the specification and passes all tests. The time limit is 1 second. You may start "
    "by outlining your thought process. In the end, please provide the complete code in a code block "
    "enclosed with ``` ```.\n\n"
)


def livecodebench_tests(raw: dict, train: bool) -> dict:
    """The tests of a raw row: all, or in training half of the private ones, drawn at random, at least one."""
    private = raw["private_test_cases"]  # JSON text, or base64 of zlib of its pickle, which is never executed
    if not private.lstrip().startswith("["):
        data = zlib.decompress(base64.b64decode(private))
        [private] = [value for _, value, _ in pickletools.genops(data) if isinstance(value, str)]
    private = json.loads(private)
    if train:
        drawn = np.random.default_rng(0).permutation(len(private))[: max(1, len(private) // 2)]
        private = [private[i] for i in sorted(drawn)]
    cases = json.loads(raw["public_test_cases"]) + private
    tests = {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}
    function = json.loads(raw.get("metadata") or "{}").get("func_name")
    return {**tests, "testtype": cases[0]["testtype"], "fn_name": function, "time_limit": 6}


def to_row(raw: dict, train: bool = False) -> dict | None:
    """A data set's columns as ours: prompt, and what the verifier reads. None: the paper leaves it out."""
    row = dict(raw)
    if "private_test_cases" in raw:  # LiveCodeBench, February to April 2025
        if not "2025-02-01" <= str(raw["contest_date"])[:10] < "2025-05-01":
            return None
        row |= {"prompt": CODE_PROMPT + raw["question_content"], "tests": livecodebench_tests(raw, train)}
        if signature := re.search(r"def .*\S", raw.get("starter_code") or ""):
            shown = signature[0].replace("(self, ", "(")
            row["prompt"] += f"\n\nYour solution should have the following signature: ```python\n{shown}\n```"
    elif "answerKey" in raw:  # SciKnowEval
        if raw["details"]["level"] != "L3" or raw["type"] not in ("mcq-4-choices", "mcq-2-choices"):
            return None
        options = zip(raw["choices"]["label"], raw["choices"]["text"], strict=True)
        question = raw["question"] + "\n\n" + "\n".join(f"{label}: {text}" for label, text in options)
        row |= {"system": SCIENCE_SYSTEM, "answer": raw["answerKey"]}
        row["prompt"] = question + "\nPlease reason step by step."
    elif "golden_answer" in raw:  # ToolAlpaca
        row["answer"] = raw["golden_answer"]
    row["prompt"] = as_messages(row["prompt"], row.get("system", ""))
    return row


def grade_groups(run: Any, places: list, rows: list, attempts: list) -> list:
    """The marks of every group, on all processes; a row's own "feedback" where the verifier has none."""
    marks, G = [], run.args.rollouts
    with run.timer("verify"):
        verdicts = run.grade(rows, attempts)
        for place, row, y, (reward, feedback) in zip(places, rows, attempts, verdicts, strict=True):
            text, solution = run.text(y), ""
            if reward >= run.args.success:
                solution = answer_of(text)
            elif not feedback:
                feedback = row.get("feedback", "")
            shown = ["" if run.has_special_token(part) else part for part in (solution, feedback)]
            marks.append((place, Mark(text, reward, *shown, hidden=shown != [solution, feedback])))
        everyone = [mark for _, mark in sorted(run.gather(marks))]
    return [everyone[i : i + G] for i in range(0, len(everyone), G)]


def hindsight(group: list, i: int, args: Args) -> tuple[str, str]:
    """(s_i, f_i): the first other success of attempt i's group, and the feedback on i; "" for none."""
    others = [mark.solution for j, mark in enumerate(group) if j != i and mark.solution]
    solution = others[0] if others and args.hindsight != "feedback" else ""
    if args.hindsight == "solution" or (args.hindsight == "solution_or_feedback" and solution):
        return solution, ""
    return solution, group[i].feedback


def teacher_ids(row: dict, solution: str, feedback: list, tokenizer: Any, args: Args) -> list | None:
    """The reprompt of section 2 as token ids; None when there is nothing to tell or no way to fit it.

    Where it is too long, the solution is cut at its end, then the oldest feedback goes; the rest stays whole.
    """
    copies = max(args.template.count("{solution}"), 1)
    while solution or any(feedback):
        s, f = solution, "\n\n".join(feedback)
        if not is_turns(args.template):
            s, f = s and SOLUTION + s, f and FEEDBACK + f
        messages = with_template(row["prompt"], args.template, solution=s, feedback=f)
        ids = chat_ids(tokenizer, messages, row, args)
        over = len(ids) - args.max_teacher_tokens
        if over <= 0:
            return ids
        if solution:
            kept = tokenizer(solution, add_special_tokens=False)["input_ids"][: -math.ceil(over / copies)]
            solution = tokenizer.decode(kept).rstrip("\ufffd")  # half a character would become longer
        else:
            feedback = feedback[1:]
    return None


def look_back(run: Any, groups: list, places: list, rows: list, attempts: list) -> tuple[list, int]:
    """This rank's attempts that carry loss, as samples; and how many teacher prompts were too long."""
    samples, dropped, args = [], 0, run.args
    for place, row, y in zip(places, rows, attempts, strict=True):
        q, i = divmod(place, args.rollouts)
        rewards = [mark.reward for mark in groups[q]]
        advantage = rewards[i] - statistics.mean(rewards)  # Eq. 12; exactly 0 if all are equal
        solution, feedback = hindsight(groups[q], i, args) if args.policy_weight < 1 else ("", "")
        context = teacher_ids(row, solution, [feedback], run.tokenizer, args)
        dropped += bool(solution or feedback) and context is None
        learns = context or (args.policy_weight and advantage)
        if learns and (y.finished or not args.mask_truncated):
            mask = [True] * len(y.ids)
            samples.append(Sample(place, row["prompt_ids"], context, y.ids, y.logps, mask, advantage))
    return samples, dropped


def sdpo_loss(h_ND: Tensor, head: Any, targets: list, micro: list, n: dict, args: Args) -> tuple:
    """lambda GRPO + (1 - lambda) Eq. 1 on a micro-batch, in place of Eq. 3: (loss, statistics, weights).

    Both use the same hidden states and weights. Eq. 1, and with it the statistics and the weights returned,
    is of the attempts with hindsight.
    """
    y_N = torch.tensor([token for s in micro for token in s.y], dtype=torch.long, device=h_ND.device)
    logps_N = torch.tensor([p for s in micro for p in s.logps], device=h_ND.device)
    sizes = [n["tokens"]] * len(micro)
    if args.average == "sequence":
        sizes = [max(sum(s.mask), 1) * n["attempts"] for s in micro]
    weights = [m / size for s, size in zip(micro, sizes, strict=True) for m in s.mask]
    weight_N, loss = torch.tensor(weights, device=h_ND.device), 0.0
    if args.policy_weight:  # Eq. 13
        logp_N, entropy_N = token_logps(h_ND, head, y_N)
        advantage_N = torch.tensor([s.advantage for s in micro for _ in s.y], device=h_ND.device)
        ratio_N = (logp_N - logps_N).exp()
        clipped_N = ratio_N.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
        loss = -args.policy_weight * (weight_N * gain_N).sum()
        stats = {"logp": logp_N.detach(), "entropy": entropy_N, "ratio": ratio_N.detach()}
    if args.policy_weight < 1:  # Eq. 1
        guided = [s.context is not None for s in micro for _ in s.y]
        guided_N = torch.tensor(guided, dtype=torch.bool, device=h_ND.device)
        h_ND, y_N, weight_N, logps_N = (x[guided_N] for x in (h_ND, y_N, weight_N, logps_N))
        scaled_N, behaviour_N = (1 - args.policy_weight) * weight_N, logps_N if args.is_cap else None
        distilled, stats = distill_loss(h_ND, head, targets, y_N, scaled_N, objective_of(args), behaviour_N)
        loss = loss + distilled
    return loss, stats, weight_N


def objective_of(args: Args) -> Objective:
    return Objective(args.divergence, args.support, args.topk, is_cap=args.is_cap, clip=args.advantage_clip)


def teacher_accuracy(run: Any, sampler: Any, samples: list, asked: list, step: int) -> dict:
    """The self-teacher answers some of this batch's hindsight prompts: how much hindsight helps."""
    every = max(1, len(asked) // run.args.teacher_samples)
    chosen = [s for s in samples if s.context and s.place % every == 0]
    rows, contexts = [asked[s.place] for s in chosen], [s.context for s in chosen]
    with run.timer("eval"):
        keys, sampling = [row["rollout_key"] for row in rows], Sampling(run.args.max_completion_tokens)
        answers = sampler(run.teacher.model, contexts, keys, (TEACHER_STREAM, step), sampling)
        n = run.sum(reward=sum(reward for reward, _ in run.grade(rows, answers)), asked=len(rows))
    return {"teacher/accuracy": n["reward"] / n["asked"]} if n["asked"] else {}


def first_success(run: Any, group: list, step: int) -> dict:
    """Test time: attempts so far, and whether one of this group solves the question (solution.json)."""
    solved = [i for i, mark in enumerate(group) if mark.reward >= run.args.success]
    attempts = (step - 1) * len(group) + (solved[0] + 1 if solved else len(group))
    if solved and run.main:
        solution = {"attempt": attempts, "text": group[solved[0]].text}
        (run.out / "solution.json").write_text(json.dumps(solution, indent=1))
        run.say(f"solved by attempt {attempts}, see {run.out}/solution.json")
    return {"search/attempts": attempts, "search/solved": float(bool(solved))}


def check(args: Args, vocabulary: int) -> None:
    """InputError for combinations of flags that cannot mean what they say."""
    objective_of(args).check(vocabulary)
    if args.rollouts < 2 and (args.hindsight == "solution" or args.policy_weight):
        raise InputError("--rollouts 1: a group of one has no other attempt to learn from; use 2 or more")
    if args.mini_batch and args.prompts_per_step % args.mini_batch:
        raise InputError(
            f"--mini-batch {args.mini_batch} must divide --prompts-per-step {args.prompts_per_step}"
        )
    if args.question and args.prompts_per_step != 1:
        raise InputError(f"--question {args.question} trains on one row; add --prompts-per-step 1")
    if args.search != "sdpo" and not args.question:
        raise InputError(f"--search {args.search} looks for the solution of one row; add --question")
    check_template(args.template, "{feedback}", "{prompt}", "{solution}")


def main(args: Args) -> None:
    # Find every error that needs no weights before loading any.
    tokenizer = load_tokenizer(args.model)
    check(args, len(tokenizer))
    rows = load_rows(args.data, partial(to_row, train=not args.question))
    ids = [row["id"] for row in rows]
    if args.question not in (0, *ids):
        raise InputError(f"--question {args.question}: the rows of {args.data} are {ids[0]} to {ids[-1]}")
    rows = [row for row in rows if args.question in (0, row["id"])]
    train = tokenize(rows, tokenizer, args)
    run = start_run(args, tokenizer, train, to_row, graded=True)
    run.success = args.success
    steps = args.steps or math.ceil(args.epochs * len(train) / args.prompts_per_step)
    run.say(
        f"sdpo: {len(train)} rows ({len(rows) - len(train)} too long, left out), {steps} steps of "
        f"{args.prompts_per_step} questions x {args.rollouts} on {run.world} x {run.device.type}"
    )
    if args.question and (run.out / "solution.json").exists():
        return run.say(f"already solved, see {run.out}/solution.json")
    if args.dry_run:
        group = [Mark("", 0.0, "", "<feedback>"), Mark("", 1.0, "<another attempt>", "")]
        solution, feedback = hindsight(group, 0, args)
        ids = teacher_ids(train[0], solution, [feedback], tokenizer, args) or []
        run.say(f"student reads: {tokenizer.decode(train[0]['prompt_ids'])}")
        return run.say(f"teacher reads: {tokenizer.decode(ids) or 'nothing; raise --max-teacher-tokens'}")

    student = load_model(args.model, run, args.lora_rank)
    distils = args.policy_weight < 1 and args.search == "sdpo"  # GRPO and searches keep no second model
    teacher = Teacher(args.teacher if distils else "live", args.ema_rate, student, run)
    sampler, sampling = make_sampler(run, student), Sampling(args.max_completion_tokens)
    eval_sampling = Sampling(args.max_completion_tokens, args.eval_temperature, args.eval_top_p)
    done = run.start_training(steps, student, teacher)
    if not done:
        run.log(0, evaluate(run, sampler, student, 0, eval_sampling))

    history = run.state.setdefault("history", [])  # multi_turn: the feedback on all attempts so far
    if args.search == "multi_turn" and args.template == REPROMPT:
        args = replace(args, template=MULTI_TURN)
    shown = done > 0  # whether one sample was printed
    for step in range(done + 1, steps + 1):
        asked = step_rows(train, step, args.prompts_per_step, args.rollouts, args.seed)
        if history:
            ids = teacher_ids(asked[0], "", history, tokenizer, args) or asked[0]["prompt_ids"]
            asked = [{**row, "prompt_ids": ids} for row in asked]
        size = args.rollouts * (args.mini_batch or args.prompts_per_step)  # attempts of a mini-batch
        places = run.share(range(len(asked)), size)
        rows = [asked[place] for place in places]

        # 1. Attempt: y_1..y_G ~ student(.|x) for each question, from the weights about to be updated.
        with run.timer("generate"):
            prompts, keys = [row["prompt_ids"] for row in rows], [row["rollout_key"] for row in rows]
            attempts = sampler(student, prompts, keys, (TRAIN_STREAM, step), sampling)

        # 2. Grade: reward r_i and feedback f_i of each attempt. At test time the first success ends the run.
        groups = grade_groups(run, places, rows, attempts)
        found = first_success(run, groups[0], step) if args.question else {}
        if found.get("search/solved"):
            run.log(step, found)
            break
        if args.search != "sdpo":  # the baselines ask again, without training
            history += [mark.feedback for mark in groups[0] if mark.feedback and args.search == "multi_turn"]
            if run.end_step(step, found):
                return
            continue

        # 3. Look back: the teacher of y_i reads another success s_i and/or f_i. Some y_i have neither.
        samples, dropped = look_back(run, groups, places, rows, attempts)

        # 4. Learn, one optimiser step per mini-batch of questions.
        lr, totals = learning_rate(step, args), Totals()
        for first in range(0, len(asked), size):
            mini_batch = range(first, first + size)
            lengths = [len(y.ids) for place, y in zip(places, attempts, strict=True) if place in mini_batch]
            taught = [s for s in samples if s.place in mini_batch]
            if args.entropy_quantile:
                taught = most_uncertain(run, student, taught, args.entropy_quantile)

            # 4a. Count attempts and tokens of all ranks before any backward: the denominators.
            n = run.sum(taught=len(taught), attempts=len(lengths), tokens=sum(lengths))
            if n["taught"] == 0:  # true on every rank at once, so none is left waiting
                continue

            # 4b. Distil: the teacher scores y_i with hindsight, the student without; only the student learns.
            for micro in micro_batches(run, taught):
                with run.timer("teacher"):
                    guided = [s for s in micro if s.context] if distils else micro
                    targets = teacher.targets([(s.context, s.y) for s in guided]) if distils else []
                with run.timer("student"):
                    h_ND = completion_states(student, [(s.prompt, s.y) for s in micro])
                    loss, stats, weight_N = sdpo_loss(h_ND, head_of(student), targets, micro, n, args)
                    loss.backward()
                drawn = [p for s in guided for p in s.logps]
                totals.add(loss, stats, weight_N, drawn if first == 0 else None)
                if guided and not shown:  # the statistics are of these
                    shown = True
                    prompts = {"student reads": guided[0].prompt, "teacher reads": guided[0].context}
                    explain(run, prompts, guided[0].y, stats)

            # 4c. Step. Gradients are summed over ranks.
            with run.timer("optim"):
                totals.grad_norms.append(optimizer_step(run, lr))

        # 5. The teacher follows, once per batch of rollouts, unless every gradient was skipped.
        if any(map(math.isfinite, totals.grad_norms or [0.0])):
            teacher.update()  # teacher <- (1 - rate) teacher + rate student

        # 6. Evaluate, report, save.
        metrics = {**totals.metrics(run, attempts), **found, "train/lr": lr}
        n = run.sum(active=len(samples), dropped=dropped)
        marks = [mark for group in groups for mark in group]
        metrics["rollout/reward"] = sum(mark.reward for mark in marks) / len(marks)
        metrics["rollout/special_tokens"] = sum(mark.hidden for mark in marks)
        metrics["distill/active_frac"] = n["active"] / len(asked)
        metrics["teacher/dropped_prompts"] = n["dropped"]
        metrics["teacher/distance"] = teacher.distance()
        evaluates = step % args.eval_every == 0 or step == steps
        if args.teacher_samples and distils and args.teacher != "trust_region" and (step == 1 or evaluates):
            metrics |= teacher_accuracy(run, sampler, samples, asked, step)
        if evaluates:
            metrics |= evaluate(run, sampler, student, step, eval_sampling)
        if run.end_step(step, metrics):
            return

    save_results(run, student)


if __name__ == "__main__":
    launch(main, Args, PRESETS)
