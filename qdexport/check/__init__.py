"""Quality, compiler parity, noise floor and the plan audit."""
