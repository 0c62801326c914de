"""On-policy distillation from another model: GKD ("On-Policy Distillation of Language Models", arXiv:2306.13649).

    minimise   (1 - lambda) E_{(x,y) ~ fixed outputs} D  +  lambda E_x E_{y ~ student(.|x)} D
               with D(x, y) = 1/|y|  sum_t  D( teacher(.|x, y_<t),  student(.|x, y_<t) )

x prompt | y the student's own answer, or a fixed one | teacher: another model, frozen, local or served by vLLM
Both sides read the same tokens. On its own answers the student is corrected where it goes, not where an expert would be.

Data   JSON lines with "prompt" (text or chat messages); "completion" for lambda < 1; evaluation rows have "prompt" and "answer".
       GSM8K and DeepMath rows are mapped.
Run    python distill.py                                              # the laptop world: CPU, no download, minutes
       python distill.py --objective sft --lmbda 0 --out runs/sft-lock     # the baseline: the expert's words as hard targets
       torchrun --nproc-per-node 8 distill.py --preset tml-math       # the sampled-token policy gradient of Thinking Machines
       python distill.py --support teacher_topk --topk 64 --teacher-url http://localhost:8000/v1    # vllm serve ... --max-logprobs 64
Differs from the papers: GKD distilled T5, here both are decoders; jsd at beta = 0 and 1 is refused, because it vanishes there
and the two KLs are flags of their own. Thinking Machines sum over tokens, here it is a mean: Adam sees no difference. GSM8K's
fixed outputs end in \\boxed{} instead of "####", as the prompt asks.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import (TRAIN_STREAM, Divergence, Head, InputError, Json, Rollout, Run, RunArgs, RunError, Sampler, Support, Teacher, TopK, again,
                    as_messages, barrier, batch_rows, begin, chat_ids, check_divergence, check_vocabularies, distill_loss, eos_ids_of, evaluate,
                    explain, find, finish, fit, head_of, is_adapter, launch, learning_rate, load_checkpoint, load_evals, load_model, load_rows,
                    load_tokenizer, load_verifier, make_optimizer, make_sampler, micro_batches, most_of_ranks, on_completions, optimizer_step,
                    planned, read_jsonl, read_logps, save_checkpoint, start, step_rows, token_loss, token_stats)


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Where the other flags start from: toy, gkd-gsm8k, tml-math. Any flag given beside it wins."""

    # The algorithm, in the paper's order and symbols.
    objective: Literal["divergence", "policy_gradient", "sft"] = "divergence"
    """divergence: D of the two next-token distributions along y. policy_gradient: -ratio A_t, the sampled tokens alone
    (Thinking Machines). sft: -log p(y), the fixed outputs as hard targets."""
    lmbda: float = 1.0
    """lambda, the share of steps on the student's own y: a step draws u from U(0, 1), and u <= lambda takes them (Algorithm 1).
    Otherwise y is a fixed output, one per prompt whatever --rollouts, drawn by nobody here: no importance ratio."""
    outputs: Literal["completion", "teacher"] = "completion"
    """The fixed outputs: the rows' "completion" and an EOS, or the teacher's, sampled once per row and kept in --out."""
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
    average: Literal["sequence", "token"] = "sequence"
    """sequence: every answer weighs the same, whatever its length (GKD). token: every token does."""
    is_cap: float = 0.0
    """Importance ratio student/sampler per token, at most this. 0 = no ratio (GKD), inf = no cap (Thinking Machines). It is 1
    at the first optimiser step of a batch."""
    coef: float = 1.0
    """Policy gradient: a_t = -coef (log p_sampler(y_t) - log p_teacher(y_t))."""
    discount: float = 0.0
    """gamma, policy gradient: A_t = sum over t' >= t of gamma^(t' - t) a_t'. 0: no credit to later tokens."""
    teacher: str = "Qwen/Qwen3-4B"
    """A model of the same tokenizer: folder, hub id, or a folder with a LoRA adapter over --model. It is never updated."""
    teacher_url: str = ""
    """A running vLLM server in place of --teacher, such as http://localhost:8000/v1. It tells its top-k and the sampled token:
    --support teacher_topk or sampled, or the policy gradient. A key is read from VLLM_API_KEY."""
    teacher_model: str = ""
    """The served teacher's name; not needed when the server has one model."""
    teacher_requests: int = 16
    """Requests in flight at once, from each process."""
    teacher_timeout: float = 120.0
    """Seconds that one answer may take."""
    teacher_retries: int = 6
    """Further tries after a timeout, a broken connection, or status 429 or 5xx, waiting 1, 2, 4... seconds before each. When
    all fail the run saves a checkpoint and ends."""
    allow_eos_mismatch: bool = False
    """Go on although student and teacher end their answers with different tokens: the student learns no end from the teacher."""
    loss_temperature: float = 1.0
    """Divides the logits of both sides inside D. It is not the temperature of sampling."""

    # Model and data.
    model: str = "Qwen/Qwen3-0.6B"
    """Folder or hub id of the student; a chat model."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank. 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others watch what is forgotten."""
    verifier: str = "exact"
    """Grades evaluation: exact, choice, tool_use, math, code (in a sandbox), or path.py:function(completion, row) -> reward."""
    student_chat_kwargs: Json = field(default_factory=lambda: {"enable_thinking": False})
    """Arguments of the chat template, as JSON. Both sides read the prompt that it makes."""
    max_prompt_tokens: int = 1024
    """Longest prompt. A longer one stops the run, or is left out with --drop-long; nothing is ever cut."""
    drop_long: bool = False
    """Leave rows with too long prompts or completions out, and say how many."""

    # Generation.
    prompts_per_step: int = 32
    """Prompts of one batch of rollouts, over all processes."""
    rollouts: int = 1
    """Answers per prompt."""
    max_completion_tokens: int = 2048
    """Longest answer, in training and evaluation."""
    temperature: float = 1.0
    """Of sampling answers to learn from, the student's and the teacher's. 0 = greedy."""
    top_p: float = 1.0
    """Nucleus of sampling; below 1 it needs --is-cap 0."""
    top_k: int = 0
    """Sampling from the k likeliest tokens only; 0 = all. Otherwise it needs --is-cap 0."""
    cut_off: Literal["auto", "keep", "drop"] = "auto"
    """Answers cut off at the limit: keep them, drop them, or auto = keep, but stop if step 1 has no other."""

    # Optimisation.
    epochs: float = 2.0
    """Passes over the data; steps = ceil(epochs * rows / prompts per step)."""
    steps: int = 0
    """Batches of rollouts; above 0 it replaces --epochs."""
    mini_batch: int = 0
    """Prompts per optimiser step; 0 = all of the batch: strictly on-policy."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "constant"
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
    """Of evaluation; 0 = greedy."""
    eval_top_p: float = 1.0
    """Nucleus of evaluation."""


@dataclass
class Args(RunArgs, PaperArgs):
    """The paper's flags, then those of every script: the machine and the run."""


