"""What is decided before anything runs: findings, rules and records, as pure functions of values."""
