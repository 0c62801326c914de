"""Distillation from another model: whose answers a step learns from, what both sides read, and what each objective differentiates."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import launch, make_model, run_here

import common
import distill
import toy
from common import Head, InputError, Run, Sampler, Teacher, TopK, distill_loss, load_model, on_completions, parse, read_jsonl, token_loss
from distill import PRESETS, Args, Sample, advantages, gkd_loss, on_policy, policy_loss, to_row, to_training_row, token_weight, tokenize


# ---- Rows, and whose answers a step learns from

def test_rows_of_the_papers_data_sets():
    suffix = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    row = to_row({"question": "How many?", "answer": "48/2 = <<48/2=24>>24\nSo 1,224.\n#### 1,224"})
    assert row["prompt"] == [{"role": "user", "content": "How many?" + suffix}] and row["answer"] == "1224"
    assert row["completion"] == "48/2 = <<48/2=24>>24\nSo 1,224.\n\\boxed{1224}"
    row = to_row({"question": "Q", "final_answer": "x^2", "r1_solution_1": "thus", "difficulty": 5.0})
    assert (row["prompt"][0]["content"], row["answer"], row["completion"]) == ("Q" + suffix, "x^2", "thus")
    assert to_training_row({"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]})["completion"] == "c"
    for answer in ("48/2 = 24\n#### 24", "x\n#### -1,000,000"):
        row = to_row({"question": "Q", "answer": answer})
        assert common.math_answer(row["completion"], row)[0] == 1


def test_completions_end_with_eos_and_only_lambda_below_one_wants_them():
    tokenizer = toy.make_tokenizer()
    rows = lambda **more: [{"prompt": common.as_messages("zig:12"), "where": "f:1", **more}]
    [row] = tokenize(rows(completion="34"), tokenizer, Args(lmbda=0.5, student_chat_kwargs={}))
    assert tokenizer.decode(row["output"]) == "34<|end|>" and row["output"].count(tokenizer.eos_token_id) == 1
    assert tokenize(rows(), tokenizer, Args(student_chat_kwargs={}))[0]["output"] == []
    assert tokenize(rows(), tokenizer, Args(lmbda=0.5, outputs="teacher", student_chat_kwargs={}))[0]["output"] == []
    for missing in ({}, {"completion": " "}):
        with pytest.raises(InputError, match="f:1: no 'completion' in this row; --lmbda 0.5"):
            tokenize(rows(**missing), tokenizer, Args(lmbda=0.5, student_chat_kwargs={}))
    with pytest.raises(InputError, match="f:1: 3 tokens, over --max-completion-tokens 2"):
        tokenize(rows(completion="34"), tokenizer, Args(lmbda=0.5, max_completion_tokens=2, student_chat_kwargs={}))


def test_lambda_is_a_share_of_steps_drawn_from_seed_and_step_alone(monkeypatch):
    """Algorithm 1. Ranks agree, because nothing but the two numbers enters; another seed draws other steps."""
    share = lambda lmbda, seed=0: [on_policy(Args(lmbda=lmbda, seed=seed), step) for step in range(1, 1001)]
    assert not any(share(0.0)) and all(share(1.0))
    assert sum(share(0.5)) == pytest.approx(500, abs=50) and sum(share(0.9)) == pytest.approx(900, abs=30)
    assert all(b for a, b in zip(share(0.5), share(0.9)) if a)
    before = share(0.5)
    monkeypatch.setenv("RANK", "3")
    assert share(0.5) == before != share(0.5, seed=1)


def test_steps_take_the_students_answers_or_the_fixed_ones(tiny, tmp_path, monkeypatch):
    """What is scored on an off-policy step is the file's completion; on an on-policy step what the sampler gave. Both sides read one prompt."""
    seen, scored, drawn = [], [], []
    targets, score, sample = Teacher.targets, distill.on_completions, Sampler.__call__
    monkeypatch.setattr(Teacher, "targets", lambda self, pairs: (seen.extend(pairs), targets(self, pairs))[1])
    monkeypatch.setattr(distill, "on_completions", lambda model, pairs, *rest: (scored.extend(pairs), score(model, pairs, *rest))[1])
    def watched(self, model, prompts, rows, n, stream, **how):
        groups = sample(self, model, prompts, rows, n, stream, **how)
        drawn.extend((tuple(prompt), tuple(y.ids), stream) for prompt, group in zip(prompts, groups) for y in group)
        return groups
    monkeypatch.setattr(Sampler, "__call__", watched)
    rows = run_here("distill", tmp_path / "r", tiny, "--lmbda 0.5 --steps 6 --rollouts 2 --eval-every 99")
    took = [on_policy(Args(lmbda=0.5, seed=0), step) for step in range(1, 7)]
    assert 0 < sum(took) < 6 and [r["distill/on_policy"] for r in rows[1:]] == took
    assert seen == scored and len(seen) == sum(16 if own else 8 for own in took)
    tokenizer = toy.make_tokenizer()
    own = {(prompt, y) for prompt, y, stream in drawn if stream[0] == common.TRAIN_STREAM}
    texts = {f"<|user|>{r['prompt']}<|end|><|assistant|>": r["completion"] + "<|end|>" for r in map(json.loads, tiny.data.read_text().splitlines())}
    at = 0
    for step in took:
        for prompt, y in seen[at:at + (16 if step else 8)]:
            if step:
                assert (tuple(prompt), tuple(y)) in own
            else:
                assert texts[tokenizer.decode(prompt)] == tokenizer.decode(y)
        at += 16 if step else 8


