"""What became of documents and why, from the ledger: counts, figures, samples, duplicates, tokens, clusters."""
