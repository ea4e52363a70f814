#!/usr/bin/env bash
# lock.sh [UV OPTIONS]: writes docker/requirements-*.lock anew: the extras of each image, at the versions of constraints.txt, with
# the hashes of every file that the index has of them.
#
# build-cpu needs the CPU build of torch: name a place that has it, as --index URL or --find-links FOLDER.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
tool=build/uv
"$python" -m pip --disable-pip-version-check install --quiet --upgrade --target "$tool" 'uv==0.13.9'

lock() { # NAME EXTRA,... [REQUIREMENT [UV OPTIONS]]
    local extras=() extra requirement=${3:-}
    for extra in ${2//,/ }; do extras+=(--extra "$extra"); done
    echo "$requirement" > build/lock-overrides.txt
    # Without torch's own line the pin would exclude a build with a local version.
    grep -v "^${requirement%%==*}==" constraints.txt > build/lock-constraints.txt
    { echo "# Made by 'make image-lock': do not edit. Extras: $2."
      "$tool/bin/uv" pip compile --quiet pyproject.toml "${extras[@]}" --constraint build/lock-constraints.txt \
          --override build/lock-overrides.txt --generate-hashes --no-header --no-annotate \
          --python-version 3.11 --python-platform x86_64-manylinux_2_28 "${@:4}"
    } > build/lock.txt
    mv build/lock.txt "docker/requirements-$1.lock"
    echo "docker/requirements-$1.lock: $(grep -c == "docker/requirements-$1.lock") packages"
}

lock cpu openvino,serve
lock gpu-tensorrt serve,tensorrt
lock gpu-tensorrt-rtx serve,tensorrt-rtx
lock build-cuda build,openvino
lock build-cpu build,openvino "$(grep "^torch==" constraints.txt)+cpu" "$@"
