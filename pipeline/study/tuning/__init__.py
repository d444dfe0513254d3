"""`tune`: trials of values that Optuna suggests, in the slots there are, until the best is known and confirmed."""
