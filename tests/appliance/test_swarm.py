"""Three installed nodes as a swarm: enrolled by multicast, asked across machines, tasks, one put out."""

import pytest

from tests.appliance.nodes import Swarm, asked, ctl, ctl_json, submit, wait_served, wait_task

pytestmark = pytest.mark.timeout(1200)


def test_three_machines_are_one_swarm_after_two_codes(swarm: Swarm) -> None:
    for machine in swarm:
        for name in ("one", "two", "three"):  # others may have joined since
            machine.wait_until(f'mycoswarmctl nodes --json | grep -q \'"name": *"{name}"\'')
        machine.wait_until("grep -qi ':1D0D 0*:0000 0A' /proc/net/tcp /proc/net/tcp6")
    for name in ("one", "two"):
        swarm.three.wait_until(f"mycoswarmctl nodes ping {name} | grep -q alive")


def test_a_prompt_is_answered_by_the_machine_that_has_the_model(swarm: Swarm) -> None:
    wait_served(swarm.one)
    before = len(asked(swarm.two))
    answer = ctl_json(swarm.one, "ask", "--model", "ok", "across the room")
    assert "Hello there" in str(answer), answer
    bodies = asked(swarm.two)[before:]
    assert [body["messages"][-1]["content"] for body in bodies] == ["across the room"]
    for machine in (swarm.one, swarm.two):
        ctl(machine, "audit", "verify")


def test_a_secret_prompt_does_not_travel(swarm: Swarm) -> None:
    before = len(asked(swarm.two))
    refused = ctl(swarm.one, "ask", "--model", "ok", "--label", "secret", "stays here", check=False)
    assert refused.code != 0, refused
    assert len(asked(swarm.two)) == before


def test_a_task_runs_in_a_cage_and_its_change_comes_back(swarm: Swarm) -> None:
    machine = swarm.two
    machine.sh("rm -rf /root/notes; mkdir -p /root/notes; echo hello > /root/notes/notes.txt")
    task = submit(machine, "sum up", "--workspace", "/root/notes")
    done = wait_task(machine, task)
    assert done["state"] == "succeeded", (done, machine.journal("-n", "60"))
    assert not machine.path("/root/notes/SUMMARY.md").exists()
    ctl(machine, "apply", task, "--workspace", "/root/notes", "--yes")
    assert machine.path("/root/notes/SUMMARY.md").read_text() == "in short\n"
    assert "mycoswarm-task@" in machine.journal("-u", "mycoswarm-task@*")


def test_a_task_on_one_machine_thinks_with_the_engine_of_another(swarm: Swarm) -> None:
    done = wait_task(swarm.one, submit(swarm.one, "finish"))
    assert done["state"] == "succeeded", (done, swarm.one.journal("-n", "60"))


def test_who_is_revoked_is_out_at_once(swarm: Swarm) -> None:
    swarm.three.wait_until("mycoswarmctl ask --model ok 'still a member'")
    before = len(asked(swarm.two))
    ctl(swarm.one, "revoke", "three", "--yes")
    swarm.two.wait_until('! mycoswarmctl nodes --json | grep -q \'"name": "three".*"member"\'')
    refused = ctl(swarm.three, "ask", "--model", "ok", "no longer", check=False)
    assert refused.code != 0, refused
    assert len(asked(swarm.two)) == before
