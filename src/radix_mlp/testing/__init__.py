"""What tests of code that uses radix-mlp need."""
