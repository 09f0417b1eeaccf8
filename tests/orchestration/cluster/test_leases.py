"""Nobody begins what another one is at; who dies, or gives the lease back, holds nobody up."""

import threading
import time

import pytest

from moe_ray.orchestration.cluster import leases as leases_module
from moe_ray.orchestration.cluster.leases import Leases, leased


def test_a_lease_has_one_holder_until_it_is_given_back():
    leases = Leases()
    assert leases.take("work", "a")
    assert not leases.take("work", "b")
    assert leases.take("other work", "b")
    assert leases.take("work", "a")  # renewed
    leases.give_back("work", "b")  # not its own
    assert not leases.take("work", "b")
    leases.give_back("work", "a")
    assert leases.take("work", "b")


def test_a_holder_that_is_not_heard_of_loses_its_lease(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    leases = Leases(seconds=60)
    assert leases.take("work", "a")
    now[0] = 59
    assert leases.take("work", "a")
    now[0] = 118
    assert not leases.take("work", "b")
    now[0] = 119
    assert leases.take("work", "b")
    assert not leases.take("work", "a")


class Remote:
    """Calls that a process in between would make, made here."""

    def __init__(self, leases):
        self.leases, self.taken = leases, 0

    @property
    def take(self):
        self.taken += 1
        return self.Method(self.leases.take)

    @property
    def give_back(self):
        return self.Method(self.leases.give_back)

    class Method:
        def __init__(self, call):
            self.remote = call


@pytest.fixture
def remote(monkeypatch):
    monkeypatch.setattr(leases_module.ray, "get", lambda result: result)
    monkeypatch.setattr(leases_module, "_SECONDS_BETWEEN_QUESTIONS", 0.01)
    monkeypatch.setattr(leases_module, "_SECONDS_BETWEEN_RENEWALS", 0.01)
    return Remote(Leases(seconds=0.5))


@pytest.mark.slow
def test_two_that_begin_the_same_do_it_one_after_another(remote):
    inside, at_once, order = [], [], []

    def work(holder):
        with leased(remote, "work", holder):
            inside.append(holder)
            at_once.append(len(inside))
            time.sleep(0.8)  # longer than a lease that is not renewed
            inside.remove(holder)
            order.append(holder)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once == [1, 1]
    assert sorted(order) == ["a", "b"]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_the_lease_is_given_back_after_an_error_or_a_stop(remote, error):
    def fails():
        with leased(remote, "work", "a"):
            raise error

    with pytest.raises(error):
        fails()
    assert remote.leases.take("work", "b")


def test_without_leases_nobody_waits():
    entered = []
    with leased(None, "work", "a"), leased(None, "work", "b"):
        entered.append("both at once")
    assert entered == ["both at once"]
