"""On-policy distillation from another model: GKD ("On-Policy Distillation", arXiv:2306.13649).

    minimise   (1 - lambda) E_{(x,y) ~ fixed outputs} D  +  lambda E_x E_{y ~ student(.|x)} D
               with D(x, y) = 1/|y|  sum_t  D( teacher(.|x, y_<t),  student(.|x, y_<t) )

x prompt | y the student's own answer, or a fixed one | teacher: another, frozen model, local or served
Both sides read the same tokens. The student is corrected where it goes, not where an expert would be.

Data   JSON lines with "prompt" (text or chat messages); "completion" for lambda < 1; evaluation rows have
       "prompt" and "answer". GSM8K, DeepMath and AIME rows are mapped.
Run    python distill.py                                         # the laptop world: CPU, no download, minutes
       python distill.py --objective sft --lmbda 0 --out runs/sft-lock   # the baseline: hard targets
       python sdpo.py --preset smol --policy-weight 1 --out runs/smol-teacher   # a teacher of 135M, by GRPO
       python distill.py --preset smol                                          # and its student
       torchrun --nproc-per-node 8 distill.py --preset tml-math  # the policy gradient of Thinking Machines
       python distill.py --support teacher_topk --topk 64 --teacher-url http://localhost:8000/v1
Differs from the papers: GKD distilled T5 from a fine-tuned student, here both are decoders and the student is
what --model says. jsd at beta = 0 and 1 is refused: it vanishes there, and the two KLs are flags of their
own. Thinking Machines sum over tokens, here it is a mean: Adam sees no difference. GSM8K's fixed outputs end
in \\boxed{} instead of "####", as the prompt asks, and a tenth of its training rows chooses best/.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from dataclasses import dataclass, field
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
    Rollout,
    RunArgs,
    Sampler,
    Sampling,
    Support,
    Teacher,
    TopK,
    Totals,
    as_messages,
    check_teacher,
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
    optimizer_step,
    save_results,
    start_run,
    step_rows,
    stop_ids,
    token_logps,
    tokenize,
)


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Named set of defaults: toy, smol, gkd-gsm8k, tml-math. Explicit flags override it."""

    # The algorithm, in the paper's order and symbols.
    objective: Literal["divergence", "policy_gradient", "sft"] = "divergence"
    """divergence: D along y. policy_gradient: -ratio A_t of the sampled tokens. sft: -log p(y)."""
    lmbda: float = 1.0
    """lambda, the share of steps on the student's own y (Algorithm 1). In the others y is a fixed output, one
    per prompt whatever --rollouts."""
    outputs: Literal["completion", "teacher"] = "completion"
    """The fixed outputs: the rows' "completion", or the teacher's, the same for a row at every step."""
    divergence: Divergence = "forward_kl"
    """D per token: forward_kl = KL(teacher||student), reverse_kl the other way, jsd, mixed = both KLs."""
    beta: float = 0.5
    """jsd: weight of the teacher in the mixture and of its KL. mixed: weight of the forward KL."""
    support: Support = "full"
    """Tokens that D is summed over: the vocabulary, a top-k with a tail bucket, or the sampled token."""
    topk: int = 100
    """K of a top-k support."""
    average: Literal["sequence", "token"] = "sequence"
    """sequence: every answer weighs the same, whatever its length (GKD). token: every token does."""
    teacher: str = "Qwen/Qwen3-4B"
    """A frozen model with the same tokenizer: folder or hub id; with --teacher-url its name on the server."""
    teacher_url: str = ""
    """A vLLM server in place of a local teacher, such as http://localhost:8000/v1, for --support teacher_topk
    or sampled, or the policy gradient. Its key is read from VLLM_API_KEY."""

    # Model and data.
    model: str = "Qwen/Qwen3-0.6B"
    """Folder or hub id of the student, a chat model."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank; 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others show what is forgotten."""
    verifier: str = "exact"
    """Grades evaluation: exact, choice, tool_use, math, code, or path.py:function(completion, row)."""
    chat_kwargs: Json = field(default_factory=lambda: {"enable_thinking": False})
    """Arguments of the chat template for both sides, as JSON."""
    max_prompt_tokens: int = 1024
    """Longest prompt; rows with longer ones are left out and counted."""

    # Generation.
    prompts_per_step: int = 32
    """Prompts per batch of rollouts, over all processes."""
    rollouts: int = 1
    """Answers per prompt."""
    max_completion_tokens: int = 2048
    """Longest answer, in training and evaluation; rows with longer fixed outputs are left out and counted."""
    temperature: float = 1.0
    """Sampling temperature of answers to learn from; 0 is greedy."""
    mask_truncated: bool = False
    """Leave out answers that were cut off at the limit."""

    # Optimisation: a constant learning rate after warm-up.
    epochs: float = 2.0
    """Passes over the data; steps = ceil(epochs * rows / prompts per step)."""
    steps: int = 0
    """Batches of rollouts; above 0 it replaces --epochs."""
    mini_batch: int = 0
    """Prompts per optimiser step; 0 is all of the batch, strictly on-policy."""
    lr: float = 1e-5
    """AdamW learning rate."""
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
    """Sampling temperature of evaluation; 0 is greedy."""


