"""What workers send each other goes in few calls, in one order, and changes no number."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_ray.finetuning import collectives
from moe_ray.finetuning.collectives import gradient_or_zeros, in_buckets, send_from, sum_gradients, sum_gradients_at

NUM_EXPERTS = 300


def experts(num=NUM_EXPERTS, *, shape=(6, 4)):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(*shape, generator=generator)) for _ in range(num)]
    for number, parameter in enumerate(parameters):
        if number % 3:  # a worker's batches do not hold them all
            parameter.grad = torch.randn(*shape, generator=generator)
    return parameters


@pytest.fixture
def sent(monkeypatch):
    """The bytes of each collective, of two workers that hold the same numbers; this one is rank 0."""
    sizes = []

    def add(flat, **_):
        sizes.append(flat.nbytes)
        flat.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", add)
    monkeypatch.setattr(dist, "reduce", add)
    monkeypatch.setattr(dist, "broadcast", lambda flat, src: sizes.append(flat.nbytes))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return sizes


def sums_of(parameters):
    return [2 * gradient_or_zeros(parameter) for parameter in parameters]


@pytest.mark.parametrize("limit", [1, 100, 5000, 64 * 2**20])
def test_a_sum_is_the_same_to_the_bit_however_it_is_cut(sent, monkeypatch, limit):
    monkeypatch.setattr(collectives, "BUCKET_BYTES", limit)
    parameters = experts(20)
    expected = sums_of(parameters)
    sum_gradients(parameters)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))
    assert sum(sent) == sum(p.nbytes for p in parameters)


@pytest.mark.parametrize("send", [sum_gradients, lambda p: sum_gradients_at(0, p), lambda p: send_from(0, p)])
def test_the_number_of_calls_goes_with_bytes_and_not_with_experts(sent, monkeypatch, send):
    parameters = experts()
    of_all = sum(p.nbytes for p in parameters)
    send(parameters)
    assert sent == [of_all]  # 300 experts, one call
    sent.clear()
    monkeypatch.setattr(collectives, "BUCKET_BYTES", of_all // 4)
    send(parameters)
    assert len(sent) == 4
    assert max(sent) <= of_all // 4


def test_only_the_owner_keeps_the_sum(sent):
    parameters = experts()
    expected = sums_of(parameters)
    sum_gradients_at(0, parameters)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))
    sum_gradients_at(1, parameters)
    assert [p.grad for p in parameters] == [None] * NUM_EXPERTS


@pytest.mark.parametrize("num", [1, 7])
def test_others_take_what_the_owner_sends(monkeypatch, num):
    parameters = experts(num)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "broadcast", lambda flat, src: flat.copy_(torch.arange(flat.numel()).view(flat.shape)))
    send_from(0, parameters)
    got = torch.cat([parameter.detach().flatten() for parameter in parameters])
    assert got.tolist() == list(range(24 * num))


def test_what_an_owner_sends_stays_as_it_is(sent):
    parameters = experts(5)
    before = [parameter.detach().clone() for parameter in parameters]
    send_from(0, parameters)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_devices_and_types_are_never_in_one_bucket():
    """The meta device stands for a second GPU."""
    on_both = [
        nn.Parameter(torch.zeros(4, device=device, dtype=dtype))
        for _ in range(3)
        for device in ("cpu", "meta")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    buckets = list(in_buckets(on_both))
    assert [{(p.device.type, p.dtype) for p in bucket} for bucket in buckets] == [
        {("cpu", torch.float32)},
        {("cpu", torch.bfloat16)},
        {("meta", torch.float32)},
        {("meta", torch.bfloat16)},
    ]
    assert [len(bucket) for bucket in buckets] == [3] * 4


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), limit=st.integers(1, 200))
def test_buckets_hold_all_in_order_and_are_as_full_as_can_be(sizes, limit):
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    buckets = list(in_buckets(parameters, limit=limit))
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]
    of_each = [sum(p.nbytes for p in bucket) for bucket in buckets]
    assert all(size <= limit or len(bucket) == 1 for size, bucket in zip(of_each, buckets, strict=True))
    assert all(size + after[0].nbytes > limit for size, (_, after) in zip(of_each, pairwise(buckets), strict=False))


def test_nothing_to_send_is_no_call(sent):
    sum_gradients([])
    send_from(0, [])
    assert sent == []
