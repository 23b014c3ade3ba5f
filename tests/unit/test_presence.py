"""Presence, seen by the clients: whoever got the state and then every change agrees with the truth."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from realtime_server.presence import Diff, Presence, encode

State = dict[str, dict[str, list[dict[str, Any]]]]

ROOMS = ["a", "b"]
KEYS = ["alice", "bob", "__proto__", ""]
PAYLOADS: list[dict[str, Any]] = [{}, {"n": 1}, {"n": 2}, {"phx_ref": "mine", "phx_ref_prev": "mine"}, {"metas": []}]


@dataclass
class Client:
    """What Phoenix's `Presence.syncDiff` does, which realtime-js and realtime-py copy: joins by reference, then leaves."""

    room: str
    state: State
    seen_refs: set[str] = field(default_factory=set)

    def apply(self, diff: dict[str, State]) -> None:
        diff = copy.deepcopy(diff)
        assert set(diff) == {"joins", "leaves"}
        for key, joined in diff["joins"].items():
            refs = {meta["phx_ref"] for meta in joined["metas"]}
            assert not refs & self.seen_refs, "a reference is used once"
            self.seen_refs |= refs
            current = self.state.get(key, {"metas": []})["metas"]
            self.state[key] = {"metas": [meta for meta in current if meta["phx_ref"] not in refs] + joined["metas"]}
        for key, left in diff["leaves"].items():
            assert key in self.state, "only who was there leaves"
            refs = {meta["phx_ref"] for meta in left["metas"]}
            remaining = [meta for meta in self.state[key]["metas"] if meta["phx_ref"] not in refs]
            assert len(remaining) + len(refs) == len(self.state[key]["metas"])
            self.state[key] = {"metas": remaining}
            if not remaining:
                del self.state[key]

    def shown(self) -> dict[str, list[str]]:
        """What the application sees, without references and order."""
        return shown(self.state)


def shown(state: State) -> dict[str, list[str]]:
    return {key: sorted(map(without_refs, entry["metas"])) for key, entry in state.items()}


def without_refs(meta: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in meta.items() if name not in ("phx_ref", "phx_ref_prev")})


class PresenceMachine(RuleBasedStateMachine):
    """Members track, change and leave, several under one key; clients come at any time and follow."""

    members = Bundle("members")

    def __init__(self) -> None:
        super().__init__()
        self.presence = Presence()
        self.numbers = count(1)
        self.truth: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
        self.clients: list[Client] = []

    @rule(target=members, room=st.sampled_from(ROOMS), key=st.sampled_from(KEYS))
    def member_comes(self, room: str, key: str) -> tuple[str, int, str]:
        return room, next(self.numbers), key

    @rule(room=st.sampled_from(ROOMS))
    def client_comes(self, room: str) -> None:
        self.clients.append(Client(room, json.loads(self.presence.state(room))))

    @rule(member=members, payload=st.sampled_from(PAYLOADS))
    def track(self, member: tuple[str, int, str], payload: dict[str, Any]) -> None:
        room, number, key = member
        clean = {name: value for name, value in payload.items() if not name.startswith("phx_ref")}
        before = self.truth.get((room, number))
        diff = self.presence.track(room, number, key, encode(payload), f"ref-{next(self.numbers)}")
        assert (diff is None) == (before == (key, clean))
        self.truth[room, number] = (key, clean)
        self.tell(room, diff)

    @rule(member=members)
    def untrack(self, member: tuple[str, int, str]) -> None:
        room, number, _ = member
        diff = self.presence.untrack(room, number)
        assert (diff is None) == ((room, number) not in self.truth)
        self.truth.pop((room, number), None)
        self.tell(room, diff)

    @rule(member=consumes(members))
    def member_leaves_for_good(self, member: tuple[str, int, str]) -> None:
        self.untrack(member)

    def tell(self, room: str, diff: Diff | None) -> None:
        if diff is not None:
            content = json.loads(diff.to_json())
            for client in self.clients:
                if client.room == room:
                    client.apply(content)

    def expected(self, room: str) -> dict[str, list[str]]:
        entries: dict[str, list[str]] = {}
        for (where, _), (key, payload) in self.truth.items():
            if where == room:
                entries.setdefault(key, []).append(json.dumps(payload))
        return {key: sorted(metas) for key, metas in entries.items()}

    @invariant()
    def clients_agree_with_the_truth(self) -> None:
        for client in self.clients:
            assert client.shown() == self.expected(client.room)

    @invariant()
    def who_comes_now_sees_the_truth(self) -> None:
        for room in ROOMS:
            assert shown(json.loads(self.presence.state(room))) == self.expected(room)

    @invariant()
    def nothing_is_kept_of_who_left(self) -> None:
        assert len(self.presence) == len(self.truth)


PresenceMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
test_clients_agree_with_the_truth = PresenceMachine.TestCase


def test_diff_of_a_first_track_an_update_and_an_untrack() -> None:
    presence = Presence()
    first = presence.track("room", 1, "user-1", encode({"name": "Alice"}), "r1")
    update = presence.track("room", 1, "user-1", encode({"name": "Alicia"}), "r2")
    last = presence.untrack("room", 1)
    assert first is not None
    assert update is not None
    assert last is not None
    alice, alicia = {"name": "Alice", "phx_ref": "r1"}, {"name": "Alicia", "phx_ref": "r2"}
    assert json.loads(first.to_json()) == {"joins": {"user-1": {"metas": [alice]}}, "leaves": {}}
    assert json.loads(update.to_json()) == {
        "joins": {"user-1": {"metas": [{**alicia, "phx_ref_prev": "r1"}]}},
        "leaves": {"user-1": {"metas": [alice]}},
    }
    assert json.loads(last.to_json()) == {"joins": {}, "leaves": {"user-1": {"metas": [alicia]}}}


@pytest.mark.parametrize("name", ["phx_ref", "phx_ref_prev"])
def test_references_of_users_are_overwritten(name: str) -> None:
    presence = Presence()
    presence.track("room", 1, "k", encode({name: "mine", "a": 1}), "r1")
    assert json.loads(presence.state("room")) == {"k": {"metas": [{"a": 1, "phx_ref": "r1"}]}}


def test_empty_room_is_an_empty_object() -> None:
    assert Presence().state("room") == b"{}"
