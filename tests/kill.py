"""kill -9 at random moments of a run on two processes; --resume must end with the undisturbed run's bytes.

    python tests/kill.py --kills 20 --script sdpo

A third of the kills wait until a checkpoint is half written. Prints a line for each kill, and exits 1 if any
run ends otherwise.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from conftest import JUDGE, ROOT, checkpoint, flags_of, make_model

STEPS = 12
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(script: str, flags: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen([*TORCHRUN, f"{script}.py", *flags.split()], cwd=ROOT, env=env, **quiet)


def children(pid: int) -> list[int]:
    """torchrun puts each process into a session of its own."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    own = [int(child) for child in tasks.read_text().split()] if tasks.exists() else []
    return [*own, *(grandchild for child in own for grandchild in children(child))]


def kill_at(run: subprocess.Popen, out: Path, step: int, half_saved: bool, delay: float) -> int:
    """Kills a run after the step, or in the middle of the save that follows; returns the lines it had logged."""
    log, lines = out / "metrics.jsonl", 0
    while run.poll() is None:
        lines = log.read_text().count("\n") if log.exists() else 0
        if lines > step and (not half_saved or (out / "checkpoints" / ".aside").exists()):
            break
        time.sleep(0.001)
    time.sleep(0 if half_saved else delay)
    for pid in [*children(run.pid), run.pid]:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL)
    run.wait()
    return lines


def same(a: Path, b: Path) -> bool:
    """Student, teacher and optimiser after the last step, and the number of lines in the log."""
    one, two = (checkpoint(out, STEPS) for out in (a, b))
    names = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    equal = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in names)
    return equal and len({(out / "metrics.jsonl").read_text().count("\n") for out in (a, b)}) == 1


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--script", default="sdpo")
    args = parser.parse_args()
    folder, rng, failed = Path(tempfile.mkdtemp()), random.Random(0), 0
    make_model(folder / "model", hidden_size=256, intermediate_size=512)
    make_model(folder / "teacher", seed=6)
    row = '{{"prompt": "zig:{0}7{0}", "privileged_context": "so{0}>7;", "answer": "{0}", "completion": "{0}"}}\n'
    data = folder / "data.jsonl"
    data.write_text("".join(row.format(i) for i in range(24)))
    (folder / "judge.py").write_text(JUDGE)
    tiny = SimpleNamespace(model=folder / "model", teacher=folder / "teacher", data=data, eval=data)
    more = f"--steps {STEPS} --save-every 1 --eval-every 4 --verifier {folder}/judge.py:judge"
    if start(args.script, flags_of(args.script, folder / "whole", tiny, more)).wait():
        raise SystemExit(f"{args.script}.py fails undisturbed")
    for kill in range(args.kills):
        out = folder / f"killed-{kill}"
        flags = flags_of(args.script, out, tiny, more)
        lines = kill_at(start(args.script, flags), out, rng.randint(0, STEPS - 1), kill % 3 == 0, rng.random() * 0.4)
        found = " ".join(sorted(path.name for path in (out / "checkpoints").glob("*"))) or "none"
        code = start(args.script, f"{flags} --resume").wait()
        right = code == 0 and same(folder / "whole", out)
        failed += not right
        verdict = "the same bytes" if right else f"NOT the same, exit {code}"
        print(f"kill {kill + 1} after {lines} lines, checkpoints {found}: {verdict}", flush=True)
        shutil.rmtree(out)
    print(f"{args.script}: {args.kills - failed} of {args.kills} ended with the same bytes")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
