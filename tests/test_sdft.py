"""SDFT: what each side reads, which tokens carry the loss and how much, and the rules of section 3."""

import math
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import make_model, run_here

import common
import sdft
from common import InputError, Run, Teacher, as_messages, parse_args, tokenize
from sdft import PRESETS, Args, Sample, sdft_loss, to_training_row

SYSTEM = {"role": "system", "content": "S"}
TEMPLATE = Args().template


def row(prompt="zig:4721", context="so4>7;7>2;2>1;1>4;", template=TEMPLATE):
    raw = {"prompt": prompt, "privileged_context": context}
    return to_training_row(raw, Args(template=template)) | {"id": 0, "where": "f:1"}


# ---- What each side reads


def test_student_and_teacher_read_the_papers_words():
    tokenizer = toy.make_tokenizer()
    [r] = tokenize([row()], tokenizer, Args(max_teacher_tokens=100))
    assert tokenizer.decode(r["prompt_ids"]) == "<|user|>zig:4721<|end|><|assistant|>"
    assert tokenizer.decode(r["teacher_ids"]) == (
        "<|user|>\nzig:4721\n\nThis is an example for a response to the question:\nso4>7;7>2;2>1;1>4;\n\n"
        "Now answer with a response of your own, including the thinking process.\n<|end|><|assistant|>"
    )


