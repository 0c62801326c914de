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
# A script and its preset, then the fields of a Row a line.
ROWS = """\
sdft tooluse
student | model | Qwen/Qwen2.5-7B-Instruct | Qwen/Qwen2.5-7B-Instruct | – | paper
divergence | divergence | reverse_kl in Eq. 1; all results were run with forward_kl | forward_kl | jsd ½ | code
support | support | full | full | student's top 100, renormalised | paper
first tokens without loss | skip_tokens | the first few | 3 | 0 | code
importance ratio | is_cap | optional | 2 (cap), averaged over the answer | 2 (cap), per token | code
teacher, rate | teacher / ema_rate | ema, .01 .02 .05 tried | ema / 0.01, in bf16 | base | code
prompts, answers each | prompts_per_step / rollouts | \
16 32 64 tried, 1 | 32 / 1 (until March 2026: 8 answers) | 8 answers | code
learning rate | lr | 5e-6 1e-5 5e-5 tried | 5e-5, bf16 weights | – | paper
schedule, warm-up steps | schedule / warmup | cosine / 10 | cosine, a tenth | – | paper
epochs | epochs | 1 2 tried | 2 | – | paper
weight decay | weight_decay | 0 | 0 | – | paper
AdamW betas | adam_betas | – | 0.9 / 0.999 | – | code
longest prompt | max_prompt_tokens | – | 1024, cut | 512, cut | code
longest answer | max_completion_tokens | 2048 | 1024 | 256 | paper
evaluation temperature | eval_temperature | 0 | 0 | – | paper
longest answer in evaluation | eval_max_tokens | – | 1024 | – | code
verifier | verifier | tool_use: actions and inputs | tool_use | – | paper
validation, then test | eval_data | validation split, 68 rows | 68 rows, later 97 | – | own

sdft science
verifier | verifier | choice: the letter | choice: text in <answer> | – | paper
validation, then test | eval_data | 5 %, 20 % of the rows | 507 rows | – | own
learning rate | lr | 5e-6 1e-5 5e-5 tried | – | – | paper
epochs | epochs | 1 2 tried | – | – | paper
longest answer | max_completion_tokens | 2048 | evaluation 2048 | 256 | paper

sdft medical
rows | data | medical-o1 (en), 1,000 questions test | – | – | own
learning rate | lr | 5e-6 1e-5 5e-5 tried | – | – | paper
epochs | epochs | 1 2 tried | – | – | paper
longest answer | max_completion_tokens | 2048 | – | 256 | paper

sdft knowledge
learning rate | lr | 5e-6 1e-5 5e-5 tried | – | – | paper
epochs | epochs | 1 2 4 tried | – | – | paper
EMA rate | ema_rate | .01 .02 .05: 0.01 | – | – | paper
longest answer | max_completion_tokens | 1024 | – | 256 | paper
longest teacher prompt: an article | max_teacher_tokens | – | – | – | own

sdpo sciknoweval
student | model | Qwen/Qwen3-8B | Qwen/Qwen3-8B | – | paper
divergence | divergence | jsd | jsd, ½ | sampled token, reverse KL | paper
support | support / topk | student_topk / 100 | student_topk / 100, with a tail | sampled token | paper
average | average | token | sequence | sequence | code
a success has at least the reward | success | 1 | 0.5 | 1 | code
verifier | verifier | choice: the letter | choice: text in <answer> | – | paper
importance ratio: cap, per token | is_cap | 2 | 2 | – | paper
teacher, rate | teacher / ema_rate | \
ema / 0.05, once per batch | ema / 0.05, once per batch | ema, .05, every optimiser step | paper
what the teacher reads | hindsight | solution | solution | solution | paper
questions, attempts | prompts_per_step / rollouts | 32 / 8 | 32 / 8 | – | paper
questions an optimiser step (0: all) | mini_batch | all: 0 or 32 | 32 | – | paper
learning rate, then constant, warm-up | lr / warmup | 1e-5 / 10 | 1e-5 / 10 | – | paper
weight decay | weight_decay | 0.01 | 0.01 | – | paper
AdamW betas | adam_betas | – | 0.9 / 0.999 | – | code
longest prompt, answer, teacher prompt | max_prompt_tokens / max_completion_tokens / max_teacher_tokens | \
2048 / 8192 / 10240 | 2048 / 8192 / 10240 | 512, 256 | paper
evaluation: answers, T, top-p, every | eval_samples / eval_temperature / eval_top_p / eval_every | \
16 / 0.6 / 0.95 / 5 | 16 / 0.6 / 0.95 / 5 | – | paper

sdpo grpo
share of GRPO | policy_weight | 1 | 1 | – | paper
learning rate, then constant, warm-up | lr / warmup | 1e-6 / 10 | 1e-6 / 10 | – | paper
questions an optimiser step | mini_batch | 8 | 8 | – | paper
questions, attempts | prompts_per_step / rollouts | 32 / 8 | 32 / 8 | – | paper
average | average | token | sequence | dapo: token | code
verifier | verifier | choice: the letter | choice: text in <answer> | – | paper

sdpo tooluse
verifier | verifier | tool_use: actions and inputs | tool_use | – | paper
what the teacher reads | hindsight | solution | solution | solution | paper
learning rate, then constant, warm-up | lr / warmup | 1e-5 / 10 | 1e-5 / 10 | – | paper
divergence, K | divergence / topk | jsd / 100 | jsd / 100 | – | paper

sdpo lcb
divergence | divergence | reverse_kl | reverse_kl | reverse KL | paper
support | support / topk | student_topk / 20 | student_topk / 20, with a tail | sampled token | paper
teacher, rate | teacher / ema_rate | ema / 0.01 | ema, .05 as released: the flag was renamed | ema, .05 | paper
questions, attempts, mini-batch | prompts_per_step / rollouts / mini_batch | 32 / 8 / 1 | 32 / 8 / 1 | – | paper
learning rate, then constant, warm-up | lr / warmup | 1e-6 / 0 | 1e-6 / 0 | – | paper
evaluation answers | eval_samples | 4 | 4 | – | paper
verifier | verifier | code: all tests | code: all tests | – | paper

sdpo ttt
questions, attempts, mini-batch | prompts_per_step / rollouts / mini_batch | 1 / 16 / 1 | not released | – | paper
divergence, K, rate | divergence / topk / ema_rate | reverse_kl / 20 / 0.01 | not released | – | paper
learning rate, advantage clip | lr / advantage_clip | 1e-6 / 5 | not released | – | paper
steps | steps | 2750 attempts, 172 steps | not released | – | paper
warm-up, row | warmup / question | 0 / 1, 3, 10 and 16 more | not released | – | paper
verifier | verifier | code: all tests | not released | – | paper
hindsight prompts answered by the teacher | teacher_samples | – | – | – | own

srt math
student | model | Qwen/Qwen3-4B-Instruct-2507 | – | – | paper
questions, attempts, revisions, kept | questions / attempts / revisions / target | \
10000 / 1 / 3 / 6000 | 3 attempts, 3 revisions, 6000 | 1, 3 | paper
right attempts revised too | revise_right | yes | no | yes | paper
phrases | phrases | paper | its own for wrong attempts | paper | paper
loss | loss | joint | sequential | joint | paper
epochs | epochs | 2 | 3 + 3 | – | paper
learning rate, schedule | lr / schedule | 5e-6 / cosine | 5e-6 / cosine | – | paper
weight decay | weight_decay | – | 1e-4 | – | code
AdamW betas | adam_betas | – | 0.9 / 0.95 | – | code
warm-up, share of the steps | warmup | – | 0.05 | – | code
traces a step | prompts_per_step | – | 4 | – | code
sampling: T, longest | temperature / max_completion_tokens | 0.7 / 16384 | 1 / 16384 | .8 | paper
evaluation: answers, longest | eval_samples / eval_max_tokens | 8 / 32768 | 8 | – | paper
verifier | verifier | math, or a stated answer | math, or a stated answer | – | paper

srt math-sequential
loss | loss | joint | sequential | joint | code
epochs of each run | epochs | 2 | 3 | – | code
warm-up, share of each run | warmup | – | 0.05 | – | code
records of the second run | stage_two | – | 1000 (README: 2000) | – | code
attempts, revisions, kept | attempts / revisions / target | 1, 3 | 3 / 3 / 6000 | 1, 3 | code
right attempts revised too | revise_right | yes | no | yes | code
phrases | phrases | paper | qwen | paper | code
sampling: T | temperature | 0.7 | 1, top-p .9 | .8 | code
longest answer in evaluation | eval_max_tokens | 32768 | – | – | paper
verifier | verifier | math, or a stated answer | math, or a stated answer | – | paper

srt code
questions, kept | questions / target | 10000 / 6000 | 6000 | – | paper
verifier | verifier | code | code: the last Python block | – | paper
evaluation: answers, longest | eval_samples / eval_max_tokens | 8 / 32768 | 8 | – | paper
loss, epochs | loss / epochs | joint / 2 | sequential, 3 + 3 | joint | paper

sdzero math
divergence | divergence | reverse KL in Eq. 4 | mixed, ½ | – | code
support | support / topk | top 64 | teacher_topk / 64, renormalised | – | code
reviser renewed every (0: never) | sync_every | at a plateau, in a figure | 0 | 512, renewed whole | code
questions | questions | 9000 | DeepScaleR | – | paper
prompts, answers each | prompts_per_step / rollouts | 1 answer | 128 / 1 | 1 | code
learning rate | lr | 5e-6 | 5e-6 | – | paper
warm-up steps | warmup | – | 20, then constant | – | code
weight decay | weight_decay | – | 0.01 | – | code
epochs | epochs | 1 | 5 at most | – | paper
sampling: T, longest | temperature / max_completion_tokens | 0.7 / 16384 | 1, 8192 with the prompt | – | paper
longest teacher prompt | max_teacher_tokens | – | 32768, cut | – | code
evaluation: answers, longest | eval_samples / eval_max_tokens | 8 / 32768 | 8 | – | paper
verifier | verifier | math, or a stated answer | math, or a stated answer | – | paper

sdzero code
questions | questions | 9000 | – | – | paper
verifier | verifier | code | code: the last Python block | – | paper
evaluation: answers, longest | eval_samples / eval_max_tokens | 8 / 32768 | 8 | – | paper
learning rate | lr | 5e-6 | 5e-6 | – | paper

distill gkd-gsm8k
lambda | lmbda | 1 (best of 0 ½ 1) | – | always 1; GKD trainer .5 | paper
divergence | divergence | forward_kl (best of 5 on GSM8K) | – | reverse KL; GKD trainer jsd ½ | paper
support | support | full | – | full | paper
average | average | sequence | – | token | paper
sampling temperature | temperature | 1 | – | 1; GKD trainer .9 | paper
learning rate | lr | – | – | 1e-6 | own
longest answer | max_completion_tokens | – | – | 512; GKD trainer 128 | own
verifier | verifier | accuracy | – | – | own
validation, then test | eval_data | GSM8K | – | – | own

distill tml-math
student, teacher | model / teacher | Qwen/Qwen3-8B-Base / Qwen/Qwen3-8B | Qwen3.5 | – | paper
objective | objective | policy_gradient | policy_gradient | – | paper
prompts, answers each | prompts_per_step / rollouts | 64, 4 | 512 / 4 (README), 1024 | – | code
LoRA rank, learning rate | lora_rank / lr | – | 128 / 1e-4 | – | code
steps | steps | 150 | 200 | – | paper
longest answer | max_completion_tokens | – | 4096 (README: 16384) | – | code
average | average | – | sum over tokens | – | own
warm-up steps | warmup | – | – | – | own
chat template arguments | chat_kwargs | – | – | – | own
evaluation temperature | eval_temperature | – | 1 | – | code
verifier | verifier | AIME24 | – | – | own
"""
TABLES: dict[tuple[str, str], list[Row]] = {}
for block in ROWS.split("\n\n"):
    heading, *lines = block.strip().split("\n")
    script, preset = heading.split()
    TABLES[script, preset] = [Row(*line.split(" | ")) for line in lines]