@dataclass
class Args(RunArgs, PaperArgs):
    """The paper's flags, then those of every script."""


PRESETS: dict[str, dict] = {
    # The task on which learning on one's own answers shows: the teacher never fails, so its outputs never
    # show how to continue after a failure.
    "toy": dict(
        model="toy:lock-0/student",
        teacher="toy:lock-0/teacher",
        data="toy:lock-0/lock-train.jsonl",
        eval_data=("toy:lock-0/lock-eval.jsonl", "toy:lock-0/lock-prior.jsonl"),
        verifier="toy:lock",
        divergence="jsd",
        average="token",
        chat_kwargs={},
        max_prompt_tokens=64,
        max_completion_tokens=20,
        steps=64,
        lr=4e-4,
        engine_cache_gib=0.25,
        warmup=5,
        adam_betas=(0.9, 0.95),
        tokens_per_batch=8192,
        eval_every=8,
        eval_temperature=1.0,
        seed=0,
    ),
    # The docstring has the command that makes the teacher. Not tuned.
    "smol": dict(
        model="smol:model",
        teacher="runs/smol-teacher/last",
        data="smol:quick-train.jsonl",
        eval_data=("smol:quick-eval.jsonl", "smol:prior-eval.jsonl"),
        verifier="smol:grade",
        chat_kwargs={},
        max_prompt_tokens=128,
        max_completion_tokens=14,
        engine_cache_gib=0.5,
        prompts_per_step=32,
        steps=10,
        lr=1e-5,
        warmup=2,
        adam_betas=(0.9, 0.95),
        dtype="bfloat16",
        tokens_per_batch=1024,
        eval_every=5,
        eval_temperature=1.0,
        save_every=1000,
        seed=0,
    ),
    # The paper distils T5-XL (3B) into 77M-800M and prints no learning rate, batch or steps; these are Args'.
    # lambda = 1 with the forward KL is the best of its GSM8K table; y are sampled at temperature 1.
    "gkd-gsm8k": dict(
        data="openai/gsm8k:main@train#train",
        eval_data=("openai/gsm8k:main@train#test", "openai/gsm8k:main@test"),
        verifier="math",
    ),
    # Thinking Machines, October 2025: 150 steps of 512 x 4, rank 128. Their student was first fine-tuned
    # on 400K traces of OpenThoughts-3: give such a checkpoint as --model. Not printed: average, warm-up.
    "tml-math": dict(
        objective="policy_gradient",
        average="token",
        model="Qwen/Qwen3-8B-Base",
        teacher="Qwen/Qwen3-8B",
        lora_rank=128,
        lr=1e-4,
        warmup=0,
        data="zwhe99/DeepMath-103K@train",
        eval_data=("HuggingFaceH4/aime_2024@train",),
        verifier="math",
        prompts_per_step=512,
        rollouts=4,
        steps=150,
        max_completion_tokens=4096,
        chat_kwargs={},
        eval_temperature=1.0,
    ),
}

MATH_SUFFIX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
URL = r"https?://(\[[\da-f:]+\]|[^/:]+)(:\d+)?(/.*)?"
LAMBDA_STREAM, OUTPUT_STREAM = 2, 3  # random numbers that are neither evaluation's nor the rollouts'


class Sample(NamedTuple):
    q: int  # the prompt's place in the batch
    prompt: list  # what both sides read
    y: list  # what both score
    logps: list  # of y under the sampler


