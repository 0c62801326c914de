"""The distillation loss against its definition: float64 autograd of the plain formula, finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common import Head, InputError, Objective, TopK, distill_loss, token_logps

N, D, V, K = 19, 6, 13, 4
KINDS = ["forward_kl", "reverse_kl", "jsd", "mixed"]
SUPPORTS = [
    ("full", True),
    ("student_topk", True),
    ("student_topk", False),
    ("teacher_topk", True),
    ("teacher_topk", False),
]


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


def plain_loss(z, t, kind="forward_kl", beta=0.5, support="full", tail=True, topk=K):
    log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)
    if support != "full":
        kept = (z if support == "student_topk" else t).topk(topk).indices
        log_p, log_q = log_p.gather(-1, kept), log_q.gather(-1, kept)
        if tail:
            log_p, log_q = (
                torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (log_p, log_q)
            )
        else:
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    return plain_divergence(log_p, log_q, kind, beta)


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


def loss_of(h, head, teacher, y, weight, behaviour=None, **settings):
    """`distill_loss` with an objective of these settings."""
    return distill_loss(h, head, teacher, y, weight, Objective(**settings), behaviour)


def gradients(loss, h, head):
    return torch.autograd.grad(loss, [x for x in (h, head.weight, head.bias) if x is not None])


def relative(got, expected):
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(got, expected, strict=True)
    )


# Exactness.


@pytest.mark.parametrize("support, tail", SUPPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_autograd_of_the_plain_formula(kind, support, tail):
    h, head, teacher, y, weight = problem()
    ((_, h_t, head_t),) = teacher
    z, t = head.logits(h), head_t.logits(h_t)
    logp = z.log_softmax(-1).gather(-1, y[:, None])[:, 0].detach()
    behaviour = logp + torch.linspace(-1, 1, N, dtype=torch.float64)
    ratio = (logp - behaviour).exp().clamp(max=1.5)
    each = plain_loss(z, t, kind, 0.3, support, tail)
    settings = dict(divergence=kind, beta=0.3, support=support, topk=K, tail=tail, is_cap=1.5, chunk=5)
    loss, stats = loss_of(h, head, teacher, y, weight, behaviour, **settings)
    expected = (weight * ratio * each).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative(gradients(loss, h, head), gradients(expected, h, head)) <= 1e-10

    log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)
    kept = (z if support == "student_topk" else t).topk(V if support == "full" else K).indices
    expected = {
        "divergence": each,
        "logp": logp,
        "teacher_logp": log_q.gather(-1, y[:, None])[:, 0],
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


@pytest.mark.parametrize("support, tail", SUPPORTS + [("sampled", True)])
def test_clip_is_a_policy_gradient_with_clamped_advantages(support, tail):
    """Reverse KL: each token or bucket v weighs its grad log p(v) with clamp(log p - log q), a constant."""
    h, head, teacher, y, weight = problem()
    ((_, h_t, head_t),) = teacher
    z, t = head.logits(h), head_t.logits(h_t)
    if support == "sampled":
        log_p, log_q = (x.log_softmax(-1).gather(-1, y[:, None]) for x in (z, t))
        clamped = (log_p - log_q).clamp(-0.4, 0.4).detach()
        D, surrogate = clamped[:, 0], (clamped * log_p)[:, 0]
    else:
        log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)
        if support != "full":
            kept = (z if support == "student_topk" else t).topk(K).indices
            log_p, log_q = log_p.gather(-1, kept), log_q.gather(-1, kept)
            if tail:
                log_p, log_q = (
                    torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (log_p, log_q)
                )
            else:
                log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        clamped = (log_p - log_q).clamp(-0.4, 0.4).detach()
        assert (clamped.abs() == 0.4).any() and (clamped.abs() < 0.4).any()
        D = surrogate = (log_p.exp() * clamped).sum(-1)
    loss, _ = loss_of(
        h,
        head,
        teacher,
        y,
        weight,
        divergence="reverse_kl",
        support=support,
        topk=K,
        tail=tail,
        clip=0.4,
        chunk=5,
    )
    assert loss.item() == pytest.approx((weight * D).sum().item(), rel=1e-10)
    assert relative(gradients(loss, h, head), gradients((weight * surrogate).sum(), h, head)) <= 1e-10


def test_clip_is_for_the_reverse_kl_alone():
    h, head, teacher, y, weight = problem()
    with pytest.raises(
        InputError, match="a clip of 5.0 belongs to reverse_kl, not jsd; add --divergence reverse_kl"
    ):
        loss_of(h, head, teacher, y, weight, divergence="jsd", clip=5.0)


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
    size = {"jsd": 8, "forward_kl": 2, "reverse_kl": 2, "mixed": 2}[kind]
    h, head, _, y, weight = problem(n=256, d=64, v=3000, plain_head=True)
    noise = torch.randn(256, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h_t = h.detach() + math.sqrt(size * at) / 2 * noise
    h, W = (x.detach().float().requires_grad_() for x in (h, head.weight))
    head, h_t = Head(W), h_t.float()
    loss, stats = loss_of(
        h, head, [(1.0, h_t, Head(head.weight.detach()))], y, weight.float(), divergence=kind
    )
    h_64, W_64 = h.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    each = plain_loss(h_64 @ W_64.t(), h_t.double() @ W_64.detach().t(), kind)
    assert at / 2 < each.mean() < 4 * at  # the fixture is where it says it is
    exact = gradients((weight.float().double() * each).sum(), h_64, Head(W_64))
    assert relative(gradients(loss, h, head), exact) <= tolerance
    active = weight > 0
    torch.testing.assert_close(stats["divergence"][active].double(), each[active], rtol=1e-3, atol=2e-6)


def test_trap_54_bf16_weights_get_float32_logits_and_no_negative_kl():
    h, head, teacher, y, weight = problem(
        n=10_000, d=16, v=50, distance=0.02, dtype=torch.bfloat16, plain_head=True
    )
    weight = torch.ones(10_000)
    for kind in KINDS:
        loss, stats = loss_of(h, head, teacher, y, weight, divergence=kind)
        assert stats["divergence"].min() >= -1e-6
        assert loss.dtype == torch.float32
        h_64, W_64 = h.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
        exact = plain_loss(
            h_64 @ W_64.t(), teacher[0][1].double() @ teacher[0][2].weight.double().t(), kind
        ).sum()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
        d_h, d_w = gradients(loss, h, head)
        assert d_h.dtype == d_w.dtype == torch.bfloat16
        assert (
            relative((d_h, d_w), gradients(exact, h_64, Head(W_64))) < 4e-3
        )  # one rounding to bf16, of the result


def test_trap_54_logits_of_a_bf16_head_are_float32():
    h, head, *_ = problem(dtype=torch.bfloat16)
    logits = head.logits(h)
    assert logits.dtype == torch.float32
    plain = 5 * torch.tanh(0.7 * (h.double() @ head.weight.double().t() + head.bias.double()) / 5)
    torch.testing.assert_close(logits.double(), plain, rtol=1e-5, atol=1e-5)


def test_trap_54_autocast_on_a_cpu_rounds_neither_logits_nor_gradients():
    h, head, teacher, y, weight = problem(dtype=torch.float32)
    loss, _ = loss_of(h, head, teacher, y, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = loss_of(h, head, teacher, y, weight)
        logits = head.logits(h)
    assert inside.item() == loss.item() and torch.equal(logits, head.logits(h))
    for a, b in zip(gradients(inside, h, head), gradients(loss, h, head), strict=True):
        assert torch.equal(a, b)


# Directions, coefficients, and what the divergences promise.


def seven(kind, beta=0.5, **options):
    """D of two distributions over seven tokens, given directly as logits."""
    log_p = torch.tensor([[0.30, 0.25, 0.20, 0.10, 0.08, 0.05, 0.02]]).double().log()
    log_q = torch.tensor([[0.02, 0.40, 0.10, 0.30, 0.03, 0.05, 0.10]]).double().log()
    eye = Head(torch.eye(7).double())
    teacher, y = [(1.0, log_q, eye)], torch.tensor([0])
    loss, _ = loss_of(log_p, eye, teacher, y, torch.ones(1), divergence=kind, beta=beta, **options)
    return loss.item(), log_p[0], log_q[0]


def test_trap_1_forward_is_teacher_to_student_and_reverse_is_student_to_teacher():
    loss, log_p, log_q = seven("forward_kl")
    assert loss == pytest.approx(sum(q.exp() * (q - p) for p, q in zip(log_p, log_q, strict=True)).item())
    loss, log_p, log_q = seven("reverse_kl")
    assert loss == pytest.approx(sum(p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True)).item())
    assert abs(seven("forward_kl")[0] - loss) > 0.1


def test_trap_2_jsd_mixes_probabilities_and_never_exceeds_log_2():
    loss, log_p, log_q = seven("jsd")
    m = [(p.exp() + q.exp()) / 2 for p, q in zip(log_p, log_q, strict=True)]
    kl_pm, kl_qm = (
        sum(a.exp() * (a - b.log()) for a, b in zip(logs, m, strict=True)) for logs in (log_p, log_q)
    )
    assert loss == pytest.approx((kl_pm + kl_qm).item() / 2)
    far, y = Head(torch.eye(2) * 200), torch.tensor([0, 1])
    teacher = [(1.0, torch.eye(2).flip(0), far)]
    loss, _ = loss_of(torch.eye(2), far, teacher, y, torch.ones(2), divergence="jsd")
    assert loss.item() / 2 == pytest.approx(math.log(2))


def test_trap_3_jsd_vanishes_at_its_ends_and_mixed_becomes_the_two_kls():
    assert seven("jsd", 1e-4)[0] == pytest.approx(1e-4 * seven("forward_kl")[0], rel=1e-2)
    assert seven("jsd", 1 - 1e-4)[0] == pytest.approx(1e-4 * seven("reverse_kl")[0], rel=1e-2)
    assert seven("jsd", 0.0)[0] == pytest.approx(0, abs=1e-12)
    assert seven("mixed", 1.0)[0] == pytest.approx(seven("forward_kl")[0])
    assert seven("mixed", 0.0)[0] == pytest.approx(seven("reverse_kl")[0])


# Supports.


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("support", ["student_topk", "teacher_topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_of_the_whole_vocabulary_is_full(kind, support, tail):
    h, head, teacher, y, weight = problem()
    full, _ = loss_of(h, head, teacher, y, weight, divergence=kind, beta=0.3)
    settings = dict(divergence=kind, beta=0.3, support=support, topk=V, tail=tail)
    top, stats = loss_of(h, head, teacher, y, weight, **settings)
    assert top.item() == pytest.approx(full.item(), rel=1e-12)
    assert relative(gradients(top, h, head), gradients(full, h, head)) <= 1e-10
    assert stats["mass_student"][1].item() == pytest.approx(1)


@pytest.mark.parametrize("support", ["student_topk", "teacher_topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_trap_38_no_token_is_negative_and_lumping_the_tail_never_adds(kind, support):
    h, head, teacher, y, _ = problem()
    options = dict(divergence=kind, beta=0.3)
    full = loss_of(h, head, teacher, y, torch.ones(N), **options)[1]["divergence"]
    for topk in range(1, V + 1):
        found = []
        for tail in (True, False):
            settings = dict(**options, support=support, topk=topk, tail=tail)
            found.append(loss_of(h, head, teacher, y, torch.ones(N), **settings)[1]["divergence"])
        lumped, kept = found
        assert lumped.min() >= -1e-7 and kept.min() >= -1e-7
        assert (lumped <= full + 1e-6).all()


def test_trap_36_one_renormalised_token_says_nothing_and_the_tail_bucket_speaks():
    assert seven("jsd", support="student_topk", topk=1, tail=False)[0] == pytest.approx(0, abs=1e-12)
    assert seven("jsd", support="student_topk", topk=1, tail=True)[0] > 0.01


def test_trap_37_a_negative_kept_part_still_has_its_gradient():
    """q = (.6, .4), p = (.9, .1), k = 1: the kept term is negative; clamped, it would teach nothing."""
    p, q = (torch.tensor([pair]).double().log() for pair in ([0.9, 0.1], [0.6, 0.4]))
    p.requires_grad_()
    eye = Head(torch.eye(2).double())
    loss, _ = loss_of(
        p, eye, [(1.0, q, eye)], torch.tensor([0]), torch.ones(1), support="student_topk", topk=1
    )
    (grad,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(grad, torch.tensor([[0.3, -0.3]]).double())


def test_a_tail_too_small_for_one_minus_the_rest_is_still_counted():
    """Mass 1e-9 outside the kept token: 1 - sum is 0 in float32, a sum over the tail is not."""
    z = torch.tensor([[0.0, -20.7, -30.0]])
    t = torch.tensor([[0.0, -10.0, -30.0]])
    eye = Head(torch.eye(3))
    options = dict(divergence="forward_kl", support="student_topk", topk=1)
    loss, _ = loss_of(z, eye, [(1.0, t, eye)], torch.tensor([0]), torch.ones(1), **options)
    exact = plain_loss(z.double(), t.double(), support="student_topk", topk=1)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)


def test_a_tail_that_underflows_still_counts_and_still_learns():
    """The student's mass outside its favourite is e^-200, 0 in float32; D and gradient are exact."""
    z, t = torch.tensor([[0.0, -200.0, -201.0]], requires_grad=True), torch.tensor([[0.0, -1.0, -1.0]])
    eye = Head(torch.eye(3))
    loss, _ = loss_of(
        z, eye, [(1.0, t, eye)], torch.tensor([0]), torch.ones(1), support="student_topk", topk=1
    )
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
    p = head.logits(h).softmax(-1)[0].detach()
    h_V, teacher_V = h.expand(V, -1), [(1.0, h_t.expand(V, -1), head_t)]
    sampled, stats = loss_of(
        h_V, head, teacher_V, torch.arange(V), p, divergence="reverse_kl", support="sampled"
    )
    exact, _ = loss_of(h, head, teacher, torch.tensor([0]), torch.ones(1), divergence="reverse_kl")
    assert relative(gradients(sampled, h, head), gradients(exact, h, head)) <= 1e-10
    assert sampled.item() == pytest.approx(exact.item())  # the values average to the KL as well
    log_p, log_q = head.logits(h).log_softmax(-1)[0], head_t.logits(h_t).log_softmax(-1)[0]
    torch.testing.assert_close(stats["divergence"].double(), (log_p - log_q).detach(), rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize(
    "alpha, kind", [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.5, "jsd"), (0.2, "jsd")]
)
def test_parity_with_trl(alpha, kind):
    h, head, teacher, y, weight = problem()
    t, z = teacher[0][2].logits(teacher[0][1]), head.logits(h)
    top = dict(support="student_topk", topk=K)
    for theirs, options in [
        (trl_divergence(z.log_softmax(-1), t.log_softmax(-1), alpha), {}),
        (trl_topk(z, t, alpha, K, True), {**top, "tail": True}),
        (trl_topk(z, t, alpha, K, False), {**top, "tail": False}),
    ]:
        loss, _ = loss_of(h, head, teacher, y, weight, divergence=kind, beta=alpha, **options)
        expected = (weight * theirs).sum()
        assert loss.item() == pytest.approx(expected.item())
        exact = torch.autograd.grad(expected, (h, head.weight, head.bias), retain_graph=True)
        assert relative(gradients(loss, h, head), exact) <= 1e-10


