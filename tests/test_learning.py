"""The laptop world learns by self-distillation, with a margin that noise does not cross (seed 0; README has three seeds)."""

import pytest
from conftest import metrics_of

import common
import sdft

FAST = "--eval-every 120 --save-every 1000 --steps 240"


def learn(out, flags):
    sdft.main(common.parse(sdft.Args, sdft.PRESETS, ["--out", str(out), *flags.split()]))
    return metrics_of(out)


@pytest.fixture(scope="module")
def run_sdft(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("sdft") / "r", FAST)


def test_sdft_teaches_a_new_skill(run_sdft):
    """From nothing to at least .85; the divergence falls; the priors were there and most of them stay."""
    first, last = run_sdft[0], run_sdft[-1]
    assert first["eval/avg@1"] < 0.02 and first["eval/prior-eval/avg@1"] > 0.95
    assert last["eval/avg@1"] >= 0.85 and last["eval/prior-eval/avg@1"] > 0.6
    assert last["distill/divergence"] < 0.2 * run_sdft[1]["distill/divergence"]


def test_sft_learns_it_too_and_forgets_more(run_sdft, tmp_path):
    last = learn(tmp_path / "r", f"{FAST} --method sft --lr 3e-4 --verifier toy:lenient")[-1]
    assert last["eval/avg@1"] >= 0.85
    assert last["eval/prior-eval/avg@1"] < run_sdft[-1]["eval/prior-eval/avg@1"] - 0.25


def test_a_teacher_without_the_demonstration_teaches_nothing(tmp_path):
    last = learn(tmp_path / "r", f"{FAST} --steps 60 --template {{prompt}}")[-1]
    assert last["eval/avg@1"] < 0.02
