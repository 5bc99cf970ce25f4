"""The embedded engine's own process: one model, served by llama.cpp's server on a unix socket.

Started as `python3 -I -S llama_child.py ...` with the system's Python: it imports the standard
library and the unpacked xllamacpp, nothing of ours. Rule: it takes no network port, fetches nothing,
has no web page and no tools, and dies with whoever started it.
Source: llama.cpp tools/server/README.md.
"""

import argparse
import ctypes
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
# Prompts of earlier conversations kept in memory; the server's own default is 8 GiB.
PROMPT_CACHE_MIB = 256
# Above warnings llama.cpp logs what it is doing, and further up the prompt itself.
LOG_WARNINGS = 2
EXIT_NO_ENGINE = 3
EXIT_NO_MODEL = 4


def main() -> None:
    """Serve until killed."""
    options = _parse_arguments()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the node, which then stops us
    sys.path.insert(0, options.engine)
    try:
        # The path to it is an argument, so it cannot be imported at the top.
        import xllamacpp  # noqa: PLC0415
    except ImportError as exc:
        print(f"cannot load the engine from {options.engine!r}: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(EXIT_NO_ENGINE)
    params = xllamacpp.CommonParams()
    params.verbosity = LOG_WARNINGS
    params.model.path = options.model
    params.model_alias = {options.name}
    params.hostnames = [options.socket]
    params.n_ctx = options.context
    params.n_parallel = options.parallel
    params.kv_unified = True  # a single long prompt may use the context of all places
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.embedding = options.embedding
    params.offline = True
    params.ui = False
    params.endpoint_slots = False
    params.cors_origins = ""
    params.models_autoload = False
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError, OSError) as exc:
        print(f"cannot load the model {options.model!r}: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(EXIT_NO_MODEL)
    print("ready", server.listening_address, flush=True)  # noqa: T201
    threading.Event().wait()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--parallel", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--embedding", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