def to_row(raw: dict) -> dict:
    """A data set's columns as ours: prompt, and what it has of completion and answer."""
    row = dict(raw)
    if "final_answer" in raw:  # DeepMath
        row |= {"prompt": raw["question"] + MATH_SUFFIX, "answer": raw["final_answer"]}
        row["completion"] = raw["r1_solution_1"]
    elif "problem" in raw and "prompt" not in raw:  # AIME
        row["prompt"] = raw["problem"] + MATH_SUFFIX
    elif "question" in raw and "####" in str(raw.get("answer")):  # GSM8K, ending as the prompt asks
        worked, _, number = raw["answer"].rpartition("####")
        number = number.strip().replace(",", "")
        row |= {"prompt": raw["question"] + MATH_SUFFIX, "answer": number}
        row["completion"] = f"{worked.strip()}\n\\boxed{{{number}}}"
    row["prompt"] = as_messages(row["prompt"], row.get("system", ""))
    if isinstance(row.get("completion"), list):  # chat messages: the assistant's
        row["completion"] = row["completion"][-1]["content"] if row["completion"] else None
    return row


def training_rows(args: Args) -> list:
    """The rows of --data, with their completion only where the loss reads it."""
    rows = load_rows(args.data, to_row)
    for row in rows:
        completion = row.pop("completion", None)
        if args.lmbda < 1 and args.outputs == "completion":
            if not isinstance(completion, str) or not completion.strip():
                where = f"{row['where']}: no 'completion' in this row"
                raise InputError(f"{where}; --lmbda {args.lmbda} learns from it (or use --outputs teacher)")
            row["expert_text"] = completion
    return rows


def on_policy(args: Args, step: int) -> bool:
    """Algorithm 1: u ~ U(0, 1) of this step, the same on all processes; u <= lambda is on-policy."""
    return np.random.default_rng((args.seed, LAMBDA_STREAM, step)).random() <= args.lmbda


def gkd_loss(h_ND: Tensor, head: Any, targets: Any, micro: list, n: dict, args: Args) -> tuple:
    """(loss, statistics, weights) of a micro-batch: D(teacher, student) over y, or -ratio A, or -log p(y)."""
    y_N = torch.tensor([token for s in micro for token in s.y], dtype=torch.long, device=h_ND.device)
    each = [1 / n["tokens"]] * len(micro)
    if args.average == "sequence":
        each = [1 / (len(s.y) * n["sequences"]) for s in micro]
    weights = [share for s, share in zip(micro, each, strict=True) for _ in s.y]
    weight_N = torch.tensor(weights, device=h_ND.device)
    if args.objective == "divergence":
        loss, stats = distill_loss(h_ND, head, targets, y_N, weight_N, objective_of(args))
        return loss, stats, weight_N
    logp_N, entropy_N = token_logps(h_ND, head, y_N)
    stats = {"logp": logp_N.detach(), "entropy": entropy_N}
    if args.objective == "sft":
        return -(weight_N * logp_N).sum(), stats, weight_N
    logps_N = torch.tensor([p for s in micro for p in s.logps], device=h_ND.device)
    teacher_logp_N = teacher_logps(targets, y_N)
    advantage_N = teacher_logp_N - logps_N  # A_t = log p_teacher(y_t) - log p_sampler(y_t): a constant
    ratio_N = (logp_N - logps_N).exp()  # student / sampler, without a cap
    stats |= {"divergence": -advantage_N, "teacher_logp": teacher_logp_N, "ratio": ratio_N.detach()}
    return -(weight_N * ratio_N * advantage_N).sum(), stats, weight_N


def teacher_logps(targets: Any, y_N: Tensor) -> Tensor:
    """log p_teacher(y_t): what a server said, or from the hidden states of a local teacher."""
    if isinstance(targets, TopK):
        return targets.logp_N
    [(_, h_ND, head)] = targets
    with torch.no_grad():
        return token_logps(h_ND, head, y_N)[0]


def objective_of(args: Args) -> Objective:
    return Objective(args.divergence, args.support, args.topk, beta=args.beta)


def needs_teacher(args: Args) -> bool:
    return args.objective != "sft" or (args.outputs == "teacher" and args.lmbda < 1)


