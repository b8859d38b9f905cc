"""What was measured: records in JSON lines, their comparison, and a page to look at.

Standard library and NumPy; measuring itself is runtime/bench.py.
"""
