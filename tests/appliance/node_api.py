"""The node's HTTP interface as seen on its own machine, with the system's Python alone.

It runs there: `python3 FILE COMMAND WORD…`. Starting mycoswarmctl for each question would be the dearest part
of most tests, above all where a processor is emulated.
"""

import http.client
import json
import socket
import sys
import time
from typing import Any


class Refused(Exception):
    """The node's answer is a no."""

    def __init__(self, status: int, text: bytes) -> None:
        super().__init__(status, text)
        self.status = status


class Connection(http.client.HTTPConnection):
    """A connection to the node's unix socket."""

    def connect(self) -> None:
        """Connect; http.client calls it."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect("/run/mycoswarm/api.sock")


def call(method: str, path: str, body: object = None) -> Any:
    """Return the node's answer; a list where it answers in lines."""
    connection = Connection("mycoswarm")
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status not in (200, 202):
            raise Refused(answer.status, text)
        is_lines = "ndjson" in answer.headers["Content-Type"]
        return [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)
    finally:
        connection.close()


def insist(method: str, path: str) -> Any:
    """Ask until the node answers."""
    while True:
        try:
            return call(method, path)
        except (OSError, http.client.HTTPException) as exc:
            why: Exception = exc
        except Refused as exc:
            if exc.status != 503:
                raise
            why = exc
        print(why, file=sys.stderr)
        time.sleep(0.1)


def get(words: "list[str]") -> None:
    """Print what is at a path."""
    print(json.dumps(insist("GET", words[0])))


def wait_tasks(words: "list[str]") -> None:
    """Wait until tasks are in one of these states, as `succeeded,failed`, then print them."""
    states, *task_ids = words
    tasks = {}
    for task_id in task_ids:
        while (task := insist("GET", f"/api/tasks/{task_id}")["task"])["state"] not in states.split(","):
            time.sleep(0.1)
        tasks[task_id] = task
    print(json.dumps(tasks))


def steps(task_ids: "list[str]") -> None:
    """Print every change of these tasks' states."""
    found = {}
    for task_id in task_ids:
        events = insist("GET", f"/api/tasks/{task_id}/events")
        found[task_id] = [event["data"] for event in events if event["kind"] == "state"]
    print(json.dumps(found))


def post(words: "list[str]") -> None:
    """Post a task and print its id."""
    prompt, agent, model = words
    body = {"prompt": prompt, "agent": agent, "model": model}
    print(json.dumps(call("POST", "/api/tasks", body)["task"]["id"]))


def pour(_: "list[str]") -> None:
    """Post tasks one after the other for ever; print the id of each that was acknowledged."""
    number = 0
    while True:
        number += 1
        body = {"prompt": f"number {number}", "agent": "scribe", "model": "agent"}
        try:
            print(call("POST", "/api/tasks", body)["task"]["id"], flush=True)
        except Refused as exc:
            print("refused", exc, file=sys.stderr, flush=True)
        except (OSError, http.client.HTTPException, ValueError):
            pass
        time.sleep(0.2)


if __name__ == "__main__":
    commands = {"get": get, "wait": wait_tasks, "steps": steps, "post": post, "pour": pour}
    commands[sys.argv[1]](sys.argv[2:])