def test_the_teachers_outputs_are_drawn_once_from_a_stream_of_their_own(tiny, tmp_path, monkeypatch):
    """Later epochs and a resumed run read the file; each row is answered by the teacher, not the student."""
    asked, sample = [], Sampler.__call__
    def watched(self, model, prompts, rows, n, stream, **how):
        asked.append((stream[0], len(prompts)))
        return sample(self, model, prompts, rows, n, stream, **how)
    monkeypatch.setattr(Sampler, "__call__", watched)
    flags = "--lmbda 0 --outputs teacher --steps 6 --save-every 2 --eval-every 99 --sample-batch 5"
    whole = run_here("distill", tmp_path / "whole", tiny, flags)
    assert sum(n for stream, n in asked if stream == distill.OUTPUT_STREAM) == 24 and len({s for s, _ in asked} - {distill.OUTPUT_STREAM}) == 1
    log = Run.log
    def die(self, step, metrics):
        log(self, step, metrics)
        if step == 3:
            raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die)
        with pytest.raises(MemoryError):
            run_here("distill", tmp_path / "cut", tiny, flags)
    asked.clear()
    resumed = run_here("distill", tmp_path / "cut", tiny, flags + " --resume")
    assert not [s for s, _ in asked if s == distill.OUTPUT_STREAM]
    for a, b in zip(whole, resumed, strict=True):
        assert a["train/loss"] == b["train/loss"] if a["step"] else True
    kept = {o["row"]: o for o in read_jsonl(tmp_path / "whole" / "outputs" / "0.jsonl")}
    assert len(kept) == 24
    run = Run(SimpleNamespace(out="/nowhere", dtype="auto", seed=0, max_completion_tokens=30, sample_batch=99))
    tokenizer, teacher = toy.make_tokenizer(), load_model(str(tiny.teacher), run)
    prompt = common.chat_ids(tokenizer, common.as_messages(json.loads(tiny.data.read_text().splitlines()[6])["prompt"]), {})
    [[y]] = Sampler(tokenizer, teacher, run.args)(teacher, [prompt], [7], 1, (distill.OUTPUT_STREAM,), temperature=1.0)
    assert kept[7]["ids"] == y.ids and kept[7]["finished"] == y.finished


