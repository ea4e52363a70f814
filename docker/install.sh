#!/bin/sh
# install.sh WHEELHOUSE: inside the image, makes /opt/qdm from a folder that docker/wheelhouse.sh made, and from nothing else.
set -eu

python3 -m venv /opt/qdm
/opt/qdm/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-index --find-links "$1" --only-binary :all: \
    --require-hashes --requirement "$1/requirements.lock"
/opt/qdm/bin/python -m pip check
# Nothing is installed later on, so nothing that could install is left.
/opt/qdm/bin/python -m pip uninstall --yes --quiet --root-user-action ignore setuptools pip