# Zeros and infinities.


def test_a_token_both_sides_exclude_counts_for_nothing():
    """-inf in both biases: every divergence is that of the vocabulary without those entries."""
    h, head, teacher, y, weight = problem()
    ((_, h_t, head_t),) = teacher
    banned = torch.zeros(V, dtype=torch.bool)
    banned[[2, 7]] = True
    y[banned[y]] = 0
    full, full_t = (
        side._replace(bias=side.bias.detach().masked_fill(banned, -math.inf), softcap=0.0)
        for side in (head, head_t)
    )
    for kind in KINDS:
        for support, tail in SUPPORTS:
            options = dict(divergence=kind, support=support, tail=tail, topk=K)
            loss, stats = loss_of(h, full, [(1.0, h_t, full_t)], y, weight, **options)
            keep, keep_t = (
                Head(side.weight[~banned], side.bias[~banned], side.scale) for side in (head, head_t)
            )
            without, _ = loss_of(h, keep, [(1.0, h_t, keep_t)], torch.zeros_like(y), weight, **options)
            assert loss.item() == pytest.approx(without.item(), rel=1e-10)
            got, exact = (gradients(x, h, Head(head.weight)) for x in (loss, without))
            assert relative(got, exact) <= 1e-10
            assert all(stat.isfinite().all() for stat in stats.values())


