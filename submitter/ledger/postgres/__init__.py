"""The PostgreSQL ledger (extra `postgres`)."""
