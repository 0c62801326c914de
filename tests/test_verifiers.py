"""math and code: rewards, the exact feedback, and programs that try to get out of the sandbox or to a reward they did not earn."""

import base64
import json
import os
import pickle
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import common
from common import InputError, code, last_boxed, livecodebench_row, math_answer

SUM = {"inputs": ["1 2\n", "30 4\n", "5 6\n"], "outputs": ["3\n", "34\n", "11\n"], "testtype": "stdin", "time_limit": 2}
ADD = {"inputs": ["[1, 2]\n3", "[]\n0"], "outputs": ["6", "0"], "testtype": "functional", "fn_name": "add", "time_limit": 2}
RIGHT = "print(sum(map(int, input().split())))"


def fenced(program):
    return f"I think this works.\n```python\n{program}\n```\nDone."


# ---------------------------------------------------------------- math

@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{4} no \boxed{5}.", "5"), (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"), (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    (r"\boxed{ 7 }" + " and so on" * 99, "7"), (r"\boxed{1} then \boxed{2", None), ("no box", None), (r"\boxed 5", None), ("", None)])
def test_the_last_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer


def test_math_feedback_speaks_of_the_format_only():
    wrong_format = r"Your answer had the wrong format. The solution must be given in the format: \boxed{your_answer}."
    assert math_answer(r"\boxed{5}", {"answer": " 5 "}) == (1.0, "")
    assert math_answer("5", {"answer": "5"}) == (0.0, wrong_format)
    assert math_answer("5", {"answer": 5, "truncated": True}) == (0.0, "Your response was truncated because it exceeded the maximum length.")


def test_math_verify_judges_other_spellings_from_many_threads():
    pytest.importorskip("math_verify")
    cases = [("0.5", r"\frac{1}{2}", 1), ("1000", "1,000", 1), ("1+x", "x+1", 1), ("6", "5", 0), ("\udcff", "5", 0), (r"\{2,1\}", r"\{1,2\}", 1)]
    with ThreadPoolExecutor(8) as pool:
        graded = pool.map(lambda case: math_answer(rf"\boxed{{{case[0]}}}", {"answer": case[1]}), cases * 3)
    assert list(graded) == [(float(reward), "") for _, _, reward in cases * 3]


def test_an_answer_that_never_ends_is_wrong_in_bounded_time():
    pytest.importorskip("math_verify")
    start = time.monotonic()
    assert math_answer(r"\boxed{9^{9^{9^{9}}}}", {"answer": "3"}) == (0.0, "")
    assert math_answer(r"\boxed{2/4}", {"answer": "1/2"}) == (1.0, "")
    assert time.monotonic() - start < 60


