"""The authors' image pipeline around the networks, in NumPy and OpenCV, one file a stage."""