def test_trap_9_what_only_the_teacher_excludes():
    """q = 0 < p: forward KL and JSD are finite and exact; the reverse KL is huge; nothing is NaN."""
    h, head, teacher, y, weight = problem(plain_head=True)
    ((_, h_t, head_t),) = teacher
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = -math.inf
    y[y == 3] = 0
    ours = [(1.0, h_t, head_t._replace(bias=bias))]
    log_q = (h_t @ head_t.weight.t() + bias).log_softmax(-1)

    def q_log(log_b):
        return torch.where(log_q.isinf(), 0, log_q.exp() * (log_q.nan_to_num(neginf=0) - log_b)).sum(-1)

    for kind in ("forward_kl", "jsd"):
        log_p = head.logits(h).log_softmax(-1)
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        each = q_log(log_p)
        if kind == "jsd":
            each = (q_log(log_m) + (log_p.exp() * (log_p - log_m)).sum(-1)) / 2
        loss, _ = loss_of(h, head, ours, y, weight, divergence=kind)
        expected = (weight * each).sum()
        assert loss.item() == pytest.approx(expected.item())
        assert relative(gradients(loss, h, head), gradients(expected, h, head)) <= 1e-10
    for kind in ("reverse_kl", "mixed"):
        loss, stats = loss_of(h, head, ours, y, weight, divergence=kind)
        assert loss.item() > 1e20 and not any(g.isnan().any() for g in gradients(loss, h, head))


