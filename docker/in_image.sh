#!/usr/bin/env bash
# in_image.sh ROOT_FILE_SYSTEM UID SCRIPT [FOLDER=PLACE[:ro] ...]: runs a shell script as container engines do with --read-only,
# --cap-drop ALL, --security-opt no-new-privileges and --network none, but without one. Needs root.
#
# The image's files are read-only; /tmp is a new tmpfs, and each FOLDER is bound to PLACE, writable unless :ro follows. SCRIPT runs outside the
# image, in the new namespaces, and enters with `inside COMMAND ...`, or for good with `enter`: the environment is that of $IMAGE_ENV (one NAME=VALUE a
# line), the user UID, whom no passwd entry names.
set -euo pipefail

if [ -z "${IN_NAMESPACES:-}" ]; then
    IN_NAMESPACES=1 exec unshare --mount --pid --net --fork --kill-child -- "$0" "$@"
fi
root=$1 uid=$2 script=$3
shift 3

mount --make-rprivate /
mount --bind "$root" "$root"
for pair in "$@"; do
    place=$root${pair#*=}
    mkdir -p "${place%:ro}"
    mount --bind "${pair%%=*}" "${place%:ro}"
    [[ $place != *:ro ]] || mount -o remount,bind,ro "${place%:ro}"
done
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -o remount,bind,ro "$root/sys"
mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -m 1777 "$root/dev/shm"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
mount -o remount,bind,ro "$root"
# A network of its own with nothing but the loopback, and that is down at first.
python3 - <<'PYTHON'
import fcntl, socket, struct
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    fcntl.ioctl(probe, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
PYTHON

chroot=$(command -v chroot)
mapfile -t environment <<< "$IMAGE_ENV"
enter() {
    exec env --ignore-environment "${environment[@]}" "$chroot" "$root" setpriv --reuid "$uid" --regid "$uid" --clear-groups \
        --no-new-privs --bounding-set=-all --inh-caps=-all -- env --chdir=/data "$@"
}
inside() { (enter "$@"); }
# shellcheck source=/dev/null
source "$script"