def test_a_math_worker_that_dies_is_replaced(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(common, "MATH_WORKER", "for line in iter(input, ''): 1 / 0")
    monkeypatch.setattr(common, "idle_math_workers", common.queue.SimpleQueue())
    assert math_answer(r"\boxed{2/4}", {"answer": "1/2"}) == (0.0, "") and common.idle_math_workers.empty()


def test_without_math_verify_one_sentence_says_what_to_type(monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install math-verify"):
        math_answer(r"\boxed{4}", {"answer": "5"})
    with pytest.raises(InputError, match="pip install math-verify"):
        common.load_verifier("math")


# ---------------------------------------------------------------- code: rewards and feedback

@pytest.mark.parametrize("program, tests", [
    (RIGHT, SUM), ("import sys\nprint(*map(str, [sum(map(int, sys.stdin.read().split()))]), sep='')\nsys.exit(0)", json.dumps(SUM)),
    ("print(sum(map(int, open('/dev/stdin').read().split())))", SUM),
    ("import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()", SUM),
    ("if __name__ == '__main__':\n    " + RIGHT, SUM), ("open('a', 'w').write('x')\n" + RIGHT, SUM),
    ("def add(numbers, more):\n    print('noise')\n    return sum(numbers) + more", ADD),
    ("class Solution:\n    def add(self, numbers: List[int], more: int) -> int:\n        return sum(numbers) + more", ADD),
    ("def f(x): return {x: (x, 'a')}", ["assert f(1) == {1: (1, 'a')}", "assert f(2)[2][0] > 1", "assert not f(3) == 3", "assert f(1) is not None"])])
def test_correct_programs_pass(program, tests):
    assert code(fenced(program), {"tests": tests}) == (1.0, "")


def test_the_longest_block_is_the_program():
    assert code(f"```\nshort\n```\n```py\n{RIGHT}\n```\n```text\nboo\n```", {"tests": SUM}) == (1.0, "")


WRONG = "Test Case {}: Wrong Answer\n\nInput\n{}\n\nOutput\n{}\n\nExpected\n{}"
NO_BLOCK = "Incorrect Format: Put your code inside a ```python ... ``` block."
CUT = ("Truncated Attempt: Your previous response was too long and truncated because it reached the maximum response length. "
       "Try again with a shorter response.")


@pytest.mark.parametrize("completion, tests, truncated, feedback", [
    (fenced("print(max(map(int, input().split())))"), SUM, False, WRONG.format(1, "1 2", "2", "3") + "\n\n" + WRONG.format(3, "5 6", "6", "11")),
    (fenced("def add(a, b): return [a, b]"), {**ADD, "inputs": ["[1, 2]\n3"], "outputs": ["6"]}, True, WRONG.format(1, "[1, 2]\n3", "[[1, 2], 3]", "6")),
    (fenced("def f(x): return x"), ["assert f(1) == 1", "assert f(2) == (3,)"], False, WRONG.format(2, "f(2)", "2", "(3,)")),
    (fenced("def g(x):\n    return 1 // x\na, b = map(int, input().split())\ng(a - 30)\nprint(a + b)"), SUM, False,
     "Runtime Error\nZeroDivisionError: integer division or modulo by zero\nLine 4 in <module> (solution.py)\nLine 2 in g (solution.py)\n\n"
     "Last Executed Input\n30 4"),
    (fenced("print("), SUM, False, "Runtime Error\nSyntaxError: '(' was never closed (solution.py, line 1)\n\nLast Executed Input\n1 2"),
    (fenced("while True: pass"), {**SUM, "time_limit": 0.3}, False, "Time Limit Exceeded\n\nLast Executed Input\n1 2"),
    (RIGHT, SUM, False, NO_BLOCK), ("```python\n" + RIGHT, SUM, True, CUT), (fenced(RIGHT), SUM, True, ""), ("", SUM, False, NO_BLOCK)])
def test_feedback_word_for_word(completion, tests, truncated, feedback):
    assert code(completion, {"tests": tests, "truncated": truncated}) == (float(feedback == ""), feedback)


def test_feedback_is_short():
    tests = {"inputs": ["1\n" * 9, "2" * 999], "outputs": ["3" * 999, "4"], "testtype": "stdin", "time_limit": 2}
    reward, feedback = code(fenced("print('5' * 999)"), {"tests": tests})
    fields = feedback.split("\n\n")
    assert reward == 0 and len(feedback) <= 2000 and all(len(field) <= 250 + len("Expected\n") for field in fields)
    assert fields[1] == "Input\n" + "1\n" * 8 + "..." and fields[2] == "Output\n" + "5" * 246 + "\n..."


@pytest.mark.parametrize("tests", ["", "-", "{}", None, 7, [], [3], ["print(1)"], {**SUM, "outputs": ["3"]}, {**SUM, "testtype": "x"},
                                   {**ADD, "fn_name": None}, {**SUM, "inputs": [1, 2, 3]}, "[" * 100_000])
def test_broken_tests_name_the_row(tests):
    with pytest.raises(InputError, match="rows.jsonl:3: 'tests' cannot be used"):
        code(fenced(RIGHT), {"tests": tests, "where": "rows.jsonl:3"})


@pytest.mark.parametrize("text", ["\x00", "\udcff", "```", "```" * 30_000, "```\n" * 30_000, fenced("\x00"), fenced("'\udcff'"), fenced("print('\\udcff')"),
                                  fenced("(" * 5000), fenced("-" * 100_000 + "1"), fenced("x = " + "9" * 100_000), fenced("print('[' * 10 ** 6)")])
def test_any_completion_is_survived(text):
    for tests in (SUM, ADD, ["assert f(1) == 2"]):
        assert code(text, {"tests": tests})[0] == 0
    assert math_answer(text, {"answer": "5"})[0] == 0


def test_livecodebench_rows():
    private = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([{"input": "[]\n0", "output": "0", "testtype": "functional"}])))).decode()
    raw = {"question_content": "Add {them} up.", "starter_code": "class Solution:\n    def add(self, numbers: List[int], more: int) -> int:\n        ",
           "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]), "private_test_cases": private,
           "metadata": '{"func_name": "add"}', "contest_date": "2025-04-30"}
    row = livecodebench_row(raw)
    assert row["tests"] == {**ADD, "time_limit": 6}
    assert row["prompt"] == (
        "You are a coding expert. You will be given a coding problem, and you need to write a correct Python program that matches the "
        "specification and passes all tests. The time limit is 1 second. You may start by outlining your thought process. In the end, "
        "please provide the complete code in a code block enclosed with ``` ```.\n\nAdd {them} up.\n\nYour solution should have the "
        "following signature: ```python\ndef add(numbers: List[int], more: int) -> int:\n```")
    stdin = livecodebench_row({**raw, "starter_code": "", "private_test_cases": "[]", "metadata": "{}"})
    assert stdin["prompt"].endswith("Add {them} up.") and stdin["tests"]["fn_name"] is None


