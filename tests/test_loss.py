"""The distillation loss against its definition: float64 autograd of the plain formula, finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common import Head, InputError, Objective, TopK, distill_loss, token_logps

N, D, V, K = 19, 6, 13, 4
KINDS = ["forward_kl", "reverse_kl", "jsd", "mixed"]
TOPKS = [("student_topk", True), ("student_topk", False), ("teacher_topk", True), ("teacher_topk", False)]
SUPPORTS = [("full", True), *TOPKS]
ONE, FIRST = torch.ones(1), torch.tensor([0])


# What the loss is, in plain words: everything at once, differentiated by torch.


def plain_divergence(log_p, log_q, kind, beta):
    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if kind == "forward_kl":
        return kl(log_q, log_p)
    if kind == "reverse_kl":
        return kl(log_p, log_q)
    if kind == "mixed":
        return beta * kl(log_q, log_p) + (1 - beta) * kl(log_p, log_q)
    log_m = ((1 - beta) * log_p.exp() + beta * log_q.exp()).log()
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def supported(z, t, support="full", tail=True):
    """Log-probs of both sides on the support."""
    log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)
    if support == "full":
        return log_p, log_q
    kept = (z if support == "student_topk" else t).topk(K).indices
    log_p, log_q = log_p.gather(-1, kept), log_q.gather(-1, kept)
    if tail:
        return (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (log_p, log_q))
    return log_p.log_softmax(-1), log_q.log_softmax(-1)


def plain_loss(z, t, kind="forward_kl", beta=0.5, support="full", tail=True):
    return plain_divergence(*supported(z, t, support, tail), kind, beta)


def problem(seed=0, distance=0.5, dtype=torch.float64, n=N, d=D, v=V, plain_head=False):
    """A student and a teacher, each with states and a head with bias, scale, soft cap; some weights are 0."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    h, W, b = randn(n, d), randn(v, d) * 2 / math.sqrt(d), randn(v)
    h_t, W_t = h + distance * randn(n, d), W + distance * randn(v, d) / math.sqrt(d)
    b_t = b + distance * randn(v)
    y, weight = torch.randint(v, (n,), generator=g), torch.rand(n, generator=g, dtype=torch.float64)
    weight[::4] = 0
    h, W, b = (x.to(dtype).requires_grad_() for x in (h, W, b))
    h_t, W_t, b_t, weight = (x.to(dtype) for x in (h_t, W_t, b_t, weight))
    if plain_head:
        return h, Head(W), [(1.0, h_t, Head(W_t))], y, weight
    return h, Head(W, b, 0.7, 5.0), [(1.0, h_t, Head(W_t, b_t, 1.2, 4.0))], y, weight


def logits(h, head, teacher):
    """Of both sides."""
    ((_, h_t, head_t),) = teacher
    return head.logits(h), head_t.logits(h_t)


def of(y, x):
    return x.gather(-1, y[:, None])[:, 0]


def loss_of(h, head, teacher, y, weight, behaviour=None, **settings):
    """`distill_loss` with an objective of these settings."""
    return distill_loss(h, head, teacher, y, weight, Objective(**settings), behaviour)


def gradients(loss, h, head):
    return torch.autograd.grad(loss, [x for x in (h, head.weight, head.bias) if x is not None], retain_graph=True)


def relative(got, expected):
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, expected, strict=True))


def agree(loss, expected, h, head, value=1e-10, gradient=1e-10):
    """Two ways to compute one loss have the same value and gradients, relative to their size."""
    assert loss.item() == pytest.approx(expected.item(), rel=value)
    assert relative(gradients(loss, h, head), gradients(expected, h, head)) <= gradient


# Exactness.