def test_trap_9_tokens_of_weight_zero_are_never_looked_at():
    h, head, teacher, y, weight = problem()
    loss, stats = loss_of(h, head, teacher, y, weight, divergence="reverse_kl")
    unused = weight == 0
    ((_, h_t, head_t),) = teacher
    bad_h, bad_t, bad_y = h.detach().clone(), h_t.clone(), y.clone()
    bad_h[unused], bad_t[unused], bad_y[unused] = math.nan, -math.inf, -100
    bad_h.requires_grad_()
    again, bad_stats = loss_of(bad_h, head, [(1.0, bad_t, head_t)], bad_y, weight, divergence="reverse_kl")
    assert again.item() == loss.item()
    for a, b in zip(gradients(again, bad_h, head), gradients(loss, h, head), strict=True):
        assert torch.equal(a, b)
    assert all(
        torch.equal(stats[name], bad_stats[name]) and (stats[name][unused] == 0).all() for name in stats
    )


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


def test_trap_40_the_ratio_multiplies_every_token_and_the_cap_bounds_it():
    h, head, teacher, y, weight = problem()
    logp = token_logps(h, head, y)[0].detach()
    for cap, expected in [(0.0, math.e), (2.0, 2.0), (3.0, math.e)]:
        loss, stats = loss_of(h, head, teacher, y, weight, behaviour=logp - 1, is_cap=cap)
        plain, _ = loss_of(h, head, teacher, y, weight)
        assert loss.item() == pytest.approx(expected * plain.item(), rel=1e-5)
        assert relative(gradients(loss, h, head), [expected * g for g in gradients(plain, h, head)]) <= 1e-5
        assert stats["ratio"][1].item() == pytest.approx(expected, rel=1e-5)


