"""How limits are divided among the nodes of a queue, also while nodes come and go."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from relay.queue.division import Division, Member, part, share

NAMES = ("dest.example", "[192.0.2.1]:25", "m365.example:587 as relay")


@given(st.integers(0, 50), st.integers(1, 16))
def test_shares_add_up_to_the_limit_and_differ_by_one_at_most(limit, count):
    shares = [share(limit, index, count) for index in range(count)]
    assert sum(shares) == limit
    assert max(shares) - min(shares) <= 1


@given(st.integers(0, 200), st.text(max_size=30), st.integers(1, 40))
def test_parts_of_all_nodes_add_up_to_the_limit_at_any_destination(limit, name, count):
    parts = [part(limit, name, index, count) for index in range(count)]
    assert sum(parts) == limit
    assert max(parts) - min(parts) <= 1


def test_nodes_without_a_part_differ_from_domain_to_domain():
    have_it = {
        index
        for number in range(50)
        for index in range(3)
        if part(1, f"d{number}.example", index, 3)
    }
    assert have_it == {0, 1, 2}


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 12))
def test_node_with_a_part_of_the_lesser_limit_has_one_of_the_greater_at_that_destination(
    one, other, count
):
    less, more = sorted((one, other))
    for index in range(count):
        assert part(less, "m365", index, count) <= part(more, "m365", index, count)


@dataclass
class Server:
    """The leases, as the database has them: each with its node and what that says to have seen."""

    leases: dict[int, tuple[int, frozenset[int]]] = field(default_factory=dict)
    last: int = 0

    def register(self, node: int) -> int:
        for lease in [one for one, (of, _) in self.leases.items() if of == node]:
            del self.leases[lease]
        self.last += 1
        self.leases[self.last] = node, frozenset()
        return self.last

    def members(self) -> list[Member]:
        return [Member(lease, node, seen) for lease, (node, seen) in self.leases.items()]

    def tell(self, lease: int, division: Division) -> None:
        view = division.untold
        if view is not None and lease in self.leases:
            self.leases[lease] = self.leases[lease][0], frozenset(view)


@dataclass
class Node:
    number: int
    lease: int = 0
    division: Division = field(default_factory=Division)
    sees: list[Member] | None = None
    """What it has read and not acted on yet."""

    def used(self, limit: int, name: str) -> int:
        return self.division.part(limit, name) if self.lease else 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "lose", "read", "act", "act", "tell", "tell"]), st.integers(0, 2)
    ),
    min_size=40,
    max_size=80,
)


@settings(max_examples=200)
@given(STEPS, st.integers(1, 7))
def test_nodes_never_use_more_than_a_limit_together_whatever_comes_between(steps, limit):
    server, nodes = Server(), [Node(number) for number in range(3)]
    for what, number in steps:
        node = nodes[number]
        if what == "join":
            node.lease, node.division = server.register(number), Division()
            node.sees = None
        elif what == "lose":  # its claims and connections are over when another marks it lost
            server.leases.pop(node.lease, None)
            node.lease = 0
        elif node.lease and what == "read":
            node.sees = server.members()
        elif node.lease and what == "act":  # on what it read now, or a while ago
            node.division.look(node.sees or server.members(), node.lease)
            node.sees = None
        elif node.lease and what == "tell":
            server.tell(node.lease, node.division)
        for name in NAMES:
            assert sum(one.used(limit, name) for one in nodes) <= limit
    settle(server, [node for node in nodes if node.lease])
    for name in NAMES:
        if server.leases:
            assert sum(one.used(limit, name) for one in nodes) == limit


def settle(server: Server, nodes: list[Node]) -> None:
    """Nobody comes or goes for two looks."""
    for _ in range(2):
        for node in nodes:
            node.division.look(server.members(), node.lease)
            server.tell(node.lease, node.division)
    for node in nodes:
        node.division.look(server.members(), node.lease)
        assert node.division.is_agreed


def test_node_that_joins_has_no_part_before_all_others_have_seen_it():
    server = Server()
    first, second = Node(1, server.register(1)), Node(2)
    settle(server, [first])
    assert first.used(4, "dest.example") == 4
    second.lease = server.register(2)
    second.division.look(server.members(), second.lease)
    server.tell(second.lease, second.division)
    second.division.look(server.members(), second.lease)
    assert second.used(4, "dest.example") == 0
    first.division.look(server.members(), first.lease)
    assert first.used(4, "dest.example") == 2
    second.division.look(server.members(), second.lease)
    assert second.used(4, "dest.example") == 0, "the first one has not said so yet"
    server.tell(first.lease, first.division)
    second.division.look(server.members(), second.lease)
    assert second.used(4, "dest.example") == 2


def test_node_whose_lease_is_lost_has_no_part():
    server = Server()
    node = Node(1, server.register(1))
    settle(server, [node])
    node.division.forget()
    assert node.used(4, "dest.example") == 0
    assert node.division.untold is None
