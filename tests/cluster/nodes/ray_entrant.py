"""Opens a Ray session as `preceptor` does, in a process of its own, says how that went, and stays until told to go.

python -m tests.cluster.nodes.ray_entrant OVERRIDE...
"""

import json
import os
import sys
import time

import ray

from cluster.contracts.errors import PreceptorError
from cluster.nodes.ray_session import ray_session
from tests.builders import make_config


@ray.remote
def answer() -> int:
    return 42


def main() -> None:
    before = dict(os.environ)
    began = time.monotonic()
    try:
        with ray_session(make_config(*sys.argv[1:])) as session:
            told = {
                "dashboard": session.dashboard_address,
                "token_file": session.token_file and str(session.token_file),
                "address": ray.get_runtime_context().gcs_address,
                "answer": ray.get(answer.remote(), timeout=60),
                "changed": sorted(name for name in before if os.environ.get(name) != before[name]),
                "token_variables": sorted(name for name in os.environ if name.startswith("RAY_AUTH")),
            }
            print(json.dumps(told), flush=True)  # noqa: T201
            sys.stdin.read()
    except PreceptorError as error:
        told = {"error": type(error).__name__, "sentence": str(error), "seconds": time.monotonic() - began}
        print(json.dumps(told), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
