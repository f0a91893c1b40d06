"""The parts of `examples/train_small.py`: texts, questions about them, the teacher, the evaluation."""
