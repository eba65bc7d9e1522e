"""The hardware side of retraining: Lightning strategies and trainers."""
