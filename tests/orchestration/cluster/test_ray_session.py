"""Ray as moe-ray wants it: errors come as they were raised, and what cannot be had is refused instead of waited for."""

import logging
import time
from contextlib import contextmanager, nullcontext
from signal import SIG_IGN, SIGTERM, getsignal, raise_signal, signal

import pytest

from moe_ray.config.cluster import ClusterConfig
from moe_ray.errors import InputError, NothingSelected, OutsideFailed
from moe_ray.orchestration.cluster.ray_session import (
    _missing,
    arrow_filesystem,
    check_reachable,
    require_cpus,
    require_gpus,
    resources_released,
    result_of,
)
from moe_ray.signals import Terminated
from moe_ray.storage.folder import Folder


def test_a_folder_elsewhere_is_read_by_arrow_through_its_own_file_system(tmp_path):
    folder = Folder.open(f"memory://{tmp_path.name}/run")
    folder.write_bytes("a.txt", b"text")
    with arrow_filesystem(folder).open_input_stream(f"{folder.path}/a.txt") as stream:
        assert stream.read() == b"text"
    assert arrow_filesystem(Folder.open(str(tmp_path))) is None


@pytest.mark.parametrize(
    ("now", "missing"),
    [
        ({"CPU": 4.0, "GPU": 1.0}, []),
        ({"CPU": 5.0, "GPU": 1.0}, []),
        ({"CPU": 4.0 - 1e-9, "GPU": 1.0}, []),
        ({"CPU": 1.5, "GPU": 1.0}, ["2.5 CPU"]),
        ({}, ["4 CPU", "1 GPU"]),  # Ray leaves out what is all in use
    ],
)
def test_what_is_not_given_back_is_named(now, missing):
    assert _missing({"CPU": 4.0, "GPU": 1.0, "memory": 9.0}, now) == missing


@pytest.mark.parametrize(
    ("said", "times", "starts", "raised"),
    [
        ("node timed out during startup.", 1, 2, None),
        (
            "node timed out during startup.",
            2,
            2,
            "did not start on this machine, twice, .* when the machine is less busy",
        ),
        ("\nThe last 20 lines of dashboard.log (it contains the error message from the dashboard): \n…", 1, 2, None),
        ("Failed to start a dashboard.", 2, 2, "did not start on this machine, twice"),
        ("no such setting", 1, 1, "no such setting"),
    ],
)
def test_a_local_ray_that_was_too_slow_is_started_once_more(said, times, starts, raised, monkeypatch):
    from moe_ray.orchestration.cluster import ray_session

    calls = []

    def init(**options):
        calls.append(options)
        if len(calls) <= times:
            raise Exception(said)

    monkeypatch.setattr(ray_session.ray, "init", init)
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    with nullcontext() if raised is None else pytest.raises(Exception, match=raised):
        ray_session._start_local(num_cpus=3)
    assert len(calls) == starts
    assert all(options["dashboard_host"] == "127.0.0.1" and options["num_cpus"] == 3 for options in calls)


@pytest.mark.parametrize(("of_user", "told"), [(None, {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}), ("ACTIVE", None)])
def test_the_processes_of_a_cluster_are_told_to_wait_passively_unless_the_user_says_how(of_user, told, monkeypatch):
    from moe_ray import threads
    from moe_ray.orchestration.cluster import ray_session

    calls = []
    monkeypatch.setattr(threads, "_set_here", False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if of_user:
        monkeypatch.setenv("OMP_WAIT_POLICY", of_user)
    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_session.ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_session, "_tune_data", lambda: None)
    with ray_session.ray_session(ClusterConfig(address="10.0.0.1:6379")):
        pass
    assert [options["runtime_env"] for options in calls] == [told]


@pytest.mark.parametrize(
    ("nodes", "raised"),
    [([{"Alive": True}], KeyError), ([{"Alive": False}], OutsideFailed), ([], OutsideFailed), (None, OutsideFailed)],
)
def test_what_follows_the_loss_of_the_last_node_is_said_as_that_and_not_as_it_looks(nodes, raised, monkeypatch):
    from moe_ray.orchestration.cluster import ray_session

    def listed():
        if nodes is None:
            raise RuntimeError("nobody answers")
        return nodes

    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_session.ray, "init", lambda **options: None)
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_session.ray, "nodes", listed)
    monkeypatch.setattr(ray_session, "_tune_data", lambda: None)
    match = "raylet.* ended, .*the same command goes on" if raised is OutsideFailed else "x"
    with pytest.raises(raised, match=match), ray_session.ray_session(ClusterConfig(address="10.0.0.1:6379")):
        raise KeyError("x")


