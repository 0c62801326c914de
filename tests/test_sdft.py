"""SDFT: what each side reads, which tokens carry the loss and how much, and the rules of section 3."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, run_here

import common
import sdft
import toy
from common import InputError, Run, Teacher, as_messages, load_model, most_uncertain, on_completions, parse
from sdft import Args, PRESETS, Sample, sdft_loss, teacher_messages, to_training_row, token_weights, tokenize

SYSTEM = {"role": "system", "content": "S"}


def row(prompt="zig:4721", context="so4>7;7>2;2>1;1>4;", **more):
    return to_training_row({"prompt": prompt, "privileged_context": context, **more}) | {"id": 0, "where": "f:1"}


# ---- What each side reads

def test_student_and_teacher_read_the_papers_words():
    tokenizer = toy.make_tokenizer()
    [r] = tokenize([row()], tokenizer, Args(max_teacher_tokens=100))
    assert tokenizer.decode(r["prompt_ids"]) == "<|user|>zig:4721<|end|><|assistant|>"
    assert tokenizer.decode(r["teacher_ids"]) == (
        "<|user|>\nzig:4721\n\nThis is an example for a response to the question:\nso4>7;7>2;2>1;1>4;\n\n"
        "Now answer with a response of your own, including the thinking process.\n<|end|><|assistant|>")


def test_the_student_never_reads_the_demonstration():
    """Whatever the demonstration is, the student's token ids are the same."""
    tokenizer = toy.make_tokenizer()
    one, other = (tokenize([row(context=c)], tokenizer, Args())[0] for c in ("so4>7;", "so9>9;9>9;"))
    assert one["prompt_ids"] == other["prompt_ids"] and one["teacher_ids"] != other["teacher_ids"]


def test_system_message_and_earlier_turns_stay_and_braces_survive():
    turns = [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "{demonstration} %s"}]
    out = teacher_messages(row(prompt=turns, context="{prompt}"), "<{prompt}|{demonstration}>")
    assert out == turns[:3] + [{"role": "user", "content": "<{demonstration} %s|{prompt}>"}]


def test_an_explicit_teacher_prompt_replaces_the_template():
    r = to_training_row({"prompt": "zig:1", "teacher_prompt": "rev:1"})
    assert teacher_messages(r, "unused {prompt}") == as_messages("rev:1")
    with pytest.raises(InputError, match="f:1: no 'privileged_context' in this row; --method sft"):
        tokenize([{**r, "where": "f:1"}], toy.make_tokenizer(), Args(method="sft"))


def test_chat_kwargs_are_each_sides_own():
    """Trap 21."""
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template += "{% if quick %} no{% endif %}"
    [r] = tokenize([row()], tokenizer, Args(teacher_chat_kwargs={"quick": True}))
    assert tokenizer.decode(r["teacher_ids"]).endswith("<|assistant|> no") and tokenizer.decode(r["prompt_ids"]).endswith("<|assistant|>")


def test_a_long_demonstration_never_pushes_the_question_out():
    """Trap 17: an error that names the flag, or a counted drop."""
    tokenizer, long = toy.make_tokenizer(), row(context="so" + "4>7;" * 50)
    with pytest.raises(InputError, match="f:1: .* over --max-teacher-tokens 64"):
        tokenize([long], tokenizer, Args(max_teacher_tokens=64))
    kept = tokenize([long, row()], tokenizer, Args(max_teacher_tokens=64, drop_long=True))
    assert len(kept) == 1 and "zig:4721" in tokenizer.decode(kept[0]["teacher_ids"])
    with pytest.raises(InputError, match="left no row"):
        tokenize([long], tokenizer, Args(max_teacher_tokens=64, drop_long=True))


# ---- Which tokens carry the loss