def test_weights_add_up_and_chunks_do_not_show():
    h, head, teacher, y, weight = problem()
    loss, stats = loss_of(h, head, teacher, y, weight, chunk=N)
    whole = gradients(loss, h, head)
    for chunk in (1, 3, 512):
        other, other_stats = loss_of(h, head, teacher, y, weight, chunk=chunk)
        assert relative(gradients(other, h, head), whole) <= 1e-12
        assert other.item() == pytest.approx(loss.item(), rel=1e-12)
        assert all(torch.allclose(stats[name], other_stats[name]) for name in stats)
    ((_, h_t, head_t),) = teacher
    twice, _ = loss_of(
        torch.cat([h, h]), head, [(1.0, torch.cat([h_t, h_t]), head_t)], y.repeat(2), weight.repeat(2) / 2
    )
    assert twice.item() == pytest.approx(loss.item())


# Heads and teachers.


@pytest.mark.parametrize(
    "name, options, head_options",
    [
        ("Gemma2", dict(final_logit_softcapping=2.0, head_dim=8), dict(softcap=2.0)),
        ("Granite", dict(logits_scaling=3.0), dict(scale=1 / 3.0)),
        ("Cohere", dict(logit_scale=0.25), dict(scale=0.25)),
        ("Phi", {}, {}),  # a head with a bias
    ],
)
def test_trap_53_heads_are_those_of_the_models(name, options, head_options):
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, pad_token_id=0)
    shape |= dict(num_attention_heads=2, num_key_value_heads=2)
    config = getattr(transformers, f"{name}Config")(**shape, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    weight = model.lm_head.weight
    torch.nn.init.normal_(weight)
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.arange(10)[None]
    h = model.base_model(ids).last_hidden_state[0]
    logits = model(ids).logits[0]
    head = Head(weight, model.lm_head.bias, **head_options)
    torch.testing.assert_close(head.logits(h), logits)
    teacher, weight_N = [(1.0, h.detach().flip(0), head)], torch.ones(10, dtype=torch.float64)
    loss, _ = loss_of(h, head, teacher, ids[0], weight_N, divergence="reverse_kl")
    expected = plain_loss(logits, logits.detach().flip(0), "reverse_kl").sum()
    assert loss.item() == pytest.approx(expected.item())
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    )


