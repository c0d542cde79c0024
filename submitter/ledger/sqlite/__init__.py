"""The SQLite ledger: one file, no server."""