SCRIPTS = ("sdft", "sdpo", "srt", "sdzero", "distill")
OWN = ("toy", "smol")  # presets of no paper: one table, a column for each script
PLACES = {"data", "eval_data", "model"}  # where things lie says nothing about an experiment


def presets_of(script: str) -> dict:
    return importlib.import_module(script).PRESETS


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
        lines.append(f"| {row.name} | {row.paper} | {row.code} | {row.trl} | {value} |")
    return "\n".join(lines)


def own_table(preset: str) -> str:
    """All values of a preset that no paper has, in the order of the scripts' flags."""
    columns = {script: presets_of(script).get(preset, {}) for script in SCRIPTS}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [f"**`--preset {preset}`**", "", "| | " + " | ".join(columns) + " |", "|---" * 6 + "|"]
    for name in names:
        shown = [show(column[name]) if name in column else NONE for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(repr(x)[1:-1].replace("|", "\\|") for x in shown) + " |")
    return "\n".join(lines)


def test_every_preset_has_a_table():
    presets = {(script, preset) for script in SCRIPTS for preset in presets_of(script)}
    assert presets == set(TABLES) | {(script, preset) for script in SCRIPTS for preset in OWN}


@pytest.mark.parametrize("script, preset", TABLES)
def test_no_value_of_a_preset_is_left_out(script, preset):
    named = {flag for row in TABLES[script, preset] for flag in row.flags.split(" / ")}
    assert set(presets_of(script)[preset]) - PLACES <= named


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


@pytest.mark.parametrize("preset", OWN)
def test_the_page_shows_our_own_presets(preset):
    assert own_table(preset) in PAGE.read_text(), (
        "python tests/test_settings.py prints the tables that belong there"
    )


if __name__ == "__main__":
    print("\n\n".join([*(table(*key) for key in TABLES), *map(own_table, OWN)]))