def test_trap_26_a_live_teacher_on_the_students_own_head_is_a_target_only():
    h, head, teacher, y, weight = problem()
    h_t = teacher[0][1].requires_grad_()
    loss, _ = loss_of(h, head, [(1.0, h_t, head)], y, weight)
    apart = Head(head.weight.detach().clone(), head.bias.detach().clone(), head.scale, head.softcap)
    expected, _ = loss_of(h, head, [(1.0, h_t.detach(), apart)], y, weight)
    assert relative(gradients(loss, h, head), gradients(expected, h, head)) <= 1e-12
    loss, _ = loss_of(h, head, [(1.0, h_t, head)], y, weight)
    loss.backward()
    assert h_t.grad is None


@pytest.mark.parametrize("a", [0.0, 0.05, 1.0])
def test_a_trust_region_teacher_mixes_logits(a):
    h, head, teacher, y, weight = problem()
    ((_, h_ref, ref),) = teacher
    h_live = h.detach() + 0.1
    t = (1 - a) * ref.logits(h_ref) + a * head.logits(h_live).detach()
    expected = (weight * plain_loss(head.logits(h), t, "jsd")).sum()
    loss, _ = loss_of(h, head, [(1 - a, h_ref, ref), (a, h_live, head)], y, weight, divergence="jsd", chunk=5)
    assert loss.item() == pytest.approx(expected.item())
    assert relative(gradients(loss, h, head), gradients(expected, h, head)) <= 1e-10


def test_shares_of_the_teachers_logits_may_be_any_number_and_zero_is_not_computed():
    h, head, teacher, y, weight = problem()
    ((_, h_t, head_t),) = teacher
    loss, _ = loss_of(h, head, [(0.5, h_t, head_t), (0.0, h_t * math.nan, head_t)], y, weight)
    expected = (weight * plain_loss(head.logits(h), 0.5 * head_t.logits(h_t))).sum()
    assert loss.item() == pytest.approx(expected.item())


def test_teacher_of_another_width_and_precision():
    h, head, _, y, weight = problem(dtype=torch.float32)
    wide, W_t = torch.randn(N, 2 * D).bfloat16(), torch.randn(V, 2 * D).bfloat16()
    loss, _ = loss_of(h, head, [(1.0, wide, Head(W_t))], y, weight)
    expected = (weight * plain_loss(head.logits(h), wide.float() @ W_t.float().t())).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    h, head, teacher, y, weight = problem(n=5, plain_head=True)
    loss, _ = loss_of(h, head, teacher, y, weight)
    frozen, _ = loss_of(h, Head(head.weight.detach()), teacher, y, weight)
    torch.testing.assert_close(torch.autograd.grad(frozen, h)[0], gradients(loss, h, head)[0])
    assert largest_tensor(lambda: loss_of(h, Head(head.weight.detach()), teacher, y, weight, chunk=1)) < V * D


def test_gradients_scale_with_what_comes_back_and_only_once():
    h, head, teacher, y, weight = problem()
    one = gradients(loss_of(h, head, teacher, y, weight)[0], h, head)
    loss, stats = loss_of(h, head, teacher, y, weight)
    third = torch.autograd.grad(-loss / 3, (h, head.weight, head.bias), retain_graph=True)
    assert relative(third, [-g / 3 for g in one]) <= 1e-12
    with pytest.raises(RuntimeError):  # they were scaled in place
        loss.backward()


def test_without_autograd_there_is_a_value_and_no_gradient_is_computed():
    h, head, teacher, y, weight = problem(n=5)
    with torch.no_grad():
        loss, _ = loss_of(h, head, teacher, y, weight)
        assert largest_tensor(lambda: loss_of(h, head, teacher, y, weight, chunk=1)) < V * D
    assert not loss.requires_grad and loss.item() == loss_of(h, head, teacher, y, weight)[0].item()


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

    def step():
        settings = dict(divergence="jsd", support=support, topk=K, chunk=16)
        loss_of(h, head, teacher, y, weight, **settings)[0].backward()

    assert largest_tensor(step) <= max(16 * 50, 400 * 7 * 2)


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


