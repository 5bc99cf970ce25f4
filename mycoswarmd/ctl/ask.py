"""`mycoswarmctl ask`: one prompt, its answer as it comes."""

import json
import sys
from collections.abc import Iterator, Mapping

from mycoswarmd.ctl.place import engine_command
from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.refusals import Doc, to_error
from mycoswarmd.ctl.screen import clean, line
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.ctl.transcript import asked
from mycoswarmd.errors import BadRequest, EngineError, MycoswarmError, NotFound

# What the daemon takes (its PROMPT_BODY_BYTES), less room for the rest of the request.
MAX_PROMPT_BYTES = 7 << 20
# Of the swarm's models, where one has to be chosen.
_NAMED = 4


@guarded
def ask(
    ctx: typer.Context,
    prompt: str = typer.Argument(..., metavar="PROMPT", help="The question; - reads it from stdin."),
    model: str = typer.Option(
        None, "--model", "-m", metavar="NAME", help="Model to ask. Default: the first one on this node."
    ),
    label: str = typer.Option(
        None, "--label", "-l", metavar="LABEL", help="How sensitive the prompt is. Default: the policy's."
    ),
    system: str = typer.Option(None, "--system", metavar="TEXT", help="Instructions before the prompt."),
    max_tokens: int = typer.Option(
        None, "--max-tokens", min=1, metavar="N", help="Stop the answer after N tokens."
    ),
    temperature: float = typer.Option(
        None,
        "--temperature",
        min=0,
        max=2,
        metavar="T",
        help="How freely words are chosen; 0: always the likeliest. Default: the engine's.",
    ),
    no_stream: bool = typer.Option(False, "--no-stream", help="Print the answer when it is complete."),
    verbose: bool = typer.Option(
        False, "--verbose", "-v", help="Say on stderr which node, model, zone and rule answered."
    ),
    as_json: bool = JSON,
) -> None:
    """Ask a model one question.

    The answer is printed as it comes.
    """
    session = begin(ctx, as_json=as_json)
    text = read_prompt(prompt)
    name = model or first_model(session)
    messages = [{"role": "system", "content": system}] if system else []
    body: Doc = {"model": name, "messages": [*messages, {"role": "user", "content": text}]}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if temperature is not None:
        body["temperature"] = temperature
    if not (no_stream or as_json):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"X-Mycoswarm-Label": header_value(label)} if label else {}
    answers = session.client.events(
        "/v1/chat/completions", body, headers, on_wait=lambda: show_waiting(session)
    )
    if as_json:
        said, data = next(answers)
        session.document({**_parse(data), "mycoswarm": places(said)})
    else:
        show(session, answers, verbose=verbose)


ASK_EXAMPLES = examples(
    'mycoswarmctl ask "why is the sky blue?"',
    'git diff | mycoswarmctl ask --system "Write a commit message." -',
    'mycoswarmctl ask --label secret --model smollm2 "…" --json | jq -r .choices[0].message.content',
)


def read_prompt(given: str) -> str:
    """Return the prompt, from stdin for "-"; BadRequest when it is empty, too large or not text."""
    if given != "-":
        text = given
    else:
        untrusted = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        if len(untrusted) > MAX_PROMPT_BYTES:
            hint = f"at most {MAX_PROMPT_BYTES >> 20} MiB"
            raise BadRequest("prompt-too-large", "cannot take this prompt from stdin: too large", hint=hint)
        try:
            text = untrusted.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise BadRequest(
                "bad-prompt", f"cannot read the prompt from stdin: no UTF-8 at byte {exc.start}"
            ) from exc
    if not text.strip():
        raise BadRequest("empty-prompt", "cannot send an empty prompt", hint="give it, or - for stdin")
    return text


def header_value(label: str) -> str:
    """Return a label that may stand in a header; BadRequest otherwise."""
    if not label.isascii() or not label.isprintable():
        raise BadRequest("bad-label", f"cannot use label {label!r}: not a word of plain ASCII")
    return label


