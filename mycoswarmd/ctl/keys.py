"""`mycoswarmctl keys`: API keys for programs on this machine."""

from mycoswarmd.ctl.client import segment
from mycoswarmd.ctl.plain import examples, make_app, typer
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.ctl.tasks import at
from mycoswarmd.errors import MycoswarmError

keys_app = make_app("Make, list and revoke API keys.")


@keys_app.command("create", epilog=examples("export OPENAI_API_KEY=$(mycoswarmctl keys create editor)"))
@guarded
def create(
    ctx: typer.Context,
    name: str = typer.Argument(..., metavar="NAME", help="Name of the program, for the policy's origins."),
    as_json: bool = JSON,
) -> None:
    """Create a key; print its secret, this once.

    For programs on this machine that speak the OpenAI API at http://127.0.0.1:7436/v1.
    """
    session = begin(ctx, as_json=as_json)
    answer = session.local.post("/api/keys", {"name": name})
    if as_json:
        session.document(answer)
        return
    session.text(answer.get("secret", ""))
    session.aside(f"key {name!r} is made; its secret is shown this once and stored nowhere")
    if not _is_heard(session):
        session.aside(
            'nothing listens for programs yet: put listen = "127.0.0.1:7436" into '
            "/etc/mycoswarm/mycoswarm.toml, then sudo systemctl restart mycoswarmd"
        )


def _is_heard(session: Session) -> bool:
    """Tell whether the node listens for programs, as far as it says."""
    try:
        listeners = session.local.get("/api/status").get("listeners")
    except MycoswarmError:  # the key is made all the same
        return True
    return not isinstance(listeners, list) or any(str(one).startswith("http://") for one in listeners)


@keys_app.command("list")
@guarded
def show(ctx: typer.Context, as_json: bool = JSON) -> None:
    """List keys, also revoked ones."""
    session = begin(ctx, as_json=as_json)
    answer = session.local.get("/api/keys")
    if as_json:
        session.document(answer)
        return
    rows = [
        (
            row.get("name"),
            row.get("id"),
            at(row.get("created_at_ms")),
            at(row.get("last_used_at_ms")),
            at(row["revoked_at_ms"]) if row.get("revoked_at_ms") else "",
        )
        for row in answer.get("keys", [])
    ]
    session.table(("NAME", "ID", "CREATED", "LAST USED", "REVOKED"), rows, empty="no keys")


@keys_app.command("revoke")
@guarded
def revoke(
    ctx: typer.Context,
    name: str = typer.Argument(..., metavar="NAME", help="Name or id of the key."),
    as_json: bool = JSON,
) -> None:
    """Revoke a key, at once."""
    session = begin(ctx, as_json=as_json)
    answer = session.local.delete(f"/api/keys/{segment(name)}")
    if as_json:
        session.document(answer)
    else:
        session.aside(f"key {name!r} is revoked")
