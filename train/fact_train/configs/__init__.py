"""Experiments, one file each: its docstring says command, hardware, duration and result."""
