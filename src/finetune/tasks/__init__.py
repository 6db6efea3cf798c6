"""Tasks: what is optimised and measured. Lightning lives on this floor."""