@pytest.mark.parametrize("support, tail", SUPPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_autograd_of_the_plain_formula(kind, support, tail):
    h, head, teacher, y, weight = problem()
    z, t = logits(h, head, teacher)
    log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)
    logp = of(y, log_p).detach()
    behaviour = logp + torch.linspace(-1, 1, N, dtype=torch.float64)
    ratio = (logp - behaviour).exp().clamp(max=1.5)
    each = plain_loss(z, t, kind, 0.3, support, tail)
    settings = dict(divergence=kind, beta=0.3, support=support, topk=K, tail=tail, is_cap=1.5, chunk=5)
    loss, stats = loss_of(h, head, teacher, y, weight, behaviour, **settings)
    agree(loss, (weight * ratio * each).sum(), h, head, value=1e-12)

    kept = (z if support == "student_topk" else t).topk(V if support == "full" else K).indices
    expected = {
        "divergence": each,
        "logp": logp,
        "teacher_logp": of(y, log_q),
        "ratio": ratio,
        "entropy": torch.distributions.Categorical(logits=log_p).entropy(),
        "mass_student": log_p.exp().gather(-1, kept).sum(-1),
        "mass_teacher": log_q.exp().gather(-1, kept).sum(-1),
    }
    assert stats.keys() == expected.keys()
    for name, stat in stats.items():
        assert stat.dtype == torch.float32 and not stat.requires_grad
        exact = expected[name].detach() * (weight > 0)
        torch.testing.assert_close(stat.double(), exact, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("support, tail", [*SUPPORTS, ("sampled", True)])
def test_clip_is_a_policy_gradient_with_clamped_advantages(support, tail):
    """Reverse KL: each token or bucket v weighs its grad log p(v) with clamp(log p - log q), a constant."""
    h, head, teacher, y, weight = problem()
    z, t = logits(h, head, teacher)
    if support == "sampled":
        log_p, log_q = of(y, z.log_softmax(-1)), of(y, t.log_softmax(-1))
        D = (log_p - log_q).clamp(-0.4, 0.4).detach()
        surrogate = D * log_p
    else:
        log_p, log_q = supported(z, t, support, tail)
        clamped = (log_p - log_q).clamp(-0.4, 0.4).detach()
        assert (clamped.abs() == 0.4).any() and (clamped.abs() < 0.4).any()
        D = surrogate = (log_p.exp() * clamped).sum(-1)
    settings = dict(divergence="reverse_kl", support=support, topk=K, tail=tail, clip=0.4, chunk=5)
    loss, _ = loss_of(h, head, teacher, y, weight, **settings)
    assert loss.item() == pytest.approx((weight * D).sum().item(), rel=1e-10)
    assert relative(gradients(loss, h, head), gradients((weight * surrogate).sum(), h, head)) <= 1e-10


class Fresh(torch.autograd.Function):
    """gradcheck asks one graph several times; the loss answers once, so every question gets a new graph."""

    @staticmethod
    def forward(ctx, fn, *inputs):
        ctx.fn, ctx.inputs = fn, inputs
        return fn(*inputs).detach()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.inputs]
            return None, *torch.autograd.grad(ctx.fn(*inputs), inputs, grad)


