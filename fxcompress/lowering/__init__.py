"""From qdq values to integer operators: the values, the builder, the state. The rules are in ``passes/_lower_*.py``."""
