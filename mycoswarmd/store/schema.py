"""The tables, as a list of migrations; `PRAGMA user_version` counts those that were applied.

Rule: a migration that was released is never edited, only followed by another.
Source: https://www.sqlite.org/pragma.html#pragma_user_version
"""

import sqlite3

from mycoswarmd.errors import StoreError

# Triggers keep one counter per state, so that "is the queue full" is one look-up, not a count. Each index
# is another page to write and sync with every task, so there are only those that a look-up of one task
# or the next task needs; lists walk the table from its newest row.
_TASKS = """
CREATE TABLE tasks (
    n INTEGER PRIMARY KEY,                -- age, whatever the clock said: rows are never deleted
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    label TEXT NOT NULL,
    tainted INTEGER NOT NULL DEFAULT 0,
    submitter TEXT NOT NULL,              -- Principal.describe()
    spec TEXT NOT NULL,                   -- JSON, without the prompt
    prompt TEXT NOT NULL,
    spec_sha256 TEXT NOT NULL,            -- what an idempotency key is compared by
    idempotency_key TEXT,
    priority INTEGER NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    attempt_base INTEGER NOT NULL DEFAULT 0,
    created_at_ms INTEGER NOT NULL,
    updated_at_ms INTEGER NOT NULL,
    not_before_ms INTEGER NOT NULL DEFAULT 0,
    deadline_at_ms INTEGER,
    code TEXT NOT NULL DEFAULT '',
    message TEXT NOT NULL DEFAULT '',
    summary TEXT NOT NULL DEFAULT '',
    changes TEXT,
    steps INTEGER NOT NULL DEFAULT 0,
    tokens INTEGER NOT NULL DEFAULT 0,
    events INTEGER NOT NULL DEFAULT 0     -- seq of its last event
) STRICT;
CREATE UNIQUE INDEX tasks_idempotency ON tasks (submitter, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX tasks_queue ON tasks (priority, n) WHERE state = 'queued';
CREATE INDEX tasks_running ON tasks (n) WHERE state = 'running';
CREATE INDEX tasks_deadline ON tasks (deadline_at_ms)
    WHERE deadline_at_ms IS NOT NULL AND state IN ('queued', 'running', 'waiting');

CREATE TABLE task_counts (state TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT;
CREATE TRIGGER tasks_counted_insert AFTER INSERT ON tasks BEGIN
    INSERT INTO task_counts VALUES (NEW.state, 1) ON CONFLICT (state) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER tasks_counted_update AFTER UPDATE OF state ON tasks WHEN OLD.state <> NEW.state BEGIN
    UPDATE task_counts SET n = n - 1 WHERE state = OLD.state;
    INSERT INTO task_counts VALUES (NEW.state, 1) ON CONFLICT (state) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER tasks_kept BEFORE DELETE ON tasks BEGIN SELECT RAISE(ABORT, 'tasks are kept'); END;

CREATE TABLE events (
    task_id TEXT NOT NULL REFERENCES tasks (id),
    seq INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (task_id, seq)
) STRICT, WITHOUT ROWID;
"""

_RECEIPTS = """
CREATE TABLE receipts (
    seq INTEGER PRIMARY KEY,
    at_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    body BLOB NOT NULL,
    prev_sha256 TEXT NOT NULL,
    sha256 TEXT NOT NULL
) STRICT;
CREATE TRIGGER receipts_no_update BEFORE UPDATE ON receipts BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER receipts_no_delete BEFORE DELETE ON receipts BEGIN SELECT RAISE(ABORT, 'append only'); END;
"""

_SMALL = """
CREATE TABLE approvals (
    n INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    task_id TEXT REFERENCES tasks (id),
    what TEXT NOT NULL,
    facts TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'approved', 'denied', 'expired')),
    asked_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL,
    decided_by TEXT NOT NULL DEFAULT '',
    decided_at_ms INTEGER
) STRICT;
-- One answer per task and question. An expired one was nobody's answer: it may be asked again.
CREATE UNIQUE INDEX approvals_once ON approvals (task_id, what)
    WHERE task_id IS NOT NULL AND state <> 'expired';
CREATE INDEX approvals_pending ON approvals (n) WHERE state = 'pending';

CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    secret_sha256 TEXT NOT NULL UNIQUE,
    created_at_ms INTEGER NOT NULL,
    last_used_at_ms INTEGER,
    revoked_at_ms INTEGER
) STRICT;
CREATE UNIQUE INDEX keys_live ON keys (name) WHERE revoked_at_ms IS NULL;

CREATE TABLE usage (
    counter TEXT NOT NULL,
    time_window INTEGER NOT NULL,
    total INTEGER NOT NULL,
    PRIMARY KEY (counter, time_window)
) STRICT, WITHOUT ROWID;
"""

_SWARM = """
CREATE TABLE roster (
    seq INTEGER PRIMARY KEY,              -- the genesis has the lowest
    sha256 TEXT NOT NULL UNIQUE,
    statement TEXT NOT NULL               -- JSON, as it goes to other nodes
) STRICT;

CREATE TABLE beacons (
    signer TEXT PRIMARY KEY,
    n INTEGER NOT NULL,
    beacon TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE invites (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    invite TEXT NOT NULL UNIQUE,
    boot_id TEXT NOT NULL,
    keys BLOB NOT NULL,                   -- zeroed when it is not open any more
    role TEXT NOT NULL,
    name TEXT NOT NULL,
    needs_confirm INTEGER NOT NULL,
    expires_at_boot_ms INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'used', 'burnt', 'expired', 'cancelled'))
) STRICT;

CREATE TABLE peers (
    node_id TEXT PRIMARY KEY,
    addresses TEXT NOT NULL,              -- JSON, [[host, port], ...], the newest first
    boot INTEGER NOT NULL,
    instance TEXT NOT NULL,
    last_seen_at_ms INTEGER NOT NULL,
    alarm TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- How often the daemon was started, in one row. It outlives the membership: it must never be lower again.
CREATE TABLE starts (one INTEGER PRIMARY KEY CHECK (one = 1), n INTEGER NOT NULL) STRICT;
"""

MIGRATIONS: tuple[str, ...] = (_TASKS + _RECEIPTS + _SMALL, _SWARM)
VERSION = len(MIGRATIONS)


def check_version(connection: sqlite3.Connection, path: str) -> int:
    """Return the database's version, or refuse one that a newer program wrote."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise StoreError(
            "store-newer",
            f"cannot use the database {path!r}: it has schema {version}, this program knows {VERSION}",
            hint="run the newer mycoswarmd that wrote it, or start with another state directory",
        )
    return version


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Apply what is missing, each migration in one transaction with its number."""
    for version in range(check_version(connection, path), VERSION):
        # executescript commits before it starts, so the transaction is part of the script.
        connection.executescript(
            f"BEGIN IMMEDIATE; {MIGRATIONS[version]} PRAGMA user_version = {version + 1}; COMMIT;"
        )
