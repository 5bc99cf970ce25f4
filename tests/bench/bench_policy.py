"""How long a decision takes, with 200 rules and many different requests."""

import shutil
import statistics
import time
from pathlib import Path

from mycoswarmd.core.policy.check import check_policy
from mycoswarmd.core.policy.evaluate import evaluate
from mycoswarmd.core.types import Action, Principal, Request, Zone

RULES = 200
DECISIONS = 50_000


def policy_text() -> str:
    """Write a policy with 200 rules that differ in model, label and effect."""
    head = 'schema = 1\nname = "bench"\n'
    labels = ("public", "internal", "private", "secret")
    rules = [
        f'[[rule]]\nid = "r{i}"\nwhy = "bench"\neffect = "{"forbid" if i % 7 == 0 else "allow"}"\n'
        f'action = "infer"\nzone = ["{"self" if i % 2 else "lan"}"]\nmodel = ["m{i}-*"]\n'
        f'label = {{ max = "{labels[i % 4]}" }}\n'
        for i in range(RULES)
    ]
    return head + "\n".join(rules)


def run(directory: Path) -> None:
    """Print percentiles of one decision, in microseconds."""
    del directory
    started_s = time.perf_counter()
    checked = check_policy(policy_text().encode(), path="bench.toml", resolve_program=shutil.which)
    loaded_s = time.perf_counter() - started_s
    principal = Principal(is_owner=True, uid=0, user="root")
    requests = [
        Request(
            action=Action.INFER,
            principal=principal,
            zone=Zone.LAN if i % 2 else Zone.SELF,
            label=("public", "internal", "private", None)[i % 4],
            model=f"m{i % 300}-instruct",
        )
        for i in range(1000)
    ]
    times_us = []
    for i in range(DECISIONS):
        request = requests[i % 1000]
        started_ns = time.perf_counter_ns()
        evaluate(checked.policy, request)
        times_us.append((time.perf_counter_ns() - started_ns) / 1000)
    cuts = statistics.quantiles(times_us, n=1000)
    print(
        f"{'rules':>8} {'p50 us':>8} {'p99 us':>8} {'p99.9 us':>9} {'per second':>11} {'load+checks s':>14}"
    )
    print(
        f"{RULES:>8} {cuts[499]:>8.1f} {cuts[989]:>8.1f} {cuts[998]:>9.1f} "
        f"{1e6 / statistics.fmean(times_us):>11,.0f} {loaded_s:>14.3f}"
    )
