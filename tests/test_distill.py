"""Distillation from another model: whose answers a step learns from, what both sides read, what each objective does."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import killed_after, make_model, run_here, same
from test_sdft import watch

import common
import distill
from common import Head, InputError, Objective, Run, Sampler, Sampling, Teacher, TopK, parse_args
from distill import PRESETS, Args, Sample, gkd_loss, on_policy, to_row, training_rows

STUB = dict(out="/nowhere", dtype="auto", activation_checkpointing=False, seed=0)
STUB |= dict(sample_batch=99, engine="transformers")


@pytest.fixture
def drawn(monkeypatch):
    """All that any sampler drew: (stream, its stop tokens, row, prompt, y)."""
    found = []

    def see(args, rollouts):
        sampler, _, prompts, keys, stream, _ = args
        for (row, _), prompt, y in zip(keys, prompts, rollouts, strict=True):
            found.append((stream[0], sampler.eos.tolist(), row, prompt, y.ids))

    watch(monkeypatch, Sampler, "__call__", see)
    return found


@pytest.fixture
def learnt(monkeypatch):
    """(sample, its teacher_logp) for all that the loss was computed on."""
    found = []

    def see(args, out):
        of_N = out[1].get("teacher_logp", torch.zeros(len(args[0])))
        found.extend(zip(args[3], of_N.split([len(s.y) for s in args[3]]), strict=True))

    watch(monkeypatch, distill, "gkd_loss", see)
    return found


def test_rows_of_the_papers_data_sets():
    suffix = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    row = to_row({"question": "How many?", "answer": "48/2 = <<48/2=24>>24\nSo 1,224.\n#### 1,224"})
    assert row["prompt"] == [{"role": "user", "content": "How many?" + suffix}] and row["answer"] == "1224"
    assert row["completion"] == "48/2 = <<48/2=24>>24\nSo 1,224.\n\\boxed{1224}"
    row = to_row({"question": "Q", "final_answer": "x^2", "r1_solution_1": "thus", "difficulty": 5.0})
    assert (row["prompt"][0]["content"], row["answer"], row["completion"]) == ("Q" + suffix, "x^2", "thus")
    row = to_row({"id": 60, "problem": "Q", "solution": "s", "answer": "204", "url": "u", "year": "2024"})  # AIME
    assert (row["prompt"][0]["content"], row["answer"]) == ("Q" + suffix, "204") and "completion" not in row
    for answer in ("48/2 = 24\n#### 24", "x\n#### -1,000,000"):
        row = to_row({"question": "Q", "answer": answer})
        assert common.math_answer(row["completion"], row)[0] == 1


def rows_of(path, args, **more):
    path.write_text(json.dumps({"prompt": "zig:12", **more}) + "\n")
    args.data = str(path)
    return common.tokenize(training_rows(args), toy.make_tokenizer(), args)


def test_completions_end_with_eos_and_only_lambda_below_one_wants_them(tmp_path):
    tokenizer, path, fixed = toy.make_tokenizer(), tmp_path / "f.jsonl", dict(lmbda=0.5, chat_kwargs={})
    for completion in ("34", [{"role": "assistant", "content": "34"}]):
        [row] = rows_of(path, Args(**fixed), completion=completion)
        assert row["completion_ids"] == tokenizer("34<|end|>")["input_ids"]
    for args in (Args(chat_kwargs={}), Args(**fixed, outputs="teacher")):
        assert "completion_ids" not in rows_of(path, args, completion="3" * 9999)[0]
    for missing in ({}, {"completion": " "}):
        with pytest.raises(InputError, match="f.jsonl:1: no 'completion' in this row; --lmbda 0.5"):
            rows_of(path, Args(**fixed), **missing)
    with pytest.raises(InputError, match="--max-completion-tokens"):
        rows_of(path, Args(**fixed, max_completion_tokens=2), completion="34")


def test_lambda_is_a_share_of_steps_drawn_from_seed_and_step_alone():
    """Algorithm 1. Ranks agree, because nothing but the two numbers enters; another seed draws other steps."""

    def share(lmbda, seed=0):
        return [on_policy(Args(lmbda=lmbda, seed=seed), step) for step in range(1, 1001)]

    assert not any(share(0.0)) and all(share(1.0))
    assert sum(share(0.5)) == pytest.approx(500, abs=50) and sum(share(0.9)) == pytest.approx(900, abs=30)
    assert all(b for a, b in zip(share(0.5), share(0.9), strict=True) if a)
    assert share(0.5) == share(0.5) != share(0.5, seed=1)


def test_steps_take_the_students_answers_or_the_fixed_ones(tiny, tmp_path, monkeypatch, drawn, learnt):
    """Off-policy steps score the file's completion, on-policy steps what was drawn; both sides read one prompt."""
    taught, read = [], []
    watch(monkeypatch, Teacher, "targets", lambda args, _: taught.extend(args[1]))
    watch(monkeypatch, distill, "completion_states", lambda args, _: read.extend(args[1]))
    rows = run_here("distill", tmp_path / "r", tiny, "--lmbda 0.5 --steps 6 --rollouts 2 --eval-every 99")
    took = [on_policy(Args(lmbda=0.5, seed=0), step) for step in range(1, 7)]
    assert 0 < sum(took) < 6 and [r["distill/on_policy"] for r in rows[1:]] == took
    assert taught == read == [(s.prompt, s.y) for s, _ in learnt]
    tokenizer = toy.make_tokenizer()
    lines = [json.loads(line) for line in tiny.data.read_text().splitlines()]
    texts = {f"<|user|>{r['prompt']}<|end|><|assistant|>": r["completion"] + "<|end|>" for r in lines}
    own = [(prompt, y) for stream, _, _, prompt, y in drawn if stream == common.TRAIN_STREAM]
    pairs = iter(taught)
    for step in took:
        for prompt, y in itertools.islice(pairs, 16 if step else 8):
            assert (prompt, y) in own if step else texts[tokenizer.decode(prompt)] == tokenizer.decode(y)
    assert not list(pairs)


