"""Adapters for other libraries, one file each, imported only when used.

from radix_mlp.integrations.sentence_transformers import enable    # a loaded SentenceTransformer or CrossEncoder
from radix_mlp.integrations.decision import enable                 # transformers' pipeline("decision")
python -m radix_mlp.integrations.lm_eval --model radix-mlp ...     # lm-evaluation-harness
from radix_mlp.integrations.mteb import RadixEncoder               # mteb
from radix_mlp.integrations.ray import Embed                       # Ray Data
from radix_mlp.integrations.trl import enable                      # TRL's trainers
from radix_mlp.integrations.trainer import enable                  # transformers' Trainer
from radix_mlp.integrations.sentence_transformers_training import enable    # its trainers
"""
