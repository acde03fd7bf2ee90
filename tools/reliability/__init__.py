"""What the tables of docs/reliability.md are made with: faults that are injected, and inputs that are hostile."""
