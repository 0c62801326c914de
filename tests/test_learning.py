"""The laptop world learns by self-distillation, with a margin that noise does not cross (seed 0).

ENGINE=vllm pytest tests/test_learning.py: the same, with answers drawn by vLLM.
"""

import json
import os

import pytest
import toy
from conftest import metrics_of

import common
import distill
import sdft
import sdpo
import sdzero
import srt

ENGINE = os.environ.get("ENGINE", "transformers")
FAST = "--eval-every 120 --save-every 1000 --steps 240"
NEW, PRIOR = "eval/avg@1", "eval/prior-eval/avg@1"


def learn(out, flags, script=sdft):
    argv = ["--out", str(out), "--engine", ENGINE, *flags.split()]
    script.main(common.parse_args(script.Args, script.PRESETS, argv))
    return metrics_of(out)


@pytest.fixture(scope="module")
def run_sdft(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("sdft") / "r", FAST)


def test_sdft_teaches_a_new_skill(run_sdft):
    """From nothing to at least .85; the divergence falls; the priors were there and most of them stay."""
    first, last = run_sdft[0], run_sdft[-1]
    assert first[NEW] < 0.02 and first[PRIOR] > 0.95
    assert last[NEW] >= 0.85 and last[PRIOR] > 0.6
    assert last["distill/divergence"] < 0.2 * run_sdft[1]["distill/divergence"]


def test_sft_learns_it_too_and_forgets_more(run_sdft, tmp_path):
    last = learn(tmp_path / "r", f"{FAST} --method sft --lr 3e-4 --verifier toy:lenient")[-1]
    assert last[NEW] >= 0.85 and last[PRIOR] < run_sdft[-1][PRIOR] - 0.25


def test_a_teacher_without_the_demonstration_teaches_nothing(tmp_path):
    rows = map(json.loads, toy.resolve("toy:0/zig-train.jsonl").read_text().splitlines())
    alone = "".join(json.dumps({**row, "teacher_prompt": row["prompt"]}) + "\n" for row in rows)
    (tmp_path / "alone.jsonl").write_text(alone)
    assert learn(tmp_path / "r", f"{FAST} --steps 60 --data {tmp_path}/alone.jsonl")[-1][NEW] < 0.02


def test_sdpo_learns_from_its_own_successes_and_feedback(tmp_path):
    """.27 to .9 in 60 steps of 32 attempts, its self-teacher knows more from the start; GRPO is behind."""
    rows = learn(tmp_path / "r", "--eval-every 60 --steps 60", sdpo)
    assert rows[0][NEW] < 0.35 and rows[-1][NEW] >= 0.88 and rows[-1][PRIOR] > 0.9
    assert rows[1]["teacher/accuracy"] > rows[1]["rollout/reward"] + 0.3
    grpo = learn(tmp_path / "g", "--eval-every 60 --steps 60 --policy-weight 1", sdpo)
    assert 0.35 < grpo[-1][NEW] < rows[-1][NEW]


def test_srt_then_sdzero(tmp_path):
    """Wrong sums are corrected four times in five, after SRT nine in ten; then the reviser teaches."""
    rows = learn(tmp_path / "srt", "--eval-every 1000", srt)
    before, after = (row["revise/wrong_to_right"] for row in (rows[0], rows[-1]))
    assert rows[0][NEW] < 0.35 < 0.7 < before < 0.88 < after
    rows = learn(tmp_path / "r", f"--model {tmp_path}/srt/last --steps 20 --eval-every 20", sdzero)
    assert rows[0][NEW] < 0.6 and rows[-1][NEW] >= 0.92 and rows[-1][PRIOR] > 0.9


def test_on_policy_distillation_beats_off_policy_where_the_teacher_never_fails(tmp_path):
    """The locks: after 512 answers, held-out; the student alone opens .38."""
    flags = "--steps 16 --eval-every 16"
    assert learn(tmp_path / "on", flags, distill)[-1][NEW] >= 0.62
    assert learn(tmp_path / "off", f"{flags} --lmbda 0", distill)[-1][NEW] <= 0.5
