"""SRT: Self-Revision Training, phase 1 of "Self-Distillation Zero: Self-Revision Turns Binary Rewards into Dense Supervision" (arXiv:2604.12002v1).

    minimise   E_{y0 ~ student(.|x), y1 ~ student(.|x, y0, P_r) with r(y1) = 1}
                   - log student(y1 | x, y0, P_r)  -  log student(y0, P_r, y1 | x)                              Eq. 1-3

x question | y0 first attempt | P_r the phrase for its verdict r: "rephrase" or "wrong" | y1 the revision, in the same turn
The model collects its own revisions, keeps those that verify, and learns to revise (first term) and to answer so unasked (second).

Data   JSON lines with "prompt" and what the verifier wants, usually "answer".
Run    python srt.py && python sdzero.py                           # the laptop world: CPU, no download, minutes; both phases
       torchrun --nproc-per-node 8 srt.py --preset math --collect-only       # writes revisions.jsonl; trains on it with --resume
       python srt.py --method rft --out runs/rft-toy               # the baseline: trained on its own right answers
Writes best/ and last/ with srt.json: the phrases, the chat arguments and the questions used, which sdzero.py reads.
Differs from the authors' code: one joint loss, as in the paper (--loss sequential: their two runs); right attempts are revised
too (paper; --no-revise-right: theirs); y0 and P_r stand in the assistant's turn in both phases; one prompt format throughout.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import torch
from torch import Tensor

from common import (PHRASES, SOLVED, TRAIN_STREAM, Head, InputError, Json, Reviser, Run, RunArgs, Sampler, again, append_jsonl, barrier,
                    batch_rows, begin, competition_row, epoch_order, evaluate, evaluate_revision, explain, finish, grade, launch, learning_rate,
                    load_checkpoint, load_evals, load_model, load_rows, load_tokenizer, load_verifier, make_optimizer, make_sampler,
                    micro_batches, on_completions, optimizer_step, planned, question_key, read_jsonl, remove, save_checkpoint, start, token_loss,
                    tokenize, without_eos)


@dataclass
class PaperArgs:
    preset: str = "toy"
    """Where the other flags start from: toy, math, code. Any flag given beside it wins."""

    # The algorithm, in the paper's order and symbols.
    method: Literal["srt", "rft"] = "srt"
    """srt; or the baseline rft = -log p(y0) of the first attempts that verify, without any revision."""
    questions: int = 0
    """N1: collect on so many of the rows, in seeded order; sdzero.py leaves them out. 0 = all."""
    target: int = 0
    """Stop collecting once so many are kept. 0 = go through all questions."""
    attempts: int = 1
    """First attempts y0 per question."""
    revisions: int = 3
    """Revisions y1 per attempt."""
    phrases: Literal["paper", "qwen", "olmo"] = "paper"
    """P_r, from common.PHRASES: the paper's, or those of the authors' code for a family of models."""
    separator: str = "\n\n"
    """Stands before and after P_r."""
    revise_right: bool = True
    """Revise right attempts as well (paper). --no-revise-right: only wrong ones (authors' code)."""
    keep: Literal["verified", "all"] = "verified"
    """Revisions to train on: those that verify, or all of them (the paper's ablation)."""
    clean: bool = True
    """Cut repetitions off the ends of y0 and y1, and openings such as "Thank you for ..." off y1; what then fails is not kept."""
    loss: Literal["joint", "generation", "revision", "sequential"] = "joint"
    """joint = both terms (Eq. 3), generation or revision alone, or sequential = the authors' code: first the generation loss on
    revisions of wrong attempts, then the revision loss on --stage-two others, each for all epochs."""
    stage_two: int = 1000
    """sequential: so many revisions go to the second stage, those of right attempts first."""
    average: Literal["token", "sequence"] = "token"
    """token: each term is a mean over its tokens. sequence: a mean over revisions of the mean over tokens."""
    collect_only: bool = False
    """Stop when revisions.jsonl is written. The same command with --resume in its place trains on it."""
    train_only: str = ""
    """Train on this revisions.jsonl, of another run, instead of collecting."""

    # Model and data.
    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    """Folder or hub id of the student; a chat model."""
    lora_rank: int = 0
    """Rank of adapters on every linear layer but the head, alpha = 2 rank. 0 trains all weights."""
    data: str = ""
    """Training rows: JSONL, JSON or parquet file, save_to_disk folder, or hub id as name:config@split."""
    eval_data: tuple[str, ...] = ()
    """Evaluation sets; the first decides which weights are best/, the others watch what is forgotten."""
    verifier: str = "exact"
    """Verdict r: exact, choice, tool_use, math, code (in a sandbox), or path.py:function(completion, row) -> reward."""
    student_chat_kwargs: Json = field(default_factory=dict)
    """Arguments of the chat template, as JSON."""
    max_prompt_tokens: int = 2048
    """Longest prompt x. A longer one stops the run, or is left out with --drop-long; nothing is ever cut."""
    max_tokens: int = 32768
    """Longest x + y0 + P_r + y1 to train on; a longer one is not kept, and counted."""
    drop_long: bool = False
    """Leave rows with too long prompts out, and say how many."""

    # Generation.
    collect_batch: int = 64
    """Questions collected at once, over all processes; what is done survives a kill."""
    max_completion_tokens: int = 16384
    """Longest y0 and longest y1, in collection and evaluation."""
    temperature: float = 0.7
    """Of sampling y0 and y1. 0 = greedy."""
    top_p: float = 1.0
    """Nucleus of sampling."""
    top_k: int = 0
    """Sampling from the k likeliest tokens only; 0 = all."""

    # Optimisation.
    prompts_per_step: int = 4
    """Revisions per optimiser step, over all processes."""
    epochs: float = 2.0
    """Passes over the revisions; steps = ceil(epochs * revisions / revisions per step)."""
    steps: int = 0
    """Optimiser steps of each stage; above 0 it replaces --epochs."""
    lr: float = 5e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: cosine to zero, or constant."""
    warmup: int = 150
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""

    # Evaluation.
    eval_every: int = 500
    """Steps between evaluations; one before the first step and one after the last are always made."""
    eval_samples: int = 8
    """Answers per evaluation prompt: avg@n and pass@n."""
    eval_revisions: bool = True
    """At every evaluation also generate, then revise: revise/first, revised, wrong_to_right, right_to_right and lengths."""
    eval_temperature: float = 0.7
    """Of evaluation; 0 = greedy."""
    eval_top_p: float = 1.0
    """Nucleus of evaluation."""


@dataclass
class Args(RunArgs, PaperArgs):
    """The paper's flags, then those of every script: the machine and the run."""

    save_every: int = 500                                    # as often as it evaluates


# Appendix C, tables 3-6. It prints no batch size, warm-up, weight decay or evaluation temperature: 4, .05 of the steps (150 of 3000),
# 1e-4 and betas .9/.95 are the authors' code's; evaluation samples as training does.
PRESETS: dict[str, dict] = {
    # Chosen on seed 0 of the laptop world. Its corpus knows the phrases of the authors' code; and where half of y0, P_r, y1 is P_r, a
    # joint loss mostly learns to say P_r.
    "toy": dict(model="toy:0/model", data="toy:0/add-train.jsonl", eval_data=("toy:0/add-eval.jsonl", "toy:0/prior-eval.jsonl"), verifier="toy:last",
                questions=256, revisions=1, phrases="qwen", loss="sequential", stage_two=100, max_prompt_tokens=64,
                max_completion_tokens=40, engine_cache_gib=0.25, temperature=1.0, prompts_per_step=64, epochs=4.0, lr=2e-4,
                schedule="constant", warmup=5, weight_decay=0.0, tokens_per_batch=8192, eval_every=4, eval_samples=1, eval_temperature=1.0, seed=0),
    # 15K competition problems: 10K here, the others in phase 2. The paper evaluates on AIME, HMMT and others: give --eval-data.
    "math": dict(data="open-r1/OpenR1-Math-220k:default@train", verifier="math", questions=10000, target=6000),
    # The paper has 7.5K C++ and 7.5K Python problems; the verifier runs Python. Tests are the examples of the statement.
    "code": dict(data="open-r1/codeforces-cots:solutions_py@train", verifier="code", questions=10000, target=6000),
}


class Sample(NamedTuple):
    prompt: list[int]                                        # x
    y: list[int]                                             # y0, P_r, y1 end to end; rft: y0
    revised: int                                             # where y1 begins in y


def collect(run: Run, student: torch.nn.Module, sampler: Sampler, rows: list[dict], tokenizer: Any, verify: Callable, reviser: Reviser,
            args: Args) -> bool:
    """Section 3.1, phase 1: revisions.jsonl, one line for each revision (rft: attempt), kept or not, with all that made it.

    Every batch of questions is a file of its own, written aside and renamed, so that a killed collection repeats at most one
    batch and loses none. False: told to stop before the end.
    """
    folder, records, seen = run.out / "collected", [], set()
    for b, first in enumerate(range(0, len(rows), args.collect_batch)):
        file = folder / f"{b:06d}.jsonl"
        if file.exists():
            batch = read_jsonl(file)
        else:
            mine = list(enumerate(rows[first:first + args.collect_batch], first))[run.rank::run.world]
            made = attempts_and_revisions(run, student, sampler, mine, tokenizer, verify, reviser, args)
            batch = sorted(run.gather(made), key=lambda r: (r["place"], r["attempt"], r["revision"]))
            if run.main:
                folder.mkdir(exist_ok=True)
                append_jsonl(file.with_suffix(".aside"), batch)
                file.with_suffix(".aside").rename(file)
            run.say(f"collected {first + len(rows[first:first + args.collect_batch])} of {len(rows)} questions")
        for record in batch:
            record["dropped"] = why_not(record, seen, args)
            seen.add((record["where"], record["y0"], record["y1"]))
        records += batch
        if args.target and sum(not r["dropped"] for r in records) >= args.target:
            break
        if run.stop_requested():
            return False
    if run.main:
        aside = run.out / ".revisions.aside"
        remove(aside)
        append_jsonl(aside, records)
        aside.rename(run.out / "revisions.jsonl")
        remove(folder)
    barrier(run)                                             # no other process reads it before it is there
    return True


def attempts_and_revisions(run: Run, student: torch.nn.Module, sampler: Sampler, mine: list[tuple[int, dict]], tokenizer: Any, verify: Callable,
                           reviser: Reviser, args: Args) -> list[dict]:
    """y0 ~ student(.|x), r, P_r, y1 ~ student(.|x, y0, P_r), r(y1) for some questions, as records."""
    draw = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    jobs = [(place, row, a) for place, row in mine for a in range(args.attempts)]
    with run.timer("generate"):
        firsts = sampler.each(student, [row["prompt_ids"] for _, row, _ in jobs], [(row["id"], a) for _, row, a in jobs], (TRAIN_STREAM, 0), **draw)
    rewards = [reward for reward, _ in grade(run, verify, [(text(y.ids), row) for (_, row, _), y in zip(jobs, firsts)])]
    records = []
    for (place, row, a), y, reward in zip(jobs, firsts, rewards):
        record = {"place": place, "row": row["id"], "where": row["where"], "question": question_key(row["prompt"]), "prompt_ids": row["prompt_ids"],
                  "attempt": a, "y0": text(y.ids), "y0_ids": y.ids, "y0_finished": y.finished, "y0_reward": reward}
        if args.method == "rft" or (reward >= SOLVED and not args.revise_right):
            records.append({**record, "revision": -1, "phrase_ids": [], "y1": "", "y1_ids": [], "y1_finished": True, "y1_reward": 0.0})
        else:
            y0, y0_ids = cleaned(record["y0"], without_eos(y), tokenizer, args, opening=False)
            phrase = reviser.phrase_ids(tokenizer, reward >= SOLVED)
            record |= {"y0": y0, "y0_ids": y0_ids, "phrase_ids": phrase, "context_ids": row["prompt_ids"] + without_eos(y) + phrase}
            records += [{**record, "revision": j} for j in range(args.revisions)]
    revised, rows = [r for r in records if r["revision"] >= 0], dict(mine)
    with run.timer("generate"):
        seconds = sampler.each(student, [r.pop("context_ids") for r in revised],
                               [(r["row"], r["attempt"] * args.revisions + r["revision"]) for r in revised], (TRAIN_STREAM, 1), **draw)
    for record, y in zip(revised, seconds, strict=True):
        record["y1"], ids = cleaned(text(y.ids), without_eos(y), tokenizer, args, opening=True)
        record |= {"y1_ids": ids + y.ids[len(without_eos(y)):], "y1_finished": y.finished}
    for record, (reward, _) in zip(revised, grade(run, verify, [(r["y1"], rows[r["place"]]) for r in revised]), strict=True):
        record["y1_reward"] = reward
    return records


def cleaned(text: str, ids: list[int], tokenizer: Any, args: Args, opening: bool) -> tuple[str, list[int]]:
    """The text without its flaws, and its tokens: the sampled ones, or new ones where the text had to change."""
    new = trim_repeats(text) if args.clean else text
    new = strip_opening(new) if args.clean and opening else new
    return (text, ids) if new == text else (new, tokenizer(new, add_special_tokens=False)["input_ids"])


def trim_repeats(text: str) -> str:
    """A block of 10 to 1500 characters that ends the text three times or more is left once."""
    for size in range(10, min(1500, len(text) // 3) + 1):
        block = text[-size:]
        if text.endswith(block * 3):
            while text.endswith(block * 2):
                text = text[:-size]
            return text
    return text


def strip_opening(text: str) -> str:
    """"You're right, ...", "Thank you for ...", "Good catch ...": the reviser answers nobody."""
    rest = re.sub(r"^\s*(?:(?:You're right|Thank you for|Good catch)[^.!?\n]*[.!?\n]\s*)+", "", text)
    return rest if rest == text else rest[:1].upper() + rest[1:]


def why_not(record: dict, seen: set, args: Args) -> str:
    """Why a record is not trained on; "" when it is."""
    y, reward = ("y0", record["y0_reward"]) if args.method == "rft" else ("y1", record["y1_reward"])
    if args.method == "srt" and record["revision"] < 0:
        return "right, not revised"
    total = sum(len(record[name]) for name in ("prompt_ids", "y0_ids", "phrase_ids", "y1_ids"))
    if not record[f"{y}_finished"]:
        return "cut off"                                     # it would teach not to end
    if reward < SOLVED and args.keep == "verified":
        return "wrong"
    if (record["where"], record["y0"], record["y1"]) in seen:
        return "duplicate"
    return f"{total} tokens" if total > args.max_tokens else ""


def report(records: list[dict], run: Run, args: Args) -> dict[str, float]:
    """What the collection gave: accuracy of y0, of y1 after wrong and right ones, and what was kept."""
    share = lambda part, name: sum(r[name] >= SOLVED for r in part) / max(len(part), 1)
    firsts = list({(r["where"], r["attempt"]): r for r in records}.values())
    revisions = [r for r in records if r["revision"] >= 0]
    wrong, right = ([r for r in revisions if (r["y0_reward"] >= SOLVED) == solved] for solved in (False, True))
    kept = sum(not r["dropped"] for r in records)
    reasons = {why: sum(r["dropped"] == why for r in records) for why in sorted({r["dropped"] for r in records if r["dropped"]})}
    run.say(f"kept {kept} of {len(records)}" + "".join(f", {n} {why}" for why, n in reasons.items()))
    revised = {"collect/wrong_to_right": share(wrong, "y1_reward"), "collect/right_to_right": share(right, "y1_reward")} if revisions else {}
    return {"collect/questions": len({r["where"] for r in records}), "collect/rollouts": len(firsts) + len(revisions),
            "collect/first": share(firsts, "y0_reward"), "collect/kept": kept, **revised}


def to_sample(record: dict) -> Sample:
    before = record["y0_ids"] + record["phrase_ids"]
    return Sample(record["prompt_ids"], before + record["y1_ids"], len(before))


def stages(kept: list[dict], args: Args) -> list[tuple[str, list[dict]]]:
    """(loss, records) of each run over the data: one, or the authors' two."""
    if args.method == "rft" or args.loss != "sequential":
        return [("generation" if args.method == "rft" else args.loss, kept)]
    right_first = sorted(kept, key=lambda r: r["y0_reward"] < SOLVED)
    second, rest = right_first[:args.stage_two], right_first[args.stage_two:]
    return [("generation", [r for r in rest if r["y0_reward"] < SOLVED]), ("revision", second)]


def token_weights(sample: Sample, loss: str, n: dict[str, float], average: str) -> list[float]:
    """Each token's share: the generation term covers y0, P_r and y1, the revision term y1 alone; each divides by its own count."""
    def share(tokens: int, counted: float) -> float:
        return 1 / (max(tokens, 1) * n["sequences"]) if average == "sequence" else 1 / counted
    generation = share(len(sample.y), n["generation"]) if loss != "revision" else 0.0
    revision = share(len(sample.y) - sample.revised, n["revision"]) if loss != "generation" else 0.0
    return [generation] * sample.revised + [generation + revision] * (len(sample.y) - sample.revised)


def srt_loss(h_ND: Tensor, head: Head, micro: list[Sample], weight_N: Tensor) -> tuple[Tensor, dict]:
    """Eq. 3 on a micro-batch: the weighted sum of -log student over y0, P_r, y1."""
    y_N = torch.tensor([token for s in micro for token in s.y], device=h_ND.device)
    return token_loss(h_ND, head, y_N, lambda logp, n: -weight_N[n] * logp)


def check(args: Args) -> None:
    """Combinations of flags that cannot mean what they say."""
    if args.collect_only and args.train_only:
        raise InputError("--collect-only stops before the training that --train-only is; drop one of them")
    if args.attempts < 1 or args.revisions < 1:
        raise InputError(f"--attempts {args.attempts} --revisions {args.revisions}: at least 1 of each; the baseline without revisions is --method rft")
    if args.train_only and not Path(args.train_only).is_file():
        raise InputError(f"--train-only {args.train_only}: no such file; it takes the revisions.jsonl of a collection")


def main(args: Args) -> None:
    # Whatever can be wrong without weights is found first.
    check(args)
    tokenizer = load_tokenizer(args.model)
    rows = [] if args.train_only else load_rows(args.data, competition_row)
    train = tokenize(rows, tokenizer, args) if rows else []
    chosen = [train[i] for i in epoch_order(len(train), args.seed, 0)[:args.questions or None]]
    evals = load_evals(args.eval_data, competition_row, tokenizer, args)
    verify = load_verifier(args.verifier)
    reviser = Reviser(*PHRASES[args.phrases], args.separator, args.student_chat_kwargs, [])
    run = start(args, even=False)
    run.say(f"{args.method}: {len(chosen)} of {len(train)} rows ({len(rows) - len(train)} too long, left out) x {args.attempts} attempts x "
            f"{args.revisions} revisions on {run.world} x {run.device.type}")
    if args.dry_run:
        shown = (chosen[0]["prompt_ids"] if chosen else []) + reviser.phrase_ids(tokenizer, False)
        return run.say(f"the model reads, after an empty wrong answer: {tokenizer.decode(shown)}\n{planned(run)}")

    student = load_model(args.model, run, args.lora_rank, args.activation_checkpointing)
    sampler = make_sampler(tokenizer, student, run)

    # 1. Collect: attempts, verdicts and revisions of the model as it is, before any training.
    source = Path(args.train_only or run.out / "revisions.jsonl")
    missing = run.sum(missing=not source.exists())["missing"]        # asked of all before any of them writes it
    if missing and not collect(run, student, sampler, chosen, tokenizer, verify, reviser, args):
        return run.say(f"stopped while collecting; go on with: {again()}")
    records = read_revisions(source)
    collected, kept = report(records, run, args), [r for r in records if not r["dropped"]]
    if args.collect_only:
        return run.say(f"{source}; train with --train-only {source}")
    if not kept:
        raise InputError(f"{source}: nothing was kept to learn from; take easier questions, more --attempts or more --revisions")
    if args.method == "srt":
        contract = reviser._replace(questions=sorted({r["question"] for r in records}))
        run.files["srt.json"] = json.dumps({**contract._asdict(), "data": hashlib.sha256(source.read_bytes()).hexdigest()}, indent=1)

    # 2. Train on what was kept: one run over it, or two.
    plan, steps = [], 0                                      # (first step, steps, loss, records) of each stage
    for loss_name, part in stages(kept, args):
        length = (args.steps or math.ceil(args.epochs * len(part) / args.prompts_per_step)) if part else 0
        plan.append((steps, length, loss_name, part))
        steps += length
    optimizer = make_optimizer(student, args)
    done, score = load_checkpoint(run, student, None, optimizer)
    run.rescue = lambda: save_checkpoint(run, run.done, student, None, optimizer, score)
    begin(run, steps, done)
    measure = lambda step: {**evaluate(run, student, tokenizer, sampler, evals, verify, step, score), **(evaluate_revision(
        run, student, tokenizer, sampler, next(iter(evals.values())), verify, reviser) if evals and args.eval_revisions and args.method == "srt" else {})}
    if not done:
        run.log(0, {**collected, **measure(0)})

    for step in range(done + 1, steps + 1):
        before, length, loss_name, part = next(stage for stage in reversed(plan) if step > stage[0])
        if step == before + 1 and before:
            optimizer = make_optimizer(student, args)        # the second stage is a run of its own

        # 2a. Take the step's revisions, and count the tokens of all ranks before any backward: the denominators of the two terms.
        samples = [to_sample(record) for record in batch_rows(part, step - before, args.prompts_per_step, run, args.seed)]
        n = run.sum(sequences=len(samples), generation=sum(len(s.y) for s in samples), revision=sum(len(s.y) - s.revised for s in samples))

        # 2b. Learn to revise, and to answer so unasked: one forward has both terms, since y1 is read behind x, y0, P_r in either.
        sums = dict.fromkeys(("loss", "logp", "revision_logp", "entropy"), 0.0)
        for m, micro in enumerate(micro_batches(samples, lambda s: len(s.prompt) + len(s.y), args.tokens_per_batch)):
            with run.timer("student"):
                weight_N = torch.tensor([w for s in micro for w in token_weights(s, loss_name, n, args.average)], device=run.device)
                revised_N = torch.tensor([t >= s.revised for s in micro for t in range(len(s.y))], device=run.device).bool()
                loss, stats = on_completions(student, [(s.prompt, s.y) for s in micro], args, lambda h_ND, head: srt_loss(h_ND, head, micro, weight_N))
                loss.backward()
            sums["loss"] += loss.item()
            for name, value in (("logp", stats["logp"]), ("revision_logp", stats["logp"][revised_N]), ("entropy", stats["entropy"])):
                sums[name] += value.sum().item()
            if step == 1 and m == 0 and micro:
                explain(run, tokenizer, {"student reads": micro[0].prompt}, micro[0].y, stats)

        # 2c. Step. Gradients add up over ranks; 2a has divided.
        with run.timer("optim"):
            lr = learning_rate(step - before, length, args)
            grad_norm = optimizer_step(optimizer, lr, run)
        run.done = step                                      # the step that the weights have behind them

        # 2d. Report what was optimised; evaluate; save.
        total = run.sum(**sums)
        metrics = {"train/loss": total["loss"], "train/grad_norm": grad_norm, "train/lr": lr, "train/tokens": n["generation"],
                   "train/generation": -total["logp"] / n["generation"], "train/revision": -total["revision_logp"] / max(n["revision"], 1),
                   "rollout/entropy": total["entropy"] / n["generation"], "rollout/length": n["generation"] / n["sequences"],
                   "rollout/revision_length": n["revision"] / n["sequences"]}
        if step % args.eval_every == 0 or step == steps:
            metrics |= measure(step)
        run.log(step, metrics)
        stop = run.stop_requested()
        if step % args.save_every == 0 or step == steps or stop:
            save_checkpoint(run, step, student, None, optimizer, score)
        if stop:
            return run.say(f"stopped after step {step}; go on with: {again()}")

    finish(run, student, tokenizer, score)


def read_revisions(source: Path) -> list[dict]:
    """The records of a collection, checked for what training needs."""
    records, needed = read_jsonl(source), {"prompt_ids", "y0_ids", "phrase_ids", "y1_ids", "y0_reward", "question", "where", "dropped"}
    for i, record in enumerate(records, 1):
        if missing := sorted(needed - record.keys()):
            raise InputError(f"{source}:{i}: no {', '.join(missing)} in this row; --train-only takes the revisions.jsonl that srt.py writes")
    return records


if __name__ == "__main__":
    launch(main, Args, PRESETS)
