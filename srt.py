"""SRT: Self-Revision Training, phase 1 of SD-Zero ("Self-Distillation Zero", arXiv:2604.12002v1).

    minimise   E_{y0 ~ student(.|x), y1 ~ student(.|x, y0, P_r) with r(y1) = 1}
                   - log student(y1 | x, y0, P_r)  -  log student(y0, P_r, y1 | x)                   Eq. 1-3

x question | y0 first attempt | P_r the phrase for its verdict r | y1 the revision, in the same assistant turn
The model learns from its own verified revisions: to revise (first term), and to answer so unasked (second).

Data   JSON lines with "prompt" and what the verifier reads; OpenR1-Math, DeepScaleR, codeforces-cots rows.
Run    python srt.py && python sdzero.py     # the laptop world, both phases: CPU, no download, minutes
       python srt.py --preset smol && python sdzero.py --preset smol    # a pretrained model of 135M
       torchrun --nproc-per-node 8 srt.py --preset math --collect-only  # with --resume instead: trains on it
       python srt.py --method rft --out runs/rft-toy    # the baseline: trained on its own right answers
Writes best/ and last/ with srt.json (phrases, chat arguments, questions used), which sdzero.py reads.
Differs from the paper: 10K of all OpenR1-Math rows, proofs included, stand for its 15K competition problems;
warm-up, batch and weight decay, which it does not print, are the code's. From the authors' code: one joint
loss (paper; --preset math-sequential: their two runs); right attempts are revised too (paper); y0 and P_r
always stand in the assistant's turn; no nucleus, no stop string "Question:"; no cut-off revision is kept.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common import (
    PHRASES,
    SOLVED,
    TRAIN_STREAM,
    InputError,
    Json,
    Reviser,
    Rollout,
    RunArgs,
    Sampling,
    as_messages,
    completion_states,
    evaluate,
    explain,
    head_of,
    launch,
    learning_rate,
    load_model,
    load_rows,
    load_tokenizer,
    make_optimizer,
    make_sampler,
    micro_batches,
    optimizer_step,
    question_key,
    read_jsonl,
    revise,
    save_results,
    start_run,
    step_rows,
    token_logps,
    tokenize,
)


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Named set of defaults: toy, smol, math, math-sequential, code. Explicit flags override it."""

    # The algorithm, in the paper's order and symbols.
    method: Literal["srt", "rft"] = "srt"
    """srt, or the baseline rft = -log p(y0) of the first attempts that verify, without any revision."""
    questions: int = 0
    """N1: collect on this many rows, in seeded order; sdzero.py leaves them out. 0 is all rows."""
    target: int = 0
    """Stop collecting once this many records are kept; 0 goes through all questions."""
    attempts: int = 1
    """First attempts y0 per question."""
    revisions: int = 3
    """Revisions y1 per attempt."""
    phrases: Literal["paper", "qwen", "olmo"] = "paper"
    """P_r: the paper's, or those of the authors' code for a family of models."""
    revise_right: bool = True
    """Revise right attempts as well (paper). --no-revise-right: only wrong ones (authors' code)."""
    keep: Literal["verified", "all"] = "verified"
    """Revisions to train on: those that verify, or all that ended by themselves (the paper's ablation)."""
    loss: Literal["joint", "generation", "revision", "sequential"] = "joint"
    """joint = both terms (Eq. 3), one of them, or sequential = the authors' code: the generation loss on
    revisions of wrong attempts, then the revision loss on --stage-two others, each for all epochs."""
    stage_two: int = 1000
    """sequential: number of revisions in the second stage, those of right attempts first."""
    collect_only: bool = False
    """Stop when revisions.jsonl is written. The same command with --resume in its place trains on it, and so
    does another run with it as --data."""

    # Model and data.
    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    """Folder or hub id of the student, a chat model."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank; 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split. The
    revisions.jsonl of another run is trained on as it is."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others show what is forgotten."""
    verifier: str = "exact"
    """Verdict r: exact, choice, tool_use, math, code, or path.py:function(completion, row) -> reward."""
    chat_kwargs: Json = field(default_factory=dict)
    """Arguments of the chat template, as JSON: '{"enable_thinking": false}'."""
    max_prompt_tokens: int = 2048
    """Longest prompt x; rows with longer ones are left out and counted."""
    max_tokens: int = 32768
    """Longest x + y0 + P_r + y1 to train on; a longer one is not kept, and counted."""

    # Generation.
    collect_batch: int = 64
    """Questions collected at once, over all processes; finished batches survive a kill."""
    max_completion_tokens: int = 16384
    """Longest y0 and longest y1."""
    eval_max_tokens: int = 0
    """Longest answer in evaluation (paper: 32K); 0 is --max-completion-tokens."""
    temperature: float = 0.7
    """Sampling temperature of y0 and y1; 0 is greedy."""

    # Optimisation.
    prompts_per_step: int = 4
    """Revisions per optimiser step, over all processes."""
    epochs: float = 2.0
    """Passes over the revisions; steps = ceil(epochs * revisions / revisions per step)."""
    steps: int = 0
    """Optimiser steps of each stage; above 0 it replaces --epochs."""
    lr: float = 5e-6
    """Peak AdamW learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: cosine to zero, or constant."""
    warmup: float = 0.05
    """Linear warm-up: a share of each stage's steps, or from 1 on a number of steps."""
    weight_decay: float = 1e-4
    """AdamW weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""

    # Evaluation.
    eval_every: int = 500
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

    save_every: int = 500  # as often as it evaluates


# Appendix C, tables 3-6. It prints no batch size, warm-up, weight decay or evaluation temperature: 4, 0.05 of
# the steps, 1e-4 and betas 0.9, 0.95 are those of the authors' code; evaluation samples as training does.
PRESETS: dict[str, dict] = {
    # Chosen on seed 0 of the laptop world. Its corpus knows the phrases of the authors' code. Half of its
    # y0, P_r, y1 is P_r, so a joint loss mostly learns to say P_r.
    "toy": dict(
        model="toy:0/model",
        data="toy:0/add-train.jsonl",
        eval_data=("toy:0/add-eval.jsonl", "toy:0/prior-eval.jsonl"),
        verifier="toy:last",
        questions=256,
        revisions=1,
        phrases="qwen",
        loss="sequential",
        stage_two=100,
        max_prompt_tokens=64,
        max_completion_tokens=40,
        engine_cache_gib=0.25,
        temperature=1.0,
        prompts_per_step=64,
        epochs=4.0,
        lr=2e-4,
        schedule="constant",
        warmup=5,
        weight_decay=0.0,
        tokens_per_batch=8192,
        eval_every=4,
        eval_samples=1,
        eval_temperature=1.0,
        seed=0,
    ),
    # Chosen on seed 0 of tests/smol.py. The generation loss teaches y0, P_r, y1 as one answer, and 14 tokens
    # have no room for it.
    "smol": dict(
        model="smol:model",
        data="smol:quick-train.jsonl",
        eval_data=("smol:quick-eval.jsonl", "smol:prior-eval.jsonl"),
        verifier="smol:grade",
        questions=105,
        attempts=4,
        revisions=2,
        phrases="qwen",
        loss="revision",
        max_prompt_tokens=128,
        max_completion_tokens=14,
        engine_cache_gib=0.5,
        temperature=1.0,
        prompts_per_step=16,
        epochs=3.0,
        lr=2e-5,
        schedule="constant",
        warmup=2,
        weight_decay=0.0,
        dtype="bfloat16",
        tokens_per_batch=1024,
        eval_every=1000,
        eval_samples=1,
        eval_temperature=1.0,
        save_every=1000,
        seed=0,
    ),
    # 15K competition problems: 10K here, the others in phase 2. The paper also evaluates on
    # MathArena/aime_2025@train, MathArena/hmmt_feb_2025@train, HuggingFaceH4/MATH-500@test, AMO-Bench and 500
    # held-out problems: give --eval-data.
    "math": dict(
        data="open-r1/OpenR1-Math-220k:default@train",
        eval_data=("HuggingFaceH4/aime_2024@train",),
        verifier="math",
        questions=10000,
        target=6000,
        eval_max_tokens=32768,
    ),
    # The authors' code: two runs of three epochs each, on revisions of wrong attempts first.
    "math-sequential": dict(
        data="open-r1/OpenR1-Math-220k:default@train",
        eval_data=("HuggingFaceH4/aime_2024@train",),
        verifier="math",
        target=6000,
        attempts=3,
        phrases="qwen",
        revise_right=False,
        loss="sequential",
        epochs=3.0,
        temperature=1.0,
        eval_max_tokens=32768,
    ),
    # The paper has 7.5K C++ and 7.5K Python problems; the verifier runs Python, on the statement's examples.
    # It evaluates on 500 held-out problems and LiveCodeBench: give --eval-data, rows of "prompt" and "tests".
    "code": dict(
        data="open-r1/codeforces-cots:solutions_py@train",
        verifier="code",
        questions=10000,
        target=6000,
        eval_max_tokens=32768,
    ),
}


class Sample(NamedTuple):
    prompt: list  # x
    y: list  # y0, P_r, y1 end to end; rft: y0
    revision: int  # length of y1


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


def to_training_row(raw: dict, reviser: Reviser, tokenizer: Any) -> dict:
    """A question, or a collected record, which must have our phrases, chat arguments and tokenizer."""
    if "reviser" not in raw:
        return competition_row(raw)
    if raw["reviser"] != reviser._asdict():
        told = f"collected with {raw['reviser']}, not {reviser._asdict()}"
        raise ValueError(f"{told}; use the same --phrases and --chat-kwargs")
    if raw["phrase_ids"] not in ([], reviser.phrase_ids(tokenizer, raw["y0_reward"] >= SOLVED)):
        raise ValueError("collected with another tokenizer than that of --model")
    return raw


def collect(run: Any, sampler: Any, student: Any, asked: list, reviser: Reviser) -> list | None:
    """Section 3.1, phase 1: the records of revisions.jsonl, one per revision (rft: attempt), kept or not.

    Every batch is at first a file of its own: a killed collection repeats at most one. None after a signal.
    """
    args, final, folder = run.args, run.out / "revisions.jsonl", run.out / "collected"
    if not run.sum(missing=not final.exists())["missing"]:  # of any rank, before one of them writes it
        return read_jsonl(final)
    records, seen, per_batch = [], set(), args.collect_batch * args.attempts
    for first in range(0, len(asked), per_batch):
        part, file = asked[first : first + per_batch], folder / f"{first:08d}.jsonl"
        if not file.exists():
            made = attempts_and_revisions(run, sampler, student, run.share(part), reviser)
            write_whole(run, file, run.gather(made))
            run.say(f"collected {first + len(part)} of {len(asked)} attempts")
        for record in read_jsonl(file):
            record["dropped"] = why_not(record, seen, args)
            seen.add((record["where"], record["y0"], record["y1"]))
            records.append(record)
        if args.target and sum(not record["dropped"] for record in records) >= args.target:
            break
        if run.sum(stop=run.stopped)["stop"]:
            return run.say("Stopped while collecting. To continue, rerun the same command with --resume.")
    write_whole(run, final, records)
    if run.main:
        shutil.rmtree(folder)
    return records


def write_whole(run: Any, file: Path, records: list) -> None:
    """Writes the file aside and renames it: it is there with all its lines, or not at all."""
    with run.writing(str(file)):
        if run.main:
            file.parent.mkdir(exist_ok=True)
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            file.with_suffix(".aside").write_text("".join(lines), encoding="utf-8")
            file.with_suffix(".aside").rename(file)


def attempts_and_revisions(run: Any, sampler: Any, student: Any, rows: list, reviser: Reviser) -> list:
    """y0 ~ student(.|x), r, P_r, y1 ~ student(.|x, y0, P_r), r(y1), as records; each row is one attempt."""
    args, sampling = run.args, Sampling(run.args.max_completion_tokens, run.args.temperature)
    with run.timer("generate"):
        prompts, keys = [row["prompt_ids"] for row in rows], [row["rollout_key"] for row in rows]
        firsts = sampler(student, prompts, keys, (TRAIN_STREAM, 0), sampling)
    records, revised = [], []
    for row, y, (reward, _) in zip(rows, firsts, run.grade(rows, firsts), strict=True):
        record = {name: row[name] for name in ("id", "where", "prompt_ids")}
        record |= {"question": question_key(row["prompt"]), "attempt": row["rollout_key"][1]}
        record |= {"y0": run.text(y), "y0_ids": y.ids, "y0_finished": y.finished, "y0_reward": reward}
        record |= {"reviser": reviser._asdict(), "revision": -1, "phrase_ids": [], "y1": "", "y1_ids": []}
        if args.method == "rft" or (reward >= SOLVED and not args.revise_right):
            records.append(record)
            continue
        clean, phrase = cleaned(run, y, False), reviser.phrase_ids(run.tokenizer, reward >= SOLVED)
        record |= {"y0": run.text(clean), "y0_ids": clean.without_eos(), "phrase_ids": phrase}
        records += [{**record, "revision": j} for j in range(args.revisions)]
        revised += [(row, y, r) for r in records[-args.revisions :]]
    with run.timer("generate"):
        contexts = [row["prompt_ids"] + y.without_eos() + r["phrase_ids"] for row, y, r in revised]
        keys = [(r["id"], r["attempt"] * args.revisions + r["revision"]) for _, _, r in revised]
        drawn = sampler(student, contexts, keys, (TRAIN_STREAM, 1), sampling)
    seconds = [cleaned(run, y, True) for y in drawn]
    verdicts = run.grade([row for row, _, _ in revised], seconds)
    for (_, _, record), y, (reward, _) in zip(revised, seconds, verdicts, strict=True):
        record |= {"y1": run.text(y), "y1_ids": y.ids, "y1_finished": y.finished, "y1_reward": reward}
    return records


def cleaned(run: Any, y: Rollout, revision: bool) -> Rollout:
    """The answer as the authors clean it; where there is nothing to clean its tokens stay the sampled ones.

    A block of 10 to 1500 characters that ends the text three times or more is left once (read backwards: the
    shortest one). A revision loses a chatty opening: nobody spoke to the reviser.
    """
    text = re.sub(r"^(.{10,1500}?)\1{2,}", r"\1", run.text(y)[::-1], flags=re.DOTALL)[::-1]
    opening = re.match(r"\s*(?:(?:You're right|Thank you for|Good catch)[^.!?\n]*[.!?\n]\s*)+", text)
    if revision and opening:
        text = text[opening.end() :]
        text = text[:1].upper() + text[1:]
    if text == run.text(y):
        return y
    words = run.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return y._replace(ids=words + y.ids[len(y.without_eos()) :])


def why_not(record: dict, seen: set, args: Args) -> str:
    """Why a record is not trained on; "" if it is."""
    if args.method == "srt" and record["revision"] < 0:
        return "right, not revised"
    y = "y0" if args.method == "rft" else "y1"
    if not record[f"{y}_finished"]:
        return "cut off"  # it would teach not to end
    if record[f"{y}_reward"] < SOLVED and args.keep == "verified":
        return "wrong"
    if (record["where"], record["y0"], record["y1"]) in seen:
        return "duplicate"
    total = sum(len(record[name]) for name in ("prompt_ids", "y0_ids", "phrase_ids", "y1_ids"))
    return f"{total} tokens" if total > args.max_tokens else ""


def schedule(kept: list, args: Args) -> list:
    """(loss, records, step of its run, steps of its run) of every step: one run over the data, or two."""
    runs = [(args.loss if args.method == "srt" else "generation", kept)]
    if runs[0][0] == "sequential":
        right_first = sorted(kept, key=lambda r: r["y0_reward"] < SOLVED)
        rest = [r for r in right_first[args.stage_two :] if r["y0_reward"] < SOLVED]
        runs = [("generation", rest), ("revision", right_first[: args.stage_two])]
    plan = []
    for loss, records in runs:
        steps = args.steps or math.ceil(args.epochs * len(records) / args.prompts_per_step)
        plan += [(loss, records, step, steps) for step in range(1, steps + 1) if records]
    return plan


def srt_loss(h_ND: Tensor, head: Any, micro: list, n: dict, loss: str) -> tuple:
    """Eq. 3 on a micro-batch: (loss, statistics of each token).

    The generation term is a mean over y0, P_r and y1 of the step, the revision term a mean over y1.
    """
    y_N = torch.tensor([token for s in micro for token in s.y], dtype=torch.long, device=h_ND.device)
    revised = [t >= len(s.y) - s.revision for s in micro for t in range(len(s.y))]
    revised_N = torch.tensor(revised, dtype=torch.float32, device=h_ND.device)
    generation = (loss != "revision") / n["generation"]
    weight_N = generation + (loss != "generation") / max(n["revision"], 1) * revised_N
    logp_N, entropy_N = token_logps(h_ND, head, y_N)
    stats = {"logp": logp_N.detach(), "entropy": entropy_N, "revision_logp": revised_N * logp_N.detach()}
    return -(weight_N * logp_N).sum(), stats


def main(args: Args) -> None:
    # Find every error that needs no weights before loading any.
    tokenizer, reviser = load_tokenizer(args.model), Reviser(*PHRASES[args.phrases], args.chat_kwargs, [])
    rows = load_rows(args.data, partial(to_training_row, reviser=reviser, tokenizer=tokenizer))
    collected = all("reviser" in row for row in rows)
    if collected:
        if args.collect_only:
            raise InputError(f"--collect-only: {args.data} holds collected records already; leave it out")
        if any((row["revision"] < 0) != (args.method == "rft") for row in rows if not row["dropped"]):
            raise InputError(f"--data {args.data}: collected with another --method than {args.method}")
        asked, what = rows, f"{len(rows)} collected records"
    else:
        train = tokenize(rows, tokenizer, args)
        questions = min(args.questions or len(train), len(train))
        asked = step_rows(train, 1, questions, args.attempts, args.seed)
        what = f"{questions} of {len(rows)} rows ({len(rows) - len(train)} too long, left out)"
    run = start_run(args, tokenizer, asked, competition_row, graded=not collected)
    run.say(f"{args.method}: {what} on {run.world} x {run.device.type}")
    if args.dry_run:
        shown = asked[0]["prompt_ids"] + reviser.phrase_ids(tokenizer, False)
        return run.say(f"the model reads, after an empty wrong answer: {tokenizer.decode(shown)}")

    # 1. Collect: attempts, verdicts and revisions of the model as it is, before any training.
    student = load_model(args.model, run, args.lora_rank)
    sampler = make_sampler(run, student)
    records = rows if collected else collect(run, sampler, student, asked, reviser)
    if records is None:
        return
    kept, reasons = [r for r in records if not r["dropped"]], [r["dropped"] for r in records]
    run.say(", ".join(f"{reasons.count(why)} {why or 'kept'}" for why in sorted({"", *reasons})))
    if args.collect_only:
        return run.say(f"to train on {run.out}/revisions.jsonl: --resume here, or --data in another run")
    if not kept:
        raise InputError(f"--data {args.data}: no record was kept; use easier questions or more --revisions")
    if args.method == "srt":
        contract = reviser._replace(questions=sorted({r["question"] for r in records}))
        run.files["srt.json"] = json.dumps(contract._asdict(), indent=1)

    # 2. Train on what was kept: one run over it, or two.
    plan = schedule(kept, args)
    steps = len(plan)
    eval_tokens = args.eval_max_tokens or args.max_completion_tokens
    eval_sampling = Sampling(eval_tokens, args.eval_temperature, args.eval_top_p)
    done = run.start_training(steps, student, None)
    if not done:
        metrics = evaluate(run, sampler, student, 0, eval_sampling)
        metrics |= revise(run, sampler, student, eval_sampling, reviser)
        attempts = [r["attempt"] for r in records if r["revision"] < 1]
        metrics["collect/questions"] = attempts.count(0)
        metrics["collect/rollouts"] = len(attempts) + sum(r["revision"] >= 0 for r in records)
        metrics["collect/kept"] = len(kept)
        run.log(0, metrics)

    for step in range(done + 1, steps + 1):
        loss_name, part, at, length = plan[step - 1]
        if at == 1 and step > 1:
            run.optimizer = make_optimizer(student, args)  # the second run is one of its own

        # 2a. Take the step's revisions; count the tokens of all ranks before any backward: the denominators.
        rows = run.share(step_rows(part, at, args.prompts_per_step, 1, args.seed))
        ys = [r["y0_ids"] + r["phrase_ids"] + r["y1_ids"] for r in rows]
        samples = [Sample(r["prompt_ids"], y, len(r["y1_ids"])) for r, y in zip(rows, ys, strict=True)]
        n = run.sum(rows=len(rows), generation=sum(map(len, ys)), revision=sum(s.revision for s in samples))

        # 2b. Learn to revise, and to answer so unasked: in both terms y1 follows x, y0, P_r.
        sums = dict.fromkeys(("loss", "logp", "revision_logp", "entropy"), 0.0)
        for m, micro in enumerate(micro_batches(run, samples)):
            with run.timer("student"):
                h_ND = completion_states(student, [(s.prompt, s.y) for s in micro])
                loss, stats = srt_loss(h_ND, head_of(student), micro, n, loss_name)
                loss.backward()
            sums["loss"] += loss.item()
            for name, values_N in stats.items():
                sums[name] += values_N.sum().item()
            if step == 1 and m == 0 and micro:
                explain(run, {"student reads": micro[0].prompt}, micro[0].y, stats)

        # 2c. Step. Gradients are summed over ranks.
        warm = replace(args, warmup=args.warmup if args.warmup >= 1 else args.warmup * length)
        lr = learning_rate(at, warm, length if args.schedule == "cosine" else 0)
        with run.timer("optim"):
            grad_norm = optimizer_step(run, lr)

        # 2d. Evaluate, report, save.
        n |= run.sum(**sums)
        metrics = {"train/loss": n["loss"], "train/grad_norm": grad_norm, "train/lr": lr}
        metrics["train/tokens"] = n["generation"]
        metrics["train/generation"] = -n["logp"] / n["generation"]
        metrics["train/revision"] = -n["revision_logp"] / max(n["revision"], 1)
        metrics["rollout/entropy"] = n["entropy"] / n["generation"]
        metrics["rollout/length"] = n["generation"] / n["rows"]
        metrics["rollout/revision_length"] = n["revision"] / n["rows"]
        if step % args.eval_every == 0 or step == steps:
            metrics |= evaluate(run, sampler, student, step, eval_sampling)
            metrics |= revise(run, sampler, student, eval_sampling, reviser)
        if run.end_step(step, metrics):
            return

    save_results(run, student)


if __name__ == "__main__":
    launch(main, Args, PRESETS)
