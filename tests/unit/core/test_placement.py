from mycoswarmd.core.placement import Candidate, order, why_not
from mycoswarmd.core.types import Zone


def at(node: str, zone: Zone = Zone.LAN, **more: object) -> Candidate:
    return Candidate(engine=f"peer:{node}", model="m", zone=zone, node=node, **more)  # type: ignore[arg-type]


def names(candidates: list[Candidate], *prefer: str) -> list[str | None]:
    return [one.node for one in order(candidates, prefer=prefer)]


def test_near_before_far_then_what_is_loaded_then_what_is_idle() -> None:
    here = at("here", Zone.SELF, running=9)
    loaded, busy, idle = at("loaded", loaded=True, running=5), at("busy", running=3), at("idle")
    away = Candidate(engine=None, model="m", zone=Zone.CLOUD, dest="big")
    assert names([away, busy, idle, loaded, here]) == ["here", "loaded", "idle", "busy", None]


def test_the_owners_order_comes_first() -> None:
    here, pi = at("here", Zone.SELF), at("pi")
    big = Candidate(engine=None, model="m", zone=Zone.CLOUD, dest="big")
    assert names([here, pi, big], "lan", "self", "big") == ["pi", "here", None]
    assert names([here, pi, big], "big", "lan", "self") == [None, "pi", "here"]


def test_equal_nodes_keep_their_order() -> None:
    assert names([at("a"), at("b"), at("c")]) == ["a", "b", "c"]


def test_every_loser_has_its_reason() -> None:
    here = at("here", Zone.SELF)
    assert why_not(at("pi"), here, prefer=()) == "lan comes after self"
    loaded = at("pi", loaded=True)
    assert why_not(at("pc"), loaded, prefer=()) == "the model is not in memory there"
    busy = at("pc", running=3)
    assert why_not(busy, at("pi", running=1), prefer=()) == (
        "3 prompts are running there, 1 on the chosen one"
    )
    assert why_not(at("b"), at("a"), prefer=()) == "equal; the order of names decides"
    other = at("here", Zone.SELF)
    assert why_not(other, here, prefer=()) == "equal; the order of the settings decides"
