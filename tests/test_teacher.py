"""The teacher moves by the rule, in fp32, from the weights in memory, and never receives a gradient."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

from common import InputError, Run, Teacher, head_of, load_model, make_optimizer, on_completions

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


@pytest.mark.parametrize("ours, theirs", [(89, 120), (120, 89), (100, 120)])
def test_heads_padded_to_different_sizes_are_cut_to_the_smaller(ours, theirs, tmp_path, run, capsys):
    """Both sides, in scoring and sampling; the saved folder keeps its rows, and a whole head stays the very tensor."""
    student = load_model(str(make_model(tmp_path / "ours", vocab_size=ours)), run)
    assert head_of(student).weight is student.lm_head.weight
    teacher = Teacher(str(make_model(tmp_path / "theirs", vocab_size=theirs, seed=5)), 0.1, student, run)
    n = min(ours, theirs)
    assert f"padded to {ours} and {theirs} rows; both are cut to {n}" in capsys.readouterr().out
    assert logits(teacher).shape == student_logits(student, run).shape == (8, n)
    assert torch.equal(head_of(student).weight, student.lm_head.weight[:n]) and student.lm_head.weight.shape[0] == ours
    with torch.no_grad():
        plain = teacher.model(torch.tensor([PAIRS[0][0] + PAIRS[0][1]])).logits[0, 4:-1, :n]
    assert torch.allclose(logits(teacher)[:3], plain, atol=1e-5)


def test_a_head_that_does_not_cover_the_tokenizer_is_refused(tmp_path, student, run):
    with pytest.raises(InputError, match="the tokenizer has 89 tokens, but .* 89 rows and the teacher's 80"):
        Teacher(str(make_model(tmp_path / "small", vocab_size=80)), 0.1, student, run)


def test_another_tokenizer_is_refused_by_its_first_token(tmp_path, student, run):
    other = make_model(tmp_path / "other")
    file = other / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["zig"], vocabulary["zag"] = vocabulary["zag"], vocabulary["zig"]
    file.write_text(json.dumps(words))
    with pytest.raises(InputError, match="other and --model .*/m differ in vocabulary: token 'z[ai]g' is number"):
        Teacher(str(other), 0.1, student, run)


def adapter(folder, base, **changes):
    """A LoRA adapter as peft saves it, its weights not zero; and the model with it."""
    from peft import LoraConfig, get_peft_model
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **changes}))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) * 0.3
    model.save_pretrained(folder)
    return model.eval()


def test_a_lora_adapter_over_the_students_base(tmp_path, student, run):
    """Its base is the folder the student came from, not the student as it is now."""
    model = adapter(tmp_path / "adapter", tmp_path / "m")
    nudge(student)
    teacher = Teacher(str(tmp_path / "adapter"), 0.1, student, run)
    with torch.no_grad():
        theirs = torch.cat([model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1:-1] for prompt, y in PAIRS])
    assert torch.allclose(logits(teacher), theirs, atol=1e-4) and not torch.allclose(theirs, student_logits(student, run), atol=0.1)
    assert not any("lora" in name or p.requires_grad for name, p in teacher.model.named_parameters())


@pytest.mark.parametrize("other, changes", [(dict(hidden_size=48), {}), ({}, dict(target_modules=["gate_proj"]))], ids=["shapes", "names"])
def test_an_adapter_that_does_not_fit_is_refused(other, changes, tmp_path, student, run):
    adapter(tmp_path / "adapter", make_model(tmp_path / "other", **other), **changes)
    if changes:                                              # weights for layers that the adapter's own config does not name
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match="this adapter does not fit the student's base .*/m"):
        Teacher(str(tmp_path / "adapter"), 0.1, student, run)


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
