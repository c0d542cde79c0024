"""The DynamoDB ledger: one table."""