def check(args: Args, vocabulary: int) -> None:
    """InputError for combinations of flags that cannot mean what they say."""
    policy, divergence = args.objective == "policy_gradient", args.objective == "divergence"
    if args.objective == "sft" and args.lmbda > 0:
        raise InputError(f"--objective sft learns fixed outputs; add --lmbda 0 (it is {args.lmbda})")
    if args.lmbda < 1 and (policy or (divergence and args.support == "sampled")):
        need = "the policy gradient needs the student's own tokens"
        raise InputError(f"{need}; add --lmbda 1 (it is {args.lmbda})")
    if args.lmbda == 1 and args.outputs == "teacher":
        raise InputError("--outputs teacher with --lmbda 1: no step would learn from them; lower --lmbda")
    if policy and args.temperature != 1:
        raise InputError("--objective policy_gradient compares sampler and student; it needs --temperature 1")
    if divergence:
        objective_of(args).check(vocabulary)
    if args.divergence == "jsd" and args.beta in (0, 1):
        raise InputError(f"--beta {args.beta}: jsd vanishes there; use --divergence forward_kl or reverse_kl")
    if args.mini_batch and args.prompts_per_step % args.mini_batch:
        sizes = f"{args.mini_batch} must divide --prompts-per-step {args.prompts_per_step}"
        raise InputError(f"--mini-batch {sizes}")
    if args.teacher_url and not re.fullmatch(URL, args.teacher_url):
        raise InputError(f"--teacher-url {args.teacher_url}: expected http://localhost:8000/v1 or similar")
    if args.teacher_url and (args.objective == "sft" or args.outputs == "teacher"):
        raise InputError("--teacher-url: a server scores answers, it does not write them; use --teacher PATH")
    if args.teacher_url and divergence and args.support in ("full", "student_topk"):
        raise InputError(f"--support {args.support} is not for --teacher-url; use teacher_topk or sampled")
    if not args.teacher_url and needs_teacher(args) and args.teacher in ("", *Teacher.KINDS):
        raise InputError(f"--teacher {args.teacher or '(none)'}: expected another model's folder or hub id")