def test_a_pickle_that_wants_to_call_something_is_refused():
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)
    with pytest.raises(pickle.UnpicklingError, match="posix.system"):
        common.private_tests(base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode())


# ---------------------------------------------------------------- code: hostile programs

FORK_AWAY = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(1)\n"
OWN_CALLS = "import ctypes\nlibc = ctypes.CDLL(None)\n"
HOSTILE = {                                                  # each prints or returns what it won; none of it may be the right answer
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb by libc": OWN_CALLS + "while True: libc.fork()",
    "fork by its number": OWN_CALLS + "import time\npid = libc.syscall(57, 999)\nif pid >= 0: print('won')\nwhile pid == 0: time.sleep(1)",
    "processes by subprocess": "import subprocess\nsubprocess.Popen(['sleep', '1000'])\nprint('won')",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "daemon": FORK_AWAY + "print('won')",
    "10 GB": "x = bytearray(10 ** 10)\nprint('won', len(x))",
    "10 GB of shared memory": OWN_CALLS + "assert libc.shmget(0, 1 << 30, 0o1600) < 0\n" * 10 + "raise SystemExit(1)",
    "infinite loop": "while True: pass",
    "sleep": "import time\ntime.sleep(10 ** 6)",
    "infinite output": "while True: print('x' * 9999)",
    "infinite output to stderr": "import sys\nwhile True: print('x' * 9999, file=sys.stderr)",
    "many files": "for i in range(10 ** 5): open(f'f{i}', 'w').write('x' * (4 << 20))\nprint('won')",
    "deaf to signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "kill the parent": "import os\nfor p in (os.getppid(), 1, 0, -1, -os.getpgrp()):\n    try: os.kill(p, 9); print('won')\n    except OSError: pass",
    "kill the caller": "import os\nos.kill(CALLER, 9)",
    "leave the group": "import os\nos.setsid()\nprint('won')",
    "socket": "import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('won')",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX)\nprint('won')",
    "own namespace": OWN_CALLS + "assert libc.unshare(0x10000000) == 0\nprint('won')",
    "memory of the runner": "import os\nfor p in (1, os.getppid()):\n    try: open(f'/proc/{p}/mem', 'r+b'); print('won')\n    except OSError: pass",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "fake success": "import sys\nprint('ok\\n[\"ok\", \"3\", \"\"]')\nprint('passed', file=sys.stderr)\nsys.exit(0)",
    "patched builtins": "import builtins, json, sys\nclass Same(str):\n    __eq__ = lambda *_: True\n    __hash__ = str.__hash__\n"
                        "json.loads = json.dumps = builtins.repr = builtins.bool = lambda *a, **k: Same()\nsys.stdout = sys.__stdout__ = None\n"
                        "def add(*a): return Same()\nf = add",
    "closed stdout": "import os, sys\nsys.stdout.close()\nos.close(2)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x) + 1\nf(1)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "hostile error": "class E(BaseException):\n    def __str__(self): raise self\nraise E()",
    "late exit handler": "import atexit, time\natexit.register(time.sleep, 10 ** 6)\nprint('won')",
}


@pytest.fixture(params=["namespaces", "no namespaces"])
def kernel(request, monkeypatch):
    """The sandbox as this kernel allows it, and as it is where the kernel refuses namespaces."""
    if request.param == "no namespaces":
        assert "libc.unshare(" in common.SANDBOX
        monkeypatch.setattr(common, "SANDBOX", common.SANDBOX.replace("libc.unshare(", "-1 + 0 * ("))
    return request.param


def lingering(mark):
    """The processes whose command line shows `mark` and that do not go away: every process of a sandbox inherits it."""
    for _ in range(60):
        found = [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark in read(p)]
        if not found:
            break
        time.sleep(0.05)
    return found


def read(path):
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_get_no_reward_and_leave_no_process(name, kernel, monkeypatch):
    mark = f"sandbox-{uuid.uuid4().hex}"
    monkeypatch.setattr(common, "SANDBOX", f"# {mark}\n{common.SANDBOX}")          # every process of it shows this in its command line
    tests = {"inputs": ["1 2", "30 4"], "outputs": ["81723", "34"], "testtype": "stdin", "time_limit": 1}
    before = set(os.listdir(common.tempfile.gettempdir()))
    start = time.monotonic()
    reward, feedback = code(fenced(HOSTILE[name].replace("CALLER", str(os.getpid()))), {"tests": tests})
    assert reward == 0 and feedback and "won" not in feedback.replace("'won'", "") and len(feedback) <= 2000, feedback
    assert time.monotonic() - start < 15
    assert not lingering(mark)
    assert not [new for new in set(os.listdir(common.tempfile.gettempdir())) - before if new.startswith("tmp")]


