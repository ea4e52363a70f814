# Sourced by in_image.sh: what the image has to do. `inside` runs a command in it, `enter` becomes one.

fail() { echo "image test FAILED: $*" >&2; exit 1; }

inside sh -c '! touch /opt/qdm/x /etc/x 2> /dev/null' || fail "the root file system can be written"
inside python -c '
import importlib.util as find
found = [name for name in ("torch", "onnx", "diffusers", "pip", "setuptools") if find.find_spec(name)]
raise SystemExit(f"the image holds {found}" if found else 0)' || fail "see above"

inside qdm-deploy doctor --json > "$IMAGE_WORK/doctor.json" || fail "doctor finds: $(cat "$IMAGE_WORK/doctor.json")"
inside qdm-deploy verify /models/model.qdm --quiet > /dev/null || fail "verify"
for backend in onnxruntime openvino; do
    inside qdm-deploy generate /models/model.qdm -n 2 --steps 2 --seed 0 --backend "$backend" --out "images-$backend" --quiet > /dev/null ||
        fail "generate on $backend"
    inside test -s "images-$backend/00001.png" || fail "generate on $backend left no picture"
done
# The cache keeps which backend was the fastest and what OpenVINO compiled; nothing else may stay.
left() { inside find /tmp -type f -not -path '/tmp/qdm/choices/*.json' -not -path '/tmp/qdm/openvino/*.compiled'; }
[ -z "$(left)" ] || fail "something was left in /tmp: $(left)"

mapfile -t command < "$IMAGE_WORK/command"
inside qdm-deploy healthcheck > /dev/null 2>&1 && fail "healthcheck passes without a server"
# In a container tini is process 1; here the namespace has another.
enter TINI_SUBREAPER=1 "${command[@]}" > "$IMAGE_WORK/serve.out" 2> "$IMAGE_WORK/serve.log" &
server=$!
for _ in $(seq 120); do
    if inside qdm-deploy healthcheck --quiet > /dev/null 2>&1; then break; fi
    kill -0 "$server" 2> /dev/null || { cat "$IMAGE_WORK/serve.log" >&2; fail "the server ended"; }
    sleep 1
done
inside qdm-deploy healthcheck || { cat "$IMAGE_WORK/serve.log" >&2; fail "the server is not healthy after two minutes"; }
python3 "$IMAGE_SMOKE" http://127.0.0.1:8000 "$IMAGE_WORK/secrets/qdm_api_key" || { cat "$IMAGE_WORK/serve.log" >&2; fail "see above"; }

kill -TERM "$server"
code=0
wait "$server" || code=$?
[ "$code" = 0 ] || { cat "$IMAGE_WORK/serve.log" >&2; fail "SIGTERM ended the server with $code"; }
echo "doctor, verify, generate, serve, healthcheck, one request and SIGTERM: fine"