def test_the_teachers_outputs_come_from_a_stream_of_their_own(tiny, tmp_path, drawn, learnt):
    """At every step, twice in a step and after a resume, a row has the one answer that the teacher gave it."""
    flags = "--lmbda 0 --outputs teacher --prompts-per-step 32 --steps 4 --save-every 2 --sample-batch 5"
    whole = run_here("distill", tmp_path / "whole", tiny, flags)
    written = [(row, tuple(y)) for stream, _, row, _, y in drawn if stream == distill.OUTPUT_STREAM]
    assert len(written) == len(learnt) == 128 and len(set(written)) == len({row for row, _ in written}) == 24
    assert sorted(y for _, y in written) == sorted(tuple(s.y) for s, _ in learnt)
    with killed_after(3):
        run_here("distill", tmp_path / "cut", tiny, flags)
    same(run_here("distill", tmp_path / "cut", tiny, flags + " --resume"), whole)
    run = Run(SimpleNamespace(**STUB), toy.make_tokenizer())
    teacher = common.load_model(str(tiny.teacher), run)
    prompt = json.loads(tiny.data.read_text().splitlines()[6])["prompt"]
    ids = run.tokenizer(f"<|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    [y] = Sampler(run, teacher)(teacher, [ids], [(7, 0)], (distill.OUTPUT_STREAM,), Sampling(30))
    assert dict(written)[7] == tuple(y.ids)


def test_the_teacher_stops_where_it_stops(tiny, tmp_path, drawn):
    """Its outputs end with its own stop tokens, of which the student may know one only."""
    other = make_model(tmp_path / "other", seed=6)
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [5, 30]}))
    run_here("distill", tmp_path / "r", tiny, f"--teacher {other} --lmbda 0 --outputs teacher --steps 1")
    stops = {stream: set(eos) for stream, eos, *_ in drawn}
    assert stops[distill.OUTPUT_STREAM] > stops[common.EVAL_STREAM]


# ---- The loss


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    run = Run(SimpleNamespace(**STUB, tokens_per_batch=8))
    folder = tmp_path_factory.mktemp("world")
    student = run.student = common.load_model(str(make_model(folder / "m")), run)
    teacher = Teacher(str(make_model(folder / "t", seed=3)), 0.0, student, run)
    samples = [
        Sample(0, [3, 20, 5, 4], [30, 31, 32, 33, 5], [-3.0, -4.0, -5.0, -2.0, -6.0]),
        Sample(1, [3, 21, 22, 5, 4], [34, 35, 5], [-3.0, -4.0, -5.0]),
    ]
    return SimpleNamespace(run=run, student=student, teacher=teacher, samples=samples)


