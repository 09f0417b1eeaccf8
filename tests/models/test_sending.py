import pytest
import torch

from moe_ray.models.sending import sent


class OnHost:
    """What a tensor is asked for on its way; there is no GPU here."""

    def __init__(self, device="cpu"):
        self.device, self.done = torch.device(device), []

    def pin_memory(self):
        self.done.append("pinned")
        return self

    def to(self, device, *, non_blocking=False):
        self.done.append((str(device), non_blocking))
        return self


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 1)])
def test_a_gpu_gets_it_from_pinned_memory_and_nobody_waits(device):
    assert sent(OnHost(), device).done == ["pinned", (str(device), True)]


def test_what_is_on_a_gpu_already_is_not_pinned():
    assert sent(OnHost("cuda:0"), "cuda:1").done == [("cuda:1", False)]


def test_on_the_host_it_is_the_tensor_itself():
    tensor = torch.arange(3)
    assert sent(tensor, "cpu") is tensor
    assert sent(tensor, "meta").is_meta