def test_token_weights():
    """Trap 22 and the averages: 1/(n_i B) after the skipped tokens, or one over all tokens."""
    assert token_weights([False, False, False, True, True], 4, 20, "sequence") == [0, 0, 0, 1 / 8, 1 / 8]
    assert token_weights([False, False, False, True, True], 4, 20, "token") == [0, 0, 0, 1 / 20, 1 / 20]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    run = Run(SimpleNamespace(out="/nowhere", dtype="auto"))
    student = load_model(str(make_model(tmp_path_factory.mktemp("world") / "m")), run)
    teacher = Teacher("ema", 0.1, student, run)
    prompts, contexts = [[3, 20, 5, 4], [3, 20, 21, 22, 5, 4]], [[3, 20, 40, 41, 42, 5, 4], [3, 43, 5, 4]]
    ys = [[30, 31, 32, 33, 5], [34, 35, 5]]
    samples = [Sample(p, c, y, [-1.0] * len(y), []) for p, c, y in zip(prompts, contexts, ys)]
    return SimpleNamespace(run=run, student=student, teacher=teacher, samples=samples)


def loss_of(world, args, samples=None, context=True):
    samples = samples or world.samples
    args.dtype = "auto"
    targets = world.teacher.targets([(s.context if context else s.prompt, s.y) for s in samples])
    n, tokens, skip = len(world.samples), sum(len(s.y) for s in world.samples), args.skip_tokens if args.method == "sdft" else 0
    masks = [[t >= skip for t in range(len(s.y))] for s in samples]
    weight_N = torch.tensor([w for mask in masks for w in (token_weights(mask, n, tokens, args.average) if any(mask) else [0.0] * len(mask))])
    return on_completions(world.student, [(s.prompt, s.y) for s in samples], args, lambda h, head: sdft_loss(h, head, targets, samples, weight_N, args))


def logps_by_hand(model, prompt, y):
    """log-softmax rows [len(y), V], straight from the model's logits."""
    with torch.no_grad():
        return model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1:-1].double().log_softmax(-1)


def test_loss_is_the_papers_sum_by_hand(world):
    """L = 1/B sum_i 1/n_i sum_{t>3} KL(teacher || student), n_i = |y_i| - 3. Trap 1: the arguments are not swapped."""
    want = 0.0
    for s in world.samples:
        p, q = logps_by_hand(world.student, s.prompt, s.y), logps_by_hand(world.teacher.model, s.context, s.y)
        per_token = (q.exp() * (q - p)).sum(-1)[3:]
        want += per_token.mean().item() / 2 if len(per_token) else 0.0
    assert loss_of(world, Args(is_cap=0))[0].item() == pytest.approx(want, rel=1e-5)


def test_same_model_same_prompt_gives_zero(world):
    """Trap 14: any shift between the sides would show."""
    loss, stats = loss_of(world, Args(is_cap=0, skip_tokens=0), context=False)
    assert abs(loss.item()) < 1e-6 and loss_of(world, Args(is_cap=0, skip_tokens=0))[0].item() > 0.1


def test_baselines_by_hand(world):
    """SFT: -log p(c). DFT: -sg[p(c)] log p(c), whose gradient is p times SFT's."""
    sft = dft = 0.0
    for s in world.samples:
        logp = logps_by_hand(world.student, s.prompt, s.y).gather(1, torch.tensor(s.y)[:, None])[:, 0]
        sft, dft = sft - logp.mean().item() / 2, dft - (logp.exp() * logp).mean().item() / 2
    assert loss_of(world, Args(method="sft"))[0].item() == pytest.approx(sft, rel=1e-5)
    assert loss_of(world, Args(method="dft"))[0].item() == pytest.approx(dft, rel=1e-5)


def test_dft_does_not_differentiate_its_weight(world):
    grads = {}
    for method in ("sft", "dft"):
        world.student.zero_grad()
        loss_of(world, Args(method=method), samples=[Sample(*world.samples[0][:2], [30], [-1.0], [])])[0].backward()
        grads[method] = world.student.lm_head.weight.grad.clone()
    p = logps_by_hand(world.student, world.samples[0].prompt, [30])[0, 30].exp().item()
    assert torch.allclose(grads["dft"], p * grads["sft"], atol=1e-7)


