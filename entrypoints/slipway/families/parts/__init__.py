"""What the families are made of: checks, rules, decoders in common, quantised forms."""
