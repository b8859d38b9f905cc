"""Measures of a reenacted face against what it should be; NumPy and OpenCV only."""
