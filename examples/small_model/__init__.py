"""What `examples/train_small.py` is made of: the texts, the questions asked of them, the teacher, the evaluation."""