PRESETS: dict[str, dict] = {
    # The task on which learning on one's own answers shows: the teacher never fails, so its outputs never show how to go on after a failure.
    "toy": dict(model="toy:lock-0/student", teacher="toy:lock-0/teacher", data="toy:lock-0/lock-train.jsonl",
                eval_data=("toy:lock-0/lock-eval.jsonl", "toy:lock-0/lock-prior.jsonl"), verifier="toy:lock",
                divergence="jsd", average="token", student_chat_kwargs={}, max_prompt_tokens=64, max_completion_tokens=20, steps=64, lr=4e-4,
                engine_cache_gib=0.25, warmup=5, adam_betas=(0.9, 0.95), tokens_per_batch=8192, eval_every=8, eval_temperature=1.0, seed=0),
    # The paper distils T5-XL (3B) into 77M-800M and prints no learning rate, batch or steps; these are Args'. lambda = 1 with the
    # forward KL is the best of its GSM8K table; y are sampled at temperature 1, and a sequence is a mean over its tokens.
    "gkd-gsm8k": dict(data="openai/gsm8k:main@train", eval_data=("openai/gsm8k:main@test",), verifier="math"),
    # Thinking Machines, October 2025: 150 steps of 512 x 4, rank 128. Their student was first fine-tuned on 400K traces of OpenThoughts-3:
    # give such a checkpoint as --model. Not printed: the average over tokens, warm-up, and the adapters' alpha.
    "tml-math": dict(objective="policy_gradient", is_cap=math.inf, average="token", model="Qwen/Qwen3-8B-Base", teacher="Qwen/Qwen3-8B",
                     lora_rank=128, lr=1e-4, warmup=0, data="zwhe99/DeepMath-103K@train", verifier="math", prompts_per_step=512, rollouts=4,
                     steps=150, max_completion_tokens=4096, student_chat_kwargs={}, eval_temperature=1.0),
}

MATH_SUFFIX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
LAMBDA_STREAM, OUTPUT_STREAM = 2, 3                          # random numbers that are neither evaluation's nor the rollouts'
PAUSE = 1.0                                                  # seconds before the second request; doubled each time


class Sample(NamedTuple):
    prompt: list[int]                                        # what both sides read
    y: list[int]                                             # what both score
    logps: list[float]                                       # of y under the sampler
    told: TopK | None                                        # what the teacher says of y, where it is asked before the weights move
    advantage: list[float]                                   # A_t, for the policy gradient