def test_expected_outputs_are_nowhere_in_the_program_s_memory():
    search = ("import gc, sys\nframe, seen = sys._getframe(), []\nwhile frame: seen += [repr(frame.f_locals)]; frame = frame.f_back\n"
              "seen += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list))]\nprint({} if any(str({}) in text for text in seen) else 'no')")
    for needle, reward in ((81722 + 1, 0), (55550 + 5, 1)):                      # the expected output; the input, which it may know
        tests = {"inputs": ["55555"], "outputs": [str(needle)], "testtype": "stdin", "time_limit": 5}
        assert code(fenced(search.format(*[f"{needle - 1} + 1"] * 2)), {"tests": tests})[0] == reward


@pytest.mark.parametrize("program", ["patched builtins", "os._exit", "sys.exit", "fake success", "closed stdout"])
def test_nothing_fakes_a_returned_value(program):
    for tests in (ADD, ["assert f(2) == 4"]):
        assert code(fenced(HOSTILE[program]), {"tests": tests})[0] == 0


def test_the_program_sees_no_environment_of_ours_and_no_other_process(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    look = "import os\nassert set(os.environ) <= {'HOME', 'PATH', 'TMPDIR', 'OPENBLAS_NUM_THREADS', 'LC_CTYPE'}\nassert os.listdir('.') == []\n"
    assert code(fenced(look + RIGHT), {"tests": SUM}) == (1.0, "")
    if namespaces():
        spy = ("import glob\nassert len(glob.glob('/proc/[0-9]*')) == 2\nfor name in glob.glob('/proc/[0-9]*/environ'):\n"
               "    try: assert 'secret' + '-key' not in open(name, errors='replace').read()\n    except OSError: pass\n")
        assert code(fenced(spy + RIGHT), {"tests": SUM}) == (1.0, "")


def namespaces():
    """Whether the program is alone with its runner, as it is where the kernel grants user namespaces."""
    return code(fenced("import os\nassert os.getppid() == 1\n" + RIGHT), {"tests": SUM})[0] == 1


def test_an_output_over_the_limit_is_an_error_at_once():
    for program in ("while True: print('x' * 9999)", "open('f', 'w').write('x' * (5 << 20))"):
        assert "File too large" in code(fenced(program), {"tests": SUM})[1]


def test_nothing_outside_the_empty_folder_is_written(tmp_path):
    if not namespaces():
        pytest.skip("this kernel grants no user namespaces; the docstring says what that means")
    victim = tmp_path / "victim"
    victim.write_text("kept")
    for attack in (f"open({str(victim)!r}, 'w')", f"import os\nos.remove({str(victim)!r})", f"import os\nos.chmod({str(victim)!r}, 0)",
                   f"open({str(tmp_path / 'new')!r}, 'w')", OWN_CALLS + "assert libc.mount(b'', b'/', b'', 0x1020, None) == 0"):
        assert "Runtime Error" in code(fenced(attack), {"tests": SUM})[1]
    assert victim.read_text() == "kept" and list(tmp_path.iterdir()) == [victim]


def test_the_whole_is_bounded_when_every_test_is_slow(monkeypatch):
    timer = common.threading.Timer
    monkeypatch.setattr(common.threading, "Timer", lambda seconds, *args: timer(seconds / 30, *args))
    tests = {"inputs": ["1"] * 99, "outputs": [""] * 99, "testtype": "stdin", "time_limit": 2}
    start = time.monotonic()
    assert code(fenced("import time\ntime.sleep(0.2)"), {"tests": tests}) == (0.0, "Time Limit Exceeded\n\nLast Executed Input\n1")
    assert time.monotonic() - start < 10                                         # 20 s without the timer


def test_a_daemon_dies_with_its_namespace_where_there_is_no_filter(monkeypatch):
    if not namespaces():
        pytest.skip("this kernel grants no user namespaces; the docstring says what that means")
    mark = f"sandbox-{uuid.uuid4().hex}"
    monkeypatch.setattr(common, "SANDBOX", f"# {mark}\n" + common.SANDBOX.replace("'x86_64'", "'other'").replace("'aarch64'", "'another'"))
    assert "won" in code(fenced(FORK_AWAY + "print('won')"), {"tests": SUM})[1]
    assert not lingering(mark)


def test_eight_threads_grade_at_once_and_no_descriptor_stays_open():
    code(fenced(RIGHT), {"tests": SUM})
    before = len(os.listdir("/proc/self/fd"))
    programs = [RIGHT, "print(0)", "1 / 0", RIGHT] * 4
    with ThreadPoolExecutor(8) as pool:
        rewards = [reward for reward, _ in pool.map(lambda program: code(fenced(program), {"tests": SUM}), programs)]
    assert rewards == [1, 0, 0, 1] * 4
    assert len(os.listdir("/proc/self/fd")) == before