def test_system_message_and_earlier_turns_stay_and_braces_survive():
    before = [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = [*before, {"role": "user", "content": "{demonstration} %s"}]
    template = "[{prompt}] {demonstration}"  # which is text, not a list
    sdft.check(Args(template=template), 1000)
    r = row(prompt=turns, context="{prompt}", template=template)
    assert r["teacher_messages"] == [*before, {"role": "user", "content": "[{demonstration} %s] {prompt}"}]


def test_an_explicit_teacher_prompt_replaces_the_template():
    raw = {"prompt": "zig:1", "teacher_prompt": "rev:1"}
    assert to_training_row(raw, Args())["teacher_messages"] == as_messages("rev:1")
    with pytest.raises(KeyError, match="privileged_context"):  # load_rows names file and row
        to_training_row(raw, Args(method="sft"))


def test_chat_kwargs_reach_both_sides():
    """Trap 21."""
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template += "{% if quick %} no{% endif %}"
    [r] = tokenize([row()], tokenizer, Args(chat_kwargs={"quick": True}))
    assert tokenizer.decode(r["prompt_ids"]).endswith("<|assistant|> no")
    assert tokenizer.decode(r["teacher_ids"]).endswith("<|assistant|> no")


def test_a_long_demonstration_never_pushes_the_question_out():
    """Trap 17: the row is left out."""
    tokenizer, long = toy.make_tokenizer(), row(context="so" + "4>7;" * 50)
    kept = tokenize([long, row()], tokenizer, Args(max_teacher_tokens=64))
    assert len(kept) == 1
    assert "zig:4721" in tokenizer.decode(kept[0]["teacher_ids"])
    with pytest.raises(InputError, match="none of the 1 rows fits; raise .*--max-teacher-tokens"):
        tokenize([long], tokenizer, Args(max_teacher_tokens=64))


def test_the_authors_rows_load():
    """Their SciKnowEval and ToolAlpaca rows, for evaluation; a right demonstration tells the letter."""
    science = {"prompt": "Q?", "system": "S", "answer": "A", "kind": "mcq", "idx": 4, "elo": "1500"}
    assert sdft.to_row(science)["answer"] == "A"
    assert sdft.to_row(science)["prompt"] == [SYSTEM, *as_messages("Q?")]
    assert sdft.to_row({"prompt": "Q?", "answer": "[]", "kind": "tooluse"})["prompt"] == as_messages("Q?")
    text = "<reasoning>\nx\n</reasoning>\n<answer>\nB\n</answer>"
    shown = sdft.to_row({"messages": [{"role": "user", "content": "q"}], "output_text": text})
    assert shown["answer"] == "B" and common.choice(text, shown) == 1


TURNS = (
    '[{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{demonstration}"},'
    ' {"role": "user", "content": "{prompt}"}]'
)
MESSAGES = "expected text or chat messages"


def test_turns_stand_in_place_of_the_last_user_message():
    """A template of chat messages, token by token: the demonstration is an earlier answer, the student's side
    is the same as with a text."""
    tokenizer = toy.make_tokenizer()
    before = [SYSTEM, {"role": "user", "content": "zag:1"}, {"role": "assistant", "content": "2"}]
    prompt = [*before, {"role": "user", "content": "zig:47"}]
    [told] = tokenize([row(prompt=prompt, context="7>4;", template=TURNS)], tokenizer, Args())
    [plain] = tokenize([row(prompt=prompt, context="7>4;")], tokenizer, Args())
    assert told["prompt_ids"] == plain["prompt_ids"]
    earlier = "<|system|>S<|end|><|user|>zag:1<|end|><|assistant|>2<|end|>"
    words = f"{earlier}<|user|>zig:47<|end|><|assistant|>7>4;<|end|><|user|>zig:47<|end|><|assistant|>"
    assert told["teacher_ids"] == tokenizer(words)["input_ids"]


@pytest.mark.parametrize(
    "template, message",
    [
        ("{prompt} {privileged_context}", "needs the placeholders {demonstration}$"),
        ("no place", "needs the placeholders {prompt}, {demonstration}$"),
        (TURNS.replace("{demonstration}", "{solution}"), "needs the placeholders {demonstration}$"),
        (TURNS[:-1], MESSAGES),
        (TURNS.replace('"content": "{demonstration}"', '"text": "{demonstration}"'), MESSAGES),
        (TURNS.replace('{"role": "user", "content": "{prompt}"}]', '"{prompt}"]'), MESSAGES),
        (TURNS.rpartition(",")[0] + ', "content": ["{prompt}"]}]', MESSAGES),
        (TURNS.rpartition(', {"role"')[0] + "]", "ends with the user's"),
        (TURNS.replace(': "{prompt}"}]', ': "a"}]'), "last message must contain {prompt} and no other"),
        (TURNS.replace(': "{prompt}"}]', ': "{prompt}{demonstration}"}]'), "and no other placeholder"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, message):
    with pytest.raises(InputError, match=f"--template.*{message}"):
        sdft.check(Args(template=template), 1000)


# ---- Which tokens carry the loss


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    run = Run(Args(out="/nowhere", tokens_per_batch=1000))
    student = run.student = common.load_model(str(make_model(tmp_path_factory.mktemp("world") / "m")), run)
    teacher = Teacher("ema", 0.1, student, run)
    prompts = [[3, 20, 5, 4], [3, 20, 21, 22, 5, 4]]
    contexts = [[3, 20, 40, 41, 42, 5, 4], [3, 43, 5, 4]]
    ys = [[30, 31, 32, 33, 5], [34, 35, 5, 36]]
    parts = zip(prompts, contexts, ys, strict=True)
    samples = [Sample(p, c, y, [-1.0] * len(y), [True] * len(y)) for p, c, y in parts]
    return SimpleNamespace(run=run, student=student, teacher=teacher, samples=samples)


def loss_of(world, args, samples=None, context=True):
    samples = samples or world.samples
    skip = args.skip_tokens if args.method == "sdft" else 0
    samples = [s._replace(mask=[t >= skip for t in range(len(s.y))]) for s in samples]
    targets = world.teacher.targets([(s.context if context else s.prompt, s.y) for s in samples])
    h_ND = common.completion_states(world.student, [(s.prompt, s.y) for s in samples])
    n = {"sequences": len(world.samples)}
    loss, stats, _ = sdft_loss(h_ND, common.head_of(world.student), targets, samples, n, args)
    return loss, stats


def logps_by_hand(model, prompt, y):
    """log-softmax rows [len(y), V], straight from the model's logits."""
    with torch.no_grad():
        return model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def drawn_by_hand(model, s):
    return logps_by_hand(model, s.prompt, s.y).gather(1, torch.tensor(s.y)[:, None])[:, 0]


def losses_by_hand(world):
    """1/n_i sum_{t>3} KL(teacher || student) of each answer, n_i = |y_i| - 3. Trap 1: not swapped."""
    found = []
    for s in world.samples:
        p = logps_by_hand(world.student, s.prompt, s.y)
        q = logps_by_hand(world.teacher.model, s.context, s.y)
        found.append((q.exp() * (q - p)).sum(-1)[3:].mean().item())
    return found


def test_loss_is_the_papers_mean_by_hand(world):
    """Trap 14: with one prompt on both sides, any shift between them would show."""
    assert loss_of(world, Args(is_cap=0))[0].item() == pytest.approx(sum(losses_by_hand(world)) / 2, rel=1e-5)
    assert abs(loss_of(world, Args(is_cap=0, skip_tokens=0), context=False)[0].item()) < 1e-6


def test_baselines_by_hand(world):
    """SFT: -log p(c). DFT: -sg[p(c)] log p(c), whose gradient is p times SFT's."""
    logps = [drawn_by_hand(world.student, s) for s in world.samples]
    sft, dft = sum(-p.mean() for p in logps) / 2, sum(-(p.exp() * p).mean() for p in logps) / 2
    assert loss_of(world, Args(method="sft"))[0].item() == pytest.approx(sft.item(), rel=1e-5)
    assert loss_of(world, Args(method="dft"))[0].item() == pytest.approx(dft.item(), rel=1e-5)
    grads, sample = [], world.samples[0]._replace(y=[30], logps=[-1.0])
    for method in ("sft", "dft"):
        world.student.zero_grad()
        loss_of(world, Args(method=method), samples=[sample])[0].backward()
        grads.append(world.student.lm_head.weight.grad.clone())
    p = drawn_by_hand(world.student, sample).exp().item()
    assert torch.allclose(grads[1], p * grads[0], atol=1e-7)


def test_is_weight_is_one_capped_mean_per_sequence(world):
    """w_i = mean_t min(r_t, cap) over the loss tokens; no lower clip (section 1.4 of the code)."""
    offsets = [torch.tensor([0.1, 0.2, 0.3, -0.5, 3.0]), torch.tensor([9.0, 9.0, 9.0, 0.2])]
    pairs = zip(world.samples, offsets, strict=True)
    samples = [s._replace(logps=(drawn_by_hand(world.student, s) - offset).tolist()) for s, offset in pairs]
    loss, stats = loss_of(world, Args(is_cap=2.0), samples=samples)
    first, second = (math.exp(-0.5) + 2.0) / 2, math.exp(0.2)
    assert stats["ratio"].tolist() == pytest.approx([first] * 5 + [second] * 4, rel=1e-5)
    one, other = losses_by_hand(world)
    assert loss.item() == pytest.approx((first * one + second * other) / 2, rel=1e-5)  # trap 40


def test_loss_does_not_depend_on_the_split(world):
    """Traps 4 and 5, with answers of unequal length."""
    args = Args(is_cap=0, skip_tokens=1)
    parts = [loss_of(world, args, samples=[s])[0].item() for s in world.samples]
    assert sum(parts) == pytest.approx(loss_of(world, args)[0].item(), rel=1e-6)


# ---- The loop


def watch(monkeypatch, owner, name, see):
    """Calls `see` with the arguments and the result of every call of owner.name."""
    real = getattr(owner, name)

    def watched(*args, **kwargs):
        result = real(*args, **kwargs)
        see(args, result)
        return result

    monkeypatch.setattr(owner, name, watched)


def test_prompts_scored_are_the_very_lists_that_were_sampled_from(tiny, tmp_path, monkeypatch):
    """Traps 18 and 19: ids go from tokenizer to sampler to both sides untouched; the teacher alone sees c."""
    sampled, scored, taught = [], [], []

    def see_sample(args, rollouts):
        _, _, prompts, _, stream, _ = args
        if stream[0] == common.TRAIN_STREAM:
            sampled.extend((p, y.ids) for p, y in zip(prompts, rollouts, strict=True))

    watch(monkeypatch, common.Sampler, "__call__", see_sample)
    watch(monkeypatch, Teacher, "targets", lambda args, _: taught.extend(args[1]))
    watch(monkeypatch, sdft, "completion_states", lambda args, _: scored.extend(args[1]))
    run_here("sdft", tmp_path / "r", tiny)
    assert len(sampled) == 24 and sorted(s for s in sampled if len(s[1]) > 1) == sorted(scored)
    assert [y for _, y in taught] == [y for _, y in scored]
    text = toy.make_tokenizer().decode
    assert all("an example for a response" in text(prompt) for prompt, _ in taught)
    assert not any("an example for a response" in text(prompt) for prompt, _ in scored)


def test_generate_from_teacher_samples_with_the_demonstration(tiny, tmp_path, monkeypatch):
    seen = []

    def see_sample(args, _):
        _, model, prompts, _, stream, _ = args
        if stream[0] == common.TRAIN_STREAM:
            seen.append(len(prompts[0]) > 30 and not any(p.requires_grad for p in model.parameters()))

    watch(monkeypatch, common.Sampler, "__call__", see_sample)
    run_here("sdft", tmp_path / "r", tiny, "--generate-from teacher --is-cap 0")
    assert seen == [True] * 3


def test_the_ema_waits_when_a_gradient_was_skipped(tiny, tmp_path, monkeypatch):
    norms, moved = iter([1.0, math.nan, math.inf, 1.0]), []
    monkeypatch.setattr(sdft, "optimizer_step", lambda *_: next(norms))
    watch(monkeypatch, Teacher, "update", lambda args, _: moved.append(args[0].run.bar.n))
    run_here("sdft", tmp_path / "r", tiny, "--steps 4 --eval-every 9")
    assert moved == [0, 3]


@pytest.mark.parametrize("method", ["sdft", "sft", "dft"])
def test_what_masks_tokens_masks_them_in_the_baselines_too(method, tiny, tmp_path):
    whole = run_here("sdft", tmp_path / "whole", tiny, f"--method {method} --steps 1")[1]
    part = run_here("sdft", tmp_path / "part", tiny, f"--method {method} --steps 1 --entropy-quantile 0.3")[1]
    assert 0 < part["distill/tokens"] < 0.5 * whole["distill/tokens"]
    assert part["train/loss"] != whole["train/loss"] and part["train/grad_norm"] != whole["train/grad_norm"]


@pytest.mark.parametrize("script", ["sdft", "srt", "sdzero"])
def test_evaluation_may_have_a_limit_of_its_own(script, tiny, tmp_path, monkeypatch):
    limits = {}

    def see(args, _):
        limits.setdefault(args[4][0], set()).add(args[5].max_tokens)

    watch(monkeypatch, common.Sampler, "__call__", see)
    run_here(script, tmp_path / "r", tiny, "--steps 1 --eval-max-tokens 7")
    assert limits == {common.TRAIN_STREAM: {30}, common.EVAL_STREAM: {7}}


def test_ema_moves_once_per_step_whatever_the_micro_batches(tiny, tmp_path, monkeypatch):
    """Trap 33."""
    calls = []
    watch(monkeypatch, Teacher, "update", lambda *_: calls.append(1))
    a, b = (run_here("sdft", tmp_path / n, tiny, f"--tokens-per-batch {n}")[-1] for n in ("8", "9999"))
    assert len(calls) == 3 + 3 and 0 < a["teacher/distance"] == pytest.approx(b["teacher/distance"], rel=1e-3)


@pytest.mark.parametrize("script, tokens", [("sdft", 29), ("sdzero", 30), ("distill", 30)])
def test_answers_cut_off_are_left_out_when_asked(script, tokens, tiny, tmp_path):
    """Trap 13. A cut-off answer has 30 tokens, of which sdft skips one here."""
    kept = run_here(script, tmp_path / "kept", tiny, "--steps 1")[1]
    masked = run_here(script, tmp_path / "masked", tiny, "--steps 1 --mask-truncated")[1]
    cut = 8 * kept["rollout/cut_frac"]
    assert 0 < cut < 8 and masked["rollout/cut_frac"] == kept["rollout/cut_frac"]
    assert kept["distill/tokens"] - masked["distill/tokens"] == cut * tokens
    if script != "distill":
        assert kept["distill/active_frac"] - masked["distill/active_frac"] == pytest.approx(cut / 8)


def test_a_step_without_a_loss_token_changes_nothing(tiny, tmp_path):
    """Trap 8: every answer shorter than what is skipped."""
    rows = run_here("sdft", tmp_path / "r", tiny, "--skip-tokens 30")
    for r in rows[1:]:
        assert r["train/loss"] == r["train/grad_norm"] == r["distill/tokens"] == 0
    assert rows[-1]["teacher/distance"] == 0


def test_evaluation_does_not_touch_training(tiny, tmp_path):
    """Trap 49."""
    often, never = (
        run_here("sdft", tmp_path / n, tiny, f"--eval-every {n} --eval-temperature 1") for n in ("1", "9")
    )
    assert [r["train/loss"] for r in often[1:]] == [r["train/loss"] for r in never[1:]]
    assert "eval/avg@1" in often[1]
    assert "eval/avg@1" not in never[1]


MISTAKES = """sdft --generate-from teacher | add --is-cap 0
sdft --support sampled | needs --divergence reverse_kl
sdft --generate-from teacher --is-cap 0 --support sampled --divergence reverse_kl | the student drew
sdft --support student_topk --topk 1000 | --topk 1000: the vocabulary has
sdzero --support sampled | needs --divergence reverse_kl
sdzero --support teacher_topk --topk 1000 | the vocabulary has"""


@pytest.mark.parametrize("mistake", MISTAKES.split("\n"))
def test_flags_that_cannot_mean_what_they_say(mistake, tiny, tmp_path):
    (script, _, flags), message = mistake.split(" | ")[0].partition(" "), mistake.split(" | ")[1]
    with pytest.raises(InputError, match=message):
        run_here(script, tmp_path / "r", tiny, flags)


def test_skipped_tokens_carry_no_loss(tiny, tmp_path):
    """One more skipped: every answer that still had loss tokens has one less."""
    rows = [run_here("sdft", tmp_path / str(k), tiny, f"--steps 1 --skip-tokens {k}")[1] for k in range(4)]
    for before, after in zip(rows, rows[1:], strict=False):
        less = before["distill/tokens"] - after["distill/tokens"]
        assert less == 8 * before["distill/active_frac"]
        assert before["train/loss"] != after["train/loss"]


def test_entropy_quantile_keeps_the_most_uncertain_tokens(tiny, tmp_path):
    """Counted over the whole step, not per answer or micro-batch; the entropies come from the student."""

    def step(more):
        return run_here("sdft", tmp_path / more.replace(" ", ""), tiny, f"--steps 1 {more}")[1]

    whole, some = step("--entropy-quantile 0"), step("--entropy-quantile 0.3")
    assert some["distill/tokens"] == math.ceil(0.3 * whole["distill/tokens"])
    assert some["rollout/entropy"] > whole["rollout/entropy"]
    assert step("--entropy-quantile 1")["train/loss"] == whole["train/loss"] != some["train/loss"]
    split = step("--entropy-quantile 0.3 --tokens-per-batch 8")
    assert split["train/loss"] == pytest.approx(some["train/loss"], rel=1e-6)


WAYS = """--divergence reverse_kl
--divergence jsd
--divergence mixed --support teacher_topk --topk 5
--support student_topk --topk 5
--divergence reverse_kl --support sampled
--teacher live
--teacher base
--method sft
--method dft
--lora-rank 2
--rollouts 2"""


@pytest.mark.parametrize("flags", WAYS.split("\n"))
def test_every_way_runs_and_lowers_its_own_loss(flags, tiny, tmp_path):
    """On the same prompts again and again; `sampled` has an advantage, which shrinks on average only."""
    more = f"--steps 20 --lr 1e-2 --prompts-per-step 12 --eval-every 20 {flags}"
    rows = run_here("sdft", tmp_path / "r", tiny, more)
    losses = [r["train/loss"] for r in rows[1:]]
    if "sampled" not in flags:
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(r["train/grad_norm"] > 0 for r in rows[1:])


# ---- Presets


def test_presets_are_the_papers():
    """Tables 3 and 4, and the authors' main.py where the tables are silent; test_settings.py has the rest."""
    for name in ("tooluse", "science", "medical", "knowledge"):
        a = parse_args(Args, PRESETS, ["--preset", name])
        assert (a.skip_tokens, a.teacher, a.ema_rate, a.is_cap) == (3, "ema", 0.01, 2.0)
        assert (a.schedule, a.adam_betas, a.seed) == ("cosine", (0.9, 0.999), 42)
        assert a.max_prompt_tokens == 1024 and a.out == f"runs/sdft-{name}"
        assert a.data.endswith("#train") == (name != "knowledge")
    for name in ("science", "tooluse"):
        a = parse_args(Args, PRESETS, ["--lr", "1.0", f"--preset={name}"])
        assert a.lr == 1.0 and a.eval_data == (f"data/{name}_train#test", f"data/{name}_eval")
    assert common.MAX_GRAD_NORM == 1.0
