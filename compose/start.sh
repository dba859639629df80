#!/bin/sh
# Starts one role in a container. The data plane binds to the container's own address, which is known only now.
set -eu
EXPERTMESH_DATA_ADDRESS="${EXPERTMESH_DATA_ADDRESS:-$(hostname -i | cut -d ' ' -f 1)}"
export EXPERTMESH_DATA_ADDRESS
exec python -m "$1" --config /etc/expertmesh/config.json
