"""Promise: what lies between the matrix multiplications has the gradients that autograd finds, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from job.fast import pointwise


def test_rms_norm() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16, dtype=torch.float64, requires_grad=True), torch.randn(16, dtype=torch.float64)
    found, scale, _ = pointwise.rms_norm(x, weight, 1e-6, quantise=False)
    expected = torch.nn.functional.rms_norm(x, (16,), weight, 1e-6)
    assert torch.allclose(found, expected)
    gradient, beside = torch.randn(2, 5, 16, dtype=torch.float64)
    [autograd] = torch.autograd.grad(expected, x, gradient)
    ours, _ = pointwise.rms_norm_gradient(gradient, x.detach(), weight, scale.detach(), beside, quantise=False)
    assert torch.allclose(ours, autograd + beside)
    assert torch.equal(pointwise.normed(x, weight, scale), found)


def test_swiglu() -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    found, _ = pointwise.swiglu(gate_up, None, quantise=False)
    gradient = torch.randn(5, 12, dtype=torch.float64)
    [autograd] = torch.autograd.grad(found, gate_up, gradient)
    ours, act, _ = pointwise.swiglu_gradient(gradient, gate_up.detach(), None, None, None, quantise=False)
    assert torch.allclose(ours, autograd)
    assert torch.equal(act, found)


def test_rotation_turns_back() -> None:
    torch.manual_seed(0)
    states = torch.randn(5, 4, 8, dtype=torch.float64)
    angle = torch.randn(5, 4, dtype=torch.float64)
    turned = pointwise.rotate(states.clone(), angle.cos(), angle.sin(), 3)
    assert torch.equal(turned[:, 3], states[:, 3])
    assert not torch.allclose(turned[:, :3], states[:, :3])
    back = pointwise.rotate_gradient(turned[:, :2], turned[:, 2:3], turned[:, 3:], angle.cos(), angle.sin())
    assert torch.allclose(back, states)


def test_norm_and_rotation_of_heads() -> None:
    torch.manual_seed(0)
    heads, kv_heads = 3, 2
    states = torch.randn(5, heads + 2 * kv_heads, 8, dtype=torch.float64, requires_grad=True)
    of_query, of_key = torch.randn(2, 8, dtype=torch.float64)
    norms = pointwise.HeadNorms(of_query, of_key, 1e-6)
    norms.query[3] = 0.0  # what a weight of zero hides cannot be seen in the rotated values
    angle = torch.randn(5, 4, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    found = (
        *pointwise.norm_and_rotate(states, norms, cos, sin, heads, kv_heads),
        states[:, heads + kv_heads :],
    )
    normed = [
        torch.nn.functional.rms_norm(part, (8,), weight, norms.epsilon)
        for part, weight in ((states[:, :heads], norms.query), (states[:, heads : heads + kv_heads], norms.key))
    ]
    for ours, alone in zip(found, normed, strict=False):
        assert torch.allclose(ours, pointwise.rotate(alone, cos, sin, alone.shape[1]))
    query, key, value = (torch.randn_like(part) for part in found)
    [autograd] = torch.autograd.grad(found, states, (query, key, value))
    back = pointwise.norm_and_rotate_gradient(query, key, value, states.detach(), norms, cos, sin)
    assert torch.allclose(back, autograd)


def test_heads_are_rounded_where_the_modules_round_them() -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(65, 4, 16).bfloat16(), torch.randn(16).bfloat16()
    theirs = Qwen3RMSNorm(16, eps=1e-6)
    theirs.weight.data = weight
    still = torch.ones(65, 8), torch.zeros(65, 8)
    query, key = pointwise.norm_and_rotate(states, pointwise.HeadNorms(weight, weight, 1e-6), *still, 2, 1)
    assert torch.equal(torch.cat((query, key), dim=1), theirs(states[:, :3]))


def test_cross_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (5,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    loss, gradient = pointwise.cross_entropy(logits.detach(), targets)
    assert loss.item() == pytest.approx(expected.item())
    assert torch.allclose(gradient, torch.autograd.grad(expected, logits)[0])


def test_a_row_in_e4m3_is_within_half_a_step_of_itself() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 64) * torch.logspace(-6, 6, 7)[:, None]
    small, scale = pointwise.to_fp8(x)
    error = (small.float() * scale - x).abs()
    # 3 bits of mantissa: 2^-4 of the value; below the smallest normal, 2^-6, steps are 2^-9 of the scale.
    assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all()
