"""Frames in, frames out: ONNX Runtime, NumPy and OpenCV, never torch."""