def to_row(raw: dict) -> dict:
    """One data set's columns as ours: prompt, and whichever of completion and answer it has."""
    row = dict(raw)
    if "final_answer" in raw:                                # DeepMath
        row |= {"prompt": raw["question"] + MATH_SUFFIX, "answer": raw["final_answer"], "completion": raw["r1_solution_1"]}
    elif "question" in raw and "####" in str(raw.get("answer")):                    # GSM8K; its last line in the format that the prompt asks for
        worked, _, number = raw["answer"].rpartition("####")
        number = number.strip().replace(",", "")
        row |= {"prompt": raw["question"] + MATH_SUFFIX, "answer": number, "completion": f"{worked.strip()}\n\\boxed{{{number}}}"}
    row["prompt"] = as_messages(row["prompt"])
    return row


def to_training_row(raw: dict) -> dict:
    row = to_row(raw)
    if isinstance(row.get("completion"), list):              # chat messages: the assistant's
        row["completion"] = row["completion"][-1]["content"]
    return row


def tokenize(rows: list[dict], tokenizer: Any, args: Args) -> list[dict]:
    """Prompts, and completions where they are learnt, as token ids, once; too long ones stop the run or, with --drop-long, are left out."""
    kept = []
    for row in rows:
        row["prompt_ids"], row["output"] = chat_ids(tokenizer, row["prompt"], args.student_chat_kwargs), []
        if args.lmbda < 1 and args.outputs == "completion":
            if not str(row.get("completion") or "").strip():
                raise InputError(f"{row['where']}: no 'completion' in this row; --lmbda {args.lmbda} learns from it (or --outputs teacher)")
            row["output"] = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if (fit(row["prompt_ids"], args.max_prompt_tokens, "--max-prompt-tokens", row["where"], args.drop_long)
                and fit(row["output"], args.max_completion_tokens, "--max-completion-tokens", row["where"], args.drop_long)):
            kept.append(row)
    if not kept:
        raise InputError(f"{args.data}: --drop-long left no row; raise --max-prompt-tokens or --max-completion-tokens")
    return kept


def on_policy(args: Args, step: int) -> bool:
    """Algorithm 1: u ~ U(0, 1) of this step, the same on all processes; u <= lambda means the student's own answers."""
    return np.random.default_rng((args.seed, LAMBDA_STREAM, step)).random() <= args.lmbda


