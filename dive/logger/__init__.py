"""Experiment loggers: CSV, TensorBoard, Weights & Biases, MLflow."""
