#!/usr/bin/env bash
# test_image.sh [BUNDLE]: builds the cpu image without a daemon (buildah), looks at its configuration, and runs it as a container
# engine would with --read-only, --cap-drop ALL, no-new-privileges and a user id that no passwd entry names.
#
#   BUNDLE      a class-conditional or unconditional bundle; without one, a quick one of the embedded model is built
#   BASE_IMAGE  an image that buildah can pull, its registry included; without it, Debian 12 is bootstrapped (mmdebstrap)
#   BUNDLER     the qdm-deploy that builds the quick bundle (.venv/bin/qdm-deploy); PYTHON makes the wheels (.venv/bin/python)
#   IMAGE_TEST  folder for the image store and the base (build/image-test); the base is kept, the store is not
#
# Where it cannot run it says so and ends with 0.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "image test skipped: $*"; exit 0; }
fail() { echo "image test FAILED: $*" >&2; exit 1; }
say() { echo "== $* (${SECONDS} s)"; }

command -v buildah > /dev/null || skip "there is no buildah here (Debian: apt-get install buildah mmdebstrap)"
[ "$(id -u)" = 0 ] || skip "it needs root, to mount the image's files read-only"
unshare --mount --pid --net --fork true 2> /dev/null || skip "this machine does not let root make namespaces"
[ -n "${BASE_IMAGE:-}" ] || command -v mmdebstrap > /dev/null || skip "there is no mmdebstrap here, and BASE_IMAGE is not set"

PYTHON=${PYTHON:-.venv/bin/python}
BUNDLER=${BUNDLER:-.venv/bin/qdm-deploy}
folder=${IMAGE_TEST:-build/image-test}
mkdir -p "$folder/context"
folder=$(realpath "$folder")
work=$(mktemp -d "$folder/run.XXXXXX")
store=(--root "$folder/store" --runroot "$folder/runroot" --storage-driver vfs --registries-conf "$work/registries.conf")
clean_up() {
    jobs -p | xargs --no-run-if-empty kill 2> /dev/null || true
    buildah "${store[@]}" rm --all > /dev/null 2>&1 || true
    buildah "${store[@]}" rmi --all --force > /dev/null 2>&1 || true
    rm -rf "$folder/store" "$folder/runroot" "$work"
}
trap clean_up EXIT

# ------------------------------------------------------------------------------------------------- bundle, base, image

bundle=${1:-}
if [ -z "$bundle" ]; then
    say "a quick bundle, beside what follows"
    bundle=$work/model.qdm
    printf 'base = "fast"\n[calibration]\nsamples = 1\nsteps = 2\n' > "$work/recipe.toml"
    "$BUNDLER" -q build --int8 --recipe "$work/recipe.toml" --out "$bundle" --verify-samples 1 --verify-steps 2 \
        --engines none --targets openvino,onnxruntime --min-psnr 0 --min-speedup 0 \
        > "$work/bundle.log" 2>&1 &
    building=$!
fi

if [ -z "${BASE_IMAGE:-}" ]; then
    if [ ! -e "$folder/context/base.tar" ]; then
        say "Debian 12"
        mmdebstrap --quiet --mode=root --variant=minbase --include=ca-certificates,python3,python3-venv,tini bookworm "$work/base.tar"
        mv "$work/base.tar" "$folder/context/base.tar"
    fi
    printf 'FROM scratch\nADD base.tar /\n' > "$work/Dockerfile.base"
fi
say "wheelhouse"
PYTHON=$PYTHON docker/wheelhouse.sh cpu

echo '{"default": [{"type": "insecureAcceptAnything"}]}' > "$work/policy.json"
: > "$work/registries.conf"
# The image format of Docker: OCI's has no HEALTHCHECK.
build=(buildah "${store[@]}" bud --quiet --isolation chroot --format docker --signature-policy "$work/policy.json")
if [ -z "${BASE_IMAGE:-}" ]; then
    BASE_IMAGE=localhost/base:bookworm
    "${build[@]}" --file "$work/Dockerfile.base" --tag "$BASE_IMAGE" "$folder/context" > /dev/null
fi
say "image"
"${build[@]}" --file docker/Dockerfile --target cpu --tag localhost/qdm-deploy:cpu --build-arg "BASE_IMAGE=$BASE_IMAGE" \
    --build-arg VERSION=test . > "$work/build.log" 2>&1 || { tail -50 "$work/build.log" >&2; fail "it does not build"; }

# ------------------------------------------------------------------------------------------------------- configuration

say "configuration"
buildah "${store[@]}" inspect --type image localhost/qdm-deploy:cpu > "$work/inspect.json"
python3 - "$work" <<'PYTHON'
import json, pathlib, sys

work = pathlib.Path(sys.argv[1])
config = json.loads((work / "inspect.json").read_text())["Docker"]["config"]
expected = {
    "User": "10001:10001",
    "Entrypoint": ["tini", "--", "qdm-deploy"],
    "WorkingDir": "/data",
    "StopSignal": "SIGTERM",
    "ExposedPorts": {"8000/tcp": {}},
}
wrong = {key: config.get(key) for key, value in expected.items() if config.get(key) != value}
if wrong:
    sys.exit(f"image test FAILED: the configuration has {wrong}, not {expected}")
if config["Healthcheck"]["Test"] != ["CMD", "qdm-deploy", "healthcheck"]:
    sys.exit(f"image test FAILED: the health check is {config['Healthcheck']}")
if config["Cmd"][0] != "serve" or "--api-key-file" not in config["Cmd"]:
    sys.exit(f"image test FAILED: the command {config['Cmd']} does not serve, or not behind a key")
if config["Labels"].get("org.opencontainers.image.version") != "test":
    sys.exit(f"image test FAILED: the labels are {config['Labels']}")
(work / "environment").write_text("\n".join(config["Env"]))
(work / "command").write_text("\n".join(config["Entrypoint"] + config["Cmd"]))
PYTHON

# --------------------------------------------------------------------------------------------------------------- running

if [ -n "${building:-}" ]; then
    say "waiting for the bundle"
    wait "$building" || { tail -20 "$work/bundle.log" >&2; fail "the quick bundle could not be built"; }
fi

container=$(buildah "${store[@]}" from --pull-never localhost/qdm-deploy:cpu)
root=$(buildah "${store[@]}" mount "$container")
mkdir -p "$work/models" "$work/data" "$work/secrets"
cp -r "$bundle" "$work/models/model.qdm"
chmod -R a+rX "$work/models"
chmod 1777 "$work/data"
python3 -c "import secrets; print(secrets.token_hex())" > "$work/secrets/qdm_api_key"
user=$((20000 + RANDOM))

say "as user $user"
# No quotes inside: the folders are ours and have no blanks.
export IMAGE_WORK=$work IMAGE_SMOKE=$PWD/docker/smoke_test.py
IMAGE_ENV=$(cat "$work/environment") docker/in_image.sh "$root" "$user" docker/test_inside.sh \
    "$work/models=/models:ro" "$work/data=/data" "$work/secrets=/run/secrets:ro" || fail "see above"

say "size"
echo "image: $(du -sm "$root" | cut -f1) MiB, of which /opt/qdm $(du -sm "$root/opt/qdm" | cut -f1) MiB"
say "image test passed"
