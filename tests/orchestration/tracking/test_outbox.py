"""Nothing that is meant for the tracking server is lost, sent twice or out of order, whatever the server does."""

from __future__ import annotations

import pytest

from moe_ray.orchestration.tracking import outbox
from moe_ray.orchestration.tracking.outbox import SPOOL, Outbox, Refused, Unreachable
from moe_ray.storage.folder import Folder


class FakeServer:
    def __init__(self) -> None:
        self.is_up, self.got, self.attempts = True, [], 0

    def take(self, item):
        self.attempts += 1
        if not self.is_up:
            raise Unreachable("down")
        if item["kind"] == "bad":
            raise Refused("never")
        self.got.append(item["n"])


@pytest.fixture
def folder(tmp_path):
    return Folder.open(str(tmp_path))


def test_what_is_sent_while_the_server_is_away_comes_in_order_when_it_is_back(folder, monkeypatch):
    monkeypatch.setattr(outbox, "_FIRST_PAUSE", 0.0)
    server = FakeServer()
    box = Outbox(folder, "here", server.take)
    for n in range(6):
        server.is_up = n not in (2, 3)
        box.send({"kind": "metrics", "run": "r", "n": n})
        assert folder.exists(SPOOL) == (n in (2, 3))
    assert server.got == list(range(6))
    assert len(box) == 0


def test_a_dead_server_is_asked_once_and_then_left_alone_for_a_while(folder):
    server = FakeServer()
    box = Outbox(folder, "here", server.take)
    server.is_up = False
    for n in range(50):
        box.send({"kind": "metrics", "run": "r", "n": n})
    assert server.attempts == 1
    assert len(box) == 50
    server.is_up = True
    assert box.flush()
    assert server.got == list(range(50))


def test_the_next_process_sends_what_this_one_could_not(folder):
    server = FakeServer()
    server.is_up = False
    Outbox(folder, "here", server.take).send({"kind": "metrics", "run": "r", "n": 0})
    server.is_up = True
    later = Outbox(folder, "here", server.take)
    later.send({"kind": "metrics", "run": "r", "n": 1})
    assert server.got == [0, 1]
    assert not folder.exists(SPOOL)


def test_items_for_another_server_stay_where_they_are(folder):
    server = FakeServer()
    server.is_up = False
    Outbox(folder, "there", server.take).send({"kind": "metrics", "run": "r", "n": 0})
    server.is_up = True
    here = Outbox(folder, "here", server.take)
    here.send({"kind": "metrics", "run": "r", "n": 1})
    assert (server.got, here.num_foreign) == ([1], 1)
    assert Outbox(folder, "there", server.take).flush()
    assert server.got == [1, 0]


def test_what_the_server_refuses_is_named_and_holds_up_nothing(folder, caplog):
    server = FakeServer()
    box = Outbox(folder, "here", server.take)
    box.send({"kind": "bad", "run": "r", "n": 0})
    box.send({"kind": "metrics", "run": "r", "n": 1})
    assert server.got == [1]
    assert box.refused == ["bad: never"]
    assert "MLflow refused bad" in caplog.text


def test_items_follow_a_run_that_gets_its_name_late(folder):
    server = FakeServer()
    server.is_up = False
    box = Outbox(folder, "here", server.take)
    box.send({"kind": "create", "run": "pending-1", "parent": "p", "n": 0})
    box.send({"kind": "create", "run": "pending-2", "parent": "pending-1", "n": 1})
    box.rename("pending-1", "real")
    assert [(item["run"], item["parent"]) for item in box._waiting] == [("real", "p"), ("pending-2", "real")]