def test_is_weight_is_one_capped_mean_per_sequence(world):
    """w_i = mean_t min(r_t, cap) over the loss tokens; no lower clip (section 1.4 of the code)."""
    ys = [(s.prompt, s.y) for s in world.samples]
    logps = [logps_by_hand(world.student, p, y).gather(1, torch.tensor(y)[:, None])[:, 0] for p, y in ys]
    offsets = [torch.tensor([0.1, 0.2, 0.3, -0.5, 3.0]), torch.tensor([9.0, 9.0, 9.0])]
    samples = [s._replace(logps=(l - o).tolist()) for s, l, o in zip(world.samples, logps, offsets)]
    _, stats = loss_of(world, Args(is_cap=2.0), samples=samples)
    want = (torch.tensor(-0.5).exp().item() + 2.0) / 2
    assert stats["ratio"].tolist() == pytest.approx([want] * 5 + [0.0] * 3, rel=1e-5)
    loss = loss_of(world, Args(is_cap=2.0), samples=samples)[0].item()
    assert loss == pytest.approx(want * loss_of(world, Args(is_cap=0), samples=samples)[0].item(), rel=1e-5)      # trap 40: it is active


def test_sampling_temperature_does_not_touch_the_loss(world):
    """Trap 23; --loss-temperature does."""
    base = loss_of(world, Args(is_cap=0))[0].item()
    assert loss_of(world, Args(is_cap=0, temperature=0.7))[0].item() == base != loss_of(world, Args(is_cap=0, loss_temperature=0.7))[0].item()


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_loss_does_not_depend_on_the_split(world, average):
    """Traps 4 and 5, with answers of unequal length."""
    args = Args(is_cap=0, skip_tokens=1, average=average)
    parts = [loss_of(world, args, samples=[s])[0].item() for s in world.samples]
    assert sum(parts) == pytest.approx(loss_of(world, args)[0].item(), rel=1e-6)


# ---- The loop

def test_prompts_scored_are_the_very_lists_that_were_sampled_from(tiny, tmp_path, monkeypatch):
    """Traps 18 and 19: ids go from tokenizer to sampler and from sampler to both sides untouched; the teacher's prompt alone has c."""
    seen = {"sampled": [], "scored": [], "taught": []}
    sample, score = common.Sampler.__call__, sdft.on_completions
    def sampling(self, model, prompts, rows, n, stream, **kw):
        out = sample(self, model, prompts, rows, n, stream, **kw)
        if stream[0] == common.TRAIN_STREAM:
            seen["sampled"] += [(tuple(p), tuple(y.ids)) for p, group in zip(prompts, out) for y in group]
        return out
    targets = Teacher.targets
    monkeypatch.setattr(Teacher, "targets", lambda self, pairs: (seen["taught"].extend(pairs), targets(self, pairs))[1])
    monkeypatch.setattr(common.Sampler, "__call__", sampling)
    monkeypatch.setattr(sdft, "on_completions", lambda model, pairs, *rest: (seen["scored"].extend((tuple(p), tuple(y)) for p, y in pairs), score(model, pairs, *rest))[1])
    run_here("sdft", tmp_path / "r", tiny)
    assert len(seen["sampled"]) == 24 and sorted(s for s in seen["sampled"] if len(s[1]) > 1) == sorted(seen["scored"])
    header = toy.make_tokenizer()("This is an example for a response to the question:\n")["input_ids"]
    holds = lambda prompt: any(list(prompt[i:i + len(header)]) == header for i in range(len(prompt)))
    assert [tuple(y) for _, y in seen["taught"]] == [y for _, y in seen["scored"]]
    assert all(holds(prompt) for prompt, _ in seen["taught"]) and not any(holds(prompt) for prompt, _ in seen["scored"])