def fixed_outputs(train: list[dict], steps: int, teacher: Any, tokenizer: Any, run: Run) -> dict[int, Rollout]:
    """The y of off-policy steps by row. The teacher's are sampled once for the rows those steps will meet, and kept in --out/outputs."""
    args, folder = run.args, run.out / "outputs"
    if args.outputs == "completion":
        return {row["id"]: Rollout(row["output"], [0.0] * len(row["output"]), True) for row in train}
    read = lambda: {o["row"]: Rollout(o["ids"], o["logps"], o["finished"]) for file in sorted(folder.glob("*.jsonl")) for o in read_jsonl(file)}
    folder.mkdir(exist_ok=True)
    known, file = read(), folder / f"{run.rank}.jsonl"
    barrier(run)                                             # all have read before anyone writes
    met = {row["id"]: row for step in range(1, steps + 1) if not on_policy(args, step)
           for row in step_rows(train, step, args.prompts_per_step, args.seed)}
    mine, sampler = [row for i, row in sorted(met.items()) if i not in known][run.rank::run.world], Sampler(tokenizer, teacher.model, args)
    run.say(f"the teacher answers the rows of the off-policy steps: {len(met)}, of which {len(met.keys() & known.keys())} are there already")
    lines = file.read_text() if file.exists() else ""
    for lo in range(0, most_of_ranks(len(mine)), args.sample_batch):
        rows = mine[lo:lo + args.sample_batch]
        groups = sampler(teacher.model, [row["prompt_ids"] for row in rows], [row["id"] for row in rows], 1, (OUTPUT_STREAM,),
                         temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
        lines += "".join(json.dumps({"row": row["id"], **y._asdict()}) + "\n" for row, [y] in zip(rows, groups, strict=True))
        aside = file.with_suffix(".aside")
        aside.write_text(lines)
        aside.rename(file)
    barrier(run)
    return read()


def advantages(logps: list[float], teacher_logps: list[float], coef: float, discount: float) -> list[float]:
    """A_t = a_t + gamma A_{t+1}, a_t = -coef (log p_sampler(y_t) - log p_teacher(y_t)): constants."""
    A, later = [], 0.0
    for ours, theirs in zip(reversed(logps), reversed(teacher_logps), strict=True):
        later = -coef * (ours - theirs) + discount * later
        A.append(later)
    return A[::-1]


def joined(told: list[TopK], run: Run) -> TopK:
    """What the teacher says of several y, laid end to end."""
    nothing = TopK(*[torch.zeros(0, device=run.device)] * 3)
    return TopK(*(torch.cat(parts).to(run.device) for parts in zip(*told))) if told else nothing


def token_weight(length: int, sequences: float, tokens: float, average: str) -> float:
    """A token's share of the loss, in an answer of this length: 1/(n_i B) or 1/(all tokens)."""
    return 1 / (length * sequences) if average == "sequence" else 1 / tokens


def policy_loss(logp: Tensor, behaviour: Tensor, advantage: Tensor, is_cap: float) -> Tensor:
    """-ratio A per token, ratio = min(student / sampler, cap); its gradient is -ratio A d log p, also where the cap binds."""
    ratio = (logp.detach() - behaviour).exp().clamp(max=is_cap) if is_cap else 1.0
    return -ratio * (1 + logp - logp.detach()) * advantage


def gkd_loss(h_ND: Tensor, head: Head, target: list | TopK, micro: list[Sample], weight_N: Tensor, own: bool, args: Args) -> tuple[Tensor, dict]:
    """The weighted sum over the tokens of y of D(teacher, student); or of -ratio A; or of -log p(y). `own`: y are the student's."""
    flat = lambda lists: torch.tensor([x for values in lists for x in values], device=h_ND.device)
    y_N, behaviour_N = flat(s.y for s in micro), flat(s.logps for s in micro)
    if args.objective == "sft":
        return token_loss(h_ND, head, y_N, lambda logp, n: -weight_N[n] * logp)
    if args.objective == "policy_gradient":
        advantage_N, teacher_N = flat(s.advantage for s in micro), target.logp_N
        loss, stats = token_loss(h_ND, head, y_N, lambda logp, n: weight_N[n] * policy_loss(logp, behaviour_N[n], advantage_N[n], args.is_cap),
                                 temperature=args.loss_temperature)
        ratio_N = (stats["logp"] - behaviour_N).exp().clamp(max=args.is_cap) if args.is_cap else torch.ones_like(weight_N)
        return loss, {**stats, "divergence": behaviour_N - teacher_N, "teacher_logp": teacher_N, "ratio": ratio_N}
    return distill_loss(h_ND, head, target, y_N, weight_N, divergence=args.divergence, beta=args.beta, support=args.support, topk=args.topk,
                        tail=args.tail, temperature=args.loss_temperature, behaviour_logp_N=behaviour_N if own and args.is_cap else None,
                        is_cap=args.is_cap)


def ask(teacher: Teacher | Served, pairs: list[tuple[list[int], list[int]]], run: Run) -> list[TopK]:
    """What the teacher says of each y: a server its top k, a local one, for the policy gradient, the tokens' log-probs."""
    if isinstance(teacher, Served):
        return teacher.targets(pairs)
    told: list[Any] = [None] * len(pairs)
    for micro in micro_batches(range(len(pairs)), lambda i: sum(map(len, pairs[i])), run.args.tokens_per_batch):
        y_N = torch.tensor([token for i in micro for token in pairs[i][1]], device=run.device)
        logp_N, _ = on_completions(teacher.model, [pairs[i] for i in micro], run.args,
                                   lambda h_ND, head: token_stats(h_ND, head, y_N, temperature=run.args.loss_temperature))
        for i, part in zip(micro, logp_N.split([len(pairs[i][1]) for i in micro])):
            told[i] = TopK(y_N.new_zeros(len(part), 0), part.new_zeros(len(part), 0), part)
    return told


def consult(run: Run, teacher: Teacher | Served, questions: list[list[Sample]]) -> tuple[list[list[Sample]], str]:
    """Every sample with what the teacher says of it, and ""; or, on all ranks when one of them has no good answer, what went wrong."""
    args, problem, told = run.args, "", []
    try:
        told = ask(teacher, [(s.prompt, s.y) for group in questions for s in group], run)
    except RunError as error:
        problem = str(error)
    if run.sum(failed=bool(problem))["failed"]:
        return [], problem or "another process lost its teacher"
    known = iter(told)
    heard = [[s._replace(told=next(known)) for s in group] for group in questions]
    if args.objective == "policy_gradient":
        heard = [[s._replace(advantage=advantages(s.logps, s.told.logp_N.tolist(), args.coef, args.discount)) for s in group] for group in heard]
    return heard, ""


def stop_ids(source: str, tokenizer: Any) -> list[int]:
    """The EOS tokens of a model folder or hub id, without its weights."""
    from transformers import AutoConfig, GenerationConfig
    config = AutoConfig.from_pretrained(find(source))
    try:
        generation = GenerationConfig.from_pretrained(find(source))
    except OSError:                                          # a folder need not have one
        generation = config
    return sorted(eos_ids_of(tokenizer, SimpleNamespace(config=config, generation_config=generation)))


def check_teacher(args: Args, tokenizer: Any) -> None:
    """One vocabulary and one way to end, before weights are loaded."""
    check_vocabularies(args.model, args.teacher)
    if is_adapter(args.teacher) or args.allow_eos_mismatch:
        return
    ours, theirs = stop_ids(args.model, tokenizer), stop_ids(args.teacher, load_tokenizer(args.teacher, "--teacher"))
    if ours != theirs:
        raise InputError(f"--teacher {args.teacher} ends its answers with {tokenizer.batch_decode([[i] for i in theirs])}, --model {args.model} with "
                         f"{tokenizer.batch_decode([[i] for i in ours])}; make their eos_token_id agree, or add --allow-eos-mismatch")


def needs_teacher(args: Args) -> bool:
    return args.objective != "sft" or (args.outputs == "teacher" and args.lmbda < 1)


def check(args: Args, vocabulary: int, world: int) -> None:
    """Combinations of flags that cannot mean what they say."""
    policy, own = args.objective == "policy_gradient", args.lmbda > 0
    if not 0 <= args.lmbda <= 1:
        raise InputError(f"--lmbda {args.lmbda}: a share of the steps in [0, 1]")
    if args.objective == "sft" and own:
        raise InputError(f"--objective sft learns fixed outputs as hard targets; add --lmbda 0 (it is {args.lmbda})")
    if args.lmbda < 1 and (policy or (args.objective == "divergence" and args.support == "sampled")):
        raise InputError(f"the policy gradient needs tokens that the student sampled; add --lmbda 1 (it is {args.lmbda}), or take --objective "
                         "divergence with another --support")
    if args.lmbda == 1 and args.outputs == "teacher":
        raise InputError("--outputs teacher with --lmbda 1: no step would learn from them; lower --lmbda")
    if policy and (args.temperature != args.loss_temperature or args.top_p < 1 or args.top_k):
        raise InputError("--objective policy_gradient compares sampling and training distributions, so it needs --temperature equal to "
                         "--loss-temperature, --top-p 1 and --top-k 0")
    if args.is_cap < 0:
        raise InputError(f"--is-cap {args.is_cap}: a largest ratio, 0 for no ratio or inf for no cap")
    if not own and args.is_cap:
        raise InputError("--is-cap with --lmbda 0: fixed outputs have no sampler to compare with; give --is-cap 0")
    if not policy and (args.discount or args.coef != 1):
        raise InputError(f"--discount and --coef belong to --objective policy_gradient (it is {args.objective})")
    if not 0 <= args.discount <= 1:
        raise InputError(f"--discount {args.discount}: from 0 (no credit to later tokens) to 1")
    if args.objective == "sft" and args.loss_temperature != 1:
        raise InputError("--loss-temperature divides the logits inside a divergence; --objective sft has none")
    if args.objective == "divergence":
        check_divergence(args, vocabulary)
    if args.rollouts < 1:
        raise InputError(f"--rollouts {args.rollouts}: at least one answer per prompt")
    if args.mini_batch and (args.prompts_per_step % args.mini_batch or args.mini_batch % world):
        raise InputError(f"--mini-batch {args.mini_batch}: it must divide --prompts-per-step {args.prompts_per_step} and be a multiple of the "
                         f"{world} processes")
    if needs_teacher(args) and not args.teacher_url and args.teacher in ("", "live", "base", "ema", "trust_region"):
        raise InputError(f"--teacher {args.teacher or '(none)'}: expected another model's folder or hub id; both sides read the same, so the "
                         "student would have nothing to learn from itself")
    if args.teacher_url:
        check_served(args)


def main(args: Args) -> None:
    # Whatever can be wrong without weights is found first.
    tokenizer = load_tokenizer(args.model)
    check(args, len(tokenizer), int(os.environ.get("WORLD_SIZE", 1)))
    rows = load_rows(args.data, to_training_row)
    train = tokenize(rows, tokenizer, args)
    evals = load_evals(args.eval_data, to_row, tokenizer, args)
    verify = load_verifier(args.verifier)
    steps = args.steps or math.ceil(args.epochs * len(train) / args.prompts_per_step)
    served, told = Served(args, len(tokenizer)) if args.teacher_url else None, ""
    if served:
        told = served.greet(tokenizer, stop_ids(args.model, tokenizer), train[0]["prompt_ids"])
    elif needs_teacher(args):
        check_teacher(args, tokenizer)
    run = start(args)
    run.say(f"{args.objective}: {len(train)} rows ({len(rows) - len(train)} too long, left out), {steps} steps of {args.prompts_per_step} prompts x "
            f"{args.rollouts}, {sum(on_policy(args, step) for step in range(1, steps + 1))} of them on-policy, on {run.world} x {run.device.type}")
    run.say(told) if told else None
    if args.dry_run:
        shown = "".join(f"\nfixed output: {tokenizer.decode(train[0]['output'])}" if train[0]["output"] else "")
        return run.say(f"student and teacher read: {tokenizer.decode(train[0]['prompt_ids'])}{shown}\n"
                       f"{planned(run, args.teacher if needs_teacher(args) and not served else '')}")

    student = load_model(args.model, run, args.lora_rank, args.activation_checkpointing)
    if served:
        served.vocabulary = head_of(student).weight.shape[0]                        # a padded head may sample beyond the tokenizer
    teacher = served or (Teacher(args.teacher, 0.0, student, run) if needs_teacher(args) else None)
    sampler, early = make_sampler(tokenizer, student, run), served is not None or args.objective == "policy_gradient"
    optimizer = make_optimizer(student, args)
    done, score = load_checkpoint(run, student, None, optimizer)
    run.rescue = lambda: save_checkpoint(run, run.done, student, None, optimizer, score)
    fixed = fixed_outputs(train, steps, teacher, tokenizer, run) if args.lmbda < 1 else {}
    begin(run, steps, done)
    if not done:
        run.log(0, evaluate(run, student, tokenizer, sampler, evals, verify, 0, score))

    for step in range(done + 1, steps + 1):
        rows, own = batch_rows(train, step, args.prompts_per_step, run, args.seed), on_policy(args, step)

        # 1. Answer: in a share lambda of the steps y ~ student(.|x), from the weights about to be updated; in the others the fixed outputs.
        with run.timer("generate"):
            groups = [[fixed[row["id"]]] for row in rows] if not own else sampler(
                student, [row["prompt_ids"] for row in rows], [row["id"] for row in rows], args.rollouts, (TRAIN_STREAM, step),
                temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
        answers = [y for group in groups for y in group]
        drawn = run.sum(answers=len(answers), length=sum(len(y.ids) for y in answers), cut=sum(not y.finished for y in answers))
        if step == 1 and drawn["cut"] == drawn["answers"] and args.cut_off != "keep":
            raise InputError(f"all {drawn['answers']:.0f} answers of step 1 were cut off at --max-completion-tokens {args.max_completion_tokens}; "
                             "raise it, or accept them with --cut-off keep")
        questions = [[Sample(row["prompt_ids"], y.ids, y.logps, None, []) for y in group if y.finished or args.cut_off != "drop"]
                     for row, group in zip(rows, groups, strict=True)]

        # 2. Ask: what must come from a server, or is a constant of the policy gradient, comes before any weight moves.
        if early:
            with run.timer("teacher"):
                questions, problem = consult(run, teacher, questions)
            if problem:
                raise run.stranded(problem)

        # 3. Learn, one optimiser step per mini-batch of prompts.
        sums = dict.fromkeys(("loss", "divergence", "teacher_logp", "logp", "entropy", "mass_student", "mass_teacher", "ratio", "tokens"), 0.0)
        grad_norm, lr, per_rank = 0.0, learning_rate(step, steps, args), (args.mini_batch or args.prompts_per_step) // run.world
        for first in range(0, len(questions), per_rank):
            samples = [s for group in questions[first:first + per_rank] for s in group]

            # 3a. Count the answers and tokens of all ranks before any backward: the only denominators of this optimiser step.
            n = run.sum(sequences=len(samples), tokens=sum(len(s.y) for s in samples))
            if n["sequences"] == 0:                          # true on every rank at once, so none is left waiting
                continue

            # 3b. Distil: both sides score the same y after the same x; only the student has a gradient.
            for m, micro in enumerate(micro_batches(samples, lambda s: len(s.prompt) + len(s.y), args.tokens_per_batch)):
                pairs = [(s.prompt, s.y) for s in micro]
                with run.timer("teacher"):
                    target = (joined([s.told for s in micro], run) if early
                              else teacher.targets(pairs) if args.objective == "divergence" else [])
                with run.timer("student"):
                    weight_N = torch.tensor([token_weight(len(s.y), n["sequences"], n["tokens"], args.average) for s in micro for _ in s.y],
                                            device=run.device)
                    loss, stats = on_completions(student, pairs, args, lambda h_ND, head: gkd_loss(h_ND, head, target, micro, weight_N, own, args))
                    loss.backward()
                sums["loss"] += loss.item()
                sums["tokens"] += len(weight_N)
                for name, values in stats.items():
                    sums[name] += values.sum().item()
                if own and first == 0:                       # before any of this batch's optimiser steps
                    run.compare(stats["logp"], weight_N, micro)
                if step == 1 and first == 0 and m == 0 and micro:
                    explain(run, tokenizer, {"student and teacher read": micro[0].prompt}, micro[0].y, stats)

            # 3c. Step. Gradients add up over ranks; 3a has divided.
            with run.timer("optim"):
                grad_norm = optimizer_step(optimizer, lr, run)
        run.done = step                                      # the step that the weights have behind them

        # 4. Report what was optimised; evaluate; save.
        total = run.sum(**sums)
        tokens = max(total["tokens"], 1)
        metrics = {"train/loss": total["loss"], "train/grad_norm": grad_norm, "train/lr": lr, "train/tokens": drawn["length"],
                   "distill/tokens": total["tokens"], "distill/on_policy": float(own), "rollout/entropy": total["entropy"] / tokens,
                   "rollout/length": drawn["length"] / drawn["answers"], "rollout/cut_frac": drawn["cut"] / drawn["answers"]}
        if args.objective != "sft":
            metrics |= {"distill/divergence": total["divergence"] / tokens, "distill/is_ratio_mean": total["ratio"] / tokens}
        if args.objective == "divergence":
            metrics |= {"distill/topk_mass_student": total["mass_student"] / tokens, "distill/topk_mass_teacher": total["mass_teacher"] / tokens}
        if step % args.eval_every == 0 or step == steps:
            metrics |= evaluate(run, student, tokenizer, sampler, evals, verify, step, score)
        run.log(step, metrics)
        stop = run.stop_requested()
        if step % args.save_every == 0 or step == steps or stop:
            save_checkpoint(run, step, student, None, optimizer, score)
        if stop:
            return run.say(f"stopped after step {step}; go on with: {again()}")

    finish(run, student, tokenizer, score)


# The served teacher: a client of vLLM's completions that believes nothing it has not checked.

class Refused(RunError):
    """The server answered, and not with what was asked: status 4xx or 3xx."""


class Served:
    """A teacher behind a vLLM server: token ids in, log-probs of its top k and of the sent tokens out, every answer checked before use."""

    def __init__(self, args: Args, vocabulary: int):
        self.args, self.url, self.vocabulary, self.name = args, args.teacher_url.rstrip("/"), vocabulary, args.teacher_model
        self.k = args.topk if args.objective == "divergence" and args.support == "teacher_topk" else 0
        self.gone, self.problem, self.waited = threading.Event(), RunError(""), False       # one request failed for good: the others stop trying

    def request(self, url: str, body: dict | None = None) -> Any:
        """The server's JSON. Timeouts, broken connections, 429 and 5xx are tried again, waiting twice as long each time; nothing else is."""
        key = {"Authorization": f"Bearer {os.environ['VLLM_API_KEY']}"} if "VLLM_API_KEY" in os.environ else {}
        asked = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json", **key})
        problem = "another request failed"
        for attempt in range(self.args.teacher_retries + 1):
            if attempt and not self.waited:
                self.waited = True
                print(f"waiting for the teacher: {url}: {problem}", file=sys.stderr, flush=True)
            if self.gone.wait(PAUSE * 2 ** (attempt - 1) if attempt else 0):
                break
            try:
                text = read_all(asked, self.args.teacher_timeout)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    raise Refused(f"{url} refused: {problem}") from error
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                try:
                    return json.loads(text)
                except ValueError as error:
                    raise RunError(f"{url} sent something that is not JSON ({error}): {text[:80]!r}; nothing was trained on it") from error
        raise RunError(f"the teacher at {url} did not answer, tried {self.args.teacher_retries + 1} times ({problem})")

    def targets(self, pairs: list[tuple[list[int], list[int]]]) -> list[TopK]:
        """What the teacher says of each y, several requests in flight."""
        def ask(pair: tuple[list[int], list[int]]) -> TopK:
            ids = [*pair[0], *pair[1]]
            body = {"model": self.name, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": self.k}
            try:
                return self.read(self.request(f"{self.url}/completions", body), ids, len(pair[0]))
            except RunError as error:
                self.problem = self.problem if self.gone.is_set() else error
                self.gone.set()
                raise self.problem
        with ThreadPoolExecutor(self.args.teacher_requests) as pool:
            return list(pool.map(ask, pairs))

    def read(self, answer: Any, ids: list[int], first: int) -> TopK:
        """The answer for ids[first:] as tensors; RunError with the position and what was found there if anything is not as asked."""
        def wrong(what: str) -> RunError:
            return RunError(f"the teacher at {self.url} sent a wrong answer: {what}; nothing was trained on it")
        try:
            table = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            raise wrong(f"no choices[0].prompt_logprobs in {str(answer)[:80]!r}") from error
        if not isinstance(table, list) or len(table) != len(ids):
            raise wrong(f"{len(ids)} tokens were sent and {len(table) if isinstance(table, list) else table!r} positions came back")
        tops, own = [], []
        for at in range(first, len(ids)):
            try:
                told = read_logps(table[at], ids[at], self.vocabulary)
            except ValueError as error:
                raise wrong(f"position {at} {error}") from error
            top = dict(told)
            if len(told) == self.k + 1 and told[ids[at]] <= min(told.values()):            # the sent token is not among the top k
                del top[ids[at]]
            if len(top) != self.k:
                raise wrong(f"position {at} has {len(top)} tokens where the likeliest {self.k} were asked for")
            if sum(map(math.exp, top.values())) > 1.001:
                raise wrong(f"position {at} has log-probs whose probabilities sum to {sum(map(math.exp, top.values())):.3f}")
            tops.append(top)
            own.append(min(told[ids[at]], 0.0))
        return TopK(torch.tensor([list(top) for top in tops], dtype=torch.long), torch.tensor([list(top.values()) for top in tops]).clamp(max=0),
                    torch.tensor(own))

    def greet(self, tokenizer: Any, stops: list[int], prompt: list[int]) -> str:
        """Compares model, length, vocabulary and EOS before anything is loaded, as far as a server tells; returns what was compared."""
        args, n, root = self.args, self.vocabulary, self.url.removesuffix("/v1")
        try:
            models = {card["id"]: card for card in self.request(f"{self.url}/models")["data"]}
            if self.name not in models and (self.name or len(models) != 1):
                raise InputError(f"--teacher-model {self.name or '(none)'}: the server has {', '.join(models)}; name one of them")
            self.name = self.name or next(iter(models))
            longest, needed = models[self.name].get("max_model_len") or math.inf, args.max_prompt_tokens + args.max_completion_tokens + 1
            if needed > longest:
                raise InputError(f"--teacher-url {self.url}: its max_model_len is {longest}, but --max-prompt-tokens + --max-completion-tokens + 1 "
                                 f"are {needed}; serve it with --max-model-len {needed}, or lower them")
            try:
                theirs = self.request(f"{root}/detokenize", {"model": self.name, "tokens": list(range(n))})["prompt"]
                compared = f"{n} tokens compared"
            except Refused as error:
                theirs, compared = None, f"tokens not compared ({error})"
            if theirs not in (None, tokenizer.decode(range(n))):
                raise InputError(f"--teacher-url {self.url}: {self.name} and --model {args.model} differ in vocabulary: ids 0 to {n - 1} are other "
                                 "text there; they must share one tokenizer")
            self.targets([(prompt, [n - 1])])
            for stop in stops:                               # forced to say this token, does it end there?
                forced = {"model": self.name, "prompt": prompt, "max_tokens": 2, "temperature": 0, "logit_bias": {str(stop): 100}}
                ended = self.request(f"{self.url}/completions", forced)["choices"][0]["finish_reason"] == "stop"
                if not ended and not args.allow_eos_mismatch:
                    raise InputError(f"--teacher-url {self.url}: the student ends its answers with {tokenizer.decode([stop])!r}, {self.name} does "
                                     "not; give a teacher that does, or --allow-eos-mismatch")
        except (RunError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"--teacher-url {self.url}: {error}; is a vLLM server ready there, with --max-logprobs {max(self.k, 1)}?") from error
        return f"teacher {self.name} at {self.url}: {compared}, its EOS may be more than the student's {stops}"


def read_all(asked: urllib.request.Request, timeout: float) -> bytes:
    """The whole body within `timeout` seconds, however slowly it drips."""
    deadline, parts = time.monotonic() + timeout, []
    with urllib.request.urlopen(asked, timeout=timeout) as reply:
        while part := reply.read1(1 << 16):
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the answer was not complete after {timeout:g} seconds")
        if reply.length:
            raise ConnectionError(f"the answer broke off {reply.length} bytes before its end")
    return b"".join(parts)


def check_served(args: Args) -> None:
    """What a server cannot give."""
    if not args.teacher_url.startswith(("http://", "https://")):
        raise InputError(f"--teacher-url {args.teacher_url}: expected an address such as http://localhost:8000/v1")
    if not needs_teacher(args) or args.outputs == "teacher":
        raise InputError("--teacher-url: a server scores answers, it is not asked for any; take --teacher PATH for --outputs teacher, and neither "
                         "for --objective sft on completions")
    if args.objective == "divergence" and args.support in ("full", "student_topk"):
        raise InputError(f"--teacher-url: a server tells the teacher's top k, not --support {args.support}; take --support teacher_topk or sampled, "
                         "or --objective policy_gradient")
    if args.loss_temperature != 1:
        raise InputError(f"--teacher-url: a server's log-probs are those at temperature 1, --loss-temperature {args.loss_temperature} needs logits; "
                         "take 1, or --teacher PATH")
    if args.teacher_requests < 1 or args.teacher_retries < 0 or args.teacher_timeout <= 0:
        raise InputError("--teacher-requests at least 1, --teacher-retries at least 0, --teacher-timeout above 0")


if __name__ == "__main__":
    launch(main, Args, PRESETS)
