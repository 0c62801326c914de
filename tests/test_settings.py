"""Whose value each preset takes: the paper's, the authors' code's, TRL 1.16's default, ours.

    python tests/test_settings.py > table.md                # the tables of tests/README.md

The column `ours` is read from the presets; the others are facts. A word in brackets behind ours says which of
them it is; the test holds it to that.
"""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import common

PAGE = Path(__file__).parent / "README.md"


class Row(NamedTuple):
    name: str
    flags: str  # whose values make up ours, with " / " between them
    paper: str
    code: str
    trl: str
    whose: str  # paper, code, or own: a choice that the docstring or PRESETS explains


NONE = "–"
TABLES: dict[tuple[str, str], list[Row]] = {
    ("sdft", "tooluse"): [
        Row("student", "model", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", NONE, "paper"),
        Row(
            "divergence",
            "divergence",
            "reverse_kl in Eq. 1; all results were run with forward_kl",
            "forward_kl",
            "jsd ½",
            "code",
        ),
        Row("support", "support", "full", "full", "student's top 100, renormalised", "paper"),
        Row("first tokens without loss", "skip_tokens", "the first few", "3", "0", "code"),
        Row(
            "importance ratio",
            "is_cap",
            "optional",
            "2 (cap), averaged over the answer",
            "2 (cap), per token",
            "code",
        ),
        Row(
            "teacher, rate",
            "teacher / ema_rate",
            "ema, .01 .02 .05 tried",
            "ema / 0.01, in bf16",
            "base",
            "code",
        ),
        Row(
            "prompts, answers each",
            "prompts_per_step / rollouts",
            "16 32 64 tried, 1",
            "32 / 1 (until March 2026: 8 answers)",
            "8 answers",
            "code",
        ),
        Row("learning rate", "lr", "5e-6 1e-5 5e-5 tried", "5e-5, bf16 weights", "", "paper"),
        Row("schedule, warm-up steps", "schedule / warmup", "cosine / 10", "cosine, a tenth", "", "paper"),
        Row("epochs", "epochs", "1 2 tried", "2", "", "paper"),
        Row("weight decay", "weight_decay", "0", "0", "", "paper"),
        Row("AdamW betas", "adam_betas", NONE, "0.9 / 0.999", "", "code"),
        Row("longest prompt", "max_prompt_tokens", NONE, "1024, cut", "512, cut", "code"),
        Row("longest answer", "max_completion_tokens", "2048", "1024", "256", "paper"),
        Row("evaluation temperature", "eval_temperature", "0", "0", "", "paper"),
    ],
    ("sdpo", "sciknoweval"): [
        Row("student", "model", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B", NONE, "paper"),
        Row("divergence", "divergence", "jsd", "jsd, ½", "sampled token, reverse KL", "paper"),
        Row(
            "support",
            "support / topk",
            "student_topk / 100",
            "student_topk / 100, with a tail",
            "sampled token",
            "paper",
        ),
        Row("average", "average", "token", "sequence", "sequence", "code"),
        Row("importance ratio: cap, per token", "is_cap", "2", "2", NONE, "paper"),
        Row(
            "teacher, rate",
            "teacher / ema_rate",
            "ema / 0.05, once per batch",
            "ema / 0.05, once per batch",
            "ema, .05, every optimiser step",
            "paper",
        ),
        Row("what the teacher reads", "hindsight", "solution", "solution", "solution", "paper"),
        Row("questions, attempts", "prompts_per_step / rollouts", "32 / 8", "32 / 8", "", "paper"),
        Row("questions an optimiser step (0: all)", "mini_batch", "all: 0 or 32", "32", "", "paper"),
        Row("learning rate, then constant, warm-up", "lr / warmup", "1e-5 / 10", "1e-5 / 10", "", "paper"),
        Row("weight decay", "weight_decay", "0.01", "0.01", "", "paper"),
        Row("AdamW betas", "adam_betas", NONE, "0.9 / 0.999", "", "code"),
        Row(
            "longest prompt, answer, teacher prompt",
            "max_prompt_tokens / max_completion_tokens / max_teacher_tokens",
            "2048 / 8192 / 10240",
            "2048 / 8192 / 10240",
            "512, 256",
            "paper",
        ),
        Row(
            "evaluation: answers, T, top-p, every",
            "eval_samples / eval_temperature / eval_top_p / eval_every",
            "16 / 0.6 / 0.95 / 5",
            "16 / 0.6 / 0.95 / 5",
            "",
            "paper",
        ),
    ],
    ("sdpo", "lcb"): [
        Row("divergence", "divergence", "reverse_kl", "reverse_kl", "reverse KL", "paper"),
        Row(
            "support",
            "support / topk",
            "student_topk / 20",
            "student_topk / 20, with a tail",
            "sampled token",
            "paper",
        ),
        Row(
            "teacher, rate",
            "teacher / ema_rate",
            "ema / 0.01",
            "ema, .05 as released: the flag was renamed",
            "ema, .05",
            "paper",
        ),
        Row(
            "questions, attempts, mini-batch",
            "prompts_per_step / rollouts / mini_batch",
            "32 / 8 / 1",
            "32 / 8 / 1",
            "",
            "paper",
        ),
        Row("learning rate, then constant, warm-up", "lr / warmup", "1e-6 / 0", "1e-6 / 0", "", "paper"),
        Row("evaluation answers", "eval_samples", "4", "4", "", "paper"),
    ],
    ("sdpo", "ttt"): [
        Row(
            "questions, attempts, mini-batch",
            "prompts_per_step / rollouts / mini_batch",
            "1 / 16 / 1",
            "not released",
            NONE,
            "paper",
        ),
        Row(
            "divergence, K, rate",
            "divergence / topk / ema_rate",
            "reverse_kl / 20 / 0.01",
            "not released",
            NONE,
            "paper",
        ),
        Row(
            "learning rate, advantage clip", "lr / advantage_clip", "1e-6 / 5", "not released", NONE, "paper"
        ),
        Row("steps", "steps", "2750 attempts, 172 steps", "not released", NONE, "paper"),
    ],
    ("srt", "math"): [
        Row("student", "model", "Qwen/Qwen3-4B-Instruct-2507", NONE, NONE, "paper"),
        Row(
            "questions, attempts, revisions, kept",
            "questions / attempts / revisions / target",
            "10000 / 1 / 3 / 6000",
            "3 attempts, 3 revisions, 6000",
            "1, 3",
            "paper",
        ),
        Row("right attempts revised too", "revise_right", "yes", "no", "yes", "paper"),
        Row("phrases", "phrases", "paper", "its own for wrong attempts", "paper", "paper"),
        Row("loss", "loss", "joint", "sequential", "joint", "paper"),
        Row("epochs", "epochs", "2", "3 + 3", "", "paper"),
        Row("learning rate, schedule", "lr / schedule", "5e-6 / cosine", "5e-6 / cosine", "", "paper"),
        Row("weight decay", "weight_decay", NONE, "1e-4", "", "code"),
        Row("AdamW betas", "adam_betas", NONE, "0.9 / 0.95", "", "code"),
        Row("warm-up steps", "warmup", NONE, "a twentieth", "", "own"),
        Row("traces a step", "prompts_per_step", NONE, "4", "", "code"),
        Row(
            "sampling: T, longest",
            "temperature / max_completion_tokens",
            "0.7 / 16384",
            "1 / 16384",
            ".8",
            "paper",
        ),
        Row("evaluation answers", "eval_samples", "8", "8", "", "paper"),
    ],
    ("sdzero", "math"): [
        Row("divergence", "divergence", "reverse KL in Eq. 4", "mixed, ½", "", "code"),
        Row("support", "support / topk", "top 64", "teacher_topk / 64, renormalised", "", "code"),
        Row(
            "reviser renewed every (0: never)",
            "sync_every",
            "at a plateau, in a figure",
            "0",
            "512, renewed whole",
            "code",
        ),
        Row("questions", "questions", "9000", "DeepScaleR", "", "paper"),
        Row("prompts, answers each", "prompts_per_step / rollouts", "1 answer", "128 / 1", "1", "code"),
        Row("learning rate", "lr", "5e-6", "5e-6", "", "paper"),
        Row("warm-up steps", "warmup", NONE, "20, then constant", "", "code"),
        Row("weight decay", "weight_decay", NONE, "0.01", "", "code"),
        Row("epochs", "epochs", "1", "5 at most", "", "paper"),
        Row(
            "sampling: T, longest",
            "temperature / max_completion_tokens",
            "0.7 / 16384",
            "1, 8192 with the prompt",
            "",
            "paper",
        ),
        Row("longest teacher prompt", "max_teacher_tokens", NONE, "32768, cut", "", "code"),
    ],
    ("distill", "gkd-gsm8k"): [
        Row("lambda", "lmbda", "1 (best of 0 ½ 1)", NONE, "always 1; GKD trainer .5", "paper"),
        Row(
            "divergence",
            "divergence",
            "forward_kl (best of 5 on GSM8K)",
            NONE,
            "reverse KL; GKD trainer jsd ½",
            "paper",
        ),
        Row("support", "support", "full", NONE, "full", "paper"),
        Row("average", "average", "sequence", NONE, "token", "paper"),
        Row("sampling temperature", "temperature", "1", NONE, "1; GKD trainer .9", "paper"),
        Row("learning rate", "lr", NONE, NONE, "1e-6", "own"),
        Row("longest answer", "max_completion_tokens", NONE, NONE, "512; GKD trainer 128", "own"),
    ],
    ("distill", "tml-math"): [
        Row(
            "student, teacher",
            "model / teacher",
            "Qwen/Qwen3-8B-Base / Qwen/Qwen3-8B",
            "Qwen3.5",
            NONE,
            "paper",
        ),
        Row("objective", "objective", "policy_gradient", "policy_gradient", NONE, "paper"),
        Row(
            "prompts, answers each",
            "prompts_per_step / rollouts",
            "64, 4",
            "512 / 4 (README), 1024",
            NONE,
            "code",
        ),
        Row("LoRA rank, learning rate", "lora_rank / lr", NONE, "128 / 1e-4", NONE, "code"),
        Row("steps", "steps", "150", "200", NONE, "paper"),
        Row("longest answer", "max_completion_tokens", NONE, "4096 (README: 16384)", NONE, "code"),
    ],
}


def show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " / ".join(map(show, value))
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:g}" if isinstance(value, float) else str(value)


def ours(script: str, preset: str, row: Row) -> str:
    module = importlib.import_module(script)
    values = dataclasses.asdict(common.parse_args(module.Args, module.PRESETS, ["--preset", preset]))
    return " / ".join(show(values[flag]) for flag in row.flags.split(" / "))


def table(script: str, preset: str) -> str:
    lines = [
        f"**`{script}.py --preset {preset}`**",
        "",
        "| | paper | authors' code | TRL 1.16 | ours |",
        "|---|---|---|---|---|",
    ]
    for row in TABLES[script, preset]:
        value = f"{ours(script, preset, row)} ({row.whose})"
        lines.append(f"| {row.name} | {row.paper} | {row.code} | {row.trl or NONE} | {value} |")
    return "\n".join(lines)


@pytest.mark.parametrize("script, preset", TABLES)
def test_ours_is_whose_it_says(script, preset):
    for row in TABLES[script, preset]:
        value, fact = ours(script, preset, row), {"paper": row.paper, "code": row.code, "own": ""}[row.whose]
        if row.whose == "own":
            assert value not in (row.paper, row.code), f"{row.name}: {value} has a source"
        else:
            assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w]|\.\d)", fact), (
                f"{row.name}: ours is {value}, {row.whose} says {fact}"
            )


@pytest.mark.parametrize("script, preset", TABLES)
def test_the_page_shows_the_presets(script, preset):
    assert table(script, preset) in PAGE.read_text(), (
        "python tests/test_settings.py prints the tables that belong there"
    )


if __name__ == "__main__":
    print("\n\n".join(table(*key) for key in TABLES))