def test_outputs_of_another_run_are_not_taken(tiny, tmp_path):
    flags = "--lmbda 0 --outputs teacher --steps 2"
    run_here("distill", tmp_path / "r", tiny, flags)
    before = (tmp_path / "r" / "outputs" / "0.jsonl").read_text()
    with pytest.raises(InputError, match="already holds a run"):
        run_here("distill", tmp_path / "r", tiny, flags + " --temperature 0.5")
    run_here("distill", tmp_path / "r", tiny, flags + " --temperature 0.5 --overwrite")
    assert (tmp_path / "r" / "outputs" / "0.jsonl").read_text() != before


def test_answers_cut_off_are_kept_or_dropped(tiny, tmp_path):
    kept = run_here("distill", tmp_path / "kept", tiny, "--steps 1")[1]
    dropped = run_here("distill", tmp_path / "dropped", tiny, "--steps 1 --cut-off drop")[1]
    assert 0 < kept["rollout/cut_frac"] == dropped["rollout/cut_frac"] and dropped["distill/tokens"] < kept["distill/tokens"]
    assert kept["distill/tokens"] - dropped["distill/tokens"] == kept["rollout/cut_frac"] * 8 * 30
    with pytest.raises(InputError, match="all 8 answers of step 1 were cut off"):
        run_here("distill", tmp_path / "none", tiny, "--max-completion-tokens 1")


# ---- The loss

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    run = Run(SimpleNamespace(out="/nowhere", dtype="auto"))
    folder = tmp_path_factory.mktemp("world")
    student = load_model(str(make_model(folder / "m")), run)
    teacher = Teacher(str(make_model(folder / "t", seed=3)), 0.0, student, run)
    ys = [[30, 31, 32, 33, 5], [34, 35, 5]]
    samples = [Sample(p, y, [-3.0, -4.0, -5.0, -2.0, -6.0][:len(y)], None, [0.5, -1.0, 2.0, 0.25, -3.0][:len(y)])
               for p, y in zip([[3, 20, 5, 4], [3, 21, 22, 5, 4]], ys)]
    return SimpleNamespace(run=run, student=student, teacher=teacher, samples=samples)


def loss_of(world, own=True, **flags):
    args = Args(**flags)
    pairs = [(s.prompt, s.y) for s in world.samples]
    target = world.teacher.targets(pairs)
    if args.objective == "policy_gradient":
        target = TopK(*(torch.cat(parts) for parts in zip(*distill.ask(world.teacher, pairs, SimpleNamespace(
            args=SimpleNamespace(**{**vars(args), "tokens_per_batch": 8}), device=torch.device("cpu"))))))
    weight_N = torch.tensor([token_weight(len(s.y), 2, 8, args.average) for s in world.samples for _ in s.y])
    return on_completions(world.student, pairs, args, lambda h, head: gkd_loss(h, head, target, world.samples, weight_N, own, args))


def logps(model, s):
    with torch.no_grad():
        return model(torch.tensor([s.prompt + s.y])).logits[0, len(s.prompt) - 1:-1].double().log_softmax(-1)


def of_y(log_p, s):
    return log_p.gather(1, torch.tensor(s.y)[:, None])[:, 0]


def averaged(per_answer, average="sequence"):
    return sum(x.mean() for x in per_answer) / len(per_answer) if average == "sequence" else torch.cat(per_answer).mean()


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_divergence_by_hand(divergence, average, world):
    """Full vocabulary, both sides after the same prompt; mean over an answer's tokens, then over answers (GKD), or over all tokens."""
    def D(s):
        p, q = logps(world.student, s), logps(world.teacher.model, s)
        kl = lambda a, b: (a.exp() * (a - b)).sum(-1)
        m = ((p.exp() + q.exp()) / 2).log()
        return {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "jsd": (kl(p, m) + kl(q, m)) / 2}[divergence]
    want = averaged([D(s) for s in world.samples], average)
    assert loss_of(world, divergence=divergence, average=average)[0].item() == pytest.approx(want.item(), rel=1e-5)
    assert averaged([D(s) for s in world.samples]) != pytest.approx(averaged([D(s) for s in world.samples], "token").item(), rel=1e-3)