def test_generate_from_teacher_samples_with_the_demonstration(tiny, tmp_path, monkeypatch):
    prompts = []
    sample = common.Sampler.__call__
    def sampling(self, model, ps, rows, n, stream, **kw):
        prompts.append((stream[0], ps[0], any(p.requires_grad for p in model.parameters())))
        return sample(self, model, ps, rows, n, stream, **kw)
    monkeypatch.setattr(common.Sampler, "__call__", sampling)
    run_here("sdft", tmp_path / "r", tiny, "--generate-from teacher --is-cap 0 --cut-off keep")
    train = [(p, trained) for stream, p, trained in prompts if stream == common.TRAIN_STREAM]
    assert len(train) == 3 and all(len(p) > 30 and not trained for p, trained in train)


def test_ema_moves_once_per_step_whatever_the_micro_batches(tiny, tmp_path, monkeypatch):
    """Trap 33."""
    calls = []
    update = Teacher.update
    monkeypatch.setattr(Teacher, "update", lambda self: (calls.append(1), update(self))[1])
    a = run_here("sdft", tmp_path / "a", tiny, "--tokens-per-batch 8")
    assert len(calls) == 3
    b = run_here("sdft", tmp_path / "b", tiny)
    assert a[-1]["teacher/distance"] == pytest.approx(b[-1]["teacher/distance"], rel=1e-3) and a[-1]["teacher/distance"] > 0


def test_answers_cut_off_are_dropped_when_asked(tiny, tmp_path):
    """Trap 13."""
    kept, dropped = (run_here("sdft", tmp_path / how, tiny, f"--cut-off {how}")[1] for how in ("keep", "drop"))
    assert 0 < kept["rollout/cut_frac"] < 1 and kept["distill/active_frac"] > dropped["distill/active_frac"] > 0
    assert dropped["distill/active_frac"] <= 1 - dropped["rollout/cut_frac"] + 1e-9


def test_a_step_without_a_loss_token_changes_nothing(tiny, tmp_path):
    """Trap 8: every answer shorter than what is skipped."""
    rows = run_here("sdft", tmp_path / "r", tiny, "--skip-tokens 30")
    assert all(r["train/loss"] == 0 and r["train/grad_norm"] == 0 and r["distill/tokens"] == 0 for r in rows[1:])
    assert rows[-1]["teacher/distance"] == 0


def test_evaluation_does_not_touch_training(tiny, tmp_path):
    """Trap 49."""
    often, never = (run_here("sdft", tmp_path / n, tiny, f"--eval-every {n} --eval-temperature 1") for n in ("1", "9"))
    assert [r["train/loss"] for r in often[1:]] == [r["train/loss"] for r in never[1:]]
    assert "eval/avg@1" in often[1] and "eval/avg@1" not in never[1]


@pytest.mark.parametrize("flags, message", [
    ("--temperature 0.7", "--is-cap compares"), ("--top-p 0.9", "--is-cap compares"), ("--top-k 5", "--is-cap compares"),
    ("--generate-from teacher", "add --is-cap 0"),
    ("--support sampled", "add --divergence reverse_kl"), ("--divergence jsd --beta 0", "without its ends"), ("--ema-rate 1.5", "a rate in"),
    ("--support student_topk --topk 1000", "--topk 1000: the vocabulary has")])