def loss_of(world, **flags):
    args, samples = Args(**flags), world.samples
    pairs = [(s.prompt, s.y) for s in samples]
    target = world.teacher.targets(pairs)
    h_ND = common.completion_states(world.student, pairs)
    n = {"sequences": 2, "tokens": 8}
    return gkd_loss(h_ND, common.head_of(world.student), target, samples, n, args)[:2]


def logps(model, s):
    with torch.no_grad():
        logits = model(torch.tensor([s.prompt + s.y])).logits[0, len(s.prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def of_y(log_p, s):
    return log_p.gather(1, torch.tensor(s.y)[:, None])[:, 0]


def averaged(per_answer, average="sequence"):
    if average == "token":
        return torch.cat(per_answer).mean()
    return sum(x.mean() for x in per_answer) / len(per_answer)


def kl(a, b):
    return (a.exp() * (a - b)).sum(-1)


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_divergence_by_hand(divergence, average, world):
    """Mean over an answer's tokens, then over answers (GKD), or over all tokens."""
    each = []
    for s in world.samples:
        p, q = logps(world.student, s), logps(world.teacher.model, s)
        m = ((p.exp() + q.exp()) / 2).log()
        each.append(dict(forward_kl=kl(q, p), reverse_kl=kl(p, q), jsd=(kl(p, m) + kl(q, m)) / 2)[divergence])
    loss = loss_of(world, divergence=divergence, average=average)[0].item()
    assert loss == pytest.approx(averaged(each, average).item(), rel=1e-5)


def test_sft_is_the_likelihood_of_the_outputs(world):
    want = averaged([-of_y(logps(world.student, s), s) for s in world.samples])
    assert loss_of(world, objective="sft", lmbda=0.0)[0].item() == pytest.approx(want.item(), rel=1e-5)


def test_policy_gradient_by_hand(world):
    """-(student / sampler) A, and what is reported: the log-ratio to the teacher on the sampled tokens."""
    each = []
    for s in world.samples:
        drawn = torch.tensor(s.logps)
        advantage = of_y(logps(world.teacher.model, s), s) - drawn
        each.append(-(of_y(logps(world.student, s), s) - drawn).exp() * advantage)
    loss, stats = loss_of(world, objective="policy_gradient")
    assert loss.item() == pytest.approx(averaged(each).item(), rel=1e-5)
    theirs = torch.cat([of_y(logps(world.teacher.model, s), s) for s in world.samples])
    ours = torch.tensor([x for s in world.samples for x in s.logps])
    assert torch.allclose(stats["teacher_logp"].double(), theirs, atol=1e-5)
    assert torch.allclose(stats["divergence"].double(), ours - theirs, atol=1e-5)


def test_the_policy_gradient_is_on_average_the_gradient_of_the_reverse_kl():
    """Trap 35: strictly on-policy, weighted by p over every token; and it is --support sampled, token by token."""
    torch.manual_seed(0)
    h, W, W_t = (torch.randn(n, 6, dtype=torch.float64) for n in (1, 11, 11))
    W.requires_grad_()
    p, q = (h @ W.detach().t()).log_softmax(-1)[0], (h @ W_t.t()).log_softmax(-1)[0]
    teacher, one, total = [(1.0, h, Head(W_t))], torch.ones(1, dtype=torch.float64), torch.zeros_like(W)
    for y in range(11):
        y_N, nothing = torch.tensor([y]), torch.zeros(1, 0)
        target = TopK(nothing.long(), nothing, q[y_N])
        micro = [Sample(0, [0], [y], [p[y].item()])]
        args, n = Args(objective="policy_gradient"), {"sequences": 1, "tokens": 1}
        ours = torch.autograd.grad(gkd_loss(h, Head(W), target, micro, n, args)[0], W)[0]
        loss, _ = common.distill_loss(h, Head(W), teacher, y_N, one, Objective("reverse_kl", "sampled"))
        assert torch.allclose(ours, torch.autograd.grad(loss, W)[0], atol=1e-6)
        total += p[y].exp() * ours
    loss, _ = common.distill_loss(h, Head(W), teacher, torch.tensor([0]), one, Objective("reverse_kl"))
    assert torch.allclose(total, torch.autograd.grad(loss, W)[0], atol=1e-6) and total.abs().max() > 1e-3


# ---- The loop


def test_the_teacher_is_asked_about_the_sampled_tokens(tiny, tmp_path, learnt):
    """Sampler and teacher meet in the loop: recomputed from what the loss is given."""
    run_here("distill", tmp_path / "r", tiny, "--objective policy_gradient --steps 1")
    run = Run(SimpleNamespace(**STUB))
    student, teacher = common.load_model(str(tiny.model), run), common.load_model(str(tiny.teacher), run)
    assert len(learnt) == 8
    for s, told in learnt:
        assert s.logps == pytest.approx(of_y(logps(student, s), s).tolist(), abs=1e-4)
        assert told.tolist() == pytest.approx(of_y(logps(teacher, s), s).tolist(), abs=1e-4)


def test_one_buffer_serves_several_optimiser_steps(tiny, tmp_path, monkeypatch):
    """The ratio of the policy gradient leaves 1 after the first step of a batch; with one step a batch it is 1."""
    calls = []
    watch(monkeypatch, distill, "optimizer_step", lambda args, _: calls.append(1))
    on = run_here("distill", tmp_path / "on", tiny, "--objective policy_gradient")
    assert len(calls) == 3 and all(r["distill/is_ratio_mean"] == pytest.approx(1, abs=1e-5) for r in on[1:])
    off = run_here("distill", tmp_path / "off", tiny, "--objective policy_gradient --mini-batch 2 --lr 1e-2")
    assert len(calls) == 3 + 12 and any(abs(r["distill/is_ratio_mean"] - 1) > 1e-2 for r in off[1:])
    assert all(r["rollout/logp_gap_max"] < 1e-4 for r in off[1:])  # of the first step alone


def test_a_teacher_equal_to_the_student_teaches_nothing(tiny, tmp_path):
    rows = run_here("distill", tmp_path / "r", tiny, f"--teacher {tiny.model} --steps 1")
    assert rows[1]["train/loss"] == pytest.approx(0, abs=1e-6) and rows[1]["train/grad_norm"] < 1e-4


def test_the_divergence_falls(tiny, tmp_path):
    rows = run_here("distill", tmp_path / "r", tiny, "--steps 20 --lr 3e-3")
    assert rows[-1]["distill/divergence"] < 0.8 * rows[1]["distill/divergence"]


WAYS = """--divergence jsd --beta 0.1
--divergence reverse_kl --support teacher_topk --topk 5
--support student_topk --topk 5
--divergence reverse_kl --support sampled
--objective policy_gradient --rollouts 2
--objective sft --lmbda 0 --teacher nowhere
--objective sft --lmbda 0 --outputs teacher
--lmbda 0
--lmbda 0.5 --mini-batch 2
--lora-rank 2
--temperature 0.7"""


@pytest.mark.parametrize("flags", WAYS.split("\n"))
def test_every_way_runs(flags, tiny, tmp_path):
    """sft on completions loads no teacher; nobody is compared, and zero stands in the metrics."""
    rows = run_here("distill", tmp_path / "r", tiny, f"--steps 2 {flags}")
    assert all(math.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 for r in rows[1:])
    compared = [r[f"distill/{name}"] for name in ("divergence", "is_ratio_mean") for r in rows[1:]]
    assert any(compared) == ("--objective sft" not in flags)


MISTAKES = """--objective sft | add --lmbda 0 .it is 1.0
--objective policy_gradient --lmbda 0.5 | needs the student's own tokens
--support sampled --divergence reverse_kl --lmbda 0 | needs the student's own tokens
--outputs teacher | no step would learn from them
--objective policy_gradient --temperature 0.5 | needs --temperature 1
--support sampled | needs --divergence reverse_kl
--support teacher_topk --topk 1000 | --topk 1000: the vocabulary has
--divergence jsd --beta 1 | jsd vanishes there
--mini-batch 3 | must divide --prompts-per-step
--teacher ema | --teacher ema: expected another model's
--teacher= | --teacher .none.: expected another model's folder or hub id
--teacher-url localhost:8000 | expected http://localhost:8000/v1
--teacher-url http://localhost:80o/v1 | expected http://localhost:8000/v1
--teacher-url ftp://localhost/v1 | expected http://localhost:8000/v1
--teacher-url http://x/v1 | --support full is not for --teacher-url
--teacher-url http://x/v1 --support student_topk --topk 5 | --support student_topk is not for --teacher-url
--teacher-url http://x/v1 --objective sft --lmbda 0 | a server scores answers
--teacher-url http://x/v1 --lmbda 0 --outputs teacher | a server scores answers
--teacher /nowhere | --teacher /nowhere: no tokenizer could be loaded
--verifier nothing | --verifier nothing: nothing is no Python file here; expected"""


@pytest.mark.parametrize("mistake", MISTAKES.split("\n"))
def test_flags_that_cannot_mean_what_they_say(mistake, tiny, tmp_path, monkeypatch):
    flags, message = mistake.split(" | ")
    monkeypatch.setattr(distill, "load_model", lambda *a: pytest.fail("a model was loaded first"))
    with pytest.raises(InputError, match=message):
        run_here("distill", tmp_path / "r", tiny, f"--average token --divergence forward_kl {flags}")


def test_sides_without_a_common_end_are_refused(tiny, tmp_path, monkeypatch):
    """EOS ids of tokenizer, config and generation_config together: one in common is enough (a base student)."""
    tokenizer, other = toy.make_tokenizer(), make_model(tmp_path / "other", seed=6)

    def end_with(name, ids):
        settings = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps(settings | {"eos_token_id": ids}))

    ours = common.stop_ids(str(tiny.model))
    assert ours == [tokenizer.eos_token_id]
    end_with("generation_config.json", [*ours, 0])
    assert common.stop_ids(str(other), "--teacher") == [*ours, 0]
    run_here("distill", tmp_path / "r", tiny, f"--teacher {other} --steps 1")
    end_with("config.json", 0)
    end_with("generation_config.json", [0])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(other)
    assert common.stop_ids(str(other), "--teacher") == [0]
    monkeypatch.setattr(distill, "load_model", lambda *a: pytest.fail("a model was loaded first"))
    with pytest.raises(InputError, match=r"different tokens: \['<.pad.>'\] and \['<.end.>'\]"):
        run_here("distill", tmp_path / "s", tiny, f"--teacher {other} --dry-run")


def test_a_step_whose_answers_are_all_left_out(tiny, tmp_path, capsys, monkeypatch):
    """It takes no optimiser step, moves nothing, and is said."""
    monkeypatch.setattr(distill, "optimizer_step", lambda *_: pytest.fail("a step without an answer"))
    flags = "--steps 2 --mask-truncated --max-completion-tokens 1 --lr 1"
    rows = run_here("distill", tmp_path / "r", tiny, flags)
    assert [r["rollout/cut_frac"] for r in rows[1:]] == [1, 1]
    for r in rows[1:]:
        assert r["train/loss"] == r["train/grad_norm"] == r["distill/tokens"] == 0
    assert rows[0]["eval/avg@1"] == rows[2]["eval/avg@1"]
    assert "every completion was cut off; raise --max-completion-tokens" in capsys.readouterr().out
    first, last = (common.load_model(str(f), Run(SimpleNamespace(**STUB))) for f in (tiny.model, tmp_path / "r/last"))
    assert all(map(torch.equal, first.parameters(), last.parameters()))


def test_presets_pass_their_own_check():
    """tests/test_settings.py has their values."""
    for name in PRESETS:
        distill.check(parse_args(Args, PRESETS, ["--preset", name]), 151936)
    distill.check(Args(teacher_url="https://[::1]:8000/v1", support="teacher_topk"), 151936)
    gsm8k, deepmath = (parse_args(Args, PRESETS, ["--preset", name]) for name in ("gkd-gsm8k", "tml-math"))
    assert gsm8k.data == gsm8k.eval_data[0].replace("test", "train") == "openai/gsm8k:main@train#train"
    assert (deepmath.lmbda, deepmath.mini_batch, deepmath.data) == (1, 0, "zwhe99/DeepMath-103K@train")