def test_loss_temperature_divides_both_sides(world):
    cool = lambda log_p: (log_p / 2).log_softmax(-1)
    D = lambda p, q: (q.exp() * (q - p)).sum(-1)
    want = averaged([D(cool(logps(world.student, s)), cool(logps(world.teacher.model, s))) for s in world.samples])
    assert loss_of(world, loss_temperature=2.0)[0].item() == pytest.approx(want.item(), rel=1e-5)


def test_sft_is_the_likelihood_of_the_outputs(world):
    want = averaged([-of_y(logps(world.student, s), s) for s in world.samples])
    assert loss_of(world, objective="sft", lmbda=0.0)[0].item() == pytest.approx(want.item(), rel=1e-5)


def test_importance_ratio_by_hand_and_only_on_the_students_own_answers(world):
    """Trap 40: min(student / sampler, cap) on each token's D; fixed outputs have no sampler."""
    each = []
    for s in world.samples:
        p, q = logps(world.student, s), logps(world.teacher.model, s)
        ratio = (of_y(p, s) - torch.tensor(s.logps)).exp()
        assert (ratio > 0.3).any() and (ratio < 0.3).any()
        each.append(ratio.clamp(max=0.3) * (q.exp() * (q - p)).sum(-1))
    assert loss_of(world, is_cap=0.3)[0].item() == pytest.approx(averaged(each).item(), rel=1e-5)
    assert loss_of(world, own=False, is_cap=0.3)[0].item() == loss_of(world)[0].item() != pytest.approx(averaged(each).item(), rel=1e-2)


def test_policy_gradient_by_hand(world):
    """-min(student / sampler, cap) A, and what is reported: the log-ratio to the teacher on the sampled tokens."""
    for cap in (0.0, 0.3, math.inf):
        ratio = [(of_y(logps(world.student, s), s) - torch.tensor(s.logps)).exp().clamp(max=cap) if cap else 1.0 for s in world.samples]
        want = averaged([-r * torch.tensor(s.advantage) for r, s in zip(ratio, world.samples)])
        loss, stats = loss_of(world, objective="policy_gradient", is_cap=cap)
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    theirs = torch.cat([of_y(logps(world.teacher.model, s), s) for s in world.samples])
    ours = torch.tensor([x for s in world.samples for x in s.logps])
    assert torch.allclose(stats["teacher_logp"].double(), theirs, atol=1e-5) and torch.allclose(stats["divergence"].double(), ours - theirs, atol=1e-5)


def test_the_cap_bounds_the_ratio_and_keeps_the_gradient():
    for cap, behaviour, factor in [(2.0, -1.0, math.e), (2.0, -0.5, math.e), (0.0, -3.0, 1.0), (math.inf, -3.0, math.exp(1.5))]:
        logp = torch.tensor([-1.5 if cap != 2.0 else behaviour + 1.0], requires_grad=True)
        loss = policy_loss(logp, torch.tensor([behaviour]), torch.tensor([3.0]), cap)
        want = min(factor, cap or math.inf)
        loss.backward()
        assert loss.item() == pytest.approx(-3 * want) and logp.grad.item() == pytest.approx(-3 * want)


def test_advantages_by_hand():
    """-coef (log p_sampler - log p_teacher), and gamma times the next token's; gamma 0 gives no credit to later tokens."""
    ours, theirs = [-1.0, -2.0, -0.5], [-3.0, -1.0, -0.5]
    assert advantages(ours, theirs, 1.0, 0.0) == [-2.0, 1.0, 0.0]
    assert advantages(ours, theirs, 2.0, 0.0) == [-4.0, 2.0, 0.0]
    assert advantages(ours, theirs, 1.0, 0.5) == [-1.5, 1.0, 0.0] and advantages(ours, theirs, 1.0, 1.0) == [-1.0, 1.0, 0.0]
    assert advantages([-1.0, -1.0, -1.0], [-1.0, -1.0, -2.0], 1.0, 0.5) == [-0.25, -0.5, -1.0]


