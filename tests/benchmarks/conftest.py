import sys
from pathlib import Path

# the scripts import each other by their bare names
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
