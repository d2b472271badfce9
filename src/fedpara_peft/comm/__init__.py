"""Communication: states by scope, payloads, the ledger."""