def test_the_policy_gradient_is_on_average_the_gradient_of_the_reverse_kl():
    """Trap 35: strictly on-policy, discount 0; weighted by p over every token of the vocabulary. And it is --support sampled, token by token."""
    torch.manual_seed(0)
    h, W, W_t = torch.randn(1, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64).requires_grad_(), torch.randn(11, 6, dtype=torch.float64)
    p, q = (h @ W.detach().t()).log_softmax(-1)[0], (h @ W_t.t()).log_softmax(-1)[0]
    total, one = torch.zeros_like(W), torch.ones(1, dtype=torch.float64)
    for y in range(11):
        y_N, A = torch.tensor([y]), torch.tensor(advantages([p[y].item()], [q[y].item()], 1.0, 0.0), dtype=torch.float64)
        grads = []
        for cap in (0.0, 2.0):
            loss, _ = token_loss(h, Head(W), y_N, lambda logp, n: policy_loss(logp, p[y_N][n], A[n], cap))
            grads += torch.autograd.grad(loss, W)
        loss, _ = distill_loss(h, Head(W), [(1.0, h, Head(W_t))], y_N, one, divergence="reverse_kl", support="sampled")
        grads += torch.autograd.grad(loss, W)
        assert torch.allclose(grads[0], grads[1]) and torch.allclose(grads[0], grads[2])
        total += p[y].exp() * grads[0]
    loss, _ = distill_loss(h, Head(W), [(1.0, h, Head(W_t))], torch.tensor([0]), one, divergence="reverse_kl")
    assert torch.allclose(total, torch.autograd.grad(loss, W)[0]) and total.abs().max() > 1e-3


# ---- The loop

@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_advantage_is_that_of_the_sampled_tokens(temperature, tiny, tmp_path, monkeypatch):
    """coef, discount, sampler and teacher meet in the loop, both sides at one temperature: recomputed from what the loss is given."""
    seen, loss = [], distill.gkd_loss
    monkeypatch.setattr(distill, "gkd_loss", lambda h, head, target, micro, *rest: (seen.extend(micro), loss(h, head, target, micro, *rest))[1])
    run_here("distill", tmp_path / "r", tiny, "--objective policy_gradient --coef 0.5 --discount 0.25 --steps 1 "
             f"--temperature {temperature} --loss-temperature {temperature}")
    run = Run(SimpleNamespace(out="/nowhere", dtype="auto"))
    student, teacher = load_model(str(tiny.model), run), load_model(str(tiny.teacher), run)
    assert len(seen) == 8
    for s in seen:
        ours, theirs = (of_y((logps(model, s) / temperature).log_softmax(-1), s) for model in (student, teacher))
        a = -0.5 * (ours - theirs)
        want = [sum(0.25 ** (k - t) * a[k] for k in range(t, len(a))) for t in range(len(a))]
        assert s.advantage == pytest.approx([x.item() for x in want], abs=1e-4)


def test_one_buffer_serves_several_optimiser_steps(tiny, tmp_path, monkeypatch):
    """The ratio leaves 1 after the first; with one step a batch it is 1. The advantages are those of the sampler throughout."""
    calls, step = [], distill.optimizer_step
    monkeypatch.setattr(distill, "optimizer_step", lambda *a: (calls.append(1), step(*a))[1])
    for objective in ("divergence", "policy_gradient"):
        on = run_here("distill", tmp_path / f"on {objective}".replace(" ", "-"), tiny, f"--objective {objective} --is-cap 2")
        assert len(calls) == 3 and all(r["distill/is_ratio_mean"] == pytest.approx(1, abs=1e-5) for r in on[1:])
        off = run_here("distill", tmp_path / f"off-{objective}", tiny, f"--objective {objective} --is-cap 2 --mini-batch 2 --lr 1e-2")
        assert len(calls) == 3 + 12 and any(abs(r["distill/is_ratio_mean"] - 1) > 1e-2 for r in off[1:])
        calls.clear()