def first_model(session: Session) -> str:
    """Choose when nobody did: a chat model of this node, in the order of the list; say so on stderr."""
    listed = session.client.get("/api/models").get("models", [])
    chat = [row for row in listed if "chat" in row.get("kinds", ["chat"])]
    here = [row for row in chat if row.get("zone") == "self"]
    afar = sorted({str(row["name"]) for row in chat if row.get("zone") == "lan"})
    if not here and afar:
        more = f", and {len(afar) - _NAMED} more: mycoswarmctl models" if len(afar) > _NAMED else ""
        raise NotFound(
            "no-model",
            "cannot choose a model: this node serves none",
            hint=f"say which one of the swarm's: --model {' or '.join(map(line, afar[:_NAMED]))}{more}",
        )
    if not here:
        raise NotFound(
            "no-model",
            "cannot choose a model: this node serves none",
            hint=f"`{engine_command()}` brings a small one; `mycoswarmctl models` lists all",
        )
    chosen = str(min(here, key=lambda row: not row.get("loaded"))["name"])
    session.aside(f"using model {chosen} on this node")
    return chosen


def show_waiting(session: Session) -> None:
    """Say which prompts wait for a person, if any does; a slow model needs no words."""
    try:
        rows = session.client.get("/api/approvals").get("approvals", [])
    except MycoswarmError:
        return  # not ours to see; the prompt itself goes on
    for row in rows:
        if row.get("task_id") is None:
            session.aside(f"waits for approval: {asked(row.get('facts'))}")
            session.aside(f"  answer it with: mycoswarmctl approve {row.get('id')}   or the same with --deny")


def show(session: Session, answers: Iterator[tuple[Mapping[str, str], bytes]], *, verbose: bool) -> None:
    """Print an answer as it comes; thoughts of reasoning models go to stderr when verbose."""
    printer = _Printer(session, verbose=verbose)
    try:
        for said, data in answers:
            if data == b"[DONE]":
                break
            printer.take(said, _parse(data))
    finally:
        printer.end_line()
    if not printer.finish:
        raise _no_answer()
    if printer.finish == "length":
        session.aside("(cut: the answer reached the limit of tokens)")


class _Printer:
    def __init__(self, session: Session, *, verbose: bool) -> None:
        self.finish = ""
        self._session = session
        self._verbose = verbose
        self._says_where = verbose
        self._ends_line = True

    def take(self, said: Mapping[str, str], document: Doc) -> None:
        """Print what one event or one whole answer adds."""
        if self._says_where:
            self._says_where = False
            facts = [f"{key}={line(value)}" for key, value in places(said).items() if value]
            self._session.aside("  ".join(facts))
        if "error" in document:
            raise _broken(document["error"])
        for choice in document.get("choices") or []:
            part = choice.get("delta") or choice.get("message") or {}
            self.finish = choice.get("finish_reason") or self.finish
            if text := part.get("content"):
                print(clean(text), end="", flush=True)
                self._ends_line = text.endswith("\n")
            if self._verbose and part.get("reasoning_content"):
                print(clean(part["reasoning_content"]), end="", file=sys.stderr, flush=True)

    def end_line(self) -> None:
        """End the last line of what was printed, also before an error."""
        if not self._ends_line:
            print(flush=True)


def places(headers: Mapping[str, str]) -> Doc:
    """Return what the headers say about who answered and by which rule."""
    lower = {key.lower(): value for key, value in headers.items()}
    names = ("node", "model", "zone", "rule", "receipt")
    return {name: lower.get(f"x-mycoswarm-{name}", "") for name in names}


def _parse(data: bytes) -> Doc:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise _no_answer() from exc
    return document if isinstance(document, dict) else {}


def _broken(error: object) -> MycoswarmError:
    if not isinstance(error, dict):
        return _no_answer()
    return to_error(403 if error.get("rule") else 502, error)


def _no_answer() -> EngineError:
    return EngineError("answer-cut", "cannot show the whole answer: it broke off", hint="ask again")