def main(args: Args) -> None:
    # Find every error that needs no weights before loading any.
    tokenizer = load_tokenizer(args.model)
    check(args, len(tokenizer))
    rows = training_rows(args)
    train = tokenize(rows, tokenizer, args)
    if needs_teacher(args) and not args.teacher_url:
        check_teacher(args.model, args.teacher)
    run = start_run(args, tokenizer, train, to_row)
    steps = args.steps or math.ceil(args.epochs * len(train) / args.prompts_per_step)
    own_steps = sum(on_policy(args, step) for step in range(1, steps + 1))
    run.say(
        f"{args.objective}: {len(train)} rows ({len(rows) - len(train)} too long, left out), {steps} steps, "
        f"{own_steps} of them on-policy, of {args.prompts_per_step} prompts x {args.rollouts} on "
        f"{run.world} x {run.device.type}"
    )
    teacher = Served(run, len(tokenizer)) if args.teacher_url else None
    if teacher:
        problem, compared = "", ""
        try:
            compared = teacher.check(stop_ids(args.model), train[0]["prompt_ids"])
        except InputError as error:
            problem = str(error)
        run.agree(problem, InputError)
        run.say(compared)
    if args.dry_run:
        return run.say(f"student and teacher read: {tokenizer.decode(train[0]['prompt_ids'])}")

    student = load_model(args.model, run, args.lora_rank)
    if teacher:
        teacher.vocabulary = len(head_of(student).weight)  # may be padded
    elif needs_teacher(args):
        teacher = Teacher(args.teacher, 0.0, student, run)
    sampler, sampling = make_sampler(run, student), Sampling(args.max_completion_tokens, args.temperature)
    eval_sampling = Sampling(args.max_completion_tokens, args.eval_temperature)
    done = run.start_training(steps, student, None)
    if not done:
        run.log(0, evaluate(run, sampler, student, 0, eval_sampling))

    for step in range(done + 1, steps + 1):
        own = on_policy(args, step)
        each, questions = args.rollouts if own else 1, args.mini_batch or args.prompts_per_step
        asked = step_rows(train, step, args.prompts_per_step, each, args.seed)
        places = run.share(range(len(asked)), each * questions)
        rows = [asked[place] for place in places]

        # 1. Answer: in a share lambda of the steps y ~ student(.|x), from the weights about to be updated;
        #    in the others y is a fixed output.
        with run.timer("generate"):
            prompts, keys = [row["prompt_ids"] for row in rows], [row["rollout_key"] for row in rows]
            if own:
                answers = sampler(student, prompts, keys, (TRAIN_STREAM, step), sampling)
            elif args.outputs == "teacher":  # the same y whenever a row is met
                writer, keys = Sampler(run, teacher.model), [(row["id"], 0) for row in rows]
                answers = writer(teacher.model, prompts, keys, (OUTPUT_STREAM,), sampling)
            else:
                words = [row["completion_ids"] for row in rows]
                answers = [Rollout(ids, [0.0] * len(ids), True) for ids in words]
        samples = []
        for place, row, y in zip(places, rows, answers, strict=True):
            if y.finished or not args.mask_truncated:
                samples.append(Sample(place // each, row["prompt_ids"], y.ids, y.logps))

        # 2. Learn, one optimiser step per mini-batch of prompts.
        lr, totals = learning_rate(step, args), Totals()
        for first in range(0, args.prompts_per_step, questions):
            batch = [s for s in samples if first <= s.q < first + questions]

            # 2a. Count answers and tokens of all ranks before any backward: the denominators.
            n = run.sum(sequences=len(batch), tokens=sum(len(s.y) for s in batch))
            if n["sequences"] == 0:  # true on every rank at once, so none is left waiting
                continue

            # 2b. Distil: both sides score the same y after the same x; the student has a gradient.
            for m, micro in enumerate(micro_batches(run, batch)):
                pairs = [(s.prompt, s.y) for s in micro]
                with run.timer("teacher"):
                    targets = [] if args.objective == "sft" else teacher.targets(pairs)
                with run.timer("student"):
                    h_ND = completion_states(student, pairs)
                    loss, stats, weight_N = gkd_loss(h_ND, head_of(student), targets, micro, n, args)
                    loss.backward()
                fresh = own and first == 0 and args.temperature == 1
                totals.add(loss, stats, weight_N, [p for s in micro for p in s.logps] if fresh else None)
                if step == 1 and first == 0 and m == 0 and micro:
                    explain(run, {"student and teacher read": micro[0].prompt}, micro[0].y, stats)

            # 2c. Step. Gradients are summed over ranks.
            with run.timer("optim"):
                totals.grad_norms.append(optimizer_step(run, lr))

        # 3. Evaluate, report, save.
        metrics = {**totals.metrics(run, answers), "train/lr": lr}
        metrics["distill/on_policy"] = float(own)
        if step % args.eval_every == 0 or step == steps:
            metrics |= evaluate(run, sampler, student, step, eval_sampling)
        if run.end_step(step, metrics):
            return

    save_results(run, student)


# The served teacher: a vLLM server scores the student's answers. Nothing it says is used unchecked.

REQUESTS = 16  # in flight per process
TIMEOUT = 120  # seconds per answer
RETRIES = 6  # after timeouts, lost connections and status 408, 409, 429 and 5xx; the pauses double


class Served:
    """A teacher on a vLLM server: token ids in; log-probs of its top k and of the sent tokens out."""

    def __init__(self, run: Any, vocabulary: int):
        try:
            import openai
        except ImportError as error:
            raise InputError("--teacher-url needs the openai package: pip install openai") from error
        self.run, self.args, self.vocabulary = run, run.args, vocabulary
        policy = self.args.objective == "policy_gradient"
        self.k = 0 if policy or self.args.support == "sampled" else self.args.topk
        self.url, key = self.args.teacher_url.rstrip("/"), os.environ.get("VLLM_API_KEY") or "none"
        self.client = openai.AsyncOpenAI(base_url=self.url, api_key=key, timeout=TIMEOUT, max_retries=RETRIES)
        self.errors = (openai.OpenAIError, TimeoutError, ValueError, LookupError, TypeError)
        self.slots = asyncio.Semaphore(REQUESTS)
        self.loop = asyncio.new_event_loop()  # the client's connections belong to one loop

    def targets(self, pairs: list) -> TopK:
        """What it says of all answers, end to end; a failure on one process ends the run on all."""
        problem, told = "", [TopK(*[torch.zeros(0)] * 3)]
        try:
            told = self.ask(pairs) or told
        except ConnectionError as error:
            problem = f"{error}; rerun the same command with --resume"
        self.run.agree(problem)
        return TopK(*(torch.cat(parts).to(self.run.device) for parts in zip(*told, strict=True)))

    def ask(self, pairs: list) -> list:
        """Score each (prompt, answer). The first request that fails for good cancels the others."""

        async def score_all() -> list:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.score(*pair)) for pair in pairs]
            return [task.result() for task in tasks]

        try:
            return self.loop.run_until_complete(score_all())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def request(self, path: str, *keys: str | int, **body: Any) -> Any:
        """reply[keys[0]][keys[1]]... of the server's JSON reply to a POST, or a ConnectionError."""
        reply, body = None, {"model": self.args.teacher, "temperature": 0, **body}
        try:
            async with self.slots, asyncio.timeout(TIMEOUT * (RETRIES + 1)):  # httpx lets a trickle go on
                reply = await self.client.post(path, cast_to=object, body=body)
            for key in keys:
                reply = reply[key]
            return reply
        except self.errors as error:
            found = error.__cause__ or getattr(error, "body", reply) or ""
            reason = " ".join(f"{type(error).__name__}: {error} {found}".split())[:300]
            text = f"no usable answer from the teacher at {self.url}, {path}: {reason}"
            raise ConnectionError(text) from error

    async def score(self, prompt: list[int], answer: list[int]) -> TopK:
        """One (prompt, answer). Any position of the answer that is not as requested is a ConnectionError."""
        ids, keys = prompt + answer, ("choices", 0, "prompt_logprobs")
        table = await self.request("/completions", *keys, prompt=ids, max_tokens=1, prompt_logprobs=self.k)
        wrong = f"wrong answer from the teacher at {self.url}, nothing was trained on it"
        count = len(table) if isinstance(table, list) else 0
        if count != len(ids):
            raise ConnectionError(f"{wrong}: {len(ids)} tokens were sent, {count} positions came back")
        tops, sent = [], []
        for at, token in enumerate(answer, len(prompt)):
            try:
                top = {int(i): float(told["logprob"]) for i, told in table[at].items()}
                sent.append(top[token])
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                has = f"has no log-prob of the sent token {token}: {str(table[at])[:200]}"
                raise ConnectionError(f"{wrong}: position {at} {has}") from error
            odd = {i: p for i, p in top.items() if not (0 <= i < self.vocabulary and -math.inf < p < 1e-3)}
            if len(top) == self.k + 1 and sent[-1] == min(top.values()):
                del top[token]  # sent, but not among the top k
            if odd or len(top) != self.k or sum(map(math.exp, top.values())) > 1.001:
                has = (
                    f"has {len(top)} log-probs, not those of the {self.k} likeliest: {str(odd or top)[:200]}"
                )
                raise ConnectionError(f"{wrong}: position {at} {has}")
            tops.append(top)
        ids_NK = torch.tensor([list(top) for top in tops], dtype=torch.long)
        logps_NK = torch.tensor([list(top.values()) for top in tops])
        return TopK(ids_NK, logps_NK.clamp(max=0), torch.tensor(sent).clamp(max=0))

    def check(self, stops: list[int], prompt: list[int]) -> str:
        """Compare server and student before a model is loaded. Returns what could be compared."""
        fetch, name, ids = self.loop.run_until_complete, self.args.teacher, list(range(self.vocabulary))
        longest = self.args.max_prompt_tokens + self.args.max_completion_tokens + 1
        filled, decode = (prompt * (longest // len(prompt) + 1))[: longest - 2], self.run.tokenizer.decode
        try:
            self.ask([(prompt, ids[-1:])])
            for stop in stops:  # does the server end an answer where it is forced to say this token?
                forced = {"prompt": filled, "max_tokens": 2, "logit_bias": {str(stop): 100}}
                if fetch(self.request("/completions", "choices", 0, "finish_reason", **forced)) != "stop":
                    token = repr(decode([stop]))
                    raise InputError(f"--teacher {name} does not end answers with {token}, the student does")
        except ConnectionError as error:
            hint = f"is vLLM up, with --max-model-len {longest} and --max-logprobs {max(self.k, 1)}?"
            raise InputError(f"--teacher-url {self.url}: {error}; {hint}") from error
        compared = f"{len(ids)} tokens compared"
        try:
            url = self.url.removesuffix("/v1") + "/detokenize"
            if fetch(self.request(url, "prompt", tokens=ids)) != decode(ids):
                raise InputError(f"--teacher {name} and --model {self.args.model} differ in vocabulary")
        except ConnectionError as error:
            compared = f"tokens not compared ({error})"
        return f"teacher {name} at {self.url}: {compared}, EOS {stops} in common"


if __name__ == "__main__":
    launch(main, Args, PRESETS)
