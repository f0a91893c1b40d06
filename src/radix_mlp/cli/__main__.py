"""`python -m radix_mlp.cli`."""

from radix_mlp.cli.main import app

app(prog_name="radix-mlp")
