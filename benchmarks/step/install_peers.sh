#!/bin/sh
# The trainers that we are measured against, in a virtual environment of their own: .venv-peers beside .venv.
set -eu
cd "$(dirname "$0")/../.."
python3 -m venv .venv-peers
.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
    "torch>=2.13,<2.14" "transformers>=5.24,<6" "peft>=0.21,<0.22" "trl==1.16.0" datasets
