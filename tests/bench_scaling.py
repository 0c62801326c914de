"""How a training step grows: seconds by phase and peak memory.

    python tests/bench_scaling.py             # about ten minutes of one core
    python tests/bench_scaling.py width       # one axis

One thing changes, everything else stays: sdpo.py, 8 questions x 4 attempts, prompts of 32 tokens, answers of
64 (an EOS is never drawn), a random Qwen3 of 4 layers x 128. Each point is a process of its own; the first
step is not counted. The exponent is the slope of a line through the logarithms: 1 is linear, and the part of
the cost that does not depend on the size pulls it below.
"""

import json
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path

import bench_trl
from conftest import launch, metrics_of

BASE = dict(questions=8, attempts=4, answer=64, prompt=32, width=128)
AXES = {
    "questions": (4, 8, 16, 32),
    "attempts": (2, 4, 8, 16),
    "answer": (32, 64, 128, 256),
    "prompt": (32, 128, 512, 1024),
    "width": (64, 128, 256, 512),
}
STEPS = 4
# Half of the texts are right, so that nearly every attempt has a teacher.
JUDGE = "def judge(completion, row):\n    return float(sum(map(ord, completion)) % 2)\n"


def measure(questions: int, attempts: int, answer: int, prompt: int, width: int) -> dict[str, float]:
    """Seconds of each phase of a step and the process's peak growth in MiB."""
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), random.Random(0)
        bench_trl.SHAPES["here"] = bench_trl.Shape(4, width, 3 * width, 4, 2, 89)
        bench_trl.make_model(folder / "model", "here", answer, "forced")
        texts = ["sort:" + "".join(rng.choices("0123456789", k=prompt - 9)) for _ in range(questions * STEPS)]
        rows = [{"prompt": text, "answer": "0"} for text in texts]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "judge.py").write_text(JUDGE)
        flags = (
            f"--model {folder}/model --data {folder}/rows.jsonl --eval-data --out {folder}/out "
            f"--steps {STEPS} --prompts-per-step {questions} --rollouts {attempts} --max-prompt-tokens 4096 "
            f"--max-teacher-tokens 8192 --max-completion-tokens {answer} --verifier {folder}/judge.py:judge "
            "--teacher-samples 0 --lr 1e-6 --warmup 0 --tokens-per-batch 8192 --save-every 1000 "
            "--hindsight solution"
        )
        done = launch(f"sdpo.py {flags}")
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        steps = metrics_of(folder / "out")
        phases = ("generate", "teacher", "student")
        found = {phase: statistics.median(row[f"time/{phase}"] for row in steps[2:]) for phase in phases}
        grown = 1024 * (steps[-1]["memory/peak_gib"] - steps[0]["memory/peak_gib"])
        return {**found, "step": sum(found.values()), "MiB": grown}


def slope(xs: list[float], ys: list[float]) -> float:
    xs, ys = [math.log(x) for x in xs], [math.log(max(y, 1e-9)) for y in ys]
    return statistics.linear_regression(xs, ys).slope


def main() -> None:
    for axis in sys.argv[1:] or AXES:
        points = [measure(**BASE | {axis: value}) for value in AXES[axis]]
        print(f"\n| {axis} | generate | teacher | student | step, s | MiB |\n|---|---|---|---|---|---|")
        for value, point in zip(AXES[axis], points, strict=True):
            seconds = " | ".join(f"{point[key]:.2f}" for key in ("generate", "teacher", "student", "step"))
            print(f"| {value} | {seconds} | {point['MiB']:.0f} |")
        slopes = [slope(list(AXES[axis]), [point[key] for point in points]) for key in points[0]]
        print("| exponent | " + " | ".join(f"{value:.2f}" for value in slopes) + " |", flush=True)


if __name__ == "__main__":
    main()