def test_a_teacher_equal_to_the_student_teaches_nothing(tiny, tmp_path):
    rows = run_here("distill", tmp_path / "r", tiny, f"--teacher {tiny.model} --steps 1")
    assert rows[1]["train/loss"] == pytest.approx(0, abs=1e-6) and rows[1]["train/grad_norm"] < 1e-4


def test_the_divergence_falls(tiny, tmp_path):
    rows = run_here("distill", tmp_path / "r", tiny, "--steps 20 --lr 3e-3")
    assert rows[-1]["distill/divergence"] < 0.8 * rows[1]["distill/divergence"]


@pytest.mark.parametrize("flags", ["--divergence jsd --beta 0.1", "--divergence reverse_kl --support teacher_topk --topk 5", "--support student_topk --topk 5 --no-tail",
                                   "--divergence reverse_kl --support sampled --is-cap 2", "--objective policy_gradient --rollouts 2 --is-cap inf",
                                   "--objective sft --lmbda 0", "--objective sft --lmbda 0 --outputs teacher", "--lmbda 0", "--lmbda 0.5 --mini-batch 2",
                                   "--lora-rank 2", "--temperature 0.7 --top-p 0.9 --top-k 20", "--loss-temperature 2", "--cut-off drop"])
def test_every_way_runs(flags, tiny, tmp_path):
    rows = run_here("distill", tmp_path / "r", tiny, f"--steps 2 {flags}")
    assert all(math.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 for r in rows[1:])


def test_sft_on_completions_loads_no_teacher(tiny, tmp_path):
    assert "distill/divergence" not in run_here("distill", tmp_path / "r", tiny, "--objective sft --lmbda 0 --teacher nowhere")[-1]


@pytest.mark.parametrize("flags, message", [
    ("--lmbda 1.5", "--lmbda 1.5: a share"), ("--objective sft", "add --lmbda 0 .it is 1.0"), ("--objective policy_gradient --lmbda 0.5", "needs tokens that the student"),
    ("--support sampled --divergence reverse_kl --lmbda 0", "needs tokens that the student"), ("--outputs teacher", "no step would learn from them"),
    ("--is-cap 2 --temperature 0.5", "--is-cap compares"), ("--objective policy_gradient --top-p 0.9", "--objective policy_gradient compares"),
    ("--is-cap -1", "--is-cap -1.0: a largest ratio"), ("--lmbda 0 --is-cap 2", "fixed outputs have no sampler"), ("--discount 0.5", "belong to --objective policy_gradient"),
    ("--coef 2", "belong to --objective policy_gradient"), ("--objective policy_gradient --discount 2", "--discount 2.0: from 0"),
    ("--objective sft --lmbda 0 --loss-temperature 2", "inside a divergence"), ("--support sampled", "add --divergence reverse_kl"),
    ("--support teacher_topk --topk 1000", "--topk 1000: the vocabulary has"), ("--divergence jsd --beta 1", "without its ends"),
    ("--divergence mixed --beta 2", "--beta 2.0: a share"), ("--rollouts 0", "--rollouts 0: at least one"), ("--mini-batch 3", "must divide --prompts-per-step"),
    ("--teacher ema", "--teacher ema: expected another model's"), ("--teacher", "--teacher .none.: expected another model's"),
    ("--teacher-url localhost:8000", "expected an address such as"), ("--teacher-url http://x/v1", "not --support full"),
    ("--teacher-url http://x/v1 --support student_topk --topk 5", "not --support student_topk"),
    ("--teacher-url http://x/v1 --support teacher_topk --topk 5 --loss-temperature 2", "those at temperature 1"),
    ("--teacher-url http://x/v1 --objective sft --lmbda 0", "a server scores answers"), ("--teacher-url http://x/v1 --lmbda 0 --outputs teacher", "a server scores answers"),
    ("--teacher-url http://x/v1 --support teacher_topk --topk 5 --teacher-requests 0", "--teacher-requests at least 1"),
    ("--teacher /nowhere", "--teacher /nowhere: no tokenizer could be loaded"), ("--verifier nothing", "--verifier nothing: expected")])