# The sampled token's own losses, as the scripts write them.


def nll(logp, weight, advantage, old):
    return -weight * logp


def dft(logp, weight, advantage, old):
    return -weight * logp.exp().detach() * logp


def clipped(logp, weight, advantage, old):
    ratio = (logp - old).exp()
    return -weight * torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


@pytest.mark.parametrize("chunk", [1, 5, 512])
@pytest.mark.parametrize("plain_head", [False, True])
@pytest.mark.parametrize("formula", [nll, dft, clipped])
def test_losses_on_token_logps_equal_float64_autograd(formula, plain_head, chunk):
    """Values, and gradients for hidden states, weight and bias of a head with bias, scale and soft cap."""
    h, head, _, y, weight = problem(plain_head=plain_head)
    advantage = torch.randn(N, dtype=torch.float64)
    log_p = F.linear(h, head.weight, head.bias) * head.scale
    log_p = log_p if plain_head else head.softcap * (log_p / head.softcap).tanh()
    log_p = log_p.log_softmax(-1)
    plain = log_p.gather(-1, y[:, None])[:, 0]
    old = plain.detach() + torch.linspace(-0.5, 0.5, N, dtype=torch.float64)
    expected = formula(plain, weight, advantage, old).sum()
    logp, entropy = token_logps(h, head, y, chunk)
    loss = formula(logp, weight, advantage, old).sum()
    assert loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(logp, plain)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).detach())
    assert not entropy.requires_grad
    assert relative(gradients(loss, h, head), gradients(expected, h, head)) <= 1e-10


def test_token_logps_of_a_frozen_head_and_without_autograd():
    h, head, _, y, weight = problem(n=5, v=40, plain_head=True)
    d_h = gradients((weight * token_logps(h, head, y)[0]).sum(), h, head)[0]
    frozen = Head(head.weight.detach())

    def step():
        return torch.autograd.grad((weight * token_logps(h, frozen, y, chunk=1)[0]).sum(), h)[0]

    torch.testing.assert_close(step(), d_h)
    assert largest_tensor(step) < 40 * D
    with torch.no_grad():
        logp, entropy = token_logps(h, head, y)
    assert not logp.requires_grad and not entropy.requires_grad
    torch.testing.assert_close(logp, token_logps(h, head, y)[0].detach())


