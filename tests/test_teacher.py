"""The teacher moves by the rule, in fp32, from the weights in memory, and never receives a gradient."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import make_model
from transformers import AutoModelForCausalLM

from common import InputError, Objective, Run, Teacher, completion_states, distill_loss
from common import head_of, learning_rate, load_model, make_optimizer, token_logps

PAIRS = [([3, 20, 21, 5, 4], [30, 31, 5]), ([3, 22, 5, 4], [32, 33, 34, 35, 5])]
Y_N = torch.tensor([token for _, y in PAIRS for token in y])


@pytest.fixture
def run():
    args = dict(out="/nowhere", seed=0, dtype="auto", activation_checkpointing=False)
    return Run(SimpleNamespace(**args, lr=1e-3, adam_betas=(0.8, 0.95), weight_decay=0.02))


@pytest.fixture(params=[0, 2], ids=["full", "lora"])
def student(request, tmp_path, run):
    return load_model(str(make_model(tmp_path / "m")), run, lora_rank=request.param)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def nudge(weights, size=0.05, seed=0):
    torch.manual_seed(seed)
    for p in weights:
        p += size * torch.randn_like(p)


@torch.no_grad()
def logits(teacher):
    return sum(share * head.logits(h_ND) for share, h_ND, head in teacher.targets(PAIRS))


@torch.no_grad()
def student_logits(student):
    return head_of(student).logits(completion_states(student, PAIRS))


def divergence(student, targets):
    h_ND, weight_N = completion_states(student, PAIRS), torch.ones(len(Y_N))
    return distill_loss(h_ND, head_of(student), targets, Y_N, weight_N, Objective())[0]


def test_the_optimizer_is_adamw_with_the_flags(student, run):
    [group] = make_optimizer(student, run.args).param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 0.02, 1e-3)
    rates = [learning_rate(step, SimpleNamespace(lr=2.0, warmup=2), 5) for step in range(1, 6)]
    assert rates == pytest.approx([1, 2] + [1 + math.cos(math.pi * t / 4) for t in (1, 2, 3)])


@pytest.mark.parametrize("kind", ["ema", "base", "live", "trust_region"])
def test_teacher_begins_as_the_student_in_memory(kind, student, run):
    """Traps 30 and 31: not reloaded from the folder; with LoRA not from a zero adapter."""
    nudge(trained(student))
    assert torch.allclose(logits(Teacher(kind, 0.1, student, run)), student_logits(student), atol=1e-6)


@pytest.mark.parametrize(
    "kind, rate, share",
    [("ema", 0.25, 0.25), ("ema", 0.0, 0.0), ("ema", 1.0, 1.0), ("base", 0.25, 0.0), ("live", 0.25, 1.0)],
)
def test_update_moves_the_teacher_by_the_rate(kind, rate, share, student, run):
    """Trap 28: teacher <- (1 - rate) teacher + rate student; base never moves, live at once."""
    teacher = Teacher(kind, rate, student, run)
    before = [p.detach().clone() for p in trained(student)]
    nudge(trained(student))
    moved = [p.detach().clone() for p in trained(student)]
    teacher.update()
    pairs = zip(teacher.model.parameters(), student.parameters(), strict=True)
    after = [t for t, s in pairs if s.requires_grad]
    for old, new, s, kept in zip(before, after, trained(student), moved, strict=True):
        assert torch.allclose(new, old + share * (s - old), atol=1e-6)
        assert torch.equal(s, kept)
    if share == 1.0:
        assert torch.allclose(logits(teacher), student_logits(student), atol=1e-5)


def test_sync_makes_the_teacher_the_student_as_it_is_now(student, run):
    teacher = Teacher("base", 0.0, student, run)
    nudge(trained(student))
    now = student_logits(student)
    assert not torch.allclose(logits(teacher), now, atol=1e-2) and teacher.distance() > 0
    teacher.sync()
    assert torch.equal(logits(teacher), now) and teacher.distance() == 0
    nudge(trained(student), seed=1)
    assert torch.equal(logits(teacher), now)


def test_ema_in_fp32_follows_tiny_steps(tmp_path, run):
    """Trap 29: 300 steps of 2e-6 a weight at rate 0.01, from a bf16 folder, within 1 % of float64."""
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
    """Traps 26 and 27: no gradient, none of it in the optimiser; only frozen weights under LoRA are shared."""
    teacher = Teacher("ema", 0.1, student, run)
    targets = teacher.targets(PAIRS)
    assert not targets[0][1].requires_grad and not trained(teacher.model)
    nudge([targets[0][1]])
    divergence(student, targets).backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(p.grad is not None for p in trained(student))
    groups = make_optimizer(student, run.args).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained(student)}
    for t, s in zip(teacher.model.parameters(), student.parameters(), strict=True):
        assert (t is s) == (not s.requires_grad)


def test_a_live_teacher_is_a_target_only(student, run):
    """The gradient is that of a copy as the teacher, though both sides are one model with one head."""
    found = []
    for kind in ("live", "base"):
        targets = Teacher(kind, 0.0, student, run).targets([([3, 9, *prompt], y) for prompt, y in PAIRS])
        assert not targets[0][1].requires_grad
        loss = divergence(student, targets)
        assert loss > 0.1
        found.append(torch.autograd.grad(loss, trained(student)))
    torch.testing.assert_close(*found)


def test_trust_region_mixes_logits_of_base_and_live(student, run):
    """(1 - rate) base + rate live, on the teacher's prompt; the base never moves."""
    base = student_logits(student)
    teacher = Teacher("trust_region", 0.3, student, run)
    nudge(trained(student))
    teacher.update()
    assert torch.allclose(logits(teacher), 0.7 * base + 0.3 * student_logits(student), atol=1e-5)


