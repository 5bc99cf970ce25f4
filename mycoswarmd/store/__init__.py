"""Durable state in SQLite: queue, receipts, keys, approvals, blobs. The only importer of sqlite3."""