def test_flags_that_cannot_mean_what_they_say(flags, message, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "load_model", lambda *a: pytest.fail("a model was loaded first"))
    with pytest.raises(InputError, match=message):
        distill.main(parse(Args, PRESETS, [*f"--model {tiny.model} --teacher {tiny.teacher} --data {tiny.data} --eval-data {tiny.eval} --verifier exact --out "
                                           f"{tmp_path}/r --steps 1 --prompts-per-step 8 --average token --divergence forward_kl {flags}".split(),
                                           *([""] if flags == "--teacher" else [])]))


def test_dry_run_shows_what_both_read_and_the_fixed_output(tiny, tmp_path):
    done = launch(f"distill.py --model {tiny.model} --teacher {tiny.teacher} --data {tiny.data} --eval-data {tiny.eval} --out {tmp_path / 'r'} --lmbda 0 --dry-run")
    assert done.returncode == 0, done.stderr
    assert "student and teacher read: <|user|>zig:47210<|end|><|assistant|>\nfixed output: 1274<|end|>" in done.stdout and not (tmp_path / "r").exists()


def test_another_end_is_refused_unless_allowed(tiny, tmp_path):
    """EOS ids of tokenizer, config and generation_config together; nothing is loaded before."""
    other = make_model(tmp_path / "other", seed=6)
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [5, 0]}))
    with pytest.raises(InputError, match="ends its answers with .*<.pad.>.*--allow-eos-mismatch"):
        run_here("distill", tmp_path / "r", tiny, f"--teacher {other} --dry-run")
    run_here("distill", tmp_path / "r", tiny, f"--teacher {other} --allow-eos-mismatch --steps 1")


def test_presets_are_the_papers():
    """GKD: Algorithm 1 at temperature 1, sequence mean, lambda 1; forward KL is its best on GSM8K. Thinking Machines: section 4.3 of our notes."""
    a = parse(Args, PRESETS, ["--preset", "gkd-gsm8k"])
    assert (a.lmbda, a.divergence, a.support, a.average, a.temperature, a.loss_temperature, a.rollouts, a.is_cap) == (1.0, "forward_kl", "full", "sequence", 1.0, 1.0, 1, 0)
    assert (a.data, a.eval_data, a.verifier, a.outputs, a.mini_batch) == ("openai/gsm8k:main@train", ("openai/gsm8k:main@test",), "math", "completion", 0)
    a = parse(Args, PRESETS, ["--preset", "tml-math"])
    assert (a.objective, a.coef, a.discount, a.is_cap, a.lmbda, a.mini_batch) == ("policy_gradient", 1.0, 0.0, math.inf, 1.0, 0)
    assert (a.model, a.teacher, a.data, a.lora_rank, a.lr) == ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", "zwhe99/DeepMath-103K@train", 128, 1e-4)
    assert (a.prompts_per_step, a.rollouts, a.steps, a.max_completion_tokens, a.temperature, a.top_p, a.eval_temperature, a.eval_top_p) == (512, 4, 150, 4096, 1.0, 1.0, 1.0, 1.0)
    a = parse(Args, PRESETS, [])
    assert (a.model, a.teacher, a.divergence, a.beta, a.support, a.lmbda, a.average) == ("toy:lock-0/student", "toy:lock-0/teacher", "jsd", 0.5, "full", 1.0, "token")
    assert (a.lr, a.schedule, a.steps, a.prompts_per_step, a.adam_betas, a.weight_decay, a.warmup, a.max_completion_tokens) == (4e-4, "constant", 64, 32, (0.9, 0.95), 0.0, 5, 20)
    assert (a.eval_every, a.eval_samples, a.eval_temperature, a.verifier) == (8, 1, 1.0, "toy:lock")
    for name in PRESETS:
        distill.check(parse(Args, PRESETS, ["--preset", name]), 151936, 1)