@pytest.mark.parametrize("support, tail", SUPPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_finite_differences(kind, support, tail):
    h, head, teacher, y, weight = problem(n=4, d=3, v=6)
    settings = dict(divergence=kind, beta=0.7, support=support, topk=2, tail=tail, chunk=3)

    def fn(h, W, b):
        return loss_of(h, head._replace(weight=W, bias=b), teacher, y, weight, **settings)[0]

    assert torch.autograd.gradcheck(lambda *x: Fresh.apply(fn, *x), (h, head.weight, head.bias))


@pytest.mark.parametrize("at, tolerance", [(1e-2, 1e-5), (1e-4, 1e-4)])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_gradients_stay_exact_where_the_two_nearly_agree(kind, at, tolerance):
    h, head, _, y, weight = problem(n=256, d=64, v=3000, plain_head=True)
    noise = torch.randn(256, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h_t = (h.detach() + math.sqrt((8 if kind == "jsd" else 2) * at) / 2 * noise).float()
    h, W = (x.detach().float().requires_grad_() for x in (h, head.weight))
    loss, stats = loss_of(h, Head(W), [(1.0, h_t, Head(W.detach()))], y, weight.float(), divergence=kind)
    h_64, W_64 = (x.detach().double().requires_grad_() for x in (h, W))
    each = plain_loss(h_64 @ W_64.t(), h_t.double() @ W_64.detach().t(), kind)
    assert at / 2 < each.mean() < 4 * at  # the fixture is where it says it is
    exact = gradients((weight.float().double() * each).sum(), h_64, Head(W_64))
    assert relative(gradients(loss, h, Head(W)), exact) <= tolerance
    active = weight > 0
    torch.testing.assert_close(stats["divergence"][active].double(), each[active], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_trap_54_bf16_weights_get_float32_logits_and_no_negative_kl(kind):
    h, head, teacher, y, _ = problem(n=10_000, d=16, v=50, distance=0.02, dtype=torch.bfloat16, plain_head=True)
    loss, stats = loss_of(h, head, teacher, y, torch.ones(10_000), divergence=kind)
    assert stats["divergence"].min() >= -1e-6 and loss.dtype == torch.float32
    h_64, W_64 = (x.detach().double().requires_grad_() for x in (h, head.weight))
    t = teacher[0][1].double() @ teacher[0][2].weight.double().t()
    exact = plain_loss(h_64 @ W_64.t(), t, kind).sum()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    found = gradients(loss, h, head)
    assert {x.dtype for x in found} == {torch.bfloat16}
    assert relative(found, gradients(exact, h_64, Head(W_64))) < 4e-3  # one rounding to bf16, of the result


def test_trap_54_logits_of_a_bf16_head_are_float32():
    h, head, *_ = problem(dtype=torch.bfloat16)
    plain = 5 * torch.tanh(0.7 * (h.double() @ head.weight.double().t() + head.bias.double()) / 5)
    torch.testing.assert_close(head.logits(h), plain.float(), rtol=1e-5, atol=1e-5)


def test_trap_54_autocast_on_a_cpu_rounds_neither_logits_nor_gradients():
    h, head, teacher, y, weight = problem(dtype=torch.float32)

    def found():
        losses = loss_of(h, head, teacher, y, weight)[0], (weight * token_logps(h, head, y)[0]).sum()
        return [*losses, head.logits(h), *gradients(losses[0], h, head), *gradients(losses[1], h, head)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = found()
    assert all(torch.equal(a, b) for a, b in zip(inside, found(), strict=True))


# Directions, coefficients, and what the divergences promise.

LOG_P = torch.tensor([[0.30, 0.25, 0.20, 0.10, 0.08, 0.05, 0.02]]).double().log()
LOG_Q = torch.tensor([[0.02, 0.40, 0.10, 0.30, 0.03, 0.05, 0.10]]).double().log()


def given(z, t, **settings):
    """The loss of one token whose logits are given."""
    eye = Head(torch.eye(z.shape[-1], dtype=z.dtype))
    return loss_of(z, eye, [(1.0, t, eye)], FIRST, ONE, **settings)[0]


def seven(kind, beta=0.5, **options):
    return given(LOG_P, LOG_Q, divergence=kind, beta=beta, **options).item()


def test_trap_1_forward_is_teacher_to_student_and_reverse_is_student_to_teacher():
    forward = sum(q.exp() * (q - p) for p, q in zip(LOG_P[0], LOG_Q[0], strict=True)).item()
    reverse = sum(p.exp() * (p - q) for p, q in zip(LOG_P[0], LOG_Q[0], strict=True)).item()
    assert seven("forward_kl") == pytest.approx(forward) and seven("reverse_kl") == pytest.approx(reverse)


def test_trap_2_jsd_mixes_probabilities_and_never_exceeds_log_2():
    log_m = ((LOG_P.exp() + LOG_Q.exp()) / 2).log()
    assert seven("jsd") == pytest.approx(sum((x.exp() * (x - log_m)).sum().item() for x in (LOG_P, LOG_Q)) / 2)
    apart = torch.tensor([[200.0, 0.0]])
    assert given(apart, apart.flip(1), divergence="jsd").item() == pytest.approx(math.log(2))


def test_trap_3_jsd_vanishes_at_its_ends_and_mixed_becomes_the_two_kls():
    assert seven("jsd", 1e-4) == pytest.approx(1e-4 * seven("forward_kl"), rel=1e-2)
    assert seven("jsd", 1 - 1e-4) == pytest.approx(1e-4 * seven("reverse_kl"), rel=1e-2)
    assert seven("jsd", 0.0) == pytest.approx(0, abs=1e-12)
    assert seven("mixed", 1.0) == pytest.approx(seven("forward_kl"))
    assert seven("mixed", 0.0) == pytest.approx(seven("reverse_kl"))


# Supports.


@pytest.mark.parametrize("support, tail", TOPKS)
@pytest.mark.parametrize("kind", KINDS)
def test_trap_38_no_token_is_negative_lumping_the_tail_never_adds_and_k_of_all_is_full(kind, support, tail):
    h, head, teacher, y, _ = problem()
    whole, full = loss_of(h, head, teacher, y, torch.ones(N), divergence=kind, beta=0.3)
    for topk in range(1, V + 1):
        settings = dict(divergence=kind, beta=0.3, support=support, topk=topk, tail=tail)
        loss, stats = loss_of(h, head, teacher, y, torch.ones(N), **settings)
        found = stats["divergence"]
        assert found.min() >= -1e-7 and (not tail or (found <= full["divergence"] + 1e-6).all())
    agree(loss, whole, h, head, value=1e-12)
    assert stats["mass_student"].tolist() == pytest.approx([1] * N)


def test_trap_36_one_renormalised_token_says_nothing_and_the_tail_bucket_speaks():
    assert seven("jsd", support="student_topk", topk=1, tail=False) == pytest.approx(0, abs=1e-12)
    assert seven("jsd", support="student_topk", topk=1, tail=True) > 0.01


def test_trap_37_a_negative_kept_part_still_has_its_gradient():
    """q = (.6, .4), p = (.9, .1), k = 1: the kept term is negative; clamped, it would teach nothing."""
    p, q = (torch.tensor([pair]).double().log() for pair in ([0.9, 0.1], [0.6, 0.4]))
    loss = given(p.requires_grad_(), q, support="student_topk", topk=1)
    (grad,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(grad, torch.tensor([[0.3, -0.3]]).double())


def test_a_tail_that_underflows_still_counts_and_still_learns():
    """The student's mass outside its favourite is e^-200, 0 in float32; D and gradient are exact."""
    z, t = torch.tensor([[0.0, -200.0, -201.0]], requires_grad=True), torch.tensor([[0.0, -1.0, -1.0]])
    loss = given(z, t, support="student_topk", topk=1)
    q = t.double().softmax(-1)[0]
    rest = q[1] + q[2]
    log_tail = -200 + math.log1p(math.exp(-1))
    assert loss.item() == pytest.approx((q[0] * q[0].log() + rest * (rest.log() - log_tail)).item(), rel=1e-5)
    inside = torch.tensor([1, math.exp(-1)]).double() / (1 + math.exp(-1))
    got, exact = torch.autograd.grad(loss, z)[0][0], torch.cat([1 - q[:1], -rest * inside])
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def test_trap_35_sampled_gradients_average_to_the_gradient_of_the_exact_reverse_kl():
    h, head, teacher, _, _ = problem(n=1)
    ((_, h_t, head_t),) = teacher
    z, t = (x.log_softmax(-1)[0].detach() for x in logits(h, head, teacher))
    every = [(1.0, h_t.expand(V, -1), head_t)]
    settings = dict(divergence="reverse_kl", support="sampled")
    sampled, stats = loss_of(h.expand(V, -1), head, every, torch.arange(V), z.exp(), **settings)
    exact, _ = loss_of(h, head, teacher, FIRST, ONE, divergence="reverse_kl")
    agree(sampled, exact, h, head, value=1e-6)  # the values average to the KL as well
    torch.testing.assert_close(stats["divergence"].double(), z - t, rtol=1e-5, atol=1e-6)


# Parity with TRL 1.16's self-distillation losses, restated: alpha 0 forward KL, 1 reverse KL, else a JSD.


def trl_divergence(log_p, log_q, alpha):
    if alpha in (0.0, 1.0):
        input, target = (log_p, log_q) if alpha == 0.0 else (log_q, log_p)
        return F.kl_div(input, target, reduction="none", log_target=True).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(1 - alpha), log_q + math.log(alpha))
    kl_pm, kl_qm = (F.kl_div(log_m, log_a, reduction="none", log_target=True) for log_a in (log_p, log_q))
    return torch.lerp(kl_pm, kl_qm, alpha).sum(-1)


def trl_topk(z, t, alpha, topk, tail):
    kept = z.topk(topk).indices
    log_p, log_q = (x.log_softmax(-1).gather(-1, kept) for x in (z, t))
    if not tail:
        return trl_divergence(log_p.log_softmax(-1), log_q.log_softmax(-1), alpha)
    rest_p, rest_q = ((-x.logsumexp(-1, keepdim=True).clamp(max=-1e-7).expm1()).log() for x in (log_p, log_q))
    return trl_divergence(torch.cat([log_p, rest_p], -1), torch.cat([log_q, rest_q], -1), alpha)


@pytest.mark.parametrize("alpha, kind", [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.5, "jsd"), (0.2, "jsd")])
def test_parity_with_trl(alpha, kind):
    h, head, teacher, y, weight = problem()
    z, t = logits(h, head, teacher)
    top = dict(support="student_topk", topk=K)
    for theirs, options in [
        (trl_divergence(z.log_softmax(-1), t.log_softmax(-1), alpha), {}),
        (trl_topk(z, t, alpha, K, True), {**top, "tail": True}),
        (trl_topk(z, t, alpha, K, False), {**top, "tail": False}),
    ]:
        loss, _ = loss_of(h, head, teacher, y, weight, divergence=kind, beta=alpha, **options)
        agree(loss, (weight * theirs).sum(), h, head)


# Zeros and infinities.


@pytest.mark.parametrize("support, tail", SUPPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_both_sides_exclude_counts_for_nothing(kind, support, tail):
    """-inf in both biases: every divergence is that of the vocabulary without those entries."""
    h, head, teacher, y, weight = problem()
    ((_, h_t, head_t),) = teacher
    banned = torch.zeros(V, dtype=torch.bool)
    banned[[2, 7]] = True
    y[banned[y]] = 0
    sides = [side._replace(bias=side.bias.detach(), softcap=0.0) for side in (head, head_t)]
    full, full_t = (side._replace(bias=side.bias.masked_fill(banned, -math.inf)) for side in sides)
    keep, keep_t = (side._replace(weight=side.weight[~banned], bias=side.bias[~banned]) for side in sides)
    options = dict(divergence=kind, support=support, tail=tail, topk=K)
    loss, stats = loss_of(h, full, [(1.0, h_t, full_t)], y, weight, **options)
    without, _ = loss_of(h, keep, [(1.0, h_t, keep_t)], torch.zeros_like(y), weight, **options)
    agree(loss, without, h, Head(head.weight))
    assert all(stat.isfinite().all() for stat in stats.values())


@pytest.mark.parametrize("kind", KINDS)
def test_trap_9_what_only_the_teacher_excludes(kind):
    """q = 0 < p: forward KL and JSD are finite and exact; the reverse KL is huge; nothing is NaN."""
    h, head, teacher, y, weight = problem(plain_head=True)
    ((_, h_t, head_t),) = teacher
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = -math.inf
    y[y == 3] = 0
    ours = [(1.0, h_t, head_t._replace(bias=bias))]
    loss, _ = loss_of(h, head, ours, y, weight, divergence=kind)
    if kind in ("reverse_kl", "mixed"):
        assert loss.item() > 1e20 and not any(g.isnan().any() for g in gradients(loss, h, head))
        return
    log_q, log_p = (h_t @ head_t.weight.t() + bias).log_softmax(-1), head.logits(h).log_softmax(-1)

    def q_log(log_b):
        return torch.where(log_q.isinf(), 0, log_q.exp() * (log_q.nan_to_num(neginf=0) - log_b)).sum(-1)

    each = q_log(log_p)
    if kind == "jsd":
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        each = (q_log(log_m) + (log_p.exp() * (log_p - log_m)).sum(-1)) / 2
    agree(loss, (weight * each).sum(), h, head)


def test_trap_9_tokens_of_weight_zero_are_never_looked_at():
    h, head, teacher, y, weight = problem()
    loss, stats = loss_of(h, head, teacher, y, weight, divergence="reverse_kl")
    unused = weight == 0
    ((_, h_t, head_t),) = teacher
    bad_h, bad_t, bad_y = h.detach().clone(), h_t.clone(), y.clone()
    bad_h[unused], bad_t[unused], bad_y[unused] = math.nan, -math.inf, -100
    bad_h.requires_grad_()
    again, bad_stats = loss_of(bad_h, head, [(1.0, bad_t, head_t)], bad_y, weight, divergence="reverse_kl")
    found, expected = [again, *gradients(again, bad_h, head)], [loss, *gradients(loss, h, head)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for name, stat in stats.items():
        assert torch.equal(stat, bad_stats[name]) and (stat[unused] == 0).all()


@pytest.mark.parametrize("support", ["full", "student_topk", "sampled"])
def test_trap_8_a_batch_without_a_token_is_a_zero_with_zero_gradients(support):
    h, head, teacher, y, weight = problem()
    h = (h.detach() * math.inf).requires_grad_()
    loss, stats = loss_of(h, head, teacher, y, weight * 0, divergence="reverse_kl", support=support, topk=K)
    assert loss.item() == 0 and all((stat == 0).all() for stat in stats.values())
    assert all((g == 0).all() for g in gradients(loss, h, head))
    nothing = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
    loss = -token_logps(nothing, head, y[:0])[0].sum()
    assert loss.item() == 0 and (gradients(loss, nothing, head)[1] == 0).all()


@pytest.mark.parametrize("cap, expected", [(0.0, math.e), (2.0, 2.0), (3.0, math.e)])
def test_trap_40_the_ratio_multiplies_every_token_and_the_cap_bounds_it(cap, expected):
    h, head, teacher, y, weight = problem()
    behaviour = token_logps(h, head, y)[0].detach() - 1
    loss, stats = loss_of(h, head, teacher, y, weight, behaviour, is_cap=cap)
    plain, _ = loss_of(h, head, teacher, y, weight)
    agree(loss, expected * plain, h, head, value=1e-5, gradient=1e-5)
    assert stats["ratio"][1].item() == pytest.approx(expected, rel=1e-5)


def test_weights_add_up_and_chunks_do_not_show():
    h, head, teacher, y, weight = problem()
    for chunk in (1, 3, 512):
        other, other_stats = loss_of(h, head, teacher, y, weight, chunk=chunk)
        loss, stats = loss_of(h, head, teacher, y, weight, chunk=N)
        agree(other, loss, h, head, value=1e-12, gradient=1e-12)
        assert all(torch.allclose(stats[name], other_stats[name]) for name in stats)
    ((_, h_t, head_t),) = teacher
    both = [(1.0, torch.cat([h_t, h_t]), head_t)]
    twice, _ = loss_of(torch.cat([h, h]), head, both, y.repeat(2), weight.repeat(2) / 2)
    assert twice.item() == pytest.approx(loss.item())


# Heads and teachers.


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.95, 0.05), (0.0, 1.0), (0.5,)])
def test_a_teacher_of_two_models_mixes_logits(shares):
    h, head, teacher, y, weight = problem()
    z, t_ref = logits(h, head, teacher)
    ((_, h_ref, ref),) = teacher
    h_live = h.detach() + 0.1
    t_live = head.logits(h_live).detach()
    parts = [(share, *part) for share, part in zip(shares, [(h_ref, ref), (h_live, head)])]
    loss, _ = loss_of(h, head, parts, y, weight, divergence="jsd", chunk=5)
    t = sum(share * logits for share, logits in zip(shares, (t_ref, t_live)))
    agree(loss, (weight * plain_loss(z, t, "jsd")).sum(), h, head)


def test_teacher_of_another_width_and_precision():
    h, head, _, y, weight = problem(dtype=torch.float32)
    wide, W_t = torch.randn(N, 2 * D).bfloat16(), torch.randn(V, 2 * D).bfloat16()
    loss, _ = loss_of(h, head, [(1.0, wide, Head(W_t))], y, weight)
    expected = (weight * plain_loss(head.logits(h), wide.float() @ W_t.float().t())).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    h, head, teacher, y, weight = problem(n=5, plain_head=True)
    loss, _ = loss_of(h, head, teacher, y, weight)
    frozen = Head(head.weight.detach())
    [d_h] = torch.autograd.grad(loss_of(h, frozen, teacher, y, weight)[0], h)
    torch.testing.assert_close(d_h, gradients(loss, h, head)[0])
    assert largest_tensor(lambda: loss_of(h, frozen, teacher, y, weight, chunk=1)) < V * D
    with torch.no_grad():
        value, _ = loss_of(h, head, teacher, y, weight)
    assert not value.requires_grad and value == loss


def test_gradients_scale_with_what_comes_back_and_only_once():
    h, head, teacher, y, weight = problem()
    one = gradients(loss_of(h, head, teacher, y, weight)[0], h, head)
    loss, _ = loss_of(h, head, teacher, y, weight)
    assert relative(gradients(-loss / 3, h, head), [-g / 3 for g in one]) <= 1e-12
    with pytest.raises(RuntimeError):  # they were scaled in place
        loss.backward()


# Memory: what is never made.


class Largest(TorchDispatchMode):
    """The largest tensor that any operation has newly allocated."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.entries = max(self.entries, x.numel())
        return out


def largest_tensor(fn):
    with Largest() as largest:
        fn()
    return largest.entries


@pytest.mark.parametrize("support", ["full", "teacher_topk"])
def test_no_tensor_of_tokens_by_vocabulary_is_ever_made(support):
    h, head, teacher, y, weight = problem(n=400, v=50)
    settings = dict(divergence="jsd", support=support, topk=K, chunk=16)

    def step():
        loss_of(h, head, teacher, y, weight, **settings)[0].backward()

    assert largest_tensor(step) <= 400 * 7 * 2


def test_no_tensor_of_tokens_by_vocabulary_is_made_for_the_tokens_log_probs():
    """Nor do the chunks keep their logits for the backward pass, which together would be one."""
    h, head, _, y, weight = problem(n=400, v=50)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    def step():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logp, _ = token_logps(h, head, y, chunk=16)
            loss = -(weight * logp).sum()
        loss.backward()

    assert largest_tensor(step) <= max(16 * 50, 400 * 6)
    assert h.grad is not None and sum(kept.values()) < 400 * 50 / 2


# The sampled token's log-prob.


@pytest.mark.parametrize("chunk", [1, 5, 512])
@pytest.mark.parametrize("plain_head", [False, True])
def test_token_logps_equal_float64_autograd(plain_head, chunk):
    """Values, and gradients for hidden states, weight and bias of a head with bias, scale and soft cap."""
    h, head, _, y, weight = problem(plain_head=plain_head)
    log_p = F.linear(h, head.weight, head.bias) * head.scale
    log_p = log_p if plain_head else head.softcap * (log_p / head.softcap).tanh()
    log_p = log_p.log_softmax(-1)
    logp, entropy = token_logps(h, head, y, chunk)
    torch.testing.assert_close(logp, of(y, log_p))
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).detach())
    assert not entropy.requires_grad
    agree((weight * logp.exp()).sum(), (weight * of(y, log_p).exp()).sum(), h, head)


def test_token_logps_of_a_frozen_head_and_without_autograd():
    h, head, _, y, weight = problem(n=5, v=40, plain_head=True)
    plain, _ = token_logps(h, head, y)
    frozen = Head(head.weight.detach())

    def step():
        return torch.autograd.grad((weight * token_logps(h, frozen, y, chunk=1)[0]).sum(), h)[0]

    torch.testing.assert_close(step(), gradients((weight * plain).sum(), h, head)[0])
    assert largest_tensor(step) < 40 * D
    with torch.no_grad():
        logp, _ = token_logps(h, head, y)
    assert not logp.requires_grad and torch.equal(logp, plain)


def test_trap_9_a_token_that_cannot_be_has_a_finite_log_prob_and_entropy():
    h, head, _, y, _ = problem()
    bias = head.bias.detach().clone()
    bias[3] = -math.inf
    y[0] = 3
    logp, entropy = token_logps(h, head._replace(bias=bias, softcap=0.0), y)
    assert logp.isfinite().all() and entropy.isfinite().all() and logp[0] < -1e20
    keep = torch.arange(V) != 3
    log_p = (0.7 * (h @ head.weight[keep].t() + bias[keep])).log_softmax(-1)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).detach())


# Refusals.


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(support="student_topk", topk=V + 1), f"topk {V + 1}.*{V} tokens"),
        (dict(support="teacher_topk", topk=0), "topk 0"),
        (dict(support="sampled", divergence="jsd"), "--support sampled needs --divergence reverse_kl, not jsd"),
        (dict(clip=5.0, divergence="jsd"), "a clip of 5.0 needs --divergence reverse_kl, not jsd"),
        (dict(divergence="kl"), "expected one of forward_kl"),
        (dict(support="top"), "full, student_topk"),
        (dict(divergence="jsd", beta=1.5), "beta 1.5"),
    ],
)
def test_refusals_say_what_would_work(options, says):
    with pytest.raises(InputError, match=says):
        loss_of(*problem(), **options)


@pytest.mark.parametrize("support", ["full", "student_topk", "teacher_topk", "sampled"])
@pytest.mark.parametrize("ours, theirs", [(V + 5, V), (V, V + 5)])
def test_heads_padded_to_different_sizes_are_cut_to_the_smaller(ours, theirs, support):
    """Loss and gradients are those of the smaller vocabulary; what is beyond it gets a gradient of zero."""
    h, _, _, y, weight = problem()
    _, head, [(_, _, head_t)], *_ = problem(v=V + 5, seed=1)
    ((_, h_t, _),) = problem()[2]

    def first(side, size):
        W, b = (x.detach()[:size].clone() for x in (side.weight, side.bias))
        return side._replace(weight=W.requires_grad_(), bias=b.requires_grad_())

    head, head_t, small, small_t = first(head, ours), first(head_t, theirs), first(head, V), first(head_t, V)
    settings = dict(divergence="reverse_kl", support=support, topk=K, chunk=5)
    loss, stats = loss_of(h, head, [(1.0, h_t, head_t)], y, weight, **settings)
    expected, expected_stats = loss_of(h, small, [(1.0, h_t, small_t)], y, weight, **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    d_h, d_w, d_b = gradients(loss, h, head)
    assert relative((d_h, d_w[:V], d_b[:V]), gradients(expected, h, small)) <= 1e-12
    assert d_w.shape == (ours, D) and (d_w[V:] == 0).all() and (d_b[V:] == 0).all()
    assert all(torch.equal(stats[name], expected_stats[name]) for name in stats)


# A teacher of which only the top k is known.


def topk_of(t, y):
    log_q = t.log_softmax(-1).detach()
    kept = log_q.topk(K, sorted=False).indices
    return TopK(kept, log_q.gather(-1, kept), of(y, log_q))


SERVED = [(kind, *support) for kind in KINDS for support in TOPKS[2:]] + [("reverse_kl", "sampled", True)]


@pytest.mark.parametrize("kind, support, tail", SERVED)
@pytest.mark.parametrize("dtype, value, gradient", [(torch.float64, 1e-12, 1e-10), (torch.float32, 1e-5, 1e-5)])
def test_a_teachers_top_k_from_outside_equals_the_teacher(dtype, value, gradient, kind, support, tail):
    """Loss, gradients and statistics; in float32, as a server sends them, up to rounding."""
    h, head, teacher, y, weight = problem(dtype=dtype)
    told = topk_of(logits(h, head, teacher)[1], y)
    behaviour = token_logps(h, head, y)[0].detach() + 0.3
    options = dict(divergence=kind, beta=0.3, support=support, topk=K, tail=tail, is_cap=1.5, chunk=5)
    ours, stats = loss_of(h, head, told, y, weight, behaviour, **options)
    local, expected = loss_of(h, head, teacher, y, weight, behaviour, **options)
    agree(ours, local, h, head, value, gradient)
    for name, stat in stats.items():
        torch.testing.assert_close(stat, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("excess", [0.0, 1e-6])
def test_a_tail_that_rounding_took_is_small_and_not_nothing(excess):
    """Log-probs that sum to 1 or more: the rest is float32's epsilon, the reverse KL stays moderate."""
    logps = torch.tensor([[math.log(0.75) + excess, math.log(0.25)]])
    told = TopK(torch.tensor([[0, 1]]), logps, torch.tensor([-1.0]))
    settings = dict(divergence="reverse_kl", support="teacher_topk", topk=2)
    loss, _ = loss_of(torch.zeros(1, 2), Head(torch.zeros(5, 2)), told, FIRST, ONE, **settings)
    want = sum(0.2 * math.log(0.2 / q) for q in (0.75, 0.25)) + 0.6 * math.log(0.6 / 2**-23)
    assert loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("support", ["full", "student_topk"])
def test_what_a_top_k_cannot_give_is_refused(support):
    h, head, _, y, weight = problem()
    message = f"--support {support}: a served teacher has teacher_topk and sampled"
    with pytest.raises(InputError, match=message):
        loss_of(h, head, topk_of(torch.randn(N, V), y), y, weight, topk=K, support=support)


class Precisions(TorchDispatchMode):
    """What torch is told of the float32 products on CPU while they run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("bf16", [True, False])
def test_only_a_bf16_head_may_multiply_bf16_on_cpu(bf16):
    """Whatever torch is told elsewhere; sums are of float32 in both cases."""
    matmul, g = torch.backends.mkldnn.matmul, torch.Generator().manual_seed(0)
    h, W = (torch.randn(n, 256, generator=g, requires_grad=True) for n in (64, 512))
    head, y, weight, precisions = Head(W, bf16=bf16), torch.zeros(64, dtype=torch.long), torch.ones(64), Precisions()
    exact = h.detach().double() @ W.detach().double().t()
    told = "ieee" if bf16 else "bf16"
    matmul.fp32_precision = told
    try:
        with precisions:
            z = head.logits(h)
            (z.sum() + loss_of(h, head, [(1.0, h.detach(), head)], y, weight)[0]).backward()
        assert precisions.seen == ["bf16" if bf16 else "ieee"] * 7
        assert matmul.fp32_precision == told
    finally:
        matmul.fp32_precision = "none"
    assert (z - exact).abs().max() < (1.0 if bf16 else 1e-3)