@pytest.mark.slow
@pytest.mark.parametrize(("has_ended", "raised"), [(True, OutsideFailed), (False, Terminated)])
def test_a_lost_raylet_is_said_and_not_taken_for_a_request_to_end(has_ended, raised, monkeypatch):
    from moe_ray.orchestration.cluster import ray_session

    @contextmanager
    def lost(watch):
        yield
        watch.has_ended = has_ended
        raise_signal(SIGTERM)

    before = getsignal(SIGTERM)
    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_session.ray, "init", lambda **options: None)
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_session, "_tune_data", lambda: None)
    monkeypatch.setattr(ray_session, "raylet_watched", lost)
    try:
        with pytest.raises(raised), ray_session.ray_session(ClusterConfig(address="10.0.0.1:6379")):
            pass
        # The process of a notebook goes on, and can still be ended.
        assert (getsignal(SIGTERM) is not SIG_IGN) is has_ended
    finally:
        signal(SIGTERM, before)


@pytest.mark.slow
def test_nothing_is_waited_for_after_an_error_or_the_loss_of_the_last_node(monkeypatch):
    from moe_ray.orchestration.cluster import ray_session

    held = [{"CPU": 4.0}, {"CPU": 1.0}]
    monkeypatch.setattr(ray_session.ray, "available_resources", lambda: held[0] if len(held) == 2 else held[-1])
    monkeypatch.setattr(ray_session.ray, "nodes", lambda: [{"Alive": True}])
    began = time.monotonic()

    def fails():
        held.pop(0)
        raise KeyError("x")

    with pytest.raises(KeyError), resources_released("capture"):
        fails()
    held.insert(0, {"CPU": 4.0})
    monkeypatch.setattr(ray_session.ray, "nodes", lambda: [{"Alive": False}])
    with resources_released("capture"):
        held.pop(0)
    assert time.monotonic() - began < 10


def wait_until_all_cpus_are_free(ray):
    """The tasks of a test before this one may not have given theirs back."""
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.needs_ray
@pytest.mark.filterwarnings("default")
class TestWithRay:
    @pytest.fixture(autouse=True)
    def ray(self, ray_cluster):
        import ray

        return ray

    def test_an_error_of_ours_comes_as_it_was_raised_and_any_other_as_rays(self, ray):
        def fails(kind):
            raise kind("got 1, expected 2")

        task = ray.remote(max_retries=0)(fails)
        with pytest.raises(NothingSelected) as error:
            result_of(task.remote(NothingSelected))
        assert str(error.value) == "got 1, expected 2"
        assert not isinstance(error.value, ray.exceptions.RayError)
        with pytest.raises(ray.exceptions.RayTaskError, match="got 1, expected 2"):
            result_of(task.remote(KeyError))

    def test_more_cpus_than_a_local_ray_has_are_refused(self):
        require_cpus(4, "the sweep")
        with pytest.raises(InputError, match=r"the sweep needs 5 logical CPUs, got 4; raise cluster\.num_cpus"):
            require_cpus(5, "the sweep")

    def test_gpus_that_a_local_ray_has_not_are_refused_and_not_waited_for(self):
        require_gpus(0, "capture")
        with pytest.raises(InputError, match=r"capture needs 1 GPUs, got 0 on this machine; set its gpus_per_"):
            require_gpus(1, "capture")

    def test_what_an_actor_held_is_free_again_after_the_block(self, ray, caplog):
        class Idle:
            def ready(self):
                return True

        wait_until_all_cpus_are_free(ray)
        with caplog.at_level(logging.WARNING), resources_released("waiting"):
            actor = ray.remote(num_cpus=2)(Idle).remote()
            assert ray.get(actor.ready.remote())
            del actor
        assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
        assert caplog.messages == []

    def test_one_node_reaches_a_folder_of_its_own_and_no_probe_is_left(self, tmp_path):
        folder = Folder.open(str(tmp_path))
        check_reachable(folder)
        assert folder.names() == []
