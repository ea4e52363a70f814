#!/usr/bin/env bash
# wheelhouse.sh NAME: fills build/wheelhouse/NAME with what docker/requirements-NAME.lock lists and with qdm-deploy itself.
#
#   NAME         cpu, gpu-tensorrt, gpu-tensorrt-rtx, build-cpu or build-cuda
#   PYTHON       downloads and makes the wheels (python3; it needs pip); pip's own settings choose the index
#   TORCH_INDEX  package index that has the CPU build of torch; only for build-cpu
#
# Every download is checked against the lock. What is published as source becomes a wheel here, not in the image; the hashes
# of all wheels go into build/wheelhouse/NAME/requirements.lock, which is what the image installs from.
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:?name one of: $(cd docker && ls requirements-*.lock | sed 's/requirements-\(.*\)\.lock/\1/' | xargs)}
lock=docker/requirements-$name.lock
[ -f "$lock" ] || { echo "there is no $lock; choose one of: $(cd docker && ls requirements-*.lock | xargs)" >&2; exit 2; }
python=${PYTHON:-python3}
out=build/wheelhouse/$name
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# glibc 2.36 is that of Debian 12, the oldest base.
platforms=(--platform linux_x86_64 --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
for minor in $(seq 17 36); do platforms=(--platform "manylinux_2_${minor}_x86_64" "${platforms[@]}"); done

rm -rf "$out"
mkdir -p "$out"
pip download --quiet --quiet --no-deps --require-hashes --requirement "$lock" --dest "$out" --implementation cp --python-version 3.11 \
    "${platforms[@]}" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
for source in "$out"/*.tar.gz; do
    [ -e "$source" ] || continue
    pip wheel --quiet --quiet --no-deps --wheel-dir "$out" "$source"
    rm "$source"
done
pip wheel --quiet --quiet --no-deps --wheel-dir "$out" .

"$python" - "$out" <<'PYTHON'
import hashlib, pathlib, sys

folder = pathlib.Path(sys.argv[1])
lines = []
for wheel in sorted(folder.glob("*.whl")):
    name, version = wheel.name.split("-")[:2]
    lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}")
(folder / "requirements.lock").write_text("\n".join(lines) + "\n")
PYTHON
echo "$out: $(find "$out" -name '*.whl' | wc -l) wheels, $(du -sm "$out" | cut -f1) MiB"
