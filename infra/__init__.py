"""Where things are and who runs them: store, records, ledger, leases, tracking, cluster. No tensors live here."""