def test_flags_that_cannot_mean_what_they_say(flags, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        run_here("sdft", tmp_path / "r", tiny, flags)


def test_skipped_tokens_carry_no_loss(tiny, tmp_path):
    """One more skipped: every answer that still had loss tokens has one less."""
    rows = [run_here("sdft", tmp_path / str(k), tiny, f"--steps 1 --skip-tokens {k}")[1] for k in range(4)]
    for before, after in zip(rows, rows[1:]):
        assert before["distill/tokens"] - after["distill/tokens"] == 8 * before["distill/active_frac"] and before["train/loss"] != after["train/loss"]


def test_entropy_quantile_keeps_the_most_uncertain_tokens(tiny, tmp_path):
    """Counted over the whole step, not per answer or micro-batch; the entropies come from the student."""
    world = lambda more: run_here("sdft", tmp_path / more.replace(" ", ""), tiny, f"--steps 1 {more}")[1]
    whole, some = world("--entropy-quantile 0"), world("--entropy-quantile 0.3")
    assert some["distill/tokens"] == math.ceil(0.3 * whole["distill/tokens"]) and some["rollout/entropy"] > whole["rollout/entropy"]
    assert world("--entropy-quantile 1")["train/loss"] == whole["train/loss"] != some["train/loss"]
    assert world("--entropy-quantile 0.3 --tokens-per-batch 8")["train/loss"] == pytest.approx(some["train/loss"], rel=1e-6)


def test_most_uncertain_by_hand(world):
    pairs, masks = [(s.prompt, s.y) for s in world.samples], [[False, True, True, True, True], [True, True, True]]
    world.run.args.tokens_per_batch = 8
    kept = most_uncertain(world.run, world.student, pairs, masks, 0.5)
    entropy = [[-(row.exp() * row).sum().item() for row in logps_by_hand(world.student, p, y)] for p, y in pairs]
    threshold = sorted([e for es, ms in zip(entropy, masks) for e, m in zip(es, ms) if m])[-4]
    assert kept == [[m and e > threshold - 1e-4 for e, m in zip(es, ms)] for es, ms in zip(entropy, masks)]


@pytest.mark.parametrize("flags", ["--divergence reverse_kl", "--divergence jsd", "--divergence mixed --support teacher_topk --topk 5 --no-tail",
                                   "--support student_topk --topk 5", "--divergence reverse_kl --support sampled", "--teacher live", "--teacher base",
                                   "--method sft", "--method dft", "--lora-rank 2", "--average token", "--rollouts 2"])
def test_every_way_runs_and_lowers_its_own_loss(flags, tiny, tmp_path):
    """On the same prompts again and again; the sampled support has no loss to lower, its advantage shrinks on average only."""
    rows = run_here("sdft", tmp_path / "r", tiny, f"--steps 20 --lr 1e-2 --prompts-per-step 12 --eval-every 20 {flags}")
    losses = [r["train/loss"] for r in rows[1:]]
    if "sampled" not in flags:
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(r["train/grad_norm"] > 0 for r in rows[1:])


# ---- Presets

def test_presets_are_the_papers():
    """papers: table 3 and 4, and the authors' main.py where the tables are silent."""
    for name in ("tooluse", "science", "medical", "knowledge"):
        a = parse(Args, PRESETS, ["--preset", name])
        assert (a.model, a.divergence, a.support, a.skip_tokens, a.average) == ("Qwen/Qwen2.5-7B-Instruct", "forward_kl", "full", 3, "sequence")
        assert (a.teacher, a.ema_rate, a.rollouts, a.prompts_per_step, a.is_cap) == ("ema", 0.01, 1, 32, 2.0)
        assert (a.temperature, a.top_p, a.top_k, a.schedule, a.warmup, a.grad_clip, a.weight_decay) == (1.0, 1.0, 0, "cosine", 10, 1.0, 0.0)
        assert a.adam_betas == (0.9, 0.999) and a.seed == 42 and a.eval_temperature == 0 and a.lr in (5e-6, 1e-5, 5e-5)
        assert a.max_completion_tokens == (1024 if name == "knowledge" else 2048) and a.epochs == (4 if name == "knowledge" else 2)
        assert a.max_prompt_tokens == 1024 and a.out == f"runs/sdft-{name}"
    assert parse(Args, PRESETS, ["--preset", "science"]).verifier == "choice" and parse(Args, PRESETS, ["--preset=tooluse"]).verifier == "tool_use"


def test_flags_win_over_the_preset():
    a = parse(Args, PRESETS, ["--lr", "1.0", "--preset", "science", "--student-chat-kwargs", '{"enable_thinking": false}'])
    assert (a.lr, a.verifier, a.student_chat_kwargs) == (1.0, "choice", {"enable_thinking": False})
    with pytest.raises(InputError, match="--preset sience: .* toy, tooluse, science"):
        parse(Args, PRESETS, ["--preset", "sience"])
