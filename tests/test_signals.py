import os
import signal
import threading

import pytest

from moe_ray.signals import Terminated, end_main_thread, end_on_sigterm, interrupts_deferred


@pytest.fixture(autouse=True)
def handlers():
    """As of a command, and afterwards those of before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_on_sigterm()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interrupt_comes_at_the_end_of_what_may_not_be_broken_off(number, raised):
    done = []

    def work():
        with interrupts_deferred():
            os.kill(os.getpid(), number)
            done.append("to its end")

    with pytest.raises(raised):
        work()
    assert done == ["to its end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_comes_also_where_the_work_fails():
    def work():
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError

    with pytest.raises(KeyboardInterrupt):
        work()


def test_a_second_interrupt_comes_at_once():
    done = []

    def work():
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("first")
            os.kill(os.getpid(), signal.SIGINT)
            done.append("second")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["first"]


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_deferred():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_defers_nothing():
    seen = []

    def work():
        with interrupts_deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_another_thread_ends_the_main_one_only_where_that_is_prepared():
    with pytest.raises(Terminated):
        end_main_thread()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_main_thread()