def test_trap_54_token_logps_under_autocast_are_those_without():
    h, head, _, y, weight = problem(dtype=torch.float32)
    plain = (weight * token_logps(h, head, y)[0]).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = (weight * token_logps(h, head, y)[0]).sum()
    assert inside.item() == plain.item()
    for a, b in zip(gradients(inside, h, head), gradients(plain, h, head), strict=True):
        assert torch.equal(a, b)


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
        (dict(support="sampled", divergence="jsd"), "--support sampled belongs to reverse_kl, not jsd"),
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
    _, head, teacher, *_ = problem(v=V + 5, seed=1)
    ((_, h_t, head_t),) = teacher
    W, b = (x.detach()[:ours].clone().requires_grad_() for x in (head.weight, head.bias))
    head, head_t = (
        head._replace(weight=W, bias=b),
        head_t._replace(weight=head_t.weight[:theirs], bias=head_t.bias[:theirs]),
    )
    settings = dict(divergence="reverse_kl", support=support, topk=K, chunk=5)
    loss, stats = loss_of(h, head, [(1.0, h_t, head_t)], y, weight, **settings)
    small, small_t = (side._replace(weight=side.weight[:V], bias=side.bias[:V]) for side in (head, head_t))
    expected, expected_stats = loss_of(h, small, [(1.0, h_t, small_t)], y, weight, **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    got = gradients(loss, h, head)
    assert relative(got, gradients(expected, h, head)) <= 1e-12
    assert got[1].shape == (ours, D) and (got[1][V:] == 0).all() and (got[2][V:] == 0).all()
    assert all(torch.equal(stats[name], expected_stats[name]) for name in stats)
    if support == "full":
        exact = (weight * plain_loss(small.logits(h), small_t.logits(h_t), "reverse_kl")).sum()
        assert loss.item() == pytest.approx(exact.item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_cuda_half_precision_products_keep_float32_logits(autocast):
    h, head, teacher, y, weight = problem(
        n=600, d=64, v=1000, distance=0.1, dtype=torch.bfloat16, plain_head=True
    )
    kind = torch.float32 if autocast else torch.bfloat16
    tensors = (h, head.weight, teacher[0][1])
    h, W, h_t = (x.detach().cuda().to(kind).requires_grad_() for x in tensors)
    head = Head(W)
    head_t = Head(teacher[0][2].weight.cuda().to(h.dtype))
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss, _ = loss_of(h, head, [(1.0, h_t, head_t)], y.cuda(), weight.float().cuda())
    h_64, W_64 = (x.detach().double().requires_grad_() for x in (h, head.weight))
    each = plain_loss(h_64 @ W_64.t(), h_t.double() @ teacher[0][2].weight.cuda().double().t())
    exact = (weight.double().cuda() * each).sum()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert relative(gradients(loss, h, head), gradients(exact, h_64, Head(W_64))) < 1e-2


# A teacher of which only the top k is known.


def topk_of(t, y, k=K, dtype=None):
    log_q = t.log_softmax(-1).detach()
    kept = log_q.topk(k, sorted=False).indices
    return TopK(
        kept,
        log_q.gather(-1, kept).to(dtype or t.dtype),
        log_q.gather(-1, y[:, None])[:, 0].to(dtype or t.dtype),
    )


@pytest.mark.parametrize(
    "support, tail", [("teacher_topk", True), ("teacher_topk", False), ("sampled", True)]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_teachers_top_k_from_outside_equals_the_teacher(dtype, kind, support, tail):
    """Loss, gradients and statistics; in float32, as a server sends them, up to rounding."""
    if support == "sampled" and kind != "reverse_kl":
        return
    h, head, teacher, y, weight = problem(dtype=dtype)
    ((_, h_t, head_t),) = teacher
    behaviour = token_logps(h, head, y)[0].detach() + 0.3
    options = dict(
        divergence=kind,
        beta=0.3,
        support=support,
        topk=K,
        tail=tail,
        behaviour=behaviour,
        is_cap=1.5,
        chunk=5,
    )
    ours, stats = loss_of(h, head, topk_of(head_t.logits(h_t), y), y, weight, **options)
    local, expected = loss_of(h, head, teacher, y, weight, **options)
    exact = dtype == torch.float64
    assert ours.item() == pytest.approx(local.item(), rel=1e-12 if exact else 1e-5)
    assert relative(gradients(ours, h, head), gradients(local, h, head)) <= (1e-10 if exact else 1e-5)
    for name, stat in stats.items():
        torch.testing.assert_close(stat, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_tail_that_rounding_took_is_small_and_not_nothing():
    """Log-probs that sum to 1 or more: the rest is float32's epsilon, the reverse KL stays moderate."""
    h, W = torch.zeros(1, 2), torch.zeros(5, 2)
    for logps in ([math.log(0.75), math.log(0.25)], [math.log(0.75) + 1e-6, math.log(0.25)]):
        told = TopK(torch.tensor([[0, 1]]), torch.tensor([logps]), torch.tensor([-1.0]))
        loss, _ = loss_of(
            h,
            Head(W),
            told,
            torch.tensor([0]),
            torch.ones(1),
            divergence="reverse_kl",
            support="teacher_topk",
            topk=2,
        )
        want = sum(0.2 * math.log(0.2 / q) for q in (0.75, 0.25)) + 0.6 * math.log(0.6 / 2**-23)
        assert loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("support", ["full", "student_topk"])
def test_what_a_top_k_cannot_give_is_refused(support):
    h, head, teacher, y, weight = problem()
    with pytest.raises(
        InputError, match=f"--support {support}: a served teacher has teacher_topk and sampled"
    ):
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
    h, W = torch.randn(64, 256, generator=g, requires_grad=True), torch.randn(512, 256, generator=g, requires_grad=True)
    head, y_N, weight_N, precisions = Head(W, bf16=bf16), torch.zeros(64, dtype=torch.long), torch.ones(64), Precisions()
    exact = h.detach().double() @ W.detach().double().t()
    told = "ieee" if bf16 else "bf16"
    matmul.fp32_precision = told
    try:
        with precisions:
            z = head.logits(h)
            (z.sum() + distill_loss(h, head, [(1.0, h.detach(), head)], y_N, weight_N, Objective())[0]).backward()
        assert precisions.seen == ["bf16" if bf16 else "ieee"] * 7
        assert matmul.fp32_precision == told
    finally:
        matmul.fp32_precision = "none"
    assert (z - exact).abs().max() < (1.0 if bf16 else 1e-3)