def test_distance_is_relative(student, run):
    teacher = Teacher("base", 0.1, student, run)
    assert teacher.distance() == 0
    for p in trained(student):
        p.data *= 2
    assert teacher.distance() == pytest.approx(0.5, abs=1e-6)
    assert Teacher("live", 0.1, student, run).distance() == 0


def test_only_a_teacher_with_weights_of_its_own_has_them_in_checkpoints(tmp_path, student, run):
    names = {name for name, p in student.named_parameters() if p.requires_grad}
    for kind in ("ema", "base", "trust_region"):
        theirs, ours = Teacher(kind, 0.1, student, run).weights()
        assert theirs.keys() == ours.keys() == names
    for kind in ("live", str(make_model(tmp_path / "other", "llama"))):
        assert Teacher(kind, 0.1, student, run).weights() == ({}, {})


def test_another_model_as_teacher(tmp_path, student, run):
    other = make_model(tmp_path / "other", "llama", seed=5)
    teacher = Teacher(str(other), 0.1, student, run)
    now = logits(teacher)
    assert not torch.allclose(now, student_logits(student), atol=0.1)
    with torch.no_grad():
        prompt, y = PAIRS[0]
        plain = teacher.model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1]
    assert torch.allclose(now[: len(y)], plain, atol=1e-5)
    nudge(trained(student))
    teacher.update()
    assert torch.equal(logits(teacher), now) and teacher.distance() == 0


@pytest.mark.parametrize("ours, theirs", [(120, 89), (121, 120), (120, 120), (89, 120)])
def test_a_teacher_that_lacks_ids_of_the_student_is_refused(ours, theirs, tmp_path, run):
    """The student may draw an id of its padding, which the teacher could not read."""
    student = load_model(str(make_model(tmp_path / "ours", vocab_size=ours)), run)
    other = str(make_model(tmp_path / "theirs", vocab_size=theirs))
    if ours <= theirs:
        assert divergence(student, Teacher(other, 0.1, student, run).targets(PAIRS)).isfinite()
        return
    with pytest.raises(InputError, match=f"the teacher reads {theirs} ids, the student draws {ours}; use a"):
        Teacher(other, 0.1, student, run)


def test_another_tokenizer_is_refused_by_its_first_token(tmp_path, student, run):
    other = make_model(tmp_path / "other")
    file = other / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["zig"], vocabulary["zag"] = vocabulary["zag"], vocabulary["zig"]
    file.write_text(json.dumps(words))
    message = r"other and --model .*/m differ in vocabulary: token 'z[ai]g' is \d+"
    with pytest.raises(InputError, match=message):
        Teacher(str(other), 0.1, student, run)


def test_an_adapter_folder_is_refused_in_one_sentence(tmp_path, student, run):
    """transformers alone would load its base and the adapter into it."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    toy.make_tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="^--teacher .*/adapter: no model could be loaded .*"):
        Teacher(str(tmp_path / "adapter"), 0.1, student, run)


def test_two_teacher_passes_are_the_same_while_the_student_trains(tmp_path, run):
    """Trap 25: with attention dropout in the config."""
    student = load_model(str(make_model(tmp_path / "m", attention_dropout=0.5)), run)
    teacher = Teacher("ema", 0.1, student, run)
    assert torch.equal(logits(teacher), logits(teacher))


def test_without_pairs_there_are_no_states_and_gradients_of_zero(student, run):
    """Trap 8: a rank whose share is empty takes part all the same."""
    h_ND, nothing = completion_states(student, []), torch.tensor([], dtype=torch.long)
    targets = Teacher("ema", 0.1, student, run).targets([])
    loss, _ = distill_loss(h_ND, head_of(student), targets, nothing, torch.ones(0), Objective())
    (loss - token_logps(h_ND, head_of(student), nothing)[0].sum()).backward()
    assert h_ND.shape == (0, 32) and loss.item() == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in trained(student))
