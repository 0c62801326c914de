"""The teacher moves by the rule, in fp32, from the weights in memory, and never receives a gradient."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

from common import InputError, Run, Teacher, load_model, make_optimizer, on_completions

PAIRS = [([3, 20, 21, 5, 4], [30, 31, 5]), ([3, 22, 5, 4], [32, 33, 34, 35, 5])]
ARGS = dict(out="/nowhere", seed=0, dtype="auto", lr=1e-3, adam_betas=(0.9, 0.999), weight_decay=0.0)


@pytest.fixture
def run():
    return Run(SimpleNamespace(**ARGS))


@pytest.fixture(params=[0, 2], ids=["full", "lora"])
def student(request, tmp_path, run):
    return load_model(str(make_model(tmp_path / "m")), run, lora_rank=request.param)


def nudge(model, size=0.05, seed=0):
    """Moves every trained weight."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += size * torch.randn_like(p)


def logits(teacher):
    [(coefficient, h_ND, head)] = teacher.targets(PAIRS)
    return coefficient * head.logits(h_ND)


def student_logits(student, run):
    with torch.no_grad():
        return on_completions(student, PAIRS, run.args, lambda h, head: head.logits(h))


def test_teacher_begins_as_the_student_in_memory(student, run):
    """Traps 30 and 31: not reloaded from the folder, and with LoRA not from a zero adapter, also when the adapter is trained already."""
    nudge(student)
    for kind in ("ema", "base", "live"):
        assert torch.allclose(logits(Teacher(kind, 0.1, student, run)), student_logits(student, run), atol=1e-6)


@pytest.mark.parametrize("kind, rate, want", [("ema", 0.25, 0.25), ("ema", 0.0, 0.0), ("ema", 1.0, 1.0), ("base", 0.25, 0.0), ("live", 0.25, 1.0)])
def test_update_moves_the_teacher_by_the_rate(kind, rate, want, student, run):
    """Trap 28: teacher <- (1 - rate) teacher + rate student; rate 0 constant, rate 1 equal; base never, live at once."""
    teacher = Teacher(kind, rate, student, run)
    before = [p.detach().clone() for p in student.parameters() if p.requires_grad]
    nudge(student)
    teacher.update()
    after = [t for t, s in zip(teacher.model.parameters(), student.parameters()) if s.requires_grad]
    for old, new, s in zip(before, after, (p for p in student.parameters() if p.requires_grad), strict=True):
        assert torch.allclose(new, old + want * (s - old), atol=1e-6)
    if want == 1.0:
        assert torch.allclose(logits(teacher), student_logits(student, run), atol=1e-5)


def test_ema_in_fp32_follows_tiny_steps(tmp_path, run):
    """Trap 29: 300 steps of 2e-6 a weight at rate .01, from a bf16 folder, within 1 % of a float64 reference."""
    student = load_model(str(make_model(tmp_path / "m")), run)
    for p in student.parameters():
        p.data = p.data.bfloat16().float()
    teacher = Teacher("ema", 0.01, student, run)
    s = student.lm_head.weight.detach().double().clone()
    start, reference, drift = s.clone(), s.clone(), 2e-6 * torch.randn_like(s)
    for _ in range(300):
        s += drift
        student.lm_head.weight.data.copy_(s)
        teacher.update()
        reference.lerp_(s, 0.01)
    moved = (teacher.model.lm_head.weight.double() - start).norm() / (reference - start).norm()
    assert moved == pytest.approx(1, abs=0.01)


def test_no_gradient_reaches_the_teacher(student, run):
    """Trap 26: no gradient, no parameter in the optimiser; the frozen weights under LoRA are shared, the trained ones are not."""
    teacher = Teacher("ema", 0.1, student, run)
    [(_, h_ND, head)] = teacher.targets(PAIRS)
    assert not h_ND.requires_grad and not any(p.requires_grad for p in teacher.model.parameters())
    on_completions(student, PAIRS, run.args, lambda h, own: (own.logits(h) * head.logits(h_ND)).sum()).backward()
    assert all(p.grad is None for p in teacher.model.parameters() if not any(p is s for s in student.parameters()))
    trained = {id(p) for group in make_optimizer(student, run.args).param_groups for p in group["params"]}
    assert trained == {id(p) for p in student.parameters() if p.requires_grad}
    for t, s in zip(teacher.model.parameters(), student.parameters()):
        assert (t is s) == (not s.requires_grad)


def test_teacher_pass_leaves_the_student_as_it_was(student, run):
    """Trap 27: same outputs, same requires_grad, same gradients before and after."""
    teacher = Teacher("ema", 0.1, student, run)
    flags, before = [p.requires_grad for p in student.parameters()], student_logits(student, run)
    nudge(teacher.model.requires_grad_(True), seed=2)
    teacher.model.requires_grad_(False)
    if all(flags):
        assert not torch.allclose(logits(teacher), before, atol=1e-2)
        assert torch.equal(student_logits(student, run), before)
    assert [p.requires_grad for p in student.parameters()] == flags


def test_trust_region_mixes_logits_of_base_and_live(student, run):
    """(1 - rate) base + rate live, evaluated on the teacher's prompt; the base never moves."""
    base = student_logits(student, run)
    teacher = Teacher("trust_region", 0.3, student, run)
    nudge(student)
    teacher.update()
    mixed = sum(c * head.logits(h) for c, h, head in teacher.targets(PAIRS))
    assert torch.allclose(mixed, 0.7 * base + 0.3 * student_logits(student, run), atol=1e-5)


def test_distance_is_relative(student, run):
    teacher = Teacher("base", 0.1, student, run)
    assert teacher.distance() == 0
    for p in student.parameters():
        if p.requires_grad:
            p.data *= 2
    assert teacher.distance() == pytest.approx(0.5, abs=1e-6)


def test_another_model_as_teacher(tmp_path, student, run):
    other = make_model(tmp_path / "other", "llama", seed=5)
    assert not torch.allclose(logits(Teacher(str(other), 0.1, student, run)), student_logits(student, run), atol=0.1)
    with pytest.raises(InputError, match="share one vocabulary"):
        Teacher(str(make_model(tmp_path / "wide", vocab_size=120)), 0.1, student, run)


def test_two_teacher_passes_are_the_same_while_the_student_trains(tmp_path, run):
    """Trap 25: with attention dropout in the config."""
    student = load_model(str(make_model(tmp_path / "m", attention_dropout=0.5)), run)
    teacher = Teacher("ema", 0.1, student, run)
    assert torch.equal(logits(teacher), logits(teacher))


def test_states_alone_equal_states_in_a_padded_batch(tmp_path, run):
    """Traps 15 and 16, also with absolute positions (GPT-2)."""
    for family in ("qwen3", "gpt2"):
        model = load_model(str(make_model(tmp_path / family, family)), run)
        both = student_logits(model, run)
        alone = torch.cat([on_completions(model, [pair], run.args, lambda h, head: head.logits(h).detach()) for pair in PAIRS])
        assert torch.allclose(both, alone, atol=1e-5)


def test_row_n_predicts_completion_token_n(tmp_path, run):
    """Trap 14: against the model's own logits one position earlier."""
    model = load_model(str(make_model(tmp_path / "m")), run)
    ours = student_logits(model, run)
    with torch.no_grad():
        theirs = torch.cat([model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1:-1] for prompt, y in PAIRS])
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours[1:], theirs[:-1], atol=0.1)
